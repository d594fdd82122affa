"""Attention maps against those that the towers' own modules compute, and the numbers of maps made by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit

from evaclip.diagnostics.attention import attention_distance, attention_maps, diagnosed, head_similarity
from evaclip.encoder import ImageTower, Preprocessing, load_image_tower
from evaclip.errors import InputError
from evaclip.models.shapes import VisionShape
from evaclip.models.vision import VisionTower
from tests.models.layouts import openai_clip, torchscript
from tests.objectives.test_mim import PIXELS

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}


def tower_of(model) -> ImageTower:
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return ImageTower(name="made", model=model.eval(), preprocessing=Preprocessing(size=16))


def eva(**changes):
    shape = VisionShape(image_size=16, patch_size=4, width=48, depth=3, heads=3, mlp_hidden=100, **changes)
    return lambda: VisionTower(shape, 24)


MADE = {
    "EVA-02": eva(swiglu=True, sub_ln=True, rope=True),
    "shared bias": eva(relative_position=True, layer_scale=0.1),
    "timm's ViT": lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False, **SIZES),
    "timm's BEiT": lambda: Beit(**SIZES, use_rel_pos_bias=True),
    "registers": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2", pretrained=False, **SIZES
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_maps_are_those_of_the_modules_own_softmax(kind):
    """timm's attention without the fused kernel hands its softmax to a dropout of rate 0, where a hook sees it."""
    torch.manual_seed(0)
    tower, kept = tower_of(MADE[kind]()), []
    blocks = tower.model.trunk.blocks if isinstance(tower.model, VisionTower) else tower.model.blocks
    for block in blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: kept.append(output))
    features = tower.feature_map(PIXELS)
    expected = list(kept)
    assert len(expected) == 3
    found, patches = attention_maps(tower, PIXELS)
    assert len(found) == 3 and patches == 16 and not blocks[0].attn.fused_attn
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        assert other.std() > 1e-3
    assert torch.equal(tower.feature_map(PIXELS), features)


@torch.no_grad()
def test_maps_of_open_clips_transformer_are_those_of_torchs_attention(tmp_path):
    torch.jit.save(torchscript(openai_clip()), tmp_path / "openai.pt")
    tower, taken = load_image_tower(str(tmp_path / "openai.pt")), []
    for block in tower.model.transformer.resblocks:
        block.attn.register_forward_pre_hook(
            lambda module, inputs, options: taken.append((module, inputs)), with_kwargs=True
        )
    found, patches = attention_maps(tower, PIXELS)
    assert patches == 16 and len(found) == len(taken) == 2
    for maps, (module, inputs) in zip(found, taken, strict=True):
        projected = F.linear(inputs[0], module.in_proj_weight, module.in_proj_bias).double()
        query, key, _ = projected.view(4, 17, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        expected = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(maps, expected.float(), atol=1e-6, rtol=1e-4)


def test_attention_distance_of_known_maps():
    side, size = 4, 8.0
    places = list(itertools.product(range(side), repeat=2))
    uniform = sum(math.dist(a, b) for a in places for b in places) / len(places) ** 2 * size
    right = torch.zeros(16, 16)
    for number, (_, column) in enumerate(places):
        right[number, number + 1 if column < side - 1 else number] = 1.0
    corner = torch.zeros(16, 16)
    corner[:, 0] = 1.0
    to_corner = sum(math.dist(a, (0, 0)) for a in places) / 16 * size
    maps = torch.stack([torch.full((16, 16), 1 / 16), torch.eye(16), right, corner])[None].expand(3, -1, -1, -1)
    expected = torch.tensor([uniform, 0.0, 0.75 * size, to_corner])
    torch.testing.assert_close(attention_distance(maps, 16, size), expected)
    # What a class token and a register take of the attention has no place, and the rest counts as the whole.
    wider = torch.zeros(3, 4, 18, 18)
    wider[:, :, 2:, 2:] = 0.3 * maps
    wider[:, :, 2:, 0] = 0.7
    wider[:, :, :2, 0] = 1.0
    torch.testing.assert_close(attention_distance(wider, 16, size), expected)


def test_head_similarity_of_known_maps():
    eye = torch.eye(6)
    turned = eye.roll(1, dims=1)
    assert head_similarity(torch.stack([eye, eye, eye])[None]).item() == pytest.approx(1.0)
    assert head_similarity(torch.stack([eye, turned])[None]).item() == pytest.approx(0.0, abs=1e-6)
    assert head_similarity(torch.stack([eye, eye, turned])[None]).item() == pytest.approx(1 / 3)
    maps = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    pairs = [
        np.dot(maps[b, i, q], maps[b, j, q]) / maps[b, i, q].norm() / maps[b, j, q].norm()
        for b, q in itertools.product(range(2), range(5))
        for i, j in itertools.permutations(range(3), 2)
    ]
    assert head_similarity(maps).item() == pytest.approx(float(np.mean(pairs)), rel=1e-5)
    assert head_similarity(maps[:, :1]).isnan()


def test_all_images_count_alike_however_they_are_split():
    torch.manual_seed(0)
    tower = tower_of(MADE["shared bias"]())
    pixels = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8)
    whole = diagnosed(tower, pixels)
    maps, _ = attention_maps(tower, pixels)
    assert whole.distance.shape == (3, 3) and whole.similarity.shape == (3,) and whole.average.shape == (3, 17, 17)
    np.testing.assert_allclose(whole.average[1], maps[1].mean((0, 1)).numpy(), rtol=1e-4)
    np.testing.assert_allclose(whole.distance[2], attention_distance(maps[2], 16, 4.0).numpy(), rtol=1e-4)
    np.testing.assert_allclose(whole.similarity[0], head_similarity(maps[0]).item(), rtol=1e-4)
    np.testing.assert_allclose(whole.average.sum(-1), 1.0, rtol=1e-5)
    corners = list(itertools.product(range(4), repeat=2))
    even = sum(math.dist(a, b) for a in corners for b in corners) / 256 * 4.0
    assert whole.even == pytest.approx(even, rel=1e-5)
    again = diagnosed(tower, pixels)
    assert np.array_equal(again.distance, whole.distance) and np.array_equal(again.average, whole.average)


def test_a_tower_without_attention_over_a_grid_is_one_sentence():
    tower = tower_of(timm.create_model("resnet10t", pretrained=False))
    with pytest.raises(InputError, match="has no patch tokens"):
        attention_maps(replace(tower, preprocessing=Preprocessing(size=32)), PIXELS)
