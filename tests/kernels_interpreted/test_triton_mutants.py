"""The tests are tested: each planted fault in a kernel's source must turn the contract red, by its numbers."""

import importlib.util
import pathlib
import sys
from dataclasses import dataclass

import pytest
import torch

from tritium.kernels import contract, ops
from tritium.kernels.case import Case
from tritium.kernels.op import Backend


@dataclass(frozen=True)
class Mutant:
    """A fault: ``before`` becomes ``after`` in the op's impl_triton.py, and ``case`` is the one that must see it."""

    op: str
    name: str
    before: str
    after: str
    case: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def attention(name: str, before: str, after: str, case: str = "more_queries", **options: object) -> Mutant:
    return Mutant("attention", name, before, after, case, **options)


MUTANTS = [
    attention("last key dropped", "seen = j < Tk", "seen = j < Tk - 1", "cross"),
    attention("last key tile dropped", "last = tl.maximum(last, 0)\n    first = tl.minimum(tl.maximum(first, 0), last)",
              "last = tl.maximum(last, 0) // BLOCK_N * BLOCK_N\n    first = tl.minimum(tl.maximum(first, 0), last)",
              "cross"),
    attention("accumulator not rescaled", "y = y * rescale[:, None]", "y = y * 1.0", "head_80_long"),
    attention("sum not rescaled", "l = l * rescale + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", "head_80_long"),
    attention("causal by one", "seen & (j <= i + past)", "seen & (j < i + past)"),
    attention("keys past the end", "seen = j < Tk", "seen = j < Tk + 1", "cross"),
    attention("window by one", "i + past - j < window", "i + past - j <= window", "window_more_keys"),
    attention("documents not separated", "seen & (j >= start)", "seen", "documents_full"),
    attention("query tile of a document skipped", "starts <= end, i + 1, 0", "starts < n0, i + 1, 0", "documents_full"),
    attention("heads share the wrong keys", "K += b * stride_kb + (h // R) * stride_kh",
              "K += b * stride_kb + (h % (H // R)) * stride_kh", "two_groups"),
    attention("only one head of a group in dk", "in range(0, tiles * R)", "in range(0, tiles)", "two_groups"),
    attention("scale of dk forgotten", "dk * scale", "dk"),
    attention("gradient of q times 1.02", "dq * scale", "dq * (scale * 1.02)"),
    attention("gradient of q times 1.02 in bf16", "dq * scale", "dq * (scale * 1.02)", "several_tiles",
              dtype=torch.bfloat16),
    attention("delta forgotten", "ds = p * (dp - delta[None, :])", "ds = p * dp"),
    attention("lse in base e", "m + tl.log2(", "m + tl.log("),
    attention("softcap not differentiated", "ds = ds * (1 - tanh_s * tanh_s)", "ds = ds", "softcap_short"),
    attention("softcap ignored", "s = softcap * tanh(s * (factor / softcap))", "s = s * factor", "softcap_short"),
    attention("dropout not made up for", "keep_scale=1 / (1 - dropout)", "keep_scale=1.0", "dropout_short"),
    attention("dropout by another hash", "0x846CA68B", "0x846CA68D", "dropout_short"),
    attention("dropout missing in dv", "tl.where(kept, p * keep_scale, 0.0)", "p", "dropout_short"),
    Mutant("layer_norm", "mean not subtracted", "tl.where(real, x - mean[:, None], 0.0)", "tl.where(real, x, 0.0)",
           "odd"),
    Mutant("layer_norm", "padding in the variance", "tl.where(real, x - mean[:, None], 0.0)", "x - mean[:, None]",
           "odd"),
    Mutant("layer_norm", "eps forgotten", "/ C + eps)", "/ C)", "large_eps"),
    Mutant("layer_norm", "bias forgotten", "if BIAS is not None:", "if BIAS is None:", "odd"),
    Mutant("layer_norm", "last rows dropped", "tl.cdiv(N, BLOCK_N), P)", "N // BLOCK_N, P)", "many_rows"),
    Mutant("layer_norm", "mean(g·x̂) forgotten", "- xhat * mean_gx", "", "odd"),
    Mutant("layer_norm", "gradient of weight times 1.02", "dweight += tl.sum(dy * xhat, 0)",
           "dweight += tl.sum(dy * xhat, 0) * 1.02", "odd"),
    Mutant("layer_norm", "a program's share lost", "(p < P)[:, None]", "(p < P - 1)[:, None]", "many_rows"),
    Mutant("cross_entropy", "padding in lse", "mask = full + columns < V", "mask = full + columns < V + 1", "padded"),
    Mutant("cross_entropy", "last tile dropped", "if full < V:", "if full > V:", "several_tiles"),
    Mutant("cross_entropy", "sum not rescaled", "sums * tl.exp2((top - new_top) * LOG2E)", "sums", "several_tiles"),
    Mutant("cross_entropy", "ignored rows counted", "if target == ignore_index:", "if target == V + 7:",
           "ignore_index_in_range"),
    Mutant("cross_entropy", "padding's gradient not zero", "tl.where(real, dz, 0.0)", "tl.where(real, dz, 1e-3)",
           "padded"),
    Mutant("cross_entropy", "z_loss not differentiated", "(1 + 2 * z_loss * lse)", "(1 + z_loss * lse)", "z_loss"),
    Mutant("cross_entropy", "smoothing over the padding", "dloss * smoothing / V", "dloss * smoothing / Vp",
           "smoothing"),
    Mutant("cross_entropy", "gradient times 1.02", "scale = dloss *", "scale = 1.02 * dloss *", "odd"),
    Mutant("cross_entropy", "softcap not differentiated", "dz *= 1 -", "dz *= 1 - 0 *", "softcap"),
    Mutant("linear_cross_entropy", "gradient of weight not accumulated", "if add:", "if False:", "chunks"),
    Mutant("linear_cross_entropy", "last chunk dropped", "in range(0, N, n):", "in range(0, N // n * n, n):", "chunks"),
    Mutant("linear_cross_entropy", "upstream gradient forgotten", "x * tl.load(FACTOR).to(tl.float32)", "x", "tiny"),
    Mutant("linear_cross_entropy", "upstream gradient in bf16", "factor, y, x.numel()",
           "factor.bfloat16(), y, x.numel()", "tiny"),
]  # fmt: skip
# smaller than the op's own cases, for speed
EXTRA = {
    "head_80_long": Case("head_80_long", {"B": 1, "Tq": 3, "Tk": 100, "H": 1, "G": 1, "D": 80}, {"scale": 2.0}),
    "two_groups": Case("two_groups", {"B": 1, "Tq": 4, "Tk": 4, "H": 4, "G": 2, "D": 8}),
    "softcap_short": Case("softcap_short", {"B": 1, "Tq": 6, "Tk": 6, "H": 1, "G": 1, "D": 16}, {"softcap": 2.0}),
    "dropout_short": Case("dropout_short", {"B": 1, "Tq": 9, "Tk": 9, "H": 1, "G": 1, "D": 8}, {"dropout": 0.3}),
}


def case_of(mutant: Mutant) -> Case:
    if mutant.case in EXTRA:
        return EXTRA[mutant.case]
    (case,) = (c for c in ops.OPS[mutant.op].cases.CASES if c.name == mutant.case)
    return case


def mutated(mutant: Mutant, folder: pathlib.Path, number: int) -> Backend:
    """The op's Triton backend with the fault in its source, under a module and op name of its own."""
    op = ops.OPS[mutant.op]
    source = pathlib.Path(op.load("triton").module.__file__).read_text()
    assert mutant.before in source, f"{mutant}: the source has changed and no longer holds {mutant.before!r}"
    source = source.replace(mutant.before, mutant.after)
    registered = f'"{mutant.op}_triton"'
    assert registered in source
    name = f"mutant_{number}_{mutant.op}"
    path = folder / f"{name}.py"  # a file, since Triton reads a kernel's source from it
    path.write_text(source.replace(registered, f'"{name}"'))
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Backend(mutant.op, name, getattr(module, mutant.op), module)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    backend = mutated(mutant, tmp_path, MUTANTS.index(mutant))
    report = contract.check(ops.OPS[mutant.op], backend, case_of(mutant), mutant.dtype, variants=("plain",))
    assert report.status == "failed", report
    assert "raised" not in report.reason, "a fault must be seen by its numbers, not by a crash"


@pytest.mark.parametrize("name", EXTRA)
def test_without_a_fault_these_cases_pass(name):
    report = contract.check(ops.attention, "triton", EXTRA[name], variants=("plain",))
    assert report.ok, report
