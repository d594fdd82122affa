"""Feature distillation: a new tower learns the whitened feature map of a trained one.

Wei et al. (arXiv 2205.14141, section 3) and their code: teacher and student see the same view of an image, nothing is
masked, and the student's tokens, through a linear map, meet the teacher's after its last norm, whitened by a LayerNorm
without parameters. It asks nothing of the teacher but a feature map, so that one without logits will do (CLIP, DINO).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from evaclip.data.masks import drop_path_factors
from evaclip.data.pipeline import Batch
from evaclip.data.transforms import normalized
from evaclip.encoder import ImageTower, load_image_tower
from evaclip.errors import InputError
from evaclip.models.distilled import DistilledTower
from evaclip.models.shapes import ClipShape
from evaclip.objectives.teacher import TaughtObjective


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Feature distillation. Of the model's shape it uses the image tower; `dim` is the width of the teacher's map."""

    captioned: ClassVar[bool] = False
    """Whether captions are read."""
    kind: Literal["distillation"] = "distillation"
    """The objective's name."""
    teacher: str
    """A model with patch tokens: a run, an exported or Hugging Face folder, a file of weights, an open_clip name; or,
    without a text tower, `timm:NAME`, `timm:NAME:FILE`, a folder in timm's layout."""
    beta: float = 2.0
    """Where the smooth L1 loss turns from a square into a line."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the student's last block."""
    checkpointing: bool = False
    """Keep no activations inside the blocks and compute them again in the backward pass."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"--objective.beta {self.beta} must be above 0; the paper's is 2")

    def build(self, shape: ClipShape, seed: int) -> "DistillationObjective":
        """The objective with a freshly initialised tower. Raises InputError for a teacher that does not fit it."""
        with torch.device("cpu"):  # also where the student is built without values
            teacher = load_image_tower(self.teacher)
            _check(teacher, shape, self)
        return DistillationObjective(self, self.student(shape), teacher, seed)

    def student(self, shape: ClipShape) -> DistilledTower:
        """The tower and its projector."""
        return DistilledTower(shape.vision, shape.dim)

    def seen(self, patches: int) -> str:
        """What a user is told of it."""
        return f"all {patches} patches seen, feature map of the teacher {self.teacher}"


class DistillationObjective(TaughtObjective):
    """Its loss is of whole feature maps."""

    def __init__(self, config: DistillationConfig, student: DistilledTower, teacher: ImageTower, seed: int) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.seed = seed
        self._teacher = teacher  # no module, so no part of this one: not trained, wrapped or saved
        student.visual.checkpointing = config.checkpointing

    def forward(self, batch: Batch, whole: bool = False) -> tuple[Tensor, ...]:
        """The mean loss over all numbers of a micro-batch's feature maps, [1], float32."""
        depth, training = self.student.visual.shape.depth, self.student.training
        drop = drop_path_factors(self.seed, batch.positions, depth, self.config.drop_path) if training else None
        self._teacher.model.to(batch.images.device)
        with torch.no_grad():
            target = whitened(self._teacher.feature_map(batch.images))
        return (distance(self.student(normalized(batch.images), drop), target, self.config.beta)[None],)


def whitened(feature_map: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
    """Every token with mean 0 and variance 1 over its channels, float32 (section 3, "whitening teacher features").

    So teachers whose features differ in size by orders of magnitude share their hyper-parameters.
    """
    return F.layer_norm(feature_map.float(), feature_map.shape[-1:])


def distance(
    found: Float[Tensor, "batch tokens channels"], target: Float[Tensor, "batch wanted channels"], beta: float
) -> Float[Tensor, ""]:
    """Smooth L1 (section 3, equation 1), the mean over all numbers. Without a class token in `target`, of patches."""
    return F.smooth_l1_loss(found[:, -target.shape[1] :].float(), target, beta=beta)


def _check(teacher: ImageTower, shape: ClipShape, config: DistillationConfig) -> None:
    size, vision = teacher.preprocessing.size, shape.vision
    with torch.no_grad():
        _, tokens, width = teacher.feature_map(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape
    if tokens not in (vision.patches, vision.patches + 1):
        raise InputError(
            f"the teacher {config.teacher} has {tokens} tokens and the student a class token and {vision.patches} "
            "patches: their grids must be the same, so change --model.vision.image-size or --model.vision.patch-size"
        )
    if width != shape.dim:
        raise InputError(f"the feature map of {config.teacher} has {width} channels: set --model.dim {width}")
