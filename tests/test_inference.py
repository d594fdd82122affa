"""`evaclip.load`: paths, pictures, tensors and captions to unit rows, batches that shrink, sentences for bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaclip
from evaclip import checkpoint
from evaclip.errors import InputError
from evaclip.inference import Batches, Model, in_threads, out_of_memory, read_image
from evaclip.models.clip import Clip
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.records import unstructured
from tests.conftest import OUT_OF_MEMORY

CAPTIONS = ["a long caption about a cat and its many, many friends", "dog", "", "a photo of a dog"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has not learned anything."""
    folder = tmp_path_factory.mktemp("run")
    config = eva02_tiny_digits()
    checkpoint.save(folder / "checkpoints", 1, {"model": Clip(config.model).state_dict()}, {})
    (folder / "config.json").write_text(json.dumps(unstructured(config)))
    return folder


@pytest.fixture
def model(run):
    return evaclip.load(run, device="cpu", batch_size=2)


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(random.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_paths_pictures_and_tensors_give_the_same_rows(model, pictures):
    rows = model.encode_image(pictures)
    assert rows.shape == (5, 64) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    opened = [Image.open(path) for path in pictures]
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened]
    preprocessing = model.encoder.preprocessing
    prepared = preprocessing.normalized(torch.stack([preprocessing.pixels(image) for image in opened]))
    mixed = [str(pictures[0]), opened[1], pixels[2], prepared[3], prepared[4]]
    for same in (opened, pixels, prepared, mixed, iter(pictures)):
        np.testing.assert_allclose(model.encode_image(same), rows, atol=1e-6)
    np.testing.assert_allclose(model.encode_image(pictures[2]), rows[2:3], atol=1e-6)


def test_captions_come_back_in_their_order(model):
    rows = model.encode_text(CAPTIONS * 20)
    expected = model.encoder.texts(CAPTIONS).numpy()
    np.testing.assert_allclose(rows, np.tile(expected, (20, 1)), atol=1e-6)
    np.testing.assert_allclose(model.encode_text("dog"), expected[1:2], atol=1e-6)


def test_nothing_gives_no_rows(model):
    assert model.encode_image([]).shape == (0, 64) and model.encode_text([]).shape == (0, 64)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_a_batch_that_does_not_fit_is_halved_and_stays_small(model, pictures, error):
    expected = model.encode_image(pictures)
    model = Model(model.encoder, batch_size=8)
    fits, sizes = model._image_rows, []

    def small_memory(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise error
        return fits(images)

    model._image_rows = small_memory
    np.testing.assert_allclose(model.encode_image(pictures), expected, atol=1e-6)
    assert sizes == [5, 2, 2, 1]
    np.testing.assert_allclose(model.encode_image(pictures), expected, atol=1e-6)
    assert sizes[4:] == [2, 2, 1]


def test_what_never_fits_and_what_is_no_lack_of_memory():
    def fails(error):
        def work(batch):
            raise error

        return work

    with pytest.raises(InputError, match="too small for a single item"):
        list(Batches(4).run(range(4), fails(torch.OutOfMemoryError("CUDA out of memory"))))
    with pytest.raises(RuntimeError, match="other"):
        list(Batches(4).run(range(4), fails(RuntimeError("other"))))
    with pytest.raises(InputError, match="at least one"):
        Batches(0)
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value)


@pytest.mark.parametrize("overlap", [False, True])
def test_threads_keep_the_order_and_read_only_so_far_ahead(overlap):
    asked = []

    def items():
        for number in range(100):
            asked.append(number)
            yield number

    results = in_threads(lambda number: number * 2, items(), 4, overlap=overlap)
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert len(asked) == (13 if overlap else 12)
    assert list(results) == list(range(20, 200, 2))


def test_bad_images_and_devices_are_one_sentence(model, run, tmp_path, pictures):
    (tmp_path / "text.png").write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(pictures[0].read_bytes()[:200])
    for path, says in (
        ("gone.png", "gone.png does not exist"),
        ("text.png", "text.png cannot be read as JPEG, PNG, WEBP"),
        ("cut.png", "cut.png cannot be read"),
        ("", "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            model.encode_image([pictures[0], tmp_path / path])
    with pytest.raises(InputError, match="40 x 30 pixels, more than 1,000"):
        read_image(pictures[0], max_pixels=1000)
    with pytest.raises(InputError, match="an image tensor is uint8"):
        model.encode_image(torch.zeros(1, 1, 16, 16))
    with pytest.raises(InputError, match="no device is called 'gpu'"):
        evaclip.load(run, device="gpu")


def test_the_example_of_the_readme_runs_in_a_fresh_process(run, pictures):
    code = (
        "import sys, evaclip\n"
        "assert 'torch' not in sys.modules\n"
        f"model = evaclip.load({str(run)!r})\n"
        f"images = model.encode_image([{str(pictures[0])!r}])\n"
        "texts = model.encode_text(['a red bicycle', 'snow'])\n"
        "print((images @ texts.T).shape, len(model.space_id), model.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 2) 32 EVA02-tiny-digits"
