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
from tritium.kernels.op import KernelError, tuning
from tritium.kernels.site import Machine, Site

FAKES = str(pathlib.Path(__file__).with_name("fakes"))
FAKED = ("flash_attn", "apex", "amp_C", "liger_kernel", "quack", "cut_cross_entropy")
PACKAGES = {
    "flash-attn": "2.8.3", "apex": "0.1", "triton": "3.6.0", "liger-kernel": "0.8.5", "quack-kernels": "0.6.5",
    "cut-cross-entropy": "25.1.1", "flash-attn-4": "4.0.0b36",
}  # fmt: skip
H100 = Machine("cuda", "sm_90", packages=PACKAGES)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ADAPTERS = {
    ("attention", "flash_attn"): (FP16, BF16),
    ("cross_entropy", "flash_attn"): (FP32, FP16, BF16),
    ("layer_norm", "apex"): (FP32, FP16, BF16),
    ("rms_norm", "apex"): (FP32, FP16, BF16),
    ("cross_entropy", "apex"): (FP32, FP16),
    ("adamw", "apex"): (FP32, FP16, BF16),
    ("attention", "flash_attn_4"): (FP16, BF16),
    ("layer_norm", "liger"): (FP32, FP16, BF16),
    ("rms_norm", "liger"): (FP32, FP16, BF16),
    ("add_rms_norm", "liger"): (FP32, FP16, BF16),
    ("swiglu", "liger"): (FP32, FP16, BF16),
    ("geglu", "liger"): (FP32, FP16, BF16),
    ("relu2", "liger"): (FP32, FP16, BF16),
    ("rope", "liger"): (FP32, FP16, BF16),
    ("cross_entropy", "liger"): (FP32,),
    ("linear_cross_entropy", "liger"): (FP32, FP16, BF16),
    ("rms_norm", "quack"): (FP32, FP16, BF16),
    ("add_rms_norm", "quack"): (FP32, FP16, BF16),
    ("cross_entropy", "quack"): (FP32, FP16, BF16),
    ("linear_cross_entropy", "cut_cross_entropy"): (FP16, BF16),
}
NEEDS = {  # of every backend but apex, the package
    "flash_attn": "flash-attn", "flash_attn_4": "flash-attn-4", "liger": "liger-kernel", "quack": "quack-kernels",
    "cut_cross_entropy": "cut-cross-entropy",
}  # fmt: skip


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
        "attention": {"grouped", "softcap", "window_more_keys", "documents", "documents_window_softcap"},
        "cross_entropy": {"padded", "ignored", "all_ignored", "ignore_index_in_range"},
        "layer_norm": {"odd", "wide_weights", "three_axes", "large_eps"},
        "rms_norm": {"odd", "wide_weight", "no_weight", "heads"},
        "add_rms_norm": {"odd", "wide_weight", "heads", "vector"},
        "swiglu": {"scalar", "odd", "three_axes", "packed", "packed_extremes"},
        "geglu": {"scalar", "odd", "three_axes", "packed"},
        "relu2": {"scalar", "odd", "three_axes", "extremes"},
        "rope": {"odd", "grouped", "partial", "nothing_turns", "per_row_partial"},
        "linear_cross_entropy": {"odd", "all_ignored", "softcap", "evaluation", "same_dtype_weight"},
        "adamw": {"empty_tensor", "no_tensors", "clipped", "skipped", "no_copies", "fp32_grads"},
    }[name]
    expected |= {
        ("attention", "flash_attn"): {"more_queries"}, ("cross_entropy", "apex"): {"smoothing"},
        ("cross_entropy", "liger"): {"everything", "minus_infinity"},
        ("linear_cross_entropy", "liger"): {"everything", "smoothing"},
    }.get((name, backend), set())  # fmt: skip
    assert expected <= names


@pytest.mark.parametrize(("name", "backend"), ADAPTERS, ids=lambda v: v)
def test_without_its_package_an_adapter_says_how_to_get_it(name, backend):
    site = Site(op=name, machine=Machine("cuda", "sm_90", packages={"triton": "3.6"}), dtype=FP16)
    reason = ops.OPS[name].load(backend).unsupported(site)
    if backend in NEEDS:
        package = NEEDS[backend]
        pre = "--pre " * (backend == "flash_attn_4")
        assert reason == f"needs the package {package}, which is not installed; pip install {pre}{package}"
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
        ("attention", "flash_attn_4", {"machine": Machine("cuda", "sm_80", packages=PACKAGES)}, "sm_80"),
        ("attention", "flash_attn_4", {"dtype": FP32}, "float16 and bfloat16, this site in float32"),
        ("attention", "flash_attn_4", {"options": {"dropout": 0.1}}, "no dropout"),
        ("attention", "flash_attn_4", {"shape": {"D": 20}}, "D=20"),
        (
            "attention",
            "flash_attn_4",
            {"shape": {"D": 160}, "machine": Machine("cuda", "sm_100", packages=PACKAGES)},
            "D=160 channels on sm_100",
        ),
        (
            "attention",
            "flash_attn_4",
            {"shape": {"D": 256}, "options": {"softcap": 9.0}, "machine": Machine("cuda", "sm_100", packages=PACKAGES)},
            "no softcap",
        ),
        ("attention", "flash_attn_4", {"compiled": True}, "one graph cannot"),
        ("attention", "flash_attn_4", {"options": {"documents": True, "causal": False}}, "only for causal"),
        ("attention", "flash_attn_4", {"shape": {"Tq": 5, "Tk": 4}}, "sees no key"),
        ("attention", "flash_attn_4", {"options": {"scale": -0.5}}, "not positive"),
        ("attention", "flash_attn_4", {"shape": {"B": 0, "Tq": 4, "Tk": 4}}, "no kernel for an empty tensor"),
        ("layer_norm", "liger", {"options": {"bias": False}}, "always has a bias"),
        ("layer_norm", "liger", {"shape": {"N": 0, "C": 8}}, "no kernel for an empty tensor"),
        ("rms_norm", "liger", {"shape": {"N": 2, "C": 70000}}, "C=70000"),
        ("add_rms_norm", "liger", {"options": {"weight": False}}, "always has a weight"),
        ("geglu", "liger", {"options": {"approximate": "none"}}, "tanh approximation alone"),
        ("cross_entropy", "liger", {"dtype": BF16}, "each row's loss to bfloat16"),
        ("cross_entropy", "liger", {"dtype": FP32, "compiled": True}, "one graph cannot"),
        ("linear_cross_entropy", "liger", {"compiled": True}, "one graph cannot"),
        ("rms_norm", "quack", {"machine": Machine("cuda", "sm_80", packages=PACKAGES)}, "this is sm_80"),
        ("rms_norm", "quack", {"shape": {"N": 0, "C": 8}}, "no kernel for an empty tensor"),
        ("cross_entropy", "quack", {"options": {"label_smoothing": 0.1}}, "no label_smoothing"),
        ("cross_entropy", "quack", {"options": {"minus_infinity": 0.5}}, "-∞"),
        ("linear_cross_entropy", "cut_cross_entropy", {"dtype": FP32}, "this site is in float32"),
        ("linear_cross_entropy", "cut_cross_entropy", {"options": {"z_loss": 1e-4}}, "no z_loss"),
        ("linear_cross_entropy", "cut_cross_entropy", {"compiled": True}, "one graph cannot"),
        ("linear_cross_entropy", "cut_cross_entropy", {"shape": {"N": 0}}, "no kernel for an empty tensor"),
    ],
)
def test_what_a_package_cannot_do_is_refused_with_a_remedy(name, backend, changes, words):
    site = Site(**{"op": name, "machine": H100, "dtype": FP16, **changes})
    reason = ops.OPS[name].load(backend).unsupported(site)
    assert words in reason
    assert ";" in reason  # rule and value; remedy
    good = Site(op=name, machine=H100, dtype=ADAPTERS[name, backend][0])
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
    attention = ops.attention.load("flash_attn_4").function
    with pytest.raises(KernelError, match="no dropout"):
        attention(q, q, q, dropout=0.1, seed=torch.tensor(0))
    with pytest.raises(KernelError, match="as many queries as keys"):
        attention(q[:, :2], q, q, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(KernelError, match="always has a bias"):
        ops.layer_norm.load("liger").function(x, w)
    with pytest.raises(KernelError, match="always has a weight"):
        ops.add_rms_norm.load("liger").function(x, x)
    with pytest.raises(KernelError, match="tanh approximation"):
        ops.geglu.load("liger").function(x, x, "none")
    ids = torch.tensor([1, 2])
    with pytest.raises(KernelError, match="no softcap"):
        ops.cross_entropy.load("quack").function(x, ids, 8, softcap=3.0)
    with pytest.raises(KernelError, match="no label_smoothing"):
        ops.linear_cross_entropy.load("cut_cross_entropy").function(x, x, ids, 2, label_smoothing=0.1)


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
    for backend in ("flash_attn", "flash_attn_4"):  # the fake of the second calls the first's
        for mode in (False, True):
            torch.use_deterministic_algorithms(mode)
            try:
                ops.attention.load(backend).function(q, q, q)
            finally:
                torch.use_deterministic_algorithms(False)
    assert seen == [False, True, False, True]


def test_auto_takes_no_other_packages_kernel():
    named = {name for entry in tuning() for name in entry.order}
    assert not named & {backend for _, backend in ADAPTERS}
