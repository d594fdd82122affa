"""The towers are open_clip's and timm's, parameter for parameter and bit for bit, under our own forward pass."""

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer
from timm.layers.patch_dropout import PatchDropoutWithIndices

from evaclip.errors import InputError
from evaclip.models.clip import Clip
from evaclip.models.shapes import SHAPES, TextShape, VisionShape, eva02_small, shape_named
from evaclip.models.text import TextTower
from evaclip.models.vision import VisionTower

OPEN_CLIP = [name for name in SHAPES if name.startswith(("EVA01", "EVA02"))]
# Millions of parameters of the image tower and the text tower (open_clip's model_profile; arXiv 2402.04252, table 1).
PUBLISHED = {
    "EVA01-g-14": (1012.59, 123.85),
    "EVA01-g-14-plus": (1012.59, 354.03),
    "EVA02-B-16": (86.26, 63.43),
    "EVA02-L-14": (304.11, 123.65),
    "EVA02-L-14-336": (304.43, 123.65),
    "EVA02-E-14": (4350.56, 354.03),
    "EVA02-E-14-plus": (4350.56, 694.33),
    "EVA-CLIP-8B": (7500, 695),
    "EVA-CLIP-18B": (17500, 695),
}


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = Clip(shape_named(name))
    found = (millions(model.visual), millions(model.text))
    exact = name in OPEN_CLIP
    assert found == pytest.approx(PUBLISHED[name], abs=0.005 if exact else None, rel=None if exact else 0.01)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_keys_and_shapes_are_open_clips(name):
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in Clip(SHAPES[name]).state_dict().items()}
        theirs = {
            key: tuple(value.shape) for key, value in open_clip.create_model(name, device="meta").state_dict().items()
        }
    assert ours == theirs | {"logit_scale": (1,)}


@pytest.fixture(scope="module")
def both():
    """EVA02-B-16 of open_clip with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = open_clip.create_model("EVA02-B-16").eval()
    ours = Clip(SHAPES["EVA02-B-16"]).eval()
    ours.load_state_dict(theirs.state_dict() | {"logit_scale": theirs.logit_scale[None]})
    return ours, theirs


@torch.no_grad()
def test_features_of_b16_equal_open_clips(both):
    ours, theirs = both
    images = torch.randn(2, 3, 224, 224)
    tokens = open_clip.get_tokenizer("EVA02-B-16")(["a photo of a cat", "two dogs, running"])
    assert torch.equal(ours.encode_image(images), theirs.encode_image(images))
    assert torch.allclose(ours.encode_text(tokens), theirs.encode_text(tokens), atol=1e-5, rtol=1e-5)


def family(**changes) -> VisionShape:
    return VisionShape(image_size=16, patch_size=4, width=48, depth=3, heads=3, mlp_hidden=100, **changes)


FAMILIES = {
    "EVA-01": family(),
    "EVA-02": family(swiglu=True, sub_ln=True, rope=True, rope_grid=16),
    "EVA-02 E": family(post_norm=True),
    "8B": family(rms_norm=True, qkv_bias=False, head_bias=False),
    "18B": family(rms_norm=True, post_norm=True, qkv_bias=False, head_bias=False),
}


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its initial value, so that each of them matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module


@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_forward_is_timms(shape):
    tower = randomised(VisionTower(shape, 8)).eval()
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(tower(images), tower.trunk(images))


@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
def test_kept_tokens_are_timms_patch_dropout(shape):
    tower = randomised(VisionTower(shape, 8))
    images = torch.randn(3, 3, 16, 16)
    keep = torch.stack([torch.randperm(16)[:8] for _ in range(3)])

    class Given(PatchDropoutWithIndices):
        def forward(self, x):
            patches = x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
            return torch.cat([x[:, :1], patches], 1), keep

    ours = tower(images, keep=keep)
    tower.trunk.patch_drop = Given()
    assert torch.equal(ours, tower.trunk(images))


def test_keeping_every_token_changes_nothing_and_losing_one_does():
    tower = randomised(VisionTower(FAMILIES["EVA-02"], 8))
    images = torch.randn(2, 3, 16, 16)
    every = torch.arange(16).expand(2, -1)
    assert torch.allclose(tower(images, keep=every), tower(images), atol=1e-6)
    assert not torch.allclose(tower(images, keep=every[:, 1:]), tower(images), atol=1e-3)


def test_the_mask_token_hides_a_patch():
    tower = randomised(VisionTower(FAMILIES["EVA-02"], 8, mask_token=True))
    images = torch.randn(1, 3, 16, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = images.clone()
    changed[:, :, 4:8, 4:8] = 9.0  # patch 5 of a 4 x 4 grid
    assert torch.equal(tower(images, mask=mask), tower(changed, mask=mask))
    assert not torch.allclose(tower(images), tower(changed), atol=1e-3)
    with pytest.raises(ValueError, match="without a mask token"):
        VisionTower(FAMILIES["EVA-02"], 8)(images, mask=mask)


@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
def test_drop_path_scales_each_branch(shape):
    tower = randomised(VisionTower(shape, 8))
    images = torch.randn(2, 3, 16, 16)
    ones = torch.ones(2, 6)
    assert torch.equal(tower(images, drop_path=ones), tower(images))
    # With every branch dropped nothing mixes the tokens: the class token stays what it was.
    class_token = tower.trunk.cls_token[:, 0] + tower.trunk.pos_embed[:, 0]
    expected = tower.trunk.head(tower.trunk.norm(class_token))
    assert torch.allclose(tower(images, drop_path=0 * ones), expected.expand(2, -1), atol=1e-6)


def test_the_rotary_embedding_is_the_formula():
    """EVA-02 (arXiv 2303.11331, section 2): half of a head's channels turn with the row, half with the column."""
    tower = VisionTower(family(rope=True, swiglu=True, sub_ln=True, rope_grid=8), 8)
    rotary = tower.trunk.rope.get_embed()  # [patches, sin and cos of each channel]
    head, grid = 16, 4
    frequencies = 10000.0 ** -(torch.arange(0, head // 2, 2) / (head // 2))
    place = torch.arange(grid) / grid * 8
    angle = place[:, None] * frequencies
    rows = angle[:, None].expand(grid, grid, -1)
    columns = angle[None].expand(grid, grid, -1)
    angles = torch.cat([rows, columns], -1).repeat_interleave(2, -1).reshape(grid * grid, head)
    assert torch.allclose(rotary, torch.cat([angles.sin(), angles.cos()], -1), atol=1e-6)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_checkpointing_gives_the_same_gradient(tiny_shape, tower):
    model = randomised(Clip(tiny_shape))
    keep = torch.arange(8).expand(2, -1)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        model.set_checkpointing(enabled)
        if tower == "vision":
            generator = torch.Generator().manual_seed(2)
            out = model.encode_image(torch.randn(2, 3, 16, 16, generator=generator), keep=keep)
        else:
            out = model.encode_text(torch.tensor([[49406, 5, 49407], [49406, 49407, 0]]))
        out.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.no_grad()
def test_text_is_the_same_at_any_length_from_its_end_on():
    shape = TextShape(width=32, depth=2, heads=2)
    ours = randomised(TextTower(shape, 8)).eval()
    reference = TextTransformer(context_length=77, width=32, heads=2, layers=2, output_dim=8).eval()
    reference.load_state_dict(ours.state_dict())
    tokens = torch.zeros(3, 77, dtype=torch.long)
    for row, length in enumerate((1, 20, 75)):
        tokens[row, : length + 2] = torch.tensor([49406, *range(10, 10 + length), 49407])
    expected = reference(tokens)
    assert torch.allclose(ours(tokens), expected, atol=1e-5)
    assert torch.allclose(ours(tokens[:2, :22]), expected[:2], atol=1e-5)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="does not divide"):
        VisionShape(image_size=224, patch_size=15, width=48, depth=1, heads=3, mlp_hidden=64)
    with pytest.raises(InputError, match="heads do not divide"):
        TextShape(width=32, depth=1, heads=3)
    with pytest.raises(InputError, match="did you mean EVA02-B-16"):
        shape_named("EVA02-B-61")


def test_layers_hold_every_tower_parameter_once(tiny_shape):
    model = Clip(tiny_shape)
    layers = model.layers()
    listed = [name for stages in layers.values() for stage in stages for name in stage]
    assert sorted([*listed, "logit_scale"]) == sorted(name for name, _ in model.named_parameters())
    assert [len(stages) for stages in layers.values()] == [4, 4]
    assert "visual.trunk.pos_embed" in layers["vision"][0] and "visual.trunk.head.weight" in layers["vision"][-1]
    assert "text.token_embedding.weight" in layers["text"][0] and "text.text_projection" in layers["text"][-1]


def test_the_logit_scale_is_clamped_on_the_parameter(tiny_shape):
    model = Clip(tiny_shape)
    for start, end in ((9.0, 100.0), (-3.0, 1.0)):
        model.logit_scale.data.fill_(start)
        model.clamp_logit_scale()
        assert model.logit_scale.shape == (1,) and model.logit_scale.exp().item() == pytest.approx(end)


def test_a_small_shape_has_all_parts_of_b16():
    text = TextShape(width=32, depth=1, heads=2)
    small = eva02_small("s", image_size=32, patch_size=4, width=96, depth=2, heads=3, dim=32, text=text)
    assert (small.vision.swiglu, small.vision.sub_ln, small.vision.rope) == (True, True, True)
    assert small.vision.mlp_hidden == 256 and small.vision.patches == 64


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_captions_have_the_padded_ones_features_and_gradients(tiny_shape, checkpointing):
    """Captions of 1 to 77 tokens beside the full padded form."""
    torch.manual_seed(0)
    tower = TextTower(tiny_shape.text, 24)
    tower.checkpointing = checkpointing
    tokens = torch.zeros(77, 77, dtype=torch.int32)
    for row in range(77):
        tokens[row, :row] = torch.randint(1, 49_000, (row,))
        tokens[row, row] = 49407
    order = torch.randperm(77)
    weights, found = torch.randn(77, 24), {}
    for packed in (False, True):
        tower.packed = packed
        tower.zero_grad()
        features = tower(tokens[order])
        (features * weights).sum().backward()
        found[packed] = (features.detach(), {name: p.grad.clone() for name, p in tower.named_parameters()})
    assert (found[True][0] - found[False][0]).abs().max() <= 1e-6 * found[False][0].abs().max()
    for name, right in found[False][1].items():
        assert (found[True][1][name] - right).norm() <= 2e-6 * right.norm() + 1e-9, name


def test_packed_captions_give_the_same_bits_on_every_run():
    """Enough tokens that torch shares the sums of the gradients among its threads."""
    torch.manual_seed(0)
    tower = TextTower(TextShape(width=128, depth=1, heads=2), 32)
    tower.packed = True
    tokens = torch.zeros(512, 20, dtype=torch.int32)
    for row in range(512):
        length = 5 + row % 14
        tokens[row, :length] = torch.randint(1, 40_000, (length,))
        tokens[row, length] = 49407
    weights, runs = torch.randn(512, 32), []
    for _ in range(5):
        tower.zero_grad()
        (tower(tokens) * weights).sum().backward()
        runs.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    assert all(torch.equal(gradient, other[name]) for name, gradient in runs[0].items() for other in runs[1:])
