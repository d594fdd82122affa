"""Random numbers as a pure function of (seed, purpose, position).

Nothing in a run draws from a generator with state. Masks, drop path, crops and the order of the samples are each a
hash of the run's seed, a word that says what the number is for, and the global position of the sample. So a sample
meets the same choices after a restart, in the second pass of an accumulated batch, and on another number of GPUs.

The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, section 4, with Stafford's constants).
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
WORD = (1 << 64) - 1


def key(seed: int, purpose: str) -> int:
    """A 64-bit number for one purpose of one run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(seed: int, purpose: str, position: int) -> np.random.Generator:
    """A numpy generator for one sample, for choices that need several numbers of different kinds."""
    return np.random.Generator(np.random.Philox(key=np.array([key(seed, purpose), position], dtype=np.uint64)))


def bits(seed: int, purpose: str, positions: Int64[Tensor, " batch"], count: int) -> Int64[Tensor, "batch count"]:
    """`count` independent 64-bit numbers for each position, the same on every device."""
    start = positions * _signed(GOLDEN) + _signed(key(seed, purpose))
    counter = torch.arange(1, count + 1, device=positions.device) * _signed(GOLDEN)
    return _mix(_mix(start)[:, None] + counter[None, :])


def uniform(seed: int, purpose: str, positions: Int64[Tensor, " batch"], count: int) -> Tensor:
    """`count` independent float32 numbers in [0, 1) for each position, shape [batch, count]."""
    return _shift(bits(seed, purpose, positions, count), 40).to(torch.float32) * 2.0**-24


def permute(index: np.ndarray, size: int, seed: int, purpose: str) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends each index; nothing is stored.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and Rogaway, "Ciphers
    with arbitrary finite domains", CT-RSA 2002, section 3). `index`: int64 in [0, size), any shape.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    base = key(seed, purpose)
    keys = [np.uint64((base + turn * GOLDEN) & WORD) for turn in range(4)]

    def once(value: np.ndarray) -> np.ndarray:
        left, right = value >> half, value & mask
        for turn_key in keys:
            left, right = right, left ^ (_mix_numpy(right + turn_key) & mask)
        return (left << half) | right

    with np.errstate(over="ignore"):
        result = once(index.astype(np.uint64))
        outside = result >= size
        while outside.any():
            result[outside] = once(result[outside])
            outside = result >= size
    return result.astype(np.int64)


def _signed(value: int) -> int:
    """The same 64 bits as the signed number that torch holds."""
    return value - (1 << 64) if value >> 63 else value


def _shift(value: Tensor, count: int) -> Tensor:
    """A logical right shift; torch's own keeps the sign."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _signed(MIX_1)
    value = (value ^ _shift(value, 27)) * _signed(MIX_2)
    return value ^ _shift(value, 31)


def _mix_numpy(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX_2)
    return value ^ (value >> np.uint64(31))
