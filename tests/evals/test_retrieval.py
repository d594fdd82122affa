"""Recall against a plain computation in float64, every layout with an oracle, and the command."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from evaclip import checkpoint
from evaclip.cli import main
from evaclip.config import EvalConfig
from evaclip.encoder import Encoder, Preprocessing, load_encoder
from evaclip.errors import InputError
from evaclip.evals.blocks import cache_of
from evaclip.evals.captioned import READERS, find_captioned
from evaclip.evals.features import Setting
from evaclip.evals.retrieval import (
    Retrieval,
    RetrievalConfig,
    image_to_text_ranks,
    load_retrieval_card,
    retrieval,
    retrieval_cards,
    retrieval_data,
    save_retrieval,
    text_to_image_ranks,
)
from evaclip.models.clip import Clip
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.records import unstructured
from tests.conftest import encoded

COUNT = 12


def unit(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize(("images", "captions"), [(1, 1), (40, 200), (300, 1100)])
def test_ranks_are_those_of_the_whole_matrix_in_float64(images, captions):
    random = np.random.default_rng(images)
    owners = np.sort(np.concatenate([np.arange(images), random.integers(0, images, captions - images)]))
    image, text = unit(images, 1), unit(captions, 2)
    scores = image.double().numpy() @ text.double().numpy().T
    expected_text = [(scores[:, t] >= scores[owners[t], t]).sum() - 1 for t in range(captions)]
    expected_image = [
        int((scores[i][owners != i] >= scores[i][owners == i].max()).sum()) if images > 1 else 0 for i in range(images)
    ]
    places = torch.from_numpy(owners)
    assert text_to_image_ranks(image, text, places).tolist() == expected_text
    assert image_to_text_ranks(image, text, places).tolist() == expected_image


def test_a_tie_counts_against_the_model():
    same = torch.ones(4, 3) / 3**0.5
    owners = torch.tensor([0, 1, 2, 3])
    assert text_to_image_ranks(same, same, owners).tolist() == [3, 3, 3, 3]
    assert image_to_text_ranks(same, same, owners).tolist() == [3, 3, 3, 3]
    assert image_to_text_ranks(same[:2], same, torch.tensor([0, 0, 0, 1])).tolist() == [1, 3]


def picture(number: int) -> bytes:
    """One colour, from which the oracle reads the number."""
    return encoded(np.full((24, 20, 3), 20 * number, np.uint8))


def captions_of(number: int) -> list[str]:
    """Five or six, as COCO has; some with the characters that break careless readers."""
    told = [
        f"picture, number {number}",
        f"{number} .jpg, they say",
        f"it is {number}",
        f'"{number}"',
        f"this: {number}",
    ]
    return told + ([f"once more {number}"] if number % 5 == 0 else [])


NAMES = [f"{number:03}.png" for number in range(COUNT)]


def write_images(folder: Path, names: list[str] = NAMES) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))


def karpathy(folder: Path, filepath: str = "", extra: bool = True) -> None:
    write_images(folder / "images" / filepath)
    entries = [
        {"filename": name, "split": "test", "sentences": [{"raw": c} for c in captions_of(number)]}
        | ({"filepath": filepath} if filepath else {})
        for number, name in enumerate(NAMES)
    ]
    other = {"filename": "x.png", "split": "restval", "sentences": [{"raw": "another split"}]}
    (folder / "dataset_coco.json").write_text(json.dumps({"images": [other, *entries], "dataset": "coco"}))


def karpathy_coco(folder: Path) -> None:
    karpathy(folder, "val2014")


def clip_benchmark_list(folder: Path) -> None:
    jpegs = [name.replace("png", "jpg") for name in NAMES]
    write_images(folder, jpegs)
    lines = [f"{name},{caption}" for number, name in enumerate(jpegs) for caption in captions_of(number)]
    (folder / "coco_test_karpathy.txt").write_text("image,caption\n" + "\n".join(lines) + "\n\n")


def coco(folder: Path, name: str = "coco_test_karpathy.json", more: int = 0) -> None:
    write_images(folder / "val2014")
    images = [{"id": 100 + number, "file_name": name} for number, name in enumerate(NAMES)]
    images += [{"id": 900 + number, "file_name": f"y{number}.png"} for number in range(more)]
    notes = [(100 + number, caption) for number in range(COUNT) for caption in captions_of(number)]
    notes = [notes[n] for n in np.random.default_rng(0).permutation(len(notes))] + [
        (900 + n, "no") for n in range(more)
    ]
    told = {"images": images, "annotations": [{"image_id": i, "caption": c} for i, c in notes]}
    (folder / "annotations").mkdir()
    (folder / "annotations" / name).write_text(json.dumps(told))


def coco_with_ids(folder: Path) -> None:
    coco(folder, "captions_val2014.json", more=3)
    (folder / "coco_test_ids.txt").write_text("".join(f"{100 + number}\n" for number in range(COUNT)))


def tokens(folder: Path) -> None:
    write_images(folder / "flickr30k-images")
    lines = [f"{name}#{n}\t{c}" for number, name in enumerate(NAMES) for n, c in enumerate(captions_of(number))]
    (folder / "results_20130124.token").write_text("\n".join([*lines, "other.png#0\tanother split"]))
    (folder / "coco_test.txt").write_text("\n".join(name.removesuffix(".png") for name in NAMES))


def parquet(folder: Path, column: str = "caption") -> None:
    (folder / "data").mkdir(parents=True)
    rows = [
        {"image": {"bytes": picture(number), "path": None}, column: captions_of(number), "split": "test"}
        for number in range(COUNT)
    ]
    rows.insert(3, {"image": {"bytes": picture(0), "path": None}, column: ["another split"], "split": "train"})
    for part in (0, 1):
        table = pyarrow.Table.from_pylist(rows[part * 7 : (part + 1) * 7])
        pyarrow.parquet.write_table(table, folder / "data" / f"test-{part:05}-of-00002.parquet")


def parquet_sentences(folder: Path) -> None:
    parquet(folder, "sentences")


def webdataset(folder: Path) -> None:
    (folder / "test").mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                for ending, data in (("png", picture(number)), ("txt", "\n".join(captions_of(number)).encode())):
                    info = tarfile.TarInfo(f"s{number:04}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


LAYOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "karpathy": (karpathy, "karpathy_json"),
    "karpathy with filepath": (karpathy_coco, "karpathy_json"),
    "list": (clip_benchmark_list, "clip_benchmark_list"),
    "coco": (coco, "coco_captions"),
    "coco and ids": (coco_with_ids, "coco_captions"),
    "tokens": (tokens, "flickr_tokens"),
    "parquet": (parquet, "huggingface_parquet"),
    "parquet of sentences": (parquet_sentences, "huggingface_parquet"),
    "tars": (webdataset, "webdataset_tars"),
}


class Oracle(nn.Module):
    """Features that carry the number of the picture, or `shift` more."""

    shift = 0

    def encode_image(self, images):
        return F.one_hot((images.mean((1, 2, 3)).round().long() + self.shift) % COUNT, COUNT).float()

    def encode_text(self, ids):
        return F.one_hot(ids[:, 0], COUNT).float()


@pytest.fixture
def oracle() -> Encoder:
    plain = Preprocessing(size=16, mean=(0.0, 0.0, 0.0), std=(20 / 255,) * 3)
    digits = [[int("".join(filter(str.isdigit, c))) for c in captions_of(n)] for n in range(COUNT)]
    assert all(number == n for n, found in enumerate(digits) for number in found)
    return Encoder(
        name="oracle", model=Oracle(), preprocessing=plain, device=torch.device("cpu"),
        tokenizer=lambda captions: torch.tensor([[int("0" + "".join(filter(str.isdigit, c)))] for c in captions]),
    )  # fmt: skip


CARD = """name = "coco"
title = "Few"
images = 12
captions = 63
source = "made"
licence = "none"
terms = "Make it."
[[reference]]
model = "EVA02-tiny-digits"
image_to_text = [1.0, 5.0, 12.34]
text_to_image = [1.0, 5.0, 10.0]
source = "made"
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_oracle_finds_everything_in_every_layout_and_nothing_in_a_permuted_one(tmp_path, oracle, layout):
    write, reader = LAYOUTS[layout]
    write(tmp_path / "data")
    (tmp_path / "few.toml").write_text(CARD)
    card = load_retrieval_card(str(tmp_path / "few.toml"))
    data = retrieval_data(card, tmp_path / "data")
    assert data.layout == reader and (len(data), len(data.captions)) == (COUNT, 63)
    told = {number: [c for c, o in zip(data.captions, data.owners, strict=True) if o == number] for number in range(12)}
    order = [int(np.asarray(data.open(number))[0, 0, 0]) // 20 for number in range(COUNT)]
    assert sorted(order) == list(range(COUNT))
    assert all(sorted(told[place]) == sorted(captions_of(number)) for place, number in enumerate(order))
    assert set(retrieval(oracle, card, data, Setting(batch=5)).metrics().values()) == {1.0}
    oracle.model.shift = 1
    assert retrieval(oracle, card, data).metrics()["image_to_text/recall@10"] == 0
    assert READERS[reader]("coco", tmp_path / "data").fingerprint == data.fingerprint


def test_the_shipped_cards_are_karpathys_splits():
    cards = {name: load_retrieval_card(name) for name in retrieval_cards()}
    assert {name: (card.images, card.captions) for name, card in cards.items()} == {
        "flickr30k": (1000, 5000), "coco": (5000, 25010),
    }  # fmt: skip
    assert all(len(card.reference) == 6 for card in cards.values())
    # EVA01-g-14's mean of the two R@1 is in another table of the same source: 80.37 and 52.93.
    for name, mean in (("flickr30k", 80.37), ("coco", 52.93)):
        (found,) = [r for r in cards[name].reference if r.model == "EVA01-g-14"]
        assert (found.image_to_text[0] + found.text_to_image[0]) / 2 == pytest.approx(mean, abs=0.011)


@pytest.fixture
def run(tmp_path) -> Path:
    config = eva02_tiny_digits()
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, {"model": Clip(config.model).state_dict()}, {})
    (tmp_path / "run" / "config.json").write_text(json.dumps(unstructured(config)))
    return tmp_path / "run"


def test_the_command_prints_both_ways_and_writes_what_it_takes_to_trust_it(tmp_path, run, capfd):
    karpathy(tmp_path / "data")
    (tmp_path / "few.toml").write_text(CARD)
    arguments = ["retrieval", "--dataset", str(tmp_path / "few.toml"), "--data", str(tmp_path / "data")]
    arguments += ["--model", str(run), "--workers", "0"]
    assert main(arguments) == 0
    said = capfd.readouterr().out
    assert "Few: EVA02-tiny-digits, step 7, 12 images, 63 captions" in said and "12.34" in said
    path = run / "scores" / "coco.json"
    record = json.loads(path.read_text())
    encoder = load_encoder(run)
    data = find_captioned("coco", tmp_path / "data")
    images = torch.cat([encoder.images(encoder.preprocessing.pixels(data.open(n))[None]) for n in range(COUNT)])
    scores = (images @ encoder.texts(list(data.captions)).T).double().numpy()
    top = scores.argsort(1)[:, ::-1]
    for k in (1, 5, 10):
        found = np.mean([any(data.owners[t] == i for t in top[i, :k]) for i in range(COUNT)])
        assert record["metrics"][f"image_to_text/recall@{k}"] == pytest.approx(found)
        found = np.mean([data.owners[t] in scores[:, t].argsort()[::-1][:k] for t in range(63)])
        assert record["metrics"][f"text_to_image/recall@{k}"] == pytest.approx(found)
    assert record["metrics"]["mean_recall"] == pytest.approx(
        np.mean([value for name, value in record["metrics"].items() if "@" in name])
    )
    assert not record["partial"] and record["data"]["layout"] == "karpathy_json"
    first = path.read_text()
    assert main([*arguments, "--batch", "5"]) == 0
    assert json.loads(path.read_text())["metrics"] == json.loads(first)["metrics"]
    assert main(["compare", str(path), str(path)]) == 0
    said = capfd.readouterr().out
    assert "text_to_image" in said and "recall@10" in said


def test_beside_the_training_it_yields_names_and_values(tmp_path, run):
    karpathy(tmp_path / "data")
    (tmp_path / "few.toml").write_text(CARD)
    part = RetrievalConfig(card=str(tmp_path / "few.toml"), data=tmp_path / "data")
    (built,) = EvalConfig(retrieval=(part,)).build().items()
    assert built[0] == "retrieval/coco" and isinstance(built[1], Retrieval)
    pairs = dict(built[1](load_encoder(run).model, torch.device("cpu"), tmp_path / "out"))
    assert len(pairs) == 7 and all(name.startswith("retrieval/coco/") for name in pairs)
    assert json.loads((tmp_path / "out" / "coco.json").read_text())["metrics"]["mean_recall"] == pytest.approx(
        pairs["retrieval/coco/mean_recall"]
    )
    (tmp_path / "data").rename(tmp_path / "COCO")
    with pytest.raises(InputError, match="COCO captions has 5,000 test images with 25,010 captions, 12 with 63"):
        EvalConfig(datasets=("coco",), data_root=tmp_path).build()


def test_what_is_not_whole_or_not_there_is_one_sentence(tmp_path, run, capfd):
    def refused(*more: str) -> str:
        arguments = ["retrieval", "--dataset", "coco", "--data", str(tmp_path / "data"), "--model", str(run)]
        assert main([*arguments, "--workers", "0", *more]) == 2
        return capfd.readouterr().err.strip().splitlines()[-1]

    assert "COCO captions is not at" in refused() and "did you mean flickr30k" in refused("--dataset", "flickr_30k")
    karpathy(tmp_path / "data")
    assert "has 5,000 test images with 25,010 captions, 12 with 63 were found in layout karpathy_json" in refused()
    (tmp_path / "data" / "images" / NAMES[3]).write_bytes(b"junk")
    words = ["retrieval", "--dataset", "coco", "--data", str(tmp_path / "data"), "--model", str(run), "--workers", "0"]
    assert main([*words, "--allow-partial"]) == 0
    said = capfd.readouterr().out
    assert "(partial data)" in said and "1 files could not be read; they are listed in" in said
    assert "--batch must be at least 1" in refused("--batch", "0")
    (tmp_path / "data" / "images" / NAMES[3]).unlink()
    assert "11 with" in refused()
    assert main([*words, "--allow-partial"]) == 0
    assert "could not be read" not in capfd.readouterr().out


def test_a_damaged_image_goes_to_the_ledger_with_its_captions_and_too_many_are_no_score(tmp_path, oracle):
    karpathy(tmp_path / "data")
    (tmp_path / "few.toml").write_text(CARD)
    card = load_retrieval_card(str(tmp_path / "few.toml"))
    victim = tmp_path / "data" / "images" / NAMES[5]  # with six captions
    victim.write_bytes(b"junk")
    data = retrieval_data(card, tmp_path / "data")
    with pytest.raises(InputError, match=rf"1 of 12 files of Few cannot be read, {NAMES[5]} for one"):
        retrieval(oracle, card, data)
    result = retrieval(oracle, card, data, Setting(allow_partial=True))
    assert set(result.metrics().values()) == {1.0} and list(result.bad) == [5]
    record = json.loads(save_retrieval(result, oracle, tmp_path / "out").read_text())
    assert (record["images"], record["captions"], record["partial"]) == (11, 57, True)
    assert record["coverage"] == {"scored": 11, "bad": 1, "listed": 12}
    (line,) = (tmp_path / "out" / "coco.bad.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == NAMES[5]
    for name in NAMES:
        (tmp_path / "data" / "images" / name).write_bytes(b"junk")
    with pytest.raises(InputError, match="no file of Few can be read"):
        retrieval(oracle, card, retrieval_data(card, tmp_path / "data"), Setting(allow_partial=True))
    for number, name in enumerate(NAMES):
        (tmp_path / "data" / "images" / name).write_bytes(picture(number))
    save_retrieval(retrieval(oracle, card, retrieval_data(card, tmp_path / "data")), oracle, tmp_path / "out")
    assert not (tmp_path / "out" / "coco.bad.jsonl").exists()


def test_a_second_evaluation_encodes_nothing_and_other_captions_are_encoded_anew(tmp_path, oracle):
    karpathy(tmp_path / "data")
    (tmp_path / "few.toml").write_text(CARD)
    card = load_retrieval_card(str(tmp_path / "few.toml"))
    calls = {"encode_image": 0, "encode_text": 0}

    def counted(tower: str, usual: Callable) -> Callable:
        def call(rows):
            calls[tower] += 1
            return usual(rows)

        return call

    for tower in calls:
        setattr(oracle.model, tower, counted(tower, getattr(oracle.model, tower)))
    setting = Setting(batch=5, cache=cache_of(oracle, tmp_path / "cache"))
    plain = retrieval(oracle, card, retrieval_data(card, tmp_path / "data"), Setting(batch=5))
    assert calls == {"encode_image": 3, "encode_text": 13}
    for _ in range(2):
        result = retrieval(oracle, card, retrieval_data(card, tmp_path / "data"), setting)
        assert calls == {"encode_image": 6, "encode_text": 26}
        assert all(np.array_equal(result.ranks[way], plain.ranks[way]) for way in plain.ranks)
    assert result.times.cached == 12 and result.times.images == 0
    path = tmp_path / "data" / "dataset_coco.json"
    path.write_text(path.read_text().replace("it is 7", "it was 7"))
    retrieval(oracle, card, retrieval_data(card, tmp_path / "data"), setting)
    assert calls == {"encode_image": 9, "encode_text": 39}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("dataset_coco.json", "{", "karpathy_json, but"),
        ("dataset_coco.json", '{"images": [{"split": "test"}]}', "filename"),
        ("dataset_coco.json", '{"images": []}', "none of the 0 images"),
        ("coco_test_karpathy.txt", "image,caption\nno image here", "has no image"),
        ("coco_test_karpathy.txt", "image,caption\n../../etc/x.jpg,stolen", "outside of the folder"),
        ("coco_test_karpathy.txt", "image,caption\n/etc/x.jpg,stolen", "outside of the folder"),
        ("captions_val2014.json", "{}", "ids of the test split, is needed"),
        ("results_20130124.token", "x", "the names of the test images, is needed"),
        ("0.tar", "junk", "webdataset_tars"),
        ("test.parquet", "junk", "huggingface_parquet"),
    ],
)
def test_a_damaged_or_hostile_list_is_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        find_captioned("coco", tmp_path)


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    karpathy(tmp_path)
    monkeypatch.setattr("evaclip.evals.layouts.tree.MAX_PIXELS", 400)
    with pytest.raises(ValueError, match="20 x 24 is more than 400 pixels"):
        find_captioned("coco", tmp_path).open(0)
    assert isinstance(Image.open(tmp_path / "images" / NAMES[0]), Image.Image)


def test_features_that_are_not_finite_are_no_score(tmp_path, oracle):
    karpathy(tmp_path / "data")
    (tmp_path / "few.toml").write_text(CARD)
    card = load_retrieval_card(str(tmp_path / "few.toml"))
    oracle.model.encode_image = lambda images: torch.full((len(images), COUNT), torch.nan)
    with pytest.raises(InputError, match="not finite: its weights have diverged"):
        retrieval(oracle, card, retrieval_data(card, tmp_path / "data"))
