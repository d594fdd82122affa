"""The proof that an export is the model: both see the same images and captions, and their vectors are compared.

Golden images go through the preprocessing that the export itself describes, captions through its tokenizer: most
exports that disappoint were resized, cropped or tokenised differently, not computed differently.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from evaclip.encoder import Encoder
from evaclip.exported import Tower

PROMPTS = (
    "a photo of a temple with a curved roof",
    "a close-up of a yellow flower",
    "a red circle on a blue square",
    "black and white stripes",
    "a checkerboard",
    "random noise",
    "a photo of a cat.",
    "two dogs running on a beach at sunset",
    "a diagram of the human heart",
    "the handwritten digit seven",
    "an aerial view of a city at night",
    "a bowl of soup, top-down, on a wooden table",
    "a blurry photo of a street sign that says STOP!",
    "1,234 identical grey boxes",
    "a caf\u00e9 in Paris &amp; its customers",
    "a",
    "",
    "a very long caption " * 30,
)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the vectors of an export are from those of the model."""

    images: int
    """Golden images; 0 where there is no image tower."""
    prompts: int
    """Golden captions; 0 where there is no text tower."""
    max_difference: float
    """The largest difference of any coordinate of the unit vectors."""
    min_cosine: float
    """The smallest cosine between a vector and its counterpart."""
    top_match: float | None
    """Share of images whose nearest caption, and captions whose nearest image, is the same; None with one tower."""

    def holds(self, least_cosine: float, least_match: float) -> bool:
        """Whether the export may be called the same model."""
        return self.min_cosine >= least_cosine and (self.top_match is None or self.top_match >= least_match)


def compare(model: Encoder, export: Encoder, towers: tuple[Tower, ...]) -> Parity:
    """Pass the golden images and captions through both."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    if "image" in towers:
        goldens = golden_images()
        pairs["image"] = (_images(model, goldens), _images(export, goldens))
    if "text" in towers:
        pairs["text"] = (model.texts(PROMPTS).cpu(), export.texts(PROMPTS).cpu())
    before = torch.cat([pair[0] for pair in pairs.values()])
    after = torch.cat([pair[1] for pair in pairs.values()])
    cosines = torch.cosine_similarity(before.double(), after.double(), dim=1)
    finite = bool(torch.isfinite(after).all())
    return Parity(
        images=len(pairs["image"][0]) if "image" in pairs else 0,
        prompts=len(PROMPTS) if "text" in pairs else 0,
        max_difference=float((before - after).abs().max()) if finite else float("inf"),
        min_cosine=float(cosines.min()) if finite else -1.0,
        top_match=_agreement(pairs["image"], pairs["text"]) if len(pairs) == 2 else None,
    )


def golden_images() -> list[Image.Image]:
    """Two photographs of scikit-learn and parts of them, drawn pictures, and unusual sizes and modes."""
    from sklearn.datasets import load_sample_images

    photos: list[Image.Image] = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # type: ignore
    parts = [
        photo.crop(box) for photo in photos for box in ((0, 0, 300, 400), (200, 60, 640, 200), (320, 180, 400, 260))
    ]
    rows, columns = np.mgrid[0:240, 0:320]
    disc = (rows - 120) ** 2 + (columns - 160) ** 2 < 70**2
    drawn = [
        np.where(disc[..., None], (220, 30, 30), (30, 40, 220)),
        np.broadcast_to((columns // 16 % 2 * 255)[..., None], (240, 320, 3)),
        np.broadcast_to(((rows // 40 + columns // 40) % 2 * 255)[..., None], (240, 320, 3)),
        np.stack([rows, columns // 2, 255 - rows], axis=-1),
        np.random.default_rng(0).integers(0, 256, (240, 320, 3)),
    ]
    pictures = [Image.fromarray(np.ascontiguousarray(pixels).astype(np.uint8)) for pixels in drawn]
    strange = [photos[0].convert("L"), photos[1].convert("P"), photos[1].resize((40, 333)), photos[0].resize((9, 7))]
    return [*photos, *parts, *pictures, *strange]


def _images(encoder: Encoder, goldens: list[Image.Image]) -> Float[Tensor, "images dim"]:
    pixels = [encoder.preprocessing.pixels(image) for image in goldens]
    return torch.cat([encoder.images(part).cpu() for part in torch.stack(pixels).split(8)])


def _agreement(images: tuple[Tensor, Tensor], texts: tuple[Tensor, Tensor]) -> float:
    scores = [image @ text.T for image, text in zip(images, texts, strict=True)]
    same = [scores[0].argmax(dim=axis) == scores[1].argmax(dim=axis) for axis in (0, 1)]
    return float(torch.cat(same).double().mean())
