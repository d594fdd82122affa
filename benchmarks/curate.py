"""The verbs that read and write shards, beside the webdataset library on the same shard of 10,000 samples."""

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import webdataset
from measure import best_seconds, write_result
from PIL import Image
from sklearn.datasets import load_sample_images

from evaclip.curate.check import check_shard
from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.reshard import ReshardCommand, _members_of, _write_shard
from evaclip.curate.scan import scan
from evaclip.data.index import _index, samples_of

SAMPLES = 10_000


def write_shard(path: Path, **form: object) -> int:
    """Crops of two photographs as JPEGs of 384 pixels, with captions and records as img2dataset writes them."""
    random, files = np.random.default_rng(0), []
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(64):
        left, top = int(random.integers(100)), int(random.integers(60))
        buffer = io.BytesIO()
        photos[number % 2].crop((left, top, left + 500, top + 340)).resize((384, 261)).save(buffer, "JPEG", quality=88)
        files.append(buffer.getvalue())
    with webdataset.TarWriter(str(path), encoder=False, **form) as tar:
        for number in range(SAMPLES):
            key = f"{number:09}"
            caption = f"a photograph, number {number}, of a thing on a table"
            record = {"url": f"http://example.org/{key}.jpg", "key": key, "caption": caption, "status": "success",
                      "width": 384, "height": 261, "similarity": 0.31, "sha256": "0" * 64}  # fmt: skip
            tar.write({"__key__": key, "jpg": files[number % 64], "txt": caption.encode(),
                       "json": json.dumps(record).encode()})  # fmt: skip
    return path.stat().st_size


def webdataset_reads(path: Path) -> None:
    """Every sample, nothing decoded."""
    assert sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False)) == SAMPLES


def webdataset_checks(path: Path) -> None:
    """What a check by hand would do with the library: each caption, record and image header, and a hash of the file."""
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        assert sample["txt"].decode() and json.loads(sample["json"]) and Image.open(io.BytesIO(sample["jpg"])).size
    sha256(path)


def webdataset_reshards(path: Path, out: Path) -> None:
    """Through the library's own shuffle buffer, which holds 1,000 samples, into its own writer."""
    shuffled = webdataset.WebDataset(str(path), shardshuffle=False).shuffle(1000)
    with webdataset.TarWriter(str(out / "w.tar"), encoder=False, mtime=0, format=tarfile.USTAR_FORMAT) as tar:
        for sample in shuffled:
            tar.write({name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")})


def sha256(path: Path) -> str:
    """As the standard library does it for a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """All on one shard that lies in the page cache; wall clock unless it says processor time."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "00000.tar", Path(folder) / "out"
        out.mkdir()
        megabytes = write_shard(path, mtime=0, format=tarfile.USTAR_FORMAT) / 1e6
        hashing = best_seconds(lambda: sha256(path), 3)
        reading = best_seconds(lambda: webdataset_reads(path), 2)
        offsets = best_seconds(lambda: samples_of(path), 3)
        rows.append(["index: offsets and counts", f"{offsets:.3f} s", f"{reading:.2f} s", f"{reading / offsets:.1f}x",
                     "under 0.5 s"])  # fmt: skip
        whole = best_seconds(lambda: _index(path, None), 3)
        peer = reading + hashing
        rows.append(["index: with the hash", f"{whole:.3f} s", f"{peer:.2f} s", f"{peer / whole:.1f}x",
                     f"hashing alone {hashing:.3f} s"])  # fmt: skip
        full = best_seconds(lambda: check_shard(path, level="full"), 5)
        peer = best_seconds(lambda: webdataset_checks(path), 1)
        rows.append(["check --level full", f"{full:.3f} s", f"{peer:.2f} s", f"{peer / full:.1f}x",
                     f"{full / hashing:.2f}x of hashing alone, wanted 1.2x"])  # fmt: skip
        work = best_seconds(lambda: check_shard(path, level="full"), 3, time.process_time)
        alone = best_seconds(lambda: sha256(path), 3, time.process_time)
        rows.append(["the same, processor time", f"{work:.3f} s", "", "", f"{work / alone:.2f}x of hashing alone"])
        looking = best_seconds(lambda: scan(path, "full"), 3)
        rows.append(["check without the hash", f"{looking:.3f} s", "", "", ""])
        journal = Journal(out / "unfinished", {}, 1)
        members = dict(journal.each("looking at samples", lambda p: _members_of(p, level="full"), [path], shard_state))
        command = ReshardCommand(shards=(str(path),), out=out, per_shard=SAMPLES, processes=1)
        counts = (len(members[path]["starts"]) - 1,)

        def ours() -> None:
            _write_shard(0, command=command, paths=[path], counts=counts, journal=journal)

        writing, processor = best_seconds(ours, 3), best_seconds(ours, 3, time.process_time)
        peer = best_seconds(lambda: webdataset_reshards(path, out), 1)
        rates = f"{megabytes / writing:,.0f} MB/s ({megabytes / processor:,.0f} MB/s of processor time)"
        rows.append(["reshard: shuffled, written, hashed, synced", rates, f"{megabytes / peer:,.0f} MB/s",
                     f"{peer / writing:.1f}x", "at least 300 MB/s and core"])  # fmt: skip
        shutil.rmtree(out)
        extended = Path(folder) / "extended.tar"
        write_shard(extended)
        offsets, reading = (
            best_seconds(lambda: samples_of(extended), 3),
            best_seconds(lambda: webdataset_reads(extended), 1),
        )
        rows.append(["index of a shard with webdataset's default headers", f"{offsets:.3f} s", f"{reading:.2f} s",
                     f"{reading / offsets:.1f}x", "under 0.5 s"])  # fmt: skip
    write_result(
        "curate",
        f"One shard of {SAMPLES:,} samples, {megabytes:,.0f} MB",
        ["what", "ours", "webdataset library", "speed", "target or comparison"],
        rows,
        "JPEG, caption and record for each sample; the shard lies in the page cache. The library reads every sample "
        "without decoding; for the check its samples are looked at as a script would (caption, record, header of the "
        "image by PIL) and the file is hashed; for resharding they pass through its shuffle buffer of 1,000 into its "
        "writer, which neither hashes nor syncs. Our check hashes in a thread beside the rest, so on one core it takes "
        "its processor time. Resharding has looked at the samples before (`check without the hash`).",
    )


if __name__ == "__main__":
    main()
