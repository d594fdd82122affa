"""The batch script of the watch, with stand-ins for Slurm's commands that write down how they were called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from evaclip.shipped import shipped

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
echo $$ > "$CALLS.pid"
sleep "$LASTS" &
trap 'kill $!; exit 143' TERM
wait
exit "$STATUS"
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$CALLS"
kill -TERM "$(cat "$CALLS.pid")"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script as Slurm would, with a folder in which its commands are ours."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    started = []

    def begin(*arguments: str, status: int = 0, lasts: float = 0) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "LASTS": str(lasts),
            "STATUS": str(status), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "EVACLIP_PYTHON": "python3 -u",
        }  # fmt: skip
        script = ["bash", str(shipped("slurm") / "eval.sbatch"), *arguments]
        process = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("status", [0, 2, 89])
def test_it_watches_with_the_arguments_given_and_ends_as_the_watch_does(tmp_path, start, status):
    process = start(str(run_folder(tmp_path / "run")), "--datasets", "a b", "c", status=status)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == status and f"evaclip: exit status {status}\n" in said
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == f"srun --ntasks=1 python3 -u -m evaclip watch {tmp_path / 'run'} --datasets a b c"


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_out_of_time_it_comes_back_and_when_it_was_cancelled_it_does_not(tmp_path, start, number):
    process = start(str(run_folder(tmp_path / "run")), lasts=60)
    until((tmp_path / "calls.pid").exists)
    process.send_signal(number)
    if number == signal.SIGTERM:  # Slurm tells the processes of the step as well
        os.kill(int((tmp_path / "calls.pid").read_text()), number)
    said = process.communicate(timeout=30)[0]
    calls = (tmp_path / "calls").read_text().splitlines()[1:]
    assert process.returncode == 143
    if number == signal.SIGUSR1:
        assert calls == ["scancel --signal=TERM 7", "scontrol requeue 7"] and "out of time, requeued" in said
    else:
        assert calls == [] and "requeued\n" not in said


def test_it_waits_for_the_run_to_begin(tmp_path, start):
    process = start(str(tmp_path / "run"))
    time.sleep(0.3)
    assert not (tmp_path / "calls").exists()
    run_folder(tmp_path / "run")
    process.communicate(timeout=30)
    assert process.returncode == 0 and (tmp_path / "calls").read_text().startswith("srun")
