"""SigLIP's loss in tiles against its definition in float64 and against open_clip, on one process and on several."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor

from evaclip.objectives.columns import Exchange, early_exchange
from evaclip.objectives.sigmoid import sigmoid_loss
from tests.objectives.test_contrastive import KINDS, features
from tests.ranks import in_ranks

BATCH = 48


def definition(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def inputs(kind: str, scale: float, bias: float, batch: int = BATCH) -> list[Tensor]:
    scalars = (torch.tensor([scale]).double(), torch.tensor([bias]).double())
    return [t.clone().requires_grad_() for t in (*features(kind, batch), *scalars)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -20.0), (5.0, 0.0)])
@pytest.mark.parametrize("batch", [1, 2, 70])
def test_value_and_gradients_are_the_definitions(kind, scale, bias, batch):
    exact = inputs(kind, scale, bias, batch)
    expected = definition(*exact)
    expected.backward()
    ours = [t.detach().float().requires_grad_() for t in exact]
    loss, _ = sigmoid_loss(*ours, precision="fp32", tile=(16, 24))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=3e-6, abs=1e-6)
    for found, right in zip(ours, exact, strict=True):
        assert (found.grad.double() - right.grad).norm() <= 2e-5 * right.grad.norm() + 3e-7 * scale


def test_it_is_open_clips_loss_and_counts_like_the_argmax():
    ours, theirs = ([t.detach().float().requires_grad_() for t in inputs("trained", 20.0, -8.0)] for _ in range(2))
    loss, stats = sigmoid_loss(*ours, precision="fp32")
    loss.backward()
    other = SigLipLoss()(*theirs)
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)
    assert all((a.grad - b.grad).norm() <= 3e-5 * b.grad.norm() for a, b in zip(ours, theirs, strict=True))
    logits = ours[0] @ ours[1].T
    assert stats.image_to_text.item() == pytest.approx((logits.argmax(1) == torch.arange(BATCH)).float().mean().item())


def check_ranks() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    for kind, way in itertools.product(KINDS, ("gathered", "ring", "early")):
        exact = inputs(kind, 30.0, -10.0)
        expected = definition(*exact)
        expected.backward()
        ours = [t.detach().float() for t in exact]
        ours = [t.requires_grad_() for t in (ours[0][own].clone(), ours[1][own].clone(), *ours[2:])]
        text, exchange = ours[1], Exchange(group=dist.group.WORLD, ring=way == "ring")
        if way == "early":
            text, exchange = early_exchange(text, exchange, "fp32")
        loss, _ = sigmoid_loss(ours[0], text, *ours[2:], precision="fp32", tile=(10, 7), exchange=exchange)
        loss.backward()
        assert abs(loss - expected) <= 1e-5 * abs(expected), (kind, way)
        for found, right in zip(ours[:2], exact[:2], strict=True):
            error = (found.grad.double() - ranks * right.grad[own]).norm()
            assert error <= 1e-4 * ranks * right.grad[own].norm() + 1e-5, (kind, way)
        for found, right in zip(ours[2:], exact[2:], strict=True):
            dist.all_reduce(found.grad)
            assert abs(found.grad / ranks - right.grad) <= 1e-4 * abs(right.grad) + 1e-5, (kind, way)


@pytest.mark.parametrize("world", [2, 4])
def test_averaged_gradients_are_those_of_one_process(world):
    in_ranks(world, check_ranks)
