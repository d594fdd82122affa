"""Which patches a sample keeps and which residual branches it drops: pure functions of (seed, sample position)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from evaclip import keyed


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
