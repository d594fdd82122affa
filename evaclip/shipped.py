"""Finds the folders that travel with the code: `zero_shot/`, `retrieval/`, `data_recipes/`, `slurm/`.

In a checkout they lie at the top level; a wheel carries them inside the package. The checkout wins, because an
editable install can leave an old copy in site-packages.
"""

from importlib.resources import files
from pathlib import Path


def shipped(folder: str) -> Path:
    """The path of a shipped folder, e.g. `shipped("zero_shot")`."""
    package = Path(str(files("evaclip")))
    beside, inside = package.parent / folder, package / "_shipped" / folder
    return beside if (package.parent / "pyproject.toml").exists() else inside
