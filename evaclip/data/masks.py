"""Which patches stay, which are masked, which residual branches are dropped: pure functions of (seed, position)."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from evaclip import keyed

# Of block-wise masking: the narrowest block, and rectangles tried in a row before single patches fill the rest.
NARROWEST, TRIES = 0.3, 10


def kept_patches(
    seed: int, positions: Int64[Tensor, " batch"], patches: int, ratio: float
) -> Int64[Tensor, "batch kept"] | None:
    """Indices of the patches that stay when a share `ratio` is masked, in ascending order; None if all stay.

    Uniform without replacement, each sample on its own (FLIP, arXiv 2212.00794, section 3): patches are ranked by
    keyed 64-bit numbers. At least one patch stays. `positions`: global sample positions.
    """
    if ratio == 0:
        return None
    kept = max(1, int(patches * (1 - ratio)))
    order = keyed.bits(seed, "kept patches", positions, patches).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values


def drop_path_factors(
    seed: int, positions: Int64[Tensor, " batch"], depth: int, rate: float
) -> Float[Tensor, "batch branches"] | None:
    """The factor on each residual branch, two per block: 0 if dropped, 1 / (1 - its rate) if not; None if none can be.

    The rate rises linearly from 0 at the first block to `rate` at the last (arXiv 1603.09382, equation 4).
    """
    if rate == 0:
        return None
    rates = torch.linspace(0, rate, depth, device=positions.device).repeat_interleave(2)
    drawn = keyed.uniform(seed, "drop path", positions, 2 * depth)
    return (drawn >= rates) / (1 - rates)


def block_masks(
    seed: int, positions: Int64[Tensor, " batch"], grid: int, masked: int, smallest: int = 16
) -> Bool[Tensor, "batch patches"]:
    """Which patches are replaced by the mask token: rectangles until exactly `masked` are covered, on the CPU.

    Block-wise masking of BEiT (arXiv 2106.08254, algorithm 1): areas of `smallest` patches or more, aspect ratios from
    0.3 to 1 / 0.3. What no rectangle fits into any more is drawn one by one. `grid`: patches of a side.
    """
    rows = [_block_mask(keyed.generator(seed, "block mask", int(p)), grid, masked, smallest) for p in positions.cpu()]
    return torch.from_numpy(np.stack(rows)).flatten(1)


def _block_mask(random: np.random.Generator, grid: int, masked: int, smallest: int) -> np.ndarray:
    mask = np.zeros((grid, grid), dtype=bool)
    missed = 0
    while (left := masked - int(mask.sum())) > 0 and missed < TRIES:
        missed += 1
        area = random.uniform(min(smallest, left), left)
        aspect = np.exp(random.uniform(np.log(NARROWEST), -np.log(NARROWEST)))
        height, width = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if not (0 < height <= grid and 0 < width <= grid):
            continue
        top, column = random.integers(grid - height + 1), random.integers(grid - width + 1)
        block = mask[top : top + height, column : column + width]
        if 0 < block.size - int(block.sum()) <= left:
            block[:] = True
            missed = 0
    free = np.flatnonzero(~mask)
    mask.flat[random.choice(free, masked - int(mask.sum()), replace=False)] = True
    return mask
