"""The text tower: open_clip's parameters under a forward pass of our own.

CLIP's text transformer is causal and pooled at the end-of-text token (arXiv 2103.00020, section 2.4), so whatever
stands after that token changes nothing. The forward pass therefore takes captions cut to any common length, and the
loader cuts each batch to its longest caption: the same features as at 77 tokens, for a fraction of the work.
"""

from types import MethodType
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evaclip.models.shapes import TextShape
from evaclip.openclip import TextTransformer


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
        )
        for block in self.transformer.resblocks:  # stays a call of a module, which sharding hooks into
            block.forward = MethodType(_block_forward, block)
        self.shape = shape
        self.checkpointing = False

    def forward(  # type: ignore[override]
        self, tokens: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch dim"]:
        """One vector per caption, not normalised. The end-of-text token is the one with the highest id."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.transformer.resblocks:
            if self.checkpointing and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        end = tokens.argmax(dim=1)
        pooled = x.gather(1, end[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
        # The norm works on each token alone: after the pooling it has one token to do, not the whole caption.
        return self.ln_final(pooled) @ self.text_projection


def _block_forward(block: Any, x: Tensor) -> Tensor:
    """One transformer block with causal attention through torch's fused kernels."""
    attention = block.attn
    batch, length, width = x.shape
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + attention.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
    return x + block.mlp(block.ln_2(x))
