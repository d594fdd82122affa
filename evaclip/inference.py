"""`evaclip.load`: a trained model for those who never saw the trainer.

    import evaclip
    model = evaclip.load("exports/digits")
    images = model.encode_image(["a.jpg", "b.png"])      # [2, dim], unit rows, float32
    texts = model.encode_text(["a red bicycle", "snow"])
    print(images @ texts.T)

Images are decoded by a few threads, on a GPU while the model works on those before them. A batch that does not fit into
memory is halved and tried again, and later ones keep the smaller size.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaclip.data.transforms import FORMATS
from evaclip.encoder import Encoder, load_encoder
from evaclip.errors import InputError

Picture = str | Path | Image.Image | Tensor
Item = TypeVar("Item")
Result = TypeVar("Result")
# Images with more pixels than this are refused before they are decoded.
MAX_PIXELS = 80_000_000


class Model:
    """Image and text encoder of a trained model; vectors of one `space_id` may be compared."""

    def __init__(self, encoder: Encoder, batch_size: int = 64) -> None:
        """`batch_size`: images that pass through the tower at a time, and captions by the eight."""
        self.encoder = encoder
        self._images, self._texts = Batches(batch_size), Batches(8 * batch_size)

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.encoder.name

    @property
    def space_id(self) -> str:
        """What two sets of vectors must share to be compared, see `Encoder.space_id`."""
        return self.encoder.space_id

    def encode_image(self, images: Picture | Iterable[Picture]) -> np.ndarray:
        """Unit rows, float32, [images, dim].

        `images`: one or several of: a path, a PIL image, pixels as a uint8 tensor [3, height, width]; these are resized
        and cropped as the model wants it. Float tensors [3, size, size] are taken as already prepared. Raises
        InputError, with its place, for an image that cannot be read.
        """
        if isinstance(images, Tensor) and images.ndim == 4:
            images = list(images)
        pictures = [images] if isinstance(images, str | Path | Image.Image | Tensor) else list(images)
        if not pictures:
            return self.encode_image(Image.new("RGB", (1, 1)))[:0]
        overlap = self.encoder.device.type != "cpu"
        prepared = in_threads(self._pixels, pictures, self._images.size, overlap=overlap)
        return torch.cat(list(self._images.run(prepared, self._image_rows))).numpy()

    def encode_text(self, captions: str | Iterable[str]) -> np.ndarray:
        """Unit rows, float32, [captions, dim]; a caption longer than the model's context is cut."""
        texts = [captions] if isinstance(captions, str) else list(captions)
        if not texts:
            return self.encode_text("")[:0]
        # Captions of like length share a batch, which is as long as its longest.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        rows = torch.cat(list(self._texts.run((texts[place] for place in order), self._text_rows)))
        return rows[torch.tensor(order).argsort()].numpy()

    def _pixels(self, picture: Picture) -> Tensor:
        """uint8 pixels of the model's size; prepared tensors as they are."""
        size = self.encoder.preprocessing.size
        if isinstance(picture, str | Path):
            return self.encoder.preprocessing.pixels(read_image(Path(picture)))
        if isinstance(picture, Image.Image):
            return self.encoder.preprocessing.pixels(picture)
        if picture.ndim == 3 and picture.shape[0] == 3 and picture.dtype == torch.uint8:
            whole = Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())
            return self.encoder.preprocessing.pixels(whole)
        if picture.shape == (3, size, size) and picture.is_floating_point():
            return picture.float().cpu()
        raise InputError(
            f"an image tensor is uint8 [3, height, width], or prepared float [3, {size}, {size}]; this one is "
            f"{picture.dtype} {list(picture.shape)}"
        )

    def _image_rows(self, images: Sequence[Tensor]) -> Tensor:
        if all(image.dtype == torch.uint8 for image in images):
            return self.encoder.images(torch.stack(list(images))).cpu()
        normalized = self.encoder.preprocessing.normalized
        floats = [image if image.is_floating_point() else normalized(image[None])[0] for image in images]
        return self.encoder.prepared(torch.stack(floats)).cpu()

    def _text_rows(self, captions: Sequence[str]) -> Tensor:
        return self.encoder.texts(captions).cpu()


class Batches:
    """A batch size that halves when memory runs out, and stays there."""

    def __init__(self, size: int) -> None:
        """`size`: items of a batch to begin with."""
        if size < 1:
            raise InputError(f"a batch holds at least one item, not {size}")
        self.size = size

    def run(self, items: Iterable[Item], work: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
        """The work's results, in order. Raises InputError when a single item does not fit."""
        waiting: list[Item] = []
        for item in items:
            waiting.append(item)
            while len(waiting) >= self.size:
                yield self._tried(waiting, work)
        while waiting:
            yield self._tried(waiting, work)

    def _tried(self, waiting: list[Item], work: Callable[[Sequence[Item]], Result]) -> Result:
        while True:
            batch = waiting[: self.size]
            try:
                result = work(batch)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise InputError("memory is too small for a single item: take a smaller model or the CPU") from None
                self.size = len(batch) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            del waiting[: len(batch)]
            return result


def load(source: str | Path, device: str = "auto", batch_size: int = 64) -> Model:
    """A model by the folder of an export or a run, or by an open_clip name. See `load_encoder` for all of them.

    `device`: `cpu`, `cuda`, `cuda:1`, or `auto` for a GPU if there is one. Raises InputError with one sentence.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"no device is called {device!r}: cpu, cuda, cuda:1, or auto") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: torch sees no CUDA device; evaclip doctor says more")
    return Model(load_encoder(source, chosen), batch_size)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A decoded RGB image; its header is looked at first. Raises InputError that names the path."""
    try:
        image = Image.open(path, formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise InputError(f"{path} has {image.width} x {image.height} pixels, more than {max_pixels:,}: resize it")
        return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"the image {path} does not exist") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"the image {path} cannot be read as {', '.join(FORMATS)}: {error}") from None


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], at_once: int, *, overlap: bool
) -> Iterator[Result]:
    """The work's results in order, computed by a few threads, at most `at_once` items ahead of the one asked for.

    `overlap`: begin the next items while the results are being used. Without it the threads rest meanwhile: on a CPU
    they would only take the cores from the model.
    """
    left, waiting = iter(items), deque[Future[Result]]()
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        while True:
            if overlap or not waiting:
                waiting.extend(pool.submit(work, item) for item in itertools.islice(left, at_once - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that memory ran out: on a GPU by the kind of its error, on a CPU by its words."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said or "not enough memory" in said
