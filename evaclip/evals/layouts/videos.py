"""UCF-101 with its split lists, and Kinetics with its annotations: which videos belong, and which are missing."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.layouts.folders import of_videos
from evaclip.evals.layouts.found import LabelledImages
from evaclip.evals.layouts.tree import IMAGE_SUFFIXES, VIDEO_SUFFIXES, File, places
from evaclip.evals.names import canonical, join_list

# A YouTube id has eleven characters and may begin with a dash or hold underscores, so it is cut, not split, off.
YOUTUBE_ID = 11
CLIP = re.compile(r"_(\d{6})_(\d{6})$")


def ucf_lists(card: Card, data: Path, split: str) -> LabelledImages | None:
    """`UCF-101/<Class>/v_<Class>_g01_c01.avi`, `ucfTrainTestlist/testlist01.txt`; `split` "2" or "1,2,3" for others."""
    folder = next((path for path in (data / "ucfTrainTestlist", data) if any(path.glob("testlist0*.txt"))), None)
    if folder is None:
        return None
    wanted: list[str] = []
    for number in ["1"] if split == "test" else split.split(","):
        path = folder / f"{'trainlist' if split == 'train' else 'testlist'}0{'1' if split == 'train' else number}.txt"
        if not path.is_file():
            raise InputError(f"{folder} has no {path.name}")
        wanted += [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    classes = _joined(card, [PurePosixPath(name).parent.name for name in wanted], folder)
    at = {canonical(file.stem): file for file in _files(card, data)}
    pairs = [
        (at[key], number)
        for name, number in zip(wanted, classes, strict=True)
        if (key := canonical(PurePosixPath(name).stem)) in at
    ]
    return of_videos("ucf_lists", [file for file, _ in pairs], [number for _, number in pairs], _count(card, classes))


def kinetics_csv(card: Card, data: Path, split: str) -> LabelledImages | None:
    """`annotations/val.csv` (label, youtube_id, time_start, ...) and `[val/][<label>/]<id>_<start>_<end>.mp4`."""
    path = _annotations(card, data, "*.csv")
    if path is None:
        return None
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("label") and row.get("youtube_id")]
    if not rows:
        raise InputError(f"{path} has no rows with label and youtube_id; Kinetics' annotations are needed")
    classes = _joined(card, [row["label"] for row in rows], path)
    by_clip, by_id = {}, {}
    for row, number in zip(rows, classes, strict=True):
        by_clip[row["youtube_id"], int(float(row.get("time_start") or 0))] = number
        by_id[row["youtube_id"]] = number
    files, labels, seen = [], [], set()
    for file in _files(card, data):
        clip = CLIP.search(file.stem)
        identity = file.stem[: clip.start()] if clip else file.stem[:YOUTUBE_ID]
        key = (identity, int(clip[1])) if clip and (identity, int(clip[1])) in by_clip else identity
        number = by_clip.get(key) if isinstance(key, tuple) else by_id.get(key)
        if number is not None and key not in seen:
            seen.add(key)
            files.append(file)
            labels.append(number)
    return of_videos(f"kinetics_csv with {path.name}", files, labels, _count(card, by_clip.values()))


def video_list(card: Card, data: Path, split: str) -> LabelledImages | None:
    """mmaction's `*val_list*.txt`: a path and the number of the class in the order of sorted labels, on each line."""
    path = _annotations(card, data, "*val*list*.txt")
    if path is None:
        return None
    ordered = sorted(range(len(card.classes)), key=lambda number: card.data_labels[number])
    at = {(PurePosixPath(file.name).stem): file for file in _files(card, data)}
    files, labels, listed = [], [], []
    for line in path.read_text().splitlines():
        name, _, number = line.strip().rpartition(" ")
        if not name:
            continue
        if not number.isdecimal() or int(number) >= len(ordered):
            raise InputError(f"{path}: {line.strip()!r} does not end in a number of a class of {card.title}")
        listed.append(ordered[int(number)])
        file = at.get(PurePosixPath(name).stem)
        if file is not None:
            files.append(file)
            labels.append(ordered[int(number)])
    return of_videos(f"video_list with {path.name}", files, labels, _count(card, listed))


def _annotations(card: Card, data: Path, pattern: str) -> Path | None:
    """The list of the validation part in the data's folder or in `annotations/`."""
    if not data.is_dir():
        return None
    for folder in (data, data / "annotations", data.parent / "annotations", data.parent):
        found = [p for p in sorted(folder.glob(pattern)) if "val" in p.stem.lower() and "train" not in p.stem.lower()]
        if found:
            return found[0]
    return None


def _count(card: Card, classes: Iterable[int]) -> np.ndarray:
    """How many there are of each class."""
    return np.bincount(np.fromiter(classes, np.int64), minlength=len(card.classes))


def _joined(card: Card, labels: Sequence[str], where: Path) -> list[int]:
    """The class of each label, by name."""
    names = sorted(set(labels))
    found = dict(zip(names, join_list(card, names, where), strict=True))
    return [found[label] for label in labels]


def _files(card: Card, data: Path) -> Iterator[File]:
    """Videos (or frames, where there are no videos) in the first place that has any, in class folders or flat."""
    for tree in places(card, data, "test"):
        inside = [file for folder in ("", *tree.folders()) for file in tree.files(folder)]
        for suffixes in (VIDEO_SUFFIXES, IMAGE_SUFFIXES):
            files = [file for file in inside if file.suffix in suffixes]
            if files:
                yield from files
                return
