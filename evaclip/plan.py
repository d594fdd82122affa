"""What a run will need, before it stands in a queue: memory by part, arithmetic, communication, hours.

Parameters and arithmetic are counted on the meta device, by building the towers and by torch's FlopCounterMode, so
nothing of their size is ever allocated. Memory counts float32 parameters, gradients and two moments as the chosen
engine spreads them, and what the backward pass keeps of a micro-batch, counted as the forward pass saves it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evaclip.config import RunConfig
from evaclip.errors import InputError
from evaclip.models.clip import Clip
from evaclip.objectives.clip import ClipConfig

# Samples whose activations and arithmetic are counted; everything but the loss grows in proportion.
COUNTED = 2
# Copies of the parameters, gradients and moments that a process holds, by engine: 1 whole, "n" one of n parts.
HELD = {
    "ddp": {"parameters": 1, "gradients": 1, "moments": 1},
    "zero1": {"parameters": 1, "gradients": 1, "moments": "n"},
    "zero2": {"parameters": 1, "gradients": 1, "moments": "n"},  # gradients are whole until the step reduces them
    "fsdp2": {"parameters": "n", "gradients": "n", "moments": "n"},
}


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What a recipe needs on a number of GPUs."""

    gpus: int
    """How many."""
    caption_tokens: int = 20
    """Mean length of the captions, start and end included."""
    peak_tflops: float = 989.0
    """What one GPU can do in 16 bits at best, dense; 989 is an H100's or H200's, 312 an A100's."""
    mfu: float = 0.4
    """Share of that which training is expected to reach."""


@dataclass(frozen=True)
class Plan:
    """The numbers; bytes are those of one GPU, FLOPs those of a whole step."""

    parameters: int
    memory: dict[str, float]
    tower_flops: float
    """Forward and backward pass of both towers, without what checkpointing repeats."""
    repeated_flops: float
    loss_flops: float
    communication: dict[str, float]
    """Bytes that a GPU receives in a step."""
    step_seconds: float
    hours: float


def plan(config: RunConfig, command: PlanCommand) -> Plan:
    """Count it. Raises InputError when the batch does not divide, or the run is not contrastive."""
    if not isinstance(config.objective, ClipConfig):
        raise InputError(f"evaclip plan counts contrastive runs, and {config.name} has no captions")
    local, rest = divmod(config.batch_size, command.gpus)
    if rest or local % config.engine.micro_batches:
        raise InputError(
            f"a batch of {config.batch_size:,} does not divide among {command.gpus} GPUs and "
            f"{config.engine.micro_batches} micro-batches each"
        )
    with torch.device("meta"):
        model = config.objective.student(config.model)
    model.text.packed = False  # on the meta device no caption has a length of its own; all get the mean
    count = sum(p.numel() for p in model.parameters())
    micro = local // config.engine.micro_batches
    towers, kept, repeated = _towers(model, config, command.caption_tokens)
    batch, dim = config.batch_size, config.model.dim
    held = {part: count / (command.gpus if how == "n" else 1) for part, how in HELD[config.engine.kind].items()}
    copies = 2 * count if config.engine.precision == "pure_bf16" and config.engine.kind == "ddp" else 0
    memory = {
        "parameters": 4 * held["parameters"] + copies,
        "gradients": 4 * held["gradients"],
        "moments": 8 * held["moments"],
        "activations": kept * micro,
        "loss": (2 * batch + 10 * local) * dim,
    }
    again = repeated + (towers / 3 if config.engine.micro_batches > 1 and not config.engine.keep_activations_gb else 0)
    communication = {
        "gradients": 8.0 * count * (command.gpus - 1) / command.gpus,
        "parameters": 8.0 * count * (command.gpus - 1) / command.gpus if config.engine.kind == "fsdp2" else 0.0,
        "captions": (2 + 4) * (batch - local) * dim,
    }
    loss = 4 * 2.0 * batch**2 * dim
    seconds = (batch * (towers + again) + loss) / (command.gpus * command.peak_tflops * 1e12 * command.mfu)
    return Plan(
        count, memory, batch * towers, batch * again, loss, communication, seconds, seconds * config.steps / 3600
    )


def _towers(model: Clip, config: RunConfig, caption_tokens: int) -> tuple[float, float, float]:
    """Per sample: FLOPs forward and backward, bytes kept for the backward pass, FLOPs that checkpointing repeats."""
    vision, objective = config.model.vision, config.objective
    assert isinstance(objective, ClipConfig)
    dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
    model = model.to(dtype)
    images = torch.zeros(COUNTED, 3, vision.image_size, vision.image_size, device="meta", dtype=dtype)
    tokens = torch.zeros(COUNTED, min(caption_tokens, config.model.text.context), device="meta", dtype=torch.int64)
    patches = max(1, int(vision.patches * (1 - objective.mask_ratio)))
    keep = torch.zeros(COUNTED, patches, device="meta", dtype=torch.int64) if objective.mask_ratio else None
    passes: list[Callable[[], Tensor]] = [
        lambda: model.encode_image(images, keep=keep),
        lambda: model.encode_text(tokens),
    ]
    forward, kept = 0.0, 0.0
    for encode in passes:
        model.set_checkpointing(objective.checkpointing)
        storages: dict[int, int] = {}

        def seen(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
            features = encode()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept += sum(size for storage, size in storages.items() if storage not in own)
        del features
        model.set_checkpointing(False)
        counter = FlopCounterMode(display=False)
        with counter:
            encode()
        forward += counter.get_total_flops()
    repeated = forward / COUNTED if objective.checkpointing else 0.0
    return 3 * forward / COUNTED, kept / COUNTED, repeated


def run_plan(config: RunConfig, command: PlanCommand) -> Plan:
    """Print the plan of a recipe."""
    found = plan(config, command)
    table = Table(title=f"{config.name} on {command.gpus} GPUs ({config.engine.kind}, {config.engine.precision})")
    for column in ("what", "amount", "remark"):
        table.add_column(column, justify="right" if column == "amount" else "left")
    for part, size in found.memory.items():
        remark = f"micro-batch of {config.batch_size // command.gpus // config.engine.micro_batches:,}"
        remark += ", and one block's while it is computed again" if config.objective.checkpointing else ""
        table.add_row(f"memory: {part}", f"{size / 1e9:,.2f} GB", remark if part == "activations" else "")
    table.add_row(
        "memory of a GPU", f"[b]{sum(found.memory.values()) / 1e9:,.1f} GB[/b]", "framework and buffers come on top"
    )
    whole = found.tower_flops + found.repeated_flops + found.loss_flops
    table.add_row(
        "towers, a step", f"{found.tower_flops / 1e15:,.2f} PFLOP", f"{found.parameters / 1e6:,.1f}M parameters"
    )
    table.add_row(
        "repeated forward passes", f"{found.repeated_flops / 1e15:,.2f} PFLOP", "checkpointing, micro-batches"
    )
    table.add_row(
        "loss, a step", f"{found.loss_flops / 1e15:,.3f} PFLOP", f"{found.loss_flops / whole:.2%} of the step"
    )
    for part, size in found.communication.items():
        table.add_row(f"received: {part}", f"{size / 1e9:,.2f} GB", "by each GPU, a step")
    rate = config.batch_size / found.step_seconds / command.gpus
    table.add_row("step", f"{found.step_seconds:,.2f} s", f"{rate:,.0f} images/s and GPU")
    table.add_row(
        "run", f"[b]{found.hours:,.1f} h[/b]",
        f"{config.steps:,} steps, predicted at {command.mfu:.0%} of {command.peak_tflops:g} TFLOP/s, not measured",
    )  # fmt: skip
    Console(highlight=False, width=110).print(table)
    return found
