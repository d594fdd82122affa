"""`evaclip data synth`: shards of drawn shapes with captions that describe them, the same for the same seed."""

import io
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from evaclip import keyed
from evaclip.curate.journal import Journal
from evaclip.curate.rewrite import claim, finish, several_cores
from evaclip.data.index import ShardHead
from evaclip.data.manifest import Manifest
from evaclip.data.write import ShardWriter
from evaclip.errors import InputError

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "yellow": (240, 200, 30),
    "purple": (148, 80, 189),
    "orange": (255, 127, 14),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")
SENTENCES = (
    "a {} {} beside a {} {} on {} ground",
    "a picture of a {} {} and a {} {}, {} behind them",
    "{} {} on the left, {} {} on the right, the rest is {}",
)


@dataclass(frozen=True, kw_only=True)
class SynthCommand:
    """Write shards of two coloured shapes beside each other, with captions: data for tests, smoke runs and timings."""

    out: Path
    """Folder for the shards."""
    samples: int = 1000
    """Samples of all shards."""
    per_shard: int = 500
    """Samples of a shard; the last one has what is left."""
    seed: int = 0
    """Decides everything."""
    size: int = 64
    """Pixels of a side."""
    repeats: float = 0.0
    """Share of samples that show an earlier sample's picture again, in other bytes."""
    processes: int = several_cores()
    """Shards that are written at a time."""


def run_synth(command: SynthCommand) -> None:
    """Print what was written."""
    manifest = synth(command)
    print(f"{manifest.samples:,} samples in {len(manifest.shards):,} shards, fingerprint {manifest.fingerprint}")


def synth(command: SynthCommand) -> Manifest:
    """The manifest of the shards. Raises InputError for a folder that holds others."""
    if command.samples < 1 or command.per_shard < 1 or command.size < 8 or not 0 <= command.repeats <= 1:
        raise InputError("--samples and --per-shard are at least 1, --size at least 8, --repeats from 0 to 1")
    settings = {name: value for name, value in asdict(command).items() if name not in ("out", "processes")}
    done = claim(command.out, settings, "")
    if done is not None:
        return done
    journal = Journal(command.out / "unfinished", settings, command.processes)
    numbers = range(-(-command.samples // command.per_shard))
    written = journal.each("drawing", partial(_shard, command=command), numbers)
    heads = [ShardHead(**result["head"]) for _, result in written]
    made_by = {"verb": "synth", "settings": settings, "source": ""}
    manifest = finish(command.out, heads, [], command.samples, 0, made_by)
    journal.finished()
    return manifest


def drawn(seed: int, number: int, size: int, repeats: float = 0.0) -> tuple[bytes, str, dict[str, Any]]:
    """A sample's JPEG, caption and record."""
    shown = number
    while shown and (chosen := keyed.generator(seed, "repeats", shown)).random() < repeats:
        shown = int(chosen.integers(shown))
    quality = 90 if shown == number else 75
    random = keyed.generator(seed, "synth", shown)
    names = [list(COLOURS)[int(place)] for place in random.permutation(len(COLOURS))[:3]]
    shapes = [SHAPES[int(random.integers(len(SHAPES)))] for _ in range(2)]
    image = Image.new("RGB", (size, size), COLOURS[names[2]])
    canvas = ImageDraw.Draw(image)
    for place in range(2):
        middle = ((0.25 + 0.5 * place) * size, size * (0.3 + 0.4 * random.random()))
        _draw(canvas, shapes[place], middle, size * (0.1 + 0.1 * random.random()), COLOURS[names[place]])
    noise = random.integers(-12, 13, (size, size, 3))
    pixels = (np.asarray(image).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    random = keyed.generator(seed, "captions", number)
    sentence = SENTENCES[int(random.integers(len(SENTENCES)))]
    caption = sentence.format(names[0], shapes[0], names[1], shapes[1], names[2])
    record = {"width": size, "height": size, "similarity": round(float(random.uniform(0.1, 0.4)), 4), "shows": shown}
    return buffer.getvalue(), caption, record


def _draw(canvas: ImageDraw.ImageDraw, shape: str, middle: tuple[float, float], radius: float, colour: Any) -> None:
    x, y = middle
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x - radius, y + radius), (x + radius, y + radius), (x, y - radius)], fill=colour)
    else:
        canvas.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=colour)
        canvas.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=colour)


def _shard(number: int, *, command: SynthCommand) -> dict[str, Any]:
    first = number * command.per_shard
    last = min(first + command.per_shard, command.samples)
    with ShardWriter(command.out / f"synth-{number:05}.tar") as shard:
        for place in range(first, last):
            image, caption, record = drawn(command.seed, place, command.size, command.repeats)
            shard.add(f"{place:09}.jpg", image)
            shard.add(f"{place:09}.txt", caption.encode())
            shard.add(f"{place:09}.json", json.dumps(record).encode())
    return {"head": asdict(shard.head(last - first))}
