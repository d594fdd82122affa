"""Captions per second and core, cleaning included, beside open_clip's tokenizer; ids are compared on the way."""

import random
import time
from functools import partial

import open_clip
import torch
from measure import best_seconds, write_result

from evaclip.data.tokenizer import Tokenizer


def captions(count: int, plain: bool) -> list[str]:
    """Made-up captions of 4 to 25 words with the vocabulary's own words, a tenth of them with typographic signs."""
    draw = random.Random(0)
    words = [word[:-4] for word in open_clip.tokenizer.SimpleTokenizer().encoder if word.endswith("</w>")]
    words = [word for word in words[512:30_000] if word.isascii() and word.isalpha()]
    made = []
    for _ in range(count):
        text = " ".join(draw.choices(words, weights=[1 / (n + 20) for n in range(len(words))], k=draw.randint(4, 25)))
        chance = draw.random()
        if not plain and chance < 0.1:
            text += " – “best” of 2024’s"
        if not plain and 0.1 <= chance < 0.15:
            text += " &amp; more, café"
        made.append(text.capitalize() + f", {draw.randint(1, 999)}")
    return made


def main() -> None:
    """Both tokenizers on the same captions, tables of known words warm in both."""
    torch.set_num_threads(1)
    rows = []
    for name, plain in (("plain ASCII", True), ("a tenth with quotes, dashes, entities", False)):
        texts = captions(20_000, plain)
        ours, theirs = Tokenizer(), open_clip.tokenizer.SimpleTokenizer()
        same = torch.equal(ours(texts).long(), theirs(texts))
        rates = [len(texts) / best_seconds(partial(t, texts), 3, time.process_time) for t in (ours, theirs)]
        rows.append(
            [name, *(f"{rate:,.0f}" for rate in rates), f"**{rates[0] / rates[1]:.2f}x**", "yes" if same else "NO"]
        )
    write_result(
        "tokenizer",
        "Tokenizer, captions per second of one core, cleaning included",
        ["captions", "ours", "open_clip", "speed", "identical ids"],
        rows,
        "20,000 captions of 4 to 25 words, drawn by rank; processor time, best of three.",
    )


if __name__ == "__main__":
    main()
