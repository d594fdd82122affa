"""A trained dual encoder, whoever trained it: images and captions in, unit vectors out.

Everything that uses a model without training it (benchmarks, teachers, export, search, filtering) takes an `Encoder`,
so each of them works with a run of ours, an exported folder, and any model of open_clip.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from evaclip.exported import MANIFEST, Manifest, load_towers, read_manifest, verify
from evaclip.models.clip import Clip
from evaclip.models.shapes import ClipShape
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
    """SHA-256 over names, shapes and float32 values of everything that decides a vector's direction."""

    def line(name: str) -> str:
        value = state[name].detach()
        flat = value.to("cpu", torch.float32).contiguous().numpy().data
        return f"{name} {list(value.shape)} {hashlib.sha256(flat).hexdigest()}"

    names = sorted(name for name in state if name not in ("logit_scale", "logit_bias"))
    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256("\n".join(pool.map(line, names)).encode()).hexdigest()


def load_encoder(source: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """A model by the folder of a run, the folder of an export, or an open_clip name.

    `source`: a run's folder (its newest whole checkpoint); what `evaclip export` writes; a folder with
    `open_clip_config.json`; `NAME:TAG` or `NAME` of open_clip, with random weights only where TAG is the word `random`;
    `hf-hub:ORGANISATION/NAME`. Raises CheckpointError or InputError with one sentence.
    """
    folder, device = Path(source), torch.device(device)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.format != "open_clip":
        return encoder_of_export(folder, manifest, device)
    if (folder / "open_clip_config.json").is_file():
        return _from_open_clip(f"local-dir:{folder}", None, device)
    if folder.is_dir():
        return _from_run(folder, device)
    name, _, tag = str(source).partition(":")
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


def encoder_of_export(folder: Path, manifest: Manifest, device: torch.device, *, trusted: bool = False) -> Encoder:
    """An encoder of an export that is not open_clip's. `trusted`: whether its files may be programs of torch.export."""
    verify(folder, manifest)
    try:
        model = load_towers(folder, manifest, device, trusted=trusted)
    except InputError:
        raise
    except Exception as error:  # timm, onnxruntime, torch.export and safetensors raise a dozen kinds
        raise CheckpointError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    tokenizer = clip_tokenizer(manifest.shape.text.context)
    return Encoder(
        name=manifest.name,
        model=model,
        preprocessing=structured(manifest.preprocessing, Preprocessing, folder / MANIFEST),
        tokenizer=lambda captions: cut_to_longest(tokenizer(captions)),
        device=device,
        origin=manifest.origin | {"export": str(folder)},
        known_space=manifest.space_id,
    )


def _only_tag(name: str) -> str:
    """The weights of a name that come first in open_clip's list, which are the authors' own."""
    tags = list_pretrained_tags_by_model(name)
    if not tags:
        raise InputError(f"no model is called {name!r}: neither a folder nor a model of open_clip with weights")
    return tags[0]


def _from_open_clip(name: str, tag: str | None, device: torch.device) -> Encoder:
    weights = None if tag == "random" else tag
    try:
        model = create_model(name, pretrained=weights, device=device, **_own_trunk(name))
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


def _own_trunk(name: str) -> dict[str, Any]:
    """A tower that timm has no name for lies beside the weights, wherever the folder has been moved to since."""
    folder = Path(name.removeprefix("local-dir:"))
    if not name.startswith("local-dir:") or not (folder / "config.json").is_file():
        return {}
    vision = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    if ":" not in vision.get("timm_model_name", ""):
        return {}
    return {"vision_cfg": vision | {"timm_model_name": name, "timm_model_pretrained": False}}
