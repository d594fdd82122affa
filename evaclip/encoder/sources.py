"""Where an encoder comes from: a run of ours, an export, a file of weights in any layout, a model of open_clip."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evaclip import checkpoint
from evaclip.data.tokenizer import clip_tokenizer, cut_to_longest
from evaclip.encoder.dual import Encoder, Preprocessing, encoder_of
from evaclip.errors import CheckpointError, InputError, near_path
from evaclip.exported import MANIFEST, Manifest, load_towers, read_manifest, verify
from evaclip.log import say
from evaclip.models.clip import Clip
from evaclip.models.shapes import SHAPES, ClipShape
from evaclip.models.weights import Weights, as_layout, load_whole, read_weights
from evaclip.models.weights.plain import plain_clip, published_shape
from evaclip.openclip import create_model, get_pretrained_cfg, get_tokenizer, list_pretrained_tags_by_model
from evaclip.records import structured


def load_encoder(source: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """A model by the folder of a run, the folder of an export, a file of weights, or an open_clip name.

    `source`: a run's folder (its newest whole checkpoint) or that of one of its checkpoints; what `evaclip export`
    writes; a folder with `open_clip_config.json`; Hugging Face's folder of a CLIPModel; a file of weights, `FILE` of a
    published EVA-CLIP or of OpenAI's, and `NAME:FILE` with the name of a shape of ours or a model of open_clip's;
    `NAME:TAG` or `NAME` of open_clip, with random weights only where TAG is the word `random`;
    `hf-hub:ORGANISATION/NAME`. Raises CheckpointError or InputError with one sentence.
    """
    folder, device = Path(source), torch.device(device)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.format != "open_clip":
        return encoder_of_export(folder, manifest, device)
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


def clip_of_run(folder: Path) -> tuple[Clip, dict[str, str]]:
    """The towers of a run's newest whole checkpoint, and where they come from. Raises CheckpointError.

    `folder` may also be one of the folders in the run's `checkpoints/`.
    """
    if (folder / checkpoint.MANIFEST).is_file():
        return clip_of_checkpoint(checkpoint.load(folder, kinds=("model",)))
    _shape_and_loss(folder)  # or a sentence that says what is wrong with the folder
    found = checkpoint.newest(folder / "checkpoints", kinds=("model",))
    if found is None:
        raise CheckpointError(f"the run in {folder} has no checkpoint yet")
    return clip_of_checkpoint(found)


def clip_of_checkpoint(found: checkpoint.Checkpoint) -> tuple[Clip, dict[str, str]]:
    """The towers of a run's checkpoint that has been read, and where they come from. Raises CheckpointError."""
    run_dir = found.path.parents[1]
    shape, loss = _shape_and_loss(run_dir)
    model = Clip(shape, logit_bias=loss == "sigmoid")
    model.load_state_dict(found.tensors["model"])
    origin = {"name": model.shape.name, "run": str(run_dir), "step": str(found.step)}
    if "averaged" in found.record:  # written by `evaclip average`
        origin["averaged"] = ", ".join(map(str, found.record["averaged"]))
    return model.eval(), origin


def _shape_and_loss(run_dir: Path) -> tuple[ClipShape, str]:
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_text())
        shape, objective = config["model"], config["objective"]
        # The first runs were written when there was one objective, and that had one loss.
        if objective.get("kind", "clip") != "clip":
            raise ValueError(f"its objective is {objective['kind']}")
        loss = objective.get("loss", "softmax")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run that has two towers: {error}") from None
    return structured(shape, ClipShape, path), loss


def _from_run(folder: Path, device: torch.device) -> Encoder:
    model, origin = clip_of_run(folder)
    return encoder_of(model.to(device), origin)


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
    model = plain_clip(weights, weights.activation).to(device)
    prepared = described_preprocessing(weights.path, model.shape.vision.image_size)
    return replace(encoder_of(model, _origin(weights)), preprocessing=prepared)


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


def described_preprocessing(folder: Path, size: int) -> Preprocessing:
    """What Hugging Face's preprocessor_config.json says, OpenAI's own where there is none.

    `size`: pixels of a side that the image tower takes. Raises CheckpointError for what we do not do.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Preprocessing(size=size)
    try:
        found = json.loads(path.read_text())
        mean, std = (tuple(float(value) for value in found[name]) for name in ("image_mean", "image_std"))
        filter = Image.Resampling(found.get("resample", Image.Resampling.BICUBIC)).name.lower()
        given = found.get("size", size)  # of early files a number: the shortest side
        sides = [int(side) for side in (given.values() if isinstance(given, dict) else [given])]
        (a, b, c), (d, e, f) = mean, std
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe how images are prepared: {error!r}") from None
    if set(sides) != {size}:
        raise CheckpointError(
            f"{path} resizes images to {given} and the tower takes {size}; only one size is known here"
        )
    resize = "squash" if len(sides) == 2 else "shortest"
    return Preprocessing(size=size, mean=(a, b, c), std=(d, e, f), interpolation=filter, resize=resize)


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
        files=hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest(),
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
        # open_clip builds ViT-B-32:openai with GELU and warns; the weights were trained with QuickGELU.
        quick = bool(weights and get_pretrained_cfg(name, weights).get("quick_gelu", False))
        model = create_model(name, pretrained=weights, device=device, force_quick_gelu=quick, **_own_trunk(name))
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
