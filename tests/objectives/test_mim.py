"""Masked image modelling: its masks, its teachers, its loss against a plain one, its initial values, and whole runs."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from evaclip.cli import main
from evaclip.config import load_config
from evaclip.data.masks import block_masks
from evaclip.data.pipeline import Batch
from evaclip.data.transforms import CropConfig, normalized, training_pixels
from evaclip.encoder import load_encoder
from evaclip.engine import Engine, EngineConfig
from evaclip.errors import InputError
from evaclip.keyed import generator
from evaclip.models.mim import MaskedTower
from evaclip.models.shapes import SHAPES
from evaclip.objectives.mim import MimConfig
from evaclip.objectives.teacher import patch_features
from evaclip.optim import OptimConfig, TowerRates
from evaclip.recipes import RECIPES
from evaclip.train import train
from tests.conftest import encoded
from tests.models.layouts import FAMILIES, eva_clip, openai_clip, shape_of, torchscript
from tests.ranks import in_ranks
from tests.test_train import final, losses, same_state, tiny_run

PIXELS = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_block_masks_cover_exactly_their_share_in_blocks_and_depend_on_the_sample_alone():
    positions = torch.arange(64)
    masks = block_masks(3, positions, 16, 105)
    assert masks.shape == (64, 256) and (masks.sum(1) == 105).all()
    assert torch.equal(masks[5:9], block_masks(3, positions[5:9], 16, 105))
    assert not torch.equal(masks, block_masks(4, positions, 16, 105)) and len(masks.unique(dim=0)) == 64
    # In blocks, a patch's right neighbour is nearly always as it is; drawn one by one it would be in 52 of 100.
    square = masks.view(64, 16, 16)
    assert (square[:, :, 1:] == square[:, :, :-1]).float().mean() > 0.75
    # Rectangles seldom reach the corners; else no side is preferred, and no place is left out.
    share = block_masks(3, torch.arange(2000), 16, 105).float().mean(0).view(16, 16)
    assert 0 < share.min() and share.max() < 0.8 and share.mean().item() == pytest.approx(105 / 256)
    for other in (share.flip(0), share.flip(1), share.T):
        assert (share - other).abs().max() < 0.07
    for grid, count in ((4, 1), (4, 6), (4, 15), (2, 3)):
        assert (block_masks(0, positions[:8], grid, count).sum(1) == count).all()


def test_images_are_mirrored_every_other_time_by_their_own_number():
    data = encoded(np.arange(3 * 64 * 64, dtype=np.uint8).reshape(64, 64, 3))
    whole = CropConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    plain = training_pixels(data, 16, whole, generator(0, "x", 0))
    mirrored = [
        torch.equal(training_pixels(data, 16, replace(whole, flip=True), generator(0, "x", n)), plain.flip(2))
        for n in range(200)
    ]
    assert 70 < sum(mirrored) < 130


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A teacher of each kind: OpenAI's plain transformer, ours, and timm's EVA inside open_clip."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.jit.save(torchscript(openai_clip()), folder / "openai.pt")
    torch.save(eva_clip(FAMILIES["eva02"]), folder / "eva.pt")
    SHAPES["small-teacher"] = shape_of(FAMILIES["eva02"])
    yield {"openai": str(folder / "openai.pt"), "ours": f"small-teacher:{folder / 'eva.pt'}"}
    del SHAPES["small-teacher"]


@pytest.mark.parametrize("kind", ["openai", "ours"])
@torch.no_grad()
def test_teachers_give_their_projected_patch_tokens(teachers, kind):
    """The class token through the same steps is the image feature that everybody knows."""
    teacher = load_encoder(teachers[kind])
    found = patch_features(teacher, PIXELS)
    assert found.shape == (4, 16, 24) and found.dtype == torch.float32
    model, kept = teacher.model, []
    images = teacher.preprocessing.normalized(PIXELS)
    last = model.visual.ln_post if kind == "openai" else model.visual.trunk.norm
    hook = last.register_forward_hook(lambda module, inputs, output: kept.append(output))
    feature = model.encode_image(images)
    hook.remove()
    project = (lambda x: x @ model.visual.proj) if kind == "openai" else model.visual.trunk.head
    whole = kept[0] if kept[0].ndim == 3 else None
    assert whole is not None
    torch.testing.assert_close(project(whole[:, 0]), feature)
    torch.testing.assert_close(found, project(whole[:, 1:]))
    larger = F.interpolate(PIXELS, size=32, mode="nearest")
    assert patch_features(teacher, larger).shape == found.shape


@torch.no_grad()
def test_open_clips_eva_is_a_teacher(teachers):
    ours = load_encoder(teachers["ours"])
    theirs = replace(ours, model=open_clip.CustomTextCLIP.__new__(open_clip.CustomTextCLIP))
    torch.nn.Module.__init__(theirs.model)
    theirs.model.visual = torch.nn.Module()
    theirs.model.visual.trunk = ours.model.visual.trunk  # timm's Eva, as open_clip holds it
    assert torch.equal(patch_features(theirs, PIXELS), patch_features(ours, PIXELS))


def test_teachers_without_patch_tokens_or_of_another_shape_are_one_sentence(tmp_path, teachers):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    resnet = open_clip.model.CLIP(24, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(resnet.state_dict(), tmp_path / "open_clip_model.safetensors")
    shape = shape_of(FAMILIES["eva02"])
    with pytest.raises(InputError, match="has no patch tokens in the joint space"):
        MimConfig(teacher=str(tmp_path)).build(shape, 0)
    with pytest.raises(InputError, match="has 16 patches and the student 64"):
        MimConfig(teacher=teachers["openai"]).build(shape_of(FAMILIES["eva02"], image_size=32), 0)
    with pytest.raises(InputError, match=r"features of 24 numbers: set --model\.dim 24"):
        MimConfig(teacher=teachers["openai"]).build(replace(shape, dim=32), 0)


def batch(size: int = 8) -> Batch:
    images = torch.randint(0, 256, (size, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(images, torch.full((size, 1), 49407, dtype=torch.int32), torch.arange(size))


def engine(teacher: str, **changes) -> Engine:
    torch.manual_seed(0)
    built = MimConfig(teacher=teacher, smallest_block=2, drop_path=0.2).build(shape_of(FAMILIES["eva02"]), seed=4)
    optim = OptimConfig(optimizer="adamw", vision=TowerRates(lr=1e-2), lr=1e-2).build(built.student, built.layers())
    return Engine(EngineConfig(device="cpu", precision="fp32", **changes), built, optim, None)


def test_the_loss_is_the_negative_cosine_at_masked_patches(teachers):
    objective = engine(teachers["openai"]).objective.eval()
    loss = objective.loss(objective(batch()))[0]
    masks = block_masks(4, batch().positions, 4, objective.config.masked(16), 2)
    assert objective.config.masked(16) == 7 and objective.config.masked(256) == 105
    target = patch_features(load_encoder(teachers["openai"]), batch().images).double()
    tower = objective.student.visual
    patches = tower.trunk.head(tower.tokens(normalized(batch().images), mask=masks)[:, 1:]).double()
    cosines = [
        (a @ b / a.norm() / b.norm()).item()
        for mask, row, wanted in zip(masks, patches, target, strict=True)
        for a, b in zip(row[mask], wanted[mask], strict=True)
    ]
    assert len(cosines) == 8 * 7
    assert loss.item() == pytest.approx(-sum(cosines) / len(cosines), abs=1e-6)


def test_the_student_does_not_see_what_is_masked(teachers):
    objective = engine(teachers["openai"]).objective.eval()
    mask = block_masks(4, batch().positions, 4, 7, 2)
    images = normalized(batch().images)
    hidden = mask.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = objective.student(images, mask)
    assert torch.equal(found, objective.student(torch.where(hidden, 9.0, images), mask))
    assert not torch.allclose(found, objective.student(torch.where(hidden, images, 9.0), mask))


def test_accumulation_gives_the_gradient_of_the_whole_batch_and_the_teacher_is_not_trained(teachers):
    whole, split = engine(teachers["ours"]), engine(teachers["ours"], micro_batches=4)
    loss, other = whole.forward_backward(batch())["loss"], split.forward_backward(batch())["loss"]
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in whole.parameters.items():
        expected = parameter.grad
        assert expected is not None, name
        assert (split.parameters[name].grad - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name
    assert {name.split(".")[0] for name in whole.objective.state_dict()} == {"student"}


def test_a_tenth_of_the_gradient_reaches_patches_that_are_held_back():
    shape = shape_of(FAMILIES["eva02"]).vision
    towers = []
    for held in (False, True):
        torch.manual_seed(0)
        tower = MaskedTower(shape, 24, hold_back_patches=held)
        tower(normalized(PIXELS), block_masks(0, torch.arange(4), 4, 7, 2)).square().sum().backward()
        towers.append(tower.visual.trunk)
    free, held = (trunk.patch_embed.proj.weight.grad for trunk in towers)
    assert (held - 0.1 * free).norm() < 1e-4 * held.norm()
    one, other = (trunk.head.weight.grad for trunk in towers)
    assert (one - other).norm() < 1e-4 * one.norm()


@pytest.mark.parametrize("family", ["eva01", "eva02", "tiny"])
def test_initial_values_are_the_papers(family):
    torch.manual_seed(0)
    shape = shape_of(FAMILIES[family], width=192, mlp_hidden=512, depth=3).vision
    trunk = MaskedTower(shape, 64).visual.trunk
    grown = math.sqrt(math.log(6)) if family == "eva02" else 1.0

    def expected(rows: int, columns: int) -> float:
        return 0.015 if family == "eva01" else math.sqrt(2 / (rows + columns))

    for number, block in enumerate(trunk.blocks, 1):
        shrunk = 1 / math.sqrt(2 * number) if family == "eva01" else 1.0
        out = expected(192, 192) * grown * shrunk
        assert block.attn.proj.weight.std().item() == pytest.approx(out, rel=0.03)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(expected(192, 512) * grown * shrunk, rel=0.03)
        if family == "eva02":
            assert block.attn.v_proj.weight.std().item() == pytest.approx(out, rel=0.03)
            assert block.attn.k_proj.weight.std().item() == pytest.approx(expected(192, 192), rel=0.03)
        assert not block.attn.proj.bias.any()
    assert trunk.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.fixture
def recipe(tmp_path, shards, monkeypatch, teachers):
    """`evaclip train masked`: a small EVA-02 against OpenAI's small CLIP."""
    folder = shards()
    shape = shape_of(FAMILIES["eva02"])
    objective = MimConfig(teacher=teachers["openai"], smallest_block=2)
    optim = OptimConfig(optimizer="adamw", vision=TowerRates(lr=3e-3), lr=3e-3, warmup=5, clip_norm=3.0)

    def made(run_dir=tmp_path / "mim", **changes):
        config = tiny_run(run_dir, folder, model=shape, objective=objective, steps=40, optim=optim)
        return replace(config, **changes)

    monkeypatch.setitem(RECIPES, "masked", made)
    monkeypatch.setitem(RECIPES, "after", lambda: tiny_run(tmp_path / "clip", folder, model=shape, steps=1))
    return made


def test_a_run_learns_and_a_clip_run_starts_from_it_with_nothing_renewed_but_its_projection(tmp_path, recipe, capfd):
    assert main(["train", "masked", "--objective.drop-path", "0.1"]) == 0
    said = capfd.readouterr()
    assert "7 of 16 patches masked, teacher" in said.err and "text tower" not in said.err
    curve = list(losses(tmp_path / "mim").values())
    assert sum(curve[-5:]) / 5 < sum(curve[:5]) / 5 - 0.1
    assert load_config(tmp_path / "mim").objective.drop_path == 0.1
    assert (tmp_path / "mim" / "report.html").stat().st_size > 10_000
    assert main(["train", "after", "--vision-init", str(tmp_path / "mim"), "--optim.vision.lr", "0"]) == 0
    table = [line for line in capfd.readouterr().err.splitlines() if line.startswith("  renewed  visual")]
    assert len(table) == 2 and all("trunk.head" in line for line in table)
    before, after = (final(tmp_path / name).tensors["model"] for name in ("mim", "clip"))
    assert torch.equal(
        after["visual.trunk.blocks.1.attn.norm.weight"], before["visual.trunk.blocks.1.attn.norm.weight"]
    )


def test_a_masked_run_goes_on_bit_for_bit(tmp_path, recipe):
    train(recipe(steps=6))
    shutil.copytree(tmp_path / "mim", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000006")
    train(recipe(run_dir=tmp_path / "parts", steps=6, resume="auto"))
    assert same_state(tmp_path / "mim", tmp_path / "parts")


def test_two_ranks_train_as_one_process_does(tmp_path, recipe):
    train(recipe(steps=4))
    runs = [recipe(run_dir=tmp_path / kind, steps=4, engine=EngineConfig(precision="fp32", device="cpu", kind=kind))
            for kind in ("ddp", "fsdp2")]  # fmt: skip
    in_ranks(2, all_of, runs)
    for run in runs:
        assert losses(run.run_dir) == pytest.approx(losses(tmp_path / "mim"), rel=5e-5), run.run_dir
        assert final(run.run_dir).tensors["model"].keys() == final(tmp_path / "mim").tensors["model"].keys()


def all_of(runs) -> None:
    for run in runs:
        train(run)


def test_masked_runs_that_cannot_be_are_one_sentence(tmp_path, recipe, capfd):
    def refused(sentence, *arguments):
        assert main([*arguments]) == 2
        assert sentence in capfd.readouterr().err.splitlines()[-1]

    refused("starts from random", "train", "masked", "--vision-init", str(tmp_path))
    refused("evaclip plan counts contrastive runs", "plan", "eva02_mim_b", "--gpus", "8")
    status = main(["train", "masked", "--objective.teacher", "./nowhere"])
    assert status == 89 and "the model ./nowhere does not exist" in capfd.readouterr().err
    train(recipe(steps=1))
    with pytest.raises(InputError, match="not the folder of a run that has two towers"):
        load_encoder(tmp_path / "mim")
    zero_shot = RECIPES["eva02_tiny_digits"]().evals
    with pytest.raises(InputError, match="no towers with a common space"):
        recipe(evals=zero_shot)


def test_published_runs_have_the_published_numbers():
    giant, base = RECIPES["eva01_mim_g"](), RECIPES["eva02_mim_b"]()
    assert giant.steps * giant.batch_size == pytest.approx(150 * 29.6e6, rel=1e-3) and giant.optim.floor == 0.01
    assert base.objective.masked(256) == 105 and base.model.vision.patches == 256
    sizes = {"eva01_mim_g": 1012, "eva02_mim_ti": 5.8, "eva02_mim_s": 22, "eva02_mim_b": 86, "eva02_mim_l": 304}
    for name, millions in sizes.items():
        with torch.device("meta"):
            student = RECIPES[name]().objective.student(RECIPES[name]().model)
        assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, rel=0.02), name
