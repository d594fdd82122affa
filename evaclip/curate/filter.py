"""`evaclip data filter`: samples that meet conditions on their columns, or whose caption fits their image."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.rewrite import Verdict, claim, keep, refuse_equal_names, several_cores, source_fingerprint
from evaclip.curate.scan import MAX_PIXELS, Sample, parsed_json, scan
from evaclip.curate.score import score_shard
from evaclip.data.index import expand
from evaclip.data.manifest import Manifest
from evaclip.data.transforms import BadImageError, image_size
from evaclip.errors import InputError

CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*(\S.*?)\s*").fullmatch
COMPARE = {
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
    "==": lambda value, bound: value == bound,
    "!=": lambda value, bound: value != bound,
}
MEASURED = ("image_width", "image_height", "short_side", "aspect", "image_bytes", "characters", "words")


@dataclass(frozen=True)
class Condition:
    """COLUMN OPERATOR VALUE."""

    column: str
    operator: str
    value: float | str

    def __str__(self) -> str:
        return f"{self.column} {self.operator} {self.value}"


@dataclass(frozen=True, kw_only=True)
class FilterCommand:
    """Keep samples that meet all conditions."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    out: Path
    """Folder for the new shards, their manifest, and the list of what was left out."""
    where: tuple[str, ...] = ()
    """Conditions such as "similarity >= 0.28": a column of the samples' json, or one that is measured: image_width,
    image_height, short_side, aspect (long over short side), image_bytes, characters, words."""
    model: str | None = None
    """Score image and caption with this model (a run's folder, an export's, or an open_clip name)."""
    min_score: float | None = None
    """Cosine of image and caption that a sample needs."""
    top_share: float | None = None
    """Keep this share of the samples that meet the conditions, those with the highest cosine."""
    device: str = "cpu"
    """Where the model runs."""
    processes: int = several_cores()
    """Shards that are read at a time."""


def run_filter(command: FilterCommand) -> None:
    """Print how many samples each condition cost."""
    manifest = filter_shards(command)
    made = manifest.made_by
    for reason, count in made["left_out"].items():
        print(f"{count:>12,}  {reason}")
    print(f"{made['in']:,} samples in, {made['out']:,} out, {made['rejected']:,} rejected")
    print(f"fingerprint {manifest.fingerprint}: {command.out}")


def filter_shards(command: FilterCommand) -> Manifest:
    """The manifest of the new shards."""
    conditions = [condition(text) for text in command.where]
    _check(command, conditions)
    paths = expand(command.shards)
    refuse_equal_names(paths)
    settings = {name: value for name, value in asdict(command).items() if name not in ("shards", "out", "processes")}
    settings["where"] = list(command.where)
    source = source_fingerprint(paths, command.out, command.processes)
    done = claim(command.out, settings, source)
    if done is not None:
        return done
    journal = Journal(command.out / "unfinished", settings, command.processes)
    work = partial(_measured, conditions=conditions)
    results = [result for _, result in journal.each("reading columns", work, paths, shard_state)]
    verdicts: list[Verdict] = [{int(p): (code, why) for p, (code, why) in r["left_out"].items()} for r in results]
    counts: Counter[str] = Counter(reason for result in results for reason in result["reasons"])
    if command.model is not None:
        counts["score"] = _by_score(command, paths, verdicts, journal)
    made_by = {"verb": "filter", "settings": settings, "source": source, "left_out": dict(counts)}
    manifest = keep(paths, verdicts, command.out, journal, made_by)
    journal.finished()
    return manifest


def condition(text: str) -> Condition:
    """A condition from its text. Raises InputError."""
    parts = CONDITION(text)
    if parts is None:
        raise InputError(f"--where {text!r} is not COLUMN OPERATOR VALUE, as in 'width >= 200'")
    try:
        value: float | str = float(parts[3])
    except ValueError:
        value = parts[3].strip("'\"")
        if parts[2] not in ("==", "!="):
            raise InputError(f"--where {text!r}: {parts[2]} compares with a number") from None
    return Condition(parts[1], parts[2], value)


def failed(conditions: Sequence[Condition], columns: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first condition that a sample does not meet, as code, detail and reason; None if it meets all.

    A column that is missing, null, NaN or of another kind meets none: what is not known is not kept.
    """
    for each in conditions:
        value = columns.get(each.column)
        if isinstance(each.value, float) and isinstance(value, (int, float)) and not math.isnan(value):
            met = COMPARE[each.operator](value, each.value)
        elif isinstance(each.value, str) and isinstance(value, str):
            met = COMPARE[each.operator](value, each.value)
        else:
            return "no-column", f"{each.column} is {str(value)[:100]!r}", f"no {each.column}"
        if not met:
            return "filtered", f"{each.column} is {str(value)[:100]}, not {each}", f"not {each}"
    return None


def _check(command: FilterCommand, conditions: list[Condition]) -> None:
    if not conditions and command.model is None:
        raise InputError("nothing to filter by: give --where or --model")
    if (command.model is None) != (command.min_score is None and command.top_share is None):
        raise InputError("--model goes with --min-score or --top-share, and they with it")
    if command.min_score is not None and command.top_share is not None:
        raise InputError("--min-score and --top-share are two ways to say the same; give one")
    if command.top_share is not None and not 0 < command.top_share <= 1:
        raise InputError("--top-share is above 0 and at most 1")


def _measured(path: Path, *, conditions: list[Condition]) -> dict[str, Any]:
    left_out, reasons = {}, []
    with path.open("rb") as file:
        for place, sample in enumerate(scan(path).good):
            try:
                problem = failed(conditions, _columns(file, sample, conditions))
            except BadImageError as error:
                problem = error.code, str(error), error.code
            if problem is not None:
                left_out[place] = problem[:2]
                reasons.append(problem[2])
    return {"left_out": left_out, "reasons": reasons}


def _columns(file: Any, sample: Sample, conditions: list[Condition]) -> dict[str, Any]:
    """The columns of a sample that are asked for; what is measured goes before what the json says of that name."""

    def read(span: tuple[int, int] | None) -> bytes:
        if span is None:
            return b""
        file.seek(span[0])
        return file.read(span[1])

    asked = {each.column for each in conditions}
    columns: dict[str, Any] = {}
    if asked - set(MEASURED) and (record := sample.span("json")) is not None:
        columns = parsed_json(read(record))
    if asked & {"characters", "words"}:
        caption = read(sample.caption()).decode("utf-8", "replace").strip()
        columns |= {"characters": len(caption), "words": len(caption.split())}
    if asked & set(MEASURED):
        columns["image_bytes"] = sample.image()[1]
    if asked & {"image_width", "image_height", "short_side", "aspect"}:
        width, height = image_size(read(sample.image()), MAX_PIXELS)
        short = min(width, height)
        aspect = max(width, height) / short
        columns |= {"image_width": width, "image_height": height, "short_side": short, "aspect": aspect}
    return columns


def _by_score(command: FilterCommand, paths: list[Path], verdicts: list[Verdict], journal: Journal) -> int:
    """Leave out by the cosine of image and caption. Returns how many."""
    own = Journal(journal.folder, {"model": command.model}, 1)  # torch uses all cores within one process
    work = partial(score_shard, model=str(command.model), device=command.device)
    scores = [np.array(result["score"]) for _, result in own.each("scoring", work, paths, shard_state)]
    least = command.min_score
    if least is None:
        assert command.top_share is not None
        standing = [np.delete(score, list(verdict)) for score, verdict in zip(scores, verdicts, strict=True)]
        together = np.sort(np.concatenate(standing))  # NaN, what cannot be decoded, comes last
        together = together[~np.isnan(together)]
        kept = min(len(together), math.ceil(command.top_share * len(together)))
        least = float(together[-kept]) if kept else math.inf
    count = 0
    for score, verdict in zip(scores, verdicts, strict=True):
        for place in np.flatnonzero(~(score >= least)).tolist():
            if place not in verdict:
                verdict[place] = ("filtered", f"score {score[place]:.4f}, not >= {least:.4f}")
                count += 1
    return count
