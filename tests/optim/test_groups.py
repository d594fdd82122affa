"""Every parameter gets the rates that the rules say, and a rule that says nothing is an error."""

import math
from itertools import pairwise

import pytest
import torch

from evaclip.errors import InputError
from evaclip.models.clip import Clip
from evaclip.optim import Lamb, OptimConfig, Rule, TowerRates, set_learning_rates, warmup_cosine
from evaclip.optim.groups import settings


@pytest.fixture
def model(tiny_shape):
    return Clip(tiny_shape)


def chosen(model, **changes):
    towers = {"vision": TowerRates(lr=4e-4, layer_decay=0.5), "text": TowerRates(lr=4e-5, layer_decay=0.75)}
    arguments = {"other_lr": 1e-2, "adapt_undecayed": False} | changes
    return {s.name: s for s in settings(model, model.layers(), towers, **arguments)}


def test_layer_decay_counts_from_the_top_of_each_tower(model):
    found = chosen(model)
    rates = {
        "visual.trunk.head.weight": 4e-4,
        "visual.trunk.norm.weight": 4e-4,
        "visual.trunk.blocks.1.attn.q_proj.weight": 2e-4,
        "visual.trunk.blocks.0.mlp.fc2.weight": 1e-4,
        "visual.trunk.patch_embed.proj.weight": 5e-5,
        "visual.trunk.pos_embed": 5e-5,
        "text.text_projection": 4e-5,
        "text.ln_final.bias": 4e-5,
        "text.transformer.resblocks.1.mlp.c_fc.weight": 4e-5 * 0.75,
        "text.token_embedding.weight": 4e-5 * 0.75**3,
        "logit_scale": 1e-2,
    }
    assert {name: found[name].lr for name in rates} == pytest.approx(rates)
    assert set(found) == {name for name, _ in model.named_parameters()}


def test_what_is_not_decayed(model):
    undecayed = {name for name, setting in chosen(model).items() if not setting.decay}
    for name, parameter in model.named_parameters():
        special = name in {"visual.trunk.pos_embed", "visual.trunk.cls_token", "text.positional_embedding"}
        assert (name in undecayed) == (parameter.ndim == 1 or special), name
    assert "text.token_embedding.weight" not in undecayed


@pytest.mark.parametrize("everywhere", [False, True])
def test_undecayed_parameters_are_adapted_by_choice(model, everywhere):
    found = chosen(model, adapt_undecayed=everywhere)
    assert found["visual.trunk.norm.bias"].adapt is everywhere
    assert found["visual.trunk.head.weight"].adapt


def test_the_first_rule_that_speaks_wins(model):
    rules = (
        Rule(pattern=r"blocks\.0\.", lr=0.1),
        Rule(pattern=r"blocks\.", lr=0.2, decay=False),
        Rule(pattern=r"norm1\.weight$", adapt=True, decay=True),
    )
    found = chosen(model, rules=rules)
    plain = chosen(model)
    name = "visual.trunk.blocks.0.norm1.weight"
    assert found[name].lr == pytest.approx(0.1 * plain[name].lr)
    assert (found[name].decay, found[name].adapt) == (False, True)
    other = "visual.trunk.blocks.1.mlp.fc2.weight"
    assert found[other].lr == pytest.approx(0.2 * plain[other].lr) and not found[other].decay


def test_a_rule_that_matches_nothing_is_an_error(model):
    with pytest.raises(InputError, match=r"matches no parameter; near it are .*head\.weight"):
        chosen(model, rules=(Rule(pattern="visual.trunk.haed.weight", lr=0.1),))
    with pytest.raises(InputError, match="not a regular expression"):
        chosen(model, rules=(Rule(pattern="blocks.(", lr=0.1),))


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_the_optimizer_has_every_parameter_in_one_group(model, name):
    optimizer = OptimConfig(optimizer=name, vision=TowerRates(lr=1e-3, layer_decay=0.8)).build(model, model.layers())
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    names = [n for group in optimizer.param_groups for n in group["names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    set_learning_rates(optimizer, 0.5)
    assert all(group["lr"] == 0.5 * group["peak_lr"] for group in optimizer.param_groups)
    assert isinstance(optimizer, Lamb) == (name == "lamb")


def test_frozen_parameters_are_left_out(model):
    model.text.requires_grad_(False)
    assert not any(name.startswith("text.") for name in chosen(model))


def test_the_schedule_warms_up_and_follows_a_cosine():
    factor = [warmup_cosine(step, warmup=10, total=110, floor=0.1) for step in range(111)]
    assert factor[0] == pytest.approx(0.1) and factor[9] == factor[10] == 1.0
    assert factor[60] == pytest.approx(0.55) and factor[110] == pytest.approx(0.1)
    assert factor[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert all(a >= b for a, b in pairwise(factor[10:]))
    assert warmup_cosine(500, warmup=0, total=100) == 0.0


def test_a_step_moves_each_group_by_its_own_rate(model):
    optimizer = OptimConfig(
        vision=TowerRates(lr=1e-3), text=TowerRates(lr=0.0), lr=0.0, weight_decay=0.0
    ).build(model, model.layers())  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("visual."), name
