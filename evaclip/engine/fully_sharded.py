"""The engine over torch's FSDP2: parameters, gradients and optimizer state spread over the processes.

For towers that do not fit one GPU (EVA-CLIP 8B and 18B). Each block's parameters are gathered while it works and freed
afterwards (Zhao et al., arXiv 2304.11277, section 3). A tensor is split along its first dimension; LAMB and the
gradient's norm sum over the parts. Checkpoints hold whole tensors.

Initial values are dealt out tensor by tensor from the first process's main memory, and what is saved comes back the
same way. The other processes build the model on the meta device, without values. Only while it is evaluated does each
process have all of it: the benchmarks' images are shared as under the other engines, none waits for another.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from evaclip.distributed import everyone, is_main, world_size
from evaclip.engine.contract import EngineConfig, Objective, OptimizerBuilder
from evaclip.engine.data_parallel import Engine, FirstPhase, require_same_names
from evaclip.errors import InputError


class FullyShardedEngine(Engine):
    """See the module."""

    def __init__(self, config: EngineConfig, objective: Objective, optim: OptimizerBuilder) -> None:
        if everyone() is None:
            raise InputError("--engine.kind fsdp2 spreads the model over processes: start them with torchrun")
        device = config.resolved_device()
        first = objective.student.cpu() if is_main() else None
        self._plain = _without_values(objective.student)
        objective.student = _without_values(objective.student)
        mesh = init_device_mesh(device.type, (world_size(),))
        self._root: Any = FirstPhase(objective, config.precision, device)
        # Only the blocks are gathered in 16 bits: the scalars of the loss live beside them and need all of theirs.
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in _blocks(objective.student):
            fully_shard(block, mesh=mesh, mp_policy=low if config.precision == "pure_bf16" else MixedPrecisionPolicy())
        fully_shard(self._root, mesh=mesh)
        objective.student.to_empty(device=device)
        _fill(objective.student, first)
        optimizer = optim.build(objective.student, objective.layers(), flat=False)
        super().__init__(config, objective, optimizer, optim.clip_norm)

    def _split_masters(self, student: nn.Module) -> None:
        """Nothing to do: the shards are the masters."""

    def _wrapped(self, first_phase: FirstPhase) -> nn.Module:
        return self._root

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    def _own_part(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    def _norms(self, own_parts: list[Tensor]) -> Tensor:
        squares = super()._norms(own_parts).square()
        dist.all_reduce(squares, group=everyone())
        return squares.sqrt()

    @torch.no_grad()
    def whole_student(self) -> nn.Module:
        """A copy with all values on each process's device; its memory, float32, is free again with the copy."""
        whole, own = copy.deepcopy(self._plain).to_empty(device=self.device), self.objective.student
        values = dict([*own.named_parameters(), *own.named_buffers()])
        for name, place in [*whole.named_parameters(), *whole.named_buffers()]:
            place.copy_(_whole(values[name]))
        return whole

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """As in `Engine`."""
        return {kind: _gathered(named) for kind, named in super().state_dict().items()}

    def _load(self, model: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int) -> None:
        own = self.objective.student.state_dict()
        require_same_names("model", set(own), set(model))
        with torch.no_grad():
            for name, value in model.items():
                self._own_part(own[name]).copy_(self._own_part(_spread_like(own[name], value)))
        for path, value in moments.items():
            name, key = path.rsplit("/", 1)
            state = self.optimizer.state[self.parameters[name]]
            state[key] = _spread_like(self.parameters[name], value)
            if "step" not in self.optimizer.param_groups[0]:  # AdamW counts per tensor
                state["step"] = torch.tensor(float(step))


def _blocks(student: nn.Module) -> list[nn.Module]:
    """The repeated parts of the towers: what is gathered and freed together."""
    return [block for module in student.modules() if isinstance(module, nn.ModuleList) for block in module]


def _without_values(student: nn.Module) -> nn.Module:
    """The same modules with parameters and buffers on the meta device."""
    tensors = [*student.parameters(), *student.buffers()]
    memo: dict[int, Any] = {id(t): t.detach().to("meta") for t in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in student.parameters()}
    return copy.deepcopy(student, memo)


@torch.no_grad()
def _fill(student: nn.Module, whole: nn.Module | None) -> None:
    """Deal out the values that the first process has in `whole`."""
    source = {} if whole is None else dict([*whole.named_parameters(), *whole.named_buffers()])
    for name, parameter in student.named_parameters():
        value = source[name].detach() if source else torch.empty(parameter.shape, dtype=parameter.dtype)
        _local(parameter).copy_(_local(_spread_like(parameter, value)))
    for name, buffer in student.named_buffers():
        if source:
            buffer.copy_(source[name])
        dist.broadcast(buffer, 0, group=everyone())


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the first process's main memory, one after the other; none in the others."""
    found = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor)
        if is_main():
            found[name] = whole.cpu()
    return found


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread_like(like: Tensor, value: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
