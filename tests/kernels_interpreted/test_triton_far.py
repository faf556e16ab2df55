"""Elements beyond 2³¹: every offset that is formed in 64 bits is needed, and without it some scenario here is red.

A scenario computes in a process of its own, on tensors of 2³¹ elements and more that are reserved and hardly touched,
and compares with the reference what one program, or a few rows that lie far apart, made.
"""

import pathlib
import re

import pytest
import torch
from far import FAR, close, far_allocations, in_child, launcher, many_processors, only, reserved, spread
from mutation import Mutant, mutated

from tritium.kernels import ops
from tritium.kernels.attention import impl_triton as attention
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_lists, triton_norms, triton_pointwise
from tritium.kernels.op import Backend

FP16, FP32 = torch.float16, torch.float32


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(backend: Backend, leaves, *upstream, order=lambda *leaves: leaves, **options) -> None:
    """Results and gradients, of leaves that may lie far apart, against the reference's from copies of them."""
    found = []
    for function, place in ((backend.function, lambda t: t), (ops.OPS[backend.op].reference, torch.clone)):
        mine = [place(t).detach().requires_grad_() for t in leaves]
        outputs = function(*order(*mine), **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, mine, [place(g) for g in upstream])
        found.append([*(o.detach() for o in outputs), *gradients])
    for got, want in zip(*found, strict=True):
        close(got, want)


# -------------------------------------------------------------------------------------------------------------- losses


def rows_of_logits(backend: Backend) -> None:
    targets = torch.tensor([1, 4, 2])
    for reduction in ("none", "sum"):
        upstream = torch.ones(3) if reduction == "none" else torch.ones(())
        options = {"targets": targets, "vocab_size": 7, "reduction": reduction}
        logits = spread(random(3, 8, dtype=FP32), FAR, 1)
        compare(backend, [logits], upstream, **options)


def scaled_gradient_of_logits(backend: Backend) -> None:
    many_processors()
    only()
    dlogits = reserved(2**31 + 100, FP16)
    dlogits[-3:] = torch.tensor([1.0, 2.0, -3.0])
    backend.module._launch_scale(dlogits, torch.tensor(0.5))
    assert dlogits[-4:].tolist() == [0.0, 0.5, 1.0, -1.5]


def scaled_gradient_of_the_head(backend: Backend) -> None:
    only()
    x = reserved(2**31 + 100, FP32)
    x[-2:] = torch.tensor([1.0, -3.0])
    assert backend.module._scaled(x, torch.tensor(0.5), FP16)[-3:].tolist() == [0.0, 0.5, -1.5]


# --------------------------------------------------------------------------------------------------- pointwise, norms


def rows_of_activations(backend: Backend) -> None:
    compare(backend, [spread(random(3, 8), FAR, 1)], spread(random(3, 8, seed=1), FAR, 1))


def one_wide_activation(backend: Backend) -> None:
    far_allocations()
    only()
    F = 2**31 + 600
    x = reserved(F, FP16).view(1, F)
    x[0, -3:] = torch.tensor([1.0, 2.0, -3.0])
    with torch.no_grad():
        close(backend.function(x)[0, -3:], ops.gelu.reference(x[0, -3:]))


def rows_of_a_norm(backend: Backend) -> None:
    for C in (8, 20_000):  # the second does not fit the registers
        leaves = [spread(random(3, C), FAR, 1), random(C, seed=1), random(C, seed=2)]
        compare(backend, leaves, spread(random(3, C, seed=3), FAR, 1))


def shares_of_a_wide_norm(backend: Backend) -> None:
    """Three programs' sums of a row of 2³⁰ + 600: written by the last program, and added up."""
    norms = backend.module.norms
    C, P = FAR + 600, 3
    tile = 512
    only()
    partial = reserved(2 * P * C, FP32).view(2, P, C)
    dy, s = reserved(3 * C, FP16).view(3, C), reserved(3 * C, FP16).view(3, C)
    dy[2, -1], s[2, -1] = 2.0, 5.0
    weight = reserved(C, FP16)
    constants = launch.constants(C=C, HAS_BIAS=True, BLOCK_N=1, BLOCK_C=tile, STAGES=1)
    launcher(norms, "_backward")(
        (P, -(-C // tile)), constants, dy, None, s, weight, torch.ones(3), torch.full((3,), 0.25), torch.zeros(3, 2),
        reserved(3 * C, FP16), partial, C, 0, C, 3,
    )  # fmt: skip
    assert partial[:, 2, -1].tolist() == [2.0, 2.0]  # dy (s - mean) rstd, and dy
    partial[:, 0, -1] = torch.tensor([10.0, 20.0])
    dweight, dbias = reserved(C, FP32), reserved(C, FP32)
    constants = launch.constants(C=C, BLOCK_N=4, BLOCK_C=tile)
    launcher(norms, "_add_partials")((-(-C // tile), 2), constants, partial, dweight, dbias, P)
    assert dbias[-2:].tolist() == [0.0, 22.0]


# ------------------------------------------------------------------------------------------------- rope and embedding


def heads_and_tokens_of_rope(backend: Backend) -> None:
    cos, sin = random(3, 4, seed=8, dtype=FP32), random(3, 4, seed=9, dtype=FP32)
    for strides, shape in (
        ((FAR, 8, 8, 1), (3, 3, 1, 8)),
        ((0, FAR, 8, 1), (1, 3, 2, 8)),
        ((0, 8, FAR, 1), (1, 3, 3, 8)),
    ):
        leaves = [spread(random(*shape, seed=i), *strides) for i in range(2)]
        upstream = [spread(random(*shape, seed=i), *strides) for i in (2, 3)]
        compare(backend, leaves, *upstream, cos=cos, sin=sin)


def many_tokens_of_rope(backend: Backend) -> None:
    far_allocations()
    only()
    N, G = 2**22 + 1, 64
    q, k = random(8).expand(1, N, 1, 8), random(8, seed=1).expand(1, N, G, 8)
    cos, sin = (random(4, seed=i, dtype=FP32).expand(N, 4) for i in (2, 3))
    with torch.no_grad():
        _, found = backend.function(q, k, cos, sin)
        _, want = ops.rope.reference(q[:, -1:], k[:, -1:], cos[-1:], sin[-1:])
    close(found[:, -1:, -1:], want[:, :, -1:])


def ids_of_an_embedding(backend: Backend) -> None:
    ids = spread(torch.tensor([3, 0, 3]), FAR)
    table, upstream = spread(random(5, 8), FAR, 1), spread(random(3, 8, seed=1), FAR, 1)
    compare(backend, [table], upstream, order=lambda table: (ids, table))


def many_ids_of_an_embedding(backend: Backend) -> None:
    far_allocations()
    only()
    N, C = 2**20 + 1, 2**11
    table, ids = random(3, C), torch.full((1,), 2).expand(N)
    with torch.no_grad():
        close(backend.function(ids, table)[-1, -1:], table[2, -1:])


def rows_of_a_wide_table(backend: Backend) -> None:
    """24 rows of dy for the third of three wide rows of the table, in three chunks: sums of them, and of the sums."""
    only()
    C, tile = FAR + 600, 512
    tiles = -(-C // tile)
    dy = reserved(C, FP16).expand(24, C)
    dy[0, -2:] = 1.0
    keys, order = torch.full((24,), 7, dtype=torch.int32), torch.arange(24)
    sums = reserved(3 * C, FP32).view(3, C)
    constants = launch.constants(C=C, BLOCK_C=tile, UNROLL=8)
    launcher(backend.module, "_sum_chunks")((3 * tiles,), constants, dy, keys, order, sums, 0, 3)
    assert sums[2, -2:].tolist() == [8.0, 8.0]
    sums[0, -1] = 5.0
    dweight = reserved(3 * C, FP32).view(3, C)
    constants = launch.constants(C=C, BLOCK_V=4, BLOCK_C=tile, UNROLL=2)
    starts = torch.tensor([0, 0, 0, 24], dtype=torch.int32)
    launcher(backend.module, "_sum_runs")((tiles,), constants, dy, order, starts, sums, dweight, 0, 3, 3)
    assert dweight[:, -1].tolist() == [0.0, 0.0, 13.0]


# -------------------------------------------------------------------------------------------------------------- linear


def rows_and_columns_of_linear(backend: Backend) -> None:
    for strides in ((FAR, 1), (1, FAR)):
        leaves = [spread(random(3, 3), *strides), spread(random(3, 3, seed=1), *strides), random(3, seed=2)]
        compare(backend, leaves, spread(random(3, 3, seed=3), *strides))


def steps_of_linear(backend: Backend) -> None:
    x, weight = random(2, 64), random(2, 64, seed=1)
    with torch.no_grad():
        want = ops.linear.reference(x, weight)
        for a, b in ((spread(x, 1, 2**26), weight), (x, spread(weight, 1, 2**26))):
            close(backend.function(a, b), want)


def many_outputs_of_linear(backend: Backend) -> None:
    far_allocations()
    only()
    module = backend.module
    M, N = 2**16 + 16, 2**15
    x, weight = random(2).expand(M, 2), random(2, seed=1).expand(N, 2)
    with torch.no_grad():
        want = ops.linear.reference(x[-1:], weight[-1:])
        close(backend.function(x, weight)[-1:, -1:], want)
    out = reserved(M * N, FP16).view(M, N)
    module._multiply_long(x, weight.t(), out)
    close(out[-1:, -1:], want)
    S, M, N = 3, 2**15, 2**15
    parts = reserved(S * M * N, FP32).view(S, M, N)
    a, b = random(4 * S).expand(M, 4 * S), random(4 * S, seed=1).expand(N, 4 * S).t()
    tile = launch.constants(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=8, EVEN=False, PRECISION="ieee")
    launcher(module, "_weights")((M * N // 256, S), tile, a, b, parts, M, N, 4 * S, 4, 0, 1, 1, 0)
    close(parts[-1, -1, -1], (a[0, -4:].float() * b[-4:, 0].float()).sum())


def sums_of_linear(backend: Backend) -> None:
    only()
    F, P = FAR + 600, 3
    dy = torch.tensor([[2.0]], dtype=FP16).expand(48, F)
    parts = reserved(P * F, FP32).view(P, F)
    grid = (-(-F // 128), P)
    launcher(backend.module, "_column_sums")(grid, launch.constants(BLOCK_N=16, BLOCK_F=128), dy, parts, 48, F, 0, 0)
    assert parts[2, -1] == 32.0
    parts[0, -1] = 1.0
    out = reserved(F, FP32)
    constants = launch.constants(BLOCK_P=2, BLOCK=256)
    launcher(backend.module, "_add_parts")((-(-F // 256),), constants, parts, out, P, F)
    assert out[-1] == 33.0
    size = 2**31 + 100
    parts, out = reserved(size, FP32).view(1, size), reserved(size, FP32)
    parts[0, -1] = 7.0
    launcher(backend.module, "_add_parts")((-(-size // 256),), constants, parts, out, 1, size)
    assert out[-2:].tolist() == [0.0, 7.0]


# ----------------------------------------------------------------------------------------------------------- attention


def batches_heads_and_starts_of_attention(backend: Backend) -> None:
    """(B, T, H, D) with batches, query heads of one key head, or heads of their own far apart; starts and dlse too."""
    for (B, H, G), strides in (((3, 1, 1), (FAR, 8, 8, 1)), ((1, 3, 1), (0, 8, FAR, 1)), ((1, 3, 3), (0, 8, FAR, 1))):
        shapes = ((B, 3, H, 8), (B, 3, G, 8), (B, 3, G, 8), (B, 3, H, 8))
        q, k, v, dy = (spread(random(*shape, seed=i), *strides) for i, shape in enumerate(shapes))
        compare(backend, [q, k, v], dy, spread(random(B, H, 3, seed=5, dtype=FP32), 0 if B == 1 else 3 * H, 3, 1))
    starts = spread(torch.tensor([[0, 1, 1]], dtype=torch.int32), 0, FAR)
    dlse = spread(random(1, 1, 3, seed=5, dtype=FP32), 0, 0, FAR)
    compare(backend, [random(1, 3, 1, 8, seed=i) for i in range(3)], random(1, 3, 1, 8, seed=4), dlse, seq_start=starts)


def time_steps_of_attention(backend: Backend) -> None:
    """The longest steps that are read in place: the last tile begins beyond 2³¹."""
    T, stride = 168, 2**24 - 8
    q, k, v, dy = (spread(random(1, T, 1, 8, seed=i, dtype=FP32), 0, stride, 8, 1) for i in range(4))
    compare(backend, [q, k, v], dy, random(1, 1, T, seed=5, dtype=FP32), window=4)


def many_rows_of_attention(backend: Backend) -> None:
    """B H Tq beyond 2³¹, and H D Tq: the last queries and keys of the last head of the last batch."""
    far_allocations()
    shared = backend.module.shared
    B, T, H, D = 8, 289, 2**20, 8
    options = (True, 0.3, 0, 0.0, 0.0)
    small = [random(1, T, 1, D, seed=i) for i in range(4)]
    small_dlse = random(1, 1, T, seed=4, dtype=FP32)
    q, k, v, dy = (t.expand(B, T, H, D) for t in small)
    y, lse, natural = None, None, torch.empty(B, H, T, dtype=FP32)

    def last_queries_of_the_last_head(kernel: str) -> tuple[int, int]:
        """(programs, the one wanted): a head's programs begin with its last queries."""
        blocks = -(-T // shared.config(kernel, 90, D, FP16).BLOCK_M)
        return B * H * blocks, B * H * blocks - blocks

    programs, wanted = last_queries_of_the_last_head("forward")
    only(lambda n: (wanted if n == programs else n - 1,))
    y, lse = shared.forward(q, k, v, None, None, *options, natural)
    arguments = (dy, small_dlse.expand(B, H, T), q, k, v, None, None, y, lse, *options)
    only()
    _, dk, dv = shared.backward(*arguments)
    programs, wanted = last_queries_of_the_last_head("backward_queries")
    only(lambda n: (wanted if n == programs else n - 1,))
    dq, _, _ = shared.backward(*arguments)

    leaves = [t.float().requires_grad_() for t in small[:3]]
    want = ops.attention_lse.reference(*leaves, scale=0.3)
    gradients = torch.autograd.grad(want, leaves, (small[3].float(), small_dlse))
    last = slice(256, None)  # the first row of the last tile of every kernel
    close(natural[-1:, -1:, last], want[1][:, :, last].detach())
    for got, exact in zip((y, dq, dk, dv), (want[0].detach(), *gradients), strict=True):
        close(got[-1:, last, -1:], exact[:, last])


# --------------------------------------------------------------------------------------------------------------- lists


def end_of_a_long_list(backend: Backend) -> None:
    many_processors()
    only()
    x = reserved(2**31 + 5000, FP16)
    x[-3:] = torch.tensor([1.0, 2.0, -2.0])
    backend.function([torch.ones(3), x])
    arch, chunks = launch.arch(), 1 + -(-x.numel() // backend.module.config(90).CHUNK)
    most = launch.processors() * backend.module.config(arch).programs_per_processor
    sums, _ = backend.module._workspace(x.device, 0, most)
    assert sums[chunks - 1] == 9.0


def last_elements_of_long_parameters(backend: Backend) -> None:
    only()
    size, last = 2**31 + 5000, 7
    dtypes = {"params": FP32, "copies": FP16, "grads": FP16, "exp_avgs": FP32, "exp_avg_sqs": FP32}
    far = {name: reserved(size, dtype) for name, dtype in dtypes.items()}
    small = {name: random(last, seed=i, dtype=dtype).abs() for i, (name, dtype) in enumerate(dtypes.items())}
    for name, values in small.items():
        far[name][-last:] = values
    scalars = {name: torch.tensor(value) for name, value in
               {"lr": 0.1, "step": 3.0, "grad_scale": 1.0, "skip": 0.0}.items()}  # fmt: skip
    backend.function(**{name: [t] for name, t in far.items()}, **scalars)
    ops.adamw.reference(**{name: [t] for name, t in small.items()}, **scalars)
    for name, values in small.items():
        close(far[name][-last:], values)


# ----------------------------------------------------------------------------------------------------------- the tests

SCENARIOS = {
    "cross_entropy": (rows_of_logits, scaled_gradient_of_logits),
    "linear_cross_entropy": (scaled_gradient_of_the_head,),
    "gelu": (rows_of_activations, one_wide_activation),
    "layer_norm": (rows_of_a_norm, shares_of_a_wide_norm),
    "rope": (heads_and_tokens_of_rope, many_tokens_of_rope),
    "embedding": (ids_of_an_embedding, rows_of_a_wide_table, many_ids_of_an_embedding),
    "linear": (rows_and_columns_of_linear, steps_of_linear, many_outputs_of_linear, sums_of_linear),
    "attention_lse": (batches_heads_and_starts_of_attention, time_steps_of_attention, many_rows_of_attention),
    "global_norm": (end_of_a_long_list,),
    "adamw": (last_elements_of_long_parameters,),
}
SHARED = {
    "gelu": triton_pointwise, "layer_norm": triton_norms, "attention_lse": attention,
    "global_norm": triton_lists, "adamw": triton_lists,
}  # fmt: skip
# memory that is not there, a wrong number, or the language's own word
RED = ("ended by SIGSEGV", "AssertionError", "is out of range for type int32")
BITS = ".to(tl.int64) <<"  # of a number, and no offset
WIDE = re.compile(r"\.to\(tl\.int64\)(?! <<)|tl\.cast\(\w+, tl\.int64\)|tl\.full\(\(\), \w+, tl\.int64\)")


def lost(op: str, module) -> list[Mutant]:
    """The module's source without one of its 64-bit numbers, for each of them."""
    text = pathlib.Path(module.__file__).read_text()
    shared = "" if module is ops.OPS[op].load("triton").module else module.__name__
    found = []
    for match in WIDE.finditer(text):
        narrow = "" if match[0].startswith(".") else match[0].replace("int64", "int32")
        start = text.rindex("\n", 0, match.start()) + 1
        line = text[start : text.index("\n", start)].strip()
        while text.count(text[start : match.end()]) > 1:  # back to where it is the only one
            start = text.rindex("\n", 0, start - 1) + 1
        before = text[start : match.end()]
        name = f"{len(found)} {line}"
        found.append(Mutant(op, name, before, text[start : match.start()] + narrow, "", shared=shared))
    return found


MUTANTS = [
    *(mutant for op in SCENARIOS for mutant in lost(op, ops.OPS[op].load("triton").module)),
    *(mutant for op, module in SHARED.items() if module is not triton_lists for mutant in lost(op, module)),
    *(
        Mutant(op, "the first element of a piece", "* CHUNK\n", "* CHUNK\n    start = start.to(tl.int32)\n", "",
               shared=triton_lists.__name__)
        for op in ("global_norm", "adamw")
    ),
]  # fmt: skip


def test_every_64_bit_number_of_the_kernels_is_planted_as_lost():
    planted = {pathlib.Path(ops.OPS[m.op].load("triton").module.__file__) for m in MUTANTS if not m.shared}
    planted |= {pathlib.Path(module.__file__) for module in SHARED.values()}
    for path in pathlib.Path(launch.__file__).parents[1].rglob("*.py"):
        text = path.read_text()
        if "@triton.jit" in text and (count := text.count("tl.int64") - text.count(BITS)):
            assert path in planted
            assert count == len(WIDE.findall(text)), f"{path} forms a 64-bit number in a way that is not known here"


@pytest.mark.parametrize(("op", "scenario"), [(op, s) for op, several in SCENARIOS.items() for s in several])
def test_what_lies_beyond_32_bits_is_found(op, scenario):
    backend = ops.OPS[op].load("triton")
    said = in_child(lambda: scenario(backend))
    assert not said, said


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_lost_64_bit_number_is_red(mutant, tmp_path):
    backend = mutated(mutant, tmp_path)
    said = ""
    for scenario in SCENARIOS[mutant.op]:
        said = said or in_child(lambda scenario=scenario: scenario(backend))
    assert any(way in said for way in RED), said or "nothing was seen"
