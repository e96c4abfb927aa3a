"""The colours of heat maps and series, for light and dark, as CSS.

A sequential scale for amounts, LEVELS steps of one hue, and a diverging one for differences, blue
for more and orange for less, which people tell apart whatever their colour vision. Knows no report.
"""

from __future__ import annotations

from collections.abc import Sequence

LEVELS = 11  # of the sequential scale: 0 to 10
SIDE = 5  # of the diverging scale: -5 to 5
INK = {"dark": "#12171e", "light": "#ffffff"}
# from the least to the most
AMOUNT = {
    "light": ("#eff3f8", "#a9c6e4", "#4f8cc4", "#16487f"),
    "dark": ("#1c232c", "#234a72", "#3f82bf", "#a8d2f7"),
}
# from the least through no difference to the most
DIFFERENCE = {
    "light": ("#b34700", "#f2b27c", "#f1f2f4", "#9cc1e3", "#1c5a99"),
    "dark": ("#ffa861", "#8a4a18", "#20262e", "#2a5a8a", "#8cc4f5"),
}


def amount_level(share: float) -> int:
    """The level of 0 to 1."""
    return round((LEVELS - 1) * min(1.0, max(0.0, share)))


def difference_level(difference: float, largest: float) -> int:
    """The level of a difference between -largest and largest; 0 only for none at all."""
    if not difference or not largest:
        return 0
    level = max(1, round(SIDE * min(1.0, abs(difference) / largest)))
    return level if difference > 0 else -level


def amount_class(level: int) -> str:
    return f"a{level}"


def difference_class(level: int) -> str:
    """d-3 is written n3: a minus sign is awkward in a class."""
    return f"{'n' if level < 0 else 'd'}{abs(level)}"


def css(mode: str) -> str:
    """Classes for cells of tables and for paths of pictures, in "light" or "dark"."""
    amounts = ramp(AMOUNT[mode], LEVELS)
    differences = ramp(DIFFERENCE[mode], 2 * SIDE + 1)
    named = {
        **{amount_class(level): colour for level, colour in enumerate(amounts)},
        **{difference_class(level - SIDE): colour for level, colour in enumerate(differences)},
    }
    return "".join(
        f".{name}{{background:{colour};fill:{colour};color:{ink_on(colour)}}}"
        for name, colour in named.items()
    )


def ramp(stops: Sequence[str], steps: int) -> list[str]:
    """`steps` colours, evenly between `stops` (#rrggbb)."""
    found = []
    for step in range(steps):
        place = step / (steps - 1) * (len(stops) - 1)
        at = min(int(place), len(stops) - 2)
        pairs = zip(_channels(stops[at]), _channels(stops[at + 1]), strict=True)
        mixed = (round(low + (high - low) * (place - at)) for low, high in pairs)
        found.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return found


def ink_on(colour: str) -> str:
    """Of the two inks the one that is easier to read on `colour`."""
    return max(INK.values(), key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2, 1 to 21."""
    dim, bright = sorted((_luminance(one), _luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def _luminance(colour: str) -> float:
    """Relative luminance of sRGB, by WCAG 2."""
    linear = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in _channels(colour))
    )
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
