"""Where a step's time goes: names of real kernels, made-up timelines, and costs put where they must be found."""

import dataclasses
import itertools
import json
import sys
import time
import types

import pytest
import torch

from tritium.benchmarks import anatomy, ours, peers
from tritium.benchmarks.anatomy import Event, Kernel
from tritium.engine.config import Config, GPTConfig, TrainConfig
from tritium.engine.step import MicroBatch
from tritium.kernels import ops
from tritium.kernels.layer_norm import reference

MODEL = GPTConfig(vocab_size=300, block_size=128, n_layer=2, n_head=4, n_embd=256)
CONFIG = Config(name="few", model=MODEL, train=TrainConfig(precision="fp32", compile="false"))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("aten::addmm", "GEMM"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>", "GEMM"),
        ("tritium::linear_triton", "GEMM"),
        ("triton_tem_fused_addmm_3", "GEMM"),
        ("flash_fwd_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, cutlass::bfloat16_t>>", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<cutlass::bfloat16_t>>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(AttentionKernel<cutlass::bfloat16_t>::Params)", "attention"),
        ("triton_tem_fused_flex_attention_backward_2", "attention"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float,4>>", "optimizer"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("triton_per_fused_native_layer_norm_backward_12", "norm"),
        ("graph_0_cpp_fused_add_mean_mul_pow_rsqrt_view_5", "norm"),
        ("graph_0_cpp_fused_add_div_expand_mul_pow_sum_view_5", "norm"),
        ("graph_0_cpp_fused_pow_relu_view_3", "activation"),
        ("triton_poi_fused_gelu_3", "activation"),
        ("graph_0_cpp_fused_add_cat_mul_neg_slice_slice_backward_unsqueeze_4", "position"),
        ("tritium::linear_cross_entropy_native", "loss"),
        ("aten::nll_loss_forward", "loss"),
        ("aten::embedding_dense_backward", "embedding"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "host to device"),
        ("tritium::adamw_triton", "optimizer"),
        ("aten::add_", None),
        ("## Call CompiledFxGraph abc ##", None),
    ],
)
def test_a_name_says_its_row(name, row):
    assert anatomy.classify(name) == row


def ms(times, row):
    return sum(times.get(row, {}).values())


def test_own_time_of_nested_events_adds_up():
    events = [
        Event("tritium::step", 0, 100),
        Event("tritium::data", 0, 10, 0),
        Event("tritium::op::rms_norm", 10, 40, 0),
        Event("aten::mul", 12, 30, 2, sequence=7),
        Event("aten::mm", 40, 60, 0),
        Event("autograd::engine::evaluate_function: MulBackward0", 60, 80, 0, sequence=7, backward=True),
        Event("aten::mul", 62, 78, 5, sequence=9),
        Event("aten::add", 80, 85, 0),
        Event("something of a user's", 85, 95, 0),
    ]
    times = anatomy.cpu_rows(events)
    got = {row: ms(times, row) * 1e3 for row in times}
    assert got == {"gaps": 5, "data wait": 10, "norm": 50, "GEMM": 20, "elementwise": 5, "other": 10}
    rows = {row["row"]: row for row in anatomy.table(times, 0.1, {"norm": 0.02})}
    assert rows["norm"]["backward_ms"] == pytest.approx(0.02)
    assert rows["norm"]["fraction"] == pytest.approx(0.4)
    failed = [check["name"] for check in anatomy.checks(list(rows.values())) if not check["ok"]]
    assert failed == ["other is at most 5 % of the step"]


def test_rows_that_do_not_add_up_to_the_step_are_said():
    rows = anatomy.table({"GEMM": {("aten::mm", False): 90.0}}, 100.0, {})
    assert [check["name"] for check in anatomy.checks(rows) if not check["ok"]] == ["the rows add up to the step"]


def test_a_product_inside_an_op_is_attentions_own_or_a_gemm():
    for op, row in (("attention", "attention"), ("linear_cross_entropy", "GEMM"), ("linear", "GEMM")):
        times = anatomy.cpu_rows([Event(f"tritium::op::{op}", 0, 10), Event("aten::mm", 0, 10, 0)])
        assert ms(times, row) == pytest.approx(0.01)


HOST = [
    Event("tritium::step", 0, 100),
    Event("tritium::data", 0, 12, 0),
    Event("tritium::op::layer_norm", 12, 20, 0),
    Event("aten::add", 20, 22, 0),
    Event("tritium::op::attention", 22, 24, 0),
    Event("aten::bmm", 22, 24, 4),
    Event("tritium::op::cross_entropy", 24, 26, 0, sequence=5),
    Event("autograd::engine::evaluate_function: EagerBackward", 26, 30, 0, sequence=5, backward=True),
]
STEP, _, NORM, ADD, _, BMM, LOSS, BACKWARD = range(len(HOST))


def test_a_devices_timeline_becomes_rows_gaps_and_exposed_communication():
    timeline = [
        Kernel("Memcpy HtoD (Pageable -> Device)", 10, 14),
        Kernel("mystery_kernel", 20, 50, NORM),
        Kernel("nvjet_tst_128", 45, 60, STEP),  # 5 of it beside the last one, on another stream
        Kernel("ncclDevKernel_AllReduce", 55, 75),  # 5 beside a product, 5 beside the next kernel
        Kernel("vectorized_elementwise_kernel", 70, 75, ADD),
        Kernel("nobody_knows", 90, 95),
    ]
    times = anatomy.device_rows(HOST, timeline, 0, 100)
    got = {row: round(ms(times, row) * 1e3, 6) for row in times}
    assert got == {
        "data wait": 10, "host to device": 4, "norm": 30, "GEMM": 10, "communication": 10, "elementwise": 5,
        "other": 5, "gaps": 26,
    }  # fmt: skip
    assert sum(got.values()) == 100


def test_a_kernel_belongs_where_it_was_launched_whatever_its_name():
    """Kernels of one name in several rows (every op in Triton calls its own _forward), a product inside attention, a
    backward."""
    timeline = [
        Kernel("_forward", 0, 10, NORM),
        Kernel("_forward", 10, 17, LOSS),
        Kernel("cutlass_80_tensorop_bf16_s16816gemm_bf16", 17, 20, BMM),
        Kernel("_forward", 20, 26, BACKWARD),
        Kernel("triton_per_fused_native_layer_norm_4", 26, 28, STEP),  # compiled: the host only starts the graph
        Kernel("elementwise_kernel", 28, 29, STEP),
    ]
    times = anatomy.device_rows(HOST, timeline, 0, 29)
    us = {row: {key: round(1e3 * value, 6) for key, value in names.items()} for row, names in times.items()}
    assert us == {
        "norm": {("_forward", False): 10, ("triton_per_fused_native_layer_norm_4", False): 2},
        "loss": {("_forward", False): 7, ("_forward", True): 6},
        "attention": {("cutlass_80_tensorop_bf16_s16816gemm_bf16", False): 3},
        "elementwise": {("elementwise_kernel", False): 1},
    }


def test_communication_that_is_hidden_costs_nothing():
    timeline = [Kernel("nvjet", 0, 100), Kernel("ncclDevKernel", 10, 90)]
    times = anatomy.device_rows(HOST[:1], timeline, 0, 100)
    assert {row: ms(times, row) for row in times} == {"GEMM": 0.1}


def seen(name, start, end, *, id=0, thread=1, device=False, sequence=-1, scope=0, annotation=False):
    """An event as torch.profiler gives it (autograd/profiler.py: a kernel has the id of the call that launched it)."""
    return types.SimpleNamespace(
        name=name, time_range=types.SimpleNamespace(start=start, end=end), id=id, thread=thread, is_async=False,
        device_type=torch.autograd.DeviceType.CUDA if device else torch.autograd.DeviceType.CPU, sequence_nr=sequence,
        scope=scope, is_user_annotation=annotation,
    )  # fmt: skip


def test_the_steps_of_a_profile_with_a_device():
    """The host's numbers for its own events (3 here) may be a launch's id as well; a launch may bear a thread of its
    own; the marks are repeated on the device; what lies between steps belongs to none."""
    profile = [
        seen("tritium::step", 100, 200, id=1),
        seen("tritium::op::layer_norm", 110, 130, id=2),
        seen("aten::empty", 111, 113, id=8),
        seen("cuLaunchKernelEx", 115, 118, id=3, thread=77),  # Triton's, without an operator around it
        seen("aten::mm", 140, 150, id=3),
        seen("cudaLaunchKernel", 142, 144, id=4),
        seen("autograd::engine::evaluate_function: EagerBackward", 160, 190, id=5, thread=2, sequence=9, scope=1),
        seen("cuLaunchKernel", 170, 171, id=6, thread=2),
        seen("tritium::op::layer_norm", 120, 195, device=True, annotation=True),
        seen("_forward", 120, 140, id=3, device=True),
        seen("gemm", 145, 165, id=4, device=True),
        seen("_backward", 175, 195, id=6, device=True),
        seen("from a graph", 196, 198, id=99, device=True),
        seen("after", 205, 210, id=3, device=True),
    ]
    ((start, end, host, kernels),) = anatomy._steps(profile)
    assert (start, end) == (100, 200)
    assert [event.name.rpartition("::")[2] for event in host] == [
        "step", "layer_norm", "empty", "mm", "evaluate_function: EagerBackward",
    ]  # fmt: skip
    assert [event.parent for event in host] == [-1, 0, 1, 0, -1]
    found = [(kernel.name, host[kernel.launched].name if kernel.launched >= 0 else None) for kernel in kernels]
    assert found == [
        ("_forward", "tritium::op::layer_norm"),
        ("gemm", "aten::mm"),
        ("_backward", "autograd::engine::evaluate_function: EagerBackward"),
        ("from a graph", None),
    ]


# ------------------------------------------------------------------------------------------------------- a real profile


@pytest.fixture
def twice(monkeypatch):
    """(module path, seconds of each call) of a layer_norm that computes everything twice and looks at its own watch."""
    module, spent = types.ModuleType("norm_twice.backend"), []

    def half(*args):
        """The norm again and again for 2 ms: long beside what the profiler itself takes."""
        start = time.perf_counter()
        while time.perf_counter() - start < 0.002:
            y = reference.layer_norm(*args)
        return y, time.perf_counter() - start

    def layer_norm(x, weight, bias=None, eps=1e-5):
        (_, first), (y, second) = (half(x, weight, bias, eps) for _ in range(2))
        spent.append((first, second))
        return y

    module.layer_norm = layer_norm
    monkeypatch.setitem(sys.modules, "norm_twice", types.ModuleType("norm_twice"))
    monkeypatch.setitem(sys.modules, "norm_twice.backend", module)
    yield "norm_twice.backend", spent
    for op in ops.OPS.values():
        op._loaded.pop("norm_twice.backend", None)


def training(norm="reference"):
    config = CONFIG.replace(kernels={"default": "reference"} | ({"layer_norm": norm} if norm != "reference" else {}))
    return ours.build(config, "cpu", 8)


def source(sleep_s=0.0, waited_s=None):
    """waited_s: gets what every wait really took, which is more than was asked for on a busy machine."""
    batches = itertools.cycle([MicroBatch(*b) for b in peers.batches(MODEL, 8, 128, 4, "cpu")])

    def take():
        start = time.perf_counter()
        if sleep_s:
            time.sleep(sleep_s)
        batch = next(batches)
        if waited_s is not None:
            waited_s.append(time.perf_counter() - start)
        return batch

    return take


def test_a_planted_wait_for_data_lands_in_its_row():
    trained = training()
    waited_s = []
    times, _ = anatomy.profile(trained, source(0.020, waited_s), steps=1)
    assert waited_s[-1] >= 0.020
    assert ms(times, "data wait") == pytest.approx(1e3 * waited_s[-1], rel=0.1)
    times, wall_ms = anatomy.profile(trained, source())
    assert ms(times, "data wait") < 10.0
    rows = anatomy.table(times, wall_ms, anatomy.roofline(trained, 8, 128, 1e12, 1e10))
    assert all(check["ok"] for check in anatomy.checks(rows))
    found = {row["row"] for row in rows}
    assert found >= {"GEMM", "attention", "norm", "activation", "loss", "embedding", "elementwise", "optimizer", "gaps"}
    assert all(
        row["roofline_ms"] is not None for row in rows if row["row"] in ("GEMM", "attention", "norm", "optimizer")
    )


def test_work_that_no_row_is_for_is_other_and_fails_the_run():
    """A sort is no elementwise work, though it is an operator of torch's like any."""
    trained = training()
    numbers = torch.rand(1 << 20)

    def planted(*_):
        torch.sort(numbers)

    trained.engine.model.register_forward_pre_hook(planted)
    times, wall_ms = anatomy.profile(trained, source(), steps=1)
    rows = anatomy.table(times, wall_ms, {})
    assert [check["name"] for check in anatomy.checks(rows) if not check["ok"]] == ["other is at most 5 % of the step"]
    (other,) = (row for row in rows if row["row"] == "other")
    assert other["top"][0]["name"] == "aten::sort"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("aten::add_", "elementwise"), ("aten::_foreach_mul_", "elementwise"), ("aten::sum", "elementwise"),
        ("aten::_to_copy", "elementwise"), ("aten::slice_backward", "elementwise"), ("aten::cat", "elementwise"),
        ("aten::sort", "other"), ("aten::_fft_r2c", "other"), ("aten::convolution", "other"), ("aten::topk", "other"),
        ("graph_0_cpp_fused_add_3", "elementwise"), ("triton_poi_fused_add_mul_0", "elementwise"),
    ],
)  # fmt: skip
def test_what_counts_as_elementwise(name, row):
    assert anatomy.rows_of([anatomy.Event(name, 0.0, 1.0)]) == [row]


def test_a_loader_that_is_slower_than_the_step_is_waited_for(tmp_path, monkeypatch):
    """tritium train's own loader, which reads ahead: only what the step does not hide is waited for."""
    from tritium.benchmarks.training import handing_out
    from tritium.engine.data.loader import Loader
    from tritium.engine.data.prepare import prepare

    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{"word " * 50}{i}"}}\n' for i in range(40)))
    prepare(tmp_path / "a.jsonl", tmp_path / "data", tokenizer="bytes", val_fraction=0.1, say=lambda _: None)
    trained = ours.build(CONFIG.replace(data={"folder": str(tmp_path / "data")}), "cpu", 1)
    batches, real = peers.batches(MODEL, 1, 32, 1, "cpu"), Loader.batch

    def slow(self, index):
        time.sleep(0.3)
        return real(self, index)

    monkeypatch.setattr(Loader, "batch", slow)
    with handing_out(trained, batches) as source:
        times, wall_ms = anatomy.profile(trained, source, steps=1)
    # a batch every 300 ms, less what the step has for itself
    assert wall_ms >= 250.0
    assert ms(times, "data wait") > 0.3 * wall_ms


def test_parts_whose_operators_have_no_name_of_their_own_are_told_by_their_call_sites():
    """In eager torch RMSNorm, rotary positions and SwiGLU are products and sums like any other."""
    model = dataclasses.replace(
        MODEL, norm="rms_norm", position="rope", activation="swiglu", bias=False, tie_head=False
    )  # fmt: skip
    config = CONFIG.replace(kernels={"default": "reference"})
    trained = ours.build(dataclasses.replace(config, model=model), "cpu", 8)
    times, wall_ms = anatomy.profile(trained, source(), steps=1)
    for row in ("norm", "position", "activation"):
        for backward in (False, True):
            assert sum(value for (_, back), value in times[row].items() if back == backward) > 0.0
    # residuals, gradients that are added up, the loss's scale
    assert ms(times, "elementwise") < 0.1 * wall_ms


def forward_ms(times, row):
    return sum(value for (_, backward), value in times[row].items() if not backward)


def test_a_norm_that_computes_twice_lands_in_its_row_twice(twice):
    """Held to the norm's own watch in the very same step, so that a busy machine lengthens both alike."""
    path, spent = twice
    trained = training(path)
    for _ in range(3):
        spent.clear()
        times, _ = anatomy.profile(trained, source(), steps=1)
        calls = spent[len(spent) // 2 :]  # the first step is not profiled
        assert len(calls) == 2 * MODEL.n_layer + 1
        first, second = (1e3 * sum(halves) for halves in zip(*calls, strict=True))
        assert forward_ms(times, "norm") == pytest.approx(first + second, rel=0.1)
        assert min(first, second) > 0.1 * (first + second)  # or a row that misses one of them would not be seen


def test_every_profiled_step_is_alone_in_its_profile(monkeypatch):
    """What a profile keeps of one step lengthens the next (large blocks are allocated anew: GEMM, it seems)."""
    import torch.profiler

    trained = training()

    class Spy(torch.profiler.profile):
        def __enter__(self):
            trained.before = len(steps)
            return super().__enter__()

        def __exit__(self, *args):
            profiled.append(range(trained.before, len(steps)))
            return super().__exit__(*args)

    profiled, steps, step = [], [], trained.step
    monkeypatch.setattr(trained, "step", lambda *args: steps.append(step(*args)))
    monkeypatch.setattr(torch.profiler, "profile", Spy)
    anatomy.profile(trained, source(), steps=3)
    assert [list(steps) for steps in profiled] == [[1], [3], [5]]


def test_marks_are_gone_afterwards():
    trained = training()
    before = [site.function for _, site in anatomy_sites(trained)]
    anatomy.profile(trained, source(), steps=1)
    assert [site.function for _, site in anatomy_sites(trained)] == before
    assert "step" not in vars(trained.engine.optimizer)


def anatomy_sites(trained):
    from tritium.kernels.op import call_sites

    return list(call_sites([trained.engine.model, trained.engine.optimizer]))


def test_the_picture_is_drawn(tmp_path):
    rows = anatomy.table(anatomy.cpu_rows(HOST), 0.1, {"norm": 0.001})
    anatomy.draw(rows, "a step", tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "norm" in anatomy.text(rows)
    assert json.loads(json.dumps(rows)) == rows


def test_roofline_of_gpt2_124m_is_the_hand_computed_one():
    """N = 2·256 tokens, 12 layers of 12·768² weights and a head of 768·50304, 6 FLOPs a weight and token; attention's
    two products over half a square, 4·T·768 a token, 2.5 times that backward (the scores are computed again)."""
    config = Config(model=dataclasses.replace(GPTConfig(), vocab_size=50257))
    with torch.device("meta"):
        from tritium.engine.model import GPT
        from tritium.engine.optim import AdamW

        model = GPT(config.model)
        engine = types.SimpleNamespace(
            model=model, optimizer=AdamW(model, config.optim, {}), dtype=torch.float32, config=config
        )
    found = anatomy.roofline(types.SimpleNamespace(engine=engine), 2, 256, matmul=1e12, copy=1e15)
    N = 512
    assert found["GEMM"] == pytest.approx(1e3 * N * 6 * (12 * 12 * 768**2 + 768 * 50304) / 1e12, rel=0.01)
    assert found["attention"] == pytest.approx(1e3 * 12 * N * 4 * 256 * 768 / 2 * 3.5 / 1e12, rel=0.01)
    # 12 layers of 12·768² + 13·768 parameters, embeddings of 50304 and 1024 rows, the last norm; three fp32 tensors are
    # read and written, the gradient is read for its norm and for the update
    parameters = 12 * (12 * 768**2 + 13 * 768) + (50304 + 1024) * 768 + 2 * 768
    assert found["optimizer"] == pytest.approx(1e3 * parameters * (6 * 4 + 2 * 4) / 1e15, rel=1e-6)
