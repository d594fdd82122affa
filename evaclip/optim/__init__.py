"""Optimizers, parameter rules and schedules. Nothing in here knows a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from evaclip.distributed import everyone
from evaclip.optim.groups import Rule, Setting, TowerRates, parameter_groups, settings
from evaclip.optim.lamb import Lamb, Segment
from evaclip.optim.schedule import warmup_cosine

__all__ = ["Lamb", "OptimConfig", "Rule", "Segment", "TowerRates", "set_learning_rates", "warmup_cosine"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its rates and their schedule."""

    optimizer: Literal["lamb", "adamw"] = "lamb"
    """Update rule."""
    vision: TowerRates = field(default_factory=lambda: TowerRates(lr=2e-4, layer_decay=0.75))
    """Rates of the image tower."""
    text: TowerRates = field(default_factory=lambda: TowerRates(lr=2e-5, layer_decay=0.75))
    """Rates of the text tower."""
    lr: float = 5e-4
    """Peak learning rate of parameters in neither tower: the logit scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases, norms, position embeddings, class token and logit scale have none."""
    clip_norm: float | None = 5.0
    """Largest global gradient norm."""
    warmup: int = 2000
    """Steps of linear warm-up."""
    floor: float = 0.0
    """Where the cosine ends, as a share of the peak."""
    adapt_undecayed: bool = False
    """LAMB: give parameters without weight decay a trust ratio too."""
    max_ratio: float | None = None
    """LAMB: upper bound of the trust ratio."""
    trust_scope: Literal["tensor", "ds_partition"] = "tensor"
    """LAMB: one trust ratio per tensor; or, under ZeRO, the ratio of EVA-CLIP's own runs: DeepSpeed's, per flat
    partition of each group, which changes with the number of processes."""
    rules: tuple[Rule, ...] = ()
    """Exceptions by parameter name; the first rule that matches and says something wins."""

    def build(
        self, student: nn.Module, layers: Mapping[str, Sequence[Sequence[str]]], *, flat: bool = False
    ) -> Optimizer:
        """The optimizer over a model's parameters; `layers` as in `groups.settings`.

        `flat`: for an engine that lays all parameters one behind the other. LAMB then has a single group, and what
        differs from tensor to tensor comes as segments (`settings_of`).
        """
        groups = parameter_groups(student, self.settings_of(student, layers), self.weight_decay)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps)
        if flat and self.trust_scope == "tensor":
            groups = [{"params": [p for group in groups for p in group["params"]], "peak_lr": 1.0, "lr": 1.0}]
        return Lamb(
            groups,
            betas=self.betas,
            eps=self.eps,
            max_ratio=self.max_ratio,
            published=self.trust_scope == "ds_partition",
        )

    def settings_of(self, student: nn.Module, layers: Mapping[str, Sequence[Sequence[str]]]) -> list[Setting]:
        """Learning rate, decay and adaptation of each trainable parameter."""
        rates = {"vision": self.vision, "text": self.text}
        return settings(
            student, layers, rates, other_lr=self.lr, adapt_undecayed=self.adapt_undecayed, rules=self.rules
        )

    def spread(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        layers: Mapping[str, Sequence[Sequence[str]]],
        places: Mapping[str, tuple[int, int]],
    ) -> None:
        """Tell a `flat` LAMB what lies where in this process's partition: name -> (start, length)."""
        if not isinstance(optimizer, Lamb):
            return
        if self.trust_scope == "ds_partition":
            optimizer.start()
            return
        chosen = self.settings_of(student, layers)
        segments = [
            Segment(number, *places[s.name], s.lr, self.weight_decay if s.decay else 0.0, s.adapt)
            for number, s in enumerate(chosen)
            if s.name in places
        ]
        optimizer.spread(everyone(), segments, len(chosen))


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Every group's learning rate becomes its peak x `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
