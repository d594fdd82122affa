"""The exact symmetric contrastive loss, without the matrix of logits.

CLIP's loss (arXiv 2103.00020, figure 3) over a batch of B pairs with unit features I, T and logits S = s I T^t:

    loss = 1/2B sum_i [ log sum_j exp S_ij - S_ii ] + 1/2B sum_j [ log sum_i exp S_ij - S_jj ]

S has B^2 entries, 64 GB at a batch of 131,072. Here it is visited in tiles that fit the cache. Three ideas:

* One exponential per entry serves both directions. E_ij = exp(S_ij - r) with one shared reference r = 0.35 s neither
  overflows nor loses a sum while s <= 100 and every row and column has one cosine above -0.52. The rare batch where
  that fails is noticed from its sums and done again with a running maximum per row and column.
* The diagonal stays out of the sums. With r_i, c_i the log-sum-exp over j != i, the loss is
  1/2B sum_i softplus(r_i - S_ii) + softplus(c_i - S_ii), which keeps its digits when a pair is almost certain, where
  log-sum-exp minus diagonal gives zero.
* The backward pass computes the tiles again (or reads them, when the whole matrix is small). With R_i, C_j the full
  log-sum-exps, G_ij = exp(S_ij - R_i) + exp(S_ij - C_j) = E_ij (a_i + b_j) off the diagonal, dI = k G T,
  dT = k G^t I, and ds = sum_i <I_i, dI_i> / s comes for free.

Label smoothing of weight e adds a rank-one term: e (mean_i S_ii - mean_ij S_ij) to the loss, nothing to the tiles.

Memory beside the features and their gradients: a few tiles, a dozen vectors of length B, and the tiles of the forward
pass when all of them fit KEPT_BYTES (a quarter of the work saved).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# Rows and columns of a tile: on a CPU a tile of float32 fits the second-level cache, on a GPU it feeds the cores.
CPU_TILE = (512, 1024)
GPU_TILE = (4096, 8192)
# The whole matrix is kept for the backward pass up to this size: a batch of 4,096.
KEPT_BYTES = 64 * 2**20
# A pair is found if its logit leads by more than this times the scale: two equal captions are a tie, not a match.
ROUNDING = 1e-6
# Smallest sum of exponentials that is trusted; below it float32 is about to lose terms.
TINY_SUM = 1e-30


@dataclass(frozen=True)
class ContrastiveStats:
    """How many of the batch's pairs find each other, as fractions on the device of the features."""

    image_to_text: Tensor
    """Images whose own caption has the highest logit."""
    text_to_image: Tensor
    """Captions whose own image has the highest logit."""


def contrastive_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    scale: Float[Tensor, "1"],
    *,
    label_smoothing: float = 0.0,
    tile: tuple[int, int] | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, ""], ContrastiveStats]:
    """The mean loss over both directions, and the accuracies.

    `image`, `text`: unit rows, pair i in row i. `scale`: the logit scale itself, not its logarithm. `label_smoothing`:
    the share of each target that is spread over the whole batch. `tile`: rows and columns of a tile. `group`: the
    ranks whose rows form the batch; only one process for now. Gradients reach all three tensors.
    """
    if group is not None and group.size() > 1:
        raise ValueError("the contrastive loss does not span several processes yet")
    tile = tile or (GPU_TILE if image.is_cuda else CPU_TILE)
    loss, i2t, t2i = _Contrastive.apply(image.float(), text.float(), scale.float(), label_smoothing, tile)  # type: ignore[misc]
    return loss, ContrastiveStats(i2t, t2i)


class _Contrastive(torch.autograd.Function):
    """Forward keeps the features, the diagonal and the log-sum-exps; backward does the tiles again."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, smoothing: float, tile: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = len(image)
        diagonal = scale * (image * text).sum(1)
        kept: list[Tensor] | None = [] if batch * batch * image.element_size() <= KEPT_BYTES else None
        sums = _shared_reference_sums(image, text, scale, tile, kept)
        shared = bool(torch.stack([s.min() for s in (sums.row, sums.column)]).min() > TINY_SUM) or batch == 1
        shared = shared and bool(torch.isfinite(sums.row).all() & torch.isfinite(sums.column).all())
        if not shared:
            kept = None
            sums = _running_maximum_sums(image, text, scale, tile)
        row, column = sums.row.log() + sums.row_reference, sums.column.log() + sums.column_reference
        loss = (F.softplus(row - diagonal) + F.softplus(column - diagonal)).sum() / (2 * batch)
        if smoothing:
            loss = loss + smoothing * (diagonal.mean() - scale[0] * (image.mean(0) @ text.mean(0)))
        ctx.save_for_backward(image, text, scale, diagonal, row, column)
        ctx.smoothing, ctx.tile, ctx.shared, ctx.kept = smoothing, tile, shared, kept
        found = diagonal - ROUNDING * scale
        i2t, t2i = (found > sums.row_maximum).float().mean(), (found > sums.column_maximum).float().mean()
        ctx.mark_non_differentiable(i2t, t2i)
        return loss, i2t, t2i

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        image, text, scale, diagonal, row, column = ctx.saved_tensors
        batch = len(image)
        all_row, all_column = torch.logaddexp(row, diagonal), torch.logaddexp(column, diagonal)
        d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
        reference = _reference(scale)
        row_factor, column_factor = (reference - all_row).exp(), (reference - all_column).exp()
        for number, (rows, columns) in enumerate(_tiles(batch, ctx.tile)):
            if ctx.shared:
                e = ctx.kept[number] if ctx.kept else _exponentials(image[rows], text[columns], scale, reference)
                g = e * (row_factor[rows, None] + column_factor[columns])
            else:
                s = (scale * image[rows]) @ text[columns].T
                g = (s - all_row[rows, None]).exp_().add_((s - all_column[columns]).exp_())
            _diagonal_view(g, rows, columns).zero_()
            d_image[rows] += g @ text[columns]
            d_text[columns] += g.T @ image[rows]
        # Subtracting the diagonal from its own softmax would lose its digits; the sigmoid keeps them.
        pull = (torch.sigmoid(row - diagonal) + torch.sigmoid(column - diagonal))[:, None]
        d_image -= pull * text
        d_text -= pull * image
        if ctx.smoothing:
            d_image += 2 * ctx.smoothing * (text - text.mean(0))
            d_text += 2 * ctx.smoothing * (image - image.mean(0))
        factor = upstream / (2 * batch)
        d_scale = (factor * (image * d_image).sum()).reshape(1)
        return d_image.mul_(scale * factor), d_text.mul_(scale * factor), d_scale, None, None


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
    image: Tensor, text: Tensor, scale: Tensor, tile: tuple[int, int], kept: list[Tensor] | None
) -> _Sums:
    """One exponential per entry. A sum that under- or overflowed shows as 0 or inf; the caller looks.

    The tiles of exp(S - reference) are appended to `kept` when it is a list.
    """
    reference = _reference(scale)
    row, column = torch.zeros_like(image[:, 0]), torch.zeros_like(image[:, 0])
    row_top, column_top = torch.zeros_like(row), torch.zeros_like(row)
    for rows, columns in _tiles(len(image), tile):
        e = _exponentials(image[rows], text[columns], scale, reference)
        _diagonal_view(e, rows, columns).zero_()
        row[rows] += e.sum(1)
        column[columns] += e.sum(0)
        torch.maximum(row_top[rows], e.amax(1), out=row_top[rows])
        torch.maximum(column_top[columns], e.amax(0), out=column_top[columns])
        if kept is not None:
            kept.append(e)
    return _Sums(row, column, reference, reference, row_top.log() + reference, column_top.log() + reference)


def _running_maximum_sums(image: Tensor, text: Tensor, scale: Tensor, tile: tuple[int, int]) -> _Sums:
    """Two exponentials per entry and a reference for each row and column: right for any finite logits."""
    row, column = torch.zeros_like(image[:, 0]), torch.zeros_like(image[:, 0])
    row_top, column_top = torch.full_like(row, -torch.inf), torch.full_like(row, -torch.inf)
    for rows, columns in _tiles(len(image), tile):
        s = (scale * image[rows]) @ text[columns].T
        _diagonal_view(s, rows, columns).fill_(-torch.inf)
        _merge(s, row, row_top, rows, 1)
        _merge(s, column, column_top, columns, 0)
    return _Sums(row, column, row_top, column_top, row_top, column_top)


def _merge(s: Tensor, sums: Tensor, top: Tensor, where: slice, axis: int) -> None:
    """Fold a tile into running sums of exp(S - top), where top is the running maximum along `axis`."""
    new = torch.maximum(top[where], s.amax(axis))
    anchor = torch.where(new.isinf(), torch.zeros_like(new), new)  # a 1 x 1 tile on the diagonal has no entry at all
    sums[where] = sums[where] * (top[where] - anchor).exp() + (s - anchor.unsqueeze(axis)).exp().sum(axis)
    top[where] = new


def _exponentials(image: Tensor, text: Tensor, scale: Tensor, reference: Tensor) -> Tensor:
    """exp(S - reference) of a tile."""
    return ((scale * image) @ text.T).sub_(reference).exp_()


def _tiles(batch: int, tile: tuple[int, int]) -> list[tuple[slice, slice]]:
    rows, columns = tile
    return [
        (slice(top, min(top + rows, batch)), slice(left, min(left + columns, batch)))
        for top in range(0, batch, rows)
        for left in range(0, batch, columns)
    ]


def _diagonal_view(tile: Tensor, rows: slice, columns: slice) -> Tensor:
    """The entries of a tile that lie on the diagonal of the whole matrix, as a view, often empty."""
    first = max(rows.start, columns.start)
    last = min(rows.stop, columns.stop)
    if first >= last:
        return tile[:0, 0]
    return tile[first - rows.start : last - rows.start, first - columns.start : last - columns.start].diagonal()
