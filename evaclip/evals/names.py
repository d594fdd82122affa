"""Joins the names that data has for its classes to a card's classes; the order of a folder or a list is never trusted.

Kinetics' folders come with spaces or underscores, with or without parentheses; UCF-101 writes one class in two ways;
ImageNet's are WordNet ids, numbers, or lemmas. Names are equal when their letters and digits are.
"""

from collections.abc import Sequence
from pathlib import Path

from evaclip.errors import InputError, did_you_mean
from evaclip.evals.card import Card

# Share of the names of a list that must be a card's own for the rest to be taken as other spellings.
KNOWN_SHARE = 0.5


def canonical(name: str) -> str:
    """Letters and digits alone, without case: what is left of a name that survives a file system."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def folder_of(root: Path, names: Sequence[str]) -> Path:
    """The folder below `root` that bears one of a benchmark's names, else where one of the first name would lie."""
    wanted = {canonical(name) for name in names}
    below = sorted(root.iterdir()) if root.is_dir() else []
    return next((path for path in below if path.is_dir() and canonical(path.name) in wanted), root / names[0])


def join_folders(card: Card, names: Sequence[str]) -> list[int | None] | None:
    """The class of each folder name, None for a folder that the benchmark leaves out; None when no name is known.

    Raises InputError for a name that is no class beside others that are, and for one that two classes share.
    """
    numbered = _numbered(card, names)
    if numbered is not None:
        return list(numbered)
    known = max(_tables(card), key=lambda table: sum(canonical(name) in table for name in names))
    if not any(canonical(name) in known for name in names):
        return None
    left_out = {canonical(name) for name in card.other_labels}
    joined: list[int | None] = []
    for name in names:
        found = known.get(canonical(name), [])
        if len(found) > 1:
            raise InputError(f"the folder {name!r} could be any of {len(found)} classes of {card.title} of that name")
        if not found and canonical(name) not in left_out:
            raise InputError(f"{name!r} is no class of {card.title}; {did_you_mean(name, card.data_labels)}")
        joined.append(found[0] if found else None)
    return joined


def join_list(card: Card, names: Sequence[str], where: object) -> list[int]:
    """The class of each number in a file that lists the names of its numbers.

    A name that two classes share is taken in order. Some sets spell a few classes in words of their own; those are
    taken to stand where the card has them, provided that at least half of the names are known and all of these stand
    there too. Raises InputError otherwise.
    """
    numbered = _numbered(card, names)
    if numbered is not None:
        return numbered
    best: list[int | None] = []
    for table in _tables(card):
        left = {name: list(numbers) for name, numbers in table.items()}
        joined = [left[key].pop(0) if left.get(key := canonical(name)) else None for name in names]
        if sum(number is not None for number in joined) > sum(number is not None for number in best):
            best = joined
    strange = [name for name, number in zip(names, best or [None] * len(names), strict=True) if number is None]
    if not strange:
        return [number for number in best if number is not None]
    in_place = all(number in (None, place) for place, number in enumerate(best))
    if len(names) == len(card.classes) and in_place and len(strange) <= (1 - KNOWN_SHARE) * len(names):
        return list(range(len(names)))
    raise InputError(
        f"{where}: {strange[0]!r} is no class of {card.title}; {did_you_mean(strange[0], card.data_labels)}"
    )


def _tables(card: Card) -> list[dict[str, list[int]]]:
    """For each of the card's ways to name its classes: canonical name to class numbers."""
    tables = []
    for column in (card.data_labels, card.classes, card.also):
        table: dict[str, list[int]] = {}
        for number, name in enumerate(column):
            table.setdefault(canonical(name), []).append(number)
        tables.append(table)
    return tables


def _numbered(card: Card, names: Sequence[str]) -> list[int] | None:
    """Names that are numbers, which ImageNet-V2's folders are: they count the card's classes from 0."""
    if not names or not all(name.isascii() and name.isdecimal() for name in names):
        return None
    if any(canonical(name) in _tables(card)[0] for name in names):
        return None
    numbers = [int(name) for name in names]
    if max(numbers) >= len(card.classes):
        raise InputError(
            f"classes are numbered {min(numbers)} to {max(numbers)}, but those of {card.title} are 0 to "
            f"{len(card.classes) - 1}; whose numbers these are cannot be known"
        )
    return numbers
