"""The text tower by the mean length of the captions: padded to 77 tokens, cut to the batch's longest, packed."""

import torch
from measure import best_seconds, write_result

from evaclip.data.tokenizer import cut_to_longest
from evaclip.models.shapes import shape_named
from evaclip.models.text import TextTower

BATCH = 64


def captions(mean: int, batch: int = BATCH) -> torch.Tensor:
    """Token ids whose lengths are spread as a gamma distribution of shape 4 around the mean, from 3 to 77."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.distributions.Gamma(4.0, 4.0 / mean)
    torch.manual_seed(0)
    drawn = lengths.sample((batch,)).round().int().clamp(3, 77)
    tokens = torch.zeros(batch, 77, dtype=torch.int32)
    for row, length in enumerate(drawn.tolist()):
        tokens[row, : length - 1] = torch.randint(1, 49_000, (length - 1,), generator=random)
        tokens[row, length - 1] = 49407
    return tokens


def main() -> None:
    """Forward and backward of B/16's text tower."""
    shape = shape_named("EVA02-B-16")
    tower = TextTower(shape.text, shape.dim)
    rows = []
    for mean in (10, 20, 40, 77):
        tokens = captions(mean)
        seconds = {}
        for way, packed, given in (
            ("padded", False, tokens),
            ("cut", False, cut_to_longest(tokens)),
            ("packed", True, cut_to_longest(tokens)),
        ):
            tower.packed = packed
            seconds[way] = best_seconds(lambda given=given: tower(given).sum().backward(), repeats=3)
        length = (tokens.argmax(1) + 1).float()
        rows.append(
            [f"{length.mean():.0f}", f"{length.max():.0f}"]
            + [f"{BATCH / seconds[way]:,.0f}" for way in seconds]
            + [f"**{seconds['padded'] / seconds['packed']:.2f}x**", f"{seconds['cut'] / seconds['packed']:.2f}x"]
        )
    write_result(
        "text", "Captions per second through B/16's text tower, forward and backward, float32 on the CPU",
        ["mean tokens", "longest", "padded to 77", "cut to the longest", "packed", "packed over padded",
         "packed over cut"], rows,
        f"Batch of {BATCH}; lengths drawn from a gamma distribution of shape 4, held between 3 and 77.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
