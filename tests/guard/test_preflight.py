"""The look at every node: what it measures is right, what is broken is named with its node, nobody waits for ever."""

import contextlib
import io
import os
import statistics
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evaclip.cli import main
from evaclip.engine import EngineConfig
from evaclip.errors import InputError
from evaclip.guard import preflight as guard
from evaclip.guard import probes
from evaclip.guard.preflight import Found, compared, preflight
from evaclip.recipes import RECIPES
from tests.ranks import in_ranks
from tests.test_train import tiny_run

ENGINE = EngineConfig(precision="fp32", device="cpu")
# What is wrong with the last of three nodes, and what is said of it.
FAULTS = {
    "nothing": r"preflight: every node is fit \(3\)",
    "shards": r"n2 \(process 2\): shards: .*gone\.tar",
    "fewer shards": r"n2 \(process 2\): sees other shards than most nodes",
    "folder": r"n2 \(process 2\): run folder: Not a directory",
    "not shared": r"n2 \(process 2\): run folder: what process 0 wrote to .* is not there: do all nodes share it\?",
    "clock": r"n2 \(process 2\): its clock is [45]\.\d s ahead",
    "GPU": r"n2 \(process 2\): GPU: --engine\.device cuda: torch sees no CUDA device",
    "late": r"preflight: n2 \(process 2\) did not finish the all-reduce in 5 s",
}


def test_one_process_is_looked_at_and_nothing_is_left_behind(tmp_path, shards, monkeypatch, capfd):
    folder = shards()
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny_run(tmp_path / "run", folder))
    assert main(["preflight", "tiny"]) == 0
    said = capfd.readouterr().out
    assert "preflight: every node is fit (1)" in said and "│ ok │" in said and "cpu" in said
    assert list((tmp_path / "run").iterdir()) == []
    assert main(["train", "tiny", "--steps", "1"]) == 0  # the folder is not taken
    (folder / "train-00000.tar").unlink()
    assert main(["preflight", "tiny", "--data.sources.0.shards", str(folder / "train-0000{0..3}.tar")]) == 2
    assert "1 of 4 shards do not exist" in capfd.readouterr().out
    assert main(["preflight"]) == 2


@pytest.fixture(scope="module")
def looked(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit status and output of the first of three processes, each a node of its own, for every fault."""
    from evaclip.data.write import write_shards
    from tests.conftest import made_pairs

    folder = tmp_path_factory.mktemp("preflight")
    write_shards(made_pairs(64), folder / "shards", "train", 16)
    return in_ranks(3, every_fault, folder)[0]


def every_fault(folder: Path) -> dict[str, tuple[int, str]]:
    found = {}
    for fault in FAULTS:
        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
            patch.setattr(probes, "SHORT", 0.2)
            patch.setenv("SLURMD_NODENAME", f"n{dist.get_rank()}")
            patch.setenv("LOCAL_RANK", "0")
            try:
                status = one_fault(fault, folder, patch)
            except InputError as error:
                status = error.exit_status
                print(error)
        found[fault] = (status, told.getvalue())
    return found


def one_fault(fault: str, folder: Path, patch: pytest.MonkeyPatch) -> int:
    engine, run_dir = ENGINE, folder / "run"
    data = tiny_run(run_dir, folder / "shards").data
    if fault == "late":
        patch.setattr(guard, "PATIENCE", timedelta(seconds=5))
    if dist.get_rank() == 2 and fault == "shards":
        data = replace(data, sources=(replace(data.sources[0], shards=(str(folder / "gone.tar"),)),))
    elif dist.get_rank() == 2 and fault == "fewer shards":
        data = replace(data, sources=(replace(data.sources[0], shards=(str(folder / "shards/train-00000.tar"),)),))
    elif dist.get_rank() == 2 and fault == "folder":
        run_dir = folder / "shards" / "train-00000.tar" / "run"
    elif dist.get_rank() == 2 and fault == "not shared":
        run_dir = folder / "elsewhere"
    elif dist.get_rank() == 2 and fault == "clock":
        real = time.time
        patch.setattr(time, "time", lambda: real() + 5)
    elif dist.get_rank() == 2 and fault == "GPU":
        patch.setattr(torch.cuda, "is_available", lambda: False)
        engine = replace(ENGINE, device="cuda")
    elif dist.get_rank() == 2 and fault == "late":
        patch.setattr(guard, "all_reduce_gbs", lambda _: time.sleep(12))
    elif fault == "late":
        patch.setattr(guard, "all_reduce_gbs", lambda _: None)
    return preflight(engine, data, run_dir)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_with_the_name_of_the_node(looked, fault):
    import re

    status, said = looked[fault]
    said = " ".join(said.split())
    assert re.search(FAULTS[fault], said), said
    assert status == (0 if fault == "nothing" else 2)
    if fault == "nothing":
        assert all(f"│ ok │ n{node} │ 1 │ cpu │" in said for node in range(3))
    elif fault != "late":
        assert said.endswith("preflight: not fit: n2")
        assert "│ FAIL │ n2" in said and "│ ok │ n0" in said


def gpu(rank: int, **changes) -> Found:
    found = Found(
        rank=rank, node=f"n{rank // 2}", leads=rank % 2 == 0, device="cuda", name=f"H200 {rank}", tflops=700.0
    )
    return replace(found, **changes)


def test_a_slow_gpu_a_missing_one_and_a_shared_one_show_beside_the_others():
    others = [gpu(rank, tflops=700.0 + rank) for rank in range(5)]
    assert all(compared(one, others) == [] for one in others)
    slow = gpu(5, tflops=500.0)
    assert compared(slow, [*others, slow]) == ["its GPU reaches 500 TFLOP/s, the middle one 702"]
    assert compared(gpu(5, tflops=640.0), [*others, slow]) == []
    without = gpu(5, device="cpu", name="cpu", tflops=0.1)
    assert compared(without, [*others, without]) == ["sees no GPU, others do"]
    shared = gpu(5, name="H200 4")
    assert compared(shared, [*others, shared]) == ["uses the same GPU as process 4"]
    alike = [Found(rank=rank, node="n0", leads=rank == 0, device="cpu", name="cpu", tflops=0.1) for rank in range(2)]
    assert all(compared(one, alike) == [] for one in alike)  # processes of a node share its CPU


def test_the_speed_of_a_product_is_its_arithmetic_over_its_time():
    a, b = torch.randn(2, 512, 512)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    right = 2 * 512**3 / statistics.median(seconds) / 1e12
    assert right / 20 < probes.matmul_tflops(torch.device("cpu")) < right * 20  # a loaded machine is uneven


def test_a_rename_that_shows_a_part_is_noticed(tmp_path, monkeypatch):
    probes.write_trial(tmp_path, 0)
    probes.watch_renames(tmp_path, 0, 0)

    def torn(path: Path, number: int, turn: int) -> None:
        path.write_text(f"{number}-{turn % 10} " * (probes.WORDS // 2))

    def gone(path: Path, number: int, turn: int) -> None:
        path.unlink(missing_ok=True)

    for broken, said in ((torn, "seen in part"), (gone, "vanished")):
        probes._put(tmp_path / "0" / "file", 0, 0)
        with monkeypatch.context() as patch, pytest.raises(InputError, match=said):
            patch.setattr(probes, "_put", broken)
            probes.watch_renames(tmp_path, 0, 0)


def test_every_node_reads_other_shards_and_addresses_count_as_well(tmp_path, shards, monkeypatch):
    folder = shards(per_shard=2)
    data = tiny_run(tmp_path / "run", folder).data
    places, _ = probes.listing(data)
    assert places == [str(path) for path in sorted(folder.glob("*.tar"))] and len(places) == 32
    read: dict[int, list[str]] = {0: [], 1: []}
    for number, names in read.items():

        def noted(path, mode, names=names):
            names.append(path)
            return open(path, mode)

        monkeypatch.setattr(probes, "open", noted, raising=False)
        assert probes.reading_mbs(places, number) > 0
    assert len(read[0]) == len(read[1]) == 8 and not set(read[0]) & set(read[1])
    monkeypatch.undo()
    away = replace(data, sources=(replace(data.sources[0], shards=(f"file://{folder}/train-0000{{0..3}}.tar",)),))
    places, _ = probes.listing(away)
    assert places == [f"file://{folder}/train-0000{number}.tar" for number in range(4)]
    assert probes.reading_mbs(places, 0) > 0
    (folder / "train-00002.tar").unlink()
    with pytest.raises(InputError, match=r"file://.*train-00002\.tar cannot be read: No such file"):
        probes.reading_mbs(places, 0)


def test_sums_are_checked_and_bandwidth_counts_what_a_link_carries():
    for wrong, bandwidth in in_ranks(2, reduced):
        assert wrong == "the sum is wrong"
        assert bandwidth > 0
    assert probes.all_reduce_gbs(torch.device("cpu")) is None  # one process


def reduced() -> tuple[str, float]:
    """What is said of a sum that is wrong in every process, and the bandwidth where it is right."""
    bandwidth = probes.all_reduce_gbs(torch.device("cpu"))
    probes.rank = lambda: 1  # both add 2
    try:
        probes.all_reduce_gbs(torch.device("cpu"))
    except InputError as error:
        return str(error), bandwidth
    return "", bandwidth


def test_a_failure_becomes_a_fault_of_one_sentence():
    own = Found(rank=0, node="n0", leads=True)
    assert own.attempt("shards", lambda: 5) == 5 and own.faults == []

    def fails() -> None:
        raise PermissionError(13, os.strerror(13), "/data/x.tar")

    assert own.attempt("shards", fails) is None
    assert own.faults == ["shards: Permission denied"]
