"""Which learning rate and which decay each parameter gets: ordered rules, nothing uncovered, nothing unused.

The learning rate of a parameter is the base rate of its tower x the layer decay to the power of its distance from the
top of the tower x the factor of the first rule that matches its name. Layer decay is that of BEiT (arXiv 2106.08254,
appendix on fine-tuning): the head has distance 0, the last block 1, the embeddings depth + 1.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from evaclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An exception for the parameters whose name a regular expression finds; what is None is left to later rules."""

    pattern: str
    """Searched in the parameter's name."""
    lr: float | None = None
    """Factor on the learning rate."""
    decay: bool | None = None
    """Whether weight decay applies."""
    adapt: bool | None = None
    """Whether LAMB scales the step by its trust ratio."""


@dataclass(frozen=True, kw_only=True)
class TowerRates:
    """The learning rates of one tower."""

    lr: float
    """Peak learning rate of the top layer."""
    layer_decay: float = 1.0
    """Factor from each layer to the one below it."""


@dataclass(frozen=True)
class Setting:
    """What the rules decided for one parameter."""

    name: str
    lr: float
    decay: bool
    adapt: bool


# One-dimensional parameters (biases, norms, the scale) are never decayed; these tables of vectors are not either.
UNDECAYED = Rule(pattern=r"(^|\.)(pos_embed|positional_embedding|cls_token|mask_token)$", decay=False)


def settings(
    student: nn.Module,
    layers: Mapping[str, Sequence[Sequence[str]]],
    towers: Mapping[str, TowerRates],
    *,
    other_lr: float,
    adapt_undecayed: bool,
    rules: Sequence[Rule] = (),
) -> list[Setting]:
    """One setting per trainable parameter, in the model's order.

    `layers`: for each tower its parameter names from the embeddings up to the head. `towers`: the rates by the same
    names. `other_lr`: for parameters in no tower. `adapt_undecayed`: whether undecayed parameters get a trust ratio
    where no rule says so. Raises InputError for a rule that matches nothing.
    """
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    base = {name: other_lr for name in parameters}
    for tower, stages in layers.items():
        for distance, stage in enumerate(reversed(stages)):
            base |= {name: towers[tower].lr * towers[tower].layer_decay ** distance for name in stage}
    for rule in rules:
        _check(rule, list(parameters))
    found = []
    for name, parameter in parameters.items():
        matching = [rule for rule in (*rules, UNDECAYED) if re.search(rule.pattern, name)]
        decay = _first([rule.decay for rule in matching], parameter.ndim > 1)
        adapt = _first([rule.adapt for rule in matching], decay or adapt_undecayed)
        factor = _first([rule.lr for rule in matching], 1.0)
        found.append(Setting(name, base[name] * factor, decay, adapt))
    return found


def parameter_groups(student: nn.Module, chosen: Sequence[Setting], weight_decay: float) -> list[dict[str, Any]]:
    """torch's parameter groups: parameters that share all three settings share a group, which keeps their names."""
    parameters = dict(student.named_parameters())
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for setting in chosen:
        group = groups.setdefault(
            (setting.lr, setting.decay, setting.adapt),
            {
                "params": [],
                "names": [],
                "peak_lr": setting.lr,
                "lr": setting.lr,
                "weight_decay": weight_decay if setting.decay else 0.0,
                "adapt": setting.adapt,
            },
        )
        group["params"].append(parameters[setting.name])
        group["names"].append(setting.name)
    return list(groups.values())


def _first(values: Sequence[Any], default: Any) -> Any:
    return next((value for value in values if value is not None), default)


def _check(rule: Rule, names: list[str]) -> None:
    try:
        if any(re.search(rule.pattern, name) for name in names):
            return
    except re.error as error:
        raise InputError(f"the optimizer rule {rule.pattern!r} is not a regular expression: {error}") from None
    near = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.3)
    hint = f"; near it are {', '.join(near)}" if near else ""
    raise InputError(f"the optimizer rule {rule.pattern!r} matches no parameter{hint}")
