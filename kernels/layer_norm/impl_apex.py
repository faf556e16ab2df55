"""layer_norm by NVIDIA apex's FusedLayerNorm kernels. Written against apex 25.09
(apex.normalization.fused_layer_norm)."""

from torch import Tensor

from tritium.kernels.lib import nvidia_apex
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

UNPROVEN = "never run on a GPU: only its calls have been checked, against apex 25.09's signatures"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See the reference. Needs a bias; weights wider than x go through apex's mixed kernel, which returns their
    dtype."""
    from apex.normalization import fused_layer_norm as apex

    if bias is None:
        raise KernelError(_NO_BIAS)
    shape = (x.shape[-1],)
    if weight.dtype == x.dtype:
        return apex.fused_layer_norm_affine(x, weight, bias, shape, eps)
    return apex.mixed_dtype_fused_layer_norm_affine(x, weight, bias, shape, eps).to(x.dtype)


_NO_BIAS = (
    "apex's layer norm has no form with a weight and without a bias; choose triton or reference, or set bias=true"
)


def unsupported(site: Site) -> str | None:
    reason = nvidia_apex.unavailable(site, "fused_layer_norm_cuda")
    if reason is not None:
        return reason
    if not site.option("bias", True):
        return _NO_BIAS
    if site.option("wide") and site.compiled:
        return "apex's mixed-dtype layer norm cannot be traced by torch.compile; set compile=false or choose triton"
    if 0 in site.shape.values():
        return f"apex launches no kernel for an empty tensor, this site has {dict(site.shape)}; choose reference"
    return None
