"""transformers' CLIPModel: its names, and its queries, keys and values, which it keeps apart."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from evaclip.errors import CheckpointError

_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
_WITHIN = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCKS = {"vision": "visual.transformer.resblocks", "text": "text.transformer.resblocks"}
# The misspelt name is transformers' own.
_SINGLE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.weight": "text.ln_final.weight",
    "text_model.final_layer_norm.bias": "text.ln_final.bias",
    "logit_scale": "logit_scale",
}
# Linear layers there, bare matrices here, which are applied from the other side.
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text.text_projection"}
_THREE = ("q_proj", "k_proj", "v_proj")


def from_hugging_face(state: Mapping[str, Tensor], where: Path | str) -> dict[str, Tensor]:
    """A CLIPModel's tensors under OpenAI's names, with the text tower under `text.`.

    Names that are none of CLIPModel's stay as they are. Raises CheckpointError where a query has no key or value.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = _LAYER.fullmatch(name)
        if name.endswith("embeddings.position_ids"):  # counts from 0, kept by older versions
            continue
        if name in _SINGLE:
            found[_SINGLE[name]] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T.contiguous()
        elif layer is None:
            found[name] = value
        else:
            _take_from_layer(found, layer, state, where)
    return found


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way: a plain CLIP's tensors under CLIPModel's names. There and back is exact."""
    single = {ours: theirs for theirs, ours in _SINGLE.items()}
    transposed = {ours: theirs for theirs, ours in _TRANSPOSED.items()}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in single:
            found[single[name]] = value
        elif name in transposed:
            found[transposed[name]] = value.T.contiguous()
        else:
            found |= _as_layer(name, value)
    return found


def _as_layer(name: str, value: Tensor) -> dict[str, Tensor]:
    """A block's tensor under their name; queries, keys and values, which lie in one here, under three."""
    tower, blocks = next((tower, blocks) for tower, blocks in _BLOCKS.items() if name.startswith(f"{blocks}."))
    number, rest = name.removeprefix(f"{blocks}.").split(".", 1)
    layer = f"{tower}_model.encoder.layers.{number}"
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {f"{layer}.self_attn.{part}.{kind}": v for part, v in zip(_THREE, value.chunk(3), strict=True)}
    module, _, kind = rest.rpartition(".")
    theirs = next(theirs for theirs, ours in _WITHIN.items() if ours == module)
    return {f"{layer}.{theirs}.{kind}": value}


def _take_from_layer(found: dict[str, Tensor], name: re.Match[str], state: Mapping[str, Tensor], where: Path | str):
    tower, number, rest = name.groups()
    block = f"{_BLOCKS[tower]}.{number}"
    module, _, kind = rest.rpartition(".")
    if module in _WITHIN:
        found[f"{block}.{_WITHIN[module]}.{kind}"] = state[name[0]]
    elif module == "self_attn.q_proj":
        parts = [name[0].replace("q_proj", part) for part in _THREE]
        for part in parts:
            if part not in state:
                raise CheckpointError(f"{where} has {name[0]} and lacks {part}")
        found[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[part] for part in parts])
    elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
        found[name[0]] = state[name[0]]
