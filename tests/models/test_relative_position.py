"""The shared relative position bias and layer scale: timm's `Beit`, weight for weight, under our forward pass."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit

from evaclip.errors import InputError
from evaclip.export.weights import refuse_beyond_timm
from evaclip.models.clip import Clip
from evaclip.models.shapes import ClipShape, TextShape, VisionShape
from evaclip.models.vision import VisionTower

SHAPE = VisionShape(
    image_size=16, patch_size=4, width=48, depth=3, heads=3, mlp_hidden=100, relative_position=True, layer_scale=0.1
)
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tower(shape: VisionShape = SHAPE) -> VisionTower:
    """Every parameter away from its initial value, the bias above all."""
    torch.manual_seed(0)
    made = VisionTower(shape, 24).eval()
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3 if parameter.ndim < 3 else 0.1)
    return made


@torch.no_grad()
def test_the_tower_is_timms_beit_with_a_shared_bias():
    ours = tower()
    theirs = Beit(
        img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=100.5 / 48, num_classes=24,
        global_pool="token", init_values=0.1, use_abs_pos_emb=False, use_shared_rel_pos_bias=True,
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.trunk.state_dict())  # strict: the names are the same
    assert ours.trunk.rel_pos_bias.relative_position_bias_table.abs().max() > 0.5
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES))
    torch.testing.assert_close(ours.tokens(IMAGES), theirs.forward_features(IMAGES))


@torch.no_grad()
def test_kept_patches_take_their_places_bias_with_them():
    """With all patches kept in any order the class token's feature is the same; of a few, that of a plain attention."""
    ours = tower()
    everything = torch.stack([torch.randperm(16) for _ in range(4)])
    torch.testing.assert_close(ours(IMAGES, keep=everything), ours(IMAGES))
    keep = torch.tensor([[0, 5, 9], [1, 2, 3], [4, 10, 15], [6, 7, 8]])
    found = ours.tokens(IMAGES, keep=keep)
    for number, row in enumerate(keep):
        rows = torch.cat([torch.zeros(1, dtype=torch.long), row + 1])
        torch.testing.assert_close(found[number], plain(ours, IMAGES[number], rows), atol=1e-5, rtol=1e-4)


def plain(ours: VisionTower, image: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """One image's tokens in float64, written out: only tokens `rows`, the bias by their differences."""
    state = {name: value.double() for name, value in ours.trunk.state_dict().items()}
    patches = F.conv2d(image[None].double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = torch.cat([state["cls_token"][0], patches.flatten(2)[0].T])[rows]
    table = state["rel_pos_bias.relative_position_bias_table"]
    bias = torch.empty(3, len(rows), len(rows), dtype=torch.float64)
    for a, i in enumerate(rows.tolist()):
        for b, j in enumerate(rows.tolist()):
            down, right = (i - 1) // 4 - (j - 1) // 4, (i - 1) % 4 - (j - 1) % 4
            cell = -1 if i == j == 0 else -3 if i == 0 else -2 if j == 0 else (down + 3) * 7 + right + 3
            bias[:, a, b] = table[cell]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (48,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    for number in range(3):
        block = f"blocks.{number}."
        biases = torch.cat([state[f"{block}attn.q_bias"], torch.zeros(48), state[f"{block}attn.v_bias"]])
        qkv = F.linear(norm(x, f"{block}norm1"), state[f"{block}attn.qkv.weight"], biases)
        q, k, v = qkv.view(-1, 3, 3, 16).permute(1, 2, 0, 3)
        mixed = ((q @ k.transpose(1, 2) / 4 + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + state[f"{block}gamma_1"] * F.linear(
            mixed, state[f"{block}attn.proj.weight"], state[f"{block}attn.proj.bias"]
        )
        hidden = F.linear(norm(x, f"{block}norm2"), state[f"{block}mlp.fc1.weight"], state[f"{block}mlp.fc1.bias"])
        x = x + state[f"{block}gamma_2"] * F.linear(
            F.gelu(hidden), state[f"{block}mlp.fc2.weight"], state[f"{block}mlp.fc2.bias"]
        )
    return norm(x, "norm").float()


def test_recomputing_the_blocks_gives_the_same_gradients_and_drop_path_scales_whole_branches():
    factors = torch.tensor([[1.0, 0.0, 2.0, 0.0, 1.0, 1.5]]).expand(4, -1)
    ours, gradients = tower(), []
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        ours.tokens(IMAGES, drop_path=factors).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in ours.trunk.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    assert not gradients[0]["blocks.0.gamma_2"].any() and gradients[0]["blocks.0.gamma_1"].any()
    assert gradients[0]["rel_pos_bias.relative_position_bias_table"].any()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_bias_goes_through_sixteen_bits(precision):
    ours = tower()
    with torch.autocast("cpu", precision):
        found = ours(IMAGES)
    assert F.cosine_similarity(found.float(), ours(IMAGES)).min() > 0.999


@torch.no_grad()
def test_a_clip_model_may_have_such_a_tower(tmp_path):
    shape = ClipShape(name="biased", dim=24, vision=SHAPE, text=TextShape(width=32, depth=1, heads=2))
    model = Clip(shape)
    again = Clip(shape)
    again.start_from(model.state_dict())
    assert torch.equal(again.encode_image(IMAGES), model.encode_image(IMAGES))
    stages = model.layers()["vision"]
    assert sum(map(len, stages)) == sum(1 for name, _ in model.named_parameters() if name.startswith("visual."))
    assert "visual.trunk.rel_pos_bias.relative_position_bias_table" in stages[-1]  # as in the authors' fine-tuning


def test_layer_scale_with_post_norm_is_one_sentence():
    with pytest.raises(InputError, match="layer scale and post-norm exclude each other"):
        replace(SHAPE, post_norm=True)


def test_timm_and_open_clip_are_not_given_what_their_eva_cannot_express():
    shape = ClipShape(name="biased", dim=24, vision=SHAPE, text=TextShape(width=32, depth=1, heads=2))
    with pytest.raises(InputError, match="a shared relative position bias, which timm's Eva has not"):
        refuse_beyond_timm(shape, "timm")
    refuse_beyond_timm(replace(shape, vision=replace(SHAPE, relative_position=False)), "timm")
