"""What the benchmarks share: timing, peak memory, and a result file that says where it was measured."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def best_seconds(work: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of several runs after one to warm up; other work on the machine only ever adds."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        work()
        best = min(best, clock() - start)
    return best


def in_turns(*works: Callable[[], object], repeats: int = 2) -> list[float]:
    """The shortest of several runs of each, one after the other in turns, so that other work disturbs all alike."""
    best = [float("inf")] * len(works)
    for _ in range(repeats + 1):  # one round more, which warms up
        for number, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def extra_peak_megabytes(code: str) -> float:
    """How far the resident memory of a fresh process rises while `run()`, defined by `code`, runs (Linux)."""
    probe = (
        f"{code}\n"
        "def kilobytes(name): return int(open('/proc/self/status').read().split(name + ':')[1].split()[0])\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew\n"
        "before = kilobytes('VmRSS'); run(); print((kilobytes('VmHWM') - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def device() -> str:
    """The processor and, if there is one, the GPU."""
    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{', '.join(sorted(names))}, {torch.get_num_threads()} threads{gpu}"


def write_result(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: str = "") -> None:
    """A Markdown table in results/, with device, versions, command and date; also printed."""
    packages = ("evaclip", "torch", "open_clip_torch", "pillow", "simplejpeg", "tokenizers")
    lines = [
        f"# {title}",
        "",
        f"- device: {device()}",
        f"- versions: python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages),
        f"- command: `python benchmarks/{name}.py`",
        f"- date: {time.strftime('%Y-%m-%d')}",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    text = "\n".join(lines + (["", notes] if notes else [])) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
