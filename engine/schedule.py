"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from tritium.engine.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step ``step`` (0 is the first) in a run of ``steps``: linear warm-up, then cosine, wsd or
    constant.
    """
    peak, floor = config.lr, config.lr * config.min_lr_fraction
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * min(1.0, done)))
    decay = max(1, round(config.decay_fraction * steps))
    left = max(0, steps - step)
    return peak if left >= decay else floor + (peak - floor) * left / decay
