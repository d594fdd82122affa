"""A run as one page: what was trained, how it went, what the model gets right and what not.

`report.html` stands on its own: its pictures are inside, so it can be sent by mail. They lie in `report/` as well.
"""

import base64
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2

from evaclip.errors import InputError
from evaclip.log import read_lines, read_log
from evaclip.report.plots import confusion_matrix, curves, png, prediction_grid
from evaclip.report.results import Result, read_result

# What `evaclip watch` leaves beside the log of the training, in the run's folder.
SCORES = Path("evals") / "scores.jsonl"
# Curves of the page: title, the logged names, and whether they are shares.
CURVES = (
    ("loss", ("loss",), False),
    ("pairs of the batch that find each other", ("accuracy/image_to_text", "accuracy/text_to_image"), True),
    ("logit scale", ("logit_scale",), False),
    ("gradient norm before clipping", ("gradient_norm/visual", "gradient_norm/text"), False),
    ("images per second", ("images_per_second",), False),
)
# Kinds of benchmarks, and the titles of their curves.
TRENDS = {"zero_shot": "zero-shot accuracy", "retrieval": "retrieval recall", "probe": "probes"}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1d2126 }
  h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
  table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left }
  th { border-bottom: 1px solid #c8ccd1 } td.number { text-align: right; font-variant-numeric: tabular-nums }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem }
  img { max-width: 100%; height: auto } pre { background: #f5f6f7; padding: 1rem; overflow: auto; font-size: 12px }
  .quiet { color: #666c74 }
</style>
<h1>{{ name }}</h1>
<p class="quiet">{{ summary }}</p>
{% for event in events %}<p>step {{ event.step }}: {{ event.event }}</p>{% endfor %}
{% if scores %}
<h2>Scores at step {{ scores[0].step }}</h2>
<table>
<tr><th>benchmark<th>images<th>metric<th>score<th>95 % interval</tr>
{% for score in scores %}{% for metric, value in score.metrics.items() %}
<tr><td>{{ score.title }}<td class="number">{{ "{:,}".format(score.images) }}<td>{{ metric }}
<td class="number">{{ "%.2f"|format(100 * value) }}
<td class="number">{% if metric in score.interval95 %}{{ "%.2f"|format(100 * score.interval95[metric][0]) }} to
{{ "%.2f"|format(100 * score.interval95[metric][1]) }}{% endif %}</tr>
{% endfor %}{% endfor %}
</table>
{% endif %}
<h2>Curves</h2>
<div class="plots">
{% for plot in plots %}<img alt="{{ plot.title }}" src="data:image/png;base64,{{ plot.data }}">{% endfor %}
</div>
{% for score in scores if score.grid %}
<h2>{{ score.title }}: images and predictions</h2>
<img alt="images with predictions" src="data:image/png;base64,{{ score.grid }}">
<h2>{{ score.title }}: confusion</h2>
<img alt="confusion matrix" src="data:image/png;base64,{{ score.confusion }}">
{% endfor %}
<h2>Configuration</h2>
<pre>{{ config }}</pre>
</html>
"""


def write_run_report(run_dir: Path) -> Path:
    """Draw the run in `run_dir` from its log and its newest scores."""
    records = [*read_log(run_dir), *read_lines(run_dir / SCORES)]
    config = json.loads((run_dir / "config.json").read_text())
    pictures: dict[str, bytes] = {}
    for title, names, percent in CURVES:
        series = {name: _series(records, name) for name in names}
        if any(steps for steps, _ in series.values()):
            pictures[title] = png(curves(series, title, percent))
    pictures = _trends(records) | pictures
    plots = [{"title": title, "data": _inline(data)} for title, data in pictures.items()]
    scores = [_score(result, pictures) for result in _newest_scores(run_dir)]
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    for title, data in pictures.items():
        (folder / f"{title.replace(' ', '_')}.png").write_bytes(data)
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            name=config["name"],
            summary=_summary(records, config) + _best(run_dir),
            events=[record for record in records if "event" in record],
            scores=scores,
            plots=plots,
            config=json.dumps(config, indent=2),
        )
    )
    path = run_dir / "report.html"
    temporary = path.with_name(f".{path.name}-{os.getpid()}")  # the training and a watch may write at once
    temporary.write_text(page)
    temporary.replace(path)
    return path


def _trends(records: list[dict[str, Any]]) -> dict[str, bytes]:
    """A picture of the scores over steps for each kind of benchmark."""
    pictures = {}
    for kind, title in TRENDS.items():
        names = sorted({name for record in records for name in record if name.startswith(f"{kind}/")})
        if names:
            shown = {name.removeprefix(f"{kind}/"): _series(records, name) for name in names}
            pictures[title] = png(curves(shown, title, percent=True))
    return pictures


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = sorted({record["step"]: record[name] for record in records if name in record}.items())
    return [step for step, _ in found], [value for _, value in found]


def _newest_scores(run_dir: Path) -> Iterator[Result]:
    """The results of the newest step that has any; one that a watch is just writing comes with the next report."""
    folders = sorted((run_dir / "evals").glob("step_*"))
    for path in sorted(folders[-1].glob("*.json")) if folders else []:
        with suppress(InputError):
            yield read_result(path)


def _score(result: Result, pictures: dict[str, bytes]) -> dict[str, Any]:
    """A result with its two pictures, which are added to `pictures` as well."""
    record, arrays = result.record, result.arrays
    step = int(result.path.parent.name.removeprefix("step_"))
    if "shown" not in arrays:  # retrieval has no classes
        return record | {"step": step, "grid": None}
    classes, predictions, labels = arrays["classes"].tolist(), arrays["predictions"], arrays["labels"]
    shown = arrays["shown"]
    grid = png(prediction_grid(arrays["thumbnails"], predictions[shown], labels[shown], classes))
    confusion = png(confusion_matrix(predictions, labels, classes))
    pictures |= {f"grid of {record['dataset']}": grid, f"confusion of {record['dataset']}": confusion}
    return record | {"step": step, "grid": _inline(grid), "confusion": _inline(confusion)}


def _summary(records: list[dict[str, Any]], config: dict[str, Any]) -> str:
    steps = [record for record in records if "loss" in record]
    if not steps:
        return "no step has been logged yet"
    return (
        f"{config['model']['name']}, step {steps[-1]['step']:,} of {config['steps']:,}, "
        f"batch {config['batch_size']:,}, loss {steps[-1]['loss']:.4f}"
    )


def _best(run_dir: Path) -> str:
    """The checkpoint that has the mark `best`, if one has it."""
    try:
        mark = json.loads((run_dir / "checkpoints" / "best.json").read_text())
        return f"; best checkpoint: step {mark['step']:,}, {mark['name']} {100 * mark['value']:.2f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _inline(data: bytes) -> str:
    return base64.b64encode(data).decode()
