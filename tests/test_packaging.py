"""What is built from this checkout and installed somewhere else is whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASSES = {
    "prune",
    "prune-depth",
    "evolve",
    "merge-kv-heads",
    "rotate",
    "sparsify",
    "reconstruct",
    "recover",
    "reestimate-norms",
    "verify",
    "save-pretrained",
    "export-onnx",
    "print",
}

PROBE = """
import importlib, importlib.metadata, importlib.resources, json, sys
import graphprune, graphprune.passes
data = importlib.resources.files("graphprune") / "data"
points = importlib.metadata.entry_points(group="graphprune.passes")
try:
    importlib.import_module("passes")
except ImportError as error:
    top_level = type(error).__name__
else:
    top_level = "imported"
print(json.dumps({
    "file": graphprune.__file__,
    "passes": graphprune.passes.__file__,
    "typed": (importlib.resources.files("graphprune") / "py.typed").is_file(),
    "sizes": {name: len((data / name).read_bytes()) for name in json.loads(sys.argv[1])},
    "points": {point.name: point.value for point in points},
    "top_level": top_level,
    "version": importlib.metadata.version("graphprune"),
}))
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def data_files() -> dict[str, int]:
    data = ROOT / "graphprune" / "data"
    return {
        path.relative_to(data).as_posix(): path.stat().st_size
        for path in sorted(data.rglob("*"))
        if path.is_file()
    }


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that is built from it, not from the checkout."""
    source = tmp_path_factory.mktemp("source") / "graphprune"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("graphprune", "passes"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an environment says that has the wheel and its dependencies but not the checkout."""
    (wheel,) = built.glob("*.whl")
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True, with_pip=False)
    (python,) = [*home.glob("bin/python"), *home.glob("Scripts/python.exe")]
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = run(python, "-c", where, cwd=home).strip()
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"),
        *("--no-index", "--no-compile", "--target", site, wheel),
        cwd=home,
    )
    # Isolated, so that nothing of the checkout is seen; without the dependencies, as importing
    # graphprune alone must need none of them; and any warning is an error.
    names = json.dumps([*data_files()])
    return json.loads(run(python, "-I", "-W", "error", "-c", PROBE, names, cwd=home))


def test_every_package_on_disk_is_listed() -> None:
    on_disk = {
        ".".join(("graphprune", *path.parent.relative_to(ROOT / "graphprune").parts))
        for path in (ROOT / "graphprune").rglob("__init__.py")
    } | {
        ".".join(("graphprune.passes", *path.parent.relative_to(ROOT / "passes").parts))
        for path in (ROOT / "passes").rglob("__init__.py")
    }
    setuptools = project()["tool"]["setuptools"]
    assert setuptools["packages"] == sorted(on_disk)
    assert setuptools["package-dir"] == {"graphprune.passes": "passes"}


def test_every_folder_with_modules_is_a_package() -> None:
    for top in ("graphprune", "passes"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_the_link_leads_to_the_passes() -> None:
    link = ROOT / "graphprune" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def test_every_pass_module_has_an_entry_point() -> None:
    points = project()["project"]["entry-points"]["graphprune.passes"]
    modules = {value.partition(":")[0].rpartition(".")[2] for value in points.values()}
    names = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert names == modules
    for name, value in points.items():
        stem = name.replace("-", "_")
        class_name = "".join(word.capitalize() for word in name.split("-"))
        assert value == f"graphprune.passes.{stem}:{class_name}"


def test_passes_refuse_to_be_imported_from_the_top() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError: these passes are imported as 'graphprune.passes'" in done.stderr


def test_sdist_holds_all_sources_and_nothing_twice(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"graphprune/data/{name}" for name in data_files()} <= names
    assert {f"passes/{name}" for name in python_files(ROOT / "passes")} <= names
    assert not [name for name in names if name.startswith("graphprune/passes/")]


def test_wheel_holds_every_module(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    package = ROOT / "graphprune"
    expected = {f"graphprune/{name}" for name in python_files(package)} | {
        f"graphprune/passes/{name}" for name in python_files(ROOT / "passes")
    }
    assert {name for name in names if name.endswith(".py")} == expected


def test_installed_package_is_the_wheel(installed: dict[str, Any]) -> None:
    assert not Path(installed["file"]).is_relative_to(ROOT)
    assert Path(installed["passes"]).parts[-3:] == ("graphprune", "passes", "__init__.py")
    assert installed["version"] == project()["project"]["version"]
    assert installed["typed"]


def test_installed_data_is_whole(installed: dict[str, Any]) -> None:
    assert installed["sizes"] == data_files()
    assert {
        "heldout.txt",
        "calibration.txt",
        "reference/config.json",
        "reference/generation_config.json",
        "reference/model.safetensors",
        "reference/tokenizer.json",
        "reference/tokenizer_config.json",
    } <= installed["sizes"].keys()
    reference = [size for name, size in data_files().items() if name.startswith("reference/")]
    assert sum(reference) <= 4_000_000


def test_installed_entry_points_are_visible(installed: dict[str, Any]) -> None:
    assert installed["points"] == project()["project"]["entry-points"]["graphprune.passes"]
    assert set(installed["points"]) == PASSES


def test_installed_passes_have_one_name(installed: dict[str, Any]) -> None:
    assert installed["top_level"] == "ModuleNotFoundError"
