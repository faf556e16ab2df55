"""Generation: prefill, then one token at a time with a KV cache.

Shapes: B rows, T columns, V vocabulary, G key/value heads, D head width.

Prompts of different lengths are padded on the left, so that the newest token of every row is in the last column;
``seq_start`` keeps attention and learned positions to a row's own tokens. A row draws one uniform number a token from a
generator of its own, so what it says depends on its prompt and seed and not on the rows beside it.

The model sees the last ``block_size`` tokens of a row, as in nanoGPT. Once a row is longer than that, its window slides
with every token: all positions change, nothing cached can be kept, and each token costs a prefill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tritium.engine.config import ConfigError
from tritium.engine.model import GPT
from tritium.kernels import op


class GenerateError(ConfigError):
    """A request that cannot be met; the message says why."""


class KVCache:
    """Keys and values of the first ``length`` columns of B rows, (B, columns, G, D) per layer, allocated once."""

    def __init__(self, model: GPT, B: int, columns: int):
        c = model.config
        shape, device = (B, columns, c.kv_heads, c.head_width), model.wte.weight.device
        self.k = [torch.empty(shape, dtype=model.compute_dtype, device=device) for _ in range(c.n_layer)]
        self.v = [torch.empty(shape, dtype=model.compute_dtype, device=device) for _ in range(c.n_layer)]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, G, D) after the columns held; returns all. ``advance`` once every layer has done so."""
        end = self.length + k.shape[1]
        self.k[layer][:, self.length : end] = k
        self.v[layer][:, self.length : end] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def advance(self, T: int) -> None:
        self.length += T


def generate(
    model: GPT,
    ids: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    cache: bool = True,
) -> list[list[int]]:
    """The new tokens of each row, without its prompt, up to and including the first of ``stop_ids``. See ``stream``."""
    rows: list[list[int]] = [[] for _ in ids]
    for tokens in stream(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
        cache=cache,
    ):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    model: GPT,
    ids: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    cache: bool = True,
) -> Iterator[list[int | None]]:
    """Yields, for every new token, one id per row, or None for a row that has stopped.

    The model is in eval mode until the iterator is exhausted or closed, then as it was.
    ids: B prompts, lists of their own lengths or a tensor (B, T). temperature: 0 takes the likeliest token. top_k: draw
    from the k likeliest only (0: all). top_p: from the fewest likeliest whose probability reaches p. seed: row r uses
    seed + r; or one seed per row. cache=False computes every step anew: the same tokens, slowly.
    Raises GenerateError at once for arguments that make no sense.
    """
    prompts = [list(map(int, row)) for row in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    seeds = [seed + r for r in range(len(prompts))] if isinstance(seed, int) else list(seed)
    V = model.config.vocab_size
    for r, row in enumerate(prompts):
        if not row:
            raise GenerateError(f"prompt {r} is empty: there is nothing to continue; begin with the end-of-text token")
        wrong = next((i for i in row if not 0 <= i < V), None)
        if wrong is not None:
            raise GenerateError(
                f"prompt {r} holds id {wrong}, and the model has ids 0 to {V - 1}: use its own tokenizer"
            )
    for name, value, good, rule in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
        ("temperature", temperature, temperature >= 0.0, "at least 0 (0 takes the likeliest token)"),
        ("top_k", top_k, top_k >= 0, "at least 0 (0 draws from all tokens)"),
        ("top_p", top_p, 0.0 < top_p <= 1.0, "in (0, 1]"),
        ("seed", seed, len(seeds) == len(prompts), f"an integer or one integer for each of the {len(prompts)} prompts"),
    ):
        if not good:
            raise GenerateError(f"{name} must be {rule}, not {value}")
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, generators, frozenset(stop_ids), cache)


def _steps(
    model: GPT,
    rows: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generators: list[torch.Generator],
    stop_ids: frozenset[int],
    use_cache: bool,
) -> Iterator[list[int | None]]:
    """The loop; ``rows`` (prompts) grow."""
    alive = list(range(len(rows)))
    block_size = model.config.block_size
    cache, batch, starts = None, alive, None  # batch: the rows in the cache; starts: their first columns
    with _inference(model):
        for remaining in range(max_new_tokens, 0, -1):
            if not alive:
                return
            if cache is not None and cache.length < block_size:
                _enter(model, "decode")
                newest = torch.tensor([rows[r][-1:] for r in batch], device=model.wte.weight.device)
                logits = _forward(model, newest, starts, cache)
            else:
                _enter(model, "prefill")
                batch, cache = list(alive), None
                crops = [rows[r][-block_size:] for r in batch]
                newest, starts = _pad_left(crops, model.wte.weight.device)
                if use_cache and remaining > 1 and newest.shape[1] < block_size:
                    cache = KVCache(model, len(batch), min(block_size, newest.shape[1] + remaining - 1))
                logits = _forward(model, newest, starts, cache)
            places = [batch.index(r) for r in alive]
            tokens = sample(logits[places], [generators[r] for r in alive], temperature, top_k, top_p)
            new: list[int | None] = [None] * len(rows)
            for r, token in zip(alive, tokens, strict=True):
                rows[r].append(token)
                new[r] = token
            alive = [r for r in alive if rows[r][-1] not in stop_ids]
            yield new


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows as ids (B, T), padded with id 0, and their first columns (B,) int32, or None when all are equally long."""
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == T for row in rows):
        return ids, None
    return ids, torch.tensor([T - len(row) for row in rows], dtype=torch.int32, device=device)


@torch.no_grad()
def _forward(model: GPT, ids: Tensor, starts: Tensor | None, cache: KVCache | None) -> Tensor:
    """ids (B, T), after what the cache holds → logits of the last column, (B, V) fp32 on the CPU."""
    B, T = ids.shape
    seq_start = None if starts is None else starts[:, None].expand(B, T)
    x = model.hidden(ids, seq_start, cache)
    if cache is not None:
        cache.advance(T)
    return model.head.logits(x[:, -1], model.head_weight).float().cpu()


@contextlib.contextmanager
def _inference(model: GPT) -> Iterator[None]:
    """No dropout meanwhile; afterwards the model is in the mode it was in, its call sites on that mode's kernels."""
    training = model.training
    torch.nn.Module.train(model, False)
    try:
        yield
    finally:
        torch.nn.Module.train(model, training)
        phase = "train" if training else "eval"
        if all(phase in site.bound for _, site in op.call_sites(model)):
            op.enter(model, phase)


def _enter(model: GPT, phase: str) -> None:
    if any(site.bound for _, site in op.call_sites(model)):
        op.enter(model, phase)


def sample(
    logits: Tensor, generators: Sequence[torch.Generator], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[int]:
    """One id for each row of logits (B, V) on the CPU: where the cumulative probability passes its generator's draw."""
    if not torch.isfinite(logits).all():
        raise GenerateError(
            "the model's logits are not finite, so there is nothing to draw from: its weights have diverged or are "
            "damaged; use an earlier checkpoint"
        )
    if temperature == 0.0:
        return logits.argmax(-1).tolist()
    z = logits.double()
    z = (z - z.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    p = torch.softmax(z, dim=-1)
    if top_p < 1.0:
        descending, order = p.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(-1) - descending
        p = torch.zeros_like(p).scatter(-1, order, descending.masked_fill(before >= top_p, 0.0))
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    u = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # strictly below the total, and the first place strictly above u: a token of probability 0 is never drawn
    point = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)[:, 0].tolist()
