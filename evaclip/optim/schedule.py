"""Learning-rate schedules as pure functions of the step, so that there is nothing to save or restore."""

import math


def warmup_cosine(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """The factor on every learning rate at a step that counts from 0.

    Rises linearly over `warmup` steps, the first of which is already above zero, then falls along half a cosine to
    `floor` at the end of `total` steps (SGDR, arXiv 1608.03983, equation 5, without restarts).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
