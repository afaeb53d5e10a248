"""The slash commands in the command palette.

Knows nothing of what they do.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content

from edgeinfer.tui import slash

if TYPE_CHECKING:
    from edgeinfer.tui.commands import ChatCommands


class CommandSearch(Provider):
    """Textual's own takes the brackets of `[path]` for markup."""

    async def discover(self) -> Hits:
        for command in sorted(slash.COMMANDS, key=lambda each: each.name):
            title = Content(command.name.capitalize()) + self._hint(command)
            yield DiscoveryHit(title, self._run(command), command.name, command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in slash.COMMANDS:
            name = command.name.capitalize()
            score = max(matcher.match(name), matcher.match(f"{name} {command.help}") / 2)
            if score > 0:
                title = matcher.highlight(name) + self._hint(command)
                yield Hit(score, title, self._run(command), command.name, command.help)

    def _run(self, command: slash.Command) -> partial[None]:
        return partial(command.run, cast("ChatCommands", self.app), "")

    def _hint(self, command: slash.Command) -> Content:
        return Content(f" {command.hint}".rstrip())
