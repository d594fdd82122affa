"""`evaclip diagnose`: the page of a teacher and its student, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaclip.cli import main
from evaclip.data.pipeline import Batch
from evaclip.diagnostics.images import some_images
from evaclip.errors import InputError
from evaclip.objectives.distillation import DistillationConfig
from evaclip.train import train
from tests.conftest import encoded, made_pairs
from tests.models.layouts import FAMILIES, shape_of
from tests.objectives.test_distillation import PLAIN, timm_folder
from tests.test_train import final, tiny_run

PICTURES = {"attention_distance", "similarity_of_heads", "average_attention_maps", "loss_landscape",
            "sections_of_the_landscape"}  # fmt: skip


@pytest.fixture
def both(tmp_path, shards):
    """A supervised teacher, and a student that learnt from it for a moment."""
    timm_folder(tmp_path / "teacher")
    objective = DistillationConfig(teacher=str(tmp_path / "teacher"))
    model = replace(shape_of(FAMILIES["eva02"]), dim=40, vision=PLAIN)
    train(tiny_run(tmp_path / "student", shards(), model=model, objective=objective, steps=2))
    return [str(tmp_path / "teacher"), str(tmp_path / "student")]


def test_a_teacher_and_its_student_share_a_page(tmp_path, both, capfd):
    arguments = ["diagnose", *both, "--images", str(tmp_path / "shards"), "--count", "6", "--landscape-images", "4",
                 "--points", "3", "--device", "cpu"]  # fmt: skip
    for name in ("one", "two"):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    said = capfd.readouterr()
    assert f"written to {tmp_path / 'two' / 'diagnosis.html'}" in said.err
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert {name.removesuffix(".png") for name in files if name.endswith(".png")} == PICTURES
    page = files["diagnosis.html"].decode()
    assert page.count("data:image/png;base64") == 5 and page.count("<h2>") == 5
    record = json.loads(files["diagnosis.json"])
    teacher, student = (record["models"][name] for name in both)
    assert np.shape(student["attention_distance_pixels"]) == (2, 3) and np.shape(teacher["loss"]) == (3, 3)
    assert len(teacher["head_similarity"]) == 2 and record["steps"] == [-1.0, 0.0, 1.0]
    # The teacher is its own; the student's centre is the loss that it was trained with.
    assert teacher["loss"][1][1] == 0
    objective = DistillationConfig(teacher=both[0]).build(replace(shape_of(FAMILIES["eva02"]), dim=40, vision=PLAIN), 0)
    objective.student.load_state_dict(final(tmp_path / "student").tensors["model"])
    pixels = torch.stack(
        [
            torch.from_numpy(np.array(image.resize((16, 16), 3))).permute(2, 0, 1)
            for image in some_images(str(tmp_path / "shards"), 6)
        ]
    )[:4]
    batch = Batch(pixels, torch.zeros(4, 1, dtype=torch.int32), torch.arange(4))
    with torch.no_grad():
        assert student["loss"][1][1] == pytest.approx(objective.eval()(batch)[0].item(), rel=1e-5)


def test_without_a_landscape_and_of_one_checkpoint(tmp_path, both):
    step = next((tmp_path / "student" / "checkpoints").iterdir())
    arguments = ["--images", str(tmp_path / "shards"), "--count", "2", "--landscape-images", "0"]
    assert main(["diagnose", str(step), *arguments, "--out", str(tmp_path / "out")]) == 0
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {name for name in PICTURES if "landscape" not in name}
    assert "loss" not in json.loads((tmp_path / "out" / "diagnosis.json").read_text())["models"][str(step)]


def test_images_come_from_files_or_shards_evenly_spread(tmp_path, shards):
    for number, pair in enumerate(made_pairs(6)):
        path = tmp_path / "files" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pair.image)
    order = [0, 2, 4, 1, 3, 5]
    pairs = [np.array(image) for image in some_images(str(tmp_path / "files"), 3)]
    whole = [np.array(image) for image in some_images(str(tmp_path / "files"), 6)]
    assert all(np.array_equal(one, whole[number]) for one, number in zip(pairs, (0, 2, 4), strict=True))
    assert encoded(whole[1]) == made_pairs(6)[order[1]].image
    assert len(some_images(str(shards()), 64)) == 64


def test_what_cannot_be_diagnosed_is_one_sentence(tmp_path, both, capfd):
    shards = str(tmp_path / "shards")

    def refused(sentence, *arguments):
        assert main(["diagnose", *arguments, "--out", str(tmp_path / "no")]) != 0
        assert sentence in capfd.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "no").exists()

    refused("name the models", "--images", shards)
    refused("is named twice", both[0], both[0], "--images", shards)
    refused("--points 4 must be odd", both[0], "--images", shards, "--points", "4")
    refused("holds 64 images and 65 were asked for", both[0], "--images", shards, "--count", "65")
    refused("the images ./nowhere do not exist", both[0], "--images", "./nowhere")
    refused("the model ./nowhere does not exist", "./nowhere", "--images", shards)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(InputError, match=r"a\.jpg cannot be used"):
        some_images(str(tmp_path / "bad"), 1)
