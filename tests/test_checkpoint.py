"""A checkpoint is whole or it is not used, and nothing good is lost on the way."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaclip import checkpoint
from evaclip.checkpoint import (
    CheckpointConfig,
    Writer,
    forget_after,
    load,
    mark_best,
    marks,
    newest,
    prune,
    save,
)
from evaclip.errors import CheckpointError, InputError


def tensors(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a.weight": torch.randn(5, 3, generator=generator), "scale": torch.randn(1, generator=generator)},
        "optimizer": {"a.weight/exp_avg": torch.randn(5, 3, generator=generator), "a.weight/step": torch.tensor(3.0)},
    }


def write(folder: Path, *steps: int) -> list[Path]:
    return [save(folder, step, tensors(step), {"cursor": {"position": 8 * step}}) for step in steps]


def test_what_is_loaded_is_what_was_saved(tmp_path):
    write(tmp_path, 7)
    found = newest(tmp_path)
    assert found.step == 7 and found.record["cursor"] == {"position": 56}
    for kind, named in tensors(7).items():
        assert found.tensors[kind].keys() == named.keys()
        assert all(torch.equal(found.tensors[kind][name], value) for name, value in named.items())


def test_no_checkpoint_is_none_and_the_newest_is_by_step(tmp_path):
    assert newest(tmp_path / "nothing") is None
    write(tmp_path, 9, 100, 20)
    assert newest(tmp_path).step == 100


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    save(tmp_path, 5, tensors(6), {"again": True})
    assert newest(tmp_path).record["again"] and len(list(tmp_path.iterdir())) == 1


def damage(path: Path, kind: str, random: np.random.Generator, other: Path) -> None:
    """One way in which a file can be wrong."""
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: int(random.integers(1, len(data)))])
    elif kind == "flipped bit":
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
    else:
        shutil.copy(other / path.name, path)


KINDS = ("missing", "empty", "truncated", "flipped bit", "of another step")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, capfd, kind, name):
    """Five ways to damage each of four files, six times over with other places: none is ever used in silence."""
    random = np.random.default_rng(0)
    for _ in range(6):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        older, newer = write(tmp_path / "c", 10, 20)
        before = (newer / name).read_bytes()
        damage(newer / name, kind, random, older)
        found = newest(tmp_path / "c")
        said = capfd.readouterr().err
        if found.step == 20:  # a flipped bit in the manifest's white space or version may leave its meaning alone
            assert name == "manifest.json" and json.loads((newer / name).read_text()) == json.loads(before)
        else:
            assert found.step == 10 and f"passing over a damaged checkpoint: {newer}" in said


def test_when_none_is_whole_the_run_refuses(tmp_path):
    for path in write(tmp_path, 10, 20):
        (path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is whole; the newest: .*step_00000020"):
        newest(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that was written"):
        load(tmp_path / "step_00000010")


def test_pruning_keeps_the_newest_and_removes_what_was_left_half_done(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step_00000005.tmp-123").mkdir()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    with pytest.raises(InputError, match="at least 2"):
        CheckpointConfig(keep=1)


PHASES = ["save_file", "_described", "_flush", "rename"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_full_disk_in_any_phase_leaves_the_older_ones(tmp_path, monkeypatch, phase):
    write(tmp_path, 10)

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path if phase == "rename" else checkpoint, phase, full)
    with pytest.raises(
        InputError, match=r"step 20 cannot be written .*No space left.* older checkpoints are untouched"
    ):
        write(tmp_path, 20)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert newest(tmp_path).step == 10


@pytest.mark.parametrize("phase", PHASES)
def test_death_in_any_phase_leaves_a_loadable_last_good_one(tmp_path, monkeypatch, phase):
    class Killed(BaseException):
        """Nothing catches it, as nothing catches SIGKILL."""

    def die(*_, **__):
        raise Killed

    write(tmp_path, 10)
    monkeypatch.setattr(Path if phase == "rename" else checkpoint, phase, die)
    with pytest.raises(Killed):
        write(tmp_path, 20)
    monkeypatch.undo()
    assert newest(tmp_path).step == 10
    write(tmp_path, 20)
    assert newest(tmp_path).step == 20


def dies_at(event: int, folder: Path) -> int:
    """Writes step 20 in a child that is killed at its n-th file operation. Returns the child's exit status."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(name: str, _: object) -> None:
            nonlocal seen
            if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
                seen += 1
                if seen == event:
                    os._exit(9)

        sys.addaudithook(hook)
        save(folder, 20, tensors(20), {"cursor": {"position": 160}})
        prune(folder, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path):
    """Each operation of a save in turn, until the save gets through."""
    for event in range(1, 200):
        folder = tmp_path / str(event)
        write(folder, 5, 10)
        status = dies_at(event, folder)
        found = newest(folder)
        assert found.step in (10, 20)
        assert all(torch.equal(found.tensors["model"][n], t) for n, t in tensors(found.step)["model"].items())
        if status == 0:
            break
        write(folder, 20)  # and the run goes on
        prune(folder, 2)
        assert newest(folder).step == 20 and sorted(p.name for p in folder.iterdir()) == [
            "step_00000010",
            "step_00000020",
        ]
    assert status == 0 and event > 12


def test_of_five_hundred_damages_none_is_loaded_in_silence(tmp_path, capfd):
    random = np.random.default_rng(0)
    write(tmp_path / "good", 10, 20)
    good = {path.name: path.read_bytes() for path in (tmp_path / "good" / "step_00000020").iterdir()}
    older = tmp_path / "good" / "step_00000010"
    for number in range(500):
        folder = tmp_path / f"bad{number}"
        shutil.copytree(tmp_path / "good", folder)
        name = sorted(good)[int(random.integers(len(good)))]
        path, data = folder / "step_00000020" / name, bytearray(good[name])
        way = ("missing", "truncated", "flipped", "empty", "of another step")[number % 5]
        if way == "missing":
            path.unlink()
        elif way == "of another step":
            path.write_bytes((older / name).read_bytes())
        else:
            if way == "flipped":
                data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
            length = {"truncated": int(random.integers(1, len(data))), "empty": 0}.get(way, len(data))
            path.write_bytes(data[:length])
        found = newest(folder)
        assert found.step == 10, (way, name)
        said = capfd.readouterr().err
        assert "passing over a damaged checkpoint: " in said and "step_00000020" in said, (way, name)
        shutil.rmtree(folder)


def test_a_writer_stages_its_copy_and_raises_later(tmp_path, monkeypatch):
    writer = Writer(tmp_path, keep=2)
    values = tensors(1)
    writer.write(1, values, {})
    values["model"]["a.weight"].zero_()  # the training goes on at once
    writer.write(2, tensors(2), {})
    writer.finish()
    assert torch.equal(newest(tmp_path).tensors["model"]["a.weight"], tensors(2)["model"]["a.weight"])
    assert torch.equal(load(tmp_path / "step_00000001").tensors["model"]["a.weight"], tensors(1)["model"]["a.weight"])

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer.write(3, tensors(3), {})
    with pytest.raises(InputError, match="step 3 cannot be written"):
        writer.write(4, tensors(4), {})
    assert writer.failed is not None and newest(tmp_path).step == 2


def test_going_back_forgets_what_came_after(tmp_path):
    write(tmp_path, 1, 2, 3)
    forget_after(tmp_path, 16)
    assert newest(tmp_path).step == 2


def test_the_best_is_the_highest_of_those_that_are_there_and_of_one_number(tmp_path):
    marked = [mark_best(tmp_path / "new", 1, "a", 0.5)]
    write(tmp_path, 1, 2, 3, 4)
    for step, name, value in [(1, "a", 0.5), (2, "a", 0.5), (3, "a", 0.6), (4, "a", 0.55), (3, "a", 0.1), (4, "b", 0)]:
        marked.append(mark_best(tmp_path, step, name, value))
    assert marked == [True, True, False, True, False, True, True]
    assert marks(tmp_path) == {"best": {"step": 4, "name": "b", "value": 0}}
    shutil.rmtree(tmp_path / "step_00000004")
    assert mark_best(tmp_path, 2, "b", -1)
