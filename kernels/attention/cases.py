"""Cases of attention. B batch · Tq queries · Tk keys · H query heads · G key/value heads · D head width.

Options: the op's own; documents (False): rows hold several documents, so a ``seq_start`` is given.
"""

from typing import Any

import torch

from tritium.kernels.case import Case


def _case(name: str, B: int, Tq: int, Tk: int, H: int, G: int, D: int, large: bool = False, **options: object) -> Case:
    return Case(name, {"B": B, "Tq": Tq, "Tk": Tk, "H": H, "G": G, "D": D}, options, large)


CASES = (
    _case("one_token", 1, 1, 1, 1, 1, 16),
    _case("tiny", 2, 5, 5, 2, 2, 16),
    _case("odd", 1, 67, 67, 3, 3, 32),
    _case("several_tiles", 1, 150, 150, 1, 1, 16),
    _case("head_64", 1, 33, 33, 2, 2, 64),
    _case("head_128", 1, 20, 20, 1, 1, 128),
    _case("head_80", 1, 19, 19, 1, 1, 80),
    _case("no_batch", 0, 8, 8, 2, 2, 16),
    _case("grouped", 2, 18, 18, 4, 2, 16),
    _case("multi_query", 1, 21, 21, 4, 1, 32),
    _case("full", 2, 17, 17, 2, 2, 16, causal=False),
    _case("cross", 1, 7, 30, 2, 1, 16, causal=False),
    _case("more_keys", 2, 6, 40, 2, 2, 16),
    _case("decode", 3, 1, 37, 4, 2, 16),
    _case("more_queries", 1, 9, 5, 2, 2, 16),
    _case("scale", 1, 16, 16, 2, 2, 16, scale=0.3),
    _case("window", 1, 50, 50, 2, 2, 16, window=9),
    _case("window_more_keys", 1, 11, 45, 2, 1, 16, window=7),
    _case("softcap", 1, 22, 22, 2, 2, 16, softcap=5.0),
    _case("documents", 2, 40, 40, 2, 2, 16, documents=True),
    _case("documents_grouped", 1, 70, 70, 4, 2, 16, documents=True),
    _case("documents_window_softcap", 2, 36, 36, 2, 1, 16, documents=True, window=6, softcap=8.0, scale=0.5),
    _case("documents_full", 1, 24, 24, 2, 2, 16, documents=True, causal=False),
    _case("dropout", 2, 16, 16, 2, 2, 16, dropout=0.3),
    _case("dropout_documents", 1, 30, 30, 4, 2, 16, dropout=0.1, documents=True),
    *(_case(f"{name}_{T // 1024}k", B, T, T, H, G, D, large=True) for name, H, G, D in
      (("gpt2_124m", 12, 12, 64), ("gpt2_1558m", 25, 25, 64), ("llama_8b", 32, 8, 128))
      for B, T in ((16, 1024), (4, 4096), (1, 16384))),
    _case("gpt2_124m_1k_documents", 16, 1024, 1024, 12, 12, 64, large=True, documents=True),
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    B, Tq, Tk, H, G, D = (case.shape[letter] for letter in ("B", "Tq", "Tk", "H", "G", "D"))

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    arguments = {"q": make(B, Tq, H, D), "k": make(B, Tk, G, D), "v": make(B, Tk, G, D), "seq_start": None}
    options = dict(case.options)
    if options.pop("documents", False):
        arguments["seq_start"] = seq_start(case).to(device)
    if options.get("dropout", 0.0) > 0.0:
        options["seed"] = torch.tensor(1234 + seed, device=device)
    return {**arguments, **options}


def seq_start(case: Case) -> torch.Tensor:
    """Documents whose lengths differ within and between rows; a function of the case, so its FLOPs are one number."""
    B, Tq, Tk = (case.shape[letter] for letter in ("B", "Tq", "Tk"))
    starts = torch.zeros(B, Tq, dtype=torch.int32)
    for b in range(B):
        begin, number = 0, 0
        for i in range(Tq):
            length = 1 + (3 + 5 * b + 7 * number) * max(Tk // 24, 1)
            if i + Tk - Tq - begin >= length:
                begin, number = begin + length, number + 1
            starts[b, i] = begin
    return starts


def exact_zeros(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Queries before the first key see nothing: they give zeros, and so does their gradient."""
    B, Tq, Tk, H, D = (case.shape[letter] for letter in ("B", "Tq", "Tk", "H", "D"))
    blind = torch.arange(Tq, device=arguments["q"].device) + Tk - Tq < 0
    blind = (blind & bool(case.options.get("causal", True)))[None, :, None, None].expand(B, Tq, H, D)
    return {"output": blind, "gradient of q": blind}


def visible(case: Case) -> int:
    """The (query, key) pairs, over the whole batch, where the key may be seen."""
    B, Tq, Tk = (case.shape[letter] for letter in ("B", "Tq", "Tk"))
    position = torch.arange(Tq) + Tk - Tq
    last = position if case.options.get("causal", True) else torch.full((Tq,), Tk - 1)
    window = int(case.options.get("window", 0))
    first = (position - window + 1).clamp(min=0) if window else torch.zeros_like(position)
    if case.options.get("documents"):
        return int((last - torch.maximum(first, seq_start(case)) + 1).clamp(min=0).sum())
    return B * int((last - first + 1).clamp(min=0).sum())


def flops(case: Case) -> int:
    """The two GEMMs (q·k and weights·v) over the visible pairs."""
    return 4 * case.shape["H"] * case.shape["D"] * visible(case)


def flops_backward(case: Case) -> int:
    """Five GEMMs over the visible pairs: q·k again, dv, dweights, dq, dk."""
    return 10 * case.shape["H"] * case.shape["D"] * visible(case)


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read q, k, v, write y."""
    q, kv = _elements(case)
    return dtype.itemsize * (2 * q + 2 * kv)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read q, k, v, y, dy, write dq, dk, dv."""
    q, kv = _elements(case)
    return dtype.itemsize * (4 * q + 4 * kv)


def _elements(case: Case) -> tuple[int, int]:
    B, Tq, Tk, H, G, D = (case.shape[letter] for letter in ("B", "Tq", "Tk", "H", "G", "D"))
    return B * Tq * H * D, B * Tk * G * D
