"""rms_norm by NVIDIA apex's FusedRMSNorm kernels. Written against apex 25.09 (apex.normalization.fused_layer_norm)."""

from torch import Tensor

from tritium.kernels.lib import nvidia_apex
from tritium.kernels.site import Site

UNPROVEN = "never run on a GPU: only its calls have been checked, against apex 25.09's signatures"


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See the reference. A weight wider than x goes through apex's mixed kernel, which returns the weight's dtype."""
    from apex.normalization import fused_layer_norm as apex

    shape = (x.shape[-1],)
    if weight is None:
        return apex.fused_rms_norm(x, shape, eps)
    if weight.dtype == x.dtype:
        return apex.fused_rms_norm_affine(x, weight, shape, eps)
    return apex.mixed_dtype_fused_rms_norm_affine(x, weight, shape, eps).to(x.dtype)


def unsupported(site: Site) -> str | None:
    reason = nvidia_apex.unavailable(site, "fused_layer_norm_cuda")
    if reason is not None:
        return reason
    if site.option("wide") and site.compiled:
        return "apex's mixed-dtype RMS norm cannot be traced by torch.compile; set compile=false or choose reference"
    if 0 in site.shape.values():
        return f"apex launches no kernel for an empty tensor, this site has {dict(site.shape)}; choose reference"
    return None
