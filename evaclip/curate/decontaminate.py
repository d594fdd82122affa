"""`evaclip data hash` and `evaclip data decontaminate`: no picture of an evaluation set stays in the training set.

A list of hashes is a text file with a line for each image: evaluation set, SHA-256, perceptual hash (`-` for an image
without texture). It can be made once, kept, and handed on without the images.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.likeness import hash_shard, image_hashes, nearest
from evaclip.curate.rewrite import Verdict, claim, keep, refuse_equal_names, several_cores, source_fingerprint
from evaclip.data.index import expand
from evaclip.data.manifest import Manifest
from evaclip.data.transforms import BadImageError
from evaclip.errors import InputError
from evaclip.evals.card import load_card
from evaclip.evals.layouts import find_images
from evaclip.log import progress, say

LINE = re.compile(r"(\S+)\t([0-9a-f]{64})\t([0-9a-f]{16}|-)").fullmatch


@dataclass(frozen=True, kw_only=True)
class HashCommand:
    """Write the hashes of an evaluation set's images, for `evaclip data decontaminate`."""

    dataset: tyro.conf.Positional[str]
    """Name of a benchmark, or path of a card."""
    data: Path
    """Folder of its images."""
    out: Path
    """The list; lines of other sets that are in it stay."""


@dataclass(frozen=True, kw_only=True)
class DecontaminateCommand:
    """Leave out images that are in an evaluation set: the same bytes, or nearly the same look."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    against: tuple[Path, ...]
    """Lists of hashes that `evaclip data hash` wrote."""
    out: Path
    """Folder for the new shards, their manifest, and the list of what was left out."""
    distance: int = 4
    """Bits of 64 in which perceptual hashes of the same picture may differ; -1 compares bytes only."""
    processes: int = several_cores()
    """Shards that are read at a time."""


@dataclass(frozen=True)
class HashList:
    """The images of evaluation sets."""

    names: list[str]
    """Set of each image."""
    sha256: list[bytes]
    perceptual: np.ndarray
    """uint64, of the textured ones."""
    textured: np.ndarray
    """Places of those in the list."""


def run_hash(command: HashCommand) -> None:
    """Print how many images were hashed."""
    card = load_card(command.dataset)
    images = find_images(card, command.data)
    lines, failed = [], 0
    for number in progress(range(len(images)), len(images), f"hashing {card.title}"):
        try:
            digest, perceptual = image_hashes(_bytes_of(images.open(number)))
        except BadImageError as error:
            failed += 1
            say(f"image {number} of {card.name} is left out: {error}")
            continue
        lines.append(f"{card.name}\t{digest.hex()}\t{'-' if perceptual is None else f'{perceptual:016x}'}")
    before = command.out.read_text().splitlines() if command.out.is_file() else []
    kept = [line for line in before if line.partition("\t")[0] != card.name]
    command.out.parent.mkdir(parents=True, exist_ok=True)
    part = command.out.with_name(f"{command.out.name}.part")
    part.write_text("".join(f"{line}\n" for line in [*kept, *lines]))
    part.replace(command.out)
    print(
        f"{len(lines):,} images of {card.name} in {command.out}" + (f", {failed} could not be read" if failed else "")
    )


def run_decontaminate(command: DecontaminateCommand) -> None:
    """Print how many samples each evaluation set cost."""
    manifest = decontaminate(command)
    made = manifest.made_by
    for name, count in made["per_set"].items():
        print(f"{count:>12,}  {name}")
    print(f"{made['in']:,} samples in, {made['out']:,} out, {made['rejected']:,} rejected")
    print(f"fingerprint {manifest.fingerprint}: {command.out}")


def decontaminate(command: DecontaminateCommand) -> Manifest:
    """The manifest of the new shards; `made_by` has the count of each evaluation set, zeros with them."""
    known = read_hashes(command.against)
    paths = expand(command.shards)
    refuse_equal_names(paths)
    lists = hashlib.sha256(b"".join(path.read_bytes() for path in command.against)).hexdigest()
    settings = {"distance": command.distance, "lists": lists}
    source = source_fingerprint(paths, command.out, command.processes)
    done = claim(command.out, settings, source)
    if done is not None:
        return done
    journal = Journal(command.out / "unfinished", settings, command.processes)
    halves = {digest[:16]: name for digest, name in zip(known.sha256, known.names, strict=True)}
    per_set, verdicts = Counter(dict.fromkeys(known.names, 0)), []
    for _, result in journal.each("hashing images", hash_shard, paths, shard_state):
        verdict, sets = _verdict(result, known, halves, command.distance)
        verdicts.append(verdict)
        per_set.update(sets)
    made_by = {"verb": "decontaminate", "settings": settings, "source": source, "per_set": dict(per_set)}
    manifest = keep(paths, verdicts, command.out, journal, made_by)
    journal.finished()
    return manifest


def read_hashes(paths: Iterable[Path]) -> HashList:
    """Lists of hashes, put together. Raises InputError with the line that is not as it should be."""
    names, digests, perceptual, textured = [], [], [], []
    for path in paths:
        if not path.is_file():
            raise InputError(f"the list of hashes {path} does not exist; evaclip data hash writes one")
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found = LINE(line)
            if found is None:
                raise InputError(f"{path}, line {number}: not `set, SHA-256, perceptual hash`, parted by tabs")
            if found[3] != "-":
                perceptual.append(int(found[3], 16))
                textured.append(len(names))
            names.append(found[1])
            digests.append(bytes.fromhex(found[2]))
    if not names:
        raise InputError("the lists of hashes are empty")
    return HashList(names, digests, np.array(perceptual, np.uint64), np.array(textured, np.int64))


def _verdict(
    result: dict[str, Any], known: HashList, halves: dict[bytes, str], distance: int
) -> tuple[Verdict, list[str]]:
    verdict: Verdict = {int(place): (code, detail) for place, (code, detail) in result["undecodable"].items()}
    sets = []
    textured = np.flatnonzero(result["textured"])
    close = (
        nearest(known.perceptual, np.array(result["perceptual"])[textured], distance)
        if distance >= 0
        else textured * 0 - 1
    )
    by_look = {
        int(place): known.names[known.textured[match]]
        for place, match in zip(textured, close, strict=True)
        if match >= 0
    }
    for place, pair in enumerate(np.array(result["sha256"])):
        name = halves.get(pair.tobytes()) or by_look.get(place)
        if place not in verdict and name is not None:
            verdict[place] = ("contaminated", f"in {name}")
            sets.append(name)
    return verdict, sets


def _bytes_of(image: Image.Image) -> bytes:
    """The file that an image was opened from; a PNG of it when there is none."""
    if isinstance(getattr(image, "fp", None), io.BytesIO):
        return image.fp.getvalue()  # type: ignore[union-attr]
    if filename := getattr(image, "filename", ""):
        return Path(filename).read_bytes()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
