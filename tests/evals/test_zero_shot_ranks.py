"""One benchmark shared by 1, 2 and 4 processes: the same file, byte for byte but for date and speed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaclip import checkpoint
from evaclip.cli import main
from evaclip.evals.card import load_card
from evaclip.evals.scores import OF_THE_RUN
from evaclip.models.clip import Clip
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.records import unstructured
from tests.conftest import encoded
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


def made_data(folder: Path, count: int = 61) -> Path:
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / "test" / CIFAR.classes[number % 10] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)))
    (folder / "test" / "cat" / "003.png").write_bytes(b"junk")
    return folder


def scored(folder: str, name: str, cache: str) -> dict:
    """What one process is told, and what the first one wrote."""
    torch.set_num_threads(1)
    words = ["zeroshot", "--dataset", "cifar10", "--model", f"{folder}/run", "--data", f"{folder}/data"]
    words += ["--out", f"{folder}/{name}", "--cache", f"{folder}/{cache}", "--batch", "8", "--workers", "0"]
    status = [main(words), main([*words, "--allow-partial"])]
    return {"status": status}


def ours(folder: Path) -> dict:
    record = json.loads((folder / "cifar10.json").read_text())
    return {name: value for name, value in record.items() if name not in OF_THE_RUN}


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_writes_the_same(tmp_path, world):
    made_run(tmp_path / "run")
    made_data(tmp_path / "data")
    threads = torch.get_num_threads()
    alone = scored(str(tmp_path), "alone", "cache_of_one")
    torch.set_num_threads(threads)
    together = in_ranks(world, scored, str(tmp_path), "together", "cache_of_many")
    assert [answer["status"] for answer in together] == [[2, 0]] * world == [alone["status"]] * world
    assert ours(tmp_path / "together") == ours(tmp_path / "alone")
    assert ours(tmp_path / "together")["coverage"]["scored"] == 60
    one, many = (np.load(tmp_path / name / "cifar10.npz") for name in ("alone", "together"))
    assert all(np.array_equal(one[name], many[name]) for name in one.files)
    ledgers = [(tmp_path / name / "cifar10.bad.jsonl").read_text() for name in ("alone", "together")]
    assert ledgers[0] == ledgers[1] and "cat/003.png" in ledgers[0]
    # The caches hold the same blocks, so one process goes on from what several began, and the other way round.
    caches = [sorted(p.relative_to(tmp_path / c) for p in (tmp_path / c).rglob("*.safetensors"))
              for c in ("cache_of_one", "cache_of_many")]  # fmt: skip
    assert caches[0] == caches[1] and len(caches[0]) == 1 + 8
    for path in caches[0]:
        one, many = (load_file(tmp_path / cache / path) for cache in ("cache_of_one", "cache_of_many"))
        assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
