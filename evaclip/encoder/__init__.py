"""Trained dual encoders, one way to all of them.

Everything that uses a model without training it (benchmarks, teachers, export, search, filtering) takes an `Encoder`,
so each of them works with a run of ours, an exported folder, and any model of open_clip.
"""

from evaclip.encoder.dual import Encoder, Preprocessing, encoder_of
from evaclip.encoder.image_tower import ImageTower, load_image_tower
from evaclip.encoder.sources import (
    clip_of_checkpoint,
    clip_of_run,
    described_preprocessing,
    encoder_of_export,
    load_encoder,
)

__all__ = [
    "Encoder",
    "ImageTower",
    "Preprocessing",
    "clip_of_checkpoint",
    "clip_of_run",
    "described_preprocessing",
    "encoder_of",
    "encoder_of_export",
    "load_encoder",
    "load_image_tower",
]
