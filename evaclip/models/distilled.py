"""The student of feature distillation: an image tower whose head maps every token into the teacher's feature map.

Its names are those of a CLIP model's image tower, so a CLIP run of the same shape can start from it as it is.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from evaclip.models.clip import stages_of
from evaclip.models.mim import initialise
from evaclip.models.shapes import VisionShape
from evaclip.models.vision import VisionTower

# Of the linear layers and the patch projection in the authors' code, cut off at one deviation.
STD = 0.02


class DistilledTower(nn.Module):
    """An EVA tower and its projector, a linear map of each token: a convolution of 1 x 1 over the map."""

    def __init__(self, shape: VisionShape, dim: int) -> None:
        """`dim`: channels of the teacher's feature map."""
        super().__init__()
        self.visual = VisionTower(shape, dim)
        _initialise(self.visual)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        drop_path: Float[Tensor, "batch branches"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The class token's and every patch's prediction."""
        return self.visual.trunk.head(self.visual.tokens(images, drop_path=drop_path))

    def layers(self) -> dict[str, list[list[str]]]:
        """The parameter names, layer by layer from the embeddings up to the projector."""
        return {"vision": stages_of([name for name, _ in self.named_parameters()], "vision")}


@torch.no_grad()
def _initialise(tower: VisionTower) -> None:
    """BEiT's initial values as the authors of feature distillation have them, EVA-02's where the tower is one.

    The projector keeps torch's own, as theirs does; EVA's head would start a thousand times smaller.
    """
    initialise(tower, std=STD, cut=STD)
    trunk = tower.trunk
    if not tower.shape.rope:
        nn.init.trunc_normal_(trunk.patch_embed.proj.weight, std=STD, a=-STD, b=STD)
        nn.init.zeros_(trunk.patch_embed.proj.bias)
        nn.init.trunc_normal_(trunk.cls_token, std=STD, a=-STD, b=STD)
    trunk.head.reset_parameters()
