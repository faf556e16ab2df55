"""torch.compile of a model, as one graph or block by block, and its results kept with a run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import pathlib
import platform
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tritium.engine import checkpoint
from tritium.engine.model import GPT
from tritium.engine.recompute import ByLayer
from tritium.kernels import op

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # ids, targets, seq_start → the summed loss


def compiled(model: GPT, scope: str, mode: str) -> Forward:
    """The training pass of ``model``, compiled without a graph break; it shares the model's parameters.

    scope: "model", one graph, which fuses across everything; "block", one graph for the embedding, one that all blocks
    share, one for the norm and the head: the compiler sees one block instead of all of them, so that the first step
    comes sooner, and nothing is fused across a block's ends. mode: torch.compile's.
    """
    _know_our_sources()
    if scope == "block":
        return _Parts(model, mode)
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)


class _Parts:
    """The pass with each of the model's parts compiled for itself."""

    PARTS = ("embed", "run_block", "finish")

    def __init__(self, model: GPT, mode: str):
        self.model = model
        compile = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
        self.parts: dict[str, Any] = {name: compile(getattr(model, name)) for name in self.PARTS}
        if isinstance(model.run_block, ByLayer):  # the number of a layer is not to be a graph's
            ways = {way: compile(way) for way in model.run_block.ways}
            self.parts["run_block"] = ByLayer([ways[way] for way in model.run_block.ways])

    def __call__(self, ids: Tensor, targets: Tensor, seq_start: Tensor | None = None) -> Tensor:
        with self._in_place():
            loss: Tensor = self.model(ids, targets, seq_start)
        return loss

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        # for the pass only: evaluation and sampling, of other shapes, use the same model eagerly
        block = self.model.run_block
        vars(self.model).update(self.parts)
        try:
            yield
        finally:
            for name in ("embed", "finish"):  # methods again
                del vars(self.model)[name]
            self.model.run_block = block


def _know_our_sources() -> None:
    """Make the sources of our kernels part of every key of the compiler's caches. It knows a custom op by its name, and
    keeps graphs that hold its traced backward and the shapes its fake promised: those of another version of tritium
    would be used, and be wrong, without a word.
    """
    import torch._functorch.config as functorch

    config: Any = torch.compiler.config
    tag = f"tritium {sources()}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {tag}".strip()
        known: Any = functorch
        known.autograd_cache_allow_custom_autograd_functions = True  # the graph holds all that ours does


@functools.cache
def sources() -> str:
    """A digest of the Python sources of tritium.kernels."""
    digest = hashlib.sha256()
    folder = pathlib.Path(op.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def save_cache(path: pathlib.Path) -> int:
    """Write what this process compiled, for ``load_cache`` here or on another machine of the same kind; returns the
    bytes written, 0 where nothing was compiled. OSError where the disk does not take it.
    """
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        return 0
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("machine", machine())
        archive.writestr("artifacts", found[0])
        for file in _libraries():
            archive.write(file, str(pathlib.PurePath("libraries", file.parent.name, file.name)))
    checkpoint.write_whole(path, content.getvalue())
    return len(content.getvalue())


def load_cache(path: pathlib.Path) -> bool:
    """Give the compiler what ``save_cache`` wrote; whether it is of use here: there is such a file, from a machine of
    this kind. What was compiled from other sources or with other settings has another key, and is not used. ValueError
    for a file that is damaged.
    """
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}  # each is held to its checksum
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if files.pop("machine", b"").decode() != machine():
        return False
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = pathlib.Path(cache_dir())
    artifacts = files.pop("artifacts")
    for name, content in files.items():
        _, inner, file = pathlib.PurePath(name).parts  # written above: one folder deep
        target = folder / inner / file
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_whole(target, content)
    return torch.compiler.load_cache_artifacts(artifacts) is not None


def machine() -> str:
    """What a library depends on that was compiled here for this very processor, of which its key knows little."""
    flags = model = ""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            if name.strip() in ("flags", "Features"):
                flags = hashlib.sha256(value.encode()).hexdigest()[:16]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return json.dumps([platform.machine(), model, flags, platform.libc_ver(), sys.version, torch.__version__, gpu])


def _libraries() -> list[pathlib.Path]:
    """The C++ libraries of the compiler's cache that this process used; what torch's own artifacts leave out."""
    from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache, CppWrapperCodeCache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = pathlib.Path(cache_dir())
    used = {key for cache in (CppCodeCache, CppPythonBindingsCodeCache, CppWrapperCodeCache) for key in cache.cache}
    found = []
    for file in folder.glob("*/*.so"):
        if file.name.partition(".")[0] in used:
            found.append(file)
        elif ".main." not in file.name:  # programs that ask what the processor and the compiler can do
            with contextlib.suppress(OSError):
                head = file.with_suffix(".cpp").read_text()
                if "_chk_kernel" in head or "CPU_CAPABILITY" in head:
                    found.append(file)
    return found
