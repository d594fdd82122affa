"""`evaclip slurm submit`: fills in `slurm/train.sbatch` for a recipe and hands it to Slurm.

The script is complete in itself and says what it does. Beside it there is one verb that only the script uses,
`evaclip slurm attempt`: it counts attempts that saved nothing, so that a job which can only fail does not come back
for ever.
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from evaclip.config import RunConfig
from evaclip.errors import InputError, did_you_mean
from evaclip.recipes import configured
from evaclip.shipped import shipped

SCRIPT = "train.sbatch"
# The line of the script that makes way for the recipe and its changes.
RECIPE = "# evaclip slurm submit puts the recipe here."


@dataclass(frozen=True, kw_only=True)
class SubmitCommand:
    """A recipe on a cluster. What is not listed here changes the recipe, as for `evaclip train`."""

    nodes: int
    """How many nodes."""
    gpus_per_node: int = 8
    """GPUs of each, and processes on each; 0 for nodes without GPUs, which get one process each."""
    time: str = "24:00:00"
    """Time limit of one attempt; a run that needs more is saved, requeued and continued."""
    save_before: int = 300
    """Seconds before the time limit at which the run is saved and stopped; Slurm may be a minute early."""
    partition: str | None = None
    """Slurm's partition; its default if none is given."""
    account: str | None = None
    """Whom the hours are charged to."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, without their dashes: `--sbatch constraint=h100 exclude=n17`."""
    python: str = sys.executable
    """The Python that has evaclip, on every node."""
    modules: tuple[str, ...] = ()
    """Environment modules to load first."""
    container: tuple[str, ...] = ()
    """srun's options for a container, without their dashes: `--container container-image=/images/evaclip.sqsh`."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """What starts the processes; exit statuses do not survive torchrun."""
    preflight: bool = True
    """Look at every node before each attempt."""
    idle_requeues: int = 3
    """Requeues in a row that leave no new checkpoint, after which the job stays down."""
    dry_run: bool = False
    """Show the script and submit nothing."""


@dataclass(frozen=True, kw_only=True)
class AttemptCommand:
    """What the script says of itself when it starts."""

    job: str
    """Slurm's number of the job."""
    idle_requeues: int
    """As for submit."""


def slurm(arguments: list[str]) -> int:
    """`evaclip slurm VERB RECIPE [RECIPE ...] [--field value]`."""
    verb, *rest = arguments or [""]
    if verb in ("", "--help", "-h") or (verb == "submit" and not rest):
        print("usage: evaclip slurm submit RECIPE --nodes N [--field.sub value]; --help explains each field")
        return 0 if verb in ("--help", "-h") else 2
    if verb not in ("submit", "attempt"):
        raise InputError(f"evaclip slurm has no verb {verb!r}; {did_you_mean(verb, ['submit'])}")
    kind = SubmitCommand if verb == "submit" else AttemptCommand
    command, recipe = tyro.cli(kind, args=rest, prog=f"evaclip slurm {verb}", return_unknown_args=True)
    # Read now what the job will read in the queue: a misspelt field is told at once.
    configs = configured("train", recipe)
    if not configs:
        raise InputError("which recipe? evaclip recipes lists them; it comes first: evaclip slurm submit RECIPE ...")
    if isinstance(command, AttemptCommand):
        return attempt(command, configs)
    processes = command.nodes * max(1, command.gpus_per_node)
    for config in configs:
        if config.batch_size % processes:
            raise InputError(
                f"{config.name}: a batch of {config.batch_size:,} does not divide among {processes:,} processes"
            )
    return submit(command, recipe, configs[0].run_dir)


def submit(command: SubmitCommand, recipe: list[str], run_dir: Path) -> int:
    """Write the script to the run's folder and submit it. Raises InputError with sbatch's own words."""
    script = rendered((shipped("slurm") / SCRIPT).read_text(), command, recipe, run_dir.name)
    if command.dry_run:
        print(script, end="")
        return 0
    path = logs_of(run_dir) / SCRIPT
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(script)
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"the script cannot be written to {path.parent}: {error.strerror}") from None
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(f"there is no sbatch here; on a machine that submits jobs: sbatch {path}") from None
    if done.returncode != 0:
        raise InputError(f"sbatch does not take {path}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().split(";")[0]
    print(f"submitted as job {job}; output in {run_dir.name}-{job}.out, of each process in {logs_of(run_dir)}")
    return 0


def rendered(script: str, command: SubmitCommand, recipe: list[str], name: str) -> str:
    """The script with its options, settings and recipe filled in."""
    options: dict[str, str | None] = {
        "job-name": name,
        "nodes": str(command.nodes),
        "gpus-per-node": str(command.gpus_per_node) if command.gpus_per_node else None,
        "time": command.time,
        "signal": f"B:USR1@{command.save_before}",
    }
    options |= {key: value for key in ("partition", "account") if (value := getattr(command, key))}
    options |= {key: value for key, _, value in (option.partition("=") for option in command.sbatch)}
    for option, value in options.items():
        script = _with_option(script, option, value)
    settings = {
        "python": shlex.quote(command.python),
        "modules": f"({shlex.join(command.modules)})",
        "container": f"({shlex.join(f'--{option}' for option in command.container)})",
        "launcher": command.launcher,
        "preflight": "yes" if command.preflight else "no",
        "idle_requeues": str(command.idle_requeues),
    }
    for name, value in settings.items():
        script = _replaced(script, rf"^{name}=.*$", f"{name}={value}")
    return _replaced(script, rf"^{re.escape(RECIPE)}$", f"set -- {shlex.join(recipe)}")


def attempt(command: AttemptCommand, configs: list[RunConfig]) -> int:
    """Count this attempt of a job and print the folder for its logs.

    Raises InputError when too many requeues in a row have left no new checkpoint. Another job counts from the start.
    """
    folder = logs_of(configs[0].run_dir)
    path = folder / "attempts.json"
    now = {"job": command.job, "newest": [newest_step(config.run_dir) for config in configs]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else {}
        idle = before["idle"] + 1 if now.items() <= before.items() else 0
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(now | {"idle": idle}))
        temporary.rename(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {error}") from None
    if idle > command.idle_requeues:
        raise InputError(
            f"{command.idle_requeues} requeues in a row left no new checkpoint (the newest is of step "
            f"{max(now['newest']):,}), so the job stays down. {folder} holds what each process said; when that is "
            "mended, submit it again"
        )
    print(folder)
    return 0


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest finished checkpoint, unread; 0 if there is none."""
    names = [path.parent.name.removeprefix("step_") for path in run_dir.glob("checkpoints/step_*/manifest.json")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def logs_of(run_dir: Path) -> Path:
    """Where the script and what each process says go."""
    return run_dir / "slurm"


def _with_option(script: str, option: str, value: str | None) -> str:
    """The script with an option of sbatch set, or left out for None; one that it does not have comes last."""
    line = f"#SBATCH --{option}" + (f"={value}" if value else "")
    present = re.compile(rf"^#SBATCH --{re.escape(option)}(=.*)?\n", re.MULTILINE)
    if present.search(script):
        return present.sub("" if value is None else lambda _: f"{line}\n", script)
    if value is None:
        return script
    end = script.rindex("\n#SBATCH ") + 1
    end = script.index("\n", end) + 1
    return f"{script[:end]}{line}\n{script[end:]}"


def _replaced(script: str, pattern: str, line: str) -> str:
    found, count = re.subn(pattern, lambda _: line, script, flags=re.MULTILINE)
    if count != 1:
        raise InputError(f"slurm/{SCRIPT} has {count} lines {pattern}, not one: was it changed by hand?")
    return found
