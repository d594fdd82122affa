"""The text tower: open_clip's parameters under a forward pass of our own.

CLIP's text transformer is causal and pooled at the end-of-text token (arXiv 2103.00020, section 2.4), so whatever
stands after that token changes nothing. The forward pass therefore takes captions cut to any common length, and the
loader cuts each batch to its longest caption. Packed, it takes no padding at all: everything but the attention works on
the tokens of all captions one behind the other, and attention on each caption by itself. The features are those of the
padded form, for the share of its work that the captions really have.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from evaclip.models.shapes import TextShape
from evaclip.openclip import QuickGELU, TextTransformer


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed batch come from."""

    batch: int
    length: int
    """Tokens of the longest caption."""
    where: Int64[Tensor, " total"]
    """Each token's place in the flattened padded batch."""
    starts: Int[Tensor, " captions_and_end"]
    """First token of each caption, and the total."""


class TextTower(TextTransformer):
    """CLIP's text transformer; parameter names and initialisation are open_clip's."""

    def __init__(self, shape: TextShape, dim: int) -> None:
        """`dim`: dimensions of the joint space."""
        super().__init__(
            context_length=shape.context,
            vocab_size=shape.vocabulary,
            width=shape.width,
            heads=shape.heads,
            layers=shape.depth,
            output_dim=dim,
            act_layer=QuickGELU if shape.activation == "quick_gelu" else nn.GELU,
        )
        for block in self.transformer.resblocks:  # stays a call of a module, which sharding hooks into
            block.forward = MethodType(_block_forward, block)
        self.shape = shape
        self.checkpointing = False
        self.packed = False

    def forward(  # type: ignore[override]
        self, tokens: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch dim"]:
        """One vector per caption, not normalised. The end-of-text token is the one with the highest id."""
        ends = tokens.argmax(dim=1)
        if self.packed:
            packing = packed(ends, tokens.shape[1])
            places = packing.where % packing.length
            # An embedding, since the backward pass of plain indexing adds up in another order on every run.
            x = self.token_embedding(tokens.flatten()[packing.where]) + F.embedding(places, self.positional_embedding)
            x = self._blocks(x, packing)[packing.starts[1:] - 1]
        else:
            x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
            x = self._blocks(x, None)
            x = x.gather(1, ends[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
        # The norm works on each token alone: after the pooling it has one token to do, not the whole caption.
        return self.ln_final(x) @ self.text_projection

    def _blocks(self, x: Tensor, packing: Packing | None) -> Tensor:
        for block in self.transformer.resblocks:
            if self.checkpointing and x.requires_grad:
                x = checkpoint(block, x, packing, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, packing)
        return x


def packed(ends: Int64[Tensor, " batch"], length: int) -> Packing:
    """The packing of captions whose end-of-text tokens stand at `ends`, padded to `length`."""
    real = torch.arange(length, device=ends.device) <= ends[:, None]
    starts = F.pad((ends + 1).cumsum(0), (1, 0)).to(torch.int32)
    return Packing(len(ends), length, real.flatten().nonzero()[:, 0], starts)


def _block_forward(block: Any, x: Tensor, packing: Packing | None = None) -> Tensor:
    """One transformer block with causal attention; x is [batch, length, width], or [total, width] when packed."""
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    qkv = qkv.unflatten(-1, (3, attention.num_heads, -1))
    mixed = _causal(qkv) if packing is None else _packed_causal(qkv, packing)
    x = x + attention.out_proj(mixed.flatten(-2))
    return x + block.mlp(block.ln_2(x))


def _causal(
    qkv: Float[Tensor, "batch length 3 heads channels"],
) -> Float[Tensor, "batch length heads channels"]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _packed_causal(
    qkv: Float[Tensor, "total 3 heads channels"], packing: Packing
) -> Float[Tensor, "total heads channels"]:
    """Each caption by itself: by torch's kernel for sequences of any length on a GPU, else padded for a moment."""
    if qkv.is_cuda and qkv.dtype in (torch.float16, torch.bfloat16):
        q, k, v = qkv.unbind(1)
        longest = packing.length
        mixed = varlen_attn(q, k, v, packing.starts, packing.starts, longest, longest, window_size=(-1, 0))
        assert isinstance(mixed, Tensor)
        return mixed
    padded = qkv.new_zeros(packing.batch * packing.length, *qkv.shape[1:]).index_copy(0, packing.where, qkv)
    return _causal(padded.unflatten(0, (packing.batch, packing.length))).flatten(0, 1)[packing.where]
