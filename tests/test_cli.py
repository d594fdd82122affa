"""Verbs that need no run: help, recipes, doctor."""

import pytest

from evaclip.cli import VERBS, main
from evaclip.config import described, differences, load_config
from evaclip.errors import CheckpointError, InputError, did_you_mean
from evaclip.quickstart import _clear
from evaclip.recipes import RECIPES
from evaclip.records import structured, unstructured


def test_help_names_every_verb(capfd):
    assert main([]) == 0
    said = capfd.readouterr().out
    assert all(f"evaclip {verb}" in said for verb in VERBS)


@pytest.mark.parametrize("verb", ["zeroshot", "quickstart", "export"])
def test_each_verb_explains_its_fields(verb, capfd):
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0 and len(capfd.readouterr().out.splitlines()) > 8


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_listed_explained_and_survive_json(name, capfd):
    assert main(["recipes"]) == 0
    assert name in capfd.readouterr().out
    assert main(["recipes", name]) == 0
    assert "drop_path" in capfd.readouterr().out
    config = RECIPES[name]()
    assert config.name == name and (RECIPES[name].__doc__ or "").strip()
    assert structured(unstructured(config), type(config), "test") == config
    assert differences(config, config) == []
    assert any(line.strip().startswith("batch_size") for line in described(config))


def test_a_recipe_of_ones_own_is_a_function_in_a_file(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom evaclip.recipes.small import eva02_tiny_digits\n"
        "def my_run():\n    'Mine.'\n    return replace(eva02_tiny_digits(), name='my_run', steps=7)\n"
    )
    assert main(["recipes", f"{tmp_path}/mine.py:my_run"]) == 0
    assert "steps: 7" in capfd.readouterr().out
    assert main(["recipes", f"{tmp_path}/mine.py:my_rum"]) == 2
    assert "has no function 'my_rum'; did you mean my_run" in capfd.readouterr().err
    assert main(["recipes", f"{tmp_path}/yours.py:x"]) == 2


def test_doctor_reports(capfd):
    assert main(["doctor"]) == 0
    said = capfd.readouterr().out
    for word in ("torch", "flash_attn", "attention kernel", "GPU", "wandb"):
        assert word in said
    assert main(["doctor", "please"]) == 2


def test_a_stored_configuration_of_another_version_is_refused(tmp_path):
    config = next(iter(RECIPES.values()))()
    record = unstructured(config)
    record["objective"]["mask_ration"] = 0.5
    with pytest.raises(InputError, match="unknown field 'mask_ration', did you mean mask_ratio"):
        structured(record, type(config), "config.json")
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        load_config(tmp_path)


def test_near_names():
    assert did_you_mean("trian", ["train", "data"]) == "did you mean train?"
    assert did_you_mean("x", ["train", "data"]) == "known are: data, train"
    assert did_you_mean("x", []) == "none are known"


def test_quickstart_removes_only_what_a_quickstart_wrote(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds thesis\.tex, which no quickstart wrote"):
        _clear(tmp_path)
    (tmp_path / "thesis.tex").unlink()
    _clear(tmp_path)
    assert not tmp_path.exists()


def test_a_quickstart_that_is_stopped_scores_nothing(tmp_path, monkeypatch, capfd):
    from evaclip.train import Outcome

    monkeypatch.setattr("evaclip.quickstart.train", lambda config: Outcome(5, "SIGTERM"))
    assert main(["quickstart", "--out", str(tmp_path / "q")]) == 130
    said = capfd.readouterr()
    assert "3/3" not in said.err and "evaclip: interrupted" in said.err
