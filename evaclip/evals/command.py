"""What the commands that score a model have in common: what they are told, and how they begin."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from evaclip.distributed import is_main, joined, main_first, rank, world_size
from evaclip.encoder import Encoder, load_encoder
from evaclip.engine import EngineConfig
from evaclip.errors import InputError
from evaclip.evals.blocks import cache_of
from evaclip.evals.features import Setting
from evaclip.evals.names import folder_of
from evaclip.evals.protocol import protocol_named
from evaclip.log import quiet
from evaclip.report.results import Result


@dataclass(frozen=True, kw_only=True)
class ScoringCommand:
    """Which model, which data, how. Under torchrun all processes share the work; what is written is the same."""

    model: str = "EVA02-B-16"
    """Folder of a run or of an export, an open_clip NAME or NAME:TAG, or hf-hub:ORGANISATION/NAME; by default the
    published EVA02-CLIP-B/16."""
    data: Path | None = None
    """Folder (or tar) of the data; by default a folder of the benchmark's name in `data_root`."""
    data_root: Path = Path("data")
    """Where the folders of the benchmarks lie."""
    protocol: Literal["eva", "openai", "testbed", "pe"] = "eva"
    """Whose way of cutting images and choosing frames."""
    out: Path | None = None
    """Folder for results and predictions; by default `scores/` in the run, or `scores/MODEL`."""
    cache: Path | None = None
    """Folder that keeps features; by default `cache/` in the folder of the results."""
    allow_partial: bool = False
    """Score a data set that is not whole, or has many damaged files; the result says so."""
    batch: int = 256
    """Images, or captions, that pass through a tower at a time."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main process."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.workers < 0:
            raise InputError("--batch must be at least 1 and --workers at least 0")


@contextmanager
def in_company() -> Iterator[None]:
    """Together with the other processes that torchrun or srun started; the first alone speaks."""
    with joined(), quiet(not is_main()):
        yield


def data_folder(command: ScoringCommand, name: str, aliases: tuple[str, ...] = ()) -> Path:
    """Where a benchmark lies: `--data`, or the folder of `--data-root` that bears one of its names."""
    return command.data or folder_of(command.data_root, (name, *aliases))


def encoder_of_command(command: ScoringCommand) -> Encoder:
    """The model on its device. Raises InputError."""
    return load_encoder(command.model, EngineConfig(device=command.device).resolved_device())


def begun(command: ScoringCommand) -> tuple[Encoder, Setting, Path]:
    """The model, how it is scored, and the folder for what comes out. The first process loads the model first."""
    with main_first():
        encoder = encoder_of_command(command)
    out = command.out or _default_out(command.model)
    setting = Setting(
        protocol=protocol_named(command.protocol),
        batch=command.batch,
        workers=command.workers,
        cache=cache_of(encoder, command.cache or out / "cache"),
        share=(rank(), world_size()),
        allow_partial=command.allow_partial,
    )
    return encoder, setting, out


def _default_out(model: str) -> Path:
    if (Path(model) / "config.json").is_file():
        return Path(model) / "scores"
    return Path("scores") / re.sub(r"[^A-Za-z0-9_.-]+", "_", model).strip("_.")


def print_metrics(result: Result) -> None:
    """Every metric with its interval as a table on standard output, and what could not be read."""
    record = result.record
    table = Table()
    for column in ("metric", "score", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in record["metrics"].items():
        low, high = record["interval95"][name]
        table.add_row(name, f"{100 * value:.2f}", f"{100 * low:.2f} to {100 * high:.2f}")
    Console(highlight=False).print(table)
    print_bad(result)


def print_bad(result: Result) -> None:
    """How many files could not be read, and where they are listed."""
    bad = result.record["coverage"]["bad"]
    if bad:
        print(f"{bad:,} files could not be read; they are listed in {result.path.with_suffix('.bad.jsonl')}")
