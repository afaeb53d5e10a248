"""Colours: the two themes of our own, and what the transcript takes from any theme.

Knows nothing of what is coloured. The grounds of our themes differ in 256 colours too: those near
black have so little colour that they become greys, of which there are more.
"""

from __future__ import annotations

from dataclasses import dataclass

from textual.color import Color
from textual.theme import Theme

DARK = Theme(
    name="edge-dark",
    primary="#7aa2c9",
    secondary="#8f9bb3",
    accent="#7aa2c9",
    foreground="#d5d9e0",
    background="#16181c",
    surface="#1d2026",
    panel="#282c33",
    success="#8fb573",
    warning="#d9a95c",
    error="#d97373",
    dark=True,
    variables={
        "block-cursor-foreground": "#16181c",
        "input-selection-background": "#7aa2c9 30%",
        "row-background": "#2c323b",
    },
)
LIGHT = Theme(
    name="edge-light",
    primary="#2f6493",
    secondary="#5c6675",
    accent="#2f6493",
    foreground="#23272e",
    background="#fbfbf9",
    surface="#f1f1ee",
    panel="#e6e6e2",
    success="#3f7d2c",
    warning="#96650a",
    error="#b03a3a",
    dark=False,
    variables={"block-cursor-foreground": "#fbfbf9", "input-selection-background": "#2f6493 25%"},
)
OURS = (DARK, LIGHT)


def row_colors(theme: Theme) -> dict[str, str]:
    """Variables for the row of a list that the cursor is on."""
    if theme.ansi:
        return {"row-background": "ansi_cyan", "row-color": "ansi_black"}
    colors = theme.to_color_system().generate()
    return {"row-background": f"{colors['primary']} 18%", "row-color": colors["foreground"]}


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours as rich names; "" leaves the terminal's own."""

    text: str
    muted: str
    faint: str
    accent: str
    tint: str  # behind what the user wrote
    code: str  # behind code
    good: str
    warn: str
    bad: str

    @classmethod
    def of(cls, theme: Theme) -> Palette:
        colors = theme.to_color_system().generate()
        if theme.ansi:
            # Sixteen colours do not blend.
            return cls("", "bright_black", "bright_black", "blue", "", "", "green", "yellow", "red")
        text, ground = Color.parse(colors["foreground"]), Color.parse(colors["background"])

        def mix(share: float) -> str:
            return ground.blend(text, share, alpha=1).hex

        return cls(
            text=text.hex,
            muted=mix(0.58),
            faint=mix(0.28),
            accent=Color.parse(colors["primary"]).hex,
            tint=Color.parse(colors["surface"]).hex,
            code=Color.parse(colors["surface"]).hex,
            good=Color.parse(colors["success"]).hex,
            warn=Color.parse(colors["warning"]).hex,
            bad=Color.parse(colors["error"]).hex,
        )
