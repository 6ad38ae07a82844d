"""The learning rate as a pure function of the step."""

import math

from megameta.config import OptimizerSection


def learning_rate(step: int, num_steps: int, optimizer: OptimizerSection) -> float:
    """Learning rate of optimiser step ``step`` (1 … num_steps).

    Linear warm-up to ``lr`` at step ``warmup_steps``; then by ``schedule``: cosine to ``min_lr`` at the last step; wsd:
    ``lr`` until the last ``decay_steps`` (default: a tenth of the run), then linear to ``min_lr``; constant: ``lr``.
    """
    warmup, peak, floor = optimizer.warmup_steps, optimizer.lr, optimizer.min_lr
    if step <= warmup:
        return peak * step / warmup
    if optimizer.schedule == "constant":
        return peak
    if optimizer.schedule == "wsd":
        decay = optimizer.decay_steps or max(1, num_steps // 10)
        done = max(0, step - (num_steps - decay)) / decay
        return peak + (floor - peak) * min(1.0, done)
    done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
