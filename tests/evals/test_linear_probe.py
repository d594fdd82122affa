"""The probe against scikit-learn, the neighbours too, and the command on a made set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from evaclip import checkpoint
from evaclip.cli import main
from evaclip.config import EvalConfig
from evaclip.encoder import load_encoder
from evaclip.errors import InputError
from evaclip.evals import linear_probe
from evaclip.evals.linear_probe import ProbeConfig, chosen_decay, fitted, logits_of, neighbour_votes
from evaclip.models.clip import Clip
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.records import unstructured
from tests.conftest import encoded


def blobs(count: int, classes: int, seed: int, spread: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows around one direction a class."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    labels = torch.arange(count) % classes
    rows = centres[labels] + spread * torch.randn(count, 6, generator=random, dtype=torch.float64)
    return F.normalize(rows, dim=1), labels


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_fit_is_scikit_learns(decay, classes, monkeypatch):
    features, labels = blobs(120, classes, 0)
    monkeypatch.setattr(linear_probe, "ROWS", 50)  # in uneven parts
    weights = fitted(features, labels, classes, decay)
    # Of two classes it learns one vector, the difference of ours, whose penalty is twice that of the two halves.
    strength = decay * len(labels) / (2 if classes == 2 else 1)
    theirs = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-12, max_iter=10_000)
    theirs.fit(features.numpy(), labels.numpy())
    expected = theirs.predict_proba(features.numpy())
    assert torch.allclose(logits_of(weights, features).softmax(1), torch.from_numpy(expected), atol=1e-5)


def test_float32_is_as_good():
    features, labels = blobs(120, 5, 0)
    exact, single = fitted(features, labels, 5, 1e-3), fitted(features.float(), labels, 5, 1e-3)
    assert torch.allclose(logits_of(single, features.float()).double(), logits_of(exact, features), atol=5e-3)


def test_the_decay_is_the_best_on_images_that_were_held_out(capfd):
    features, labels = blobs(200, 4, 1, spread=2.0)
    decay, tried = chosen_decay(features, labels, 4, 0.25, 0)
    assert len(tried) == 9 and tried[decay] == max(tried.values())
    assert all(other <= decay for other, value in tried.items() if value == tried[decay])
    assert "of 50 held-out training images" in capfd.readouterr().err
    assert chosen_decay(features, labels, 4, 0.25, 0) == (decay, tried)
    assert chosen_decay(features, labels, 4, 0.25, 1)[1] != tried
    with pytest.raises(InputError, match="too few to hold out"):
        chosen_decay(features[:2], labels[:2], 4, 0.1, 0)


@pytest.mark.parametrize("neighbours", [1, 7, 500])
def test_neighbours_vote_as_scikit_learns_do(neighbours, monkeypatch):
    train, labels = blobs(150, 4, 2, spread=1.5)
    test, _ = blobs(90, 4, 3, spread=1.5)
    monkeypatch.setattr(linear_probe, "ROWS", 100)
    votes = neighbour_votes(train, labels, test, 4, neighbours)
    theirs = KNeighborsClassifier(
        min(neighbours, 150), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(train.numpy(), labels.numpy())
    expected = theirs.predict_proba(test.numpy())
    assert torch.allclose(votes / votes.sum(1, keepdim=True), torch.from_numpy(expected), atol=1e-9)


CARD = """name = "colours"
title = "Colours"
classes = ["red", "green", "blue"]
templates = ["{}"]
layouts = ["class_folders"]
count = 15
source = "made"
licence = "none"
"""


@pytest.fixture
def made(tmp_path) -> list[str]:
    """A card, images of three colours, and an untrained model: `evaclip probe` of them."""
    (tmp_path / "colours.toml").write_text(CARD)
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 15)):
        for number in range(count):
            pixels = random.integers(0, 90, (16, 16, 3))
            pixels[..., number % 3] += 150
            path = tmp_path / "data" / part / ["red", "green", "blue"][number % 3] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(pixels.astype(np.uint8)))
    config = eva02_tiny_digits()
    torch.manual_seed(0)
    model = Clip(config.model)
    with torch.no_grad():
        for p in model.visual.parameters():
            p.add_(0.1 * torch.randn_like(p))
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, {"model": model.state_dict()}, {})
    (tmp_path / "run" / "config.json").write_text(json.dumps(unstructured(config)))
    return [
        "probe", "--dataset", str(tmp_path / "colours.toml"), "--data", str(tmp_path / "data"),
        "--model", str(tmp_path / "run"), "--workers", "0",
    ]  # fmt: skip


def test_the_command_fits_prints_and_writes(tmp_path, made, capfd):
    assert main(made) == 0
    assert "Colours, linear probe: EVA02-tiny-digits, step 7, 60 training images, 15 test" in capfd.readouterr().out
    path = tmp_path / "run" / "scores" / "colours_probe.json"
    record = json.loads(path.read_text())
    assert record["metrics"] == {"linear/top1": 1.0, "neighbours/top1": 1.0}
    assert record["model"]["step"] == "7" and record["protocol"]["training_images"] == 60
    assert record["protocol"]["held_out_accuracy"][f"{record['protocol']['weight_decay']:.3g}"] == 1.0
    first = path.read_text()
    assert main([*made, "--batch", "7"]) == 0
    assert json.loads(path.read_text())["metrics"] == json.loads(first)["metrics"]
    assert main(["compare", str(path), str(path)]) == 0
    assert "neighbours" in capfd.readouterr().out


def test_beside_the_training_it_yields_names_and_values(tmp_path, made):
    part = ProbeConfig(card=str(tmp_path / "colours.toml"), data=tmp_path / "data")
    built = EvalConfig(probe=(part,)).build()
    model = load_encoder(tmp_path / "run").model
    pairs = dict(built["probe/colours"](model, torch.device("cpu"), tmp_path / "out"))
    assert pairs == {"probe/colours/linear/top1": 1.0, "probe/colours/neighbours/top1": 1.0}
    assert (tmp_path / "out" / "colours_probe.npz").is_file()


def test_bad_input_is_one_sentence(tmp_path, made, capfd):
    def refused(*more: str) -> str:
        assert main([*made, *more]) == 2
        return capfd.readouterr().err.strip().splitlines()[-1]

    assert "held_out must lie between 0 and 1" in refused("--held-out", "1")
    victim: Path = sorted(tmp_path.glob("data/train/*/*.png"))[3]
    victim.write_bytes(b"junk")
    assert f"1 of 60 files of Colours cannot be read, {victim.parent.name}/{victim.name} for one" in refused()
    assert main([*made, "--allow-partial"]) == 0
    assert "59 training images, 15 test" in (said := capfd.readouterr().out) and "1 files could not be read" in said
    (line,) = (tmp_path / "run" / "scores" / "colours_probe.bad.jsonl").read_text().splitlines()
    assert json.loads(line)["part"] == "train" and json.loads(line)["key"].endswith(victim.name)
    victim.unlink()
    test = tmp_path / "data" / "test" / "red" / "00.png"
    test.unlink()
    assert "15 test images, 14 were found" in refused()
    (tmp_path / "data" / "test").rename(tmp_path / "flat")
    assert "has no training part of Colours" in refused("--data", str(tmp_path / "flat"))
