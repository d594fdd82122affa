"""The plan's numbers against the arithmetic of transformers written down, and the command line."""

from dataclasses import replace

import pytest

from evaclip.cli import main
from evaclip.config import RunConfig
from evaclip.plan import Plan, PlanCommand, plan
from evaclip.recipes import RECIPES


def planned(config: RunConfig, gpus: int, **changes) -> Plan:
    return plan(config, PlanCommand(gpus=gpus, **changes))


def matmul_flops(width: int, hidden: int, depth: int, tokens: int, gates: int) -> float:
    """Forward FLOPs of a transformer's blocks for one sample: projections, attention, MLP."""
    projections = 4 * width * width + gates * width * hidden
    return depth * (2 * tokens * projections + 4 * tokens * tokens * width)


def test_arithmetic_and_memory_are_those_written_down():
    config = RECIPES["eva02_clip_b16"]()
    found = planned(config, 64)
    assert found.parameters == pytest.approx(149.69e6, rel=1e-4)
    vision = matmul_flops(768, 2048, 12, 99, gates=3) + 2 * 196 * 768 * 768 + 2 * 768 * 512
    text = matmul_flops(512, 2048, 12, 20, gates=2) + 2 * 512 * 512
    assert found.tower_flops == pytest.approx(3 * 131_072 * (vision + text), rel=0.01)
    assert found.repeated_flops == pytest.approx(found.tower_flops / 3)
    assert found.loss_flops == 8 * 131_072**2 * 512
    assert found.memory["parameters"] == 4 * found.parameters and found.memory["moments"] == 8 * found.parameters
    assert found.step_seconds == pytest.approx(
        (found.tower_flops + found.repeated_flops + found.loss_flops) / (64 * 989e12 * 0.4)
    )


def test_sharding_masking_and_micro_batches_save_what_they_should():
    config = RECIPES["eva02_clip_l14"]()
    whole = planned(config, 128)
    assert whole.memory["moments"] == pytest.approx(8 * whole.parameters / 128)
    unmasked = planned(RECIPES["eva02_clip_l14_published"](), 128)
    assert 1.7 < unmasked.tower_flops / whole.tower_flops < 2.1
    parts = planned(replace(config, engine=replace(config.engine, micro_batches=4)), 128)
    assert parts.memory["activations"] == pytest.approx(whole.memory["activations"] / 4)
    assert parts.repeated_flops > whole.repeated_flops
    plain = planned(replace(config, objective=replace(config.objective, checkpointing=False)), 128)
    assert plain.memory["activations"] > 3 * whole.memory["activations"] and plain.repeated_flops == 0


def test_the_largest_needs_its_parameters_spread():
    config = RECIPES["eva_clip_18b"]()
    found = planned(config, 360)
    assert found.parameters == pytest.approx(18.1e9, rel=0.02)
    assert found.memory["parameters"] + found.memory["gradients"] + found.memory["moments"] < 1e9
    assert planned(replace(config, engine=replace(config.engine, kind="ddp")), 360).memory["parameters"] > 70e9


def test_the_command_prints_a_table_and_refuses_what_does_not_divide(capfd):
    assert main(["plan", "eva02_clip_b16", "--gpus", "64", "--run.engine.micro-batches", "2"]) == 0
    said = capfd.readouterr().out
    for words in ("memory of a GPU", "micro-batch of 1,024", "received: captions", "not measured"):
        assert words in said
    assert main(["plan", "eva02_clip_b16", "--gpus", "7"]) == 2
    assert "a batch of 131,072 does not divide among 7 GPUs" in capfd.readouterr().err
    assert main(["plan"]) == 0
    assert main(["plan", "eva02_clip_b17", "--gpus", "7"]) == 2
