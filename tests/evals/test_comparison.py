"""McNemar's test against its definition, and results that cannot be compared."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from evaclip.cli import main
from evaclip.errors import InputError
from evaclip.evals.comparison import class_changes, compare, mcnemar_p
from evaclip.report.results import read_result, wilson, write_result

CLASSES = ["cat", "dog", "owl"]


def written(folder: Path, name: str, predictions: np.ndarray, labels: np.ndarray, **changes) -> Path:
    """A result such as an evaluator leaves."""
    top1 = float((predictions == labels).mean())
    record = {
        "dataset": "pets", "title": "Pets", "model": {"name": name, "step": "12000"}, "images": len(labels),
        "headline": "top1", "metrics": {"top1": top1}, "data": {"sha256": "ab" * 32},
    }  # fmt: skip
    arrays = {"predictions": predictions, "labels": labels, "classes": np.array(CLASSES)}
    return write_result(folder, name, record | changes, arrays)


def two(folder: Path, **changes) -> tuple[Path, Path]:
    """Two models of which the second is better at owls."""
    random = np.random.default_rng(0)
    labels = np.arange(300) % 3
    a = np.where(random.random(300) < 0.7, labels, (labels + 1) % 3)
    b = np.where((labels == 2) | (random.random(300) < 0.1), labels, a)
    return written(folder, "a", a, labels), written(folder, "b", b, labels, **changes)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (9, 3), (7, 7), (40, 80), (400, 520)])
def test_p_is_that_of_the_binomial_distribution(only_a, only_b):
    n, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    assert mcnemar_p(50, only_a, only_b, 20) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_the_table_is_counted_image_by_image(tmp_path):
    a, b = (read_result(path) for path in two(tmp_path))
    (pair,) = compare(a, b)
    table = {(x, y): 0 for x in (False, True) for y in (False, True)}
    for one, other, label in zip(a.arrays["predictions"], b.arrays["predictions"], a.arrays["labels"], strict=True):
        table[bool(one == label), bool(other == label)] += 1
    assert (pair.both, pair.only_a, pair.only_b) == (table[True, True], table[True, False], table[False, True])
    assert pair.hits == (round(300 * a.headline), round(300 * b.headline))
    assert compare(b, a)[0].p == pair.p < 1e-6
    changes = class_changes(a, b)
    assert changes[0].name == "owl" and changes[0].images == changes[0].b == 100
    assert sum(change.a for change in changes) == pair.hits[0]


def test_recalls_are_compared_caption_by_caption(tmp_path):
    random = np.random.default_rng(1)
    paths = []
    for name in ("a", "b"):
        ranks = {
            f"{way}_ranks": random.integers(0, 20, n) for way, n in (("image_to_text", 40), ("text_to_image", 200))
        }
        record = {
            "dataset": "coco", "title": "COCO", "model": {"name": name}, "images": 40, "headline": "m",
            "metrics": {"m": 0.5}, "data": {"sha256": "cd" * 32},
        }  # fmt: skip
        paths.append(write_result(tmp_path, name, record, ranks))
    a, b = (read_result(path) for path in paths)
    pairs = {pair.metric: pair for pair in compare(a, b)}
    assert len(pairs) == 6 and pairs["text_to_image/recall@5"].images == 200
    assert pairs["text_to_image/recall@5"].hits[0] == (a.arrays["text_to_image_ranks"] < 5).sum()
    assert class_changes(a, b) == []
    fewer = {name: rows[:-1] for name, rows in b.arrays.items()}
    with pytest.raises(InputError, match="do not count the same files"):
        compare(a, read_result(write_result(tmp_path, "fewer", b.record, fewer)))


def test_intervals_are_wilsons():
    assert wilson(37, 50) == pytest.approx(proportion_confint(37, 50, method="wilson"))


def test_the_command_prints_both_models_and_the_classes_that_changed(tmp_path, capfd):
    assert main(["compare", *map(str, two(tmp_path)), "--classes", "1"]) == 0
    said = capfd.readouterr().out
    assert "Pets, 300 images" in said and "b, step 12,000" in said and "owl" in said and "cat" not in said
    assert "100.0" in said and "McNemar" in said


def test_what_cannot_be_compared_is_one_sentence(tmp_path, capfd):
    a, b = two(tmp_path, data={"sha256": "ef" * 32})

    def refused(*paths: Path) -> str:
        assert main(["compare", *map(str, paths)]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    assert "different files of Pets (fingerprints abababababab and efefefefefef)" in refused(a, b)
    assert "did you mean" in refused(a, tmp_path / "bb.json")
    _, b = two(tmp_path, dataset="birds", title="Birds")
    assert "a.json is of Pets" in refused(a, b) and "a comparison needs one data set" in refused(a, b)
    a, b = two(tmp_path)
    b.with_suffix(".npz").unlink()
    assert "with the single predictions is missing; score again" in refused(a, b)
    a.with_suffix(".npz").write_bytes(b"junk")
    assert "is not the result of an evaluation" in refused(a, b)
    b.write_text(json.dumps({"dataset": "pets"}))
    assert "it has no 'title'" in refused(b, a)
    _, b = two(tmp_path)
    a = written(tmp_path, "a", np.zeros(300, np.int64), np.zeros(300, np.int64))
    assert "do not have the same labels" in refused(a, b)


def test_without_statsmodels_it_says_how_to_have_it(tmp_path, monkeypatch, capfd):
    import sys

    monkeypatch.setitem(sys.modules, "statsmodels.stats.contingency_tables", None)
    assert main(["compare", *map(str, two(tmp_path))]) == 2
    assert "pip install 'evaclip[compare]'" in capfd.readouterr().err
