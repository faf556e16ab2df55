"""``tritium bench peers`` from the command line to the record, on a model of a few thousand parameters."""

import dataclasses
import json
import re

import numpy
import pytest

from tritium.benchmarks import arm, compare, peers, record, throughput
from tritium.benchmarks.peers import huggingface, textbook
from tritium.engine import presets
from tritium.engine.config import Config, GPTConfig, TrainConfig

MODEL = GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=32)
CONFIG = Config(name="few", model=MODEL, train=TrainConfig(precision="fp32", compile="false"))

pytestmark = pytest.mark.timeout(300)  # processes that import torch, one after the other


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(presets, "names", lambda: ["few", "llama_8b"])
    monkeypatch.setattr(presets, "load", lambda name: CONFIG)
    monkeypatch.setattr(
        textbook, "variants", lambda device: [peers.Variant(compile="false"), peers.Variant(compile="no such mode")]
    )


def run(tmp_path, *more):
    return throughput.main(
        ["few", "--T", "16", "--B", "2", "--restarts", "1", "--rounds", "3", "--peers", "textbook",
         "--out", str(tmp_path), *more]
    )  # fmt: skip


def test_a_comparison_leaves_a_record_and_a_table(tmp_path, capsys):
    (tmp_path / "throughput_damaged.json").write_text("{")  # costs the table its own lines
    (tmp_path / "throughput_few_T16_B2.json").write_text("{}")  # that it is written over is said
    assert run(tmp_path, "--screening-steps", "0") == 0
    (tmp_path / "throughput_damaged.json").unlink()
    result = json.loads((tmp_path / "throughput_few_T16_B2.json").read_text())
    assert result["command"].startswith("tritium bench peers few --T 16")
    (ours, mine), (theirs, other) = result["arms"].items()
    assert (mine["peer"], other["peer"]) == ("tritium", "textbook")
    assert result["best_peer"] == theirs
    assert result["equal_loss"] == {"ok": True, "worst_relative": pytest.approx(0, abs=1e-5), "problems": []}
    assert {row["site"]: row["backend"] for row in mine["kernels"]}["blocks.0.attention"]
    for fact in (mine, other):
        assert len(fact["times"]["rounds_ms"]) == 3
        assert fact["times"]["restarts"] == [0, 0, 0]
        assert fact["tokens_per_s"] == pytest.approx(1e3 * 32 / fact["times"]["p50_ms"])
        assert fact["startup_s"] > 0
        assert fact["peak_bytes"] > 0
    assert result["settings"]["models"].keys() == {"few"}
    assert {fact["model"] for fact in (mine, other)} == {"few"}
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert figures.keys() == {f"{ours} tokens/s", f"{theirs} tokens/s"}
    assert figures[f"{ours} tokens/s"]["better"] == "higher"
    assert len(figures[f"{ours} tokens/s"]["samples"]) == 6
    assert figures[f"{ours} tokens/s"]["restarts"] == []
    assert (
        "3 interleaved rounds in one process of each (so the intervals do not cover another process)"
        in (tmp_path / "throughput.md").read_text()
    )
    assert [(check["name"], check["ok"]) for check in result["checks"]] == [
        ("equal precision and optimizer", True), ("equal losses", True),
    ]  # fmt: skip
    assert mine["settings"] == other["settings"]
    assert mine["settings"]["precision"] == "fp32" and mine["settings"]["lr"] == "0.0006"
    assert mine["losses_fp32"] == []  # they train in it
    assert result["sources"].keys() == {f"{row['op']}.{row['backend']}" for row in result["kernels"]}
    table, (shown, said) = (tmp_path / "throughput.md").read_text(), capsys.readouterr()
    assert "throughput_damaged.json is left out of throughput.md" in said
    assert table.strip() in shown
    assert "throughput_few_T16_B2.json, in place of a file that was no record" in shown
    assert f"| **{ours}** |" in table
    assert "lower bound is" in shown
    reason = (
        "textbook is void as a baseline: it has to be at least as fast as huggingface, compiled, which was not timed"
    )
    assert reason in table and "the only one, which is no baseline (textbook: " in shown
    assert compare.main([str(tmp_path), str(tmp_path), "--gate", "0.5"]) == 0


class FakeArm:
    """Stands for a process: each arm has its own losses and its own speed."""

    losses_of = {name: [6.0, 5.9, 5.8] for name in ("tritium", *peers.NAMES)}
    ms_of = {**dict.fromkeys(peers.NAMES, 130.0), "tritium": 100.0, "textbook": 120.0}
    settings_of = {name: {"precision": "fp32", "lr": "0.0006", "grad_clip": "1"} for name in ("tritium", *peers.NAMES)}
    fp32_of = {name: [6.0, 5.9, 5.8] for name in ("tritium", *peers.NAMES)}
    alive = 0

    def __init__(self, name, variant, cache, stderr):
        self.name, self.runs = name, 0
        self.mode = variant["compile"] if variant is not None else ""
        self.kept = variant is not None and variant["keep_memory"]

    def __enter__(self):
        FakeArm.alive += 1
        return self

    def __exit__(self, *exc):
        FakeArm.alive -= 1

    def start(self, config, B, T, device, seed):
        self.config = config
        if self.mode == "no such mode":
            raise arm.ArmError("this mode does not exist")
        kernels = (
            []
            if self.name != "tritium"
            else [{"site": "x", "op": "gelu", "phase": "train", "backend": "reference", "why": "x"}]
        )
        return {
            "startup_s": 1.0,
            "peak_bytes": 1,
            "threads": 2,
            "variant": f"fp32 {self.mode}{f' {peers.KEEPS_MEMORY}' if self.kept else ''}".strip(),
            "kernels": kernels,
        }

    def settings(self):
        return self.settings_of[self.name]

    def losses(self, steps, fp32=False):
        return (self.fp32_of if fp32 else self.losses_of)[self.name][:steps]

    def memory_bytes(self):
        return 1 << 20

    def step_ms(self):
        self.runs += 1
        return self.ms_of[self.name] * (1 + 0.001 * (self.runs % 3))


class Untimed(FakeArm):
    def step_ms(self):
        raise AssertionError("timed before it was known to compute the same thing")


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(throughput, "ArmProcess", Untimed)
    monkeypatch.setattr(textbook, "variants", lambda device: [peers.Variant(compile="false")])


@pytest.mark.parametrize("steps", ["0", "3"])
@pytest.mark.parametrize("wrong", [[6.001, 5.9, 5.8], [6.0, 5.9, 5.8002], [6.0, float("nan"), 5.8]])
def test_different_losses_are_refused_before_any_is_timed(tmp_path, monkeypatch, capsys, untimed, wrong, steps):
    monkeypatch.setitem(FakeArm.losses_of, "textbook", wrong)
    assert run(tmp_path, "--screening-steps", steps) == 1
    assert "do not compute the same thing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["0", "3"])
@pytest.mark.parametrize("wrong", [{"precision": "bf16"}, {"precision": "bf16 and fp32"}, {"lr": "0.00066"}])
def test_other_settings_are_refused_before_any_is_timed(tmp_path, monkeypatch, capsys, untimed, wrong, steps):
    monkeypatch.setitem(FakeArm.settings_of, "textbook", FakeArm.settings_of["textbook"] | wrong)
    assert run(tmp_path, "--screening-steps", steps) == 1
    ((name, value),) = wrong.items()
    shown = capsys.readouterr().err
    assert f"{name}: tritium: fp32 has {FakeArm.settings_of['tritium'][name]}, textbook: fp32 false {value}" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fp32", "bf16", "same"), [(5.8001, 5.801, True), (5.8002, 5.8, False), (5.8, 5.82, False)])
def test_what_trains_in_bf16_is_also_compared_in_fp32(tmp_path, monkeypatch, capsys, fp32, bf16, same):
    """The last loss in each; another learning rate, say, is lost in bf16's rounding."""
    monkeypatch.setattr(throughput, "ArmProcess", FakeArm)
    for name in ("tritium", "textbook"):
        monkeypatch.setitem(FakeArm.settings_of, name, FakeArm.settings_of[name] | {"precision": "bf16"})
    monkeypatch.setitem(FakeArm.losses_of, "textbook", [6.0, 5.9, bf16])
    monkeypatch.setitem(FakeArm.fp32_of, "textbook", [6.0, 5.9, fp32])
    assert run(tmp_path, "--screening-steps", "0", "--precision", "bf16") == (0 if same else 1)
    if same:
        result = record.read(tmp_path / "throughput_few_T16_B2.json")
        assert [arm["losses_fp32"][-1] for arm in result["arms"].values()] == [5.8, fp32]
    else:
        assert ("in fp32, uncompiled: step 3: " in capsys.readouterr().err) == (fp32 == 5.8002)


def test_peers_are_tried_in_tritiums_precision(monkeypatch):
    both = [peers.Variant("bf16"), peers.Variant("fp32", padded=False), peers.Variant("bf16", "medium", extra="x")]
    monkeypatch.setattr(textbook, "variants", lambda device: both)
    assert peers.variants_in("textbook", "cpu", "fp32") == [both[1]]
    assert peers.variants_in("textbook", "cpu", "bf16") == [both[0], both[2]]
    monkeypatch.setattr(
        textbook, "variants", lambda device: [both[0], both[2], dataclasses.replace(both[0], matmul="high")]
    )
    assert peers.variants_in("textbook", "cpu", "fp32") == [peers.Variant(), peers.Variant(extra="x")]


def test_precision_is_resolved_once_for_all_arms(tmp_path, monkeypatch, capsys):
    asked = []

    class Watched(FakeArm):
        def start(self, config, *rest):
            asked.append(config.train.precision)
            return super().start(config, *rest)

    auto = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, precision="auto"))
    monkeypatch.setattr(presets, "load", lambda name: auto)
    monkeypatch.setattr(throughput, "ArmProcess", Watched)
    monkeypatch.setattr(throughput, "resolve", lambda precision, device: {"auto": throughput.torch.bfloat16}[precision])
    assert run(tmp_path, "--screening-steps", "0") == 0
    assert asked == ["bf16", "bf16"]


@pytest.mark.parametrize("gain", [0.8, 1.2])
def test_every_variant_is_tried_and_the_fastest_are_compared(tmp_path, monkeypatch, capsys, gain):
    """A variant that does not run is on record with the reason; one that is 10 % slower too, and it is not compared.
    The fastest get tritium's way with memory as well, and as they are shipped the fastest is compared in any case.
    """

    class Varied(FakeArm):
        def step_ms(self):
            assert not (self.kept and self.mode in ("slow", "no such mode"))  # offered to the fastest alone
            return super().step_ms() * {"slow": 1.1, "near": 1.02}.get(self.mode, 1.0) * (gain if self.kept else 1.0)

    modes = ("slow", "no such mode", "near", "default")
    monkeypatch.setattr(throughput, "ArmProcess", Varied)
    monkeypatch.setattr(textbook, "variants", lambda device: [peers.Variant(compile=mode) for mode in modes])
    assert run(tmp_path, "--screening-steps", "3") == 0
    result = json.loads((tmp_path / "throughput_few_T16_B2.json").read_text())
    assert [row["tokens_per_s"] is None for row in result["screening"]] == [False, True, False, False, False, False]
    assert result["screening"][1]["problem"] == "this mode does not exist"
    shipped = ["fp32 default", "fp32 near"]
    kept = [f"{variant} {peers.KEEPS_MEMORY}" for variant in shipped]
    compared = shipped if gain > 1 else [kept[0], shipped[0], kept[1]]
    assert list(result["arms"]) == ["tritium: fp32", *(f"textbook: {variant}" for variant in compared)]
    assert result["best_peer"] == f"textbook: {compared[0]}"
    # textbook alone is no baseline; with huggingface behind it it is one
    monkeypatch.setattr(huggingface, "why_not", lambda device: None)
    monkeypatch.setattr(huggingface, "variants", lambda device: [peers.Variant(compile="slow")])
    monkeypatch.setattr(Varied, "step_ms", lambda self: FakeArm.step_ms(self) * (gain if self.kept else 1.0))
    capsys.readouterr()
    assert run(tmp_path, "--screening-steps", "3", "--peers", "textbook,huggingface") == 0
    lent = "That one was lent what tritium does about memory; of those as they come, the best is textbook: fp32"
    assert (lent in capsys.readouterr().out) == (gain < 1)


def test_arms_that_the_memory_does_not_hold_are_left_out_and_said(monkeypatch, tmp_path, capsys):
    """Of each peer the fastest comes first; a system without memory would kill one, and with it the comparison."""

    class Large(FakeArm):
        held = 0

        def memory_bytes(self):
            return (3 if self.mode == "large" else 1) << 30

        def __enter__(self):
            Large.held += self.memory_bytes()
            assert Large.held < 5 << 30, "the system would kill one"
            return super().__enter__()

        def __exit__(self, *exc):
            Large.held -= self.memory_bytes()
            super().__exit__(*exc)

        def step_ms(self):
            return super().step_ms() * {"near": 1.02}.get(self.mode, 1.0)

    modes = ("default", "near")
    monkeypatch.setattr(throughput, "ArmProcess", Large)
    monkeypatch.setattr(throughput, "free_bytes", lambda device: 4 << 30)
    monkeypatch.setattr(throughput.allocator, "why_not", lambda: "not here")
    monkeypatch.setattr(textbook, "variants", lambda device: [peers.Variant(compile=mode) for mode in modes])
    monkeypatch.setattr(huggingface, "why_not", lambda device: None)
    monkeypatch.setattr(huggingface, "variants", lambda device: [peers.Variant(compile=mode) for mode in modes])
    run(tmp_path, "--screening-steps", "3", "--peers", "textbook,huggingface")
    result = json.loads((tmp_path / "throughput_few_T16_B2.json").read_text())
    assert list(result["arms"]) == ["tritium: fp32", "textbook: fp32 default", "huggingface: fp32 default"]
    assert [row["problem"] and row["problem"][:12] for row in result["screening"]] == [None, "not compared"] * 2
    assert "not compared: it held 1.0 GiB, and 0.6 are left beside the others; fewer --peers" in capsys.readouterr().err

    monkeypatch.setattr(huggingface, "variants", lambda device: [peers.Variant(compile="large")])
    run(tmp_path, "--screening-steps", "3", "--peers", "textbook,huggingface")
    result = json.loads((tmp_path / "throughput_few_T16_B2.json").read_text())
    assert result["peers_absent"]["huggingface"].startswith("not compared: it held 3.0 GiB")
    assert {fact["peer"] for fact in result["arms"].values()} == {"tritium", "textbook"}


class Deviating(FakeArm):
    """Every process is up to 3 % faster or slower than its arm for as long as it lives."""

    started = []  # (arm, folder of compiled code, arms alive) of each process
    random = numpy.random.default_rng(0)

    def __init__(self, name, variant, cache, stderr):
        super().__init__(name, variant, cache, stderr)
        self.factor, self.cache = float(numpy.exp(0.03 * self.random.uniform(-1, 1))), cache

    def start(self, *more):
        Deviating.started.append((self.name, self.cache, FakeArm.alive))
        return super().start(*more)

    def step_ms(self):
        return super().step_ms() * self.factor


@pytest.fixture
def deviating(monkeypatch, all_installed):
    monkeypatch.setattr(throughput, "ArmProcess", Deviating)
    monkeypatch.setattr(Deviating, "started", [])
    monkeypatch.setattr(Deviating, "random", numpy.random.default_rng(0))
    monkeypatch.setattr(huggingface, "why_not", lambda device: None)


def test_restarts_are_fresh_processes_in_an_order_drawn_anew_and_widen_the_interval(tmp_path, capsys, deviating):
    status, result = run_with(tmp_path, "textbook,huggingface", "--B", "2", "--restarts", "6")
    assert status == 0
    first, rest = Deviating.started[:3], Deviating.started[3:]
    assert [name for name, *_ in first] == ["tritium", "textbook", "huggingface"]
    caches = {name: cache for name, cache, _ in first}
    assert len(set(caches.values())) == 3
    restarts = [rest[i : i + 3] for i in range(0, 18, 3)]
    assert all([alive for *_, alive in restart] == [1, 2, 3] for restart in restarts)  # those before have ended
    assert all({name: cache for name, cache, _ in restart} == caches for restart in restarts)
    assert len({tuple(name for name, *_ in restart) for restart in restarts}) > 2
    assert FakeArm.alive == 0
    settings = result["settings"]
    assert (settings["restarts"], settings["rounds"]) == (6, 3)
    assert (settings["models"]["few"]["restarts"], settings["models"]["few"]["stopped"]) == (6, "")
    assert 0.003 < settings["models"]["few"]["deviation"] < 0.04
    for key, fact in result["arms"].items():
        assert fact["times"]["restarts"] == [i for i in range(6) for _ in range(3)]
        assert fact["warm_up"] == {"runs": 36, "stable": True}
        (figure,) = [f for f in result["figures"] if f["name"] == f"{key} tokens/s"]
        assert figure["restarts"] == [i for i in range(6) for _ in range(6)]
    for name, truth in (("textbook", 1.2), ("huggingface", 1.3)):
        (ratio,) = [ratio for key, ratio in result["speedup"].items() if key.startswith(f"{name}:")]
        assert ratio["low"] < truth < ratio["high"]
        assert ratio["high"] / ratio["low"] > 1.01  # a process differs from its own rounds by a tenth of a per cent
    shown = capsys.readouterr()
    assert "restart 6 of 6" in shown.err
    assert re.search(r"3 interleaved rounds in each of 6 processes \(which deviate by \d\.\d %\), commit", shown.out)
    assert throughput.main(
        ["few", "--T", "16", "--B", "2", "--restarts", "6", "--rounds", "3", "--peers", "textbook,huggingface",
         "--screening-steps", "0", "--out", str(tmp_path)]
    ) == 0  # fmt: skip
    again = [name for name, *_ in Deviating.started[21:]]
    assert again == [name for name, *_ in Deviating.started[:21]]  # a seed draws the order


def test_a_restart_that_fails_leaves_those_before_it(tmp_path, monkeypatch, capsys, deviating):
    class Killed(Deviating):
        def step_ms(self):
            if len(Deviating.started) > 9 and self.name == "textbook":
                raise arm.ArmError("textbook ended with status -9 during 'step'")
            return super().step_ms()

    monkeypatch.setattr(throughput, "ArmProcess", Killed)
    status, result = run_with(tmp_path, "textbook,huggingface", "--B", "2", "--restarts", "5")
    assert status == 0
    said = "restart 3 failed: textbook ended with status -9 during 'step'"
    model = result["settings"]["models"]["few"]
    assert (result["settings"]["restarts"], model["restarts"], model["stopped"]) == (5, 2, said)
    assert all(fact["times"]["restarts"] == [0] * 3 + [1] * 3 for fact in result["arms"].values())
    assert all(fact["warm_up"]["runs"] == 12 for fact in result["arms"].values())
    shown = capsys.readouterr()
    assert f"few has fewer restarts than were asked for: {said}." in shown.out
    assert f"{said}; the 2 before it are kept" in shown.err
    monkeypatch.setattr(Deviating, "started", [("", "", 0)] * 3)
    with pytest.raises(record.RecordError):  # nothing to make an interval of
        run_with(tmp_path / "none", "textbook,huggingface", "--B", "2", "--restarts", "3", "--rounds", "1")
    assert "few: textbook ended with status -9 during 'step'" in capsys.readouterr().err
    monkeypatch.setattr(Deviating, "started", [("", "", 0)] * 7)
    with pytest.raises(record.RecordError):
        run_with(tmp_path / "none", "textbook,huggingface", "--B", "2", "--restarts", "5")  # the first one fails


def test_ctrl_c_in_a_late_restart_leaves_those_before_it(tmp_path, monkeypatch, capsys, deviating):
    class Interrupted(Deviating):
        def step_ms(self):
            if len(Deviating.started) > 9 and self.name == "textbook":
                raise KeyboardInterrupt
            return super().step_ms()

    monkeypatch.setattr(throughput, "ArmProcess", Interrupted)
    status, result = run_with(tmp_path, "textbook,huggingface,torchtitan", "--B", "2", "--restarts", "5")
    assert (status, FakeArm.alive) == (130, 0)
    model = result["settings"]["models"]["few"]
    assert (model["restarts"], model["stopped"]) == (2, "restart 3 stopped by Ctrl-C")
    assert all(fact["times"]["restarts"] == [0] * 3 + [1] * 3 for fact in result["arms"].values())
    assert result["peers_absent"] == {"torchtitan": "was not reached: stopped by Ctrl-C"}  # another model, not begun
    assert result["checks"][-1] == {"name": "ran to its end", "ok": False, "detail": "stopped by Ctrl-C"}
    assert "not all of it ran: stopped by Ctrl-C" in capsys.readouterr().err
    monkeypatch.setattr(Deviating, "started", [("", "", 0)] * 7)
    with pytest.raises(KeyboardInterrupt):  # in the first restart: there is nothing to keep
        run_with(tmp_path / "none", "textbook,huggingface,torchtitan", "--B", "2", "--restarts", "5")
    assert not list((tmp_path / "none").glob("*"))


@pytest.mark.parametrize("how", [KeyboardInterrupt("stopped by SIGTERM"), arm.ArmError("tritium ended with status -9")])
def test_a_model_that_cannot_be_timed_leaves_the_others_figures(tmp_path, monkeypatch, capsys, deviating, how):
    class Fails(Deviating):
        def step_ms(self):
            if self.name == "tritium" and self.config.name != "few":
                raise how
            return super().step_ms()

    monkeypatch.setattr(throughput, "ArmProcess", Fails)
    status, result = run_with(tmp_path, "textbook,huggingface,torchtitan", "--B", "2", "--restarts", "3")
    interrupted = isinstance(how, KeyboardInterrupt)
    assert (status, FakeArm.alive) == (130 if interrupted else 1, 0)
    assert {fact["peer"] for fact in result["arms"].values()} == {"tritium", "textbook", "huggingface"}
    assert result["peers_absent"].keys() == {"torchtitan"}
    assert f"could not be timed: {how}" in result["peers_absent"]["torchtitan"]
    assert result["checks"][-1]["name"] == "ran to its end" and not result["checks"][-1]["ok"]
    assert "NOT SO: ran to its end" in capsys.readouterr().out


def test_a_peer_that_fails_after_its_screening_costs_itself(tmp_path, monkeypatch, capsys, all_installed):
    class Killed(FakeArm):
        def losses(self, steps, fp32=False):
            if self.name == "huggingface_eager":
                raise arm.ArmError("huggingface_eager ended with status -9 during 'losses'")
            return super().losses(steps, fp32)

    monkeypatch.setattr(throughput, "ArmProcess", Killed)
    status, result = run_with(tmp_path, "huggingface,huggingface_eager,textbook")
    assert (status, FakeArm.alive) == (0, 0)
    assert {fact["peer"] for fact in result["arms"].values()} == {"tritium", "huggingface", "textbook"}
    assert result["peers_absent"].keys() == {"huggingface_eager"}
    said = "ended with status -9 during 'losses'"
    assert said in result["peers_absent"]["huggingface_eager"]
    shown = capsys.readouterr()
    assert "huggingface_eager is left out: " in shown.out and "not compared: huggingface_eager ended" in shown.err
    status, _ = run_with(tmp_path / "none", "huggingface_eager,textbook")
    assert status == 0
    monkeypatch.setattr(peers, "REQUIRED", ("huggingface_eager",))
    status, _ = run_with(tmp_path / "required", "huggingface_eager,textbook")
    assert status == 1


@pytest.mark.parametrize("changed", ["losses", "variant"])
def test_an_arm_that_is_another_one_after_a_restart_is_refused(tmp_path, monkeypatch, capsys, deviating, changed):
    class Another(Deviating):
        def start(self, *more):
            self.again = self.name == "textbook" and any(name == "textbook" for name, *_ in Deviating.started)
            found = super().start(*more)
            return found | {"variant": "bf16"} if self.again and changed == "variant" else found

        def losses(self, steps, fp32=False):
            found = super().losses(steps, fp32)
            return [*found[:-1], found[-1] + 0.01] if self.again and changed == "losses" else found

        def step_ms(self):
            raise AssertionError("timed before it was known to be the same")

    monkeypatch.setattr(throughput, "ArmProcess", Another)
    with pytest.raises(record.RecordError):
        run_with(tmp_path, "textbook,huggingface", "--B", "2", "--restarts", "2")  # nothing was written
    shown = capsys.readouterr().err
    assert "textbook: fp32 false is another one after a restart, so it cannot be timed: " in shown
    assert ("restarted it 5.81" in shown) == (changed == "losses")


@pytest.mark.parametrize(("theirs_ms", "sure"), [(120.0, True), (100.0, False), (80.0, False)])
def test_the_verdict_is_that_of_the_interval(tmp_path, monkeypatch, capsys, theirs_ms, sure):
    monkeypatch.setattr(throughput, "ArmProcess", FakeArm)
    monkeypatch.setitem(FakeArm.ms_of, "textbook", theirs_ms)
    assert run(tmp_path, "--screening-steps", "0") == 0
    assert ("lower bound is above 1" in capsys.readouterr().out) == sure
    result = json.loads((tmp_path / "throughput_few_T16_B2.json").read_text())
    assert result["speedup"]["textbook: fp32 false"]["median"] == pytest.approx(theirs_ms / 100.0, rel=0.01)


def test_kernels_that_cannot_be_had_end_it_with_the_reason(tmp_path, monkeypatch, capsys):
    kernels = dataclasses.replace(CONFIG.kernels, attention="triton")
    monkeypatch.setattr(presets, "load", lambda name: dataclasses.replace(CONFIG, kernels=kernels))
    assert run(tmp_path, "--screening-steps", "0") == 1
    assert "Triton compiles for GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fwe"], "no preset 'fwe'; the nearest are few, "),
        (["few", "--roundz", "3"], "no flag '--roundz'; the nearest are --rounds, "),
        (["few", "--prec", "fp32"], "no flag '--prec'; the nearest are --precision, "),  # a record's command names it
        (["few", "--T", "0"], "--T must be at least 1; it is 0"),
        (["few", "--B", "-2"], "--B must be at least 1; it is -2"),
        (["few", "--screening-steps", "-1"], "--screening-steps must be at least 0; it is -1"),
        (["few", "--seed", "-1"], "--seed must be from 0 to 9223372036854775807; it is -1"),
        (["few", "--seed", "9223372036854775808"], "it is 9223372036854775808"),
        (["few", "--peers", "litgtp"], "no peer 'litgtp'; the nearest are litgpt, "),
        (["few", "--rounds", "1", "--restarts", "1"], "--rounds must be at least 2 with --restarts 1"),
        (["few", "--rounds", "0"], "--rounds must be at least 1"),
        (["few", "--restarts", "0"], "--restarts must be at least 1"),
        (["few", "--device", "cuda"], "torch finds no GPU here"),
        (["few", "--out", __file__], "cannot hold a record"),
    ],
)
def test_a_wrong_command_line_says_what_there_is(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        throughput.main(arguments)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def run_with(tmp_path, names, *more):
    """The command with these peers, compared by fakes; its record."""
    status = throughput.main(
        ["few", "--T", "16", "--restarts", "1", "--rounds", "3", "--peers", names, "--screening-steps", "0",
         "--out", str(tmp_path), *more]
    )  # fmt: skip
    return status, record.read(tmp_path / "throughput_few_T16_B2.json")


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(throughput, "ArmProcess", FakeArm)
    monkeypatch.setattr(peers, "missing", lambda package: None)
    monkeypatch.setattr(peers.peer("torchtitan"), "why_not", lambda device: None)


def test_a_peer_is_compared_with_tritium_at_a_model_that_it_has(tmp_path, monkeypatch, capsys, all_installed):
    started = []

    class Watched(FakeArm):
        def start(self, config, B, T, device, seed):
            started.append((self.name, config.name, config.model.position, config.model.norm, FakeArm.alive))
            return super().start(config, B, T, device, seed)

    monkeypatch.setattr(throughput, "ArmProcess", Watched)
    monkeypatch.setitem(FakeArm.ms_of, "litgpt", 110.0)
    status, result = run_with(tmp_path, "textbook,litgpt,torchtitan", "--B", "2")
    assert status == 0
    assert started == [
        ("tritium", "few", "learned", "layer_norm", 1),
        ("textbook", "few", "learned", "layer_norm", 2),
        ("tritium", "few with litgpt's parts", "rope", "layer_norm", 1),  # the others have ended
        ("litgpt", "few with litgpt's parts", "rope", "layer_norm", 2),
        ("tritium", "few with Llama's parts", "rope", "rms_norm", 1),
        ("torchtitan", "few with Llama's parts", "rope", "rms_norm", 2),
    ]
    assert result["settings"]["models"]["few with litgpt's parts"]["changed"] == "position=rope"
    assert result["best_peer"] == "litgpt: fp32 default [litgpt's parts]"
    assert result["speedup"].keys() == {key for key, fact in result["arms"].items() if fact["peer"] != "tritium"}
    table = capsys.readouterr().out
    titles = [line for line in table.splitlines() if line.startswith("**few")]
    assert len(titles) == 3
    assert titles[1].startswith("**few with litgpt's parts (position=rope), T=16, B=2**")
    below = table[table.index(titles[1]) : table.index(titles[2])]
    assert "litgpt: " in below and "tritium: " in below and "textbook: " not in below


def test_losses_are_compared_within_a_model(tmp_path, monkeypatch, capsys, all_installed):
    monkeypatch.setitem(FakeArm.losses_of, "litgpt", [6.0, 5.9, 5.7])
    with pytest.raises(record.RecordError):
        run_with(tmp_path, "textbook,litgpt", "--B", "2")  # nothing was written
    shown = capsys.readouterr().err
    assert "do not compute the same thing at few with litgpt's parts, so" in shown
    assert "tritium: fp32 has the loss 5.800000, litgpt: fp32 default 5.7" in shown


@pytest.mark.parametrize(("theirs_ms", "void"), [(90.0, True), (120.0, False), (130.0, False)])
def test_plain_pytorch_slower_than_transformers_is_void_as_a_baseline(tmp_path, capsys, monkeypatch, all_installed,
                                                                      theirs_ms, void):  # fmt: skip
    """textbook takes 120 ms; transformers, compiled, theirs_ms."""
    monkeypatch.setitem(FakeArm.ms_of, "huggingface", theirs_ms)
    status, result = run_with(tmp_path, "textbook,huggingface", "--B", "2")
    assert status == 0
    shown = capsys.readouterr().out
    assert all(check["ok"] for check in result["checks"])  # slow is not wrong
    assert list(result["void"]) == (["textbook"] if void else [])
    assert ("(void as a baseline) |" in shown) == void
    assert ("textbook is void as a baseline: it has to be at least as fast as huggingface" in shown) == void
    if void:
        assert f"and is {theirs_ms / 120:.3f} [" in result["void"]["textbook"]
        assert result["best_peer"].startswith("huggingface")
    else:
        assert result["best_peer"].startswith("textbook")


@pytest.mark.parametrize("name", peers.REQUIRED)
def test_a_required_peer_without_figures_is_status_1(tmp_path, capsys, monkeypatch, all_installed, name):
    monkeypatch.setattr(peers.peer(name), "why_not", lambda device: "needs a package; install it")
    others = [peer for peer in peers.REQUIRED if peer != name]
    status, result = run_with(tmp_path, ",".join(peers.REQUIRED), "--B", "2")
    assert status == 1
    assert result["peers_absent"] == {name: "needs a package; install it"}
    assert {fact["peer"] for fact in result["arms"].values()} == {"tritium", *others}
    shown = capsys.readouterr()
    assert (
        f"{name} gave no figure: needs a package; install it; or leave it out: --peers {','.join(others)}" in shown.err
    )
    assert f"{name} is left out: needs a package; install it" in shown.out


def test_what_cannot_be_timed_or_written_is_said_at_once_and_a_full_disk_costs_no_table(
    tmp_path, capsys, monkeypatch, all_installed
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(throughput, "bench_train", lambda *a, **more: pytest.fail("it was begun"))
        for words, said in (
            (["few", "--out", str(tmp_path / "file")], "--out: "),
            (["few", "--out", str(tmp_path), "--device", "cuda"], "--device cuda: torch finds no GPU here"),
        ):
            with pytest.raises(SystemExit) as stop:
                throughput.main(words)
            assert stop.value.code == 2
            assert said in capsys.readouterr().err

    def full(result, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(throughput, "save", full)
    with pytest.raises(OSError, match="No space"):
        run_with(tmp_path, "textbook,huggingface,litgpt", "--B", "2")
    assert "| training step |" in capsys.readouterr().out


def test_a_peer_that_is_not_required_says_why_not_and_is_left_out(tmp_path, capsys, monkeypatch, all_installed):
    monkeypatch.setattr(peers.peer("torchtitan"), "why_not", lambda device: "needs another torch")
    status, result = run_with(tmp_path, "textbook,torchtitan,huggingface_liger", "--B", "2")
    assert status == 0
    assert result["peers_absent"]["torchtitan"] == "needs another torch"
    assert "for GPUs" in result["peers_absent"]["huggingface_liger"]
    assert "torchtitan is left out: needs another torch." in capsys.readouterr().out


def test_a_required_peer_of_which_no_variant_runs_is_status_1(tmp_path, capsys, monkeypatch, all_installed):
    monkeypatch.setattr(huggingface, "variants", lambda device: [peers.Variant(compile="no such mode")])
    argv = ["few", "--T", "16", "--B", "2", "--restarts", "1", "--rounds", "2", "--screening-steps", "1"]
    argv += ["--out", str(tmp_path)]
    monkeypatch.setattr(textbook, "variants", lambda device: [peers.Variant()])
    assert throughput.main([*argv, "--peers", "textbook,huggingface"]) == 1
    assert "huggingface gave no figure: no variant of it runs here: this mode does not exist" in capsys.readouterr().err
    assert (tmp_path / "throughput_few_T16_B2.json").exists()
    assert throughput.main([*argv, "--peers", "huggingface"]) == 1
    assert "there is no peer to compare with: huggingface no variant" in capsys.readouterr().err


def test_a_model_that_is_no_gpt2_is_compared_with_gpt2s_parts_and_named_so(tmp_path, monkeypatch, all_installed):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, norm="rms_norm", position="rope"))
    monkeypatch.setattr(presets, "load", lambda name: other)
    assert throughput.shaped("few", 64).model == dataclasses.replace(other.model, block_size=64)
    _, result = run_with(tmp_path, "textbook", "--B", "2")
    assert result["settings"]["models"]["few with GPT-2's parts"]["changed"] == "position=learned, norm=layer_norm"
    assert list(result["arms"]) == ["tritium: fp32 [GPT-2's parts]", "textbook: fp32 false [GPT-2's parts]"]


def test_a_model_that_a_peer_cannot_have_is_a_reason(tmp_path, monkeypatch, all_installed):
    odd = dataclasses.replace(MODEL, n_embd=30, n_head=2)  # heads of 15 channels have no pairs to turn
    monkeypatch.setattr(presets, "load", lambda name: dataclasses.replace(CONFIG, model=odd))
    status, result = run_with(tmp_path, "textbook,litgpt", "--B", "2")
    assert status == 1
    assert "must be even" in result["peers_absent"]["litgpt"]


def test_tables_of_committed_records_can_be_drawn():
    paths = list((record.ROOT / "benchmarks" / "results" / "cpu").glob("throughput_*.json"))
    assert paths
    for path in paths:
        found = record.read(path)
        table = throughput.table(found)
        assert table.count("\n| ") == len(found["arms"]) + len(found["settings"].get("models", [0]))  # a head each
