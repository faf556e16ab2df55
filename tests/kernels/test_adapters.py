"""Adapters of other packages, over fakes with those packages' strict signatures (tests/kernels/fakes), in the contract.

That the real kernels compute the same is not shown here: each adapter says so in UNPROVEN.
"""

import importlib.util
import pathlib
import sys

import pytest
import torch

from tritium.kernels import contract, ops
from tritium.kernels.lib import nvidia_apex
from tritium.kernels.op import KernelError
from tritium.kernels.site import Machine, Site

FAKES = str(pathlib.Path(__file__).with_name("fakes"))
FAKED = ("flash_attn", "apex", "amp_C")
H100 = Machine("cuda", "sm_90", packages={"flash-attn": "2.8.3", "apex": "0.1", "triton": "3.6.0"})
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ADAPTERS = {
    ("attention", "flash_attn"): (FP16, BF16),
    ("cross_entropy", "flash_attn"): (FP32, FP16, BF16),
    ("layer_norm", "apex"): (FP32, FP16, BF16),
    ("rms_norm", "apex"): (FP32, FP16, BF16),
    ("cross_entropy", "apex"): (FP32, FP16),
    ("adamw", "apex"): (FP32, FP16, BF16),
}


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in FAKED]:
        del sys.modules[name]


@pytest.mark.parametrize(("name", "backend"), ADAPTERS, ids=lambda v: v)
def test_an_adapter_keeps_the_contract(name, backend, fakes):
    op = ops.OPS[name]
    assert op.load(backend).unproven.startswith("never run on a GPU")
    ran = set()
    for case in op.cases.CASES:
        if case.large:
            continue
        for dtype in ADAPTERS[name, backend]:
            report = contract.check(op, backend, case, dtype, machine=H100)
            assert report.status != "failed", report
            assert report.ok or len(report.reason) > 20
            if report.ok:
                ran.add((case.name, dtype))
    names = {case for case, _ in ran}
    assert {d for _, d in ran} == set(ADAPTERS[name, backend])
    expected = {
        "attention": {
            "grouped",
            "more_queries",
            "window_more_keys",
            "softcap",
            "documents",
            "documents_window_softcap",
        },
        "cross_entropy": {"padded", "ignored", "all_ignored", "ignore_index_in_range", "smoothing"},
        "layer_norm": {"odd", "wide_weights", "three_axes", "large_eps"},
        "rms_norm": {"odd", "wide_weight", "no_weight", "heads"},
        "adamw": {"empty_tensor", "no_tensors", "clipped", "skipped", "no_copies", "fp32_grads"},
    }[name]
    assert expected <= names


@pytest.mark.parametrize(("name", "backend"), ADAPTERS, ids=lambda v: v)
def test_without_its_package_an_adapter_says_how_to_get_it(name, backend):
    site = Site(op=name, machine=Machine("cuda", "sm_90", packages={"triton": "3.6"}), dtype=FP16)
    reason = ops.OPS[name].load(backend).unsupported(site)
    if backend == "flash_attn":
        assert reason == "needs the package flash-attn, which is not installed; pip install flash-attn"
    else:
        assert "from its repository NVIDIA/apex" in reason
        assert "unrelated web toolkit" in reason


@pytest.mark.parametrize(("name", "backend"), ADAPTERS, ids=lambda v: v)
def test_on_a_cpu_an_adapter_is_refused(name, backend):
    site = Site(op=name, machine=Machine("cpu", "x86_64", packages=H100.packages), dtype=FP16)
    assert "this site is on cpu" in ops.OPS[name].load(backend).unsupported(site)


def test_the_web_toolkit_named_apex_is_not_taken_for_nvidias(monkeypatch):
    monkeypatch.setattr(Machine, "version", lambda self, package: "0.9.10.dev0" if package == "apex" else None)
    here = Site(op="layer_norm", machine=Machine("cuda", "sm_90"))
    assert importlib.util.find_spec("fused_layer_norm_cuda") is None
    reason = nvidia_apex.unavailable(here, "fused_layer_norm_cuda")
    assert "so it is not NVIDIA's or lacks that extension" in reason
    monkeypatch.syspath_prepend(FAKES)
    assert nvidia_apex.unavailable(here, "amp_C") is None
    assert "amp_C" not in sys.modules  # looked up, not imported


@pytest.mark.parametrize(
    ("name", "backend", "changes", "words"),
    [
        ("attention", "flash_attn", {"dtype": FP32}, "float16 and bfloat16, this site in float32"),
        ("attention", "flash_attn", {"options": {"dropout": 0.1}}, "could not be repeated from its seed"),
        ("attention", "flash_attn", {"shape": {"D": 512}}, "D=512"),
        ("attention", "flash_attn", {"options": {"documents": True}, "compiled": True}, "from the host"),
        ("attention", "flash_attn", {"options": {"documents": True, "causal": False}}, "documents only for causal"),
        ("attention", "flash_attn", {"machine": Machine("cuda", "sm_75", packages=H100.packages)}, "sm_75"),
        ("cross_entropy", "flash_attn", {"options": {"softcap": 30.0}}, "no softcap"),
        ("cross_entropy", "flash_attn", {"compiled": True}, "torch.compile cannot trace"),
        ("cross_entropy", "apex", {"options": {"z_loss": 1e-4}}, "no z_loss"),
        ("cross_entropy", "apex", {"dtype": BF16}, "log-sum-exp to bfloat16"),
        ("cross_entropy", "apex", {"compiled": True}, "torch.compile cannot trace"),
        ("layer_norm", "apex", {"options": {"bias": False}}, "without a bias"),
        ("layer_norm", "apex", {"options": {"wide": True}, "compiled": True}, "cannot be traced"),
        ("layer_norm", "apex", {"shape": {"N": 0, "C": 8}}, "no kernel for an empty tensor"),
        ("rms_norm", "apex", {"options": {"wide": True}, "compiled": True}, "cannot be traced"),
        ("adamw", "apex", {"compiled": True}, "choose torch_fused"),
    ],
)
def test_what_a_package_cannot_do_is_refused_with_a_remedy(name, backend, changes, words):
    site = Site(**{"op": name, "machine": H100, "dtype": FP16, **changes})
    reason = ops.OPS[name].load(backend).unsupported(site)
    assert words in reason
    assert ";" in reason  # rule and value; remedy
    good = Site(op=name, machine=H100, dtype=FP16)
    assert ops.OPS[name].load(backend).unsupported(good) is None


def test_calls_that_the_site_could_not_foresee_are_refused(fakes):
    x, w = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(KernelError, match="without a bias"):
        ops.layer_norm.load("apex").function(x, w)
    q = torch.randn(1, 4, 2, 8, dtype=BF16)
    attention = ops.attention.load("flash_attn").function
    with pytest.raises(KernelError, match="could not be repeated"):
        attention(q, q, q, dropout=0.1, seed=torch.tensor(0))
    with pytest.raises(KernelError, match="as many queries as keys"):
        attention(q[:, :2], q, q, torch.zeros(3, dtype=torch.int32))


def test_flash_attns_sequences_are_padded_to_a_power_of_two():
    prepare = ops.attention.load("flash_attn").prepare
    starts = torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]], dtype=torch.int32)
    bounds = prepare(starts)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 2, 5, 6, 9, 10, 10, 10]
    assert prepare(torch.zeros(1, 3, dtype=torch.int32)).tolist() == [0, 3]
    assert prepare(torch.zeros(4, 3, dtype=torch.int32)).tolist() == [0, 3, 6, 9, 12, 12, 12, 12]


def test_deterministic_mode_reaches_flash_attn(fakes, monkeypatch):
    import flash_attn

    seen = []
    monkeypatch.setattr(flash_attn, "flash_attn_func", lambda q, k, v, **o: seen.append(o["deterministic"]) or q)
    q = torch.randn(1, 4, 2, 8, dtype=BF16)
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)
        try:
            ops.attention.load("flash_attn").function(q, q, q)
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, True]
