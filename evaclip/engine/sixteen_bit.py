"""Parameters in bfloat16 with float32 masters: what `precision="pure_bf16"` means in an engine without sharding.

The optimizer keeps the parameters that it was built with, in float32 and never rounded. In their places the model gets
bfloat16 copies, which are rounded from the masters after every step. Vectors stay as they are: norms and biases are
small, and the logit scale lives where 16 bits are 0.03 coarse.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Masters:
    """The float32 parameters behind a model's 16-bit ones, by name."""

    def __init__(self, student: nn.Module) -> None:
        """Puts a bfloat16 copy in the place of every trainable matrix."""
        self.masters: dict[str, nn.Parameter] = {}
        self.copies: dict[str, nn.Parameter] = {}
        for name, parameter in list(student.named_parameters()):
            if parameter.ndim < 2 or not parameter.requires_grad:
                continue
            owner, _, own = name.rpartition(".")
            copy = nn.Parameter(parameter.detach().to(torch.bfloat16))
            setattr(student.get_submodule(owner), own, copy)
            self.masters[name], self.copies[name] = parameter, copy

    def take_gradients(self) -> None:
        """Hand the copies' gradients to the masters, in float32."""
        for name, copy in self.copies.items():
            self.masters[name].grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """Copies from masters."""
        torch._foreach_copy_(list(self.copies.values()), list(self.masters.values()))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Masters, unrounded, from a state of the whole student."""
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.round()
