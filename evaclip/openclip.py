"""Everything we take from open_clip, in one place.

open_clip's next major version changes its interface; when it comes, this file changes and nothing else. Importing it
takes seconds (it loads torchvision and every model family), so only code that builds a model or a tokenizer does.
"""

from open_clip.factory import create_model, get_tokenizer
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer, VisionTransformer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

__all__ = [
    "IMAGENET_CLASSNAMES",
    "OPENAI_IMAGENET_TEMPLATES",
    "LayerNorm",
    "QuickGELU",
    "SimpleTokenizer",
    "TextTransformer",
    "VisionTransformer",
    "create_model",
    "default_bpe",
    "get_pretrained_cfg",
    "get_tokenizer",
    "list_pretrained_tags_by_model",
]
