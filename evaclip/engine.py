"""Runs an objective on a device: precision, accumulation, clipping, the step.

Accumulation is exact. The features of all micro-batches are computed first, without keeping activations; the loss
sees the whole batch once; then each micro-batch runs again and receives its part of the features' gradient. Masks and
drop path are keyed by sample, so the second pass repeats the first by itself. This is the scheme of GradCache (Gao et
al., arXiv 2101.06983, section 3) and BASIC (2111.10050, section 4), without their replay of random states.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evaclip.errors import CheckpointError, InputError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@runtime_checkable
class Batch(Protocol):
    """What an engine asks of a batch."""

    def split(self, parts: int) -> Sequence["Batch"]:
        """Equal consecutive micro-batches."""
        ...

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        ...


@runtime_checkable
class Objective(Protocol):
    """The contract between an objective and the engines; every objective is an `nn.Module` besides.

    Two phases: a forward pass, where data-parallel wrappers have their hooks and everything with parameters happens,
    and a loss of features, in which there are none. So an engine can put the features of many micro-batches through
    one loss and send the gradients back through each. An objective without such a loss has one feature: its loss.
    """

    @property
    def student(self) -> nn.Module:
        """What is trained and saved."""
        ...

    def __call__(self, batch: Any) -> tuple[Tensor, ...]:
        """The first phase: features of a micro-batch, including the learnt scalars that the loss needs."""
        ...

    def loss(self, features: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The second phase: the loss of a whole batch and what is worth logging."""
        ...

    def join(self, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """The features of a batch from those of its micro-batches."""
        ...

    def constrain(self) -> None:
        """Restore what must hold of the parameters, after every step."""
        ...

    def layers(self) -> dict[str, list[list[str]]]:
        """The student's parameter names by tower and layer."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed."""

    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the towers; parameters, optimizer and loss are float32 in each."""
    micro_batches: int = 1
    """Parts of the batch that pass through the towers one after another; the gradient is the same."""

    def resolved_device(self) -> torch.device:
        """The device meant. Raises InputError when it is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"--engine.device {self.device}: torch sees no CUDA device; evaclip doctor says more")
        return device


class Engine:
    """One process, one device. The training loop knows nothing but these four methods."""

    def __init__(
        self, config: EngineConfig, objective: Objective, optimizer: Optimizer, clip_norm: float | None
    ) -> None:
        """`clip_norm`: the largest global norm of the gradient."""
        self.config = config
        self.objective = objective
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.device = config.resolved_device()
        self.parameters = {n: p for n, p in objective.student.named_parameters() if p.requires_grad}
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """Leave the gradient of the batch's loss on the parameters. The metrics stay on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.split(self.config.micro_batches) if self.config.micro_batches > 1 else [batch]
        parts = [part.to(self.device) for part in parts]
        if len(parts) == 1:
            with self._autocast():
                features = self.objective(parts[0])
            loss, metrics = self.objective.loss(features)
            self._scaler.scale(loss).backward()
            return dict(metrics)
        with torch.no_grad(), self._autocast():
            found = [self.objective(part) for part in parts]
        leaves = [tuple(f.detach().requires_grad_() for f in part) for part in found]
        loss, metrics = self.objective.loss(self.objective.join(leaves))
        self._scaler.scale(loss).backward()
        for part, leaf in zip(parts, leaves, strict=True):
            with self._autocast():
                features = self.objective(part)
            reached = [(f, g.grad) for f, g in zip(features, leaf, strict=True) if g.grad is not None]
            torch.autograd.backward([f for f, _ in reached], [g for _, g in reached])
        return dict(metrics)

    def step(self) -> dict[str, Tensor]:
        """Clip, update, constrain. A gradient that is not finite changes nothing and shows in the metrics."""
        self._scaler.unscale_(self.optimizer)
        with_grad = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(with_grad.values())))
        total = torch.linalg.vector_norm(norms)
        finite = bool(torch.isfinite(total))
        if finite and self.clip_norm is not None:
            factor = (self.clip_norm / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(list(with_grad.values()), factor)
        if finite:
            self._scaler.step(self.optimizer)
            self.objective.constrain()
        self._scaler.update()
        metrics = {f"gradient_norm/{part}": norm for part, norm in _by_part(list(with_grad), norms).items()}
        return metrics | {"gradient_norm": total, "skipped": torch.tensor(float(not finite))}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by kind: the student's, and the optimizer's as `parameter name/state name`."""
        names: dict[Any, str] = {p: name for name, p in self.parameters.items()}
        moments = {
            f"{names[p]}/{key}": value
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        return {"model": self.objective.student.state_dict(), "optimizer": moments}

    def scalars(self) -> dict[str, Any]:
        """What of the state is a number: the optimizer's step count and the loss scale."""
        return {"optimizer_step": self.optimizer.param_groups[0].get("step", 0), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> None:
        """The inverse of `state_dict` and `scalars`. Raises CheckpointError for anything missing or left over."""
        model, moments = self.objective.student, tensors["optimizer"]
        _same_names("model", set(model.state_dict()), set(tensors["model"]))
        _same_names("optimizer state", set(self.parameters), {path.rsplit("/", 1)[0] for path in moments})
        model.load_state_dict(dict(tensors["model"]))
        for path, value in moments.items():
            name, key = path.rsplit("/", 1)
            p = self.parameters[name]
            self.optimizer.state[p][key] = value.to(p.device) if value.ndim else value.clone()
        for group in self.optimizer.param_groups:
            group["step"] = scalars["optimizer_step"]
        if scalars["scaler"]:
            self._scaler.load_state_dict(dict(scalars["scaler"]))

    def _autocast(self) -> Any:
        dtype = PRECISIONS[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)


def _by_part(names: list[str], norms: Tensor) -> dict[str, Tensor]:
    """The norms by the first word of the parameters' names: the towers."""
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        parts.setdefault(name.split(".")[0], []).append(number)
    return {part: torch.linalg.vector_norm(norms[numbers]) for part, numbers in parts.items()}


def _same_names(what: str, here: set[str], stored: set[str]) -> None:
    if here == stored:
        return
    missing, left = sorted(here - stored)[:3], sorted(stored - here)[:3]
    raise CheckpointError(
        f"the checkpoint's {what} does not fit this run: "
        + "; ".join(
            text
            for text in (
                f"it lacks {', '.join(missing)}" if missing else "",
                f"it holds {', '.join(left)} besides" if left else "",
            )
            if text
        )
    )
