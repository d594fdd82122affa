"""A run that starts from another: its weights, its place in the data, another resolution or masking."""

from dataclasses import replace

import pytest
import torch

from evaclip.cli import main
from evaclip.errors import CheckpointError, InputError
from evaclip.models.clip import Clip
from evaclip.models.shapes import TextShape, eva02_small
from evaclip.objectives.clip import ClipConfig
from evaclip.recipes import RECIPES
from evaclip.train import train
from tests.test_train import final, losses, tiny_run


def shape(image_size: int, width: int = 48):
    text = TextShape(width=32, depth=2, heads=2)
    return eva02_small("t", image_size=image_size, patch_size=4, width=width, depth=2, heads=2, dim=24, text=text)


def test_a_phase_begins_with_the_weights_and_the_data_that_the_one_before_left(tmp_path, shards):
    folder = shards()
    first = tiny_run(tmp_path / "first", folder)
    train(first)
    unmasked = tiny_run(
        tmp_path / "second", folder, start_from=tmp_path / "first", objective=ClipConfig(mask_ratio=0.0), steps=3
    )
    train(unmasked)
    assert final(tmp_path / "second").record["cursor"]["position"] == (12 + 3) * 16
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1]
    train(replace(unmasked, run_dir=tmp_path / "again", steps=2))
    train(replace(unmasked, run_dir=tmp_path / "again", steps=3, resume="auto"))
    assert losses(tmp_path / "again").keys() == {1, 2, 3}
    train(replace(unmasked, run_dir=tmp_path / "other", seed=9, steps=1))
    assert final(tmp_path / "other").record["cursor"]["position"] == 16


def test_another_resolution_gets_the_position_embedding_resampled(tmp_path, shards):
    folder = shards()
    train(tiny_run(tmp_path / "first", folder))
    large = tiny_run(tmp_path / "large", folder, start_from=tmp_path / "first", model=shape(24), steps=2)
    train(large)
    assert losses(tmp_path / "large")[1] < losses(tmp_path / "first")[1]


def test_resampling_keeps_a_smooth_embedding_and_everything_else():
    torch.manual_seed(0)
    small, large = Clip(shape(16)), Clip(shape(32))
    place = torch.linspace(-1, 1, 4)
    small.visual.trunk.pos_embed.data[0, 1:] = place.repeat_interleave(4)[:, None].expand(-1, 48)
    large.start_from(small.state_dict())
    rows = large.visual.trunk.pos_embed[0, 1:, 0].view(8, 8)
    assert torch.allclose(rows, rows[:, :1].expand(-1, 8), atol=1e-5) and (rows[:, 0].diff() > 0).all()
    assert torch.equal(large.visual.trunk.pos_embed[:, 0], small.visual.trunk.pos_embed[:, 0])
    assert torch.equal(large.text.token_embedding.weight, small.text.token_embedding.weight)
    with pytest.raises(InputError, match=r"and \d+ other parameters differ from those to start from"):
        Clip(shape(16, width=32)).start_from(small.state_dict())


def test_phases_are_named_one_after_the_other(tmp_path, shards, monkeypatch, capfd):
    folder = shards()
    monkeypatch.setitem(RECIPES, "one", lambda: tiny_run(tmp_path / "one", folder, steps=2))
    monkeypatch.setitem(RECIPES, "two", lambda: tiny_run(tmp_path / "two", folder, start_from=tmp_path / "one"))
    assert main(["train", "one", "two", "--steps", "3"]) == 0
    said = capfd.readouterr()
    assert said.out.count("done: 3 steps") == 2 and "starting from step 3 of" in said.err
    with pytest.raises(CheckpointError, match="does not exist"):
        train(tiny_run(tmp_path / "three", folder, start_from=tmp_path / "nothing"))


def test_published_phases_follow_each_other():
    assert RECIPES["eva02_clip_l14_336"]().start_from == RECIPES["eva02_clip_l14"]().run_dir
    assert RECIPES["eva_clip_18b_unmasked"]().start_from == RECIPES["eva_clip_18b"]().run_dir
