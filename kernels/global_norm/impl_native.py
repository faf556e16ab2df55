"""global_norm on the CPU in C++ (global_norm.cpp): one pass over all tensors, in one parallel region.

Every element is read once: the memory bandwidth is the bound. torch's own (reference.py) walks the tensors one by one,
each on one thread.
"""

from array import array

import torch
from torch import Tensor

from tritium.kernels.autograd import bypass, register
from tritium.kernels.lib import native
from tritium.kernels.site import Site

DETERMINISTIC = True  # whatever the number of threads

_chunks = native.Function("global_norm_chunks", "lpp", "l")
_norm = native.Function("global_norm", "lppp ppp i")


def _launch(tensors: list[Tensor]) -> Tensor:
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in native.DTYPES or not tensor.is_cpu:
            names = " or ".join(str(d).removeprefix("torch.") for d in native.DTYPES)
            raise TypeError(
                f"global_norm native needs {names} on the CPU; tensors[{i}] is {tensor.dtype} on {tensor.device}; "
                "choose reference"
            )
    dense = native.dense(tensors)
    sizes, first_chunk = native.sizes(dense), array("q", bytes(8 * (len(dense) + 1)))
    chunks = _chunks(len(dense), sizes.buffer_info()[0], first_chunk.buffer_info()[0])
    tables = (sizes, native.addresses(dense), native.codes(dense), first_chunk, array("d", bytes(8 * chunks)))
    result = torch.empty((), dtype=torch.float32)
    _norm(
        len(dense), *(table.buffer_info()[0] for table in tables), result.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return result


_registered = register("global_norm_native", _launch)
_registered.register_fake(lambda tensors: torch.empty((), dtype=torch.float32))


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Any number of fp32 or bf16 tensors on the CPU → the norm over all their elements, () fp32."""
    return _launch(tensors) if bypass(tensors) else _registered([t.detach() for t in tensors])


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
