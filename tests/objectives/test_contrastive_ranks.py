"""Gradients averaged over ranks are those of one process with the whole batch, however the captions travel."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evaclip.objectives import contrastive, tiles
from evaclip.objectives.columns import Exchange, early_exchange
from evaclip.objectives.contrastive import contrastive_loss
from tests.objectives.test_contrastive import KINDS, definition, features, unit
from tests.ranks import in_ranks

BATCH, DIM = 48, 24


def encoders() -> tuple[Tensor, Tensor]:
    """Two linear towers, near the identity, so that the kinds of features keep their character."""
    return torch.eye(DIM).double() + 0.05 * unit(DIM, DIM, 5), torch.eye(DIM).double() + 0.05 * unit(DIM, DIM, 6)


def single_process(kind: str, scale: float, smoothing: float) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of towers and scale over the whole batch, in float64."""
    parameters = [w.clone().requires_grad_() for w in (*encoders(), torch.tensor([scale]).double())]
    image, text = (F.normalize(x @ w, dim=1) for x, w in zip(features(kind, BATCH, DIM), parameters, strict=False))
    loss = definition(image, text, parameters[2], smoothing)
    loss.backward()
    return loss.detach(), [p.grad for p in parameters if p.grad is not None]


def averaged(kind: str, scale: float, smoothing: float, group, early: bool = False, **how) -> tuple[Tensor, list]:
    """The same from this rank's rows, in float32, with gradients averaged as data-parallel training does."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    parameters = [w.float().requires_grad_() for w in (*encoders(), torch.tensor([scale]).double())]
    sides = [x[rows].float() for x in features(kind, BATCH, DIM)]
    exchange = Exchange(group=group, ring=how.pop("ring", False))
    text = F.normalize(sides[1] @ parameters[1], dim=1)
    if early:
        text, exchange = early_exchange(text, exchange, how.get("precision", "fp16"))
    image = F.normalize(sides[0] @ parameters[0], dim=1)
    loss, _ = contrastive_loss(
        image, text, parameters[2], label_smoothing=smoothing, tile=(10, 7), exchange=exchange, **how
    )
    loss.backward()
    for p in parameters:
        dist.all_reduce(p.grad, group=group)
    return loss.detach(), [p.grad / ranks for p in parameters]


def check_everything() -> None:
    world = dist.get_world_size()
    dist.barrier()
    own_group = dist.new_group(list(reversed(range(world))))
    ways = [{"ring": False}, {"ring": True}, {"ring": False, "early": True}]
    for kind, scale, smoothing in itertools.product(KINDS, (14.3, 100.0), (0.0, 0.1)):
        loss, exact = single_process(kind, scale, smoothing)
        for way in ways:
            found_loss, found = averaged(kind, scale, smoothing, dist.group.WORLD, precision="fp32", **way)
            assert abs(found_loss - loss) <= 3e-6 * (abs(loss) + scale), (kind, way)
            for ours, right in zip(found, exact, strict=True):
                error = (ours.double() - right).norm()
                assert error <= 1e-4 * right.norm() + 3e-7 * scale, (kind, scale, smoothing, way, error, right.norm())
                if right.norm() > 1e-2 * scale:
                    ratio = (ours.double() * right).sum() / (right * right).sum()
                    assert abs(ratio - 1) < 1e-4, (kind, scale, smoothing, way, ratio)
    for way in ways:
        first, again = (averaged("random", 50.0, 0.0, own_group, **way) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True)), "two runs differ"
        _, exact = single_process("random", 50.0, 0.0)
        assert all((a.double() - b).norm() < 2e-3 * b.norm() for a, b in zip(first[1], exact, strict=True))
    check_accuracies()
    check_not_finite()


def check_accuracies() -> None:
    """They count over the whole batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    image, text = (x.float() for x in features("trained", BATCH, DIM))
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    logits, target = image @ text.T, torch.arange(BATCH)
    for ring in (False, True):
        exchange = Exchange(group=dist.group.WORLD, ring=ring)
        _, stats = contrastive_loss(
            image[own], text[own], torch.tensor([20.0]), precision="fp32", tile=(5, 6), exchange=exchange
        )
        for found, axis in ((stats.image_to_text, 1), (stats.text_to_image, 0)):
            assert abs(found - (logits.argmax(axis) == target).float().mean()) < 1e-6


def check_not_finite() -> None:
    """A broken feature on one rank reaches the loss of all, and nobody waits for ever."""
    text = F.normalize(torch.ones(4, DIM) + torch.arange(4)[:, None], dim=1)
    if dist.get_rank() == 0:
        text[0] = torch.nan
    loss, _ = contrastive_loss(text, text, torch.tensor([10.0]), exchange=Exchange(group=dist.group.WORLD))
    assert not torch.isfinite(loss)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_averaged_gradients_are_those_of_one_process(world):
    in_ranks(world, check_everything)


def test_the_ways_cover_both_kinds_of_sums():
    """Guards the tests above: `opposite ends` must take the general path on the ranks as well."""
    image, text = (t.float() for t in features("opposite ends", BATCH, DIM))
    how = tiles.How(smoothing=0, tile=(16, 24), dtype=torch.float32, exchange=Exchange())
    sums = contrastive._shared_reference_sums(image, text, torch.tensor([100.0]), how, None)
    assert not contrastive._trusted(sums, None)
