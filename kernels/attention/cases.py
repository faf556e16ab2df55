"""Cases of attention. B batch · Tq queries · Tk keys · H query heads · G key/value heads · D head width.

Options: the op's own; documents (False): rows hold several documents, so a ``seq_start`` is given; "anywhere": they
start in no order, before the first key, beyond the query itself and beyond the last key.
"""

from typing import Any

import torch

from tritium.kernels.case import Budget, Case, Goal


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
    *(_case(f"head_{D}", 1, 12, 12, 2, 1, D) for D in (8, 24, 40, 72, 96)),
    *(_case(f"head_{D}", 1, 9, 9, 1, 1, D) for D in (160, 256)),
    _case("negative_scale", 2, 14, 14, 4, 2, 16, scale=-0.7),
    _case("zero_scale", 2, 14, 14, 4, 2, 16, scale=0.0),
    _case("huge_logits_softcap", 1, 20, 20, 2, 2, 16, scale=50.0, softcap=10.0),
    # every two of the options together; more queries than keys: the first of them see nothing
    _case("documents_full_negative_window_softcap_dropout_grouped", 1, 19, 19, 4, 2, 8,
          documents=True, causal=False, scale=-0.4, window=5, softcap=2.0, dropout=0.2),
    _case("more_keys_zero_softcap_dropout_grouped", 2, 6, 22, 4, 2, 8, scale=0.0, softcap=2.0, dropout=0.2),
    _case("more_keys_documents_full_zero_window", 2, 7, 25, 2, 2, 8, documents=True, causal=False, scale=0.0, window=5),
    _case("more_queries_negative_window_grouped", 2, 13, 6, 4, 2, 8, scale=-0.4, window=5),
    _case("more_queries_documents_softcap_dropout", 2, 12, 7, 2, 2, 8, documents=True, softcap=2.0, dropout=0.2),
    _case("more_queries_documents_window_softcap", 1, 15, 9, 2, 1, 24, documents=True, softcap=2.0, window=3),
    _case("more_keys_full_dropout_grouped", 2, 5, 11, 4, 2, 8, causal=False, dropout=0.2),
    _case("more_keys_negative_softcap", 2, 6, 17, 2, 2, 8, scale=-0.4, softcap=2.0),
    _case("more_keys_documents", 2, 9, 30, 2, 1, 8, documents=True),
    _case("window_softcap", 1, 21, 21, 2, 2, 8, window=5, softcap=2.0),
    _case("more_queries_zero_softcap", 1, 9, 4, 2, 2, 8, scale=0.0, softcap=2.0),
    _case("more_keys_documents_full_negative_softcap", 1, 10, 13, 2, 1, 8,
          documents=True, causal=False, scale=-0.4, softcap=2.0),
    _case("starts_anywhere", 2, 40, 40, 4, 2, 16, documents="anywhere"),
    _case("starts_anywhere_several_tiles", 1, 150, 150, 1, 1, 8, documents="anywhere"),
    _case("starts_anywhere_full", 2, 23, 31, 2, 1, 8, documents="anywhere", causal=False, scale=-0.4),
    _case("starts_anywhere_full_window_softcap", 1, 35, 33, 2, 2, 8,
          documents="anywhere", causal=False, window=5, softcap=2.0),
    _case("starts_anywhere_window_dropout", 1, 37, 37, 2, 2, 8, documents="anywhere", window=9, dropout=0.2),
    _case("starts_anywhere_more_queries", 2, 15, 9, 2, 1, 8, documents="anywhere"),
    _case("starts_anywhere_decode", 3, 1, 9, 2, 1, 8, documents="anywhere"),
    *(_case(f"{name}_{T // 1024}k", B, T, T, H, G, D, large=True) for name, H, G, D in
      (("gpt2_124m", 12, 12, 64), ("gpt2_1558m", 25, 25, 64), ("llama_8b", 32, 8, 128))
      for B, T in ((16, 1024), (4, 4096), (1, 16384))),
    _case("gpt2_124m_1k_documents", 16, 1024, 1024, 12, 12, 64, large=True, documents=True),
    # 2048 channels and 16 k tokens, as attention's speeds are published
    *(_case(f"d64_{T // 1024}k{'' if causal else '_full'}", 16384 // T, T, T, 32, 32, 64, large=True, causal=causal)
      for T in (1024, 4096, 16384) for causal in (True, False)),
    *(_case(f"d128_{T // 1024}k", 16384 // T, T, T, 16, 16, 128, large=True) for T in (1024, 2048, 4096, 8192)),
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
    if case.options["documents"] == "anywhere":
        return _anywhere(B, Tq, Tk)
    rows = []
    for b in range(B):
        begin, number, starts = 0, 0, []
        for i in range(Tq):
            length = 1 + (3 + 5 * b + 7 * number) * max(Tk // 24, 1)
            if i + Tk - Tq - begin >= length:
                begin, number = begin + length, number + 1
            starts.append(begin)
        rows.append(starts)
    return torch.tensor(rows, dtype=torch.int32).reshape(B, Tq)


def _anywhere(B: int, Tq: int, Tk: int) -> torch.Tensor:
    """Starts from -3 to Tk + 3, in no order; those of the last quarter of the queries lie beyond all keys, as padding's
    may, so that of causal queries none sees the last keys. Some are the lowest and the highest that int32 holds."""
    lowest, highest = -(2**31), 2**31 - 1
    generator = torch.Generator().manual_seed(Tq * 1000 + Tk)
    starts = torch.randint(-3, Tk + 4, (B, Tq), generator=generator)
    early = torch.randint(-3, Tk // 4 + 1, (B, Tq), generator=generator)
    starts = torch.where(torch.rand(B, Tq, generator=generator) < 0.5, starts, early)
    starts = torch.where(starts == -3, lowest, starts)
    starts[:, Tq - Tq // 4 :] = Tk + 1
    starts[:, Tq - Tq // 4 :: 2] = highest
    return starts.to(torch.int32)


def _span(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last key that each query sees, both (B, Tq); the last is below the first where it sees none."""
    B, Tq, Tk = (case.shape[letter] for letter in ("B", "Tq", "Tk"))
    position = (torch.arange(Tq) + Tk - Tq).expand(B, Tq)
    last = position if case.options.get("causal", True) else torch.full_like(position, Tk - 1)
    window = int(case.options.get("window", 0))
    first = (position - window + 1).clamp(min=0) if window else torch.zeros_like(position)
    if case.options.get("documents"):
        first = torch.maximum(first, seq_start(case).long())
    return first, last


def exact_zeros(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A query that sees no key gives zeros, and so do its gradient and those of a key that no query sees."""
    B, Tk, H, G, D = (case.shape[letter] for letter in ("B", "Tk", "H", "G", "D"))
    first, last = _span(case)
    sees = last >= first
    # how many spans begin and have not ended
    begun = torch.zeros(B, Tk + 1, dtype=torch.int64)
    begun.scatter_add_(1, torch.where(sees, first, 0), sees.long())
    begun.scatter_add_(1, torch.where(sees, last + 1, 0), -sees.long())
    unseen = begun.cumsum(1)[:, :Tk] == 0
    device = arguments["q"].device
    blind, unseen = (~sees).to(device)[:, :, None, None], unseen.to(device)[:, :, None, None]
    blind, unseen = blind.expand(-1, -1, H, D), unseen.expand(-1, -1, G, D)
    return {"output": blind, "gradient of q": blind, "gradient of k": unseen, "gradient of v": unseen}


def visible(case: Case) -> int:
    """The (query, key) pairs, over the whole batch, where the key may be seen."""
    first, last = _span(case)
    return int((last - first + 1).clamp(min=0).sum())


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


def exponentials(case: Case) -> int:
    """One per visible pair: a bound of its own where D is small."""
    return case.shape["H"] * visible(case)


def exponentials_backward(case: Case) -> int:
    """One per visible pair again: the weights are computed anew from the saved lse."""
    return exponentials(case)


BANNED = {
    ("dropout", "not seed"): "weights are dropped by the seed, so without one there is nothing to compute",
    ("not dropout", "seed"): "the seed is for dropping weights, so without dropout nothing reads it",
}
BUDGETS = (
    Budget("_delta", threads=1024, needs=("wide loads",), fixed=True),
    Budget("_forward", needs=("tensor core", "wide loads")),
    Budget("_backward_*", needs=("tensor core", "wide loads")),
)
GOALS = (
    Goal("d64_1k", "forward", 310, "TFLOP/s", "291 (Triton)"),
    Goal("d64_4k", "forward", 430, "TFLOP/s", "420 (FA3)"),
    Goal("d64_16k", "forward", 485, "TFLOP/s", "473 (FA3)"),
    Goal("d64_16k_full", "forward", 510, "TFLOP/s", "497 (FA3)"),
    Goal("d128_1k", "forward", 370, "TFLOP/s", "367 (TLX)"),
    Goal("d128_2k", "forward", 570, "TFLOP/s", "568 (TLX)"),
    Goal("d128_4k", "forward", 670, "TFLOP/s", "667 (FA3)"),
    Goal("d128_8k", "forward", 690, "TFLOP/s", "685 (FA3)"),
    Goal("d64_1k_full", "backward", 370, "TFLOP/s", "363 (FA3)"),
    Goal("d64_4k_full", "backward", 460, "TFLOP/s", "453 (FA3)"),
    Goal("d64_16k_full", "backward", 480, "TFLOP/s", "474 (FA3)"),
    Goal("d128_1k", "backward", 225, "TFLOP/s", "219 (TLX)"),
    Goal("d128_2k", "backward", 350, "TFLOP/s", "347 (TLX)"),
    Goal("d128_4k", "backward", 470, "TFLOP/s", "468 (TLX)"),
    Goal("d128_8k", "backward", 545, "TFLOP/s", "539 (TLX)"),
)
