"""Runs for two cores and ten minutes: `evaclip quickstart`'s digits, and CIFAR-10."""

from pathlib import Path

from evaclip.checkpoint import CheckpointConfig
from evaclip.config import EvalConfig, RunConfig
from evaclip.data.shards import DataConfig, SourceConfig
from evaclip.engine import EngineConfig
from evaclip.evals.zero_shot import ZeroShotConfig
from evaclip.models.shapes import TextShape, eva02_small
from evaclip.objectives.clip import ClipConfig
from evaclip.optim import OptimConfig, TowerRates


def eva02_tiny_digits() -> RunConfig:
    """A small EVA-02 dual tower on 1,437 handwritten digits; what `evaclip quickstart` runs.

    LAMB moves a tensor by (learning rate x its own norm) a step, so a rate is a relative speed: at 5e-3 a tensor can
    turn over about once in the run. Two choices make that robust. Every tensor has a trust ratio, biases too: EVA's
    head starts a thousand times smaller than usual and its bias at zero, so a bias that takes Adam's absolute steps
    soon outshouts the head, and all images get the same feature. And the text tower learns at a fifth of the image
    tower's rate (EVA-CLIP: a tenth): the ratio of the token table is taken over 49,408 rows, of which the captions use
    forty.
    """
    return RunConfig(
        name="eva02_tiny_digits",
        run_dir=Path("runs/eva02_tiny_digits"),
        steps=320,
        batch_size=128,
        model=eva02_small(
            "EVA02-tiny-digits", image_size=16, patch_size=2, width=96, depth=6, heads=3, dim=64,
            text=TextShape(width=64, depth=3, heads=2),
        ),
        data=DataConfig(sources=(SourceConfig(name="digits", shards=("data/digits/shards",)),), workers=1),
        objective=ClipConfig(mask_ratio=0.5),
        optim=OptimConfig(
            vision=TowerRates(lr=5e-3), text=TowerRates(lr=1e-3), lr=5e-3, adapt_undecayed=True,
            warmup=40, clip_norm=1.0,
        ),
        engine=EngineConfig(precision="fp32"),
        evals=EvalConfig(every=40, zero_shot=(ZeroShotConfig(card="digits", data=Path("data/digits")),)),
        checkpoint=CheckpointConfig(every=80),
    )  # fmt: skip


def eva02_tiny_cifar10() -> RunConfig:
    """A small EVA-02 dual tower on CIFAR-10's 50,000 training images with captions, scored on the 10,000 test images.

    The shards: `evaclip data caption cifar10 --data DIR --out data/cifar10/shards`. Sized for ten minutes on two cores;
    there it reached 64.3 % in eleven.
    """
    return RunConfig(
        name="eva02_tiny_cifar10",
        run_dir=Path("runs/eva02_tiny_cifar10"),
        steps=1150,
        batch_size=128,
        model=eva02_small(
            "EVA02-tiny-cifar10", image_size=32, patch_size=4, width=128, depth=6, heads=4, dim=64,
            text=TextShape(width=64, depth=3, heads=2),
        ),
        data=DataConfig(sources=(SourceConfig(name="cifar10", shards=("data/cifar10/shards",)),), workers=1),
        objective=ClipConfig(mask_ratio=0.5),
        optim=OptimConfig(
            vision=TowerRates(lr=4e-3), text=TowerRates(lr=1e-3), lr=4e-3, adapt_undecayed=True,
            warmup=60, clip_norm=1.0,
        ),
        engine=EngineConfig(precision="fp32"),
        evals=EvalConfig(every=230, zero_shot=(ZeroShotConfig(card="cifar10", data=Path("data/cifar10")),)),
        checkpoint=CheckpointConfig(every=230),
    )  # fmt: skip
