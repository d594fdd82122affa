"""The engine: accumulation that changes no gradient, clipping, skipped steps, state that comes back."""

import pytest
import torch

from evaclip.data.pipeline import Batch
from evaclip.engine import Engine, EngineConfig, build_engine
from evaclip.engine.loss_scale import LossScale
from evaclip.errors import CheckpointError, InputError
from evaclip.objectives.clip import ClipConfig
from evaclip.optim import OptimConfig, TowerRates, set_learning_rates


def batch(size: int = 16, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.zeros(size, 12, dtype=torch.int32)
    for row in range(size):
        length = int(torch.randint(1, 10, (1,), generator=generator))
        tokens[row, 0], tokens[row, length + 1] = 49406, 49407
        tokens[row, 1 : length + 1] = torch.randint(1, 40_000, (length,), generator=generator)
    return Batch(images, tokens, torch.arange(first, first + size))


def engine(shape, *, clip_norm=None, optimizer="lamb", objective=None, **changes) -> Engine:
    torch.manual_seed(0)
    built = ClipConfig(**({"drop_path": 0.2} | (objective or {}))).build(shape, seed=4)
    rates = TowerRates(lr=1e-2)
    optim = OptimConfig(optimizer=optimizer, vision=rates, text=rates, lr=1e-2).build(built.student, built.layers())
    config = EngineConfig(**({"device": "cpu", "precision": "fp32"} | changes))
    return Engine(config, built, optim, clip_norm)


def gradients(of: Engine) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in of.parameters.items()}


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_shape, parts):
    """With half the patches masked and drop path on, the second pass must repeat the choices of the first."""
    whole, split = engine(tiny_shape), engine(tiny_shape, micro_batches=parts)
    loss, other = whole.forward_backward(batch())["loss"], split.forward_backward(batch())["loss"]
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    right, found = gradients(whole), gradients(split)
    assert right.keys() == found.keys() == dict(whole.objective.student.named_parameters()).keys()
    for name, expected in right.items():
        # Where the true gradient vanishes (a bias before a norm) only rounding is left.
        assert (found[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name


def test_masks_matter_and_are_keyed_by_the_seed_and_position(tiny_shape):
    model = engine(tiny_shape).objective
    first, again = model(batch())[0], model(batch())[0]
    moved = model(Batch(batch().images, batch().tokens, batch().positions + 1))[0]
    assert torch.equal(first, again) and not torch.equal(first, moved)
    model.eval()
    unmasked = model(batch())[0]
    assert not torch.allclose(unmasked, first, atol=1e-3)


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_clipping_bounds_the_global_norm(tiny_shape, clip_norm, monkeypatch):
    found = engine(tiny_shape, clip_norm=clip_norm)
    found.forward_backward(batch())
    before = torch.cat([g.flatten() for g in gradients(found).values()]).norm()
    monkeypatch.setattr(found.optimizer, "step", lambda *_: None)
    metrics = found.step()
    after = torch.cat([g.flatten() for g in gradients(found).values()]).norm()
    assert metrics["gradient_norm"].item() == pytest.approx(before.item(), rel=1e-5)
    assert after.item() == pytest.approx(min(clip_norm, before.item()), rel=1e-4)
    parts = torch.stack([metrics[f"gradient_norm/{part}"] for part in ("visual", "text", "logit_scale")])
    assert parts.norm().item() == pytest.approx(before.item(), rel=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_shape):
    found = engine(tiny_shape)
    found.forward_backward(batch())
    found.parameters["logit_scale"].grad.fill_(float("nan"))
    before = {name: p.clone() for name, p in found.parameters.items()}
    assert found.step()["skipped"].item() == 1
    assert all(torch.equal(p, before[name]) for name, p in found.parameters.items())
    assert found.scalars()["optimizer_step"] == 0
    found.forward_backward(batch())
    assert found.step()["skipped"].item() == 0 and found.scalars()["optimizer_step"] == 1


def test_the_logit_scale_is_constrained_after_the_step(tiny_shape):
    found = engine(tiny_shape)
    found.parameters["logit_scale"].data.fill_(9.0)
    found.forward_backward(batch())
    found.step()
    assert found.parameters["logit_scale"].exp().item() == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_state_comes_back_bit_for_bit(tiny_shape, optimizer):
    def step(which: Engine, number: int) -> None:
        which.forward_backward(batch(first=16 * number))
        which.step()

    straight = engine(tiny_shape, optimizer=optimizer)
    for number in range(3):
        step(straight, number)
    restored = engine(tiny_shape, optimizer=optimizer)
    state = {kind: {n: t.clone() for n, t in named.items()} for kind, named in straight.state_dict().items()}
    restored.load_state_dict(state, straight.scalars())
    for number in range(3, 6):
        step(straight, number)
        step(restored, number)
    assert all(torch.equal(p, restored.parameters[name]) for name, p in straight.parameters.items())


def test_state_that_does_not_fit_is_refused(tiny_shape):
    found = engine(tiny_shape)
    state, scalars = found.state_dict(), found.scalars()
    short = {
        "model": state["model"],
        "optimizer": {k: v for k, v in state["optimizer"].items() if "cls_token" not in k},
    }
    with pytest.raises(
        CheckpointError, match=r"optimizer state does not fit this run: it lacks visual\.trunk\.cls_token"
    ):
        found.load_state_dict(short, scalars)
    more = {"model": state["model"] | {"extra": torch.zeros(1)}, "optimizer": state["optimizer"]}
    with pytest.raises(CheckpointError, match="it holds extra besides"):
        found.load_state_dict(more, scalars)


def test_bf16_trains_with_float32_parameters_and_loss(tiny_shape):
    found, exact = engine(tiny_shape, precision="bf16"), engine(tiny_shape)
    loss = found.forward_backward(batch())["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.forward_backward(batch())["loss"].item(), abs=0.1)
    found.step()
    assert all(p.dtype == torch.float32 for p in found.parameters.values())


def test_checkpointing_inside_the_towers_changes_nothing(tiny_shape):
    plain, sparing = engine(tiny_shape), engine(tiny_shape, objective={"checkpointing": True})
    for found in (plain, sparing):
        found.forward_backward(batch())
    other = gradients(sparing)
    assert all(torch.equal(g, other[name]) for name, g in gradients(plain).items())


def test_a_gpu_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no CUDA device"):
        EngineConfig(device="cuda").resolved_device()
    assert EngineConfig(device="auto").resolved_device().type == "cpu"


@pytest.mark.parametrize(
    ("kind", "precision", "sentence"),
    [
        ("zero1", "fp32", "start them with torchrun"),
        ("fsdp2", "fp32", "start them with torchrun"),
        ("zero2", "pure_bf16", "pure_bf16 runs under ddp and fsdp2; ZeRO here takes bf16 or fp16"),
    ],
)
def test_engines_that_spread_the_work_say_what_they_need(tiny_shape, kind, precision, sentence):
    objective = ClipConfig().build(tiny_shape, seed=0)
    with pytest.raises(InputError, match=sentence):
        build_engine(EngineConfig(device="cpu", kind=kind, precision=precision), objective, OptimConfig())


def test_a_budget_keeps_activations_and_saves_second_passes(tiny_shape):
    """All but the last micro-batch fit a large budget, none a small one; the gradient is the same (see the ranks)."""
    passes = {}
    for budget in (0.0, 1e-6, 1.0):
        found = engine(tiny_shape, micro_batches=4, keep_activations_gb=budget)
        found.forward_backward(batch())  # the first step measures
        calls = []
        found.objective.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.forward_backward(batch())
        passes[budget] = len(calls)
    assert passes == {0.0: 8, 1e-6: 8, 1.0: 5}


def test_a_fixed_logit_scale_is_not_learnt(tiny_shape):
    for parts in (1, 2):
        found = engine(tiny_shape, objective={"fixed_logit_scale": 50.0}, micro_batches=parts)
        for _ in range(2):
            found.forward_backward(batch())
            found.step()
        assert "logit_scale" not in found.parameters
        assert found.objective.student.logit_scale.exp().item() == pytest.approx(50, rel=1e-6)


def test_the_sigmoid_loss_trains_with_its_bias(tiny_shape):
    whole, split = (engine(tiny_shape, objective={"loss": "sigmoid"}, micro_batches=n) for n in (1, 4))
    first = whole.forward_backward(batch())["loss"].item()
    assert split.forward_backward(batch())["loss"].item() == pytest.approx(first, rel=1e-3)
    for name, right in gradients(whole).items():
        assert (gradients(split)[name] - right).norm() <= 2e-3 * right.norm() + 1e-7, name
    for _ in range(10):
        whole.step()
        last = whole.forward_backward(batch())["loss"].item()
    assert last < first and whole.parameters["logit_bias"].grad is not None


def test_an_overflow_halves_the_loss_scale_and_two_thousand_good_steps_double_it():
    scale = LossScale(dynamic=True)
    scale.update(finite=False)
    assert scale.value == 2.0**15
    for _ in range(2000):
        scale.update(finite=True)
    assert scale.value == 2.0**16
    again = LossScale(dynamic=True)
    again.restore(scale.state())
    assert again.state() == scale.state()
    fixed = LossScale(dynamic=False)
    fixed.update(finite=False)
    assert fixed.value == 1.0 and fixed.state() == {}


def test_scaled_gradients_come_back_unscaled(tiny_shape):
    exact, scaled = engine(tiny_shape), engine(tiny_shape, precision="fp16")
    scaled._loss_scale.value = 8.0
    for found in (exact, scaled):
        found.forward_backward(batch())
        found.step()
    for name, right in gradients(exact).items():
        assert (gradients(scaled)[name] - right).norm() <= 0.05 * right.norm() + 1e-4, name


def test_pure_bf16_rounds_copies_and_never_the_masters(tiny_shape):
    found, exact = engine(tiny_shape, precision="pure_bf16"), engine(tiny_shape)
    start = {name: p.clone() for name, p in exact.parameters.items()}
    assert all(torch.equal(p, start[name]) for name, p in found.parameters.items())
    student = found.objective.student
    assert student.visual.trunk.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    assert student.logit_scale.dtype == torch.float32
    set_learning_rates(found.optimizer, 1e-4)  # steps too small for bfloat16 to see at once
    for number in range(3):
        found.forward_backward(batch(first=16 * number))
        found.step()
    weight = "visual.trunk.blocks.0.attn.q_proj.weight"
    assert not torch.equal(found.state_dict()["model"][weight], start[weight])
    restored = engine(tiny_shape, precision="pure_bf16")
    state = {kind: {n: t.clone() for n, t in named.items()} for kind, named in found.state_dict().items()}
    restored.load_state_dict(state, found.scalars())
    set_learning_rates(restored.optimizer, 1e-4)
    for which in (found, restored):
        which.forward_backward(batch())
        which.step()
    assert all(torch.equal(p, restored.parameters[name]) for name, p in found.parameters.items())
    whole = found.whole_student()
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in found.state_dict()["model"].items())
