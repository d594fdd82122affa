"""Reading what `evaclip export` writes: the manifest, and the towers of each format.

An export is a folder with `evaclip_manifest.json`, which lists every other file with its SHA-256. The files are hashed
again when they are loaded, so that the `space_id` of the manifest is that of what lies beside it. Only an open_clip
folder is left to open_clip: it may be edited, and its weights tell their `space_id` themselves.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evaclip.errors import CheckpointError, InputError
from evaclip.models.clip import Clip
from evaclip.models.shapes import ClipShape, PlainShape
from evaclip.models.text import TextTower
from evaclip.models.vision import VisionTower
from evaclip.models.weights import read_weights
from evaclip.models.weights.plain import plain_clip
from evaclip.records import structured

MANIFEST = "evaclip_manifest.json"
VERSION = 1
Format = Literal["open_clip", "timm", "huggingface", "onnx", "torch_export", "evaclip"]
Tower = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an export says of itself."""

    version: int
    """Of this record."""
    format: Format
    """Which program the folder is for."""
    towers: tuple[Tower, ...]
    """What is in it."""
    precision: str
    """`fp32`, `fp16`, or `int8`: how the weights are stored."""
    name: str
    """What the model is called."""
    space_id: str
    """Of the model that was exported, see `Encoder.space_id`."""
    shape: ClipShape | PlainShape
    """Both towers of the model."""
    preprocessing: dict[str, Any]
    """How an image becomes what the image tower takes."""
    tokenizer: dict[str, Any]
    """How a caption becomes what the text tower takes."""
    origin: dict[str, str]
    """Where the weights come from."""
    config: dict[str, Any]
    """The configuration of the run, if it was one."""
    scores: dict[str, Any]
    """The run's benchmark results by name, if there are any."""
    versions: dict[str, str]
    """Of the packages that wrote it."""
    parity: dict[str, Any]
    """How far its vectors are from those of the model, see `evaclip.export.parity`."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of every other file."""


class Towers(nn.Module):
    """One or both towers of an export, whatever runs them."""

    def __init__(
        self, image: Callable[[Tensor], Tensor] | None, text: Callable[[Tensor], Tensor] | None, folder: Path
    ) -> None:
        """`folder`: for the sentence about a tower that is not there."""
        super().__init__()
        self.visual, self._text, self._folder = image, text, folder

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features. Raises InputError where there is no image tower."""
        if self.visual is None:
            raise InputError(f"{self._folder} holds the text tower alone; images need an export with the image tower")
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features. Raises InputError where there is no text tower."""
        if self._text is None:
            raise InputError(f"{self._folder} holds the image tower alone; captions need an export with the text tower")
        return self._text(tokens)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an export; None where there is none. Raises CheckpointError for one that cannot be used."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        version = record["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the manifest of an export: {error}") from None
    if version != VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, this evaclip reads {VERSION}; use the one that wrote it"
        )
    return structured(record, Manifest, path)


def described(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def verify(folder: Path, manifest: Manifest) -> None:
    """Hash the files of an export again. Raises CheckpointError that names one which is not as it was written."""
    for name, written in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MANIFEST} names {name}, which lies outside of the folder")
        if not path.is_file() or described(path) != written:
            raise CheckpointError(f"{path} is not the file that was exported: export the model again")


def load_towers(folder: Path, manifest: Manifest, device: torch.device, *, trusted: bool = False) -> nn.Module:
    """The towers of an export of any format but open_clip's.

    `trusted`: whether a program of torch.export may be loaded; its archive can hold pickles, which run what they like.
    """
    if manifest.format == "evaclip":
        return _own_towers(folder, manifest, device)
    if manifest.format == "huggingface":
        weights = read_weights(folder)
        assert weights.activation is not None  # its config.json says it, or reading it failed
        return plain_clip(weights, weights.activation).to(device)
    loaders: Mapping[str, Callable[[str], Callable[[Tensor], Tensor]]] = {
        "timm": lambda _: timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device),
        "onnx": lambda tower: _onnx_tower(folder / f"{tower}.onnx", device),
        "torch_export": lambda tower: _program(folder / f"{tower}.pt2", device),
    }
    if manifest.format == "torch_export" and not trusted:
        raise InputError(
            f"{folder} is a program of torch.export, which may run anything when it is loaded: load it yourself with "
            "torch.export.load, or name another export of the model"
        )
    loaded = {tower: loaders[manifest.format](tower) for tower in manifest.towers}
    return Towers(loaded.get("image"), loaded.get("text"), folder)


def _own_towers(folder: Path, manifest: Manifest, device: torch.device) -> nn.Module:
    shape, state = manifest.shape, load_file(folder / "model.safetensors")
    if not isinstance(shape, ClipShape):
        raise CheckpointError(f"{folder / MANIFEST} gives the shape of a plain CLIP to an export that holds none")
    if len(manifest.towers) == 2:
        whole = Clip(shape, logit_bias="logit_bias" in state)
        whole.load_state_dict(state)
        return whole.eval().to(device)
    if manifest.towers == ("image",):
        one: nn.Module = VisionTower(shape.vision, shape.dim)
    else:
        one = TextTower(shape.text, shape.dim)
    one.load_state_dict({name.split(".", 1)[1]: value for name, value in state.items()})
    one = one.eval().to(device)
    return Towers(one, None, folder) if manifest.towers == ("image",) else Towers(None, one, folder)


def _onnx_tower(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A session of onnxruntime as a function of tensors."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError("an ONNX export runs in onnxruntime: pip install 'evaclip[onnx]'") from None
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise InputError(f"this onnxruntime cannot run on {device}: pip install onnxruntime-gpu, or take the CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    given = session.get_inputs()[0]
    kind = torch.int64 if given.type == "tensor(int64)" else torch.float32

    def run(values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: values.to("cpu", kind).numpy()})[0]).to(device)

    return run


def _program(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module().to(device)
    wide = path.stem == "text"
    return lambda values: module(values.to(torch.int64) if wide else values)
