"""ImageNet's validation images as they come from the tar: one flat folder, with the labels in a file beside it.

Four files are in use, and none of them means the same as another: the development kit's numbers count in the order of
its own `meta.mat`, Caffe's `val.txt` counts sorted WordNet ids from 0, Kaggle's and TensorFlow's hold WordNet ids.
Names of files may carry the WordNet id too.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.layouts.found import LabelledImages, of_files
from evaclip.evals.layouts.tree import File, Tree, opened, places

NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_(n\d{8}))?$", re.IGNORECASE)


def flat_imagenet(card: Card, data: Path, split: str) -> LabelledImages | None:
    """`ILSVRC2012_val_00000001[_n01751748].JPEG` without class folders, and one of the label files."""
    for tree in places(card, data, split):
        files = [file for file in _candidates(tree) if NAME.match(file.stem)]
        if files:
            return _labelled(card, data, files, tree.packed is not None)
    return None


def validation_number(key: str) -> int | None:
    """Which of the 50,000 an image is, by its name; None when the name does not say."""
    found = NAME.match(Path(key).stem)
    return int(found[1]) if found else None


def _candidates(tree: Tree) -> list[File]:
    """The files of a place, unless its first ones show that it is something else."""
    return tree.files() if tree.packed is not None or any(NAME.match(p.stem) for p in tree.root.iterdir()) else []


def _labelled(card: Card, data: Path, files: list[File], packed: bool) -> LabelledImages:
    classes = {name: number for number, name in enumerate(card.data_labels)}
    said = {number: wnid.lower() for file in files for number, wnid in [_parts(file)] if wnid}
    layout = "flat_imagenet, WordNet ids in the file names"
    if len(said) < len(files):
        name, said = _label_file(data, list(card.data_labels))
        layout = f"flat_imagenet with {name}"
    labels = []
    for file in files:
        wnid = said.get(_parts(file)[0])
        if wnid not in classes:
            raise InputError(f"{file.name} has no label of {card.title} in {layout}: {wnid}")
        labels.append(classes[wnid])
    return of_files(layout + (" in a tar" if packed else ""), files, labels, lambda i: opened(files[i].read()))


def _parts(file: File) -> tuple[int, str | None]:
    found = NAME.match(file.stem)
    assert found is not None
    return int(found[1]), found[2]


def _label_file(data: Path, wnids: list[str]) -> tuple[str, Mapping[int, str]]:
    """The first label file near the images: its name, and the WordNet id of each image number."""
    for folder in _near(data):
        for name, read in LABEL_FILES.items():
            if (folder / name).is_file():
                try:
                    return name, read(folder / name, wnids)
                except (ValueError, IndexError, KeyError, OSError) as error:
                    raise InputError(f"{folder / name} is not the label file of that name: {error}") from None
    raise InputError(
        f"the images in {data} lie flat and no label file is near; put one of {', '.join(LABEL_FILES)} beside them"
    )


def _near(data: Path) -> Iterator[Path]:
    """The data's folder, the one above, and what lies one or two levels below them."""
    start = data.parent if data.is_file() else data
    for folder in (start, start.parent):
        yield folder
        below = [
            path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(("train", "n0"))
        ]
        yield from below
        yield from (path / "data" for path in below if (path / "data").is_dir())


def _kaggle(path: Path, wnids: list[str]) -> dict[int, str]:
    with path.open(newline="") as stream:
        rows = csv.DictReader(stream)
        return {int(row["ImageId"].rpartition("_")[2]): row["PredictionString"].split()[0] for row in rows}


def _caffe(path: Path, wnids: list[str]) -> dict[int, str]:
    """Numbers from 0 in the order of sorted WordNet ids."""
    pairs = [line.split() for line in path.read_text().splitlines() if line.strip()]
    numbers = [int(number) for _, number in pairs]
    if min(numbers) < 0 or max(numbers) >= len(wnids):
        raise ValueError(f"its classes are numbered {min(numbers)} to {max(numbers)}, not 0 to {len(wnids) - 1}")
    names = [NAME.match(Path(name).stem) for name, _ in pairs]
    return {int(name[1]): sorted(wnids)[number] for name, number in zip(names, numbers, strict=True) if name}


def _tensorflow(path: Path, wnids: list[str]) -> dict[int, str]:
    return dict(enumerate(path.read_text().split(), 1))


def _devkit(path: Path, wnids: list[str]) -> dict[int, str]:
    """The development kit's ids, which mean nothing without the kit's own list of them."""
    tables: dict[str, Callable[[Path], dict[int, str]]] = {"meta.mat": _meta_mat, "map_clsloc.txt": _map_clsloc}
    for folder in (path.parent, path.parent / "data"):
        for name, read in tables.items():
            if (folder / name).is_file():
                ids = read(folder / name)
                return {place: ids[int(number)] for place, number in enumerate(path.read_text().split(), 1)}
    raise InputError(
        f"{path} numbers its classes as the development kit does, and the kit's meta.mat (or map_clsloc.txt), which "
        "says how, is not beside it"
    )


def _meta_mat(path: Path) -> dict[int, str]:
    from scipy.io import loadmat

    synsets: Any = np.atleast_1d(loadmat(path, squeeze_me=True)["synsets"])
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}


def _map_clsloc(path: Path) -> dict[int, str]:
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return {int(row[1]): row[0] for row in rows}


LABEL_FILES: dict[str, Callable[[Path, list[str]], Mapping[int, str]]] = {
    "LOC_val_solution.csv": _kaggle,
    "val.txt": _caffe,
    "imagenet_2012_validation_synset_labels.txt": _tensorflow,
    "ILSVRC2012_validation_ground_truth.txt": _devkit,
}
