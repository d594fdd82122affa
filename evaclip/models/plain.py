"""CLIP with a plain vision transformer, OpenAI's and whoever followed: open_clip's image tower beside our text tower.

evaclip trains no such model; it takes them as they are, for scoring, as teachers, for their text towers, and to export.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from evaclip.models.clip import INITIAL_LOGIT_SCALE
from evaclip.models.shapes import PlainShape
from evaclip.models.text import TextTower
from evaclip.openclip import LayerNorm, QuickGELU, VisionTransformer


class PlainClip(nn.Module):
    """Image tower, text tower and the logarithm of the logit scale; keys are open_clip's: `visual.*`, `text.*`."""

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        vision = shape.vision
        self.shape = shape
        self.visual = VisionTransformer(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.width,
            layers=vision.depth,
            heads=vision.heads,
            mlp_ratio=mlp_ratio(vision.mlp_hidden, vision.width),
            output_dim=shape.dim,
            act_layer=QuickGELU if shape.activation == "quick_gelu" else nn.GELU,
            norm_layer=LayerNorm,
        )
        self.text = TextTower(replace(shape.text, activation=shape.activation), shape.dim)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Image features, not normalised. `images`: normalised pixels."""
        return self.visual(images)

    def encode_text(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Text features, not normalised. `tokens`: ids with an end-of-text token in each row."""
        return self.text(tokens)


def mlp_ratio(hidden: int, width: int) -> float:
    """What open_clip multiplies the width with; it rounds down, so the half keeps the product above what is meant."""
    return hidden / width if hidden % width == 0 else (hidden + 0.5) / width
