"""CLIP's tokenizer as one `tokenizer.json`, which the `tokenizers` library reads in Python, Rust, Node and the browser.

It gives the ids of ours for any caption in clean text. It does not mend broken encodings or HTML entities first, as
ours does with the libraries that open_clip uses: captions that hold such things are to be cleaned before.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from evaclip.openclip import SimpleTokenizer

# CLIP's words: English contractions, letters, single digits, anything else without spaces.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_tokenizer(folder: Path, context: int) -> None:
    """`tokenizer.json`: start token, at most `context` ids in all, end token; no padding."""
    reference = SimpleTokenizer(context_length=context)
    start, end = (reference.decoder[id] for id in (reference.sot_token_id, reference.eot_token_id))
    tokenizer = Tokenizer(
        models.BPE(reference.encoder, [(left, right) for left, right in reference.bpe_ranks], end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
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
