"""Thousands of broken tars and images: no crash, no hang, nothing lost in silence, a code for each rejection.

`make soak` runs 10,000 of each. A seed that ever failed goes into SEEDS, which every run begins with.
"""

import io
import time
import warnings
from functools import partial

import numpy as np
import pytest
from PIL import Image

from evaclip.curate.check import check_shard
from evaclip.curate.rewrite import copy_samples
from evaclip.curate.scan import CODES, scan
from evaclip.data.index import ShardHead, index_or_reason, load_index
from evaclip.data.manifest import ShardRecord
from evaclip.data.samples import OpenShard
from evaclip.data.tar import DamagedTarError, members
from evaclip.data.transforms import BadImageError, CropConfig, image_size, training_pixels, whole_pixels
from tests.curate.conftest import sample_files, tar_of

SEEDS: tuple[int, ...] = (0,)
LIMIT = 5.0
LENGTHS = [pytest.param(300, id="short"), pytest.param(10_000, id="soak", marks=pytest.mark.soak)]
OCTAL = np.frombuffer(b"0123456789-+_ \0\xff\x80xLg5", np.uint8)
CODES_OF_IMAGES = {"undecodable", "too-many-pixels"}


def mutated(data: bytes, random: np.random.Generator, header: int) -> bytes:
    """One to eight changes: bits, fields of headers, cuts, and blocks moved, doubled, zeroed or left out."""
    result = bytearray(data)
    for _ in range(int(random.integers(1, 9))):
        if not result:
            break
        at, kind = int(random.integers(len(result))), int(random.integers(8))
        block = at // header * header
        other = int(random.integers(len(result))) // header * header
        if kind == 0:
            result[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            place = min(block + int(random.integers(header)), len(result) - 1)
            result[place] = int(random.choice(OCTAL))
        elif kind == 2:
            result = result[: at if random.random() < 0.5 else block] if random.random() < 0.3 else result
        elif kind == 3:
            result[block : block + header] = bytes(header)
        elif kind == 4:
            result[block:block] = result[other : other + header]
        elif kind == 5:
            del result[block : block + header * int(random.integers(1, 4))]
        elif kind == 6:
            result[block : block + header] = random.bytes(header)
        else:
            result[block : block + header], result[other : other + header] = (
                result[other : other + header],
                result[block : block + header],
            )
    return bytes(result)


def with_right_checksums(data: bytes, random: np.random.Generator) -> bytes:
    """Half of the headers that were changed get the checksum of what they now say, to come past the first look."""
    result = bytearray(data)
    for at in range(0, len(result) - 511, 512):
        if result[at + 257 : at + 262] == b"ustar" and random.random() < 0.5:
            result[at + 148 : at + 156] = b" " * 8
            result[at + 148 : at + 156] = b"%06o\0 " % sum(result[at : at + 512])
    return bytes(result)


@pytest.mark.parametrize("count", LENGTHS)
def test_broken_tars(tmp_path, count):
    shards = []
    for place, format in enumerate((0, 1, 2)):  # ustar, GNU, PAX
        path = tmp_path / f"{place}.tar"
        tar_of([file for number in range(5) for file in sample_files(number)], path, format)
        shards.append((path.read_bytes(), index_or_reason(path, None)))
    path, slowest, rejected = tmp_path / "broken.tar", 0.0, 0
    for seed in [*SEEDS, *range(1, count)]:
        random = np.random.default_rng(seed)
        whole, head = shards[seed % 3]
        broken = with_right_checksums(mutated(whole, random, 512), random)
        path.write_bytes(broken)
        began = time.perf_counter()
        rejected += one_broken_tar(path, broken == whole, head)
        slowest = max(slowest, time.perf_counter() - began)
        assert slowest < LIMIT, seed
    print(f"{count:,} tars: {rejected:,} with problems, the slowest took {slowest:.3f} s")
    assert rejected > 0.8 * count


def one_broken_tar(path, same: bool, head: ShardHead) -> bool:
    """Every way in which a shard is read, on one that may be broken. Returns whether it has problems."""
    listed = ShardRecord(name=head.name, bytes=head.bytes, sha256=head.sha256, samples=head.samples)
    result = check_shard(path, level="decode", known={str(path): listed})
    codes = {problem[0] for problem in result["problems"]}
    assert codes <= set(CODES) and (same or codes), "a change without a problem"
    found = scan(path, "decode")
    assert found.found == len(found.good) + sum(bool(problem.key) for problem in found.problems)
    blind = {problem.code for problem in found.problems}  # what is seen without knowing the hash
    try:
        assert members(path) is not None and not {"cut", "bad-header", "not-a-file", "after-end"} & blind
    except DamagedTarError:
        assert blind
    indexed = index_or_reason(path, None)
    if isinstance(indexed, ShardHead):
        shard = OpenShard(path, load_index(path))
        for sample in range(indexed.samples):
            try:
                image, caption = shard.image(sample), shard.caption(sample)
                assert image and caption
            except BadImageError as error:
                assert error.code
        shard.close()
    repaired = copy_samples(path, found.good, path.with_name("repaired.tar"))
    if found.good:
        again = scan(path.with_name("repaired.tar"), "decode")
        assert not again.problems and len(again.good) == len(found.good) == repaired.samples
    return bool(codes)


def pictures() -> list[bytes]:
    """One image of each kind that shards hold: JPEG plain, progressive, grey and CMYK; PNG of each mode; WebP."""
    random = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(48), np.arange(40))[..., None] * np.array([1, 2, 3]) + random.integers(
        0, 30, (48, 40, 3)
    )
    image = Image.fromarray((smooth % 256).astype(np.uint8))
    made = []
    for mode, kind, more in (
        ("RGB", "JPEG", {"exif": Image.Exif().tobytes() or b""}),
        ("RGB", "JPEG", {"progressive": True, "quality": 60}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("I;16", "PNG", {}),
        ("RGB", "WEBP", {"quality": 70}),
        ("RGBA", "WEBP", {"lossless": True}),
    ):
        buffer = io.BytesIO()
        (image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(
            buffer, kind, **more
        )
        made.append(buffer.getvalue())
    return made


def readings(data: bytes, crop: CropConfig, seed: int):
    """Every way in which an image is read."""
    yield partial(image_size, data, crop.max_pixels)
    yield partial(whole_pixels, data, crop.max_pixels)
    yield partial(training_pixels, data, 24, crop, np.random.default_rng(seed))


@pytest.mark.parametrize("count", LENGTHS)
def test_broken_images(count):
    originals, slowest, rejected = pictures(), 0.0, 0
    crop = CropConfig(max_pixels=1_000_000)
    for seed in [*SEEDS, *range(1, count)]:
        random = np.random.default_rng(seed)
        data = mutated(originals[seed % len(originals)], random, int(random.choice([1, 2, 4, 16, 64])))
        began = time.perf_counter()
        bad = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for read in readings(data, crop, seed):
                try:
                    found = read()
                    assert found is not None
                except BadImageError as error:
                    bad = True
                    assert error.code in CODES_OF_IMAGES, seed
        rejected += bad
        slowest = max(slowest, time.perf_counter() - began)
        assert slowest < LIMIT, seed
    print(f"{count:,} images: {rejected:,} rejected, the slowest took {slowest:.3f} s")
    assert rejected > 0.3 * count
