"""The op contract: what an op is, how its backends are found, and how a model's call sites get their functions.

An op is a folder beside this file. Its ``reference.py`` holds a function of the op's name: signature, mathematics and
default. Every ``impl_NAME.py`` in the folder is the backend NAME: a function of the same name and signature, plus

    unsupported(site: Site) -> str | None      None = "I can do this"; otherwise one sentence: rule, value, remedy
    prepare(seq_start) -> object               optional: run once per micro-batch, its result is passed as ``seq_start``

A module declares where it calls an op with a :class:`CallSite`; :func:`bind` gives every call site of a model its
function, once at start-up. Nothing is global, so several models with different kernels live in one process.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
import inspect
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch

from tritium.kernels.site import PHASES, Machine, Site

ENTRY_POINTS = "tritium.kernels"  # group; an entry is named "<op>.<backend>" and points to a module
_FOLDER = pathlib.Path(__file__).parent


class KernelError(ValueError):
    """A kernel choice that cannot be met; the message lists every backend's reason."""


@dataclass(frozen=True)
class Backend:
    """A loaded backend: its function, and the module that answers for it."""

    op: str
    name: str
    function: Callable[..., Any]
    module: ModuleType

    def unsupported(self, site: Site) -> str | None:
        """Why it cannot serve the site, or None. KernelError where the module's own function gives no such answer."""
        judge = getattr(self.module, "unsupported", None)
        if judge is None:
            return None
        try:
            reason = judge(site)
        except Exception as error:  # a user's function may fail in any way
            raise KernelError(
                f"backend {self.name!r} of op {self.op}: unsupported(site) raised {type(error).__name__}: {error}"
            ) from error
        if reason is not None and not isinstance(reason, str):
            raise KernelError(
                f"backend {self.name!r} of op {self.op}: unsupported(site) returned {reason!r}; it returns None where "
                "it can serve the site, else one sentence"
            )
        return reason

    @property
    def prepare(self) -> Callable[[Any], Any] | None:
        return getattr(self.module, "prepare", None)

    @property
    def unproven(self) -> str | None:
        """A sentence when this backend has never been run on the device it is for."""
        return getattr(self.module, "UNPROVEN", None)

    @property
    def precision(self) -> str | None:
        """ "fp8" where it rounds its operands to less than the compute dtype; None for the compute dtype."""
        return getattr(self.module, "PRECISION", None)

    @property
    def chunks(self) -> bool:
        """Whether it heeds the argument ``chunk`` (of linear_cross_entropy)."""
        return bool(getattr(self.module, "CHUNKS", False))


class Op:
    """One op. ``updates`` names the arguments it mutates; such an op has no autograd (the optimizer's).
    ``has_gradient`` is False for it, and for a function that nobody differentiates.
    """

    def __init__(self, name: str, *, updates: Sequence[str] = (), has_gradient: bool = True):
        self.name, self.updates, self.has_gradient = name, tuple(updates), has_gradient and not updates
        self.package = f"tritium.kernels.{name}"
        self.folder = _FOLDER / name
        self._loaded: dict[str, Backend] = {}

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    @cached_property
    def reference(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{self.package}.reference"), self.name)

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.reference)

    @property
    def cases(self) -> ModuleType:
        """The op's ``cases.py``: CASES, inputs(), flops(), bytes(), budgets."""
        return importlib.import_module(f"{self.package}.cases")

    def backends(self) -> list[str]:
        """This op's backends, ``reference`` first; the folder listing is the registry, entry points add to it."""
        found = {path.stem.removeprefix("impl_") for path in self.folder.glob("impl_*.py")}
        found |= set(_entry_points(self.name))
        return ["reference", *sorted(found)]

    def load(self, name: str) -> Backend:
        """Import a backend: a listed name, or a dotted module path of the user's own. Checks the signature."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Backend:
        if name == "reference":
            return Backend(self.name, name, self.reference, inspect.getmodule(self.reference))  # type: ignore[arg-type]
        if (self.folder / f"impl_{name}.py").exists():
            path = f"{self.package}.impl_{name}"
        elif name in _entry_points(self.name):
            path = _entry_points(self.name)[name]
        elif "." in name:
            path = name
        else:
            raise KernelError(
                f"op {self.name} has no backend {name!r}; the nearest are {nearest(name, self.backends())}; "
                f"it has {', '.join(self.backends())} (or give a module path such as my_package.my_{self.name})"
            )
        try:
            module = importlib.import_module(path)
        except Exception as error:  # a user's module may fail in any way while it is imported
            raise KernelError(
                f"backend {name!r} of op {self.name}: importing {path} failed: {type(error).__name__}: {error}"
            ) from error
        function = getattr(module, self.name, None)
        if not callable(function):
            raise KernelError(f"backend {name!r} of op {self.name}: module {path} defines no function {self.name}")
        if _shape_of(inspect.signature(function)) != _shape_of(self.signature):
            raise KernelError(
                f"backend {name!r} of op {self.name} must have the reference's signature.\n"
                f"  reference: {self.name}{self.signature}\n  {path}: {self.name}{inspect.signature(function)}"
            )
        return Backend(self.name, name, function, module)

    def why_not(self, site: Site, extra: Sequence[str] = ()) -> dict[str, str | None]:
        """Backend → None if it can serve the site, else its one-sentence reason."""
        table: dict[str, str | None] = {}
        for name in [*self.backends(), *(e for e in extra if e not in self.backends())]:
            try:
                table[name] = self.load(name).unsupported(site)
            except KernelError as error:
                table[name] = str(error)
        return table


def nearest(name: str, known: Sequence[str], count: int = 3) -> str:
    """The ``count`` known names that are most like ``name``, best first."""
    return ", ".join(difflib.get_close_matches(name, known, count, cutoff=0.0))


def _shape_of(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
    """What must agree between a backend and its reference: names, kinds and defaults, not the annotations' spelling."""
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


@cache
def _entry_points(op: str) -> dict[str, str]:
    found = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        owner, _, name = point.name.partition(".")
        if owner == op and name:
            found[name] = point.value
    return found


# --------------------------------------------------------------------------------------------------------------- auto


@dataclass(frozen=True)
class Tuned:
    """One measured order: where it holds, which backends from best to worst, and the record it was read from."""

    arch: str
    op: str
    order: tuple[str, ...]
    evidence: str
    compiled: bool | None = None
    dtype: str | None = None
    phase: str | None = None
    shape: Mapping[str, tuple[int, int]] | None = None  # letter → inclusive range

    def covers(self, site: Site) -> bool:
        return (
            site.op == self.op
            and fnmatch.fnmatch(site.machine.arch, self.arch)
            and self.compiled in (None, site.compiled)
            and self.dtype in (None, str(site.dtype).removeprefix("torch."))
            and self.phase in (None, site.phase)
            and all(k in site.shape and lo <= site.shape[k] <= hi for k, (lo, hi) in (self.shape or {}).items())
        )


def _entries(text: str) -> Iterator[Tuned]:
    """Of one file; ValueError for what is none."""
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError(f"it holds a {type(found).__name__}, and is a list of entries")
    for i, entry in enumerate(found, 1):
        try:
            if not isinstance(entry["order"], list):
                raise ValueError(f"order is a list of backends, not {entry['order']!r}")
            shape = {k: tuple(v) for k, v in entry.get("shape", {}).items()}
            yield Tuned(**{**entry, "order": tuple(entry["order"]), "shape": shape})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"entry {i}: {error}") from None


@cache
def tuning() -> tuple[Tuned, ...]:
    """Every entry of ``tuning/*.json``; the first that covers a site decides its ``auto`` order."""
    entries: list[Tuned] = []
    for path in sorted((_FOLDER / "tuning").glob("*.json")):
        try:
            entries += _entries(path.read_text())
        except ValueError as error:
            raise KernelError(
                f"{path}: {error}, so nothing says what auto chooses; mend it, or restore it with git checkout"
            ) from None
    return tuple(entries)


def auto(op: Op, site: Site, entries: Sequence[Tuned] | None = None) -> tuple[str, str]:
    """The backend ``auto`` means at this site, and why. Never one that computes in less than the site's dtype."""
    for entry in tuning() if entries is None else entries:
        if not entry.covers(site):
            continue
        passed: list[str] = []
        for name in entry.order:
            backend = op.load(name)
            reason = backend.unsupported(site)
            if backend.precision is not None:
                reason = f"it computes in {backend.precision}, which is chosen by name alone"
            if reason is None:
                why = f"auto: {entry.evidence}"
                return name, why + (f" ({'; '.join(passed)})" if passed else "")
            passed.append(f"not {name}: {reason}")
        return "reference", "auto: " + "; ".join(passed)
    return "reference", "auto: nothing measured for this site"


# ------------------------------------------------------------------------------------------------------------- binding


class CallSite:
    """Where a module calls an op: ``self.norm = CallSite(ops.layer_norm, shape={"C": C})``, then ``self.norm(x, ...)``.

    Until :func:`bind` it runs the reference. training: options of the phase "train" only (dropout); the other phases
    have their defaults. dtype: a site whose dtype is not the model's compute dtype says so. weights: the dtype that its
    weights keep whatever x is; where x is narrower, the site has the option ``wide``.
    """

    def __init__(
        self,
        op: Op,
        *,
        shape: Mapping[str, int] = {},
        options: Mapping[str, object] = {},
        training: Mapping[str, object] = {},
        dtype: torch.dtype | None = None,
        weights: torch.dtype | None = None,
    ):
        self.op, self.shape, self.options, self.training = op, dict(shape), dict(options), dict(training)
        self.dtype, self.weights = dtype, weights
        self.function = op.reference
        self.backend = "reference"
        self.bound: dict[str, Backend] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def site(self, machine: Machine, name: str, phase: str, dtype: torch.dtype, **facts: Any) -> Site:
        """What a backend is told of this place at ``name`` in a model that computes in ``dtype``; facts: further fields
        of Site."""
        dtype = self.dtype or dtype
        options = self.options | (self.training if phase == "train" else {})
        if self.weights is not None and self.weights.itemsize > dtype.itemsize:
            options["wide"] = True
        return Site(self.op.name, machine, name, phase, dtype, self.shape, options, **facts)

    def enter(self, phase: str) -> None:
        if phase in self.bound:
            self.function, self.backend = self.bound[phase].function, self.bound[phase].name
        elif self.bound:
            raise KernelError(
                f"this {self.op.name} call site is bound for {', '.join(self.bound)} and not for {phase!r}; "
                f"call bind(model, ..., phases=({phase!r},)) first"
            )


@dataclass(frozen=True)
class Row:
    """One line of the kernel table: call site, backend, why."""

    site: str
    op: str
    phase: str
    backend: str
    why: str


def call_sites(model: Any) -> Iterator[tuple[str, CallSite]]:
    """(module path, call site) of every place where the model calls an op, in module order.

    model: a module, any object with a method ``call_sites()`` that yields the same (an optimizer), or a list of these.
    """
    if isinstance(model, (list, tuple)):
        for holder in model:
            yield from call_sites(holder)
        return
    if not isinstance(model, torch.nn.Module):
        yield from model.call_sites()
        return
    for path, module in model.named_modules():
        for value in vars(module).values():
            if isinstance(value, CallSite):
                yield path, value


def enter(model: Any, phase: str) -> None:
    """Point every call site at the function bound for ``phase``."""
    if phase not in PHASES:
        raise KernelError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
    for _, site in call_sites(model):
        site.enter(phase)


@dataclass(frozen=True)
class Choice:
    """A parsed key of ``choices``: ``[PATTERN:]OP[@PHASE]``; OP may be ``*``."""

    key: str
    pattern: str | None
    op: str
    phase: str | None

    @staticmethod
    def parse(key: str) -> Choice:
        pattern, colon, rest = key.rpartition(":")
        op, _, phase = rest.partition("@")
        return Choice(key, pattern if colon else None, op, phase or None)

    def applies(self, path: str, op: str, phase: str) -> bool:
        return (
            self.op in ("*", op)
            and self.phase in (None, phase)
            and (self.pattern is None or fnmatch.fnmatch(path, self.pattern))
        )

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """A layer override outranks an op choice outranks the default; a phase is more specific than none."""
        return (self.pattern is not None, self.op != "*", self.phase is not None)


def bind(
    model: Any,
    choices: Mapping[str, str] | str = "auto",
    *,
    machine: Machine | None = None,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    deterministic: bool = False,
    phases: Sequence[str] = PHASES,
) -> list[Row]:
    """Give every call site of ``model`` its function for each phase; returns the table *site, op, phase, backend, why*.

    model: as for :func:`call_sites`, so that a model and its optimizer can be bound together.

    choices: ``"triton"`` (that backend for every op that has it, ``auto`` for the rest) or a mapping from
    ``[PATTERN:]OP[@PHASE]`` to a backend, e.g. ``{"*": "auto", "attention": "sdpa_flash", "attention@decode":
    "reference", "blocks.0.*:layer_norm": "my_package.my_norm"}``.
    Raises KernelError, naming every backend's reason, when a chosen backend cannot serve a site, and when a key
    matches nothing.
    """
    machine = machine or Machine.here()
    mapping = {"*": choices} if isinstance(choices, str) else dict(choices)
    # the more specific key wins; of two equally specific ones, the later
    parsed = sorted(enumerate(Choice.parse(k) for k in mapping), key=lambda item: (item[1].rank, item[0]), reverse=True)
    used, rows, problems = set(), [], []
    refused: dict[tuple[Op, str, str], list[Site]] = {}
    sites = list(call_sites(model))
    available = sorted({name for _, call in sites for name in call.op.backends()})
    for key, name in mapping.items():  # a default that no op has would leave every op on auto: a silent fallback
        if Choice.parse(key).op == "*" and name != "auto" and "." not in name and sites and name not in available:
            problems.append(
                f"{key}={name} was chosen and no op of this model has a backend {name!r}; "
                f"the nearest are {nearest(name, available)}"
            )
    for path, call in sites:
        for phase in phases:
            choice = next((c for _, c in parsed if c.applies(path, call.op.name, phase)), None)
            used |= {c.key for _, c in parsed if c.applies(path, call.op.name, phase)}
            name = mapping[choice.key] if choice else "auto"
            site = call.site(machine, path, phase, dtype, compiled=compiled, deterministic=deterministic)
            if (
                choice is not None
                and choice.op == "*"
                and name != "auto"
                and "." not in name
                and name not in call.op.backends()
            ):
                backend, why = auto(call.op, site)
                why = f"{call.op.name} has no {name}; {why}"
            elif name == "auto":
                backend, why = auto(call.op, site)
            else:
                backend, why = name, f"chosen: {choice.key if choice else ''}={name}"
                try:
                    reason = call.op.load(name).unsupported(site)
                except KernelError as error:
                    reason = str(error)
                if reason is not None:
                    refused.setdefault((call.op, name, reason), []).append(site)
                    continue
            call.bound[phase] = call.op.load(backend)
            rows.append(Row(path, call.op.name, phase, backend, why))
    problems += [_refusal(op, name, reason, places) for (op, name, reason), places in refused.items()]
    unused = [key for key in mapping if key not in used and key != "*"]
    if unused and sites:
        known = sorted({call.op.name for _, call in sites})
        problems.append(
            f"kernel choice {', '.join(unused)} matches no call site of this model; it calls {', '.join(known)} "
            f"(keys are [PATTERN:]OP[@PHASE], PATTERN over module paths such as {sites[-1][0]!r})"
        )
    if problems:
        raise KernelError("\n".join(problems))
    holders = model if isinstance(model, (list, tuple)) else [model]
    training = all(m.training for m in holders if isinstance(m, torch.nn.Module))
    enter(model, "train" if training and "train" in phases else phases[0])
    return rows


def _refusal(op: Op, name: str, reason: str, places: Sequence[Site]) -> str:
    """A choice that cannot be met for one reason, wherever that is, and what every backend says to the first place."""
    site, names = places[0], list(dict.fromkeys(p.name for p in places))
    phases = ", ".join(dict.fromkeys(p.phase for p in places))
    where = f"{names[0] or 'this site'}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
    lines = [f"{op.name}={name} was chosen and cannot serve {where} ({phases}; {site.device}): {reason}"]
    for other, why in op.why_not(site, extra=[name]).items():
        lines.append(f"    {other:<16} {'can' if why is None else why}")
    return "\n".join(lines)


def format_table(rows: Sequence[Row]) -> str:
    """The kernel table as text; call sites that differ only by layer number share a line."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        site = ".".join("*" if part.isdigit() else part for part in row.site.split(".")) or "model"
        groups.setdefault((site, row.op, row.backend, row.why), []).append(row.phase)
    lines = []
    for (site, op, backend, why), phases in groups.items():
        unique = [p for p in PHASES if p in phases]
        lines.append((site, op, ",".join(unique) if len(unique) < len(PHASES) else "all", backend, why))
    head = ("call site", "op", "phase", "backend", "why")
    width = [max(len(line[i]) for line in [head, *lines]) for i in range(4)]
    return "\n".join("  ".join([*(line[i].ljust(width[i]) for i in range(4)), line[4]]) for line in [head, *lines])
