"""Asking an index: what a query means, what is printed, the page of thumbnails, refusals."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from evaclip.cli import main
from evaclip.encoder import load_encoder
from evaclip.errors import InputError
from evaclip.search.index import open_index
from evaclip.search.pictures import thumbnail
from evaclip.search.query import Query, query_vector
from tests.search.conftest import picture, write_model


def search(*words) -> int:
    return main(["search", *(str(word) for word in words), "--device", "cpu"])


def lines(capfd):
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_an_image_finds_itself_and_text_ranks_as_the_product_does(searchable, model, tmp_path, capfd):
    picture(7).save(tmp_path / "seven.png")
    assert search(searchable, "--image", tmp_path / "seven.png", "--top", 3) == 0
    found = lines(capfd)
    assert [row["rank"] for row in found] == [1, 2, 3] and found[0]["key"] == "007.png"
    assert found[0]["score"] == pytest.approx(1, abs=1e-3) and found[0]["caption"] == "noise <b>number</b> 7"
    assert search(searchable, "some words", "--top", 12) == 0
    found = lines(capfd)
    vectors = np.load(searchable / "part-00000.npy").astype(np.float64)
    scores = vectors @ load_encoder(model).texts(["some words"]).numpy()[0].astype(np.float64)
    assert [row["row"] for row in found] == np.argsort(-scores, kind="stable").tolist()
    np.testing.assert_allclose([row["score"] for row in found], -np.sort(-scores), atol=1e-5)


def test_what_a_query_means(searchable, model):
    index, encoder = open_index(searchable), load_encoder(model)
    a, b, no = encoder.texts(["a", "b", "no"]).numpy()
    own = np.load(searchable / "part-00000.npy")[4].astype(np.float32)
    direction = (a + b + own) / 3 - 0.5 * no
    found = query_vector(Query(texts=("a", "b"), rows=(4,), without=("no",)), encoder, index)
    np.testing.assert_allclose(found, direction / np.linalg.norm(direction), atol=1e-5)
    image = encoder.images(encoder.preprocessing.pixels(picture(1))[None]).numpy()[0]
    np.testing.assert_allclose(query_vector(Query(images=(picture(1),)), encoder, index), image, atol=1e-6)
    with pytest.raises(InputError, match="nothing to search for"):
        query_vector(Query(without=("no",)), encoder, index)
    with pytest.raises(InputError, match="has no row 12"):
        query_vector(Query(rows=(12,)), encoder, index)


def test_a_file_of_queries(searchable, tmp_path, capfd):
    picture(2).save(tmp_path / "two.png")
    queries = ["plain words", "", json.dumps({"image": "two.png"}), json.dumps({"text": ["a", "b"], "without": "c"})]
    (tmp_path / "queries.jsonl").write_text("\n".join(queries))
    assert search(searchable, "--batch", tmp_path / "queries.jsonl", "--top", 2) == 0
    found = lines(capfd)
    assert [(row["query"], row["rank"]) for row in found] == [(n, r) for n in range(3) for r in (1, 2)]
    assert found[2]["key"] == "002.png"


def test_the_page_of_thumbnails_stands_alone_and_trusts_no_caption(searchable, tmp_path, capfd):
    page = tmp_path / "pages" / "sheet.html"
    assert search(searchable, "<script>alert(1)</script>", "--without", "x", "--top", 5, "--html", page) == 0
    text = page.read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "<b>number</b>" not in text and "noise &lt;b&gt;number" in text
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert len(pictures) == 5
    shown = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    shown.load()
    assert shown.size == (20, 16) and "http" not in text.replace("http-equiv", "")
    scores = [row["score"] for row in lines(capfd)]
    assert all(f"{score:.4f}" in text for score in scores)


def test_thumbnails_are_small_upright_and_hold_nothing_but_pixels():
    image = picture(0, (600, 300))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"  # turned a quarter; a description
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    made = thumbnail(buffer.getvalue(), "x")
    shown = Image.open(io.BytesIO(made))
    assert shown.size == (128, 256) and not shown.getexif() and b"where I live" not in made


def test_a_changed_original_is_said_on_the_page(model, tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    out = tmp_path / "out"
    assert main(["embed", str(tmp_path / "photos"), str(out), "--model", str(model), "--device", "cpu"]) == 0
    assert main(["index", str(out)]) == 0
    (tmp_path / "photos" / "1.png").write_bytes(b"something else")
    (tmp_path / "photos" / "2.png").unlink()
    assert search(out, "words", "--html", tmp_path / "sheet.html") == 0
    text = (tmp_path / "sheet.html").read_text()
    assert "has changed since it was embedded" in text and "cannot be read" in text and text.count("base64,") == 1


def test_refusals(searchable, model, tmp_path, capfd):
    def refused(sentence, *words):
        assert search(*words) == 2
        said = capfd.readouterr().err
        assert sentence in said and said.count("\n") == 1, said

    refused("is of another space", searchable, "words", "--model", write_model(tmp_path / "other", seed=1))
    refused("nothing to search for", searchable)
    refused("cannot be read", searchable, "--image", tmp_path / "no.png")
    (tmp_path / "bad.png").write_bytes(b"GIF89a")
    refused("is no JPEG, PNG or WebP", searchable, "--image", tmp_path / "bad.png")
    refused("--top must be at least 1", searchable, "x", "--top", "0")
    refused("evaclip index makes one", tmp_path, "x")
    for text, sentence in (("{", "line 1"), ('{"txt": "a"}', "did you mean text"), ('{"text": 3}', "must be a text")):
        (tmp_path / "queries").write_text(text)
        refused(sentence, searchable, "--batch", tmp_path / "queries")
    (tmp_path / "queries").write_text("\n")
    refused("holds no queries", searchable, "--batch", tmp_path / "queries")
    refused("leave out the others", searchable, "x", "--batch", tmp_path / "queries")


def test_weights_that_changed_are_refused(searchable, tmp_path, capfd):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(searchable, out)
    path = out / "index" / "index.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["source"] = str(write_model(tmp_path / "model", seed=9))
    path.write_text(json.dumps(manifest))
    assert search(out, "words") == 2
    assert "its weights have changed since" in capfd.readouterr().err
