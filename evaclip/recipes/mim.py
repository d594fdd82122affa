"""EVA's and EVA-02's masked image modelling, with their hyper-parameters. None of these has been run here.

Source: the pre-training scripts of baaivision/EVA. The towers carry the norm inside attention that EVA-02's CLIP models
have and its own pre-training lacked, so that nothing is renewed when a CLIP run starts from them (`--vision-init RUN`).
"""

from pathlib import Path

from evaclip.config import RunConfig
from evaclip.data.shards import DataConfig, SourceConfig
from evaclip.data.transforms import CropConfig
from evaclip.engine import EngineConfig
from evaclip.models.shapes import TEXT_B, TEXT_L, ClipShape, TextShape, VisionShape
from evaclip.objectives.mim import MimConfig
from evaclip.optim import OptimConfig, TowerRates

IMAGENET_21K, MERGED_30M = 14.2e6, 29.6e6
CLIP_L = "ViT-L-14-quickgelu:openai"
EVA01_G = "EVA01-g-14:laion400m_s11b_b41k"


def _run(
    name: str, vision: VisionShape, text: TextShape, *, images: float, epochs: int, warmup_epochs: int, batch: int,
    lr: float, teacher: str, dim: int, drop_path: float = 0.0, spread: bool = False,
) -> RunConfig:  # fmt: skip
    """What the runs have in common. `images`: of the data set. `dim`: of the teacher's features."""
    source = "imagenet21k" if images == IMAGENET_21K else "merged30m"
    return RunConfig(
        name=name,
        run_dir=Path("runs") / name,
        steps=round(epochs * images / batch),
        batch_size=batch,
        model=ClipShape(name=name, dim=dim, vision=vision, text=text),
        data=DataConfig(
            sources=(SourceConfig(name=source, shards=(f"data/{source}",)),),
            crop=CropConfig(scale=(0.2, 1.0), flip=True),
            workers=8,
        ),
        objective=MimConfig(teacher=teacher, drop_path=drop_path, hold_back_patches=vision.rope, checkpointing=spread),
        optim=OptimConfig(
            optimizer="adamw", vision=TowerRates(lr=lr), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05,
            clip_norm=3.0, warmup=round(warmup_epochs * images / batch), floor=1e-5 / lr,
        ),
        engine=EngineConfig(precision="fp16", kind="zero1" if spread else "ddp"),
    )  # fmt: skip


def _eva02(width: int, depth: int, heads: int, hidden: int, *, sub_ln: bool) -> VisionShape:
    return VisionShape(
        image_size=224, patch_size=14, width=width, depth=depth, heads=heads, mlp_hidden=hidden,
        swiglu=True, sub_ln=sub_ln, rope=True,
    )  # fmt: skip


def eva01_mim_g() -> RunConfig:
    """EVA-01 g/14 against OpenAI's CLIP L/14: 150 epochs of Merged-30M, batch 4,096 on 128 GPUs."""
    vision = VisionShape(image_size=224, patch_size=14, width=1408, depth=40, heads=16, mlp_hidden=6144)
    return _run(
        "eva01_mim_g", vision, TEXT_L, images=MERGED_30M, epochs=150, warmup_epochs=2, batch=4096, lr=1e-3,
        teacher=CLIP_L, dim=768, drop_path=0.1, spread=True,
    )  # fmt: skip


def eva02_mim_ti() -> RunConfig:
    """EVA-02 Ti/14 against EVA-01 CLIP g/14: 240 epochs of ImageNet-21K, batch 4,000 on 40 GPUs."""
    return _run(
        "eva02_mim_ti", _eva02(192, 12, 3, 512, sub_ln=False), TEXT_B, images=IMAGENET_21K, epochs=240,
        warmup_epochs=1, batch=4000, lr=3e-3, teacher=EVA01_G, dim=1024,
    )  # fmt: skip


def eva02_mim_s() -> RunConfig:
    """EVA-02 S/14 against EVA-01 CLIP g/14: 240 epochs of ImageNet-21K, batch 4,000 on 40 GPUs."""
    return _run(
        "eva02_mim_s", _eva02(384, 12, 6, 1024, sub_ln=False), TEXT_B, images=IMAGENET_21K, epochs=240,
        warmup_epochs=1, batch=4000, lr=3e-3, teacher=EVA01_G, dim=1024,
    )  # fmt: skip


def eva02_mim_b() -> RunConfig:
    """EVA-02 B/14 against EVA-01 CLIP g/14: 150 epochs of ImageNet-21K, batch 2,048 on 32 GPUs."""
    return _run(
        "eva02_mim_b", _eva02(768, 12, 12, 2048, sub_ln=True), TEXT_B, images=IMAGENET_21K, epochs=150,
        warmup_epochs=1, batch=2048, lr=1.5e-3, teacher=EVA01_G, dim=1024,
    )  # fmt: skip


def eva02_mim_l() -> RunConfig:
    """EVA-02 L/14 against EVA-01 CLIP g/14: 150 epochs of ImageNet-21K, batch 2,048 on 64 GPUs."""
    return _run(
        "eva02_mim_l", _eva02(1024, 24, 16, 2730, sub_ln=True), TEXT_L, images=IMAGENET_21K, epochs=150,
        warmup_epochs=1, batch=2048, lr=1.5e-3, teacher=EVA01_G, dim=1024, drop_path=0.1, spread=True,
    )  # fmt: skip
