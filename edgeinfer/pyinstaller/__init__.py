"""Tells PyInstaller where its hook for this package lies; an entry point names this module.

Nothing else imports it.
"""

from __future__ import annotations

from pathlib import Path


def hook_folders() -> list[str]:
    return [str(Path(__file__).parent)]
