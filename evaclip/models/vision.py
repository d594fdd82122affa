"""The vision tower: timm's EVA blocks under a forward pass of our own.

timm's `Eva` holds the parameters, so keys and values are those of open_clip's EVA models. The forward pass is ours
because three things come from outside, each a pure function of (seed, purpose, sample): which tokens stay (FLIP,
arXiv 2212.00794, section 3), which are replaced by the mask token (EVA, 2211.07636, section 2), and which residual
branches are dropped (stochastic depth, 1603.09382, section 3). Nothing random happens in here.

      images -> patches -> [mask token] -> + class token, + position -> [keep some] -> blocks -> norm -> token 0 -> head
                                           rotary angles ------------> [the same] ---^

Students of feature distillation have BEiT's shared relative position bias in the place of the position embedding; what
stays of it goes to every block, as the rotary angles do.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from timm.layers.norm import RmsNorm
from timm.models.beit import RelativePositionBias
from timm.models.eva import Eva, EvaBlockPostNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evaclip.models.shapes import VisionShape


class VisionTower(nn.Module):
    """An EVA vision transformer with its projection to the joint space; parameters live under `trunk.`."""

    def __init__(self, shape: VisionShape, dim: int, *, mask_token: bool = False) -> None:
        """`dim`: dimensions of the joint space. `mask_token`: whether masked image modelling will need one."""
        super().__init__()
        self.shape = shape
        self.checkpointing = False
        self.trunk: Any = _build_trunk(shape, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width)) if mask_token else None

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        keep: Int64[Tensor, "batch kept"] | None = None,
        mask: Bool[Tensor, "batch patches"] | None = None,
        drop_path: Float[Tensor, "batch branches"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """One vector per image, not normalised.

        `keep`: indices of the patches that stay, the class token always does. `mask`: patches that are replaced by
        the mask token. `drop_path`: the factor of each residual branch, two per block (attention, MLP): 0 or 1 / keep
        probability.
        """
        return self.trunk.head(self.tokens(images, keep, mask, drop_path)[:, 0])

    def tokens(
        self,
        images: Float[Tensor, "batch 3 height width"],
        keep: Int64[Tensor, "batch kept"] | None = None,
        mask: Bool[Tensor, "batch patches"] | None = None,
        drop_path: Float[Tensor, "batch branches"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """The class token and the patch tokens after the final norm, before the head."""
        trunk = self.trunk
        x = trunk.patch_embed(images)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("this tower was built without a mask token")
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([trunk.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if trunk.pos_embed is not None:
            x = x + trunk.pos_embed
        rotary = trunk.rope.get_embed() if trunk.rope is not None else None
        bias = trunk.rel_pos_bias() if self.shape.relative_position else None
        if keep is not None:
            patches = x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :1], patches], dim=1)
            if rotary is not None:
                rotary = rotary[keep][:, None]  # [batch, 1 for the heads, kept, 2 * head width]
            if bias is not None:
                kept = F.pad(keep + 1, (1, 0))  # the class token is number 0
                bias = bias[:, kept[:, :, None], kept[:, None, :]].transpose(0, 1)  # [batch, heads, tokens, tokens]
        for number, block in enumerate(trunk.blocks):
            factors = None if drop_path is None else drop_path[:, 2 * number : 2 * number + 2]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, factors, attn_mask=bias, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rotary, factors, attn_mask=bias)
        return trunk.norm(x)


def _block_forward(
    block: Any, x: Tensor, rope: Tensor | None = None, factors: Tensor | None = None, **masks: Any
) -> Tensor:
    """One transformer block; a function of its arguments alone, so that recomputing it gives the same bits.

    The arguments are those of timm's own, so that timm's forward pass still works, and the factors of the branches.
    """
    if isinstance(block, EvaBlockPostNorm):
        x = x + _scaled(block.norm1(block.attn(x, rope=rope, **masks)), factors, 0)
        return x + _scaled(block.norm2(block.mlp(x)), factors, 1)
    attention = block.attn(block.norm1(x), rope=rope, **masks)
    if block.gamma_1 is not None:
        attention = block.gamma_1 * attention
    x = x + _scaled(attention, factors, 0)
    mlp = block.mlp(block.norm2(x))
    if block.gamma_2 is not None:
        mlp = block.gamma_2 * mlp
    return x + _scaled(mlp, factors, 1)


def _scaled(branch: Tensor, factors: Tensor | None, which: int) -> Tensor:
    return branch if factors is None else branch * factors[:, which, None, None].to(branch.dtype)


def trunk_arguments(shape: VisionShape) -> dict[str, Any]:
    """What timm's `Eva` is built with, all of it plain numbers; the head's width and RMSNorm are not among them."""
    return {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        # timm takes a ratio and rounds down; the half keeps the product above the whole number it stands for.
        "mlp_ratio": (shape.mlp_hidden + 0.5) / shape.width,
        "qkv_bias": shape.qkv_bias,
        "qkv_fused": not shape.sub_ln,
        "swiglu_mlp": shape.swiglu,
        "scale_mlp": shape.sub_ln,
        "scale_attn_inner": shape.sub_ln,
        "use_rot_pos_emb": shape.rope,
        "ref_feat_shape": (shape.rope_grid, shape.rope_grid) if shape.rope else None,
        "use_post_norm": shape.post_norm,
        "use_abs_pos_emb": not shape.relative_position,
        "init_values": shape.layer_scale,
        "global_pool": "token",
    }


def _build_trunk(shape: VisionShape, dim: int) -> Eva:
    norm: dict[str, Any] = {"norm_layer": partial(RmsNorm, eps=1e-6)} if shape.rms_norm else {}
    trunk = Eva(**trunk_arguments(shape), num_classes=dim if shape.head_bias else 0, **norm)
    if not shape.head_bias:  # timm's own head always has one
        trunk.head = nn.Linear(shape.width, dim, bias=False)
        nn.init.trunc_normal_(trunk.head.weight, std=0.02 * 0.001)
    if shape.relative_position:  # under the name that timm's `Beit` has for it
        trunk.rel_pos_bias = RelativePositionBias(trunk.patch_embed.grid_size, shape.heads)
    for block in trunk.blocks:  # a call of the block stays a call of a module, which sharding hooks into
        block.forward = MethodType(_block_forward, block)
    return trunk
