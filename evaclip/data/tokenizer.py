"""Captions to token ids: CLIP's byte-pair encoding, with the very ids of open_clip's tokenizer, faster.

open_clip cleans a caption, splits it into words by a regular expression and merges byte pairs in Python. Here plain
ASCII skips the parts of the cleaning that cannot change it, each word is merged by the `tokenizers` library, and
words seen before come from a table: captions repeat their words. The splitting pattern is open_clip's own object, so
characters younger than some library's Unicode tables are split alike.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int32
from tokenizers import Tokenizer as WordMerger
from tokenizers import models, pre_tokenizers
from torch import Tensor

from evaclip.openclip import SimpleTokenizer

# Printable ASCII without "&": neither ftfy nor HTML unescaping can change it, apart from its white space.
PLAIN = re.compile(r"[ -%'-~\t\n\r]*").fullmatch
# Words remembered before the table starts anew: tens of megabytes.
TABLE_SIZE = 500_000


class Tokenizer:
    """CLIP's tokenizer. Calling it gives padded rows; `encode` gives the ids of one caption, bare."""

    def __init__(self, context: int = 77) -> None:
        """`context`: the most tokens of a caption, start and end included."""
        self.context = context
        reference = SimpleTokenizer(context_length=context)
        self.start, self.end = reference.sot_token_id, reference.eot_token_id
        self._split: Callable[[str], list[str]] = reference.pat.findall
        self._clean_thoroughly = reference.clean_fn
        merges = [(left, right) for left, right in reference.bpe_ranks]
        self._merger = WordMerger(models.BPE(reference.encoder, merges, end_of_word_suffix="</w>"))
        self._merger.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        # The names of the special tokens stand for themselves when a caption spells them out, as in open_clip.
        self._special = {"<start_of_text>": [self.start], "<end_of_text>": [self.end]}
        self._table: dict[str, list[int]] = dict(self._special)

    def encode(self, caption: str) -> list[int]:
        """The ids of a caption without start, end, padding or cut."""
        ids: list[int] = []
        for word in self._split(self.clean(caption)):
            known = self._table.get(word)
            if known is None:
                known = self._remember(word)
            ids += known
        return ids

    def __call__(self, captions: Sequence[str]) -> Int32[Tensor, "captions context"]:
        """Rows of start, ids, end and zeros; a caption too long is cut and still ends with the end token."""
        rows = np.zeros((len(captions), self.context), dtype=np.int32)
        for row, caption in zip(rows, captions, strict=True):
            ids = [self.start, *self.encode(caption)[: self.context - 2], self.end]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)

    def clean(self, caption: str) -> str:
        """Mended encoding, HTML entities resolved, single spaces, lower case."""
        if PLAIN(caption):
            return " ".join(caption.split()).lower()
        return self._clean_thoroughly(caption)

    def _remember(self, word: str) -> list[int]:
        if len(self._table) >= TABLE_SIZE:
            self._table = dict(self._special)
        ids = self._table[word] = self._merger.encode(word, add_special_tokens=False).ids
        return ids


@lru_cache(maxsize=2)
def clip_tokenizer(context: int = 77) -> Tokenizer:
    """The one tokenizer of this process; building it reads 262k merges."""
    return Tokenizer(context)


def cut_to_longest(tokens: Int32[Tensor, "captions context"]) -> Int32[Tensor, "captions length"]:
    """The same captions without the columns in which all of them are padding."""
    if not tokens.shape[1]:
        return tokens
    longest = int(tokens.argmax(dim=1).max()) + 1  # the end token has the highest id
    return tokens[:, :longest]
