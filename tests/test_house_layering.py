"""The borders between the folders, and the border around torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("adapter", "distill", "kernels", "monitors", "serving")
ALLOWED = {  # folder -> folders of ours it may import: five arrows
    "adapter": set(),
    "kernels": set(),
    "monitors": {"adapter"},
    "serving": {"adapter", "kernels"},
    "distill": {"adapter", "kernels"},
}
TORCH = {"torch", "transformers", "peft", "triton"}
TORCH_ALLOWED = (  # everything else must import where torch is not installed
    "adapter.hotswap",
    "adapter.lora",
    "adapter.models",
    "distill.assignment",
    "distill.batches",
    "distill.bootstrap",
    "distill.bootstrap_cli",
    "distill.bootstrap_training",
    "distill.factors",
    "distill.gate",
    "distill.job",
    "distill.kept",
    "distill.laws",
    "distill.losses",
    "distill.packing",
    "distill.ranks",
    "distill.scoring",
    "distill.selfplay",
    "distill.sharding",
    "distill.trainer",
    "distill.trials",
    "distill.tuning",
    "distill.vocab_job",
    "distill.vocabulary",
    "kernels",
    "serving.demo.reference",
    "serving.engine",
)


def inside(module: str, names: tuple[str, ...] | list[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def modules() -> dict[str, Path]:
    """Every importable module by dotted name; migrations are loaded by Alembic, not imported."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if "migrations" in parts or "data" in parts:
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TORCH_FREE = [name for name in MODULES if not inside(name, TORCH_ALLOWED)]


def imported(path: Path) -> set[str]:
    """Dotted names a file imports, lazily or not; `if TYPE_CHECKING` counts too, on purpose."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", MODULES)
def test_only_the_five_arrows(name: str) -> None:
    """A module imports its own folder and those its folder may lean on, nothing else of ours."""
    folder = name.split(".")[0]
    reached = {item.split(".")[0] for item in imported(MODULES[name])} & set(PACKAGES)
    assert reached <= ALLOWED[folder] | {folder}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_stays_where_tensors_are(name: str) -> None:
    """A module outside the tensor modules names neither torch nor a module that needs it."""
    reached = imported(MODULES[name])
    assert not {item.split(".")[0] for item in reached} & TORCH
    assert not {item for item in reached if item in MODULES and inside(item, TORCH_ALLOWED)}


_IMPORT_ALL = """
import importlib, sys
for name in ("torch", "transformers", "peft", "triton"):
    sys.modules[name] = None
def forbid(event, arguments):
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.exec", "os.fork"):
        raise RuntimeError(f"{event} during an import")
sys.addaudithook(forbid)
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        sys.exit(f"{name}: {error!r}")
"""


@pytest.mark.parametrize("folder", [name for name in PACKAGES if name != "kernels"])
def test_torch_free_modules_import_without_torch(folder: str) -> None:
    """In a process where torch cannot be imported, every torch-free module can, and opens nothing."""
    names = [name for name in TORCH_FREE if name.split(".")[0] == folder]
    assert names
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_import_linter_guards_the_same_modules() -> None:
    """The linter's torch contract covers every torch-free module, and names nothing that does not exist."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    [contract] = [item for item in config["contracts"] if item["name"] == "torch stays out"]
    guarded = contract["source_modules"]
    plain = [name for name in TORCH_FREE if name not in PACKAGES and not name.endswith("__main__")]
    assert [] == [name for name in plain if not inside(name, guarded)]
    assert [] == [name for name in guarded if name not in MODULES and name != "adapter.migrations"]
    assert set(contract["forbidden_modules"]) == TORCH


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_package_files_are_a_docstring(name: str) -> None:
    """A package's `__init__.py` holds its docstring and nothing that drags something in."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    rest = [ast.unparse(node) for node in tree.body[1:]]
    assert rest == (["__version__ = '0.0.0'"] if name == "kernels" else [])


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are_for(name: str) -> None:
    """Every module opens with a docstring."""
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
