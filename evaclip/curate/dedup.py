"""`evaclip data dedup`: of images that are the same, the first stays."""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.likeness import hash_shard, near_pairs
from evaclip.curate.rewrite import Verdict, claim, keep, refuse_equal_names, several_cores, source_fingerprint
from evaclip.curate.score import embed_shards
from evaclip.data.index import expand
from evaclip.data.manifest import Manifest
from evaclip.errors import InputError

# Rows of a block of similarities.
BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class DedupCommand:
    """Leave out images that are in the set already: the same bytes, nearly the same look, or the same to a model."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    out: Path
    """Folder for the new shards, their manifest, and the list of what was left out."""
    distance: int = 4
    """Bits of 64 in which perceptual hashes of the same picture may differ; -1 compares bytes only."""
    model: str | None = None
    """Also compare the features of this model (a run's folder, an export's, or an open_clip name)."""
    similarity: float = 0.97
    """Cosine of features from which on two images are the same."""
    device: str = "cpu"
    """Where the model runs."""
    processes: int = several_cores()
    """Shards that are read at a time."""


def run_dedup(command: DedupCommand) -> None:
    """Print how many of each kind were left out."""
    manifest = dedup(command)
    made = manifest.made_by
    print(f"{made['in']:,} samples in, {made['out']:,} out, {made['rejected']:,} rejected: {made['codes']}")
    print(f"fingerprint {manifest.fingerprint}: {command.out}")


def dedup(command: DedupCommand) -> Manifest:
    """The manifest of the new shards."""
    if not -1 <= command.distance <= 16:
        raise InputError("--distance is from 0 to 16 bits, or -1 for bytes only")
    paths = expand(command.shards)
    refuse_equal_names(paths)
    settings = {name: value for name, value in asdict(command).items() if name not in ("shards", "out", "processes")}
    source = source_fingerprint(paths, command.out, command.processes)
    done = claim(command.out, settings, source)
    if done is not None:
        return done
    journal = Journal(command.out / "unfinished", settings, command.processes)
    results = [result for _, result in journal.each("hashing images", hash_shard, paths, shard_state)]
    counts = [len(result["keys"]) for result in results]
    first, codes = first_of_each(results, command.distance)
    if command.model is not None:
        features = embed_shards(paths, command.model, command.device, journal)
        _first_by_features(features, command.similarity, first, codes)
    verdicts = _verdicts(paths, counts, first, codes, journal)
    for verdict, result in zip(verdicts, results, strict=True):
        verdict |= {int(place): (code, detail) for place, (code, detail) in result["undecodable"].items()}
    counted = dict(Counter(code for verdict in verdicts for code, _ in verdict.values()))
    made_by = {"verb": "dedup", "settings": settings, "source": source, "codes": counted}
    manifest = keep(paths, verdicts, command.out, journal, made_by)
    journal.finished()
    return manifest


def first_of_each(results: list[dict[str, Any]], distance: int) -> tuple[np.ndarray, np.ndarray]:
    """For each sample of the set, the place of the one that stays in its stead (its own if it stays), and why.

    A sample goes if one that stays, and comes before it, has the same bytes or a perceptual hash within `distance`.
    Codes: 0 stays, 1 same bytes, 2 same look.
    """
    sha256 = np.concatenate([result["sha256"] for result in results])
    count = len(sha256)
    bad = np.zeros(count, bool)
    start = 0
    for result in results:
        bad[[start + int(place) for place in result["undecodable"]]] = True
        start += len(result["keys"])
    first, codes = np.arange(count), np.zeros(count, np.int8)
    usable = np.flatnonzero(~bad)
    pair = np.ascontiguousarray(sha256[usable]).view([("high", np.uint64), ("low", np.uint64)])[:, 0]
    _, place, inverse = np.unique(pair, return_index=True, return_inverse=True)
    first[usable] = usable[place[inverse]]
    codes[first != np.arange(count)] = 1
    if distance < 0:
        return first, codes
    perceptual = np.concatenate([result["perceptual"] for result in results])
    textured = np.concatenate([result["textured"] for result in results]) & (codes == 0) & ~bad
    candidates = np.flatnonzero(textured)
    values, place, inverse = np.unique(perceptual[candidates], return_index=True, return_inverse=True)
    earliest = candidates[place]  # the first sample of each value
    order = np.argsort(earliest)
    stays = _greedy(near_pairs(values[order], distance), len(values))
    representative = np.empty(len(values), np.int64)
    representative[order] = earliest[order][stays]
    first[candidates] = representative[inverse]
    codes[candidates] = np.where(first[candidates] != candidates, 2, 0)
    return first, codes


def _greedy(pairs: Any, count: int) -> np.ndarray:
    """In order: what is near to one that stays goes in its favour. `pairs`: arrays of i < j. Returns int64 [count]."""
    found = list(pairs)
    stays = np.arange(count)
    if not found:
        return stays
    both = np.unique(np.stack([np.concatenate(side) for side in zip(*found, strict=True)], 1)[:, ::-1], axis=0)
    for later, earlier in both.tolist():
        if stays[later] == later and stays[earlier] == earlier:
            stays[later] = earlier
    return stays


def _first_by_features(features: torch.Tensor, similarity: float, first: np.ndarray, codes: np.ndarray) -> None:
    """The same by the cosine of features, among the samples that stay; code 3. Exact: all are compared with all."""
    kept = np.flatnonzero(codes == 0)
    rows = features[torch.from_numpy(kept)]
    pairs = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        later, earlier = torch.nonzero(block @ rows[: start + len(block)].T >= similarity, as_tuple=True)
        later += start
        pairs.append((earlier[earlier < later].numpy(), later[earlier < later].numpy()))
    stays = _greedy(pairs, len(rows))
    first[kept] = kept[stays]
    codes[kept] = np.where(stays != np.arange(len(rows)), 3, 0)


def _verdicts(
    paths: list[Path], counts: list[int], first: np.ndarray, codes: np.ndarray, journal: Journal
) -> list[Verdict]:
    """What goes, shard by shard, and in whose favour."""
    ends = np.cumsum(counts)
    names = ("", "same-bytes", "same-look", "same-features")

    @lru_cache(maxsize=64)
    def keys_of(number: int) -> list[str]:
        return journal.result("hashing images", shard_state(paths[number]))["keys"]

    verdicts: list[Verdict] = [{} for _ in paths]
    for place in np.flatnonzero(codes).tolist():
        here, there = (int(np.searchsorted(ends, each, side="right")) for each in (place, first[place]))
        original = keys_of(there)[int(first[place] - (ends[there] - counts[there]))]
        verdicts[here][place - int(ends[here] - counts[here])] = (
            names[codes[place]],
            f"as {original} of {paths[there].name}",
        )
    return verdicts
