"""The ladder at a size for two cores: a CLIP model teaches an EVA, the EVA starts the next CLIP model, and so on.

EVA (arXiv 2211.07636, section 2.3) and EVA-CLIP (2303.15389, section 2.1) climb it with billions of images. Here a
rung is minutes of CIFAR-10; `python benchmarks/ladder.py` climbs two of them with three seeds and draws the curves.

    evaclip train ladder_clip --run-dir A                            a CLIP model from random
    evaclip train ladder_mim --objective.teacher A --run-dir B       an EVA that learns to predict its features
    evaclip train ladder_clip --vision-init B --run-dir C            a CLIP model that starts from that EVA
    evaclip train ladder_mim --objective.teacher C --run-dir D       and is the teacher of the next
"""

from pathlib import Path

from evaclip.checkpoint import CheckpointConfig
from evaclip.config import EvalConfig, RunConfig
from evaclip.data.shards import DataConfig, SourceConfig
from evaclip.data.transforms import CropConfig
from evaclip.engine import EngineConfig
from evaclip.evals.zero_shot import ZeroShotConfig
from evaclip.models.shapes import TextShape, eva02_small
from evaclip.objectives.clip import ClipConfig
from evaclip.objectives.mim import MimConfig
from evaclip.optim import OptimConfig, TowerRates

MODEL = eva02_small(
    "EVA02-ladder", image_size=32, patch_size=8, width=128, depth=4, heads=4, dim=64,
    text=TextShape(width=64, depth=2, heads=2),
)  # fmt: skip
CIFAR10 = (SourceConfig(name="cifar10", shards=("data/cifar10/shards",)),)


def ladder_clip() -> RunConfig:
    """A CLIP model of 64,000 pairs of CIFAR-10, scored at every quarter; from random unless --vision-init is given."""
    return RunConfig(
        name="ladder_clip",
        run_dir=Path("runs/ladder_clip"),
        steps=500,
        batch_size=128,
        model=MODEL,
        data=DataConfig(sources=CIFAR10, workers=1),
        objective=ClipConfig(mask_ratio=0.5),
        optim=OptimConfig(
            vision=TowerRates(lr=4e-3), text=TowerRates(lr=1e-3), lr=4e-3, adapt_undecayed=True,
            warmup=50, clip_norm=1.0,
        ),
        engine=EngineConfig(precision="fp32"),
        evals=EvalConfig(every=125, zero_shot=(ZeroShotConfig(card="cifar10", data=Path("data/cifar10")),)),
        checkpoint=CheckpointConfig(every=250),
    )  # fmt: skip


def ladder_mim() -> RunConfig:
    """Masked image modelling of 128,000 images of CIFAR-10, captions unused; the teacher is a run of `ladder_clip`."""
    return RunConfig(
        name="ladder_mim",
        run_dir=Path("runs/ladder_mim"),
        steps=1000,
        batch_size=128,
        model=MODEL,
        data=DataConfig(sources=CIFAR10, crop=CropConfig(scale=(0.5, 1.0), flip=True), workers=1),
        objective=MimConfig(teacher="runs/ladder_clip", smallest_block=2, hold_back_patches=True),
        optim=OptimConfig(
            optimizer="adamw", vision=TowerRates(lr=2e-3), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05,
            clip_norm=3.0, warmup=100, floor=0.01,
        ),
        engine=EngineConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every=250),
    )  # fmt: skip
