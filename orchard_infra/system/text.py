"""Text for a person: safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` without anything that could act on a terminal: escapes, controls, bidi marks.

    >>> printable("train\\x1b[2J.py")
    'train\\\\x1b[2J.py'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """A length of time for a person.

    >>> duration(7509)
    '2 h 5 min'
    """
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
