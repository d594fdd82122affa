"""The service, asked in this process: answers, limits, token, hosts, and that no path is ever followed."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from evaclip.cli import main
from evaclip.encoder import load_encoder
from evaclip.search import service
from evaclip.search.index import open_index
from evaclip.search.service import Limits, create_app
from tests.search.conftest import picture

LOCAL = "http://localhost"


def png(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def index(searchable):
    return open_index(searchable)


@pytest.fixture(scope="module")
def encoder(model):
    return load_encoder(model)


@pytest.fixture(scope="module")
def client(index, encoder):
    return TestClient(create_app(index, encoder, Limits(), hosts=("localhost",)), base_url=LOCAL)


def other(index, encoder, base_url=LOCAL, token=None, hosts=None, **limits):
    return TestClient(create_app(index, encoder, Limits(**limits), token, hosts), base_url=base_url)


def test_search_gives_what_the_index_gives(client, index, encoder):
    answer = client.post("/search", json={"text": ["some words"], "top": 5})
    assert answer.status_code == 200
    scores, rows = index.search(encoder.texts(["some words"]).numpy(), 5)
    found = answer.json()["results"]
    assert [row["row"] for row in found] == rows[0].tolist()
    np.testing.assert_allclose([row["score"] for row in found], scores[0], atol=1e-5)
    assert set(found[0]) == {"row", "score", "key", "caption", "place", "width", "height"}  # no path of this machine
    image = client.post("/search", json={"image": [png(picture(7))], "top": 1}).json()["results"][0]
    assert image["key"] == "007.png"
    like = client.post("/search", json={"like": [image["row"]], "top": 1}).json()["results"][0]
    assert like["row"] == image["row"]


def test_embed_and_search_by_vector(client, encoder):
    answer = client.post("/embed", json={"text": ["a", "b"], "image": [png(picture(3))]}).json()
    np.testing.assert_allclose(answer["text"], encoder.texts(["a", "b"]).numpy(), atol=1e-6)
    assert answer["dim"] == 24 and answer["space_id"] == encoder.space_id
    query = {"vector": answer["image"][0], "space_id": answer["space_id"], "top": 1}
    assert client.post("/search", json=query).json()["results"][0]["key"] == "003.png"
    assert client.post("/search", json=query | {"space_id": "another"}).status_code == 409
    assert client.post("/search", json=query | {"vector": [1.0, 2.0]}).status_code == 400
    assert client.post("/search", json=query | {"vector": [0.0] * 24}).status_code == 400


def test_health_and_description(client, index):
    health = client.get("/healthz").json()
    assert health == {"status": "ok", "rows": 12, "space_id": index.space_id, "dim": 24}
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/search", "/embed", "/thumbnail/{row}", "/healthz"}


def test_the_page_and_its_two_files_are_all_there_is(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "javascript" in client.get("/page.js").headers["content-type"]
    assert client.get("/page.css").status_code == 200
    assert "<script>" not in page.text and "http" not in page.text  # nothing inline, nothing from elsewhere


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../serve.py", "/page.html", "/docs",
     "/thumbnail/..%2f..%2fetc%2fpasswd", "/thumbnail/%2fetc%2fpasswd", "/thumbnail/-1", "/thumbnail/12",
     "/thumbnail/99999999999999999999", "/thumbnail/1e1", "/thumbnail/0%00", "/thumbnail//etc/passwd"],
)  # fmt: skip
def test_nothing_but_indexed_rows_is_read(client, path):
    answer = client.get(path)
    assert answer.status_code in (404, 422) and "root:" not in answer.text


def test_thumbnails_are_made_anew_from_indexed_images(client, index, encoder, tmp_path):
    answer = client.get("/thumbnail/3")
    assert answer.headers["content-type"] == "image/jpeg" and answer.headers["x-content-type-options"] == "nosniff"
    assert Image.open(io.BytesIO(answer.content)).size == (20, 16)
    row = index.row(3)
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * row["bytes"])  # a file of the right length in the place of the image
    changed = service.Service(index, encoder, Limits())
    changed.row = lambda number: row | {"path": str(secret)}
    with pytest.raises(service.HTTPException) as refused:
        changed.thumbnail(3)
    assert refused.value.status_code == 404 and "secret" not in refused.value.detail


@pytest.mark.parametrize(
    ("asked", "status", "sentence"),
    [
        ({}, 400, "nothing to search for"),
        ({"text": "a"}, 422, "list"),
        ({"text": [""]}, 422, "at least 1"),
        ({"text": ["a" * 2001]}, 422, "at most 2000"),
        ({"text": ["a"] * 33}, 422, "at most 32"),
        ({"text": ["\ud800"]}, 422, "unicode"),
        ({"text": ["a"], "top": 0}, 422, "greater than or equal to 1"),
        ({"text": ["a"], "top": True}, 422, "integer"),
        ({"text": ["a"], "path": "/etc/passwd"}, 422, "Extra inputs"),
        ({"like": [12]}, 404, "there is no row 12"),
        ({"like": [-1]}, 422, "greater than or equal to 0"),
        ({"image": ["????"]}, 400, "not base64"),
        ({"image": ["AAAA"]}, 400, "no JPEG, PNG or WebP"),
        ({"image": ["/etc/passwd"]}, 400, "the image is no"),
    ],
)
def test_bad_questions_get_a_sentence(client, asked, status, sentence):
    body = json.dumps(asked)
    answer = client.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and sentence in answer.text


def test_a_form_of_another_page_is_not_taken(client):
    body = json.dumps({"text": ["a"]})
    assert client.post("/search", content=body, headers={"Content-Type": "text/plain"}).status_code == 422
    assert "access-control-allow-origin" not in client.get("/healthz").headers


def test_limits_on_body_and_pixels(index, encoder):
    small = other(index, encoder, max_body=2000, max_pixels=1000)
    assert small.post("/search", json={"text": ["a"]}).status_code == 200
    assert small.post("/search", content=b"x" * 2001).status_code == 413
    assert small.post("/search", content=iter([b"x" * 1500, b"x" * 1500])).status_code == 413  # no length was said
    flat = Image.new("RGB", (40, 30))
    answer = small.post("/search", json={"image": [png(flat)]})
    assert answer.status_code == 400 and "40 x 30 is more than 1,000 pixels" in answer.text


def test_an_answer_that_takes_too_long_is_503_and_the_next_one_comes(index, encoder, monkeypatch):
    slow = other(index, encoder, seconds=0.3, at_once=1)
    patient = service.results
    monkeypatch.setattr(service, "results", lambda *arguments: time.sleep(0.8) or patient(*arguments))
    answer = slow.post("/search", json={"text": ["a"]})
    assert answer.status_code == 503 and "no answer within 0.3 seconds" in answer.text
    monkeypatch.setattr(service, "results", patient)
    assert slow.get("/healthz").status_code == 200
    time.sleep(0.8)
    assert slow.post("/search", json={"text": ["a"]}).status_code == 200


def test_a_token_guards_all_but_the_page_and_health(index, encoder):
    guarded = other(index, encoder, token="0123456789abcdef")
    for method, path in (("post", "/search"), ("post", "/embed"), ("get", "/thumbnail/0")):
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \xff".encode("latin-1")}):
            answer = guarded.request(
                method, path, headers=header, **({"json": {"text": ["a"]}} if method == "post" else {})
            )
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": "Bearer 0123456789abcdef"}
    assert guarded.post("/search", json={"text": ["a"]}, headers=right).status_code == 200
    assert guarded.get("/thumbnail/0", headers=right).status_code == 200
    assert guarded.get("/").status_code == guarded.get("/healthz").status_code == 200


def test_other_names_for_this_machine_are_not_answered(index, encoder):
    names = ("localhost", "127.0.0.1", "::1")
    for address, status in (("http://localhost:8000", 200), ("http://127.0.0.1", 200), ("http://[::1]:99", 200),
                            ("http://evil.example", 421), ("http://localhost.evil.example", 421)):  # fmt: skip
        assert other(index, encoder, base_url=address, hosts=names).get("/healthz").status_code == status


def test_serve_from_the_command_line(searchable, tmp_path):
    words = [sys.executable, "-m", "evaclip", "serve", str(searchable), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        said = serving.stderr.readline()
        assert "12 rows at http://127.0.0.1:" in said
        with urllib.request.urlopen(said.split()[3] + "healthz") as answer:
            assert json.load(answer)["rows"] == 12
        serving.send_signal(2)
        assert serving.wait(20) == 0 and "stopped" in serving.stderr.read()


def test_serving_that_cannot_begin(searchable, tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(searchable), "--port", port]) == 2
        assert "choose another with --port" in capfd.readouterr().err
    (tmp_path / "token").write_text("short\n")
    assert main(["serve", str(searchable), "--token-file", str(tmp_path / "token")]) == 2
    assert "at least 16 printable" in capfd.readouterr().err
    assert main(["serve", str(searchable), "--token-file", str(tmp_path / "none")]) == 2
    assert "cannot be read from" in capfd.readouterr().err
