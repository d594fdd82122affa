"""Benchmarks of every kind shared by 1, 2 and 4 processes: the same files, byte for byte but for date and speed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evaclip import checkpoint, distributed
from evaclip.cli import main
from evaclip.encoder import Encoder
from evaclip.evals import linear_probe, retrieval
from evaclip.evals.card import load_card
from evaclip.evals.scores import OF_THE_RUN
from evaclip.models.clip import Clip
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.records import unstructured
from tests.conftest import encoded
from tests.evals.test_retrieval import CARD, NAMES, karpathy
from tests.ranks import in_ranks

CIFAR = load_card("cifar10")


def made_run(folder: Path) -> Path:
    """A run whose towers are random and far from any symmetry."""
    torch.manual_seed(0)
    config = eva02_tiny_digits()
    model = Clip(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    checkpoint.save(folder / "checkpoints", 7, {"model": model.state_dict()}, {})
    (folder / "config.json").write_text(json.dumps(unstructured(config)))
    return folder


def made_data(folder: Path) -> None:
    """Images of CIFAR-10's classes in two parts, and images with captions; one of each set is damaged."""
    random = np.random.default_rng(0)
    for part, count in (("test", 61), ("train", 50)):
        for number in range(count):
            path = folder / "data" / part / CIFAR.classes[number % 10] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)))
        (folder / "data" / part / "cat" / "003.png").write_bytes(b"junk")
    karpathy(folder / "captioned")
    (folder / "captioned" / "images" / NAMES[5]).write_bytes(b"junk")
    (folder / "few.toml").write_text(CARD)


def scored(folder: str, name: str, cache: str) -> list[int]:
    """The exit statuses of one process; the first writes. Parts are small, so that each process has several or none."""
    torch.set_num_threads(1)
    words = ["--model", f"{folder}/run", "--out", f"{folder}/{name}", "--cache", f"{folder}/{cache}"]
    words += ["--batch", "8", "--workers", "0"]
    cifar = ["--dataset", "cifar10", "--data", f"{folder}/data", *words]
    few = ["retrieval", "--dataset", f"{folder}/few.toml", "--data", f"{folder}/captioned", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "ROWS", 3)
        patch.setattr(linear_probe, "TEST_ROWS", 7)
        patch.setattr(distributed, "PIECE", 5)
        refused = [main(["zeroshot", *cifar]), main(few)]
        return refused + [main([*one, "--allow-partial"]) for one in (["zeroshot", *cifar], ["probe", *cifar], few)]


def ours(folder: Path, name: str) -> dict:
    record = json.loads((folder / f"{name}.json").read_text())
    return {name: value for name, value in record.items() if name not in OF_THE_RUN}


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_writes_the_same(tmp_path, world):
    made_run(tmp_path / "run")
    made_data(tmp_path)
    threads = torch.get_num_threads()
    alone = scored(str(tmp_path), "alone", "cache_of_one")
    torch.set_num_threads(threads)
    together = in_ranks(world, scored, str(tmp_path), "together", "cache_of_many")
    assert together == [[2, 2, 0, 0, 0]] * world == [alone] * world
    for name, counted in (("cifar10", 60), ("cifar10_probe", 60), ("coco", 11)):
        assert ours(tmp_path / "together", name) == ours(tmp_path / "alone", name)
        assert ours(tmp_path / "together", name)["coverage"]["scored"] == counted
        speed = json.loads((tmp_path / "together" / f"{name}.json").read_text())["speed"]
        # The probe finds what was encoded to score zero-shot, retrieval what it had when it refused.
        assert speed["from_cache"] == {"cifar10": 0, "cifar10_probe": 61, "coco": 12}[name]
        one, many = (np.load(tmp_path / way / f"{name}.npz") for way in ("alone", "together"))
        assert one.files == many.files and all(np.array_equal(one[part], many[part]) for part in one.files)
        ledgers = [(tmp_path / way / f"{name}.bad.jsonl").read_text() for way in ("alone", "together")]
        assert ledgers[0] == ledgers[1] and len(ledgers[0].splitlines()) == (2 if "probe" in name else 1)
    # The caches hold the same blocks, so one process goes on from what several began, and the other way round.
    caches = [sorted(p.relative_to(tmp_path / c) for p in (tmp_path / c).rglob("*.safetensors"))
              for c in ("cache_of_one", "cache_of_many")]  # fmt: skip
    # A classifier, 61 and 50 images, whose test part serves two benchmarks, 12 images and 63 captions.
    assert caches[0] == caches[1] and len(caches[0]) == 1 + 8 + 7 + 2 + 8
    for path in caches[0]:
        one, many = (load_file(tmp_path / cache / path) for cache in ("cache_of_one", "cache_of_many"))
        assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def scored_by_one_that_diverged(folder: str) -> list[int]:
    """The same of a model that makes no number of a single image, so that one process alone meets it."""
    usual = Encoder.images

    def images(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        found = usual(encoder, pixels)
        return found / (pixels.flatten(1).float().mean(1, keepdim=True) > 0)  # of a black one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "images", images)
        return scored(folder, "diverged", "cache_of_diverged")


def test_a_process_that_meets_what_is_no_number_does_not_leave_the_others_waiting(tmp_path):
    made_run(tmp_path / "run")
    made_data(tmp_path)
    for path in (
        tmp_path / "data" / "test" / CIFAR.classes[9] / "059.png",
        tmp_path / "captioned" / "images" / NAMES[9],
    ):
        Image.new("RGB", (24, 20)).save(path)
    assert in_ranks(2, scored_by_one_that_diverged, str(tmp_path)) == [[2] * 5] * 2
