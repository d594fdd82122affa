"""The judgement of steps, the watch over a hanging process, and signals that nobody answers."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from evaclip.guard.health import GuardConfig, Health, Verdict, write_dump
from evaclip.guard.heartbeat import Heartbeat, behind


def positions(step: int) -> tuple[int, int]:
    return 8 * (step - 1), 8 * step


def test_a_loss_beyond_six_deviations_of_the_last_128_is_a_spike():
    health = Health(GuardConfig())
    for step in range(1, 129):
        assert health.judge(step, 2.0 + 0.1 * (-1) ** step, False, positions(step)) == Verdict()
    assert not health.judge(129, 2.0 + 0.59, False, positions(129)).spike
    assert "deviations above the mean 2.0" in health.judge(130, 2.0 + 0.75, False, positions(130)).spike
    assert not health.judge(131, 0.5, False, positions(131)).spike  # a fall is no spike


def test_the_first_127_losses_are_never_a_spike():
    health = Health(GuardConfig())
    assert not any(health.judge(step, 1.0 if step < 128 else 1e6, False, (0, 8)).spike for step in range(1, 129))


def test_too_many_skipped_steps_in_a_window_are_lost_with_their_data():
    health = Health(GuardConfig(most_skipped=3, window=10))
    bad = {4, 5, 14, 18, 22}  # 4 and 5 are out of the window when 14 comes
    verdicts = {step: health.judge(step, math.nan if step in bad else 1.0, step in bad, positions(step))
                for step in range(1, 23)}  # fmt: skip
    assert [step for step, verdict in verdicts.items() if verdict.lost] == [22]
    assert verdicts[22].lost == (8 * 13, 8 * 22)


def test_a_dump_is_json_whatever_the_numbers_are(tmp_path):
    write_dump(tmp_path / "a" / "step_7.json", 7, "why", ["a.tar#3"], {"loss": math.nan, "gradient_norm": 2.5})
    found = json.loads((tmp_path / "a" / "step_7.json").read_text())
    assert found == {"step": 7, "why": "why", "metrics": {"loss": "nan", "gradient_norm": 2.5}, "samples": ["a.tar#3"]}


def test_the_limit_is_five_median_steps_or_the_floor_and_longer_for_what_is_no_step(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("evaclip.guard.heartbeat.time.monotonic", lambda: clock[0])
    heart = Heartbeat(tmp_path, 0, GuardConfig(hang_floor=30.0, patience=999.0))
    assert heart.limit() == 999.0
    for step in range(6):
        heart.beat(step)
        clock[0] += 4.0
    assert heart.limit() == 30.0
    for step in range(6, 60):
        heart.beat(step)
        clock[0] += 10.0
    assert heart.limit() == 50.0
    heart.phase("evaluate")
    assert heart.limit() == 999.0
    clock[0] += 500.0
    heart.beat(60)
    assert heart.limit() == 50.0  # the evaluation did not count as a step


def test_those_behind_are_named(tmp_path):
    for rank, (step, phase) in enumerate([(7, "step"), (7, "data"), (6, "step"), (7, "step")]):
        beat = {"rank": rank, "step": step, "phase": phase, "host": f"node{rank}"}
        (tmp_path / f"rank_{rank:05}.json").write_text(json.dumps(beat))
    (tmp_path / "rank_00009.json").write_text("{")
    assert behind(tmp_path) == ["process 1 on node1 (step 7, data)", "process 2 on node2 (step 6, step)"]


def run(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_a_hang_dumps_the_stacks_and_ends_with_88(tmp_path):
    process = run(
        "import time\nfrom pathlib import Path\n"
        "from evaclip.guard.health import GuardConfig\nfrom evaclip.guard.heartbeat import Heartbeat\n"
        "def stuck_in_here(): time.sleep(60)\n"
        f"with Heartbeat(Path({str(tmp_path)!r}), 3, GuardConfig(hang_floor=1.0)) as heart:\n"
        "    for step in range(4): heart.beat(step); heart.phase('step'); time.sleep(0.01)\n"
        "    stuck_in_here()\n"
    )
    _, said = process.communicate(timeout=30)
    assert process.returncode == 88
    assert "process 3 has been in phase 'step' of step 3 for" in said and "run again with --resume auto" in said
    assert "stuck_in_here" in (tmp_path / "stacks_00003.txt").read_text()
    assert json.loads((tmp_path / "rank_00003.json").read_text())["step"] == 3


def test_a_run_that_ends_leaves_no_stacks(tmp_path):
    with Heartbeat(tmp_path, 0, GuardConfig()) as heart:
        heart.beat(1)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_00000.json"]
    assert json.loads((tmp_path / "rank_00000.json").read_text())["phase"] == "ended"


@pytest.mark.parametrize(("patient", "least"), [(False, 0.5), (True, 1.5)])
def test_a_signal_that_nobody_answers_ends_the_process_with_85(patient, least):
    process = run(
        "import sys, time, threading\nfrom evaclip.guard.signals import StopRequest\n"
        f"with StopRequest(grace=0.5) as stop:\n    stop.patient = {patient}\n"
        "    threading.Timer(1.5, lambda: setattr(stop, 'patient', False)).start()\n"
        "    print('ready', file=sys.stderr, flush=True)\n    time.sleep(30)\n    time.sleep(30)\n"
    )
    assert process.stderr.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 85 and time.monotonic() - start > least
    assert "SIGUSR1 came 0 s ago and the step under way has not ended" in said or "SIGUSR1 came 1 s ago" in said


def test_an_answered_signal_ends_nothing(tmp_path):
    process = run(
        "import os, signal, time\nfrom evaclip.guard.signals import StopRequest\n"
        "with StopRequest(grace=0.3) as stop:\n    os.kill(os.getpid(), signal.SIGTERM)\n    assert stop\n"
        "    stop.answered()\n    time.sleep(1)\n"
    )
    assert process.wait(timeout=30) == 0
