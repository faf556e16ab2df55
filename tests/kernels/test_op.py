"""The op contract: discovery, loading, binding, the reasons in errors, and what auto means."""

import sys

import pytest
import torch
from torch import Tensor, nn

from tritium.kernels import op as op_module
from tritium.kernels import ops
from tritium.kernels.op import CallSite, KernelError, Tuned, auto, bind, call_sites, enter, format_table
from tritium.kernels.site import PHASES, Machine, Site

CPU = Machine("cpu", "x86_64", packages={})
H100 = Machine("cuda", "sm_90", packages={"triton": "3.6.0", "flash-attn": "2.8.3"})

BACKEND = '''
import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Twice the layer norm, to be told from the real one."""
    return 2 * torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
'''


class Block(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C))
        self.norm = CallSite(ops.layer_norm, shape={"C": C}, options={"bias": False})
        self.attend = CallSite(ops.attention, shape={"D": C, "H": 1, "G": 1}, options={"causal": True})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x, self.weight)
        return x + self.attend(x[:, :, None], x[:, :, None], x[:, :, None])[:, :, 0]


class Model(nn.Module):
    def __init__(self, C: int = 16, layers: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(C) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    """What auto means is given by each test, not by the entries that ship."""
    monkeypatch.setattr(op_module, "tuning", lambda: ())


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write a module of the user's own; gives a function (name, source) → None."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def write(name: str, source: str = BACKEND) -> None:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)
        for op in ops.OPS.values():
            op._loaded.pop(name, None)


# ------------------------------------------------------------------------------------------------------------ catalogue


def test_every_op_has_a_reference_of_its_name_and_cases():
    assert list(ops.OPS) == [
        "linear", "embedding", "attention", "attention_lse", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm",
        "rope", "gelu", "swiglu", "geglu", "relu2", "cross_entropy", "linear_cross_entropy", "global_norm", "adamw",
        "adamw_8bit",
    ]  # fmt: skip
    for name, op in ops.OPS.items():
        assert op.reference.__name__ == name
        assert op.cases.CASES
        assert op.backends()[0] == "reference"


def test_the_folder_listing_is_the_registry():
    found = ops.attention.backends()
    assert {"sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flex", "flash_attn"} <= set(found)
    assert "sdpa_common" not in found
    files = {p.stem.removeprefix("impl_") for p in ops.attention.folder.glob("impl_*.py")}
    assert set(found) == files | {"reference"}


def test_every_backend_in_the_tree_loads_with_the_references_signature():
    for op in ops.OPS.values():
        for name in op.backends():
            assert callable(op.load(name).function), (op, name)


# -------------------------------------------------------------------------------------------------------------- loading


def test_an_unknown_backend_names_those_there_are():
    with pytest.raises(
        KernelError, match=r"no backend 'tritn'; the nearest are triton, .*; it has reference, .*module path"
    ):
        ops.layer_norm.load("tritn")


def test_a_wrong_signature_prints_both(mine):
    mine("wrong_signature.norm", BACKEND.replace("eps: float = 1e-5", "eps: float = 1e-6"))
    with pytest.raises(KernelError) as error:
        ops.layer_norm.load("wrong_signature.norm")
    assert "eps: float = 1e-05" in str(error.value)
    assert "eps: float = 1e-06" in str(error.value)
    assert "reference: layer_norm(" in str(error.value)


def test_a_module_without_the_function_or_that_fails_to_import_says_so(mine):
    mine("no_function.norm", "x = 1\n")
    with pytest.raises(KernelError, match=r"module no_function\.norm defines no function layer_norm"):
        ops.layer_norm.load("no_function.norm")
    mine("bad_import.norm", "import no_such_package\n")
    with pytest.raises(
        KernelError, match=r"importing bad_import\.norm failed: ModuleNotFoundError: No module named 'no_such_package'"
    ):
        ops.layer_norm.load("bad_import.norm")
    with pytest.raises(KernelError, match=r"importing not_there\.norm failed"):
        ops.layer_norm.load("not_there.norm")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return site.shape['X']", r"unsupported\(site\) raised KeyError: 'X'"),
        ("return False", r"unsupported\(site\) returned False; it returns None where it can serve the site"),
    ],
)
def test_an_answer_that_is_none_is_a_kernel_error(mine, body, words):
    name = "no_answer.norm"
    mine(name, BACKEND + f"\n\ndef unsupported(site):\n    {body}\n")
    site = Site("layer_norm", CPU, "here", "train", torch.float32, {"C": 8}, {})
    with pytest.raises(KernelError, match=rf"backend '{name}' of op layer_norm: {words}"):
        ops.layer_norm.load(name).unsupported(site)
    assert "unsupported(site)" in ops.layer_norm.why_not(site, [name])[name]


def test_bring_your_own_module(mine):
    mine("my_package.my_norm")
    model = Model()
    rows = bind(model, {"layer_norm": "my_package.my_norm"}, machine=CPU)
    assert {r.backend for r in rows if r.op == "layer_norm"} == {"my_package.my_norm"}
    x, w = torch.randn(2, 3, 16), torch.randn(16)
    assert torch.equal(model.blocks[0].norm(x, w), 2 * ops.layer_norm.reference(x, w))


def test_an_entry_point_is_a_backend_by_name(mine, tmp_path):
    mine("my_plugin.norm")
    info = tmp_path / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tritium.kernels]\nlayer_norm.doubled = my_plugin.norm\n")
    op_module._entry_points.cache_clear()
    try:
        assert "doubled" in ops.layer_norm.backends()
        assert "doubled" not in ops.rms_norm.backends()
        assert ops.layer_norm.load("doubled").module.__name__ == "my_plugin.norm"
    finally:
        op_module._entry_points.cache_clear()
        ops.layer_norm._loaded.pop("doubled", None)


# -------------------------------------------------------------------------------------------------------------- binding


def bound(model: nn.Module, **arguments: object) -> dict[tuple[str, str, str], str]:
    return {(r.site, r.op, r.phase): r.backend for r in bind(model, machine=CPU, **arguments)}


def test_every_site_is_bound_for_every_phase_and_the_table_says_why():
    model = Model()
    assert [path for path, _ in call_sites(model)] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    rows = bind(model, {"attention": "sdpa"}, machine=CPU)
    assert len(rows) == 4 * len(PHASES)
    assert {r.why for r in rows if r.op == "attention"} == {"chosen: attention=sdpa"}
    assert {r.why for r in rows if r.op == "layer_norm"} == {"auto: nothing measured for this site"}
    text = format_table(rows)
    assert len(text.splitlines()) == 3  # the two layers agree, so they share their lines
    assert "blocks.*" in text
    assert "chosen: attention=sdpa" in text


def test_a_layer_outranks_an_op_outranks_the_default_and_a_phase_is_more_specific():
    choices = {
        "blocks.1:attention": "sdpa_flash",
        "attention@decode": "sdpa",
        "attention": "reference",
        "*": "sdpa",
    }
    table = bound(Model(), choices=choices)
    assert table["blocks.0", "attention", "train"] == "reference"
    assert table["blocks.0", "attention", "decode"] == "sdpa"
    assert table["blocks.1", "attention", "train"] == "sdpa_flash"
    assert table["blocks.1", "attention", "decode"] == "sdpa_flash"
    assert table["blocks.0", "layer_norm", "train"] == "reference"  # it has no sdpa: auto


def test_of_two_equal_keys_the_later_wins():
    table = bound(Model(), choices={"blocks.*:attention": "sdpa", "blocks.0:attention": "reference"})
    assert (table["blocks.0", "attention", "train"], table["blocks.1", "attention", "train"]) == ("reference", "sdpa")
    table = bound(Model(), choices={"blocks.0:attention": "reference", "blocks.*:attention": "sdpa"})
    assert table["blocks.0", "attention", "train"] == "sdpa"


def test_one_name_for_all_means_every_op_that_has_it():
    model = Model()
    rows = bind(model, "sdpa", machine=CPU)
    assert {(r.op, r.backend) for r in rows} == {("attention", "sdpa"), ("layer_norm", "reference")}
    assert "layer_norm has no sdpa" in next(r.why for r in rows if r.op == "layer_norm")


def test_a_choice_that_cannot_be_met_lists_every_backends_reason():
    with pytest.raises(KernelError) as error:
        bind(Model(), {"attention": "sdpa_cudnn"}, machine=CPU)
    text = str(error.value)
    where = "blocks.0 and 1 more (train, eval, prefill, decode; cpu)"
    assert f"attention=sdpa_cudnn was chosen and cannot serve {where}: torch's cuDNN attention is for GPUs" in text
    assert text.count("was chosen") == 1  # once, not once per layer and phase
    for name in ops.attention.backends():
        assert f"    {name}" in text
    assert "reference        can" in text
    assert "needs the package flash-attn, which is not installed" in text


def test_a_refused_choice_leaves_no_silent_fallback():
    model = Model()
    with pytest.raises(KernelError):
        bind(model, {"blocks.1:attention": "sdpa_cudnn"}, machine=CPU)


def test_a_key_that_matches_nothing_is_an_error():
    with pytest.raises(KernelError, match=r"kernel choice atention matches no call site.*attention, layer_norm"):
        bind(Model(), {"atention": "sdpa"}, machine=CPU)
    with pytest.raises(KernelError, match=r"blocks\.7:attention matches no call site"):
        bind(Model(), {"blocks.7:attention": "sdpa"}, machine=CPU)


def test_all_problems_are_reported_at_once():
    with pytest.raises(KernelError) as error:
        bind(Model(), {"attention": "sdpa_cudnn", "layer_norm": "nonesuch", "rope": "triton"}, machine=CPU)
    text = str(error.value)
    assert "sdpa_cudnn was chosen" in text
    assert "has no backend 'nonesuch'" in text
    assert "kernel choice rope matches no call site" in text


def test_phases_switch_functions_and_an_unbound_phase_is_an_error():
    model = Model()
    bind(model, {"attention": "sdpa", "attention@decode": "reference"}, machine=CPU, phases=("train", "decode"))
    site = model.blocks[0].attend
    assert (site.backend, site.function) == ("sdpa", ops.attention.load("sdpa").function)
    enter(model, "decode")
    assert (site.backend, site.function) == ("reference", ops.attention.reference)
    with pytest.raises(KernelError, match="bound for train, decode and not for 'eval'"):
        enter(model, "eval")
    with pytest.raises(KernelError, match="phase must be one of train, eval, prefill, decode, not 'test'"):
        enter(model, "test")


def test_a_model_in_eval_mode_enters_its_first_bound_phase_and_unbound_sites_run_the_reference():
    model = Model()
    assert model.blocks[0].attend.backend == "reference"
    model(torch.randn(1, 4, 16))
    model.eval()
    bind(model, {"attention@eval": "sdpa"}, machine=CPU, phases=("eval",))
    assert model.blocks[0].attend.backend == "sdpa"


def test_a_plan_for_an_h100_is_made_on_this_machine():
    rows = bind(Model(C=64), {"attention": "flash_attn"}, machine=H100, dtype=torch.bfloat16, compiled=True)
    assert {r.backend for r in rows if r.op == "attention"} == {"flash_attn"}
    with pytest.raises(KernelError, match="computes in float16 and bfloat16, this site in float32"):
        bind(Model(C=64), {"attention": "flash_attn"}, machine=H100)
    with pytest.raises(KernelError, match=r"compute capability 8\.0"):
        bind(
            Model(C=64), {"attention": "flash_attn"}, dtype=torch.bfloat16,
            machine=Machine("cuda", "sm_75", packages={"flash-attn": "2.8.3"}),
        )  # fmt: skip


def test_a_site_of_another_dtype_says_so():
    model = nn.Module()
    model.norm = CallSite(ops.attention, dtype=torch.float32)
    with pytest.raises(KernelError, match="this site in float32"):
        bind(model, {"attention": "sdpa_flash"}, machine=H100, dtype=torch.bfloat16)


def test_options_of_training_hold_in_that_phase_alone():
    model = nn.Module()
    model.attend = CallSite(ops.attention, options={"causal": True}, training={"dropout": 0.1})
    with pytest.raises(KernelError, match=r"attention=sdpa was chosen and cannot serve this site \(train; cpu\)"):
        bind(model, {"attention": "sdpa"}, machine=CPU)
    table = bound(model, choices={"attention": "sdpa", "attention@train": "reference"})
    assert [table["", "attention", phase] for phase in PHASES] == ["reference", "sdpa", "sdpa", "sdpa"]
    assert model.attend.site(CPU, "", "train", torch.float32).options == {"causal": True, "dropout": 0.1}
    assert model.attend.site(CPU, "", "eval", torch.float32).options == {"causal": True}


@pytest.mark.parametrize(
    ("weights", "own", "dtype", "wide"),
    [
        (torch.float32, None, torch.bfloat16, True),
        (torch.float32, None, torch.float32, False),
        (torch.float32, None, torch.float64, False),
        (torch.float32, torch.float32, torch.bfloat16, False),  # this site's x is fp32 too
        (None, None, torch.bfloat16, False),
    ],
)
def test_a_site_whose_weights_keep_their_dtype_is_wide_beside_a_narrower_x(weights, own, dtype, wide):
    call = CallSite(ops.layer_norm, shape={"C": 8}, dtype=own, weights=weights)
    assert call.site(CPU, "", "train", dtype).options.get("wide", False) is wide


def test_a_model_and_its_optimizer_are_bound_together():
    class Optimizer:
        def __init__(self):
            self.update = CallSite(ops.adamw)

        def call_sites(self):
            yield "optimizer", self.update

    model, optimizer = Model(), Optimizer()
    rows = bind([model, optimizer], {"adamw": "torch_fused"}, machine=CPU)
    assert {(r.site, r.backend) for r in rows if r.op == "adamw"} == {("optimizer", "torch_fused")}
    assert optimizer.update.backend == "torch_fused"


def test_two_models_with_different_kernels_compile_side_by_side():
    torch._dynamo.reset()
    torch.manual_seed(0)
    first, second = Model(), Model()
    second.load_state_dict(first.state_dict())
    bind(first, "reference", machine=CPU)
    bind(second, {"attention": "sdpa", "blocks.0:attention": "sdpa_flash"}, machine=CPU)
    x = torch.randn(2, 5, 16)
    outputs = []
    for model in (first, second, first, second):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        outputs.append((compiled(x), model.blocks[0].weight.grad.clone()))
        model.zero_grad()
    for (y, grad), (other, other_grad) in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.equal(y, other)
        assert torch.equal(grad, other_grad)
    assert [s.backend for _, s in call_sites(first)] == ["reference"] * 4
    assert [s.backend for _, s in call_sites(second)] == ["reference", "sdpa_flash", "reference", "sdpa"]
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1])


def test_prepare_is_the_backends_own(mine):
    mine("prepared.norm", BACKEND + "\n\ndef prepare(seq_start):\n    return seq_start + 1\n")
    assert ops.layer_norm.load("prepared.norm").prepare(1) == 2
    assert ops.layer_norm.load("reference").prepare is None
    assert ops.attention.load("flash_attn").unproven.startswith("never run on a GPU")
    assert ops.attention.load("sdpa").unproven is None


# ----------------------------------------------------------------------------------------------------------------- auto


def at(**changes: object) -> Site:
    values = {"op": "attention", "machine": CPU, "dtype": torch.float32, "shape": {"D": 64}, **changes}
    return Site(**values)


def entry(**changes: object) -> Tuned:
    values = {"arch": "x86_64", "op": "attention", "order": ("sdpa_flash",), "evidence": "record 7", **changes}
    return Tuned(**values)


def test_auto_takes_the_first_measured_backend_that_can_and_says_why():
    entries = [entry(order=("sdpa_cudnn", "sdpa_flash", "reference"))]
    name, why = auto(ops.attention, at(), entries)
    assert name == "sdpa_flash"
    assert why.startswith("auto: record 7 (not sdpa_cudnn: ")
    assert "for GPUs and this site is on cpu" in why


def test_auto_falls_back_to_the_reference_with_every_reason():
    name, why = auto(ops.attention, at(options={"softcap": 5.0}), [entry(order=("sdpa_flash", "sdpa"))])
    assert name == "reference"
    assert "not sdpa_flash: SDPA has no soft cap" in why
    assert "not sdpa: SDPA has no soft cap" in why
    assert auto(ops.attention, at(), []) == ("reference", "auto: nothing measured for this site")


@pytest.mark.parametrize(
    ("changes", "covered"),
    [
        ({}, True),
        ({"arch": "sm_90"}, False),
        ({"arch": "x86*"}, True),
        ({"op": "layer_norm"}, False),
        ({"compiled": False}, True),
        ({"compiled": True}, False),
        ({"dtype": "float32"}, True),
        ({"dtype": "bfloat16"}, False),
        ({"phase": "train"}, True),
        ({"phase": "decode"}, False),
        ({"shape": {"D": (64, 128)}}, True),
        ({"shape": {"D": (65, 128)}}, False),
        ({"shape": {"H": (1, 99)}}, False),  # the site does not say H
    ],
)
def test_an_entry_covers_only_what_it_names(changes, covered):
    assert entry(**changes).covers(at()) is covered


def test_the_first_covering_entry_decides():
    entries = [entry(arch="sm_90", order=("flex",)), entry(order=("sdpa",), evidence="record 8"), entry()]
    assert auto(ops.attention, at(), entries) == ("sdpa", "auto: record 8")


def test_a_default_that_no_op_has_is_an_error_with_the_nearest_names():
    for choices in ("tritn", {"*": "tritn"}, {"*@train": "tritn"}):
        with pytest.raises(KernelError, match=r"no op of this model has a backend 'tritn'; the nearest are triton, "):
            bind(Model(), choices)


def test_a_module_that_fails_in_any_way_while_imported_is_a_kernel_error(tmp_path, monkeypatch):
    (tmp_path / "broken_pkg").mkdir()
    (tmp_path / "broken_pkg" / "__init__.py").write_text("")
    (tmp_path / "broken_pkg" / "norm.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KernelError, match=r"importing broken_pkg\.norm failed: ZeroDivisionError"):
        ops.layer_norm.load("broken_pkg.norm")
