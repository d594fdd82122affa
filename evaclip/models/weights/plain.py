"""CLIP with a plain vision transformer, OpenAI's and whoever followed: open_clip's model, built from the weights alone.

evaclip trains no such towers; it takes them as they are, for scoring, as teachers, and for their text towers.
"""

import math
from typing import Any

from torch import Tensor, nn

from evaclip.errors import CheckpointError
from evaclip.models.shapes import SHAPES, Activation, ClipShape
from evaclip.models.weights.files import Weights
from evaclip.models.weights.names import TRUNK
from evaclip.openclip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

HEAD_WIDTH = 64  # of every model of OpenAI's; Hugging Face's say how many heads they have


def plain_clip(weights: Weights, activation: Activation) -> nn.Module:
    """The model, with `encode_image` and `encode_text`. Raises CheckpointError where the weights are not whole."""
    state = weights.named.tensors
    try:
        dim = state["text.text_projection"].shape[1]
        vision = _vision(state, _heads(weights, "vision", state["visual.class_embedding"].shape[0]))
        text = _text(state, _heads(weights, "text", state["text.positional_embedding"].shape[1]))
    except KeyError as error:
        raise CheckpointError(f"{weights.path} lacks {error.args[0]}: a CLIP model has two whole towers") from None
    model = CustomTextCLIP(dim, vision, text, quick_gelu=activation == "quick_gelu")
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in own or name not in state:
            raise CheckpointError(f"{weights.path} {'has an unknown' if name not in own else 'lacks'} {name}")
        if own[name].shape != state[name].shape:
            raise CheckpointError(f"{weights.path}: {name} is {list(state[name].shape)}, not {list(own[name].shape)}")
    model.load_state_dict(state)
    return model.eval()


def published_shape(weights: Weights) -> ClipShape:
    """The published EVA-CLIP of these weights' sizes. Raises CheckpointError where there is none."""
    state = weights.named.tensors
    try:
        found = _sizes(state)
    except KeyError as error:
        raise CheckpointError(f"{weights.path} lacks {error.args[0]}, so it is no whole EVA-CLIP") from None
    for shape in SHAPES.values():
        vision, text = shape.vision, shape.text
        sizes = (vision.width, vision.depth, vision.patch_size, vision.patches, text.width, text.depth, shape.dim)
        if sizes == found:
            return shape
    raise CheckpointError(
        f"{weights.path} has the sizes of no published EVA-CLIP (image tower {found[0]} x {found[1]})"
    )


def _sizes(state: dict[str, Tensor]) -> tuple[int, ...]:
    text = state["text.positional_embedding"].shape[1]
    dim = state["text.text_projection"].shape[1]
    position, kernel = state[f"{TRUNK}pos_embed"], state[f"{TRUNK}patch_embed.proj.weight"]
    depths = _depth(state, f"{TRUNK}blocks."), _depth(state, "text.transformer.resblocks.")
    return position.shape[2], depths[0], kernel.shape[-1], position.shape[1] - 1, text, depths[1], dim


def _vision(state: dict[str, Tensor], heads: int) -> CLIPVisionCfg:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    return CLIPVisionCfg(
        layers=_depth(state, "visual.transformer.resblocks."),
        width=width,
        head_width=width // heads,
        mlp_ratio=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        patch_size=patch,
        image_size=patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
    )


def _text(state: dict[str, Tensor], heads: int) -> CLIPTextCfg:
    context, width = state["text.positional_embedding"].shape
    return CLIPTextCfg(
        context_length=context,
        vocab_size=len(state["text.token_embedding.weight"]),
        width=width,
        heads=heads,
        layers=_depth(state, "text.transformer.resblocks."),
        mlp_ratio=state["text.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
    )


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _heads(weights: Weights, tower: str, width: int) -> int:
    described: Any = weights.config.get(f"{tower}_config") or {}
    # What transformers takes for granted where a file leaves it out.
    default = {"vision": 12, "text": 8}[tower] if weights.config else max(1, width // HEAD_WIDTH)
    heads = described.get("num_attention_heads", default)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(f"{weights.path}: {heads} attention heads do not divide the {tower} tower's {width}")
    return heads
