"""The k nearest of all rows, none left out: a chunked matrix product over vectors mapped from the disk.

A chunk is turned to float32 once for all queries. Its best scores are found in two steps: the largest of each block
of columns, which vector instructions compute, then the k best within the k best blocks. Every one of the k best lies
in a block whose largest is no smaller than it, so nothing is lost.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int64
from torch import Tensor

# Rows that become float32 at a time.
CHUNK = 16_384
# Columns of a block.
BLOCK = 64
# Queries at a time: with CHUNK rows, 64 MB of scores.
QUERIES = 1024


def top_k(
    queries: Float32[np.ndarray, "queries dim"],
    segments: Sequence[Float16[np.ndarray, "_ dim"]],
    alive: Sequence[Bool[np.ndarray, " _"]],
    k: int,
) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Scores, largest first, and row numbers counted over all segments; equal scores come in the order of the rows.

    Rows that are not alive are passed over. Where there are fewer than k, the rest has the score -inf and the row -1.
    """
    parts = [
        _block_of_queries(torch.from_numpy(queries[start : start + QUERIES]), segments, alive, k)
        for start in range(0, len(queries), QUERIES)
    ]
    scores, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    return scores, rows


def _block_of_queries(
    queries: Tensor, segments: Sequence[np.ndarray], alive: Sequence[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    count, dim = queries.shape
    best = torch.full((count, k), -torch.inf)
    rows = torch.full((count, k), -1, dtype=torch.int64)
    buffer = torch.zeros(CHUNK, dim)
    first = 0
    for vectors, living in zip(segments, alive, strict=True):
        for start in range(0, len(vectors), CHUNK):
            part = torch.from_numpy(vectors[start : start + CHUNK])
            used = -(-len(part) // BLOCK) * BLOCK
            buffer[: len(part)].copy_(part)
            scores = queries @ buffer[:used].T
            scores[:, len(part) :] = -torch.inf
            dead = ~living[start : start + CHUNK]
            if dead.any():
                scores[:, : len(part)][:, torch.from_numpy(dead)] = -torch.inf
            found, columns = _best_columns(scores, min(k, used))
            best, rows = _merged(best, rows, found, columns + first + start, k)
        first += len(vectors)
    rows[best == -torch.inf] = -1
    return best.numpy(), rows.numpy()


def _best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are."""
    count, width = scores.shape
    if width <= 4 * k * BLOCK:
        return scores.topk(k, dim=1)
    blocks = scores.view(count, -1, BLOCK)
    _, chosen = blocks.amax(2).topk(k, dim=1)
    candidates = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    found, place = candidates.topk(k, dim=1)
    return found, chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK


def _merged(scores: Tensor, rows: Tensor, more: Tensor, more_rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of two lists for each query, in the order of score, then row."""
    all_scores, all_rows = torch.cat([scores, more], 1), torch.cat([rows, more_rows], 1)
    all_rows, order = all_rows.sort(dim=1)
    all_scores, second = all_scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return all_scores[:, :k], all_rows.gather(1, second)[:, :k]
