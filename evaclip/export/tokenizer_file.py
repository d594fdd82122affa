"""CLIP's tokenizer as one `tokenizer.json`, which the `tokenizers` library reads in Python, Rust, Node and the browser.

It gives the ids of ours for any caption in clean text. It does not mend broken encodings or HTML entities first, as
ours does with the libraries that open_clip uses: captions that hold such things are to be cleaned before.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from evaclip.openclip import SimpleTokenizer

# CLIP's words: English contractions, letters, single digits, anything else without spaces.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


# What transformers calls the two special tokens, and the files beside it that its older versions read.
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, context: int) -> None:
    """`tokenizer.json`: start token, at most `context` ids in all, end token; no padding."""
    reference = SimpleTokenizer(context_length=context)
    start, end = (reference.decoder[id] for id in (reference.sot_token_id, reference.eot_token_id))
    _write(folder, reference, context, start, end)


def write_transformers_tokenizer(folder: Path, context: int) -> None:
    """The same for transformers' CLIPTokenizer: its names of the special tokens, and the files that it looks for."""
    reference = SimpleTokenizer(context_length=context)
    renamed = {reference.sot_token_id: START, reference.eot_token_id: END}
    reference.encoder = {renamed.get(id, word): id for word, id in reference.encoder.items()}
    _write(folder, reference, context, START, END)
    merges = [" ".join(pair) for pair in reference.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, "do_lower_case": True} | special
    for name, record in (
        ("vocab.json", reference.encoder),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(folder: Path, reference: Any, context: int, start: str, end: str) -> None:
    tokenizer = Tokenizer(
        models.BPE(reference.encoder, [(left, right) for left, right in reference.bpe_ranks], end_of_word_suffix="</w>")
    )
    # Of what our cleaning does beyond this, only the composed form of accented letters can be had here.
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{start} $A {end}", special_tokens=[(start, reference.sot_token_id), (end, reference.eot_token_id)]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(start), AddedToken(end)])
    tokenizer.enable_truncation(context)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
