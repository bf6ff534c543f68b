"""Fonts for a picture's texts, which may be in any script: matplotlib takes one font, and draws what it lacks as boxes."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

from ..files import require


def complete(figure: Any) -> None:
    """Give the figure's texts the installed fonts for the characters that their own font lacks. Warn once of those that no font
    has."""
    texts = [text for text in figure.findobj(require("matplotlib.text", "matplotlib", "demo").Text) if text.get_text()]
    lacking = {text: found for text in texts if (found := _lacking(text))}
    wanted: set[int] = set().union(*lacking.values())
    if not wanted:
        return
    families = []
    for family, file in _families().items():
        has = wanted & _characters(file)
        if has:
            families.append(family)
            wanted -= has
        if not wanted:
            break
    for text in lacking:
        text.set_fontfamily([*text.get_fontfamily(), *families])
    if wanted:
        some = " ".join(map(chr, sorted(wanted)[:10])) + " …" * (len(wanted) > 10)
        message = (
            f"no installed font has {some}: {len(wanted)} characters are drawn as boxes. See fonts.google.com/noto"
        )
        warnings.warn(message, UserWarning, stacklevel=4)


def _lacking(text: Any) -> set[int]:
    """The characters that the text's font does not have."""
    fonts = require("matplotlib.font_manager", "matplotlib", "demo")
    visible = {ord(character) for character in text.get_text() if character.isprintable()}
    return visible - _characters(fonts.findfont(text.get_fontproperties()))


def _families() -> dict[str, str]:
    """The installed ones with a file of each, those without serifs first. Of matplotlib's own only the ones for texts: its fonts
    for formulas have symbols in the places of letters, and its last resort has a box for every character."""
    own = require("matplotlib", "matplotlib", "demo").get_data_path() + os.sep
    files = {
        entry.name: entry.fname
        for entry in require("matplotlib.font_manager", "matplotlib", "demo").fontManager.ttflist
        if (entry.style, entry.weight) == ("normal", 400)  # matplotlib logs where it has to take another
        and (not entry.fname.startswith(own) or entry.name.startswith(("DejaVu", "STIXGeneral")))
    }
    return {name: files[name] for name in sorted(files, key=lambda name: ("sans" not in name.lower(), name))}


@functools.cache
def _characters(file: str) -> frozenset[int]:
    """Code points that a font's file has."""
    try:
        return frozenset(require("matplotlib.font_manager", "matplotlib", "demo").get_font(file).get_charmap())
    except (OSError, RuntimeError):  # it is gone since matplotlib listed it, or of a kind that matplotlib does not draw
        return frozenset()
