"""The ways in which the published scores were made; they differ in what is cut off, and in which frames are taken.

| protocol | resize | video | ObjectNet's border |
|---|---|---|---|
| eva | the model's own (centre crop for EVA-CLIP) | one frame, vissl's | kept |
| openai | shortest side, centre crop | the middle frame | kept |
| testbed | shortest side, centre crop | the middle frame | 2 px cut off |
| pe | both sides, squashed | 8 frames, features averaged | kept |

All: prompts averaged per class, ImageNet-A and -R over 200 classes, ObjectNet over 113, Kinetics as the mean of top-1
and top-5. Sources: EVA-01/clip/benchmark.md, arXiv 2103.00020, ImageNet Testbed (arXiv 2007.00644), Perception Encoder
(arXiv 2504.13181).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from evaclip.encoder import Preprocessing
from evaclip.errors import InputError, did_you_mean
from evaclip.evals.card import Card


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images and videos become what the tower sees."""

    name: str
    resize: Literal["model", "shortest", "squash"]
    sampling: Literal["vissl", "centre", "uniform"]
    frames: int = 1


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="eva", resize="model", sampling="vissl"),
        Protocol(name="openai", resize="shortest", sampling="centre"),
        Protocol(name="testbed", resize="shortest", sampling="centre"),
        Protocol(name="pe", resize="squash", sampling="uniform", frames=8),
    )
}


@dataclass(frozen=True, kw_only=True)
class View:
    """A protocol applied to one benchmark and one model."""

    protocol: str
    preprocessing: Preprocessing
    border: int
    """Pixels cut off each side first."""
    frames: int
    """Frames of a video; 1 for images."""
    sampling: str
    """Which frames; `none` for images."""

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """What the tower sees of an image."""
        if self.border:
            image = image.crop((self.border, self.border, image.width - self.border, image.height - self.border))
        return self.preprocessing.pixels(image)

    def described(self) -> str:
        """In words."""
        size = self.preprocessing.size
        resize = {"shortest": f"shortest side to {size} px, {{}} (PIL), centre crop"}.get(
            self.preprocessing.resize, f"both sides to {size} px, {{}} (PIL)"
        )
        words = [resize.format(self.preprocessing.interpolation)]
        if self.border:
            words.insert(0, f"{self.border} px cut off each side")
        if self.sampling != "none":
            words.insert(0, f"{self.frames} frame{'s, features averaged' if self.frames > 1 else ''} ({self.sampling})")
        return ", ".join(words)

    def record(self) -> dict[str, Any]:
        """For the record of a result."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        return {"name": self.protocol, "preprocessing": self.described(), "mean": mean, "std": std}


def protocol_named(name: str) -> Protocol:
    """A protocol by name. Raises InputError."""
    if name not in PROTOCOLS:
        raise InputError(f"no protocol is called {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def view_of(protocol: Protocol, card: Card | None, preprocessing: Preprocessing) -> View:
    """What a protocol asks for on a benchmark, for a model with this preprocessing; None is a set of plain images."""
    resize = preprocessing.resize if protocol.resize == "model" else protocol.resize
    video = card is not None and card.media == "video"
    return View(
        protocol=protocol.name,
        preprocessing=replace(preprocessing, resize=resize),
        border=card.border.get(protocol.name, 0) if card is not None else 0,
        frames=protocol.frames if video else 1,
        sampling=protocol.sampling if video else "none",
    )
