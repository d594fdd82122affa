"""What this machine has, and what is missing for which feature."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

LIBRARIES = ("torch", "timm", "open_clip_torch", "webdataset", "tokenizers", "simplejpeg", "pillow", "numpy", "pyarrow")
# Package, how to get it, and what it is for; all of it works without them.
OPTIONAL = (
    ("flash_attn", "pip install 'evaclip[flash]'", "flash-attn's own attention kernels"),
    ("deepspeed", "pip install 'evaclip[deepspeed]'", "--engine.kind zero1 and zero2"),
    ("faiss", "pip install 'evaclip[search]'", "approximate indexes of evaclip index"),
    ("fastapi", "pip install 'evaclip[serve]'", "evaclip serve"),
    ("wandb", "pip install 'evaclip[wandb]'", "logging to Weights & Biases"),
)
TOOLS = (
    ("g++", "apt-get install g++", "torch.compile on the CPU"),
    ("sbatch", "apt-get install slurm-client", "Slurm"),
)


def doctor() -> None:
    """Print a table of everything; nothing is changed."""
    table = Table("", "what", "found", title="evaclip doctor")
    for ok, what, found in findings():
        table.add_row("ok" if ok else "-", what, found)
    Console(highlight=False).print(table)


def findings() -> Iterator[tuple[bool, str, str]]:
    """Whether it is there, what it is, and what was found or how to get it."""
    yield True, "evaclip", version("evaclip")
    yield sys.version_info >= (3, 11), "python", platform.python_version()
    for name in LIBRARIES:
        try:
            yield True, name, version(name)
        except PackageNotFoundError:
            yield False, name, f"missing; pip install {name}"
    yield True, "CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for number in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(number).total_memory / 2**30
        yield True, f"GPU {number}", f"{torch.cuda.get_device_name(number)}, {memory:.0f} GiB"
    if not torch.cuda.is_available():
        yield False, "GPU", "torch sees none: training runs on the CPU"
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        works, why = attention_kernel_works(backend)
        yield works, f"attention kernel {backend.name.lower().removesuffix('_attention')}", why
    for name, how, purpose in OPTIONAL:
        there = importlib.util.find_spec(name) is not None
        yield there, name, version(packages_distributions()[name][0]) if there else f"missing, for {purpose}: {how}"
    for name, how, purpose in TOOLS:
        path = shutil.which(name)
        yield path is not None, name, path or f"missing, for {purpose}: {how}"


def attention_kernel_works(backend: SDPBackend) -> tuple[bool, str]:
    """Whether a kernel runs attention of EVA02-B/16's shape, forward and backward, on this machine's best device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.randn(2, 12, 99, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, q, q).sum().backward()
    except RuntimeError:
        return False, f"not for {str(dtype).removeprefix('torch.')} on this {device}"
    return True, f"{str(dtype).removeprefix('torch.')} on {device}"
