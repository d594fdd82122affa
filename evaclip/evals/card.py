"""A benchmark is one TOML file: classes, prompts, metric, expected size, published scores, and where it all comes from.

name = "cifar10"
title = "CIFAR-10"
aliases = ["c10"]                        # other names at the command line
classes = ["airplane", ...]              # as they go into the prompts
labels = ["airplane", ...]               # as the data calls them; left out when the same
also = [...]                             # a third way in which some copies of the data call them
class_list = "lists/imagenet.tsv"        # instead of these: a table with the columns class, label, also
templates = ["a photo of a {}.", ...]
template_list = "lists/templates.txt"    # instead: one template a line
other_list = "lists/objectnet_other.txt" # labels that the data has and the benchmark leaves out, one a line
media = "image"                          # or "video"
folders = ["val", ...]                   # where the test part may lie below the data's folder, likeliest first
archives = ["val.tar", ...]              # or packed
layouts = ["huggingface_parquet", ...]   # readers to try, in this order
count = 10000                            # test images; a different number is refused
per_class = 1000                         # of each class, where all have the same number
coverage = 0.98                          # share of `count` from which a set counts as whole; videos vanish from the web
headline = "top1"                        # or "mean_top1_top5"
source, licence, terms = "..."
[border]                                 # pixels cut off each side before the resize, by protocol
testbed = 2
[[reference]]
model = "EVA02-B-16"
top1 = 98.46
source = "..."
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evaclip.errors import InputError, did_you_mean
from evaclip.records import structured
from evaclip.shipped import shipped


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published score; per cent."""

    model: str
    source: str
    top1: float | None = None
    top5: float | None = None
    mean_top1_top5: float | None = None


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
    note: str = ""
    """What somebody who reads the score should know."""
    headline: Literal["top1", "mean_top1_top5"] = "top1"
    aliases: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    other_labels: tuple[str, ...] = ()
    media: Literal["image", "video"] = "image"
    folders: tuple[str, ...] = ("test", "val", "valid")
    archives: tuple[str, ...] = ()
    other_variants: tuple[str, ...] = ()
    """Words in a path that show another variant of the data, whose score is another."""
    split_counts: tuple[int, ...] = ()
    """Test clips of each official split, where there are several."""
    per_class: int = 0
    coverage: float = 1.0
    lossless: bool = False
    """Whether a JPEG shows that the pixels are no longer the published ones."""
    real_labels: bool = False
    """Whether timm's ImageNet ReaL labels belong to these images."""
    border: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.05
    """Points by which a score may differ from the published one and still count as the same."""
    clip_benchmark: str = ""
    """What CLIP_benchmark calls it."""
    reference: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "also"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.classes):
                raise InputError(f"card {self.name}: {len(getattr(self, name))} {name} for {len(self.classes)} classes")
        for template in self.templates:
            if template.count("{}") != 1:
                raise InputError(f"card {self.name}: the template {template!r} needs exactly one {{}}")
        if len(self.classes) < 2 or not self.templates:
            raise InputError(f"card {self.name}: at least two classes and one template are needed")

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
    """A card by its shipped name or alias (dashes are fine), or by the path of a TOML file. Raises InputError."""
    if Path(name).suffix == ".toml":
        return _read(Path(name))
    known = known_cards()
    wanted = _plain(name)
    for card, path in known.items():
        if _plain(card) == wanted:
            return _read(path)
    for path in known.values():
        if wanted in map(_plain, _said(path).get("aliases", ())):
            return _read(path)
    raise InputError(f"no benchmark is called {name!r}; {did_you_mean(name.lower().replace('-', '_'), known)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _said(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the card {path} cannot be read: {error}") from None


def _read(path: Path) -> Card:
    said = _said(path)
    if "class_list" in said:
        said |= _columns(_lines(path, said.pop("class_list")), path)
    if "template_list" in said:
        said["templates"] = _lines(path, said.pop("template_list"))
    if "other_list" in said:
        said["other_labels"] = _lines(path, said.pop("other_list"))
    return structured(said, Card, path)


def _lines(card: Path, name: str) -> list[str]:
    """The lines of a list beside the card, or else of a shipped one; those that begin with # are its source."""
    beside = card.parent / name
    path = beside if beside.is_file() else shipped("zero_shot") / name
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the card {card} names the list {name}, which cannot be read: {error}") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _columns(lines: list[str], card: Path) -> dict[str, list[str]]:
    """A table with a head of `class`, `label`, `also` as the card's own keys."""
    keys = {"class": "classes", "label": "labels", "also": "also"}
    head = lines[0].split("\t") if lines else []
    rows = [line.split("\t") for line in lines[1:]]
    if "class" not in head or not set(head) <= set(keys) or any(len(row) != len(head) for row in rows):
        raise InputError(f"the class list of {card} needs a head of class, label, also, and rows of as many columns")
    return {keys[name]: [row[place] for row in rows] for place, name in enumerate(head)}
