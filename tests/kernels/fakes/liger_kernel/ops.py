"""The functions' positional signatures, and what they overwrite."""

import torch
import torch.nn.functional as F

from tritium.kernels.cross_entropy.reference import cross_entropy
from tritium.kernels.rms_norm.reference import rms_norm
from tritium.kernels.rope.reference import rope


def _gradients(function, inputs, upstream):
    """Of ``function`` over fresh leaves, in fp32 where they are narrower."""
    with torch.enable_grad():
        leaves = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])


def _wide(*tensors):
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


class LigerLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, B, eps):
        ctx.save_for_backward(X, W, B)
        ctx.eps = eps
        x, w, b = _wide(X, W, B)
        return F.layer_norm(x, (x.shape[-1],), w, b, eps).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        inputs = ctx.saved_tensors
        found = _gradients(lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, ctx.eps), inputs, [dY])
        return *(g.to(t.dtype) for g, t in zip(found, inputs, strict=True)), None


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode, row_mode) == (0.0, "gemma", None)
        ctx.given = [X] if W is None else [X, W]
        ctx.eps, ctx.in_place = eps, in_place
        return rms_norm(X, W, eps)

    @staticmethod
    def backward(ctx, dY):
        dY = dY.contiguous()
        found = _gradients(lambda x, w=None: rms_norm(x, w, ctx.eps), ctx.given, [dY])
        dx = dY.copy_(found[0]) if ctx.in_place else found[0].to(dY.dtype)
        return dx, found[1].to(ctx.given[1].dtype) if len(found) > 1 else None, None, None, None, None, None


class LigerFusedAddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        assert (offset, casting_mode) == (0.0, "gemma")
        S = X + R
        ctx.save_for_backward(S, W)
        ctx.eps, ctx.in_place = eps, in_place
        return rms_norm(S, W, eps), S

    @staticmethod
    def backward(ctx, dY, dS):
        S, W = ctx.saved_tensors
        dY = dY.contiguous()
        dx, dw = _gradients(lambda s, w: rms_norm(s, w, ctx.eps), [S, W], [dY])
        dx = (dx + dS).to(dY.dtype)
        dx = dY.copy_(dx) if ctx.in_place else dx
        return dx, dx, dw.to(W.dtype), None, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.given = a, b = a.contiguous(), b.contiguous()
        a.view(-1, a.shape[-1])  # a tensor without axes has no rows
        return ctx.of(*_wide(a, b)).to(a.dtype)

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.given
        found = _gradients(ctx.of, (a, b), [dc])
        with torch.no_grad():
            return tuple(t.data.copy_(g) for t, g in zip((a, b), found, strict=True))


class LigerSiLUMulFunction(_Gated):
    @staticmethod
    def forward(ctx, a, b, gate_multiplier=1.0, down_multiplier=1.0):
        assert (gate_multiplier, down_multiplier) == (1.0, 1.0)
        ctx.of = lambda a, b: F.silu(a) * b
        return _Gated.forward(ctx, a, b)


class LigerGELUMulFunction(_Gated):
    @staticmethod
    def forward(ctx, a, b):
        ctx.of = lambda a, b: F.gelu(a, approximate="tanh") * b
        return _Gated.forward(ctx, a, b)


class LigerReLUSquaredFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X):
        X.contiguous().view(-1, X.shape[-1])
        ctx.save_for_backward(X)
        return F.relu(X).square()

    @staticmethod
    def backward(ctx, dY):
        (X,) = ctx.saved_tensors
        return (dY.float() * 2 * F.relu(X).float()).to(X.dtype)


class LigerRopeFunction(torch.autograd.Function):
    """q (B, H, T, D), k (B, G, T, D); turned in place where the heads' last axes are contiguous in (B, T, H, D)."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        assert (position_ids, unsqueeze_dim) == (None, 1)
        assert rotary_dim == 2 * cos.shape[-1] > 0
        ctx.save_for_backward(cos, sin)
        return LigerRopeFunction.turn(q, k, cos, sin)

    @staticmethod
    def turn(q, k, cos, sin):
        given = [t.transpose(1, 2).contiguous() for t in (q, k)]
        for tensor, turned in zip(given, rope(*given, cos, sin), strict=True):
            tensor.data.copy_(turned)
        return tuple(t.detach().transpose(1, 2) for t in given)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return (*LigerRopeFunction.turn(dq, dk, cos, -sin), None, None, None, None, None)


class LigerCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, _input, target, weight, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
        softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False,
    ):  # fmt: skip
        assert weight is None
        assert reduction == "none"
        assert softcap is None or softcap > 0
        assert (return_z_loss, return_token_accuracy, return_predicted_tokens) == (False, False, False)

        def losses(z):
            V = z.shape[1]
            return cross_entropy(z, target, V, ignore_index, label_smoothing, lse_square_scale, softcap or 0.0)

        loss = losses(_input.detach()).to(_input.dtype)
        if _input.requires_grad:
            (gradient,) = _gradients(losses, [_input], [torch.ones_like(loss)])
            ctx.gradient = _input.data.copy_(gradient)
        return loss, None, None, None

    @staticmethod
    def backward(ctx, grad_output, *rest):
        return (ctx.gradient * grad_output[:, None], *[None] * 10)


class LigerFusedLinearCrossEntropyFunction(torch.autograd.Function):
    """Both gradients are made forwards, of the weight only where x needs one; reduction "sum"."""

    @staticmethod
    def forward(
        ctx, _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
        use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False, ce_impl=None,
        ce_mode=None, chunk_mem_const=1,
    ):  # fmt: skip
        assert _input.dtype == weight.dtype
        assert (bias, ce_weight, reduction) == (None, None, "sum")

        def loss(x, w):
            V = w.shape[0]
            z = F.linear(x, w)
            return cross_entropy(z, target, V, ignore_index, label_smoothing, lse_square_scale, softcap or 0.0).sum()

        ctx.gradients = (None, None)
        if _input.requires_grad:
            found = _gradients(loss, [_input, weight], [torch.ones(())])
            ctx.gradients = (found[0].to(_input.dtype), found[1].to(weight.dtype) if weight.requires_grad else None)
        return loss(*_wide(_input, weight)), None, None, None

    @staticmethod
    def backward(ctx, grad_output, *rest):
        scaled = [None if g is None else g.mul_(grad_output) for g in ctx.gradients]
        return (*scaled, *[None] * 10)
