"""Named runs. Each is a function without arguments that returns the whole configuration; its docstring tells what it
takes and what came out. Any field can be changed from the command line: `evaclip train NAME --optim.vision.lr 1e-3`,
and a recipe of one's own is a function in any file: `evaclip train mine.py:my_run`.
"""

import itertools
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

from evaclip.config import RunConfig
from evaclip.errors import InputError, did_you_mean, near_path
from evaclip.recipes import distillation, ladder, mim, published, small

Recipe = Callable[[], RunConfig]
RECIPES: dict[str, Recipe] = {
    function.__name__: function
    for function in (
        small.eva02_tiny_digits,
        small.eva02_tiny_cifar10,
        ladder.ladder_clip,
        ladder.ladder_mim,
        published.eva01_clip_g14,
        published.eva01_clip_g14_plus,
        published.eva02_clip_b16,
        published.eva02_clip_b16_published,
        published.eva02_clip_l14,
        published.eva02_clip_l14_published,
        published.eva02_clip_l14_336,
        published.eva02_clip_e14,
        published.eva02_clip_e14_plus,
        published.eva_clip_8b,
        published.eva_clip_18b,
        published.eva_clip_18b_unmasked,
        mim.eva01_mim_g,
        mim.eva02_mim_ti,
        mim.eva02_mim_s,
        mim.eva02_mim_b,
        mim.eva02_mim_l,
        distillation.fd_tiny_cifar10,
        distillation.fd_clip_b,
        distillation.fd_clip_l,
        distillation.fd_dino_b,
        distillation.fd_deit_b,
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name, or `file.py:function` of one's own. Raises InputError with the nearest name."""
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), function)
    if name not in RECIPES:
        raise InputError(f"no recipe is called {name!r}; {did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def configured(verb: str, arguments: Sequence[str]) -> list[RunConfig]:
    """The runs that `RECIPE [RECIPE ...] [--field.sub value]` stands for; the changes apply to each of them."""
    import tyro

    names = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    rest = arguments[len(names) :]
    return [
        tyro.cli(
            RunConfig,
            default=recipe(),
            args=rest,
            prog=f"evaclip {verb} {name}",
            description=recipe.__doc__,
            config=(tyro.conf.AvoidSubcommands,),
        )
        for name, recipe in ((name, recipe_named(name)) for name in names)
    ]


def _from_file(path: Path, function: str) -> Recipe:
    if not path.is_file():
        raise InputError(f"the recipe file {path} does not exist; {near_path(path)}")
    found = runpy.run_path(str(path))
    if not callable(found.get(function)):
        functions = [name for name, value in found.items() if callable(value) and not name.startswith("_")]
        raise InputError(f"{path} has no function {function!r}; {did_you_mean(function, functions)}")
    return found[function]
