"""Features of many images, for the evaluators that look at nothing else."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaclip.encoder import Encoder, Preprocessing
from evaclip.errors import InputError
from evaclip.log import progress


def image_features(
    encoder: Encoder,
    keys: Sequence[str],
    open: Callable[[int], Image.Image],
    what: str,
    batch: int = 256,
    workers: int = 0,
) -> Float[Tensor, "images dim"]:
    """Unit rows, float32, on the encoder's device, in the order of `keys`.

    `open` gives the image with a number. Raises InputError that names the image, for one that cannot be read, or says
    that the features are not finite.
    """
    pixels = _Pixels(keys, open, encoder.preprocessing)
    loader = DataLoader(pixels, batch, num_workers=workers, multiprocessing_context="fork" if workers else None)
    parts = [encoder.images(block) for block in progress(loader, len(loader), what)]
    return finite(torch.cat(parts), encoder)


def finite(features: Float[Tensor, "rows dim"], encoder: Encoder) -> Float[Tensor, "rows dim"]:
    """The same; raises InputError if a number among them is none: every comparison with it would be wrong."""
    if not torch.isfinite(features).all():
        raise InputError(f"{encoder.name} gives features that are not finite: its weights have diverged")
    return features


class _Pixels(Dataset[Tensor]):
    """Decoded images."""

    def __init__(self, keys: Sequence[str], open: Callable[[int], Image.Image], preprocessing: Preprocessing) -> None:
        self.keys, self.open, self.preprocessing = keys, open, preprocessing

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Tensor:
        try:
            return self.preprocessing.pixels(self.open(number))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"the image {self.keys[number]} cannot be read: {error}") from None
