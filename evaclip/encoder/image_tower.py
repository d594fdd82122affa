"""Trained image towers, one way to all of them: what has a feature map, with a text tower beside it or without one.

A teacher of feature distillation needs neither text nor logits (arXiv 2205.14141, section 3), so a vision transformer
that was trained by DINO or on labels is as good as a CLIP's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from evaclip import checkpoint
from evaclip.encoder.dual import Encoder, Preprocessing
from evaclip.encoder.sources import load_encoder
from evaclip.errors import CheckpointError, InputError
from evaclip.models.clip import Clip
from evaclip.models.shapes import ClipShape
from evaclip.models.vision import VisionTower
from evaclip.records import structured

TIMM = "timm:"
# Objectives whose runs have an image tower alone, as a configuration and as people call them.
WITHOUT_TEXT = {"mim": "masked image modelling", "distillation": "feature distillation"}


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """A vision transformer that gives a feature map."""

    name: str
    """What was asked for."""
    model: Any
    """Ours, timm's, or open_clip's own vision transformer."""
    preprocessing: Preprocessing
    """How images are prepared for it."""
    objective: dict[str, Any] | None = None
    """What it was trained with, where it is a run's without a text tower."""

    def feature_map(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channels"]:
        """Tokens after the last norm and before any projection: the class token, if it has one, and every patch.

        Pixels are resized to what the tower takes. Gradients pass.
        """
        images = self.preprocessing.normalized(pixels)
        size = self.preprocessing.size
        if images.shape[-1] != size:
            images = nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        return self.tokens(images)

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channels"]:
        """The same of images that are prepared already. Raises InputError for a model without patch tokens."""
        model = self.model
        if isinstance(model, VisionTower):
            return model.tokens(images)
        if hasattr(model, "num_prefix_tokens") and hasattr(model, "forward_features"):
            found = model.forward_features(images)
            if found.ndim == 3:
                first = found[:, :1] if getattr(model, "cls_token", None) is not None else found[:, :0]
                return torch.cat([first, found[:, model.num_prefix_tokens :]], dim=1)
        elif hasattr(model, "ln_post") and getattr(model, "attn_pool", None) is None:
            return model.ln_post(model.transformer(model._embeds(images)))
        raise InputError(
            f"{self.name} has no patch tokens: a vision transformer of evaclip, timm or open_clip has them"
        )


def load_image_tower(source: str, device: torch.device | str = "cpu") -> ImageTower:
    """An image tower by all that `load_encoder` takes, and by what has no text tower.

    These are the folder of a run of masked image modelling or feature distillation; `timm:NAME` of a model that timm
    has weights for, `timm:NAME:FILE` with the weights in a file; a folder in timm's layout, config.json beside
    model.safetensors. Raises CheckpointError or InputError with one sentence.
    """
    folder, device = Path(source), torch.device(device)
    config = _json(folder / "config.json")
    if source.startswith(TIMM):
        name, _, file = source.removeprefix(TIMM).partition(":")
        tower = _of_timm(name, source, {"file": file, "custom_load": file.endswith(".npz")} if file else {})
    elif "architecture" in config:
        tower = _of_timm(f"local-dir:{folder}", source, {})
    elif _kind(config) in WITHOUT_TEXT or _kind(_json(folder.parent.parent / "config.json")) in WITHOUT_TEXT:
        tower = _of_run(folder, source)
    else:
        tower = _of_encoder(load_encoder(source), source)
    tower.model.to(device).eval().requires_grad_(False)
    return tower


def _of_timm(name: str, source: str, overlay: dict[str, Any]) -> ImageTower:
    if overlay and not Path(overlay["file"]).is_file():
        raise CheckpointError(f"the weights {overlay['file']} of {source} do not exist")
    try:
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        found = resolve_data_config({}, model=model)
        _, height, width = found["input_size"]
    except Exception as error:  # timm, the hub and safetensors raise a dozen kinds
        raise InputError(
            f"timm cannot load {source}: {str(error).strip().splitlines()[0][:300]}. Without a network, name its "
            "weights as timm:NAME:FILE, or a folder with timm's config.json and model.safetensors"
        ) from None
    if height != width:
        raise InputError(f"{source} takes images of {height} x {width} px, and evaclip gives square ones")
    return ImageTower(
        name=source,
        model=model,
        preprocessing=Preprocessing(
            size=height,
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            interpolation=found["interpolation"],
            resize="squash" if found["crop_mode"] == "squash" else "shortest",
        ),
    )


def _of_run(folder: Path, source: str) -> ImageTower:
    """Of a run without a text tower, or of one of its checkpoints."""
    whole = (folder / checkpoint.MANIFEST).is_file()
    run_dir = folder.parent.parent if whole else folder
    found = (
        checkpoint.load(folder, kinds=("model",))
        if whole
        else checkpoint.newest(folder / "checkpoints", kinds=("model",))
    )
    if found is None:
        raise CheckpointError(f"the run in {folder} has no checkpoint yet")
    config = _json(run_dir / "config.json")
    shape = structured(config["model"], ClipShape, run_dir / "config.json")
    state = {name.removeprefix("visual."): value for name, value in found.tensors["model"].items()}
    tower = VisionTower(shape.vision, shape.dim, mask_token="mask_token" in state)
    tower.load_state_dict(state)
    size = shape.vision.image_size
    return ImageTower(name=source, model=tower, preprocessing=Preprocessing(size=size), objective=config["objective"])


def _of_encoder(encoder: Encoder, source: str) -> ImageTower:
    model: Any = encoder.model
    visual = model.visual if isinstance(model, Clip) else getattr(model, "visual", None) or model
    tower = visual if isinstance(visual, VisionTower) else getattr(visual, "trunk", None) or visual
    if not isinstance(tower, nn.Module):
        raise InputError(f"{source} is a program, which shows no patch tokens: name what it was exported from")
    return ImageTower(name=source, model=tower, preprocessing=encoder.preprocessing)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(config: dict[str, Any]) -> str | None:
    objective = config.get("objective")
    return objective.get("kind") if isinstance(objective, dict) else None
