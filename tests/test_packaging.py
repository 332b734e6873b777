"""The package list, the import direction and what the repository may hold."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"affmae_cli": "affmae_cli", "affmae_engine": "affmae_engine", "affmae_kernels": "kernels"}
FORBIDDEN = {
    "affmae_kernels": {"affmae_engine", "affmae_cli", "typer", "rich", "textual", "pydantic"},
    "affmae_engine": {"affmae_cli", "typer", "rich", "textual"},
    "affmae_cli": set(),
}


def imported_modules(source: str) -> set[str]:
    """Names of the modules that a module imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported_roots(source: str) -> set[str]:
    """Top-level package names that a module imports."""
    return {name.split(".")[0] for name in imported_modules(source)}


def test_packages_on_disk_are_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"affmae_presets"}
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / FOLDERS[package]).rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): sorted(bad)
        for file in files
        if (bad := imported_roots(file.read_text("utf-8")) & FORBIDDEN[package])
    }
    assert not wrong


LAYERS = {
    "runtime": {"bench", "data", "doctor", "model", "predict", "train"},
    "data": {"bench", "doctor", "predict", "train"},
    "model": {"bench", "doctor", "predict", "train"},
    "predict": {"bench", "doctor", "train"},
    "train": {"bench", "doctor"},
}
"""Folders of the engine, and those that they must not import."""


@pytest.mark.parametrize("folder", LAYERS)
def test_layers_of_the_engine(folder: str) -> None:
    files = sorted((ROOT / "affmae_engine" / folder).rglob("*.py"))
    assert files
    forbidden = [f"affmae_engine.{other}" for other in LAYERS[folder]]
    wrong = {
        str(file.relative_to(ROOT)): sorted(bad)
        for file in files
        if (bad := [name for name in imported_modules(file.read_text("utf-8")) if name.startswith(tuple(forbidden))])
    }
    assert not wrong


def test_import_check_sees_a_violation() -> None:
    assert imported_roots("def f():\n    from affmae_cli.main import app\n    import rich.table") == {
        "affmae_cli",
        "rich",
    }


@pytest.mark.parametrize(
    "call",
    [
        "pickle.load",
        "torch.load(",
        "torch.save(",
        "weights_only=False",
        "allow_pickle=True",
        "yaml.load(",
        "shell=True",
    ],
)
def test_no_unsafe_calls(call: str) -> None:
    files = [file for folder in FOLDERS.values() for file in (ROOT / folder).rglob("*.py")]
    found = {file.relative_to(ROOT).as_posix() for file in files if call in file.read_text("utf-8").replace(" = ", "=")}
    assert found == {"affmae_engine/pickled.py"} if call == "torch.load(" else not found


def test_the_one_pickle_reader_loads_weights_only() -> None:
    source = (ROOT / "affmae_engine" / "pickled.py").read_text("utf-8")
    assert re.findall(r"torch\.load\(.*\)", source) == ['torch.load(path, map_location="cpu", weights_only=True)']
