"""The models that can be offered: those the runtime lists, those used before, their neighbours.

Knows nothing of widgets.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from edgeinfer.tui.settings import ChatSettings, ModelChoice
from edgeinfer.tui.store import Store

_MOST = 200


def find_models(settings: ChatSettings, store: Store) -> list[ModelChoice]:
    """Choices without doubles, those on disk first; of a server those that it has named."""
    if settings.server is not None:
        named = [
            ModelChoice(each.id, each.id, 0, f"context {each.n_ctx:,}" if each.n_ctx else "")
            for each in settings.server.offered
        ]
        return named or [ModelChoice(settings.server.place, "", 0, "ask it again")]
    listed = settings.list_models()
    paths = [Path(each.path) for each in listed if each.path]
    known = [path for path in (settings.model, store.preference("model")) if path]
    folders = [settings.data_folder / "models"]
    folders += [Path(os.path.expanduser(path)).parent for path in known]
    found = {os.path.realpath(path) for path in paths}
    choices = [each for each in listed if each.path]
    for path in _gguf_files(folders, known):
        real = os.path.realpath(path)
        if real not in found and len(choices) < _MOST:
            found.add(real)
            with suppress(OSError):  # deleted meanwhile
                choices.append(ModelChoice(path.stem, str(path), path.stat().st_size))
    return [*choices, *(each for each in listed if not each.path and settings.fetch)]


def _gguf_files(folders: list[Path], known: list[str]) -> list[Path]:
    files = [Path(os.path.expanduser(path)) for path in known]
    for folder in dict.fromkeys(folders):
        try:
            files += sorted(folder.glob("*.gguf"))
        except OSError:
            continue
    # Later parts of a split model are no models.
    return [
        file
        for file in files
        if file.suffix == ".gguf" and os.path.isfile(file)
        and ("-of-" not in file.stem or "-00001-of-" in file.stem)
    ]  # fmt: skip
