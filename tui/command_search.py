"""The commands that can be typed, in the command palette."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content

from edgeinfer.tui.commands import TYPED, Command

if TYPE_CHECKING:
    from edgeinfer.tui.app import ChatApp


class CommandSearch(Provider):
    """Textual's own takes the brackets of `[path]` for markup."""

    async def discover(self) -> Hits:
        for name, command in sorted(TYPED.items()):
            title = Content(name.capitalize()) + self._more(command)
            yield DiscoveryHit(title, self._run(command), name, command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in TYPED.values():
            name = command.name.capitalize()
            score = max(matcher.match(name), matcher.match(f"{name} {command.help}") / 2)
            if score > 0:
                title = matcher.highlight(name) + self._more(command)
                yield Hit(score, title, self._run(command), command.name, command.help)

    def _run(self, command: Command) -> partial[None]:
        return partial(command, cast("ChatApp", self.app))

    def _more(self, command: Command) -> Content:
        """What may follow, and the keys that save the way here."""
        keys = cast("ChatApp", self.app).keys.labels(command.name)
        return Content(f" {command.argument}".rstrip()) + Content(f"  {keys}".rstrip())
