"""Feature distillation: the paper's runs with their hyper-parameters, none of which has been run here, and a small one.

Source: arXiv 2205.14141 and the configurations of SwinTransformer/Feature-Distillation (configs/pretrain). Students are
BEiT's plain blocks with layer scale and one relative position bias for all of them; a CLIP run starts from such a tower
with `--vision-init RUN` where it has the same shape, and no published EVA-CLIP has. `--model.vision.relative-position
False --model.vision.layer-scale None` makes the student an EVA-01.
"""

from pathlib import Path

from evaclip.checkpoint import CheckpointConfig
from evaclip.config import RunConfig
from evaclip.data.shards import DataConfig, SourceConfig
from evaclip.data.transforms import CropConfig
from evaclip.engine import EngineConfig
from evaclip.models.shapes import TEXT_B, TEXT_L, ClipShape, TextShape, VisionShape
from evaclip.objectives.distillation import DistillationConfig
from evaclip.optim import OptimConfig, TowerRates

IMAGENET_1K = 1_281_167
BATCH, EPOCHS, WARMUP_EPOCHS = 2048, 300, 10
# Their rates are for 512 images and grow with the batch (main_fd.py): 3e-4 and, at the end, 5e-6.
LR, LAST_LR = 3e-4 * BATCH / 512, 5e-6 * BATCH / 512


def _student(width: int, depth: int, heads: int, patch_size: int) -> VisionShape:
    return VisionShape(
        image_size=224, patch_size=patch_size, width=width, depth=depth, heads=heads, mlp_hidden=4 * width,
        relative_position=True, layer_scale=0.1,
    )  # fmt: skip


def _run(name: str, vision: VisionShape, text: TextShape, *, teacher: str, dim: int, drop_path: float) -> RunConfig:
    """What the published runs have in common. `dim`: channels of the teacher's feature map."""
    return RunConfig(
        name=name,
        run_dir=Path("runs") / name,
        steps=EPOCHS * (IMAGENET_1K // BATCH),
        batch_size=BATCH,
        model=ClipShape(name=name, dim=dim, vision=vision, text=text),
        data=DataConfig(
            sources=(SourceConfig(name="imagenet1k", shards=("data/imagenet1k/train",)),),
            crop=CropConfig(scale=(0.08, 1.0), flip=True),
            workers=8,
        ),
        objective=DistillationConfig(teacher=teacher, drop_path=drop_path),
        optim=OptimConfig(
            optimizer="adamw", vision=TowerRates(lr=LR), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05,
            clip_norm=3.0, warmup=WARMUP_EPOCHS * (IMAGENET_1K // BATCH), floor=LAST_LR / LR,
        ),
        engine=EngineConfig(precision="fp16"),
    )  # fmt: skip


def fd_clip_b() -> RunConfig:
    """ViT-B/16 from OpenAI's CLIP B/16: 300 epochs of ImageNet-1K, batch 2,048 on 16 GPUs."""
    return _run("fd_clip_b", _student(768, 12, 12, 16), TEXT_B, teacher="ViT-B-16-quickgelu:openai", dim=768,
                drop_path=0.2)  # fmt: skip


def fd_clip_l() -> RunConfig:
    """ViT-L/14 from OpenAI's CLIP L/14: 300 epochs of ImageNet-1K, batch 2,048 as for B."""
    return _run("fd_clip_l", _student(1024, 24, 16, 14), TEXT_L, teacher="ViT-L-14-quickgelu:openai", dim=1024,
                drop_path=0.3)  # fmt: skip


def fd_dino_b() -> RunConfig:
    """ViT-B/16 from DINO's, which has never seen a label: 300 epochs of ImageNet-1K, batch 2,048 as from CLIP."""
    return _run("fd_dino_b", _student(768, 12, 12, 16), TEXT_B, teacher="timm:vit_base_patch16_224.dino", dim=768,
                drop_path=0.3)  # fmt: skip


def fd_deit_b() -> RunConfig:
    """ViT-B/16 from DeiT's, which was trained on labels: 300 epochs of ImageNet-1K, batch 2,048 as from CLIP."""
    return _run("fd_deit_b", _student(768, 12, 12, 16), TEXT_B, teacher="timm:deit_base_patch16_224.fb_in1k", dim=768,
                drop_path=0.3)  # fmt: skip


def fd_tiny_cifar10() -> RunConfig:
    """A small tower with a shared relative position bias on CIFAR-10, from the tower that `eva02_tiny_cifar10` leaves.

    Captions are not looked at. The loss fell from 0.256 at step 10 to 0.0126 at step 600; nothing else of the student
    was measured.
    """
    vision = VisionShape(
        image_size=32, patch_size=4, width=128, depth=6, heads=4, mlp_hidden=512, relative_position=True,
        layer_scale=0.1,
    )  # fmt: skip
    return RunConfig(
        name="fd_tiny_cifar10",
        run_dir=Path("runs/fd_tiny_cifar10"),
        steps=600,
        batch_size=128,
        model=ClipShape(name="FD-tiny-cifar10", dim=128, vision=vision, text=TextShape(width=64, depth=3, heads=2)),
        data=DataConfig(sources=(SourceConfig(name="cifar10", shards=("data/cifar10/shards",)),), workers=1),
        objective=DistillationConfig(teacher="runs/eva02_tiny_cifar10", drop_path=0.1),
        optim=OptimConfig(
            optimizer="adamw", vision=TowerRates(lr=LR), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05,
            clip_norm=3.0, warmup=60, floor=LAST_LR / LR,
        ),
        engine=EngineConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every=150),
    )  # fmt: skip
