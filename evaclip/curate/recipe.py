"""Recipes of data: a folder each in data_recipes/, whose recipe.toml begins with the kind of recipe it is.

captions   a labelled set that `evaclip data caption` writes as pairs (the kind of a file that names none)
links      public lists of links with captions, which `evaclip data download` turns into shards
mix        several of those with their shares
images     images without captions, for masked image modelling: what to ask whom for
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from evaclip.errors import InputError, did_you_mean
from evaclip.records import structured
from evaclip.shipped import shipped

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Where the lists of links are."""

    hub: str = ""
    """Data set on the Hugging Face Hub, owner/name."""
    revision: str = "main"
    """Its commit; a branch's commit is written down when the lists are fetched."""
    addresses: tuple[str, ...] = ()
    """Or files at https addresses."""
    pattern: str
    """The lists among the files, as a glob."""
    columns: tuple[str, ...] = ()
    """Names of the columns of tab-separated files without a header; parquet files have names."""
    parts: int
    """How many lists there are; 0 if that depends."""
    bytes: int
    """Their size together; 0 if unknown."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of the lists are called there."""

    url: str
    caption: str
    keep: tuple[str, ...] = ()
    """Others that travel along, into each sample's json."""
    boxes: str = ""
    """Of boxes that are blurred, such as faces."""

    @property
    def others(self) -> tuple[str, ...]:
        """All that is needed beside link and caption."""
        return (*self.keep, self.boxes) if self.boxes else self.keep


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Links that are taken: those whose column lies within both bounds. A missing value does not."""

    column: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """What is done to an image before it is stored; the words are img2dataset's."""

    size: int
    """Pixels of the shortest side (keep_ratio), the longest (keep_ratio_largest), or both."""
    resize_mode: Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"] = "keep_ratio"
    only_if_bigger: bool = True
    """Never enlarge."""
    keep_small_files: bool = True
    """Store the bytes as they came when nothing was resized."""
    quality: int = 95
    """JPEG quality of what was."""
    min_side: int = 0
    """Smaller images count as failed."""
    max_aspect: float = 0.0
    """Longer ones too; 0 takes any."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What should come out; each number with where it is from."""

    pairs: int
    """Links in the lists."""
    pairs_from: str
    alive: float
    """Share of them that still gives an image."""
    alive_from: str
    bytes_per_sample: int
    """On the disk, captions and json included."""
    bytes_from: str


@dataclass(frozen=True, kw_only=True)
class OptOut:
    """Whose wish is honoured: sites that send these directives in X-Robots-Tag are left alone."""

    directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    user_agent_token: str = "img2dataset"
    """Name under which sites can address directives to the downloader."""


@dataclass(frozen=True, kw_only=True)
class LinksRecipe:
    """Pairs that are published as links: from the lists to shards."""

    title: str
    source: str
    licence: str
    access: str
    """What one has to do before the lists can be had."""
    notes: str = ""
    samples_per_shard: int = 10_000
    lists: Lists
    columns: Columns
    filters: tuple[Filter, ...] = ()
    images: ImagePolicy
    opt_out: OptOut = field(default_factory=OptOut)
    expected: Expected


@dataclass(frozen=True, kw_only=True)
class MixPart:
    """One set of a mix."""

    recipe: str
    pairs: int
    """Images of it that the mix asks for."""
    weight: float
    """Its share of the samples seen in training."""


@dataclass(frozen=True, kw_only=True)
class MixRecipe:
    """A set put together from others."""

    title: str
    source: str
    licence: str
    access: str
    notes: str
    parts: tuple[MixPart, ...]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One set of images."""

    name: str
    images: int
    """How many; 0 where no count was checked."""
    licence: str
    access: str


@dataclass(frozen=True, kw_only=True)
class ImagesRecipe:
    """Images without captions, from owners who each hand out their own."""

    title: str
    source: str
    notes: str
    total: int
    """Images in all, as its makers count them."""
    total_from: str
    sets: tuple[ImageSet, ...]


KINDS: dict[str, type] = {"links": LinksRecipe, "mix": MixRecipe, "images": ImagesRecipe}
CAPTIONS = "captions"
# The verb for each kind, for who used another.
VERB = {
    CAPTIONS: "evaclip data caption writes its shards",
    "links": "evaclip data download fetches it",
    "mix": "evaclip data download fetches it",
    "images": "its README says where each part is to be had",
}


def known_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.parent.name: path for path in sorted(shipped("data_recipes").glob("*/recipe.toml"))}


def recipe_record(name: str) -> tuple[Path, str, dict[str, Any]]:
    """File, kind and fields of a recipe, by its shipped name, its folder or its file. Raises InputError."""
    known = known_recipes()
    path = known.get(name.replace("-", "_").lower()) or Path(name)
    path = path / "recipe.toml" if path.is_dir() else path
    if path.suffix != ".toml":
        raise InputError(f"no data recipe is called {name!r}; {did_you_mean(name, known)}")
    try:
        record = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the data recipe {path} cannot be read: {error}") from None
    kind = record.pop("kind", CAPTIONS)
    if kind not in (CAPTIONS, *KINDS):
        raise InputError(f"{path}: a recipe of the kind {kind!r} is not known; {did_you_mean(str(kind), KINDS)}")
    return path, kind, record


def load_recipe(name: str) -> LinksRecipe | MixRecipe | ImagesRecipe:
    """A recipe of any kind but `captions`. Raises InputError."""
    path, kind, record = recipe_record(name)
    if kind == CAPTIONS:
        raise InputError(f"{name} is a recipe of captions; {VERB[kind]}")
    return structured(record, KINDS[kind], path)


def load_caption_record(name: str, kind: type[Kind]) -> Kind:
    """A recipe of captions as the dataclass that `evaclip data caption` has for it. Raises InputError."""
    path, said, record = recipe_record(name)
    if said != CAPTIONS:
        raise InputError(f"{name} is a recipe of {said}; {VERB[said]}")
    return structured(record, kind, path)
