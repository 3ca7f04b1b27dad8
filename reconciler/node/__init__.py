"""One script for one round trip: what goes to a node, and how its answer is read.

Imported by Ansible's forked workers once per node, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# The interpreter reads the script from standard input. -I keeps the node's PYTHON* variables and its
# working directory out, -S skips site-packages: neither can disturb a probe, and the start is faster.
INTERPRETER_FLAGS = "-I -S -"

STEPS_ONLY = "# --- from here on only for steps"
# Collecting garbage in a process that lives for 30 ms is a waste of one.
_PRELUDE = """\
import gc, sys, types
gc.disable()
def _module(name, source):
    module = types.ModuleType(name)
    exec(compile(source, "<" + name + ">", "exec"), module.__dict__)
    return module
"""


class BadAnswerError(Exception):
    """The node did not print the answer it was asked for; the message says what came instead."""


@cache
def source(path: Path, *, looking: bool = False) -> str:
    """The text of a file that runs on nodes; for a look, only what a look needs: a node compiles all that it gets."""
    text = path.read_text(encoding="utf-8")
    return text.partition(STEPS_ONLY)[0] if looking else text


def bundle(sources: Mapping[str, Path], request: Mapping[str, Any]) -> str:
    """The script for one request, to be completed with :func:`call`.

    ``sources`` maps module names to node-side files; ``request`` holds ``nonce`` and either ``probes``
    (a list of ``{kind, args, timeout}``) or ``step`` with its fields. Values travel as Python literals, in ASCII:
    whatever they contain, they arrive as they are, and the node needs nothing to read them.
    """
    needed = (
        {**sources, "writing": HERE / "writing.py"}
        if {"step", "fence", "confirm"} & set(request)
        else sources
    )
    looking = "probes" in request
    texts = {name: source(path, looking=looking) for name, path in needed.items()}
    return (
        f"{_PRELUDE}"
        f"lib = _module('lib', {source(HERE / 'lib.py')!a})\n"
        f"driver = _module('driver', {source(HERE / 'driver.py', looking=looking)!a})\n"
        f"SOURCES = {texts!a}\n"
        f"REQUEST = {_plain(request)!a}\n"
    )


def _plain(value: Any) -> Any:
    """Nothing but what has a literal: the types that JSON has. Raises TypeError or ValueError for the rest."""
    return json.loads(json.dumps(value, allow_nan=False))


def call(script: str, connection: Mapping[str, Any]) -> bytes:
    """The script, completed with what the controller knows of the connection it travels over."""
    return f"{script}driver.main(lib, SOURCES, REQUEST, {_plain(connection)!a})\n".encode()


def parse(nonce: str, status: int, out: str, err: str) -> dict[str, Any]:
    """The node's answer. Raises BadAnswerError with a reason that a person can act on."""
    parts = out.split(nonce)
    if len(parts) == 3:  # noqa: PLR2004 - before, the answer, after
        answer: dict[str, Any] = json.loads(parts[1])
        return answer
    said = " | ".join((err.strip() or out.strip()).splitlines()[-3:])[-400:]
    if status == 127 or "not found" in said.lower():  # noqa: PLR2004 - the shell's "no such command"
        raise BadAnswerError(f"no Python on the node (set ansible_python_interpreter): {said}")
    raise BadAnswerError(
        f"the node answered with exit status {status} and no facts: {said or 'nothing at all'}"
    )
