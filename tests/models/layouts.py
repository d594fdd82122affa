"""Checkpoints as their authors lay them out, at small width, and EVA's forward pass in float64 from their own names.

Written from the key names of baaivision/EVA, openai/CLIP and transformers, without evaclip's name tables.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.models.shapes import ClipShape, TextShape, VisionShape


@dataclass(frozen=True)
class Family:
    """What tells EVA's image towers apart."""

    split: bool = False
    """EVA-02 B and L: queries, keys and values apart, w1 and w2 apart, ffn_ln."""
    packed: bool = False
    """EVA-02 Ti and S: one qkv, xformers' w12."""
    post_norm: bool = False
    """EVA-02-E."""

    @property
    def rope(self) -> bool:
        return self.split or self.packed


FAMILIES = {"eva01": Family(), "eva02": Family(split=True), "tiny": Family(packed=True), "e": Family(post_norm=True)}
WIDTH, DEPTH, HEADS, HIDDEN, DIM, TEXT_WIDTH = 48, 2, 3, 100, 24, 32
TEXT = TextShape(width=TEXT_WIDTH, depth=2, heads=2)


def shape_of(family: Family, *, image_size: int = 16, patch_size: int = 4, **changes) -> ClipShape:
    """Our shape of a family; the rotary grid is EVA-02's, 16."""
    sizes = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_hidden": HIDDEN} | changes
    vision = VisionShape(
        image_size=image_size, patch_size=patch_size, swiglu=family.rope, sub_ln=family.split, rope=family.rope,
        post_norm=family.post_norm, **sizes,
    )  # fmt: skip
    return ClipShape(name="small", dim=DIM, vision=vision, text=TEXT)


def random_tensors(seed: int):
    """A function that makes tensors of a size, around 0, or around 1 for norms."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *size, around=0.0: around + 0.2 * torch.randn(*size, generator=generator)


def eva_vision(family: Family, *, clip: bool, grid: int = 4, patch: int = 4, old_rope: bool = False, seed: int = 0):
    """EVA's own names of an image tower: a CLIP model's (inner_attn_ln, head), or what masked image modelling left."""
    r = random_tensors(seed)
    state = {
        "cls_token": r(1, 1, WIDTH),
        "pos_embed": r(1, 1 + grid * grid, WIDTH),
        "patch_embed.proj.weight": r(WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": r(WIDTH),
    }
    if not clip:
        state["mask_token"] = r(1, 1, WIDTH)
    head = WIDTH // HEADS
    rope = torch.randn(grid, grid, head) if old_rope else torch.randn(grid * grid, head)
    if family.rope:
        state |= {"rope.freqs_cos": rope, "rope.freqs_sin": rope}
    for number in range(DEPTH):
        block = f"blocks.{number}."
        for norm in ("norm1", "norm2"):
            state |= {f"{block}{norm}.weight": r(WIDTH, around=1.0), f"{block}{norm}.bias": r(WIDTH)}
        if family.split:
            state |= {f"{block}attn.{part}_proj.weight": r(WIDTH, WIDTH) for part in "qkv"}
            if clip:
                name = f"{block}attn.inner_attn_ln"
                state |= {f"{name}.weight": r(WIDTH, around=1.0), f"{name}.bias": r(WIDTH)}
        else:
            state[f"{block}attn.qkv.weight"] = r(3 * WIDTH, WIDTH)
        state |= {f"{block}attn.q_bias": r(WIDTH), f"{block}attn.v_bias": r(WIDTH)}
        state |= {f"{block}attn.proj.weight": r(WIDTH, WIDTH), f"{block}attn.proj.bias": r(WIDTH)}
        if family.rope:
            state |= {f"{block}attn.rope.freqs_cos": rope, f"{block}attn.rope.freqs_sin": rope}
        if family.split:
            into, out = {"w1": HIDDEN, "w2": HIDDEN}, "w3"
            state |= {f"{block}mlp.ffn_ln.weight": r(HIDDEN, around=1.0), f"{block}mlp.ffn_ln.bias": r(HIDDEN)}
        else:
            into, out = ({"w12": 2 * HIDDEN}, "w3") if family.packed else ({"fc1": HIDDEN}, "fc2")
        for name, size in into.items():
            state |= {f"{block}mlp.{name}.weight": r(size, WIDTH), f"{block}mlp.{name}.bias": r(size)}
        state |= {f"{block}mlp.{out}.weight": r(WIDTH, HIDDEN), f"{block}mlp.{out}.bias": r(WIDTH)}
    state |= {"norm.weight": r(WIDTH, around=1.0), "norm.bias": r(WIDTH)}
    last = ("head", DIM) if clip else ("lm_head", 40)
    return state | {f"{last[0]}.weight": r(last[1], WIDTH), f"{last[0]}.bias": r(last[1])}


def text_tower(width: int = TEXT_WIDTH, dim: int = DIM, depth: int = 2, vocabulary: int = 49408, seed: int = 5):
    """OpenAI's names, which EVA-CLIP puts under `text.`."""
    r = random_tensors(seed)
    state = {
        "token_embedding.weight": r(vocabulary, width),
        "positional_embedding": r(77, width),
        "ln_final.weight": r(width, around=1.0),
        "ln_final.bias": r(width),
        "text_projection": r(width, dim),
    }
    return state | resblocks("transformer", width, depth, r)


def resblocks(prefix: str, width: int, depth: int, r) -> dict[str, Tensor]:
    state = {}
    for number in range(depth):
        block = f"{prefix}.resblocks.{number}."
        for norm in ("ln_1", "ln_2"):
            state |= {f"{block}{norm}.weight": r(width, around=1.0), f"{block}{norm}.bias": r(width)}
        state |= {f"{block}attn.in_proj_weight": r(3 * width, width), f"{block}attn.in_proj_bias": r(3 * width)}
        state |= {f"{block}attn.out_proj.weight": r(width, width), f"{block}attn.out_proj.bias": r(width)}
        state |= {f"{block}mlp.c_fc.weight": r(4 * width, width), f"{block}mlp.c_fc.bias": r(4 * width)}
        state |= {f"{block}mlp.c_proj.weight": r(width, 4 * width), f"{block}mlp.c_proj.bias": r(width)}
    return state


def eva_clip(family: Family, *, first_release: bool = False, **sizes) -> dict[str, Tensor]:
    """A whole EVA-CLIP; its first release kept the logit scale inside the text tower."""
    state = {f"visual.{name}": value for name, value in eva_vision(family, clip=True, **sizes).items()}
    state |= {f"text.{name}": value for name, value in text_tower().items()}
    return state | {"text.logit_scale" if first_release else "logit_scale": torch.tensor(3.5)}


def openai_clip(width: int = 64, patch: int = 4, grid: int = 4, dim: int = DIM, depth: int = 2) -> dict[str, Tensor]:
    """OpenAI's names of a whole CLIP with a plain vision transformer. Heads are 64 channels wide."""
    r = random_tensors(7)
    state = {
        "visual.class_embedding": r(width),
        "visual.positional_embedding": r(1 + grid * grid, width),
        "visual.conv1.weight": r(width, 3, patch, patch),
        "visual.proj": r(width, dim),
    }
    for norm in ("ln_pre", "ln_post"):
        state |= {f"visual.{norm}.weight": r(width, around=1.0), f"visual.{norm}.bias": r(width)}
    state |= resblocks("visual.transformer", width, depth, r)
    return state | text_tower(width=64) | {"logit_scale": torch.tensor(3.0)}


def torchscript(state: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """The tensors inside a TorchScript archive, half of them fp16 parameters, with OpenAI's three sizes beside them."""

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    root = Nothing()
    sizes = {name: torch.tensor(value) for name, value in
             (("input_resolution", 16), ("context_length", 77), ("vocab_size", 49408))}  # fmt: skip
    for name, value in (state | sizes).items():
        *path, last = name.split(".")
        module: nn.Module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, Nothing())
            module = module.get_submodule(part)
        if name in sizes:
            module.register_buffer(last, value)
        else:
            module.register_parameter(last, nn.Parameter(value.half(), requires_grad=False))
    return torch.jit.script(root)


@torch.no_grad()
def eva_tokens(state: dict[str, Tensor], family: Family, images: Tensor) -> Tensor:
    """Tokens after the final norm, in float64, by the formulas: EVA (2211.07636), EVA-02 (2303.11331, section 2)."""
    s = {name.removeprefix("visual."): value.double() for name, value in state.items()}
    patch, head = s["patch_embed.proj.weight"].shape[-1], WIDTH // HEADS

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s.get(f"{name}.weight"), s.get(f"{name}.bias"), eps)

    x = F.conv2d(images.double(), s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    grid = x.shape[-1]
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    for number in range(DEPTH):
        block = f"blocks.{number}."

        def attention(x: Tensor, a: str = block + "attn.") -> Tensor:
            weight = torch.cat([s[f"{a}{part}_proj.weight"] for part in "qkv"]) if family.split else s[f"{a}qkv.weight"]
            bias = torch.cat([s[f"{a}q_bias"], torch.zeros(WIDTH).double(), s[f"{a}v_bias"]])
            q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, HEADS, head)).permute(2, 0, 3, 1, 4)
            if family.rope:
                q, k = turned(q, grid), turned(k, grid)
            weights = (q @ k.transpose(-1, -2) / math.sqrt(head)).softmax(-1)
            out = (weights @ v).transpose(1, 2).flatten(2)
            if family.split:
                out = norm(out, f"{a}inner_attn_ln")
            return F.linear(out, s[f"{a}proj.weight"], s[f"{a}proj.bias"])

        def mlp(x: Tensor, m: str = block + "mlp.") -> Tensor:
            def linear(x: Tensor, name: str) -> Tensor:
                return F.linear(x, s[f"{m}{name}.weight"], s[f"{m}{name}.bias"])

            if family.split:
                return linear(norm(F.silu(linear(x, "w1")) * linear(x, "w2"), f"{m}ffn_ln"), "w3")
            if family.packed:
                gate, value = linear(x, "w12").chunk(2, -1)
                return linear(F.silu(gate) * value, "w3")
            return linear(F.gelu(linear(x, "fc1")), "fc2")

        if family.post_norm:
            x = x + norm(attention(x), f"{block}norm1")
            x = x + norm(mlp(x), f"{block}norm2")
        else:
            x = x + attention(norm(x, f"{block}norm1"))
            x = x + mlp(norm(x, f"{block}norm2"))
    return norm(x, "norm")


def turned(x: Tensor, grid: int) -> Tensor:
    """Rotary embedding of the patch tokens: half of a head's channels by the row, half by the column, 16 rows."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2).double() / half)
    angle = (torch.arange(grid).double() / grid * 16)[:, None] * frequencies
    rows = angle[:, None].expand(grid, grid, -1)
    columns = angle[None].expand(grid, grid, -1)
    angles = torch.cat([rows, columns], -1).repeat_interleave(2, -1).flatten(0, 1)
    patches = x[..., 1:, :]
    swapped = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    return torch.cat([x[..., :1, :], patches * angles.cos() + swapped * angles.sin()], -2)
