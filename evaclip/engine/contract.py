"""What an engine asks of an objective and of its batches, and how it is configured."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evaclip.distributed import is_main, own_gpu
from evaclip.errors import InputError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "pure_bf16": torch.bfloat16}


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

    student: Any
    """The module that is trained and saved."""

    def to(self, device: torch.device) -> Any:
        """Move everything to a device."""
        ...

    def __call__(self, batch: Any, whole: bool = False) -> tuple[Tensor, ...]:
        """The first phase: features of a micro-batch, including the learnt scalars that the loss needs.

        `whole`: these features alone go straight to the loss, so what the loss needs of other processes may set out.
        """
        ...

    def loss(self, features: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The second phase: the loss of a whole batch and what is worth logging."""
        ...

    def join(self, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """The features of a batch from those of its micro-batches."""
        ...

    def constrain(self) -> Sequence[Any]:
        """Restore what must hold of the parameters, after every step. Returns those that it may have changed."""
        ...

    def layers(self) -> dict[str, list[list[str]]]:
        """The student's parameter names by tower and layer."""
        ...


@runtime_checkable
class OptimizerBuilder(Protocol):
    """What an engine asks of the optimizer's configuration (`optim.OptimConfig`)."""

    @property
    def clip_norm(self) -> float | None:
        """Largest global gradient norm."""
        ...

    def build(self, student: nn.Module, layers: Mapping[str, Sequence[Sequence[str]]], *, flat: bool) -> Optimizer:
        """The optimizer over a model's parameters."""
        ...

    def spread(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        layers: Mapping[str, Sequence[Sequence[str]]],
        places: Mapping[str, tuple[int, int]],
    ) -> None:
        """Tell the optimizer where in this process's partition each tensor lies, as name -> (start, length)."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed."""

    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    kind: Literal["ddp", "zero1", "zero2", "fsdp2"] = "ddp"
    """How several processes share the work: everything in each (DDP); optimizer state spread over them (DeepSpeed's
    ZeRO-1), reduced gradients as well (ZeRO-2); everything spread (FSDP2), for towers too large for one GPU."""
    precision: Literal["fp32", "bf16", "fp16", "pure_bf16"] = "bf16"
    """Arithmetic of the towers; optimizer and loss are float32 in each, and so are the parameters but under
    `pure_bf16`, where float32 masters stand behind them. `fp16` scales its loss."""
    micro_batches: int = 1
    """Parts of the batch that pass through the towers one after another; the gradient is the same."""
    keep_activations_gb: float = 0.0
    """Memory for micro-batches that keep their activations and so need no second forward pass."""

    def construction(self) -> AbstractContextManager[Any]:
        """Where an objective is built: without values in the processes that get them from the first."""
        return torch.device("meta") if self.kind == "fsdp2" and not is_main() else nullcontext()

    def resolved_device(self) -> torch.device:
        """The device meant, this process's own GPU. Raises InputError when it is not there."""
        if self.device == "auto":
            return torch.device("cuda", own_gpu()) if torch.cuda.is_available() else torch.device("cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"--engine.device {self.device}: torch sees no CUDA device; evaclip doctor says more")
        return device
