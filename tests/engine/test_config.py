import dataclasses

import pytest

from tritium.engine import presets
from tritium.engine.config import Config, ConfigError, GPTConfig, KernelsConfig, OptimConfig, TrainConfig, differences
from tritium.kernels.ops import OPS


def test_every_preset_is_valid_and_survives_json():
    assert {"tiny", "gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m", "llama_8b"} <= set(presets.names())
    for name in presets.names():
        config = presets.load(name)
        assert config.name == name
        assert config.problems() == []
        assert Config.from_json(config.to_json()) == config


def test_all_problems_are_reported_at_once_with_rule_and_value():
    config = Config(
        model=GPTConfig(n_embd=100, n_head=3, dropout=1.5),
        train=TrainConfig(batch_rows=10, micro_rows=4),
        optim=OptimConfig(lr=-1.0),
    )
    with pytest.raises(ConfigError) as error:
        config.check()
    text = str(error.value)
    for part in (
        "n_embd=100",
        "n_head=3",
        "dropout",
        "1.5",
        "batch_rows=10",
        "--train.batch_rows 8",
        "optim.lr",
        "-1.0",
    ):
        assert part in text


def test_batch_must_divide_among_processes():
    config = Config(train=TrainConfig(batch_rows=8, micro_rows=4))
    assert config.problems(2) == []
    assert "× 3 process(es) = 12" in config.problems(3)[0]


def test_rows_may_be_left_to_the_plan():
    assert Config(train=TrainConfig(batch_rows=8, micro_rows=0)).problems(2) == []
    assert "must be a multiple of 3 process(es)" in Config(train=TrainConfig(batch_rows=8, micro_rows=0)).problems(3)[0]
    assert "micro_rows must be at least 0" in Config(train=TrainConfig(micro_rows=-1)).problems()[0]


def test_a_budget_needs_bytes():
    assert "recompute_budget_gb above 0" in Config(train=TrainConfig(recompute="budget")).problems()[0]
    assert Config(train=TrainConfig(recompute="budget", recompute_budget_gb=0.5)).problems() == []
    assert "recompute_every must be at least 1" in Config(train=TrainConfig(recompute_every=0)).problems()[0]


def test_kernel_choices_are_the_mapping_that_bind_takes():
    config = KernelsConfig(
        default="triton", attention="sdpa", override=("blocks.0.*:layer_norm=reference", "attention@decode=reference")
    )
    assert config.choices() == {
        "*": "triton",
        "attention": "sdpa",
        "blocks.0.*:layer_norm": "reference",
        "attention@decode": "reference",
    }
    assert KernelsConfig(override=("attention",)).problems()


def test_kernels_config_has_a_field_for_every_op():
    fields = {f.name for f in dataclasses.fields(KernelsConfig)} - {"default", "override"}
    assert fields == set(OPS)


def test_unknown_fields_in_stored_json_are_an_error():
    text = Config().to_json().replace('"block_size"', '"blocksize"')
    with pytest.raises(ConfigError, match="blocksize"):
        Config.from_json(text)


def test_differences_name_section_field_and_both_values():
    a = Config()
    b = dataclasses.replace(a, model=dataclasses.replace(a.model, n_layer=3))
    assert differences(a, b) == ["model.n_layer: 12 → 3"]


def test_padding_and_widths():
    assert GPTConfig(vocab_size=50257).padded_vocab_size == 50304
    assert GPTConfig(n_embd=768, activation="swiglu").hidden_width == 2048
    assert GPTConfig(n_head=12, n_kv_head=4).kv_heads == 4
