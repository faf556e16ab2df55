"""Shapes that nobody chose: hypothesis draws sizes, options come from the op's cases, and the contract must hold."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritium.kernels import contract, ops
from tritium.kernels.case import Case

NORMS = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")
# letter → smallest and largest size; an op's own limits come first
SIZES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "": {
        "B": (0, 3), "T": (1, 40), "N": (0, 70), "C": (1, 300), "F": (1, 300), "V": (1, 300), "K": (0, 9),
        "P": (1, 5000), "H": (1, 4), "G": (1, 2), "D": (2, 40), "R": (0, 40), "Tq": (1, 70), "Tk": (1, 70),
        "Vp": (0, 40),
    },
    "linear": {"C": (1, 90), "F": (1, 90)},
    # of rows of one to three elements a norm leaves the sign, and gradients that cancel but for eps: see below
    **{norm: {"C": (5, 300)} for norm in NORMS},
    "attention": {"B": (0, 2), "G": (1, 2), "H": (1, 3), "D": (1, 9)},
    "cross_entropy": {"V": (1, 5000), "N": (0, 12)},
    "linear_cross_entropy": {"N": (0, 30), "C": (1, 60)},
}  # fmt: skip


def fitted(name: str, shape: dict[str, int], options: Mapping[str, object]) -> dict[str, int]:
    """The drawn sizes, made to obey the op's rules."""
    if name in ("attention", "attention_lse"):
        shape |= {"H": shape["G"] * shape["H"], "D": 8 * shape["D"]}
        if options.get("documents"):  # about queries that are keys too
            shape["Tq"] = min(shape["Tq"], shape["Tk"])
    if name == "rope":
        shape |= {"D": shape["D"] + shape["D"] % 2, "R": min(shape["R"] // 2 * 2, shape["D"])}
    if "Vp" in shape:
        shape["Vp"] += shape["V"]  # columns of padding were drawn
    if options.get("empty"):
        shape["K"] = max(shape["K"], 2)
    return shape


@st.composite
def drawn(draw: st.DrawFn, name: str) -> Case:
    base = draw(st.sampled_from([c for c in ops.OPS[name].cases.CASES if not c.large]))
    limits = {**SIZES[""], **SIZES.get("attention" if name == "attention_lse" else name, {})}
    shape = {letter: draw(st.integers(*limits[letter]), label=letter) for letter in base.shape}
    shape = fitted(name, shape, base.options)
    return dataclasses.replace(base, name=f"{base.name} {shape}", shape=shape)


def holds(name: str, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(drawn(name), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 99))
    def check(case: Case, dtype: torch.dtype, seed: int) -> None:
        report = contract.check(ops.OPS[name], "triton", case, dtype, seed=seed, variants=("plain",))
        assert report.ok, report

    check()


@pytest.mark.parametrize("name", ops.OPS)
def test_any_shape_keeps_the_contract(name):
    holds(name, 6 if name.startswith("attention") else 12)


@pytest.mark.parametrize("C", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NORMS)
def test_narrow_rows(name, C):
    """With a large eps, so that the gradient of x is a number and not what rounding leaves of two that cancel."""
    for seed in range(3):
        case = Case(f"C={C}", {"N": 11, "C": C}, {"eps": 0.1})
        report = contract.check(ops.OPS[name], "triton", case, torch.float32, seed=seed, variants=("plain",))
        assert report.ok, report


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ops.OPS)
def test_full_any_shape_keeps_the_contract(name):
    holds(name, 60 if name.startswith("attention") else 300)
