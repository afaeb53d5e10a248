"""The models that can be offered: those the runtime lists, those used before, their neighbours.

Knows nothing of widgets.
"""

from __future__ import annotations

from pathlib import Path

from edgeinfer.tui.settings import ChatSettings, ModelChoice
from edgeinfer.tui.store import Store

_MOST = 200


def find_models(settings: ChatSettings, store: Store) -> list[ModelChoice]:
    """Choices without doubles, those on disk first."""
    listed = settings.list_models()
    paths = [Path(each.path) for each in listed if each.path]
    known = [path for path in (settings.model, store.preference("model")) if path]
    folders = [settings.data_folder / "models", *(Path(path).expanduser().parent for path in known)]
    found = {str(path.resolve()) for path in paths if path.exists()}
    choices = [each for each in listed if each.path]
    for path in _gguf_files(folders, known):
        if str(path.resolve()) not in found and len(choices) < _MOST:
            found.add(str(path.resolve()))
            choices.append(ModelChoice(path.stem, str(path), path.stat().st_size))
    return [*choices, *(each for each in listed if not each.path and settings.fetch)]


def _gguf_files(folders: list[Path], known: list[str]) -> list[Path]:
    files = [Path(path).expanduser() for path in known]
    for folder in dict.fromkeys(folders):
        try:
            files += sorted(folder.glob("*.gguf"))
        except OSError:
            continue
    # Later parts of a split model are no models.
    return [
        file
        for file in files
        if file.suffix == ".gguf" and file.is_file()
        and ("-of-" not in file.stem or "-00001-of-" in file.stem)
    ]  # fmt: skip
