"""`evaclip convert`: any layout to another and back, tensor for tensor; and models of others as encoders."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from evaclip.cli import main
from evaclip.encoder import load_encoder
from evaclip.errors import InputError
from evaclip.models.clip import Clip
from evaclip.models.shapes import SHAPES
from evaclip.models.weights import canonical, load_towers, load_whole, read_weights
from tests.models.layouts import FAMILIES, TEXT, eva_clip, eva_vision, openai_clip, shape_of, torchscript

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
CAPTIONS = ["a photo of a cat", "two dogs & a very, very long walk"]


@pytest.fixture
def eva_file(tmp_path):
    torch.save({"module": eva_clip(FAMILIES["eva02"])}, tmp_path / "EVA.pt")
    return tmp_path / "EVA.pt"


def test_there_and_back_is_exact(tmp_path, eva_file, capfd):
    before = torch.load(eva_file, weights_only=True)["module"]
    for source, target, layout in (("EVA.pt", "a.safetensors", "open_clip"), ("a.safetensors", "b.pt", "eva")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--to", layout]) == 0
    after = torch.load(tmp_path / "b.pt", weights_only=True)
    kept = {name: value for name, value in before.items() if "rope" not in name}
    assert after.keys() == kept.keys() and all(torch.equal(after[name], kept[name]) for name in kept)
    said = capfd.readouterr().err
    assert "EVA.pt (eva) -> " in said and "visual.trunk.blocks.*.attn.q_proj.bias" in said
    assert "rotary table, which follows from the shape" in said and "x 2" in said
    assert main(["convert", str(tmp_path / "b.pt"), str(tmp_path / "timm.safetensors"), "--to", "timm"]) == 0
    assert "timm holds image towers alone" in capfd.readouterr().err
    tower = load_file(tmp_path / "timm.safetensors")
    assert torch.equal(tower["blocks.1.attn.q_proj.bias"], before["visual.blocks.1.attn.q_bias"])


def test_half_precision_stays_half_precision(tmp_path):
    state = {name: value.half() for name, value in eva_vision(FAMILIES["tiny"], clip=False).items()}
    torch.save(state, tmp_path / "tiny.pt")
    assert main(["convert", str(tmp_path / "tiny.pt"), str(tmp_path / "t.safetensors"), "--to", "timm"]) == 0
    found = load_file(tmp_path / "t.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert torch.equal(found["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.w12.weight"])


def test_bad_conversions_are_one_sentence_and_write_nothing(tmp_path, eva_file, capfd):
    def refused(source, target, layout, sentence, status=2):
        assert main(["convert", str(source), str(target), "--to", layout]) == status
        said = capfd.readouterr().err
        assert sentence in said and said.count("\n") == 1 and "Traceback" not in said

    refused(eva_file, tmp_path / "x.onnx", "timm", "must end in .safetensors or in one of .pt, .pth, .bin")
    refused(eva_file, eva_file, "timm", "exists; --overwrite replaces it")
    refused(tmp_path / "EVA.p", tmp_path / "x.pt", "timm", "do not exist; did you mean", 89)
    torch.save(openai_clip(), tmp_path / "openai.pt")
    refused(tmp_path / "openai.pt", tmp_path / "x.pt", "eva", "plain vision transformer", 89)
    eva_file.write_bytes(eva_file.read_bytes()[:5000])
    refused(eva_file, tmp_path / "x.pt", "open_clip", "damaged or cut short", 89)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EVA.pt", "openai.pt"]


def hugging_face(folder, act: str, **saving) -> CLIPModel:
    """transformers' model with random weights, and its folder as transformers writes it."""
    torch.manual_seed(3)
    tower = {"hidden_act": act, "num_hidden_layers": 2}
    vision = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision | tower, text_config=text | tower, projection_dim=24)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder, **saving)
    preparing = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2, "size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparing))
    return model


def features_of(model: CLIPModel, encoder):
    """What transformers gives for the same pixels and captions, unit rows."""
    pixels = encoder.preprocessing.pixels(PICTURE)[None]
    tokens = F.pad(open_clip.get_tokenizer("ViT-B-32")(CAPTIONS), (0, 0))
    mask = (tokens.argmax(1, keepdim=True) >= torch.arange(tokens.shape[1])).long()
    with torch.inference_mode():
        vision = model.vision_model(pixel_values=encoder.preprocessing.normalized(pixels)).pooler_output
        text = model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
        return pixels, F.normalize(model.visual_projection(vision)), F.normalize(model.text_projection(text))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_hugging_face_folder_is_an_encoder_with_transformers_features(tmp_path, act):
    model = hugging_face(tmp_path, act, max_shard_size="1MB" if act == "gelu" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (act == "gelu")
    encoder = load_encoder(tmp_path)
    assert encoder.preprocessing.mean == (0.5, 0.4, 0.3) and encoder.preprocessing.interpolation == "bilinear"
    pixels, image, text = features_of(model, encoder)
    torch.testing.assert_close(encoder.images(pixels), image)
    torch.testing.assert_close(encoder.texts(CAPTIONS), text)
    assert encoder.origin["layout"] == "hugging_face" and len(encoder.origin["sha256"]) == 64


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_our_text_tower_starts_from_hugging_faces_with_its_activation(tmp_path, act):
    theirs = hugging_face(tmp_path, act)
    weights = read_weights(tmp_path)
    assert weights.activation == act
    shape = shape_of(FAMILIES["eva02"])
    model = Clip(replace(shape, text=replace(TEXT, activation=act))).eval()
    load_towers(model, text=weights)
    model.text.text_projection.copy_(theirs.text_projection.weight.T)
    tokens = torch.tensor([[49406, 320, 1125, 49407]])
    expected = theirs.text_projection(theirs.text_model(input_ids=tokens).pooler_output)
    torch.testing.assert_close(model.encode_text(tokens), expected, atol=1e-5, rtol=1e-5)
    other = Clip(replace(shape, text=replace(TEXT, activation="gelu" if act == "quick_gelu" else "quick_gelu"))).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other.encode_text(tokens), expected, atol=1e-3)


@pytest.mark.parametrize("quick", [True, False])
def test_openais_archive_is_an_encoder_and_converts_to_open_clips_names(tmp_path, quick):
    state = openai_clip()
    torch.jit.save(torchscript(state), tmp_path / "ViT.pt")
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=4, image_size=16)
    text = open_clip.CLIPTextCfg(width=64, heads=1, layers=2)
    theirs = open_clip.model.CLIP(24, vision, text, quick_gelu=quick).eval()
    assert main(["convert", str(tmp_path / "ViT.pt"), str(tmp_path / "o.safetensors"), "--to", "open_clip"]) == 0
    theirs.load_state_dict(load_file(tmp_path / "o.safetensors"))
    encoder = load_encoder(tmp_path / "ViT.pt")
    pixels = encoder.preprocessing.pixels(PICTURE)[None]
    with torch.inference_mode():
        image = F.normalize(theirs.encode_image(encoder.preprocessing.normalized(pixels)))
        text = F.normalize(theirs.encode_text(open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)))
    # OpenAI's are QuickGELU, and with GELU the features are others.
    assert torch.allclose(encoder.images(pixels), image, atol=1e-5) == quick
    assert torch.allclose(encoder.texts(CAPTIONS), text, atol=1e-5) == quick


def test_a_file_of_weights_is_an_encoder_by_the_name_of_its_shape(tmp_path, eva_file, monkeypatch, capfd):
    shape = shape_of(FAMILIES["eva02"])
    monkeypatch.setitem(SHAPES, "small", shape)
    model = Clip(shape).eval()
    load_whole(model, read_weights(eva_file))
    for source in (f"small:{eva_file}", eva_file):  # with its name, and by its sizes
        encoder = load_encoder(source)
        pixels = encoder.preprocessing.pixels(PICTURE)[None]
        with torch.inference_mode():
            expected = F.normalize(model.encode_image(encoder.preprocessing.normalized(pixels)))
        assert torch.equal(encoder.images(pixels), expected) and encoder.origin["layout"] == "eva"
    assert capfd.readouterr().err == ""
    monkeypatch.setitem(SHAPES, "large", shape_of(FAMILIES["eva02"], image_size=32))
    load_encoder(f"large:{eva_file}")
    assert "[1, 17, 48] -> [1, 65, 48], eva" in capfd.readouterr().err


def test_a_file_of_open_clips_model_by_its_name(tmp_path):
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "epoch_1.pt")
    encoder = load_encoder(f"ViT-S-32-alt:{tmp_path / 'epoch_1.pt'}")
    pixels = encoder.preprocessing.pixels(PICTURE)[None]
    with torch.inference_mode():
        expected = F.normalize(theirs.encode_image(encoder.preprocessing.normalized(pixels)))
    assert torch.equal(encoder.images(pixels), expected)


def test_models_that_cannot_be_are_one_sentence(tmp_path, eva_file):
    with pytest.raises(InputError, match="sizes of no published EVA-CLIP"):
        load_encoder(eva_file)
    torch.save(openai_clip(), tmp_path / "resaved.pt")
    with pytest.raises(InputError, match="does not say whether it was trained with GELU or QuickGELU"):
        load_encoder(tmp_path / "resaved.pt")
    with pytest.raises(InputError, match=r"are not of ViT-S-32-alt"):
        load_encoder(f"ViT-S-32-alt:{tmp_path / 'resaved.pt'}")
    torch.save(eva_vision(FAMILIES["eva02"], clip=False), tmp_path / "mim.pt")
    with pytest.raises(InputError, match=r"lacks text.positional_embedding, so it is no whole EVA-CLIP"):
        load_encoder(tmp_path / "mim.pt")
    folder = tmp_path / "hf"
    folder.mkdir()
    hugging_face(folder, "gelu")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_act"] = "swish"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the activation 'swish' is neither gelu nor quick_gelu"):
        load_encoder(folder)
    config["text_config"]["hidden_act"] = "quick_gelu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quick_gelu in the text tower and gelu in the image tower"):
        load_encoder(folder)
    config["text_config"]["hidden_act"], config["text_config"]["eos_token_id"] = "gelu", 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="end-of-text token 7 is not the highest"):
        load_encoder(folder)
    config["text_config"]["eos_token_id"] = 49407
    config["vision_config"]["num_attention_heads"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="5 attention heads do not divide the vision tower's 48"):
        load_encoder(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    config["vision_config"]["num_attention_heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not describe how images are prepared"):
        load_encoder(folder)


def test_hugging_faces_queries_need_their_keys():
    state = {f"text_model.encoder.layers.0.self_attn.{part}_proj.weight": torch.ones(4, 4) for part in "qv"}
    with pytest.raises(InputError, match=r"lacks text_model\.encoder\.layers\.0\.self_attn\.k_proj\.weight"):
        canonical(state, "x")
