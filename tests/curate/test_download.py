"""Lists are prepared as written, and a download calls, continues and counts; img2dataset is played by a small script.

The real one is met in test_live_download.py, a long test.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from evaclip.cli import main
from evaclip.curate import lists as lists_module
from evaclip.curate.links import prepared
from evaclip.curate.lists import list_number, located
from evaclip.curate.recipe import LinksRecipe, known_recipes, load_recipe
from evaclip.errors import InputError

# Writes what img2dataset writes, for links whose number is even; a `slow` link makes it wait, a `broken` one fail.
ACTOR = """#!{python}
import json, pathlib, sys, time
import pyarrow.parquet as parquet
said = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
rows = parquet.read_table(said["url_list"]).to_pylist()
size, folder = int(said["number_sample_per_shard"]), pathlib.Path(said["output_folder"])
for number, first in enumerate(range(0, len(rows), size)):
    if (folder / f"{{number:05}}_stats.json").exists():
        continue
    block = rows[first : first + size]
    if any("broken" in row["url"] for row in block):
        sys.exit("it broke")
    if any("slow" in row["url"] for row in block):
        time.sleep(60)
    good = sum(int(row["url"].rpartition("/")[2]) % 2 == 0 for row in block)
    (folder / f"{{number:05}}.tar").write_bytes(bytes(1000 * good))
    errors = {{"success": good, "HTTP Error 404": len(block) - good}}
    stats = dict(count=len(block), successes=good, duration=0.5, status_dict=errors)
    (folder / f"{{number:05}}_stats.json").write_text(json.dumps(stats))
    print("made", number, flush=True)
"""


@pytest.fixture
def environment(tmp_path) -> Path:
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "img2dataset"
    program.write_text(ACTOR.format(python=sys.executable))
    program.chmod(0o755)
    return folder


def a_list(path: Path, count: int = 250, **changes: object) -> Path:
    """A list of links; `changes` are other columns, or other values of some rows by number."""
    columns = {
        "url": [f"http://images.example.org/{n}" for n in range(count)],
        "caption": [f"picture {n}" for n in range(count)],
        "score": [n / count for n in range(count)],
    }
    for row, url in dict(changes.pop("urls", {})).items():  # type: ignore[call-overload]
        columns["url"][row] = url
    for row, caption in dict(changes.pop("captions", {})).items():  # type: ignore[call-overload]
        columns["caption"][row] = caption
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path)
    return path


def own(tmp_path: Path, *changes: tuple[str, str]) -> str:
    text = known_recipes()["own_data"].read_text()
    for before, after in (("samples_per_shard = 10_000", "samples_per_shard = 100"), *changes):
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "mine.toml").write_text(text)
    return str(tmp_path / "mine.toml")


def links(path: str) -> LinksRecipe:
    recipe = load_recipe(path)
    assert isinstance(recipe, LinksRecipe)
    return recipe


def downloaded(tmp_path: Path, environment: Path, *more: str) -> int:
    words = ["--metadata", str(tmp_path / "links"), "--out", str(tmp_path / "out"), "--environment", str(environment)]
    return main(["data", "download", str(tmp_path / "mine.toml"), *words, *more])


SCORED = (
    '# [[filters]]\n# column = "similarity"\n# at_least = 0.28\n',
    '[[filters]]\ncolumn = "score"\nat_least = 0.2\nat_most = 0.8\n',
)


def test_a_list_keeps_what_the_recipe_says(tmp_path):
    source = a_list(tmp_path / "a.parquet", captions={60: "  ", 61: None})
    recipe = links(own(tmp_path, SCORED, ("keep = []", 'keep = ["score"]')))
    counts = prepared(source, recipe, tmp_path / "out.parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    expected = [n for n in range(250) if 0.2 <= n / 250 <= 0.8 and n not in (60, 61)]
    assert [row["caption"] for row in rows] == [f"picture {n}" for n in expected]
    assert set(rows[0]) == {"url", "caption", "score"}
    assert counts["links"] == 250 and counts["without caption"] == 2 and counts["taken"] == len(rows) == len(expected)
    assert sum(n for what, n in counts.items() if what != "links") == 250


BAD = [
    "file:///etc/passwd", "ftp://a.org/1", "", "javascript:1", "http://127.0.0.1/1", "http://10.0.0.1:8080/1",
    "https://[::1]/1", "http://localhost/1", "http://LOCALHOST:80/1", "http://printer.local/1", "http://intranet/1",
    "http://169.254.169.254/latest/meta-data", "http://metadata.google.internal/1", "http://0x7f.1/1",
    "http://2130706433/1", "http://user@192.168.0.1/1", "http://localhost./1",
]  # fmt: skip
GOOD = [
    "http://images.example.org/1", "https://a-b.example.co.uk:8443/x?y=z", "HTTP://EXAMPLE.COM", "http://8.8.8.8/1",
    "https://bücher.example/1", "http://user:word@example.org/1", "http://xn--bcher-kva.example/1",
]  # fmt: skip


def test_addresses_that_are_private_or_no_web_are_left_out(tmp_path):
    source = a_list(tmp_path / "a.parquet", 30, urls=dict(enumerate(BAD + GOOD)))
    recipe = links(own(tmp_path))
    counts = prepared(source, recipe, tmp_path / "out.parquet")
    kept = parquet.read_table(tmp_path / "out.parquet")["url"].to_pylist()
    assert counts["refused address"] == len(BAD) and kept[: len(GOOD)] == GOOD
    prepared(source, recipe, tmp_path / "all.parquet", allow_private=True)
    kept = parquet.read_table(tmp_path / "all.parquet")["url"].to_pylist()
    assert "http://127.0.0.1/1" in kept and "file:///etc/passwd" not in kept


def test_a_share_is_drawn_by_place_alone(tmp_path, monkeypatch):
    source, recipe = a_list(tmp_path / "a.parquet", 5000), links(own(tmp_path))
    taken = {}
    for share in (0.2, 0.5):
        prepared(source, recipe, tmp_path / f"{share}.parquet", share=share)
        taken[share] = set(parquet.read_table(tmp_path / f"{share}.parquet")["url"].to_pylist())
        assert abs(len(taken[share]) / 5000 - share) < 0.03
    assert taken[0.2] < taken[0.5]
    monkeypatch.setattr("evaclip.curate.links.ROWS", 333)
    prepared(source, recipe, tmp_path / "again.parquet", share=0.2)
    assert set(parquet.read_table(tmp_path / "again.parquet")["url"].to_pylist()) == taken[0.2]


def test_tab_separated_lists_have_their_columns_named(tmp_path):
    (tmp_path / "cc12m.tsv").write_text(
        'http://a.org/1\tone "quoted\nhttp://a.org/2\ttwo\tmore\nhttp://a.org/3\tthree\n'
    )
    prepared(tmp_path / "cc12m.tsv", links("cc12m"), tmp_path / "out.parquet")
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == [
        {"url": "http://a.org/1", "caption": 'one "quoted'},
        {"url": "http://a.org/3", "caption": "three"},
    ]


def test_a_list_made_in_another_way_is_not_mixed_in(tmp_path):
    source, recipe = a_list(tmp_path / "a.parquet"), links(own(tmp_path))
    first = prepared(source, recipe, tmp_path / "out.parquet", share=0.5)
    before = (tmp_path / "out.parquet").read_bytes()
    assert prepared(source, recipe, tmp_path / "out.parquet", share=0.5) == first
    with pytest.raises(InputError, match="made from another list or with other settings; choose another --out"):
        prepared(source, recipe, tmp_path / "out.parquet", share=0.6)
    assert (tmp_path / "out.parquet").read_bytes() == before


def test_lists_that_are_none_are_named(tmp_path):
    recipe = links(own(tmp_path))
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk\.parquet cannot be read as a list of links"):
        prepared(tmp_path / "junk.parquet", recipe, tmp_path / "out.parquet")
    parquet.write_table(arrow.table({"URL": ["http://a.org"], "TEXT": ["x"]}), tmp_path / "old.parquet")
    with pytest.raises(InputError, match=r"old\.parquet has no column 'url'"):
        prepared(tmp_path / "old.parquet", recipe, tmp_path / "out.parquet")
    with pytest.raises(InputError, match=r"of 3 links none is left .*3 refused address"):
        prepared(
            a_list(tmp_path / "a.parquet", 3, urls=dict.fromkeys(range(3), "file:///x")),
            recipe,
            tmp_path / "out.parquet",
        )
    assert not list(tmp_path.glob("out*"))


def test_a_download_runs_counts_and_is_not_done_twice(tmp_path, environment, capfd):
    own(tmp_path)
    for number in range(2):
        a_list(tmp_path / "links" / f"part-{number}.parquet", 250, urls={3: "file:///etc/passwd"})
    assert downloaded(tmp_path, environment) == 0
    said = capfd.readouterr().out
    assert "250 images of 498 links (50.2%) in 6 shards" in said and "248 x HTTP Error 404" in said
    summary = json.loads((tmp_path / "out/shards/00001/summary.json").read_text())
    assert (summary["links"], summary["images"], summary["counts"]["refused address"]) == (249, 125, 1)
    logs = [path.read_text().count("made") for path in sorted(tmp_path.glob("out/shards/*/img2dataset.log"))]
    assert logs == [3, 3]
    (tmp_path / "out/shards/00000/00001_stats.json").unlink()
    assert downloaded(tmp_path, environment) == 0
    assert "250 images of 498 links" in capfd.readouterr().out
    logs = [path.read_text().count("made") for path in sorted(tmp_path.glob("out/shards/*/img2dataset.log"))]
    assert logs == [4, 3]


def test_one_list_and_a_trial(tmp_path, environment, capfd):
    own(tmp_path)
    for number in range(3):
        a_list(tmp_path / "links" / f"part-{number}.parquet", 1000)
    assert downloaded(tmp_path, environment, "--part", "2") == 0
    assert [path.name for path in (tmp_path / "out/shards").iterdir()] == ["00002"]
    assert downloaded(tmp_path, environment, "--smoke") == 0
    assert "250 images of 500 links (50.0%) in 5 shards" in capfd.readouterr().out
    assert downloaded(tmp_path, environment, "--part", "3") == 2
    assert "list 3 is asked for, but there are 3, counted from 0" in capfd.readouterr().err
    assert downloaded(tmp_path, environment, "--share", "1.5") == 2


def test_a_failure_and_an_end_before_its_time_are_sentences(tmp_path, environment, capfd):
    own(tmp_path)
    a_list(tmp_path / "links" / "a.parquet", 250, urls={120: "http://a.org/broken"})
    assert downloaded(tmp_path, environment) == 2
    assert "img2dataset failed with status 1: it broke" in capfd.readouterr().err
    shutil.copy("/bin/true", environment / "bin" / "img2dataset")  # img2dataset leaves with 0 when interrupted
    assert downloaded(tmp_path, environment) == 2
    assert "100 of 250 links have been tried so far; the same command again goes on" in capfd.readouterr().err


def test_a_missing_environment_says_how_to_make_it(tmp_path, capfd):
    own(tmp_path)
    assert downloaded(tmp_path, tmp_path / "env") == 2
    said = capfd.readouterr().err
    assert f"python3.12 -m venv {tmp_path}/env && {tmp_path}/env/bin/pip install img2dataset==" in said


def test_a_stopped_download_takes_img2dataset_with_it_and_no_two_share_a_folder(tmp_path, environment, capfd):
    own(tmp_path)
    a_list(tmp_path / "links" / "a.parquet", 250, urls={120: "http://a.org/slow/0"})
    words = ["data", "download", str(tmp_path / "mine.toml"), "--metadata", str(tmp_path / "links")]
    words += ["--out", str(tmp_path / "out"), "--environment", str(environment)]
    process = subprocess.Popen([sys.executable, "-m", "evaclip", *words], cwd=Path(__file__).parents[2])
    log = tmp_path / "out/shards/00000/img2dataset.log"
    limit = time.monotonic() + 60
    while not (log.exists() and "made 0" in log.read_text()):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    assert downloaded(tmp_path, environment) == 2
    assert "another process is downloading to" in capfd.readouterr().err
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    shutil.copy("/bin/true", environment / "bin" / "img2dataset")
    assert downloaded(tmp_path, environment) == 2  # the lock is free: nobody is left
    assert "have been tried so far" in capfd.readouterr().err


def test_commands_are_shown_and_nothing_is_done(tmp_path, capfd):
    assert main(["data", "download", "merged2b", "--dry-run", "--out", str(tmp_path / "d")]) == 0
    said = capfd.readouterr().out
    assert said.count("img2dataset==1.47.0") == 2 and f"--output_folder={tmp_path}/d/coyo700m/shards/00000" in said
    assert main(["data", "download", "merged2b", "--sbatch"]) == 2
    assert "a job array for each of its sets" in capfd.readouterr().err
    assert main(["data", "download", "datacomp1b", "--sbatch"]) == 2
    assert "say it with --lists" in capfd.readouterr().err
    assert main(["data", "download", "datacomp1b", "--dry-run"]) == 0
    assert "--bbox_col=face_bboxes" in capfd.readouterr().out
    assert not (tmp_path / "d").exists()


def test_a_job_array_is_bash_and_calls_us(tmp_path, capfd):
    words = ["--sbatch", "--lists", "7", "--metadata", "a folder", "--share", "0.25", "--processes", "4"]
    assert main(["data", "download", own(tmp_path), *words]) == 0
    script = capfd.readouterr().out
    assert "#SBATCH --array=0-6%8" in script and "#SBATCH --requeue" in script and "--cpus-per-task=4" in script
    said = subprocess.run(
        ["bash", "-c", "exec() { printf '%s\\n' \"$@\"; }; " + script], capture_output=True, text=True, check=True,
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "5"},
    ).stdout.splitlines()  # fmt: skip
    assert said[:3] == ["evaclip", "data", "download"] and said[-2:] == ["--part", "5"] and "a folder" in said
    assert said[said.index("--share") + 1] == "0.25"


def test_lists_come_from_the_hub_with_their_commit(tmp_path, monkeypatch):
    """Its client is played; what it is asked for, and what is written down, is looked at."""
    import huggingface_hub

    asked = []

    class Api:
        def dataset_info(self, repo: str, revision: str) -> object:
            return type("Info", (), {"sha": "abc123"})()

        def list_repo_files(self, repo: str, **said: str) -> list[str]:
            return ["README.md", "data/b.parquet", "data/a.parquet", "x.npz"]

    def download(repo: str, name: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        asked.append((repo, name, repo_type, revision))
        (local_dir / "data").mkdir(exist_ok=True)
        return str(a_list(local_dir / name, 5))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    lists = links("coyo700m").lists
    where = located(lists, tmp_path / "m", given=False)
    assert (where.names, where.revision) == (("data/a.parquet", "data/b.parquet"), "abc123")
    assert list_number(lists, where, 1) == tmp_path / "m/data/b.parquet"
    assert asked == [("kakaobrain/coyo-700m", "data/b.parquet", "dataset", "abc123")]
    monkeypatch.setattr(Api, "dataset_info", lambda *_, **__: pytest.fail("asked again"))
    assert located(lists, tmp_path / "m", given=False) == where
    with pytest.raises(InputError, match="holds lists of kakaobrain/coyo-700m at main"):
        located(links("relaion2b_en").lists, tmp_path / "m", given=False)
    assert located(lists, tmp_path / "m", given=True).names == ("data/b.parquet",)


def test_a_gated_list_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError, "403")  # made whole, it needs the answer of an HTTP library

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(
        InputError, match=r"accept its terms at https://huggingface.co/datasets/laion/relaion2B.*hf auth login"
    ):
        located(links("relaion2b_en").lists, tmp_path / "m", given=False)

    def offline(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(InputError, match="could not be fetched: Network is unreachable"):
        located(links("coyo700m").lists, tmp_path / "m", given=False)


def test_lists_come_from_addresses_through_our_own_fetch(tmp_path, monkeypatch):
    asked = []

    def fetched(url: str, target: Path, **limits: float) -> int:
        asked.append(url)
        return target.write_text("http://a.org/1\tone\n")

    monkeypatch.setattr(lists_module, "fetch", fetched)
    lists = links("cc12m").lists
    where = located(lists, tmp_path / "m", given=False)
    for _ in range(2):
        assert list_number(lists, where, 0) == tmp_path / "m/cc12m.tsv"
    assert asked == ["https://storage.googleapis.com/conceptual_12m/cc12m.tsv"]
    with pytest.raises(InputError, match="holds no lists of links"):
        located(links("cc3m").lists, tmp_path / "none", given=False)
