"""The loss around a tower's weights, along two random directions (Li et al., arXiv 1712.09913, section 4).

Which loss: a tower that feature distillation trained has one, and it is taken with its teacher and its projector. Any
other tower is measured as its own teacher: the same loss between its feature map and what that is at the weights as
they are, both whitened, so that the centre is 0. Both say how fast the feature map gets lost, in the same unit.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaclip import keyed
from evaclip.encoder import ImageTower
from evaclip.objectives.distillation import DistillationConfig, distance, whitened

Loss = Callable[[], float]


def loss_of(tower: ImageTower, teacher: ImageTower | None, pixels: UInt8[Tensor, "images 3 height width"]) -> Loss:
    """The tower's loss on these images, at whatever its weights are when it is called.

    `teacher`: that of the tower's run of feature distillation, None for a tower that is its own.
    """
    if teacher is not None:
        target = whitened(teacher.feature_map(pixels))
        beta = float((tower.objective or {})["beta"])

        def distillation() -> float:
            return float(distance(tower.model.trunk.head(tower.feature_map(pixels)), target, beta))

        return distillation
    own = whitened(tower.feature_map(pixels))
    return lambda: float(distance(whitened(tower.feature_map(pixels)), own, DistillationConfig.beta))


def directions(model: nn.Module, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two random directions, normalised filter by filter: every row is as long as the row of weights that it moves.

    Biases, norms and factors stay where they are, as in the paper; of a token or an embedding the whole is one filter.
    A function of the seed and the parameters' names and shapes alone.
    """
    one, other = ({name: _direction(name, p, seed, axis) for name, p in model.named_parameters()} for axis in range(2))
    return one, other


def _direction(name: str, parameter: Tensor, seed: int, axis: int) -> Tensor:
    if parameter.ndim < 2:
        return torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(keyed.key(seed, f"landscape {axis} {name}") >> 1)
    drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
    rows, weights = drawn.flatten(1), parameter.detach().flatten(1)
    return (rows * (weights.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True))).view_as(parameter)


@torch.no_grad()
def landscape(
    model: nn.Module, loss: Loss, steps: Float[np.ndarray, " points"], seed: int
) -> Float[np.ndarray, "points points"]:
    """The loss at weights + a * first + b * second direction; rows are a, columns b, both from `steps`.

    The weights are put back afterwards, bit for bit.
    """
    one, other = directions(model, seed)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = np.zeros((len(steps), len(steps)))
    try:
        for row, a in enumerate(steps):
            for column, b in enumerate(steps):
                for name, parameter in model.named_parameters():
                    parameter.copy_(before[name] + float(a) * one[name] + float(b) * other[name])
                found[row, column] = loss()
    finally:
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return found
