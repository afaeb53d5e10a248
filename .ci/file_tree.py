"""Writes the README's file tree: every folder with the first line of what it says it is.

`python .ci/file_tree.py` from anywhere; with `--check` it writes nothing and exits with 1 where it
would. Knows nothing of what the files do.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- files: python .ci/file_tree.py writes this -->"
END = "<!-- end -->"
# What can't say it in a docstring.
SAID = {
    ".ci": "What a change must pass (`run`), the wheel to release, and what writes this list.",
    "LICENSE": "MIT.",
    "NOTICE": "Projects whose published facts are used.",
    "README.md": "This file.",
    "edgeinfer/examples": "Small programs, each showing one thing, and a notebook.",
    "edgeinfer/examples/ray": "Many copies of a model behind one address, and what to set.",
    "edgeinfer/pyinstaller/rthooks": "What runs before a frozen program.",
    "pyproject.toml": "Packaging, dependencies, settings of ruff, mypy and pytest.",
    "tests/bench": "Benchmarks, and the log of what was tuned.",
    "tests/goldens": "Logits of llama.cpp; `make_goldens` writes them.",
    "tui/screenshots": "What the chat looks like, written by its tests.",
}


def main() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # Links to folders have no files below them.
    files = [Path(name) for name in tracked if (ROOT / name).is_file()]
    folders = {f"{path.parent.as_posix()}/" for path in files} - {"./"}
    here = [path.name for path in files if len(path.parts) == 1 and not path.name.startswith(".")]
    tree = "\n".join(f"{name:31} {_what(name)}" for name in sorted({*folders, *here}))
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    begin = text.index(BEGIN) + len(BEGIN)
    end = text.index(END, begin)
    new = f"{text[:begin]}\n```\n{tree}\n```\n{text[end:]}"
    if sys.argv[1:] == ["--check"]:
        sys.exit(int(new != text))
    readme.write_text(new, "utf-8")


def _what(name: str) -> str:
    said = SAID.get(name.rstrip("/"))
    if said is None:
        package = (ROOT / name / "__init__.py").read_text("utf-8")
        said = (ast.get_docstring(ast.parse(package)) or "").partition("\n")[0]
    assert said, f"{name} does not say what it is"
    return said


if __name__ == "__main__":
    main()
