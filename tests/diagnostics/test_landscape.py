"""The loss landscape: its directions, its values against known ones, and that it leaves the weights as they were."""

import numpy as np
import pytest
import torch
from torch import nn

from evaclip.diagnostics.landscape import directions, landscape, loss_of
from tests.diagnostics.test_attention import MADE, tower_of
from tests.objectives.test_mim import PIXELS


def test_directions_are_as_long_as_the_weights_row_by_row_and_depend_on_the_seed_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 4))
    one, other = directions(model, 1)
    for name, parameter in model.named_parameters():
        for direction in (one[name], other[name]):
            if parameter.ndim == 1:
                assert not direction.any()
            else:
                torch.testing.assert_close(direction.norm(dim=1), parameter.norm(dim=1))
    assert not torch.allclose(one["0.weight"], other["0.weight"])
    again, _ = directions(model, 1)
    another, _ = directions(model, 2)
    assert torch.equal(again["0.weight"], one["0.weight"]) and not torch.equal(another["0.weight"], one["0.weight"])
    cosine = torch.cosine_similarity(one["2.weight"], nn.Linear(3, 4).weight, dim=1)
    assert cosine.abs().max() < 1


def test_a_square_loss_has_the_landscape_that_algebra_gives():
    torch.manual_seed(0)
    model = nn.Linear(6, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = torch.randn(4, 6, dtype=torch.float64)
    steps = np.linspace(-1, 1, 5)
    found = landscape(model, lambda: float((model.weight - wanted).square().sum()), steps, seed=3)
    one, other = (direction["weight"] for direction in directions(model, 3))
    for (row, a), (column, b) in [((r, a), (c, b)) for r, a in enumerate(steps) for c, b in enumerate(steps)]:
        moved = before["weight"] + a * one + b * other
        assert found[row, column] == pytest.approx((moved - wanted).square().sum().item(), rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_put_back_even_when_a_loss_fails():
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()

    def broken() -> float:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        landscape(model, broken, np.linspace(-1, 1, 3), 0)
    assert torch.equal(model.weight, before)


@torch.no_grad()
def test_a_tower_that_is_its_own_teacher_has_its_only_zero_at_the_centre():
    torch.manual_seed(0)
    tower = tower_of(MADE["shared bias"]())
    found = landscape(tower.model, loss_of(tower, None, PIXELS), np.linspace(-0.5, 0.5, 3), 0)
    assert found[1, 1] == 0 and (np.delete(found.ravel(), 4) > 0).all()
    assert np.array_equal(found, landscape(tower.model, loss_of(tower, None, PIXELS), np.linspace(-0.5, 0.5, 3), 0))
