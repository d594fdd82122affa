"""Shipped recipes say what they must, their READMEs show what the commands print, and plans are plain arithmetic."""

from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from evaclip.cli import main
from evaclip.curate.caption import load_caption_recipe
from evaclip.curate.download import DownloadCommand, job_array, shown
from evaclip.curate.plan import PlanCommand, budgets, rows, share_of_links
from evaclip.curate.recipe import ImagesRecipe, LinksRecipe, MixRecipe, known_recipes, load_recipe, recipe_record
from evaclip.errors import InputError

KINDS = {name: recipe_record(name)[1] for name in known_recipes()}
LINKS = [name for name, kind in KINDS.items() if kind == "links"]
MIXES = [name for name, kind in KINDS.items() if kind == "mix"]
IMAGES = [name for name, kind in KINDS.items() if kind == "images"]


def readme(name: str) -> str:
    return (known_recipes()[name].parent / "README.md").read_text()


def test_every_set_has_its_folder():
    assert set(LINKS) == {"relaion2b_en", "coyo700m", "datacomp1b", "cc3m", "cc12m", "own_data"}
    assert (MIXES, IMAGES) == (["merged2b"], ["merged30m", "merged38m"])
    index = (known_recipes()["digits"].parent.parent / "README.md").read_text()
    assert all(f"`{name}`" in index for name in KINDS)


@pytest.mark.parametrize("name", LINKS)
def test_a_recipe_of_links_is_complete(name):
    recipe = load_recipe(name)
    assert isinstance(recipe, LinksRecipe)
    assert recipe.source and recipe.licence and recipe.access and recipe.samples_per_shard == 10_000
    assert 0 < recipe.expected.alive < 1 and recipe.expected.alive_from and recipe.expected.bytes_from
    assert {"noai", "noimageai"} <= set(recipe.opt_out.directives)
    assert "laion/laion2B" not in recipe.lists.hub  # withdrawn
    said = readme(name)
    for word in ("--smoke", "opt out", "evaclip data plan", recipe.licence.split(";")[0].removeprefix("the lists: ")):
        assert word in said, word


@pytest.mark.parametrize("name", [name for name in LINKS if name != "own_data"])
def test_its_readme_shows_what_the_commands_print(name):
    recipe, said = load_recipe(name), readme(name)
    assert "\n".join(shown(recipe, DownloadCommand(recipe=name))) in said
    command = PlanCommand(recipe=name)
    for what, amount in rows(budgets(command), command):
        assert f"| {what} | {amount} |" in said
    script = known_recipes()[name].parent / "download.sbatch"
    if recipe.lists.parts:
        assert script.read_text() == job_array(recipe, DownloadCommand(recipe=name))
    else:
        assert not script.exists()


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_names_recipes_of_links(name):
    recipe = load_recipe(name)
    assert isinstance(recipe, MixRecipe) and sum(part.weight for part in recipe.parts) == pytest.approx(1)
    assert all(isinstance(load_recipe(part.recipe), LinksRecipe) for part in recipe.parts)
    command = PlanCommand(recipe=name)
    for row in rows(budgets(command), command):
        assert f"| {' | '.join(row)} |" in readme(name)


@pytest.mark.parametrize("name", IMAGES)
def test_image_sets_say_where_each_part_is(name, capfd):
    recipe = load_recipe(name)
    assert isinstance(recipe, ImagesRecipe) and recipe.total_from
    assert main(["data", "plan", name]) == 0
    said = capfd.readouterr().out
    assert all(part.name in readme(name) and part.name.split(",")[0] in said for part in recipe.sets)
    assert main(["data", "download", name]) == 2
    assert "its README says where" in capfd.readouterr().err


def test_kinds_are_not_confused(tmp_path):
    with pytest.raises(InputError, match="coyo700m is a recipe of links; evaclip data download fetches it"):
        load_caption_recipe("coyo700m")
    with pytest.raises(InputError, match="cifar10 is a recipe of captions; evaclip data caption writes its shards"):
        load_recipe("cifar10")
    with pytest.raises(InputError, match="no data recipe is called 'coyo'; did you mean coyo700m"):
        load_recipe("coyo")
    (tmp_path / "recipe.toml").write_text('kind = "link"\n')
    with pytest.raises(InputError, match="of the kind 'link' is not known; did you mean links"):
        load_recipe(str(tmp_path))
    (tmp_path / "recipe.toml").write_text("kind = ")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(str(tmp_path / "recipe.toml"))


def own(tmp_path: Path, *changes: tuple[str, str]) -> str:
    """A copy of own_data with changes; the path of its file."""
    text = known_recipes()["own_data"].read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "mine.toml").write_text(text)
    return str(tmp_path / "mine.toml")


def test_a_wrong_field_is_named(tmp_path):
    with pytest.raises(InputError, match="unknown field 'licens', did you mean licence"):
        load_recipe(own(tmp_path, ("licence =", "licens =")))


def test_a_plan_is_arithmetic():
    found = budgets(PlanCommand(recipe="relaion2b_en", alive=0.5, links_per_second=500, nodes=4))[0]
    assert (found.links, found.tried, found.images, found.shards) == (
        2_100_000_000,
        2_100_000_000,
        1_050_000_000,
        210_000,
    )
    assert found.bytes == 1_050_000_000 * 43_000 + 467_000_000_000
    assert found.node_hours == pytest.approx(2.1e9 / 500 / 3600)


def test_a_mix_takes_the_share_that_it_needs():
    recipe = load_recipe("relaion2b_en")
    assert share_of_links(recipe, 630_000_000) == pytest.approx(0.5)
    assert share_of_links(recipe, 10**12) == 1 and share_of_links(recipe, 0) == 1
    whole = budgets(PlanCommand(recipe="merged2b", alive=1.0))
    assert [budget.tried for budget in whole] == [1_600_000_000, 400_000_000]
    assert [budget.images for budget in whole] == [budget.wanted for budget in whole]


def test_rows_and_filters_are_counted_in_the_lists(tmp_path, capfd):
    lists = tmp_path / "lists"
    lists.mkdir()
    for number in range(3):
        scores = [0.1, 0.3, None, 0.5] * 25
        table = arrow.table({"url": ["http://a.org/x"] * 100, "caption": ["c"] * 100, "similarity": scores})
        parquet.write_table(table, lists / f"part-{number}.parquet")
    filters = (
        '# [[filters]]\n# column = "similarity"\n# at_least = 0.28',
        '[[filters]]\ncolumn = "similarity"\nat_least = 0.28',
    )
    recipe = own(tmp_path, filters)
    found = budgets(PlanCommand(recipe=recipe, metadata=lists))[0]
    assert (found.links, found.tried, found.images, found.counted) == (300, 150, 105, True)
    assert main(["data", "plan", recipe]) == 2
    assert "has no counts of its own" in capfd.readouterr().err
    assert main(["data", "plan", recipe, "--metadata", str(lists)]) == 0
    assert "150" in capfd.readouterr().out
    (lists / "part-1.parquet").write_bytes(b"junk")
    assert main(["data", "plan", recipe, "--metadata", str(lists)]) == 2
    assert "cannot be read" in capfd.readouterr().err
    assert main(["data", "plan", recipe, "--metadata", str(tmp_path / "none")]) == 2
    assert "holds no lists of links" in capfd.readouterr().err


def test_lines_of_tab_separated_lists_are_counted(tmp_path):
    (tmp_path / "cc12m.tsv").write_text("http://a.org/1\tone\nhttp://a.org/2\ttwo\n")
    assert budgets(PlanCommand(recipe="cc12m", metadata=tmp_path))[0].links == 2
