"""Images with several captions each, as retrieval benchmarks lie on people's disks, recognised by content.

Flickr30K and COCO are scored on the test split of Karpathy (arXiv 1412.2306), which comes in many forms; each reader
takes one. All captions are kept: COCO's 5,000 images have 25,010, although much code counts five each.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.dataset as arrow
from PIL import Image

from evaclip.data.tar import DamagedTarError, members
from evaclip.errors import InputError
from evaclip.evals.layouts.found import stamp_of
from evaclip.evals.layouts.tree import opened

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
# Folders below the data's own in which the images of a list may lie.
PLACES = ("", "images", "Images", "flickr30k-images", "flickr30k_images", "val2014", "images/val2014")


@dataclass(frozen=True)
class CaptionedImages:
    """A retrieval benchmark that is ready to be scored."""

    layout: str
    """Which reader recognised it."""
    keys: Sequence[str]
    """A name for each image, unique and stable."""
    captions: Sequence[str]
    """All captions, those of an image next to each other."""
    owners: np.ndarray
    """int64: the image of each caption."""
    open: Callable[[int], Image.Image]
    """The image with a given number."""
    fingerprint: str
    """Hash of the keys, the captions and the sizes of the image files."""
    stamp: str = ""
    """Hash of the files' times: changes when a file is written again with the same size."""

    def __len__(self) -> int:
        return len(self.keys)

    def pictures(self, number: int, frames: int = 1, sampling: str = "none") -> list[Image.Image]:
        """The image. Raises OSError or ValueError for a damaged one."""
        return [self.open(number)]


def find_captioned(name: str, folder: Path) -> CaptionedImages | None:
    """The test images of a benchmark (`flickr30k`, `coco`) in a folder, None in none of the known layouts.

    Raises InputError for a list that is damaged, or names no image that is there.
    """
    for reader in READERS.values():
        try:
            found = reader(name, folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedTarError) as error:
            raise InputError(f"{folder} looks like the layout {reader.__name__}, but: {error!r}") from None
        if found is not None:
            return found
    return None


def karpathy_json(name: str, folder: Path) -> CaptionedImages | None:
    """`dataset_flickr30k.json`, `dataset_coco.json` or `dataset.json`, and the images."""
    file = _first(folder, f"dataset_{name}.json", "dataset.json")
    if file is None:
        return None
    told = [entry for entry in json.loads(file.read_text())["images"] if entry["split"] == "test"]
    captions = {
        str(PurePosixPath(entry.get("filepath", ""), entry["filename"])): [said["raw"] for said in entry["sentences"]]
        for entry in told
    }
    return _of_files("karpathy_json", folder, captions, file)


def clip_benchmark_list(name: str, folder: Path) -> CaptionedImages | None:
    """`flickr30k_test_karpathy.txt`, CLIP_benchmark's lines of `image.jpg,caption` below a heading."""
    file = _first(folder, f"{name}_test_karpathy.txt")
    if file is None:
        return None
    captions: dict[str, list[str]] = {}
    for line in file.read_text().splitlines()[1:]:
        if line.strip():
            image, comma, caption = line.partition(".jpg,")
            if not comma:
                raise ValueError(f"the line {line[:60]!r} of {file.name} has no image")
            captions.setdefault(f"{image}.jpg", []).append(caption)
    return _of_files("clip_benchmark_list", folder, captions, file)


def coco_captions(name: str, folder: Path) -> CaptionedImages | None:
    """COCO's own JSON: `coco_test_karpathy.json`, or `captions_val2014.json` and a list of ids, one a line."""
    file = _first(folder, f"{name}_test_karpathy.json")
    wanted: set[int] | None = None
    if file is None:
        file = _first(folder, "captions_val2014.json")
        ids = _first(folder, "coco_test_ids.txt", "karpathy_test_ids.txt", "test_ids.txt")
        if file is None:
            return None
        if ids is None:
            raise ValueError(
                f"{file.name} holds the whole of val2014; coco_test_ids.txt, ids of the test split, is needed"
            )
        wanted = {int(line) for line in ids.read_text().split()}
    told = json.loads(file.read_text())
    files = {entry["id"]: entry["file_name"] for entry in told["images"] if wanted is None or entry["id"] in wanted}
    captions: dict[str, list[str]] = {}
    for entry in told["annotations"]:
        if entry["image_id"] in files:
            captions.setdefault(files[entry["image_id"]], []).append(entry["caption"])
    return _of_files("coco_captions", folder, captions, file)


def flickr_tokens(name: str, folder: Path) -> CaptionedImages | None:
    """`results_20130124.token`, lines of `image.jpg#number<tab>caption`, and a list of the test images."""
    file = _first(folder, "results_20130124.token")
    if file is None:
        return None
    split = _first(folder, f"{name}_test.txt", "test.txt")
    if split is None:
        raise ValueError(f"{file.name} holds all splits; {name}_test.txt, the names of the test images, is needed")
    wanted = {Path(line).stem for line in split.read_text().split()}
    captions: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        image, _, caption = line.partition("\t")
        image = image.rpartition("#")[0]
        if Path(image).stem in wanted:
            captions.setdefault(image, []).append(caption)
    return _of_files("flickr_tokens", folder, captions, file)


def huggingface_parquet(name: str, folder: Path) -> CaptionedImages | None:
    """`[data/]*.parquet`: `image` as {bytes, path}, a list of strings, and, where all splits are in it, `split`."""
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    files = [file for file in files if "test" in file.name] or files
    if not files:
        return None
    stored = arrow.dataset([str(file) for file in files])
    column = next((c for c in ("caption", "captions", "sentences", "raw") if c in stored.schema.names), None)
    if column is None or "image" not in stored.schema.names:
        raise ValueError(f"the columns are {', '.join(stored.schema.names)}; image and caption are needed")
    only = arrow.field("split") == "test" if "split" in stored.schema.names else None
    rows = stored.to_table(columns=["image", column], filter=only).to_pylist()
    data = [row["image"]["bytes"] for row in rows]
    keys = [row["image"].get("path") or f"test-{number:06}" for number, row in enumerate(rows)]
    if len(set(keys)) != len(keys):
        keys = [f"test-{number:06}" for number in range(len(rows))]
    return _captioned(
        "huggingface_parquet", keys, [row[column] for row in rows], lambda i: data[i], map(len, data),
        stamp_of(files),
    )  # fmt: skip


def webdataset_tars(name: str, folder: Path) -> CaptionedImages | None:
    """`[test/]*.tar` as CLIP_benchmark writes them: an image and a `.txt` with a caption a line."""
    files = sorted([*folder.glob("test/*.tar"), *folder.glob("*.tar")], key=lambda file: (len(file.name), file.name))
    if not files:
        return None
    images: dict[str, tuple[Path, int, int]] = {}
    captions: dict[str, list[str]] = {}
    for file in files:
        for member in members(file):
            key, _, ending = member.name.rpartition(".")
            if f".{ending.lower()}" in IMAGES:
                images[key] = (file, member.offset, member.size)
            elif ending == "txt":
                captions[key] = _part(file, member.offset, member.size).decode().splitlines()
    keys = [key for key in images if key in captions]
    return _captioned(
        "webdataset_tars", keys, [captions[key] for key in keys], lambda i: _part(*images[keys[i]]),
        [images[key][2] for key in keys], stamp_of(files),
    )  # fmt: skip


READERS: dict[str, Callable[[str, Path], CaptionedImages | None]] = {
    reader.__name__: reader
    for reader in (
        karpathy_json, clip_benchmark_list, coco_captions, flickr_tokens, huggingface_parquet, webdataset_tars
    )
}  # fmt: skip


def _first(folder: Path, *names: str) -> Path | None:
    """The first of the files that is in the folder, or in one where annotations usually lie."""
    places = [folder / place / name for name in names for place in ("", "annotations", "karpathy")]
    return next((path for path in places if path.is_file()), None)


def _of_files(layout: str, folder: Path, captions: dict[str, list[str]], source: Path) -> CaptionedImages:
    """Images that are files below the folder, by the names that a list has for them; missing ones are left out."""
    for name in captions:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{source.name} names {name!r}, which is outside of the folder")
    found = {}
    for name in captions:
        places = [folder / place / part for place in PLACES for part in (name, PurePosixPath(name).name)]
        path = next((path for path in places if path.is_file()), None)
        if path is not None:
            found[name] = path
    if not found:
        raise ValueError(f"none of the {len(captions):,} images that {source.name} names is below {folder}")
    keys, paths = list(found), list(found.values())
    sizes = [path.stat().st_size for path in paths]
    told = [captions[key] for key in keys]
    return _captioned(layout, keys, told, lambda i: paths[i].read_bytes(), sizes, stamp_of(paths))


def _captioned(
    layout: str, keys: list[str], captions: list[Any], data: Callable[[int], bytes], sizes: Iterable[int], stamp: str
) -> CaptionedImages:
    """`captions`: a list for each image. `data`: the file of an image."""
    cleaned = [[said.strip() for said in own if said.strip()] for own in captions]
    bare = next((key for key, own in zip(keys, cleaned, strict=True) if not own), None)
    if bare is not None:
        raise ValueError(f"the image {bare} has no caption")
    digest = hashlib.sha256()
    for key, own, size in zip(keys, cleaned, sizes, strict=True):
        digest.update(json.dumps([key, own, size]).encode())
    owners = np.repeat(np.arange(len(keys)), [len(own) for own in cleaned]).astype(np.int64)
    told = [said for own in cleaned for said in own]
    return CaptionedImages(layout, keys, told, owners, lambda i: opened(data(i)), digest.hexdigest(), stamp)


def _part(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)
