"""Frames that `evaclip frames` took: tar files of lossless WebP, and beside each what it holds.

frames.json     the benchmark, the rule, the number of shards, how many videos the data lists
000000.tar      members 00000012.0.webp, 00000012.1.webp: the frames of video 12
000000.json     its videos in order: key, label, and how many frames there are or why there are none
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.layouts.found import LabelledImages, of_files
from evaclip.evals.layouts.tree import File, opened, tree_of_tar
from evaclip.evals.names import join_list

ABOUT = "frames.json"


def frame_cache(card: Card, data: Path, split: str) -> LabelledImages | None:
    """The videos whose frames lie in a folder that `evaclip frames` wrote."""
    if not (data / ABOUT).is_file():
        return None
    about = read_json(data / ABOUT)
    if about.get("card") != card.name or about.get("split") != split:
        raise InputError(f"{data} holds frames of {about.get('card')}, split {about.get('split')}, not of {card.name}")
    stacks: list[list[File]] = []
    keys, labels, without = [], [], 0
    for shard in range(int(about["shards"])):
        listing, tar = data / f"{shard:06}.json", data / f"{shard:06}.tar"
        if not (listing.is_file() and tar.is_file()):
            raise InputError(f"the frames in {data} are not complete; run `evaclip frames` on it again")
        members = {file.name: file for file in tree_of_tar(tar).files()}
        for video in read_json(listing)["videos"]:
            if not video.get("frames"):
                without += 1
                continue
            stacks.append([members[f"{video['number']:08}.{frame}.webp"] for frame in range(video["frames"])])
            keys.append(video["key"])
            labels.append(video["label"])
    distinct = sorted(set(labels))
    classes = dict(zip(distinct, join_list(card, distinct, data / ABOUT), strict=True))
    numbers = [classes[label] for label in labels]
    middles = [stack[len(stack) // 2] for stack in stacks]

    def frames(number: int) -> list[Image.Image]:
        return [opened(file.read()) for file in stacks[number]]

    notes = (f"{without:,} videos could not be decoded when frames were taken",) if without else ()
    found = of_files("frame_cache", middles, numbers, lambda i: opened(middles[i].read()), notes=notes)
    return LabelledImages(
        found.layout, keys, found.labels, found.open, found.fingerprint, np.array(about["listed"], np.int64), None,
        (int(about["frames"]), str(about["sampling"])), frames, found.stamp, found.notes,
    )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold an object")
    return found
