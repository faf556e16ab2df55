"""torch.compile of a model, as one graph or block by block, and its results kept with a run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import pathlib
import platform
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tritium.engine import checkpoint, recompute
from tritium.engine.model import GPT
from tritium.kernels import op

# imported by the first compilation, and not by torch
MODULES = (
    "torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.compile_fx", "torch._inductor.codecache",
    "torch._inductor.async_compile",
)  # fmt: skip

BOTH = ("torch.fx.experimental.symbolic_shapes", "torch.utils.flop_counter", "torch.utils._device")  # by others too

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
        if isinstance(model.run_block, recompute.ByLayer):  # the number of a layer is not to be a graph's
            ways = {way: compile(way) for way in model.run_block.ways}
            self.parts["run_block"] = model.run_block.with_ways([ways[way] for way in model.run_block.ways])

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
    would be used, and be wrong, without a word. Likewise what is recomputed, which it knows by what is to be kept.
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
    """A digest of the Python sources of tritium.kernels and of recompute.py."""
    digest = hashlib.sha256(pathlib.Path(recompute.__file__).read_bytes())
    folder = pathlib.Path(op.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Beside:
    """The compiler, loaded in a thread beside what else a start does (checkpoint, data, weights): its modules, which
    take as long to import as torch itself, what ``save_cache`` wrote at ``cache``, and the digests of its own sources
    that its keys hold. on: False does nothing.

    Until ``wait`` returns nobody else may import or use the compiler's modules: two threads that import modules which
    import each other may see half of one.
    """

    def __init__(self, on: bool, cache: pathlib.Path | None):
        self.problem: ValueError | OSError | None = None
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._load, args=(cache,), name="compiler") if on else None

    def __enter__(self) -> Beside:
        if self.thread is not None:
            for name in BOTH:
                importlib.import_module(name)
            self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.thread is not None:
            self.thread.join()

    def _load(self, cache: pathlib.Path | None) -> None:
        try:
            for name in MODULES:
                importlib.import_module(name)
            _hash_the_compiler()
            if cache is not None:
                load_cache(cache)
        except (ValueError, OSError) as error:
            self.problem = error
        except BaseException as error:
            self.failure = error

    def wait(self) -> ValueError | OSError | None:
        """Returns once all is loaded: what was wrong with ``cache``, if anything. Any other error is raised here."""
        if self.thread is not None:
            self.thread.join()
        if self.failure is not None:
            raise self.failure
        return self.problem


@contextlib.contextmanager
def forgotten(on: bool) -> Iterator[None]:
    """What is compiled inside is forgotten afterwards; not by the caches on disk. Dynamo keeps all graphs of one
    function together, those of models that are gone too, and refuses the ninth: a process would end there that trains
    one configuration after the other.
    """
    try:
        yield
    finally:
        if on and (dynamo := sys.modules.get("torch._dynamo")) is not None:
            dynamo.reset()


def _hash_the_compiler() -> None:
    """Make torch compute, and remember, the digests of its and Triton's sources (0.4 s at the first compilation)."""
    from torch._inductor import codecache

    codecache.torch_key()
    if not torch.cuda.is_available():  # else it asks about the device, and this thread's need not be the process's
        codecache.CacheBase.get_system()


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
        archive.writestr("vectors", json.dumps(_vectors()))
        for kind, file in _libraries():
            archive.write(file, str(pathlib.PurePath(kind, file.parent.name, file.name)))
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
        written_on, artifacts = files.pop("machine"), files.pop("artifacts")
    except OSError:
        raise
    except Exception as error:  # by the bit that flipped: an unknown method, a password, a missing name, ...
        raise ValueError(f"{path} is damaged: {error}") from error
    if written_on.decode() != machine():
        return False
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = pathlib.Path(cache_dir())
    vectors = json.loads(files.pop("vectors", b"[]"))
    for name, content in files.items():
        kind, inner, file = pathlib.PurePath(name).parts  # written above
        target = folder / inner / file
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_whole(target, content)
        _know_library(kind, target)
    _know_vectors(vectors)
    return torch.compiler.load_cache_artifacts(artifacts) is not None


def _vectors() -> list[str]:
    """The vector instruction sets that the compiler has found to work here, by programs that it compiled and ran."""
    from torch._inductor import cpu_vec_isa

    valid: Any = cpu_vec_isa.valid_vec_isa_list
    return [str(isa) for isa in valid()] if valid.cache_info().currsize else []


def _know_vectors(known: list[str]) -> None:
    """Spare the compiler most of these programs, each a process, in which it asks for what it knew on this machine
    before: where every set of instructions that the processor has was found to work.
    """
    from torch._inductor import config, cpu_vec_isa

    if platform.machine() != "x86_64" or not known:
        return
    has = cpu_vec_isa.x86_isa_checker()
    if known == [str(isa) for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= set(has)]:
        with config.patch({"cpp.vec_isa_ok": True}):
            cpu_vec_isa.valid_vec_isa_list()  # which remembers


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


KINDS = ("CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache")  # of libraries, in torch's codecache


def _libraries() -> list[tuple[str, pathlib.Path]]:
    """(kind, file) of the C++ libraries of the compiler's cache that this process used; what torch's own artifacts
    leave out.
    """
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = pathlib.Path(cache_dir())
    used = {key: kind for kind in KINDS for key in getattr(codecache, kind).cache}
    found = []
    for file in folder.glob("*/*.so"):
        if kind := used.get(file.name.partition(".")[0]):
            found.append((kind, file))
        elif ".main." not in file.name:  # programs that ask what the processor and the compiler can do
            with contextlib.suppress(OSError):
                head = file.with_suffix(".cpp").read_text()
                if "_chk_kernel" in head or "CPU_CAPABILITY" in head:
                    found.append(("asking", file))
    return found


def _know_library(kind: str, path: pathlib.Path) -> None:
    """Give the compiler this library as one that it has compiled. It would find the file; but before it looks, it
    precompiles the header that it would compile with (some 10 s and 150 MB where that is not there yet).
    """
    from torch._inductor import codecache

    key = path.name.partition(".")[0]
    if kind in KINDS:
        cache = getattr(codecache, kind)
        cache.cache.setdefault(key, functools.cache(functools.partial(cache._load_library, str(path), key)))
