"""Images per second from files to unit vectors: `evaclip.load` beside open_clip in a plain loop, same folder and model.

The plain loop is what open_clip's README shows, in batches: open with PIL, open_clip's transform, stack, encode_image,
normalise. Both load one exported folder; the vectors are compared on the way.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from measure import in_turns, write_result
from PIL import Image
from sklearn.datasets import load_sample_images

import evaclip
from evaclip.encoder import encoder_of
from evaclip.export.weights import write_open_clip
from evaclip.models.clip import Clip
from evaclip.models.shapes import SHAPES, ClipShape
from evaclip.recipes.small import eva02_tiny_cifar10

BATCH = 16


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of 640 x 427 pixels: crops and mirrored crops of scikit-learn's two photographs, resized."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        photo = photos[number % len(photos)]
        left, top = int(random.integers(0, 200)), int(random.integers(0, 130))
        part = photo.crop((left, top, left + 440, top + 293)).resize((640, 427), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number:04}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def race(shape: ClipShape, count: int, repeats: int) -> list[str]:
    """One row: both rates, their ratio, and how far the vectors are apart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        source = encoder_of(Clip(shape).eval(), {})
        assert isinstance(source.model, Clip)
        write_open_clip(source.model, source.preprocessing, folder, f"local-dir:{folder}")
        paths = write_photos(folder, count)
        ours = evaclip.load(folder, device="cpu", batch_size=BATCH)
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        theirs.eval()

        def plain() -> np.ndarray:
            rows = []
            with torch.inference_mode():
                for start in range(0, count, BATCH):
                    batch = torch.stack([transform(Image.open(path)) for path in paths[start : start + BATCH]])
                    rows.append(torch.nn.functional.normalize(theirs.encode_image(batch), dim=1))
            return torch.cat(rows).numpy()

        difference = np.abs(ours.encode_image(paths) - plain()).max()
        times = in_turns(lambda: ours.encode_image(paths), plain, repeats=repeats)
        rates = [count / seconds for seconds in times]
    return [
        shape.name,
        str(count),
        *(f"{r:,.1f}" for r in rates),
        f"**{rates[0] / rates[1]:.2f}x**",
        f"{difference:.0e}",
    ]


def main() -> None:
    """A tower where decoding is most of the work, one in between, and B/16, where the tower is."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=256, help="of the smallest tower; B/16 gets an eighth")
    count = options.parse_args().images
    tiny = eva02_tiny_cifar10().model
    b16 = SHAPES["EVA02-B-16"]
    small = replace(b16, name="EVA02-Ti-16 (width 192)", vision=replace(b16.vision, width=192, heads=3, mlp_hidden=512))
    rows = [race(tiny, count, 5), race(small, count // 2, 5), race(b16, count // 8, 3)]
    write_result(
        "encode",
        "Encoding a folder of photographs, images per second, files to unit vectors",
        ["image tower", "images", "evaclip.load", "open_clip, plain loop", "speed", "largest difference"],
        rows,
        f"JPEGs of 640 x 427 pixels, batches of {BATCH}, float32, untrained weights. The shortest of several runs, in "
        "turns. The tower's arithmetic is the same in both; what differs is that each batch is decoded by as many "
        "threads as there are cores.",
    )


if __name__ == "__main__":
    main()
