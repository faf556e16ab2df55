"""apex 25.09's functional norms: normalized_shape is a sequence, the mixed forms return the weight's dtype."""

import torch
import torch.nn.functional as F


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    _check(input, normalized_shape, eps, memory_efficient, weight, bias)
    assert input.dtype == weight.dtype == bias.dtype
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    _check(input, normalized_shape, eps, memory_efficient, weight, bias)
    assert input.dtype != weight.dtype == bias.dtype
    return F.layer_norm(input.to(weight.dtype), normalized_shape, weight, bias, eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    _check(input, normalized_shape, eps, memory_efficient, weight)
    assert input.dtype == weight.dtype
    return (_normalised(input, eps) * weight).to(input.dtype)


def mixed_dtype_fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    _check(input, normalized_shape, eps, memory_efficient, weight)
    assert input.dtype != weight.dtype
    return (_normalised(input, eps) * weight).to(weight.dtype)


def fused_rms_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    _check(input, normalized_shape, eps, memory_efficient)
    return _normalised(input, eps).to(input.dtype)


def _normalised(input, eps):
    x = input.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _check(input, normalized_shape, eps, memory_efficient, *weights):
    assert tuple(normalized_shape) == input.shape[-1:]
    assert isinstance(eps, float)
    assert memory_efficient is False
    assert input.numel() > 0, "an empty launch is a CUDA error"
    assert all(w.shape == input.shape[-1:] for w in weights)
