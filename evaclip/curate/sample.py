"""`evaclip data sample`: a contact sheet, to look at what is in a set."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from evaclip import keyed
from evaclip.curate.page import inline, write_page
from evaclip.curate.rewrite import read_members, several_cores
from evaclip.curate.scan import MAX_PIXELS, Scan, scan
from evaclip.data.index import CAPTION_SUFFIX, IMAGE_SUFFIXES, expand, index_shards
from evaclip.data.transforms import BadImageError, whole_pixels
from evaclip.errors import InputError

THUMBNAIL = 224
LONGEST = 300
BODY = """<p class="quiet">{{ shown }} of {{ samples }} samples in {{ shards }} shards, drawn with seed {{ seed }}</p>
<div class="grid">
{% for item in items %}
<figure>{% if item.picture %}<img alt="{{ item.caption }}" src="{{ item.picture }}">{% endif %}
<figcaption>{% if item.problem %}<b>{{ item.problem }}</b> {% endif %}{{ item.caption }}
<br><span class="quiet">{{ item.where }}</span></figcaption></figure>
{% endfor %}
</div>
"""


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Write a page of samples drawn from all over a set."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    out: Path = Path("sample.html")
    """The page; its pictures are inside."""
    samples: int = 64
    """How many are drawn."""
    seed: int = 0
    """Decides which."""
    processes: int = several_cores()
    """Shards that are indexed at a time."""


def run_sample(command: SampleCommand) -> None:
    """Say where the page is."""
    print(f"{sample(command)} samples in {command.out}")


def sample(command: SampleCommand) -> int:
    """Write the page. Returns how many samples are on it."""
    if command.samples < 1:
        raise InputError("--samples is at least 1")
    heads = index_shards(expand(command.shards), skip_damaged=True, processes=command.processes)
    ends = np.cumsum([head.samples for head in heads])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise InputError("the shards hold no samples")
    places = keyed.permute(np.arange(min(command.samples, total)), total, command.seed, "contact sheet")
    items, scans = [], dict[int, Scan]()
    for place in sorted(places.tolist()):
        shard = int(np.searchsorted(ends, place, side="right"))
        path = Path(heads[shard].path)
        if shard not in scans:
            scans = {shard: scan(path)}
        items.append(_item(path, scans[shard], place - int(ends[shard] - heads[shard].samples)))
    write_page(
        command.out, BODY, "Samples", "11rem",
        items=items, shown=len(items), samples=f"{total:,}", shards=f"{len(heads):,}", seed=command.seed,
    )  # fmt: skip
    return len(items)


def _item(path: Path, found: Scan, place: int) -> dict[str, Any]:
    """A drawn sample; one that has been rejected is shown with its code."""
    if place >= len(found.good):
        problem = [each for each in found.problems if each.key][place - len(found.good)]
        return {"problem": problem.code, "caption": problem.detail, "where": f"{path.name} {problem.key}"}
    chosen = found.good[place]
    file = os.open(path, os.O_RDONLY)
    try:
        members = {name.rpartition(".")[2]: data for name, data in read_members(file, chosen)}
    finally:
        os.close(file)
    caption = members[CAPTION_SUFFIX].decode("utf-8", "replace").strip()
    item = {"where": f"{path.name} {chosen.key}", "caption": caption[:LONGEST] + "…" * (len(caption) > LONGEST)}
    try:
        data = next(data for suffix, data in members.items() if suffix in IMAGE_SUFFIXES)
        return item | {"picture": _thumbnail(data)}
    except BadImageError as error:
        return item | {"problem": error.code}


def _thumbnail(data: bytes) -> str:
    """Drawn anew: no byte of the file itself reaches the page."""
    image = Image.fromarray(whole_pixels(data, MAX_PIXELS))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return inline(buffer.getvalue(), "jpeg")
