"""AdamW over fp32 masters and its groups. The update is the op ``adamw``, the gradient norm the op ``global_norm``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tritium.engine import moments
from tritium.engine.config import OptimConfig
from tritium.engine.guard import Guard
from tritium.kernels import ops
from tritium.kernels.op import CallSite

ALIGNMENT = 64  # elements: where a tensor may begin in a flat buffer; 128 bytes of bf16


@dataclass
class Group:
    """Parameters updated by one call: equal weight decay, and either all with a working copy or none.

    flat: where storage is flat, the buffers that the tensors of each list are views of, by the list's name, and
    "grads"; equal places in all of them, and zeros between the views.
    """

    weight_decay: float
    names: list[str] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)  # what the model computes with, and where .grad appears
    params: list[Tensor] = field(default_factory=list)  # fp32: the masters, or the leaves themselves
    copies: list[Tensor] = field(
        default_factory=list
    )  # the leaves that are working copies; empty when params are the leaves
    exp_avgs: list[Tensor] = field(default_factory=list)  # fp32, bf16, or codes of 8 bits
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    scales: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))  # of codes, of both moments
    flat: dict[str, Tensor] = field(default_factory=dict)
    places: list[Tensor] = field(default_factory=list)  # of the gradients in flat["grads"]

    def rows(
        self, found: Iterator[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """params, copies, grads, exp_avgs, exp_avg_sqs as the update takes them; found: gradients as they are stored,
        from this group's on. The update is elementwise: a flat buffer is one vector, and a matrix that lies column by
        column (train.weight_layout) is handed over transposed, which is dense and needs no copy.
        """
        if self.flat:
            f = self.flat
            copies = [f["copies"]] if self.copies else []
            return [f["params"]], copies, [next(found)], [f["exp_avgs"]], [f["exp_avg_sqs"]]
        grads = [next(found) for _ in self.params]
        turned = [p.ndim == 2 and not p.is_contiguous() for p in self.params]

        def dense(tensors: list[Tensor]) -> list[Tensor]:
            if not any(turned) or not tensors:
                return tensors
            return [t.t() if turn else t for t, turn in zip(tensors, turned, strict=True)]

        return dense(self.params), dense(self.copies), dense(grads), dense(self.exp_avgs), dense(self.exp_avg_sqs)


class AdamW:
    """The optimizer of a model. Matrices decay, vectors do not.

    masters: name → fp32 master of the parameters whose leaf is a compute-dtype copy (precision.to_compute_dtype's
    result).
    """

    def __init__(self, model: torch.nn.Module, config: OptimConfig, masters: Mapping[str, Tensor]):
        self.config = config
        options: dict[str, object] = {"copies": bool(masters)}
        self.adamw_8bit = CallSite(ops.adamw_8bit, options=options) if config.moments == "int8" else None
        self.adamw = CallSite(ops.adamw, options=options | ({"moments": "bf16"} if config.moments == "bf16" else {}))
        self.global_norm = CallSite(ops.global_norm)
        groups: dict[tuple[bool, bool], Group] = {}
        for name, leaf in model.named_parameters():
            key = (leaf.ndim >= 2, name in masters)
            group = groups.setdefault(key, Group(config.weight_decay if leaf.ndim >= 2 else 0.0))
            master = masters.get(name, leaf.detach())
            group.names.append(name)
            group.leaves.append(leaf)
            group.params.append(master)
            kept = moments.dtype_of(config.moments, master)
            group.exp_avgs.append(torch.zeros_like(master, dtype=kept))
            group.exp_avg_sqs.append(torch.zeros_like(master, dtype=kept))
            if kept == torch.uint8:
                for scales in group.scales:
                    scales.append(moments.zero_scales(master))
            if name in masters:
                group.copies.append(leaf.detach())
        self.groups = list(groups.values())
        device = self.groups[0].params[0].device
        self.steps_done = torch.zeros((), device=device)
        self.guard = Guard(config.skip_outliers, device)

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that an update reads."""
        leaves = (leaf for group in self.groups for leaf in group.leaves)
        return sum(leaf.numel() * (leaf.grad_dtype or torch.float32).itemsize for leaf in leaves)

    @property
    def accumulated_bytes(self) -> int:
        """Moved by adding one more micro-batch's gradients, each in its leaf's dtype, to the sums."""
        leaves = (leaf for group in self.groups for leaf in group.leaves)
        return sum(
            leaf.numel() * (leaf.element_size() + 2 * (leaf.grad_dtype or torch.float32).itemsize) for leaf in leaves
        )

    @property
    def flat(self) -> bool:
        """Whether storage is flat."""
        return bool(self.groups[0].flat)

    def call_sites(self) -> Iterator[tuple[str, CallSite]]:
        yield "optimizer", self.adamw
        if self.adamw_8bit is not None:
            yield "optimizer", self.adamw_8bit
        yield "gradient norm", self.global_norm

    def gradients(self) -> list[Tensor]:
        """The gradient of every parameter, in group order. A parameter the loss did not reach is an error, not a
        zero.
        """
        found = []
        for group in self.groups:
            for name, leaf in zip(group.names, group.leaves, strict=True):
                if leaf.grad is None:
                    raise RuntimeError(f"parameter {name} has no gradient: the loss does not depend on it")
                found.append(leaf.grad)
        return found

    @torch.no_grad()
    def step(self, lr: Tensor, inverse_count: Tensor, loss: Tensor | None = None) -> Tensor:
        """Clip and update from the leaves' gradients of a *summed* loss; returns the gradient norm of the mean loss,
        () fp32.

        lr: () fp32 on the device. inverse_count: () fp32, 1 / number of targets in the whole batch. loss: () fp32, the
        mean loss. A step that ``guard`` finds bad changes nothing and is counted there. The host reads nothing back.
        """
        found = iter(self.stored_gradients())
        lists = [group.rows(found) for group in self.groups]
        grads = [grad for rows in lists for grad in rows[2]]
        norm = self.global_norm(grads) * inverse_count
        scale = inverse_count
        if self.config.grad_clip > 0.0:
            scale = scale * torch.clamp(self.config.grad_clip / (norm + 1e-6), max=1.0)
        skip = self.guard.judge(norm, loss)
        scale = torch.where(skip > 0, torch.zeros_like(scale), scale)
        self.steps_done += 1.0 - skip
        step = torch.clamp(self.steps_done, min=1.0)  # a skipped first step must not divide by 1 - β⁰
        for group, rows in zip(self.groups, lists, strict=True):
            update = self.adamw
            if group.scales[0]:
                assert self.adamw_8bit is not None
                update, rows = self.adamw_8bit, (*rows, *group.scales)  # type: ignore[assignment]
            update(
                *rows, lr, step, scale, skip,
                self.config.beta1, self.config.beta2, self.config.eps, group.weight_decay,
            )  # fmt: skip
        return norm

    def zero_grad(self) -> None:
        for group in self.groups:
            for leaf in group.leaves:
                leaf.grad = None

    def stored_gradients(self) -> list[Tensor]:
        """The gradients as they lie in memory: one flat buffer for each group, or one tensor for each parameter."""
        found = self.gradients()
        for group in self.groups:
            for leaf, place in zip(group.leaves, group.places, strict=bool(group.places)):
                _move(place, leaf)  # one that autograd did not bring
        return [group.flat["grads"] for group in self.groups] if self.flat else found

    def sum_in_fp32(self) -> None:
        """From now on gradients of working copies are summed in fp32, over micro-batches and processes.

        The first one of a step is widened when it arrives; autograd adds the later ones to that in place, as they come
        in the compute dtype. No wide copy of these is made (but inside torch's addition of two dtypes on a CPU).
        """
        for group in self.groups:
            for leaf in group.leaves if group.copies else ():
                leaf.grad_dtype = None  # any: the sum is wider than the leaf
                leaf.register_post_accumulate_grad_hook(_widen)

    @torch.no_grad()
    def flatten(self, sum_in_fp32: bool) -> None:
        """Put parameters, working copies, gradients and moments into one buffer for each group and kind. These are then
        what is summed over processes, normed and updated; names, shapes, strides and values stay.

        The first gradient of a step is copied into its place when it arrives, later ones are added there. sum_in_fp32:
        the places of working copies' gradients are fp32.
        """
        for group in self.groups:
            for kind in ("params", "copies", "exp_avgs", "exp_avg_sqs"):
                if tensors := getattr(group, kind):
                    group.flat[kind], views = _flat(tensors, tensors[0].dtype)
                    torch._foreach_copy_(views, tensors)
                    for tensor, view in zip(tensors, views, strict=True):
                        tensor.data = view  # the tensor stays: who else reads a master (a table's rows) follows
            widens = bool(group.copies) and sum_in_fp32
            group.flat["grads"], group.places = _flat(group.leaves, torch.float32 if widens else group.leaves[0].dtype)
            for leaf, view, place in zip(group.leaves, group.copies or group.params, group.places, strict=True):
                leaf.data = view.data
                if widens:
                    leaf.grad_dtype = None
                leaf.register_post_accumulate_grad_hook(partial(_move, place))

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: exp_avg.NAME, exp_avg_sq.NAME, where these are codes exp_avg_scale.NAME and exp_avg_sq_scale.NAME,
        steps_done, and the guard's. The masters are the model's business (``master_weights``).
        """
        state = {"steps_done": self.steps_done, **self.guard.state_dict()}
        for group in self.groups:
            for name, m, v in zip(group.names, group.exp_avgs, group.exp_avg_sqs, strict=True):
                state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"] = m, v
            for which, scales in zip(("exp_avg_scale", "exp_avg_sq_scale"), group.scales, strict=True):
                state |= {f"{which}.{name}": s for name, s in zip(group.names, scales, strict=bool(scales))}
        return state

    def master_weights(self) -> dict[str, Tensor]:
        """Name → fp32 weight: what a checkpoint stores, whatever the compute dtype."""
        return {name: p for group in self.groups for name, p in zip(group.names, group.params, strict=True)}

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write every working copy from its master (after loading masters in place)."""
        for group in self.groups:
            for copy, master in zip(group.copies, group.params, strict=bool(group.copies)):
                copy.copy_(master)


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A buffer of zeros, and views of it with the shapes and strides of these (dense) tensors, in their order."""
    sizes = [-(-t.numel() // ALIGNMENT) * ALIGNMENT for t in tensors]
    buffer = torch.zeros(sum(sizes), dtype=dtype, device=tensors[0].device)
    pieces = buffer.split(sizes)
    return buffer, [piece.as_strided(t.shape, t.stride()) for piece, t in zip(pieces, tensors, strict=True)]


def _move(place: Tensor, leaf: Tensor) -> None:
    """The hook of a leaf whose gradient has a place: the first one is copied there, later ones are added there."""
    if leaf.grad is not place:
        assert leaf.grad is not None
        place.copy_(leaf.grad)
        leaf.grad = place


def _widen(leaf: Tensor) -> None:
    assert leaf.grad is not None
    if leaf.grad.dtype != torch.float32:
        leaf.grad = leaf.grad.to(torch.float32)
