"""Attention maps of any image tower, and three numbers of them (Wei et al., arXiv 2205.14141, section 4).

Attention of EVA and of timm's transformers ends in torch's `scaled_dot_product_attention`, with queries and keys that
carry the rotation and a mask that is the bias. There a function mode listens, and computes the probabilities that the
fused kernel keeps to itself; open_clip's attention is a function of torch's that can be asked for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.overrides import TorchFunctionMode

from evaclip.encoder import ImageTower
from evaclip.errors import InputError

# Images whose maps are in memory at a time.
AT_A_TIME = 8


@dataclass(frozen=True)
class Attention:
    """What the attention of a tower is like, from its first block to its last."""

    distance: Float[np.ndarray, "depth heads"]
    """Mean distance between a patch and those that it looks at, in pixels of the tower's input."""
    similarity: Float[np.ndarray, " depth"]
    """Mean cosine similarity between two heads; not a number where there is one head."""
    average: Float[np.ndarray, "depth tokens tokens"]
    """The mean map of all heads and images; rows are queries and sum to 1."""
    even: float
    """The distance of attention that is spread evenly over all patches, in pixels."""


class _Listener(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            with torch._C.DisableTorchFunction():
                self.maps.append(probabilities(*args, **kwargs))
        if func is F.multi_head_attention_forward:  # open_clip's: torch would call the other inside, unheard
            found, maps = func(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))
            self.maps.append(maps.float())
            return found, None
        return func(*args, **kwargs)


def probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads tokens tokens"]:
    """softmax(q k' scale + mask), float32; the arguments are those of torch's fused attention."""
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
        raise InputError("the tower's attention has a causal or boolean mask or shares keys: it cannot be diagnosed")
    logits = query.float() @ key.float().transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    return (logits if attn_mask is None else logits + attn_mask.float()).softmax(-1)


@contextmanager
def _fused(model: torch.nn.Module) -> Iterator[None]:
    """Every attention through torch's function: timm's may be set to its own, torch's has a faster path around it."""
    before, path = {}, torch.backends.mha.get_fastpath_enabled()
    for module in model.modules():
        if getattr(module, "fused_attn", None) is False:
            before[module] = False
            module.fused_attn = True  # type: ignore[assignment]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(path)
        for module in before:
            module.fused_attn = False  # type: ignore[assignment]


@torch.no_grad()
def attention_maps(
    tower: ImageTower, pixels: UInt8[Tensor, "batch 3 height width"]
) -> tuple[list[Float[Tensor, "batch heads tokens tokens"]], int]:
    """The maps of every block, and how many patches the tower has. Raises InputError where there are none to see."""
    with _fused(tower.model), _Listener() as listener:
        tokens = tower.feature_map(pixels).shape[1]
    patches = tokens if isqrt(tokens) ** 2 == tokens else tokens - 1
    if isqrt(patches) ** 2 != patches or not listener.maps:
        raise InputError(f"{tower.name} has no attention over a square grid of patches that could be diagnosed")
    if len({found.shape for found in listener.maps}) > 1 or listener.maps[0].shape[-1] < patches:
        raise InputError(f"{tower.name} has blocks with maps of different sizes: it cannot be diagnosed")
    return listener.maps, patches


def diagnosed(tower: ImageTower, pixels: UInt8[Tensor, "images 3 height width"]) -> Attention:
    """The three numbers, each the mean over all images."""
    sums: list[Any] = [0.0, 0.0, 0.0]
    patches = size = 0
    for part in pixels.split(AT_A_TIME):
        maps, patches = attention_maps(tower, part)
        size = tower.preprocessing.size / isqrt(patches)
        found = (
            torch.stack([attention_distance(each, patches, size) for each in maps]),
            torch.stack([head_similarity(each) for each in maps]),
            torch.stack([each.mean(1).sum(0) for each in maps]),
        )
        share = (len(part), len(part), 1)
        sums = [total + number * value.double().cpu() for total, number, value in zip(sums, share, found, strict=True)]
    even = attention_distance(torch.full((1, 1, patches, patches), 1 / patches), patches, size)
    return Attention(*((total / len(pixels)).numpy() for total in sums), even=float(even))


def attention_distance(
    maps: Float[Tensor, "batch heads tokens tokens"], patches: int, size: float
) -> Float[Tensor, " heads"]:
    """Mean over images and patches of the distance to what is looked at, weighted by the attention.

    As in Dosovitskiy et al. (arXiv 2010.11929, section 4.5). Of each patch the attention to other patches is made to
    sum to 1; class and register tokens have no place. `size`: of a patch; the result has its unit.
    """
    side = isqrt(patches)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(maps.device, maps.dtype)
    apart = torch.cdist(places, places) * size
    among = maps[:, :, -patches:, -patches:]
    among = among / among.sum(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    return (among * apart).sum(-1).mean((0, 2))


def head_similarity(maps: Float[Tensor, "batch heads tokens tokens"]) -> Float[Tensor, ""]:
    """Mean cosine similarity between what two heads make of the same query, over pairs of heads, queries and images."""
    rows = F.normalize(maps, dim=-1)
    heads = maps.shape[1]
    total = rows.sum(1).square().sum(-1)  # of all pairs, those of a head with itself included, which are 1
    return ((total - heads) / (heads * (heads - 1))).mean() if heads > 1 else maps.new_tensor(float("nan"))
