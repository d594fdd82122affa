"""What a data set will take, before the first image is fetched: links, disk, hours, cost.

From the recipe's own counts, or from the lists of links when they are there: rows and what the filters leave of them
are then counted, not assumed. How many links still work, and how large an image is, only a sample can say: the smoke
version of each recipe measures both.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as dataset
import pyarrow.parquet as parquet
import tyro
from rich.console import Console
from rich.table import Table

from evaclip.curate.lists import lists_in
from evaclip.curate.recipe import ImagesRecipe, LinksRecipe, load_recipe
from evaclip.errors import InputError

# img2dataset's own figure (its README): 16 cores and a resolver of their own take about a thousand links a second.
LINKS_PER_SECOND = 1000.0
HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What a data set takes: links, images to expect, disk, hours, cost."""

    recipe: tyro.conf.Positional[str]
    """Name of a folder in data_recipes/, or a recipe.toml."""
    metadata: Path | None = None
    """Folder of the lists of links, if they are there: rows and filters are counted in them."""
    alive: float | None = None
    """Share of links that still gives an image; the recipe's expectation unless you have measured it."""
    bytes_per_sample: int | None = None
    """Likewise for the bytes of a sample on the disk."""
    nodes: int = 8
    """Machines that download, of 16 cores each."""
    links_per_second: float = LINKS_PER_SECOND
    """What one of them takes; img2dataset's README says about 1000."""
    node_price: float = 0.7
    """Of one machine for an hour; an assumption, put yours."""
    terabyte_price: float = 20.0
    """Of a terabyte for a month; an assumption, put yours."""


@dataclass(frozen=True)
class Budget:
    """What one set of links takes."""

    recipe: str
    links: int
    """Links in the lists."""
    tried: int
    """Links that pass the filters and are drawn."""
    images: int
    """Images to expect of those."""
    wanted: int
    """Images that a mix asks for; 0 for all that there are."""
    shards: int
    """Shards that the download writes."""
    bytes: int
    """Of images, captions and lists on the disk."""
    node_hours: float
    counted: bool
    """Whether the links were counted in the lists, rather than taken from the recipe."""


def budgets(command: PlanCommand) -> list[Budget]:
    """One for a set of links, one for each part of a mix. Raises InputError for a recipe of another kind."""
    recipe = load_recipe(command.recipe)
    if isinstance(recipe, ImagesRecipe):
        raise InputError(f"{command.recipe} is a set of images that their owners hand out; its README says where")
    if isinstance(recipe, LinksRecipe):
        return [_budget(Path(command.recipe).name, recipe, command, command.metadata)]
    found = []
    for part in recipe.parts:
        own = load_recipe(part.recipe)
        assert isinstance(own, LinksRecipe)
        found.append(
            _budget(part.recipe, own, command, command.metadata and command.metadata / part.recipe, part.pairs)
        )
    return found


def share_of_links(recipe: LinksRecipe, wanted: int, links: int = 0, alive: float | None = None) -> float:
    """The share of its links that should give `wanted` images; 1 when that takes all of them, or more."""
    expected = (links or recipe.expected.pairs) * (recipe.expected.alive if alive is None else alive)
    return min(1.0, wanted / expected) if wanted and expected else 1.0


def run_plan(command: PlanCommand) -> list[Budget]:
    """Print the plan."""
    recipe = load_recipe(command.recipe)
    if isinstance(recipe, ImagesRecipe):
        table = Table(title=recipe.title)
        for column in ("set", "images", "licence", "how to get it"):
            table.add_column(column, overflow="fold")
        for part in recipe.sets:
            table.add_row(part.name, f"{part.images:,}" if part.images else "not counted", part.licence, part.access)
        _console().print(table)
        return []
    found = budgets(command)
    table = Table("what", *(budget.recipe for budget in found), title=recipe.title)
    for row in rows(found, command):
        table.add_row(*row)
    _console().print(table)
    for budget in found:
        if budget.wanted > budget.images:
            print(
                f"{budget.recipe}: {budget.wanted:,} images are asked for, about {budget.images:,} can be expected. "
                "Train on what there is: weights, not counts, keep the mix"
            )
    return found


def rows(found: list[Budget], command: PlanCommand) -> list[list[str]]:
    """The lines of the table; with several sets a column each. READMEs of recipes show them too."""
    days = [budget.node_hours / command.nodes / 24 for budget in found]
    money = [budget.node_hours * command.node_price for budget in found]
    store = [budget.bytes / 1e12 * command.terabyte_price for budget in found]
    return [
        ["links in the lists", *(f"{b.links:,}{'' if b.counted else ' (recipe)'}" for b in found)],
        ["links tried", *(f"{b.tried:,}" for b in found)],
        ["images to expect", *(f"{b.images:,}" for b in found)],
        ["shards of the download", *(f"{b.shards:,}" for b in found)],
        ["disk", *(f"{b.bytes / 1e12:,.2f} TB" for b in found)],
        ["node-hours of 16 cores", *(_short(b.node_hours) for b in found)],
        [f"days on {command.nodes} nodes", *(_short(d) for d in days)],
        [f"cost of the nodes at {command.node_price:g} an hour (assumed)", *(_short(m) for m in money)],
        [f"cost of a month's disk at {command.terabyte_price:g} a TB (assumed)", *(_short(s) for s in store)],
    ]


def _budget(name: str, recipe: LinksRecipe, command: PlanCommand, metadata: Path | None, wanted: int = 0) -> Budget:
    links, passing, size = recipe.expected.pairs, recipe.expected.pairs, recipe.lists.bytes
    if metadata is not None:
        links, passing, size = _counted(recipe, metadata)
    elif not links:
        raise InputError(f"{name} has no counts of its own: name the folder of your lists of links with --metadata")
    alive = recipe.expected.alive if command.alive is None else command.alive
    tried = round(passing * share_of_links(recipe, wanted, passing, alive))
    images = round(tried * alive)
    return Budget(
        recipe=name,
        links=links,
        tried=tried,
        images=images,
        wanted=wanted,
        shards=-(-tried // recipe.samples_per_shard),
        bytes=images * (command.bytes_per_sample or recipe.expected.bytes_per_sample) + size,
        node_hours=tried / command.links_per_second / 3600,
        counted=metadata is not None,
    )


def _counted(recipe: LinksRecipe, folder: Path) -> tuple[int, int, int]:
    """Links in the lists of a folder, those that pass the filters, and the bytes of the lists."""
    files = lists_in(recipe.lists, folder)
    if any(file.suffix != ".parquet" for file in files):
        lines = 0
        for file in files:
            with file.open("rb") as lists:
                lines += sum(block.count(b"\n") for block in iter(lambda: lists.read(1 << 24), b""))
        return lines, lines, sum(file.stat().st_size for file in files)
    try:
        links = sum(parquet.read_metadata(file).num_rows for file in files)
        passing = links
        if recipe.filters:
            conditions = [
                (dataset.field(rule.column) >= rule.at_least if rule.at_least is not None else dataset.scalar(True))
                & (dataset.field(rule.column) <= rule.at_most if rule.at_most is not None else dataset.scalar(True))
                for rule in recipe.filters
            ]
            together = conditions[0]
            for condition in conditions[1:]:
                together = together & condition
            passing = dataset.dataset(files, format="parquet").count_rows(filter=together)
    except (OSError, ValueError) as error:
        raise InputError(f"the lists in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    return links, passing, sum(file.stat().st_size for file in files)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _console() -> Console:
    return Console(highlight=False, width=120)
