"""Exports are the model: by open_clip, timm, onnxruntime and torch themselves, on disk and after bad input."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import tokenizers
import torch
import torch.nn.functional as F
from open_clip.factory import get_model_config
from PIL import Image
from safetensors.torch import load_file, save_file

import evaclip
from evaclip import checkpoint
from evaclip.cli import main
from evaclip.data.tokenizer import clip_tokenizer
from evaclip.encoder import encoder_of, load_encoder, load_image_tower
from evaclip.errors import InputError
from evaclip.evals.blocks import cache_of
from evaclip.export.int8 import quantized
from evaclip.export.parity import PROMPTS, compare, golden_images
from evaclip.export.tokenizer_file import write_tokenizer
from evaclip.export.weights import TIMM_NAMES, open_clip_config, timm_config, write_open_clip
from evaclip.exported import MANIFEST
from evaclip.models.clip import Clip
from evaclip.models.shapes import SHAPES, TextShape
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.records import unstructured

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
CAPTIONS = ["a photo of a cat", "two dogs & a very, very long walk", ""]
SMALL_TEXT = TextShape(width=32, depth=2, heads=2)


def lively(shape, *, logit_bias=False):
    """A model whose vectors differ from image to image and caption to caption, as a trained one's do."""
    torch.manual_seed(0)
    model = Clip(shape, logit_bias=logit_bias).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def narrow(name):
    """A published shape with every part of it, and fewer of each."""
    shape = SHAPES[name]
    vision = replace(shape.vision, image_size=4 * shape.vision.patch_size, width=48, depth=2, heads=2, mlp_hidden=100)
    return replace(shape, dim=24, vision=vision, text=SMALL_TEXT)


@pytest.fixture
def run(tmp_path):
    """A function that writes a run of a model's weights and returns its folder."""

    def make(model, name="run"):
        folder = tmp_path / name
        checkpoint.save(folder / "checkpoints", 7, {"model": model.state_dict()}, {})
        config = replace(eva02_tiny_digits(), model=model.shape)
        if model.logit_bias is not None:
            config = replace(config, objective=replace(config.objective, loss="sigmoid"))
        (folder / "config.json").write_text(json.dumps(unstructured(config)))
        (folder / "scores").mkdir()
        (folder / "scores" / "digits.json").write_text('{"metrics": {"top1": 0.5}}')
        return folder

    return make


@pytest.fixture
def tiny_run(run, tiny_shape):
    return run(lively(tiny_shape))


def export(source, out, to, *more):
    assert main(["export", str(source), str(out), "--to", to, *more]) == 0
    return out


@pytest.mark.parametrize("name", TIMM_NAMES.values())
def test_published_towers_have_the_names_that_open_clip_has(name):
    shapes = [shape for shape in SHAPES.values() if TIMM_NAMES.get(shape.vision) == name]
    assert shapes
    for shape in shapes:
        own, theirs = open_clip_config(shape, "nowhere"), get_model_config(shape.name)
        assert own == theirs
        with torch.device("meta"):
            built = open_clip.CustomTextCLIP(**{key: value for key, value in own.items() if key != "custom_text"})
            model = Clip(shape)
        expected = {key: list(value.shape) for key, value in built.state_dict().items() if key != "logit_scale"}
        assert {key: list(value.shape) for key, value in model.state_dict().items() if key != "logit_scale"} == expected


@pytest.mark.parametrize("name", [name for name in SHAPES if not SHAPES[name].vision.rms_norm])
def test_open_clip_itself_loads_every_layout_and_gives_our_vectors(name, run, tmp_path):
    model = lively(narrow(name))
    folder = export(run(model), tmp_path / "open_clip", "open_clip")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    ours = encoder_of(model, {})
    with torch.inference_mode():
        image = F.normalize(theirs.eval().encode_image(transform(PICTURE)[None]), dim=1)
        text = F.normalize(theirs.encode_text(tokens), dim=1)
    torch.testing.assert_close(ours.images(ours.preprocessing.pixels(PICTURE)[None]), image)
    torch.testing.assert_close(ours.texts(CAPTIONS), text)
    assert theirs.logit_scale.ndim == 0 and theirs.logit_scale == model.logit_scale[0]


def test_a_published_shape_loads_strictly_by_its_own_name(tmp_path):
    encoder = encoder_of(Clip(SHAPES["EVA02-B-16"]).eval(), {})
    write_open_clip(encoder.model, encoder.preprocessing, tmp_path, "not needed")
    assert {path.name for path in tmp_path.iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors"}
    theirs = open_clip.create_model("EVA02-B-16", pretrained=str(tmp_path / "open_clip_model.safetensors"))
    state = theirs.state_dict()
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(state[name].reshape(value.shape), value), name
    with torch.inference_mode():
        text = F.normalize(theirs.eval().encode_text(open_clip.get_tokenizer("EVA02-B-16")(CAPTIONS)), dim=1)
    torch.testing.assert_close(encoder.texts(CAPTIONS), text)


def test_a_space_is_the_same_in_every_export(tiny_run, tmp_path):
    space = load_encoder(tiny_run).space_id
    for number, (to, *more) in enumerate(
        (
            ("open_clip",),
            ("timm",),
            ("evaclip",),
            ("evaclip", "--towers", "text"),
            ("onnx", "--towers", "image", "--precision", "fp16"),
            ("onnx", "--towers", "image", "--precision", "int8"),
        )
    ):
        folder = export(tiny_run, tmp_path / str(number), to, *more)
        assert load_encoder(folder).space_id == space, (to, more)
        assert json.loads((folder / MANIFEST).read_text())["space_id"] == space


def test_the_manifest_says_what_it_is(tiny_run, tmp_path, capfd):
    programs = json.loads((export(tiny_run, tmp_path / "programs", "torch_export") / MANIFEST).read_text())
    assert set(programs["files"]) == {"image.pt2", "text.pt2", "tokenizer.json"}
    manifest = json.loads((export(tiny_run, tmp_path / "out", "evaclip") / MANIFEST).read_text())
    assert manifest["origin"]["step"] == "7" and manifest["config"]["name"] == "eva02_tiny_digits"
    assert manifest["scores"] == {"digits": {"metrics": {"top1": 0.5}}}
    assert set(manifest["files"]) == {"model.safetensors"} and manifest["versions"]["evaclip"] == evaclip.__version__
    again = json.loads((export(tmp_path / "out", tmp_path / "again", "evaclip") / MANIFEST).read_text())
    assert again == manifest  # an export of an export tells of the same run
    parity = manifest["parity"]
    assert parity["min_cosine"] == pytest.approx(1) and parity["max_difference"] == 0 and parity["top_match"] == 1
    assert parity["images"] == len(golden_images())
    assert "same top match" in capfd.readouterr().out


def test_an_open_clip_folder_of_any_shape_may_be_moved(tiny_run, tmp_path):
    folder = export(tiny_run, tmp_path / "here", "open_clip")
    assert (folder / "config.json").exists()
    moved = folder.rename(tmp_path / "there")
    assert load_encoder(moved).space_id == load_encoder(tiny_run).space_id
    with pytest.raises(FileNotFoundError):
        open_clip.create_model(f"local-dir:{moved}")
    addressed = export(moved, tmp_path / "addressed", "open_clip", "--address", f"local-dir:{moved}")
    open_clip.create_model(f"local-dir:{addressed}")


def test_the_bias_of_the_sigmoid_loss_goes_along(run, tiny_shape, tmp_path):
    model = lively(tiny_shape, logit_bias=True)
    folder = export(run(model), tmp_path / "out", "open_clip")
    theirs = open_clip.create_model(f"local-dir:{folder}")
    assert theirs.logit_bias == model.logit_bias[0]
    own = load_encoder(export(folder, tmp_path / "own", "evaclip")).model
    assert torch.equal(own.logit_bias, model.logit_bias) and torch.equal(own.logit_scale, model.logit_scale)


def test_the_activation_of_openais_text_towers_goes_along(run, tiny_shape, tmp_path):
    """The command compares the export with the run, so this fails where the activation is lost."""
    model = lively(replace(tiny_shape, text=replace(tiny_shape.text, activation="quick_gelu")))
    export(run(model), tmp_path / "out", "open_clip")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(CAPTIONS)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.encode_text(tokens), model.encode_text(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["EVA-CLIP-8B", "EVA-CLIP-18B"])
def test_shapes_beyond_open_clip_are_refused_and_have_a_form_of_ours(name, run, tmp_path, capfd):
    model = lively(narrow(name))
    source = run(model)
    for to in ("open_clip", "timm"):
        assert main(["export", str(source), str(tmp_path / to), "--to", to]) == 2
        assert "RMSNorm" in (said := capfd.readouterr().err) and "--to evaclip" in said
        assert not (tmp_path / to).exists()
    own = load_encoder(export(source, tmp_path / "own", "evaclip"))
    expected = encoder_of(model, {})
    assert torch.equal(own.texts(CAPTIONS), expected.texts(CAPTIONS))
    assert own.space_id == expected.space_id
    export(source, tmp_path / "onnx", "onnx", "--towers", "image")


def test_timm_itself_loads_the_image_tower(tiny_run, tmp_path):
    folder = export(tiny_run, tmp_path / "timm", "timm")
    tower = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(tower.pretrained_cfg))
    encoder = load_encoder(tiny_run)
    with torch.inference_mode():
        theirs = F.normalize(tower(transform(PICTURE)[None]), dim=1)
    torch.testing.assert_close(encoder.images(encoder.preprocessing.pixels(PICTURE)[None]), theirs)
    with pytest.raises(InputError, match="holds the image tower alone"):
        load_encoder(folder).texts(CAPTIONS)


@pytest.mark.parametrize(
    ("precision", "tolerance", "share"), [("fp32", 1e-6, 1), ("fp16", 5e-3, 0.6), ("int8", 0.1, 0.4)]
)
def test_onnx_runs_any_batch_and_any_length(tiny_run, tmp_path, precision, tolerance, share):
    folder = export(tiny_run, tmp_path / "onnx", "onnx", "--precision", precision)
    encoder = load_encoder(tiny_run)
    image, text = (onnxruntime.InferenceSession(folder / f"{tower}.onnx") for tower in ("image", "text"))
    for batch in (1, 3):
        pixels = torch.from_numpy(np.random.default_rng(batch).integers(0, 256, (batch, 3, 16, 16), np.uint8))
        given = encoder.preprocessing.normalized(pixels).numpy()
        found = image.run(["image_embeds"], {"pixel_values": given})[0]
        np.testing.assert_allclose(found, encoder.images(pixels).numpy(), atol=tolerance)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        for captions in (["cat"] * batch, ["word " * 100] * batch):
            ids = encoder.tokenizer(captions).numpy().astype(np.int64)
            found = text.run(["text_embeds"], {"input_ids": ids})[0]
            np.testing.assert_allclose(found, encoder.texts(captions).numpy(), atol=tolerance)
    assert not any(b"site-packages" in path.read_bytes() for path in folder.glob("*.onnx")), "paths of this machine"
    weights = (tiny_run / "checkpoints" / "step_00000007" / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < share * weights + 100_000


def test_programs_of_two_models_share_no_cache_and_no_feature_map(run, tiny_shape, tmp_path):
    models = [lively(tiny_shape), lively(tiny_shape)]
    with torch.no_grad():
        models[1].visual.trunk.head.weight.mul_(-1)
    found = [
        load_encoder(export(run(model, f"run{number}"), tmp_path / f"onnx{number}", "onnx"))
        for number, model in enumerate(models)
    ]
    assert cache_of(found[0], tmp_path) != cache_of(found[1], tmp_path)
    assert cache_of(found[0], tmp_path) == cache_of(load_encoder(tmp_path / "onnx0"), tmp_path)
    with pytest.raises(InputError, match="onnx0 is a program"):
        load_image_tower(str(tmp_path / "onnx0"))


def test_the_tokenizer_beside_a_program_gives_the_ids_of_ours(tmp_path):
    write_tokenizer(tmp_path, 77)
    theirs, ours = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), clip_tokenizer(77)
    strange = [
        "It's 3pm; we'LL GO!?",
        "naïve Straße ÉCOLE cafe\u0301 北京 привет 😀 x²",
        "  tabs\tand\nlines ",
        "a1b2 -- 1,234",
        "w " * 99,
    ]
    for caption in [*strange, *(prompt for prompt in PROMPTS if "&" not in prompt)]:
        ids = theirs.encode(caption).ids
        assert ours([caption])[0].tolist() == ids + [0] * (77 - len(ids)), caption


def test_int8_weights_are_within_half_a_step_of_each_channel():
    values = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32) * np.logspace(
        -3, 2, 30, dtype=np.float32
    )
    values[:, 3] = 0
    integers, scale = quantized(values, axis=1)
    assert integers.dtype == np.int8 and np.abs(integers).max() == 127
    assert (np.abs(integers * scale - values) <= scale / 2 * 1.0001).all()


def test_a_program_of_torch_export_runs_any_batch_and_is_not_loaded_unasked(tiny_run, tmp_path):
    folder = export(tiny_run, tmp_path / "program", "torch_export")
    encoder = load_encoder(tiny_run)
    image, text = (torch.export.load(folder / f"{tower}.pt2").module() for tower in ("image", "text"))
    for batch in (1, 5):
        pixels = torch.zeros(batch, 3, 16, 16, dtype=torch.uint8)
        torch.testing.assert_close(image(encoder.preprocessing.normalized(pixels)), encoder.images(pixels))
        captions = ["a word " * batch] * batch
        torch.testing.assert_close(text(encoder.tokenizer(captions).long()), encoder.texts(captions))
    assert not any(b"site-packages" in path.read_bytes() for path in folder.glob("*.pt2")), "paths of this machine"
    with pytest.raises(InputError, match="may run anything when it is loaded"):
        load_encoder(folder)


def test_an_export_that_is_not_the_model_leaves_nothing(tiny_run, tmp_path, capfd, monkeypatch):
    def wrong(values, axis):
        integers, scale = quantized(values, axis)
        return -integers, scale

    monkeypatch.setattr("evaclip.export.int8.quantized", wrong)
    arguments = ["export", str(tiny_run), str(tmp_path / "out"), "--to", "onnx", "--precision", "int8"]
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    assert "the export is not the model: min cosine" in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr("evaclip.export.int8.quantized", lambda values, axis: (values.astype(np.int8), np.ones(1)))
    assert main(arguments) == 2
    assert "the export was written and does not run" in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_parity_sees_another_preprocessing_and_another_tokenizer(tiny_shape):
    encoder = encoder_of(lively(tiny_shape), {})
    assert compare(encoder, encoder, ("image", "text")).holds(1 - 1e-9, 1)
    nearest = replace(encoder, preprocessing=replace(encoder.preprocessing, interpolation="nearest"))
    assert not compare(encoder, nearest, ("image",)).holds(0.9999, 1)
    shouting = replace(encoder, tokenizer=lambda captions: encoder.tokenizer([f"{c}!" for c in captions]))
    assert not compare(encoder, shouting, ("text",)).holds(0.9999, 1)
    broken = lively(tiny_shape)
    with torch.no_grad():
        broken.visual.trunk.head.bias.fill_(float("nan"))
    assert not compare(encoder, encoder_of(broken, {}), ("image",)).holds(0.5, 0)


def test_what_cannot_be_exported_is_one_sentence(tiny_run, tmp_path, capfd):
    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) in (2, 89)
        return capfd.readouterr().err

    out = tmp_path / "out"
    assert "no EVA tower can be expressed as Hugging Face's CLIPModel" in refused(tiny_run, out, "--to", "huggingface")
    assert "timm has image towers only" in refused(tiny_run, out, "--to", "timm", "--towers", "text")
    assert "open_clip loads both towers" in refused(tiny_run, out, "--to", "open_clip", "--towers", "image")
    assert "is for --to onnx" in refused(tiny_run, out, "--to", "open_clip", "--precision", "fp16")
    assert "does not exist" in refused(tmp_path / "nothing", out, "--to", "onnx")
    assert "is not empty" in refused(tiny_run, tiny_run, "--to", "onnx")
    image = export(tiny_run, tmp_path / "image", "evaclip", "--towers", "image")
    assert "has not both towers" in refused(image, out, "--to", "onnx")
    assert not out.exists()


def test_a_changed_export_is_refused(tiny_run, tmp_path):
    folder = export(tiny_run, tmp_path / "own", "evaclip")
    weights = folder / "model.safetensors"
    manifest = json.loads((folder / MANIFEST).read_text())

    def broken(change, says):
        copy = shutil.copytree(folder, tmp_path / "copy")
        change(copy)
        with pytest.raises(InputError, match=says):
            load_encoder(copy)
        shutil.rmtree(copy)

    def rewritten(**fields):
        return lambda copy: (copy / MANIFEST).write_text(json.dumps(manifest | fields))

    state = load_file(weights)
    state["text.text_projection"][0, 0] += 1
    broken(lambda copy: save_file(state, copy / weights.name), "is not the file that was exported")
    broken(lambda copy: (copy / weights.name).unlink(), "is not the file that was exported")
    broken(lambda copy: (copy / MANIFEST).write_text("{"), "is not the manifest of an export")
    broken(rewritten(version=2), "is of version 2, this evaclip reads 1")
    broken(rewritten(format="pickle"), "format")
    broken(rewritten(files={"../run/config.json": {}}), "lies outside of the folder")
    other = manifest["shape"] | {"dim": 25}
    broken(rewritten(shape=other), "cannot be loaded")


def test_timms_configuration_is_plain_numbers():
    for shape in SHAPES.values():
        if not shape.vision.rms_norm:
            config = timm_config(shape, encoder_preprocessing(shape))
            assert json.loads(json.dumps(config))["model_args"]["depth"] == shape.vision.depth


def encoder_preprocessing(shape):
    from evaclip.encoder import Preprocessing

    return Preprocessing(size=shape.vision.image_size)
