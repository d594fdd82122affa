"""An export that transformers reads: CLIPModel, its tokenizer and its image processor, for CLIP with a plain tower.

EVA's towers have no place in CLIPModel. Everything in the folder is data: `config.json`, `model.safetensors`,
`preprocessor_config.json`, and the tokenizer's files. Two things are not the model's own, and nothing in a folder can
change them: transformers' tokenizer does not mend broken encodings or HTML entities, and its image processor cuts the
centre out up to one pixel off where an odd number of pixels is left over.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from evaclip.data.tokenizer import clip_tokenizer
from evaclip.encoder import Encoder, Preprocessing, described_preprocessing
from evaclip.errors import InputError
from evaclip.export.tokenizer_file import write_transformers_tokenizer
from evaclip.models.plain import PlainClip
from evaclip.models.shapes import PlainShape
from evaclip.models.weights.hugging_face import to_hugging_face


def write_hugging_face(model: PlainClip, preprocessing: Preprocessing, folder: Path) -> None:
    """Everything that CLIPModel.from_pretrained and CLIPProcessor.from_pretrained read.

    Raises InputError where transformers, which the export is compared in, is missing.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise InputError("an export for transformers is tried out there: pip install 'evaclip[huggingface]'") from None
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(
        {name: value.contiguous() for name, value in to_hugging_face(state).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    for name, record in (
        ("config.json", transformers_config(model.shape)),
        ("preprocessor_config.json", processor_config(preprocessing)),
    ):
        (folder / name).write_text(json.dumps(record, indent=2) + "\n")
    write_transformers_tokenizer(folder, model.shape.text.context)


def transformers_config(shape: PlainShape) -> dict[str, Any]:
    """transformers' CLIPConfig of a shape."""
    vision, text = shape.vision, shape.text
    both = {"hidden_act": shape.activation, "layer_norm_eps": 1e-5, "projection_dim": shape.dim}
    end = text.vocabulary - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": shape.dim,
        "torch_dtype": "float32",
        "vision_config": both
        | {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_hidden,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
        },
        "text_config": both
        | {
            "model_type": "clip_text_model",
            "max_position_embeddings": text.context,
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            # With its early files' 2, transformers looks for the highest id instead; with the true one, for this.
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }


def processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """transformers' description of how an image is prepared."""
    sides = {"height": preprocessing.size, "width": preprocessing.size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": sides if preprocessing.resize == "squash" else {"shortest_edge": preprocessing.size},
        "resample": Image.Resampling[preprocessing.interpolation.upper()].value,
        "do_center_crop": True,
        "crop_size": sides,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def transformers_encoder(folder: Path, written: Encoder) -> Encoder:
    """The folder as transformers itself loads it: its model and its tokenizer.

    `written`: the folder as we read it. Images are prepared as the folder says, and captions cleaned before. Raises
    InputError where transformers is missing.
    """
    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError:
        raise InputError(
            "comparing with Hugging Face's CLIPModel needs transformers: pip install transformers"
        ) from None
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    clean = clip_tokenizer(tokenizer.model_max_length).clean

    def ids(captions: Sequence[str]) -> Int[Tensor, "captions length"]:
        cleaned = [clean(caption) for caption in captions]
        return tokenizer(cleaned, padding=True, truncation=True, return_tensors="pt").input_ids

    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
    prepared = described_preprocessing(folder, written.preprocessing.size)
    return replace(written, model=_Towers(model.eval().float()), tokenizer=ids, preprocessing=prepared)


class _Towers(nn.Module):
    """transformers' CLIPModel with the two methods of an encoder's model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Image features, not normalised."""
        return self.model.visual_projection(self.model.vision_model(pixel_values=images).pooler_output)

    def encode_text(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Text features, not normalised."""
        return self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)
