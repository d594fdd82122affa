"""Exports that are weights and a configuration: open_clip's folder, timm's, and our own.

open_clip builds an EVA tower by the name that timm has for it and passes nothing on but dropout rates, so a shape
without such a name needs one: timm's `local-dir:FOLDER`, a `config.json` with the arguments of the tower. That file
lies in the export itself. The folder then loads with open_clip from where it was written (or from the address that was
given); evaclip finds it wherever it is. Shapes that cannot be given to timm's `Eva` as plain numbers are written in our
own form.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from evaclip.encoder import Preprocessing
from evaclip.errors import InputError
from evaclip.exported import Tower
from evaclip.models.clip import Clip
from evaclip.models.plain import PlainClip, mlp_ratio
from evaclip.models.shapes import SHAPES, ClipShape, PlainShape, TextShape, VisionShape
from evaclip.models.vision import trunk_arguments

# The EVA towers that timm has by name.
TIMM_NAMES: dict[VisionShape, str] = {
    SHAPES["EVA01-g-14"].vision: "eva_giant_patch14_224",
    SHAPES["EVA02-B-16"].vision: "eva02_base_patch16_clip_224",
    SHAPES["EVA02-L-14"].vision: "eva02_large_patch14_clip_224",
    SHAPES["EVA02-L-14-336"].vision: "eva02_large_patch14_clip_336",
    SHAPES["EVA02-E-14"].vision: "eva02_enormous_patch14_clip_224",
}
# Whichever it is, every argument of a tower is given beside it.
ANY_EVA = "eva02_base_patch16_clip_224"


def write_open_clip(model: Clip | PlainClip, preprocessing: Preprocessing, folder: Path, address: str) -> None:
    """`open_clip_config.json` and `open_clip_model.safetensors`.

    `address`: where timm will find the folder, `local-dir:PATH` or `hf-hub:ORGANISATION/NAME`; used only for a tower
    that it has no name for. Raises InputError for a shape that neither can express.
    """
    shape = model.shape
    if isinstance(shape, ClipShape):
        refuse_beyond_timm(shape, "open_clip")
    config = {
        "model_cfg": plain_config(shape) if isinstance(shape, PlainShape) else open_clip_config(shape, address),
        "preprocess_cfg": {
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "resize_mode": preprocessing.resize,
        },
    }
    state = dict(model.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape([])  # ours has one element, open_clip's has no dimension
    if "logit_bias" in state:
        config["model_cfg"]["init_logit_bias"] = float(state["logit_bias"])
        state["logit_bias"] = state["logit_bias"].reshape([])
    if isinstance(shape, ClipShape) and shape.vision not in TIMM_NAMES:
        _write_json(folder / "config.json", timm_config(shape, preprocessing))
    _write_json(folder / "open_clip_config.json", config)
    _save(state, folder / "open_clip_model.safetensors")


def write_timm(model: Clip, preprocessing: Preprocessing, folder: Path) -> None:
    """`config.json` and `model.safetensors`, the image tower with its projection as timm's classifier."""
    refuse_beyond_timm(model.shape, "timm")
    _write_json(folder / "config.json", timm_config(model.shape, preprocessing))
    _save(model.visual.trunk.state_dict(), folder / "model.safetensors")


def write_own(model: Clip, towers: Sequence[Tower], folder: Path) -> None:
    """`model.safetensors`; its shape is in the manifest."""
    wanted = {"image": "visual.", "text": "text."}
    state = model.state_dict()
    if len(towers) == 1:
        state = {name: value for name, value in state.items() if name.startswith(wanted[towers[0]])}
    _save(state, folder / "model.safetensors")


def open_clip_config(shape: ClipShape, address: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of a shape; for the published ones it is open_clip's own."""
    return {
        "embed_dim": shape.dim,
        "vision_cfg": {
            "image_size": shape.vision.image_size,
            "timm_model_name": TIMM_NAMES.get(shape.vision, address),
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": None,
        },
        "text_cfg": _text_config(shape.text),
        "custom_text": True,
    } | ({"quick_gelu": True} if shape.text.activation == "quick_gelu" else {})


def plain_config(shape: PlainShape) -> dict[str, Any]:
    """open_clip's `model_cfg` of a plain CLIP."""
    vision = shape.vision
    return {
        "embed_dim": shape.dim,
        "quick_gelu": shape.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.depth,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": mlp_ratio(vision.mlp_hidden, vision.width),
        },
        "text_cfg": _text_config(shape.text),
        "custom_text": True,
    }


def _text_config(text: TextShape) -> dict[str, int]:
    return {
        "context_length": text.context,
        "vocab_size": text.vocabulary,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
    }


def timm_config(shape: ClipShape, preprocessing: Preprocessing) -> dict[str, Any]:
    """timm's `config.json`: the architecture, the arguments of the tower, and how images are prepared for it."""
    return {
        "architecture": TIMM_NAMES.get(shape.vision, ANY_EVA),
        "num_classes": shape.dim,
        "num_features": shape.vision.width,
        "global_pool": "token",
        "model_args": {name: value for name, value in trunk_arguments(shape.vision).items() if value is not None},
        "pretrained_cfg": {
            "input_size": [3, shape.vision.image_size, shape.vision.image_size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center" if preprocessing.resize == "shortest" else "squash",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": shape.dim,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def refuse_beyond_timm(shape: ClipShape, format: str) -> None:
    """Raise InputError for a tower that timm cannot build from a configuration file."""
    reasons = [
        *(["RMSNorm, which no configuration of timm's Eva names"] if shape.vision.rms_norm else []),
        *(
            ["a projection without bias, and the head of timm's Eva always has one"]
            if not shape.vision.head_bias
            else []
        ),
        *(["a shared relative position bias, which timm's Eva has not"] if shape.vision.relative_position else []),
    ]
    if reasons:
        raise InputError(
            f"{format} cannot express {shape.name}: its image tower has {' and '.join(reasons)}. "
            "Take --to evaclip, which evaclip.load reads, or --to onnx"
        )


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().contiguous().cpu() for name, value in state.items()}, path, {"format": "pt"})


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")
