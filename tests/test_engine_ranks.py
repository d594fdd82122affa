"""Engines over several processes: gradients, LAMB, losses and saved state are those of a single process."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from evaclip.data.pipeline import Batch
from evaclip.engine import Engine, EngineConfig, build_engine
from evaclip.models.clip import Clip
from evaclip.models.shapes import ClipShape, TextShape, eva02_small
from evaclip.objectives.clip import ClipConfig
from evaclip.optim import OptimConfig, TowerRates, set_learning_rates
from tests.ranks import in_ranks
from tests.test_engine import batch

STEPS = 20
KINDS = ("ddp", "zero1", "zero2", "fsdp2")


def shape() -> ClipShape:
    text = TextShape(width=32, depth=2, heads=2)
    return eva02_small("tiny", image_size=16, patch_size=4, width=48, depth=2, heads=2, dim=24, text=text)


def kinds() -> tuple[str, ...]:
    """FSDP2 and ZeRO are refused where there is nothing to spread over, so one process has its own list."""
    return KINDS if dist.get_world_size() > 1 else ("ddp", "zero1", "zero2")


def clip_engine(kind: str, **changes: Any) -> Engine:
    torch.manual_seed(0)
    objective = ClipConfig(drop_path=0.2, loss_precision="fp32").build(shape(), seed=4)
    rates = TowerRates(lr=1e-2, layer_decay=0.8)
    optim = OptimConfig(vision=rates, text=rates, lr=1e-2, clip_norm=1.0)
    config = EngineConfig(**({"device": "cpu", "precision": "fp32", "kind": kind} | changes))
    return build_engine(config, objective, optim)


def rows(whole: Batch) -> Batch:
    """This rank's part of a batch."""
    return whole.split(dist.get_world_size())[dist.get_rank()]


def whole_gradients(engine: Engine) -> dict[str, Tensor]:
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone())
        for name, p in engine.parameters.items()
    }


# Gradients and loss curves of CLIP.


def single_gradients() -> dict[str, Tensor]:
    engine = clip_engine("ddp")
    engine.forward_backward(batch(24))
    return whole_gradients(engine)


def check_gradients(right: dict[str, Tensor]) -> None:
    ways = [{}, {"micro_batches": 3}, {"micro_batches": 3, "keep_activations_gb": 1.0}]
    for kind, way in itertools.product(("ddp", "fsdp2") if dist.get_world_size() > 1 else ("ddp",), ways):
        if 24 // dist.get_world_size() % 3 and way:
            continue
        engine = clip_engine(kind, **way)
        engine.forward_backward(rows(batch(24)))
        found = whole_gradients(engine)
        for name, expected in right.items():
            error = (found[name] - expected).norm()
            assert error <= 1e-5 * expected.norm() + 1e-8, (kind, way, name, error, expected.norm())


def curve(kind: str, **changes: Any) -> list[float]:
    engine = clip_engine(kind, **changes)
    losses = []
    for number in range(STEPS):
        set_learning_rates(engine.optimizer, min(1.0, (number + 1) / 5))
        losses.append(engine.forward_backward(rows(batch(24, first=24 * number)))["loss"].item())
        engine.step()
    return losses


def single_curve() -> list[float]:
    return curve("ddp")


def check_curves(right: list[float]) -> None:
    for kind in kinds():
        found = curve(kind, micro_batches=2 if kind == "zero1" and 24 // dist.get_world_size() % 2 == 0 else 1)
        assert found == pytest.approx(right, rel=1e-5), (kind, dist.get_world_size())


# LAMB, fed the same gradients as a float64 LAMB that is written down from the paper.


@dataclass(frozen=True)
class Step:
    """A batch that only says which step it is."""

    number: int

    def split(self, parts: int) -> list["Step"]:
        return [self] * parts

    def to(self, device: torch.device) -> "Step":
        return self


def made_gradient(name: str, like: Tensor, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + sum(name.encode()))
    return torch.randn(like.shape, generator=generator) * (0.01 + 0.1 * (len(name) % 7))


class Given(nn.Module):
    """An objective whose gradient is a given one: its loss is the inner product of the parameters with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        small = shape()
        self.student = Clip(
            ClipShape(name="g", dim=24, vision=small.vision, text=TextShape(width=32, depth=2, heads=2, vocabulary=60))
        )

    def forward(self, step: Step, whole: bool = False) -> tuple[Tensor, ...]:
        named = self.student.named_parameters()
        return (torch.stack([(p * made_gradient(name, p, step.number)).sum() for name, p in named]).sum(),)

    def loss(self, features: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return features[0], {"loss": features[0].detach()}

    def join(self, parts: Any) -> tuple[Tensor, ...]:
        return (torch.stack([part[0] for part in parts]).sum(),)

    def constrain(self) -> list:
        return []

    def layers(self) -> dict[str, list[list[str]]]:
        return self.student.layers()


def optim_config(weight_decay: float, **changes: Any) -> OptimConfig:
    return OptimConfig(
        vision=TowerRates(lr=2e-2, layer_decay=0.7), text=TowerRates(lr=1e-2, layer_decay=0.9), lr=3e-2,
        weight_decay=weight_decay, clip_norm=2.0, **changes,
    )  # fmt: skip


def factor(number: int) -> float:
    return math.cos(number / 15)


def given_engine(kind: str, weight_decay: float, **changes: Any) -> Engine:
    config = EngineConfig(device="cpu", precision="fp32", kind=kind)
    return build_engine(config, Given(), optim_config(weight_decay, **changes))


def advance(engine: Engine, first: int, last: int) -> None:
    for number in range(first, last):
        set_learning_rates(engine.optimizer, factor(number))
        if engine.config.kind == "fsdp2":  # its blocks have their parameters only while they work
            for name, p in engine.parameters.items():
                gradient = made_gradient(name, torch.empty(p.shape), number)
                p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
        else:
            engine.forward_backward(Step(number))
        engine.step()


def lamb_in_float64(weight_decay: float, steps: int) -> dict[str, Tensor]:
    """Algorithm 2 of the paper, tensor by tensor, with the clipping before it."""
    student = Given().student
    config = optim_config(weight_decay)
    x = {name: p.detach().double() for name, p in student.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in x.items()} for _ in range(2))
    for number in range(steps):
        grads = {name: made_gradient(name, p, number).double() for name, p in x.items()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        clip = min(1.0, 2.0 / (norm.item() + 1e-6))
        for setting in config.settings_of(student, student.layers()):
            name, g = setting.name, clip * grads[setting.name]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.98 * v[name] + 0.02 * g * g
            r = (m[name] / (1 - 0.9 ** (number + 1))) / ((v[name] / (1 - 0.98 ** (number + 1))).sqrt() + 1e-6)
            r = r + (weight_decay if setting.decay else 0.0) * x[name]
            ratio = x[name].norm() / r.norm() if setting.adapt and x[name].norm() > 0 and r.norm() > 0 else 1.0
            x[name] = x[name] - setting.lr * factor(number) * ratio * r
    return x


def check_weights(engine: Engine, right: dict[str, Tensor], what: Any) -> None:
    state = engine.state_dict()["model"]
    for name, expected in right.items() if dist.get_rank() == 0 else ():
        error = (state[name].double() - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < 1e-6, (what, name, error)


def check_lamb(right: dict[float, dict[str, Tensor]], saved: Any) -> dict[str, Any]:
    """Twenty steps at once, and the second ten from what another number of ranks saved; returns what this one saves."""
    states = {}
    for kind, weight_decay in itertools.product(kinds(), right):
        engine = given_engine(kind, weight_decay)
        advance(engine, 0, 10)
        if weight_decay:
            state = engine.state_dict()
            states[kind] = (
                {k: {n: t.clone() for n, t in named.items()} for k, named in state.items()},
                engine.scalars(),
            )
        advance(engine, 10, STEPS)
        check_weights(engine, right[weight_decay], (kind, weight_decay))
    for kind, (tensors, scalars) in (saved or {}).items():
        for other in sorted({kind, "ddp"} & set(kinds())):
            engine = given_engine(other, 0.05)
            engine.load_state_dict(tensors, scalars)
            advance(engine, 10, STEPS)
            check_weights(engine, right[0.05], ("resumed", kind, other))
    check_not_finite()
    check_published_scope()
    check_loss_scaling()
    check_pure_bf16()
    check_first_process_decides()
    return states if dist.get_rank() == 0 else {}


def check_not_finite() -> None:
    """A gradient that is not finite on one rank changes nothing on any, and the step does not count."""
    for kind in kinds():
        engine = clip_engine(kind)
        before = {n: t.clone() for n, t in engine.state_dict()["model"].items()}
        broken = rows(batch(24))
        with torch.no_grad():
            scale = engine.objective.student.text.ln_final.weight
            kept = scale.detach().clone()
            if dist.get_rank() == 0:
                scale.fill_(float("nan"))
        engine.forward_backward(broken)
        with torch.no_grad():
            scale.copy_(kept)
        assert engine.step()["skipped"].item() == 1, kind
        after = engine.state_dict()["model"]
        assert before or dist.get_rank() > 0
        assert all(torch.equal(t, after[n]) for n, t in before.items()), kind
        assert engine.scalars()["optimizer_step"] == 0, kind
        engine.forward_backward(rows(batch(24)))
        assert engine.step()["skipped"].item() == 0 and engine.scalars()["optimizer_step"] == 1, kind


def check_published_scope() -> None:
    """The published runs' ratio, per partition of each group as DeepSpeed cuts them, against the same in float64."""
    engine = given_engine("zero1", 0.05, trust_scope="ds_partition")
    advance(engine, 0, 5)
    found = engine.state_dict()["model"]
    for name, expected in published_lamb_in_float64(5, dist.get_world_size()).items():
        error = (found[name].double() - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < 1e-6, (name, error)


def published_lamb_in_float64(steps: int, world: int) -> dict[str, Tensor]:
    """DeepSpeed's fused LAMB on flat partitions: the correction of the bias comes after the ratio, in [0.01, 10]."""
    student = Given().student
    config = optim_config(0.05)
    groups: dict[Any, list[str]] = {}
    for s in config.settings_of(student, student.layers()):
        groups.setdefault((s.lr, s.decay, s.adapt), []).append(s.name)
    shapes = {name: p.shape for name, p in student.named_parameters()}
    x = {name: p.detach().double() for name, p in student.named_parameters()}
    flat = {key: torch.cat([x[name].flatten() for name in names]) for key, names in groups.items()}
    m, v = ({key: torch.zeros_like(f) for key, f in flat.items()} for _ in range(2))
    for number in range(steps):
        gradient = {n: made_gradient(n, torch.empty(shape), number).double() for n, shape in shapes.items()}
        clip = min(1.0, 2.0 / (torch.stack([g.norm() for g in gradient.values()]).norm().item() + 1e-6))
        for key, names in groups.items():
            g = clip * torch.cat([gradient[name].flatten() for name in names])
            m[key], v[key] = 0.9 * m[key] + 0.1 * g, 0.98 * v[key] + 0.02 * g * g
            r = m[key] / (v[key].sqrt() + 1e-6) + (0.05 if key[1] else 0.0) * flat[key]
            part = math.ceil(len(g) / (2 * world)) * 2
            length = key[0] * factor(number) * math.sqrt(1 - 0.98 ** (number + 1)) / (1 - 0.9 ** (number + 1))
            for own, update in zip(flat[key].split(part), r.split(part), strict=True):
                ratio = own.norm() / update.norm() if own.norm() > 0 and update.norm() > 0 else torch.tensor(1.0)
                own.sub_(length * ratio.clamp(0.01, 10) * update)
    for key, names in groups.items():
        parts = flat[key].split([shapes[name].numel() for name in names])
        x |= {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}
    return x


def check_loss_scaling() -> None:
    """float16 towers: every engine takes the steps of DDP, and an overflow halves everybody's scale."""
    weights = {}
    for kind in kinds():
        engine = clip_engine(kind, precision="fp16", micro_batches=2 if kind == "fsdp2" else 1)
        engine._loss_scale.value = 2.0
        for number in range(4):
            set_learning_rates(engine.optimizer, 0.1)
            engine.forward_backward(rows(batch(24, first=24 * number)))
            assert engine.step()["skipped"].item() == 0, kind
        weights[kind] = engine.state_dict()["model"]
        assert engine.scalars()["loss_scale"] == {"value": 2.0, "good_steps": 4}
        engine._loss_scale.value = 2.0**60  # features of float16 cannot hold gradients of that size
        engine.forward_backward(rows(batch(24)))
        assert engine.step()["skipped"].item() == 1, kind
        assert engine.scalars()["loss_scale"] == {"value": 2.0**59, "good_steps": 0}
    for kind, found in weights.items():
        for name, value in found.items():
            expected = weights["ddp"][name]
            assert (value - expected).norm() <= 2e-3 * expected.norm() + 1e-4, (kind, name)


def check_pure_bf16() -> None:
    """Blocks in bfloat16 follow the curve of float32, from unrounded masters."""
    for kind in {"ddp", "fsdp2"} & set(kinds()):
        exact, rounded = clip_engine(kind), clip_engine(kind, precision="pure_bf16")
        before, after = exact.state_dict()["model"], rounded.state_dict()["model"]
        assert all(torch.equal(value, after[name]) for name, value in before.items()), kind
        for number in range(5):
            parts = rows(batch(24, first=24 * number))
            losses = [engine.forward_backward(parts)["loss"].item() for engine in (exact, rounded)]
            assert losses[0] == pytest.approx(losses[1], abs=0.05), (kind, number)
            for engine in (exact, rounded):
                engine.step()


def check_first_process_decides() -> None:
    """Each rank draws other weights; all train the first one's. FSDP2 builds none at all in the others."""
    for kind in kinds():
        torch.manual_seed(dist.get_rank())
        config = EngineConfig(device="cpu", precision="fp32", kind=kind)
        with config.construction():
            objective = ClipConfig().build(shape(), seed=0)
        assert next(objective.parameters()).is_meta == (kind == "fsdp2" and dist.get_rank() > 0)
        found = build_engine(config, objective, OptimConfig()).state_dict()["model"]
        torch.manual_seed(0)
        expected = ClipConfig().build(shape(), seed=0).student.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), kind


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """What one process computes, and what it saves after ten steps."""
    lamb = {decay: lamb_in_float64(decay, STEPS) for decay in (0.0, 0.05)}
    return {"gradients": single_gradients(), "curve": single_curve_alone(), "lamb": lamb, "saved": {}}


def single_curve_alone() -> list[float]:
    return in_ranks(1, single_curve)[0]


def check_world(right: dict[str, Any]) -> dict[str, Any]:
    check_gradients(right["gradients"])
    check_curves(right["curve"])
    return check_lamb(right["lamb"], right["saved"])


@pytest.mark.parametrize("world", [2, 1, 3, 4])
def test_engines_agree_with_one_process(single, world):
    """Each world also continues what the one before it saved."""
    single["saved"] = in_ranks(world, check_world, single)[0]
