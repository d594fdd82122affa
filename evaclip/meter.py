"""Turns what happens in a step into numbers for the log, and into warnings."""

import math
import statistics
import time
from collections.abc import Mapping

from torch import Tensor

from evaclip.config import RunConfig
from evaclip.data.pipeline import LoaderTimes
from evaclip.distributed import gathered, world_size
from evaclip.log import RunLog
from evaclip.objectives.clip import ClipConfig
from evaclip.optim import warmup_cosine

# What a line of progress shows of the numbers that an objective has, and how it calls them.
SHOWN = {"loss": "loss", "i2t": "accuracy/image_to_text", "scale": "logit_scale", "images/s": "images_per_second"}
# Share of a step spent waiting for data from which the user hears about it.
STARVED = 0.2


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """The schedule's factor at a step that counts from 0."""
    return warmup_cosine(step, warmup=config.optim.warmup, total=config.steps, floor=config.optim.floor)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one."""
    return step == last or (every > 0 and step % every == 0)


class Meter:
    """See the module."""

    def __init__(self, config: RunConfig, times: LoaderTimes, log: RunLog) -> None:
        self.config, self.times, self.log = config, times, log
        self.noted: dict[str, float] = {}
        self._since, self._waited, self._count = time.perf_counter(), times.wait, 0
        self._losses: list[float] = []
        self._warned: set[str] = set()

    def note(self, name: str, value: float) -> None:
        """A number that stays in view until the next of its name."""
        self.noted[name.removeprefix("zero_shot/")] = value

    def update(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Count a step; on every `log.every`-th, fetch its metrics from the device and log them."""
        self._count += 1
        if not due(step, self.config.log.every, self.config.steps):
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds = now - self._since
        values["learning_rate_factor"] = learning_rate_factor(self.config, step - 1)
        values["images_per_second"] = self._count * self.config.batch_size / seconds
        values["data_wait_share"] = (self.times.wait - self._waited) / seconds
        self._since, self._waited, self._count = now, self.times.wait, 0
        self._name_straggler(step, values["data_wait_share"])
        self.log.scalars(step, values)
        shown = {short: values[name] for short, name in SHOWN.items() if name in values}
        self.log.line(step, shown | self.noted)
        self._warn(step, values)

    def _name_straggler(self, step: int, waiting: float) -> None:
        """All wait for the process that waits for its data; once, it is named."""
        shares = gathered(waiting)
        slowest = max(range(world_size()), key=shares.__getitem__)
        if shares[slowest] < statistics.median(shares) + STARVED or f"straggler {slowest}" in self._warned:
            return
        self._warned.add(f"straggler {slowest}")
        self.log.event(
            step,
            f"process {slowest} holds the others up: it waits for data {shares[slowest]:.0%} of the time, the median "
            f"process {statistics.median(shares):.0%}; heartbeats/rank_{slowest:05}.json says where it runs",
        )

    def _warn(self, step: int, values: Mapping[str, float]) -> None:
        if values["data_wait_share"] > STARVED and step > 2 * self.config.log.every and "starved" not in self._warned:
            self._warned.add("starved")
            stage, share = self.times.slowest()
            self.log.event(
                step,
                f"starved for data: {values['data_wait_share']:.0%} of the time is waiting; {share:.0%} of the "
                f"workers' time is {stage}. More of them help, --data.workers (now {self.config.data.workers})",
            )
        if not isinstance(self.config.objective, ClipConfig):  # only a contrastive loss knows what chance is
            return
        self._losses = [*self._losses[-9:], values["loss"]]
        chance = math.log(self.config.batch_size)
        stuck = len(self._losses) == 10 and all(abs(loss - chance) < 0.02 for loss in self._losses)
        if stuck and step > self.config.optim.warmup and "collapsed" not in self._warned:
            self._warned.add("collapsed")
            self.log.event(
                step,
                f"the loss sits at log(batch) = {chance:.3f}: every feature is the same. "
                "A lower learning rate or a longer warm-up avoids this collapse; the run is not recovering by itself",
            )
