"""The network: Norm, Linear, Attention, MLP, Block, Head, GPT, read top to bottom.

Shapes: B batch, T time, C model width, H query heads, G key/value heads, D head width, F MLP width, V vocabulary,
Vp padded vocabulary, L layers.

No module here says how an op is computed: each holds a CallSite, and ``tritium.kernels.op.bind(model, choices)`` gives
every one its kernel (until then: the reference). The default configuration is GPT-2 (Radford et al., 2019) exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tritium.engine.config import ConfigError, GPTConfig
from tritium.kernels import op, ops
from tritium.kernels.op import CallSite

__all__ = ["GPT", "MLP", "Attention", "Block", "Cache", "Embedding", "GPTConfig", "Head", "Linear", "Norm"]


class Cache(Protocol):
    """Keys and values of the columns already seen (engine/generate.py has one); ``length``: how many."""

    length: int

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's k and v (B, T, G, D); returns all columns so far, (B, length + T, G, D) each."""


class Linear(nn.Module):
    """(..., C) → (..., F)."""

    def __init__(self, C: int, F: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(F, C))
        self.bias = nn.Parameter(torch.empty(F)) if bias else None
        self.linear = CallSite(ops.linear, shape={"C": C, "F": F}, options={"bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """ids (...) → (..., C), in the table's fp32.

    master: the fp32 table, where ``weight`` is a tied head's copy of it in the compute dtype (engine/precision.py):
    rows are read there, unrounded, and their gradient goes to ``weight``, as the head's does.
    """

    def __init__(self, V: int, C: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(V, C))
        self.master: Tensor | None = None
        self.embedding = CallSite(ops.embedding, shape={"V": V, "C": C}, dtype=torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        if self.master is not None and torch.is_grad_enabled():
            return self.with_table(ids)[0]
        return self.embedding(ids, self.weight if self.master is None else self.master)

    def with_table(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, and the table for its second reader, a tied head."""
        # an opaque kernel's backward writes a whole table of its own; the reference's is the compiler's to see
        opaque = self.master is None and self.embedding.backend != "reference"
        if opaque or not torch.is_grad_enabled():
            return self(ids), self.weight
        source = self.weight.detach() if self.master is None else self.master
        rows, table = _TiedRows.apply(self.embedding(ids, source), ids, self.weight)
        return rows, table


class _TiedRows(torch.autograd.Function):
    """Rows of a table and the table itself, as one node: its gradient is the second reader's, to which the rows' is
    added where they lie. Autograd alone fills a table of zeros for the rows and then adds up two tables: for GPT-2's
    vocabulary and few rows, 154 MB written and 463 MB moved to add a few.

    Where the table's gradient is narrower than the rows', what belongs to one id is added up in the rows' dtype and
    rounded once: a frequent token's many small shares would be lost one by one. All positions of an id then write the
    same row, so their order does not matter.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return rows.view_as(rows), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor, table: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        # a compiler writes into table, which nobody else reads; eagerly it may be somebody's, and is copied
        if rows.dtype == table.dtype:
            return None, None, table.index_put((ids,), rows, accumulate=True)
        ids, rows = ids.flatten(), rows.flatten(0, -2)
        N = ids.shape[0]
        slot = ids.new_empty(table.shape[0]).index_put((ids,), torch.arange(N, device=ids.device))[ids]
        sums = torch.zeros_like(rows).index_add(0, slot, rows)[slot]  # one of an id's positions stands for all
        return None, None, table.index_put((ids,), (table[ids] + sums).to(table.dtype))


class Norm(nn.Module):
    """LayerNorm or RMSNorm over C; its weights stay fp32 whatever x is."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.eps, self.layer_norm = config.norm_eps, config.norm == "layer_norm"
        self.weight = nn.Parameter(torch.empty(C))
        self.bias = nn.Parameter(torch.empty(C)) if self.layer_norm and config.bias else None
        self.norm = CallSite(
            ops.layer_norm if self.layer_norm else ops.rms_norm,
            shape={"C": C},
            options={"bias": self.bias is not None, "weight": True},
            weights=torch.float32,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_norm:
            return self.norm(x, self.weight, self.bias, self.eps)
        return self.norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention; q, k and v come from one projection as strided views, k and v with G heads."""

    def __init__(self, config: GPTConfig, layer: int, documents: bool):
        super().__init__()
        H, G, D = config.n_head, config.kv_heads, config.head_width
        self.layer, self.heads, self.dropout, self.eps = layer, (H, G, G), config.dropout, config.norm_eps
        self.qkv = Linear(config.n_embd, (H + 2 * G) * D, config.bias)
        self.proj = Linear(H * D, config.n_embd, config.bias)
        self.attention = CallSite(
            ops.attention, shape={"H": H, "G": G, "D": D},
            options={"causal": True, "documents": documents, "window": 0, "softcap": 0.0},
            training={"dropout": config.dropout},
        )  # fmt: skip
        self.qk_norm = CallSite(ops.rms_norm, shape={"C": D}, options={"weight": False}) if config.qk_norm else None
        self.rope = CallSite(ops.rope, shape={"H": H, "G": G, "D": D}) if config.position == "rope" else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        seq_start: Any = None,
        seed: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, sum(self.heads), -1).split(self.heads, dim=2)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, None, self.eps), self.qk_norm(k, None, self.eps)
        if self.rope is not None:
            assert rotation is not None
            q, k = self.rope(q, k, *rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = self.attention(q, k, v, seq_start, dropout=self.dropout if self.training else 0.0, seed=seed)
        return self.proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """C → F → C; a gated activation's gate and value come from one projection."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, F = config.n_embd, config.hidden_width
        self.gated = config.activation in ("swiglu", "geglu")
        self.up = Linear(C, 2 * F if self.gated else F, config.bias)
        self.activation = CallSite(ops.OPS[config.activation], shape={"F": F})
        self.down = Linear(F, C, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(self.activation(*x.chunk(2, dim=-1)) if self.gated else self.activation(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int, documents: bool):
        super().__init__()
        self.norm1 = Norm(config)
        self.attention = Attention(config, layer, documents)
        self.norm2 = Norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        seq_start: Any = None,
        seed: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), rotation, seq_start, seed, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Head(nn.Module):
    """Hidden states → logits over the real vocabulary, or the summed loss. Owns a weight only when untied."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        V, Vp, C = config.vocab_size, config.padded_vocab_size, config.n_embd
        self.config, self.chunk = config, 0  # rows whose logits exist at one time: train.loss_chunk
        self.weight = None if config.tie_head else nn.Parameter(torch.empty(Vp, C))
        options = {"tied": config.tie_head, "softcap": config.logit_softcap}
        training = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
        self.linear = CallSite(ops.linear, shape={"C": C, "F": Vp}, options={"bias": False})
        self.linear_cross_entropy = self.cross_entropy = None
        if config.fused_loss:
            self.linear_cross_entropy = CallSite(
                ops.linear_cross_entropy, shape={"C": C, "V": V, "Vp": Vp}, options=options, training=training
            )
        else:
            self.cross_entropy = CallSite(
                ops.cross_entropy, shape={"V": V, "Vp": Vp}, options=options, training=training
            )

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., C), weight (Vp, C) → (..., V) in x's dtype."""
        z = self.linear(x, weight.to(x.dtype))[..., : self.config.vocab_size]
        c = self.config.logit_softcap
        return c * torch.tanh(z / c) if c > 0.0 else z

    def loss(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """x (N, C), weight (Vp, C), targets (N,) → () fp32: the sum over the rows whose target is not -100.

        Label smoothing and z-loss shape training only: in evaluation mode the loss is the negative log-likelihood.
        """
        c = self.config
        smoothing, z_loss = (c.label_smoothing, c.z_loss) if self.training else (0.0, 0.0)
        options = (c.vocab_size, -100, smoothing, z_loss, c.logit_softcap)
        if self.linear_cross_entropy is not None:
            return self.linear_cross_entropy(
                x, weight, targets, *options, self.chunk, with_grad=torch.is_grad_enabled()
            )
        assert self.cross_entropy is not None
        return self.cross_entropy(self.linear(x, weight.to(x.dtype)), targets, *options, reduction="sum")


def call(block: nn.Module, *args: Any) -> Tensor:
    """Run a block: what ``GPT.run_block`` is until engine/recompute.py puts checkpointing in its place."""
    return block(*args)


class GPT(nn.Module):
    """The language model.

    documents: forward will be given ``seq_start``; a fact for the attention backends, which may not all serve it.
    compute_dtype: dtype of the residual stream and, once engine/precision.py has converted them, of
    ``compute_parameters()``. fill: without it weights are what memory happens to hold, for who loads all of them.
    """

    blocks: Sequence[Block]
    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, documents: bool = False, fill: bool = True):
        super().__init__()
        problems = config.problems()
        if config.vocab_size == 0:
            problems.append(
                "model.vocab_size is 0: it comes from the tokenizer, or set it; a model cannot be built without"
            )
        if problems:
            raise ConfigError("this model cannot be built:\n" + "\n".join(f"  - {p}" for p in problems))
        self.config = config
        self.compute_dtype = torch.float32
        self.run_block: Callable[..., Tensor] = call
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i, documents) for i in range(config.n_layer))  # type: ignore[assignment]
        self.norm = Norm(config)
        self.head = Head(config)
        if config.position == "rope":
            half = int(config.head_width * config.rope_fraction) // 2
            self.register_buffer("cos", torch.empty(config.block_size, half, dtype=torch.float32), persistent=False)
            self.register_buffer("sin", torch.empty(config.block_size, half, dtype=torch.float32), persistent=False)
        if fill:
            self.init_weights()
        else:
            self._fill_rotation()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter, and the rotary tables. s = config.init_std.

        tensor                                        distribution
        wte.weight, rows 0 … V-1                      N(0, s)
        wte.weight, rows V … Vp-1 (padding)           0
        wpe.weight                                    N(0, s)
        head.weight (untied)                          as wte.weight
        blocks.*.attention.qkv.weight, mlp.up.weight  N(0, s)
        blocks.*.attention.proj.weight                N(0, s / √(2L)): 2L branches add to the residual stream
        blocks.*.mlp.down.weight                      N(0, s / √(2L))
        norm*.weight                                  1
        every bias                                    0
        """
        c = self.config
        residual = c.init_std / math.sqrt(2 * c.n_layer)
        for module in self.modules():
            if isinstance(module, (Linear, Embedding)):
                module.weight.normal_(0.0, c.init_std)
            elif isinstance(module, Norm):
                module.weight.fill_(1.0)
            if isinstance(module, (Linear, Norm)) and module.bias is not None:
                module.bias.zero_()
        for block in self.blocks:
            block.attention.proj.weight.normal_(0.0, residual)
            block.mlp.down.weight.normal_(0.0, residual)
        if self.head.weight is not None:
            self.head.weight.normal_(0.0, c.init_std)
        self.head_weight[c.vocab_size :] = 0.0
        self.wte.weight[c.vocab_size :] = 0.0
        self._fill_rotation()

    def _fill_rotation(self) -> None:
        c = self.config
        if c.position != "rope":
            return
        half = self.cos.shape[1]
        frequencies = c.rope_theta ** (-torch.arange(half, dtype=torch.float32, device=self.cos.device) / half)
        angles = torch.arange(c.block_size, dtype=torch.float32, device=self.cos.device)[:, None] * frequencies
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    @property
    def head_weight(self) -> Tensor:
        """(Vp, C): the head's own weight, or the token table when tied."""
        return self.wte.weight if self.head.weight is None else self.head.weight

    def compute_parameters(self) -> list[str]:
        """Names of the parameters that may be kept in the compute dtype: weights and biases of the blocks' GEMMs.

        Embeddings and norms stay fp32 leaves: they are read row-wise. The head's weight may have a copy too
        (``head_name``); without one it is cast inside its op.
        """
        return [
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, Linear)
            for name, _ in module.named_parameters(recurse=False)
        ]

    @property
    def head_name(self) -> str:
        """Name of the head's weight, which may be the token table."""
        return "wte.weight" if self.head.weight is None else "head.weight"

    def num_parameters(self, positions: bool = True) -> int:
        """Number of parameters, padding rows included; ``positions=False`` leaves out the position table (nanoGPT)."""
        count = sum(p.numel() for p in self.parameters())
        return count if positions or self.wpe is None else count - self.wpe.weight.numel()

    def train(self, mode: bool = True) -> GPT:
        """Also points every bound call site at the kernels of phase "train" or "eval"."""
        super().train(mode)
        if any(site.bound for _, site in op.call_sites(self)):
            op.enter(self, "train" if mode else "eval")
        return self

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        seq_start: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """ids (B, T) int64 → logits (B, T, V) in the compute dtype; with targets (B, T) int64 → the summed loss, fp32.

        A target of -100 is not counted; the caller divides by the number that is. seq_start: see ``hidden``.
        """
        if targets is None:
            return self.head.logits(self.hidden(ids, seq_start, cache), self.head_weight)
        x, table = self.embed(ids, seq_start, cache)
        return self.finish(self.through_blocks(x, seq_start, cache), table, targets)

    def hidden(self, ids: Tensor, seq_start: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids (B, T) int64 → the head's input (B, T, C) in the compute dtype.

        seq_start (B, T) int32: the column at which the document of each position begins. Attention stays inside it and
        learned positions count from it, so a document in a packed (or left-padded) row is computed as if it were alone.
        cache: ids continue the columns it holds. Raises ValueError when the columns exceed block_size.
        """
        x, _ = self.embed(ids, seq_start, cache)
        return self.norm(self.through_blocks(x, seq_start, cache))

    # The three parts of a pass: engine/compiling.py may compile each for itself.

    def embed(self, ids: Tensor, seq_start: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, T) → the residual stream (B, T, C) in the compute dtype, and the head's weight (Vp, C)."""
        T = ids.shape[1]
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(
                f"a row may have at most block_size={self.config.block_size} tokens, this one has {start + T}: there "
                "are no positions beyond; crop it, or build the model with a larger model.block_size"
            )
        if self.head.weight is None:
            x, table = self.wte.with_table(ids)
        else:
            x, table = self.wte(ids), self.head.weight
        if self.wpe is not None:
            if seq_start is None:
                x = x + self.wpe.weight[start : start + T]
            else:  # columns of left padding come before their row's start: any position will do, nothing reads them
                x = x + self.wpe((torch.arange(start, start + T, device=ids.device) - seq_start).clamp(min=0))
        return self.dropout(x.to(self.compute_dtype)), table

    def through_blocks(self, x: Tensor, seq_start: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The residual stream (B, T, C), through all blocks."""
        T = x.shape[1]
        start = 0 if cache is None else cache.length
        rotation = (
            (self.cos[start : start + T], self.sin[start : start + T]) if self.config.position == "rope" else None
        )
        documents = self._prepared(seq_start)
        seeds: Sequence[Tensor | None] = [None] * len(self.blocks)
        if self.training and self.config.dropout > 0.0:  # drawn out here, so that a recomputed block sees the same ones
            seeds = torch.randint(2**31, (len(self.blocks),), device=x.device).unbind()
        for block, seed, prepared in zip(self.blocks, seeds, documents, strict=True):
            x = self.run_block(block, x, rotation, prepared, seed, cache)
        return x

    def finish(self, x: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """The residual stream (B, T, C), the head's weight and targets (B, T) → the summed loss, () fp32."""
        return self.head.loss(self.norm(x).flatten(0, 1), table, targets.flatten())

    def _prepared(self, seq_start: Tensor | None) -> list[Any]:
        """For each block, seq_start as its attention backend wants it; a backend's ``prepare`` runs once per call."""
        found: list[Any] = []
        made: dict[str, Any] = {}
        for block in self.blocks:
            site = block.attention.attention
            if seq_start is not None and site.backend not in made:
                prepare = next((b.prepare for b in site.bound.values() if b.name == site.backend), None)
                made[site.backend] = seq_start if prepare is None else prepare(seq_start)
            found.append(made[site.backend] if seq_start is not None else None)
        return found
