"""The text classifier (arXiv 2103.00020, section 3.1.4): a class is the normalised mean of its prompts' unit features.

Each class is encoded by itself, so that its row is the same bits whichever benchmark asks for it, and in however many
processes. Rows are kept by the hash of weights, tokenizer and prompts: ImageNet's 1,000 serve -V2, -A, -R and -Sketch.
"""

import hashlib
import secrets
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaclip.distributed import from_main, gathered
from evaclip.encoder import Encoder
from evaclip.evals.blocks import ALONE, Cache, Share
from evaclip.evals.card import Card
from evaclip.evals.features import finite, tokenizer_ids
from evaclip.log import progress

# Classes that a process encodes between two writes of the cache, so that an interruption costs little.
SAVED_EVERY = 100


def class_embeddings(
    encoder: Encoder, card: Card, cache: Cache | None = None, share: Share = ALONE
) -> Float[Tensor, "classes dim"]:
    """One unit row per class, float32, on the encoder's device.

    `cache`: rows of earlier calls. `share`: this process's number and how many processes call this together.
    """
    rank, ranks = share
    names = list(dict.fromkeys(card.classes))
    prompts = {name: card.prompts(name) for name in names}
    keys = {name: hashlib.sha256("\n".join(prompts[name]).encode()).hexdigest()[:32] for name in names}
    path = cache.folder / f"classes-{_identity(encoder, cache)[:16]}.safetensors" if cache else None
    rows = _stored(path)
    rows = from_main(rows) if ranks > 1 else rows
    missing = [name for name in names if keys[name] not in rows]
    own = missing[rank::ranks]
    names_left = iter(progress(own, len(own), f"encoding {card.title}'s classes"))
    for _ in range(0, len(missing), SAVED_EVERY * ranks):
        new: dict[str, Tensor] = {}
        for name in islice(names_left, SAVED_EVERY):
            new[keys[name]] = F.normalize(encoder.texts(prompts[name]).mean(0), dim=0).cpu()
        for part in gathered(new) if ranks > 1 else [new]:
            rows |= part
        if rank == 0:
            _store(path, rows)
    return finite(torch.stack([rows[keys[name]] for name in card.classes]).to(encoder.device), encoder)


def prompts_hash(card: Card) -> str:
    """SHA-256 of all prompts in the order of the classes."""
    return hashlib.sha256("\n".join(p for name in card.classes for p in card.prompts(name)).encode()).hexdigest()


def _identity(encoder: Encoder, cache: Cache) -> str:
    """Hash of what the text features depend on besides the prompts."""
    return hashlib.sha256(f"{cache.towers} {tokenizer_ids(encoder)}".encode()).hexdigest()


def _stored(path: Path | None) -> dict[str, Tensor]:
    """The rows of a cache; one that was damaged is as good as none."""
    if path is None or not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return {}


def _store(path: Path | None, rows: dict[str, Tensor]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".new-{secrets.token_hex(4)}")
    save_file(rows, beside)
    beside.replace(path)
