"""Exports that are programs: ONNX and torch.export, image and text encoders apart, any batch size.

Each takes what a tower takes and gives unit vectors, so nothing is left to get wrong but the preprocessing:

    image   pixel_values  float32 [batch, 3, size, size], normalised    -> image_embeds  float32 [batch, dim]
    text    input_ids     int64   [batch, length], length <= context    -> text_embeds   float32 [batch, dim]

The names are those of the ONNX models that transformers.js reads. `fp16` computes in half precision from the patches to
the projection; `int8` keeps weights as 8-bit integers with one scale per output channel and computes in float32.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.errors import InputError
from evaclip.exported import Tower
from evaclip.models.clip import Clip
from evaclip.models.plain import PlainClip

Precision = Literal["fp32", "fp16", "int8"]
# A protobuf file holds 2 GB; larger weights lie beside it.
LARGEST_FILE = 1_800_000_000


class _ImageEncoder(nn.Module):
    """Normalised pixels to unit vectors."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.tower(pixel_values.to(self.dtype)).float(), dim=1)


class _TextEncoder(nn.Module):
    """Token ids to unit vectors."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        # onnxruntime has long had ArgMax of int32; that of int64 came later
        return F.normalize(self.tower(input_ids.to(torch.int32)).float(), dim=1)


def write_torch_export(model: Clip | PlainClip, towers: Sequence[Tower], folder: Path) -> None:
    """`image.pt2` and `text.pt2`, for torch.export.load."""
    for tower in towers:
        with _without_chatter():
            program = _captured(model, tower, torch.float32)
            for node in program.graph.nodes:  # lines of code, with their paths on this machine
                node.meta.pop("stack_trace", None)
            torch.export.save(program, folder / f"{tower}.pt2")


def write_onnx(model: Clip | PlainClip, towers: Sequence[Tower], precision: Precision, folder: Path) -> None:
    """`image.onnx` and `text.onnx`. Raises InputError when the packages are missing."""
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise InputError(f"writing ONNX needs {error.name}: pip install 'evaclip[onnx]'") from None
    for tower in towers:
        path = folder / f"{tower}.onnx"
        with _without_chatter():
            captured = _captured(model, tower, torch.float16 if precision == "fp16" else torch.float32)
            program: Any = torch.onnx.export(
                captured,
                input_names=["pixel_values" if tower == "image" else "input_ids"],
                output_names=[f"{tower}_embeds"],
                verbose=False,
            )
            proto = program.model_proto
        _forget_where_it_was_made(proto)
        if precision == "int8":
            from evaclip.export.int8 import to_int8

            to_int8(proto)
        large = proto.ByteSize() > LARGEST_FILE
        onnx.save(proto, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)


def _forget_where_it_was_made(proto: Any) -> None:
    """The exporter notes at each node the lines of code, with their paths on this machine, that it comes from."""
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.functions):
        del part.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


def _captured(model: Clip | PlainClip, tower: Tower, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """A tower as a graph in which the batch, and a caption's length, may be anything."""
    own = model.visual if tower == "image" else model.text
    if dtype != torch.float32:
        own = copy.deepcopy(own).to(dtype)
    batch = torch.export.Dim("batch")
    if tower == "image":
        size = model.shape.vision.image_size
        example, dynamic = torch.zeros(2, 3, size, size), {0: batch}
        return torch.export.export(_ImageEncoder(own, dtype).eval(), (example,), dynamic_shapes=(dynamic,))
    context = model.shape.text.context
    tokens = torch.zeros(2, min(context, 9), dtype=torch.int64)
    tokens[:, -1] = model.shape.text.vocabulary - 1
    dynamic = {0: batch, 1: torch.export.Dim("length", max=context)}
    return torch.export.export(_TextEncoder(own, dtype).eval(), (tokens,), dynamic_shapes=(dynamic,))


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """The exporter tells its steps on standard output and its doubts as warnings; the parity report judges instead."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
