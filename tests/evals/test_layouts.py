"""Every layout in which people have the benchmarks: each picture is joined to the class that it shows."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import webdataset
from scipy.io import savemat

from evaclip.errors import InputError
from evaclip.evals.card import load_card
from evaclip.evals.features import Setting
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.names import canonical, join_list
from evaclip.evals.zero_shot import check_count, zero_shot
from tests.evals.oracle import encoded_picture, oracle, seen, write_picture

IMAGENET = load_card("imagenet")
# Classes on both sides of every trap: first, last, the two cranes, a missile, numbers that sort as text elsewhere.
SOME = (0, 1, 2, 10, 100, 134, 517, 657, 999)


def numbered(place: int, wnid: str = "") -> str:
    return f"ILSVRC2012_val_{place + 1:08}{wnid and '_' + wnid}.JPEG"


def flat(folder: Path) -> None:
    for place, number in enumerate(SOME):
        write_picture(folder / numbered(place), number)


def class_folders(folder: Path) -> None:
    for place, number in enumerate(SOME):
        write_picture(folder / "val" / IMAGENET.labels[number] / numbered(place), number)
    (folder / "train").mkdir()


def in_the_file_names(folder: Path) -> None:
    for place, number in enumerate(SOME):
        write_picture(folder / "val" / numbered(place, IMAGENET.labels[number]), number)


def with_kaggles_csv(folder: Path) -> None:
    flat(folder / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    rows = [f"{Path(numbered(p)).stem},{IMAGENET.labels[n]} 1 2 3 4" for p, n in enumerate(SOME)]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))


def with_caffes_list(folder: Path) -> None:
    flat(folder)
    (folder / "val.txt").write_text("".join(f"{numbered(p)} {n}\n" for p, n in enumerate(SOME)))


def with_tensorflows_list(folder: Path) -> None:
    flat(folder / "val")
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(IMAGENET.labels[n] for n in SOME))


def devkit_ids() -> list[int]:
    """The development kit counts in an order of its own."""
    return (np.random.default_rng(0).permutation(1000) + 1).tolist()


def with_the_devkit(folder: Path) -> None:
    flat(folder / "val")
    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    ids = devkit_ids()
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{ids[n]}\n" for n in SOME))
    synsets = np.array(
        [(id, wnid) for id, wnid in zip(ids, IMAGENET.labels, strict=True)],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object)],
    )
    savemat(kit / "meta.mat", {"synsets": synsets})


def with_map_clsloc(folder: Path) -> None:
    with_the_devkit(folder)
    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    (kit / "meta.mat").unlink()
    lines = [f"{w} {i} some_name\n" for w, i in zip(IMAGENET.labels, devkit_ids(), strict=True)]
    (kit / "map_clsloc.txt").write_text("".join(lines))


def tar_of(source: Path, to: Path, mode: str = "w") -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(to, mode) as tar:
        for path in sorted(source.rglob("*")):
            tar.add(path, path.relative_to(source), recursive=False)


def in_the_original_tar(folder: Path) -> None:
    flat(folder / "unpacked")
    tar_of(folder / "unpacked", folder / "ILSVRC2012_img_val.tar")
    for path in (folder / "unpacked").iterdir():
        path.unlink()
    (folder / "val.txt").write_text("".join(f"{numbered(p)} {n}\n" for p, n in enumerate(SOME)))


def shards(folder: Path, names: list[str] | None = None) -> None:
    order = list(range(1000)) if names is None else [IMAGENET.classes.index(name) for name in names]
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("2")
    for shard, part in enumerate((SOME[:5], SOME[5:])):
        with webdataset.TarWriter(str(folder / "test" / f"{shard}.tar")) as writer:
            for place, number in enumerate(part):
                cls = str(order.index(number)).encode()
                writer.write({"__key__": f"s{place:07}", "jpg": encoded_picture(number), "cls": cls})
    (folder / "classnames.txt").write_text("\n".join(names or IMAGENET.classes))


def parquet_files(folder: Path) -> None:
    """As the hub has ImageNet: WordNet's lemmas for names, one of them in a spelling of its own."""
    names = [("crane bird" if name == "crane" else name) for name in IMAGENET.also]
    names[3] = "tiger shark, spelled otherwise"
    rows = [{"bytes": encoded_picture(n), "path": numbered(p)} for p, n in enumerate(SOME)]
    table = arrow.table({"image": rows, "label": list(SOME)})
    info = {"info": {"features": {"label": {"names": names}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    (folder / "data").mkdir(parents=True)
    parquet.write_table(table, folder / "data" / "validation-00000-of-00001.parquet", row_group_size=4)
    unlabelled = table.set_column(1, "label", arrow.array([-1] * len(SOME)))
    parquet.write_table(unlabelled, folder / "data" / "test-00000-of-00001.parquet")


LAYOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "class folders": (class_folders, "class_folders"),
    "names of files": (in_the_file_names, "WordNet ids in the file names"),
    "kaggle": (with_kaggles_csv, "LOC_val_solution.csv"),
    "caffe": (with_caffes_list, "val.txt"),
    "tensorflow": (with_tensorflows_list, "synset_labels.txt"),
    "devkit": (with_the_devkit, "ground_truth.txt"),
    "devkit with map_clsloc": (with_map_clsloc, "ground_truth.txt"),
    "tar": (in_the_original_tar, "val.txt in a tar"),
    "webdataset": (shards, "webdataset"),
    "parquet": (parquet_files, "huggingface_parquet"),
}


def check(found: LabelledImages, numbers: tuple[int, ...]) -> None:
    """Every picture has the label that it shows, and all of them are there."""
    assert sorted(found.labels.tolist()) == sorted(numbers)
    assert [seen(found.open(place)) for place in range(len(found))] == found.labels.tolist()
    assert len(set(found.keys)) == len(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_of_imagenet_joins_each_picture_to_its_class(tmp_path, name):
    build, layout = LAYOUTS[name]
    build(tmp_path / "imagenet")
    found = find_images(IMAGENET, tmp_path / "imagenet")
    assert found.layout.endswith(layout)
    check(found, SOME)
    assert find_images(IMAGENET, tmp_path / "imagenet").fingerprint == found.fingerprint


def test_the_oracle_scores_one_hundred_through_the_whole_evaluator(tmp_path):
    class_folders(tmp_path)
    result = zero_shot(oracle(IMAGENET), IMAGENET, find_images(IMAGENET, tmp_path))
    assert result.accuracy(1) == 1 and result.metrics().keys() == {"top1", "top5", "real"}


def test_a_tar_can_be_named_itself(tmp_path):
    in_the_original_tar(tmp_path)
    check(find_images(IMAGENET, tmp_path / "ILSVRC2012_img_val.tar"), SOME)


def test_shards_whose_numbers_mean_other_names_are_joined_by_name(tmp_path):
    names = [IMAGENET.classes[number] for number in reversed(SOME)]
    shards(tmp_path, names)
    check(find_images(IMAGENET, tmp_path), SOME)


def test_a_devkit_without_its_list_of_ids_is_not_guessed(tmp_path):
    with_the_devkit(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").unlink()
    with pytest.raises(InputError, match=r"meta.mat \(or map_clsloc.txt\), which says how, is not beside it"):
        find_images(IMAGENET, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: (f / "val.txt").unlink(), "no label file is near; put one of LOC_val_solution.csv, val.txt"),
        (lambda f: (f / "val.txt").write_text(numbered(0) + " 1000\n"), "numbered 1000 to 1000, not 0 to 999"),
        (lambda f: (f / "val.txt").write_text(numbered(0) + " 5\n"), "has no label of ImageNet-1K"),
        (lambda f: (f / "val.txt").write_text("junk"), "is not the label file of that name"),
    ],
)
def test_flat_images_without_usable_labels_are_one_sentence(tmp_path, change, sentence):
    with_caffes_list(tmp_path / "a" / "b")
    change(tmp_path / "a" / "b")
    with pytest.raises(InputError, match=sentence):
        find_images(IMAGENET, tmp_path / "a" / "b")


def test_a_cut_tar_and_a_missing_shard_are_one_sentence(tmp_path):
    in_the_original_tar(tmp_path / "cut")
    tar = tmp_path / "cut" / "ILSVRC2012_img_val.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(InputError, match="cannot be used: it is cut"):
        find_images(IMAGENET, tmp_path / "cut")
    shards(tmp_path / "wds")
    (tmp_path / "wds" / "test" / "1.tar").unlink()
    with pytest.raises(InputError, match=r"should hold 2 shards; 1\.tar is missing"):
        find_images(IMAGENET, tmp_path / "wds")


def test_imagenet_v2_counts_its_folders_and_does_not_sort_them(tmp_path):
    card = load_card("imagenet-v2")
    for number in SOME:
        write_picture(tmp_path / "imagenetv2-matched-frequency-format-val" / str(number) / "x.jpeg", number)
    check(find_images(card, tmp_path), SOME)
    check(find_images(card, tmp_path / "imagenetv2-matched-frequency-format-val"), SOME)
    other = tmp_path / "imagenetv2-threshold0.7-format-val"
    (tmp_path / "imagenetv2-matched-frequency-format-val").rename(other)
    with pytest.raises(InputError, match=r"another variant \(threshold0.7\)"):
        find_images(card, other)
    (other / "1000").mkdir()
    other.rename(tmp_path / "val")
    with pytest.raises(InputError, match=r"numbered 0 to 1000, but those of .* are 0 to 999"):
        find_images(card, tmp_path)


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r", "imagenet_sketch"])
@pytest.mark.parametrize("packed", [False, True])
def test_folders_by_wordnet_id_with_a_readme(tmp_path, name, packed):
    card = load_card(name)
    numbers = (0, 5, 99, len(card.classes) - 1)
    inner = tmp_path / "x" / card.folders[0]
    for number in numbers:
        write_picture(inner / card.labels[number] / "a.jpg", number)
    (inner / "README.txt").write_text("n01440764 tench")
    if packed:
        tar_of(tmp_path / "x", tmp_path / "data" / card.archives[0])
    check(find_images(card, tmp_path / ("data" if packed else "x")), numbers)
    if name != "imagenet_sketch":
        assert len(card.classes) == 200 and set(card.labels) < set(IMAGENET.labels)


def test_objectnet_scores_113_of_its_folders_and_knows_the_other_200(tmp_path):
    card = load_card("objectnet")
    numbers = tuple(card.labels.index(name) for name in ("full_sized_towel", "hand_towel_or_rag", "banana"))
    for number in numbers:
        write_picture(tmp_path / "objectnet-1.0" / "images" / card.labels[number] / "a.png", number)
    write_picture(tmp_path / "objectnet-1.0" / "images" / card.other_labels[0] / "a.png", 1)
    check(find_images(card, tmp_path), numbers)
    assert card.classes[numbers[0]] == "bath towel" and list(card.labels) == sorted(card.labels)
    write_picture(tmp_path / "objectnet-1.0" / "images" / "bananna" / "a.png", 1)
    with pytest.raises(InputError, match="'bananna' is no class of ObjectNet"):
        find_images(card, tmp_path)


C100 = load_card("cifar100")


def cifar100(folder: Path, kind: str, names: list[str]) -> np.ndarray:
    """Random pixels with CIFAR-100's labels, numbered as `names` are; returns the true classes."""
    random = np.random.default_rng(0)
    fine, pixels = random.integers(0, 100, 30), random.integers(0, 256, (30, 3072), dtype=np.uint8)
    folder.mkdir(parents=True)
    if kind == "pickles":
        (folder / "cifar-100-python").mkdir()
        batch = {b"fine_labels": fine.tolist(), b"coarse_labels": [0] * 30, b"data": pixels}
        (folder / "cifar-100-python" / "test").write_bytes(pickle.dumps(batch, protocol=2))
        meta = {b"fine_label_names": [name.encode() for name in names]}
        (folder / "cifar-100-python" / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    elif kind == "archive":
        cifar100(folder / "inner", "pickles", names)
        tar_of(folder / "inner", folder / "cifar-100-python.tar.gz", "w:gz")
        for path in sorted((folder / "inner").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    elif kind == "binary":
        (folder / "cifar-100-binary").mkdir()
        records = np.concatenate([np.zeros((30, 1), np.uint8), fine[:, None].astype(np.uint8), pixels], 1)
        records.tofile(folder / "cifar-100-binary" / "test.bin")
        (folder / "cifar-100-binary" / "fine_label_names.txt").write_text("\n".join(names) + "\n\n")
    else:
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        np.savez(folder / "cifar100.npz", x_test=images, y_test=fine[:, None])
        return fine
    return np.array([C100.classes.index(names[number].replace("_", " ")) for number in fine])


@pytest.mark.parametrize("kind", ["pickles", "archive", "binary", "arrays"])
def test_cifar100_is_joined_by_the_names_in_its_own_list(tmp_path, kind):
    names = [name.replace(" ", "_") for name in reversed(C100.classes)]
    expected = cifar100(tmp_path / "c", kind, names)
    found = find_images(C100, tmp_path / "c")
    assert np.array_equal(found.labels, expected)
    pixels = np.random.default_rng(0)
    pixels.integers(0, 100, 30)
    first = pixels.integers(0, 256, (30, 3072), dtype=np.uint8)[0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(found.open(0)), first)


def test_pixels_that_were_encoded_again_are_noted(tmp_path):
    for kind, noted in (("png", False), ("jpg", True)):
        write_picture(tmp_path / kind / "test" / "aquarium_fish" / f"a.{kind}", 1)
        assert any("encoded again as JPEG" in note for note in find_images(C100, tmp_path / kind).notes) == noted


def test_names_are_equal_when_their_letters_are():
    assert canonical("curling (sport)") == canonical("curling_sport") == canonical("Curling Sport")
    card = load_card("imagenet")
    with pytest.raises(InputError, match="'missle' is no class of ImageNet-1K"):
        join_list(card, ["missile", "missle"], "list")
    assert join_list(card, ["missile", "goldfish", "missile"], "list") == [657, 1, 744]


def test_a_picture_with_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    write_picture(tmp_path / "val" / "n01440764" / "a.jpg", 0)
    found = find_images(IMAGENET, tmp_path)
    monkeypatch.setattr("evaclip.evals.layouts.tree.MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="more than 100 pixels"):
        found.open(0)


def test_the_right_number_of_images_in_the_wrong_classes_is_refused(tmp_path):
    from dataclasses import replace

    card = replace(C100, count=4, per_class=2, classes=C100.classes[:2])
    for name in ("apple/1", "apple/2", "apple/3", "aquarium_fish/1"):
        write_picture(tmp_path / "test" / f"{name}.png", 0)
    with pytest.raises(InputError, match="2 test images of each class, but 3 of 'apple' were found"):
        check_count(card, find_images(card, tmp_path))
    result = zero_shot(oracle(card), card, find_images(card, tmp_path), Setting(allow_partial=True))
    assert not result.partial and result.accuracy(1) == 0.75


@pytest.mark.parametrize(
    ("card", "name", "content"),
    [
        ("kinetics400", "val.csv", "label,youtube_id,time_start\nyoga,abc,soon\n"),
        ("kinetics400", "val.csv", b"label,youtube_id\n\xff\xfe,\x00\n"),
        ("kinetics400", "frames.json", '{"card": "kinetics400", "split": "test", "shards": "many"}'),
        ("kinetics400", "frames.json", '{"card": "kinetics400", "split": "test"}'),
        ("cifar100", "test-0.parquet", b"PAR1 junk"),
        ("cifar100", "test/nshards.txt", "many"),
        ("cifar100", "cifar-100-python.tar.gz", b"junk"),
        ("cifar100", "cifar-100-binary/test.bin", b"x" * 3073),
        ("ucf101", "testlist01.txt", b"\xff\xfe\xfd"),
        ("imagenet", "ILSVRC2012_img_val.tar", b"junk" * 200),
    ],
)
def test_files_with_other_contents_are_one_sentence(tmp_path, card, name, content):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        find_images(load_card(card), tmp_path / "data")
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_row_without_an_image_is_a_bad_file(tmp_path):
    rows = arrow.table({"img": [{"bytes": None, "path": None}, None], "fine_label": [1, 2]})
    parquet.write_table(rows, tmp_path / "test-0.parquet")
    found = find_images(C100, tmp_path)
    with pytest.raises(ValueError, match=r"row 1 of row group 0 of test-0\.parquet holds no image"):
        found.open(1)


def test_arrays_of_another_shape_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x_test=np.zeros((3, 32, 32), np.uint8), y_test=np.zeros(3))
    with pytest.raises(InputError, match=r"uint8 \(3, 32, 32\); uint8 \[images, height, width, 3\]"):
        find_images(C100, tmp_path)
    (tmp_path / "a.npz").write_bytes(io.BytesIO(b"junk").getvalue())
    with pytest.raises(InputError, match="cannot be read as arrays"):
        find_images(C100, tmp_path)
