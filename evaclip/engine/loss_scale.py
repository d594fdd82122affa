"""Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2).

16-bit floats of five exponent bits lose small gradients, so the loss is multiplied before the backward pass and the
gradients are divided by the same number in float32. A gradient that is not finite halves the scale, and its step is
skipped; two thousand good steps double it. All processes see the same norm, so all have the same scale.
"""

from collections.abc import Mapping
from typing import Any

FIRST = 2.0**16
DOUBLE_AFTER = 2000


class LossScale:
    """What the loss is multiplied with: 1 for ever when `dynamic` is false."""

    def __init__(self, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = FIRST if dynamic else 1.0
        self._good_steps = 0

    def update(self, finite: bool) -> None:
        """Learn whether the step's gradient was finite."""
        if not self.dynamic:
            return
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self._good_steps == DOUBLE_AFTER:
            self.value, self._good_steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "good_steps": self._good_steps} if self.dynamic else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; what a run without scaling saved changes nothing."""
        if self.dynamic and state:
            self.value, self._good_steps = float(state["value"]), int(state["good_steps"])
