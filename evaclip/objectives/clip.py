"""Contrastive language-image pre-training with masked images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.data.masks import drop_path_factors, kept_patches
from evaclip.data.pipeline import Batch
from evaclip.data.transforms import normalized
from evaclip.distributed import everyone
from evaclip.models.clip import Clip
from evaclip.models.shapes import ClipShape
from evaclip.objectives.columns import Exchange, early_exchange
from evaclip.objectives.contrastive import contrastive_loss
from evaclip.objectives.sigmoid import sigmoid_loss


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The contrastive objective."""

    captioned: ClassVar[bool] = True
    """Whether captions are read."""
    kind: Literal["clip"] = "clip"
    """The objective's name."""
    mask_ratio: float = 0.5
    """Share of the image's patches that the tower does not see while training (FLIP)."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block of the image tower."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the batch."""
    max_logit_scale: float = 100.0
    """The logit scale is held between 1 and this after every step."""
    fixed_logit_scale: float | None = None
    """Do not learn the logit scale, keep it at this."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's contrastive loss, or SigLIP's, which has no softmax over the batch and learns a bias."""
    loss_precision: Literal["fp16", "fp32"] = "fp16"
    """What the features are rounded to in the loss; its sums are float32 in both."""
    ring: bool = False
    """Pass captions on instead of gathering them: less memory, more waiting; for batches past a million."""
    pack_captions: bool = True
    """Text tower: no padding, each caption at its own length; the features are the same."""
    checkpointing: bool = False
    """Keep no activations inside the blocks and compute them again in the backward pass."""

    def build(self, shape: ClipShape, seed: int) -> "ClipObjective":
        """The objective with freshly initialised towers."""
        return ClipObjective(self, self.student(shape), seed)

    def student(self, shape: ClipShape) -> Clip:
        """The towers, with the learnt scalars that the loss needs."""
        return Clip(shape, logit_bias=self.loss == "sigmoid")

    def seen(self, patches: int) -> str:
        """What a user is told of it."""
        return f"{max(1, int(patches * (1 - self.mask_ratio)))} of {patches} patches seen in training"


class ClipObjective(nn.Module):
    """See `engine.Objective`. Features are unit image rows, unit text rows, the logit scale and SigLIP's bias."""

    def __init__(self, config: ClipConfig, student: Clip, seed: int) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.seed = seed
        self._exchange = Exchange()
        student.set_checkpointing(config.checkpointing)
        student.text.packed = config.pack_captions
        if config.fixed_logit_scale is not None:
            student.logit_scale.requires_grad_(False).fill_(math.log(config.fixed_logit_scale))

    def forward(self, batch: Batch, whole: bool = False) -> tuple[Tensor, ...]:
        """Unit image features [batch, dim], unit text features [batch, dim], logit scale [1], in float32, [bias [1]].

        The text tower comes first: the captions of a `whole` batch then travel while the image tower works.
        """
        vision, training = self.student.shape.vision, self.training
        keep = kept_patches(self.seed, batch.positions, vision.patches, self.config.mask_ratio) if training else None
        drop = drop_path_factors(self.seed, batch.positions, vision.depth, self.config.drop_path) if training else None
        text = F.normalize(self.student.encode_text(batch.tokens).float(), dim=1)
        self._exchange = Exchange(group=everyone(), ring=self.config.ring)
        if whole and self._exchange.group is not None and not self.config.ring:
            text, self._exchange = early_exchange(text, self._exchange, self.config.loss_precision)
        image = self.student.encode_image(normalized(batch.images), keep=keep, drop_path=drop)
        scalars = [self.student.logit_scale.exp()]
        if self.student.logit_bias is not None:
            scalars.append(self.student.logit_bias.view_as(self.student.logit_bias))
        return F.normalize(image.float(), dim=1), text, *scalars

    def loss(self, features: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of the whole batch; metrics are its accuracies and the scale."""
        image, text, scale, *bias = features
        how: dict[str, Any] = {"precision": self.config.loss_precision, "exchange": self._exchange}
        if bias:
            loss, stats = sigmoid_loss(image, text, scale, bias[0], **how)
        else:
            loss, stats = contrastive_loss(image, text, scale, label_smoothing=self.config.label_smoothing, **how)
        metrics = {
            "loss": loss.detach(),
            "accuracy/image_to_text": stats.image_to_text,
            "accuracy/text_to_image": stats.text_to_image,
            "logit_scale": scale.detach()[0],
        }
        return loss, metrics

    def join(self, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Rows of all parts; the scalars are the same in each, so their gradient belongs to the last alone."""
        images, texts, *scalars = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(texts), *(values[-1] for values in scalars)

    def constrain(self) -> list[nn.Parameter]:
        """Clamp the logit scale on the parameter itself."""
        self.student.clamp_logit_scale(math.log(self.config.max_logit_scale))
        return [self.student.logit_scale]

    def layers(self) -> dict[str, list[list[str]]]:
        """The towers' layers."""
        return self.student.layers()
