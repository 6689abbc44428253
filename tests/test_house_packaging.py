"""What is installed is what the folders hold, and our `kernels` is taken for nobody else's."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOP = ("adapter", "distill", "kernels", "monitors", "serving")


def test_the_package_list_is_the_folders() -> None:
    """pyproject lists exactly the folders that hold Python files, sorted."""
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP
        for path in (ROOT / top).rglob("*.py")
        if "data" not in path.relative_to(ROOT).parts
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(folders)


def test_every_package_is_a_regular_one() -> None:
    """A folder without `__init__.py` would merge with a namesake elsewhere on the path."""
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists(), name


def test_files_that_are_not_code_travel_along() -> None:
    """Every file under adapter/data and the dashboard's folders, and all C sources, are matched by package-data."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package, globs in patterns.items():
        root = ROOT / package.replace(".", "/")
        shipped = {
            path for pattern in globs for path in root.glob(pattern + "/*" if pattern.endswith("**") else pattern)
        }
        expected = {
            path
            for folder in ("data", "templates", "static")
            for path in (root / folder).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        assert expected <= shipped
    sources = {path.relative_to(ROOT) for top in TOP for path in (ROOT / top).rglob("*.[ch]")}
    assert sources
    for source in sources:
        assert "*" + source.suffix in patterns[".".join(source.parent.parts)], source


def test_transformers_does_not_take_our_kernels_for_its_neighbour() -> None:
    """The probe of transformers says 'not available', and `kernels` is our folder."""
    code = (
        "import kernels; from transformers.utils import import_utils as u; "
        "assert u.is_kernels_available() is False; print(kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip()) == ROOT / "kernels/__init__.py"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_neighbour_is_in_no_pin() -> None:
    """Hugging Face's `kernels` is neither pinned nor installed."""
    assert "kernels" not in pins()
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("kernels")


def test_pins_are_exact_and_portable() -> None:
    """Every pin is one exact public version: no local builds, no paths, no machine's own index."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert "torch" in pins()


def test_every_dependency_is_pinned() -> None:
    """Nothing in pyproject can float."""
    wanted = [*PROJECT["project"]["dependencies"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    pinned = {name.lower().replace("_", "-") for name in pins()}
    assert [name for name in wanted if re.split(r"[\[;]", name)[0].strip().lower() not in pinned] == []


def test_the_command_is_installed() -> None:
    """The console script exists beside this interpreter and answers --help without loading torch."""
    script = Path(sys.executable).parent / "draftsmith"
    assert script.exists(), "run `make install`"
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['draftsmith', '--help']; "
        "import serving.cli; serving.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout


def test_the_version_is_a_calendar_version() -> None:
    """year.month.patch, and the newest entry of the changelog."""
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d\d\.(1[0-2]|[1-9])\.\d+", version)
    released = re.findall(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == version
