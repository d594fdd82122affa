"""Takes the frames of a video benchmark once: `evaclip frames`.

Decoding a ten-second clip takes a third of a second, and seeking barely helps, since clips hold one key frame; all of
Kinetics-400's validation part is 1.5 hours of a core. Frames are kept without loss, as WebP in tar files of 256 videos;
a tar is there whole or not at all, so an interrupted run goes on where it was.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from evaclip.errors import InputError
from evaclip.evals.card import Card, load_card
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.layouts.frames import ABOUT, read_json
from evaclip.evals.protocol import Protocol, protocol_named
from evaclip.log import progress

VIDEOS_IN_A_SHARD = 256


@dataclass(frozen=True, kw_only=True)
class FramesCommand:
    """Take the frames of a video benchmark once; `evaclip zeroshot --data OUT` then scores without decoding videos."""

    dataset: str
    """Name of a video benchmark (`ucf101`, `kinetics400`), or path of a card."""
    data: Path
    """Folder of the videos."""
    out: Path
    """Folder for the frames; an interrupted run goes on in it."""
    protocol: Literal["eva", "openai", "testbed", "pe"] = "eva"
    """Which frames: `eva` vissl's, `openai` the middle one, `pe` eight."""
    splits: str = "1"
    """Of UCF-101, the official test splits: 1, or 1,2,3."""
    workers: int = 2
    """Processes that decode."""


def run_frames(command: FramesCommand) -> None:
    """Write the frames, and say how many videos had none."""
    card = load_card(command.dataset)
    if card.media != "video":
        raise InputError(f"{card.title} holds images, not videos; it is scored as it is")
    split = command.splits if card.split_counts and command.splits != "1" else "test"
    videos = find_images(card, command.data, split)
    if videos.video is None:
        raise InputError(f"{command.data} holds frames already (layout {videos.layout})")
    protocol = protocol_named(command.protocol)
    shards = -(-len(videos) // VIDEOS_IN_A_SHARD)
    listed = videos.listed if videos.listed is not None else np.bincount(videos.labels, minlength=len(card.classes))
    about = {
        "card": card.name, "split": split, "sampling": protocol.sampling, "frames": protocol.frames,
        "shards": shards, "listed": listed.tolist(), "videos": videos.fingerprint,
    }  # fmt: skip
    _claim(command.out, about)
    missing = [shard for shard in range(shards) if not (command.out / f"{shard:06}.json").is_file()]
    workers = DataLoader(
        _Shards(card, videos, command.out, protocol, missing),
        batch_size=None,
        num_workers=command.workers,
        multiprocessing_context="fork" if command.workers else None,
    )
    for _ in progress(workers, len(missing), f"taking frames of {card.title}"):
        pass
    lists = [read_json(command.out / f"{shard:06}.json")["videos"] for shard in range(shards)]
    bad = [video for part in lists for video in part if not video["frames"]]
    print(f"{card.title}: frames of {len(videos) - len(bad):,} videos in {command.out}")
    for video in bad[:10]:
        print(f"without frames: {video['key']}: {video['reason']}")
    if len(bad) > 10:
        print(f"and {len(bad) - 10:,} more; each is listed in the JSON files with its reason")


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Begin, or go on, in a folder. Raises InputError when it holds something else."""
    path = out / ABOUT
    if path.is_file():
        if read_json(path) != about:
            raise InputError(f"{out} holds frames of other videos or by another rule; name another --out")
        return
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no frames; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(about) + "\n")
    beside.replace(path)


@dataclass(frozen=True)
class _Shards(Dataset[int]):
    """Shards that are written when they are asked for, so that a loader's processes share the work."""

    card: Card
    videos: LabelledImages
    out: Path
    protocol: Protocol
    missing: Sequence[int]

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, number: int) -> int:
        shard = self.missing[number]
        _write_shard(self.card, self.videos, self.out, self.protocol, shard)
        return shard


def _write_shard(card: Card, videos: LabelledImages, out: Path, protocol: Protocol, shard: int) -> None:
    """One tar, then its list, which says that the tar is whole."""
    listing: list[dict[str, Any]] = []
    beside = out / f"{shard:06}.tar.new"
    with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(shard * VIDEOS_IN_A_SHARD, min((shard + 1) * VIDEOS_IN_A_SHARD, len(videos))):
            label = card.data_labels[int(videos.labels[number])]
            video: dict[str, Any] = {"number": number, "key": videos.keys[number], "label": label}
            try:
                pictures = videos.pictures(number, protocol.frames, protocol.sampling)
            except (OSError, ValueError) as error:
                listing.append(video | {"frames": 0, "reason": str(error)})
                continue
            for frame, picture in enumerate(pictures):
                buffer = io.BytesIO()
                picture.save(buffer, "WEBP", lossless=True, quality=0, method=0)
                about = tarfile.TarInfo(f"{number:08}.{frame}.webp")
                about.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(about, buffer)
            listing.append(video | {"frames": len(pictures)})
    beside.replace(out / f"{shard:06}.tar")
    beside = out / f"{shard:06}.json.new"
    beside.write_text(json.dumps({"videos": listing}) + "\n")
    beside.replace(out / f"{shard:06}.json")
