"""Frames of a video: one in the middle, or several evenly spaced, by one of three rules.

`vissl` takes the frame whose number, from 0, is n // 2 + 1, n being what the container says; that is what the published
EVA-CLIP scores did, whose rule counts one too far. A container that says 0, or more than there is, has no such frame,
and the video is left out. `centre` takes n // 2 of the frames that can be decoded. `uniform` takes the middles of k
equal parts.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from evaclip.errors import InputError
from evaclip.evals.layouts.tree import File

SAMPLINGS = ("vissl", "centre", "uniform")
MAX_PIXELS = 40_000_000


class BadVideoError(OSError):
    """A video without the frames that were asked for."""


def sampled_frames(file: File, sampling: str, count: int = 1) -> list[Image.Image]:
    """`count` frames of a video. Raises BadVideoError for one that cannot be decoded or has no such frame."""
    if sampling not in SAMPLINGS or (count != 1 and sampling != "uniform"):
        raise InputError(f"{count} frames cannot be sampled by {sampling!r}; known are {', '.join(SAMPLINGS)}")
    av = _av()
    try:
        if sampling == "vissl":
            said = _said_count(av, file)
            return _at(av, file, [said // 2 + 1], f"its container says {said} frames")
        total = _said_count(av, file) or _decoded_count(av, file)
        try:
            return _at(av, file, places(total, sampling, count), f"{total} frames")
        except BadVideoError:  # the container says more than there is: count those that can be decoded
            total = _decoded_count(av, file)
            return _at(av, file, places(total, sampling, count), f"{total} frames")
    except (av.FFmpegError, ValueError) as error:
        raise BadVideoError(f"it cannot be decoded: {error}") from None


def places(total: int, sampling: str, count: int) -> list[int]:
    """Numbers, from 0, of the frames to take of `total`."""
    if sampling == "centre":
        return [total // 2]
    return [int((part + 0.5) * total / count) for part in range(count)]


def middle_frame(file: File) -> Image.Image:
    """The true middle, to look at."""
    return sampled_frames(file, "centre")[0]


def _said_count(av: Any, file: File) -> int:
    with _container(av, file) as container:
        return _stream(container).frames


def _decoded_count(av: Any, file: File) -> int:
    with _container(av, file) as container:
        return sum(1 for _ in _decoded(av, container))


def _at(av: Any, file: File, wanted: Sequence[int], said: str) -> list[Image.Image]:
    """The frames with these numbers, in ascending order; one may be wanted several times."""
    found: list[Image.Image] = []
    with _container(av, file) as container:
        for number, frame in enumerate(_decoded(av, container)):
            if number in wanted:
                found += [frame.to_image()] * wanted.count(number)  # type: ignore[attr-defined]
            if number >= wanted[-1]:
                break
    if len(found) < len(wanted) or not found:
        raise BadVideoError(f"it has no frame {wanted[-1]} ({said})")
    return found


def _decoded(av: Any, container: Any) -> Iterator[Any]:
    """Frames up to the end, or up to where the file is damaged."""
    frames = container.decode(_stream(container))
    while True:
        try:
            frame = next(frames)
        except (StopIteration, av.FFmpegError):
            return
        yield frame


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise BadVideoError("it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise BadVideoError(f"its frames have more than {MAX_PIXELS:,} pixels")
    return stream


def _container(av: Any, file: File) -> Any:
    # A playlist that calls itself a video may name other files and addresses; only this file is read.
    source = io.BytesIO(file.read()) if file.offset is not None else f"file:{file.path}"
    return av.open(source, metadata_errors="replace", options={"protocol_whitelist": "file"})


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise InputError("videos are decoded by PyAV: pip install 'evaclip[video]'") from None
    av.logging.set_level(av.logging.PANIC)
    return av
