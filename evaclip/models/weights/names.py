"""What every layout calls a tensor. Ours are open_clip's names, and all others go through them.

| layout       | image tower                              | text tower                   | whose files                |
| open_clip    | visual.trunk.blocks.0.attn.q_proj.bias   | text.transformer.resblocks.0 | open_clip's EVA, our runs  |
| timm         | blocks.0.attn.q_proj.bias                | none                         | timm                       |
| eva          | visual.blocks.0.attn.q_bias, or without  | text.transformer.resblocks.0 | EVA-CLIP; EVA, EVA-02      |
| openai       | visual.transformer.resblocks.0           | transformer.resblocks.0      | OpenAI, OpenCLIP           |
| hugging_face | vision_model.encoder.layers.0            | text_model.encoder.layers.0  | transformers' CLIPModel    |
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from evaclip.errors import CheckpointError
from evaclip.models.weights.hugging_face import from_hugging_face

Layout = Literal["open_clip", "timm", "eva", "openai", "hugging_face"]
Written = Literal["open_clip", "timm", "eva"]
LAYOUTS: tuple[str, ...] = get_args(Written)

TRUNK = "visual.trunk."
MASK_TOKEN = "visual.mask_token"
SCALARS = ("logit_scale", "logit_bias")
# First parts of the names in an EVA tower, in a plain vision transformer, and in a text tower.
_EVA_ROOTS = {"blocks", "patch_embed", "cls_token", "pos_embed", "rel_pos_bias", "norm", "head"}
_VIT_ROOTS = {"conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj"}
TEXT_ROOTS = {"token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"}
# Within a block, EVA's name and timm's.
_BLOCK = (
    ("attn.inner_attn_ln.", "attn.norm."),
    ("mlp.ffn_ln.", "mlp.norm."),
    ("mlp.w1.", "mlp.fc1_g."),
    ("mlp.w2.", "mlp.fc1_x."),
)
# Only where queries, keys and values are apart; in one matrix both call the biases the same.
_APART = (("attn.q_bias", "attn.q_proj.bias"), ("attn.v_bias", "attn.v_proj.bias"))
# Only of gated MLPs; the first only where both halves are packed in one matrix.
_PACKED = ("mlp.w12.", "mlp.fc1.")
_GATED_OUT = ("mlp.w3.", "mlp.fc2.")
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_ASIDE = {
    "rope": "rotary table, which follows from the shape",
    "lm_head": "head of masked image modelling",
    "attn_mask": "causal mask, which follows from the shape",
    "mask_token": "mask token of masked image modelling",
}


@dataclass(frozen=True, kw_only=True)
class Named:
    """A checkpoint's tensors under our names."""

    layout: Layout
    """Whose names they had."""
    tensors: dict[str, Tensor]
    """`visual.trunk.*` of an EVA tower or `visual.*` of a plain one, `text.*`, `logit_scale`."""
    aside: dict[str, str] = field(default_factory=dict)
    """What has no place in a tower, by the file's own name, and why."""
    from_openai: bool = False
    """Whether OpenAI's own sizes stood among the tensors."""

    @property
    def plain(self) -> bool:
        """Whether the image tower is a plain vision transformer and not an EVA."""
        return any(name.startswith("visual.") and not name.startswith((TRUNK, MASK_TOKEN)) for name in self.tensors)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so."""
        return {name: value for name, value in self.tensors.items() if name.startswith(prefix)}


def canonical(state: Mapping[str, Tensor], where: Path | str) -> Named:
    """The tensors of any of the layouts under our names.

    Raises CheckpointError that names the first tensor that belongs to none of them, or two that are the same.
    """
    layout = recognised(state)
    openai = any(name in state for name in _OPENAI_SIZES)
    renamed = from_hugging_face(state, where) if layout == "hugging_face" else dict(state)
    apart = any(name.endswith("attn.q_proj.weight") for name in renamed)
    tensors: dict[str, Tensor] = {}
    aside: dict[str, str] = {}
    for name, value in renamed.items():
        place, why = _place(name, apart)
        if why:
            aside[name] = why
        if place is None:
            if not why:
                raise CheckpointError(f"{where}: {name} belongs to no tower that evaclip knows")
            continue
        if place in tensors:
            raise CheckpointError(f"{where} has {place} twice, the second time as {name}")
        tensors[place] = value.reshape(()) if place in SCALARS and value.numel() == 1 else value
    if not tensors:
        raise CheckpointError(f"{where} holds no tensor of a tower")
    return Named(layout=layout, tensors=tensors, aside=aside, from_openai=openai)


def recognised(names: Iterable[str]) -> Layout:
    """The layout that a checkpoint's names are of."""
    names = list(names)
    if any(name.startswith(("text_model.", "vision_model.")) for name in names):
        return "hugging_face"
    if any(name.startswith((TRUNK, "trunk.")) for name in names):
        return "open_clip"
    if any(name.startswith("visual.blocks.") for name in names):
        return "eva"
    if any(name.startswith("blocks.") for name in names):
        eva = re.compile(r"blocks\.\d+\.(attn\.inner_attn_ln\.|mlp\.(ffn_ln|w\d+)\.)|mask_token|lm_head\.|rope\.freqs_")
        return "eva" if any(eva.match(name) for name in names) else "timm"
    if any(name.startswith("transformer.") for name in names):
        return "openai"
    return "open_clip"


def _place(name: str, apart: bool) -> tuple[str | None, str]:
    """Our name of a tensor, None if it has none, and why it has none or may not be wanted."""
    if name in SCALARS:
        return name, ""
    if name.startswith("text.") and name.removeprefix("text.") in SCALARS:  # EVA's first release
        return name.removeprefix("text."), ""
    if name in _OPENAI_SIZES:
        return None, "a size, not a weight"
    if re.fullmatch(r"(visual\.(trunk\.)?|trunk\.)?mask_token", name):
        return MASK_TOKEN, _ASIDE["mask_token"]
    for part, why in _ASIDE.items():
        if part in name.split("."):
            return None, why
    for prefix in (TRUNK, "trunk.", "visual.", ""):
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest.split(".")[0] in _EVA_ROOTS:
            return TRUNK + _to_timm(rest, apart), ""
    rest = name.removeprefix("visual.")
    if rest != name and rest.split(".")[0] in _VIT_ROOTS:
        return name, ""
    rest = name.removeprefix("text.")
    if rest.split(".")[0] in TEXT_ROOTS:
        return f"text.{rest}", ""
    return None, ""


def _to_timm(name: str, apart: bool) -> str:
    pairs = (*_BLOCK, _PACKED, _GATED_OUT, *(_APART if apart else ()))
    return _within_block(name, dict(pairs))


def _to_eva(name: str, *, apart: bool, gated: bool, packed: bool) -> str:
    pairs = (*_BLOCK, *(_APART if apart else ()), *((_GATED_OUT,) if gated else ()), *((_PACKED,) if packed else ()))
    return _within_block(name, {timm: eva for eva, timm in pairs})


def _within_block(name: str, renaming: Mapping[str, str]) -> str:
    found = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if found is None:
        return name
    for before, after in renaming.items():
        if found[2].startswith(before):
            return found[1] + after + found[2].removeprefix(before)
    return name


def as_layout(named: Named, to: Written) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under another layout's names, and those that it has no place for, with the reason.

    Converting there and back gives the same tensors, bit for bit. Raises CheckpointError where the layout has no place
    for the image tower.
    """
    aside = dict(named.aside)
    tensors = {name: value for name, value in named.tensors.items() if name != MASK_TOKEN}
    if named.plain:
        if to != "open_clip":
            raise CheckpointError(f"the image tower is a plain vision transformer, which the layout {to} cannot hold")
        # open_clip's own models keep a plain tower's text beside it, without a prefix.
        return {name.removeprefix("text."): value for name, value in tensors.items()}, aside
    if to == "open_clip":
        return tensors, aside
    trunk = {name.removeprefix(TRUNK): value for name, value in tensors.items() if name.startswith(TRUNK)}
    others = {name: value for name, value in tensors.items() if not name.startswith(TRUNK)}
    if to == "timm":
        if not trunk:
            raise CheckpointError("there is no image tower in it, and timm's layout has nothing else")
        return trunk, aside | dict.fromkeys(others, "timm holds image towers alone")
    apart = "blocks.0.attn.q_proj.weight" in trunk
    up, down = trunk.get("blocks.0.mlp.fc1.weight"), trunk.get("blocks.0.mlp.fc2.weight")
    packed = up is not None and down is not None and up.shape[0] == 2 * down.shape[1]
    gated = packed or "blocks.0.mlp.fc1_g.weight" in trunk
    # EVA's own files of an image tower alone have no prefix, those of a CLIP model have one.
    prefix = "visual." if others else ""
    kind = {"apart": apart, "gated": gated, "packed": packed}
    return {prefix + _to_eva(name, **kind): value for name, value in trunk.items()} | others, aside
