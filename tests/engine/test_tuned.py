"""What was measured per device, as data: it is well-formed, and ``auto`` takes it."""

import typing

import pytest
import torch

from tritium.engine import config, train, tuned
from tritium.engine.config import Config, GPTConfig, TrainConfig


def check(entry):
    section, _, name = entry["setting"].partition(".")
    allowed = typing.get_args(typing.get_type_hints(config._SECTIONS[section])[name])
    assert entry["value"] in allowed and entry["value"] != "auto" and "auto" in allowed
    assert entry["evidence"] and set(entry) <= {"setting", "value", "arch", "dtype", "evidence"}


def test_every_entry_is_a_value_of_its_setting_and_names_its_evidence():
    for entry in tuned.entries():
        check(entry)
    good = {"setting": "train.weight_layout", "value": "in_out", "arch": "x*", "dtype": "float32", "evidence": "-"}
    check(good)
    for wrong in ({"value": "auto"}, {"value": "nt"}, {"setting": "train.seed"}, {"evidence": ""}, {"when": "now"}):
        with pytest.raises((AssertionError, KeyError)):
            check(good | wrong)


@pytest.mark.parametrize(("layout", "rows_first"), [("auto", False), ("out_in", True), ("in_out", False)])
def test_auto_is_what_was_measured_for_arch_and_dtype(monkeypatch, layout, rows_first):
    entry = {"setting": "train.weight_layout", "value": "in_out", "arch": "x*", "dtype": "float32", "evidence": "-"}
    monkeypatch.setattr(tuned, "entries", lambda: [entry | {"arch": "sm_90", "value": "out_in"}, entry])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    c = Config(
        model=GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8),
        train=TrainConfig(compile="false", precision="fp32", weight_layout=layout),
    )
    weight = dict(train.build(c).model.named_parameters())["blocks.0.mlp.up.weight"]
    assert weight.is_contiguous() == rows_first and weight.shape == (32, 8)
    assert tuned.value("train.weight_layout", "x86_64", torch.bfloat16, "out_in") == "out_in"
    assert tuned.value("train.weight_layout", "sm_90", torch.float32, "in_out") == "out_in"
