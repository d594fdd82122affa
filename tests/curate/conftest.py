"""Sets of drawn samples, and a way to run a verb."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from evaclip.cli import main
from evaclip.curate.synth import SynthCommand, drawn, synth

Files = list[tuple[str, bytes]]


@pytest.fixture
def drawn_set(tmp_path: Path) -> Callable[..., Path]:
    """A function that draws a set and returns its folder."""

    def make(name: str = "set", **settings) -> Path:
        synth(SynthCommand(out=tmp_path / name, **({"samples": 60, "per_shard": 20, "processes": 1} | settings)))
        return tmp_path / name

    return make


def sample_files(number: int, seed: int = 0) -> Files:
    """The members of a drawn sample."""
    image, caption, record = drawn(seed, number, 32)
    key = f"{number:06}"
    return [(f"{key}.jpg", image), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(record).encode())]


def tar_of(files: Files, path: Path, format: int = tarfile.USTAR_FORMAT) -> Path:
    """A shard of any members."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every member of every shard of a folder by name, read by the standard library."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None and member.name not in found
                found[member.name] = file.read()
    return found


def run(*words: object) -> int:
    """`evaclip data ...`, in this process alone where the verb has processes."""
    return main(["data", *map(str, words)])
