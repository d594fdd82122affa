"""The mean of a run's last checkpoints as a model of its own: what `evaclip average` does.

Averaged late weights often score higher than any of them (arXiv 1803.05407; over fine-tuned models arXiv 2203.05482).
What comes out is the folder of a run with one checkpoint that has weights only, so everything that takes a run's folder
takes it: `evaclip zeroshot --model OUT`, exports, the next phase's `--start-from`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from evaclip import checkpoint
from evaclip.config import load_config
from evaclip.errors import CheckpointError, InputError
from evaclip.log import say
from evaclip.records import unstructured


@dataclass(frozen=True, kw_only=True)
class AverageCommand:
    """Average the weights of a run's newest checkpoints into a model of its own."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Folder for the averaged model; `evaclip zeroshot --model OUT` scores it."""
    last: int = 3
    """How many of the newest checkpoints; a run keeps --checkpoint.keep of them."""
    decay: float = 1.0
    """Weight of a checkpoint relative to that of the next newer one: 1 is the plain mean, less an exponential one."""


def run_average(command: AverageCommand) -> None:
    """Write the averaged model."""
    if command.last < 1 or not 0 < command.decay <= 1:
        raise InputError("--last must be at least 1, and --decay above 0 and at most 1")
    if (command.out / "config.json").exists():
        raise InputError(f"{command.out} already holds a run or an average; name another --out")
    config = load_config(command.run)
    steps, tensors = average(command.run / "checkpoints", command.last, command.decay)
    command.out.mkdir(parents=True, exist_ok=True)
    record = {"averaged": steps, "decay": command.decay, "config": unstructured(config)}
    path = checkpoint.save(command.out / "checkpoints", steps[0], {"model": tensors}, record)
    told = unstructured(replace(config, run_dir=command.out))
    (command.out / "config.json").write_text(json.dumps(told, indent=1) + "\n")
    say(f"steps {', '.join(f'{step:,}' for step in steps)} of {command.run}, averaged: {path}")


def average(folder: Path, last: int, decay: float = 1.0) -> tuple[list[int], dict[str, Tensor]]:
    """The steps of the newest whole checkpoints, newest first, and their weights' mean, summed in float64.

    Raises CheckpointError when there are not so many.
    """
    steps: list[int] = []
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    total = 0.0
    for path in reversed(checkpoint.paths(folder)):
        try:
            found = checkpoint.load(path, kinds=("model",)).tensors["model"]
        except CheckpointError as error:
            say(f"passing over a damaged checkpoint: {error}")
            continue
        weight = decay ** len(steps)
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float64)) + weight * value.double()
            kinds[name] = value.dtype
        total += weight
        steps.append(checkpoint.step_of(path))
        if len(steps) == last:
            return steps, {name: (value / total).to(kinds[name]) for name, value in sums.items()}
    raise CheckpointError(
        f"{folder} has {len(steps)} whole checkpoints, {last} are to be averaged: fewer with --last, "
        "or train with a larger --checkpoint.keep"
    )
