"""The tiled loss against the definition in float64, and against open_clip."""

import itertools
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.objectives import contrastive, tiles
from evaclip.objectives.columns import Block, Exchange, slices
from evaclip.objectives.contrastive import contrastive_loss

exact_loss = partial(contrastive_loss, precision="fp32")


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def definition(image: Tensor, text: Tensor, scale: Tensor, smoothing: float) -> Tensor:
    """The symmetric cross entropy over the whole matrix of logits, by torch."""
    logits, target = scale * image @ text.T, torch.arange(len(image))
    return (
        F.cross_entropy(logits, target, label_smoothing=smoothing)
        + F.cross_entropy(logits.T, target, label_smoothing=smoothing)
    ) / 2


def features(kind: str, batch: int, dim: int = 24) -> tuple[Tensor, Tensor]:
    image, text = unit(batch, dim, 0), unit(batch, dim, 1)
    if kind == "trained":
        text = F.normalize(image + 0.3 * text, dim=1)
    if kind == "anti-correlated":
        text = F.normalize(-image + 0.1 * text, dim=1)
    if kind == "opposite ends":  # every off-diagonal cosine of these rows is below -0.9
        pole = unit(1, dim, 2)
        image, text = F.normalize(pole + 0.05 * image, dim=1), F.normalize(0.05 * text - pole, dim=1)
    if kind == "half identical":
        image[: batch // 2], text[: batch // 2] = image[0], text[0]
    return image, text


KINDS = ["random", "trained", "anti-correlated", "opposite ends", "half identical"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 2, 70])
def test_value_and_gradients_are_the_definitions(kind, scale, smoothing, batch):
    image, text = features(kind, batch)
    exact = [t.clone().requires_grad_() for t in (image, text, torch.tensor([scale], dtype=torch.float64))]
    expected = definition(*exact, smoothing)
    expected.backward()
    ours = [t.detach().float().requires_grad_() for t in exact]
    loss, _ = exact_loss(*ours, label_smoothing=smoothing, tile=(16, 24))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=2e-6 * scale)
    for found, right in zip(ours, exact, strict=True):
        # Where the true gradient vanishes only rounding is left, which grows with the scale.
        error = (found.grad.double() - right.grad).norm()
        assert error <= 2e-5 * right.grad.norm() + 3e-7 * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [(7, 5), (16, 64), (64, 16), (100, 100)])
@pytest.mark.parametrize("kept", [0, 64 * 2**20])
def test_tiles_and_stored_tiles_change_nothing(kind, tile, kept, monkeypatch):
    monkeypatch.setattr(contrastive, "KEPT_BYTES", kept)
    results = []
    for shape in (tile, (100, 100)):
        image, text = (t.float().requires_grad_() for t in features(kind, 64))
        scale = torch.tensor([50.0], requires_grad=True)
        loss, _ = exact_loss(image, text, scale, tile=shape)
        loss.backward()
        results.append((loss, image.grad, text.grad, scale.grad))
    for found, right in zip(*results, strict=True):
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-5)


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        image, text = (t.float().requires_grad_() for t in features("trained", 600))
        scale = torch.tensor([30.0], requires_grad=True)
        loss, _ = exact_loss(image, text, scale)
        loss.backward()
        results.append((loss, image.grad, text.grad, scale.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_certain_pair_keeps_its_gradient():
    """Orthogonal pairs at scale 30 have a loss of 3e-13: log-sum-exp minus the diagonal would say 0."""
    image = torch.eye(4, requires_grad=True)
    scale = torch.tensor([30.0], requires_grad=True)
    loss, _ = exact_loss(image, torch.eye(4), scale)
    loss.backward()
    assert 0 < loss.item() < 1e-12
    assert scale.grad.item() < 0


def test_it_is_open_clips_loss():
    results = []
    for whose in ("ours", "theirs"):
        image, text = (t.float().requires_grad_() for t in features("random", 300, 64))
        scale = torch.tensor([14.0], requires_grad=True)
        loss = exact_loss(image, text, scale)[0] if whose == "ours" else open_clip.ClipLoss()(image, text, scale)
        loss.backward()
        results.append((loss, image.grad, text.grad, scale.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 3e-5 * theirs.norm()


@pytest.mark.parametrize("kind", ["random", "trained", "opposite ends"])
def test_accuracies_are_those_of_the_argmax(kind):
    image, text = (t.float() for t in features(kind, 90))
    _, stats = exact_loss(image, text, torch.tensor([20.0]), tile=(32, 16))
    logits, target = image @ text.T, torch.arange(90)
    assert stats.image_to_text.item() == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert stats.text_to_image.item() == pytest.approx((logits.argmax(0) == target).float().mean().item())


def test_identical_captions_do_not_count_as_found():
    image = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    text = image[:1].expand(6, -1)
    _, stats = exact_loss(image, text, torch.tensor([10.0]))
    assert stats.image_to_text.item() == 0


def test_memory_grows_with_the_batch_not_with_its_square():
    """Peak of what is allocated in forward and backward, counted operation by operation."""

    def live(batch: int) -> int:
        image, text = (t.float().requires_grad_() for t in (unit(batch, 16, 0), unit(batch, 16, 1)))
        scale = torch.tensor([30.0], requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            exact_loss(image, text, scale, tile=(128, 128))[0].backward()
        used, peak = 0, 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            used += event.nbytes() if event.name() == "[memory]" else 0
            peak = max(peak, used)
        return peak

    contrastive_kept = contrastive.KEPT_BYTES
    try:
        contrastive.KEPT_BYTES = 0
        small, large = live(512), live(2048)
    finally:
        contrastive.KEPT_BYTES = contrastive_kept
    assert large < 4.5 * small
    assert large < 2048 * 2048 * 4 / 4


def test_the_diagonal_is_found_in_every_tile():
    whole = torch.zeros(50, 50)
    for columns, rows in itertools.product(slices(50, 24), slices(50, 16)):
        tile = torch.zeros(rows.stop - rows.start, columns.stop - columns.start)
        tiles.diagonal_view(tile, rows, Block((), (), columns)).fill_(1)
        assert not tiles.diagonal_view(tile, rows, Block((), (), None)).numel()
        whole[rows, columns] += tile
    assert torch.equal(whole, torch.eye(50))


@pytest.mark.parametrize("kind", ["random", "anti-correlated"])
def test_sixteen_bit_features_keep_the_gradient(kind):
    """At logit scale 100: within a thousandth of the gradient's norm."""
    image, text = features(kind, 300, 768)
    exact = [t.clone().requires_grad_() for t in (image, text, torch.tensor([100.0], dtype=torch.float64))]
    definition(*exact, 0.0).backward()
    ours = [t.detach().float().requires_grad_() for t in exact]
    contrastive_loss(*ours)[0].backward()
    for found, right in zip(ours, exact, strict=True):
        assert (found.grad.double() - right.grad).norm() <= 1e-3 * right.grad.norm()


def test_kinds_cover_both_ways_of_summing():
    """Guards the tests above: some of the made batches must take the slow, general path."""
    slow = {
        kind
        for kind, scale in itertools.product(KINDS, (100.0,))
        for image, text in [[t.float() for t in features(kind, 70)]]
        for how in [tiles.How(smoothing=0, tile=(16, 24), dtype=torch.float32, exchange=Exchange())]
        if not contrastive._trusted(
            contrastive._shared_reference_sums(image, text, torch.tensor([scale]), how, None), None
        )
    }
    assert "opposite ends" in slow and "trained" not in slow
