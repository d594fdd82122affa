"""Putting somebody's weights into our towers. Nothing stays random, and nothing is left over, without being said."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from evaclip.errors import CheckpointError
from evaclip.models.clip import Clip
from evaclip.models.weights.files import Weights
from evaclip.models.weights.names import MASK_TOKEN, SCALARS, TRUNK
from evaclip.models.weights.report import Entry, Report
from evaclip.models.weights.resize import Resize, resized_kernel, resized_position

POSITION, KERNEL = f"{TRUNK}pos_embed", f"{TRUNK}patch_embed.proj.weight"
PREFIXES = {"image": "visual.", "text": "text."}
# The ways into the joint space: they fit the other tower that they were trained with, and no other.
PROJECTIONS = (f"{TRUNK}head.weight", f"{TRUNK}head.bias", "text.text_projection")
_INNER_NORM = re.compile(rf"{re.escape(TRUNK)}blocks\.\d+\.attn\.norm\.(weight|bias)")


@dataclass(frozen=True)
class _Fit:
    """Tensors for a model, and what became of each."""

    state: dict[str, Tensor]
    entries: list[Entry]


def load_whole(model: Clip, weights: Weights, resize: Resize = "eva") -> Report:
    """Take both towers, their projections and the logit scale of one checkpoint.

    Raises CheckpointError that names the first tensor that is missing, left over or of another shape.
    """
    _expect(weights, "image")
    _expect(weights, "text")
    fit = _fitted(model.state_dict(), weights.named.tensors, weights, model, resize, renewable={"logit_bias"})
    return _load(model, fit, f"weights of {model.shape.name} from {weights.path}", [weights])


def load_towers(
    model: Clip, *, vision: Weights | None = None, text: Weights | None = None, resize: Resize = "eva"
) -> Report:
    """Take each tower from a checkpoint of its own, or leave it as it was initialised.

    The projections and the logit scale stay fresh: they belong to two towers that learnt together. Raises
    CheckpointError that names the first tensor that is missing, left over or of another shape.
    """
    whole = _Fit({}, [])
    for tower, weights in (("image", vision), ("text", text)):
        own = {name: value for name, value in model.state_dict().items() if name.startswith(PREFIXES[tower])}
        if weights is None:
            whole.entries.extend(Entry(name=name, fate="renewed", detail="no file for this tower") for name in own)
            continue
        _expect(weights, tower)
        given = weights.named.part(PREFIXES[tower])
        fit = _fitted(own, given, weights, model, resize, renewable={*PROJECTIONS})
        whole.state.update(fit.state)
        whole.entries.extend(fit.entries)
        others = [name for name in weights.named.tensors if name not in given]
        whole.entries.extend(Entry(name=name, fate="ignored", detail=f"not of the {tower} tower") for name in others)
    scalars = [name for name in SCALARS if name in model.state_dict()]
    whole.entries.extend(
        Entry(name=name, fate="renewed", detail="belongs to towers that learnt together") for name in scalars
    )
    sources = {tower: found for tower, found in (("image", vision), ("text", text)) if found is not None}
    title = ", ".join(f"{tower} tower from {found.path} ({found.named.layout})" for tower, found in sources.items())
    return _load(model, whole, title, list(sources.values()))


def _load(model: Clip, fit: _Fit, title: str, sources: list[Weights]) -> Report:
    aside = {name: why for weights in sources for name, why in weights.named.aside.items()}
    used = {entry.name for entry in fit.entries}
    fit.entries.extend(Entry(name=name, fate="ignored", detail=why) for name, why in aside.items() if name not in used)
    model.load_state_dict(model.state_dict() | fit.state)
    return Report(title=title, entries=tuple(fit.entries))


def _expect(weights: Weights, tower: str) -> None:
    """Refuse a checkpoint without that tower."""
    if tower == "image" and weights.named.plain:
        raise CheckpointError(
            f"the image tower in {weights.path} is a plain vision transformer and not an EVA; its text tower can be "
            "taken with --text-init, and as a whole it can be used wherever evaclip takes a trained model"
        )
    if not weights.named.part(PREFIXES[tower]):
        raise CheckpointError(f"{weights.path} has no {tower} tower ({weights.named.layout} names)")


def _fitted(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    weights: Weights,
    model: Clip,
    resize: Resize,
    renewable: set[str],
) -> _Fit:
    """`given` for the places of `own`; projections that are in `renewable` stay fresh even where both have them."""
    fit = _Fit({}, [])
    has_inner_norm = any(_INNER_NORM.fullmatch(name) for name in given)
    missing = []
    for name, place in own.items():
        value = given.get(name)
        if name in renewable and name not in SCALARS:
            fit.entries.append(Entry(name=name, fate="renewed", detail="projection to another joint space"))
        elif value is not None:
            fit.state[name], entry = _into(name, value, place, weights, model, resize)
            fit.entries.append(entry)
        elif name in renewable or name == MASK_TOKEN:
            fit.entries.append(Entry(name=name, fate="renewed", detail="not in the file"))
        elif _INNER_NORM.fullmatch(name) and not has_inner_norm:
            fit.entries.append(
                Entry(name=name, fate="renewed", detail="masked image modelling had no norm inside attention")
            )
        else:
            missing.append(name)
    if missing:
        raise CheckpointError(
            f"{weights.path} lacks {_some(missing)} of {model.shape.name}{_depths(given, own)}; is it of another shape?"
        )
    left = [name for name in given if name not in own and name not in (MASK_TOKEN, *renewable)]
    if left:
        raise CheckpointError(
            f"{weights.path} has {_some(left)}, for which {model.shape.name} has no place{_depths(given, own)}; "
            "is it of another shape?"
        )
    return fit


def _into(
    name: str, value: Tensor, place: Tensor, weights: Weights, model: Clip, resize: Resize
) -> tuple[Tensor, Entry]:
    """A tensor for its place, resampled where resolution or patch size differ."""
    if name in SCALARS:
        value = value.reshape(place.shape)
    if value.shape == place.shape:
        return value, Entry(name=name, fate="taken", detail=str(list(place.shape)))
    shape = model.shape.vision
    other = f"{weights.path}: {name} is {list(value.shape)} there and {list(place.shape)} in {model.shape.name}"
    fits = value.ndim == place.ndim and value.shape[0] == place.shape[0]
    if name == POSITION and fits and value.shape[2] == place.shape[2]:
        try:
            new = resized_position(value.float(), shape.image_size // shape.patch_size, resize)
        except ValueError as error:
            raise CheckpointError(f"{other}, and {error}") from None
    elif name == KERNEL and fits and value.shape[1] == place.shape[1] and value.shape[2] == value.shape[3]:
        new = resized_kernel(value.float(), shape.patch_size, resize)
    else:
        raise CheckpointError(f"{other}: the weights are of another width or kind")
    return new, Entry(name=name, fate="resized", detail=f"{list(value.shape)} -> {list(new.shape)}, {resize}")


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} other tensors" if len(names) > 1 else "")


def _depths(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The end of an error sentence where a tower has another number of blocks."""
    for tower, blocks in (("image", f"{TRUNK}blocks."), ("text", "text.transformer.resblocks.")):
        found = [
            len({name[len(blocks) :].split(".")[0] for name in names if name.startswith(blocks)})
            for names in (given, own)
        ]
        if found[0] != found[1]:
            return f" ({found[0]} blocks in the file's {tower} tower, {found[1]} in the model's)"
    return ""
