"""Pictures whose colour says their class, and a model that reads it: whatever is lost on the way would show."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from evaclip.encoder import Encoder, Preprocessing
from evaclip.evals.card import Card

SIZE = 16
STEP = 25


def colour(number: int) -> tuple[int, int, int]:
    """Three digits of a class number, far enough apart to survive JPEG and video."""
    return number % 10 * STEP, number // 10 % 10 * STEP, number // 100 * STEP


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.new("RGB", (width, height), colour(number))


def encoded_picture(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, kind)
    return buffer.getvalue()


def write_picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_picture(number, "PNG" if path.suffix.lower() == ".png" else "JPEG"))
    return path


def write_video(path: Path, number: int, frames: int = 8, other: int | None = None) -> Path:
    """A clip of one colour; with `other`, only the frame in the true middle has it and all others have that one's."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for place in range(frames):
            shown = number if other is None or place == frames // 2 else other
            for packet in stream.encode(av.VideoFrame.from_image(picture(shown, 64, 48))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


class _Reader(nn.Module):
    def __init__(self, classes: int, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.classes, self.preprocessing = classes, preprocessing
        self.anything = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.calls += 1
        mean = torch.tensor(self.preprocessing.mean)[:, None, None]
        std = torch.tensor(self.preprocessing.std)[:, None, None]
        # The median, so that a thin border or a damaged corner does not matter.
        levels = ((images * std + mean) * 255).flatten(2).median(2).values
        digits = (levels / STEP).round().long().clamp(0, 9)
        numbers = digits[:, 0] + 10 * digits[:, 1] + 100 * digits[:, 2]
        return F.one_hot(numbers.clamp(max=self.classes), self.classes + 1).float()

    def encode_text(self, rows: Tensor) -> Tensor:
        return F.one_hot(rows[:, 0], self.classes + 1).float()


def oracle(card: Card, resize: str = "shortest") -> Encoder:
    """A model that knows every prompt of a card and every colour."""
    meaning: dict[str, int] = {}
    for number, name in enumerate(card.classes):
        for prompt in card.prompts(name):
            meaning.setdefault(prompt, number)

    def tokenizer(captions: Sequence[str]) -> Tensor:
        return torch.tensor([[meaning.get(caption, len(card.classes))] for caption in captions])

    preprocessing = Preprocessing(size=SIZE, resize=resize)
    model = _Reader(len(card.classes), preprocessing).eval()
    return Encoder(
        name="oracle", model=model, preprocessing=preprocessing, tokenizer=tokenizer, device=torch.device("cpu"),
        origin={"name": "oracle"},
    )  # fmt: skip


def seen(image: Image.Image) -> int:
    """The class that a picture shows."""
    level = np.median(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    digits = np.round(level / STEP).astype(int)
    return int(digits[0] + 10 * digits[1] + 100 * digits[2])
