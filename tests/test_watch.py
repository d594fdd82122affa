"""Scores beside the training: each checkpoint once, the best kept, whatever pruning does meanwhile."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaclip import checkpoint, watch
from evaclip.average import average
from evaclip.checkpoint import CheckpointConfig
from evaclip.cli import main
from evaclip.config import EvalConfig, RunConfig
from evaclip.data.write import write_shards
from evaclip.encoder import load_encoder
from evaclip.errors import CheckpointError
from evaclip.evals.zero_shot import ZeroShot, ZeroShotConfig
from evaclip.log import read_lines, read_log
from evaclip.report.run import write_run_report
from evaclip.train import train
from tests.conftest import made_pairs
from tests.evals.test_card_and_layouts import write_folders
from tests.test_train import same_state, tiny_run


@pytest.fixture(autouse=True)
def drawn(monkeypatch) -> list[Path]:
    """The runs whose report a watch drew anew; drawing takes longer than all the rest."""
    runs: list[Path] = []
    monkeypatch.setattr(watch, "write_run_report", runs.append)
    monkeypatch.setattr("evaclip.train.write_run_report", lambda _: None)
    return runs


def watched(folder: Path) -> RunConfig:
    """Twelve steps with three checkpoints, and a benchmark of 23 images that is left to the watch."""
    shipped = (Path(__file__).parents[1] / "zero_shot" / "cifar10.toml").read_text()
    lines = [line for line in shipped.splitlines() if not line.startswith("per_class")]
    (folder / "few.toml").write_text("\n".join(lines).replace("count = 10000", "count = 23"))
    write_folders(folder / "cifar")
    write_shards(made_pairs(64), folder / "shards", "train", 16)
    benchmark = ZeroShotConfig(card=str(folder / "few.toml"), data=folder / "cifar")
    config = tiny_run(folder / "run", folder / "shards")
    return replace(config, evals=EvalConfig(every=4, beside=True, zero_shot=(benchmark,)))


@pytest.fixture
def recipe(tmp_path) -> RunConfig:
    return watched(tmp_path)


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> RunConfig:
    config = watched(tmp_path_factory.mktemp("once"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaclip.train.write_run_report", lambda _: None)
        train(config)
    return config


@pytest.fixture
def trained(once, tmp_path) -> Path:
    """A copy of the folder of a run that is done."""
    return shutil.copytree(once.run_dir, tmp_path / "run")


def scores(run: Path) -> dict[int, float]:
    return {record["step"]: record["zero_shot/cifar10/top1"] for record in read_lines(run / "evals" / "scores.jsonl")}


def test_every_checkpoint_is_scored_as_in_the_training(tmp_path, recipe, capfd, drawn):
    inside = replace(recipe, run_dir=tmp_path / "inside", evals=replace(recipe.evals, beside=False))
    train(inside)
    train(recipe)
    run = recipe.run_dir
    assert not any("zero_shot/cifar10/top1" in record for record in read_log(run))
    assert main(["watch", str(run), "--device", "cpu"]) == 0
    found = scores(run)
    assert found == {r["step"]: r[key] for r in read_log(tmp_path / "inside") if (key := "zero_shot/cifar10/top1") in r}
    assert list(found) == [4, 8, 12]
    for step in found:
        folder = f"evals/step_{step:08}/cifar10.json"
        assert json.loads((run / folder).read_text())["metrics"]["top1"] == found[step]
    best = max(found, key=lambda step: (found[step], -step))
    for one in (run, tmp_path / "inside"):
        assert checkpoint.marks(one / "checkpoints") == {
            "best": {"step": best, "name": "zero_shot/cifar10/top1", "value": found[best]}
        }
        assert f"best checkpoint: step {best}, zero_shot/cifar10/top1" in write_run_report(one).read_text()
    board = EventAccumulator(str(run / "tensorboard" / "evals")).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("zero_shot/cifar10/top1")] == list(found.items())
    assert "best so far: step" in capfd.readouterr().err and drawn == [run] * 3
    assert "Scores at step 12" in write_run_report(run).read_text()
    assert (run / "report" / "zero-shot_accuracy.png").is_file()
    assert same_state(tmp_path / "inside", run)  # the training is the same


def test_started_again_it_scores_only_what_is_new(recipe, capfd, monkeypatch):
    called = []
    real = ZeroShot.__call__
    monkeypatch.setattr(ZeroShot, "__call__", lambda *a: called.append(1) or real(*a))
    train(replace(recipe, steps=4))
    assert main(["watch", str(recipe.run_dir)]) == 0
    assert main(["watch", str(recipe.run_dir)]) == 0
    assert len(called) == 1
    train(replace(recipe, resume="auto"))
    assert main(["watch", str(recipe.run_dir)]) == 0
    assert len(called) == 3 and list(scores(recipe.run_dir)) == [4, 8, 12]
    # The same step with other weights is another checkpoint.
    shutil.rmtree(recipe.run_dir / "checkpoints" / "step_00000012")
    found = checkpoint.load(recipe.run_dir / "checkpoints" / "step_00000008")
    found.tensors["model"]["logit_scale"] += 0.1
    checkpoint.save(recipe.run_dir / "checkpoints", 12, found.tensors, found.record)
    assert main(["watch", str(recipe.run_dir)]) == 0
    assert len(called) == 4


def test_beside_a_training_that_prunes_the_best_stays(recipe, monkeypatch):
    """The first checkpoint is made the best; the training keeps two, and is never waited for."""
    worth = iter([0.9, 0.5, 0.6, 0.7, 0.8, 0.2, 0.1])
    monkeypatch.setattr(ZeroShot, "__call__", lambda *_: iter([("zero_shot/cifar10/top1", next(worth))]))
    config = replace(recipe, steps=24, checkpoint=CheckpointConfig(every=4, keep=2))
    train(replace(config, steps=4))
    assert main(["watch", str(config.run_dir)]) == 0  # a run of four steps is done
    watcher = threading.Thread(target=main, args=(["watch", str(config.run_dir), "--poll", "0.05"],))
    settings = config.run_dir / "config.json"
    settings.write_text(settings.read_text().replace('"steps": 4', '"steps": 24'))
    watcher.start()
    train(replace(config, resume="auto"))
    watcher.join(60)
    assert not watcher.is_alive()
    kept = [checkpoint.step_of(path) for path in checkpoint.paths(config.run_dir / "checkpoints")]
    assert kept == [4, 20, 24]
    assert checkpoint.marks(config.run_dir / "checkpoints")["best"]["step"] == 4
    assert {4, 24} <= scores(config.run_dir).keys()


@pytest.mark.parametrize("moment", ["before the manifest", "after the hashes"])
def test_a_checkpoint_that_is_pruned_while_it_is_read_is_passed_over(trained, monkeypatch, capfd, moment):
    victim = trained / "checkpoints" / "step_00000008"
    name = "load" if moment == "before the manifest" else "load_file"
    real = getattr(checkpoint, name)

    def pruned(path, *rest, **named):
        if victim.name in str(path):
            shutil.rmtree(victim)
        return real(path, *rest, **named)

    monkeypatch.setattr(checkpoint, name, pruned)
    assert main(["watch", str(trained)]) == 0
    assert "step_00000008 cannot be scored: " in capfd.readouterr().err
    assert list(scores(trained)) == [4, 12]
    assert "scoring" not in checkpoint.marks(trained / "checkpoints")


def test_what_is_being_scored_is_not_pruned(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, {"model": {"a": torch.zeros(1)}}, {})
    checkpoint.mark(tmp_path, "scoring", 1)
    checkpoint.mark(tmp_path, "best", 2, name="x", value=0.5)
    (tmp_path / "damaged.json").write_text("{")
    checkpoint.prune(tmp_path, 2)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)] == [1, 2, 3, 4]
    checkpoint.unmark(tmp_path, "scoring")
    checkpoint.unmark(tmp_path, "scoring")
    checkpoint.mark(tmp_path, "best", 4)
    checkpoint.prune(tmp_path, 2)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)] == [3, 4]


def test_it_can_end_before_the_run_and_says_so(recipe, capfd):
    train(replace(recipe, steps=4))
    settings = recipe.run_dir / "config.json"
    settings.write_text(settings.read_text().replace('"steps": 4', '"steps": 9'))
    assert main(["watch", str(recipe.run_dir), "--idle-minutes", "0", "--poll", "0.01"]) == 0
    assert "the run is not done, but the watch ends" in capfd.readouterr().err
    assert list(scores(recipe.run_dir)) == [4]


def test_bad_input_is_one_sentence(tmp_path, recipe, capfd):
    train(replace(recipe, steps=4))

    def refused(*arguments: str) -> str:
        assert main(["watch", str(recipe.run_dir), *arguments]) in (2, 89)
        return capfd.readouterr().err.strip().splitlines()[-1]

    assert "did you mean cifar10" in refused("--datasets", "cifar11")
    assert "CIFAR-10 is not at" in refused("--datasets", "cifar10", "--data-root", str(tmp_path / "none"))
    assert "no score has that name; did you mean" in refused("--best", "zero_shot/cifar10/top2")
    settings = recipe.run_dir / "config.json"
    record = json.loads(settings.read_text())
    settings.write_text(json.dumps(record | {"evals": {}}))
    assert "has no benchmarks in its configuration; name some: --datasets" in refused()
    assert main(["watch", str(tmp_path / "rum")]) == 89
    assert "did you mean" in capfd.readouterr().err


def test_the_average_is_the_mean_and_a_model(tmp_path, once, trained, capfd):
    folder = trained / "checkpoints"
    states = [checkpoint.load(path).tensors["model"] for path in reversed(checkpoint.paths(folder))]
    for last, decay in ((3, 1.0), (2, 1.0), (3, 0.5), (1, 1.0)):
        steps, mean = average(folder, last, decay)
        weights = [decay**n for n in range(last)]
        assert steps == [12, 8, 4][:last]
        for name, value in mean.items():
            expected = sum(w * s[name].double() for w, s in zip(weights, states, strict=False)) / sum(weights)
            assert value.dtype == states[0][name].dtype and torch.equal(value, expected.to(value.dtype)), name
    assert torch.equal(average(folder, 1)[1]["logit_scale"], states[0]["logit_scale"])
    arguments = ["average", str(trained), "--out", str(tmp_path / "mean"), "--last", "2"]
    assert main(arguments) == 0
    encoder = load_encoder(tmp_path / "mean")
    model = encoder.model
    assert encoder.origin["averaged"] == "12, 8"
    assert torch.equal(model.state_dict()["logit_scale"], average(folder, 2)[1]["logit_scale"])
    (benchmark,) = once.evals.zero_shot
    card, data = benchmark.card, str(benchmark.data)
    assert main(["zeroshot", "--dataset", card, "--data", data, "--model", str(tmp_path / "mean")]) == 0
    assert main(arguments) == 2
    assert "already holds a run or an average" in capfd.readouterr().err


def test_damaged_checkpoints_are_left_out_of_the_average(tmp_path, trained, capfd):
    folder = trained / "checkpoints"
    (folder / "step_00000008" / "model.safetensors").write_bytes(b"junk")
    assert average(folder, 2)[0] == [12, 4]
    with pytest.raises(CheckpointError, match=r"has 2 whole checkpoints, 3 are to be averaged: .*--checkpoint.keep"):
        average(folder, 3)
    out = ["--out", str(tmp_path / "x")]
    assert main(["average", str(trained), *out, "--decay", "0"]) == 2
    assert main(["average", str(tmp_path / "nothing"), *out]) == 89
    assert not (tmp_path / "x").exists()


def test_one_checkpoint_of_a_run_is_a_model(trained):
    folder = trained / "checkpoints"
    for step in (4, 12):
        encoder = load_encoder(folder / f"step_{step:08}")
        assert encoder.origin["step"] == str(step) and encoder.origin["run"] == str(trained)
        expected = checkpoint.load(folder / f"step_{step:08}").tensors["model"]["logit_scale"]
        assert torch.equal(encoder.model.state_dict()["logit_scale"], expected)
    assert watch.print_of(folder / "step_00000004") != watch.print_of(folder / "step_00000012")
