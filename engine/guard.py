"""Bad steps, found on the device: a loss or gradient norm that is not finite, or far above those of the steps before.

A bad step changes neither weights nor moments: ``Guard.judge`` gives the update its skip flag, computed from the loss
and the norm that all processes share, so that all decide alike. The host reads nothing in the step; the verdict of each
is left in a tensor that the loop reads where it reads the loss.

An outlier is a value x with x > mean + z · max(deviation, FLOOR · |mean|), where mean and deviation are those of the
last HORIZON finite steps: what llm.c (a window of 128) and OLMo-core (also 128, z = 6) do, with two differences. The
floor: where a run's noise is tiny, a tenth more is no fault. And an outlier enters the statistics held to the limit
instead of not at all, so that a lasting change of level, after which every step would be an outlier and nothing would
be learned any more, is accepted after some tens of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

HORIZON = 128  # steps: of the running mean and variance, and before the first outlier can be called one
FLOOR = 0.02  # of the mean: the least standard deviation that is believed
GOOD, NOT_FINITE, OUTLIER = 0, 1, 2  # verdicts
WORDS = {GOOD: "good", NOT_FINITE: "not finite", OUTLIER: "an outlier"}


class Guard:
    """Judges every step of one training. All state is on the device; a checkpoint holds it (``state_dict``).

    z: how many standard deviations above the mean make an outlier; 0: only what is not finite is bad.
    skipped, streak: () fp32, bad steps so far, and in a row up to now. verdict: () fp32, of the last step: GOOD,
    NOT_FINITE or OUTLIER. mean, variance: (2,) fp32, of loss and gradient norm; seen: () fp32, of how many steps.
    state: (8,) fp32, which all of these are views of, so that one copy takes them.
    """

    def __init__(self, z: float, device: torch.device):
        self.z = z
        self.state = torch.zeros(8, device=device)
        self.verdict, self.streak, self.skipped, self.seen = self.state[:4].unbind()
        self.mean, self.variance = self.state[4:6], self.state[6:8]

    @torch.no_grad()
    def judge(self, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        """() fp32, nonzero where the step with this gradient norm and mean loss, () fp32 each, must be skipped."""
        values = torch.stack([norm if loss is None else loss, norm])
        finite = torch.isfinite(values).all()
        verdict = (~finite).to(torch.float32)
        if self.z > 0.0:
            verdict = verdict + self._outlier(values, finite)
        self.verdict.copy_(verdict)
        bad = (verdict > 0).to(torch.float32)
        self.skipped += bad
        self.streak.copy_((self.streak + 1.0) * bad)
        return bad

    def _outlier(self, values: Tensor, finite: Tensor) -> Tensor:
        """OUTLIER or 0, () fp32; takes the values into the statistics, unless one is not finite."""
        limit = self.mean + self.z * torch.maximum(self.variance.sqrt(), FLOOR * self.mean.abs())
        warm = self.seen >= HORIZON
        outlier = finite & warm & (values > limit).any()
        taken = torch.where(warm, torch.minimum(values, limit), values)
        # the mean and variance of all values up to HORIZON of them, then with that memory (Welford; West, 1979)
        weight = 1.0 / torch.clamp(self.seen + 1.0, max=float(HORIZON))
        delta = taken - self.mean
        variance = (1.0 - weight) * (self.variance + weight * delta * delta)
        self.variance.copy_(torch.where(finite, variance, self.variance))
        self.mean.copy_(torch.where(finite, self.mean + weight * delta, self.mean))
        self.seen += finite.to(torch.float32)
        return outlier.to(torch.float32) * OUTLIER

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: skipped, and guard.NAME for the rest."""
        rest = {"streak": self.streak, "seen": self.seen, "mean": self.mean, "variance": self.variance}
        return {"skipped": self.skipped, **{f"guard.{name}": tensor for name, tensor in rest.items()}}
