"""A built wheel carries the shipped folders, and they are found from any directory."""

import subprocess
import sys
import zipfile
from pathlib import Path

from evaclip.shipped import shipped

ROOT = Path(__file__).parents[1]
SHIPPED = ("zero_shot", "retrieval", "data_recipes", "slurm")


def test_a_checkout_uses_its_own_folders():
    assert shipped("zero_shot") == ROOT / "zero_shot"


def test_a_wheel_carries_the_folders_and_finds_them(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        inside = set(archive.namelist())
    for folder, place in [("evaclip", "evaclip"), *((name, f"evaclip/_shipped/{name}") for name in SHIPPED)]:
        own = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        missing = {f"{place}/{path.relative_to(ROOT / folder)}" for path in own} - inside
        assert own and not missing, missing
    assert {f"evaclip/search/page/page.{kind}" for kind in ("html", "css", "js")} <= inside
    tops = {path.name for path in (tmp_path / "site").iterdir()}
    assert tops == {"evaclip", f"evaclip-{wheel.name.split('-')[1]}.dist-info"}
    code = (
        "from evaclip.shipped import shipped\n"
        "from evaclip.evals.card import known_cards, load_card\n"
        "import evaclip\n"
        f"assert str(evaclip.__file__).startswith({str(tmp_path)!r}), evaclip.__file__\n"
        "assert 'cifar10' in known_cards() and len(load_card('imagenet').classes) == 1000\n"
        f"for folder in {SHIPPED}:\n"
        "    assert any(shipped(folder).iterdir()), folder\n"
    )
    run = [sys.executable, "-c", code]
    subprocess.run(run, cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"})
