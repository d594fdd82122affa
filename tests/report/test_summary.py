"""The page of many models: what is found, which numbers are taken together, and when they are not."""

import re
from pathlib import Path

import numpy as np
import pytest

from evaclip.cli import main
from evaclip.report.results import read_result, write_result
from evaclip.report.summary import TWELVE, confusion_pairs, find_results, grouped, newest, write_summary

CLASSES = np.array(["cat", "dog", "<owl>"])
# EVA02-CLIP-E/14+ of the paper: ImageNet, -V2, -A, -R, -Sketch, ObjectNet; it gives a mean of 80.9 and a gap of 1.1.
PUBLISHED = {
    "imagenet": 82.0, "imagenet_v2": 75.7, "imagenet_a": 82.1, "imagenet_r": 94.5, "imagenet_sketch": 71.6,
    "objectnet": 79.6,
}  # fmt: skip


def written(folder: Path, dataset: str, share: float, model: dict, **more) -> Path:
    """A result of a hundred images of which `share` are right."""
    labels = np.arange(100) % 3
    predictions = np.where(np.arange(100) < 100 * share, labels, (labels + 1) % 3)
    record = {
        "dataset": dataset, "title": dataset.upper(), "model": model, "images": 100, "headline": "top1",
        "metrics": {"top1": share}, "interval95": {"top1": [share - 0.01, share + 0.01]}, "data": {"sha256": "x"},
    }  # fmt: skip
    arrays = {
        "predictions": predictions, "labels": labels, "classes": CLASSES, "shown": np.array([0, 98, 99]),
        "thumbnails": np.full((3, 8, 8, 3), 90, np.uint8),
    }  # fmt: skip
    return write_result(folder, dataset, record | more, arrays)


def test_the_robustness_gap_is_the_papers(tmp_path):
    for name, value in PUBLISHED.items():
        written(tmp_path, name, value / 100, {"name": "E/14+"})
    (model,) = grouped(find_results(tmp_path))
    assert round(100 * model.mean(tuple(PUBLISHED)), 1) == 80.9
    assert round(100 * model.robustness_gap(), 1) == 1.1
    assert model.mean(TWELVE) is None
    for name in TWELVE[6:]:
        written(tmp_path, name, 0.5, {"name": "E/14+"})
    (model,) = grouped(find_results(tmp_path))
    assert model.mean(TWELVE) == pytest.approx((sum(PUBLISHED.values()) / 100 + 6 * 0.5) / 12)
    written(tmp_path, "objectnet", 0.796, {"name": "E/14+"}, partial=True)
    (model,) = grouped(find_results(tmp_path))
    assert model.robustness_gap() is None and model.mean(TWELVE) is None


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run with three steps and a score of its own, and another model's folder."""
    for step, share in ((4, 0.5), (8, 0.6), (12, 0.7)):
        written(tmp_path / "run" / "evals" / f"step_{step:08}", "pets", share, {"name": "tiny"})
    said = {"name": "tiny", "run": str(tmp_path / "run"), "step": "12"}
    written(tmp_path / "run" / "scores", "birds", 0.9, said)
    written(tmp_path / "other", "pets", 0.8, {"name": "ViT <b>"})
    (tmp_path / "run" / "config.json").write_text('{"name": "x"}')
    (tmp_path / "run" / "list.json").write_text("[1]")
    (tmp_path / "run" / "broken.json").write_text("{")
    return tmp_path


def test_models_are_runs_at_steps_and_the_last_is_in_the_table(folder):
    models = grouped(find_results(folder))
    assert [(model.name, model.step, sorted(model.results)) for model in models] == [
        ("ViT <b>", None, ["pets"]), ("tiny", 4, ["pets"]), ("tiny", 8, ["pets"]), ("tiny", 12, ["birds", "pets"]),
    ]  # fmt: skip
    assert [(model.name, model.step) for model in newest(models)] == [("ViT <b>", None), ("tiny", 12)]


def test_the_page_shows_models_trends_and_confusions_and_escapes_them(folder, capfd):
    assert main(["report", str(folder)]) == 0
    assert f"look at {folder / 'scores.html'}" in capfd.readouterr().err.replace("\n", "")
    page = (folder / "scores.html").read_text()
    assert "ViT &lt;b&gt;" in page and "<b>" not in page and "&lt;owl&gt;" in page and "<owl>" not in page
    assert "tiny, step 12" in page and "tiny, step 8" not in page and "5 results below" in page
    for score in ("70.00", "90.00", "80.00", "69.00 to"):
        assert score in page
    assert page.count("image/png") == 1 + 2 * 3  # a trend; two wrong images were kept of each newest result
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert write_summary(folder / "run", folder / "one.html").read_text().count("ViT") == 0


def test_a_pair_is_counted_by_hand(tmp_path):
    pairs = confusion_pairs(read_result(written(tmp_path, "pets", 0.7, {"name": "m"})))
    assert [(p["true"], p["said"], p["count"], p["images"]) for p in pairs] == [
        ("cat", "dog", 10, 34), ("dog", "<owl>", 10, 33), ("<owl>", "cat", 10, 33),
    ]  # fmt: skip
    assert [len(p["pictures"]) for p in pairs] == [1, 0, 1]
    assert confusion_pairs(read_result(written(tmp_path, "pets", 1.0, {"name": "m"}))) == []


def test_what_cannot_be_drawn_is_one_sentence(folder, tmp_path, capfd):
    def refused(path: Path) -> str:
        assert main(["report", str(path)]) == 2
        return capfd.readouterr().err.strip().splitlines()[-1]

    assert "did you mean" in refused(folder / "runn")
    (folder / "empty").mkdir()
    assert "there are no results below" in refused(folder / "empty")
    (folder / "other" / "pets.npz").write_bytes(b"junk")
    assert "pets.json is not the result of an evaluation" in refused(folder)
