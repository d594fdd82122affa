"""Training on several processes: the samples and losses of one, and checkpoints that any number can continue."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from evaclip.config import EvalConfig, RunConfig
from evaclip.encoder import load_encoder
from evaclip.engine import EngineConfig
from evaclip.evals.card import load_card
from evaclip.evals.features import Setting
from evaclip.evals.layouts import find_images
from evaclip.evals.linear_probe import ProbeConfig
from evaclip.evals.retrieval import RetrievalConfig
from evaclip.evals.zero_shot import ZeroShotConfig, zero_shot
from evaclip.guard.health import GuardConfig
from evaclip.log import read_log
from evaclip.objectives.clip import ClipConfig, ClipObjective
from evaclip.train import train
from tests.evals.test_card_and_layouts import write_folders
from tests.evals.test_retrieval import CARD, karpathy
from tests.models.layouts import FAMILIES, eva_vision, openai_clip, shape_of, text_tower, torchscript
from tests.ranks import in_ranks
from tests.test_faults import poisoned
from tests.test_train import final, losses, tiny_run


def exact_run(folder: Path, shards: Path, **changes) -> RunConfig:
    """Features of the loss in float32: a rounding to 16 bits that falls the other way would show at the fifth digit."""
    objective = ClipConfig(drop_path=0.1, loss_precision="fp32")
    return tiny_run(folder, shards, objective=objective, resume="auto", **changes)


def run(folder: Path, shards: Path, kind: str, micro_batches: int = 1, stop_after: int | None = None, **more) -> int:
    """Trains in this rank; the last rank alone is asked to stop."""
    from evaclip.train import Meter

    engine = EngineConfig(precision="fp32", device="cpu", kind=kind, micro_batches=micro_batches)
    update = Meter.update

    def interrupting(meter, step, metrics):
        update(meter, step, metrics)
        if step == stop_after and dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(signal.SIGTERM)

    Meter.update = interrupting
    return train(exact_run(folder, shards, engine=engine, **more)).step


def several(folder: Path, shards: Path) -> None:
    """Every way of sharing the work, and a run that is stopped, in one group of ranks."""
    card = str(folder / "few.toml")
    scored = EvalConfig(
        every=6,
        zero_shot=(ZeroShotConfig(card=card, data=folder / "cifar", batch=8),),
        retrieval=(RetrievalConfig(card=str(folder / "captions.toml"), data=folder / "captioned", batch=8),),
        probe=(ProbeConfig(card=card, data=folder / "cifar", batch=8),),
    )
    assert run(folder / "ddp", shards, "ddp", evals=scored) == 12
    assert run(folder / "fsdp2", shards, "fsdp2", micro_batches=2, evals=scored) == 12
    poison_of_one_rank(folder / "poisoned", shards)
    assert run(folder / "stopped", shards, "zero1", stop_after=7) == 7


def poison_of_one_rank(folder: Path, shards: Path) -> None:
    """Features that are not finite on the last rank alone: all skip, all go back, all leave the same data out."""
    forward = ClipObjective.forward
    ClipObjective.forward = poisoned(range(144, 176), only_rank=1)
    try:
        train(exact_run(folder, shards, steps=16, guard=GuardConfig(most_skipped=2, window=10)))
    finally:
        ClipObjective.forward = forward


def test_two_ranks_train_as_one_process_does(tmp_path, shards):
    folder = shards()
    train(exact_run(tmp_path / "alone", folder))
    lines = (Path(__file__).parents[1] / "zero_shot" / "cifar10.toml").read_text().splitlines()
    few = "\n".join(line for line in lines if not line.startswith("per_class")).replace("count = 10000", "count = 23")
    (tmp_path / "few.toml").write_text(few)
    write_folders(tmp_path / "cifar")
    shutil.copytree(tmp_path / "cifar" / "test", tmp_path / "cifar" / "train")
    next((tmp_path / "cifar" / "train").glob("*/*.png")).unlink()
    karpathy(tmp_path / "captioned")
    (tmp_path / "captions.toml").write_text(CARD)
    in_ranks(2, several, tmp_path, folder)
    for kind, step in itertools.product(("ddp", "fsdp2"), (6, 12)):
        check_scores(tmp_path, kind, step)
    right = losses(tmp_path / "alone")
    # FSDP2 runs with two micro-batches besides: its sums are taken in yet another order.
    for name, tolerance in (("ddp", 1e-5), ("fsdp2", 5e-5)):
        assert losses(tmp_path / name) == pytest.approx(right, rel=tolerance), name
    # What two ranks under ZeRO left, one process without it continues.
    assert final(tmp_path / "stopped").step == 7
    train(exact_run(tmp_path / "stopped", folder))
    assert losses(tmp_path / "stopped") == pytest.approx(right, rel=5e-5)
    cursor = final(tmp_path / "poisoned").record["cursor"]
    assert cursor["passed_over"] == [[144, 176]] and cursor["position"] == 16 * 16 + 32
    assert final(tmp_path / "stopped").record["cursor"] == final(tmp_path / "alone").record["cursor"]


def check_scores(folder: Path, kind: str, step: int) -> None:
    """What two ranks that shared the work wrote and logged; after the last step also what one process finds."""
    beside = folder / kind / "evals" / f"step_{step:08}"
    logged = {name: value for r in read_log(folder / kind) if r.get("step") == step for name, value in r.items()}
    for name, key in (
        ("cifar10", "zero_shot/cifar10/top1"),
        ("cifar10_probe", "probe/cifar10/linear/top1"),
        ("coco", "retrieval/coco/mean_recall"),
    ):
        found = json.loads((beside / f"{name}.json").read_text())
        assert found["images"] == (12 if name == "coco" else 23) and not found["partial"]
        assert logged[key] == found["metrics"][found["headline"]]
    if step == 12:
        card, encoder = load_card(str(folder / "few.toml")), load_encoder(folder / kind)
        again = zero_shot(encoder, card, find_images(card, folder / "cifar"), Setting(batch=8))
        with np.load(beside / "cifar10.npz") as stored:
            assert np.array_equal(again.ranks, stored["ranks"])


def test_torchrun_starts_it_and_one_rank_talks(tmp_path, shards):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from pathlib import Path\n"
        "from tests.test_train import tiny_run\n"
        f"def mine(): return tiny_run(Path({str(tmp_path / 'run')!r}), Path({str(shards())!r}))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "evaclip"]
    done = subprocess.run(
        [*command, "train", f"{recipe}:mine", "--steps", "3"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 3 steps") == 1
    assert done.stderr.count("from step 0 on 2 x cpu (ddp)") == 1
    assert final(tmp_path / "run").step == 3


def test_a_bad_start_ends_every_rank(tmp_path, shards):
    folder = shards()
    path = next(folder.glob("*.tar"))
    path.write_bytes(b"no tar")
    results = in_ranks(2, failing, tmp_path / "run", folder)
    assert str(path) in results[0]
    assert "the first process stopped" in results[1]


def failing(folder: Path, shards: Path) -> str:
    from evaclip.errors import InputError

    try:
        run(folder, shards, "ddp")
    except InputError as error:
        return str(error)
    return ""


def test_ranks_start_from_weights_that_the_first_reads(tmp_path, shards):
    """FSDP2, whose other ranks hold no values of their own, and an activation that only the file knows."""
    shape = shape_of(FAMILIES["eva02"])
    torch.save(eva_vision(FAMILIES["eva02"], clip=False), tmp_path / "mim.pt")
    torch.jit.save(torchscript(openai_clip() | text_tower()), tmp_path / "text.pt")
    started = {"model": shape, "vision_init": tmp_path / "mim.pt", "text_init": tmp_path / "text.pt", "steps": 3}
    folder = shards()
    train(exact_run(tmp_path / "alone", folder, **started))
    in_ranks(2, starting, tmp_path / "fsdp2", folder, started)
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "alone"), rel=5e-5)


def starting(folder: Path, shards: Path, started: dict) -> None:
    engine = EngineConfig(precision="fp32", device="cpu", kind="fsdp2")
    train(exact_run(folder, shards, engine=engine, **started))
