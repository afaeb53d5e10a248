"""Who may import whom: the layers of the design, checked by reading the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"edgeinfer": ROOT / "edgeinfer"} | {
    f"edgeinfer.{name}": ROOT / name for name in ("kernels", "models", "tui")
}
# A module imports only modules of lines above its own; modules of one room may import each other.
LAYERS = """
terminal repeats event_stream
errors
values
config quant platform options parameters results settings
device gguf dequantize
rope hparams
text sampling hub ops
mixture model_reader segment
draft
graph keys
batch models.*
fused_ops
fusion known
kernels.buffers kernels.cached kernels.shapes
kernels.reference kernels.cpu kernels.cuda
model backend
engine load_settings chain
balance chat_model
placement
runtime stream
watching constraining reasoning_budget
replying requesting
embedding
llm inspect_file
aio bench remote selftest replay
load
server
cli tui pyinstaller
__main__
"""
LINE = {name: i for i, line in enumerate(LAYERS.split("\n")) for name in line.split()}
ROOMS = (
    "platform", "text", "sampling", "hub", "gguf", "kernels.reference", "kernels.cpu",
    "kernels.cuda", "engine", "bench", "load", "selftest", "server", "remote", "cli", "tui",
)  # fmt: skip
SLOW = ("numpy", "numba", "llvmlite", "cupy", "textual", "tokenizers", "huggingface_hub", "jinja2")


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of every module; `edgeinfer.kernels` comes from `kernels`."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if not (
                package == "edgeinfer" and parts[0] in ("kernels", "models", "tui", "examples")
            ):
                name = ".".join([package, *parts]).removesuffix(".__init__")
                yield name, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything a module imports, inside functions too."""
    is_package = name in FOLDERS or any(name == f"edgeinfer.{p}" for p in ROOMS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # `from edgeinfer import gguf` names a module, `from edgeinfer import LLM` does not.
            modules = FOLDERS.keys()
            yield from (
                f"{module}.{a.name}" if module in modules and unit(f"{module}.{a.name}") else module
                for a in node.names
                if a.name != "__version__"  # anyone may say what this is
            )


def unit(module: str) -> str | None:
    """The entry of LAYERS that a module of ours belongs to: most often its room."""
    bare = module.removeprefix("edgeinfer.")
    first_two = ".".join(bare.split(".")[:2])
    wildcard = bare.split(".")[0] + ".*"
    return next((u for u in (first_two, bare.split(".")[0], wildcard) if u in LINE), None)


def test_imports_go_up_only() -> None:
    wrong = []
    for name, tree in sources():
        if name in ("edgeinfer", "edgeinfer.kernels", "edgeinfer.models"):
            continue
        own = unit(name)
        assert own is not None, f"give {name} a line in LAYERS"
        for module in imports(name, tree):
            if module.split(".")[0] != "edgeinfer":
                continue
            other = unit(module)
            if other is None:
                assert module == "edgeinfer", f"give {module} a line in LAYERS"
                if LINE[own] < LINE["server"]:
                    wrong.append(f"{name} imports the package's public names")
                continue
            is_own_package = other == own and own in ROOMS
            if not is_own_package and LINE[other] >= LINE[own]:
                wrong.append(f"{name} imports {module}")
            if own.startswith("models") and module != "edgeinfer.graph":
                wrong.append(f"{name} imports {module}")
            is_machine = other.startswith("kernels.") and other in ROOMS
            if is_machine and own != "backend" and other != own:
                wrong.append(f"{name} imports {module}: only backend may")
            if own == "tui" and not is_own_package:
                wrong.append(f"{name} imports {module}: the TUI uses public names only")
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in sources() if not ast.get_docstring(tree)] == []


def test_the_mapped_packages_have_one_name() -> None:
    """A bare `import kernels` makes a second module object."""
    bare = [
        f"{name} imports {module}"
        for name, tree in sources()
        for module in imports(name, tree)
        if module.split(".")[0] in ("kernels", "models", "tui")
    ]
    assert bare == []


def test_the_package_list_equals_the_folders() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = settings["tool"]["setuptools"]["packages"]
    found = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
        if not (package == "edgeinfer" and path.parent.name in ("kernels", "models", "tui"))
    }
    assert sorted(listed) == sorted(found)


def test_importing_the_package_is_cheap() -> None:
    code = f"import edgeinfer, sys; print([m for m in {SLOW} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
