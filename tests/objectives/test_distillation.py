"""Feature distillation: its teachers with and without text, its loss against a plain one, and whole runs."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from evaclip.cli import main
from evaclip.config import load_config
from evaclip.data.masks import drop_path_factors
from evaclip.data.transforms import normalized
from evaclip.encoder import load_encoder, load_image_tower
from evaclip.engine import Engine, EngineConfig
from evaclip.errors import InputError
from evaclip.evals.linear_probe import ProbeConfig
from evaclip.models.distilled import DistilledTower
from evaclip.models.shapes import SHAPES, VisionShape
from evaclip.objectives.distillation import DistillationConfig, whitened
from evaclip.optim import OptimConfig, TowerRates
from evaclip.recipes import RECIPES
from evaclip.train import train
from tests.models.layouts import FAMILIES, eva_clip, openai_clip, shape_of, torchscript
from tests.objectives.test_mim import PIXELS, all_of, batch
from tests.ranks import in_ranks
from tests.test_train import final, losses, same_state, tiny_run

# A student as in the paper, and one that a CLIP run of EVA-02's shape can start from.
PLAIN = VisionShape(
    image_size=16, patch_size=4, width=48, depth=2, heads=3, mlp_hidden=100, relative_position=True, layer_scale=0.1
)
EVA02 = shape_of(FAMILIES["eva02"]).vision
ARGUMENTS = {"img_size": 16, "patch_size": 4, "embed_dim": 40, "depth": 2, "num_heads": 2}


def timm_folder(folder, name="vit_tiny_patch16_224", classes=7, arguments=ARGUMENTS, size=16):
    """A folder as timm's own `save_for_hf` leaves it."""
    torch.manual_seed(3)
    model = timm.create_model(name, pretrained=False, num_classes=classes, **arguments).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    cfg = {"input_size": [3, size, size], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic",
           "crop_pct": 1.0, "num_classes": classes, "classifier": "head", "first_conv": "patch_embed.proj"}  # fmt: skip
    record = {"architecture": name, "num_classes": classes, "model_args": arguments, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(record))
    return model


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Of each kind: OpenAI's plain transformer, ours, a supervised one of timm's, and one with registers."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.jit.save(torchscript(openai_clip()), folder / "openai.pt")
    torch.save(eva_clip(FAMILIES["eva02"]), folder / "eva.pt")
    SHAPES["small-teacher"] = shape_of(FAMILIES["eva02"])
    timm_folder(folder / "supervised")
    timm_folder(folder / "registers", "vit_small_patch14_reg4_dinov2", 0, ARGUMENTS | {"num_heads": 4})
    timm_folder(folder / "patches", arguments=ARGUMENTS | {"class_token": False, "global_pool": "avg"})
    names = {"openai": folder / "openai.pt", "ours": f"small-teacher:{folder / 'eva.pt'}"}
    names |= {name: folder / name for name in ("supervised", "registers", "patches")}
    yield {kind: str(name) for kind, name in names.items()}
    del SHAPES["small-teacher"]


WIDTHS = {"openai": 64, "ours": 48, "supervised": 40, "registers": 40, "patches": 40}


@pytest.mark.parametrize("kind", WIDTHS)
@torch.no_grad()
def test_teachers_give_their_tokens_after_the_last_norm(teachers, kind):
    tower, kept = load_image_tower(teachers[kind]), []
    model = tower.model
    norm = {"openai": "ln_post", "ours": "trunk.norm"}.get(kind, "norm" if kind != "patches" else "blocks.1")
    hook = model.get_submodule(norm).register_forward_hook(lambda module, inputs, output: kept.append(output))
    found = tower.feature_map(PIXELS)
    hook.remove()
    assert found.shape == (4, 16 if kind == "patches" else 17, WIDTHS[kind])
    rows = kept[0]
    expected = torch.cat([rows[:, :1], rows[:, 5:]], 1) if kind == "registers" else rows
    assert torch.equal(found, expected)
    larger = F.interpolate(PIXELS, size=32, mode="nearest")
    assert tower.feature_map(larger).shape == found.shape
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@torch.no_grad()
def test_the_class_token_of_a_two_tower_teacher_is_its_image_feature_before_the_projection(teachers):
    for kind in ("openai", "ours"):
        encoder, tower = load_encoder(teachers[kind]), load_image_tower(teachers[kind])
        first = tower.feature_map(PIXELS)[:, 0]
        project = (lambda x, m=tower.model: x @ m.proj) if kind == "openai" else tower.model.trunk.head
        torch.testing.assert_close(F.normalize(project(first), dim=1), encoder.images(PIXELS))


@torch.no_grad()
def test_timms_model_is_a_teacher_by_name_and_file_with_its_own_normalisation(tmp_path, teachers):
    model = timm_folder(tmp_path / "folder")
    images = (PIXELS / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    torch.testing.assert_close(
        load_image_tower(str(tmp_path / "folder")).feature_map(PIXELS), model.forward_features(images)
    )
    whole = timm.create_model("test_vit", pretrained=False).eval()
    for kind in ("pth", "safetensors"):
        path = tmp_path / f"weights.{kind}"
        save_file(whole.state_dict(), path) if kind == "safetensors" else torch.save(
            {"model": whole.state_dict()}, path
        )
        tower = load_image_tower(f"timm:test_vit:{path}")
        prepared = torch.randn(2, 3, tower.preprocessing.size, tower.preprocessing.size)
        assert torch.equal(tower.tokens(prepared), whole.forward_features(prepared))


def test_teachers_that_cannot_be_are_one_sentence(tmp_path, teachers, monkeypatch):
    shape = replace(shape_of(FAMILIES["eva02"]), dim=40)

    def refused(sentence, teacher, shape=shape, error=InputError):
        with pytest.raises(error, match=sentence) as raised:
            DistillationConfig(teacher=str(teacher)).build(shape, 0)
        assert "\n" not in str(raised.value)

    timm_folder(tmp_path / "resnet", "resnet10t", arguments={}, size=32)
    refused("has no patch tokens", tmp_path / "resnet")
    refused("cannot load timm:vit_nonesuch", "timm:vit_nonesuch")
    refused("of timm:test_vit:/nowhere/x do not exist", "timm:test_vit:/nowhere/x")
    refused("the model ./nowhere does not exist", "./nowhere")
    refused("has 17 tokens and the student a class token and 64 patches", teachers["supervised"],
            replace(shape_of(FAMILIES["eva02"], image_size=32), dim=40))  # fmt: skip
    refused(r"has 64 channels: set --model\.dim 64", teachers["openai"])
    broken = tmp_path / "broken"
    shutil.copytree(teachers["supervised"], broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    refused("timm cannot load", broken)
    with pytest.raises(InputError, match=r"beta 0\.0 must be above 0"):
        DistillationConfig(teacher="x", beta=0.0)


def engine(teacher: str, dim: int, vision: VisionShape = PLAIN, drop_path: float = 0.2, **changes) -> Engine:
    torch.manual_seed(0)
    shape = replace(shape_of(FAMILIES["eva02"]), dim=dim, vision=vision)
    built = DistillationConfig(teacher=teacher, drop_path=drop_path).build(shape, seed=4)
    optim = OptimConfig(optimizer="adamw", vision=TowerRates(lr=1e-2), lr=1e-2).build(built.student, built.layers())
    return Engine(EngineConfig(device="cpu", precision="fp32", **changes), built, optim, None)


@pytest.mark.parametrize("vision", [PLAIN, EVA02], ids=["shared bias", "EVA-02"])
@pytest.mark.parametrize("kind", ["openai", "supervised", "patches"])
def test_the_loss_is_the_papers(teachers, kind, vision):
    """Whitening and smooth L1 written out in float64, over every number of the map."""
    objective = engine(teachers[kind], WIDTHS[kind], vision).objective.eval()
    loss = objective.loss(objective(batch()))[0]
    target = load_image_tower(teachers[kind]).feature_map(batch().images).double()
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    tower = objective.student.visual
    found = tower.trunk.head(tower.tokens(normalized(batch().images))).double()
    found = found[:, 1:] if kind == "patches" else found
    assert found.shape == target.shape
    apart = (found - target).abs()
    expected = torch.where(apart < 2, apart**2 / 4, apart - 1)
    assert (apart > 2).any() and (apart < 2).any()
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_branches_are_dropped_in_training_by_the_samples_own_number(teachers):
    objective = engine(teachers["supervised"], 40, drop_path=0.5).objective.train()
    factors = drop_path_factors(4, batch().positions, 2, 0.5)
    assert factors is not None and (factors == 0).any()
    target = whitened(load_image_tower(teachers["supervised"]).feature_map(batch().images))
    found = objective.student(normalized(batch().images), factors)
    assert objective(batch())[0].item() == pytest.approx(F.smooth_l1_loss(found, target, beta=2.0).item(), rel=1e-6)
    parts = [objective(part)[0].item() for part in batch().split(4)]
    assert sum(parts) / 4 == pytest.approx(objective(batch())[0].item(), rel=1e-5)
    assert objective(batch())[0].item() != objective.eval()(batch())[0].item()


def test_whitening_takes_away_the_size_and_the_place_of_features():
    features = torch.randn(2, 5, 64)
    torch.testing.assert_close(whitened(features * 300 + 7), whitened(features), atol=1e-3, rtol=1e-3)
    found = whitened(features)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.var(-1, unbiased=False), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_accumulation_gives_the_gradient_of_the_whole_batch_and_the_teacher_is_not_trained(teachers):
    whole, split = (engine(teachers["ours"], 48, micro_batches=parts) for parts in (1, 4))
    before = {name: value.clone() for name, value in whole.objective._teacher.model.state_dict().items()}
    loss, other = whole.forward_backward(batch())["loss"], split.forward_backward(batch())["loss"]
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in whole.parameters.items():
        expected = parameter.grad
        assert expected is not None, name
        assert (split.parameters[name].grad - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name
    whole.step()
    assert {name.split(".")[0] for name in whole.objective.state_dict()} == {"student"}
    assert all(torch.equal(value, before[name]) for name, value in whole.objective._teacher.model.state_dict().items())


def test_initial_values_are_the_authors():
    torch.manual_seed(0)
    shape = replace(PLAIN, width=192, mlp_hidden=512)
    trunk = DistilledTower(shape, 64).visual.trunk
    deviation = 0.02 * 0.539  # of a normal distribution cut at one deviation
    for number, block in enumerate(trunk.blocks, 1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(deviation, rel=0.02)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(deviation / (2 * number) ** 0.5, rel=0.02)
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all() and not block.mlp.fc1.bias.any()
    assert (
        trunk.patch_embed.proj.weight.abs().max() <= 0.02 and not trunk.rel_pos_bias.relative_position_bias_table.any()
    )
    assert trunk.head.weight.std().item() == pytest.approx((1 / 192) ** 0.5 / 3**0.5, rel=0.03)  # torch's own
    assert trunk.pos_embed is None


@pytest.fixture
def recipe(tmp_path, shards, monkeypatch, teachers):
    """`evaclip train distilled`: a small tower from a supervised one; `after`, a CLIP run of the same image tower."""
    folder = shards()
    shape = replace(shape_of(FAMILIES["eva02"]), dim=40)
    objective = DistillationConfig(teacher=teachers["supervised"])
    optim = OptimConfig(optimizer="adamw", vision=TowerRates(lr=3e-3), lr=3e-3, warmup=5, clip_norm=3.0)

    def made(run_dir=tmp_path / "fd", vision=PLAIN, **changes):
        model = replace(shape, vision=vision)
        config = tiny_run(run_dir, folder, model=model, objective=objective, steps=40, optim=optim)
        return replace(config, **changes)

    monkeypatch.setitem(RECIPES, "distilled", made)
    monkeypatch.setitem(RECIPES, "distilled_eva", lambda: made(vision=EVA02))
    for name, vision in (("after", PLAIN), ("after_eva", EVA02)):
        model = replace(shape, dim=24, vision=vision)
        monkeypatch.setitem(
            RECIPES, name, lambda model=model: tiny_run(tmp_path / "clip", folder, model=model, steps=1)
        )
    return made


@pytest.mark.parametrize("ending", ["", "_eva"], ids=["shared bias", "EVA-02"])
def test_a_run_learns_and_a_clip_run_of_its_shape_starts_from_it(tmp_path, recipe, capfd, ending):
    assert main(["train", f"distilled{ending}", "--objective.drop-path", "0.1", "--steps", "25"]) == 0
    said = capfd.readouterr()
    assert "all 16 patches seen, feature map of the teacher" in said.err and "text tower" not in said.err
    curve = list(losses(tmp_path / "fd").values())
    assert sum(curve[-5:]) / 5 < 0.7 * sum(curve[:5]) / 5
    assert load_config(tmp_path / "fd").objective.drop_path == 0.1
    assert main(["train", f"after{ending}", "--vision-init", str(tmp_path / "fd"), "--optim.vision.lr", "0"]) == 0
    table = [line for line in capfd.readouterr().err.splitlines() if line.startswith("  renewed  visual")]
    assert len(table) == 2 and all("trunk.head" in line for line in table)
    before, after = (final(tmp_path / name).tensors["model"] for name in ("fd", "clip"))
    kept = [name for name in before if "trunk.head" not in name]
    assert len(kept) > 20 and all(torch.equal(after[name], before[name]) for name in kept)
    # And it is a teacher itself, as a run without text.
    tower = load_image_tower(str(tmp_path / "fd"))
    assert tower.objective is not None and tower.feature_map(PIXELS).shape == (4, 17, 48)
    # A tower of the other shape has no place for it.
    other = "after" if ending else "after_eva"
    assert main(["train", other, "--vision-init", str(tmp_path / "fd"), "--run-dir", str(tmp_path / "no")]) != 0
    assert "is it of another shape" in capfd.readouterr().err.splitlines()[-1]


def test_a_distilled_run_goes_on_bit_for_bit(tmp_path, recipe):
    train(recipe(steps=6))
    shutil.copytree(tmp_path / "fd", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000006")
    train(recipe(run_dir=tmp_path / "parts", steps=6, resume="auto"))
    assert same_state(tmp_path / "fd", tmp_path / "parts")


def test_two_ranks_train_as_one_process_does(tmp_path, recipe):
    train(recipe(steps=4))
    runs = [recipe(run_dir=tmp_path / kind, steps=4, engine=EngineConfig(precision="fp32", device="cpu", kind=kind))
            for kind in ("ddp", "fsdp2")]  # fmt: skip
    in_ranks(2, all_of, runs)
    for run in runs:
        assert losses(run.run_dir) == pytest.approx(losses(tmp_path / "fd"), rel=5e-5), run.run_dir
        assert final(run.run_dir).tensors["model"].keys() == final(tmp_path / "fd").tensors["model"].keys()


def test_distilled_runs_that_cannot_be_are_one_sentence(tmp_path, recipe, capfd):
    def refused(sentence, *arguments):
        assert main([*arguments]) == 2
        assert sentence in capfd.readouterr().err.splitlines()[-1]

    refused("feature distillation starts from random", "train", "distilled", "--vision-init", str(tmp_path))
    refused("evaclip plan counts contrastive runs", "plan", "fd_clip_b", "--gpus", "8")
    train(recipe(steps=1))
    with pytest.raises(InputError, match="not the folder of a run that has two towers"):
        load_encoder(tmp_path / "fd")
    cifar = RECIPES["eva02_tiny_cifar10"]().evals
    with pytest.raises(InputError, match="feature distillation has no text tower to score"):
        recipe(evals=cifar)
    with pytest.raises(InputError, match="feature distillation has no text tower to score"):
        recipe(evals=replace(cifar, zero_shot=(), probe=(ProbeConfig(card="cifar10", data=tmp_path),)))


def test_the_published_recipes_are_the_papers():
    base, dino, large = RECIPES["fd_clip_b"](), RECIPES["fd_dino_b"](), RECIPES["fd_clip_l"]()
    assert base.optim.lr == pytest.approx(1.2e-3) and base.optim.lr * base.optim.floor == pytest.approx(2e-5)
    assert (base.batch_size, base.steps, base.optim.warmup) == (2048, 300 * 625, 10 * 625)
    assert [run.objective.drop_path for run in (base, dino, large)] == [0.2, 0.3, 0.3]
    assert base.objective.beta == 2.0 and base.data.crop.scale == (0.08, 1.0) and base.data.crop.flip
    assert (base.model.vision.patches, large.model.vision.patches) == (196, 256)
    for name, millions in {"fd_clip_b": 86.3, "fd_deit_b": 86.3, "fd_clip_l": 304.1}.items():
        with torch.device("meta"):
            student = RECIPES[name]().objective.student(RECIPES[name]().model)
        assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, rel=0.005), name
