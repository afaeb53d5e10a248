"""Writes the README's file tree: every tracked file with the first line of what it says it is.

`python .ci/file_tree.py` from anywhere. Knows nothing of what the files do.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- files: python .ci/file_tree.py writes this -->"
END = "<!-- end -->"
SAID = {
    ".ci/run": "Everything a change must pass, from a clean checkout.",
    "LICENSE": "MIT.",
    "NOTICE": "Projects whose published facts are used.",
    "README.md": "This file.",
    "pyproject.toml": "Packaging, dependencies, settings of ruff, mypy and pytest.",
    "edgeinfer/py.typed": "Marks the package as typed.",
    "edgeinfer/kernels": "A symbolic link to kernels/.",
    "edgeinfer/models": "A symbolic link to models/.",
    "edgeinfer/tui": "A symbolic link to tui/.",
}


def main() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [name for name in tracked if not name.startswith(".git") and (ROOT / name).exists()]
    tree = "\n".join(_lines(sorted(names, key=lambda name: name.rpartition("/")[::2])))
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    begin = text.index(BEGIN) + len(BEGIN)
    end = text.index(END, begin)
    readme.write_text(f"{text[:begin]}\n```\n{tree}\n```\n{text[end:]}", "utf-8")


def _lines(names: list[str]) -> list[str]:
    lines, folder = [], ""
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent != folder:
            lines.append(f"{parent}/")
            folder = parent
        lines.append(f"{'  ' if parent else ''}{base:28} {_what(name)}".rstrip())
    return lines


def _what(name: str) -> str:
    if name in SAID:
        return SAID[name]
    path = ROOT / name
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        return said.partition("\n")[0]
    if path.suffix in (".svg", ".txt", ".md", ".tcss", ".cu", ".cuh", ".json"):
        kind = {".svg": "Screenshot", ".tcss": "Style sheet"}.get(path.suffix)
        return f"{kind}." if kind else _first_words(path)
    return ""


def _first_words(path: Path) -> str:
    for line in path.read_text("utf-8", "replace").splitlines():
        said = re.sub(r"^[#/*\s]+", "", line).strip()
        if said:
            return said[:90]
    return ""


if __name__ == "__main__":
    main()
