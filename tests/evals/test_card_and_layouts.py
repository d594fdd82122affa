"""Cards say what they must, and images are found in each layout with the right labels."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from evaclip.curate.caption import load_caption_recipe
from evaclip.curate.recipe import known_recipes, recipe_record
from evaclip.errors import InputError
from evaclip.evals.card import known_cards, load_card
from evaclip.evals.layouts import READERS, find_images
from tests.conftest import encoded

CIFAR = load_card("cifar10")
COUNT = 23


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of CIFAR's shape and their labels."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, COUNT)


@pytest.mark.parametrize("name", known_cards())
def test_shipped_cards_are_complete(name):
    card = load_card(name)
    assert card.name == name and card.source and card.licence
    assert len(card.classes) >= 2 and len(set(card.data_labels)) == len(card.data_labels)
    assert card.templates and card.count > 0 and set(card.layouts) <= set(READERS)
    for reference in card.reference:
        scores = [reference.top1, reference.top5, reference.mean_top1_top5]
        assert reference.source and getattr(reference, card.headline)
        assert all(0 < score <= 100 for score in scores if score is not None)
    assert all("{}" not in prompt and name in prompt for name in card.classes for prompt in card.prompts(name))


def test_cifar_is_the_published_protocol():
    assert len(CIFAR.templates) == 18 and CIFAR.count == 10_000
    assert CIFAR.classes[:3] == ("airplane", "automobile", "bird") and CIFAR.classes[-1] == "truck"


@pytest.mark.parametrize("name", [name for name in known_recipes() if recipe_record(name)[1] == "captions"])
def test_shipped_caption_recipes_are_complete(name):
    recipe = load_caption_recipe(name)
    assert recipe.split != "test" and recipe.card in known_cards() and len(set(recipe.captions)) == len(recipe.captions)
    assert all(caption.count("{}") == 1 for caption in recipe.captions)


def test_names_are_forgiving_and_near_ones_are_named():
    assert load_card("CIFAR-10").name == "cifar10"
    with pytest.raises(InputError, match="no benchmark is called 'cifar11'; did you mean cifar10"):
        load_card("cifar11")
    with pytest.raises(InputError, match="no data recipe is called 'digit'; did you mean digits"):
        load_caption_recipe("digit")


GOOD = """
name = "mine"
title = "Mine"
count = 3
layouts = ["class_folders"]
classes = ["cat", "dog"]
templates = ["a {}."]
source = "me"
licence = "none"
"""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("count = 3", 'count = "three"'), "mine.toml: .*count"),
        (("count = 3", ""), "mine.toml: .*count"),
        (("licence", "license"), "unknown field 'license', did you mean licence"),
        (('["a {}."]', '["a cat."]'), "needs exactly one {}"),
        (("count = 3", 'count = 3\nlabels = ["x"]'), "1 labels for 2 classes"),
        (("count = 3", "count = = 3"), "cannot be read"),
    ],
)
def test_a_card_of_ones_own_is_read_strictly(tmp_path, change, sentence):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert load_card(str(path)).classes == ("cat", "dog")
    path.write_text(GOOD.replace(*change))
    with pytest.raises(InputError, match=sentence):
        load_card(str(path))


def write_parquet(folder: Path, names: list[str] | None = None) -> None:
    images, labels = made()
    if names is not None:  # the file numbers its classes in an order of its own
        labels = np.array([names.index(CIFAR.classes[label]) for label in labels])
    table = arrow.table(
        {
            "img": [{"bytes": encoded(image), "path": f"{n}.png"} for n, image in enumerate(images)],
            "label": labels,
        }
    )
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    (folder / "data").mkdir(parents=True)
    parquet.write_table(table.slice(0, 10), folder / "data" / "test-00000-of-00002.parquet")
    parquet.write_table(table.slice(10), folder / "data" / "test-00001-of-00002.parquet")


def write_pickles(folder: Path) -> None:
    images, labels = made()
    planes = images.transpose(0, 3, 1, 2).reshape(COUNT, -1)
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    batch = {b"batch_label": b"testing batch 1 of 1", b"labels": labels.tolist(), b"data": planes, b"filenames": []}
    with (folder / "cifar-10-batches-py" / "test_batch").open("wb") as file:
        pickle.dump(batch, file, protocol=2)


def write_binary(folder: Path) -> None:
    images, labels = made()
    planes = images.transpose(0, 3, 1, 2).reshape(COUNT, -1)
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    records = np.concatenate([labels[:, None].astype(np.uint8), planes], 1)
    records.tofile(folder / "cifar-10-batches-bin" / "test_batch.bin")


def write_folders(folder: Path) -> None:
    images, labels = made()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "test" / CIFAR.classes[label].capitalize() / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


LAYOUTS = {
    "huggingface_parquet": write_parquet,
    "cifar_pickles": write_pickles,
    "cifar_binary": write_binary,
    "class_folders": write_folders,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_images_and_labels(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    found = find_images(CIFAR, tmp_path)
    images, labels = made()
    assert found.layout == layout and len(found) == COUNT == len(set(found.keys))
    expected = sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))
    got = sorted((int(found.labels[n]), np.asarray(found.open(n).convert("RGB")).tobytes()) for n in range(COUNT))
    assert got == expected
    assert find_images(CIFAR, tmp_path).fingerprint == found.fingerprint


def test_labels_are_joined_by_the_names_in_the_file(tmp_path):
    write_parquet(tmp_path, names=sorted(CIFAR.classes, reverse=True))
    assert np.array_equal(find_images(CIFAR, tmp_path).labels, made()[1])
    write_parquet(tmp_path / "odd", names=[*CIFAR.classes[:-1], "truck", "lorry"])
    with pytest.raises(InputError, match="'lorry' is no class of CIFAR-10"):
        find_images(CIFAR, tmp_path / "odd")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"labels": Evil()}))
    with pytest.raises(InputError, match="is not a CIFAR batch and was not loaded: it asks for"):
        find_images(CIFAR, tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("cifar-10-batches-py/test_batch", b"\x80\x02}q\x00.", "does not hold CIFAR batches"),
        ("cifar-10-batches-py/test_batch", b"junk", "was not loaded"),
        ("cifar-10-batches-bin/test_batch.bin", b"x" * 3074, "no multiple of 3,073"),
        ("test/airplane/1.png", b"", None),
        ("test/aeroplane/1.png", b"", "holds no test images of CIFAR-10 in a layout known"),
        (
            "nothing.txt",
            b"",
            "holds no test images of CIFAR-10 in a layout known to this card: webdataset, ",
        ),
    ],
)
def test_what_is_not_the_data_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    if sentence is None:
        assert len(find_images(CIFAR, tmp_path)) == 1
        return
    with pytest.raises(InputError, match=sentence):
        find_images(CIFAR, tmp_path)


def test_a_strange_class_folder_is_not_another_class(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "test" / "trukc").mkdir()
    with pytest.raises(InputError, match="'trukc' is no class of CIFAR-10; did you mean truck"):
        find_images(CIFAR, tmp_path)


def test_absent_data_says_where_it_is_had(tmp_path):
    with pytest.raises(
        InputError,
        match=r"CIFAR-10 is not at .*has nothing like it\. To have it: Fetch cifar-10-python.tar.gz.*--data; layouts",
    ):
        find_images(CIFAR, tmp_path / "none")


def test_parquet_with_other_columns_is_named(tmp_path):
    parquet.write_table(arrow.table({"picture": [b""], "klass": [1]}), tmp_path / "test-0.parquet")
    with pytest.raises(InputError, match="has the columns picture, klass"):
        find_images(CIFAR, tmp_path)


def test_the_train_split_is_found_beside_the_test_split(tmp_path):
    write_parquet(tmp_path)
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(
        (tmp_path / "data" / "test-00000-of-00002.parquet").read_bytes()
    )
    assert len(find_images(CIFAR, tmp_path, "train")) == 10
    assert isinstance(find_images(CIFAR, tmp_path, "train").open(0).fp, io.BytesIO)
