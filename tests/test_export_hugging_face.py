"""Plain CLIPs as folders of transformers: its own model, tokenizer and image processor against open_clip's."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTokenizer

import evaclip
from evaclip.cli import main
from evaclip.encoder import load_encoder
from evaclip.errors import CheckpointError, InputError
from evaclip.export import hugging_face
from evaclip.exported import MANIFEST
from evaclip.models.weights.hugging_face import from_hugging_face, to_hugging_face

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
CAPTIONS = ["a photo of a cat", "two dogs & a very, very long walk", ""]
VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16, "mlp_ratio": 2.02}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


def plain_folder(folder, *, quick=True, vision=VISION, text=TEXT, preprocessing=PREPROCESSING):
    """A small model of open_clip's own kind with lively random weights, as open_clip saves it."""
    folder.mkdir()
    config = {"embed_dim": 24, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
    record = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    torch.manual_seed(0)
    kept = {name: value for name, value in text.items() if not name.startswith("tokenizer")}
    towers = open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**kept)
    model = open_clip.model.CLIP(24, *towers, quick_gelu=quick)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def both(request, tmp_path_factory):
    """A folder of open_clip, and its export for transformers."""
    root = tmp_path_factory.mktemp("plain")
    resize = "squash" if request.param else "shortest"
    source = plain_folder(root / "source", quick=request.param, preprocessing=PREPROCESSING | {"resize_mode": resize})
    return source, exported(source, root / "export")


def exported(source, out, to="huggingface", *more):
    assert main(["export", str(source), str(out), "--to", to, *more]) == 0
    return out


def refused(source, out, capfd, *more, to="huggingface"):
    assert main(["export", str(source), str(out), "--to", to, *more]) in (2, 89)
    said = capfd.readouterr().err
    assert "Traceback" not in said and not out.exists()
    return said


def test_transformers_gives_open_clips_features(both):
    source, folder = both
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{source}")
    tokens = open_clip.get_tokenizer(f"local-dir:{source}")(CAPTIONS)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pixels = transform(PICTURE)[None]
    given = processor(text=CAPTIONS, images=[PICTURE], return_tensors="pt", padding=True, truncation=True)
    # Its processor resizes tensors, and rounds otherwise than PIL: one of 256 levels apart at most.
    assert (given["pixel_values"] - pixels).abs().max() < 1.1 / 255 / 0.2
    with torch.inference_mode():
        torch.testing.assert_close(
            model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
            theirs.eval().encode_image(pixels),
        )
        text = model.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).pooler_output
        torch.testing.assert_close(model.text_projection(text), theirs.encode_text(tokens))
        scores = model(**given | {"pixel_values": pixels}).logits_per_image
        image, text = (F.normalize(part) for part in (theirs.encode_image(pixels), theirs.encode_text(tokens)))
        torch.testing.assert_close(scores, theirs.logit_scale.exp() * image @ text.T)


def test_transformers_tokenizer_gives_the_ids_of_open_clip(both):
    source, folder = both
    ours = open_clip.get_tokenizer(f"local-dir:{source}")
    strange = [
        "It's 3pm; we'LL GO!?",
        "naïve Straße ÉCOLE cafe\u0301 北京 привет 😀 x²",
        "  tabs\tand\nlines ",
        "a1b2 -- 1,234",
        "word " * 99,
        *CAPTIONS,
    ]
    for kind in (CLIPTokenizer, AutoTokenizer):
        theirs = kind.from_pretrained(folder)
        assert theirs.model_max_length == 20
        for caption in strange:
            ids = theirs(caption, truncation=True).input_ids
            assert ours([caption])[0].tolist() == ids + [0] * (20 - len(ids)), (kind, caption)


def test_the_folder_is_an_encoder_of_the_same_space(both):
    source, folder = both
    before, after = load_encoder(source), load_encoder(folder)
    pixels = before.preprocessing.pixels(PICTURE)[None]
    assert after.preprocessing == before.preprocessing
    torch.testing.assert_close(after.images(pixels), before.images(pixels))
    torch.testing.assert_close(after.texts(CAPTIONS), before.texts(CAPTIONS))
    assert evaclip.load(folder, device="cpu").space_id == before.space_id
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == "huggingface" and manifest["space_id"] == before.space_id
    assert manifest["parity"]["min_cosine"] > 0.99999 and manifest["parity"]["top_match"] == 1
    assert "transformers" in manifest["versions"]
    shutil.copytree(folder, folder.parent / "bare")
    (folder.parent / "bare" / MANIFEST).unlink()  # what another program might have written
    assert load_encoder(folder.parent / "bare").space_id == before.space_id


def test_names_there_and_back_are_exact(both):
    theirs = load_file(both[1] / "model.safetensors")
    assert theirs.keys() == CLIPModel.from_pretrained(both[1]).state_dict().keys()
    ours = from_hugging_face(theirs, "x")
    again = to_hugging_face(ours)
    assert again.keys() == theirs.keys() and all(torch.equal(again[name], theirs[name]) for name in theirs)
    weights = load_file(both[0] / "open_clip_model.safetensors")
    placed = {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": value for name, value in weights.items()
    }
    assert placed.keys() == ours.keys() and all(torch.equal(placed[name], ours[name]) for name in ours)


@pytest.mark.parametrize("both", [True], indirect=True, ids=["quick_gelu"])
@pytest.mark.parametrize("to", ["huggingface", "open_clip", "onnx", "torch_export"])
def test_a_clip_model_of_transformers_goes_to_every_format_that_holds_it(both, tmp_path, to):
    """The command compares features, so it fails where an activation, a norm or a resize is lost."""
    folder = exported(both[1], tmp_path / "out", to)
    if to == "huggingface":
        before, after = (load_file(path / "model.safetensors") for path in (both[1], folder))
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert (folder / "config.json").read_text() == (both[1] / "config.json").read_text()
    elif to == "open_clip":
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        given, _, _ = open_clip.create_model_and_transforms(f"local-dir:{both[0]}")
        with torch.inference_mode():
            pixels = transform(PICTURE)[None]
            assert torch.equal(theirs.eval().encode_image(pixels), given.eval().encode_image(pixels))
    if to != "torch_export":
        assert load_encoder(folder).space_id == load_encoder(both[0]).space_id


def test_a_model_of_open_clip_by_its_name(tmp_path):
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "ViT-Small-plain.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-Small-plain.json")
    folder = exported("ViT-Small-plain:random", tmp_path / "out")
    found = CLIPModel.from_pretrained(folder).config
    assert found.projection_dim == 24 and found.vision_config.hidden_act == "gelu"
    assert json.loads((folder / MANIFEST).read_text())["name"] == "ViT-Small-plain"


@pytest.mark.parametrize("both", [True], indirect=True, ids=["quick_gelu"])
def test_weights_that_went_astray_leave_nothing(both, tmp_path, capfd, monkeypatch):
    def astray(tensors):
        found = to_hugging_face(tensors)
        names = [f"vision_model.encoder.layers.0.self_attn.{part}_proj.weight" for part in "kv"]
        return found | dict(zip(names, [found[name] for name in reversed(names)], strict=True))

    monkeypatch.setattr(hugging_face, "to_hugging_face", astray)
    assert "the export is not the model: min cosine" in refused(both[0], tmp_path / "out", capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("both", [True], indirect=True, ids=["quick_gelu"])
def test_a_changed_file_is_refused(both, tmp_path, name):
    folder = shutil.copytree(both[1], tmp_path / "copy")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2] + b" " + content[-1:])
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that was exported"):
        load_encoder(folder)


@pytest.mark.parametrize("both", [True], indirect=True, ids=["quick_gelu"])
def test_what_is_no_plain_clip_is_one_sentence(both, tmp_path, capfd):
    out = tmp_path / "out"
    assert "is for EVA towers, and source has a plain vision transformer" in refused(both[0], out, capfd, to="timm")
    assert "is for EVA towers" in refused(both[0], out, capfd, to="evaclip")
    assert "CLIPModel has both towers" in refused(both[0], out, capfd, "--towers", "image")
    convolutional = plain_folder(tmp_path / "resnet", vision=VISION | {"layers": [1, 1, 1, 1], "width": 8})
    assert "belongs to no tower that evaclip knows" in refused(convolutional, out, capfd)
    uncausal = plain_folder(tmp_path / "uncausal", text=TEXT | {"no_causal_mask": True})
    assert "the export is not the model" in refused(uncausal, out, capfd)
    scaled = plain_folder(tmp_path / "scaled", vision=VISION | {"ls_init_value": 0.1})
    assert "has an unknown visual.transformer.resblocks.0.ls_1.gamma" in refused(scaled, out, capfd)
    tanh = plain_folder(tmp_path / "tanh", quick=False, text=TEXT | {"act_kwargs": {"approximate": "tanh"}})
    assert "neither GELU nor QuickGELU in both towers" in refused(tanh, out, capfd)
    loud = plain_folder(tmp_path / "loud", text=TEXT | {"tokenizer_kwargs": {"clean": "whitespace"}})
    assert "the tokenizer of" in refused(loud, out, capfd)


def test_a_processor_that_resizes_otherwise_is_refused(both, tmp_path):
    folder = shutil.copytree(both[1], tmp_path / "copy")
    (folder / MANIFEST).unlink()
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"shortest_edge": 40}}))
    with pytest.raises(InputError, match=r"resizes images to .*40.* and the tower takes 32"):
        load_encoder(folder)
