"""From links to shards: a recipe's lists, one after the other, or shown as commands, or as a Slurm job array.

    lists of links --prepared--> OUT/lists/00012.parquet --img2dataset--> OUT/shards/00012/00000.tar ...

One list is one call of img2dataset, one task of a job array, one folder of shards. The same command, given again, goes
on where it was stopped.
"""

import json
import math
import os
import shlex
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from evaclip.curate import img2dataset
from evaclip.curate.img2dataset import Crawling
from evaclip.curate.links import prepared
from evaclip.curate.lists import Located, list_number, located
from evaclip.curate.plan import LINKS_PER_SECOND, share_of_links
from evaclip.curate.recipe import ImagesRecipe, LinksRecipe, load_recipe
from evaclip.errors import InputError
from evaclip.log import say

SMOKE_LINKS, SMOKE_SHARD = 500, 100


@dataclass(frozen=True, kw_only=True)
class DownloadCommand:
    """Download the images of a recipe's links as shards; given again, it goes on where it was stopped."""

    recipe: tyro.conf.Positional[str]
    """Name of a folder in data_recipes/, or a recipe.toml."""
    out: Path | None = None
    """Folder for lists and shards; data/RECIPE unless named."""
    metadata: Path | None = None
    """Folder of the recipe's lists of links; they are fetched to OUT/metadata unless named."""
    part: int | None = None
    """Only this list, counted from 0: one task of a job array."""
    lists: int = 0
    """How many lists there are, for --sbatch, where the recipe does not know it."""
    share: float = 1.0
    """Of the links that pass the filters, the share to take."""
    smoke: bool = False
    """Only the first 500 links, in shards of 100: a trial of ten minutes, which measures how many links still work."""
    allow_private: bool = False
    """Also take links to private addresses: for a mirror in your own network."""
    dry_run: bool = False
    """Show the commands, and do nothing."""
    sbatch: bool = False
    """Print a Slurm job array, a task for each list; nothing is submitted."""
    crawling: tyro.conf.OmitArgPrefixes[Crawling] = field(default_factory=Crawling)
    """How hard to try."""


def run_download(command: DownloadCommand) -> None:
    """Download, or show what would be done. Raises InputError; what has come by then is kept."""
    recipe = load_recipe(command.recipe)
    if isinstance(recipe, ImagesRecipe):
        raise InputError(f"{command.recipe} is a set of images that their owners hand out; its README says where")
    if not 0 < command.share <= 1:
        raise InputError(f"--share is a share of the links, above 0 and at most 1, not {command.share:g}")
    if isinstance(recipe, LinksRecipe):
        _run(recipe, command)
        return
    if command.sbatch:
        arrays = [f"{part.recipe} --out {folder(command) / part.recipe}" for part in recipe.parts]
        raise InputError(f"{command.recipe} is a job array for each of its sets; --sbatch of: {', '.join(arrays)}")
    for part in recipe.parts:
        own = load_recipe(part.recipe)
        assert isinstance(own, LinksRecipe)
        share = round(command.share * share_of_links(own, part.pairs), 6)
        metadata = command.metadata and command.metadata / part.recipe
        _run(
            own, replace(command, recipe=part.recipe, out=folder(command) / part.recipe, share=share, metadata=metadata)
        )


def folder(command: DownloadCommand) -> Path:
    """Where everything of a download goes."""
    return command.out or Path("data") / Path(command.recipe).name


def job_array(recipe: LinksRecipe, command: DownloadCommand) -> str:
    """The text of an sbatch script with a task for each list; a task that is requeued goes on in its own folder."""
    parts = command.lists or recipe.lists.parts
    if not parts:
        raise InputError(f"{command.recipe} does not say how many lists of links there are: say it with --lists")
    links = recipe.expected.pairs * command.share / parts
    hours = max(1, math.ceil(2 * links / LINKS_PER_SECOND / 3600))
    crawling = command.crawling
    words = ["evaclip", "data", "download", command.recipe, "--out", str(folder(command))]
    words += ["--environment", str(crawling.environment), "--processes", str(crawling.processes)]
    words += ["--metadata", str(command.metadata)] if command.metadata else []
    words += ["--share", repr(command.share)] if command.share < 1 else []
    words += ["--allow-private"] if command.allow_private else []
    return "\n".join([
        "#!/bin/bash",
        f"# {recipe.title}: one task for each of its lists of links.",
        "# Submit it as it is; submit it again, or let Slurm requeue it, and every task goes on where it was stopped.",
        "# Its nodes should reach the internet and nothing private, each with a DNS resolver of its own.",
        f"#SBATCH --job-name=download-{Path(command.recipe).name}",
        f"#SBATCH --array=0-{parts - 1}%8",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        f"#SBATCH --cpus-per-task={crawling.processes}",
        "#SBATCH --mem=32G",
        f"#SBATCH --time={hours}:00:00",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%a.log",
        "set -euo pipefail",
        f'exec {shlex.join(words)} --part "$SLURM_ARRAY_TASK_ID"',
        "",
    ])  # fmt: skip


def shown(recipe: LinksRecipe, command: DownloadCommand) -> list[str]:
    """The steps as commands and remarks, the first list in full."""
    out, crawling = folder(command), command.crawling
    lines = ["# once:", *crawling.making, "# then:"]
    if not command.metadata:
        where = [f"{recipe.lists.hub} ({recipe.lists.revision}), {recipe.lists.pattern}"] if recipe.lists.hub else []
        lines += [f"# lists of links: {place}, to {out}/metadata" for place in where or recipe.lists.addresses]
    part = command.part or 0
    name = "smoke" if command.smoke else f"{part:05}"
    links = out / "lists" / f"{name}.parquet"
    lines += [f"# columns, filters and addresses checked: {links}"]
    lines += [" ".join(f"{name}={value}" for name, value in img2dataset.SILENT.items()) + " \\"]
    lines += " \\\n  ".join(map(shlex.quote, _arguments(recipe, command, links, out / "shards" / name))).splitlines()
    last = recipe.lists.parts - 1
    if last > 0 and command.part is None and not command.smoke:
        lines.append(f"# and so on for the lists 00001 to {last:05}")
    return lines


def _arguments(recipe: LinksRecipe, command: DownloadCommand, links: Path, shards: Path) -> list[str]:
    per_shard = SMOKE_SHARD if command.smoke else recipe.samples_per_shard
    return img2dataset.arguments(recipe, links, shards, command.crawling, per_shard)


def _run(recipe: LinksRecipe, command: DownloadCommand) -> None:
    if command.sbatch:
        print(job_array(recipe, command), end="")
        return
    if command.dry_run:
        print(*shown(recipe, command), sep="\n")
        return
    img2dataset.check(command.crawling)
    where = located(recipe.lists, command.metadata or folder(command) / "metadata", command.metadata is not None)
    done = [_part(recipe, command, where, part) for part in _parts(command, where)]
    links, images, shards, size = (sum(one[key] for one in done) for key in ("links", "images", "shards", "bytes"))
    errors = sum((Counter(one["errors"]) for one in done), Counter())
    print(f"{images:,} images of {links:,} links ({images / links:.1%}) in {shards:,} shards, {folder(command)}/shards")
    print(f"{size / max(images, 1):,.0f} bytes a sample, {size / 1e9:,.2f} GB in all")
    print(
        f"the recipe expects {recipe.expected.alive:.0%} ({recipe.expected.alive_from}) "
        f"and {recipe.expected.bytes_per_sample:,} bytes"
    )
    for what, count in errors.most_common(5):
        print(f"  {count:,} x {what}")


def _parts(command: DownloadCommand, where: Located) -> list[int]:
    """The lists that this call is for."""
    if command.part is not None or command.smoke:
        return [command.part or 0]
    return list(range(len(where.names)))


def _part(recipe: LinksRecipe, command: DownloadCommand, where: Located, part: int) -> dict[str, Any]:
    """Download one list. Returns its summary, which also lies beside its shards."""
    out = folder(command)
    name = "smoke" if command.smoke else f"{part:05}"
    shards, links = out / "shards" / name, out / "lists" / f"{name}.parquet"
    source = list_number(recipe.lists, where, part)
    counts = prepared(
        source, recipe, links,
        share=command.share, most=SMOKE_LINKS if command.smoke else 0, allow_private=command.allow_private,
    )  # fmt: skip
    left_out = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n and what not in ("links", "taken"))
    say(f"{source.name}: {counts['taken']:,} links to fetch" + (f" ({left_out})" if left_out else ""))
    shards.mkdir(parents=True, exist_ok=True)
    img2dataset.call(_arguments(recipe, command, links, shards), shards)
    summary = img2dataset.summarised(shards, counts["taken"])
    summary |= {"list": source.name, "revision": where.revision, "counts": counts}
    temporary = shards / f"summary.json.{os.getpid()}"
    temporary.write_text(json.dumps(summary, indent=1))
    temporary.replace(shards / "summary.json")
    return summary
