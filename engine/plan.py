"""Memory and time of a training step before it runs: ``tritium plan``, ``train.micro_rows=0``, and advice when memory
has run out.

The engine that ``tritium train`` would build is built on tensors without contents and takes its steps: weights,
optimizer, forward, backward, clip, update, with the kernels that the machine in question would be given; the machine
need not be there. Every storage is seen being made and freed, those inside our kernels' launchers too, and what the
allocator does with that is replayed by its own rules. Nothing in it is fitted to a measurement; what torch's and the
vendors' libraries take inside a call is not seen.

    parameters   what the model computes with       masters      their fp32 originals, where they are narrower
    moments      AdamW's two, as optim.moments says gradients    from the moment they exist until the update is done
    activations  kept by forward for backward       logits       of the rows whose logits exist at one time
    temporary    inside an op or between two; what is computed again; the update's
    workspace    cuBLAS's                           holes        free, and of no use to what is asked for next

What recompute=offload moves to the host's memory is counted apart from these (Row.host_bytes), and its copies' time
where forward and backward are too short for it.

A compiled step is seen through the graphs that Inductor is given (engine/graphs.py). Time is a roofline: the work of
every call site by its op's ``cases.py``, forward, backward and computed again, at the rates of kernels/peaks.py; what
lies between the call sites is counted as fused into them, and the host as never late. Products in fp8 are counted at
bf16's rate. It is a bound and ranks settings; it does not forecast tokens/s.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritium.engine import allocator, graphs
from tritium.engine.config import Config, ConfigError, data_folder
from tritium.engine.offload import STAY, Offloaded
from tritium.engine.parallel import World
from tritium.kernels import op, peaks
from tritium.kernels.autograd import LAUNCHERS, NAMESPACE
from tritium.kernels.case import Case
from tritium.kernels.lib import native
from tritium.kernels.op import CallSite
from tritium.kernels.site import Machine, interpreting

if TYPE_CHECKING:
    from tritium.engine.step import MicroBatch
    from tritium.engine.train import Engine

POLICIES = ("none", "selective", "every", "full", "budget", "offload")
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "int8": 2}  # of a parameter
KINDS = ("parameters", "masters", "moments", "gradients", "activations", "logits", "temporary", "workspace", "holes")
# how far the plan may be off: the worst error that tests and `python -m tritium.benchmarks.memory` allow it
MARGIN = 0.10
# the same where freed memory is kept in glibc's heap and not in ours: small objects lie between the blocks and cut its
# holes up, and which ones no plan sees; 1.07 was measured (docs/log.md, 2026-11-29)
HOLES_MARGIN = 1.25
# bytes/s in one direction between GPUs of one board, half of what the datasheets call NVLink's bandwidth
LINKS = {"A100": 300e9, "H100": 450e9, "H200": 450e9, "B200": 900e9}
# bytes/s in one direction to the host, half of what the datasheets call the interconnect's bandwidth: PCIe 4 and 5
HOST_LINKS = {"A100": 32e9, "H100": 64e9, "H200": 64e9, "B200": 64e9}
GPUS = tuple(peak.name.split()[0].lower() for peak in peaks.PEAKS)


class OutOfMemory(RuntimeError):
    """A run took more memory than there is; the message says which settings would fit."""


# ------------------------------------------------------------------------------------------------------------ a machine


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a run is to take place. memory: bytes that it may use there on each device. rates: what it computes and
    moves. link: bytes/s between devices in one direction; host_link: to the host. kept: on a CPU, in which
    heap freed memory stays, where it lies in holes: "native", "glibc" or none (engine/allocator.py's policy)."""

    machine: Machine
    memory: int
    rates: peaks.Peak
    link: float = math.inf
    kept: str = ""
    host_link: float = math.inf

    @property
    def name(self) -> str:
        return self.rates.name

    @property
    def margin(self) -> float:
        """Part of a plan that must be free beside it."""
        return HOLES_MARGIN if self.kept == "glibc" else MARGIN

    @staticmethod
    def gpu(name: str) -> Target:
        """One of GPUS; its memory is the number in its datasheet's name, times 10⁹: what the board has beyond that is
        left to CUDA's context."""
        peak = next(peak for peak in peaks.PEAKS if peak.name.split()[0].lower() == name)
        triton = Machine("cuda", peak.arch).version("triton")
        packages = {"triton": triton} if triton else {}
        machine = Machine("cuda", peak.arch, f"NVIDIA {peak.name.split()[0]}", packages=packages)
        name = peak.name.split()[0]
        memory = int(peak.name.split()[-2]) * 10**9
        return Target(machine, memory, peak, LINKS[name], host_link=HOST_LINKS[name])

    @staticmethod
    def here(device: torch.device, dtype: torch.dtype, all_of_it: bool = False) -> Target:
        """This machine with its free memory (``all_of_it``: as if nothing else were there yet). A CPU's rates are
        measured, in half a second."""
        machine = Machine.here(device)
        if device.type == "cuda":
            from tritium.engine.recompute import peak_of

            free, total = torch.cuda.mem_get_info(device)
            peak = peak_of(machine)
            name = peak.name.split()[0]
            links = LINKS.get(name, math.inf), HOST_LINKS.get(name, math.inf)
            return Target(machine, total if all_of_it else free, peak, links[0], host_link=links[1])
        left = allocator.available_bytes()
        if left is None:
            raise ConfigError(
                "how much memory this machine has free cannot be found out, so nothing says what fits: give "
                "tritium plan --memory_gb, or train.micro_rows above 0"
            )
        used = allocator.resident_bytes() if all_of_it else 0
        return Target(machine, left + used, _rates_here(dtype), kept=allocator.policy())


def _rates_here(dtype: torch.dtype) -> peaks.Peak:
    """A CPU's, measured now."""
    from tritium.engine import metrics

    matrix = metrics.matmul_rate(torch.device("cpu"), dtype, 512, 768, 768, seconds=0.2)
    x, y = torch.ones(1 << 24), torch.empty(1 << 24)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - start)
    copy = 2 * x.nbytes / min(times)
    return peaks.Peak("this CPU", "", matrix, matrix, copy, 1, 1e15, "measured", matrix, copy, "now")


# ---------------------------------------------------------------------------------------------------------------- trace


class Tracer(TorchDispatchMode):
    """Every storage that is made while it is at work: its size, its kind, when it came and when it went; and which
    call sites computed how often, forward and again.

    The ops of our kernels run their launchers, on tensors without contents, so that what is made inside them counts.
    ``opaque``: ops whose launcher cannot run so (it reads a value): of these only the results count.
    """

    def __init__(self, vocabulary: tuple[int, int]):
        super().__init__()
        self.vocabulary = vocabulary
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.events: list[tuple[int, str]] = []  # (storage's number + 1, negative where it is freed; phase)
        self.phase = "build"
        self.calls: dict[tuple[str, int, str], int] = collections.defaultdict(int)  # path, rows, phase
        self.counting = True
        self.opaque: set[str] = set()
        self._open: dict[int, int] = {}
        self._foreign: set[int] = set()
        self._blind = False

    def foreign(self, value: Any) -> Any:
        """Tensors like these, which are none of the run's."""
        self._blind = True
        try:
            return graphs.like(value)
        finally:
            self._blind = False

    def on_host(self, size: int) -> Tensor:
        """So many bytes of the host's memory, which are none of the device's."""
        self._blind = True
        try:
            return torch.empty(size, dtype=torch.uint8)
        finally:
            self._blind = False

    def mark(self, values: object, kind: str) -> None:
        """Say what the storages of these tensors are."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (number := self._open.get(tensor.untyped_storage()._cdata)) is not None:
                self.kinds[number] = kind

    def forward_ends(self) -> None:
        """What forward made and is still there is kept for backward; a gradient of a table as wide as the vocabulary,
        which the loss made ahead, is one already."""
        for number in self._open.values():
            if self.kinds[number] == "forward":
                self.kinds[number] = "activations"
            elif self.kinds[number] == "early gradient":
                self.kinds[number] = "gradients"
        self.kinds = ["temporary" if kind in ("forward", "early gradient") else kind for kind in self.kinds]

    @contextlib.contextmanager
    def watching(self, sites: Mapping[str, CallSite]) -> Iterator[None]:
        """Count what the call sites compute: a call whose result a policy has kept makes nothing and is none."""

        def watched(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                before = len(self.sizes)
                try:
                    return function(*args, **kwargs)
                finally:  # a recomputation ends by an exception once it has all it needs
                    if self.counting and len(self.sizes) > before:
                        self.calls[path, _rows(args), self.phase] += 1

            return call

        functions = {path: site.function for path, site in sites.items()}
        for path, site in sites.items():
            site.function = watched(path, site.function)
        try:
            yield
        finally:
            for path, site in sites.items():
                site.function = functions[path]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().rpartition("::")
        launcher = LAUNCHERS.get(name.partition(".")[0]) if namespace == NAMESPACE else None
        if launcher is None:
            result = function(*args, **(kwargs or {}))
        else:
            try:
                with self:
                    result = launcher(*args, **(kwargs or {}))
            except Exception:  # a launcher may ask for values, which there are none of
                self.opaque.add(name)
                result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._made(tensor)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._open or storage._cdata in self._foreign or storage.nbytes() == 0:
            return
        if self._blind:
            self._foreign.add(storage._cdata)
            weakref.finalize(storage, self._foreign.discard, storage._cdata)
            return
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        kind = "forward" if self.phase == "forward" else "temporary"
        if tensor.dim() == 2 and self.phase != "build" and tensor.is_floating_point():
            if tensor.shape[1] in self.vocabulary and tensor.shape[0] != self.vocabulary[1]:
                kind = "logits"
            elif self.phase == "forward" and tensor.shape[0] == self.vocabulary[1]:
                kind = "early gradient"
        self.kinds.append(kind)
        self.events.append((number + 1, self.phase))
        self._open[storage._cdata] = number
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.events.append((-self._open.pop(key) - 1, self.phase))


def _rows(args: Sequence[Any]) -> int:
    """Rows of a call: of ids their number, of anything else that of its vectors."""
    x = args[0]
    if not isinstance(x, Tensor) or x.numel() == 0:
        return 0
    return x.numel() if not x.is_floating_point() else x.numel() // x.shape[-1]


@dataclasses.dataclass
class Trace:
    """What was seen of a run's start: build, then steps.

    sizes, kinds: of each storage. events: see Tracer. calls: (path, rows, phase) → how often a site computed in the
    first micro-batch; phase "forward", or "backward" where it computed again. sites: by path. host_bytes: of the host's
    memory that is held; moved_bytes: to it and back in one micro-batch.
    """

    sizes: list[int]
    kinds: list[str]
    events: list[tuple[int, str]]
    calls: dict[tuple[str, int, str], int]
    sites: dict[str, CallSite]
    dtype: torch.dtype
    gradient_bytes: int
    update_bytes: int
    opaque: tuple[str, ...]
    host_bytes: int = 0
    moved_bytes: int = 0
    accumulated_bytes: int = 0
    unheeded: str = ""  # of the settings: what changes nothing

    def moments(self, round_to: int = 1) -> list[tuple[str, dict[str, int]]]:
        """(phase, bytes by kind) where most is alive in each quarter of each run through a phase; so it has as many
        entries for any number of layers. round_to: what a block's size is rounded up to."""
        runs: list[tuple[str, list[int]]] = []
        for event, phase in self.events:
            if not runs or runs[-1][0] != phase:
                runs.append((phase, []))
            runs[-1][1].append(event)
        found = []
        now, kinds = 0, dict.fromkeys(KINDS, 0)
        for phase, events in runs:
            for quarter in range(4):
                best, at = now, dict(kinds)
                for event in events[quarter * len(events) // 4 : (quarter + 1) * len(events) // 4]:
                    number = abs(event) - 1
                    size = -(-self.sizes[number] // round_to) * round_to
                    size = size if event > 0 else -size
                    now += size
                    kinds[self.kinds[number]] += size
                    if now > best:
                        best, at = now, dict(kinds)
                found.append((phase, at))
        return found

    def peak(self, round_to: int = 1) -> tuple[int, dict[str, int], str]:
        """(bytes alive at most, of which kinds, in which phase)."""
        return _most(self.moments(round_to))


def _most(moments: Sequence[tuple[str, dict[str, int]]]) -> tuple[int, dict[str, int], str]:
    phase, kinds = max(moments, key=lambda moment: sum(moment[1].values()))
    return sum(kinds.values()), dict(kinds), phase


class _Apart(World):
    """One process of several that are not there: it packs and unpacks what it would send."""

    def any(self, flag: bool) -> bool:
        return flag

    def share(self, value: object) -> object:
        return value

    def barrier(self) -> None:
        pass

    def _all_reduce(self, tensor: Tensor) -> None:
        pass


@contextlib.contextmanager
def _launchers_run(machine: Machine) -> Iterator[None]:
    """Launchers compute nothing: Triton's launches are recorded, C++ functions are not called, and a tensor without
    contents has an address."""
    call = native.Function.__call__

    def pretended(self: native.Function, *args: object) -> Any:
        if self.name in ("attention_scratch", "global_norm_chunks"):  # they see sizes alone
            return call(self, *args)
        return -1 if self.result else None  # "no row is bad"

    with contextlib.ExitStack() as stack:
        if machine.device == "cuda" and machine.version("triton") is not None and not interpreting():
            from tritium.kernels import aot

            stack.enter_context(aot.compiling_for(machine.arch, compile=False))
        native.Function.__call__ = pretended  # type: ignore[method-assign]
        FakeTensor.data_ptr = lambda self: 0  # type: ignore[method-assign]
        try:
            yield
        finally:
            native.Function.__call__ = call  # type: ignore[method-assign]
            del FakeTensor.data_ptr


def vocabulary(config: Config) -> int:
    """model.vocab_size, or where training takes it from the data (0) the ids of its tokenizer: that of the prepared
    folder, or the one by which the folder would be prepared. DataError where there is no such tokenizer."""
    if config.model.vocab_size:
        return config.model.vocab_size
    from tritium.engine.data import tokenizer
    from tritium.engine.data.prepare import is_prepared

    folder, spec = data_folder(config), config.data.tokenizer
    if is_prepared(folder):
        return tokenizer.load_tokenizer(folder).vocab_size
    if spec == "gpt2":
        return 50257  # loading it may fetch it
    return tokenizer.bpe_size(spec) or tokenizer.load_tokenizer(spec).vocab_size


def settled(config: Config, machine: Machine) -> Config:
    """With nothing left to ask the device or the data: a precision for "auto", whether it is deterministic, and the
    vocabulary."""
    t = config.train
    cuda = machine.device == "cuda"
    precision = t.precision
    if precision == "auto" and cuda:
        precision = "bf16" if machine.capability >= 80 else "fp32"
    elif precision == "auto":
        from tritium.engine.precision import resolve

        precision = "bf16" if resolve("auto", torch.device("cpu")) == torch.bfloat16 else "fp32"
    deterministic = t.deterministic if t.deterministic != "auto" else ("false" if cuda else "true")
    return config.replace(
        model={"vocab_size": vocabulary(config)},
        train={"precision": precision, "deterministic": deterministic},
    )


def trace(config: Config, machine: Machine, processes: int = 1, steps: int = 1, compiled: bool = False) -> Trace:
    """The start of the run ``config`` (settled) on one of ``processes`` like devices, on tensors without contents: the
    engine is built and takes ``steps`` steps of at most two micro-batches each. Raises what train.build does.

    compiled: forward and backward are those that Inductor would make (engine/graphs.py), and no call is counted.
    """
    from tritium.engine import train
    from tritium.engine.step import train_step

    c, t = config.model, config.train
    tracer = Tracer((c.vocab_size, c.padded_vocab_size))
    world = _Apart(size=processes)
    parts = min(2, t.batch_rows // (t.micro_rows * processes))  # more of them take no more memory than two
    # a captured step is looked at as the plain one: what it captures is that
    graphs_of_a_gpu = "false" if machine.device == "cuda" else t.cuda_graphs
    config = config.replace(train={"batch_rows": t.micro_rows * processes * parts, "cuda_graphs": graphs_of_a_gpu})
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_launchers_run(machine))
        stack.enter_context(train.determinism(t.deterministic == "true" and machine.device == "cpu"))
        with tracer:
            engine = train.build(config, world, compile=compiled, machine=machine)
        groups = engine.optimizer.groups
        tracer.mark([list(engine.model.parameters()), list(engine.model.buffers())], "parameters")
        for group in groups:
            tracer.mark(group.params, "masters" if group.copies else "parameters")
            tracer.mark([group.exp_avgs, group.exp_avg_sqs, group.scales], "moments")
        sites = dict(_named_sites(engine))
        offloaded = engine.model.run_block
        if isinstance(offloaded, Offloaded):
            offloaded.place = tracer.on_host
        if compiled:
            _replay(tracer, engine, _batch(config), machine)
        _phases(tracer, engine)
        with tracer, tracer.watching(sites):
            lr, inverse_count = torch.zeros(()), torch.full((), 1.0 / config.batch_tokens)
            for _ in range(steps):
                tracer.phase = "data"
                batches = [_batch(config) for _ in range(parts)]
                train_step(engine.loss, engine.optimizer, batches, lr, inverse_count, world)
        leaves = [leaf for group in groups for leaf in group.leaves]
        parameters = sum(p.numel() for group in groups for p in group.params)
        copies = sum(p.nbytes for group in groups for p in group.copies)
        moments = sum(m.nbytes for m in tree_leaves([(g.exp_avgs, g.exp_avg_sqs, g.scales) for g in groups]))
        gradients, accumulated = engine.optimizer.gradient_bytes, engine.optimizer.accumulated_bytes
        unheeded = train.unheeded_chunk(engine.model, config)
        host = (offloaded.host_bytes, offloaded.moved_bytes) if isinstance(offloaded, Offloaded) else (0, 0)
        del engine, batches, leaves, groups, offloaded
    # a master and two moments read and written, the gradient read twice (norm and update), the copy written
    return Trace(
        tracer.sizes, tracer.kinds, tracer.events, dict(tracer.calls), sites, _dtype(config), gradients,
        parameters * 8 + 2 * moments + 2 * gradients + copies, tuple(sorted(tracer.opaque)),
        *host, accumulated, unheeded,
    )  # fmt: skip


def _batch(config: Config) -> MicroBatch:
    from tritium.engine.step import MicroBatch

    shape = (config.train.micro_rows, config.model.block_size)
    ids, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    return MicroBatch(ids, targets, torch.zeros(shape, dtype=torch.int32) if config.data.documents else None)


def _replay(tracer: Tracer, engine: Engine, batch: MicroBatch, machine: Machine) -> None:
    """Put the compiler's graphs in the place of the engine's loss."""
    found = graphs.capture(engine.model, (batch.ids, batch.targets, batch.seq_start))
    engine.optimizer.zero_grad()
    replays = tuple(graphs.Replay(graph, machine.device == "cpu") for graph in (found.forward, found.backward))
    leaves = [leaf for group in engine.optimizer.groups for leaf in group.leaves]
    engine.loss = lambda batch: graphs.Stub.apply(replays, tracer.foreign, *leaves)


def _named_sites(engine: Engine) -> Iterator[tuple[str, CallSite]]:
    for path, site in op.call_sites(engine.model):
        yield f"{path}:{site.op.name}", site


def _dtype(config: Config) -> torch.dtype:
    """What a ``settled`` configuration computes in between its call sites; fp8 is bf16 with other matrix products."""
    return torch.float32 if config.train.precision == "fp32" else torch.bfloat16


def _phases(tracer: Tracer, engine: Engine) -> None:
    """Tell the tracer where in a step it is: ``train_step`` calls the loss, its backward, then the optimizer."""
    loss, step = engine.loss, engine.optimizer.step

    def gradients() -> list[Tensor | None]:
        return [leaf.grad for group in engine.optimizer.groups for leaf in group.leaves]

    def forward(batch: Any) -> Tensor:
        tracer.mark(gradients(), "gradients")
        tracer.counting = tracer.phase == "data" and not tracer.calls  # the first micro-batch of the first step
        tracer.phase = "forward"
        result = loss(batch)
        tracer.forward_ends()
        tracer.phase = "backward"
        return result

    def update(*args: Any, **kwargs: Any) -> Any:
        tracer.mark(gradients(), "gradients")
        tracer.counting, tracer.phase = False, "update"
        return step(*args, **kwargs)

    engine.loss = forward
    engine.optimizer.step = update  # type: ignore[method-assign]


# ----------------------------------------------------------------------------------------------------------- allocators


class Heap:
    """Memory in segments, given out best fit first, neighbours that are free joined: what glibc's malloc does for large
    blocks, and what torch's CUDA allocator does.

    unit: what a block's size is rounded up to. header: bytes that it has beside what was asked for; slack: that it
    must have while it is looked for, and which are given back. split: a rest of fewer bytes stays with the block.
    segment: bytes of a new segment for a request; None: there is one, which grows at its end and does not shrink.
    """

    def __init__(
        self, unit: int, header: int = 0, slack: int = 0, split: int = 32, segment: Callable[[int], int] | None = None
    ):
        self.unit, self.header, self.slack, self.split, self.segment = unit, header, slack, split, segment
        self.free: list[tuple[int, int]] = []  # (start, size), by start
        self.taken: dict[int, tuple[int, int]] = {}
        self.ends: set[int] = set()  # of segments: free blocks do not join across
        self.top = 0  # where the one segment is free to its end
        self.size = 0  # of all segments: never falls
        self.starts: set[int] = set()  # of segments
        self.idle = 0  # bytes of segments that are free from end to end

    def take(self, key: int, size: int) -> None:
        need = -(-(size + self.header) // self.unit) * self.unit
        holes = [(length, start) for start, length in self.free if length >= need + self.slack]
        if holes:
            length, start = min(holes)
            self.free.remove((start, length))
            self.idle -= length if self._whole(start, length) else 0
        elif self.segment is None:
            start, length = self.top, need + self.slack
            self.top += length
            self.size = max(self.size, self.top)
        else:
            start, length = self.size, self.segment(need)
            self.size += length
            self.starts.add(start)
            self.ends.add(self.size)
        if length - need >= self.split:
            self._insert(start + need, length - need)
            length = need
        self.taken[key] = (start, length)

    def give(self, key: int) -> None:
        self._insert(*self.taken.pop(key))

    def _insert(self, start: int, length: int) -> None:
        at = bisect.bisect(self.free, (start, length))
        if at < len(self.free) and self.free[at][0] == start + length and start + length not in self.ends:
            length += self.free.pop(at)[1]
        if at > 0 and sum(self.free[at - 1]) == start and start not in self.ends:
            at -= 1
            before = self.free.pop(at)
            start, length = before[0], before[1] + length
        if self.segment is None and start + length == self.top:
            self.top = start
        else:
            self.free.insert(at, (start, length))
            self.idle += length if self._whole(start, length) else 0

    def _whole(self, start: int, length: int) -> bool:
        return start in self.starts and start + length in self.ends


MIB = 1 << 20
NATIVE_SMALLEST = MIB // 4  # bytes of a block of the native heap (SMALLEST of kernels/lib/csrc/heap.cpp)


def held(found: Trace, target: Target) -> int:
    """Bytes that the process (on a CPU) or torch's allocator (on a GPU) holds at most for the blocks of the trace.

    glibc, with freed memory kept: blocks of 16 bytes with a header of 8, and 64 + 32 more while one is looked for that
    is aligned to 64, as torch asks; from 256 KiB on the native library's, where there is one: units of 64, and 64 more
    between two (kernels/lib/csrc/heap.cpp). Without, what is freed is gone and all is as alive. torch on CUDA: blocks
    in units of 512 bytes, those up to 1 MiB from segments of 2 MiB, those below 10 MiB from segments of 20 MiB, larger
    ones from their own in units of 2 MiB; of the larger ones a rest of up to 1 MiB is not split off. Segments that are
    free from end to end do not count: it gives them back to the device before it says that memory is out.
    """
    least = MIB + 1  # of the large ones
    if target.machine.device == "cuda":
        small = Heap(512, split=512, segment=lambda need: 2 * MIB)
        large = Heap(
            512, split=MIB + 512, segment=lambda need: 20 * MIB if need < 10 * MIB else -(-need // (2 * MIB)) * 2 * MIB
        )
    elif target.kept:
        small = large = Heap(16, header=8, slack=96)
        if target.kept == "native":
            large, least = Heap(64, header=64, split=64), NATIVE_SMALLEST
    else:
        return found.peak()[0]
    heaps = {id(heap): heap for heap in (small, large)}.values()
    most = 0
    for event, _ in found.events:
        number = abs(event) - 1
        heap = large if found.sizes[number] >= least else small
        if event > 0:
            heap.take(number, found.sizes[number])
        else:
            heap.give(number)
        most = max(most, sum(heap.size - heap.idle for heap in heaps))
    return most


def workspace(machine: Machine) -> int:
    """What torch gives cuBLAS to work in, which its allocator counts: 32 MiB from sm_90 on, 8 MiB and 128 KiB before
    (ATen/cuda/CublasHandlePool.cpp)."""
    if machine.device == "cpu":
        return 0
    return 32 * MIB if machine.capability >= 90 else 8 * MIB + (128 << 10)


# ----------------------------------------------------------------------------------------------------------------- time


def seconds(config: Config, found: Trace, target: Target, processes: int = 1) -> dict[str, float]:
    """The least seconds of one optimizer step, by part: forward, backward, again (computed a second time), update,
    accumulate (adding to gradients that are there), communicate (their sum over all processes, by a ring), and, where
    there is any, transfer (copies to the host and back, as far as forward and backward are shorter)."""
    micro_batches = config.train.batch_rows // (config.train.micro_rows * processes)
    parts = dict.fromkeys(("forward", "backward", "again", "update", "accumulate", "communicate"), 0.0)
    for (path, rows, phase), count in found.calls.items():
        site = found.sites[path]
        case = _case(config, site, rows)
        if case is None:
            continue
        dtype = site.dtype or found.dtype
        forward = peaks.bound(site.op, case, dtype, "forward", target.rates)[0] / 1e3
        if phase == "forward":
            parts["forward"] += micro_batches * count * forward
            backward = peaks.bound(site.op, case, dtype, "backward", target.rates)[0] / 1e3
            parts["backward"] += micro_batches * count * backward
        else:
            parts["again"] += micro_batches * count * forward
    parts["update"] = found.update_bytes / target.rates.reached_copy
    parts["accumulate"] = (micro_batches - 1) * found.accumulated_bytes / target.rates.reached_copy
    if found.moved_bytes:
        copy = micro_batches * found.moved_bytes / target.host_link
        parts["transfer"] = max(0.0, copy - parts["forward"]) + max(0.0, copy - parts["backward"])
    parts["communicate"] = 2 * (processes - 1) / processes * found.gradient_bytes / target.link
    return parts


def _case(config: Config, site: CallSite, rows: int) -> Case | None:
    """The case of the site's op that this call was; None where the op's cases have sizes that are not known here."""
    m, t = config.model, config.train
    B, T = t.micro_rows, m.block_size
    R = int(m.head_width * m.rope_fraction) // 2 * 2
    known = {
        "B": B, "T": T, "Tq": T, "Tk": T, "N": rows, "H": m.n_head, "G": m.kv_heads, "D": m.head_width, "R": R,
    }  # fmt: skip
    letters = {letter for case in site.op.cases.CASES for letter in case.shape}
    if letters >= {"B", "T"}:  # an op whose cases have rows either way
        letters.discard("N")
    shape = {k: v for k, v in {**known, **site.shape}.items() if k in letters}
    return Case("step", shape) if letters <= shape.keys() else None


# ----------------------------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting: what it takes. bytes: the peak by kind. phase: where in the step it is reached. seconds: of a step,
    by part (see ``seconds``). host_bytes: of the host's pinned memory."""

    settings: dict[str, Any]  # fields of train, and optim's moments
    bytes: dict[str, int]
    phase: str
    seconds: dict[str, float]
    fits: bool
    opaque: tuple[str, ...] = ()
    host_bytes: int = 0
    unheeded: str = ""

    @property
    def moments(self) -> str:
        return self.settings.get("moments", "fp32")

    @property
    def micro_rows(self) -> int:
        return self.settings["micro_rows"]

    @property
    def policy(self) -> str:
        s = self.settings
        if s["recompute"] == "every":
            return f"every {s['recompute_every']}"
        if s["recompute"] == "budget":
            return f"budget {s['recompute_budget_gb']:g} GB"
        if s["recompute"] == "offload" and s["recompute_budget_gb"]:
            return f"offload, {s['recompute_budget_gb']:g} GB stay"
        return s["recompute"]

    @property
    def peak(self) -> int:
        return sum(self.bytes.values())

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def flags(self) -> str:
        """For ``tritium train``."""
        needed = {"every": "recompute_every", "budget": "recompute_budget_gb"}.get(self.settings["recompute"])
        if self.settings["recompute"] == "offload" and self.settings["recompute_budget_gb"]:
            needed = "recompute_budget_gb"
        names = ["recompute", *([needed] if needed else []), "micro_rows"]
        flags = [f"--train.{name} {self.settings[name]}" for name in names]
        if self.settings["recompute"] == "offload":
            flags.insert(1, "--train.compile_scope block")
        if self.moments != "fp32":
            flags.append(f"--optim.moments {self.moments}")
        return " ".join(flags)


@dataclasses.dataclass(frozen=True)
class Plan:
    """rows: every setting that was looked at. chosen: the fastest that fits, None where none does."""

    config: Config
    target: Target
    processes: int
    rows: tuple[Row, ...]
    chosen: Row | None
    why: str
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a trace shows of one setting; all of it grows evenly with the number of layers."""

    moments: list[tuple[str, dict[str, int]]]
    held: int
    seconds: dict[str, float]
    opaque: tuple[str, ...]
    host_bytes: int
    unheeded: str


def _look(config: Config, target: Target, processes: int, compiled: bool) -> _Look:
    steps = 2 if target.kept else 1  # what the first leaves behind changes where in a heap the second's blocks go
    found = trace(config, target.machine, processes, steps, compiled)
    if compiled:
        found.calls.update(trace(config, target.machine, processes).calls)
    moments = found.moments(1 if target.machine.device == "cpu" else 512)
    times = seconds(config, found, target, processes)
    return _Look(moments, held(found, target), times, found.opaque, found.host_bytes, found.unheeded)


def _layers(config: Config) -> tuple[int, int]:
    """Two numbers of layers from which that of ``config`` follows in a straight line; equal where it is small, or where
    blocks differ in no regular way."""
    L, t = config.model.n_layer, config.train
    period = t.recompute_every if t.recompute == "every" else 1
    first = 3 * period + L % period
    return (L, L) if t.recompute == "budget" or first + 2 * period >= L else (first, first + period)


def measure(config: Config, target: Target, processes: int = 1, compiled: bool = False) -> Row:
    """What one setting takes: ``config`` (settled) as it is. compiled: as torch.compile would make it; of many layers
    two small numbers are then looked at."""
    L, (low, high) = config.model.n_layer, _layers(config)
    compiled = compiled and config.train.recompute != "offload"  # its hooks are around blocks, which is seen eagerly
    if not compiled or low == high:
        look = _look(config, target, processes, compiled)
    else:
        a, b = (_look(config.replace(model={"n_layer": n}), target, processes, compiled) for n in (low, high))
        share = (L - low) / (high - low)

        def line(x: float, y: float) -> float:
            return x + share * (y - x)

        moments = [
            (phase, {kind: max(0, round(line(size, y[kind]))) for kind, size in x.items()})
            for (phase, x), (_, y) in zip(a.moments, b.moments, strict=True)
        ]
        times = {part: line(x, b.seconds[part]) for part, x in a.seconds.items()}
        look = _Look(moments, round(line(a.held, b.held)), times, a.opaque, a.host_bytes, a.unheeded)
    alive, kinds, phase = _most(look.moments)
    kinds["workspace"] = workspace(target.machine)
    kinds["holes"] = max(0, look.held - alive)
    t = config.train
    settings = {
        name: getattr(t, name) for name in ("recompute", "recompute_every", "recompute_budget_gb", "micro_rows")
    }
    settings["moments"] = config.optim.moments
    fit = fits(sum(kinds.values()), target)
    return Row(settings, kinds, phase, look.seconds, fit, look.opaque, look.host_bytes, look.unheeded)


def fits(taken: int, target: Target) -> bool:
    return taken * (1.0 + target.margin) <= target.memory


def divisors(rows: int) -> list[int]:
    """All divisors of ``rows``, largest first."""
    return [n for n in range(rows, 0, -1) if rows % n == 0]


def make(
    config: Config,
    target: Target,
    processes: int = 1,
    *,
    compiled: bool = False,
    policies: Sequence[str] | None = None,
    largest: int | None = None,
    narrower: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Plan:
    """Look at every policy with the largest micro-batch that fits under it, and the next larger one. Raises ConfigError
    and KernelError as training would.

    compiled: as torch.compile would make the step; some seconds for each setting. policies: of engine.recompute, all by
    default ("offload" for a GPU); "budget" gets what is left beside full recomputing, where keeping everything does not
    fit, and without "full" the configuration's own. largest: rows of the largest micro-batch to look at. narrower: also
    look at what moments in fewer bits than the configuration's make room for; as they change what is learned, they are
    chosen where nothing else fits only.
    """
    gpu = target.machine.device == "cuda"
    if policies is None:
        policies = POLICIES if gpu and config.model.n_layer > STAY else POLICIES[:-1]
    config = settled(config, target.machine)
    if config.train.batch_rows % processes:
        raise ConfigError(
            f"train.batch_rows={config.train.batch_rows} must be a multiple of {processes} processes, or their shares "
            f"differ; use --train.batch_rows {max(1, config.train.batch_rows // processes) * processes}"
        )
    sizes = [n for n in divisors(config.train.batch_rows // processes) if largest is None or n <= largest]
    seen: dict[tuple[str, int, str], Row] = {}
    own: str = config.optim.moments

    def at(policy: str, rows: int, kind: str = own, again: bool = False, **more: Any) -> Row:
        if again or (policy, rows, kind) not in seen:
            say(f"looking at recompute={policy}, micro_rows={rows}" + (f", moments={kind}" if kind != own else ""))
            budget = config.train.recompute_budget_gb if config.train.recompute == policy else 0.0
            train = {"recompute": policy, "micro_rows": rows, "recompute_budget_gb": budget, **more}
            changed = config.replace(train=train, optim={"moments": kind})
            seen[policy, rows, kind] = measure(changed, target, processes, compiled)
        return seen[policy, rows, kind]

    def good(policy: str, rows: int) -> bool:
        try:
            return at(policy, rows).fits
        except ConfigError:
            if policy != "budget":
                raise
            return False  # more rows than the inputs of the blocks leave room for in the budget

    budget_is_free = "full" in policies  # else it is the configuration's, a policy like any other
    first: int | None = None  # what fits under one policy is where to begin with the next
    for policy in (p for p in policies if p != "offload" and not (p == "budget" and budget_is_free)):
        if first is None and good(policy, sizes[0]):  # one micro-batch, whose gradients need no sum in fp32
            first = 0
        elif first is None:
            first = _first_that_fits(sizes, lambda rows, policy=policy: good(policy, rows))  # type: ignore[misc]
        while first < len(sizes) - 1 and not good(policy, sizes[first]):
            first += 1
        while first > 0 and good(policy, sizes[first - 1]):
            first -= 1
        at(policy, sizes[first])
    if "budget" in policies and budget_is_free:
        for rows in sizes:
            none, full = seen.get(("none", rows, own)), seen.get(("full", rows, own))
            if full is not None and full.fits and (none is None or not none.fits):
                budget = _budget(config, full, target)
                at("budget", rows, recompute_budget_gb=budget)
    if "offload" in policies:
        _look_at_offload(config, target, sizes, at, [row for row in seen.values() if row.policy == "none"])
    chosen = fastest(seen.values())
    for kind, size in MOMENT_BYTES.items() if narrower else ():
        if size >= MOMENT_BYTES[own]:
            continue
        saved = 1.0 - size / MOMENT_BYTES[own]
        others = [
            row
            for row in seen.values()
            if row.moments == own and not row.fits and fits(row.peak - round(saved * row.bytes["moments"]), target)
        ]
        if others:
            row = min(others, key=lambda row: row.step_s)
            more = {"recompute_budget_gb": row.settings["recompute_budget_gb"]}
            at(row.settings["recompute"], row.micro_rows, kind, **more)
    for kind in MOMENT_BYTES:  # the least change first
        chosen = chosen or fastest(row for row in seen.values() if row.moments == kind)
    order = {policy: i for i, policy in enumerate(policies)}
    found = tuple(
        sorted(
            seen.values(), key=lambda r: (r.moments != own, order[r.settings["recompute"]], -r.micro_rows, r.moments)
        )
    )
    return Plan(config, target, processes, found, chosen, _why(found, chosen, target), compiled)


def _first_that_fits(sizes: Sequence[int], good: Callable[[int], bool]) -> int:
    """Index of the first (largest) size that is good, by bisection; of the last where none is."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        if good(sizes[middle]):
            high = middle
        else:
            low = middle + 1
    good(sizes[low])
    return low


def _look_at_offload(
    config: Config, target: Target, sizes: Sequence[int], at: Callable[..., Row], none: Sequence[Row]
) -> None:
    """The smallest micro-batch that does not fit with everything on the device, where least has to move, or the largest
    that fits with offloading; then with as many of the last blocks staying as there is room for."""
    large = [row.micro_rows for row in none if not row.fits]
    first = sizes.index(min(large)) if large else 0
    while first < len(sizes) - 1 and not at("offload", sizes[first]).fits:
        first += 1
    row = at("offload", sizes[first])
    block = row.host_bytes / (config.model.n_layer - STAY)
    left = target.memory / (1.0 + target.margin) - row.peak
    more = math.floor(0.95 * left / block) if row.fits and block else 0
    more = min(more, config.model.n_layer - STAY - 1) if config.train.recompute != "offload" else 0
    for count in range(more, max(0, more - 3), -1):  # holes may take the room of a block
        budget = math.ceil((STAY + count + 0.5) * block / 1e3) / 1e6  # beside what moves, small storages are kept
        if at("offload", sizes[first], again=True, recompute_budget_gb=budget).fits:
            return
    if more > 0:
        at("offload", sizes[first], again=True)


def _budget(config: Config, full: Row, target: Target) -> float:
    """GB that the blocks may keep where full recomputing takes ``full``: their inputs and all that is left."""
    m = config.model
    inputs = m.n_layer * full.micro_rows * m.block_size * m.n_embd * _dtype(config).itemsize
    left = target.memory / (1.0 + target.margin) - full.peak
    return math.ceil((inputs + 0.95 * max(0.0, left)) / 1e3) / 1e6


def fastest(rows: Iterable[Row]) -> Row | None:
    """Of those that fit, by the roofline; where the bound is the same to a thousandth, the largest micro-batch (fewest
    launches), then the least that is computed again."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    best = min(row.step_s for row in fitting)
    good = [row for row in fitting if row.step_s <= 1.001 * best]
    return min(good, key=lambda row: (-row.micro_rows, row.seconds["again"], row.step_s))


def _why(rows: Sequence[Row], chosen: Row | None, target: Target) -> str:
    limit = target.memory / (1.0 + target.margin)
    room = (
        f"{target.memory / 1e9:.1f} GB of {target.name}, of which {target.margin / (1 + target.margin):.0%} stay free "
        "for what a plan does not see"
    )
    if chosen is None:
        least = min(rows, key=lambda row: row.peak)
        return (
            f"nothing fits into {room}: the least is {least.flags} with {least.peak / 1e9:.2f} GB. Use a smaller "
            "model.block_size or model, or a device with more memory"
        )
    text = (
        f"{chosen.flags}: {chosen.peak / 1e9:.2f} GB fit into {room}, and no setting that fits has a lower bound on "
        f"its step, {1e3 * chosen.step_s:.4g} ms"
    )
    other = [row for row in rows if row.settings["recompute"] == "none" and row.peak > limit]
    if chosen.settings["recompute"] != "none" and other:
        least = min(other, key=lambda row: row.peak)
        again = chosen.seconds["again"] / chosen.step_s
        text += (
            f". Keeping everything takes {least.peak / 1e9:.2f} GB with {least.micro_rows} row(s); computing again is "
            f"{again:.1%} of the step"
        )
    elif chosen.settings["recompute"] == "none":
        text += ": it computes nothing again"
    if chosen.host_bytes:
        text += f". {chosen.host_bytes / 1e9:.2f} GB lie in the host's pinned memory"
        exposed = chosen.seconds.get("transfer", 0.0) / chosen.step_s
        text += f"; waiting for copies is {exposed:.1%} of the step" if exposed else "; its copies hide behind the step"
    better = [row for row in rows if row.fits and row.moments != chosen.moments and row.step_s < 0.999 * chosen.step_s]
    for row in better:
        text += f". With other moments, which train not quite the same: {row.flags}, {1e3 * row.step_s:.4g} ms"
    return text


# --------------------------------------------------------------------------------------------------------- for training


def resolve(config: Config, world: World) -> tuple[Config, str]:
    """``config`` (whose vocab_size is set) with the micro_rows of the fastest plan that fits into the memory that is
    free here, and why. Its recompute policy stays. The first process decides for all. ConfigError where none fits."""

    def decide() -> tuple[int, str]:
        try:
            target = Target.here(world.device, _dtype(settled(config, Machine.here(world.device))))
            target = dataclasses.replace(target, memory=target.memory // _sharing(world))
            made = make(
                config, target, world.size, compiled=_compiles(config, world), policies=(config.train.recompute,),
                narrower=False,
            )  # fmt: skip
        except Exception as error:  # told to all, which wait for the answer
            return 0, f"{type(error).__name__}: {error}"
        return (made.chosen.micro_rows if made.chosen else 0), made.why

    shared: Any = world.share(decide() if world.first else None)
    rows, why = shared
    if not rows:
        raise ConfigError(f"train.micro_rows=0 asks for the rows that fit, and none was found: {why}")
    return config.replace(train={"micro_rows": rows}), f"micro_rows={rows}: {why}"


def _compiles(config: Config, world: World) -> bool:
    from tritium.engine import train

    return train.should_compile(config, world.device)[0]


def _sharing(world: World) -> int:
    """Processes that share the memory of this one's device."""
    return world.size if world.device.type == "cpu" else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's error on a GPU, and what torch and Python raise on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "DefaultCPUAllocator" in text)


@contextlib.contextmanager
def advising(config: Config, world: World) -> Iterator[None]:
    """Where memory runs out inside: OutOfMemory, with what a plan says would fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).strip() or "memory ran out").splitlines()[0]
        said = f"{type(error).__name__}: {first}"
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
        error.__context__ = None
        raise OutOfMemory(f"{said}\n{advice(config, world)}") from None


def advice(config: Config, world: World) -> str:
    """What would fit where ``config`` did not: sentences for the user. Never raises."""
    general = "use fewer rows at a time (--train.micro_rows) or --train.recompute full"
    try:
        settled_config = settled(config, Machine.here(world.device))
        target = Target.here(world.device, _dtype(settled_config), all_of_it=True)
        target = dataclasses.replace(target, memory=target.memory // _sharing(world))
        rows = config.train.micro_rows or None
        this = None
        compiled = _compiles(config, world)
        if rows:
            this = measure(settled_config, target, world.size, compiled)
        made = make(config, target, world.size, compiled=compiled, largest=rows)
        fitting = [row for row in made.rows if this is None or row.peak < 0.95 * this.peak]
        chosen = fastest(r for r in fitting if r.moments == config.optim.moments) or fastest(fitting)
        lines = []
        if this is not None:
            kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in this.bytes.items() if size > 5e6)
            lines.append(f"By the plan this run takes {this.peak / 1e9:.2f} GB ({kinds}); there are "
                         f"{target.memory / 1e9:.2f} GB.")  # fmt: skip
        if chosen is None:
            lines.append(f"No smaller setting fits: {made.why}; {general}.")
        else:
            lines.append(
                f"These would fit, {chosen.peak / 1e9:.2f} GB, and of those that do they are fastest: {chosen.flags}"
            )
        return "\n".join(lines)
    except Exception as error:  # the memory may be too full even for this
        return f"{general[0].upper()}{general[1:]} (no plan could be made: {type(error).__name__})."


# -------------------------------------------------------------------------------------------------------------- showing


def to_json(plan: Plan) -> str:
    """The plan as data."""
    found = {
        "tool": "tritium plan",
        "target": {
            "name": plan.target.name, "device": plan.target.machine.device, "arch": plan.target.machine.arch,
            "memory_bytes": plan.target.memory, "matrix_flops": plan.target.rates.reached_matrix,
            "copy_bytes_per_s": plan.target.rates.reached_copy, "processes": plan.processes,
        },
        "compiled": plan.compiled,
        "margin": plan.target.margin,
        "config": json.loads(plan.config.to_json()),
        "rows": [_row(plan, row) for row in plan.rows],
        "chosen": None if plan.chosen is None else _row(plan, plan.chosen),
        "why": plan.why,
    }  # fmt: skip
    return json.dumps(found, indent=2)


def _row(plan: Plan, row: Row) -> dict[str, Any]:
    return {
        **row.settings, "peak_bytes": row.peak, "bytes": row.bytes, "reached_in": row.phase, "fits": row.fits,
        "host_bytes": row.host_bytes,
        "step_s": row.step_s, "seconds": row.seconds, "tokens_per_s": plan.config.batch_tokens / row.step_s,
        "inside_not_seen": list(row.opaque),
    }  # fmt: skip


def text(plan: Plan) -> str:
    """The plan for a terminal: a line a setting, GB by kind; the chosen one is marked."""
    shown = [kind for kind in KINDS if any(row.bytes[kind] for row in plan.rows)]
    host = any(row.host_bytes for row in plan.rows)
    head = [
        "",
        "recompute",
        "moments",
        "rows",
        *shown,
        *(["on host"] if host else []),
        "peak GB",
        "in",
        "ms a step",
        "tokens/s",
        "",
    ]
    lines = [head]
    for row in plan.rows:
        lines.append([
            "→" if row is plan.chosen else "", row.policy, row.moments, str(row.micro_rows),
            *(f"{row.bytes[kind] / 1e9:.2f}" for kind in shown),
            *([f"{row.host_bytes / 1e9:.2f}"] if host else []), f"{row.peak / 1e9:.2f}", row.phase,
            f"{1e3 * row.step_s:.4g}", f"{plan.config.batch_tokens / row.step_s:,.0f}",
            "fits" if row.fits else "too much",
        ])  # fmt: skip
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = {0, 1, 2, len(head) - 4, len(head) - 1}
    table = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, width, strict=True)))
        for line in lines
    ]
    c, t = plan.config, plan.config.train
    about = (
        f"{c.name} on {plan.processes} × {plan.target.name} ({plan.target.memory / 1e9:.1f} GB): {t.precision}, "
        f"{t.batch_rows} rows of {c.model.block_size} tokens a step, {c.model.vocab_size:,} ids. "
        "GB of one device; least times (roofline); "
        f"{'compiled' if plan.compiled else 'eager'}; nothing was run."
    )
    opaque = sorted({name for row in plan.rows for name in row.opaque})
    note = [f"not seen inside: {', '.join(opaque)}"] if opaque else []
    if t.precision == "fp8":
        note.append("products in fp8 are counted at bf16's rate")
    note += sorted({row.unheeded for row in plan.rows if row.unheeded})
    return "\n".join([about, "", *(line.rstrip() for line in table), "", *note, plan.why])


_COLOURS = {
    "parameters": "#35618f", "masters": "#6c9bc7", "moments": "#b3cde3", "gradients": "#d9853b",
    "activations": "#c23b22", "logits": "#e8a79c", "temporary": "#8d8d8d", "workspace": "#5b5b5b", "holes": "#dddddd",
}  # fmt: skip


def draw(plan: Plan, path: pathlib.Path) -> None:
    """A picture (PNG): a bar a setting, stacked by kind, the memory there is, and beside it the step's least time."""
    from matplotlib.figure import Figure

    rows = list(reversed(plan.rows))
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(rows)), dpi=120, layout="constrained")
    memory, times = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    names = [
        f"{row.policy}, {row.micro_rows} row{'s' if row.micro_rows > 1 else ''}"
        + (f", {row.moments}" if row.moments != plan.config.optim.moments else "")
        for row in rows
    ]
    left = [0.0] * len(rows)
    for kind in KINDS:
        sizes = [row.bytes[kind] / 1e9 for row in rows]
        if any(sizes):
            memory.barh(names, sizes, left=left, color=_COLOURS[kind], label=kind, height=0.72)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    memory.axvline(plan.target.memory / 1e9, color="#222222", linewidth=1.2)
    memory.axvline(plan.target.memory / 1e9 / (1 + plan.target.margin), color="#222222", linewidth=1, linestyle=":",
                   label=f"memory, and less {plan.target.margin:.0%}")  # fmt: skip
    memory.set_xlabel("GB at the peak of a step, one device")
    colours = ["#35618f" if row is plan.chosen else ("#b3cde3" if row.fits else "#eeeeee") for row in rows]
    times.barh(names, [1e3 * row.step_s for row in rows], color=colours, height=0.72)
    times.set_xlabel("ms a step, at least")
    for axes in (memory, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    c = plan.config
    where = f"{plan.processes} × {plan.target.name}"
    figure.suptitle(
        f"{c.name}, {c.model.block_size} tokens a row, on {where}: a plan, not run (dark: chosen; pale: does not fit)",
        fontsize=10,
    )
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
