"""Shards at addresses: the same batches as from local ones, whatever the network does, within the cache's bound."""

import contextlib
import hashlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.registry import known_implementations

from evaclip import fetch as fetching
from evaclip.data import remote
from evaclip.data.index import FOLDER, expand, index_shards
from evaclip.data.remote import CacheConfig, ShardCache, addresses, is_address
from evaclip.data.shards import DataConfig, ShardSet, SourceConfig
from evaclip.errors import InputError
from tests.data.test_pipeline import batches, same
from tests.ranks import in_ranks

# How the first answers for a file go wrong, one after the other; then it is sent whole.
TROUBLE = ("refuse", "cut", "reset", "stall", "busy")


class Storage(BaseHTTPRequestHandler):
    """Serves a folder, as badly as its server's `trouble` says; counts what was sent whole."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        path = server.root / self.path.partition("?")[0].lstrip("/")  # type: ignore[attr-defined]
        if not path.is_file():
            self.send_error(404)
            return
        with server.lock:  # type: ignore[attr-defined]
            number = server.asked[path.name] = server.asked[path.name] + 1  # type: ignore[attr-defined]
        body, trouble = path.read_bytes(), server.trouble  # type: ignore[attr-defined]
        how = trouble[number - 1] if number <= len(trouble) else "whole"
        if how == "refuse":
            self.close_connection = True
            return
        if how == "busy":
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if how == "whole" else body[: len(body) // 2])
        self.wfile.flush()
        if how == "stall":
            time.sleep(1.0)
        if how == "whole":
            with server.lock:  # type: ignore[attr-defined]
                server.sent[path.name] += 1  # type: ignore[attr-defined]
        self.close_connection = how != "whole"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(fetching, "RETRY_AFTER", (0.01,) * 6)
    monkeypatch.setattr(fetching, "SILENCE", 0.4)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    server.daemon_threads = True
    server.root, server.trouble = tmp_path, ()  # type: ignore[attr-defined]
    server.asked, server.sent, server.lock = Counter(), Counter(), threading.Lock()  # type: ignore[attr-defined]
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def url(server: ThreadingHTTPServer, name: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def data_of(*patterns: str, cache: Path | None = None, gigabytes: float = 1.0, **changes: object) -> ShardSet:
    source = SourceConfig(name="s", shards=patterns)
    settings = {"workers": 0, "chunk": 4} | changes
    return ShardSet(DataConfig(sources=(source,), cache=CacheConfig(folder=cache, gigabytes=gigabytes), **settings))


def equal(one: list, other: list) -> bool:
    return all(same(a, b) and c == d for (a, c), (b, d) in zip(one, other, strict=True))


NAMES = "shards/train-{00000..00007}.tar"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_network_changes_nothing(storage, shards, tmp_path, workers):
    """Connections refused, cut and reset, bodies that stall, a busy server: for each shard, one after another."""
    folder = shards(count=64, per_shard=8)
    expected = batches(data_of(str(folder)), 20)
    shutil.rmtree(folder / FOLDER)
    storage.trouble = TROUBLE
    data = data_of(url(storage, NAMES), cache=tmp_path / "cache", workers=workers)
    assert data.fingerprint == expected[0][1].fingerprint
    assert all(number == len(TROUBLE) + 1 for number in storage.asked.values())
    for place in (tmp_path / "cache/shards").glob("*/*.tar"):
        place.unlink()
    storage.asked.clear()
    found = batches(data, 20)
    assert equal(expected, found)
    assert all(number >= len(TROUBLE) + 1 for number in storage.asked.values())


def test_a_small_cache_holds_its_bound_and_shards_come_back(storage, shards, tmp_path):
    folder = shards(count=64, per_shard=8)
    expected = batches(data_of(str(folder), window=1), 24)
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    limit, seen = 3 * largest + 100, []
    shutil.rmtree(folder / FOLDER)
    data = data_of(url(storage, NAMES), cache=tmp_path / "cache", gigabytes=limit / 1e9, window=1)

    def size() -> int:
        """Of whole shards and what is reserved, or of what has come of it: whichever is more."""
        with data.cache._counting():
            sizes = Counter()
            for path in (tmp_path / "cache/shards").glob("*/t*"):
                with contextlib.suppress(FileNotFoundError):
                    sizes[path.suffix] += path.stat().st_size
        return sizes[".tar"] + max(sizes[".reserved"], sizes[".came"] + sizes[".part"])

    assert 0 < size() <= limit
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(size())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = batches(data, 24)
    done.set()
    watcher.join()
    assert equal(expected, found) and len(seen) > 10 and max(seen) <= limit
    assert max(storage.sent.values()) > 1  # some had gone, and were fetched again
    assert equal(expected, batches(data_of(
        url(storage, NAMES), cache=tmp_path / "cache", gigabytes=limit / 1e9, window=1, workers=3,
    ), 24))  # fmt: skip
    with pytest.raises(
        InputError, match=r"does not hold two windows of 4 shards .*raise --data.cache.gigabytes or lower"
    ):
        data_of(url(storage, NAMES), cache=tmp_path / "cache", gigabytes=limit / 1e9, window=4)


def read_in_rank(address: str, cache: Path, rank_batches: int) -> list[torch.Tensor]:
    import torch.distributed as dist

    data = data_of(address, cache=cache, workers=2)
    return [b.images for b, _ in batches(data, rank_batches, rank=dist.get_rank(), ranks=dist.get_world_size())]


def test_workers_and_ranks_of_a_machine_fetch_each_shard_once(storage, shards, tmp_path):
    folder = shards(count=64, per_shard=8)
    expected = batches(data_of(str(folder)), 10)
    found = in_ranks(2, read_in_rank, url(storage, NAMES), tmp_path / "cache", 10)
    for number, (batch, _) in enumerate(expected):
        assert torch.equal(torch.cat([part[number] for part in found]), batch.images)
    tars = {name: count for name, count in storage.sent.items() if name.endswith(".tar")}
    assert len(tars) == 8 and set(tars.values()) == {1}


def test_an_index_stays_and_one_beside_the_shards_is_used(storage, shards, tmp_path):
    folder = shards(count=64, per_shard=8)
    local = index_shards(expand([str(folder)]))
    data = data_of(url(storage, NAMES), cache=tmp_path / "cache")
    assert not [name for name in storage.sent if name.endswith(".tar")]  # nothing but indexes was fetched
    assert [(head.name, head.sha256) for head in data.heads[0]] == [(head.name, head.sha256) for head in local]
    storage.sent.clear()
    data_of(url(storage, NAMES), cache=tmp_path / "cache")
    assert not storage.sent
    assert equal(batches(data_of(str(folder)), 4), batches(data, 4))


def test_an_index_that_is_none_or_points_outside_is_not_used(storage, shards, tmp_path):
    import numpy as np

    folder = shards(count=16, per_shard=8)
    index_shards(expand([str(folder)]))
    first, second = sorted((folder / FOLDER).glob("*.npz"))
    first.write_bytes(b"PK junk")
    with np.load(second) as stored:
        parts = dict(stored)
    parts["spans"][3, 1] = 10**15
    np.savez(second, **parts)
    names = "shards/train-{00000..00001}.tar"
    data = data_of(url(storage, names), cache=tmp_path / "cache")
    assert storage.sent["train-00000.tar"] == storage.sent["train-00001.tar"] == 1
    assert equal(batches(data_of(str(folder), index_folder=tmp_path / "i"), 2), batches(data, 2))


def test_a_shard_that_is_another_by_now_is_refused(storage, shards, tmp_path):
    folder = shards(count=16, per_shard=8)
    data = data_of(url(storage, "shards/train-{00000..00001}.tar"), cache=tmp_path / "cache")
    shutil.rmtree(next((tmp_path / "cache/shards").glob("*")) / "none", ignore_errors=True)
    for place in (tmp_path / "cache/shards").glob("*/*.tar"):
        place.unlink()
    whole = (folder / "train-00000.tar").read_bytes()
    changed = bytearray(whole)
    changed[1000] ^= 1
    (folder / "train-00000.tar").write_bytes(changed)
    with pytest.raises(
        InputError, match=r"train-00000\.tar is not the shard that was indexed: its hash or size differs"
    ):
        batches(data, 2)
    (folder / "train-00000.tar").write_bytes(whole)
    assert len(batches(data, 2)) == 2
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".came", ".part", ".reserved")]


def test_what_cannot_be_had_is_a_sentence(storage, shards, tmp_path):
    shards(count=16, per_shard=8)
    for patterns, sentence in (
        ((url(storage, "shards/none.tar"),), r"none\.tar could not be fetched: the server answers 404"),
        ((url(storage, "shards/"),), "a web server does not list its files"),
        (("pipe:cat x.tar",), "not read through programs"),
        (("simplecache::s3://bucket/x.tar",), "not read through programs or chains"),
        (("nonsense://bucket/x.tar",), "could not be fetched: Protocol not known"),
    ):
        with pytest.raises(InputError, match=sentence):
            data_of(*patterns, cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"name a folder on a local disk .* --data\.cache\.folder"):
        data_of(url(storage, NAMES))
    (tmp_path / "shards" / "junk.tar").write_bytes(b"junk" * 1000)
    names = (url(storage, "shards/train-{00000..00001}.tar"), url(storage, "shards/junk.tar"))
    with pytest.raises(InputError, match=r"1 of 3 shards are damaged .*junk\.tar"):
        data_of(*names, cache=tmp_path / "cache")
    assert len(data_of(*names, cache=tmp_path / "cache", skip_damaged_shards=True)) == 16
    with pytest.raises(InputError, match="is too small for a shard of"):
        data = data_of(names[0], cache=tmp_path / "other")
        data.cache.limit = 10
        data.cache._make_room(100)


def test_what_a_killed_process_left_is_cleared(storage, shards, tmp_path):
    folder = shards(count=16, per_shard=8)
    data = data_of(url(storage, "shards/train-{00000..00001}.tar"), cache=tmp_path / "cache")
    place = next((tmp_path / "cache/shards").glob("*/train-00000.tar"))
    for suffix in (".came", ".came.part", ".reserved"):
        place.with_name(f"gone.tar{suffix}").write_bytes(bytes(100))
    place.unlink()
    data.cache.limit = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert len(batches(data, 2)) == 2
    assert not list(place.parent.glob("gone*"))


@pytest.fixture
def bucket(shards) -> Iterator[str]:
    """Shards in fsspec's file system in memory, for what is not http."""
    system = fsspec.filesystem("memory")
    folder = shards(count=32, per_shard=8)
    for path in folder.glob("*.tar"):
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket/"
    system.rm("/bucket", recursive=True)


def test_any_storage_of_fsspec_serves(bucket, shards, tmp_path, monkeypatch):
    folder = shards(count=32, per_shard=8)
    expected = batches(data_of(str(folder)), 6)
    monkeypatch.setattr(remote, "RETRY_AFTER", (0.01, 0.01))
    get, calls = fsspec.get_filesystem_class("memory").get_file, Counter()

    def failing(self, path: str, target: str, **more: object) -> None:
        calls[path] += 1
        if calls[path] == 1:
            raise RuntimeError("the connection was lost")
        get(self, path, target, **more)
        if calls[path] == 2:
            Path(target).write_bytes(Path(target).read_bytes()[:-100])

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "get_file", failing)
    for pattern in (bucket, f"{bucket}*.tar", f"{bucket}train-{{00000..00003}}.tar"):
        calls.clear()
        data = data_of(pattern, cache=tmp_path / hashlib.md5(pattern.encode()).hexdigest())
        assert equal(expected, batches(data, 6))
        assert {path for path, count in calls.items() if count == 3} == {f"/bucket/train-{n:05}.tar" for n in range(4)}
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "get_file", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"train-00000\.tar could not be fetched: division by zero"):
        data_of(bucket, cache=tmp_path / "third")
    with pytest.raises(InputError, match=r"holds no \.tar files"):
        addresses("memory://empty/")


def test_a_storage_whose_package_is_missing_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(known_implementations, "far", {"class": "farfs.Far", "err": "install farfs"})
    with pytest.raises(InputError, match="install farfs"):
        data_of("far://bucket/x.tar", cache=tmp_path)


def test_addresses_and_lists_mix_with_local_shards(storage, shards, tmp_path):
    one, two = shards(count=16, per_shard=8, name="one"), shards(count=16, per_shard=8, name="two", seed=1, first=50)
    (tmp_path / "list").write_text(f"{url(storage, 'one/train-{00000..00001}.tar')}\n\n{two}\n")
    mixed = data_of(f"@{tmp_path}/list", cache=tmp_path / "cache")
    assert equal(batches(data_of(str(one), str(two)), 4), batches(mixed, 4))


def test_a_signature_in_an_address_makes_no_other_shard_and_is_not_written_down(shards, tmp_path):
    cache = ShardCache(CacheConfig(folder=tmp_path))
    place = cache.place("https://host/a/train-0.tar?Signature=abc")
    assert place == cache.place("https://host/a/train-0.tar?Signature=other") and "abc" not in str(place)
    assert place != cache.place("https://host/b/train-0.tar") != cache.place("s3://host/b/train-0.tar")
    assert is_address("s3://bucket/x") and not is_address("/local/x") and not is_address("@list")
