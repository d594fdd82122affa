"""`evaclip data check`: everything that is wrong with a set of shards, one JSON line each, and the good part saved."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.rewrite import copy_samples, several_cores
from evaclip.curate.scan import MAX_PIXELS, Level, Problem, Scan, scan, scan_mapped
from evaclip.data.index import ShardHead, expand
from evaclip.data.manifest import NAME, ShardRecord, manifest_of, read_manifest, write_record
from evaclip.data.tar import mapped
from evaclip.errors import InputError
from evaclip.log import say


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """Look for everything that is wrong with shards. Exit status 0: nothing; 1: problems; 2: it could not be done."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    level: Level = "full"
    """`fast`: headers, names, counts; `full`: also hashes against the manifest, captions, json, headers of images;
    `decode`: also every pixel."""
    out: Path = Path("problems.jsonl")
    """Where the problems go, one JSON object a line: code, shard, offset, key, detail."""
    repair: Path | None = None
    """Folder for new shards that hold the good samples of those with problems; a list in it names what to train on."""
    max_pixels: int = MAX_PIXELS
    """Larger images are a problem; they are not decoded."""
    processes: int = several_cores()
    """Shards that are looked at at a time."""


def run_check(command: CheckCommand) -> int:
    """Print what was found. Returns the exit status."""
    paths = expand(command.shards)
    problems, samples = check(paths, command)
    lines = "".join(json.dumps(asdict(problem)) + "\n" for problem in problems)
    _write(command.out, lines)
    counts = Counter(problem.code for problem in problems)
    for code, count in counts.most_common():
        print(f"{count:>12,}  {code}")
    print(
        f"{samples:,} samples in {len(paths):,} shards, {len(problems):,} problems" + (f": {command.out}" * bool(lines))
    )
    return 1 if problems else 0


def check(paths: list[Path], command: CheckCommand) -> tuple[list[Problem], int]:
    """The problems of a set in the order of its shards, and how many samples it has; repairs it if asked to."""
    known = _manifests(paths)
    journal = Journal(
        command.out.with_name(f"{command.out.name}.unfinished"),
        {"level": command.level, "max_pixels": command.max_pixels, "known": {k: v.sha256 for k, v in known.items()}},
        command.processes,
    )
    work = partial(check_shard, level=command.level, max_pixels=command.max_pixels, known=known)
    problems, hashes, samples = [], [], 0
    for _, result in journal.each(f"checking ({command.level})", work, paths, shard_state):
        problems += [Problem(*each) for each in result["problems"]]
        samples += result["samples"]
        hashes.append(np.array(result["keys"]))
    problems += _missing(paths, known) + _repeated(paths, hashes)
    if command.repair is not None:
        _repair(paths, problems, command, journal)
    journal.finished()
    return problems, samples


def check_shard(
    path: Path, *, level: Level, max_pixels: int = MAX_PIXELS, known: dict[str, ShardRecord] | None = None
) -> dict[str, Any]:
    """One shard: its problems, its samples, the hashes of its keys. The hash of the whole is taken at the same time."""
    if level == "fast" or path.stat().st_size == 0:
        found, sha256 = scan(path, level, max_pixels), None
    else:
        with mapped(path) as data, ThreadPoolExecutor(1) as thread:
            hashing = thread.submit(lambda: hashlib.sha256(data).hexdigest())
            found = scan_mapped(data, path.name, level, max_pixels)
            sha256 = hashing.result()
    problems = [*found.problems, *_counts(path, found)]
    listed = (known or {}).get(str(path))
    if listed is not None:
        if path.stat().st_size != listed.bytes or sha256 not in (None, listed.sha256):
            detail = f"{path.stat().st_size:,} bytes with hash {sha256}, listed {listed.bytes:,} with {listed.sha256}"
            problems.append(Problem("changed", path.name, 0, "", detail))
    elif (path.parent / NAME).is_file():
        problems.append(Problem("not-listed", path.name, 0, "", f"in {path.parent / NAME}"))
    return {
        "problems": [list(astuple(problem)) for problem in problems],
        "samples": found.found,
        "keys": key_hashes(sample.key for sample in found.good),
    }


def key_hashes(keys: Iterable[str]) -> np.ndarray:
    """uint64 of each key; two keys of a billion share one with a chance of 3 %."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _manifests(paths: list[Path]) -> dict[str, ShardRecord]:
    """What the manifests beside the shards say of them, by path."""
    known = {}
    for folder in {path.parent for path in paths}:
        if (folder / NAME).is_file():
            known |= {str(folder / shard.name): shard for shard in read_manifest(folder / NAME).shards}
    return known


def _missing(paths: list[Path], known: dict[str, ShardRecord]) -> list[Problem]:
    """Shards of the manifests that are gone from their folders."""
    here = {str(path) for path in paths}
    gone = [path for path in known if path not in here and not Path(path).exists()]
    return [Problem("missing", Path(path).name, 0, "", f"{known[path].samples:,} samples") for path in sorted(gone)]


def _repeated(paths: list[Path], hashes: list[np.ndarray]) -> list[Problem]:
    """Keys that an earlier shard has too."""
    every = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    order = np.argsort(every, kind="stable")
    again = np.sort(order[1:][every[order][1:] == every[order][:-1]])
    ends, problems = np.cumsum([len(part) for part in hashes]), []
    for number in np.unique(np.searchsorted(ends, again, side="right")).tolist():
        first = ends[number] - len(hashes[number])
        here = set(every[again[(again >= first) & (again < ends[number])]].tolist())
        good = scan(paths[number]).good
        for sample, own in zip(good, key_hashes(sample.key for sample in good).tolist(), strict=True):
            if own in here:
                detail = "an earlier shard of the set has it"
                problems.append(Problem("duplicate-key", paths[number].name, sample.spans[0][0], sample.key, detail))
    return problems


def _counts(path: Path, found: Scan) -> list[Problem]:
    """What img2dataset wrote beside the shard against what is in it."""
    said: dict[str, int] = {}
    try:
        stats = path.with_name(f"{path.stem}_stats.json")
        if stats.is_file():
            said[stats.name] = int(json.loads(stats.read_text())["successes"])
        table = path.with_suffix(".parquet")
        if table.is_file():
            status = pq.read_table(table, columns=["status"])["status"].to_pylist()
            said[table.name] = status.count("success")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return [Problem("counts-differ", path.name, 0, "", f"its records cannot be read: {error}")]
    return [
        Problem("counts-differ", path.name, 0, "", f"{name} says {count:,} samples, the shard holds {found.found:,}")
        for name, count in said.items()
        if count != found.found
    ]


def _repair(paths: list[Path], problems: list[Problem], command: CheckCommand, journal: Journal) -> None:
    """New shards of the good samples, and `shards.txt`, which lists them and the sound ones where they are."""
    assert command.repair is not None
    folder = command.repair
    if any(path.parent.resolve() == folder.resolve() for path in paths):
        raise InputError(f"--repair {folder} is where the shards are; name another folder")
    names = Counter(path.name for path in paths)
    damaged = {problem.shard for problem in problems if problem.code not in ("missing", "not-listed")}
    if any(names[name] > 1 for name in damaged):
        raise InputError(
            f"two shards are called {next(n for n in damaged if names[n] > 1)}; repair one folder at a time"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rejected = {(each.shard, each.key) for each in problems if each.code == "duplicate-key"}
    todo = [path for path in paths if path.name in damaged]
    work = partial(_repaired, folder=folder, rejected=rejected, level=command.level, max_pixels=command.max_pixels)
    heads = [ShardHead(**result["head"]) for _, result in journal.each("repairing", work, todo, shard_state)]
    sound = [path for path in paths if path.name not in damaged]
    kept = {head.name: Path(head.path) for head in heads if head.samples}
    listed = [kept.get(path.name, path) for path in paths if path in sound or path.name in kept]
    _write(folder / "shards.txt", "".join(f"{path.resolve()}\n" for path in listed))
    write_record(folder / NAME, manifest_of([head for head in heads if head.samples], {"verb": "check --repair"}))
    samples = sum(head.samples for head in heads)
    say(f"{samples:,} good samples of {len(todo):,} shards in {folder}; train on @{folder / 'shards.txt'}")


def _repaired(
    path: Path, *, folder: Path, rejected: set[tuple[str, str]], level: Level, max_pixels: int
) -> dict[str, Any]:
    good = [sample for sample in scan(path, level, max_pixels).good if (path.name, sample.key) not in rejected]
    return {"head": asdict(copy_samples(path, good, folder / path.name))}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)
