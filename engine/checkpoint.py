"""Checkpoints: torch.distributed.checkpoint's format, written atomically, checksummed, with everything a run needs to
go on.

A run folder holds ``checkpoints/step_00000100/``: DCP's files (fp32 weights, optimizer, random states), ``run.json``
(resolved config, kernel table, versions, position) and ``checksums.json`` (SHA-256 of every file, written last). A
checkpoint is written into a folder whose name starts with ``.`` and renamed when it is whole, so a kill at any moment
leaves either a good checkpoint or none. (DCP takes half a second to import, which is left to those who need it.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import platform
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritium.engine.config import Config, ConfigError
from tritium.engine.parallel import World

FORMAT = 1
_RUN, _SUMS = "run.json", "checksums.json"
BESIDE = "checkpoint"  # where a folder keeps another one


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or continued from."""


@dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint on disk. meta: the contents of run.json."""

    path: pathlib.Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def config(self) -> Config:
        return Config.from_json(json.dumps(self.meta["config"]))


def folder_of(out: pathlib.Path, step: int) -> pathlib.Path:
    return out / "checkpoints" / f"step_{step:08d}"


def save(out: pathlib.Path, state: dict[str, Tensor], meta: dict[str, Any], world: World, keep: int) -> pathlib.Path:
    """Write ``state`` (flat name → tensor; equal on every process except keys that carry a rank) and ``meta`` (JSON
    values, with "step" and "config") as the checkpoint of ``meta["step"]``; then drop all but the newest ``keep``.
    Every process calls it.

    Raises CheckpointError when the disk refuses; earlier checkpoints stay as they were.
    """
    final = folder_of(out, meta["step"])
    write(final, state, meta, world, f"the checkpoint of step {meta['step']}")
    if world.first:
        older = [path for path in candidates(out) if path != final]  # what was written just now is never what goes
        for old in older[keep - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return final


def write(
    final: pathlib.Path,
    state: dict[str, Tensor],
    meta: dict[str, Any],
    world: World,
    what: str,
    beside: pathlib.Path | None = None,
) -> None:
    """Write the folder ``final`` in a checkpoint's format, whole or not at all. Every process calls it.

    what: how an error calls it. beside: another such folder, kept in ``final / BESIDE`` (as links, where it can be).
    Raises CheckpointError when the disk refuses.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    temporary = final.with_name(f".{final.name}.tmp")

    def clear() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def fill() -> None:
        with _quiet():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), no_dist=world.size == 1)

    def seal() -> None:
        _write(
            temporary / _RUN,
            json.dumps({"format": FORMAT, "world_size": world.size, "versions": versions(), **meta}, indent=2),
        )
        sums = {p.name: _sha256(p) for p in sorted(temporary.iterdir())}
        _write(temporary / _SUMS, json.dumps(sums, indent=2))
        if beside is not None:
            shutil.copytree(beside, temporary / BESIDE, copy_function=_link)
        _sync_folder(temporary)
        if final.exists():  # the same step once more (a run that was resumed and stopped at once)
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(final.parent)

    for stage, everywhere in ((clear, False), (fill, True), (seal, False)):
        failure = None
        if everywhere or world.first:
            try:
                stage()
            except (Exception, CheckpointException) as error:  # DCP's own exception is a BaseException
                failure = _root(error)
        if world.any(failure is not None):  # agreed by all, so that no process waits for one that has given up
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"writing {what} into {final.parent} failed ({failure or 'on another process'}); earlier checkpoints "
                "are untouched. Free space, or choose another folder with --run.out"
            )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def candidates(out: pathlib.Path) -> list[pathlib.Path]:
    """Complete checkpoint folders of a run, newest first (a ``.tmp`` folder is not complete)."""
    return sorted((p for p in (out / "checkpoints").glob("step_*") if p.is_dir()), reverse=True)


def verify(path: pathlib.Path) -> Checkpoint:
    """Read and check one checkpoint folder; CheckpointError says which file is wrong and how."""
    try:
        sums = json.loads((path / _SUMS).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint of tritium: it has no {_SUMS}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / _SUMS} cannot be read ({error}), so the checkpoint cannot be trusted"
        ) from error
    if not isinstance(sums, dict):
        raise CheckpointError(f"{path / _SUMS} is no list of checksums, so the checkpoint cannot be trusted")
    for name, expected in sums.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete")
        actual = _sha256(file)
        if actual != expected:
            raise CheckpointError(f"{file} is damaged: SHA-256 is {actual[:12]}…, it was written as {expected[:12]}…")
    missing = {_RUN, ".metadata"} - set(sums)
    if missing:
        raise CheckpointError(
            f"{path / _SUMS} does not list {', '.join(sorted(missing))}, so the checkpoint cannot be trusted"
        )
    meta = json.loads((path / _RUN).read_text())
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {meta.get('format')}; this version of tritium reads format {FORMAT}"
        )
    return Checkpoint(path, meta)


def newest(out: pathlib.Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint of a run, None when there is none at all; each damaged one is warned about and
    passed over.

    CheckpointError when there are checkpoints and none is good: starting over silently would look like a resume.
    """
    problems = []
    for path in candidates(out):
        try:
            return verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"{error}; trying the one before it")
    if problems:
        raise CheckpointError(f"no checkpoint of {out} is usable:\n  " + "\n  ".join(problems))
    return None


def set_aside(out: pathlib.Path, used: Checkpoint) -> list[pathlib.Path]:
    """Rename the checkpoints newer than ``used``, which ``newest`` passed over, to ``damaged_step_…``; returns the new
    paths. A run that goes on from ``used`` would otherwise count them among the newest it keeps."""
    moved = []
    for path in candidates(out):
        if path.name > used.path.name:
            target = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name → size and dtype (DCP's TensorStorageMetadata) of every tensor in it."""
    import torch.distributed.checkpoint as dcp

    return dict(dcp.FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata)


def read(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    """Fill the tensors of ``state`` in place from the checkpoint's tensors of the same names."""
    import torch.distributed.checkpoint as dcp

    stored = contents(checkpoint)
    wrong = [f"{k} is missing" for k in state if k not in stored]
    for name, tensor in state.items():
        size = getattr(stored.get(name), "size", None)
        if size is not None and tuple(size) != tuple(tensor.shape):
            wrong.append(f"{name} has shape {tuple(size)}, the model expects {tuple(tensor.shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{checkpoint.path} does not fit this model: {'; '.join(wrong[:3])}{more}")
    with _quiet():
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint.path), no_dist=True)


@dataclass(frozen=True)
class Restored:
    """A trained model ready for inference: eval mode, fp32, unbound kernels (bind it to choose others)."""

    model: Any
    config: Config
    tokenizer: Any
    step: int
    path: pathlib.Path


def load_run(path: pathlib.Path | str, device: str = "cpu", warn: Callable[[str], None] = print) -> Restored:
    """The model of a run folder (its newest good checkpoint) or of one checkpoint folder. Raises CheckpointError."""
    from tritium.engine.data.tokenizer import load_tokenizer
    from tritium.engine.model import GPT

    path = pathlib.Path(path)
    if (path / _SUMS).exists():
        found, out = verify(path), path.resolve().parent.parent
    else:
        if not path.is_dir():
            raise CheckpointError(f"{path} does not exist: give a run folder (runs/NAME) or one of its checkpoints")
        newest_good = newest(path, warn)
        if newest_good is None:
            raise CheckpointError(
                f"{path} holds no checkpoint: give a run folder (runs/NAME) or one of its checkpoints"
            )
        found, out = newest_good, path
    config = found.config
    with torch.device(device):
        model = GPT(config.model)
    read(found, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return Restored(model.eval(), config, load_tokenizer(out / "tokenizer"), found.step, found.path)


# A checkpoint may be continued with other values of these only by starting a new run: they change what has been
# learned from what.
_FIXED = ("model.", "data.seed", "data.documents", "train.batch_rows", "train.seed")


def check_compatible(stored: Config, current: Config, path: pathlib.Path) -> None:
    """Raise ConfigError when ``current`` cannot continue a run of ``stored``."""
    from tritium.engine.config import differences

    changed = [d for d in differences(stored, current) if d.startswith(_FIXED)]
    if changed:
        raise ConfigError(
            f"{path} was trained with another configuration, so it cannot be continued with this one:\n"
            + "\n".join(f"  - {d}" for d in changed)
            + "\ngive these options their old values (`tritium train RUN_FOLDER` continues with all of them), "
            "or start a new run with --run.out OTHER_FOLDER"
        )


def random_state(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The generators of this process, under names that carry its rank."""
    state = {f"rng.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], rank: int, device: torch.device) -> None:
    torch.set_rng_state(state[f"rng.cpu.{rank}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[f"rng.cuda.{rank}"], device)


def versions() -> dict[str, str]:
    """What a bitwise comparison of two runs depends on."""
    import numpy

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: pathlib.Path, content: str | bytes) -> None:
    with path.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Replace a small file whole or not at all: a kill leaves the old one. Of several writers at one time each has a
    temporary file of its own, and the last one's content stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        _write(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _root(error: BaseException) -> str:
    """The reason in a failure's chain: the operating system's word where there is one (a full disk reaches us as DCP's
    CheckpointException around a RuntimeError around an OSError), else the innermost."""
    chain: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop(0)
        if one is None or one in chain:
            continue
        chain.append(one)
        queue += [failure[0] for failure in getattr(one, "failures", {}).values()]
        queue += [one.__cause__, one.__context__]
    reason = next((e for e in chain if isinstance(e, OSError) and e.errno), chain[-1])
    return f"{type(reason).__name__}: {reason}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns at every save and load of one process that it assumes a single process, which is what it was told."""
    logger = logging.getLogger("torch.distributed.checkpoint._dedup_save_plans")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
