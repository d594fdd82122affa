"""Random numbers are functions of their key, and behave like random numbers."""

import numpy as np
import pytest
import torch

from evaclip import keyed

POSITIONS = torch.tensor([0, 1, 2, 10**12])


def splitmix(value: int) -> int:
    """SplitMix64's finalizer in Python's own integers."""
    value = ((value ^ (value >> 30)) * keyed.MIX_1) & keyed.WORD
    value = ((value ^ (value >> 27)) * keyed.MIX_2) & keyed.WORD
    return value ^ (value >> 31)


def test_bits_are_splitmix_of_key_position_and_counter():
    drawn = keyed.bits(7, "masks", POSITIONS, 3)
    for row, position in enumerate(POSITIONS.tolist()):
        start = splitmix((position * keyed.GOLDEN + keyed.key(7, "masks")) & keyed.WORD)
        expected = [splitmix((start + (n + 1) * keyed.GOLDEN) & keyed.WORD) for n in range(3)]
        assert [value & keyed.WORD for value in drawn[row].tolist()] == expected


def test_a_position_draws_the_same_alone_and_in_company():
    together = keyed.bits(7, "masks", POSITIONS, 5)
    alone = torch.cat([keyed.bits(7, "masks", position[None], 5) for position in POSITIONS])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("change", [{"seed": 8}, {"purpose": "drop path"}])
def test_another_seed_or_purpose_draws_other_numbers(change):
    arguments = {"seed": 7, "purpose": "masks", "positions": POSITIONS, "count": 4} | change
    assert not torch.equal(keyed.bits(**arguments), keyed.bits(7, "masks", POSITIONS, 4))


def test_uniform_numbers_are_uniform_and_uncorrelated():
    drawn = keyed.uniform(3, "x", torch.arange(20_000), 8)
    assert drawn.min() >= 0 and drawn.max() < 1
    histogram = torch.histc(drawn, 16) / drawn.numel()
    assert (histogram - 1 / 16).abs().max() < 0.002
    correlation = torch.corrcoef(drawn.T) - torch.eye(8)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1000, 4097])
def test_permute_is_a_permutation(size):
    moved = keyed.permute(np.arange(size), size, 11, "order")
    assert sorted(moved.tolist()) == list(range(size))


def test_permutations_of_two_epochs_differ_and_look_shuffled():
    first, second = (keyed.permute(np.arange(10_000), 10_000, 11, f"epoch {e}") for e in (0, 1))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.05


def test_permute_keeps_the_shape_and_takes_each_index_alone():
    whole = keyed.permute(np.arange(12).reshape(3, 4), 12, 1, "x")
    assert whole.shape == (3, 4)
    assert whole[1, 2] == keyed.permute(np.array([6]), 12, 1, "x")[0]


def test_generators_depend_on_position():
    draw = [keyed.generator(1, "crop", position).random() for position in (0, 1, 0)]
    assert draw[0] == draw[2] != draw[1]
