"""Optimizers, parameter rules and schedules. Nothing in here knows a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from evaclip.optim.groups import Rule, TowerRates, parameter_groups, settings
from evaclip.optim.lamb import Lamb
from evaclip.optim.schedule import warmup_cosine

__all__ = ["Lamb", "OptimConfig", "Rule", "TowerRates", "set_learning_rates", "warmup_cosine"]


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
    rules: tuple[Rule, ...] = ()
    """Exceptions by parameter name; the first rule that matches and says something wins."""

    def build(self, student: nn.Module, layers: Mapping[str, Sequence[Sequence[str]]]) -> Optimizer:
        """The optimizer over a model's parameters; `layers` as in `groups.settings`."""
        rates = {"vision": self.vision, "text": self.text}
        chosen = settings(
            student, layers, rates, other_lr=self.lr, adapt_undecayed=self.adapt_undecayed, rules=self.rules
        )
        groups = parameter_groups(student, chosen, self.weight_decay)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps)
        return Lamb(groups, betas=self.betas, eps=self.eps, max_ratio=self.max_ratio)


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Every group's learning rate becomes its peak x `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
