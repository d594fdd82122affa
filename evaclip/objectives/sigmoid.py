"""SigLIP's loss (Zhai et al., arXiv 2303.15343, equation 1) over the batch of all processes, in tiles.

Every image and every caption of the batch is a pair of its own, right or wrong, with logit L_ij = s I_i T_j^t + b:

    loss = 1/B sum_i [ softplus(-L_ii) + sum_{j != i} softplus(L_ij) ]

There is no normaliser, so a tile needs nothing of the others. G_ij = sigmoid(L_ij) off the diagonal and -sigmoid(-L_ii)
on it; dI = s/B G T, dT = s/B G^t I, ds = sum_i <I_i, dI_i> / s and db = 1/B sum_ij G_ij. Features, tiles, the journey
of the captions and the averaging of gradients are those of `contrastive`.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from evaclip.objectives.columns import Block, Exchange, Gathered, Total, mean, sent_off, slices, sweep
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


def sigmoid_loss(
    image: Float[Tensor, "local dim"],
    text: Float[Tensor, "local dim"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    *,
    precision: Literal["fp16", "fp32"] = "fp16",
    tile: tuple[int, int] | None = None,
    exchange: Exchange | None = None,
) -> tuple[Float[Tensor, ""], ContrastiveStats]:
    """The mean loss of an image over all processes, and the accuracies; arguments as in `contrastive_loss`."""
    how = how_to(image, precision, tile, exchange)
    loss, i2t, t2i = _Sigmoid.apply(image.float(), text.float(), scale.float(), bias.float(), how)  # type: ignore[misc]
    return loss, ContrastiveStats(i2t, t2i)


class _Sigmoid(torch.autograd.Function):
    """Forward keeps the features; backward does the tiles again."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, how: How
    ) -> tuple[Tensor, Tensor, Tensor]:
        exchange = how.exchange
        image, text = image.to(how.dtype), text.to(how.dtype)
        text, captions = sent_off(text, exchange)
        ctx.save_for_backward(image, text, scale, bias)
        ctx.how, ctx.captions = how, captions
        diagonal = scale * inner(image, text) + bias
        lost = image.new_zeros(len(image), dtype=torch.float32)
        row_top, column_top = torch.full_like(lost, -torch.inf), Total(torch.full_like(lost, -torch.inf), "max")
        for rows, block, l_ in _tiles(image, captions, scale, bias, [column_top], how):
            diagonal_view(l_, rows, block).fill_(-torch.inf)
            lost[rows] += F.softplus(l_).sum(1)
            torch.maximum(row_top[rows], l_.amax(1), out=row_top[rows])
            torch.maximum(block.totals[0], l_.amax(0), out=block.totals[0])
        found = diagonal - ROUNDING * scale
        parts = [
            (F.softplus(-diagonal) + lost).mean(),
            (found > row_top).float().mean(),
            (found > column_top.wait()).float().mean(),
        ]
        loss, i2t, t2i = mean(torch.stack(parts), exchange).unbind()
        ctx.mark_non_differentiable(i2t, t2i)
        return loss, i2t, t2i

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        image, text, scale, bias = ctx.saved_tensors
        factor = upstream / len(image)  # n / B: averaged over the processes
        pull = torch.sigmoid(-(scale * inner(image, text) + bias))
        d_image = -(factor * scale * pull)[:, None] * text
        total = Total(torch.zeros_like(text, dtype=torch.float32))
        d_bias = -pull.sum()
        for rows, block, l_ in _tiles(image, ctx.captions, scale, bias, [total], ctx.how):
            if block.own is not None and rows.start == 0:
                block.totals[0].sub_((factor * scale * pull)[block.own, None] * image[block.own])
            g = torch.sigmoid(l_)
            diagonal_view(g, rows, block).zero_()
            d_bias += g.sum()
            add_product(d_image[rows], g, block.values[0], factor * scale)
            add_product(block.totals[0], g.T, image[rows], factor * scale)
        d_scale = (inner(image, d_image).sum() / scale).reshape(1)
        return d_image, ctx.how.exchange.brought_home(total), d_scale, (factor * d_bias).reshape(1), None


def _tiles(
    image: Tensor, captions: Tensor | Gathered, scale: Tensor, bias: Tensor, totals: list[Total], how: How
) -> Iterator[tuple[slice, Block, Tensor]]:
    """Rows, block and logits of every tile."""
    width = how.columns(len(image), image.shape[1], image.shape[1])
    for block in sweep([captions], totals, how.exchange, chunk=width):
        for rows in slices(len(image), how.tile[0]):
            yield rows, block, logits(image[rows], block.values[0], scale).add_(bias)
