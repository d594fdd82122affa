"""LAMB (You et al., arXiv 1904.00962, algorithm 2): Adam's direction, with a step as long as the tensor deserves.

For each tensor x with moments m, v:  r = m' / (sqrt(v') + eps) + decay * x,  x -= lr * (|x| / |r|) * r, where m', v'
are corrected for their bias first (so the ratio sees the true direction, as in the paper and unlike DeepSpeed's fused
kernel). The ratio is taken per tensor. It is 1 where either norm is zero and for groups that do not adapt.

It stays so when the tensors are spread over processes. A process then updates pieces: whole tensors, its shards of them
(FSDP2's DTensors), or stretches of one flat partition in which many tensors lie one behind the other (DeepSpeed's
ZeRO). Squared norms of the pieces are summed per tensor, over all processes in one small all-reduce a step. Without
that a partition takes one ratio for all that lies in it, which differs from LAMB and changes with the number of
processes; EVA-CLIP's published runs did so. `published=True`, with `segments` left unset under ZeRO, is their rule: the
ratio of DeepSpeed's fused kernel, taken of every group, bias and norms included, from moments whose bias is not
corrected, held between 0.01 and 10; the correction is a factor on the step's length instead.

All pieces are updated together through torch's foreach functions: a step makes the same few calls however many tensors
there are.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

PUBLISHED_BOUNDS = (0.01, 10.0)


@dataclass(frozen=True)
class Segment:
    """A stretch of a flat partition that belongs to one tensor."""

    tensor: int
    """Number of the tensor, the same in every process."""
    start: int
    length: int
    lr: float
    """Factor on the group's learning rate."""
    weight_decay: float
    adapt: bool


@dataclass(frozen=True)
class _Piece:
    """What this process updates of one tensor."""

    tensor: int
    x: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    lr: float
    weight_decay: float
    adapt: bool


class Lamb(Optimizer):
    """LAMB over parameter groups; each group has `lr`, `weight_decay` and `adapt`.

    `betas`, `eps`: as in Adam. `max_ratio`: upper bound of the trust ratio, None for the paper's own. Gradients are
    not clipped in here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool = True,
        max_ratio: float | None = None,
        published: bool = False,
    ) -> None:
        self.published = published
        self.bounds = PUBLISHED_BOUNDS if published else (None, max_ratio)
        self.segments: Sequence[Segment] | None = None
        self.tensors = 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt, "step": 0}
        super().__init__(params, defaults)
        sharded = [p for group in self.param_groups for p in group["params"] if isinstance(p, DTensor)]
        self.group: ProcessGroup | None = sharded[0].device_mesh.get_group() if sharded else None
        self.start()

    def start(self) -> None:
        """Make the moments: eagerly, so that they can be saved before the first step.

        Called again when an engine has put flat partitions in the place of tensors; moments of what is gone go too.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        for stranger in set(self.state) - set(parameters):
            del self.state[stranger]
        for p in parameters:  # in order, so that all processes save in the same order
            if "exp_avg" not in self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def spread(self, group: ProcessGroup | None, segments: Sequence[Segment], tensors: int) -> None:
        """From now on the only parameter of the only group is a flat partition, and norms are summed over `group`.

        `segments`: what lies where in this process's partition. `tensors`: how many tensors there are in all.
        """
        self.group, self.segments, self.tensors = group, segments, tensors
        self.start()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "LAMB takes no closure"
        advanced = [group for group in self.param_groups if any(p.grad is not None for p in group["params"])]
        for group in advanced:  # DeepSpeed steps one group at a time
            group["step"] += 1
        pieces: list[_Piece] = []
        for group in advanced:
            pieces += self._pieces(group, len(pieces))
        if not advanced:
            return
        shared = advanced[0]  # betas, eps and the step count are the same in every group
        beta1, beta2 = shared["betas"]
        correction1, correction2 = 1 - beta1 ** shared["step"], 1 - beta2 ** shared["step"]
        after = 1.0
        if self.published:
            after, correction1, correction2 = math.sqrt(correction2) / correction1, 1.0, 1.0
        x, m, v = [p.x for p in pieces], [p.m for p in pieces], [p.v for p in pieces]
        r: list[Tensor] = []
        if pieces:
            grads = [p.grad for p in pieces]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_div_(denominator, math.sqrt(correction2))
            torch._foreach_add_(denominator, shared["eps"])
            r = list(torch._foreach_div(m, denominator))
            torch._foreach_div_(r, correction1)
            decays = [p.weight_decay for p in pieces]
            if any(decays):
                torch._foreach_add_(r, torch._foreach_mul(x, decays))
        steps = self._step_lengths(pieces, x, r, advanced) * after
        if pieces:
            torch._foreach_mul_(r, list(steps.unbind()))
            torch._foreach_sub_(x, r)

    def _pieces(self, group: dict[str, Any], before: int) -> list[_Piece]:
        """The pieces of a group that have a gradient, after so many `before` of other groups."""
        rates = (group["lr"], group["weight_decay"], group["adapt"])
        found: list[_Piece] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            x, grad = _local(p), _local(p.grad)
            m, v = _local(self.state[p]["exp_avg"]), _local(self.state[p]["exp_avg_sq"])
            if self.segments is None:
                found.append(_Piece(before + len(found), x, grad, m, v, *rates))
                continue
            for s in self.segments:
                x_, grad_, m_, v_ = (t.narrow(0, s.start, s.length) for t in (x, grad, m, v))
                found.append(_Piece(s.tensor, x_, grad_, m_, v_, group["lr"] * s.lr, s.weight_decay, s.adapt))
        return found

    def _step_lengths(
        self, pieces: Sequence[_Piece], x: list[Tensor], r: list[Tensor], groups: Sequence[dict[str, Any]]
    ) -> Tensor:
        """Learning rate x trust ratio of each piece; one all-reduce when tensors are spread over processes."""
        device = groups[0]["params"][0].device
        tensors = len(pieces) if self.segments is None else self.tensors
        squares = torch.zeros(2, tensors, device=device)
        numbers = torch.tensor([p.tensor for p in pieces], device=device, dtype=torch.int64)
        if pieces:
            norms = torch.stack([torch.stack(torch._foreach_norm(x)), torch.stack(torch._foreach_norm(r))])
            squares.index_add_(1, numbers, norms.float().square())
        if self.group is not None:
            dist.all_reduce(squares, group=self.group)
        x_norm, r_norm = squares.sqrt()[:, numbers]
        adapt = torch.tensor([p.adapt or self.published for p in pieces], device=device, dtype=torch.bool)
        ratio = torch.where((x_norm > 0) & (r_norm > 0) & adapt, x_norm / r_norm, 1.0)
        if self.bounds != (None, None):
            ratio = ratio.clamp(*self.bounds)
        return torch.tensor([p.lr for p in pieces], device=device, dtype=ratio.dtype) * ratio


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a distributed tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
