"""The batch script that submit fills in, and the count of attempts that saved nothing; no Slurm is needed here."""

import json
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from evaclip.cli import main
from evaclip.config import RunConfig
from evaclip.recipes import RECIPES
from evaclip.shipped import shipped
from evaclip.slurm import SubmitCommand, newest_step, rendered
from tests.test_train import tiny_run

SCRIPT = (shipped("slurm") / "train.sbatch").read_text()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """`evaclip slurm submit tiny` at the command line."""
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny_run(tmp_path / "run", tmp_path / "shards"))


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.partition("=")[::2] for line in lines)


def test_submit_fills_in_what_it_is_told(recipe, capfd):
    words = ["submit", "tiny", "--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--save-before", "60",
             "--sbatch", "constraint=h100", "exclude=n17", "time=2:00", "--modules", "cuda/12",
             "--python", "/a b/python",
             "--container", "container-image=/images/x.sqsh", "--launcher", "torchrun", "--no-preflight",
             "--steps", "7", "--name", "it's mine", "--dry-run"]  # fmt: skip
    assert main(["slurm", *words]) == 0
    script = capfd.readouterr().out
    found = options(script)
    right = {"nodes": "2", "gpus-per-node": "4", "partition": "gpu", "signal": "B:USR1@60", "constraint": "h100",
             "exclude": "n17", "time": "2:00", "job-name": "run", "open-mode": "append", "requeue": ""}  # fmt: skip
    assert right.items() <= found.items() and "account" not in found
    # sbatch reads its options up to the first command.
    assert script.rindex("#SBATCH") < script.index("\npython=")
    said = subprocess.run(
        ["bash", "-c", script[script.index("\npython=") : script.index("\ntasks=")].replace("module load", "true")
         + '\nprintf "%s\\n" "$python" "${modules[@]}" "${container[@]}" "$launcher" "$preflight" "$@"'],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert said == ["/a b/python", "cuda/12", "--container-image=/images/x.sqsh", "torchrun", "no",
                    "tiny", "--steps", "7", "--name", "it's mine"]  # fmt: skip


def test_the_script_is_bash_before_and_after(recipe):
    for text in (SCRIPT, rendered(SCRIPT, SubmitCommand(nodes=1, gpus_per_node=0), ["tiny"], "run")):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""
    assert "gpus-per-node" not in options(text)


def test_what_changes_the_job_cannot_be_taken_for_what_changes_the_recipe():
    assert not {field.name for field in fields(SubmitCommand)} & {field.name for field in fields(RunConfig)}


def test_submitting_calls_sbatch_with_a_script_that_stays(tmp_path, recipe, monkeypatch, capfd):
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >{shlex.quote(str(tmp_path / "called"))}\necho "4711;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert main(["slurm", "submit", "tiny", "--nodes", "2"]) == 0
    script = tmp_path / "run" / "slurm" / "train.sbatch"
    assert (tmp_path / "called").read_text().split() == ["--parsable", str(script)]
    assert "submitted as job 4711; output in run-4711.out" in capfd.readouterr().out
    assert "\nset -- tiny\n" in script.read_text()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert main(["slurm", "submit", "tiny", "--nodes", "2"]) == 2
    assert "evaclip: sbatch does not take" in (said := capfd.readouterr().err) and "invalid partition" in said
    sbatch.unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert main(["slurm", "submit", "tiny", "--nodes", "2"]) == 2
    assert "there is no sbatch here" in capfd.readouterr().err


@pytest.mark.parametrize(("words", "sentence"), [
    (["submit", "--nodes", "1"], "which recipe?"),
    (["submit", "tinny", "--nodes", "1"], "did you mean tiny?"),
    (["submit", "tiny", "--nodes", "3", "--gpus-per-node", "1"], "a batch of 16 does not divide among 3 processes"),
    (["submitt", "tiny"], "did you mean submit?"),
])  # fmt: skip
def test_what_would_fail_in_the_queue_fails_at_once(recipe, capfd, words, sentence):
    assert main(["slurm", *words]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("evaclip: ") and sentence in said[0]


def test_a_misspelt_field_is_told_at_once(recipe, capfd):
    with pytest.raises(SystemExit) as exit:
        main(["slurm", "submit", "tiny", "--nodes", "1", "--optim.weight-dcay", "1"])
    assert exit.value.code == 2 and "--optim.weight-decay" in capfd.readouterr().err


def test_requeues_that_save_nothing_come_to_an_end(tmp_path, recipe, capfd):
    def attempt(job: str) -> int:
        return main(["slurm", "attempt", "tiny", "--job", job, "--idle-requeues", "2"])

    folder = tmp_path / "run" / "slurm"
    assert [attempt("7") for _ in range(3)] == [0, 0, 0]
    assert capfd.readouterr().out.split() == [str(folder)] * 3
    finished(tmp_path / "run", 300)
    (tmp_path / "run" / "checkpoints" / "step_00000400.tmp-1a2b").mkdir()  # not finished: no step forward
    assert [attempt("7") for _ in range(4)] == [0, 0, 0, 2]
    said = capfd.readouterr().err
    assert "2 requeues in a row left no new checkpoint (the newest is of step 300)" in said and str(folder) in said
    assert attempt("8") == 0  # submitted again, by a person
    (folder / "attempts.json").write_text("{")
    assert attempt("8") == 2
    assert "attempts.json" in capfd.readouterr().err


def finished(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": step}))


def test_newest_step(tmp_path):
    assert newest_step(tmp_path) == 0
    for step in (8, 100_000_000, 16):
        finished(tmp_path, step)
    assert newest_step(tmp_path) == 100_000_000


# Instead of Slurm's commands: srun ends as its turn of `plan` says, and a signal may reach the script meanwhile.
SRUN = """#!/bin/bash
echo "srun $*" >>"$D/calls"
case "$*" in
    *" slurm attempt "*) echo "$D/logs"; exit 0 ;;
    *" preflight "*) exit "$(cat "$D/preflight")" ;;
esac
trap 'exit 85' TERM
echo 'evaclip: what went wrong' >"$D/logs/7.rank-0.log"
if [ -n "$SIGNAL" ]; then
    kill -"$SIGNAL" $PPID
    for _ in {1..50}; do sleep 0.1; [ ! -e "$D/told" ] || break; done
    sleep 0.5
fi
exit "$(cat "$D/status")"
"""
NOTED = """#!/bin/bash
echo "$(basename "$0") $*" >>"$D/calls"
touch "$D/told"
"""


@pytest.fixture
def script(tmp_path):
    """The script as Slurm runs it, where srun ends with a given status, or is signalled; returns status and calls."""

    def run(status: int, preflight: int = 0, signal: str = "") -> tuple[int, list[str], str]:
        (tmp_path / "logs").mkdir(exist_ok=True)
        for name, text in (("status", str(status)), ("preflight", str(preflight)), ("calls", "")):
            (tmp_path / name).write_text(text)
        (tmp_path / "told").unlink(missing_ok=True)
        for name, text in (("srun", SRUN), ("scontrol", NOTED), ("scancel", NOTED)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96",
                      "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "n[1-2]"}  # fmt: skip
        environment = {"D": str(tmp_path), "SIGNAL": signal, "PATH": f"{tmp_path}:/usr/bin:/bin"} | allocation
        done = subprocess.run(
            ["bash", str(shipped("slurm") / "train.sbatch"), "tiny", "--steps", "7"],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stdout + done.stderr

    return run


REQUEUE = "scontrol requeue 7"


@pytest.mark.parametrize("status", [0, 1, 2, 85, 86, 87, 88, 89, 130, 137, 143])
def test_what_another_attempt_could_change_comes_back(script, status):
    code, calls, said = script(status)
    assert code == status and f"evaclip: exit status {status}" in said
    assert (REQUEUE in calls) == (status in (1, 85, 88, 137, 143))
    assert ("evaclip: what went wrong" in said) == (status != 0)
    attempt, preflight, train = [call for call in calls if call.startswith("srun")]
    assert "--ntasks=1 " in attempt and attempt.endswith("tiny --steps 7 --job 7 --idle-requeues 3")
    for step in (preflight, train):
        assert "--nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 --kill-on-bad-exit=0 --wait=60" in step
    assert "rank-%t.log --open-mode=append python3 -m evaclip train tiny --steps 7 --resume auto" in train


def test_a_node_that_is_not_fit_ends_it_before_the_training(script):
    code, calls, _ = script(0, preflight=2)
    assert code == 2 and REQUEUE not in calls and not any(" train " in call for call in calls)


def test_before_the_time_is_up_the_processes_are_told_and_the_job_comes_back(script):
    code, calls, said = script(85, signal="USR1")
    assert "scancel --signal=TERM 7" in calls and code == 85 and calls[-1] == REQUEUE
    assert "exit status 85, requeued" in said


def test_what_slurm_ends_itself_it_also_brings_back_itself(script):
    code, calls, said = script(85, signal="TERM")
    assert code == 85 and REQUEUE not in calls and "exit status 85, ended by Slurm" in said
