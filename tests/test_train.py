"""The training loop at the command line: it learns, continues bit for bit, stops when asked, and explains itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaclip import checkpoint
from evaclip.cli import main
from evaclip.config import RunConfig
from evaclip.data.shards import DataConfig, SourceConfig
from evaclip.encoder import clip_of_run
from evaclip.engine import EngineConfig
from evaclip.errors import DivergedError
from evaclip.log import LogConfig, read_log
from evaclip.models.shapes import TextShape, eva02_small
from evaclip.objectives.clip import ClipConfig
from evaclip.optim import OptimConfig, TowerRates
from evaclip.recipes import RECIPES
from evaclip.train import train


def tiny_run(folder: Path, shards: Path, **changes) -> RunConfig:
    """Twelve steps of a tiny model; a second on two cores."""
    text = TextShape(width=32, depth=2, heads=2)
    rates = TowerRates(lr=5e-3)
    config = RunConfig(
        name="tiny",
        run_dir=folder,
        steps=12,
        batch_size=16,
        model=eva02_small("tiny", image_size=16, patch_size=4, width=48, depth=2, heads=2, dim=24, text=text),
        data=DataConfig(sources=(SourceConfig(name="made", shards=(str(shards),)),), workers=0, chunk=8),
        objective=ClipConfig(drop_path=0.1),
        optim=OptimConfig(vision=rates, text=rates, lr=5e-3, warmup=2, adapt_undecayed=True),
        engine=EngineConfig(precision="fp32", device="cpu"),
        checkpoint=checkpoint.CheckpointConfig(every=4),
        log=LogConfig(every=1),
    )
    return replace(config, **changes)


def final(folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    return found


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(folder) if "loss" in record}


def same_state(one: Path, other: Path) -> bool:
    a, b = final(one), final(other)
    tensors = all(
        torch.equal(value, b.tensors[kind][name]) for kind, named in a.tensors.items() for name, value in named.items()
    )
    return tensors and a.step == b.step and a.record["cursor"] == b.record["cursor"]


@pytest.fixture
def recipe(tmp_path, shards, monkeypatch) -> Callable[..., RunConfig]:
    """`evaclip train tiny` at the command line."""
    folder = shards()
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny_run(tmp_path / "run", folder))
    return lambda **changes: tiny_run(tmp_path / "run", folder, **changes)


def test_training_learns_and_leaves_what_it_promises(tmp_path, recipe, capfd):
    assert main(["train", "tiny", "--steps", "60"]) == 0
    folder = tmp_path / "run"
    curve = losses(folder)
    assert sorted(curve) == list(range(1, 61))
    assert sum(list(curve.values())[-5:]) / 5 < sum(list(curve.values())[:5]) / 5 - 0.3
    record = read_log(folder)[-1]
    for name in ("accuracy/image_to_text", "logit_scale", "gradient_norm/visual", "gradient_norm/text",
                 "images_per_second", "data_wait_share", "learning_rate_factor"):  # fmt: skip
        assert name in record
    said = capfd.readouterr()
    assert f"done: 60 steps, {folder}" in said.out
    assert "8 of 16 patches seen in training" in said.err and "60 steps x 16 = 960 pairs, 15 epochs" in said.err
    assert list((folder / "tensorboard").iterdir()) and (folder / "report.html").stat().st_size > 10_000
    model, origin = clip_of_run(folder)
    assert origin["step"] == "60" and not model.training


def test_two_runs_of_a_seed_are_the_same_bits_and_another_seed_is_not(tmp_path, recipe):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(recipe(run_dir=tmp_path / name, seed=seed))
    assert same_state(tmp_path / "a", tmp_path / "b") and losses(tmp_path / "a") == losses(tmp_path / "b")
    assert not same_state(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("changes", [{}, {"workers": 1}], ids=["inline", "worker"])
def test_interrupted_at_three_random_steps_it_continues_bit_for_bit(tmp_path, recipe, monkeypatch, changes):
    base = recipe()
    data = replace(base.data, **changes)
    train(recipe(run_dir=tmp_path / "straight", data=data))
    random = torch.Generator().manual_seed(len(changes))
    for step in sorted(torch.randperm(10, generator=random)[:3].add(1).tolist()):
        with stopping_after(step, monkeypatch):
            outcome = train(recipe(run_dir=tmp_path / "broken", data=data, resume="auto"))
        assert (outcome.step, outcome.stopped_by) == (step, "SIGINT")
    assert train(recipe(run_dir=tmp_path / "broken", data=data, resume="auto")).stopped_by is None
    assert same_state(tmp_path / "straight", tmp_path / "broken")
    assert losses(tmp_path / "straight") == losses(tmp_path / "broken")


class stopping_after:
    """Sends this process SIGINT during a step."""

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.patch = step, monkeypatch

    def __enter__(self) -> None:
        from evaclip.train import Meter

        update = Meter.update

        def interrupting(meter, step, metrics):
            update(meter, step, metrics)
            if step == self.step:
                signal.raise_signal(signal.SIGINT)

        self.patch.setattr(Meter, "update", interrupting)

    def __exit__(self, *_) -> None:
        self.patch.undo()


def test_a_crash_loses_only_the_steps_since_the_last_checkpoint(tmp_path, recipe, monkeypatch):
    train(recipe(run_dir=tmp_path / "straight"))
    from evaclip.train import Meter

    def crash(meter, step, metrics):
        if step == 7:
            raise ZeroDivisionError

    monkeypatch.setattr(Meter, "update", crash)
    with pytest.raises(ZeroDivisionError):
        train(recipe(run_dir=tmp_path / "broken"))
    monkeypatch.undo()
    assert final(tmp_path / "broken").step == 4
    train(recipe(run_dir=tmp_path / "broken", resume="auto"))
    assert same_state(tmp_path / "straight", tmp_path / "broken")


def test_a_damaged_checkpoint_is_passed_over_and_the_curve_is_the_same(tmp_path, recipe, capfd):
    train(recipe(run_dir=tmp_path / "straight"))
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--help"])
    train(recipe(run_dir=tmp_path / "broken", steps=12))
    newest = tmp_path / "broken" / "checkpoints" / "step_00000012" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    train(recipe(run_dir=tmp_path / "broken", resume="auto"))
    assert f"passing over a damaged checkpoint: {newest}" in capfd.readouterr().err
    assert same_state(tmp_path / "straight", tmp_path / "broken")


def test_a_finished_run_stays_as_it_is_and_more_steps_extend_it(tmp_path, recipe):
    train(recipe())
    before = final(tmp_path / "run").path.stat().st_mtime_ns
    assert train(recipe(resume="auto")).step == 12
    assert final(tmp_path / "run").path.stat().st_mtime_ns == before
    assert train(recipe(resume="auto", steps=14)).step == 14


REFUSALS = [
    (["--batch-size", "65"], 2, "a batch of 65 is larger than the data: 64 samples"),
    (["--engine.device", "cuda"], 2, "torch sees no CUDA device"),
]


@pytest.mark.parametrize(("arguments", "status", "sentence"), REFUSALS)
def test_bad_input_is_one_sentence(recipe, capfd, monkeypatch, arguments, status, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "tiny", *arguments]) == status
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("evaclip: ") and sentence in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_missing_shards_are_one_sentence(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny_run(tmp_path / "run", tmp_path / "nowhere-{0..3}.tar"))
    assert main(["train", "tiny"]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("evaclip: ") and "4 of 4 shards do not exist" in last


def test_a_run_folder_that_is_taken_is_refused(recipe, capfd):
    assert main(["train", "tiny"]) == 0
    assert main(["train", "tiny"]) == 2
    assert "already holds a run: continue it with --resume auto" in capfd.readouterr().err


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path, recipe, capfd):
    (tmp_path / "file").write_text("")
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written: Not a directory" in capfd.readouterr().err


def test_a_full_disk_is_a_sentence_and_keeps_what_was_saved(tmp_path, recipe, capfd, monkeypatch):
    real = checkpoint.save_file

    def full(tensors, path):
        if "step_00000008" in str(path):
            raise OSError(28, os.strerror(28))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main(["train", "tiny"]) == 2
    assert "No space left on device" in capfd.readouterr().err
    assert final(tmp_path / "run").step == 4


def test_changed_shards_refuse_by_name_unless_allowed(tmp_path, shards, capfd):
    folder = shards()
    train(tiny_run(tmp_path / "run", folder, steps=4))
    shards(seed=9)
    monkey = tiny_run(tmp_path / "run", folder, resume="auto")
    with pytest.raises(Exception, match=r"not that of the checkpoint: train-00000\.tar changed; .*--allow-data-change"):
        train(monkey)
    assert train(replace(monkey, allow_data_change=True)).step == 12
    assert "going on with changed data" in capfd.readouterr().err


def test_changed_settings_are_named_on_resuming(tmp_path, recipe, capfd):
    train(recipe(steps=4))
    train(recipe(resume="auto", steps=6, batch_size=8))
    said = capfd.readouterr().err
    assert "changed since the run began: steps: 4 -> 6" in said
    assert "changed since the run began: batch_size: 16 -> 8" in said


def test_a_collapse_is_noticed(tmp_path, recipe, capfd):
    frozen = TowerRates(lr=0.0)
    config = recipe(
        steps=30,
        objective=ClipConfig(max_logit_scale=1.0001),  # logits of nearly zero: every pair as likely as the other
        optim=OptimConfig(vision=frozen, text=frozen, lr=0.0, warmup=1),
    )
    train(config)
    found = [record["event"] for record in read_log(tmp_path / "run") if "event" in record]
    assert not any("log(batch)" in event for event in found)  # random features of scale 1 are close, not equal
    rates = TowerRates(lr=5.0)
    wild = OptimConfig(optimizer="adamw", vision=rates, text=rates, lr=0.0, warmup=1, clip_norm=None)
    train(recipe(run_dir=tmp_path / "wild", steps=40, optim=wild))
    found = [record["event"] for record in read_log(tmp_path / "wild") if "event" in record]
    assert any("the loss sits at log(batch) = 2.773" in event for event in found)


def test_a_gradient_that_is_never_finite_ends_the_run(tmp_path, recipe):
    rates = TowerRates(lr=1e30)
    wild = OptimConfig(optimizer="adamw", vision=rates, text=rates, warmup=1, clip_norm=None)
    with pytest.raises(DivergedError, match=r"20 of the last 100 steps .* there is no checkpoint from before them"):
        train(recipe(steps=60, optim=wild))


def test_starvation_is_said_with_its_stage(tmp_path, recipe, monkeypatch):
    from evaclip.data import samples

    real = samples.training_pixels

    def slow(*arguments):
        time.sleep(0.004)
        return real(*arguments)

    monkeypatch.setattr(samples, "training_pixels", slow)
    train(recipe())
    events = [record["event"] for record in read_log(tmp_path / "run") if "event" in record]
    assert any("starved for data" in event and "is decode and crop" in event for event in events)


def test_unknown_names_are_answered_with_near_ones(recipe, capfd):
    for arguments, near in (
        (["trian", "tiny"], "did you mean train"),
        (["train", "tinny"], "did you mean tiny"),
        (["recipes", "eva02_tiny_digit"], "did you mean eva02_tiny_digits"),
    ):
        assert main(arguments) == 2
        assert near in capfd.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["train", "tiny", "--optim.weight-dcay", "1"])
    assert exit.value.code == 2
    assert "--optim.weight-decay" in capfd.readouterr().err


def test_help_shows_the_docstring_of_each_field(recipe, capfd):
    with pytest.raises(SystemExit) as exit:
        main(["train", "tiny", "--help"])
    assert exit.value.code == 0
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    for words in ("Optimizer steps of the whole run", "Share of the image's patches that the tower does not see",
                  "Decay of the two moments", "Worker processes that read and decode"):  # fmt: skip
        assert words in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_a_signal_to_the_whole_group_saves_and_says_how_to_continue(tmp_path, shards, number, status):
    """The whole program in a process of its own, interrupted as a person or a cluster would."""
    folder = shards()
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from evaclip.cli import main\n"
        "from evaclip.recipes import RECIPES\n"
        "from tests.test_train import tiny_run\n"
        f"RECIPES['tiny'] = lambda: tiny_run(Path({str(tmp_path / 'run')!r}), Path({str(folder)!r}))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", "tiny", "--steps", "100000", "--data.workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 6) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal or Slurm does: to the workers as well
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert f"stopped by {number.name} at step {step}, everything is saved" in out
    assert "evaclip train tiny --steps 100000 --data.workers 2 --resume auto" in out
    assert final(tmp_path / "run").step == step and "Traceback" not in err


def test_a_disk_that_is_full_for_the_log_is_a_sentence(recipe, capfd, monkeypatch):
    from evaclip.log import RunLog

    def full(*_):
        raise OSError(28, os.strerror(28), "log.jsonl")

    monkeypatch.setattr(RunLog, "scalars", full)
    assert main(["train", "tiny"]) == 2
    assert "evaclip: No space left on device (log.jsonl); what was saved before is untouched" in capfd.readouterr().err


def test_a_batch_that_does_not_fit_leaves_no_run_behind(recipe):
    assert main(["train", "tiny", "--batch-size", "65"]) == 2
    assert main(["train", "tiny", "--steps", "1"]) == 0


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_it_trains_in_sixteen_bits(tmp_path, recipe, precision):
    train(recipe(steps=4, engine=EngineConfig(precision=precision, device="cpu")))
    assert all(2 < loss < 7 for loss in losses(tmp_path / "run").values())


def test_float16_finds_its_loss_scale_and_trains(tmp_path, recipe):
    """The first scales are too large: their steps are skipped, and do not count."""
    train(recipe(steps=24, engine=EngineConfig(precision="fp16", device="cpu")))
    engine = final(tmp_path / "run").record["engine"]
    assert 4 <= engine["optimizer_step"] < 24
    assert engine["loss_scale"]["value"] == 2.0 ** (16 - (24 - engine["optimizer_step"]))


def test_weights_and_biases_get_the_same_numbers_when_asked(tmp_path, recipe, monkeypatch):
    import types

    logged = {}
    run = types.SimpleNamespace(log=lambda values, step: logged.update({step: values}), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    train(recipe(steps=3, log=LogConfig(every=1, wandb_project="p")))
    assert sorted(logged) == [1, 2, 3] and "loss" in logged[3]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "other"), "--log.wandb-project", "p"]) == 2


def test_a_terminal_gets_a_progress_bar(recipe, monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    train(recipe(steps=3))
    assert "3/3" in terminal.getvalue() and "loss" in terminal.getvalue()
