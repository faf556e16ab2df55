import dataclasses
import json
import os
import pathlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tritium.engine import hf, precision
from tritium.engine.hf import HFError, export_gpt2, load_gpt2
from tritium.engine.model import GPT, GPTConfig

V, T = 61, 24
SHAPE = dict(vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)  # noqa: C408
THREE = {
    "small": {},
    "other_width": {"n_inner": 80, "n_head": 2, "n_layer": 3, "layer_norm_epsilon": 1e-3},
    "untied": {"tie_word_embeddings": False, "n_positions": 40, "vocab_size": 128},
}
OURS = GPTConfig(
    vocab_size=V, vocab_multiple=16, block_size=T, n_layer=2, n_head=4, n_embd=32, init_std=0.2, dropout=0.1
)
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))


def theirs(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a mix-up shows
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ours(**changes: object) -> GPT:
    torch.manual_seed(1)
    model = GPT(dataclasses.replace(OURS, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = slice(0, V) if name in ("wte.weight", "head.weight") else slice(None)
            parameter[rows] += 0.1 * torch.randn_like(parameter[rows])
    return model


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    theirs().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: pathlib.Path, change) -> None:
    """``change`` the tensors of a folder's file, a dict, in place."""
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / hf.WEIGHTS)


def reconfigure(folder: pathlib.Path, **changes: object) -> None:
    path = folder / hf.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ----------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("changes", THREE.values(), ids=THREE)
@torch.no_grad()
def test_what_transformers_saves_has_its_logits_here(tmp_path, changes):
    reference = theirs(**changes)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_gpt2(tmp_path / "theirs")
    expected = reference(IDS).logits
    assert expected.std() > 0.3
    assert model(IDS).shape == expected.shape
    assert (model(IDS) - expected).abs().max() < 1e-5
    assert not model.training and model.config.dropout == 0.1

    # and back: everything transformers reads is bitwise what it wrote
    export_gpt2(model, tmp_path / "back")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
    assert back.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.equal(back(IDS).logits, expected)
    kept = {k: v for k, v in reference.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    assert {k: back.config.to_dict()[k] for k in kept} == kept


@pytest.mark.parametrize("changes", [{}, {"mlp_width": 48, "n_layer": 3}, {"tie_head": False, "vocab_multiple": 64}])
@torch.no_grad()
def test_what_we_export_has_our_logits_in_transformers_and_comes_back_bit_for_bit(tmp_path, changes):
    model = ours(**changes)
    export_gpt2(model, tmp_path / "ours")
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert (reference(IDS).logits - model(IDS)).abs().max() < 1e-5
    back = load_gpt2(tmp_path / "ours", vocab_multiple=model.config.vocab_multiple)
    assert back.config == model.config
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    export_gpt2(back, tmp_path / "again")
    for file in (hf.WEIGHTS, hf.CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_padding_rows_are_zero_after_loading_and_not_exported(saved, tmp_path):
    model = load_gpt2(saved, vocab_multiple=64)
    assert model.wte.weight.shape == (64, 32) and not model.wte.weight[V:].any()
    export_gpt2(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / hf.WEIGHTS, "pt") as file:
        assert file.get_slice("transformer.wte.weight").get_shape() == [V, 32]
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_a_model_computing_in_bf16_is_exported_in_fp32(tmp_path):
    model = ours()
    precision.to_compute_dtype(model, torch.bfloat16)
    export_gpt2(model, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / hf.WEIGHTS).values()} == {torch.float32}


def test_half_precision_files_are_read(saved):
    expected = load_gpt2(saved)
    rewrite(saved, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    model = load_gpt2(saved)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.bfloat16().float())


@torch.no_grad()
def test_the_forms_gpt2_files_come_in(saved, tmp_path):
    """Names without prefix, mask buffers beside the weights, a tied head stored all the same, one file, shards."""
    expected = load_gpt2(saved)(IDS)

    def old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, T, T).tril().bool()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(saved, old)
    assert torch.equal(load_gpt2(saved)(IDS), expected)
    assert torch.equal(load_gpt2(saved / hf.WEIGHTS)(IDS), expected)
    assert torch.equal(load_gpt2(str(saved))(IDS), expected)

    tensors = load_file(saved / hf.WEIGHTS)
    names, index = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({k: tensors[k] for k in part}, saved / f"part{i}.safetensors")
        index |= dict.fromkeys(part, f"part{i}.safetensors")
    (saved / hf.WEIGHTS).unlink()
    (saved / hf.INDEX).write_text(json.dumps({"weight_map": index}))
    assert torch.equal(load_gpt2(saved)(IDS), expected)
    (saved / "part1.safetensors").unlink()
    with pytest.raises(HFError, match=r"names part1.safetensors, missing here"):
        load_gpt2(saved)
    (saved / hf.INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(HFError, match=r"not a file beside it"):
        load_gpt2(saved)
    (saved / hf.INDEX).write_text("[]")
    with pytest.raises(HFError, match=r"not an index of shards"):
        load_gpt2(saved)


def test_what_config_json_leaves_out_has_transformers_default(saved):
    raw = json.loads((saved / hf.CONFIG).read_text())
    for name in ("layer_norm_epsilon", "activation_function", "n_inner", "tie_word_embeddings", "scale_attn_weights"):
        raw.pop(name)
    (saved / hf.CONFIG).write_text(json.dumps(raw))
    assert load_gpt2(saved).config.norm_eps == 1e-5


def test_fields_can_be_changed_and_loading_draws_no_random_numbers(saved):
    state = torch.get_rng_state()
    model = load_gpt2(saved, dropout=0.0, fused_loss=False)
    assert model.config.dropout == 0.0 and not model.config.fused_loss
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(HFError, match=r"GPTConfig has not all of the fields colour"):
        load_gpt2(saved, colour="red")
    with pytest.raises(HFError, match=r"model.position='rope' \(GPT-2: 'learned'\)"):
        load_gpt2(saved, position="rope")


# ----------------------------------------------------------------------------------------------------- damaged weights


def cut(folder: pathlib.Path, share: float) -> None:
    path = folder / hf.WEIGHTS
    os.truncate(path, int(path.stat().st_size * share))


def flip_header(folder: pathlib.Path) -> None:
    data = bytearray((folder / hf.WEIGHTS).read_bytes())
    data[20] ^= 0xFF
    (folder / hf.WEIGHTS).write_bytes(data)


def reshape(name: str, *shape: int):
    return lambda folder: rewrite(folder, lambda t: t.update({name: torch.zeros(*shape)}))


def poison(folder: pathlib.Path) -> None:
    rewrite(folder, lambda t: t["transformer.h.1.mlp.c_fc.weight"].view(-1)[7:8].fill_(torch.nan))


DAMAGES = {
    "gone": (lambda f: (f / hf.WEIGHTS).unlink(), r"holds no model.safetensors"),
    "pickle": (
        lambda f: (f / hf.WEIGHTS).rename(f / "pytorch_model.bin"),
        r"only .bin files, which may run code when read; convert them",
    ),
    "empty": (lambda f: cut(f, 0.0), r"not a whole safetensors file"),
    "half": (lambda f: cut(f, 0.5), r"not a whole safetensors file"),
    "last_byte": (lambda f: cut(f, 0.99999), r"not a whole safetensors file"),
    "header": (flip_header, r"not a whole safetensors file"),
    "missing": (
        lambda f: rewrite(f, lambda t: t.pop("transformer.h.1.attn.c_proj.bias")),
        r"h\.1\.attn\.c_proj\.bias is missing",
    ),
    "extra": (
        lambda f: rewrite(f, lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(32)})),
        r"h\.2\.ln_1\.bias is no tensor of this model",
    ),
    "transposed": (
        reshape("transformer.h.0.attn.c_attn.weight", 96, 32),
        r"c_attn\.weight is \(96, 32\) and must be \(32, 96\)",
    ),
    "vocabulary": (reshape("transformer.wte.weight", 64, 32), r"wte\.weight is \(64, 32\) and must be \(61, 32\)"),
    "twice": (
        lambda f: rewrite(f, lambda t: t.update({"ln_f.bias": torch.zeros(32)})),
        r"ln_f\.bias is there twice",
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int64)})),
        r"ln_f\.bias holds torch.int64",
    ),
    "nan": (poison, r"h\.1\.mlp\.c_fc\.weight holds numbers that are not finite"),
    "other_head": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.zeros(61, 32)})),
        r"lm_head.weight differs from its wte.weight",
    ),
    "many": (
        lambda f: rewrite(f, lambda t: [t.pop(k) for k in sorted(t)[:10]]),
        r"and 2 more\. Use the config.json that belongs to them",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused(saved, damage, message):
    damage(saved)
    with pytest.raises(HFError, match=message):
        load_gpt2(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"must say \"model_type\": \"gpt2\", it says 'llama'"),
        ({"activation_function": "relu"}, r"activation_function must be one of gelu_new.*'relu'"),
        ({"activation_function": "gelu"}, r"GPT-2's tanh approximation"),
        ({"scale_attn_weights": False}, r"scale_attn_weights must be true"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx must be false"),
        ({"add_cross_attention": True}, r"add_cross_attention must be false"),
        ({"n_layer": "2"}, r"n_layer must be a int, it is '2'"),
        ({"n_layer": True}, r"n_layer must be a int, it is True"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings must be a bool"),
        ({"attn_pdrop": 0.2}, r"embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.1 differ"),
        ({"n_head": 5}, r"describes no model that can be built: model.n_embd=32 must be a multiple"),
        ({"vocab_size": 0}, r"vocab_size is 0"),
        ({"n_layer": 3}, r"h\.2\.ln_1\.weight is missing"),
        ({"n_layer": 1}, r"h\.1\..* is no tensor of this model"),
        ({"n_positions": 25}, r"wpe\.weight is \(24, 32\) and must be \(25, 32\)"),
    ],
)
def test_a_config_that_is_not_gpt2s_is_refused(saved, changes, message):
    reconfigure(saved, **changes)
    with pytest.raises(HFError, match=message):
        load_gpt2(saved)


def test_dropouts_that_differ_can_be_decided(saved):
    reconfigure(saved, attn_pdrop=0.2)
    assert load_gpt2(saved, dropout=0.3).config.dropout == 0.3


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "[1]"])
def test_a_config_that_is_not_json_is_refused(saved, text):
    (saved / hf.CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(HFError, match=r"config.json (is not JSON|must say)"):
        load_gpt2(saved)


def test_missing_paths_are_named(saved, tmp_path):
    with pytest.raises(HFError, match=r"nowhere does not exist: give a folder"):
        load_gpt2(tmp_path / "nowhere")
    (saved / hf.CONFIG).unlink()
    with pytest.raises(HFError, match=r"config.json does not exist"):
        load_gpt2(saved)


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "rope"}, r"model.position='rope' \(GPT-2: 'learned'\)"),
        ({"norm": "rms_norm"}, r"model.norm='rms_norm'"),
        ({"activation": "swiglu"}, r"model.activation='swiglu'"),
        ({"bias": False}, r"model.bias=False"),
        ({"qk_norm": True}, r"model.qk_norm=True"),
        ({"n_kv_head": 2}, r"model.n_kv_head=2"),
        ({"logit_softcap": 5.0}, r"model.logit_softcap=5.0"),
        ({"norm": "rms_norm", "bias": False}, r"model.norm='rms_norm' .*, model.bias=False"),
    ],
)
def test_an_architecture_the_format_cannot_hold_is_refused(tmp_path, changes, message):
    with pytest.raises(HFError, match=message):
        export_gpt2(ours(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_overwrites_nothing(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    export_gpt2(ours(), folder)  # empty: fine
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(HFError, match=r"out exists and is not empty"):
        export_gpt2(ours(n_layer=1), folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HFError, match=r"file exists"):
        export_gpt2(ours(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_gpt2(ours(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        export_gpt2(ours(), tmp_path / "out", tokenizer_files=[tmp_path / "no_such_tokenizer.json"])
    assert not list(tmp_path.iterdir())


def test_tokenizer_files_and_end_of_text_go_along(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    export_gpt2(ours(), tmp_path / "deep" / "out", tokenizer_files=[tmp_path / "tokenizer.json"], eos_token_id=60)
    out = tmp_path / "deep" / "out"
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert GPT2LMHeadModel.from_pretrained(out).config.eos_token_id == 60
