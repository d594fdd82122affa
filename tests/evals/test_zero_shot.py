"""The evaluator against open_clip's classifier and an oracle; scores at the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from statsmodels.stats.proportion import proportion_confint

from evaclip.cli import main
from evaclip.curate.caption import load_caption_recipe
from evaclip.data.tokenizer import clip_tokenizer
from evaclip.data.transforms import evaluation_pixels, normalized
from evaclip.encoder import encoder_of
from evaclip.errors import InputError
from evaclip.evals.card import load_card
from evaclip.evals.classifier import class_embeddings
from evaclip.evals.features import Setting
from evaclip.evals.layouts import find_images
from evaclip.evals.zero_shot import check_count, ranked, zero_shot
from evaclip.models.clip import Clip
from evaclip.train import train
from tests.evals.test_card_and_layouts import write_folders
from tests.test_train import tiny_run

CIFAR = load_card("cifar10")


@pytest.fixture
def model(tiny_shape) -> Clip:
    torch.manual_seed(0)
    model = Clip(tiny_shape).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def test_class_embeddings_are_open_clips(model):
    class Wrapped(torch.nn.Module):
        def encode_text(self, tokens, normalize):
            features = model.encode_text(tokens)
            return F.normalize(features, dim=-1) if normalize else features

    templates = [lambda name, t=t: t.format(name) for t in CIFAR.templates]
    expected = open_clip.build_zero_shot_classifier(Wrapped(), clip_tokenizer(), list(CIFAR.classes), templates)
    assert torch.allclose(class_embeddings(encoder_of(model, {}), CIFAR), expected.T, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_predictions_are_the_plain_computation(model, tmp_path, batch):
    write_folders(tmp_path)
    images = find_images(CIFAR, tmp_path)
    result = zero_shot(encoder_of(model, {}), CIFAR, images, Setting(batch=batch))
    pixels = torch.stack([evaluation_pixels(images.open(n), 16) for n in range(len(images))])
    with torch.no_grad():
        logits = (
            F.normalize(model.encode_image(normalized(pixels)), dim=1)
            @ class_embeddings(encoder_of(model, {}), CIFAR).T
        )
    assert np.array_equal(result.predictions, logits.argmax(1).numpy())
    assert result.accuracy(1) == np.mean(logits.argmax(1).numpy() == images.labels)
    top5 = (logits.topk(5, 1).indices == torch.from_numpy(images.labels)[:, None]).any(1).float().mean().item()
    assert result.accuracy(5) == pytest.approx(top5)


def test_ties_go_to_the_class_named_first():
    logits = torch.tensor([[0.5, 0.9, 0.9, 0.1], [0.9, 0.1, 0.9, 0.9], [0.2, 0.2, 0.2, 0.2]])
    best, before = ranked(logits, torch.tensor([2, 0, 3]))
    assert best.tolist() == [1, 0, 0]
    assert before.tolist() == [1, 0, 3]


def test_intervals_are_wilsons(model, tmp_path):
    write_folders(tmp_path)
    result = zero_shot(encoder_of(model, {}), CIFAR, find_images(CIFAR, tmp_path))
    correct = int((result.ranks < 1).sum())
    assert result.interval(1) == pytest.approx(proportion_confint(correct, len(result.ranks), method="wilson"))


def test_wrong_counts_are_refused_unless_partial_is_asked_for(tmp_path):
    write_folders(tmp_path)
    images = find_images(CIFAR, tmp_path)
    with pytest.raises(InputError, match=r"CIFAR-10 has 10,000 test images, 23 were found in layout class_folders"):
        check_count(CIFAR, images)
    check_count(CIFAR, images, allow_partial=True)


@pytest.fixture
def trained(tmp_path, shards) -> Path:
    train(tiny_run(tmp_path / "run", shards(), steps=2))
    return tmp_path / "run"


def test_the_command_prints_a_score_and_writes_what_it_takes_to_trust_it(trained, tmp_path, capfd):
    write_folders(tmp_path / "cifar")
    arguments = ["zeroshot", "--dataset", "cifar10", "--data", str(tmp_path / "cifar"), "--model", str(trained)]
    assert main(arguments) == 2
    assert "--allow-partial scores what is there" in capfd.readouterr().err
    assert main([*arguments, "--allow-partial"]) == 0
    said = capfd.readouterr()
    assert "CIFAR-10: tiny, 23 images (partial data)" in said.out and "top1" in said.out
    record = json.loads((trained / "scores" / "cifar10.json").read_text())
    assert record["images"] == 23 and record["partial"] and record["model"]["step"] == "2"
    assert record["protocol"]["templates"] == 18 and len(record["protocol"]["prompts_sha256"]) == 64
    assert record["data"]["layout"] == "class_folders" and torch.__version__.startswith(record["versions"]["torch"])
    again = json.dumps(record["metrics"])
    assert main([*arguments, "--allow-partial", "--batch", "5", "--workers", "0"]) == 0
    assert json.dumps(json.loads((trained / "scores" / "cifar10.json").read_text())["metrics"]) == again


def test_models_that_are_no_run_are_one_sentence(trained, tmp_path, capfd):
    write_folders(tmp_path / "cifar")
    arguments = ["zeroshot", "--dataset", "cifar10", "--allow-partial", "--data", str(tmp_path / "cifar"), "--model"]
    assert main([*arguments, str(tmp_path)]) == 89
    assert "is not the folder of a run" in capfd.readouterr().err
    for path in trained.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"x")
    assert main([*arguments, str(trained)]) == 89
    assert "is whole; the newest" in capfd.readouterr().err


def test_evaluation_beside_the_training_lands_in_log_and_report(tmp_path, shards):
    from evaclip.config import EvalConfig
    from evaclip.log import read_log

    card = tmp_path / "few.toml"
    shipped = (Path(__file__).parents[2] / "zero_shot" / "cifar10.toml").read_text()
    card.write_text(shipped.replace("count = 10000", "count = 23").replace("per_class = 1000", ""))
    write_folders(tmp_path / "CIFAR-10")  # found below --evals.data-root by its name
    config = tiny_run(tmp_path / "run", shards(), steps=6)
    train(replace(config, evals=EvalConfig(every=4, datasets=(str(card),), data_root=tmp_path)))
    scored = [r["step"] for r in read_log(tmp_path / "run") if "zero_shot/cifar10/top1" in r]
    assert scored == [4, 6]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Scores at step 6" in page and "CIFAR-10: confusion" in page
    names = {path.stem for path in (tmp_path / "run" / "report").glob("*.png")}
    assert {"loss", "zero-shot_accuracy", "grid_of_cifar10", "confusion_of_cifar10"} <= names


def test_captioned_shards_hold_every_image_with_its_class(tmp_path):
    import webdataset

    write_folders(tmp_path / "cifar")
    (tmp_path / "cifar" / "test").rename(tmp_path / "cifar" / "train")
    arguments = ["data", "caption", "cifar10", "--data", str(tmp_path / "cifar"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    images = find_images(CIFAR, tmp_path / "cifar", "train")
    expected = sorted((images.open(n).tobytes(), CIFAR.classes[images.labels[n]]) for n in range(len(images)))
    dataset = webdataset.WebDataset(str(next((tmp_path / "out").glob("*.tar"))), shardshuffle=False).decode("pil")
    found = []
    captions = set()
    for sample in dataset:
        name = next(c for c in CIFAR.classes if c in sample["txt"])
        found.append((sample["png"].tobytes(), name))
        captions.add(sample["txt"].replace(name, "{}"))
    assert sorted(found) == expected
    assert captions <= set(load_caption_recipe("cifar10").captions) and len(captions) > 5
    assert main([*arguments[:2], "cifar12", *arguments[3:]]) == 2
