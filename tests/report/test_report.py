"""Reports are made from what a run left behind, and a person can look at them."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from evaclip.log import redacted
from evaclip.report.plots import confusion_matrix, curves, png, prediction_grid
from evaclip.report.run import write_run_report


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_plots_are_pictures_and_the_same_twice():
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 3, 60), random.integers(0, 3, 60)
    classes = ["a", "b", "c"]
    images = random.integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
    for draw in (
        lambda: curves({"x": ([1, 2, 3], [0.1, 0.2, 0.5]), "y": ([1], [0.3])}, "title", percent=True),
        lambda: prediction_grid(images, predictions[:11], labels[:11], classes),
        lambda: confusion_matrix(predictions, labels, classes),
    ):
        first, second = png(draw()), png(draw())
        assert first == second and min(picture(first).size) > 200
        assert len(np.unique(np.asarray(picture(first).convert("L")))) > 20


def test_wrong_predictions_name_the_right_class():
    figure = prediction_grid(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]), np.array([0, 0]), ["cat", "dog"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["cat", "dog\nis cat"]


def test_the_confusion_matrix_counts():
    figure = confusion_matrix(np.array([0, 1, 1, 0]), np.array([0, 0, 1, 0]), ["cat", "dog"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["2", "1", "1"]


@pytest.fixture
def run(tmp_path):
    """What a run with two evaluations leaves."""
    (tmp_path / "config.json").write_text(
        json.dumps({"name": "<b>x</b>", "model": {"name": "m"}, "steps": 9, "batch_size": 4})
    )
    records = [{"step": s, "loss": 5 - s / 2, "gradient_norm/visual": 1.0} for s in range(1, 9)]
    records += [{"step": 4, "zero_shot/made/top1": 0.5}, {"step": 8, "event": "something <happened>"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 9, "lo')
    for step in (4, 8):
        folder = tmp_path / "evals" / f"step_{step:08}"
        folder.mkdir(parents=True)
        record = {
            "dataset": "made", "title": "Made", "images": 3, "metrics": {"top1": step / 10}, "headline": "top1",
            "model": {"name": "m"},
            "interval95": {"top1": [0.1, 0.9]},
        }  # fmt: skip
        (folder / "made.json").write_text(json.dumps(record))
        np.savez(
            folder / "made.npz", predictions=[0, 1, 0], labels=[0, 1, 1], shown=[0, 1, 2],
            thumbnails=np.zeros((3, 8, 8, 3), np.uint8), classes=["cat", "dog"],
        )  # fmt: skip
    return tmp_path


def test_a_report_shows_the_newest_scores_and_escapes_what_it_shows(run):
    page = write_run_report(run).read_text()
    assert "Scores at step 8" in page and "80.00" in page
    assert "step 8 of 9" in page and "something &lt;happened&gt;" in page and "<b>x</b>" not in page
    assert len(re.findall("data:image/png;base64,", page)) == 5
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing is fetched
    assert {p.name for p in (run / "report").iterdir()} == {
        "loss.png", "zero-shot_accuracy.png", "gradient_norm_before_clipping.png",
        "grid_of_made.png", "confusion_of_made.png",
    }  # fmt: skip


def test_a_run_without_a_step_has_a_report_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "x"}))
    assert "no step has been logged yet" in write_run_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:secret@bucket/x.tar", "s3://***@bucket/x.tar"),
        ("https://h/x?X-Amz-Signature=abc&a=1", "https://h/x?X-Amz-Signature=***&a=1"),
        ("WANDB_API_KEY=0123456789 go", "WANDB_API_KEY=*** go"),
        ("token hf_abcdefghijklmnopqrstuvwx", "token ***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("a photo of a key, keys=no", "a photo of a key, keys=***"),
        ("/data/shards/{0..9}.tar", "/data/shards/{0..9}.tar"),
    ],
)
def test_secrets_do_not_reach_the_log(text, clean):
    assert redacted(text) == clean
