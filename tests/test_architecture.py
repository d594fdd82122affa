"""The house's rules, kept by looking at the source: imports point one way, nothing heavy at import, names, sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import evaclip

PACKAGE = Path(evaclip.__file__).parent
# Lower rows may not import higher ones, and nobody imports another of his own row.
ROWS = (
    {"cli"},
    {"quickstart"},
    {
        "evaluate",
        "retrieve",
        "probe",
        "diagnostics",
        "watch",
        "average",
        "curate",
        "doctor",
        "plan",
        "slurm",
        "export",
        "search",
        "convert",
    },
    {"train"},
    {"meter", "resume"},
    {"recipes", "bootstrap"},
    {"config"},
    {"objectives", "evals", "guard", "inference"},
    {"encoder"},
    {"exported"},
    {"data", "models", "optim", "engine", "checkpoint", "report"},
    {"distributed", "keyed", "log", "records", "shipped", "openclip", "fetch", "errors"},
)
# Within the lowest row two modules are used by the others, and curate may use the row below its own and evals' layouts.
FOUNDATIONS = {"errors"}
BANNED = ("utils", "common", "helpers", "base", "factory", "manager")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts)


def row(name: str) -> int:
    return next(number for number, names in enumerate(ROWS) if name in names)


def imported(tree: ast.AST) -> set[str]:
    """First names below `evaclip` that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "evaclip":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evaclip."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("evaclip.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own.startswith("__"):
        return
    for other in imported(ast.parse(path.read_text())) - {own}:
        assert row(other) > row(own) or other in FOUNDATIONS, f"{own} imports {other}"


def test_every_module_has_its_row_and_a_proper_name():
    for path in MODULES:
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert first.startswith("__") or row(first) >= 0
        assert path.stem not in BANNED


def test_open_clip_is_imported_in_one_module():
    users = [path.stem for path in MODULES if "import open_clip" in (t := path.read_text()) or "from open_clip" in t]
    assert users == ["openclip"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has none"
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in [n for n in tree.body if isinstance(n, kinds)]:
        if not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
            for inner in [n for n in node.body if isinstance(n, ast.FunctionDef) and isinstance(node, ast.ClassDef)]:
                assert inner.name.startswith("_") or ast.get_docstring(inner), f"{node.name}.{inner.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_fit_the_eye(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, node.name


def test_importing_the_package_or_asking_for_help_loads_nothing_heavy():
    code = (
        "import sys, evaclip, evaclip.cli\n"
        "evaclip.cli.main(['--help'])\n"
        "heavy = {'torch', 'timm', 'open_clip', 'tyro', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
