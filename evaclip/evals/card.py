"""A benchmark is one TOML file: classes, prompts, metric, expected size, published scores, and where it all comes from.

name = "cifar10"
title = "CIFAR-10"
classes = ["airplane", ...]              # as they go into the prompts
labels = ["airplane", ...]               # as the data calls them; left out when the same
templates = ["a photo of a {}.", ...]
layouts = ["huggingface_parquet", ...]   # readers to try, in this order
count = 10000                            # test images; a different number is refused
headline = "top1"
source, licence, terms = "..."
[[reference]]
model = "EVA02-B-16"
top1 = 98.46
source = "..."
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from evaclip.errors import InputError, did_you_mean
from evaclip.records import structured
from evaclip.shipped import shipped


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published score."""

    model: str
    source: str
    top1: float
    """Percent."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything about a benchmark that is not code."""

    name: str
    title: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    layouts: tuple[str, ...]
    count: int
    source: str
    licence: str
    terms: str = ""
    """How and under which conditions the data is had."""
    headline: str = "top1"
    labels: tuple[str, ...] = ()
    reference: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != len(self.classes):
            raise InputError(f"card {self.name}: {len(self.labels)} labels for {len(self.classes)} classes")
        for template in self.templates:
            if template.count("{}") != 1:
                raise InputError(f"card {self.name}: the template {template!r} needs exactly one {{}}")

    @property
    def data_labels(self) -> tuple[str, ...]:
        """What the data calls the classes."""
        return self.labels or self.classes

    def prompts(self, name: str) -> list[str]:
        """A class name in every template."""
        return [template.replace("{}", name) for template in self.templates]


def known_cards() -> dict[str, Path]:
    """The shipped cards by name."""
    return {path.stem: path for path in sorted(shipped("zero_shot").glob("*.toml"))}


def load_card(name: str) -> Card:
    """A card by its shipped name (dashes are fine), or by the path of a TOML file. Raises InputError."""
    known = known_cards()
    wanted = name.lower().replace("-", "_")
    path = known.get(wanted) or known.get(wanted.replace("_", "")) or Path(name)
    if path.suffix != ".toml":
        raise InputError(f"no benchmark is called {name!r}; {did_you_mean(wanted, known)}")
    try:
        said = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the card {path} cannot be read: {error}") from None
    return structured(said, Card, path)
