"""Work that goes wrong in another process; it stands alone so that such a process starts quickly."""

import sys
from collections.abc import Iterator

from evaclip.errors import InputError


def fails(work: str, parts: list[int], process: int, processes: int) -> Iterator[int]:
    """Goes wrong in the second process."""
    if process == 1:
        if work == "sentence":
            raise InputError("the disk is on fire")
        sys.exit(7)
    yield from parts
