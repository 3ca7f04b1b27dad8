"""The little of the shell's language that can be read with certainty: simple commands, pipes, ``&&``, ``||``, ``;``.

Anything else (expansions, substitutions, functions, background jobs, files written by redirection) is refused, not
guessed at: what cannot be read cannot be judged.
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[A-Za-z0-9_./:=@%+,~^-]+")
_SINGLE = re.compile(r"'([^'\x00-\x1f\x7f]*)'")
_DOUBLE = re.compile(r'"([^"$`\\!\x00-\x1f\x7f]*)"')
_BLANK = re.compile(r"[ \t]+")
_HARMLESS = re.compile(r"(?:[12]?>[ \t]*/dev/null|2>&1|&>[ \t]*/dev/null)(?=[ \t;|&\n]|\Z)")
_BETWEEN = re.compile(r"&&|\|\||;|\||\n")
LONGEST = 1_000


class Unreadable(Exception):  # noqa: N818 - what happened, not whose mistake it is
    """The script says something that is not understood here; the message says what."""


def commands(script: str) -> list[list[str]]:
    """The simple commands of a script, in order, each as its words. Raises Unreadable."""
    if len(script) > LONGEST:
        raise Unreadable(f"the script is longer than {LONGEST} characters")
    found: list[list[str]] = [[]]
    at = 0
    while at < len(script):
        if separator := _BETWEEN.match(script, at):
            if not found[-1]:
                raise Unreadable(f"nothing stands before {separator[0]!r}")
            found.append([])
            at = separator.end()
        elif skipped := _BLANK.match(script, at) or _HARMLESS.match(script, at):
            at = skipped.end()
        else:
            word, at = _word(script, at)
            found[-1].append(word)
    return [words for words in found if words]


def _word(script: str, at: int) -> tuple[str, int]:
    """One word, of plain and quoted pieces."""
    pieces: list[str] = []
    start = at
    while at < len(script):
        piece = _PLAIN.match(script, at) or _SINGLE.match(script, at) or _DOUBLE.match(script, at)
        if piece is None:
            break
        pieces.append(piece[0] if piece.re is _PLAIN else piece[1])
        at = piece.end()
    if at == start or not (at == len(script) or script[at] in " \t\n;|&"):
        raise Unreadable(f"{script[at]!r} in a script is more than can be read here")
    return "".join(pieces), at
