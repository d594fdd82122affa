"""A CLIP with a plain vision transformer from its weights, which say everything but the activation and the heads."""

import math
from typing import Any

from torch import Tensor, nn

from evaclip.errors import CheckpointError
from evaclip.models.plain import PlainClip
from evaclip.models.shapes import SHAPES, Activation, ClipShape, PlainShape, PlainVisionShape, TextShape
from evaclip.models.weights.files import Weights
from evaclip.models.weights.names import TRUNK, canonical
from evaclip.openclip import QuickGELU

HEAD_WIDTH = 64  # of every model of OpenAI's; Hugging Face's say how many heads they have


def plain_clip(weights: Weights, activation: Activation) -> PlainClip:
    """The model of these weights. Raises CheckpointError where they are not whole."""
    state, name = weights.named.tensors, str(weights.path)
    try:
        widths = state["visual.class_embedding"].shape[0], state["text.positional_embedding"].shape[1]
    except KeyError as error:
        raise CheckpointError(f"{name} lacks {error.args[0]}: a CLIP model has two whole towers") from None
    heads = _heads(weights, "vision", widths[0]), _heads(weights, "text", widths[1])
    return _filled(state, name, weights.path.stem, activation, heads)


def plain_clip_of(model: nn.Module, name: str) -> PlainClip:
    """The same model in our form. `model`: open_clip's, with both towers.

    Raises CheckpointError for a model that is no plain CLIP, as far as weights and activations tell.
    """
    towers: Any = model
    named = canonical(model.state_dict(), name)
    if not named.plain:
        raise CheckpointError(f"{name} has no plain vision transformer")
    try:
        first = [tower.transformer.resblocks[0] for tower in (towers.visual, getattr(towers, "text", towers))]
        heads = first[0].attn.num_heads, first[1].attn.num_heads
        activations: set[Activation | None] = {_activation(block.mlp.gelu) for block in first}
        precision = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    except (AttributeError, IndexError) as error:
        raise CheckpointError(f"{name} has other blocks than CLIP: {error}") from None
    activation = activations.pop()
    if activations or activation is None or precision != {1e-5}:
        raise CheckpointError(f"{name} has neither GELU nor QuickGELU in both towers, or norms of another epsilon")
    return _filled(named.tensors, name, name, activation, heads)


def _activation(module: nn.Module) -> Activation | None:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    return "gelu" if isinstance(module, nn.GELU) and module.approximate == "none" else None


def _filled(
    state: dict[str, Tensor], where: str, name: str, activation: Activation, heads: tuple[int, int]
) -> PlainClip:
    """A model of these tensors, each of them in its place. Raises CheckpointError that names one which is not."""
    try:
        shape = _shape(state, name, activation, heads)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error.args[0]}: a CLIP model has two whole towers") from None
    model = PlainClip(shape)
    own = model.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in own or key not in state:
            raise CheckpointError(f"{where} {'has an unknown' if key not in own else 'lacks'} {key}")
        if own[key].shape != state[key].shape:
            raise CheckpointError(f"{where}: {key} is {list(state[key].shape)}, not {list(own[key].shape)}")
    model.load_state_dict(state)
    return model.eval()


def _shape(state: dict[str, Tensor], name: str, activation: Activation, heads: tuple[int, int]) -> PlainShape:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    context, text_width = state["text.positional_embedding"].shape
    vision = PlainVisionShape(
        image_size=patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
        patch_size=patch,
        width=width,
        depth=_depth(state, "visual.transformer.resblocks."),
        heads=heads[0],
        mlp_hidden=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
    )
    text = TextShape(
        width=text_width,
        depth=_depth(state, "text.transformer.resblocks."),
        heads=heads[1],
        context=context,
        vocabulary=len(state["text.token_embedding.weight"]),
        activation=activation,
    )
    dim = state["text.text_projection"].shape[1]
    return PlainShape(name=name, dim=dim, activation=activation, vision=vision, text=text)


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
