"""The shape of every EVA-CLIP model as plain numbers, and that of a CLIP with a plain vision transformer.

The first seven carry open_clip's names and have its parameters, key for key; 8B and 18B are known to neither
open_clip nor timm. Sources: EVA (arXiv 2211.07636, section 2), EVA-02 (2303.11331, table 2), EVA-CLIP (2303.15389,
table 1), EVA-CLIP-18B (2402.04252, table 1), and the model configurations of baaivision/EVA.
"""

from dataclasses import dataclass
from typing import Literal

from evaclip.errors import InputError, did_you_mean

Activation = Literal["gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """An EVA vision transformer. All of them have a class token; EVA's own have a learned position embedding."""

    image_size: int
    """Side of the square input in pixels."""
    patch_size: int
    """Side of a patch in pixels; it must divide the image."""
    width: int
    """Channels of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads; they must divide the width."""
    mlp_hidden: int
    """Hidden channels of the MLP."""
    swiglu: bool = False
    """EVA-02's gated MLP: w3(silu(w1 x) * w2 x)."""
    sub_ln: bool = False
    """EVA-02's extra LayerNorms before the output projections of attention and MLP."""
    rope: bool = False
    """2-D rotary position embedding on queries and keys, beside the learned one."""
    rope_grid: int = 16
    """Side of the patch grid that the rotary angles are scaled to (EVA-02 was pre-trained at 224 / 14 = 16)."""
    post_norm: bool = False
    """Residual post-norm, x + norm(f(x)), as in EVA-02-E and 18B."""
    rms_norm: bool = False
    """RMSNorm in the place of LayerNorm, as in 8B and 18B."""
    qkv_bias: bool = True
    """Biases on queries and values; keys never have one."""
    head_bias: bool = True
    """A bias on the projection to the joint space."""
    relative_position: bool = False
    """One learned bias on the attention logits for each head and distance, shared by all blocks (BEiT, arXiv
    2106.08254), in the place of the learned position embedding. No published EVA has it; students of feature
    distillation do."""
    layer_scale: float | None = None
    """What the learned factors of each residual branch start at (LayerScale, arXiv 2103.17239); None for no factors."""

    def __post_init__(self) -> None:
        if self.layer_scale is not None and self.post_norm:
            raise InputError("layer scale and post-norm exclude each other: set --model.vision.layer-scale None")
        if self.image_size % self.patch_size:
            raise InputError(f"a patch of {self.patch_size} px does not divide an image of {self.image_size} px")
        if self.width % self.heads:
            raise InputError(f"{self.heads} vision heads do not divide a width of {self.width}")

    @property
    def patches(self) -> int:
        """Patch tokens of one image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """CLIP's causal text transformer, pooled at the end-of-text token."""

    width: int
    """Channels of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads; they must divide the width."""
    context: int = 77
    """The most tokens of a caption, start and end included."""
    vocabulary: int = 49408
    """Rows of the token embedding."""
    activation: Literal["auto", "gelu", "quick_gelu"] = "auto"
    """`quick_gelu`, x * sigmoid(1.702 x), is what OpenAI's weights were trained with. `auto`: what the weights that the
    tower starts from were trained with, GELU where there are none. EVA-CLIP's own runs put GELU under OpenAI's."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(f"{self.heads} text heads do not divide a width of {self.width}")


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """Two towers and the space in which they meet."""

    name: str
    """What the shape is called; open_clip's name where it has one."""
    dim: int
    """Dimensions of the joint space."""
    vision: VisionShape
    """The image tower."""
    text: TextShape
    """The text tower."""


@dataclass(frozen=True, kw_only=True)
class PlainVisionShape:
    """A plain vision transformer as in OpenAI's CLIP: a class token, a norm before the blocks, GELU or QuickGELU."""

    image_size: int
    """Side of the square input in pixels."""
    patch_size: int
    """Side of a patch in pixels; it must divide the image."""
    width: int
    """Channels of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads; they must divide the width."""
    mlp_hidden: int
    """Hidden channels of the MLP."""


@dataclass(frozen=True, kw_only=True)
class PlainShape:
    """CLIP with a plain vision transformer (arXiv 2103.00020): a model of others, which evaclip takes and hands on."""

    name: str
    """What the model is called."""
    dim: int
    """Dimensions of the joint space."""
    activation: Activation
    """Of both towers' MLPs."""
    vision: PlainVisionShape
    """The image tower."""
    text: TextShape
    """The text tower, with the same activation."""


def _eva01_g() -> VisionShape:
    return VisionShape(image_size=224, patch_size=14, width=1408, depth=40, heads=16, mlp_hidden=6144)


def _eva02_b() -> VisionShape:
    return VisionShape(
        image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_hidden=2048,
        swiglu=True, sub_ln=True, rope=True,
    )  # fmt: skip


def _eva02_l(image_size: int) -> VisionShape:
    return VisionShape(
        image_size=image_size, patch_size=14, width=1024, depth=24, heads=16, mlp_hidden=2730,
        swiglu=True, sub_ln=True, rope=True,
    )  # fmt: skip


def _eva02_e() -> VisionShape:
    return VisionShape(image_size=224, patch_size=14, width=1792, depth=64, heads=16, mlp_hidden=15360, post_norm=True)


def _eva_8b(image_size: int) -> VisionShape:
    return VisionShape(
        image_size=image_size, patch_size=14, width=4096, depth=32, heads=32, mlp_hidden=20480,
        rms_norm=True, qkv_bias=False, head_bias=False,
    )  # fmt: skip


def _eva_18b() -> VisionShape:
    return VisionShape(
        image_size=224, patch_size=14, width=5120, depth=48, heads=40, mlp_hidden=25600,
        rms_norm=True, post_norm=True, qkv_bias=False, head_bias=False,
    )  # fmt: skip


TEXT_B = TextShape(width=512, depth=12, heads=8)
TEXT_L = TextShape(width=768, depth=12, heads=12)
TEXT_H = TextShape(width=1024, depth=24, heads=16)
TEXT_BIG_G = TextShape(width=1280, depth=32, heads=20)

SHAPES: dict[str, ClipShape] = {
    shape.name: shape
    for shape in (
        ClipShape(name="EVA01-g-14", dim=1024, vision=_eva01_g(), text=TEXT_L),
        ClipShape(name="EVA01-g-14-plus", dim=1024, vision=_eva01_g(), text=TEXT_H),
        ClipShape(name="EVA02-B-16", dim=512, vision=_eva02_b(), text=TEXT_B),
        ClipShape(name="EVA02-L-14", dim=768, vision=_eva02_l(224), text=TEXT_L),
        ClipShape(name="EVA02-L-14-336", dim=768, vision=_eva02_l(336), text=TEXT_L),
        ClipShape(name="EVA02-E-14", dim=1024, vision=_eva02_e(), text=TEXT_H),
        ClipShape(name="EVA02-E-14-plus", dim=1024, vision=_eva02_e(), text=TEXT_BIG_G),
        ClipShape(name="EVA-CLIP-8B", dim=1280, vision=_eva_8b(224), text=TEXT_BIG_G),
        ClipShape(name="EVA-CLIP-8B-448", dim=1280, vision=_eva_8b(448), text=TEXT_BIG_G),
        ClipShape(name="EVA-CLIP-18B", dim=1536, vision=_eva_18b(), text=TEXT_BIG_G),
    )
}


def eva02_small(
    name: str, *, image_size: int, patch_size: int, width: int, depth: int, heads: int, dim: int, text: TextShape
) -> ClipShape:
    """A small EVA-02 dual tower for tests, demonstrations and laptops: every part of B/16, fewer of each."""
    vision = VisionShape(
        image_size=image_size, patch_size=patch_size, width=width, depth=depth, heads=heads,
        mlp_hidden=width * 8 // 3, swiglu=True, sub_ln=True, rope=True, rope_grid=image_size // patch_size,
    )  # fmt: skip
    return ClipShape(name=name, dim=dim, vision=vision, text=text)


def shape_named(name: str) -> ClipShape:
    """The shape of a published model. Raises InputError, with the nearest name, when there is none."""
    if name not in SHAPES:
        raise InputError(f"no model shape is called {name!r}; {did_you_mean(name, SHAPES)}")
    return SHAPES[name]
