"""The plan of a step: what it counts against formulas, how it chooses, what it says when memory has run out."""

import dataclasses
import json
import math
import re

import pytest
import torch

from tritium.engine import graphs, plan, presets, train
from tritium.engine.config import Config, ConfigError, GPTConfig, TrainConfig
from tritium.engine.data.prepare import prepare
from tritium.engine.parallel import World
from tritium.engine.report import Reporter
from tritium.kernels.autograd import LAUNCHERS
from tritium.kernels.peaks import H100
from tritium.kernels.site import Machine

C, L, V, T, B = 64, 2, 512, 32, 4
SMALL = Config(
    name="small",
    model=GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=4, n_embd=C),
    train=TrainConfig(batch_rows=B, micro_rows=B, precision="bf16", device="cpu", compile="false"),
)
CPU = Machine.here("cpu")
GPU = plan.Target.gpu("h100")
NARROW = L * (12 * C * C + 9 * C) + V * C  # parameters with bf16 copies
WIDE = T * C + (2 * L + 1) * 2 * C


def of(machine: Machine = CPU, processes: int = 1, steps: int = 1, **fields) -> plan.Trace:
    """The trace of SMALL with other fields of train."""
    config = SMALL.replace(train=fields)
    return plan.trace(plan.settled(config, machine), machine, processes, steps)


# ---------------------------------------------------------------------------------------------------------------- trace


def test_what_stays_is_what_the_formula_says():
    _, kinds, _ = of().peak()
    assert kinds["parameters"] == 2 * NARROW + 4 * WIDE
    assert kinds["masters"] == 4 * NARROW
    assert kinds["moments"] == 8 * (NARROW + WIDE)
    fp32 = of(precision="fp32").peak()[1]
    assert (fp32["parameters"], fp32["masters"]) == (4 * (NARROW + WIDE), 0)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_moments_in_fewer_bits_are_counted(kind):
    """And what the update moves: each is read and written."""
    config = plan.settled(SMALL.replace(optim={"moments": kind}), CPU)
    found = plan.trace(config, CPU)
    every, vectors = NARROW + WIDE, L * 9 * C + (2 * L + 1) * 2 * C
    scales = sum(-(-n // 256) for n in (V * C, T * C, *L * (3 * C * C, C * C, 4 * C * C, 4 * C * C)))
    size = {"bf16": 4 * every, "int8": 2 * (every - vectors) + 8 * scales + 8 * vectors}[kind]
    assert found.peak()[1]["moments"] == size
    assert found.update_bytes == 8 * every + 2 * size + 2 * found.gradient_bytes + 2 * NARROW


OFFLOAD = {"recompute": "offload", "compile_scope": "block"}


def test_offload_leaves_the_device_by_what_lies_on_the_host():
    """Of 6 blocks 4 go; at the peak two of the four are on the device, on their way, or all are gone."""
    config = SMALL.replace(model={"n_layer": 6, "block_size": 128}, train={"precision": "bf16"})
    none = plan.trace(plan.settled(config, GPU.machine), GPU.machine)
    found = plan.trace(plan.settled(config.replace(train=OFFLOAD), GPU.machine), GPU.machine)
    assert none.host_bytes == none.moved_bytes == 0
    assert found.host_bytes == found.moved_bytes > 0, "one micro-batch: every place is used once"
    one = found.moved_bytes / 4
    ends = []
    for trace in (none, found):
        forward = next(i for i, (_, phase) in enumerate(trace.events) if phase == "backward")
        ends.append(sum(math.copysign(trace.sizes[abs(n) - 1], n) for n, _ in trace.events[:forward]))
    assert ends[0] - ends[1] == found.moved_bytes
    assert none.peak()[0] - found.peak()[0] >= 1.9 * one
    two = plan.trace(plan.settled(config.replace(train={**OFFLOAD, "batch_rows": 2 * B}), GPU.machine), GPU.machine)
    assert two.host_bytes == found.host_bytes, "used again"
    assert found.calls == none.calls, "nothing is computed again"


def test_copies_take_time_where_the_step_is_shorter():
    config = plan.settled(SMALL.replace(model={"n_layer": 4, "block_size": 128}, train=OFFLOAD), GPU.machine)
    found = plan.trace(config, GPU.machine)
    parts = plan.seconds(config, found, GPU)
    copy = found.moved_bytes / plan.HOST_LINKS["H100"]
    assert copy > max(parts["forward"], parts["backward"]), "so small a model computes faster than it copies"
    assert parts["transfer"] == pytest.approx(2 * copy - parts["forward"] - parts["backward"])
    quick = dataclasses.replace(GPU, host_link=1e30)
    assert plan.seconds(config, found, quick)["transfer"] == 0.0
    assert "transfer" not in plan.seconds(config, dataclasses.replace(found, moved_bytes=0), GPU)


def test_kinds_add_up_to_the_peak():
    for fields in ({}, {"recompute": "full"}, {"micro_rows": 1}):
        found = of(**fields)
        peak, kinds, phase = found.peak()
        assert sum(kinds.values()) == peak
        assert phase in ("forward", "backward", "update")
        assert set(kinds) == set(plan.KINDS)


def test_gradients_of_the_update_are_all_of_them():
    """With more than one micro-batch they are summed in fp32, and then one of each is there when the update begins."""
    for micro_rows, size in ((B, 2 * NARROW + 4 * WIDE), (1, 4 * (NARROW + WIDE))):
        found = of(micro_rows=micro_rows)
        at = next(i for i, (_, phase) in enumerate(found.events) if phase == "update")
        alive = set()
        for event, _ in found.events[:at]:
            alive.add(event - 1) if event > 0 else alive.discard(-event - 1)
        assert sum(found.sizes[n] for n in alive if found.kinds[n] == "gradients") == size
        assert found.gradient_bytes == size


@pytest.mark.parametrize(
    ("recompute", "peak"),
    [("none", 4_780_408_852), ("selective", 4_023_861_268), ("full", 2_509_193_236)],
)
def test_the_plan_for_a_gpu_is_what_the_fake_gpu_counts(recompute, peak):
    """tests/fake_cuda/test_memory.py, where tensors claim to be on a GPU: the same bytes to a thousandth."""
    config = presets.load("gpt2_124m").replace(
        train={"batch_rows": 8, "micro_rows": 8, "recompute": recompute},
        kernels={"default": "triton", "linear": "reference"},
    )
    found = plan.trace(plan.settled(config, GPU.machine), GPU.machine)
    assert found.opaque == ()
    assert found.peak()[0] == pytest.approx(peak, rel=1e-3)


def test_logits_are_those_of_a_chunk():
    whole = of(GPU.machine, micro_rows=B).peak()[1]["logits"]
    assert whole == 0 or whole >= B * T * V * 2
    config = SMALL.replace(kernels={"linear_cross_entropy": "triton"})
    for chunk, rows in ((0, 128), (32, 32)):
        changed = plan.settled(config.replace(train={"loss_chunk": chunk}), GPU.machine)
        found = plan.trace(changed, GPU.machine)
        sizes = [size for size, kind in zip(found.sizes, found.kinds, strict=True) if kind == "logits"]
        assert max(sizes) == rows * V * 2


def test_a_chunk_that_the_losss_backend_does_not_heed_is_said():
    for backend, heeded in (("reference", False), ("triton", True)):
        chosen = SMALL.replace(train={"loss_chunk": 32}, kernels={"linear_cross_entropy": backend})
        found = plan.make(chosen, GPU, policies=("none",), narrower=False)
        sizes = {row.bytes["logits"] for row in found.rows}
        assert ("train.loss_chunk=32 changes nothing" in plan.text(found)) is not heeded
        plain = plan.make(chosen.replace(train={"loss_chunk": 0}), GPU, policies=("none",), narrower=False)
        assert ({row.bytes["logits"] for row in plain.rows} == sizes) is not heeded
        assert "changes nothing" not in plan.text(plain)


@pytest.mark.parametrize(("spec", "ids"), [("bytes", 257), ("bpe:1024", 1024), ("gpt2", 50257)])
def test_a_vocabulary_that_the_data_gives_is_its_tokenizers(spec, ids, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # nothing is prepared
    config = SMALL.replace(model={"vocab_size": 0}, data={"tokenizer": spec})
    assert plan.settled(config, GPU.machine).model.vocab_size == ids
    assert plan.settled(SMALL, GPU.machine).model.vocab_size == V


def test_a_vocabulary_that_the_data_gives_is_that_of_the_prepared_folder(tmp_path):
    (tmp_path / "text.txt").write_text("some words, and again some words\n" * 9999)
    prepare([tmp_path / "text.txt"], tmp_path / "shards", tokenizer="bytes", say=lambda text: None)
    config = SMALL.replace(model={"vocab_size": 0}, data={"folder": str(tmp_path / "shards"), "tokenizer": "gpt2"})
    assert plan.settled(config, GPU.machine).model.vocab_size == 257


def test_a_step_that_will_be_captured_on_a_gpu_is_planned_as_the_plain_one():
    plain, captured = (of(GPU.machine, cuda_graphs=on).peak() for on in ("false", "true"))
    assert plain == captured
    with pytest.raises(ConfigError, match="this run is on cpu"):
        of(CPU, cuda_graphs="true")


def test_a_compiled_step_keeps_what_the_compiler_decided():
    """No more than eagerly; the loss's chunk and what stays are the same."""
    config = plan.settled(SMALL, CPU)
    eager, compiled = (plan.trace(config, CPU, compiled=on) for on in (False, True))
    (_, a, _), (_, b, _) = eager.peak(), compiled.peak()
    stays = ("parameters", "masters", "moments")
    assert [a[kind] for kind in stays] == [b[kind] for kind in stays]
    assert 0 < b["activations"] <= a["activations"]
    sizes = [size for size, kind in zip(compiled.sizes, compiled.kinds, strict=True) if kind == "logits"]
    assert max(sizes) == B * T * V * 2
    assert compiled.calls == {} and compiled.gradient_bytes == eager.gradient_bytes


def test_pointwise_results_of_a_graph_stay_in_registers():
    """Of a product, a chain and a sum: the product and the sum are in memory, and backward reads what forward kept."""
    with plan.FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(8, 8))
        found = graphs.capture(lambda x: ((x @ weight).tanh() * 2.0 + 1.0).sum(), (torch.empty(4, 8),))
        in_memory = {}
        for name in ("forward", "backward"):
            replay = graphs.Replay(getattr(found, name), cpu=True)
            in_memory[name] = [
                graphs._name(n) for n, kind in replay.kinds.items() if n not in replay.virtual and kind != "alias"
            ]
        assert weight.grad.shape == (8, 8)
    assert in_memory["forward"] == ["mm", "sum"]
    assert in_memory["backward"][-1] == "mm" and len(in_memory["backward"]) == 2, "what the product reads, and it"


@pytest.mark.parametrize(
    ("recompute", "layers", "two"), [("none", 6, (3, 4)), pytest.param("every", 12, (6, 8), marks=pytest.mark.full)]
)
def test_layers_follow_in_a_straight_line(recompute, layers, two):
    """A model of many layers from two of few, against all of them."""
    config = plan.settled(SMALL.replace(model={"n_layer": layers}, train={"recompute": recompute}), CPU)
    assert plan._layers(config) == two
    row = plan.measure(config, _target(1), compiled=True)
    exact = plan.trace(config, CPU, compiled=True).peak()
    assert row.peak == pytest.approx(exact[0], rel=0.01)
    assert row.phase == exact[2]
    whole = plan.trace(config, CPU)
    for part, value in plan.seconds(config, whole, _target(1)).items():
        assert row.seconds[part] == pytest.approx(value, rel=1e-6)
    few = config.replace(model={"n_layer": 5}, train={"recompute": "none"})
    assert plan._layers(few) == (5, 5)
    irregular = config.replace(train={"recompute": "budget", "recompute_budget_gb": 1.0})
    assert plan._layers(irregular) == (layers, layers)


def test_a_launcher_that_is_not_seen_inside_is_missed(monkeypatch):
    """The planted fault: without the launchers' own tensors the chunk of logits is nowhere."""
    config = plan.settled(SMALL.replace(kernels={"linear_cross_entropy": "triton"}), GPU.machine)
    seen = plan.trace(config, GPU.machine)
    monkeypatch.setattr(plan, "LAUNCHERS", {})
    blind = plan.trace(config, GPU.machine)
    assert "logits" in seen.kinds and "logits" not in blind.kinds
    assert blind.peak()[0] < seen.peak()[0]


def test_a_launcher_that_needs_values_is_named(monkeypatch):
    def reads(*args):
        raise RuntimeError("a value, please")

    name = "linear_cross_entropy_triton"
    config = plan.settled(SMALL.replace(kernels={"linear_cross_entropy": "triton"}), GPU.machine)
    plan.trace(config, GPU.machine)  # loads it
    monkeypatch.setitem(LAUNCHERS, name, reads)
    assert plan.trace(config, GPU.machine).opaque == (f"{name}.default",) or plan.trace(config, GPU.machine).opaque == (
        name,
    )


def test_a_trace_leaves_nothing_behind():
    state, call = torch.get_rng_state(), plan.native.Function.__call__
    of()
    assert torch.equal(torch.get_rng_state(), state)
    assert plan.native.Function.__call__ is call
    assert "data_ptr" not in vars(plan.FakeTensor)
    assert not torch.are_deterministic_algorithms_enabled()


def test_processes_pack_their_gradients():
    """A bucket of all of these gradients, flat, while each is still there."""
    alone, three = of(micro_rows=1), of(micro_rows=1, processes=1)
    assert alone.peak()[0] == three.peak()[0]
    packed = plan.trace(plan.settled(SMALL.replace(train={"batch_rows": 8}), CPU), CPU, processes=2)
    sizes = [size for size, (event, phase) in zip(packed.sizes, packed.events, strict=False)]
    assert max(sizes) >= 4 * (NARROW + WIDE)


# ----------------------------------------------------------------------------------------------------------- allocators


def test_a_heap_gives_the_smallest_hole_that_fits_and_joins_neighbours():
    heap = plan.Heap(16)
    for key, size in enumerate((64, 320, 64, 160, 64)):
        heap.take(key, size)
    assert heap.size == 672
    heap.give(1)
    heap.give(3)
    heap.take(5, 128)  # into the hole of 160
    assert heap.taken[5][0] == 448 and heap.size == 672
    heap.give(2)
    heap.take(6, 384)  # the hole of 320 and what was beside it
    assert heap.taken[6][0] == 64 and heap.size == 672
    heap.take(7, 400)
    assert heap.size == 1072
    heap.give(7)
    heap.take(8, 500)  # at the end, where 400 were free
    assert heap.size == 672 + 512
    heap.give(8)
    assert heap.size == 672 + 512, "it never falls"
    exact = plan.Heap(16, slack=96)
    for key in range(2):
        exact.take(key, 160)
    exact.give(0)
    exact.take(2, 160)  # the hole of 160 is too small by the slack
    assert exact.size == 3 * 160 + 96
    exact.take(3, 64)
    assert exact.taken[3][0] == 0


def test_torchs_allocator_on_a_gpu_takes_segments():
    mib = plan.MIB
    sizes, events = [1000, 3 * mib, 15 * mib, 21 * mib], [(1, ""), (2, ""), (3, ""), (4, "")]
    found = plan.Trace(sizes, ["temporary"] * 4, events, {}, {}, torch.float32, 0, 0, ())
    assert plan.held(found, GPU) == (2 + 20 + 22) * mib, "15 MiB fit beside 3 into 20"
    reused = dataclasses.replace(found, events=[(3, ""), (-3, ""), (2, ""), (1, "")])
    assert plan.held(reused, GPU) == (2 + 16) * mib


# ----------------------------------------------------------------------------------------------------------------- time


def test_seconds_are_the_rooflines_of_the_call_sites():
    """By hand for the products of matrices at a rate where they alone take time."""
    slow = dataclasses.replace(GPU, rates=dataclasses.replace(H100, measured_matrix=1e9))
    fields = {"batch_rows": 2 * B, "micro_rows": B}
    N = 2 * B * T
    config = plan.settled(SMALL.replace(train=fields), CPU)
    found = plan.trace(config, CPU)
    parts = plan.seconds(config, found, slow)
    products = L * 12 * C * C
    attention = L * 4 * N * T * C / 2
    head = 2 * N * C * V
    forward = 2 * N * products + attention + head
    assert parts["forward"] == pytest.approx(forward / 1e9, rel=0.02)
    assert parts["backward"] == pytest.approx(2 * forward / 1e9, rel=0.03)
    assert parts["again"] == 0
    full = plan.settled(SMALL.replace(train={**fields, "recompute": "full"}), CPU)
    again = plan.seconds(full, plan.trace(full, CPU), slow)
    # the last projection's result is not needed again
    assert again["again"] == pytest.approx((2 * N * L * 8 * C * C + attention) / 1e9, rel=0.02)
    assert (again["forward"], again["backward"]) == (parts["forward"], parts["backward"])
    selective = plan.settled(SMALL.replace(train={**fields, "recompute": "selective"}), CPU)
    assert plan.seconds(selective, plan.trace(selective, CPU), slow)["again"] < 0.05 * again["again"]


def test_segments_that_a_gpus_allocator_would_give_back_take_no_memory():
    """40 MiB come and go before 42 MiB that find no room in them: never both are needed. Of a segment in use all is."""
    MIB = plan.MIB
    sizes, events = [40 * MIB, 42 * MIB, 2 * MIB], [1, -1, 2, 3]
    found = dataclasses.replace(of(GPU.machine), sizes=sizes, events=[(event, "update") for event in events])
    assert plan.held(found, GPU) == (42 + 40) * MIB, "the small block lies in the segment of the first"
    assert plan.held(dataclasses.replace(found, events=found.events[:3]), GPU) == 42 * MIB


def test_fp8_is_bf16_around_its_products():
    """Attention, norms, the head and what is not named are not computed in fp32 because the layers are in fp8."""
    seconds = {}
    for precision in ("bf16", "fp8", "fp32"):
        config = plan.settled(SMALL.replace(train={"precision": precision, "recompute": "full"}), CPU)
        seconds[precision] = plan.seconds(config, plan.trace(config, CPU), GPU)
    for part in ("forward", "backward", "update"):
        assert seconds["fp8"][part] == pytest.approx(seconds["bf16"][part], rel=1e-6)
        assert seconds["fp32"][part] > 1.05 * seconds["fp8"][part]


def test_update_and_messages_are_bytes_over_rates():
    config = plan.settled(SMALL.replace(train={"batch_rows": 4, "micro_rows": 1}), GPU.machine)
    found = plan.trace(config, GPU.machine, processes=2)
    parts = plan.seconds(config, found, GPU, processes=2)
    every = NARROW + WIDE
    gradients = 4 * every
    copies = 2 * (NARROW - V * C)  # on a GPU the head has none
    assert parts["update"] == pytest.approx((24 * every + 2 * gradients + copies) / H100.reached_copy)
    # a gradient in bf16 or fp32, and its fp32 sum read and written
    added = (2 + 8) * (NARROW - V * C) + (4 + 8) * (WIDE + V * C)
    assert parts["accumulate"] == pytest.approx(added / H100.reached_copy)
    assert parts["communicate"] == pytest.approx(gradients / plan.LINKS["H100"])


# --------------------------------------------------------------------------------------------------------------- choice


def row(recompute="none", micro_rows=1, step_s=1.0, peak=10, fits=True, again=0.0) -> plan.Row:
    settings = {"recompute": recompute, "recompute_every": 2, "recompute_budget_gb": 0.0, "micro_rows": micro_rows}
    return plan.Row(settings, {"activations": peak}, "forward", {"forward": step_s - again, "again": again}, fits)


def test_the_fastest_that_fits_is_chosen():
    slow, fast, large = row(step_s=2.0), row("full", step_s=1.5, again=0.4), row(step_s=1.0, fits=False)
    assert plan.fastest([slow, fast, large]) is fast
    assert plan.fastest([large]) is None
    more_rows = row(micro_rows=4, step_s=1.5005)
    assert plan.fastest([fast, more_rows]) is more_rows
    assert plan.fastest([fast, row("none", step_s=1.5)]).settings["recompute"] == "none"


def test_a_part_of_the_memory_stays_free():
    assert plan.fits(100, _target(111)) and not plan.fits(100, _target(109))
    kept = dataclasses.replace(_target(224), kept="glibc")  # of which 1.25 parts are for holes in the heap
    assert not plan.fits(100, kept) and plan.fits(99, kept)


def test_the_largest_that_fits_is_found_by_halving():
    for limit in range(1, 65):
        asked = []
        sizes = plan.divisors(64)
        at = plan._first_that_fits(sizes, lambda rows, limit=limit, asked=asked: asked.append(rows) or rows <= limit)
        assert sizes[at] == max(n for n in sizes if n <= limit)
        assert len(asked) <= 4
    assert plan._first_that_fits([4, 2, 1], lambda rows: False) == 2


def test_a_plan_looks_at_every_policy_and_fills_a_budget():
    everything = plan.measure(plan.settled(SMALL.replace(train={"batch_rows": 16, "micro_rows": 16}), CPU), _target(1))
    target = _target(int(0.8 * everything.peak))
    made = plan.make(SMALL.replace(train={"batch_rows": 16}), target)
    assert {row.settings["recompute"] for row in made.rows} == {"none", "selective", "every", "full", "budget"}
    assert made.chosen in made.rows and made.chosen.fits
    assert made.chosen.peak * (1 + plan.MARGIN) <= target.memory
    for policy in ("none", "selective", "every", "full"):
        of_policy = [r for r in made.rows if r.settings["recompute"] == policy and r.moments == "fp32"]
        fitting = [r.micro_rows for r in of_policy if r.fits]
        larger = [r.micro_rows for r in of_policy if not r.fits]
        assert max(fitting) == 16 or min(larger) == 2 * max(fitting)
    assert made.chosen.flags in made.why
    assert {row.moments for row in made.rows if row.moments != "fp32"} <= {"bf16", "int8"}
    nothing = plan.make(SMALL, _target(1000))
    assert nothing.chosen is None and "nothing fits" in nothing.why and "the least is" in nothing.why


def test_narrower_moments_are_offered_and_chosen_only_where_nothing_else_fits():
    config = SMALL.replace(model={"n_embd": 256, "n_head": 4})
    sizes = {}
    for kind in ("fp32", "bf16"):
        settled = plan.settled(config.replace(train={"recompute": "none"}, optim={"moments": kind}), CPU)
        sizes[kind] = plan.measure(settled, _target(1)).peak
    target = _target(int(1.02 * (1 + plan.MARGIN) * sizes["bf16"]))
    assert not plan.fits(sizes["fp32"], target)
    made = plan.make(config, target, policies=("none", "full"))
    offered = [row for row in made.rows if row.moments != "fp32"]
    assert {row.moments for row in offered} == {"bf16", "int8"} and all(row.fits for row in offered)
    least = [row for row in made.rows if row.moments == "fp32" and row.fits]
    assert made.chosen.moments == ("fp32" if least else "bf16")
    assert all(f"--optim.moments {row.moments}" in row.flags for row in offered)
    assert "bf16" in plan.text(made) and json.loads(plan.to_json(made))["rows"][-1]["moments"] in ("bf16", "int8")
    tight = dataclasses.replace(target, memory=int(0.9 * target.memory))
    only = plan.make(config.replace(train={"batch_rows": 1, "micro_rows": 1}), tight, policies=("none",))
    if not any(row.fits and row.moments == "fp32" for row in only.rows):
        assert only.chosen is None or only.chosen.moments != "fp32"
    assert not [r for r in plan.make(config, target, policies=("none",), narrower=False).rows if r.moments != "fp32"]


def test_offload_is_looked_at_for_a_gpu_only():
    config = SMALL.replace(model={"n_layer": 4, "block_size": 256}, train={"batch_rows": 16})
    settled = plan.settled(config.replace(train={**OFFLOAD, "micro_rows": 16}), GPU.machine)
    target = dataclasses.replace(GPU, memory=int(1.12 * plan.measure(settled, GPU).peak))
    made = plan.make(config, target)
    of_offload = [r for r in made.rows if r.settings["recompute"] == "offload"]
    row = next(r for r in of_offload if r.micro_rows == 16)
    assert row.fits and not any(r.fits and r.micro_rows == 16 for r in made.rows if r.policy == "none")
    assert row.host_bytes > 0 and row.flags.startswith("--train.recompute offload --train.compile_scope block")
    assert "on host" in plan.text(made) and "transfer" in row.seconds
    assert not [r for r in plan.make(SMALL, _target(10**9)).rows if r.settings["recompute"] == "offload"]


@pytest.mark.full
def test_with_more_room_more_blocks_stay_and_less_has_to_move():
    deep = SMALL.replace(model={"n_layer": 8, "block_size": 256}, train={"batch_rows": 16})
    settled = plan.settled(deep.replace(train={**OFFLOAD, "micro_rows": 16}), GPU.machine)
    least = plan.measure(settled, GPU)
    room = (1 + plan.MARGIN) * (least.peak + 4.2 * least.host_bytes / 6 / 0.95)
    (more,) = [
        r
        for r in plan.make(deep, dataclasses.replace(GPU, memory=int(room))).rows
        if r.settings["recompute"] == "offload" and r.micro_rows == 16 and r.moments == "fp32"
    ]
    assert more.fits and more.policy.startswith("offload, ") and more.host_bytes < least.host_bytes
    assert "--train.recompute_budget_gb" in more.flags and more.step_s < least.step_s


def _target(memory: int) -> plan.Target:
    return plan.Target(CPU, memory, dataclasses.replace(H100, name="test"))


def test_rows_must_divide_among_processes():
    with pytest.raises(ConfigError, match=r"batch_rows=4 must be a multiple of 3 processes.*batch_rows 3"):
        plan.make(SMALL, _target(10**9), 3)


def test_boards_have_the_memory_of_their_names():
    assert {name: plan.Target.gpu(name).memory for name in plan.GPUS} == {
        "a100": 80 * 10**9, "h100": 80 * 10**9, "h200": 141 * 10**9, "b200": 180 * 10**9,
    }  # fmt: skip
    assert set(plan.LINKS) == {name.upper() for name in plan.GPUS}


# ------------------------------------------------------------------------------------------------------------- training


def test_rows_left_to_the_plan_are_the_most_that_fit(monkeypatch):
    """And the policy stays. By a machine with room for two rows, less than for four."""
    config = SMALL.replace(model={"block_size": 128}, train={"batch_rows": 4, "micro_rows": 0})
    sizes = {}
    for rows in (4, 2, 1):
        settled = plan.settled(config.replace(train={"micro_rows": rows}), CPU)
        sizes[rows] = plan.measure(settled, _target(1)).peak
    for rows, more in ((1, 2), (2, 4)):
        memory = int((sizes[rows] + sizes[more]) / 2 * (1 + plan.MARGIN))
        monkeypatch.setattr(plan.Target, "here", staticmethod(lambda *args, memory=memory: _target(memory)))
        found, why = plan.resolve(config, World())
        assert found == config.replace(train={"micro_rows": rows})
        assert why.startswith(f"micro_rows={rows}: ")
    monkeypatch.setattr(plan.Target, "here", staticmethod(lambda *args: _target(1000)))
    with pytest.raises(ConfigError, match="micro_rows=0 asks for the rows that fit, and none was found: nothing fits"):
        plan.resolve(config, World())


def test_rows_are_left_to_the_plan_under_a_budget_too(monkeypatch):
    """The configuration's own budget, in which the inputs of the blocks find room for two rows and not for four."""
    monkeypatch.setattr(plan.Target, "here", staticmethod(lambda *args: _target(10**12)))
    inputs = L * T * C * 2  # bytes of a row, in bf16
    config = SMALL.replace(train={"micro_rows": 0, "recompute": "budget", "recompute_budget_gb": 3 * inputs / 1e9})
    assert plan.resolve(config, World())[0] == config.replace(train={"micro_rows": 2})
    with pytest.raises(ConfigError, match="none was found: ConfigError: train.recompute_budget_gb"):
        plan.resolve(config.replace(train={"recompute_budget_gb": 0.5 * inputs / 1e9}), World())


def test_an_engine_is_not_built_without_rows():
    with pytest.raises(ConfigError, match=r"micro_rows=0 leaves the rows to the plan"):
        train.build(SMALL.replace(train={"micro_rows": 0}))


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


@pytest.mark.parametrize("error", ERRORS)
def test_an_allocation_that_fails_is_known(monkeypatch, error):
    monkeypatch.setattr(plan, "advice", lambda config, world: "what would fit")
    with (
        pytest.raises(plan.OutOfMemory, match=f"^{type(error).__name__}: .+\nwhat would fit$"),
        plan.advising(SMALL, World()),
    ):
        raise error


def test_out_of_memory_ends_with_what_would_fit(monkeypatch):
    """The error is planted; the advice is the plan's for a machine that the run does not fit on."""
    config = SMALL.replace(model={"block_size": 128}, train={"batch_rows": 4, "micro_rows": 4})
    this = plan.measure(plan.settled(config, CPU), _target(1))
    target = _target(int(0.9 * this.peak))
    monkeypatch.setattr(plan.Target, "here", staticmethod(lambda *args, **kw: target))

    def run(*args):
        raise ERRORS[0]

    monkeypatch.setattr(train, "_run", run)
    with pytest.raises(plan.OutOfMemory) as raised:
        train.main(config, Reporter(quiet=True))
    text = str(raised.value)
    assert text.startswith("OutOfMemoryError: CUDA out of memory.")
    assert f"By the plan this run takes {this.peak / 1e9:.2f} GB" in text
    (flags,) = re.findall(r"fastest: (--train\.recompute \w+.*--train\.micro_rows \d+)", text)
    words = dict(word.split() for word in flags.removeprefix("--train.").split(" --train."))
    fields = {k: type(getattr(config.train, k))(v) for k, v in words.items()}
    advised = plan.measure(plan.settled(config.replace(train=fields), CPU), target)
    assert advised.fits and advised.peak < this.peak


def test_the_command_says_what_would_fit(tritium, trained):
    trained.error = plan.OutOfMemory("OutOfMemoryError: no room\nthese would fit")
    status, _, said = tritium("train", "tiny")
    assert (status, said) == (1, "tritium train: OutOfMemoryError: no room\nthese would fit\n")


def test_other_errors_pass_unchanged(monkeypatch):
    with pytest.raises(RuntimeError, match="^shapes$"), plan.advising(SMALL, World()):
        raise RuntimeError("shapes")


def test_advice_never_fails(monkeypatch):
    monkeypatch.setattr(plan, "make", lambda *args, **kw: 1 / 0)
    assert "--train.micro_rows" in plan.advice(SMALL, World())


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_shows_writes_and_draws(tritium, tmp_path):
    status, out, _ = tritium(
        "plan", "tiny", "--gpu", "h100", "--gpus", "2", "--json", "plan.json", "--picture", "plan.png",
        "--model.n_layer", "2", "--train.batch_rows", "4", "--train.compile", "false",
    )  # fmt: skip
    assert status == 0
    assert "on 2 × H100 SXM 80 GB (80.0 GB): bf16, 4 rows of 256 tokens" in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["chosen"] in found["rows"] and found["target"]["processes"] == 2
    for r in found["rows"]:
        assert r["peak_bytes"] == sum(r["bytes"].values())
        assert r["step_s"] == pytest.approx(sum(r["seconds"].values()))
        assert f"{r['peak_bytes'] / 1e9:.2f}" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    chosen = found["chosen"]
    assert out.rstrip().endswith(
        "torchrun --nproc-per-node=2 -m tritium.engine.cli train tiny --model.n_layer 2 "
        "--train.batch_rows 4 --train.compile false "
        f"--train.recompute {chosen['recompute']} --train.micro_rows {chosen['micro_rows']}"
    )


def test_what_does_not_fit_is_an_exit_status_and_mistakes_are_named(tritium):
    status, out, _ = tritium("plan", "tiny", "--gpu", "a100", "--memory_gb", "0.001", "--model.n_layer", "1",
                             "--train.compile", "false")  # fmt: skip
    assert status == 1 and "nothing fits into 0.0 GB" in out
    for argv, told in (
        (["--gpu", "v100"], "a100, h100"),
        (["--gpus", "0"], "at least 1"),
        (["--gps", "2"], "--gpus"),
        (["--train.micro", "2"], "--train.micro_rows"),
    ):
        status, _, said = tritium("plan", "tiny", *argv)
        assert status == 2 and told in said
    status, _, said = tritium("plan", "tiny", "--gpu", "h100", "--gpus", "3")
    assert status == 1 and "must be a multiple of" in said
