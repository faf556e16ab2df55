"""What training claims to compute, against the same computed another way: gradients over micro-batches, the update of
every parameter, the learning rate of every step, rows of documents, and the figures a run logs and is judged by."""

import dataclasses
import functools
import json
import math
import random
import types

import numpy as np
import pytest
import torch

from tritium.engine import checkpoint, metrics, train
from tritium.engine.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig, TrainConfig
from tritium.engine.data.loader import Loader
from tritium.engine.data.prepare import prepare
from tritium.engine.metrics import read_metrics
from tritium.engine.model import GPT
from tritium.engine.optim import AdamW
from tritium.engine.report import Reporter
from tritium.engine.schedule import learning_rate
from tritium.engine.step import MicroBatch, train_step
from tritium.engine.tasks.pretraining import Pretraining

T, V = 16, 100
EOT = 256  # of the tokenizer "bytes"


def config_for(data="", out="", **changes) -> Config:
    """A run of a second; keyword arguments SECTION_FIELD replace fields."""
    config = Config(
        name="test",
        model=GPTConfig(
            vocab_size=0, block_size=T, n_layer=1, n_head=2, n_embd=32, vocab_multiple=8, init_std=0.2
        ),
        data=DataConfig(folder=str(data)),
        train=TrainConfig(steps=1, batch_rows=4, micro_rows=2, compile="false", eval_every=0, eval_tokens=0,
                          sample_tokens=0, log_every=1, device="cpu", precision="fp32"),
        optim=OptimConfig(lr=3e-3, warmup_steps=0),
        run=RunConfig(out=str(out), save_every=0, tensorboard=False),
    )  # fmt: skip
    for key, value in changes.items():
        section, _, field = key.partition("_")
        config = config.replace(**{section: {field: value}})
    return config


def rows(count: int) -> MicroBatch:
    """Random rows; of each a different number of targets is not counted."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (count, T + 1), generator=draw)
    targets = ids[:, 1:].clone()
    for row in range(count):
        targets[row, T - row :] = -100
    return MicroBatch(ids[:, :-1], targets)


def parts(batch: MicroBatch, micro_rows: int) -> list[MicroBatch]:
    return [
        MicroBatch(*pair) for pair in zip(batch.ids.split(micro_rows), batch.targets.split(micro_rows), strict=True)
    ]


def texts(folder, split: str) -> list[bytes]:
    """The documents of a split, from the bare file of ids."""
    ids = np.fromfile(folder / f"{split}_00000.bin", "<u2")
    ends = np.flatnonzero(ids == EOT)
    return [bytes(part[part != EOT].astype(np.uint8)) for part in np.split(ids, ends + 1)[:-1]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus whose splits differ: training documents of 4 to 40 letters, validation documents of 2. Which side a
    document falls on depends on its text alone, so a first preparation tells which ones to keep."""
    draw = random.Random(0)
    long = ["".join(draw.choices("abcdefgh", k=draw.randint(4, 40))) for _ in range(300)]
    short = [a + b for a in "abcdefghijkl" for b in "abcdefghijkl"]
    folder = tmp_path_factory.mktemp("corpus")

    def prepared(name, documents):
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        prepare([folder / "text.jsonl"], folder / name, tokenizer="bytes", val_fraction=0.5, say=lambda text: None)
        return folder / name

    held_out = {text.decode() for text in texts(prepared("all", long + short), "val")}
    kept = [t for t in long if t not in held_out] + [t for t in short if t in held_out]
    found = prepared("shards", kept)
    assert len(texts(found, "val")) > 30 and {len(text) for text in texts(found, "val")} == {2}
    assert len(texts(found, "train")) > 100 and min(len(text) for text in texts(found, "train")) == 4
    return found


def steps_of(out) -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "step"]


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("micro_rows", [8, 4, 2, 1])
def test_gradient_norm_and_update_are_those_of_the_mean_over_the_whole_batch(micro_rows, clip):
    """eps=1 makes Adam's first step follow the size of the gradient, which it would otherwise divide out."""
    optim = OptimConfig(eps=1.0, weight_decay=0.0, grad_clip=clip)
    config = dataclasses.replace(
        config_for(model_vocab_size=V, train_batch_rows=8, train_micro_rows=micro_rows), optim=optim
    )
    whole = rows(8)
    count = (whole.targets != -100).sum()
    assert count == 8 * T - 28

    torch.manual_seed(config.train.seed)
    model = GPT(config.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean = model(whole.ids, whole.targets) / count
    mean.backward()
    wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item()
    assert wanted > 4 * clip  # where there is a clip, it bites
    torch.optim.AdamW(model.parameters(), lr=1.0, eps=1.0, weight_decay=0.0).step()

    engine = train.build(config)
    loss, norm = train_step(engine.loss, engine.optimizer, parts(whole, micro_rows), torch.tensor(1.0), 1.0 / count)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-5)
    assert norm.item() == pytest.approx(wanted, rel=1e-5)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    largest = max(change.abs().max().item() for change in moved.values())
    assert largest > 1e-2
    for name, weight in engine.optimizer.master_weights().items():
        torch.testing.assert_close(weight - before[name], moved[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_layout_of_the_weights_is_as_asked_and_changes_no_result(precision, compiled, monkeypatch):
    """in_out: every matrix of the blocks' GEMMs, and all that is kept for it, lies so; nothing is copied on the way to
    the update; losses, weights and the tensors of a checkpoint are those of out_in.
    """
    results = {}
    for layout in ("out_in", "in_out"):
        engine = train.build(
            config_for(model_vocab_size=V, train_batch_rows=4, train_micro_rows=2, train_precision=precision,
                       train_weight_layout=layout),
            compile=compiled,
        )  # fmt: skip
        taken = []
        for site in (engine.optimizer.adamw, engine.optimizer.global_norm):
            monkeypatch.setattr(site, "function", seen_by(taken, site.function))
        losses = [
            train_step(engine.loss, engine.optimizer, parts(rows(4), 2), torch.tensor(1e-2), 0.02)[0].item()
            for _ in range(3)
        ]
        assert taken and all(t.is_contiguous() for t in taken)
        matrices = {n for n, p in engine.model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")}
        assert len(matrices) == 4
        state = engine.state()
        for name, parameter in engine.model.named_parameters():
            kept = [state[f"{kind}.{name}"] for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")]
            for tensor in (parameter, *kept):
                turned = layout == "in_out" and name in matrices
                assert tensor.is_contiguous() is not turned and (not turned or tensor.t().is_contiguous()), name
                assert tensor.shape == parameter.shape
        results[layout] = losses, {name: tensor.clone() for name, tensor in state.items()}
    (losses, state), (other_losses, other_state) = results.values()
    bound = 1e-5 if precision == "fp32" else 1e-2
    assert other_losses == pytest.approx(losses, rel=bound) and losses[2] < losses[0]
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        if not name.startswith("model."):
            continue  # of the moments, a tiny one may differ by more than its own size
        other = other_state[name]
        if name.endswith("qkv.bias"):
            # A bias of all keys moves every score of a row alike, which softmax does not see: its gradient is 0 but for
            # rounding, and AdamW divides that by its own size. So it goes anywhere within the three steps of 1e-2.
            (query, key, value), (other_query, other_key, other_value) = tensor.chunk(3), other.chunk(3)
            assert max(key.abs().max(), other_key.abs().max()) <= 3 * 1.01e-2
            tensor, other = torch.cat((query, value)), torch.cat((other_query, other_value))
        torch.testing.assert_close(other, tensor, rtol=0, atol=10 * bound * 0.2, msg=name)


def seen_by(taken: list[torch.Tensor], function):
    """``function``, whose tensors of two axes, those in lists too, are put into ``taken``."""

    def wrapped(*args, **kwargs):
        taken.extend(t for a in args for t in (a if isinstance(a, list) else [a]) if getattr(t, "ndim", 0) == 2)
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_update_is_that_of_torch_adamw_with_and_without_masters(precision):
    optim = OptimConfig(weight_decay=0.5, grad_clip=0.5)
    engine = train.build(
        dataclasses.replace(
            config_for(model_vocab_size=V, train_batch_rows=4, train_micro_rows=4, train_precision=precision),
            optim=optim,
        )
    )
    leaves = dict(engine.model.named_parameters())
    copies = [name for name, leaf in leaves.items() if leaf.dtype == torch.bfloat16]
    layers = [f"blocks.0.{layer}" for layer in ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")]
    matrices = {"wte.weight", "wpe.weight", *(f"{layer}.weight" for layer in layers)}
    narrow = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"wte.weight"}
    assert set(copies) == (narrow if precision == "bf16" else set())
    decay = {name: group.weight_decay for group in engine.optimizer.groups for name in group.names}
    assert decay == {name: 0.5 if name in matrices else 0.0 for name in leaves}

    weights = {name: w.clone().requires_grad_() for name, w in engine.optimizer.master_weights().items()}
    reference = torch.optim.AdamW(
        [
            {"params": [w for name, w in weights.items() if (name in matrices) == decays], "weight_decay": amount}
            for decays, amount in ((True, 0.5), (False, 0.0))
        ],
        lr=0.01, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    batch = rows(4)
    for _ in range(5):
        engine.loss(batch).backward()
        for name, weight in weights.items():
            weight.grad = leaves[name].grad.float() / 50
        wanted = torch.nn.utils.clip_grad_norm_(weights.values(), 0.5).item()
        reference.step()
        norm = engine.optimizer.step(torch.tensor(0.01), torch.tensor(1 / 50))
        engine.optimizer.zero_grad()
        assert norm.item() == pytest.approx(wanted, rel=1e-5) and wanted > 0.5
    masters = engine.optimizer.master_weights()
    for name, weight in weights.items():
        torch.testing.assert_close(masters[name], weight.detach(), rtol=1e-5, atol=1e-6, msg=name)
    for name in copies:
        assert torch.equal(leaves[name].detach(), masters[name].bfloat16()), name


def test_the_learning_rate_of_a_step_is_the_one_logged_and_the_one_applied(data, tmp_path, monkeypatch):
    """learning_rate counts steps from 0, metrics.jsonl the steps done: the first is learning_rate(0), logged as 1."""
    config = config_for(data, tmp_path, train_steps=8, optim_warmup_steps=3)
    applied, step = [], AdamW.step

    def noting(self, lr, inverse_count, loss):
        applied.append(lr.item())
        return step(self, lr, inverse_count, loss)

    monkeypatch.setattr(AdamW, "step", noting)
    train.main(config, Reporter(quiet=True))
    expected = [learning_rate(s, 8, config.optim) for s in range(8)]
    assert expected[:3] == pytest.approx([1e-3, 2e-3, 3e-3]) and expected[7] < expected[6] < expected[5] < 3e-3
    assert {line["step"]: line["lr"] for line in steps_of(tmp_path)} == dict(enumerate(expected, 1))
    assert applied == pytest.approx(expected, rel=1e-6)


def summed_loss(model: GPT, ids: torch.Tensor, targets: torch.Tensor, documents: bool) -> float:
    """Of one row (T,); with ``documents`` every document in it is a row of its own, given to the model alone."""
    ends = [i + 1 for i in range(len(ids) - 1) if documents and ids[i] == EOT]
    with torch.no_grad():
        return sum(
            model(ids[None, start:stop], targets[None, start:stop]).item()
            for start, stop in zip([0, *ends], [*ends, len(ids)], strict=True)
        )


@pytest.mark.parametrize("documents", [False, True])
def test_with_documents_each_is_learned_and_evaluated_as_if_it_were_alone(data, tmp_path, documents):
    config = config_for(data, tmp_path, data_documents=documents, optim_lr=0.0)  # the weights stay what they were
    outcome = train.main(config, Reporter(quiet=True))
    model = checkpoint.load_run(tmp_path).model

    batch = Loader(data, "train", T=T, batch_rows=4, seed=config.data.seed, prefetch=0).batch(0)
    losses = {d: sum(summed_loss(model, *row, d) for row in zip(batch.ids, batch.targets, strict=True)) / (4 * T)
              for d in (False, True)}  # fmt: skip
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)
    assert steps_of(tmp_path)[0]["loss"] == pytest.approx(losses[documents], rel=1e-5)

    tokens = torch.from_numpy(np.fromfile(data / "val_00000.bin", "<u2").astype(np.int64))
    windows = range(0, len(tokens) - 1, T)
    losses = {d: sum(summed_loss(model, tokens[w : w + T][: len(tokens) - 1 - w], tokens[w + 1 : w + 1 + T], d)
                     for w in windows) / (len(tokens) - 1) for d in (False, True)}  # fmt: skip
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)
    assert outcome.val_loss == pytest.approx(losses[documents], rel=1e-5)


@pytest.mark.parametrize("flat", ["false", "true"])
@pytest.mark.parametrize("way", ["eager", "model", "block"])
def test_gradients_of_bf16_weights_are_summed_over_micro_batches_in_fp32(way, flat, monkeypatch):
    """Compiled without Inductor, which has no part in it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = config_for(model_vocab_size=V, train_batch_rows=8, train_micro_rows=1, train_precision="bf16",
                        train_flat=flat, **({} if way == "eager" else {"train_compile_scope": way}))  # fmt: skip
    engine = train.build(config, compile=way != "eager")
    batches, sums = parts(rows(8), 1), {}
    for batch in batches:
        engine.loss(batch).backward()
        for name, leaf in engine.model.named_parameters():
            sums[name] = leaf.grad.clone() if name not in sums else sums[name] + leaf.grad
        engine.optimizer.zero_grad()
    copies = [name for name, leaf in engine.model.named_parameters() if leaf.dtype == torch.bfloat16]
    assert len(copies) == 9  # the biases and matrices of one block, and the table

    found, step = {}, engine.optimizer.step

    def noting(lr, inverse_count, loss):
        found.update({name: leaf.grad.clone() for name, leaf in engine.model.named_parameters()})
        return step(lr, inverse_count)

    engine.optimizer.step = noting
    train_step(engine.loss, engine.optimizer, batches, torch.tensor(0.0), torch.tensor(1.0))
    for name in copies:
        assert found[name].dtype == torch.float32, name
        size = sums[name].abs().max()
        assert torch.equal(found[name], sums[name]), name
        assert (sums[name].bfloat16().float() - sums[name]).abs().max() > 1e-4 * size, name  # the sum needs fp32


def test_flat_storage_and_separate_tensors_continue_each_others_checkpoints(data, tmp_path):
    """bf16, two micro-batches a step, to the bit of a run that changes nothing; and no checkpoint grows."""
    states, sizes = [], []
    for first, then in (("false", "false"), ("false", "true"), ("true", "false")):
        out = tmp_path / f"{first} {then}"
        for steps, flat in ((3, first), (6, then)):
            config = config_for(data, out, train_flat=flat, train_steps=steps, train_precision="bf16",
                                optim_schedule="constant", optim_grad_clip=0.0, run_keep=9)  # fmt: skip
            train.main(config, Reporter(quiet=True))
        folders = [checkpoint.folder_of(out, steps) for steps in (3, 6)]
        sizes.append([sum(f.stat().st_size for f in folder.iterdir() if f.suffix == ".distcp") for folder in folders])
        states.append(checkpoint.load_run(out).model.state_dict())
    assert sizes[0] == sizes[1] == sizes[2]
    for name, value in states[0].items():
        assert all(torch.equal(value, other[name]) for other in states[1:]), name


def test_a_sample_changes_nothing_of_what_is_learned_whatever_it_draws(data, tmp_path, monkeypatch):
    """generate() has generators of its own; one that drew from the global generator must not move dropout either."""
    sampled = []

    def drawing(self, model, device, tokens, seed=0, prompt=""):
        sampled.append(seed)
        return f"{torch.rand(7).sum().item()}"

    monkeypatch.setattr(Pretraining, "sample", drawing)
    weights = []
    for every in (0, 2):
        config = config_for(data, tmp_path / str(every), train_steps=6, train_sample_every=every, model_dropout=0.5)
        train.main(config, Reporter(quiet=True))
        weights.append(checkpoint.load_run(tmp_path / str(every)).model.state_dict())
    assert sampled == [6, 2, 4, 6]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_the_logged_fraction_of_the_matmul_rate_is_speed_times_flops_over_rate(data, tmp_path, monkeypatch):
    asked = []

    def rate(device, dtype, N, C, F, seconds):
        assert 0 < seconds <= 1
        asked.append((device.type, dtype, N, C, F))
        return 2.5e9

    monkeypatch.setattr(metrics, "matmul_rate", rate)
    train.main(config_for(data, tmp_path, train_steps=7, train_log_every=3), Reporter(quiet=True))
    assert asked == [("cpu", torch.float32, 2 * T, 32, 128)]
    # 6 per weight of one block (12·32²) and of the head (257 ids padded to 264), and 12·C·T of attention, each layer
    flops = 6 * (12 * 32**2 + 264 * 32) + 12 * 32 * T
    timed = [line for line in steps_of(tmp_path) if "tokens_per_s" in line]
    assert len(timed) >= 2
    for line in timed:
        assert line["matmul_fraction"] == pytest.approx(line["tokens_per_s"] * flops / 2.5e9, rel=1e-9)


def test_bits_per_byte_are_those_of_the_validation_text(data, tmp_path):
    """What a run with require_bigram succeeds or fails by. A validation document is 2 bytes and 3 tokens."""
    ratio = {split: 1 + len(texts(data, split)) / sum(map(len, texts(data, split))) for split in ("train", "val")}
    assert ratio["val"] == 1.5 and ratio["train"] < 1.1
    outcome = train.main(config_for(data, tmp_path, run_require_bigram=True), Reporter(quiet=True))
    assert outcome.bits_per_byte["model"] == pytest.approx(outcome.val_loss / math.log(2) * 1.5, rel=1e-9)
    lines = {line["kind"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert lines["eval"]["val_loss"] == outcome.val_loss
    assert lines["eval"]["val_tokens"] == 3 * len(texts(data, "val")) - 1  # all but the first are predicted
    for logged in (lines["eval"]["bits_per_byte"], lines["end"]["model_bits_per_byte"]):
        assert logged == outcome.bits_per_byte["model"]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_logged_speed_is_tokens_over_time(data, tmp_path, monkeypatch, every):
    """By a clock on which a step takes half a second and nothing else takes any time."""
    clock = [0.0]

    def step(*args):
        clock[0] += 0.5
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    config = config_for(data, tmp_path, train_steps=13, train_log_every=every, train_eval_every=4)
    train.main(config, Reporter(quiet=True))
    timed = [line for line in steps_of(tmp_path) if "tokens_per_s" in line]
    assert len(timed) >= 13 // every - 1
    for line in timed:
        assert line["tokens_per_s"] == pytest.approx(config.batch_tokens / 0.5)
