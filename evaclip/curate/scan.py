"""The samples of a shard, and everything that is wrong with it: what every verb that works on shards begins with.

Nothing is extracted and no name becomes a path. A sample is good or it is rejected with a code; `CODES` lists them.
"""

import json
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaclip.data.index import CAPTION_SUFFIX, IMAGE_SUFFIXES, split_name
from evaclip.data.samples import MAX_CAPTION_BYTES
from evaclip.data.tar import DamagedTarError, Member, mapped, survey
from evaclip.data.transforms import BadImageError, image_size, whole_pixels

Level = Literal["fast", "full", "decode"]

MAX_PIXELS = 40_000_000
MAX_JSON_BYTES = 1024 * 1024
MAX_JSON_DEPTH = 32
# The name field of a plain header.
MAX_NAME_BYTES = 100
CODES = {
    "empty": "the file has no bytes",
    "cut": "the archive, or a member, goes on past the end of the file",
    "bad-header": "a header has a wrong checksum, or no number where one belongs",
    "not-a-file": "a member is a link, a device or another thing that is no file",
    "after-end": "there are bytes behind the end of the archive",
    "unsafe-name": "a name is absolute, holds .., a backslash or a control character",
    "long-name": f"a name has more than {MAX_NAME_BYTES} bytes, which only extended headers can hold",
    "pickle": "a member is a pickle, which is code",
    "duplicate-member": "a name comes twice in the shard",
    "duplicate-key": "a key comes twice in the set; the first is good",
    "scattered": "the members of a sample do not lie next to each other",
    "dotted-key": "the key holds a dot: the webdataset library parts key and suffix at the first one",
    "no-image": "no jpg, jpeg, png or webp",
    "two-images": "more than one image",
    "no-caption": "no txt, or nothing in it",
    "long-caption": f"more than {MAX_CAPTION_BYTES:,} bytes of caption",
    "caption-not-utf8": "the caption is not UTF-8",
    "bad-json": f"the json is not an object of at most {MAX_JSON_BYTES:,} bytes, {MAX_JSON_DEPTH} levels deep",
    "undecodable": "the image cannot be decoded, or is not JPEG, PNG or WebP",
    "too-many-pixels": "the image has more pixels than --max-pixels",
    "counts-differ": "img2dataset's records say another number of samples",
    "changed": "the shard is not the one that the manifest lists",
    "missing": "the manifest lists a shard that is not there",
    "not-listed": "the shard is not in the manifest of its folder",
}
UNSAFE = re.compile(r"^/|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)|[\x00-\x1f\x7f\\\ufffd]").search
DECODE = json.JSONDecoder().decode
PICKLES = frozenset({"pkl", "pickle", "pyd", "pyc", "pth", "pt", "ckpt", "joblib", "dill"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One line of a check's outcome."""

    code: str
    shard: str
    offset: int
    key: str
    """Empty when it is the shard's."""
    detail: str


@dataclass(slots=True)
class Sample:
    """The members of one key."""

    key: str
    suffixes: tuple[str, ...]
    """In lower case, in the order of the members."""
    spans: list[tuple[int, int]]
    """Offset and size of each member."""

    def span(self, *suffixes: str) -> tuple[int, int] | None:
        """Offset and size of the first member with one of these suffixes, if there is one."""
        for suffix, span in zip(self.suffixes, self.spans, strict=True):
            if suffix in suffixes:
                return span
        return None

    def image(self) -> tuple[int, int]:
        """Offset and size of the image, which a good sample has."""
        span = self.span(*IMAGE_SUFFIXES)
        assert span is not None
        return span

    def caption(self) -> tuple[int, int]:
        """Offset and size of the caption, which a good sample has."""
        span = self.span(CAPTION_SUFFIX)
        assert span is not None
        return span


@dataclass
class Scan:
    """A shard, looked through."""

    good: list[Sample]
    found: int
    """Samples, the rejected ones with them."""
    problems: list[Problem] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of the good samples, at the levels that look."""


def scan(path: Path, level: Level = "fast", max_pixels: int = MAX_PIXELS) -> Scan:
    """Look through a shard. Never raises for what is in it.

    `fast`: headers, names, sizes; `full`: captions, json and the headers of images as well; `decode`: every pixel.
    """
    try:
        with mapped(path) as data:
            return scan_mapped(data, path.name, level, max_pixels)
    except DamagedTarError as error:
        return Scan([], 0, [Problem("empty", path.name, 0, "", str(error))])


def scan_mapped(data: mmap.mmap, shard: str, level: Level, max_pixels: int = MAX_PIXELS) -> Scan:
    """The same for a shard whose bytes are at hand."""
    members, damage = survey(data)
    problems = [Problem(each.code, shard, each.offset, "", each.detail) for each in damage]
    samples, bad = _grouped(members, shard, problems)
    result, codes = Scan([], len(samples), problems), {}
    for sample in samples:
        if sample.suffixes not in codes:
            codes[sample.suffixes] = _code_of_suffixes(sample.suffixes)
        code = bad.get(sample.key) or codes[sample.suffixes] or _code_of_sizes(sample)
        detail = CODES.get(code or "", "")
        if code is None and level != "fast":
            try:
                result.sizes.append(_contents(data, sample, level, max_pixels))
            except BadImageError as error:
                code, detail = error.code, str(error).removeprefix(f"{error.code}: ")
        if code is None:
            result.good.append(sample)
        else:
            problems.append(Problem(code, shard, sample.spans[0][0], sample.key, detail))
    return result


def _grouped(members: list[Member], shard: str, problems: list[Problem]) -> tuple[list[Sample], dict[str, str]]:
    """Samples, and the codes of the keys whose members are not as they should be."""
    groups: dict[str, list[Member]] = {}
    suffixes: dict[str, list[str]] = {}
    bad: dict[str, str] = {}
    suspicious, last = not _all_harmless([name for name, _, _ in members]), None
    for member in members:
        key, suffix = split_name(member.name)
        if suspicious and UNSAFE(member.name):
            bad[key] = "unsafe-name"
            if not suffix:
                problems.append(Problem("unsafe-name", shard, member.offset, "", repr(member.name)))
        if not suffix:  # belongs to no sample
            continue
        if key not in groups:
            groups[key], suffixes[key] = [member], [suffix]
        else:
            groups[key].append(member)
            suffixes[key].append(suffix)
            if key != last:
                bad.setdefault(key, "scattered")
        last = key
    spans = {key: [(offset, size) for _, offset, size in group] for key, group in groups.items()}
    return [Sample(key, tuple(suffixes[key]), spans[key]) for key in groups], bad


def _all_harmless(names: list[str]) -> bool:
    """Whether no name needs a closer look, seen from all of them at once."""
    joined = "\n".join(names)
    marks = ("..", "\\", "\ufffd", ":", "\n/")
    plain = joined.count("\n") == len(names) - 1 and joined.replace("\n", "").isprintable()
    return plain and not joined.startswith("/") and not any(mark in joined for mark in marks)


def _code_of_suffixes(suffixes: tuple[str, ...]) -> str | None:
    """What is wrong with a sample by the kinds of its members."""
    if any(suffix.rpartition(".")[2] in PICKLES for suffix in suffixes):
        return "pickle"
    if len(set(suffixes)) < len(suffixes):
        return "duplicate-member"
    images = sum(suffix in IMAGE_SUFFIXES for suffix in suffixes)
    if images != 1:
        dotted = any("." in suffix and suffix.rpartition(".")[2] in IMAGE_SUFFIXES for suffix in suffixes)
        return "two-images" if images else "dotted-key" if dotted else "no-image"
    return None if CAPTION_SUFFIX in suffixes else "no-caption"


def _code_of_sizes(sample: Sample) -> str | None:
    """What is wrong with a sample by the sizes of its members."""
    size = sample.caption()[1]
    if not 0 < size <= MAX_CAPTION_BYTES:
        return "long-caption" if size else "no-caption"
    if len(sample.key.encode()) + 1 + max(len(suffix.encode()) for suffix in sample.suffixes) > MAX_NAME_BYTES:
        return "long-name"
    return None


def _contents(data: mmap.mmap, sample: Sample, level: Level, max_pixels: int) -> tuple[int, int]:
    """Look at what the members hold. Returns the image's width and height; raises BadImageError, whatever it is."""
    at, size = sample.caption()
    try:
        if not data[at : at + size].decode("utf-8").strip():
            raise BadImageError("no-caption", "nothing but white space")
    except UnicodeDecodeError as error:
        raise BadImageError("caption-not-utf8", str(error)) from None
    record = sample.span("json")
    if record is not None:
        parsed_json(data[record[0] : record[0] + record[1]])
    at, size = sample.image()
    if level == "full":
        return image_size(data[at : at + size], max_pixels)
    height, width, _ = whole_pixels(data[at : at + size], max_pixels).shape
    return width, height


def parsed_json(data: bytes) -> dict[str, Any]:
    """A sample's record. Raises BadImageError for one that is too large, too deep or no object."""
    if len(data) > MAX_JSON_BYTES:
        raise BadImageError("bad-json", f"{len(data):,} bytes")
    if data.count(b"{") + data.count(b"[") > MAX_JSON_DEPTH and _depth(data) > MAX_JSON_DEPTH:
        raise BadImageError("bad-json", f"more than {MAX_JSON_DEPTH} levels deep")
    try:
        record = DECODE(data.decode())
    except (ValueError, RecursionError) as error:
        raise BadImageError("bad-json", str(error)) from None
    if not isinstance(record, dict):
        raise BadImageError("bad-json", "no object")
    return record


def _depth(data: bytes) -> int:
    """Most brackets open at a time; those inside strings count as well, which errs on the safe side."""
    array = np.frombuffer(data, np.uint8)
    steps = np.isin(array, (0x5B, 0x7B)).astype(np.int64) - np.isin(array, (0x5D, 0x7D))
    return int(np.cumsum(steps).max())
