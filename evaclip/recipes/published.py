"""The runs behind the published EVA-CLIP models, with their hyper-parameters and our exact loss and LAMB.

Sources: the launch scripts and the model card of baaivision/EVA (EVA-CLIP/README.md), and EVA-CLIP-18B (arXiv
2402.04252, tables 12 and 13). Betas and epsilon are set here because the published commands of 2023 silently fall back
to others after a renaming. Two things differ from the published runs unless a recipe says `published`: half of the
patches are masked (B and L were released unmasked), and LAMB's trust ratio is taken per tensor, where those runs took
it over DeepSpeed's flat partitions. None of these has been run here; the scores named are the published ones.

Batch, steps and GPUs are those of the published run; `evaclip plan NAME --gpus N` says what another number means.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from evaclip.checkpoint import CheckpointConfig
from evaclip.config import EvalConfig, RunConfig
from evaclip.data.shards import DataConfig, SourceConfig
from evaclip.engine import EngineConfig
from evaclip.models.shapes import shape_named
from evaclip.objectives.clip import ClipConfig
from evaclip.optim import OptimConfig, TowerRates

LAION_2B = SourceConfig(name="laion2b", shards=("data/laion2b_en/{000000..164090}.tar",), weight=0.8)
COYO = SourceConfig(name="coyo", shards=("data/coyo700m/{000000..047435}.tar",), weight=0.2)
LAION_400M = SourceConfig(name="laion400m", shards=("data/laion400m",))
MERGED_2B = (LAION_2B, COYO)


def _run(
    name: str,
    shape: str,
    *,
    samples: float,
    batch: int,
    sources: tuple[SourceConfig, ...],
    vision: tuple[float, float],
    text: tuple[float, float],
    kind: Literal["ddp", "zero1", "zero2", "fsdp2"] = "zero1",
    objective: ClipConfig | None = None,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.05,
) -> RunConfig:
    """What the runs have in common. `samples`: seen in all. `vision`, `text`: learning rate and layer decay."""
    return RunConfig(
        name=name,
        run_dir=Path("runs") / name,
        steps=round(samples / batch),
        batch_size=batch,
        seed=4096,
        model=shape_named(shape),
        data=DataConfig(sources=sources, workers=8),
        objective=objective or ClipConfig(mask_ratio=0.5, checkpointing=True),
        optim=OptimConfig(
            vision=TowerRates(lr=vision[0], layer_decay=vision[1]),
            text=TowerRates(lr=text[0], layer_decay=text[1]),
            lr=5e-4,
            betas=betas,
            eps=1e-6,
            weight_decay=weight_decay,
            clip_norm=5.0,
            warmup=2000,
        ),
        engine=EngineConfig(precision="bf16", kind=kind),
        evals=EvalConfig(),
        checkpoint=CheckpointConfig(every=500),
    )


def _as_published(config: RunConfig, name: str) -> RunConfig:
    """No masking, and trust ratios over DeepSpeed's flat partitions with its bound of 10."""
    return replace(
        config,
        name=name,
        run_dir=Path("runs") / name,
        objective=replace(config.objective, mask_ratio=0.0),
        optim=replace(config.optim, trust_scope="ds_partition"),
        engine=replace(config.engine, kind="zero1"),
    )


def eva01_clip_g14() -> RunConfig:
    """EVA-01 CLIP g/14, 11B pairs of LAION-400M, batch 41k on 256 GPUs. Published: 78.5 % ImageNet zero-shot.

    There is no published script for it: rates and layer decay are inferred from g/14+, drop path 0.4 is the model's.
    """
    return _run(
        "eva01_clip_g14", "EVA01-g-14", samples=11e9, batch=40_960, sources=(LAION_400M,),
        vision=(4e-4, 0.85), text=(4e-5, 0.75),
        objective=ClipConfig(mask_ratio=0.5, drop_path=0.4, checkpointing=True),
    )  # fmt: skip


def eva01_clip_g14_plus() -> RunConfig:
    """EVA-01 CLIP g/14+, 11B pairs of Merged-2B, batch 114,688 on 112 GPUs. Published: 79.3 % ImageNet zero-shot."""
    return _run(
        "eva01_clip_g14_plus", "EVA01-g-14-plus", samples=11e9, batch=114_688, sources=MERGED_2B,
        vision=(4e-4, 0.85), text=(4e-5, 0.75),
    )  # fmt: skip


def eva02_clip_b16() -> RunConfig:
    """EVA-02 CLIP B/16, 8B pairs of Merged-2B, batch 131,072 on 64 GPUs. Published, unmasked: 74.7 % ImageNet."""
    return _run(
        "eva02_clip_b16", "EVA02-B-16", samples=8e9, batch=131_072, sources=MERGED_2B,
        vision=(2e-4, 0.75), text=(2e-5, 0.75), kind="ddp",
    )  # fmt: skip


def eva02_clip_b16_published() -> RunConfig:
    """EVA-02 CLIP B/16 as it was released: no masking, trust ratios over ZeRO-1's partitions on 64 GPUs."""
    return _as_published(eva02_clip_b16(), "eva02_clip_b16_published")


def eva02_clip_l14() -> RunConfig:
    """EVA-02 CLIP L/14, 4B pairs of Merged-2B, batch 131,072 on 128 GPUs. Published, unmasked: 79.8 % ImageNet."""
    return _run(
        "eva02_clip_l14", "EVA02-L-14", samples=4e9, batch=131_072, sources=MERGED_2B,
        vision=(4e-4, 0.85), text=(4e-5, 0.75),
    )  # fmt: skip


def eva02_clip_l14_published() -> RunConfig:
    """EVA-02 CLIP L/14 as it was released: no masking, trust ratios over ZeRO-1's partitions on 128 GPUs."""
    return _as_published(eva02_clip_l14(), "eva02_clip_l14_published")


def eva02_clip_l14_336() -> RunConfig:
    """EVA-02 CLIP L/14 at 336 px, 2B pairs after L/14's 4B, batch 61,440 on 128 GPUs, unmasked. Published: 80.4 %.

    The phase after `eva02_clip_l14`, whose run it starts from: `evaclip train eva02_clip_l14 eva02_clip_l14_336`.
    """
    run = _run(
        "eva02_clip_l14_336", "EVA02-L-14-336", samples=2e9, batch=61_440, sources=MERGED_2B,
        vision=(4e-4, 0.75), text=(4e-5, 0.65), objective=ClipConfig(mask_ratio=0.0, checkpointing=True),
    )  # fmt: skip
    return replace(run, start_from=Path("runs/eva02_clip_l14"))


def eva02_clip_e14() -> RunConfig:
    """EVA-02 CLIP E/14, 4B pairs of LAION-2B, batch 115,200 on 144 GPUs. Published: 81.9 % ImageNet zero-shot."""
    return _run(
        "eva02_clip_e14", "EVA02-E-14", samples=4e9, batch=115_200, sources=(replace(LAION_2B, weight=1.0),),
        vision=(4e-4, 0.9), text=(4e-5, 0.75),
    )  # fmt: skip


def eva02_clip_e14_plus() -> RunConfig:
    """EVA-02 CLIP E/14+, 9B pairs of LAION-2B, batch 144,000 on 144 GPUs. Published: 82.0 % ImageNet zero-shot."""
    return _run(
        "eva02_clip_e14_plus", "EVA02-E-14-plus", samples=9e9, batch=144_000, sources=(replace(LAION_2B, weight=1.0),),
        vision=(4e-4, 0.9), text=(4e-5, 0.75),
    )  # fmt: skip


# 8B and 18B train with the temperature held at 0.01.
_FIXED_SCALE = ClipConfig(mask_ratio=0.5, checkpointing=True, fixed_logit_scale=100.0)


def eva_clip_8b() -> RunConfig:
    """EVA-CLIP 8B, 9B pairs of Merged-2B, batch 178k on 384 GPUs, parameters spread over them. Published: 83.5 %."""
    return _run(
        "eva_clip_8b", "EVA-CLIP-8B", samples=9e9, batch=178_176, sources=MERGED_2B, vision=(4e-4, 0.9),
        text=(4e-5, 0.75), kind="fsdp2", objective=_FIXED_SCALE, betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip


def eva_clip_18b() -> RunConfig:
    """EVA-CLIP 18B, first phase: 5.4B pairs of Merged-2B at 50 % masking, batch 108k on 360 GPUs."""
    return _run(
        "eva_clip_18b", "EVA-CLIP-18B", samples=5.4e9, batch=108_000, sources=MERGED_2B, vision=(4e-4, 0.9),
        text=(4e-5, 0.75), kind="fsdp2", objective=_FIXED_SCALE, betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip


def eva_clip_18b_unmasked() -> RunConfig:
    """EVA-CLIP 18B, second phase: 0.6B pairs without masking. Published, with LAION-COCO here and a third phase on
    video: 83.8 %. `evaclip train eva_clip_18b eva_clip_18b_unmasked` runs both."""
    return replace(
        eva_clip_18b(),
        name="eva_clip_18b_unmasked",
        run_dir=Path("runs/eva_clip_18b_unmasked"),
        start_from=Path("runs/eva_clip_18b"),
        steps=round(0.6e9 / 108_000),
        objective=replace(_FIXED_SCALE, mask_ratio=0.0),
    )
