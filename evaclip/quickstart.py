"""The whole main job on images that come inside a dependency: shards, training, zero-shot score, report."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from evaclip import keyed
from evaclip.curate.caption import caption
from evaclip.errors import InputError
from evaclip.evals.card import load_card
from evaclip.evaluate import ZeroShotCommand, run_zero_shot
from evaclip.log import clock, say
from evaclip.recipes import recipe_named
from evaclip.train import train

RECIPE = "eva02_tiny_digits"
HELD_OUT = 360


@dataclass(frozen=True, kw_only=True)
class QuickstartCommand:
    """Train a small EVA-CLIP on handwritten digits, score it on digits it has not seen, and draw a report."""

    out: Path = Path("runs/quickstart")
    """Folder for the images, the shards and the run; an earlier quickstart in it is replaced."""
    seed: int = 0
    """Decides initialisation, order, crops and masks; the same seed gives the same score."""


def run_quickstart(command: QuickstartCommand) -> float:
    """Everything, in minutes. Returns the top-1 accuracy on the held-out digits."""
    start = time.monotonic()
    run_dir, data = command.out / "run", command.out / "digits"
    _clear(command.out)
    say("1/3  writing scikit-learn's digits as images, and the training part as webdataset shards")
    write_digits(data)
    shards = caption("digits", data, data / "shards")
    say(f"     {len(shards)} shards, {HELD_OUT} images held out")
    say("2/3  training")
    config = recipe_named(RECIPE)()
    source = replace(config.data.sources[0], shards=(str(data / "shards"),))
    benchmark = replace(config.evals.zero_shot[0], data=data)
    outcome = train(
        replace(
            config,
            run_dir=run_dir,
            seed=command.seed,
            data=replace(config.data, sources=(source,)),
            evals=replace(config.evals, zero_shot=(benchmark,)),
        )
    )
    if outcome.stopped_by is not None:
        raise KeyboardInterrupt
    say("3/3  scoring the saved model, as `evaclip zeroshot` does")
    top1 = run_zero_shot(ZeroShotCommand(dataset="digits", model=str(run_dir), data=data, workers=0))
    say(f"look at {run_dir / 'report.html'}; it took {clock(time.monotonic() - start)}")
    return top1


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 digits of 8 x 8 pixels as PNG files: `train/<digit>/` and, for 360 of them, `test/`."""
    digits: Any = load_digits()
    classes = load_card("digits").classes
    places = keyed.permute(np.arange(len(digits.target)), len(digits.target), 0, "digits held out")
    for number, (pixels, target, place) in enumerate(zip(digits.images, digits.target, places, strict=True)):
        path = folder / ("test" if place < HELD_OUT else "train") / classes[target] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)


def _clear(folder: Path) -> None:
    """Remove an earlier quickstart, and nothing that is not one."""
    if folder.exists():
        strange = {path.name for path in folder.iterdir()} - {"run", "digits"}
        if strange:
            raise InputError(f"{folder} holds {sorted(strange)[0]}, which no quickstart wrote; name another --out")
        shutil.rmtree(folder)
