"""The engine of one process, and of many that each hold the whole model (torch's DistributedDataParallel).

Accumulation is exact. The features of all micro-batches are computed first, without keeping activations; the loss
sees the whole batch once; then each micro-batch runs again and receives its part of the features' gradient. Masks and
drop path are keyed by sample, so the second pass repeats the first by itself. This is the scheme of GradCache (Gao et
al., arXiv 2101.06983, section 3) and BASIC (2111.10050, section 4), without their replay of random states. Where there
is memory for the activations of some micro-batches, those have no second pass. Gradients are averaged over processes
once a step.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from evaclip.distributed import everyone
from evaclip.engine.contract import PRECISIONS, Batch, EngineConfig, Objective
from evaclip.engine.loss_scale import LossScale
from evaclip.engine.sixteen_bit import Masters
from evaclip.errors import CheckpointError


class FirstPhase(nn.Module):
    """An objective's first phase in the run's precision: what data-parallel wrappers wrap."""

    def __init__(self, objective: Objective, precision: str, device: torch.device) -> None:
        super().__init__()
        self.objective: Any = objective
        self._autocast = (device.type, PRECISIONS[precision])

    def forward(self, batch: Any, whole: bool = False) -> tuple[Tensor, ...]:
        """The features."""
        device, dtype = self._autocast
        with nullcontext() if dtype is None else torch.autocast(device, dtype=dtype):
            return self.objective(batch, whole)


class Engine:
    """The training loop knows nothing but these methods."""

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
        self._loss_scale = LossScale(dynamic=config.precision == "fp16")
        self._masters = self._split_masters(objective.student) if config.precision == "pure_bf16" else None
        self._first_phase: nn.Module = self._wrapped(FirstPhase(objective, config.precision, self.device))
        self._kept: int | None = None if config.keep_activations_gb else 0

    def _split_masters(self, student: nn.Module) -> Masters | None:
        """Turn the model's parameters into 16 bits; the optimizer keeps the float32 ones."""
        return Masters(student)

    def _wrapped(self, first_phase: FirstPhase) -> nn.Module:
        """The first phase, averaging gradients over processes in its backward pass."""
        if everyone() is None:
            return first_phase
        with warnings.catch_warnings():  # the argument has a new name in torch 2.15, which 2.11 does not know
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(first_phase, broadcast_buffers=False, gradient_as_bucket_view=True)

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """Leave the gradient of the batch's loss on the parameters. The metrics stay on the device."""
        self._zero_grad()
        parts = batch.split(self.config.micro_batches) if self.config.micro_batches > 1 else [batch]
        parts = [part.to(self.device) for part in parts]
        if len(parts) > 1:
            return self._accumulated(parts)
        loss, metrics = self.objective.loss(self._first_phase(parts[0], whole=True))
        self._backward(loss)
        return dict(metrics)

    def _accumulated(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """The same for a batch in parts."""
        with self._unsynchronised():
            if self._kept is None:
                self._kept = self._parts_within_budget(parts)
            found = []
            for number, part in enumerate(parts):
                with torch.set_grad_enabled(number < self._kept):
                    found.append(self._first_phase(part))
        leaves = [tuple(f.detach().requires_grad_() for f in part) for part in found]
        loss, metrics = self.objective.loss(self.objective.join(leaves))
        loss.backward()  # from the loss to the features: float32, nothing to scale
        for number, (part, leaf) in enumerate(zip(parts, leaves, strict=True)):
            last = number == len(parts) - 1
            with nullcontext() if last else self._unsynchronised():
                features = found[number] if number < self._kept else self._first_phase(part)
                self._send_back(features, [f.grad for f in leaf])
            found[number] = ()  # its activations are done with
        return dict(metrics)

    def _parts_within_budget(self, parts: Sequence[Batch]) -> int:
        """How many micro-batches may keep what their backward pass needs; never the last, which averages gradients."""
        storages: dict[int, int] = {}

        def seen(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
            self._first_phase(parts[0])
        own = {self._own_part(p).untyped_storage().data_ptr() for p in self.parameters.values()}
        needed = sum(size for pointer, size in storages.items() if pointer not in own)
        return min(len(parts) - 1, int(self.config.keep_activations_gb * 1e9 // max(needed, 1)))

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor) -> None:
        """Gradients of the parameters, averaged over processes."""
        (loss * self._loss_scale.value).backward()

    def _send_back(self, features: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """The gradient of a micro-batch's features to the parameters."""
        reached = [(f, g) for f, g in zip(features, gradients, strict=True) if g is not None and f.requires_grad]
        torch.autograd.backward([f for f, _ in reached], [g * self._loss_scale.value for _, g in reached])

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        """Inside, gradients add up in each process alone."""
        wrapper = self._first_phase
        return wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else nullcontext()

    def step(self) -> dict[str, Tensor]:
        """Clip, update, constrain. A gradient that is not finite changes nothing and shows in the metrics."""
        if self._masters is not None:
            self._masters.take_gradients()
        with_grad = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        grads = [self._own_part(g) for g in with_grad.values()]
        if self._loss_scale.value != 1:
            torch._foreach_mul_(grads, 1 / self._loss_scale.value)
        norms = self._norms(grads)
        total = torch.linalg.vector_norm(norms)
        finite = bool(torch.isfinite(total))
        if finite and self.clip_norm is not None:
            factor = (self.clip_norm / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, factor)
        if finite:
            self.optimizer.step()
            self.objective.constrain()
            if self._masters is not None:
                self._masters.round()
        self._loss_scale.update(finite)
        metrics = {f"gradient_norm/{part}": norm for part, norm in _by_part(list(with_grad), norms).items()}
        return metrics | {"gradient_norm": total, "skipped": torch.tensor(float(not finite))}

    def _own_part(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor, sharing its memory."""
        return tensor

    def _norms(self, own_parts: list[Tensor]) -> Tensor:
        """The norm of each tensor, from the parts that the processes hold."""
        return torch.stack(torch._foreach_norm(own_parts))

    def whole_student(self) -> nn.Module:
        """The model to be used outside of training, in every process. All of them call it."""
        if self._masters is None:
            return self.objective.student
        whole = copy.deepcopy(self.objective.student).float()
        whole.load_state_dict(self._student_state())
        return whole

    def _student_state(self) -> dict[str, Tensor]:
        """The model, unrounded."""
        return self.objective.student.state_dict() | (self._masters.masters if self._masters is not None else {})

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by kind: the student's, and the optimizer's as `parameter name/state name`.

        All processes call it; only the first one's answer is sure to hold everything.
        """
        return {"model": self._student_state(), "optimizer": self._moments()}

    @property
    def searching(self) -> bool:
        """Whether a skipped step may only mean that the loss scale was too large."""
        return self._loss_scale.value > 1

    def scalars(self) -> dict[str, Any]:
        """What of the state is a number: the optimizer's step count and the loss scale."""
        counts = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        step = self.optimizer.param_groups[0].get("step", max(counts, default=0))
        return {"optimizer_step": step, "loss_scale": self._loss_scale.state()}

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> None:
        """The inverse of `state_dict` and `scalars`. Raises CheckpointError for anything missing or left over."""
        moments = tensors["optimizer"]
        require_same_names("optimizer state", set(self.parameters), {path.rsplit("/", 1)[0] for path in moments})
        self._load(tensors["model"], moments, scalars["optimizer_step"])
        for group in self.optimizer.param_groups:
            if "step" in group:
                group["step"] = scalars["optimizer_step"]
        self._loss_scale.restore(scalars["loss_scale"])

    def _moments(self) -> dict[str, Tensor]:
        names: dict[Any, str] = {p: name for name, p in self.parameters.items()}
        return {
            f"{names[p]}/{key}": value
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and key != "step"
        }

    def _load(self, model: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int) -> None:
        require_same_names("model", set(self.objective.student.state_dict()), set(model))
        self.objective.student.load_state_dict(dict(model))
        if self._masters is not None:
            self._masters.load(model)
        for path, value in moments.items():
            name, key = path.rsplit("/", 1)
            state = self.optimizer.state[self.parameters[name]]
            state[key] = value.to(self.device, copy=True)
            if "step" not in self.optimizer.param_groups[0]:  # AdamW counts per tensor
                state["step"] = torch.tensor(float(step))


def _by_part(names: list[str], norms: Tensor) -> dict[str, Tensor]:
    """The norms by the first word of the parameters' names: the towers."""
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        parts.setdefault(name.split(".")[0], []).append(number)
    return {part: torch.linalg.vector_norm(norms[numbers]) for part, numbers in parts.items()}


def require_same_names(what: str, here: set[str], stored: set[str]) -> None:
    """Raises CheckpointError unless a checkpoint holds exactly the names that a run has."""
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
