"""What a worker process does: it turns positions into pixels and token ids.

A sample that cannot be used is replaced by another of the same shard, found by a keyed search, so that positions
never shift. A file that cannot be read is not damage: it is tried again, then the run fails, because replacing it
would make two runs differ.
"""

import os
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from evaclip import keyed
from evaclip.data.folder import SUFFIX, OpenFolder, open_folder
from evaclip.data.index import RETRY_AFTER, ShardIndex, load_index
from evaclip.data.shards import ShardSet
from evaclip.data.tokenizer import clip_tokenizer
from evaclip.data.transforms import BadImageError, training_pixels
from evaclip.errors import DamagedDataError, InputError

# Longer captions are damage: the context has 77 tokens.
MAX_CAPTION_BYTES = 64 * 1024
# Samples of a shard that are tried in the place of a damaged one.
REPLACEMENTS = 32


@dataclass
class Chunk:
    """A worker's piece of work, with its costs and losses."""

    images: Tensor
    tokens: Tensor
    positions: Tensor
    times: dict[str, float]
    damage: list[tuple[str, str]]

    def pin_memory(self) -> "Chunk":
        """Called by the loader's own thread; makes the copy to the device asynchronous."""
        return replace(self, images=self.images.pin_memory(), tokens=self.tokens.pin_memory())


class Chunks(Dataset["Chunk | InputError"]):
    """Makes the chunk that starts at a position; lives in a worker process.

    An error for the user is returned, not raised: the loader would wrap it in the worker's traceback.
    """

    def __init__(self, shards: ShardSet, seed: int, size: int, image_size: int, context: int, batch_size: int) -> None:
        self.size, self.image_size, self.context, self.seed = size, image_size, context, seed
        self.config = shards.config
        self.heads, self.cache = shards.heads, shards.cache
        self.order = shards.order(seed, batch_size)
        if context:
            clip_tokenizer(context)  # built before the workers fork, so that they share it
        self.open_shards: OrderedDict[tuple[int, int], OpenShard | OpenFolder] = OrderedDict()

    def __getitem__(self, start: int) -> Chunk | InputError:
        try:
            return self._chunk(start)
        except InputError as error:
            return error

    def _chunk(self, start: int) -> Chunk:
        positions = np.arange(start, start + self.size)
        places = self.order.places(positions)
        images = torch.empty(self.size, 3, self.image_size, self.image_size, dtype=torch.uint8)
        captions: list[str] = []
        times = {"read": 0.0, "decode": 0.0, "tokenize": 0.0}
        damage: list[tuple[str, str]] = []
        for row, (source, shard, sample) in enumerate(zip(places.source, places.shard, places.sample, strict=True)):
            opened = self._open(int(source), int(shard))
            images[row], caption = self._usable(opened, int(sample), start + row, times, damage)
            captions.append(caption)
        began = time.perf_counter()
        tokens = clip_tokenizer(self.context)(captions) if self.context else torch.empty(self.size, 0).int()
        times["tokenize"] += time.perf_counter() - began
        return Chunk(images, tokens, torch.from_numpy(positions), times, damage)

    def _usable(
        self,
        shard: "OpenShard | OpenFolder",
        sample: int,
        position: int,
        times: dict[str, float],
        damage: list[tuple[str, str]],
    ) -> tuple[Tensor, str]:
        """The pixels and caption at a position, of another sample of the shard if its own is damaged."""
        random = keyed.generator(self.seed, "crop", position)
        for attempt in range(REPLACEMENTS):
            if attempt:
                drawn = keyed.generator(self.seed, f"replacement {attempt}", position)
                sample = int(drawn.integers(len(shard.index.keys)))
            began = time.perf_counter()
            try:
                data = shard.image(sample)
                caption = shard.caption(sample) if self.context and isinstance(shard, OpenShard) else ""
                read = time.perf_counter()
                times["read"] += read - began
                pixels = training_pixels(data, self.image_size, self.config.crop, random)
                times["decode"] += time.perf_counter() - read
                return pixels, caption
            except BadImageError as error:
                if attempt == 0:
                    damage.append((error.code, f"{shard.path} sample {shard.index.keys[sample]}"))
        raise DamagedDataError(f"{shard.path}: {REPLACEMENTS} samples in a row are damaged; fetch the shard again")

    def _open(self, source: int, shard: int) -> "OpenShard | OpenFolder":
        """The shard, opened once and kept while it is among the last used."""
        place = (source, shard)
        if place not in self.open_shards:
            head = self.heads[source][shard]
            path = Path(head.path)
            with self.cache.held(path, head):
                if path.suffix == SUFFIX:
                    opened = open_folder(head, self.config.index_folder)
                else:
                    opened = OpenShard(path, load_index(path, self.config.index_folder))
            for other in [key for key, shard in self.open_shards.items() if shard.removed]:
                self.open_shards.pop(
                    other
                ).close()  # the cache has let it go; its space is free once nobody has it open
            self.open_shards[place] = opened
            if len(self.open_shards) > 2 * self.config.window:
                self.open_shards.popitem(last=False)[1].close()
        self.open_shards.move_to_end(place)
        return self.open_shards[place]


class OpenShard:
    """A shard's file and index."""

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.path, self.index = path, index
        self._file = os.open(path, os.O_RDONLY)

    @property
    def removed(self) -> bool:
        """Whether the file has lost its name since it was opened."""
        return os.fstat(self._file).st_nlink == 0

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)

    def image(self, sample: int) -> bytes:
        """The image's file. Raises BadImageError for a sample without one."""
        offset, size = (int(number) for number in self.index.spans[sample, :2])
        if size <= 0:
            raise BadImageError("no-image", "the sample has no jpg, png or webp")
        return self._pread(offset, size)

    def caption(self, sample: int) -> str:
        """The caption, stripped. Raises BadImageError for a sample whose caption cannot be used."""
        offset, size = (int(number) for number in self.index.spans[sample, 2:])
        if size < 0:
            raise BadImageError("no-caption", "the sample has no txt")
        if size > MAX_CAPTION_BYTES:
            raise BadImageError("long-caption", f"{size:,} bytes")
        try:
            caption = self._pread(offset, size).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadImageError("caption-not-utf8", str(error)) from None
        if not caption:
            raise BadImageError("no-caption", "the caption is empty")
        return caption

    def _pread(self, offset: int, size: int) -> bytes:
        """Bytes at an offset, with a few more tries when the file system hiccups."""
        problem = ""
        for pause in (*RETRY_AFTER, None):
            try:
                data = os.pread(self._file, size, offset)
                if len(data) == size:
                    return data
                problem = "the file has become shorter"
            except OSError as error:
                problem = str(error.strerror)
            if pause is not None:
                time.sleep(pause)
        raise InputError(f"{self.path} cannot be read at byte {offset:,}: {problem}")
