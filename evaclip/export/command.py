"""What `evaclip export` does: write a folder beside its place, prove that it is the model, and only then name it."""

import json
import platform
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from evaclip.encoder import Encoder, encoder_of, encoder_of_export, load_encoder
from evaclip.errors import CheckpointError, InputError
from evaclip.export.hugging_face import transformers_encoder, write_hugging_face
from evaclip.export.parity import Parity, compare
from evaclip.export.programs import Precision, write_onnx, write_torch_export
from evaclip.export.tokenizer_file import write_tokenizer
from evaclip.export.weights import TIMM_NAMES, write_open_clip, write_own, write_timm
from evaclip.exported import MANIFEST, VERSION, Format, Manifest, Tower, described, read_manifest
from evaclip.log import say
from evaclip.models.clip import Clip
from evaclip.models.plain import PlainClip
from evaclip.models.shapes import SHAPES, ClipShape
from evaclip.models.weights.plain import plain_clip_of
from evaclip.records import unstructured

# The least cosine and the least share of equal top matches of an export that may keep the model's name.
THRESHOLDS: dict[Precision, tuple[float, float]] = {"fp32": (0.9999, 1.0), "fp16": (0.999, 0.9), "int8": (0.99, 0.8)}


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a trained model in the form of another program, with a manifest and a proof that it is the same model."""

    source: tyro.conf.Positional[str]
    """Folder of a run, of an earlier export or of a CLIPModel; a file of weights; or an EVA model or a plain CLIP of
    open_clip (`EVA02-B-16:merged2b_s8b_b131k`, `ViT-B-32-quickgelu:openai`)."""
    out: tyro.conf.Positional[Path]
    """The new folder."""
    to: Format
    """open_clip (its `local-dir:` folder), timm (the image tower), huggingface (transformers' CLIPModel, of plain CLIPs
    alone), onnx or torch_export (programs, towers apart), evaclip (every EVA shape, also those that open_clip cannot
    express)."""
    towers: Literal["both", "image", "text"] = "both"
    """Which towers to export."""
    precision: Precision = "fp32"
    """How ONNX stores and computes: fp16, or int8 weights under fp32 arithmetic."""
    address: str | None = None
    """Where an open_clip folder will lie, `local-dir:PATH` or `hf-hub:ORGANISATION/NAME`; it matters for image towers
    that timm has no name for. By default where it is written."""
    min_cosine: float | None = None
    """The least cosine of the parity check; by default 0.9999 for fp32, 0.999 for fp16, 0.99 for int8."""


def run_export(command: ExportCommand) -> None:
    """Export, compare, and give the folder its name. Raises InputError, and leaves nothing, if it is not the model."""
    towers = _towers(command)
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise InputError(f"{command.out} is not empty; name a new folder")
    say(f"reading {command.source}")
    source = load_encoder(command.source)
    encoder = in_our_towers(source, command.source)
    _refuse(command, encoder.model)
    say(f"writing {encoder.name} as {command.to}, {command.precision}")
    temporary = command.out.resolve().with_name(f"{command.out.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        _write(command, encoder, towers, temporary)
        manifest = _manifest(command, encoder, towers, temporary)
        parity = _compared(source, temporary, manifest)
        print_parity(parity)
        _judge(command, parity)
        (temporary / MANIFEST).write_text(json.dumps(unstructured(replace(manifest, parity=asdict(parity))), indent=1))
        for path in temporary.iterdir():  # safetensors writes files that nobody else may read
            path.chmod((temporary / MANIFEST).stat().st_mode)
        if command.out.exists():
            command.out.rmdir()
        temporary.rename(command.out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _say_what_it_is(command, manifest)


def in_our_towers(encoder: Encoder, source: str) -> Encoder:
    """The same model in towers of ours. Raises InputError for any that is neither an EVA-CLIP nor a plain CLIP."""
    if isinstance(encoder.model, Clip | PlainClip):
        return encoder
    manifest = read_manifest(Path(source))
    shape = manifest.shape if manifest else SHAPES.get(source.partition(":")[0])
    state = encoder.model.state_dict()
    if isinstance(shape, ClipShape) and "visual.trunk.cls_token" in state and "text.text_projection" in state:
        model: Clip | PlainClip = Clip(shape, logit_bias="logit_bias" in state)
        scalars = {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in state}
        model.load_state_dict(state | scalars)
    else:
        try:
            model = plain_clip_of(encoder.model, manifest.name if manifest else Path(encoder.name).name)
        except CheckpointError as error:
            raise InputError(
                f"{source} has not both towers of an EVA-CLIP or of a plain CLIP in weights that can be read: {error}"
            ) from None
    found = replace(encoder_of(model.eval(), encoder.origin), preprocessing=encoder.preprocessing)
    if found.space_id != encoder.space_id:
        raise InputError(f"the tokenizer of {source} is not CLIP's, and none of the formats has a place for another")
    return found


def print_parity(parity: Parity) -> None:
    """The report as a table on standard output."""
    print(f"{parity.images} images and {parity.prompts} captions through the model and its export")
    table = Table()
    for column in ("max difference", "min cosine", "same top match"):
        table.add_column(column, justify="right")
    match = "-" if parity.top_match is None else f"{100 * parity.top_match:.1f} %"
    table.add_row(f"{parity.max_difference:.2e}", f"{parity.min_cosine:.7f}", match)
    Console(highlight=False).print(table)


def _towers(command: ExportCommand) -> tuple[Tower, ...]:
    """Which towers a format takes. Raises InputError for what it cannot hold."""
    if command.precision != "fp32" and command.to != "onnx":
        raise InputError(f"--precision {command.precision} is for --to onnx; {command.to} takes the weights in fp32")
    if command.to == "open_clip" and command.towers != "both":
        raise InputError("open_clip loads both towers or none; one alone goes --to timm, onnx, torch_export or evaclip")
    if command.to == "timm" and command.towers == "text":
        raise InputError("timm has image towers only; the text tower alone goes --to onnx, torch_export or evaclip")
    if command.to == "huggingface" and command.towers != "both":
        raise InputError("CLIPModel has both towers; one alone goes --to onnx or torch_export")
    if command.to == "timm":
        return ("image",)
    return ("image", "text") if command.towers == "both" else (command.towers,)


def _refuse(command: ExportCommand, model: nn.Module) -> None:
    """Raise InputError for a format that has no place for this kind of image tower."""
    if command.to == "huggingface" and not isinstance(model, PlainClip):
        raise InputError(
            "no EVA tower can be expressed as Hugging Face's CLIPModel: that one has a norm before its first block, no "
            "bias at its patches and its projection, and neither rotary positions nor SwiGLU nor inner norms. "
            "Take --to timm, which transformers reads as AutoModelForImageClassification, or --to open_clip or onnx"
        )
    if command.to in ("timm", "evaclip") and isinstance(model, PlainClip):
        raise InputError(
            f"--to {command.to} is for EVA towers, and {model.shape.name} has a plain vision transformer: take "
            "--to huggingface, open_clip, onnx or torch_export"
        )


def _write(command: ExportCommand, encoder: Encoder, towers: Sequence[Tower], folder: Path) -> None:
    model = encoder.model
    assert isinstance(model, Clip | PlainClip)
    if command.to == "open_clip":
        address = command.address or f"local-dir:{command.out.resolve()}"
        write_open_clip(model, encoder.preprocessing, folder, address)
    elif isinstance(model, PlainClip) and command.to == "huggingface":
        write_hugging_face(model, encoder.preprocessing, folder)
    elif isinstance(model, Clip) and command.to == "timm":
        write_timm(model, encoder.preprocessing, folder)
    elif command.to == "onnx":
        write_onnx(model, towers, command.precision, folder)
    elif command.to == "torch_export":
        write_torch_export(model, towers, folder)
    elif isinstance(model, Clip):
        write_own(model, towers, folder)
    if "text" in towers and command.to in ("onnx", "torch_export"):
        write_tokenizer(folder, model.shape.text.context)


def _manifest(command: ExportCommand, encoder: Encoder, towers: tuple[Tower, ...], folder: Path) -> Manifest:
    assert isinstance(encoder.model, Clip | PlainClip)
    shape = encoder.model.shape
    packages = ("evaclip", "torch", "timm", "open_clip_torch", "tokenizers", "pillow")
    packages += ("onnx", "onnxscript", "onnxruntime") if command.to == "onnx" else ()
    packages += ("transformers",) if command.to == "huggingface" else ()
    manifest = Manifest(
        version=VERSION,
        format=command.to,
        towers=towers,
        precision=command.precision,
        name=encoder.name,
        space_id=encoder.space_id,
        shape=shape,
        preprocessing=unstructured(encoder.preprocessing),
        tokenizer={"kind": "CLIP byte-pair encoding", "context": shape.text.context, "padding": 0},
        **_history(Path(command.source), encoder),
        versions={"python": platform.python_version()} | {name: version(name) for name in packages},
        parity={},
        files={path.name: described(path) for path in sorted(folder.iterdir())},
    )
    (folder / MANIFEST).write_text(json.dumps(unstructured(manifest)))
    return manifest


def _history(source: Path, encoder: Encoder) -> dict[str, Any]:
    """Where the weights come from; an export of an export tells of the same run."""
    earlier = read_manifest(source)
    if earlier is not None:
        return {"origin": earlier.origin, "config": earlier.config, "scores": earlier.scores}
    config = _record(source / "config.json") if "run" in encoder.origin else {}
    scores = {path.stem: _record(path) for path in sorted(source.glob("scores/*.json"))}
    return {"origin": encoder.origin, "config": config, "scores": scores}


def _compared(encoder: Encoder, folder: Path, manifest: Manifest) -> Parity:
    say("loading it and comparing its vectors with the model's")
    try:
        if manifest.format == "open_clip":
            export = load_encoder(folder)
        else:
            export = encoder_of_export(folder, manifest, torch.device("cpu"), trusted=True)  # written a moment ago
        if manifest.format == "huggingface":
            export = transformers_encoder(folder, export)
        return compare(encoder, export, manifest.towers)
    except Exception as error:  # a runtime that refuses what was written has words of its own
        if isinstance(error, InputError) and not isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the export was written and does not run, nothing was left of it: {reason}") from None


def _judge(command: ExportCommand, parity: Parity) -> None:
    least_cosine, least_match = THRESHOLDS[command.precision]
    least_cosine = command.min_cosine if command.min_cosine is not None else least_cosine
    if not parity.holds(least_cosine, least_match):
        raise InputError(
            f"the export is not the model: min cosine {parity.min_cosine:.6f} where {least_cosine:g} is asked for, "
            f"same top match {parity.top_match} where {least_match:g} is; nothing was left in {command.out}"
        )


def _say_what_it_is(command: ExportCommand, manifest: Manifest) -> None:
    towers = " and ".join(manifest.towers)
    say(f"written to {command.out}: {manifest.name} as {command.to}, {towers}, {manifest.precision}")
    shape = manifest.shape
    if command.to == "open_clip" and isinstance(shape, ClipShape) and shape.vision not in TIMM_NAMES:
        address = command.address or f"local-dir:{command.out.resolve()}"
        say(
            f"timm has no name for this image tower, so open_clip finds it under {address}; for another place, export "
            "this folder again with --address. evaclip.load reads it wherever it is"
        )


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
