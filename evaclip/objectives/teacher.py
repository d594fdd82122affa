"""A frozen model whose patch features are what a student learns to predict, and what such objectives share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaclip.distributed import mean_over_processes
from evaclip.encoder import Encoder
from evaclip.errors import InputError
from evaclip.models.clip import Clip


class TaughtObjective(nn.Module):
    """What objectives with a frozen teacher share. See `engine.Objective`; the only feature is the loss, [1]."""

    student: Any

    def loss(self, features: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The mean over micro-batches, whose losses count alike; logged is that of all processes."""
        loss = features[0].mean()
        return loss, {"loss": mean_over_processes(loss)}

    def join(self, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """The losses of all parts."""
        return (torch.cat([part[0] for part in parts]),)

    def constrain(self) -> list[nn.Parameter]:
        """Nothing has to hold of the parameters."""
        return []

    def layers(self) -> dict[str, list[list[str]]]:
        """The tower's layers."""
        return self.student.layers()


def patch_features(
    teacher: Encoder, pixels: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch patches dim"]:
    """The teacher's patch tokens after its last norm and its projection to the joint space, float32, without gradient.

    EVA found the projected tokens to be the better target (baaivision/EVA, issue 16). Pixels are resized to what the
    teacher takes. Raises InputError for a teacher without patch tokens or without a projection.
    """
    model: Any = teacher.model.to(pixels.device)
    with torch.no_grad():
        images = teacher.preprocessing.normalized(pixels)
        size = teacher.preprocessing.size
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        return _projected(model, images, teacher.name).float()


def _projected(model: Any, images: Tensor, name: str) -> Tensor:
    if isinstance(model, Clip):
        return model.visual.trunk.head(model.visual.tokens(images)[:, 1:])
    visual = getattr(model, "visual", None)
    trunk = getattr(visual, "trunk", None)
    if (
        trunk is not None
        and isinstance(getattr(trunk, "head", None), nn.Linear)
        and hasattr(trunk, "num_prefix_tokens")
    ):
        return trunk.head(trunk.forward_features(images)[:, trunk.num_prefix_tokens :])  # timm's, in open_clip
    if visual is not None and getattr(visual, "proj", None) is not None and hasattr(visual, "ln_post"):
        return visual.ln_post(visual.transformer(visual._embeds(images)))[:, 1:] @ visual.proj  # open_clip's own
    raise InputError(
        f"the teacher {name} has no patch tokens in the joint space: EVA-CLIP and CLIP models with a vision "
        "transformer have them"
    )
