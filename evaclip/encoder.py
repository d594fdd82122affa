"""A trained dual encoder, whoever trained it: images and captions in, unit vectors out.

Everything that uses a model without training it (benchmarks, teachers, export, search, filtering) takes an `Encoder`,
so each of them works with a run of ours, an exported folder, and any model of open_clip.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from evaclip import checkpoint
from evaclip.data.tokenizer import clip_tokenizer, cut_to_longest
from evaclip.data.transforms import MEAN, STD, evaluation_pixels
from evaclip.errors import CheckpointError, InputError, near_path
from evaclip.log import say
from evaclip.models.clip import Clip
from evaclip.models.shapes import SHAPES, ClipShape
from evaclip.models.weights import Weights, as_layout, load_whole, read_weights
from evaclip.models.weights.plain import plain_clip, published_shape
from evaclip.openclip import create_model, get_tokenizer, list_pretrained_tags_by_model
from evaclip.records import structured, unstructured

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
        return (pixels.to(torch.float32) / 255 - mean) / std


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

    @cached_property
    def space_id(self) -> str:
        """What two sets of vectors must share to be compared: 32 hexadecimal digits.

        A hash of the weights as float32 (by name; without the logit scale and bias, which no vector depends on), the
        preprocessing, and the ids that the tokenizer gives to TOKENIZER_PROBES. So a run, its open_clip export and that
        export loaded on another device have the same one; a step of training, another resize or another context length
        makes a new one. Computed once, at the speed of SHA-256 on a few threads.
        """
        if self.known_space is not None:
            return self.known_space
        parts = [weights_hash(self.model.state_dict()), json.dumps(unstructured(self.preprocessing), sort_keys=True)]
        for probe in TOKENIZER_PROBES:
            ids = self.tokenizer([probe])[0].tolist()
            used = max((place for place, id in enumerate(ids, 1) if id), default=0)  # without padding
            parts.append(json.dumps(ids[:used]))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @torch.inference_mode()
    def images(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit rows, float32, on the encoder's device."""
        prepared = self.preprocessing.normalized(pixels.to(self.device))
        return F.normalize(self._towers.encode_image(prepared).float(), dim=1)

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
    """SHA-256 over names, shapes and float32 values of everything that decides a vector's direction."""

    def line(name: str) -> str:
        value = state[name].detach()
        flat = value.to("cpu", torch.float32).contiguous().numpy().data
        return f"{name} {list(value.shape)} {hashlib.sha256(flat).hexdigest()}"

    names = sorted(name for name in state if name not in ("logit_scale", "logit_bias"))
    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256("\n".join(pool.map(line, names)).encode()).hexdigest()


def load_encoder(source: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """A model by the folder of a run, the folder of an export, a file of weights, or an open_clip name.

    `source`: a run's folder (its newest whole checkpoint); a folder with `open_clip_config.json`; Hugging Face's folder
    of a CLIPModel; a file of weights, `FILE` of a published EVA-CLIP or of OpenAI's, and `NAME:FILE` with the name of a
    shape of ours or a model of open_clip's; `NAME:TAG` or `NAME` of open_clip, with random weights only where TAG is
    the word `random`; `hf-hub:ORGANISATION/NAME`. Raises CheckpointError or InputError with one sentence.
    """
    folder, device = Path(source), torch.device(device)
    if (folder / "open_clip_config.json").is_file():
        return _from_open_clip(f"local-dir:{folder}", None, device)
    if folder.is_file() or _is_hugging_face(folder):
        return _from_weights(read_weights(folder), device)
    if folder.is_dir():
        return _from_run(folder, device)
    name, _, tag = str(source).partition(":")
    if name != "hf-hub" and Path(tag).is_file():
        return _from_named_weights(name, read_weights(Path(tag)), device)
    if name == "hf-hub":
        return _from_open_clip(str(source), None, device)
    if "/" in str(source) or str(source).startswith("."):
        raise CheckpointError(f"the model {source} does not exist; {near_path(folder)}")
    return _from_open_clip(name, tag or _only_tag(name), device)


def clip_of_run(run_dir: Path) -> tuple[Clip, dict[str, str]]:
    """The towers of a run's newest whole checkpoint, and where they come from. Raises CheckpointError."""
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_text())
        shape, loss = config["model"], config["objective"]["loss"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run that has two towers: {error}") from None
    found = checkpoint.newest(run_dir / "checkpoints", kinds=("model",))
    if found is None:
        raise CheckpointError(f"the run in {run_dir} has no checkpoint yet")
    model = Clip(structured(shape, ClipShape, path), logit_bias=loss == "sigmoid")
    model.load_state_dict(found.tensors["model"])
    return model.eval(), {"name": model.shape.name, "run": str(run_dir), "step": str(found.step)}


def _from_run(folder: Path, device: torch.device) -> Encoder:
    model, origin = clip_of_run(folder)
    return encoder_of(model.to(device), origin)


def encoder_of(model: Clip, origin: dict[str, str]) -> Encoder:
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


def _is_hugging_face(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "clip"


def _from_weights(weights: Weights, device: torch.device) -> Encoder:
    """A model whose weights say everything about it."""
    if not weights.named.plain:
        return _from_named_weights(published_shape(weights).name, weights, device)
    if weights.activation is None:
        raise InputError(
            f"{weights.path} does not say whether it was trained with GELU or QuickGELU: put open_clip's name of the "
            "model before it, as in ViT-B-32-quickgelu:FILE"
        )
    model = plain_clip(weights, weights.activation)
    side = weights.named.tensors["visual.positional_embedding"].shape[0] - 1
    patch = weights.named.tensors["visual.conv1.weight"].shape[-1]
    context = len(weights.named.tensors["text.positional_embedding"])
    tokenizer = clip_tokenizer(context)
    return Encoder(
        name=weights.path.stem,
        model=model.to(device),
        preprocessing=_described_preprocessing(weights.path, math.isqrt(side) * patch),
        tokenizer=lambda captions: tokenizer(captions).long(),
        device=device,
        origin=_origin(weights),
    )


def _from_named_weights(name: str, weights: Weights, device: torch.device) -> Encoder:
    """A file's weights in a shape of ours, or in a model of open_clip's."""
    if name in SHAPES:
        model = Clip(SHAPES[name])
        report = load_whole(model, weights)
        if report.count("resized") or report.count("renewed"):
            for line in report.lines():
                say(line)
        return encoder_of(model.eval().to(device), {"name": name} | _origin(weights))
    encoder = _from_open_clip(name, "random", device)
    state, _ = as_layout(weights.named, "open_clip")
    try:
        encoder.model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {weights.path} are not of {name}: {reason[:200]}") from None
    return replace(encoder, origin={"name": name} | _origin(weights))


def _origin(weights: Weights) -> dict[str, str]:
    return {"weights": str(weights.path), "sha256": weights.sha256, "layout": weights.named.layout}


def _described_preprocessing(folder: Path, size: int) -> Preprocessing:
    """What Hugging Face's preprocessor_config.json says, OpenAI's own where there is none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Preprocessing(size=size)
    try:
        found = json.loads(path.read_text())
        mean, std = (tuple(float(value) for value in found[name]) for name in ("image_mean", "image_std"))
        filter = Image.Resampling(found.get("resample", Image.Resampling.BICUBIC)).name.lower()
        (a, b, c), (d, e, f) = mean, std
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe how images are prepared: {error!r}") from None
    return Preprocessing(size=size, mean=(a, b, c), std=(d, e, f), interpolation=filter)


def _only_tag(name: str) -> str:
    """The weights of a name that come first in open_clip's list, which are the authors' own."""
    tags = list_pretrained_tags_by_model(name)
    if not tags:
        raise InputError(f"no model is called {name!r}: neither a folder nor a model of open_clip with weights")
    return tags[0]


def _from_open_clip(name: str, tag: str | None, device: torch.device) -> Encoder:
    weights = None if tag == "random" else tag
    try:
        model = create_model(name, pretrained=weights, device=device)
        tokenizer = get_tokenizer(name)
    except Exception as error:  # open_clip and the hub raise a dozen kinds for a file that is not there
        raise InputError(
            f"the weights of {name}{f':{tag}' if tag else ''} cannot be had: {str(error).splitlines()[0]}. Without a "
            "network, name a folder that holds open_clip_config.json and its weights, or a run's folder"
        ) from None
    found: dict[str, Any] = model.visual.preprocess_cfg  # type: ignore[union-attr]
    size = found["size"]
    preprocessing = Preprocessing(
        size=size if isinstance(size, int) else size[0],
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
        resize=found["resize_mode"],
    )
    return Encoder(
        name=name.removeprefix("local-dir:"),
        model=model.eval(),
        preprocessing=preprocessing,
        tokenizer=lambda captions: tokenizer(list(captions)),
        device=device,
        origin={"name": name} | ({"weights": tag} if tag else {}),
    )
