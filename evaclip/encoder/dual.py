"""A trained dual encoder, whoever trained it: images and captions in, unit vectors out."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from evaclip.data.tokenizer import clip_tokenizer, cut_to_longest
from evaclip.data.transforms import MEAN, STD, evaluation_pixels
from evaclip.models.clip import Clip
from evaclip.models.plain import PlainClip
from evaclip.models.weights.names import TEXT_ROOTS
from evaclip.openclip import QuickGELU
from evaclip.records import unstructured

Triple = tuple[float, float, float]
# Tokenizers that agree on these agree on captions: case, punctuation, numbers, entities, broken and foreign characters,
# white space, emoji, nothing at all, and more tokens than any tower takes.
TOKENIZER_PROBES = (
    "a photo of a Cat.",
    "TWO dogs & 12,345 birds -- isn't it?",
    "caf\u00e9 &amp; cr&egrave;me; \u00c3\u00a9t\u00c3\u00a9",
    "\u6771\u4eac\u306e\u591c\u666f \U0001f5fc  tabs\tand\nlines ",
    "",
    "many words " * 1000,
)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes what the image tower takes."""

    size: int
    """Pixels of a side."""
    mean: Triple = MEAN
    """Subtracted from each channel, pixels counted from 0 to 1."""
    std: Triple = STD
    """Divides each channel."""
    interpolation: str = "bicubic"
    """PIL's filter of the resize."""
    resize: str = "shortest"
    """`shortest`: the shortest side becomes `size`, then the centre is cut out; `squash`: both sides become `size`."""

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """An image resized and cropped."""
        filter = Image.Resampling[self.interpolation.upper()]
        if self.resize == "squash":
            image = image.convert("RGB").resize((self.size, self.size), filter)
        return evaluation_pixels(image, self.size, filter)

    def normalized(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """float32, on the pixels' device."""
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)  # in place: fresh memory costs time


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Two towers into one space, and what they take."""

    name: str
    """What the model is called."""
    model: nn.Module
    """Has `encode_image(normalised images)` and `encode_text(token ids)`; features are not normalised."""
    preprocessing: Preprocessing
    tokenizer: Callable[[Sequence[str]], Tensor]
    """Captions to padded rows of ids."""
    device: torch.device
    origin: dict[str, str] = field(default_factory=dict)
    """Where the weights come from, for records."""
    known_space: str | None = None
    """The `space_id` of the model that this one was made from, where its own weights cannot tell."""
    files: str = ""
    """Hash of the files of an export: programs show no weights, and one space has them in several precisions."""

    @cached_property
    def space_id(self) -> str:
        """What two sets of vectors must share to be compared: 32 hexadecimal digits.

        A hash of the weights as float32 (by name; without the logit scale and bias, which no vector depends on) and the
        kind of GELU, the preprocessing, and the ids that the tokenizer gives to TOKENIZER_PROBES. So a run, its
        open_clip export and that export loaded on another device have the same one; a step of training, another resize
        or another context length makes a new one. Computed once, at the speed of SHA-256 on a few threads.
        """
        if self.known_space is not None:
            return self.known_space
        parts = [self._towers_hash, json.dumps(unstructured(self.preprocessing), sort_keys=True)]
        for probe in TOKENIZER_PROBES:
            ids = self.tokenizer([probe])[0].tolist()
            used = max((place for place, id in enumerate(ids, 1) if id), default=0)  # without padding
            parts.append(json.dumps(ids[:used]))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @property
    def towers_id(self) -> str:
        """What a cache of features knows the towers by: their weights, the kind of GELU, the files of an export."""
        return self._towers_hash + self.files

    @property
    def _towers_hash(self) -> str:
        found = weights_hash(self.model.state_dict())  # the same for both kinds of GELU, whose vectors are not
        return f"{found} quick_gelu" if any(isinstance(m, QuickGELU) for m in self.model.modules()) else found

    @torch.inference_mode()
    def images(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit rows, float32, on the encoder's device."""
        return self.prepared(self.preprocessing.normalized(pixels.to(self.device)))

    @torch.inference_mode()
    def prepared(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit rows of images that are normalised already."""
        return F.normalize(self._towers.encode_image(images.to(self.device)).float(), dim=1)

    @torch.inference_mode()
    def texts(self, captions: Sequence[str], batch: int = 1024) -> Float[Tensor, "captions dim"]:
        """Unit rows, float32, on the encoder's device."""
        tokens = self.tokenizer(captions)
        parts = [self._towers.encode_text(part.to(self.device)).float() for part in tokens.split(batch)]
        return F.normalize(torch.cat(parts), dim=1)

    @property
    def _towers(self) -> Any:
        return self.model


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values of everything that decides a vector's direction.

    A plain CLIP is the same one whether its text tower's names begin with `text.` or, as in open_clip, do not.
    """
    places = {f"text.{name}" if name.split(".")[0] in TEXT_ROOTS else name: name for name in state}

    def line(place: str) -> str:
        value = state[places[place]].detach()
        flat = value.to("cpu", torch.float32).contiguous().numpy().data
        return f"{place} {list(value.shape)} {hashlib.sha256(flat).hexdigest()}"

    names = sorted(place for place in places if place not in ("logit_scale", "logit_bias"))
    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256("\n".join(pool.map(line, names)).encode()).hexdigest()


def encoder_of(model: Clip | PlainClip, origin: dict[str, str]) -> Encoder:
    """An encoder of towers that are in memory, on the device where they are."""
    tokenizer = clip_tokenizer(model.shape.text.context)
    return Encoder(
        name=model.shape.name,
        model=model,
        preprocessing=Preprocessing(size=model.shape.vision.image_size),
        tokenizer=lambda captions: cut_to_longest(tokenizer(captions)),
        device=model.logit_scale.device,
        origin=origin,
    )
