"""The whole way, for real: a web server of this machine, img2dataset in its own environment, our checks, ten steps.

The server has good images, some of them twice, and everything that goes wrong on the web: links that are dead, bodies
that never end, sites that opt out, files that are no images. The download is stopped in its middle and started again.
"""

import io
import json
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from evaclip.cli import main
from evaclip.curate.img2dataset import VERSION
from evaclip.curate.recipe import known_recipes
from evaclip.data.index import expand, index_shards, load_index
from tests.conftest import encoded

ROOT = Path(__file__).parents[2]
# Two links of a hundred come to nothing in each of these ways; the number is what the server answers.
FATES = {
    "dead": 404,
    "gone": 410,
    "broken": 500,
    "stalled": 200,
    "no-ai": 200,
    "no-ai-named": 200,
    "junk": 200,
    "empty": 200,
}
PER_SHARD, SHARDS = 100, 4
RECIPE = """
from dataclasses import replace
from pathlib import Path
from evaclip.config import EvalConfig
from evaclip.data.shards import SourceConfig
from evaclip.recipes.small import eva02_tiny_digits

def live():
    "Ten steps on what was downloaded."
    run = eva02_tiny_digits()
    source = SourceConfig(name="live", shards=({shards!r},))
    return replace(
        run, name="live", run_dir=Path({run_dir!r}), steps=10, batch_size=32, evals=EvalConfig(),
        data=replace(run.data, sources=(source,)), optim=replace(run.optim, warmup=2),
    )
"""


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Path:
    """img2dataset's environment: the one of this checkout, or a new one."""
    standing = ROOT / "data" / ".img2dataset"
    if (standing / "bin" / "img2dataset").is_file():
        return standing
    folder = tmp_path_factory.mktemp("img2dataset")
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    install = [str(folder / "bin" / "pip"), "install", "--quiet", "--no-input", f"img2dataset=={VERSION}"]
    made = made if made.returncode else subprocess.run(install, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"img2dataset cannot be installed here: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    return folder


def picture(number: int) -> bytes:
    """A JPEG of 60 x 40 pixels; of the last ten of a hundred each odd one is the one before again."""
    number -= number % 2 if number % 100 >= 90 else 0
    random = np.random.default_rng(number)
    pixels = np.kron(random.integers(0, 256, (4, 6, 3)), np.ones((10, 10, 1), int)).astype(np.uint8)
    return encoded(pixels, "JPEG")


class Web(BaseHTTPRequestHandler):
    """`/fate/number.jpg`."""

    def do_GET(self) -> None:
        fate, name = self.path.strip("/").split("/")
        body = picture(int(name.partition(".")[0]))
        body = {"junk": b"<html>not an image</html>" * 50, "empty": b""}.get(fate, body)
        self.send_response(FATES.get(fate, 200))
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        if fate.startswith("no-ai"):
            self.send_header("X-Robots-Tag", "noai" if fate == "no-ai" else "img2dataset: noindex")
        self.end_headers()
        if fate == "stalled":
            self.wfile.write(body[:100])
            self.wfile.flush()
            time.sleep(4)
        else:
            time.sleep(0.02)
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def links(web: str) -> list[str]:
    """Of a hundred links 84 are good and 16 come to nothing, two for each fate."""
    unlucky = {10 + 5 * place: fate for place, fate in enumerate(sorted(FATES) * 2)}
    return [f"{web}/{unlucky.get(n % 100, 'good')}/{n}.jpg" for n in range(PER_SHARD * SHARDS)]


def tars(out: Path) -> list[Path]:
    return sorted((out / "shards").glob("*/*.tar"))


@pytest.mark.soak
def test_from_the_web_to_ten_steps(web, environment, tmp_path, capfd):
    (tmp_path / "links").mkdir()
    urls = links(web)
    table = arrow.table({"url": urls, "caption": [f"picture {n} of the web" for n in range(len(urls))]})
    parquet.write_table(table, tmp_path / "links" / "a.parquet")
    recipe = tmp_path / "mine.toml"
    text = known_recipes()["own_data"].read_text()
    recipe.write_text(text.replace("samples_per_shard = 10_000", f"samples_per_shard = {PER_SHARD}"))
    out = tmp_path / "out"
    words = ["data", "download", str(recipe), "--metadata", str(tmp_path / "links"), "--out", str(out)]
    words += ["--environment", str(environment), "--allow-private"]
    words += ["--processes", "1", "--threads", "2", "--timeout", "1", "--retries", "0"]

    stopped = subprocess.Popen([sys.executable, "-m", "evaclip", *words], cwd=ROOT)
    limit = time.monotonic() + 300
    while not list(out.glob("shards/*/*_stats.json")):
        assert stopped.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 143
    done = {path: path.stat().st_mtime_ns for path in out.glob("shards/*/*_stats.json")}
    assert 0 < len(done) < SHARDS
    assert main(words) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())  # what was done stays as it is
    said = capfd.readouterr().out
    assert f"{84 * SHARDS} images of {len(urls)} links (84.0%) in {SHARDS} shards" in said
    errors = json.loads((out / "shards/00000/summary.json").read_text())["errors"]
    assert sum(errors.values()) == 16 * SHARDS
    assert sum(n for what, n in errors.items() if "X-Robots-Tag" in what) == 4 * SHARDS

    found = captions(out)
    good = [number for number, url in enumerate(urls) if "/good/" in url]
    assert found == Counter(f"picture {number} of the web" for number in good)
    heads = index_shards(expand([str(out / "shards" / "00000")]))
    assert sum(head.samples for head in heads) == len(good)
    assert all((load_index(path).spans >= 0).all() for path in tars(out))
    train(tmp_path, curated(out / "shards" / "00000", tmp_path, capfd))


def curated(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """What the verbs of `evaclip data` make of a download: nothing is wrong with it, the repeated images go."""
    assert main(["data", "check", str(shards), "--level", "decode", "--out", str(tmp_path / "problems.jsonl")]) == 0
    kept, new = tmp_path / "kept", tmp_path / "new"
    assert main(["data", "dedup", str(shards), "--out", str(kept), "--distance", "-1"]) == 0
    images = {picture(n) for n, url in enumerate(links("")) if "/good/" in url}
    assert f"{84 * SHARDS:,} samples in, {len(images):,} out" in capfd.readouterr().out
    assert main(["data", "reshard", str(kept), "--out", str(new), "--per-shard", "64"]) == 0
    assert sum(head.samples for head in index_shards(expand([str(new)]))) == len(images)
    return new


def captions(out: Path) -> Counter[str]:
    """The captions in the shards, read by Python's own tarfile; each image is the server's, to the byte."""
    found: Counter[str] = Counter()
    for path in tars(out):
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(name) for name in tar.getnames()}
            parts = {name: (file or io.BytesIO()).read() for name, file in files.items()}
        for name in [name for name in parts if name.endswith(".txt")]:
            caption = parts[name].decode()
            found[caption] += 1
            assert parts[name.replace(".txt", ".jpg")] == picture(int(caption.split()[1]))
    return found


def train(tmp_path: Path, shards: Path) -> None:
    """Ten steps, whose losses are finite."""
    run_dir = tmp_path / "run"
    (tmp_path / "live.py").write_text(RECIPE.format(shards=str(shards), run_dir=str(run_dir)))
    assert main(["train", f"{tmp_path}/live.py:live"]) == 0
    losses = [
        line["loss"] for line in map(json.loads, (run_dir / "log.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert losses and np.isfinite(losses).all()
