"""UCF-101 and Kinetics: lists, names, missing clips, frames, and the cache of frames."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaclip.cli import main
from evaclip.errors import InputError
from evaclip.evals.card import load_card
from evaclip.evals.features import Setting
from evaclip.evals.layouts import find_images
from evaclip.evals.layouts.tree import Tree
from evaclip.evals.layouts.video import BadVideoError, places, sampled_frames
from evaclip.evals.protocol import PROTOCOLS
from evaclip.evals.zero_shot import check_count, zero_shot
from tests.evals.oracle import oracle, seen, write_picture, write_video
from tests.evals.test_layouts import check

UCF = load_card("ucf101")
K400, K700 = load_card("k400"), load_card("kinetics-700")
# Folder and list spell the class of the handstand in two ways.
CLIPS = ("Archery", "HandstandPushups", "YoYo", "HammerThrow", "Hammering")
PARTIAL = Setting(allow_partial=True)


def ucf(folder: Path, suffix: str = ".avi") -> tuple[int, ...]:
    numbers = []
    lines: list[str] = []
    others: list[str] = []
    for place, name in enumerate(CLIPS):
        number = UCF.labels.index(name)
        spelled = name.replace("Handstand", "HandStand")
        stem = f"v_{spelled}_g0{place + 1}_c01"
        write = write_video if suffix == ".avi" else write_picture
        write(folder / "UCF-101" / name / f"{stem}{suffix}", number)
        write(folder / "UCF-101" / name / f"v_{spelled}_g20_c01{suffix}", number)  # of another split
        lines.append(f"{spelled}/{stem}.avi")
        others.append(f"{spelled}/v_{spelled}_g20_c01.avi")
        numbers.append(number)
    (folder / "ucfTrainTestlist").mkdir()
    (folder / "ucfTrainTestlist" / "testlist01.txt").write_text("\n".join(lines))
    (folder / "ucfTrainTestlist" / "testlist02.txt").write_text("\n".join(others))
    (folder / "ucfTrainTestlist" / "trainlist01.txt").write_text("\n".join(f"{line} 1" for line in others))
    return tuple(numbers)


@pytest.mark.parametrize("suffix", [".avi", ".jpg"])
def test_ucf_takes_the_clips_of_its_list(tmp_path, suffix):
    numbers = ucf(tmp_path, suffix)
    found = find_images(UCF, tmp_path)
    check(found, numbers)
    assert all("_g0" in key for key in found.keys) and found.listed is not None and found.listed.sum() == 5
    assert all("_g20" in key for key in find_images(UCF, tmp_path, "2").keys)
    assert len(find_images(UCF, tmp_path, "1,2")) == 10
    assert bool(found.notes) == (suffix == ".jpg")
    assert zero_shot(oracle(UCF), UCF, found, PARTIAL).accuracy(1) == 1
    with pytest.raises(InputError, match=r"has no testlist03\.txt"):
        find_images(UCF, tmp_path, "3")


def test_a_folder_of_frames_by_class_is_accepted(tmp_path):
    numbers = tuple(UCF.labels.index(name) for name in CLIPS)
    for number in numbers:
        write_picture(tmp_path / "val" / UCF.labels[number] / "a.jpg", number)
    check(find_images(UCF, tmp_path), numbers)


# Parentheses, an apostrophe, capitals, and names that sort elsewhere once these are gone.
SPORTS = ("curling (sport)", "curling eyelashes", "curling hair", "hugging (not baby)", "hugging baby",
          "massaging person's head", "passing American football (in game)", "yoga")  # fmt: skip


def cleaned(label: str) -> str:
    """How vissl names its folders."""
    return label.replace("(", "").replace(")", "").replace(" ", "_")


@pytest.mark.parametrize("spelling", [str, cleaned, str.lower])
def test_kinetics_folders_are_joined_by_name_in_every_spelling(tmp_path, spelling):
    labels = [label for label in SPORTS if label in K700.classes]
    assert len(labels) >= 7
    numbers = tuple(K700.classes.index(label) for label in labels)
    for number, label in zip(numbers, labels, strict=True):
        write_picture(tmp_path / "val_images" / spelling(label) / "abcdefghijk.jpg", number)
    check(find_images(K700, tmp_path), numbers)


def kinetics(folder: Path, missing: int = 1) -> list[int]:
    """Clips as CVDF has them, flat beside their list; the last `missing` are listed and not there."""
    ids = [f"-b_{place}efghi_k"[:11].ljust(11, "x") for place in range(6)]
    numbers = [
        K400.classes.index(label) for label in ("yoga", "abseiling", "hurling (sport)", "zumba", "yoga", "zumba")
    ]
    rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
    for place, (name, number) in enumerate(zip(ids, numbers, strict=True)):
        rows.append(f"{K400.classes[number]},{name},{place * 3},{place * 3 + 10},val,0")
        if place < len(ids) - missing:
            write_video(folder / "val" / f"{name}_{place * 3:06}_{place * 3 + 10:06}.mp4", number)
    write_video(folder / "val" / "unlisted_id_000001_000011.mp4", 3)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "val.csv").write_text("\n".join(rows))
    return numbers[: len(ids) - missing]


def test_kinetics_csv_joins_clips_by_id_and_counts_those_that_are_missing(tmp_path):
    numbers = kinetics(tmp_path)
    found = find_images(K400, tmp_path)
    check(found, tuple(numbers))
    with pytest.raises(
        InputError, match=r"19,881 test videos, 5 of 6 listed test videos were found .* --allow-partial"
    ):
        check_count(K400, found)
    result = zero_shot(oracle(K400), K400, found, PARTIAL)
    record = result.record({"name": "oracle"})
    assert record["partial"] and record["coverage"]["share"] == round(5 / 6, 6)
    assert record["coverage"]["least_class"] == "zumba" and record["coverage"]["least_class_share"] == 0.5


def test_a_card_of_few_videos_bears_a_few_missing_ones(tmp_path):
    from dataclasses import replace

    kinetics(tmp_path)
    found = find_images(K400, tmp_path)
    check_count(replace(K400, count=6, coverage=0.8), found)
    with pytest.raises(InputError):
        check_count(replace(K400, count=6, coverage=0.9), found)
    with pytest.raises(InputError):  # a list of a few is not the benchmark
        check_count(replace(K400, count=60, coverage=0.8), found)


def test_mmactions_list_counts_sorted_labels(tmp_path):
    numbers = kinetics(tmp_path, missing=0)
    files = sorted(path for path in (tmp_path / "val").iterdir() if not path.name.startswith("unlisted"))
    (tmp_path / "annotations" / "val.csv").unlink()
    lines = [f"{path.name} {number}\n" for path, number in zip(files, numbers, strict=True)]
    (tmp_path / "kinetics400_val_list_videos.txt").write_text("".join(lines) + "gone.mp4 0\n")
    found = find_images(K400, tmp_path)
    check(found, tuple(numbers))
    assert found.listed is not None and found.listed.sum() == 7
    (tmp_path / "kinetics400_val_list_videos.txt").write_text("a.mp4 400\n")
    with pytest.raises(InputError, match="does not end in a number of a class of Kinetics-400"):
        find_images(K400, tmp_path)


def test_kinetics_is_the_mean_of_top1_and_top5(tmp_path):
    numbers = kinetics(tmp_path, missing=0)
    result = zero_shot(oracle(K400), K400, find_images(K400, tmp_path), PARTIAL)
    ranks = np.array([0, 4, 5, 0, 1, 399])
    from dataclasses import replace

    metrics = replace(result, ranks=ranks).metrics()
    assert metrics == pytest.approx({"top1": 2 / 6, "top5": 4 / 6, "mean_top1_top5": 3 / 6})
    low, high = replace(result, ranks=ranks).interval("mean_top1_top5")
    assert low < 0.5 < high and len(numbers) == 6


@pytest.mark.parametrize("name", ["EVA01-g-14"])
@pytest.mark.parametrize("card", ["kinetics400", "kinetics600", "kinetics700"])
def test_the_metric_gives_the_published_third_number(card, name):
    reference = next(r for r in load_card(card).reference if r.model == name)
    assert reference.top1 is not None and reference.top5 is not None
    assert (reference.top1 + reference.top5) / 2 == pytest.approx(reference.mean_top1_top5, abs=0.0051)


def file_of(path: Path):
    return next(file for file in Tree(path.parent).files() if file.path == path)


@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_the_three_rules_take_the_frames_that_they_say(tmp_path, frames):
    import av

    clip = file_of(write_video(tmp_path / "a.mp4", 4, frames, other=333))
    with av.open(str(clip.path)) as container:
        everything = [frame.to_image() for frame in container.decode(video=0)]
    assert len(everything) == frames
    middle = sampled_frames(clip, "centre")
    assert len(middle) == 1 and middle[0].tobytes() == everything[frames // 2].tobytes() and seen(middle[0]) == 4
    uniform = sampled_frames(clip, "uniform", 8)
    expected = [everything[int((part + 0.5) * frames / 8)] for part in range(8)]
    assert [image.tobytes() for image in uniform] == [image.tobytes() for image in expected]
    if frames // 2 + 1 < frames:
        vissl = sampled_frames(clip, "vissl")
        assert vissl[0].tobytes() == everything[frames // 2 + 1].tobytes()
    else:  # one too far, as in the published scores: such a clip is left out
        with pytest.raises(BadVideoError, match=f"no frame {frames // 2 + 1}"):
            sampled_frames(clip, "vissl")
    assert places(280, "uniform", 8) == [17, 52, 87, 122, 157, 192, 227, 262]


def test_a_container_that_overstates_its_frames_still_has_a_middle(tmp_path, monkeypatch):
    clip = file_of(write_video(tmp_path / "a.mp4", 4, 8))
    monkeypatch.setattr("evaclip.evals.layouts.video._said_count", lambda av, file: 100)
    assert len(sampled_frames(clip, "centre")) == 1
    with pytest.raises(BadVideoError, match="says 100 frames"):
        sampled_frames(clip, "vissl")


@pytest.mark.parametrize("content", [b"", b"junk" * 99, b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/x.ts\n"])
def test_what_is_no_video_is_bad_and_nothing_else_is_opened(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    for sampling in ("vissl", "centre"):
        with pytest.raises(BadVideoError):
            sampled_frames(file_of(tmp_path / "a.mp4"), sampling)


def test_protocols_choose_frames(tmp_path):
    from dataclasses import replace

    for place in range(3):
        label = K400.classes[place]
        write_video(tmp_path / "val" / label / f"{place}.mp4", place, 5, other=(place + 1) % 3)
    found = find_images(K400, tmp_path)
    scores = {
        name: zero_shot(oracle(K400), K400, found, replace(PARTIAL, protocol=protocol)).accuracy(1)
        for name, protocol in PROTOCOLS.items()
    }
    # The middle frame alone shows the class; vissl's is the one after it, and the mean of eight sees the others.
    assert scores == {"eva": 0, "openai": 1, "testbed": 1, "pe": 0}


def test_frames_are_taken_once_and_an_interrupted_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("evaclip.evals.frame_cache.VIDEOS_IN_A_SHARD", 2)
    numbers = ucf(tmp_path)
    bad = tmp_path / "UCF-101" / "Archery" / "v_Archery_g01_c01.avi"
    bad.write_bytes(bad.read_bytes()[:100])
    words = ["frames", "--dataset", "ucf101", "--data", str(tmp_path), "--out", str(tmp_path / "frames")]
    assert main([*words, "--workers", "0"]) == 0
    assert "frames of 4 videos" in capfd.readouterr().out
    whole = {path.name: path.read_bytes() for path in (tmp_path / "frames").iterdir()}
    (tmp_path / "frames" / "000001.json").unlink()  # as if it had been stopped in the second shard
    with pytest.raises(InputError, match="not complete; run `evaclip frames` on it again"):
        find_images(UCF, tmp_path / "frames")
    assert main([*words, "--workers", "2"]) == 0
    assert "without frames: Archery/v_Archery" in capfd.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "frames").iterdir()} == whole
    found = find_images(UCF, tmp_path / "frames")
    check(found, numbers[1:])
    videos, model = find_images(UCF, tmp_path), oracle(UCF)
    bad_ones = zero_shot(model, UCF, videos, PARTIAL)
    from_frames = zero_shot(model, UCF, found, PARTIAL)
    assert np.array_equal(bad_ones.predictions, from_frames.predictions) and len(bad_ones.bad) == 1
    assert np.array_equal(bad_ones.thumbnails, from_frames.thumbnails)  # lossless
    assert from_frames.coverage()["share"] == bad_ones.coverage()["share"] == 0.8
    with pytest.raises(InputError, match="1 frames a video taken by 'vissl'; the protocol pe wants 8"):
        zero_shot(model, UCF, found, Setting(allow_partial=True, protocol=PROTOCOLS["pe"]))
    assert main([*words, "--protocol", "openai"]) == 2
    assert "holds frames of other videos or by another rule" in capfd.readouterr().err
    assert main([*words[:2], "cifar10", *words[3:]]) == 2
    assert "holds images, not videos" in capfd.readouterr().err
    listing = json.loads((tmp_path / "frames" / "000000.json").read_text())
    assert len(listing["videos"]) == 2


def test_eight_frames_are_kept_and_averaged(tmp_path, capfd):
    ucf(tmp_path)
    words = ["frames", "--dataset", "ucf101", "--data", str(tmp_path), "--out", str(tmp_path / "f"), "--workers", "0"]
    assert main([*words, "--protocol", "pe"]) == 0
    found, pe = find_images(UCF, tmp_path / "f"), Setting(allow_partial=True, protocol=PROTOCOLS["pe"])
    assert found.frames == (8, "uniform") and len(found.pictures(0, 8, "uniform")) == 8
    assert zero_shot(oracle(UCF), UCF, found, pe).accuracy(1) == 1
    assert (
        "8 frames, features averaged (uniform), both sides to 16 px"
        in zero_shot(oracle(UCF), UCF, found, pe).view.described()
    )
