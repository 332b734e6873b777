"""Systems without POSIX file locks get a message, and missing extras are named."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from affmae_engine.doctor import machine


@pytest.mark.parametrize(
    "code",
    [
        "from affmae_cli.main import main; sys.argv = ['affmae', 'predict', 'x.tif']; main()",
        "import affmae_engine; affmae_engine.load('runs/seg')",
    ],
)
def test_a_system_without_file_locks_is_told(code: str) -> None:
    # As on Windows: modules that are None cannot be imported.
    start = "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'termios', 'pwd', 'grp')));"
    done = subprocess.run([sys.executable, "-c", f"{start} {code}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "does not run on this system" in done.stderr
    assert "WSL2" in done.stderr or "ResourceError" in done.stderr
    assert "ImportError" not in done.stderr and "ModuleNotFoundError" not in done.stderr


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "numpy>=2.0",
        'numpy>=1; extra == "works"',
        'no_such_package>=1.0; extra == "hub"',
        "another-one; extra == 'hub'",
        'never-there; extra == "dev"',
    ]
    monkeypatch.setattr(machine, "requires", lambda name: requirements)
    assert machine.missing_by_extra() == {"works": [], "hub": ["no_such_package", "another-one"]}


def test_doctor_says_how_to_install_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from affmae_cli.commands.doctor import _extra

    assert _extra("hub", ["huggingface_hub"]) == 'huggingface_hub not installed: pip install "affmae[hub]"'


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from affmae_engine.checkpoint import load_weights
    from affmae_engine.errors import ConfigError

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="huggingface_hub, which is not installed") as caught:
        load_weights(Path("hf:lab/model"))
    assert caught.value.hint == 'pip install "affmae[hub]"'


def test_no_module_needs_an_extra_to_be_imported() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]

    def packages(requirements: list[str]) -> set[str]:
        names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
        return {name[0].replace("-", "_").partition(".")[0] for name in names if name}

    extras = {name: found for name, found in pyproject["optional-dependencies"].items() if name != "dev"}
    absent = set.union(*map(packages, extras.values())) - packages(pyproject["dependencies"])
    assert "huggingface_hub" in absent
    code = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({sorted(absent)!r}))
import affmae_cli, affmae_engine
for package in (affmae_cli, affmae_engine):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
