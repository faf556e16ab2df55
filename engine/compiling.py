"""torch.compile of a model, as one graph or block by block, and its results kept with a run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tritium.engine import checkpoint
from tritium.engine.model import GPT
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
        self.parts = {
            name: torch.compile(getattr(model, name), fullgraph=True, dynamic=False, mode=mode) for name in self.PARTS
        }

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
    bytes written, 0 where there is nothing to write. OSError where the disk does not take it.
    """
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        return 0
    checkpoint.write_whole(path, hashlib.sha256(found[0]).digest() + found[0])
    return len(found[0])


def load_cache(path: pathlib.Path) -> bool:
    """Give the compiler what ``save_cache`` wrote; whether there was such a file. What was compiled from other sources,
    by other versions or for another processor has another key, and is not used. ValueError for a file that is damaged.
    """
    if not path.exists():
        return False
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged: its checksum differs from its content")
    return torch.compiler.load_cache_artifacts(content[32:]) is not None
