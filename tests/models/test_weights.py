"""Foreign weights in our towers have the features that their authors' code gives them."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.transformer import TextTransformer
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.eva import Eva, checkpoint_filter_fn

from evaclip.errors import CheckpointError
from evaclip.models.clip import Clip
from evaclip.models.weights import as_layout, canonical, load_towers, load_whole, read_weights
from evaclip.models.weights.resize import resized_kernel, resized_position
from tests.models.layouts import (
    DEPTH,
    DIM,
    FAMILIES,
    HEADS,
    HIDDEN,
    WIDTH,
    Family,
    eva_clip,
    eva_tokens,
    eva_vision,
    openai_clip,
    shape_of,
    text_tower,
    torchscript,
)  # fmt: skip

torch.manual_seed(0)
IMAGES = torch.randn(3, 3, 16, 16)
TOKENS = torch.tensor([[49406, 320, 1125, 49407, 0], [49406, 736, 267, 911, 49407]])
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def timm_tower(family: Family, *, image_size: int = 16, patch_size: int = 4, clip: bool = True) -> Eva:
    return Eva(
        img_size=image_size, patch_size=patch_size, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=(HIDDEN + 0.5) / WIDTH, qkv_fused=not family.split, swiglu_mlp=family.rope, scale_mlp=family.split,
        scale_attn_inner=family.split and clip, use_rot_pos_emb=family.rope,
        ref_feat_shape=(16, 16) if family.rope else None, use_post_norm=family.post_norm, global_pool="token",
        num_classes=DIM,
    ).eval()  # fmt: skip


def read(tmp_path, state, name="weights.pt"):
    torch.save(state, tmp_path / name)
    return read_weights(tmp_path / name)


def largest(value, expected) -> float:
    """Largest difference, relative to the largest expected number."""
    return float((value.double() - expected).abs().max() / expected.abs().max())


@every_family
@torch.no_grad()
def test_an_eva_clip_gives_the_features_of_timms_converter_and_of_the_formulas(tmp_path, family):
    state = eva_clip(family)
    model = Clip(shape_of(family)).eval()
    report = load_whole(model, read(tmp_path, {"module": state, "epoch": 3}))
    assert report.count("taken") == len(model.state_dict()) and report.count("renewed") == 0
    theirs = timm_tower(family)
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    features = model.encode_image(IMAGES)
    assert torch.equal(features, theirs(IMAGES))
    expected = F.linear(
        eva_tokens(state, family, IMAGES)[:, 0],
        state["visual.head.weight"].double(), state["visual.head.bias"].double(),
    )  # fmt: skip
    assert largest(features, expected) < 1e-5
    text = TextTransformer(width=32, heads=2, layers=2, output_dim=DIM).eval()
    text.load_state_dict({name[5:]: value for name, value in state.items() if name.startswith("text.")})
    padded = F.pad(TOKENS, (0, 72))
    torch.testing.assert_close(model.encode_text(TOKENS), text(padded), atol=1e-5, rtol=1e-5)
    assert model.logit_scale.tolist() == [3.5]


@every_family
@pytest.mark.parametrize("old_rope", [False, True])
@torch.no_grad()
def test_a_tower_from_masked_image_modelling_keeps_its_final_norm(tmp_path, family, old_rope):
    state = eva_vision(family, clip=False, old_rope=old_rope)
    model = Clip(shape_of(family)).eval()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_towers(model, vision=read(tmp_path, {"model": state}))
    assert largest(model.visual.tokens(IMAGES), eva_tokens(state, family, IMAGES)) < 1e-5
    assert torch.equal(model.visual.trunk.norm.weight, state["norm.weight"])
    fates = {entry.name: entry.fate for entry in report.entries}
    for name, value in model.state_dict().items():
        assert fates[name] in ("taken", "renewed"), name
        assert torch.equal(value, fresh[name]) or fates[name] == "taken", name
    renewed = {name for name, fate in fates.items() if fate == "renewed" and name.startswith("visual.")}
    inner = {f"visual.trunk.blocks.{n}.attn.norm.{kind}" for n in range(DEPTH) for kind in ("weight", "bias")}
    head = {"visual.trunk.head.weight", "visual.trunk.head.bias"}
    assert renewed == (head | inner if family.split else head)
    ignored = {name for name, fate in fates.items() if fate == "ignored"}
    assert ignored == {name for name in state if re.search(r"mask_token|lm_head|rope", name)}
    table = "\n".join(report.lines())
    assert "head of masked image modelling" in table and "no file for this tower" in table
    assert ("had no norm inside attention" in table) == family.split


@pytest.mark.parametrize("how", ["eva", "timm"])
@pytest.mark.parametrize(("grid", "patch", "image_size"), [(4, 4, 32), (4, 3, 16), (8, 4, 16)])
@torch.no_grad()
def test_another_resolution_and_patch_size_is_evas_or_timms_resampling(tmp_path, how, grid, patch, image_size):
    family = FAMILIES["eva02"]
    state = eva_clip(family, grid=grid, patch=patch)
    model = Clip(shape_of(family, image_size=image_size)).eval()
    report = load_towers(model, vision=read(tmp_path, state), resize=how)
    resized = {entry.name.removeprefix("visual.trunk.") for entry in report.entries if entry.fate == "resized"}
    names = {"patch_embed.proj.weight": patch != 4, "pos_embed": grid != image_size // 4}
    assert resized == {name for name, changes in names.items() if changes}
    images = torch.randn(2, 3, image_size, image_size)
    if how == "timm":
        theirs = timm_tower(family, image_size=image_size)
        theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
        assert torch.equal(model.visual.tokens(images), theirs.forward_features(images))
        return
    for name, changes in names.items():
        key = f"visual.{name}"
        if changes and name == "pos_embed":
            square = state[key][:, 1:].reshape(1, grid, grid, WIDTH).permute(0, 3, 1, 2)
            new = F.interpolate(square, size=image_size // 4, mode="bicubic", align_corners=False)
            state[key] = torch.cat([state[key][:, :1], new.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        elif changes:
            state[key] = F.interpolate(state[key], size=4, mode="bicubic", align_corners=False)
    assert largest(model.visual.tokens(images), eva_tokens(state, family, images)) < 1e-5


def test_the_pseudo_inverse_keeps_the_tokens_of_enlarged_images_and_bicubic_does_not():
    kernel, image = torch.randn(5, 3, 14, 14), torch.randn(1, 3, 14, 14)
    large = F.interpolate(image, size=16, mode="bicubic", align_corners=False, antialias=True)
    token = F.conv2d(image, kernel)
    assert torch.allclose(F.conv2d(large, resized_kernel(kernel, 16, "timm")), token, atol=1e-3)
    assert not torch.allclose(F.conv2d(large, resized_kernel(kernel, 16, "eva")), token, atol=1e-1)
    position = torch.randn(1, 1 + 64, 6)
    assert not torch.allclose(resized_position(position, 4, "eva"), resized_position(position, 4, "timm"), atol=1e-2)


@register_model
def eva02_small_test_patch4_clip(pretrained=False, **changes):  # found by its name, by open_clip
    tower = timm_tower(FAMILIES["eva02"], image_size=changes.get("img_size") or 16)
    tower.reset_classifier(changes.get("num_classes", DIM))
    return tower


@torch.no_grad()
def test_open_clips_model_takes_the_converted_file_and_has_our_features(tmp_path):
    family = FAMILIES["eva02"]
    tensors, _ = as_layout(read(tmp_path, eva_clip(family)).named, "open_clip")
    save_file(tensors, tmp_path / "open.safetensors")
    assert "eva02_small_test_patch4_clip" in timm.list_models()
    vision = CLIPVisionCfg(
        timm_model_name="eva02_small_test_patch4_clip", timm_pool="token", timm_proj=None, image_size=16
    )
    theirs = CustomTextCLIP(DIM, vision, CLIPTextCfg(width=32, heads=2, layers=2)).eval()  # type: ignore[arg-type]
    theirs.load_state_dict(load_file(tmp_path / "open.safetensors"))
    ours = Clip(shape_of(family)).eval()
    load_whole(ours, read_weights(tmp_path / "open.safetensors"))
    assert torch.equal(ours.encode_image(IMAGES), theirs.encode_image(IMAGES))
    expected = theirs.encode_text(F.pad(TOKENS, (0, 72)))
    torch.testing.assert_close(ours.encode_text(TOKENS), expected, atol=1e-5, rtol=1e-5)


@every_family
def test_names_go_round_every_layout_and_come_back_the_same(family):
    eva = {name: value for name, value in eva_clip(family).items() if "rope" not in name}
    named = canonical(eva, "eva")
    assert named.layout == "eva"
    back, ignored = as_layout(named, "eva")
    assert same(back, eva) and not ignored
    open_clip, ignored = as_layout(named, "open_clip")
    assert open_clip.keys() == Clip(shape_of(family)).state_dict().keys() and not ignored
    assert canonical(open_clip, "x").layout == "open_clip"
    assert same(as_layout(canonical(open_clip, "x"), "eva")[0], eva)
    timm_names, ignored = as_layout(named, "timm")
    assert timm_names.keys() == timm_tower(family).state_dict().keys()
    assert set(ignored) == {name for name in eva if not name.startswith("visual.")}
    assert canonical(timm_names, "x").layout == "timm"
    tower = {name.removeprefix("visual."): value for name, value in eva.items() if name.startswith("visual.")}
    assert same(as_layout(canonical(timm_names, "x"), "eva")[0], tower)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_first_release_keeps_its_logit_scale_in_the_text_tower(tmp_path):
    model = Clip(shape_of(FAMILIES["eva01"]))
    load_whole(model, read(tmp_path, eva_clip(FAMILIES["eva01"], first_release=True)))
    assert model.logit_scale.tolist() == [3.5]


@pytest.mark.parametrize("source", ["openai", "open_clip", "eva"])
@torch.no_grad()
def test_a_text_tower_starts_from_anybodys(tmp_path, source):
    state = text_tower()
    if source == "openai":
        scripted = torchscript(openai_clip() | state)
        torch.jit.save(scripted, tmp_path / "ViT.pt")
        weights = read_weights(tmp_path / "ViT.pt")
        assert weights.activation == "quick_gelu" and weights.named.layout == "openai"
        state = {name: value.half().float() for name, value in state.items()}
    else:
        prefix = "text." if source == "eva" else ""
        weights = read(tmp_path, {"state_dict": {f"module.{prefix}{name}": v for name, v in state.items()}})
        assert weights.activation is None
    model = Clip(shape_of(FAMILIES["eva02"])).eval()
    report = load_towers(model, text=weights)
    fates = {entry.name: entry.fate for entry in report.entries}
    assert fates["text.text_projection"] == fates["logit_scale"] == "renewed"
    assert fates["text.token_embedding.weight"] == "taken"
    model.text.text_projection.copy_(state["text_projection"])
    theirs = TextTransformer(width=32, heads=2, layers=2, output_dim=DIM).eval()
    theirs.load_state_dict(state)
    torch.testing.assert_close(model.encode_text(TOKENS), theirs(F.pad(TOKENS, (0, 72))), atol=1e-5, rtol=1e-5)


def test_both_towers_from_one_file_of_two_models_never_mix_their_projections(tmp_path):
    model = Clip(shape_of(FAMILIES["eva02"]))
    weights = read(tmp_path, eva_clip(FAMILIES["eva02"]))
    report = load_towers(model, vision=weights, text=weights)
    renewed = {entry.name for entry in report.entries if entry.fate == "renewed"}
    assert renewed == {"visual.trunk.head.weight", "visual.trunk.head.bias", "text.text_projection", "logit_scale"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 32, "heads": 2}, r"cls_token is \[1, 1, 48\] there and \[1, 1, 32\] in small: .* another width"),
        (
            {"depth": 3},
            r"lacks visual.trunk.blocks.2.norm1.weight and \d+ other .*\(2 blocks in the file's image tower, 3 in the",
        ),
        (
            {"depth": 1},
            r"has visual.trunk.blocks.1.* for which small has no place \(2 blocks in the file's image tower, 1 in the",
        ),
        ({"mlp_hidden": 64}, r"fc1_g.weight is \[100, 48\] there and \[64, 48\]"),
        ({"qkv_bias": False}, r"q_proj.bias and \d+ other tensors, for which small has no place"),
    ],
)
def test_weights_of_another_shape_are_named(tmp_path, change, sentence):
    weights = read(tmp_path, eva_clip(FAMILIES["eva02"]))
    model = Clip(shape_of(FAMILIES["eva02"], **change))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (load_whole, lambda model, weights: load_towers(model, vision=weights)):
        with pytest.raises(CheckpointError, match=sentence):
            load(model, weights)
    assert same(model.state_dict(), before)


def test_missing_left_over_and_unknown_tensors_are_named(tmp_path):
    state = eva_clip(FAMILIES["eva02"])
    model = Clip(shape_of(FAMILIES["eva02"]))
    without = {name: value for name, value in state.items() if name != "visual.norm.bias"}
    with pytest.raises(CheckpointError, match=r"lacks visual\.trunk\.norm\.bias of small"):
        load_towers(model, vision=read(tmp_path, without))
    with pytest.raises(CheckpointError, match=r"lacks visual\.trunk\.blocks\.1\.attn\.norm\.weight"):
        load_towers(model, vision=read(tmp_path, {k: v for k, v in state.items() if "blocks.1.attn.inner" not in k}))
    with pytest.raises(CheckpointError, match=r"visual\.trunk\.blocks\.0\.attn\.gate\.weight, for which"):
        load_towers(model, vision=read(tmp_path, state | {"visual.blocks.0.attn.gate.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"decoder\.weight belongs to no tower"):
        read(tmp_path, state | {"decoder.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"twice, the second time as logit_scale"):
        read(tmp_path, {"text.logit_scale": torch.ones(()), **state})
    with pytest.raises(CheckpointError, match="lacks logit_scale"):
        load_whole(model, read(tmp_path, {k: v for k, v in state.items() if k != "logit_scale"}))
    odd = state | {"visual.pos_embed": torch.randn(1, 12, WIDTH)}
    with pytest.raises(CheckpointError, match="11 positions are no square grid"):
        load_towers(model, vision=read(tmp_path, odd))


def test_a_tower_that_is_not_there_or_not_an_eva_is_named(tmp_path):
    model = Clip(shape_of(FAMILIES["eva02"]))
    tower = read(tmp_path, eva_vision(FAMILIES["eva02"], clip=False))
    with pytest.raises(CheckpointError, match=r"weights\.pt has no text tower \(eva names\)"):
        load_towers(model, text=tower)
    with pytest.raises(CheckpointError, match="plain vision transformer and not an EVA"):
        load_towers(model, vision=read(tmp_path, openai_clip()))
    with pytest.raises(CheckpointError, match="which the layout eva cannot hold"):
        as_layout(canonical(openai_clip(), "x"), "eva")
