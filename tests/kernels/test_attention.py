"""What torch's attention backends promise beyond the contract: which kernel runs, what is refused, which tiles."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tritium.kernels import ops
from tritium.kernels.attention import impl_flex
from tritium.kernels.op import KernelError
from tritium.kernels.site import Machine, Site

CPU = Machine("cpu", "x86_64", packages={})
H100 = Machine("cuda", "sm_90", packages={})
BF16 = torch.bfloat16


def site(**changes: object) -> Site:
    return Site(**{"op": "attention", "machine": H100, "dtype": BF16, "shape": {"D": 64}, "compiled": True, **changes})


@pytest.mark.parametrize(
    ("backend", "changes", "words"),
    [
        ("sdpa", {}, None),
        ("sdpa", {"dtype": torch.float32, "options": {"window": 8, "documents": True}}, None),
        ("sdpa", {"options": {"softcap": 3.0}}, "no soft cap"),
        ("sdpa", {"options": {"dropout": 0.1}}, "could not be repeated"),
        ("sdpa_flash", {}, None),
        ("sdpa_flash", {"machine": CPU, "dtype": torch.float32}, None),
        ("sdpa_flash", {"machine": CPU, "options": {"documents": True}}, None),
        ("sdpa_flash", {"dtype": torch.float32}, "this site in float32"),
        ("sdpa_flash", {"options": {"documents": True}}, "documents needs one"),
        ("sdpa_flash", {"options": {"window": 8}}, "a window needs one"),
        ("sdpa_flash", {"shape": {"D": 64, "Tq": 4, "Tk": 9}}, "causal Tq=4 on Tk=9 needs one"),
        ("sdpa_flash", {"shape": {"D": 64, "Tq": 1, "Tk": 9}}, None),
        ("sdpa_flash", {"shape": {"D": 64, "Tq": 4, "Tk": 9}, "options": {"causal": False}}, None),
        ("sdpa_flash", {"shape": {"D": 320}}, "D=320"),
        ("sdpa_flash", {"deterministic": True}, None),
        ("sdpa_flash", {"machine": Machine("cuda", "sm_75")}, "sm_75"),
        ("sdpa_cudnn", {}, None),
        ("sdpa_cudnn", {"options": {"documents": True}}, None),
        ("sdpa_cudnn", {"machine": CPU}, "cuDNN attention is for GPUs"),
        ("sdpa_cudnn", {"shape": {"D": 60}}, "a multiple of 8"),
        ("sdpa_cudnn", {"shape": {"D": 256}}, "D ≤ 128"),
        ("sdpa_cudnn", {"deterministic": True}, "no fixed order"),
        ("sdpa_cudnn", {"deterministic": True, "phase": "eval"}, None),
        ("sdpa_cudnn", {"shape": {"D": 64, "Tq": 1, "Tk": 1}}, "no single key"),
        ("sdpa", {"shape": {"D": 64, "B": 0}}, "no empty batch"),
        ("sdpa", {"shape": {"D": 64, "B": 0}, "machine": CPU}, None),
        ("sdpa_efficient", {"dtype": torch.float32}, None),
        ("sdpa_efficient", {"dtype": torch.float64}, "this site in float64"),
        ("sdpa_efficient", {"machine": CPU}, "memory-efficient attention is for GPUs"),
        ("sdpa_efficient", {"machine": Machine("cuda", "sm_75")}, None),
        ("sdpa_efficient", {"shape": {"D": 64, "Tq": 9, "Tk": 4}}, "see no key"),
        ("sdpa_efficient", {"options": {"documents": "anywhere"}}, "see no key"),
        ("flex", {}, None),
        ("flex", {"options": {"softcap": 3.0, "window": 4, "documents": True}}, None),
        ("flex", {"options": {"dropout": 0.1}}, "no dropout"),
        ("flex", {"compiled": False}, "set compile=true"),
        ("flex", {"shape": {"D": 8}}, "D=8"),
        ("flex", {"dtype": torch.float64}, "float64"),
        ("flex", {"machine": Machine("cuda", "sm_75")}, "sm_75"),
        ("flex", {"machine": CPU, "compiled": False}, "no backward on a CPU"),
        ("flex", {"machine": CPU, "compiled": True, "phase": "eval"}, "NaN"),
        ("flex", {"machine": CPU, "compiled": False, "phase": "decode"}, None),
    ],
)
def test_a_site_is_judged_by_its_facts(backend, changes, words):
    reason = ops.attention.load(backend).unsupported(site(**changes))
    assert (reason is None) if words is None else (words in reason)


@pytest.mark.parametrize(("backend", "option"), [("sdpa", "softcap"), ("sdpa", "dropout"), ("sdpa_flash", "softcap")])
def test_an_option_the_site_did_not_name_is_refused_when_called(backend, option):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(KernelError, match="SDPA"):
        ops.attention.load(backend).function(q, q, q, **{option: 0.5})


def test_sdpa_flash_runs_the_flash_kernel_and_no_other():
    q = torch.randn(2, 6, 4, 16)
    kv = torch.randn(2, 6, 2, 16)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    for options in ({}, {"window": 3}, {"seq_start": torch.zeros(2, 6, dtype=torch.int32)}, {"causal": False}):
        seen.clear()
        with Watch(), warnings.catch_warnings():
            warnings.simplefilter("error")
            y = ops.attention.load("sdpa_flash").function(q, kv, kv, **options)
        assert flash in seen
        assert y.shape == q.shape
        assert y.is_contiguous()


@pytest.mark.parametrize(
    ("Tq", "Tk", "causal", "window", "documents"),
    [
        (300, 300, True, 0, False),
        (256, 256, True, 0, False),
        (300, 300, True, 130, False),
        (512, 512, True, 40, True),
        (300, 300, True, 0, True),
        (130, 400, True, 0, False),
        (400, 130, True, 0, False),
        (1, 300, True, 0, False),
        (200, 300, False, 50, False),
        (260, 260, False, 0, True),
        (300, 300, True, 0, "anywhere"),
        (300, 300, False, 140, "anywhere"),
        (64, 64, True, 0, False),
    ],
)
def test_flexs_tile_table_covers_what_is_visible_and_marks_only_what_is_visible_throughout(
    Tq, Tk, causal, window, documents
):
    B = 2
    seq_start = None
    if documents:
        lengths = torch.tensor([[0, 90, 91, 200, 256], [0, 1, 128, 129, 255]])
        i = torch.arange(Tq)
        seq_start = torch.stack([row[torch.searchsorted(row, i, right=True) - 1] for row in lengths]).to(torch.int32)
    if documents == "anywhere":  # within a tile the first query's start is neither the least nor the greatest
        seq_start = torch.where(i % 3 == 1, (Tk + 5) * (i // 128), torch.where(i % 3 == 2, 0, seq_start)).int()
    mask = impl_flex._block_mask(Tq, Tk, seq_start, causal, window, torch.device("cpu"))

    def table(counts, columns):
        dense = torch.zeros(*counts.shape, columns.shape[-1], dtype=torch.bool)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            row = tuple(index)
            dense[row][columns[row][: counts[row]].long()] = True
        return dense

    partly = table(mask.kv_num_blocks, mask.kv_indices)
    throughout = table(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partly & throughout).any()
    true = create_block_mask(mask.mask_mod, B if documents else None, None, Tq, Tk, device="cpu")
    true_partly = table(true.kv_num_blocks, true.kv_indices)
    true_throughout = table(true.full_kv_num_blocks, true.full_kv_indices)
    assert not ((true_partly | true_throughout) & ~(partly | throughout)).any()  # nothing visible is left out
    assert not (throughout & ~true_throughout).any()  # nothing hidden is let through
    if Tq == Tk and not documents:  # and the table is not longer than need be
        assert torch.equal(partly | throughout, true_partly | true_throughout)
        assert torch.equal(throughout, true_throughout)


def test_flex_is_one_graph():
    torch._dynamo.reset()
    q, kv = torch.randn(1, 40, 4, 16), torch.randn(1, 40, 2, 16)
    starts = torch.zeros(1, 40, dtype=torch.int32)
    starts[:, 25:] = 25
    options = {"window": 20, "softcap": 4.0}

    flex = ops.attention.load("flex").function
    attend = torch.compile(lambda q, kv, s: flex(q, kv, kv, s, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(attend(q, kv, starts), ops.attention.reference(q, kv, kv, starts, **options))


def test_without_anything_hidden_flex_and_sdpa_make_no_mask():
    assert impl_flex._block_mask(5, 9, None, False, 0, torch.device("cpu")) is None
    q = torch.randn(1, 1, 2, 16)
    k = torch.randn(1, 9, 2, 16)
    for backend in ("sdpa", "sdpa_flash"):
        torch.testing.assert_close(
            ops.attention.load(backend).function(q, k, k), ops.attention.reference(q, k, k)
        )  # fmt: skip
