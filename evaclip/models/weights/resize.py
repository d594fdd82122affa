"""Another resolution, another patch size: the two ways to resample what depends on them.

`eva` is what EVA-CLIP's published models went through: plain bicubic interpolation of both the position embedding and
the patch kernel (baaivision/EVA, interpolate_evaclip_*.py). `timm` is antialiased for the positions, and for the kernel
the pseudo-inverse of resizing images, so that resized images keep their tokens (FlexiViT, arXiv 2212.08013, section
3.4). They differ: 14 -> 16 px by one is not 14 -> 16 px by the other.
"""

import math
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

Resize = Literal["eva", "timm"]


def resized_position(
    embedding: Float[Tensor, "1 tokens channels"], grid: int, how: Resize
) -> Float[Tensor, "1 new_tokens channels"]:
    """The position embedding of a square grid for one of `grid` patches a side; the class token's stays.

    Raises ValueError where the patches of `embedding` are no square.
    """
    before = math.isqrt(embedding.shape[1] - 1)
    if before * before != embedding.shape[1] - 1:
        raise ValueError(f"{embedding.shape[1] - 1} positions are no square grid")
    if how == "timm":
        return resample_abs_pos_embed(embedding, [grid, grid], num_prefix_tokens=1)
    return resample_abs_pos_embed(embedding, [grid, grid], num_prefix_tokens=1, antialias=False, align_corners=False)


def resized_kernel(
    kernel: Float[Tensor, "width 3 patch patch"], patch: int, how: Resize
) -> Float[Tensor, "width 3 new new"]:
    """The patch projection for patches of `patch` pixels a side."""
    if how == "timm":
        return resample_patch_embed(kernel, [patch, patch])
    return F.interpolate(kernel.float(), size=(patch, patch), mode="bicubic", align_corners=False).to(kernel.dtype)
