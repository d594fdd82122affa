"""The engine over DeepSpeed's ZeRO-1 and ZeRO-2 (Rajbhandari et al., arXiv 1910.02054, section 5).

Each process holds all parameters but updates only its flat partition of them, so the optimizer's state, and in ZeRO-2
the gradients, take 1/n of the memory. DeepSpeed reduces gradients and gathers parameters; precision, accumulation and
the state that is saved stay ours: parameters are float32 and the towers compute under autocast, as in every engine, and
a checkpoint holds whole tensors, which any number of processes can read.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evaclip.distributed import everyone, is_main
from evaclip.engine.contract import EngineConfig, Objective, OptimizerBuilder
from evaclip.engine.data_parallel import Engine, FirstPhase, require_same_names
from evaclip.errors import InputError

STAGES = {"zero1": 1, "zero2": 2}


@dataclass(frozen=True)
class Place:
    """Where the part of a tensor lies that this process updates."""

    partition: Tensor
    """The flat partition, float32."""
    start: int
    offset: int
    """First element of the part within the tensor."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """The part in the partition, or in something of its shape."""
        return flat.narrow(0, self.start, self.length)


class ZeroEngine(Engine):
    """See the module."""

    def __init__(self, config: EngineConfig, objective: Objective, optim: OptimizerBuilder) -> None:
        if config.precision == "pure_bf16":
            raise InputError("--engine.precision pure_bf16 runs under ddp and fsdp2; ZeRO here takes bf16 or fp16")
        layers = objective.layers()
        super().__init__(config, objective, optim.build(objective.student, layers, flat=True), optim.clip_norm)
        self._places = self._found_places()
        optim.spread(
            self.optimizer, objective.student, layers, {n: (p.start, p.length) for n, p in self._places.items()}
        )

    def _wrapped(self, first_phase: FirstPhase) -> nn.Module:
        try:
            import deepspeed
        except ImportError:
            raise InputError(
                f"--engine.kind {self.config.kind} needs DeepSpeed: pip install 'evaclip[deepspeed]'"
            ) from None
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if shutil.which("ninja") is None:  # it may lie beside a python that was started by its path
            os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        if not dist.is_initialized():
            raise InputError(f"--engine.kind {self.config.kind} spreads work over processes: start them with torchrun")
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # counted by DeepSpeed, used by nobody
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_optimization": {"stage": STAGES[self.config.kind], "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        }
        self._zero, *_ = deepspeed.initialize(model=first_phase, optimizer=self.optimizer, config=settings)
        return self._zero

    def _found_places(self) -> dict[str, Place]:
        places = {}
        for name, parameter in self.parameters.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                own, whole = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                partition = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
                places[name] = Place(partition, own.start, whole.start, own.numel)
        return places

    def _zero_grad(self) -> None:
        """DeepSpeed does it after each step."""

    def _backward(self, loss: Tensor) -> None:
        scaled: Any = self._zero.optimizer
        scaled.override_loss_scale(self._loss_scale.value)  # DeepSpeed multiplies, and divides in its step
        self._zero.backward(loss, scale_wrt_gas=False)

    def _send_back(self, features: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        # DeepSpeed starts from a scalar; this one's gradient with respect to the features is the one given.
        self._backward(
            torch.stack([(f * g).sum() for f, g in zip(features, gradients, strict=True) if g is not None]).sum()
        )

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        return nullcontext()  # gradients add up in each process until the step

    def step(self) -> dict[str, Tensor]:
        """As in `Engine`; the norm is that of the whole gradient alone."""
        self._zero.step()
        applied = bool(self._zero.was_step_applied())
        self._loss_scale.update(applied)
        if applied:
            for parameter in self.objective.constrain():
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.update_hp()
        norm = self._zero.get_global_grad_norm()
        return {"gradient_norm": torch.as_tensor(norm), "skipped": torch.tensor(float(not applied))}

    def _moments(self) -> dict[str, Tensor]:
        """Whole tensors on the first process, summed from the parts of all."""
        moments = {}
        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                whole = torch.zeros(parameter.numel(), device=self.device)
                if (place := self._places.get(name)) is not None:
                    state = self.optimizer.state.get(place.partition, {})
                    if key in state:
                        whole[place.offset : place.offset + place.length] = place.of(state[key])
                dist.reduce(whole, 0, group=everyone())
                if is_main():
                    moments[f"{name}/{key}"] = whole.view(parameter.shape).cpu()
        return moments

    def _load(self, model: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int) -> None:
        require_same_names("model", set(self.objective.student.state_dict()), set(model))
        self.objective.student.load_state_dict(dict(model))
        for name, place in self._places.items():
            mapping: Any = self.parameters[name]
            mapping._hp_mapping.update_hp()
            for key in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state[place.partition]
                flat = state.setdefault(key, torch.zeros_like(place.partition))
                part = moments[f"{name}/{key}"].to(self.device).flatten()[place.offset : place.offset + place.length]
                place.of(flat).copy_(part)
                if "step" not in self.optimizer.param_groups[0]:  # AdamW counts per tensor
                    state["step"] = torch.tensor(float(step))
