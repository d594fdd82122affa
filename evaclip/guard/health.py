"""Judges every step: is the loss where it was, is the gradient finite, and if not, what to do about it.

A step without a finite gradient is skipped by all processes together. Too many of them among the last steps mean that
something is wrong with the weights or with the data: the run then goes back to a checkpoint from before the first of
them, and later passes over the stretch of data in which they lay. A loss far above its recent values is only reported:
most spikes of contrastive training recover by themselves.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Losses that a spike is measured against.
RECENT = 128


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does when something is wrong."""

    most_skipped: int = 20
    """Steps without a finite gradient, among the last `window`, after which the run goes back to a checkpoint from
    before them and passes over their data."""
    window: int = 100
    """Steps among which skipped ones are counted."""
    most_rollbacks: int = 3
    """How often a run may go back before it stops as diverged."""
    spike_sigma: float = 6.0
    """Standard deviations above the mean of the last 128 losses from which a loss is reported with its samples."""
    hang_floor: float = 300.0
    """Seconds without a step before a process counts as hung; five times the median step where that is longer."""
    patience: float = 3600.0
    """The same for what is no step: the first one, an evaluation, a checkpoint."""
    grace: float = 120.0
    """Seconds that a step under way may still take after a signal; then the process ends without saving."""


@dataclass(frozen=True)
class Verdict:
    """What a step was like."""

    spike: str = ""
    """How far above its recent values the loss is, in words; empty where it is not."""
    lost: tuple[int, int] | None = None
    """The stretch of positions to pass over after going back, None as long as all is well."""


class Health:
    """The memory of the last steps."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after going back."""
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._skipped: deque[tuple[int, int, int]] = deque()

    def judge(self, step: int, loss: float, skipped: bool, positions: tuple[int, int]) -> Verdict:
        """`positions`: the first position of the step's batch and the one after its last. All processes agree on
        `skipped`, so all come to the same verdict about what is lost."""
        while self._skipped and self._skipped[0][0] <= step - self.config.window:
            self._skipped.popleft()
        if skipped:
            self._skipped.append((step, *positions))
            if len(self._skipped) < self.config.most_skipped:
                return Verdict()
            return Verdict(lost=(min(s[1] for s in self._skipped), max(s[2] for s in self._skipped)))
        verdict = Verdict(spike=self._spike(loss))
        if math.isfinite(loss):
            self._losses.append(loss)
        return verdict

    def _spike(self, loss: float) -> str:
        if len(self._losses) < RECENT:
            return ""
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        far = (loss - mean) / max(deviation, 1e-12)
        if far <= self.config.spike_sigma:
            return ""
        return f"the loss {loss:.4g} is {far:.1f} standard deviations above the mean {mean:.4g} of the last {RECENT}"


def write_dump(path: Path, step: int, why: str, samples: Sequence[str], metrics: Mapping[str, float]) -> None:
    """The batch's samples and the step's numbers as JSON, for the person who looks into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    path.write_text(json.dumps({"step": step, "why": why, "metrics": numbers, "samples": list(samples)}, indent=1))
