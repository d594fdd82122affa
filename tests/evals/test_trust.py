"""What makes a number one to trust: borders, ties, alarms, published scores, ledgers, caches."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaclip.cli import main
from evaclip.errors import InputError
from evaclip.evals import blocks
from evaclip.evals.alarm import permutation_alarm
from evaclip.evals.blocks import Block, cache_of
from evaclip.evals.card import Card, load_card
from evaclip.evals.classifier import class_embeddings
from evaclip.evals.features import Setting
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.protocol import PROTOCOLS
from evaclip.evals.scores import OF_THE_RUN, real_hits
from evaclip.evals.suite import ROBUSTNESS, TWELVE, chosen, summary, verified
from evaclip.evals.zero_shot import zero_shot
from tests.evals.oracle import colour, oracle, picture, write_picture

OBJECTNET, A, CIFAR = (load_card(n) for n in ("objectnet", "imagenet_a", "cifar10"))


def short(name: str) -> Card:
    """A card with two of its templates, where the number of classes is what matters."""
    return replace(load_card(name), templates=load_card(name).templates[:2])


IMAGENET = short("imagenet")
PARTIAL = Setting(allow_partial=True)


def made(labels: list[int], shown: list[int] | None = None, name: str = "x") -> LabelledImages:
    """Pictures of the classes in `shown`, with the labels in `labels`."""
    pictures = shown if shown is not None else labels
    keys = [f"{n:05}" for n in range(len(labels))]
    return LabelledImages("made", keys, np.array(labels), lambda n: picture(pictures[n]), name)


def bordered(number: int) -> Image.Image:
    """A small picture whose border of 2 px is most of it: only a cut shows the class."""
    image = Image.new("RGB", (8, 8), colour(7))
    image.paste(colour(number), (2, 2, 6, 6))
    return image


def test_testbed_cuts_objectnets_border_and_eva_does_not():
    labels = [3, 50, 112]
    images = LabelledImages("made", ["a", "b", "c"], np.array(labels), lambda n: bordered(labels[n]), "x")
    scores = {
        name: zero_shot(oracle(OBJECTNET), OBJECTNET, images, replace(PARTIAL, protocol=protocol)).accuracy(1)
        for name, protocol in PROTOCOLS.items()
    }
    assert scores == {"eva": 0, "openai": 0, "testbed": 1, "pe": 0}
    assert zero_shot(oracle(A), A, images, replace(PARTIAL, protocol=PROTOCOLS["testbed"])).view.border == 0


def test_protocols_squash_cut_or_leave_it_to_the_model():
    wide = Image.new("RGB", (48, 16), colour(7))
    wide.paste(colour(3), (16, 0, 32, 16))  # a centre crop sees class 3 alone, a squash more of class 7
    images = LabelledImages("made", ["a"], np.array([3]), lambda n: wide, "x")

    def score(name: str, own: str) -> float:
        return zero_shot(oracle(A, own), A, images, replace(PARTIAL, protocol=PROTOCOLS[name])).accuracy(1)

    assert [score("eva", "shortest"), score("eva", "squash"), score("openai", "squash")] == [1, 0, 1]
    assert [score("testbed", "squash"), score("pe", "shortest")] == [1, 0]


@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_a_model_that_has_diverged_gets_no_score(tower):
    model = oracle(A)
    setattr(model.model, tower, lambda rows: torch.full((len(rows), 3), torch.nan))
    with pytest.raises(InputError, match="features that are not finite: its weights have diverged"):
        zero_shot(model, A, made([1, 2]), PARTIAL)


def test_two_classes_of_one_name_share_a_row_and_the_first_wins():
    missiles = [n for n, name in enumerate(IMAGENET.classes) if name == "missile"]
    assert missiles == [657, 744] and IMAGENET.classes[836] == IMAGENET.classes[837] == "sunglasses"
    assert len(set(IMAGENET.classes)) == 998
    weights = class_embeddings(oracle(IMAGENET), IMAGENET)
    assert torch.equal(weights[657], weights[744])
    result = zero_shot(oracle(IMAGENET), IMAGENET, made([657, 744, 744], [657, 657, 657]), PARTIAL)
    assert result.predictions.tolist() == [657] * 3 and result.ranks.tolist() == [0, 1, 1]
    assert result.per_class() == {"missile": 1.0, f"missile ({IMAGENET.labels[744]})": 0.0}


def test_a_and_r_are_columns_of_imagenets_classifier(tmp_path):
    whole = class_embeddings(oracle(IMAGENET), IMAGENET)
    for name in ("imagenet_a", "imagenet_r"):
        card = short(name)
        places = [IMAGENET.labels.index(wnid) for wnid in card.labels]
        assert [IMAGENET.classes[place] for place in places] == list(card.classes)
        model = oracle(IMAGENET)
        assert torch.equal(class_embeddings(model, card), whole[places])


def test_real_labels_judge_the_same_predictions():
    import timm

    path = Path(timm.__file__).parent / "data" / "_info" / "imagenet_real_labels.json"
    real = json.loads(path.read_text())
    several = next(n for n, labels in enumerate(real) if len(labels) > 1)
    keys = [f"val/n0/ILSVRC2012_val_{n + 1:08}.JPEG" for n in (0, several, several, 4)]
    assert real[0] == []
    predictions = np.array([1, real[several][1], 999 if 999 not in real[several] else 0, real[4][0]])
    assert real_hits(keys, predictions).tolist() == [True, False, True]
    assert len(real_hits(["some.jpg"], predictions[:1])) == 0
    assert sum(not labels for labels in real) == 3163 and len(real) == 50_000


def shuffled(classes: int, each: int, accuracy: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True labels, and predictions of a model that is right so often and else anywhere."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    wrong = random.integers(0, classes, len(labels))
    return labels, np.where(random.random(len(labels)) < accuracy, labels, wrong)


@pytest.mark.parametrize("accuracy", [0.0, 0.05, 0.5, 0.95])
@pytest.mark.parametrize(("classes", "each"), [(10, 20), (10, 1000), (200, 10), (1000, 10)])
def test_no_alarm_for_a_model_that_is_merely_bad(classes, each, accuracy):
    labels, predictions = shuffled(classes, each, accuracy)
    assert permutation_alarm(labels, predictions, tuple(map(str, range(classes)))) is None


@pytest.mark.parametrize(("classes", "each"), [(10, 20), (200, 10), (1000, 10)])
def test_an_alarm_when_folders_were_sorted_as_text(classes, each):
    """ImageNet-V2's trap: 0, 1, 10, 100, ... taken for 0, 1, 2, 3, ..."""
    labels, predictions = shuffled(classes, each, 0.7)
    as_text = np.array(sorted(range(classes), key=str)) if classes > 10 else np.random.default_rng(1).permutation(10)
    alarm = permutation_alarm(np.argsort(as_text)[labels], predictions, tuple(map(str, range(classes))))
    assert alarm is not None and "the labels are shuffled" in alarm


def test_an_alarm_names_the_few_classes_that_are_exchanged():
    """Kinetics-700's trap: cleaned folder names sort otherwise for five classes of 700."""
    card = load_card("kinetics700")
    cleaned = sorted(range(700), key=lambda n: card.classes[n].replace("(", "").replace(")", "").replace(" ", "_"))
    moved = [n for n in range(700) if cleaned[n] != n]
    labels, predictions = shuffled(700, 20, 0.8)
    alarm = permutation_alarm(np.argsort(cleaned)[labels], predictions, card.classes)
    assert alarm is not None and "labels of 5 classes are exchanged" in alarm and len(moved) == 5
    assert card.classes[moved[0]] in alarm
    # A model that takes one class for another, and not the other for the one, is a model that errs.
    predictions = np.where(labels == 3, 4, labels)
    assert permutation_alarm(labels, predictions, card.classes) is None


def record_of(card, correct: float, partial: bool = False, **metrics: float) -> dict:
    return {
        "dataset": card.name, "headline": card.headline, "partial": partial, "notes": [], "model": {"name": "m"},
        "metrics": {"top1": correct, **metrics}, "coverage": {"bad": 0},
    }  # fmt: skip


@pytest.mark.parametrize("name", TWELVE)
def test_the_published_scores_verify_and_others_do_not(name):
    card = load_card(name)
    for reference in card.reference:
        scores = {n: getattr(reference, n) for n in ("top1", "top5", "mean_top1_top5") if getattr(reference, n)}
        for shift, agrees in ((0, True), (card.tolerance, True), (card.tolerance + 0.02, False)):
            record = record_of(card, 0.0) | {"metrics": {n: (v + shift) / 100 for n, v in scores.items()}}
            checks = verified(record, card, reference.model)
            assert len(checks) == len(scores) and all(check["agrees"] == agrees for check in checks)


def test_average_and_gap_are_the_papers():
    """EVA02-L-14-336: 79.5 over six sets, a gap of 0.9 (arXiv 2303.15389, table 3)."""
    records = []
    for name in ROBUSTNESS:
        card = load_card(name)
        score = next(r.top1 for r in card.reference if r.model == "EVA02-L-14-336")
        records.append(record_of(card, (score or 0) / 100))
    found = summary(records)
    assert found["average"] == pytest.approx(79.5, abs=0.06) and found["gap"] == pytest.approx(0.9, abs=0.06)
    assert not found["is_the_twelve"] and found["average_of"] == 6
    assert summary(records[1:])["gap"] is None
    every = [record_of(load_card(n), 0.5, mean_top1_top5=0.7) for n in TWELVE]
    assert summary(every)["is_the_twelve"] and summary(every)["average"] == pytest.approx((9 * 50 + 3 * 70) / 12)
    assert not summary([*every[:-1], every[-1] | {"partial": True}])["is_the_twelve"]
    assert [card.name for card in chosen("all")] == list(TWELVE)
    with pytest.raises(InputError, match="no benchmark is named"):
        chosen(",")


def same(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in OF_THE_RUN}


class StopError(RuntimeError):
    """Stands for a signal."""


def test_an_interrupted_evaluation_goes_on_and_a_second_one_encodes_nothing(tmp_path):
    labels = [n % 200 for n in range(50)]
    images, model = made(labels), oracle(A)
    setting = Setting(batch=8, cache=cache_of(model, tmp_path), allow_partial=True)
    plain = zero_shot(model, A, images, Setting(batch=8, allow_partial=True)).record({"name": "m"})
    reader = model.model
    usual = reader.encode_image

    def stopping(pixels: torch.Tensor) -> torch.Tensor:
        if reader.calls == before + 3:
            raise StopError
        return usual(pixels)

    before, reader.encode_image = reader.calls, stopping
    with pytest.raises(StopError):
        zero_shot(model, A, images, setting)
    reader.encode_image = usual
    before = reader.calls
    assert same(zero_shot(model, A, images, setting).record({"name": "m"})) == same(plain)
    assert reader.calls - before == 7 - 3
    assert same(zero_shot(model, A, images, setting).record({"name": "m"})) == same(plain)
    assert reader.calls - before == 7 - 3
    for path in sorted(tmp_path.glob("images-*/*.safetensors"))[:2]:  # a bit flips, a file is cut
        data = bytearray(path.read_bytes())
        data[-1] ^= 64
        path.write_bytes(data if path.name.startswith("000000000") else data[:-9])
    assert same(zero_shot(model, A, images, setting).record({"name": "m"})) == same(plain)
    assert reader.calls - before == 7 - 3 + 2


def test_the_cache_knows_weights_data_view_and_prompts(tmp_path):
    images, model = made([1, 2, 3]), oracle(A)

    def encoded(images: LabelledImages = images, card=A, **change) -> int:
        before = model.model.calls
        cache = cache_of(model, tmp_path)
        zero_shot(model, card, images, replace(Setting(cache=cache, allow_partial=True), **change))
        return model.model.calls - before

    assert [encoded(), encoded()] == [1, 0]
    assert encoded(protocol=PROTOCOLS["pe"]) == 1 and encoded(made([1, 2, 3], name="y")) == 1
    assert encoded(replace(images, stamp="written again")) == 1
    assert encoded(card=replace(A, templates=("a {}.",))) == 0  # other prompts, the same images
    with torch.no_grad():
        model.model.anything.add_(1)
    assert encoded() == 1


def test_two_commands_may_keep_the_same_block_at_once(tmp_path, monkeypatch):
    """As a probe and a zero-shot score of one data set do, which share its test images."""
    block, usual, others = Block(np.arange(3), torch.eye(3), {}), blocks.save_file, [1]

    def overtaken(*arguments):
        usual(*arguments)
        if others:
            others.pop()
            list(kept())

    def kept():
        return blocks.kept_blocks([range(3)], tmp_path, lambda missing: [block])

    monkeypatch.setattr(blocks, "save_file", overtaken)
    assert [cached for _, cached in kept()] == [False]
    assert [cached for _, cached in kept()] == [True] and len(list(tmp_path.iterdir())) == 1


def test_the_classifier_is_shared_over_the_imagenet_family(tmp_path):
    model, encoded = oracle(IMAGENET), []
    usual = model.model.encode_text
    model.model.encode_text = lambda rows: (encoded.append(len(rows)), usual(rows))[1]
    cache = cache_of(model, tmp_path)
    for name in ("imagenet_a", "imagenet_r", "imagenet", "imagenet_v2", "imagenet_sketch"):
        class_embeddings(model, short(name), cache)
    assert sum(encoded) == 998 * 2  # each name once, whichever benchmark came first
    plain = class_embeddings(model, IMAGENET)
    assert torch.equal(class_embeddings(model, IMAGENET, cache), plain)
    for path in tmp_path.glob("classes-*"):
        path.write_bytes(b"junk")
    assert torch.equal(class_embeddings(model, IMAGENET, cache), plain)


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """CIFAR-10 in class folders, three pictures of each class; the command line's model is the oracle."""
    monkeypatch.setattr("evaclip.evals.command.load_encoder", lambda source, device="cpu": oracle(CIFAR))
    for number, name in enumerate(CIFAR.classes):
        for place in range(3):
            write_picture(tmp_path / "data" / "cifar-10" / "test" / name / f"{place}.png", number)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "cifar-10"


WORDS = ["zeroshot", "--dataset", "cifar10", "--workers", "0", "--allow-partial"]


def test_bad_files_are_listed_counted_and_never_replaced(cifar, capfd):
    (cifar / "test" / "cat" / "1.png").write_bytes(b"\x89PNG junk")
    (cifar / "test" / "dog" / "2.png").write_bytes(b"")
    assert main([*WORDS[:-1]]) == 2
    assert "CIFAR-10 has 10,000 test images" in capfd.readouterr().err
    assert main([*WORDS, "--model", "m"]) == 0
    assert "2 files could not be read" in capfd.readouterr().out
    record = json.loads(Path("scores/m/cifar10.json").read_text())
    assert record["coverage"] == {"scored": 28, "bad": 2, "listed": 10_000, "share": 0.0028}
    assert record["images"] == 28 and record["partial"] and record["metrics"]["top1"] == 1
    ledger = [json.loads(line) for line in Path("scores/m/cifar10.bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in ledger] == ["cat/1.png", "dog/2.png"] and all(line["reason"] for line in ledger)
    arrays = np.load("scores/m/cifar10.npz")
    assert len(arrays["keys"]) == len(arrays["labels"]) == 28 and "cat/1.png" not in arrays["keys"].tolist()
    assert np.array_equal(arrays["labels"], arrays["predictions"])
    again = dict(record)  # the ledger comes from the cache too
    assert main([*WORDS, "--model", "m"]) == 0
    assert same(json.loads(Path("scores/m/cifar10.json").read_text())) == same(again)
    card = replace(CIFAR, count=30)
    with pytest.raises(InputError, match=r"2 of 30 files of CIFAR-10 cannot be read, cat/1\.png for one"):
        zero_shot(oracle(CIFAR), card, find_images(card, cifar))


def test_shuffled_labels_raise_the_alarm_and_the_result_is_kept(cifar, capfd):
    names = [*CIFAR.classes[1:], CIFAR.classes[0]]
    for old in CIFAR.classes:
        (cifar / "test" / old).rename(cifar / "test" / f".{old}")
    for old, new in zip(CIFAR.classes, names, strict=True):
        (cifar / "test" / f".{old}").rename(cifar / "test" / new)
    assert main([*WORDS, "--model", "m"]) == 2
    said = capfd.readouterr()
    assert "ALARM: the labels are shuffled: 0.0% of the predictions agree with them, 100.0% would" in said.out
    assert "the labels are shuffled" in said.err and "written to scores/m" in said.err
    assert json.loads(Path("scores/m/cifar10.json").read_text())["alarm"].startswith("the labels are shuffled")


def test_verify_compares_with_the_card_and_says_why(cifar, tmp_path, capfd, monkeypatch):
    shipped = (Path(__file__).parents[2] / "zero_shot" / "cifar10.toml").read_text()
    (tmp_path / "few.toml").write_text(shipped.replace("count = 10000", "count = 30").replace("= 1000", "= 3"))
    words = ["zeroshot", "--dataset", "few.toml", "--data", str(cifar), "--workers", "0", "--out", "o", "--verify"]
    assert main(words) == 2
    assert "has no published score of 'oracle'" in capfd.readouterr().err
    assert main([*words, "--reference", "EVA02-B-16"]) == 2
    said = capfd.readouterr()
    assert "top1 100.00, published 98.46: DIFFERS" in said.out
    assert "top1 is 100.00, published 98.46 (open_clip docs/openclip_results.csv): data, prompts and" in said.err
    (tmp_path / "few.toml").write_text((tmp_path / "few.toml").read_text().replace("top1 = 98.46", "top1 = 99.97"))
    assert main([*words, "--reference", "EVA02-B-16"]) == 0
    assert "top1 100.00, published 99.97: agrees" in capfd.readouterr().out
    assert json.loads(Path("o/cifar10.json").read_text())["verified"][0]["agrees"]
    assert main([*WORDS, "--verify", "--reference", "EVA02-B-16"]) == 2
    assert "a score from partial data cannot be verified" in capfd.readouterr().err


def test_explain_prints_what_a_score_would_be_made_of(cifar, capfd):
    assert main([*WORDS, "--explain"]) == 0
    said = capfd.readouterr().out
    for line in (
        "layout        class_folders", "images        30 of 10,000, 3 to 3 of each class",
        "classes       10: 'airplane'",
        "templates     18: 'a photo of a {}.'", "protocol      eva", "shortest side to 16 px, bicubic",
        "unlike        pe: both sides to 16 px", "published     EVA02-B-16: top1 98.46",
    ):  # fmt: skip
        assert line in said
    assert not Path("scores").exists()
    assert main(["zeroshot", "--dataset", "imagenet", "--explain"]) == 2
    assert "ImageNet-1K is not at data/imagenet" in (err := capfd.readouterr().err) and "image-net.org" in err


def test_clip_benchmarks_schema_is_written_beside_our_own(cifar):
    assert main([*WORDS, "--model", "m", "--format", "clip_benchmark"]) == 0
    record = json.loads(Path("scores/m/clip_benchmark/cifar10.json").read_text())
    assert record == {
        "dataset": "cifar10", "model": "oracle", "pretrained": "oracle", "task": "zeroshot_classification",
        "metrics": {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}, "language": "en",
    }  # fmt: skip


def test_several_are_all_found_before_the_first_is_scored(cifar, capfd):
    assert main(["zeroshot", "--dataset", "cifar10,cifar100", "--workers", "0"]) == 2
    said = capfd.readouterr().err
    assert "2 of 2 benchmarks cannot be scored" in said and "cifar100: CIFAR-100 is not at data/cifar100" in said
    assert main(["zeroshot", "--dataset", "all", "--workers", "0", "--allow-partial", "--model", "m"]) == 0
    said = capfd.readouterr()
    assert "ImageNet-V2 (matched frequency) is not at data/imagenet_v2" in said.err and "average of 1" not in said.out
    assert main(["zeroshot", "--dataset", "cifar10,c10", *WORDS[3:], "--model", "m"]) == 0
    assert "average of 1 benchmarks: 100.00" in capfd.readouterr().out
    assert json.loads(Path("scores/m/summary.json").read_text())["partial"] == ["cifar10", "cifar10"]
    assert main(["zeroshot", "--dataset", "cifar10,cifar100", "--data", "x"]) == 2
    assert "--data names the folder of one benchmark" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--splits", "4"], None),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--dataset", "ucf101", "--data", "data", "--splits", "1,4"], "has the splits 1 to 3"),
        (["--dataset", "cifar13"], "no benchmark is called 'cifar13'; did you mean cifar10"),
    ],
)
def test_wrong_words_are_one_sentence(cifar, capfd, words, sentence):
    Path("data/testlist01.txt").write_text("")
    Path("data/testlist04.txt").write_text("")
    assert main([*WORDS, *words]) == (2 if sentence else 0)
    assert sentence is None or sentence in capfd.readouterr().err


def test_a_card_of_ten_lines_scores_pictures_of_ones_own(tmp_path, monkeypatch, capfd):
    (tmp_path / "names.tsv").write_text("# mine\nlabel\tclass\nn1\tcat\nn2\tsmall dog\n")
    (tmp_path / "my_card.toml").write_text(
        'name = "mine"\ntitle = "Mine"\ncount = 2\nlayouts = ["class_folders"]\nclass_list = "names.tsv"\n'
        'template_list = "lists/imagenet_templates.txt"\nsource = "me"\nlicence = "none"\n'
    )
    card = load_card(str(tmp_path / "my_card.toml"))
    assert card.classes == ("cat", "small dog") and len(card.templates) == 80
    monkeypatch.setattr("evaclip.evals.command.load_encoder", lambda source, device="cpu": oracle(card))
    for number, folder in enumerate(("N1", "n2")):
        write_picture(tmp_path / "pictures" / folder / "a.png", number)
    words = ["zeroshot", "--dataset", str(tmp_path / "my_card.toml"), "--data", str(tmp_path / "pictures")]
    assert main([*words, "--workers", "0", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "mine.json").read_text())["metrics"] == {"top1": 1.0}
    (tmp_path / "names.tsv").write_text("label\tklass\nn1\tcat\n")
    assert main(words) == 2
    assert "needs a head of class, label, also" in capfd.readouterr().err
    (tmp_path / "names.tsv").unlink()
    assert main(words) == 2
    assert "names the list names.tsv, which cannot be read" in capfd.readouterr().err
