"""Token ids are open_clip's, whatever the caption."""

import random

import open_clip
import pytest
import torch

from evaclip.data.tokenizer import Tokenizer, cut_to_longest

ODD = [
    "",
    " \t\n ",
    "A photo of a cat.",
    "it's  we'LL  they've I'm 'S",
    "café naïve Ünïcödé ﬁne ﬀ",
    "&amp;lt;b&amp;gt; &nbsp; &#39;quoted&#39; &eacute;",
    "<b>bold</b><br/><start_of_text> and <END_OF_TEXT> inside",
    "âœ” mojibake â€œquotesâ€\x9d",
    "emoji 😀👩‍👩‍👧🏳️‍🌈 and ❤️",
    "中文字幕 日本語のテキスト 한국어 텍스트",
    "עברית العربية ไทย हिन्दी",
    "numbers 1234567890 3.14 ½ ² Ⅷ ٣",
    "control \x00\x07\x1b[31mred\x1b[0m \x1c\x1d\x7f chars",
    "zero\u200bwidth\u2060 and \ufeffbom \u00a0nbsp\u3000ideographic",
    "İstanbul ſtrasse ẞ ǅ",
    "new letters \U000323b0 \U00018d09 \ua7ce",
    "x" * 10_000,
    "word " * 2_000,
    "😀" * 2_500,
    "a-b_c/d\\e|f~g^h`i@j#k$l%m*n+o=p",
]


@pytest.fixture(scope="module")
def both():
    return Tokenizer(), open_clip.tokenizer.SimpleTokenizer()


def varied(count: int) -> list[str]:
    """Captions from many scripts, with HTML, emoji, controls and words of all lengths."""
    draw = random.Random(0)
    alphabets = [
        [chr(c) for c in range(32, 127)],
        [chr(c) for c in range(0xA0, 0x250)],
        [chr(c) for c in range(0x370, 0x600)],
        [chr(c) for c in range(0x3040, 0x3100)] + [chr(c) for c in range(0x4E00, 0x4F00)],
        [chr(c) for c in range(0x1F300, 0x1F700)],
        [chr(c) for c in range(0x2000, 0x2100)],
        ["&amp;", "&lt;", "&#x27;", "<br>", "&nbsp;", "&copy;", "'s", "'ll", " ", "  ", "\n", "\t", "\x01", "�"],
    ]
    common = "a photo of the cat dog house running old new with on in Beautiful IMG_2034 2019 www.example.com".split()
    captions = []
    for _ in range(count):
        words = []
        for _ in range(draw.randint(0, 30)):
            if draw.random() < 0.6:
                words.append(draw.choice(common))
            else:
                words.append("".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 12))))
        captions.append(draw.choice([" ", "  ", "", ", "]).join(words))
    return captions


def test_ids_are_open_clips_on_ten_thousand_captions(both):
    ours, theirs = both
    captions = ODD + varied(10_000 - len(ODD))
    rows, expected = ours(captions), theirs(captions)
    different = (rows != expected).any(1).nonzero()
    assert not len(different), captions[int(different[0])]


@pytest.mark.parametrize("context", [1 + 1, 16, 77])
def test_long_captions_are_cut_and_still_end(both, context):
    _, theirs = both
    rows = Tokenizer(context)(ODD)
    assert rows.dtype == torch.int32 and rows.shape == (len(ODD), context)
    assert torch.equal(rows.long(), theirs(ODD, context_length=context))


def test_the_word_table_is_bounded_and_starting_anew_changes_nothing(both, monkeypatch):
    ours, theirs = Tokenizer(), both[1]
    monkeypatch.setattr("evaclip.data.tokenizer.TABLE_SIZE", 50)
    captions = varied(300)
    assert torch.equal(ours(captions).long(), theirs(captions))
    assert len(ours._table) <= 52


def test_cutting_removes_only_padding(both):
    rows = both[0](["a cat", "two dogs running over a hill"])
    cut = cut_to_longest(rows)
    assert cut.shape[1] == 8 and torch.equal(cut, rows[:, :8]) and rows[:, 8:].sum() == 0
