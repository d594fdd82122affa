"""LAMB (You et al., arXiv 1904.00962, algorithm 2): Adam's direction, with a step as long as the tensor deserves.

For each tensor x with moments m, v:  r = m' / (sqrt(v') + eps) + decay * x,  x -= lr * (|x| / |r|) * r, where m', v'
are corrected for their bias first (so the ratio sees the true direction, as in the paper and unlike DeepSpeed's fused
kernel). The ratio is taken per tensor. It is 1 where either norm is zero and for groups that do not adapt.

All tensors of all groups are updated together through torch's foreach functions: a step makes the same few calls
however many tensors there are.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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
    ) -> None:
        self.max_ratio = max_ratio
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt, "step": 0}
        super().__init__(params, defaults)
        for group in self.param_groups:  # eagerly, so that the state can be saved before the first step
            for p in group["params"]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "LAMB takes no closure"
        tensors: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            group["step"] += 1
            tensors += [(p, group) for p in group["params"] if p.grad is not None]
        if not tensors:
            return
        x = [p for p, _ in tensors]
        grads = [p.grad for p in x if p.grad is not None]
        m = [self.state[p]["exp_avg"] for p in x]
        v = [self.state[p]["exp_avg_sq"] for p in x]
        shared = self.param_groups[0]  # betas, eps and the step count are the same in every group
        beta1, beta2 = shared["betas"]
        correction1, correction2 = 1 - beta1 ** shared["step"], 1 - beta2 ** shared["step"]

        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, math.sqrt(correction2))
        torch._foreach_add_(denominator, shared["eps"])
        r = torch._foreach_div(m, denominator)
        torch._foreach_div_(r, correction1)
        decays = [group["weight_decay"] for _, group in tensors]
        if any(decays):
            torch._foreach_add_(r, torch._foreach_mul(x, decays))

        x_norm, r_norm = torch.stack(torch._foreach_norm(x)), torch.stack(torch._foreach_norm(r))
        adapt = torch.tensor([group["adapt"] for _, group in tensors], device=x_norm.device)
        ratio = torch.where((x_norm > 0) & (r_norm > 0) & adapt, x_norm / r_norm, 1.0)
        if self.max_ratio is not None:
            ratio = ratio.clamp(max=self.max_ratio)
        rates = torch.tensor([group["lr"] for _, group in tensors], device=ratio.device, dtype=ratio.dtype)
        torch._foreach_mul_(r, list((rates * ratio).unbind()))
        torch._foreach_sub_(x, r)
