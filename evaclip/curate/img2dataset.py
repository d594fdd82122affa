"""img2dataset, called as a program in an environment of its own.

It pins old versions of webdataset and pandas, so it is never imported here. A shard of it is done when its
`_stats.json` is there; called again with the same list and folder, it makes those that are not.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaclip.curate.recipe import LinksRecipe
from evaclip.errors import InputError
from evaclip.log import clock, say

VERSION = "1.47.0"
# What it would otherwise fetch or send at its start.
SILENT = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
# Seconds between two lines about a download that is running.
SAY_EVERY = 30.0


@dataclass(frozen=True, kw_only=True)
class Crawling:
    """How hard to try."""

    environment: Path = Path("data/.img2dataset")
    """Virtual environment in which img2dataset is installed."""
    processes: int = 16
    """Processes; one for each core."""
    threads: int = 64
    """Connections of each process."""
    retries: int = 1
    """Further attempts at a link."""
    timeout: int = 10
    """Seconds without a byte before a link counts as failed."""

    @property
    def program(self) -> Path:
        """img2dataset's own program in the environment."""
        return self.environment / "bin" / "img2dataset"

    @property
    def making(self) -> list[str]:
        """The commands that make the environment."""
        return [
            f"python3.12 -m venv {self.environment}",
            f"{self.environment}/bin/pip install img2dataset=={VERSION}",
        ]


def check(crawling: Crawling) -> None:
    """Raises InputError, with the commands that make its environment, when img2dataset is not there."""
    if not crawling.program.is_file():
        raise InputError(
            f"img2dataset is not installed in {crawling.environment}; it needs an environment of its own, with Python "
            f"3.12 or older: {' && '.join(crawling.making)}"
        )


def arguments(recipe: LinksRecipe, links: Path, shards: Path, crawling: Crawling, per_shard: int) -> list[str]:
    """The command line for one prepared list, program included."""
    images = recipe.images
    said: dict[str, Any] = {
        "url_list": links,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": shards,
        "number_sample_per_shard": per_shard,
        "processes_count": crawling.processes,
        "thread_count": crawling.threads,
        "image_size": images.size,
        "resize_mode": images.resize_mode,
        "resize_only_if_bigger": images.only_if_bigger,
        "skip_reencode": images.keep_small_files,
        "encode_quality": images.quality,
        "retries": crawling.retries,
        "timeout": crawling.timeout,
        "incremental_mode": "incremental",
        "user_agent_token": recipe.opt_out.user_agent_token,
        "disallowed_header_directives": json.dumps(recipe.opt_out.directives),
        "enable_wandb": False,
    }
    if images.min_side:
        said["min_image_size"] = images.min_side
    if images.max_aspect:
        said["max_aspect_ratio"] = images.max_aspect
    if recipe.columns.keep:
        said["save_additional_columns"] = json.dumps(recipe.columns.keep)
    if recipe.columns.boxes:
        said["bbox_col"] = recipe.columns.boxes
    return [str(crawling.program), *(f"--{name}={value}" for name, value in said.items())]


def call(command: list[str], shards: Path) -> None:
    """Run it on one list. Raises InputError when it fails, or when another one writes to the same folder.

    Signals that end this process end it too.
    """
    with (shards / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is downloading to {shards}") from None
        with (shards / "img2dataset.log").open("ab") as log:
            # It inherits the lock: should this process be killed, no other starts beside the one that is left.
            child = subprocess.Popen(
                command, env=os.environ | SILENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(lock.fileno(),), start_new_session=True,
            )  # fmt: skip
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            status = _watched(child, shards)
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if status:
        last = (shards / "img2dataset.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise InputError(
            f"img2dataset failed with status {status}: {' '.join(last)} (in full: {shards}/img2dataset.log)"
        )


def summarised(shards: Path, links: int) -> dict[str, Any]:
    """Links, images, shards, their bytes, seconds and errors, as it wrote them down.

    Raises InputError while some of the links have not been tried: it leaves with status 0 when it is interrupted.
    """
    stats = [json.loads(path.read_text()) for path in sorted(shards.glob("*_stats.json"))]
    tried = sum(one["count"] for one in stats)
    if tried != links:
        raise InputError(
            f"{shards}: {tried:,} of {links:,} links have been tried so far; the same command again goes on"
        )
    errors: Counter[str] = Counter()
    for one in stats:
        errors.update({what: count for what, count in one["status_dict"].items() if what != "success"})
    return {
        "links": tried,
        "images": sum(one["successes"] for one in stats),
        "shards": len(stats),
        "bytes": sum(path.stat().st_size for path in shards.glob("*.tar")),
        "seconds": round(sum(one["duration"] for one in stats), 1),
        "errors": dict(errors.most_common(20)),
    }


def _watched(child: "subprocess.Popen[bytes]", shards: Path) -> int:
    """Wait, and say from time to time how many shards are done."""
    waited = 0.0
    while True:
        try:
            return child.wait(timeout=SAY_EVERY)
        except subprocess.TimeoutExpired:
            waited += SAY_EVERY
            say(f"{shards}: {sum(1 for _ in shards.glob('*_stats.json')):,} shards done, {clock(waited)}")
