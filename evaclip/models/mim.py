"""The student of masked image modelling: an image tower whose head predicts the teacher's feature of every patch.

Its names are those of a CLIP model's image tower, so a CLIP run can start from it as it is.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from evaclip.models.clip import stages_of
from evaclip.models.shapes import VisionShape
from evaclip.models.vision import VisionTower

# Gradient that reaches the patch projection where it is held back (EVA-02, arXiv 2303.11331, appendix).
LEAKED = 0.1
# Of EVA-01's linear layers, in its pre-training script.
EVA01_STD = 0.015


class MaskedTower(nn.Module):
    """An EVA tower, its mask token and its head."""

    def __init__(self, shape: VisionShape, dim: int, *, hold_back_patches: bool = False) -> None:
        """`dim`: dimensions of the teacher's features. `hold_back_patches`: a tenth of the gradient reaches them."""
        super().__init__()
        self.visual = VisionTower(shape, dim, mask_token=True)
        initialise(self.visual)
        if hold_back_patches:
            self.visual.trunk.patch_embed.register_forward_hook(_held_back)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        mask: Bool[Tensor, "batch patches"],
        drop_path: Float[Tensor, "batch branches"] | None = None,
    ) -> Float[Tensor, "masked dim"]:
        """The predicted features of all masked patches, image after image."""
        patches = self.visual.tokens(images, mask=mask, drop_path=drop_path)[:, 1:]
        return self.visual.trunk.head(patches[mask])

    def layers(self) -> dict[str, list[list[str]]]:
        """The parameter names, layer by layer from the embeddings up to the head."""
        return {"vision": stages_of([name for name, _ in self.named_parameters()], "vision")}


def _held_back(_module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:
    return patches.detach() * (1 - LEAKED) + patches * LEAKED


@torch.no_grad()
def initialise(tower: VisionTower, std: float = EVA01_STD, cut: float = 2.0) -> None:
    """Initial values of masked image modelling, in place. `std`, `cut`: of EVA-01's truncated normal.

    EVA-02 (2303.11331, section 2.1 and its code): Xavier normal for linear layers, Xavier uniform for the patch
    projection; with sub-LN, as in Magneto (2210.06423, section 3), what stands between the norms grows by
    sqrt(log(2 depth)). EVA-01, as BEiT: truncated normal, the output projections of block l divided by
    sqrt(2 l). Biases are 0.
    """
    trunk, shape = tower.trunk, tower.shape
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            if shape.rope:
                nn.init.xavier_normal_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=std, a=-cut, b=cut)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if shape.rope:
        nn.init.xavier_uniform_(trunk.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(trunk.patch_embed.proj.bias)
    for name, token in tower.named_parameters():
        if name in ("trunk.cls_token", "trunk.pos_embed", "mask_token"):
            nn.init.trunc_normal_(token, std=0.02)
    for number, block in enumerate(trunk.blocks, 1):
        if shape.sub_ln:
            grown = math.sqrt(math.log(2 * shape.depth))
            for part in (block.mlp.fc1_g, block.mlp.fc1_x, block.mlp.fc2, block.attn.proj, block.attn.v_proj):
                part.weight.mul_(grown)
        elif not shape.rope:
            for part in (block.attn.proj, block.mlp.fc2):
                part.weight.div_(math.sqrt(2 * number))
