"""adamw on the CPU in C++ (adamw.cpp): one pass over all tensors, in one parallel region.

Reads p, m, v, grad and writes p, m, v and the working copy: 28 bytes an element with bf16 gradients and copies, 20 with
moments in bf16 too. The memory bandwidth is the bound.
"""

from array import array

import torch
from torch import Tensor

from tritium.kernels.adamw import arguments
from tritium.kernels.autograd import update_op
from tritium.kernels.lib import native
from tritium.kernels.site import Site

DETERMINISTIC = True  # elements are independent

_CPU = torch.device("cpu")
_step = native.Function("adamw", "li pppppppp i pppp dddd pi")


def _launch(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    arguments.check("native", params, copies, grads, exp_avgs, exp_avg_sqs, _CPU, tuple(native.DTYPES))
    written = (params, copies, exp_avgs, exp_avg_sqs)
    p, s, m, v = dense = [*map(native.dense, written)]
    g = native.dense(grads)
    first_chunk = array("q", bytes(8 * (len(p) + 1)))  # scratch
    tables = [native.sizes(p), *map(native.addresses, (p, s, g, m, v)), native.codes(s), native.codes(g)]
    moments = native.DTYPES[m[0].dtype] if m else 0
    scalars = [t.to("cpu", torch.float32) for t in (lr, step, grad_scale, skip)]
    _step(
        *(len(p), bool(copies), *(table.buffer_info()[0] for table in tables), moments),
        *(*(t.data_ptr() for t in scalars), beta1, beta2, eps, weight_decay),
        *(first_chunk.buffer_info()[0], torch.get_num_threads()),
    )
    native.copy_back(written, dense)


_adamw = update_op("adamw_native", _launch, mutates=("params", "copies", "exp_avgs", "exp_avg_sqs"))


def adamw(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One step in place: params fp32; exp_avgs, exp_avg_sqs all fp32 or all bf16; grads and copies (or an empty list)
    each fp32 or bf16.
    """
    _adamw(params, copies, grads, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay)


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
