"""Tiles of the matrix of logits: products of image rows and caption rows, in float32 from features of 16 or 32 bits."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evaclip.objectives.columns import Block, Exchange

# Rows and columns of a tile: on a CPU a tile of float32 fits the second-level cache, on a GPU it feeds the cores.
CPU_TILE = (512, 1024)
GPU_TILE = (4096, 8192)
# Totals of the captions' gradient that a process holds at a time, two of them while one travels.
TOTALS_BYTES = 12 * 2**20
# Columns of a process below which tiles get slower than the memory is worth.
FEWEST_COLUMNS = 256
# Entries of the gradient matrix are at most 2, so in float16 they keep most digits after this factor.
SIXTEEN_BIT_FACTOR = 4096.0

# A pair is found if its logit leads by more than this times the scale: two equal captions are a tie, not a match.
ROUNDING = 1e-6


@dataclass(frozen=True)
class ContrastiveStats:
    """How many of the batch's pairs find each other, as fractions on the device of the features."""

    image_to_text: Tensor
    """Images whose own caption has the highest logit."""
    text_to_image: Tensor
    """Captions whose own image has the highest logit."""


@dataclass(frozen=True, kw_only=True)
class How:
    """What the two passes of a loss have to agree on."""

    smoothing: float
    tile: tuple[int, int]
    dtype: torch.dtype
    exchange: Exchange

    def columns(self, batch: int, dim: int, totals: int) -> int:
        """Columns of a block: a tile's, or fewer where their totals, `totals` floats each, would take too much."""
        fit = TOTALS_BYTES // (4 * max(totals, 1) * self.exchange.processes)
        return min(self.tile[1], batch, max(fit, FEWEST_COLUMNS) if self.exchange.processes > 1 else batch)


def how_to(
    image: Tensor,
    precision: Literal["fp16", "fp32"],
    tile: tuple[int, int] | None,
    exchange: Exchange | None,
    smoothing: float = 0.0,
) -> How:
    """What the caller chose, with the device's own tile and one process where he chose none."""
    return How(
        smoothing=smoothing,
        tile=tile or (GPU_TILE if image.is_cuda else CPU_TILE),
        dtype=torch.float16 if precision == "fp16" else torch.float32,
        exchange=exchange or Exchange(),
    )


def logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """A tile of S in float32, from features of either precision."""
    if image.is_cuda and image.dtype == torch.float16:
        return torch.mm(image, text.T, out_dtype=torch.float32).mul_(scale)
    return (scale * image.float()) @ text.float().T


def add_product(into: Tensor, g: Tensor, features: Tensor, factor: Tensor) -> None:
    """into += factor * (g @ features), added up in float32."""
    if features.is_cuda and features.dtype == torch.float16:
        product = torch.mm((g * SIXTEEN_BIT_FACTOR).half(), features, out_dtype=torch.float32)
        into.addcmul_(product, factor / SIXTEEN_BIT_FACTOR)
    else:
        into.addcmul_(g @ features.float(), factor)


def inner(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each pair of rows, in float32."""
    return (one.float() * other).sum(1)


def diagonal_view(tile: Tensor, rows: slice, block: Block) -> Tensor:
    """The entries of a tile that lie on the diagonal of the whole matrix, as a view, often empty."""
    if block.own is None:
        return tile[:0, 0]
    first, last = max(rows.start, block.own.start), min(rows.stop, block.own.stop)
    if first >= last:
        return tile[:0, 0]
    left, top = block.own.start, rows.start
    return tile[first - top : last - top, first - left : last - left].diagonal()
