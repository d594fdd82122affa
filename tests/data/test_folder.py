"""A folder of image files: the same images as in shards, in an order of its own that goes on, and what is refused."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaclip.data.folder import index_images, open_folder
from evaclip.data.pipeline import Batch, Cursor, Stream
from evaclip.data.shards import DataConfig, ShardSet, SourceConfig
from evaclip.data.transforms import CropConfig, training_pixels
from evaclip.errors import InputError
from evaclip.keyed import generator
from tests.conftest import made_pairs

COUNT = 40


@pytest.fixture
def folder(tmp_path) -> Path:
    """Class folders of images, some of them deeper, and files that are none."""
    for number, pair in enumerate(made_pairs(COUNT)):
        place = tmp_path / "images" / f"class{number % 3}" / ("deep" if number % 7 == 0 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{pair.key}.{'PNG' if number % 2 else 'png'}").write_bytes(pair.image)
    (tmp_path / "images" / "list.txt").write_text("no image")
    (tmp_path / "images" / ".hidden").mkdir()
    (tmp_path / "images" / ".hidden" / "thumb.png").write_bytes(b"no image either")
    return tmp_path / "images"


def opened(folder: Path, **changes) -> ShardSet:
    source = SourceConfig(name="photos", shards=(str(folder),))
    return ShardSet(DataConfig(sources=(source,), **({"workers": 0, "chunk": 4} | changes)))


def batches(data: ShardSet, count: int, position: int = 0, context: int = 0) -> list[Batch]:
    stream = Stream(data, Cursor(data.fingerprint, 3, position), batch_size=8, image_size=16, context=context)
    return [batch for (batch, _), _ in zip(stream, range(count), strict=False)]


def test_an_epoch_has_every_file_once_with_its_own_crop_whatever_reads_it(folder):
    data = opened(folder)
    assert len(data) == COUNT
    seen = batches(data, COUNT // 8)
    files = {path.name.split(".")[0]: path for path in folder.rglob("0*.[pP][nN][gG]")}
    expected = {
        tuple(training_pixels(path.read_bytes(), 16, CropConfig(), generator(3, "crop", position)).flatten().tolist())
        for path in files.values()
        for position in range(COUNT)
    }
    images = {tuple(image.flatten().tolist()) for batch in seen for image in batch.images}
    assert len(images) == COUNT and images <= expected
    for workers in (1, 2):
        again = batches(opened(folder, workers=workers), COUNT // 8)
        assert all(torch.equal(a.images, b.images) for a, b in zip(seen, again, strict=True))
    later = batches(data, 2, position=24)
    assert all(torch.equal(a.images, b.images) for a, b in zip(seen[3:5], later, strict=True))
    assert all(batch.tokens.shape == (8, 0) and batch.split(2)[1].tokens.shape == (4, 0) for batch in seen)


def test_files_are_dealt_at_random_into_shards_that_are_indexed_once(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("evaclip.data.folder.PER_SHARD", 16)
    heads = index_images(folder)
    assert [head.samples for head in heads] == [16, 16, 8] and heads[0].name == "00000.images"
    before = opened(folder)
    monkeypatch.setattr("evaclip.data.folder._walked", lambda _: pytest.fail("walked again"))
    assert opened(folder).fingerprint == before.fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert opened(moved).fingerprint == before.fingerprint and opened(moved).heads[0][0].path.startswith(str(moved))
    names = before.names(range(COUNT), 3, 8)
    assert len(set(names)) == COUNT and names[0].split("#")[0].endswith(".images")


def test_a_file_that_comes_goes_or_changes_is_noticed(folder):
    before = opened(folder)
    first = sorted(folder.rglob("0*.png"))[0]
    first.rename(first.with_name("other.png"))
    renamed = opened(folder)
    assert renamed.fingerprint != before.fingerprint and len(renamed) == COUNT
    (folder / "top.png").write_bytes(made_pairs(1, seed=5)[0].image)
    assert len(opened(folder)) == COUNT + 1
    data = opened(folder)
    changed = folder / "top.png"
    changed.write_bytes(changed.read_bytes() + b"more")
    with pytest.raises(
        InputError, match=r"top\.png has [\d,]+ bytes and had .* when it was indexed: the data has chan"
    ):
        batches(data, 6)
    changed.unlink()
    with pytest.raises(InputError, match=r"top\.png cannot be read: No such file"):
        batches(data, 6)


def test_a_damaged_file_is_replaced_by_another_and_counted(folder):
    broken = sorted(folder.rglob("0*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:60])
    data = opened(folder, max_damaged=1.0)
    stream = Stream(data, Cursor(data.fingerprint, 3, 0), batch_size=8, image_size=16, context=0)
    for _, _ in zip(range(COUNT // 8), stream, strict=False):
        pass
    assert stream.damage == {"undecodable": 1} and stream.cursor.damaged == 1


def test_what_cannot_be_is_one_sentence(folder, tmp_path, shards):
    data = opened(folder)
    with pytest.raises(InputError, match="source 'photos' is a folder of images without captions"):
        batches(data, 1, context=20)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=r"holds neither \.tar files nor images"):
        opened(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*--data\.index-folder"):
        opened(folder, index_folder=tmp_path / "file" / "inside")
    assert len(opened(folder, index_folder=tmp_path / "elsewhere")) == COUNT
    assert not any(path.name.startswith("0") for path in (tmp_path / "elsewhere").iterdir())
    both = ShardSet(
        DataConfig(sources=(SourceConfig(name="both", shards=(str(shards()), str(folder))),), workers=0, chunk=4)
    )
    assert len(both) == 64 + COUNT
    assert len(batches(both, 4)) == 4


def test_shards_without_captions_serve_objectives_that_use_none(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for pair in made_pairs(8):
            info = tarfile.TarInfo(f"{pair.key}.png")
            info.size = len(pair.image)
            tar.addfile(info, io.BytesIO(pair.image))
    data = opened(tmp_path / "plain.tar")
    stream = Stream(data, Cursor(data.fingerprint, 3, 0), batch_size=8, image_size=16, context=0)
    batch, cursor = next(iter(stream))
    assert cursor.damaged == 0 and batch.images.float().std() > 10


def test_links_to_files_are_followed_and_names_in_any_script_are_kept(tmp_path):
    (tmp_path / "images" / "räume").mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "images" / "räume" / "ein bild.jpg")
    os.symlink(tmp_path / "images" / "räume" / "ein bild.jpg", tmp_path / "images" / "verweis.jpeg")
    data = opened(tmp_path / "images")
    assert len(data) == 2
    stream = Stream(data, Cursor(data.fingerprint, 3, 0), batch_size=2, image_size=16, context=0)
    assert next(iter(stream))[0].images.sum() == 0


def test_linked_folders_are_walked_once_and_what_cannot_be_walked_is_said(folder, tmp_path, monkeypatch):
    (tmp_path / "links").mkdir()
    for name in ("class0", "class1"):
        os.symlink(folder / name, tmp_path / "links" / name)
    os.symlink(tmp_path / "links", folder / "class0" / "back")
    os.symlink(folder / "class1", folder / "class1" / "itself")
    own = [path for name in ("class0", "class1") for path in (folder / name).rglob("0*.[pP][nN][gG]")]
    assert len(opened(tmp_path / "links")) == len(own) < COUNT
    os.symlink(tmp_path / "gone.png", folder / "class2" / "gone.png")
    with pytest.raises(InputError, match=r"class2/gone\.png cannot be read: No such file"):
        opened(folder)
    (folder / "class2" / "gone.png").unlink()
    listed = os.scandir

    def forbidden(place):
        if str(place).endswith("class2"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(InputError, match="class2 cannot be read: Permission denied"):
        opened(folder)


def test_names_in_no_encoding_are_kept(folder):
    before = opened(folder).fingerprint
    os.rename(next(folder.rglob("0*.png")), os.fsencode(folder) + b"/\xe9.png")
    data = opened(folder)
    assert len(data) == COUNT and data.fingerprint != before
    assert len(batches(data, COUNT // 8)) == COUNT // 8


def test_a_run_does_not_go_on_with_the_index_of_a_later_one(folder):
    data = opened(folder)
    (folder / "new.png").write_bytes(made_pairs(1, seed=5)[0].image)
    assert len(batches(data, 1)) == 1  # what it began with is still there
    assert len(opened(folder)) == COUNT + 1
    with pytest.raises(InputError, match="is not the one that this run began with"):
        batches(data, 1)


def test_a_disk_that_hiccups_is_asked_again(folder, monkeypatch):
    shard, usual, failures = open_folder(opened(folder).heads[0][0], None), Path.read_bytes, [1]

    def hiccup(path):
        if failures and failures.pop():
            raise OSError(5, "Input/output error")
        return usual(path)

    monkeypatch.setattr("evaclip.data.folder.RETRY_AFTER", (0.0,))
    monkeypatch.setattr(Path, "read_bytes", hiccup)
    assert shard.image(0) == usual(folder / shard.index.keys[0])
    failures += [1, 1]
    with pytest.raises(InputError, match="cannot be read: Input/output error"):
        shard.image(0)
