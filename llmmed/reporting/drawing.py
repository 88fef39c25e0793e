"""What the pictures share: colours that colour-blind readers tell apart, and names in lines."""

from __future__ import annotations

import textwrap

# Okabe and Ito, 2008; in every picture a marker, a hatch or a number stands beside each.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#999999"


def folded(name: str, width: int) -> str:
    """In lines of a bearable length, without what matplotlib would take for mathematics."""
    lines = [part for line in name.split("\n") for part in textwrap.wrap(line, width, break_on_hyphens=False)]
    return "\n".join(lines).replace("$", r"\$")
