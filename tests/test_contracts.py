"""The interfaces that later work relies on, each shown by something other than CLIP where it can be."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from evaclip.data.masks import kept_patches
from evaclip.data.pipeline import Cursor, Stream
from evaclip.data.shards import DataConfig, ShardSet, SourceConfig
from evaclip.engine import Engine, EngineConfig, Objective
from evaclip.evals.zero_shot import ZeroShot, ZeroShotConfig
from evaclip.models.clip import Clip
from evaclip.models.vision import VisionTower
from evaclip.optim import Lamb
from tests.evals.test_card_and_layouts import write_folders
from tests.test_engine import batch


class Reconstruction(nn.Module):
    """A one-phase objective in the manner of masked image modelling: its only feature is its loss per sample."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.student = tower

    def forward(self, batch, whole=False) -> tuple[Tensor, ...]:
        images = batch.images.float() / 255
        hidden = torch.ones(len(images), self.student.shape.patches, dtype=torch.bool)
        hidden.scatter_(1, kept_patches(0, batch.positions, hidden.shape[1], 0.5), False)
        tokens = self.student.tokens(images, mask=hidden)[:, 1:]
        return ((tokens.mean(-1) - images.mean((1, 2, 3))[:, None]).square().mean(1),)

    def loss(self, features: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        return features[0].mean(), {"loss": features[0].mean().detach()}

    def join(self, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        return (torch.cat([part[0] for part in parts]),)

    def constrain(self) -> list:
        return []

    def layers(self) -> dict[str, list[list[str]]]:
        return {"vision": [[name for name, _ in self.student.named_parameters()]]}


def reconstructing(tiny_shape, micro_batches: int = 1) -> Engine:
    torch.manual_seed(0)
    objective = Reconstruction(VisionTower(tiny_shape.vision, 8, mask_token=True))
    objective.student.trunk.head.requires_grad_(False)  # features come from the tokens
    optimizer = Lamb([p for p in objective.student.parameters() if p.requires_grad], lr=0.05)
    config = EngineConfig(device="cpu", precision="fp32", micro_batches=micro_batches)
    return Engine(config, objective, optimizer, clip_norm=1.0)


def test_an_engine_trains_any_objective_and_accumulates_it_exactly(tiny_shape):
    whole, split = reconstructing(tiny_shape), reconstructing(tiny_shape, micro_batches=4)
    assert isinstance(whole.objective, Objective)
    losses = []
    for _ in range(15):
        losses.append(whole.forward_backward(batch())["loss"].item())
        assert set(whole.step()) == {f"gradient_norm/{p}" for p in ("mask_token", "trunk")} | {
            "gradient_norm",
            "skipped",
        }
    assert losses[-1] < 0.5 * losses[0]
    whole = reconstructing(tiny_shape)
    whole.forward_backward(batch())
    split.forward_backward(batch())
    for name, p in whole.parameters.items():
        assert torch.allclose(p.grad, split.parameters[name].grad, rtol=1e-4, atol=1e-7), name


def test_an_engines_state_is_tensors_by_kind_and_numbers(tiny_shape):
    engine = reconstructing(tiny_shape)
    state = engine.state_dict()
    assert set(state) == {"model", "optimizer"}
    assert all(isinstance(value, Tensor) for named in state.values() for value in named.values())
    assert all(isinstance(value, int | float | dict) for value in engine.scalars().values())
    engine.load_state_dict(state, engine.scalars())


def test_a_stream_yields_a_batch_and_the_cursor_after_it(shards):
    source = SourceConfig(name="made", shards=(str(shards()),))
    data = ShardSet(DataConfig(sources=(source,), workers=0))
    stream = Stream(data, Cursor(data.fingerprint, 0, 24), batch_size=8, image_size=16, context=20)
    batch, cursor = next(iter(stream))
    assert batch.positions.tolist() == list(range(24, 32)) and cursor.position == 32
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 3, 16, 16)
    assert len(str(cursor.record())) < 4096


def test_an_evaluator_yields_names_and_values(tiny_shape, tmp_path):
    card = tmp_path / "few.toml"
    shipped = (Path(__file__).parents[1] / "zero_shot" / "cifar10.toml").read_text()
    lines = [line for line in shipped.splitlines() if not line.startswith("per_class")]
    card.write_text("\n".join(lines).replace("count = 10000", "count = 23"))
    write_folders(tmp_path / "cifar")
    evaluator = ZeroShot(ZeroShotConfig(card=str(card), data=tmp_path / "cifar"))
    pairs = list(evaluator(Clip(tiny_shape).eval(), torch.device("cpu"), tmp_path / "out"))
    assert [name for name, _ in pairs] == ["zero_shot/cifar10/top1", "zero_shot/cifar10/top5"]
    assert all(0 <= value <= 1 for _, value in pairs)
