"""adamw_8bit on the CPU in C++ (adamw_8bit.cpp): one pass over all tensors, in one parallel region.

16 bytes an element with bf16 gradients and copies, where adamw's moments in fp32 take 28; making codes and taking them
apart costs some 120 operations beside it.
"""

from array import array

import torch
from torch import Tensor

from tritium.kernels.adamw_8bit import arguments
from tritium.kernels.autograd import update_op
from tritium.kernels.lib import native
from tritium.kernels.site import Site

DETERMINISTIC = True  # blocks are independent

_CPU = torch.device("cpu")
_step = native.Function("adamw_8bit", "li pppppppppp pppp dddd pi")


def _launch(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    codes, scales = (exp_avgs, exp_avg_sqs), (exp_avg_scales, exp_avg_sq_scales)
    arguments.check("native", params, copies, grads, codes, scales, _CPU, tuple(native.DTYPES))
    written = (params, copies, exp_avgs, exp_avg_sqs)
    p, s, m, v = dense = [*map(native.dense, written)]
    g = native.dense(grads)
    first_chunk = array("q", bytes(8 * (len(p) + 1)))  # scratch
    tables = [native.sizes(p), *map(native.addresses, (p, s, g, m, v, *scales)), native.codes(s), native.codes(g)]
    scalars = [t.to("cpu", torch.float32) for t in (lr, step, grad_scale, skip)]
    _step(
        *(len(p), bool(copies), *(table.buffer_info()[0] for table in tables)),
        *(*(t.data_ptr() for t in scalars), beta1, beta2, eps, weight_decay),
        *(first_chunk.buffer_info()[0], torch.get_num_threads()),
    )
    native.copy_back(written, dense)


_MUTATES = ("params", "copies", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")
_update = update_op("adamw_8bit_native", _launch, mutates=_MUTATES)


def adamw_8bit(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """See the reference; grads and copies (or an empty list) each fp32 or bf16."""
    _update(
        params, copies, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, lr, step, grad_scale, skip,
        beta1, beta2, eps, weight_decay,
    )  # fmt: skip


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
