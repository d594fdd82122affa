"""Train CLIP models bootstrapped from EVA, score them zero-shot, and hand on their encoders."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from evaclip.inference import Model

__version__ = "0.1.0"


def load(source: "str | Path", device: str = "auto", batch_size: int = 64) -> "Model":
    """A trained model that turns images and captions into unit vectors; torch is imported when it is called.

    `source`: the folder of an export or a run, or an open_clip name. `device`: `cpu`, `cuda`, `cuda:1`, or `auto`.
    `batch_size`: images at a time. Raises `evaclip.errors.InputError` with one sentence.
    """
    from evaclip.inference import load

    return load(source, device, batch_size)
