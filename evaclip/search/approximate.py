"""Faster than exact and nearly as good: FAISS proposes candidates, their exact scores decide.

FAISS holds the vectors in 8 bits per dimension; that is enough to find the neighbourhood, not to order it. So it is
asked for several times as many rows as are wanted, and these are scored from the float16 vectors on the disk. How
thoroughly it looks (`effort`: lists visited, or length of the candidate queue) is the least that reaches the recall
that is asked for, measured against exact search.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int64

from evaclip.errors import InputError
from evaclip.log import progress

ApproximateKind = Literal["ivf-sq8", "hnsw"]
# Candidates for each row that is wanted.
CANDIDATES = 4
# Rows per list that centroids are trained on, and links of a node: FAISS's own advice.
ROWS_PER_LIST = 64
LINKS = 32
ADD_AT_A_TIME = 65_536


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an approximate index achieved on queries it was not tuned on."""

    effort: int
    recall_at_10: float
    ms_per_query: float
    """Many queries at once."""
    ms_alone: float
    """One query at a time."""
    exact_ms_per_query: float
    queries: int


def faiss_module() -> Any:
    """FAISS, or InputError that says how to get it."""
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        raise InputError("approximate search needs FAISS: pip install 'evaclip[search]'") from None
    return faiss


def build(
    kind: ApproximateKind,
    segments: Sequence[Float16[np.ndarray, "_ dim"]],
    alive: Sequence[Bool[np.ndarray, " _"]],
) -> Any:
    """A FAISS index of the living rows, whose ids are row numbers over all segments."""
    faiss = faiss_module()
    count, dim = int(sum(living.sum() for living in alive)), segments[0].shape[1]
    if kind == "hnsw":
        index = faiss.index_factory(dim, f"IDMap2,HNSW{LINKS}_SQ8", faiss.METRIC_INNER_PRODUCT)
        needed = count
    else:
        lists = max(1, min(round(2 * count**0.5), count // ROWS_PER_LIST, 65_536))
        index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid = ROWS_PER_LIST
        index.cp.min_points_per_centroid = 1  # few rows are searched well with any centroids
        needed = lists * ROWS_PER_LIST
    index.train(sampled(segments, alive, min(needed, 262_144), seed=0))
    add(index, segments, alive, 0)
    return index


def add(index: Any, segments: Sequence[np.ndarray], alive: Sequence[np.ndarray], first: int) -> None:
    """Add the living rows of segments; the first of them has the number `first`."""
    pieces = [
        (first + sum(len(other) for other in segments[:number]) + start, number, start)
        for number, vectors in enumerate(segments)
        for start in range(0, len(vectors), ADD_AT_A_TIME)
    ]
    for row, number, start in progress(pieces, len(pieces), "adding rows"):
        kept = np.flatnonzero(alive[number][start : start + ADD_AT_A_TIME])
        if len(kept):
            vectors = segments[number][start : start + ADD_AT_A_TIME][kept].astype(np.float32)
            index.add_with_ids(vectors, kept + row)


def sampled(
    segments: Sequence[np.ndarray], alive: Sequence[np.ndarray], count: int, seed: int
) -> Float32[np.ndarray, "count dim"]:
    """Living rows, spread evenly over all of them; `seed` moves the places."""
    living = np.flatnonzero(np.concatenate(alive))
    places = (np.arange(count) + np.random.default_rng(seed).random()) * len(living) / count
    return gathered(segments, living[places.astype(np.int64) % len(living)])


def gathered(segments: Sequence[np.ndarray], rows: Int64[np.ndarray, " rows"]) -> Float32[np.ndarray, "rows dim"]:
    """The vectors of some rows."""
    ends = np.cumsum([len(vectors) for vectors in segments])
    found = np.empty((len(rows), segments[0].shape[1]), np.float32)
    order = np.argsort(rows, kind="stable")  # the disk is read in one direction
    owner = np.searchsorted(ends, rows[order], side="right")
    for number in np.unique(owner):
        own = order[owner == number]
        first = ends[number] - len(segments[number])
        found[own] = segments[number][rows[own] - first]
    return found


def search(
    index: Any, effort: int, queries: np.ndarray, segments: Sequence[np.ndarray], alive: Sequence[np.ndarray], k: int
) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Scores and rows as `exact.top_k` gives them, perhaps without some that it finds."""
    faiss = faiss_module()
    living = np.concatenate(alive)
    selected = None if living.all() else faiss.IDSelectorBitmap(np.packbits(living, bitorder="little"))
    how: dict[str, Any] = {"sel": selected} if selected is not None else {}
    if isinstance(faiss.downcast_index(index), faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(nprobe=effort, **how)
    else:
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, CANDIDATES * k), **how)
    _, rows = index.search(queries, CANDIDATES * k, params=parameters)
    return rescored(queries, rows, segments, k)


def rescored(
    queries: np.ndarray, rows: Int64[np.ndarray, "queries candidates"], segments: Sequence[np.ndarray], k: int
) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """The k best of each query's candidates by their exact scores; candidate -1 is none."""
    wanted, back = np.unique(rows, return_inverse=True)
    missing = int(wanted[0] == -1)
    vectors = torch.from_numpy(np.concatenate([np.zeros((missing, queries.shape[1]), np.float32),
                                               gathered(segments, wanted[missing:])]))  # fmt: skip
    candidates = vectors[torch.from_numpy(back.reshape(rows.shape))]
    scores = torch.bmm(candidates, torch.from_numpy(queries)[:, :, None])[:, :, 0].numpy()
    scores[rows == -1] = -np.inf
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    best, found = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return best, np.where(best == -np.inf, -1, found)


Search = Callable[[int, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
ExactSearch = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def measure(
    search: Search, exact: ExactSearch, queries: Float32[np.ndarray, "queries dim"], most: int, target: float
) -> Measured:
    """The least effort that reaches a recall@10, tuned on half of the queries and measured on the other half.

    `search(effort, queries, k)` and `exact(queries, k)`; `most` is the greatest effort there is. The best row of each
    query is left out of the count when it is the query itself.
    """
    tuning, held_out = queries[::2], queries[1::2]
    truth, _ = exact(tuning, 11)
    enough = partial(_enough, search, tuning, truth, target + (1 - target) / 4)  # others may be harder to answer
    low, high = 0, 1
    while high < most and not enough(high):
        low, high = high, min(2 * high, most)
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    effort = high
    started = time.perf_counter()
    truth, _ = exact(held_out, 11)
    exact_seconds = time.perf_counter() - started
    search(effort, held_out, 11)
    started = time.perf_counter()
    scores, _ = search(effort, held_out, 11)
    seconds = time.perf_counter() - started
    alone = held_out[:50]
    started = time.perf_counter()
    for query in alone:
        search(effort, query[None], 11)
    seconds_alone = time.perf_counter() - started
    return Measured(
        effort=effort,
        recall_at_10=recall(scores, truth, held_out),
        ms_per_query=1e3 * seconds / len(held_out),
        ms_alone=1e3 * seconds_alone / len(alone),
        exact_ms_per_query=1e3 * exact_seconds / len(held_out),
        queries=len(held_out),
    )


def _enough(search: Search, queries: np.ndarray, truth: np.ndarray, target: float, effort: int) -> bool:
    return recall(search(effort, queries, 11)[0], truth, queries) >= target


def recall(scores: np.ndarray, truth: np.ndarray, queries: np.ndarray) -> float:
    """Recall@10 from the scores of the first 11: what scores as well as the true tenth counts as found.

    A first result with the score of the query with itself is the query: then places 2 to 11 count, else 1 to 10.
    """
    own = (queries * queries).sum(1)
    itself = truth[:, 0] >= own - 1e-3
    shifted = np.where(itself[:, None], truth[:, 1:11], truth[:, :10])
    found = np.where(itself[:, None], scores[:, 1:11], scores[:, :10])
    counted = shifted > -np.inf
    least = np.where(counted, shifted, np.inf).min(1, keepdims=True)
    return float((found >= least - 1e-5).sum() / max(1, counted.sum()))


def load(path: Path, mapped: bool = True) -> Any:
    """A FAISS index, mapped from the disk where its kind can be; read whole when rows will be added to it."""
    faiss = faiss_module()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[-1]}; build it again") from None
