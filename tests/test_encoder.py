"""The one way to a trained model: runs, open_clip folders, open_clip names."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from evaclip import checkpoint
from evaclip.config import load_config
from evaclip.encoder import load_encoder
from evaclip.errors import CheckpointError, InputError
from evaclip.evals.blocks import cache_of
from evaclip.models.clip import Clip
from evaclip.openclip import QuickGELU
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.records import unstructured

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
CAPTIONS = ["a photo of a cat", "two dogs & a very, very long walk"]
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A model of another shape, preprocessing and kind than ours, as open_clip saves it."""
    folder = tmp_path_factory.mktemp("export")
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(24, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_an_open_clip_folder_gives_open_clips_features(open_clip_folder):
    encoder = load_encoder(open_clip_folder)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")(CAPTIONS)
    with torch.inference_mode():
        image = F.normalize(model.eval().encode_image(transform(PICTURE)[None]), dim=1)
        text = F.normalize(model.encode_text(tokens), dim=1)
    torch.testing.assert_close(encoder.images(encoder.preprocessing.pixels(PICTURE)[None]), image)
    torch.testing.assert_close(encoder.texts(CAPTIONS), text)


def test_a_run_gives_its_towers(tmp_path):
    config = eva02_tiny_digits()
    model = Clip(config.model).eval()
    checkpoint.save(tmp_path / "checkpoints", 7, {"model": model.state_dict()}, {})
    (tmp_path / "config.json").write_text(json.dumps(unstructured(config)))
    encoder = load_encoder(tmp_path)
    assert encoder.origin["step"] == "7" and encoder.name == config.model.name
    pixels = encoder.preprocessing.pixels(PICTURE)[None]
    with torch.inference_mode():
        expected = F.normalize(model.encode_image(encoder.preprocessing.normalized(pixels)), dim=1)
    assert torch.equal(encoder.images(pixels), expected)
    assert encoder.texts(CAPTIONS).shape == (2, config.model.dim)


def test_a_run_from_before_a_field_takes_its_default(tmp_path):
    config = eva02_tiny_digits()
    checkpoint.save(tmp_path / "checkpoints", 7, {"model": Clip(config.model).state_dict()}, {})
    record = unstructured(config)
    for field in ("kind", "loss"):
        del record["objective"][field]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert load_encoder(tmp_path).origin["step"] == "7"
    assert load_config(tmp_path) == config


def test_an_open_clip_name_may_be_random():
    assert load_encoder("ViT-S-32-alt:random").images(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape == (1, 256)


def test_what_cannot_be_had_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="no model is called 'ViT-Q-99'"):
        load_encoder("ViT-Q-99")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        load_encoder(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot be had: .*Without a network"):
        load_encoder(tmp_path)


def test_a_space_is_weights_preprocessing_and_tokenizer(open_clip_folder):
    encoder, again = load_encoder(open_clip_folder), load_encoder(open_clip_folder)
    assert encoder.space_id == again.space_id and len(encoder.space_id) == 32
    squashed = replace(encoder.preprocessing, resize="shortest")
    assert replace(encoder, preprocessing=squashed).space_id != encoder.space_id
    shorter = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}", context_length=76)
    assert replace(encoder, tokenizer=shorter).space_id != encoder.space_id
    assert replace(encoder, known_space="known").space_id == "known"
    with torch.no_grad():
        again.model.logit_scale.add_(1)  # moves no vector
    assert replace(again).space_id == encoder.space_id
    with torch.no_grad():
        again.model.visual.proj[0, 0] += 1e-6
    assert replace(again).space_id != encoder.space_id
    assert load_encoder("ViT-S-32-alt:random").space_id != encoder.space_id


def test_a_space_and_a_cache_know_the_kind_of_gelu(tmp_path):
    """The same file is a model under either name, and one of the two is wrong."""
    found = []
    for quick in (True, False):
        model = open_clip.model.CLIP(24, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT), quick)
        if found:
            model.load_state_dict(found[0].model.state_dict())
        found.append(replace(load_encoder("ViT-S-32-alt:random"), model=model.eval()))
    assert not torch.allclose(found[0].texts(CAPTIONS), found[1].texts(CAPTIONS), atol=1e-6)
    assert found[0].space_id != found[1].space_id
    assert cache_of(found[0], tmp_path) != cache_of(found[1], tmp_path)


@pytest.mark.parametrize(("tag", "activation"), [("openai", QuickGELU), ("laion2b_s34b_b79k", torch.nn.GELU)])
def test_a_tag_of_open_clips_has_the_activation_that_it_was_trained_with(monkeypatch, tag, activation):
    """Of ViT-B-32 both kinds are published under one name, and open_clip only warns of the wrong one."""

    def without_weights(name, *, pretrained, **settings):
        assert pretrained == tag
        return open_clip.create_model(name, **settings, vision_cfg=VISION, text_cfg=TEXT)

    monkeypatch.setattr("evaclip.encoder.sources.create_model", without_weights)
    model = load_encoder(f"ViT-B-32:{tag}").model
    for tower in (model.visual, model.transformer):
        kinds = {type(m) for m in tower.modules() if isinstance(m, QuickGELU | torch.nn.GELU)}
        assert kinds == {activation}
