"""The dual tower."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int, Int64
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from evaclip.errors import InputError
from evaclip.models.shapes import ClipShape
from evaclip.models.text import TextTower
from evaclip.models.vision import VisionTower

# CLIP starts at a temperature of 0.07 and never goes below 0.01 (arXiv 2103.00020, section 2.5).
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
# SigLIP starts here, so that the many wrong pairs do not swamp the first steps (arXiv 2303.15343, section 3.2).
SIGMOID_LOGIT_SCALE, SIGMOID_LOGIT_BIAS = math.log(10.0), -10.0
LARGEST_LOGIT_SCALE = math.log(100.0)


class Clip(nn.Module):
    """Image tower, text tower and the logarithm of the logit scale.

    Keys are open_clip's: `visual.trunk.*`, `text.*`, `logit_scale`. The scale has shape [1] because sharding
    libraries cannot split a scalar, and it is float32 whatever the towers are.
    """

    def __init__(self, shape: ClipShape, *, logit_bias: bool = False) -> None:
        """`logit_bias`: whether the loss is SigLIP's, which learns a bias and starts at its own values."""
        super().__init__()
        self.shape = shape
        self.visual = VisionTower(shape.vision, shape.dim)
        self.text = TextTower(shape.text, shape.dim)
        self.logit_scale = nn.Parameter(torch.full([1], SIGMOID_LOGIT_SCALE if logit_bias else INITIAL_LOGIT_SCALE))
        self.logit_bias = nn.Parameter(torch.full([1], SIGMOID_LOGIT_BIAS)) if logit_bias else None

    def encode_image(
        self,
        images: Float[Tensor, "batch 3 height width"],
        keep: Int64[Tensor, "batch kept"] | None = None,
        drop_path: Float[Tensor, "batch branches"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Image features, not normalised. `images`: normalised pixels."""
        return self.visual(images, keep=keep, drop_path=drop_path)

    def encode_text(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Text features, not normalised. `tokens`: ids with an end-of-text token in each row."""
        return self.text(tokens)

    def set_checkpointing(self, enabled: bool) -> None:
        """Keep no activations inside the blocks and compute them again in the backward pass."""
        self.visual.checkpointing = enabled
        self.text.checkpointing = enabled

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a model that may have seen another resolution.

        The position embedding is resampled to this model's grid (bicubic, as in timm); rotary angles follow from the
        shape. Raises InputError where anything else differs.
        """
        own = self.state_dict()
        taken = dict(state)
        position = "visual.trunk.pos_embed"
        if position in taken and position in own and taken[position].shape != own[position].shape:
            grid = self.shape.vision.image_size // self.shape.vision.patch_size
            taken[position] = resample_abs_pos_embed(taken[position], [grid, grid], num_prefix_tokens=1)
        different = sorted(
            n for n in own.keys() | taken.keys() if n not in own or n not in taken or own[n].shape != taken[n].shape
        )
        if different:
            raise InputError(
                f"{different[0]} and {len(different) - 1} other parameters differ from those to start from"
            )
        self.load_state_dict(taken)

    @torch.no_grad()
    def clamp_logit_scale(self, largest: float = LARGEST_LOGIT_SCALE) -> None:
        """Hold the scale between 1 and 100, as CLIP does after every step."""
        self.logit_scale.clamp_(0.0, largest)

    def layers(self) -> dict[str, list[list[str]]]:
        """The parameter names of each tower, layer by layer from the embeddings up to the projection."""
        names = [name for name, _ in self.named_parameters()]
        return {
            "vision": stages_of(names, "vision"),
            "text": stages_of(names, "text"),
        }


_VISION_STEM = ("visual.trunk.patch_embed.", "visual.trunk.cls_token", "visual.trunk.pos_embed", "visual.mask_token")
_TEXT_STEM = ("text.token_embedding.", "text.positional_embedding")


def stages_of(names: list[str], tower: Literal["vision", "text"]) -> list[list[str]]:
    """The names of a tower's parameters: stem, blocks in order, and what comes after them."""
    if tower == "vision":
        return _stages(names, "visual.", "visual.trunk.blocks.", _VISION_STEM)
    return _stages(names, "text.", "text.transformer.resblocks.", _TEXT_STEM)


def _stages(names: list[str], tower: str, blocks: str, stem: tuple[str, ...]) -> list[list[str]]:
    own = [name for name in names if name.startswith(tower)]
    depth = 1 + max(int(name[len(blocks) :].split(".")[0]) for name in own if name.startswith(blocks))
    stages: list[list[str]] = [[] for _ in range(depth + 2)]
    for name in own:
        if name.startswith(blocks):
            stages[1 + int(name[len(blocks) :].split(".")[0])].append(name)
        else:
            stages[0 if name.startswith(stem) else -1].append(name)
    return stages
