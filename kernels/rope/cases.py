"""Cases of rope. B batch · T time · H query heads · G key heads · D head width · R rotated channels (default D).

Options: per_row (False): positions differ between rows, so cos and sin are (B, T, R/2); packed (False): q and k are
parts of one tensor that holds v too, as a projection gives them.
"""

import torch

from tritium.kernels.case import Budget, Case, Goal


def _case(name: str, B: int, T: int, H: int, G: int, D: int, R: int, large: bool = False, **options: object) -> Case:
    return Case(name, {"B": B, "T": T, "H": H, "G": G, "D": D, "R": R}, options, large)


CASES = (
    _case("one", 1, 1, 1, 1, 2, 2),
    _case("no_batch", 0, 4, 2, 2, 8, 8),
    _case("odd", 2, 7, 3, 3, 16, 16),
    _case("grouped", 2, 9, 4, 2, 32, 32),
    _case("partial", 1, 11, 2, 1, 24, 10),
    _case("nothing_turns", 1, 3, 2, 2, 8, 0),
    _case("per_row", 3, 5, 2, 1, 16, 16, per_row=True),
    _case("per_row_partial", 2, 6, 4, 2, 20, 8, per_row=True),
    _case("head_128", 1, 4, 2, 2, 128, 128),
    _case("head_80", 1, 5, 2, 2, 80, 80),
    _case("odd_head", 1, 4, 2, 1, 7, 4),
    _case("mostly_rest", 1, 3, 2, 1, 100, 12),
    _case("many_heads", 1, 2, 25, 5, 16, 16),
    _case("many_tokens", 2, 9, 5, 1, 32, 32),
    _case("packed", 2, 6, 4, 2, 32, 32, packed=True),
    _case("packed_partial", 1, 5, 3, 3, 40, 16, packed=True),
    _case("packed_per_row", 2, 5, 4, 1, 24, 24, per_row=True, packed=True),
    _case("packed_nothing_turns", 2, 3, 2, 1, 8, 0, packed=True),
    _case("gpt2_124m", 16, 1024, 12, 12, 64, 64, large=True, packed=True),
    _case("llama_8b", 1, 8192, 32, 8, 128, 128, large=True, packed=True),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    B, T, H, G, D, R = (case.shape[letter] for letter in ("B", "T", "H", "G", "D", "R"))
    position = torch.arange(T, dtype=torch.float32)
    if case.options.get("per_row"):
        position = position + torch.randint(0, 1000, (B, 1), generator=generator)
    angle = position[..., None] * 10000.0 ** (-torch.arange(R // 2) / max(R // 2, 1))
    q, k = (torch.randn(B, T, heads, D, generator=generator).to(device, dtype) for heads in (H, G))
    if case.options.get("packed"):
        q, k, _ = torch.cat((q, k, k), dim=2).split((H, G, G), dim=2)
    return {
        "q": q.detach().requires_grad_(),
        "k": k.detach().requires_grad_(),
        "cos": angle.cos().to(device),
        "sin": angle.sin().to(device),
    }


def _elements(case: Case) -> tuple[int, int]:
    """Elements of q and k together, and of cos and sin together."""
    B, T, H, G, D, R = (case.shape[letter] for letter in ("B", "T", "H", "G", "D", "R"))
    return B * T * (H + G) * D, (B if case.options.get("per_row") else 1) * T * R


def flops(case: Case) -> int:
    """Two multiplications and an add per rotated element."""
    B, T, H, G, R = (case.shape[letter] for letter in ("B", "T", "H", "G", "R"))
    return 3 * B * T * (H + G) * R


def flops_backward(case: Case) -> int:
    """The same rotation, backwards."""
    return flops(case)


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read q, k, cos and sin, write the rotated q and k."""
    values, angles = _elements(case)
    return 2 * dtype.itemsize * values + 4 * angles


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read and write two gradients; read cos and sin."""
    return bytes(case, dtype)


BUDGETS = (Budget("_turn", registers=72, threads=896, needs=("wide loads", "wide stores")),)
GOALS = (
    Goal("*", "forward", 2.8, "TB/s", "1.63 TB/s on an A100 (Liger)"),
    Goal("*", "backward", 2.8, "TB/s", "1.63 TB/s on an A100 (Liger)"),
)
