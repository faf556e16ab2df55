"""``tritium bench`` from the command line to the record, on a model of a few thousand parameters."""

import dataclasses
import json

import pytest

from tritium.benchmarks import arm, peers, throughput
from tritium.benchmarks.peers import textbook
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
        ["few", "--T", "16", "--B", "2", "--rounds", "3", "--peers", "textbook", "--out", str(tmp_path), *more]
    )


def test_a_comparison_leaves_a_record_and_a_table(tmp_path, capsys):
    assert run(tmp_path, "--screening-steps", "0") == 0
    result = json.loads((tmp_path / "throughput_few_T16_B2.json").read_text())
    assert result["command"].startswith("tritium bench peers few --T 16")
    (ours, mine), (theirs, other) = result["arms"].items()
    assert (mine["peer"], other["peer"]) == ("tritium", "textbook")
    assert result["best_peer"] == theirs
    assert result["equal_loss"] == {"ok": True, "worst_relative": pytest.approx(0, abs=1e-5), "problems": []}
    assert {row["site"]: row["backend"] for row in mine["kernels"]}["blocks.0.attention"]
    for fact in (mine, other):
        assert len(fact["times"]["rounds_ms"]) == 3
        assert fact["tokens_per_s"] == pytest.approx(1e3 * 32 / fact["times"]["p50_ms"])
        assert fact["startup_s"] > 0
        assert fact["peak_bytes"] > 0
    table, shown = (tmp_path / "throughput.md").read_text(), capsys.readouterr().out
    assert table.strip() in shown
    assert f"| **{ours}** |" in table
    assert "lower bound is" in shown


class FakeArm:
    """Stands for a process: each arm has its own losses and its own speed."""

    losses_of = {"tritium": [6.0, 5.9, 5.8], "textbook": [6.0, 5.9, 5.8]}
    ms_of = {"tritium": 100.0, "textbook": 120.0}

    def __init__(self, name, variant, cache, stderr):
        self.name, self.runs = name, 0
        self.mode = variant["compile"] if variant is not None else ""
        self.kept = variant is not None and variant["keep_memory"]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def start(self, config, B, T, device, seed):
        if self.mode == "no such mode":
            raise arm.ArmError("this mode does not exist")
        kernels = (
            []
            if self.name == "textbook"
            else [{"site": "x", "op": "gelu", "phase": "train", "backend": "reference", "why": "x"}]
        )
        return {
            "startup_s": 1.0,
            "peak_bytes": 1,
            "threads": 2,
            "variant": f"fp32 {self.mode}{' kept' if self.kept else ''}".strip(),
            "kernels": kernels,
        }

    def losses(self, steps):
        return self.losses_of[self.name][:steps]

    def step_ms(self):
        self.runs += 1
        return self.ms_of[self.name] * (1 + 0.001 * (self.runs % 3))


@pytest.mark.parametrize("wrong", [[6.001, 5.9, 5.8], [6.0, 5.9, 5.801], [6.0, float("nan"), 5.8]])
def test_different_losses_are_refused(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setattr(throughput, "ArmProcess", FakeArm)
    monkeypatch.setitem(FakeArm.losses_of, "textbook", wrong)
    assert run(tmp_path, "--screening-steps", "0") == 1
    assert "do not compute the same thing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
    shipped, kept = ["fp32 default", "fp32 near"], ["fp32 default kept", "fp32 near kept"]
    compared = shipped if gain > 1 else [*kept, shipped[0]]
    assert list(result["arms"]) == ["tritium: fp32", *(f"textbook: {variant}" for variant in compared)]
    assert result["best_peer"] == f"textbook: {compared[0]}"


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
        (["few", "--T", "0"], "--T must be at least 1; it is 0"),
        (["few", "--B", "-2"], "--B must be at least 1; it is -2"),
        (["few", "--screening-steps", "-1"], "--screening-steps must be at least 0; it is -1"),
        (["few", "--seed", "-1"], "--seed must be from 0 to 9223372036854775807; it is -1"),
        (["few", "--seed", "9223372036854775808"], "it is 9223372036854775808"),
        (["few", "--peers", "jax"], "no peer 'jax'"),
        (["few", "--rounds", "1"], "at least 2"),
    ],
)
def test_a_wrong_command_line_says_what_there_is(arguments, said, capsys):
    with pytest.raises(SystemExit) as raised:
        throughput.main(arguments)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_a_model_that_peers_do_not_have_is_compared_with_gpt2s_parts_and_named_so(monkeypatch):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, norm="rms_norm", position="rope"))
    monkeypatch.setattr(presets, "load", lambda name: other)
    config = throughput.shaped("few", 16)
    assert config.name == "few with GPT-2's parts"
    assert (config.model.norm, config.model.position) == ("layer_norm", "learned")
    assert (config.model.n_layer, config.model.n_embd) == (MODEL.n_layer, MODEL.n_embd)
    with pytest.raises(ValueError, match="norm=rms_norm"):
        throughput.bench_train(other, 16, 2)
