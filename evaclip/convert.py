"""`evaclip convert`: weights from any layout to another, tensor for tensor."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from evaclip.errors import InputError
from evaclip.log import say
from evaclip.models.weights import as_layout, read_weights
from evaclip.models.weights.names import Written
from evaclip.models.weights.report import Entry, Report

PICKLED = (".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Write weights under another layout's names. There and back gives the same tensors, bit for bit."""

    source: Annotated[Path, tyro.conf.Positional]
    """Any checkpoint that evaclip reads: a file, or a folder that holds one."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file to write: .safetensors, or torch's .pt."""
    to: Written
    """open_clip: open_clip's names, whole models. eva: those of EVA-CLIP's own code. timm: an image tower alone."""
    overwrite: bool = False
    """Replace the target if it exists."""


def run_convert(command: ConvertCommand) -> None:
    """Convert, and print what became of every tensor. Raises InputError or CheckpointError."""
    target = command.target
    if target.suffix not in (".safetensors", *PICKLED):
        raise InputError(f"{target} must end in .safetensors or in one of {', '.join(PICKLED)}")
    if target.exists() and not command.overwrite:
        raise InputError(f"{target} exists; --overwrite replaces it")
    weights = read_weights(command.source)
    tensors, ignored = as_layout(weights.named, command.to)
    _write(target, tensors)
    entries = [Entry(name=name, fate="taken", detail=str(list(value.shape))) for name, value in tensors.items()]
    entries += [Entry(name=name, fate="ignored", detail=why) for name, why in ignored.items()]
    title = f"{command.source} ({weights.named.layout}) -> {target} ({command.to})"
    for line in Report(title=title, entries=tuple(entries)).lines():
        say(line)
    if weights.activation == "quick_gelu":
        say('these weights were trained with QuickGELU: open_clip needs "quick_gelu": true in their configuration')


def _write(target: Path, tensors: dict[str, Tensor]) -> None:
    """The whole file under a temporary name first."""
    temporary = target.with_name(f".{target.name}.tmp")
    state = {name: value.contiguous().clone() for name, value in tensors.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            save_file(state, temporary, {"format": "pt"})
        else:
            torch.save(state, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
