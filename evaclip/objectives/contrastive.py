"""The exact symmetric contrastive loss, over the batch of all processes, without the matrix of logits.

CLIP's loss (arXiv 2103.00020, figure 3) over a batch of B pairs with unit features I, T and logits S = s I T^t:

    loss = 1/2B sum_i [ log sum_j exp S_ij - S_ii ] + 1/2B sum_j [ log sum_i exp S_ij - S_jj ]

S has B^2 entries, 64 GB at a batch of 131,072. Here each of n processes owns b = B/n rows, its images, and visits them
in tiles that fit the cache; only the captions travel (see `columns`). Four ideas:

* One exponential per entry serves both directions. E_ij = exp(S_ij - r) with one shared reference r = 0.35 s neither
  overflows nor loses a sum while s <= 100 and every row and column has one cosine above -0.52. The rare batch where
  that fails is noticed from its sums and done again with the true maximum of each row and column.
* The diagonal stays out of the sums. With r_i, c_i the log-sum-exp over j != i, the loss is
  1/2B sum_i softplus(r_i - S_ii) + softplus(c_i - S_ii), which keeps its digits when a pair is almost certain, where
  log-sum-exp minus diagonal gives zero.
* The backward pass computes the tiles again (or reads them, when all of them are small). With R_i, C_j the full
  log-sum-exps, G_ij = exp(S_ij - R_i) + exp(S_ij - C_j) = E_ij (a_i + b_j) off the diagonal, dI = k G T,
  dT = k G^t I, and ds = sum_i <I_i, dI_i> / s comes for free.
* Features are rounded to float16 and products added up in float32. A unit vector's entries are small, so float16 has
  8 times the precision of bfloat16 at the same speed; the gradient is off by about 5e-4 of its norm.

Label smoothing of weight e adds a rank-one term: e (mean_i S_ii - mean_ij S_ij) to the loss, nothing to the tiles.

Gradients are those that data-parallel training averages: n times the derivative of the loss on each process, so that
the mean over the processes is the gradient of one process with the whole batch, for the logit scale as well.

Memory of a process beside its float32 features, in bytes: 2 B D for the gathered captions, 2 b D for its images in
16 bits, 8 b D for the two gradients, two buffers of TOTALS_BYTES, a few tiles, a dozen vectors of length b, and the
tiles of the forward pass when all of them fit KEPT_BYTES (a quarter of the work saved). In a ring 40 b D at most.
benchmarks/loss_share.py measures it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from evaclip.objectives.columns import Exchange, Gathered, Total, mean, sent_off, slices, sweep
from evaclip.objectives.tiles import (
    ROUNDING,
    ContrastiveStats,
    How,
    add_product,
    diagonal_view,
    how_to,
    inner,
    logits,
)

# A process's tiles are kept for the backward pass up to this size: a batch of 4,096 in one process.
KEPT_BYTES = 64 * 2**20
# Smallest sum of exponentials that is trusted; below it float32 is about to lose terms.
TINY_SUM = 1e-30


def contrastive_loss(
    image: Float[Tensor, "local dim"],
    text: Float[Tensor, "local dim"],
    scale: Float[Tensor, "1"],
    *,
    label_smoothing: float = 0.0,
    precision: Literal["fp16", "fp32"] = "fp16",
    tile: tuple[int, int] | None = None,
    exchange: Exchange | None = None,
) -> tuple[Float[Tensor, ""], ContrastiveStats]:
    """The mean loss over both directions and all processes, and the accuracies.

    `image`, `text`: unit rows, pair i in row i, as many on every process. `scale`: the logit scale itself, not its
    logarithm. `label_smoothing`: the share of each target that is spread over the whole batch. `precision`: of the
    features; sums are float32. `tile`: rows and columns of a tile. Gradients reach all three tensors and are to be
    averaged over the processes.
    """
    how = how_to(image, precision, tile, exchange, label_smoothing)
    loss, i2t, t2i = _Contrastive.apply(image.float(), text.float(), scale.float(), how)  # type: ignore[misc]
    return loss, ContrastiveStats(i2t, t2i)


class _Contrastive(torch.autograd.Function):
    """Forward keeps the features, the diagonal and the log-sum-exps; backward does the tiles again."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor]:
        exchange, local = how.exchange, len(image)
        batch = local * exchange.processes
        image, text = image.to(how.dtype), text.to(how.dtype)
        text, captions = sent_off(text, exchange)
        diagonal = scale * inner(image, text)
        kept: list[Tensor] | None = [] if local * batch * 4 <= KEPT_BYTES else None
        sums = _shared_reference_sums(image, captions, scale, how, kept)
        trusted = _trusted(sums, exchange.group) or batch == 1
        if not trusted:
            kept = None
            sums = _own_reference_sums(image, captions, scale, how)
        row, column = sums.row.log() + sums.row_reference, sums.column.log() + sums.column_reference
        found = diagonal - ROUNDING * scale
        parts = [
            (F.softplus(row - diagonal) + F.softplus(column - diagonal)).mean() / 2,
            (found > sums.row_maximum).float().mean(),
            (found > sums.column_maximum).float().mean(),
        ]
        means = image.new_zeros(2, 0)
        if how.smoothing:
            means = mean(torch.stack([image.mean(0, dtype=torch.float32), text.mean(0, dtype=torch.float32)]), exchange)
            parts[0] = parts[0] + how.smoothing * (diagonal.mean() - scale[0] * (means[0] @ means[1]))
        loss, i2t, t2i = mean(torch.stack(parts), exchange).unbind()
        ctx.save_for_backward(image, text, scale, diagonal, row, column, means)
        ctx.how, ctx.captions, ctx.trusted, ctx.kept = how, captions, trusted, kept
        ctx.mark_non_differentiable(i2t, t2i)
        return loss, i2t, t2i

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        image, text, scale, diagonal, row, column, means = ctx.saved_tensors
        how: How = ctx.how
        exchange, local = how.exchange, len(image)
        all_row, all_column = torch.logaddexp(row, diagonal), torch.logaddexp(column, diagonal)
        reference = _reference(scale)
        factor = scale * upstream / (2 * local)  # n / 2B: see the module's docstring on averaging
        # Subtracting the diagonal from its own softmax would lose its digits; the sigmoid keeps them.
        pull = factor * (torch.sigmoid(row - diagonal) + torch.sigmoid(column - diagonal))
        d_image, d_text = torch.empty_like(image, dtype=torch.float32), torch.empty_like(text, dtype=torch.float32)
        for rows in slices(local, how.tile[0]):
            d_image[rows] = -pull[rows, None] * text[rows]
            if how.smoothing:
                d_image[rows] += 2 * how.smoothing * factor * (text[rows] - means[1])
        total = Total(d_text.zero_())
        kept = iter(ctx.kept or ())
        width = how.columns(local, text.shape[1], text.shape[1])
        blocks = sweep([ctx.captions, all_column], [total], exchange, chunk=width)
        for block in blocks:
            captions, block_column = block.values
            block_factor = (reference - block_column).exp()
            if block.own is not None:
                block.totals[0].sub_(pull[block.own, None] * image[block.own])
                if how.smoothing:
                    block.totals[0].add_(2 * how.smoothing * factor * (image[block.own] - means[0]))
            for rows in slices(local, how.tile[0]):
                if ctx.trusted:
                    e = next(kept) if ctx.kept else _exponentials(image[rows], captions, scale, reference)
                    g = e * ((reference - all_row[rows]).exp()[:, None] + block_factor)
                else:
                    s = logits(image[rows], captions, scale)
                    g = (s - all_row[rows, None]).exp_().add_((s - block_column).exp_())
                diagonal_view(g, rows, block).zero_()
                add_product(d_image[rows], g, captions, factor)
                add_product(block.totals[0], g.T, image[rows], factor)
        d_scale = (torch.stack([inner(image[rows], d_image[rows]).sum() for rows in slices(local, how.tile[0])])).sum()
        return d_image, exchange.brought_home(total), (d_scale / scale).reshape(1), None


@dataclass
class _Sums:
    """Sums of exp(S - reference) over the other rows or columns, and the largest such S."""

    row: Tensor
    column: Tensor
    row_reference: Tensor
    column_reference: Tensor
    row_maximum: Tensor
    column_maximum: Tensor


def _reference(scale: Tensor) -> Tensor:
    return 0.35 * scale


def _shared_reference_sums(
    image: Tensor, text: Tensor | Gathered, scale: Tensor, how: How, kept: list[Tensor] | None
) -> _Sums:
    """One exponential per entry. A sum that under- or overflowed shows as 0 or inf; the caller looks.

    The tiles of exp(S - reference) are appended to `kept` when it is a list.
    """
    reference = _reference(scale)
    row, row_top = image.new_zeros(len(image), dtype=torch.float32), image.new_zeros(len(image), dtype=torch.float32)
    column, column_top = Total(torch.zeros_like(row)), Total(torch.zeros_like(row), "max")
    width = how.columns(len(image), image.shape[1], image.shape[1] if kept is not None else 2)
    exchange = how.exchange
    for block in sweep([text], [column, column_top], exchange, chunk=width):
        sums, tops = block.totals
        for rows in slices(len(image), how.tile[0]):
            e = _exponentials(image[rows], block.values[0], scale, reference)
            diagonal_view(e, rows, block).zero_()
            row[rows] += e.sum(1)
            sums += e.sum(0)
            torch.maximum(row_top[rows], e.amax(1), out=row_top[rows])
            torch.maximum(tops, e.amax(0), out=tops)
            if kept is not None:
                kept.append(e)
    top = column_top.wait().log() + reference
    return _Sums(row, column.wait(), reference, reference, row_top.log() + reference, top)


def _own_reference_sums(image: Tensor, text: Tensor | Gathered, scale: Tensor, how: How) -> _Sums:
    """A reference for each row and column, its maximum, found first: right for any finite logits."""
    row = image.new_zeros(len(image), dtype=torch.float32)
    row_top = torch.full_like(row, -torch.inf)
    column, column_top = Total(torch.zeros_like(row)), Total(torch.full_like(row, -torch.inf), "max")
    for rows, block, s in _maskedlogits(image, [text], [column_top], scale, how):
        torch.maximum(row_top[rows], s.amax(1), out=row_top[rows])
        torch.maximum(block.totals[0], s.amax(0), out=block.totals[0])
    for rows, block, s in _maskedlogits(image, [text, column_top.wait()], [column], scale, how):
        row[rows] += (s - row_top[rows, None]).exp().sum(1)
        block.totals[0].add_((s - block.values[1]).exp_().sum(0))
    return _Sums(row, column.wait(), row_top, column_top.home, row_top, column_top.home)


def _maskedlogits(image: Tensor, values: list[Any], totals: list[Total], scale: Tensor, how: How) -> Any:
    """Rows, block and logits of every tile, with minus infinity on the diagonal."""
    exchange = how.exchange
    width = how.columns(len(image), image.shape[1], 1)
    for block in sweep(values, totals, exchange, chunk=width):
        for rows in slices(len(image), how.tile[0]):
            s = logits(image[rows], block.values[0], scale)
            diagonal_view(s, rows, block).fill_(-torch.inf)
            yield rows, block, s


def _exponentials(image: Tensor, text: Tensor, scale: Tensor, reference: Tensor) -> Tensor:
    """exp(S - reference) of a tile."""
    return logits(image, text, scale).sub_(reference).exp_()


def _trusted(sums: _Sums, group: ProcessGroup | None) -> bool:
    """Whether no sum lost terms, on any process: they all have to go the same way."""
    ends = torch.stack([sums.row.min(), sums.column.min(), -sums.row.max(), -sums.column.max()])
    ends = ends.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if group is not None:
        dist.all_reduce(ends, dist.ReduceOp.MIN, group)
    *smallest, row_end, column_end = ends.tolist()
    return min(smallest) > TINY_SUM and min(row_end, column_end) > -math.inf
