"""The options of an op, read from its signature, and the pairs of them that its small cases must hold.

An option is a parameter with a default. A case sets it when its inputs give another value (or a tensor in None's
place). Weights of another dtype than the activations' count as one more option where an op has cases of both kinds.
Faults hide where two options meet, so of any two every combination of set and left out must occur in some small case,
or be named in the op's ``cases.py`` with the reason why mathematics has no use for it:

    BANNED = {("dropout", "not seed"): "weights are dropped by the seed, so without one there is nothing to compute"}
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tritium.kernels.case import Case
from tritium.kernels.op import Op

WIDE = "weights of another dtype"


def options(op: Op) -> list[str]:
    """The parameters that a call may leave out, in the signature's order."""
    return [p.name for p in op.signature.parameters.values() if p.default is not inspect.Parameter.empty]


def chosen(op: Op, case: Case) -> dict[str, bool]:
    """Option → whether this case sets it."""
    given = op.cases.inputs(case, torch.bfloat16, "cpu", 0)
    parameters = op.signature.parameters
    found = {}
    for name in options(op):
        value, default = given.get(name, parameters[name].default), parameters[name].default
        found[name] = value is not None if isinstance(value, Tensor) or default is None else value != default
    dtypes = {v.dtype for v in given.values() if isinstance(v, Tensor) and v.requires_grad}
    found[WIDE] = len(dtypes) > 1
    return found


def combinations(settings: Mapping[str, bool]) -> Iterator[tuple[str, str]]:
    """Every pair of a case's settings, as ("dropout", "not seed")."""
    words = [name if there else f"not {name}" for name, there in settings.items()]
    yield from itertools.combinations(words, 2)


def banned(op: Op) -> Mapping[tuple[str, str], str]:
    """The combinations that ``cases.py`` names as meaningless, with their reasons."""
    return getattr(op.cases, "BANNED", {})


def missing(op: Op) -> list[tuple[str, str]]:
    """The combinations of two options that no small case has and that are not banned."""
    cases = [chosen(op, case) for case in op.cases.CASES if not case.large]
    names = options(op) + ([WIDE] if len({settings[WIDE] for settings in cases}) > 1 else [])
    wanted = [
        pair
        for values in itertools.product((True, False), repeat=2)
        for a, b in itertools.combinations(names, 2)
        for pair in combinations({a: values[0], b: values[1]})
    ]
    there = {pair for settings in cases for pair in combinations(settings)}
    return [pair for pair in wanted if pair not in there and pair not in banned(op)]
