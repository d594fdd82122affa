"""Masked image modelling: predict a frozen CLIP's features of the patches that are not seen.

EVA (arXiv 2211.07636, section 2) and EVA-02 (2303.11331, section 2): the student sees an image with about 40 % of its
patches replaced by a mask token, the teacher sees all of it, and the loss is the negative cosine similarity of the
student's and the teacher's features at the masked patches.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.data.masks import block_masks, drop_path_factors
from evaclip.data.pipeline import Batch
from evaclip.data.transforms import normalized
from evaclip.encoder import Encoder, load_encoder
from evaclip.errors import InputError
from evaclip.models.mim import MaskedTower
from evaclip.models.shapes import ClipShape
from evaclip.objectives.teacher import TaughtObjective, patch_features


@dataclass(frozen=True, kw_only=True)
class MimConfig:
    """Masked image modelling. Of the model's shape it uses the image tower; `dim` is the teacher's."""

    captioned: ClassVar[bool] = False
    """Whether captions are read."""
    kind: Literal["mim"] = "mim"
    """The objective's name."""
    teacher: str
    """A model with patch tokens: a run, an exported or Hugging Face folder, a file of weights, or an open_clip name."""
    mask_ratio: float = 105 / 256
    """Share of the patches that are masked."""
    smallest_block: int = 16
    """Patches of the smallest rectangle that is masked."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block."""
    hold_back_patches: bool = False
    """Let a tenth of the gradient reach the patch projection (EVA-02's stop_grad_conv1): steadier in 16 bits."""
    checkpointing: bool = False
    """Keep no activations inside the blocks and compute them again in the backward pass."""

    def build(self, shape: ClipShape, seed: int) -> "MimObjective":
        """The objective with a freshly initialised tower. Raises InputError for a teacher that does not fit it."""
        with torch.device("cpu"):  # also where the student is built without values
            teacher = load_encoder(self.teacher)
            _check(teacher, shape, self)
        return MimObjective(self, self.student(shape), teacher, seed)

    def student(self, shape: ClipShape) -> MaskedTower:
        """The tower, its mask token and its head."""
        return MaskedTower(shape.vision, shape.dim, hold_back_patches=self.hold_back_patches)

    def masked(self, patches: int) -> int:
        """How many of an image's patches are masked; at least one, and never all."""
        return min(max(1, round(patches * self.mask_ratio)), patches - 1)

    def seen(self, patches: int) -> str:
        """What a user is told of it."""
        return f"{self.masked(patches)} of {patches} patches masked, teacher {self.teacher}"


class MimObjective(TaughtObjective):
    """Its loss is of masked patches, of which each image has as many."""

    def __init__(self, config: MimConfig, student: MaskedTower, teacher: Encoder, seed: int) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.seed = seed
        self._teacher = (teacher,)  # in a tuple, so that it is no part of this module: not trained, wrapped or saved
        student.visual.checkpointing = config.checkpointing

    def forward(self, batch: Batch, whole: bool = False) -> tuple[Tensor, ...]:
        """The mean negative cosine similarity over the masked patches of a micro-batch, [1], float32."""
        shape = self.student.visual.shape
        grid = shape.image_size // shape.patch_size
        mask = block_masks(
            self.seed, batch.positions, grid, self.config.masked(shape.patches), self.config.smallest_block
        ).to(batch.images.device)
        training = self.student.training
        drop = drop_path_factors(self.seed, batch.positions, shape.depth, self.config.drop_path) if training else None
        target = patch_features(self._teacher[0], batch.images)[mask]
        found = self.student(normalized(batch.images), mask, drop)
        return (-F.cosine_similarity(found.float(), target, dim=1).mean()[None],)


def _check(teacher: Encoder, shape: ClipShape, config: MimConfig) -> None:
    size, vision = teacher.preprocessing.size, shape.vision
    _, patches, dim = patch_features(teacher, torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape
    if patches != vision.patches:
        raise InputError(
            f"the teacher {config.teacher} has {patches} patches and the student {vision.patches}: their grids must be "
            "the same, so change --model.vision.image-size or --model.vision.patch-size"
        )
    if dim != shape.dim:
        raise InputError(f"the teacher {config.teacher} has features of {dim} numbers: set --model.dim {dim}")
