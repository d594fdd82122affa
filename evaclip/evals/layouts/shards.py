"""Webdataset shards as CLIP_benchmark has them: `<split>/nshards.txt`, `<split>/<n>.tar`, `classnames.txt`."""

from pathlib import Path

from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.layouts.found import LabelledImages, of_files
from evaclip.evals.layouts.tree import IMAGE_SUFFIXES, File, opened, tree_of_tar
from evaclip.evals.names import join_list


def webdataset(card: Card, data: Path, split: str) -> LabelledImages | None:
    """Each sample is an image and a `.cls` or `.txt` file with the class's number.

    `classnames.txt` says what the numbers mean; without it they count the card's classes. Raises InputError for a
    shard that is missing or cut.
    """
    for folder in (data / split, data):
        if (folder / "nshards.txt").is_file():
            break
    else:
        return None
    try:
        count = int((folder / "nshards.txt").read_text())
    except ValueError:
        raise InputError(f"{folder / 'nshards.txt'} does not hold the number of shards") from None
    files: list[File] = []
    numbers: list[int] = []
    for shard in range(count):
        path = folder / f"{shard}.tar"
        if not path.is_file():
            raise InputError(f"{folder} should hold {count} shards; {path.name} is missing")
        for image, label in _samples(path):
            files.append(File(f"{shard}/{image.name}", path, image.size, image.time, image.offset))
            numbers.append(label)
    order, note = list(range(len(card.classes))), ("labels are numbers without names, taken in the card's order",)
    for names in (data / "classnames.txt", folder / "classnames.txt"):
        if names.is_file():
            order, note = join_list(card, names.read_text().splitlines(), names), ()
    if numbers and not (0 <= min(numbers) and max(numbers) < len(order)):
        raise InputError(f"{folder} has labels up to {max(numbers)}; {card.title} has {len(card.classes)} classes")
    labels = [order[number] for number in numbers]
    return of_files("webdataset", files, labels, lambda i: opened(files[i].read()), notes=note)


def _samples(path: Path) -> list[tuple[File, int]]:
    """Image and label of each sample of a shard."""
    tree = tree_of_tar(path)
    by_key: dict[str, dict[str, File]] = {}
    for files in (tree.packed or {}).values():
        for file in files:
            base, _, kind = file.name.rpartition("/")[2].partition(".")
            by_key.setdefault(f"{file.name.rpartition('/')[0]}/{base}", {})[f".{kind.lower()}"] = file
    found = []
    for key, parts in sorted(by_key.items()):
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
        label = parts.get(".cls") or parts.get(".txt")
        if image is None or label is None:
            raise InputError(f"{path}: the sample {key} has {', '.join(sorted(parts))}, not an image and a .cls")
        try:
            found.append((image, int(label.read())))
        except ValueError:
            raise InputError(f"{path}: {label.name} does not hold the number of a class") from None
    return found
