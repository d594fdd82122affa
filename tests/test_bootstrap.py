"""Towers that start from somebody's weights, at the command line: recorded, applied once, refused in one sentence."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch

from evaclip.cli import main
from evaclip.config import load_config
from evaclip.encoder import load_encoder
from evaclip.errors import InputError
from evaclip.recipes import RECIPES
from evaclip.train import train
from tests.models.layouts import FAMILIES, eva_clip, eva_vision, openai_clip, shape_of, text_tower, torchscript
from tests.test_train import final, same_state, tiny_run

# Learning rates of nothing: what a run ends with is what it began with.
STILL = ("--optim.vision.lr", "0", "--optim.text.lr", "0", "--optim.lr", "0")


@pytest.fixture
def run(tmp_path, shards, monkeypatch):
    """`evaclip train small`, the EVA-02 of the made checkpoints; extra arguments, returns status and folder."""
    folder, count = shards(), iter(range(100))
    shape = shape_of(FAMILIES["eva02"])

    def start(*arguments, at=None):
        run_dir = at or tmp_path / f"run{next(count)}"
        monkeypatch.setitem(RECIPES, "small", lambda: tiny_run(run_dir, folder, model=shape, steps=2))
        return main(["train", "small", *map(str, arguments)]), run_dir

    return start


@pytest.fixture
def files(tmp_path):
    """An EVA-02 after masked image modelling, at another patch size, and OpenAI's archive."""
    torch.save({"module": eva_vision(FAMILIES["eva02"], clip=False, patch=3)}, tmp_path / "mim.pt")
    torch.jit.save(torchscript(openai_clip() | text_tower()), tmp_path / "openai.pt")
    return tmp_path / "mim.pt", tmp_path / "openai.pt"


def test_each_tower_starts_from_its_own_file_once_and_the_run_says_so(tmp_path, run, files, capfd):
    vision, text = files
    started = ("--vision-init", vision, "--text-init", text, "--init-resize", "timm")
    status, folder = run(*started, "--steps", 0)
    assert status == 0
    config = load_config(folder)
    assert config.vision_init == vision and config.init_resize == "timm"
    assert config.vision_init_sha256 == hashlib.sha256(vision.read_bytes()).hexdigest()
    assert config.text_init_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert config.model.text.activation == "quick_gelu"
    said = capfd.readouterr().err
    for line in ("[48, 3, 3, 3] -> [48, 3, 4, 4], timm", "projection to another joint space", "head of masked image",
                 "text tower: quick_gelu, which it was trained with", "a size, not a weight"):  # fmt: skip
        assert line in said
    status, folder = run(*started, *STILL, "--steps", 1)
    state = final(folder).tensors["model"]
    assert torch.equal(state["visual.trunk.cls_token"], eva_vision(FAMILIES["eva02"], clip=False)["cls_token"])
    assert torch.equal(state["text.positional_embedding"], text_tower()["positional_embedding"].half().float())
    assert load_encoder(folder).model.shape.text.activation == "quick_gelu"


def test_a_run_goes_on_without_the_files_and_as_if_never_stopped(run, files, capfd):
    vision, text = files
    started = ("--vision-init", vision, "--text-init", text)
    _, whole = run(*started, "--steps", 6)
    parts = whole.with_name("parts")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_00000006")
    vision.unlink()
    text.unlink()
    capfd.readouterr()
    assert run(*started, "--steps", 6, "--resume", "auto", at=parts)[0] == 0
    said = capfd.readouterr().err
    assert "continuing from step 4" in said and "since the run began: vision_init" not in said
    assert same_state(whole, parts) and load_config(parts).vision_init_sha256 == load_config(whole).vision_init_sha256
    assert load_config(parts).model.text.activation == "quick_gelu"


def test_one_file_for_both_towers_brings_projections_and_logit_scale(tmp_path, run, capfd):
    state = eva_clip(FAMILIES["eva02"])
    torch.save(state, tmp_path / "clip.pt")
    both = ("--vision-init", tmp_path / "clip.pt", "--text-init", tmp_path / "clip.pt")
    _, folder = run(*both, *STILL, "--steps", 1)
    ended = final(folder).tensors["model"]
    assert torch.equal(ended["text.text_projection"], state["text.text_projection"])
    assert ended["logit_scale"].tolist() == [3.5]
    said = capfd.readouterr().err
    assert ", 0 renewed," in said and "gelu, since the file does not say" in said
    _, continued = run("--vision-init", folder, "--text-init", folder, *STILL, "--steps", 1)  # a run is one as well
    again = final(continued).tensors["model"]
    assert all(torch.equal(again[name], ended[name]) for name in ended) and load_config(continued).vision_init == folder


def test_the_activation_may_be_asked_for(run, files, capfd):
    status, folder = run("--text-init", files[1], "--model.text.activation", "gelu", "--steps", 1)
    assert status == 0 and load_config(folder).model.text.activation == "gelu"
    said = capfd.readouterr().err
    assert "gelu as asked for, although" in said and "was trained with quick_gelu" in said
    assert "visual.trunk.blocks.*.attn.norm.weight" in said and "no file for this tower" in said


def test_bad_beginnings_are_one_sentence_and_leave_no_run(tmp_path, run, files, capfd):
    vision, text = files

    def refused(sentence, *arguments, status=89):
        found, folder = run(*arguments)
        said = capfd.readouterr().err
        last = said.strip().splitlines()[-1]
        assert found == status and last.startswith("evaclip: ") and sentence in last and "Traceback" not in said
        assert not (folder / "config.json").exists()

    refused("do not exist; did you mean", "--vision-init", tmp_path / "min.pt")
    refused("is not the file that was asked for", "--vision-init", vision, "--vision-init-sha256", "0" * 64)
    refused("plain vision transformer and not an EVA", "--vision-init", text)
    refused("has no text tower", "--text-init", vision)
    refused("is [1, 1, 48] there and [1, 1, 24]", "--vision-init", vision, "--model.vision.width", 24,
            "--model.vision.heads", 1)  # fmt: skip
    refused("a patch of 5 px does not divide an image of 16 px", "--model.vision.patch-size", 5, status=2)
    vision.write_bytes(vision.read_bytes()[:3000])
    refused("damaged or cut short", "--vision-init", vision)
    with pytest.raises(InputError, match="--start-from is a whole run"):
        replace(RECIPES["small"](), start_from=tmp_path, vision_init=vision)


def test_an_older_runs_configuration_is_still_read(tmp_path, shards):
    train(tiny_run(tmp_path / "old", shards(), steps=1))
    path = tmp_path / "old" / "config.json"
    record = json.loads(path.read_text())
    for name in ("vision_init", "text_init", "init_resize", "vision_init_sha256", "text_init_sha256"):
        del record[name]
    del record["model"]["text"]["activation"]
    path.write_text(json.dumps(record))
    assert load_config(tmp_path / "old").model.text.activation == "auto"
