"""What every reader of a layout returns: images or videos with the card's labels, and what they can be known by."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from evaclip.evals.layouts.tree import File
from evaclip.evals.layouts.video import sampled_frames

# Files up to this size are hashed whole, larger ones by their size, first and last part.
HASHED_WHOLE = 512 << 20
HASHED_PART = 1 << 20


@dataclass(frozen=True)
class LabelledImages:
    """A data set that is ready to be scored."""

    layout: str
    """Which reader recognised it."""
    keys: Sequence[str]
    """A name for each image, unique and stable."""
    labels: np.ndarray
    """int64: the card's class of each image."""
    open: Callable[[int], Image.Image]
    """The image with a given number; of a video, its middle frame."""
    fingerprint: str
    """Hash of keys, labels and the files' contents or sizes."""
    listed: np.ndarray | None = None
    """int64: how many of each class the data's own list names, where it has one; more than there are, when some are
    missing."""
    video: Callable[[int], File] | None = None
    """The file of a video with a given number, where the data is videos."""
    frames: tuple[int, str] | None = None
    """How many frames of each video were taken beforehand, and by which rule, where that is known."""
    stacks: Callable[[int], list[Image.Image]] | None = None
    """All frames of a video with a given number, where they were taken beforehand."""
    stamp: str = ""
    """Hash of the files' times: changes when a file is written again with the same size."""
    notes: tuple[str, ...] = ()
    """What is not as the published scores had it."""

    def __len__(self) -> int:
        return len(self.keys)

    def pictures(self, number: int, frames: int = 1, sampling: str = "centre") -> list[Image.Image]:
        """The image, or the frames of a video. Raises OSError or ValueError for a damaged one."""
        if self.video is not None:
            return sampled_frames(self.video(number), sampling, frames)
        return self.stacks(number) if self.stacks is not None else [self.open(number)]


def of_files(
    layout: str, files: Sequence[File], labels: Sequence[int], open: Callable[[int], Image.Image], **more: object
) -> LabelledImages:
    """A data set of one file for each image."""
    keys = [file.name for file in files]
    fingerprint = digest(f"{key}\t{label}\t{file.size}" for key, label, file in zip(keys, labels, files, strict=True))
    stamp = digest(f"{file.time}" for file in files)
    return LabelledImages(layout, keys, np.array(labels, np.int64), open, fingerprint, stamp=stamp, **more)  # type: ignore[arg-type]


def digest(lines: object) -> str:
    """SHA-256 of lines of text."""
    found = hashlib.sha256()
    for line in lines:  # type: ignore[attr-defined]
        found.update(f"{line}\n".encode())
    return found.hexdigest()


def digest_of_contents(files: Sequence[Path]) -> str:
    """SHA-256 of files' contents; of a large file its size and both ends, since reading it takes as long as scoring."""
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            if size <= HASHED_WHOLE:
                found.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            found.update(f"{size}".encode() + stream.read(HASHED_PART))
            stream.seek(-HASHED_PART, 2)
            found.update(stream.read())
    return found.hexdigest()


def stamp_of(files: Sequence[Path]) -> str:
    """Hash of the times at which files were written."""
    return digest(str(file.stat().st_mtime_ns) for file in files)
