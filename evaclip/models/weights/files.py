"""Reading the tensors of any checkpoint: by what a file holds, never by what it is called, and never by running it.

A pickle is read through torch's weights-only reader, which builds tensors and refuses everything else; of TorchScript
the tensors are read and the program is not. Tensors stay in the type that they were saved in.
"""

import hashlib
import json
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evaclip.errors import CheckpointError, near_path
from evaclip.models.shapes import Activation
from evaclip.models.weights.names import Named, canonical
from evaclip.models.weights.torchscript import read_torchscript

# What a folder may call its weights, in the order in which they are looked for.
IN_A_FOLDER = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where trainers put the tensors among the rest of their state: DeepSpeed, BEiT and timm, open_clip.
CONTAINERS = ("module", "model", "state_dict")
LARGEST_HEADER = 100 << 20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint of somebody's."""

    path: Path
    """Where it was read from."""
    sha256: str
    """Of the file; of several, of the lines `SHA-256 name` of all of them."""
    named: Named
    """The tensors under our names."""
    activation: Activation | None
    """What the text tower was trained with, None where the files do not say."""
    config: dict[str, Any]
    """Hugging Face's config.json beside them, if there is one."""


def read_weights(path: Path) -> Weights:
    """Read a checkpoint: a file, the index of a sharded one, or a folder that holds either.

    Formats: safetensors, torch's own (zip and the older pickle), TorchScript, sharded by an index. Raises
    CheckpointError in one sentence for what is missing, damaged, not weights, or holds anything but plain data.
    """
    if not path.exists():
        raise CheckpointError(f"the weights {path} do not exist; {near_path(path)}")
    file = _in_folder(path) if path.is_dir() else path
    state, files, scripted = _tensors(file)
    named = canonical(state, path)
    config = _config(file.parent) if named.layout == "hugging_face" else {}
    return Weights(
        path=path,
        sha256=_hashed(files),
        named=named,
        activation=_activation(named, config, scripted, file.parent),
        config=config,
    )


def _in_folder(folder: Path) -> Path:
    for name in IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no weights; looked for {', '.join(IN_A_FOLDER)}")


def _tensors(path: Path) -> tuple[dict[str, Tensor], list[Path], bool]:
    """The tensors by their own names, the files that held them, and whether it was TorchScript."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
            found = _pickled(path, read_torchscript if scripted else _read_pickle)
            return _unwrapped(found, path), [path], scripted
        if start[:1] == b"\x80":
            return _unwrapped(_pickled(path, _read_pickle), path), [path], False
        if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= LARGEST_HEADER:
            return _unwrapped(load_file(path), path), [path], False
        if start.lstrip()[:1] == b"{":
            return _sharded(path)
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {str(error).splitlines()[0]}") from None
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is Git LFS's pointer to the weights and not they themselves: run git lfs pull")
    raise CheckpointError(f"{path} is no checkpoint: neither safetensors, nor torch's, nor TorchScript, nor an index")


def _read_pickle(path: Path) -> Any:
    # BEiT's and EVA's trainers save their arguments beside the tensors; a Namespace has nothing to run.
    with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pickle that torch did not write
        return torch.load(path, map_location="cpu", weights_only=True)


def _pickled(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        if not reason:
            raise CheckpointError(f"{path} is damaged or cut short: it is no pickle of torch's") from None
        raise CheckpointError(
            f"{path} holds Python objects that could run code and was not loaded ({reason.split('. ')[0]}); "
            "ask its author for safetensors"
        ) from None


def _unwrapped(found: Any, path: Path) -> dict[str, Tensor]:
    """The tensors inside any of the containers, without the prefix that data-parallel wrappers leave."""
    while isinstance(found, Mapping):
        inside = next((name for name in CONTAINERS if isinstance(found.get(name), Mapping)), None)
        if inside is None:
            break
        found = found[inside]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        shown = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(f"{path} holds no tensors by name, only {shown or 'nothing'}")
    odd = [str(name) for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise CheckpointError(f"{path} has {odd[0]!r} among its tensors, which is none")
    whole = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if whole else name: value for name, value in found.items()}


def _sharded(path: Path) -> tuple[dict[str, Tensor], list[Path], bool]:
    """The tensors of every shard that an index names. Shards lie beside it: a path in there is refused."""
    if path.stat().st_size > LARGEST_HEADER:
        raise CheckpointError(f"{path} is too large for an index of shards")
    index = json.loads(path.read_text())
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path} is JSON without a weight_map, so no index of shards")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{path} names the shard {name!r}, which is not a file beside it")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names the shard {name}, which is not there")
    state = {key: value for name in names for key, value in _tensors(path.parent / name)[0].items()}
    differing = sorted(places.keys() ^ state.keys())
    if differing:
        raise CheckpointError(f"the shards of {path} and their index differ in {differing[0]}")
    return state, [path, *(path.parent / name for name in names)], False


def _hashed(files: list[Path]) -> str:
    sums = []
    for path in files:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return sums[0]
    lines = [f"{digest} {path.name}\n" for digest, path in zip(sums, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    """Hugging Face's description of a CLIP model, where there is one."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _activation(named: Named, config: dict[str, Any], scripted: bool, folder: Path) -> Activation | None:
    """OpenAI's own files are QuickGELU; Hugging Face's and open_clip's folders say what they are."""
    if config:
        return _described_activation(config, folder / "config.json")
    if scripted or named.from_openai:
        return "quick_gelu"
    try:
        record = json.loads((folder / "open_clip_config.json").read_text())
        return "quick_gelu" if record["model_cfg"].get("quick_gelu") else "gelu"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _described_activation(config: dict[str, Any], path: Path) -> Activation:
    """What Hugging Face's config.json says, and transformers takes for granted where it says nothing.

    Raises CheckpointError where the towers are not OpenAI's in this or in where a caption ends.
    """
    text, vision = config.get("text_config", config), config.get("vision_config", {})
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(f"{path} does not describe two towers")
    found = text.get("hidden_act", "quick_gelu")
    if found not in ("gelu", "quick_gelu"):
        raise CheckpointError(f"{path}: the activation {found!r} is neither gelu nor quick_gelu")
    if vision and vision.get("hidden_act", "quick_gelu") != found:
        other = vision.get("hidden_act", "quick_gelu")
        raise CheckpointError(f"{path}: {found} in the text tower and {other} in the image tower; no known CLIP mixes")
    end, highest = text.get("eos_token_id", 2), text.get("vocab_size", 49408) - 1
    if end not in (None, 2, highest):  # 2 is a slip in early files, which transformers passes over as well
        raise CheckpointError(f"{path}: the end-of-text token {end} is not the highest, {highest}, as in CLIP")
    return found
