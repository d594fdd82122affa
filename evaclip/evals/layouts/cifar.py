"""CIFAR-10 and CIFAR-100 as their author distributes them, unpacked or in the archive, and as arrays."""

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.layouts.found import LabelledImages, digest_of_contents, stamp_of
from evaclip.evals.names import join_list

# The largest member of an archive that is read, in bytes; CIFAR-100's training pickle has 155 MB.
LARGEST = 400 << 20
TRAINING = tuple(f"data_batch_{number}" for number in range(1, 6))
PICKLES = {
    "cifar-10-batches-py": ("cifar-10-python.tar.gz", {"test": ("test_batch",), "train": TRAINING}, "batches.meta"),
    "cifar-100-python": ("cifar-100-python.tar.gz", {"test": ("test",), "train": ("train",)}, "meta"),
}
BINARIES = {
    "cifar-10-batches-bin": (
        "cifar-10-binary.tar.gz",
        {"test": ("test_batch",), "train": TRAINING},
        "batches.meta.txt",
    ),
    "cifar-100-binary": ("cifar-100-binary.tar.gz", {"test": ("test",), "train": ("train",)}, "fine_label_names.txt"),
}


def cifar_pickles(card: Card, data: Path, split: str) -> LabelledImages | None:
    """`cifar-10-batches-py/` or `cifar-100-python/`, or the tar.gz of either."""
    for folder, (archive, parts, about) in PICKLES.items():
        found = _contents(data, folder, archive, parts.get(split, ()), about)
        if found is None:
            continue
        files, contents = found
        batches = [_restricted_unpickle(contents[name], data / name) for name in parts[split]]
        try:
            key = b"fine_labels" if b"fine_labels" in batches[0] else b"labels"
            numbers = np.concatenate([np.asarray(batch[key], np.int64) for batch in batches])
            pixels = np.concatenate([np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches])
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{data} does not hold CIFAR batches as they were published: {error!r}") from None
        names: list[str] = []
        if about in contents:
            said = _restricted_unpickle(contents[about], data / about)
            names = [name.decode() for name in said.get(key.removesuffix(b"s") + b"_names", [])]
        return _from_planes("cifar_pickles", card, split, numbers, pixels, files, names)
    return None


def cifar_binary(card: Card, data: Path, split: str) -> LabelledImages | None:
    """`cifar-10-batches-bin/` or `cifar-100-binary/`: one label byte (coarse and fine: two), 3,072 of colour planes."""
    for folder, (archive, parts, about) in BINARIES.items():
        names = tuple(f"{name}.bin" for name in parts.get(split, ()))
        found = _contents(data, folder, archive, names, about)
        if found is None:
            continue
        files, contents = found
        width = 3074 if folder == "cifar-100-binary" else 3073
        whole = np.frombuffer(b"".join(contents[name] for name in names), np.uint8)
        if whole.size % width:
            raise InputError(f"{data}: the size of {names[0]} is no multiple of {width:,} bytes; the file is cut")
        records = whole.reshape(-1, width)
        listed = contents.get(about, b"").decode().split("\n")
        numbers, pixels = records[:, -3073].astype(np.int64), records[:, -3072:].reshape(-1, 3, 32, 32)
        return _from_planes("cifar_binary", card, split, numbers, pixels, files, [n for n in listed if n.strip()])
    return None


def arrays(card: Card, data: Path, split: str) -> LabelledImages | None:
    """An `.npz` with `x_test` and `y_test` (or `images`, `labels`): uint8 [n, height, width, 3], numbers of classes."""
    files = [data] if data.is_file() else sorted(data.glob("*.npz"))
    for file in [path for path in files if path.suffix == ".npz"]:
        try:
            with np.load(file, allow_pickle=False) as stored:
                pair = next((p for p in ((f"x_{split}", f"y_{split}"), ("images", "labels")) if p[0] in stored), None)
                if pair is None:
                    continue
                pixels, numbers = stored[pair[0]], stored[pair[1]].astype(np.int64).reshape(-1)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{file} cannot be read as arrays: {error}") from None
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(numbers):
            raise InputError(f"{file} holds {pixels.dtype} {pixels.shape}; uint8 [images, height, width, 3] is needed")
        return _from_planes("arrays", card, split, numbers, pixels.transpose(0, 3, 1, 2), [file], [])
    return None


def _contents(
    data: Path, folder: str, archive: str, names: Sequence[str], about: str
) -> tuple[list[Path], Mapping[str, bytes]] | None:
    """The files that were looked for and their bytes, from the folder or from the archive; None without them."""
    root = data / folder if (data / folder).is_dir() else data
    if names and root.is_dir() and all((root / name).is_file() for name in names):
        paths = [root / name for name in names]
        found = {path.name: path.read_bytes() for path in paths}
        return paths, found | ({about: (root / about).read_bytes()} if (root / about).is_file() else {})
    packed = data if data.name == archive else data / archive
    if not names or not packed.is_file():
        return None
    found = {}
    try:
        with tarfile.open(packed, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in (*names, about) and member.size <= LARGEST:
                    found[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{packed} is damaged: {error}") from None
    return ([packed], found) if set(names) <= set(found) else None


def _from_planes(
    layout: str,
    card: Card,
    split: str,
    numbers: np.ndarray,
    pixels: np.ndarray,
    files: Sequence[Path],
    names: Sequence[str],
) -> LabelledImages:
    """Labels are joined by the names in the set's own list; without one they count the card's classes."""
    order = np.array(join_list(card, names, files[0]) if names else range(len(card.classes)))
    if len(numbers) and not (0 <= numbers.min() and numbers.max() < len(order)):
        raise InputError(f"{files[0]} has labels up to {numbers.max()}; {card.title} has {len(card.classes)} classes")
    keys = [f"{split}-{row:06}" for row in range(len(numbers))]
    fingerprint, stamp = digest_of_contents(files), stamp_of(files)

    def open(number: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels[number].transpose(1, 2, 0)))

    return LabelledImages(layout, keys, order[numbers], open, fingerprint, stamp=stamp)


class _CifarUnpickler(pickle.Unpickler):
    """Allows numpy arrays and nothing else: a pickle can otherwise run any code."""

    ALLOWED = frozenset(
        [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
        + [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _restricted_unpickle(data: bytes, where: Path) -> Any:
    try:
        found = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, KeyError) as error:
        raise InputError(f"{where} is not a CIFAR batch and was not loaded: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{where} is not a CIFAR batch and was not loaded: it holds a {type(found).__name__}")
    return found
