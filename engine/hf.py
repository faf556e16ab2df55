"""GPT-2 weights in Hugging Face's format, in and out: a folder with ``model.safetensors`` and ``config.json``.

The names are those of transformers' ``GPT2LMHeadModel``. Its blocks hold linear weights transposed (``Conv1D``, (C, F)
where ours are (F, C)), its tables have no padding rows, and a tied head is not stored. All is read and written in fp32.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tritium.engine.config import GPTConfig
from tritium.engine.model import GPT

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks that old files store beside the weights
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of one function


class HFError(ValueError):
    """Weights that cannot be loaded, or a model that this format cannot hold; the message says why."""


def load_gpt2(path: str | os.PathLike[str], **changes: Any) -> GPT:
    """The GPT-2 of a folder, or of one .safetensors file beside its ``config.json``: on the CPU, fp32, in eval mode.

    changes: fields of GPTConfig to set otherwise than the file, e.g. ``dropout=0.0`` or ``vocab_multiple=64``.
    Raises HFError for files that are missing, damaged, incomplete, or not a GPT-2. Draws no random numbers.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise HFError(f"{path} does not exist: give a folder with {CONFIG} and {WEIGHTS}, or a .safetensors file")
    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / CONFIG, changes)
    files = _weight_files(folder) if path.is_dir() else [path]
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: tuple(place.shape) for name, place in _places(model).items()}
    tied = {"lm_head.weight": shapes["wte.weight"]} if config.tie_head else {}  # may be stored all the same
    found = _read(files, shapes, optional=tied)
    if config.tie_head and not torch.equal(found.pop("lm_head.weight", found["wte.weight"]), found["wte.weight"]):
        raise HFError(
            f"{path} has tie_word_embeddings, but its lm_head.weight differs from its wte.weight: one of them would be "
            f"lost; set tie_word_embeddings to false in {CONFIG} to keep both"
        )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for table in (model.wte.weight, model.head_weight):
            table[config.vocab_size :] = 0.0
        for name, place in _places(model).items():
            place.copy_(found[name])
    return model.eval()


def export_gpt2(
    model: GPT,
    folder: str | os.PathLike[str],
    *,
    tokenizer_files: Iterable[str | os.PathLike[str]] = (),
    eos_token_id: int | None = None,
) -> None:
    """Write ``model`` as a new folder that ``GPT2LMHeadModel.from_pretrained`` loads: all of it at once, or nothing.

    tokenizer_files: copied into it. eos_token_id: id of the end-of-text token, for config.json.
    Raises HFError when the architecture is not GPT-2's, and when the folder exists and is not empty.
    """
    folder = pathlib.Path(folder)
    config = model.config
    _check_representable(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HFError(
            f"{folder} exists and is not empty: exporting would overwrite it; name a new folder, or remove it"
        )
    tensors = {
        name if name == "lm_head.weight" else f"transformer.{name}": place.detach().float().cpu().contiguous()
        for name, place in _places(model).items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        (unfinished / CONFIG).write_text(json.dumps(_to_json(config, eos_token_id), indent=2) + "\n")
        for file in tokenizer_files:
            shutil.copyfile(file, unfinished / pathlib.Path(file).name)
        for file in unfinished.iterdir():
            _sync(file)
        os.rename(unfinished, folder)  # an empty folder is replaced
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


# --------------------------------------------------------------------------------------------------------------- config


def _read_config(path: pathlib.Path, changes: dict[str, Any]) -> GPTConfig:
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise HFError(
            f"{path} does not exist: the weights do not say their own shape; put GPT-2's {CONFIG} there"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HFError(f"{path} is not JSON ({error}): it is damaged; fetch it again") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "gpt2":
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise HFError(f'{path} must say "model_type": "gpt2", it says {kind!r}: only GPT-2 weights can be loaded')
    for name, needed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if raw.get(name, needed) != needed:
            raise HFError(
                f"{path}: {name} must be {str(needed).lower()}, it is {raw[name]!r}: another network than ours"
            )
    if raw.get("activation_function", "gelu_new") not in _TANH_GELU:
        raise HFError(
            f"{path}: activation_function must be one of {', '.join(_TANH_GELU)} (GPT-2's tanh approximation), it is "
            f"{raw['activation_function']!r}: another network than ours"
        )

    def take(name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        value = raw.get(name, default)  # what a file leaves out has transformers' default
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise HFError(f"{path}: {name} must be a {wanted}, it is {value!r}: the file is damaged or not GPT-2's")
        return value

    dropouts = {name: take(name, 0.1, (int, float)) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if "dropout" not in changes and len(set(dropouts.values())) > 1:
        listed = ", ".join(f"{k}={v}" for k, v in dropouts.items())
        raise HFError(f"{path}: {listed} differ, and the model has one dropout probability; choose it: dropout=…")
    fields = {
        "vocab_size": take("vocab_size", 50257, int),
        "block_size": take("n_positions", 1024, int),
        "n_layer": take("n_layer", 12, int),
        "n_head": take("n_head", 12, int),
        "n_embd": take("n_embd", 768, int),
        "mlp_width": 0 if raw.get("n_inner") is None else take("n_inner", 0, int),
        "norm_eps": take("layer_norm_epsilon", 1e-5, (int, float)),
        "init_std": take("initializer_range", 0.02, (int, float)),
        "tie_head": take("tie_word_embeddings", True, bool),
        "dropout": dropouts["resid_pdrop"],
    }
    try:
        config = dataclasses.replace(GPTConfig(), **{**fields, **changes})
    except TypeError as error:
        raise HFError(f"GPTConfig has not all of the fields {', '.join(changes)}: {error}") from None
    problems = config.problems() + (["vocab_size is 0: there are no tokens"] if config.vocab_size == 0 else [])
    if problems:
        raise HFError(f"{path} describes no model that can be built: {'; '.join(problems)}")
    _check_representable(config)
    return config


def _check_representable(config: GPTConfig) -> None:
    """Raise HFError naming every field in which ``config`` is not a GPT-2."""
    needed = {"position": "learned", "norm": "layer_norm", "activation": "gelu", "bias": True, "qk_norm": False}
    wrong = [f"model.{k}={getattr(config, k)!r} (GPT-2: {v!r})" for k, v in needed.items() if getattr(config, k) != v]
    if config.kv_heads != config.n_head:
        wrong.append(f"model.n_kv_head={config.n_kv_head} (GPT-2: as many as n_head={config.n_head})")
    if config.logit_softcap > 0.0:
        wrong.append(f"model.logit_softcap={config.logit_softcap} (GPT-2: 0)")
    if wrong:
        raise HFError(
            f"GPT-2's format cannot hold this architecture: {', '.join(wrong)}. Its weights would be read as another "
            "network's; keep the checkpoint, or train a GPT-2"
        )


def _to_json(config: GPTConfig, eos_token_id: int | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None if config.hidden_width == 4 * config.n_embd else config.hidden_width,
        "activation_function": "gelu_new",
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "scale_attn_weights": True,
        "tie_word_embeddings": config.tie_head,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
    }


# -------------------------------------------------------------------------------------------------------------- tensors


def _places(model: GPT) -> dict[str, Tensor]:
    """Name in the file, without "transformer." → view of our parameter that has the shape of what the file holds."""
    V = model.config.vocab_size
    places: dict[str, Any] = {"wte.weight": model.wte.weight[:V]}
    if model.wpe is not None:
        places["wpe.weight"] = model.wpe.weight
    for i, block in enumerate(model.blocks):
        for norm, theirs in ((block.norm1, "ln_1"), (block.norm2, "ln_2")):
            places |= {f"h.{i}.{theirs}.weight": norm.weight, f"h.{i}.{theirs}.bias": norm.bias}
        for ours, theirs in (
            (block.attention.qkv, "attn.c_attn"),
            (block.attention.proj, "attn.c_proj"),
            (block.mlp.up, "mlp.c_fc"),
            (block.mlp.down, "mlp.c_proj"),
        ):
            places |= {f"h.{i}.{theirs}.weight": ours.weight.T, f"h.{i}.{theirs}.bias": ours.bias}
    places |= {"ln_f.weight": model.norm.weight, "ln_f.bias": model.norm.bias}
    if not model.config.tie_head:
        places["lm_head.weight"] = model.head_weight[:V]
    return places


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        only = ", only .bin files, which may run code when read; convert them" if any(folder.glob("*.bin")) else ""
        raise HFError(f"{folder} holds no {WEIGHTS}: there are no weights to load{only}")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HFError(
            f"{folder / INDEX} is not an index of shards ({error!r}): it is damaged; fetch it again"
        ) from None
    outside = [name for name in names if not isinstance(name, str) or pathlib.PurePath(name).name != name]
    missing = [name for name in names if name not in outside and not (folder / name).is_file()]
    if outside or missing:
        what = f"{outside[0]!r}, which is not a file beside it" if outside else f"{', '.join(missing)}, missing here"
        raise HFError(f"{folder / INDEX} names {what}: the weights are incomplete; fetch the folder again")
    return [folder / name for name in names]


def _read(
    files: Sequence[pathlib.Path], needed: dict[str, tuple[int, ...]], optional: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors named, in fp32. HFError lists those that are missing, unknown, double, misshapen or not finite."""
    found: dict[str, Tensor] = {}
    seen: set[str] = set()
    problems: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 (not a dict)
                    name = key.removeprefix("transformer.")
                    shape = needed.get(name, optional.get(name))
                    if shape is None:
                        if not _BUFFERS.fullmatch(name):
                            problems.append(f"{key} is no tensor of this model")
                        continue
                    if name in seen:
                        problems.append(f"{key} is there twice")
                        continue
                    seen.add(name)
                    stored = tuple(weights.get_slice(key).get_shape())
                    if stored != shape:
                        problems.append(f"{key} is {stored} and must be {shape}")
                        continue
                    tensor = weights.get_tensor(key)
                    if not tensor.is_floating_point():
                        problems.append(f"{key} holds {tensor.dtype}, not floating-point numbers")
                    elif not torch.isfinite(tensor).all():
                        problems.append(f"{key} holds numbers that are not finite")
                    else:
                        found[name] = tensor.float()
        except SafetensorError as error:
            raise HFError(f"{file} is not a whole safetensors file ({error}): it is damaged; fetch it again") from None
    problems += [f"{name} is missing" for name in needed if name not in seen]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise HFError(
            f"{', '.join(map(str, files))}: these are not the weights that {CONFIG} describes: "
            f"{'; '.join(problems[:8])}{more}. Use the {CONFIG} that belongs to them, or fetch both again"
        )
    return found


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
