"""Files and folders of weights, as they are found: told apart by their content, and refused in one sentence."""

import hashlib
import json
import pickle
import zipfile
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from evaclip.errors import CheckpointError
from evaclip.models.weights import read_weights
from evaclip.models.weights.torchscript import read_torchscript
from tests.models.layouts import FAMILIES, eva_vision, openai_clip, torchscript

STATE = eva_vision(FAMILIES["eva02"], clip=False)
TRUNK = "visual.trunk."


def same_as_state(weights) -> bool:
    named = weights.named
    return torch.equal(named.tensors[f"{TRUNK}pos_embed"], STATE["pos_embed"]) and torch.equal(
        named.tensors[f"{TRUNK}blocks.1.mlp.fc2.bias"], STATE["blocks.1.mlp.w3.bias"]
    )


@pytest.mark.parametrize("container", ["module", "model", "state_dict", None])
@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_every_container_and_format_is_read_whatever_its_name(tmp_path, container, kind):
    path = tmp_path / "weights.of.a.strange.name"
    inside = {container: STATE, "epoch": 7, "args": Namespace(lr=1e-3)} if container else STATE
    if kind == "safetensors":
        prefix = "module." if container else ""
        save_file({prefix + name: value.clone() for name, value in STATE.items()}, path)
    else:
        torch.save(inside, path, _use_new_zipfile_serialization=kind == "zip")
    weights = read_weights(path)
    assert same_as_state(weights) and weights.named.layout == "eva"
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_containers_inside_containers(tmp_path):
    torch.save({"state_dict": {"model": {f"module.{name}": v for name, v in STATE.items()}}}, tmp_path / "w")
    assert same_as_state(read_weights(tmp_path / "w"))


def test_shards_are_found_through_their_index_and_hashed_together(tmp_path):
    names = sorted(STATE)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: STATE[key].clone() for key in keys}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    whole = read_weights(tmp_path)
    assert same_as_state(whole) and read_weights(path).sha256 == whole.sha256
    save_file({key: STATE[key] + 1 for key in halves["b.safetensors"]}, tmp_path / "b.safetensors")
    assert read_weights(path).sha256 != whole.sha256

    def refused(weight_map, sentence):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=sentence):
            read_weights(tmp_path)

    refused({"cls_token": "../b.safetensors"}, "not a file beside it")
    refused({"cls_token": "c.safetensors"}, "names the shard c.safetensors, which is not there")
    refused(index["weight_map"] | {"more": "a.safetensors"}, "and their index differ in more")
    refused({}, "without a weight_map")


class Code:
    """What a hostile pickle would run."""

    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('ran').touch()",))


@pytest.mark.parametrize("kind", ["zip", "pickle", "bare"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "bare":
        (tmp_path / "w.pt").write_bytes(pickle.dumps({"model": Code()}))
    else:
        torch.save({"model": STATE, "extra": Code()}, tmp_path / "w.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError) as error:
        read_weights(tmp_path / "w.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()
    assert "no pickle of torch's" in str(error.value) or "could run code and was not loaded" in str(error.value)
    assert ("eval" in str(error.value)) == (kind != "bare")


def test_torchscript_gives_the_tensors_of_torch_without_its_program(tmp_path, monkeypatch):
    torch.jit.save(torchscript(openai_clip()), tmp_path / "w")
    expected = torch.jit.load(tmp_path / "w").state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_torchscript(tmp_path / "w")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())


@pytest.mark.parametrize("harm", ["code", "size", "cycle", "nonsense"])
def test_a_hostile_torchscript_archive_is_refused(tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torchscript(openai_clip()), tmp_path / "w")
    with zipfile.ZipFile(tmp_path / "w") as before, zipfile.ZipFile(tmp_path / "x", "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if harm == "code" and name.endswith("/data.pkl"):
                content = pickle.dumps(Code(), protocol=2)
            if harm in ("cycle", "nonsense") and name.endswith("/data.pkl"):
                content = (
                    b"\x80\x02c__torch__\nX\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
                    if harm == "cycle"
                    else b"\x80\x02(."
                )
            if harm == "size" and "/data/" in name:
                content = content[:-2]
            after.writestr(name, content)
    sentences = {"code": "could run code", "size": "is not .* numbers", "cycle": "no tensors", "nonsense": "damaged"}
    with pytest.raises(CheckpointError, match=sentences[harm]):
        read_weights(tmp_path / "x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors", "torchscript"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, kind, share):
    path = tmp_path / "w"
    if kind == "safetensors":
        save_file({name: value.clone() for name, value in STATE.items()}, path)
    elif kind == "torchscript":
        torch.jit.save(torchscript(openai_clip()), path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="is damaged or cut short: ") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (b"<html>not found</html>", "is no checkpoint"),
        (b"{}", "without a weight_map"),
        (b"{", "is damaged or cut short"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{broken header!!", "is damaged or cut short"),
        (b"\x80\x05nonsense", "is damaged or cut short"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, content, sentence):
    (tmp_path / "model.safetensors").write_bytes(content)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=sentence):
            read_weights(source)


def test_files_without_tensors_and_folders_without_files(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights; looked for"):
        read_weights(tmp_path)
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="holds no tensors by name, only epoch, lr"):
        read_weights(tmp_path / "weights.pt")
    torch.save({"model": STATE | {"epoch": 3}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="has 'epoch' among its tensors"):
        read_weights(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"does not exist|do not exist; did you mean .*weights\.pt"):
        read_weights(tmp_path / "weigths.pt")
