"""Whether a command that an analyzer invented may run at all. Deny by default: what is not known is refused.

A program has to be in the table of :mod:`reconciler.analyze.programs`, with every option and operand of a form that
stands there. Programs that start others are looked through; scripts are read by :mod:`reconciler.analyze.shell`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reconciler.analyze import words
from reconciler.analyze.programs import PROGRAMS, READERS
from reconciler.analyze.shell import Unreadable, commands

_DEEPEST = 4
_GAINS_PRIVILEGE = frozenset({
    "sudo", "su", "doas", "pkexec", "run0", "sudoedit", "su-exec", "gosu", "runuser", "setpriv", "machinectl",
    "systemd-run", "chroot", "nsenter", "unshare", "newgrp", "sg", "login", "at", "batch", "crontab", "capsh",
})  # fmt: skip
_BEYOND_REPAIR = frozenset({
    "dd", "shred", "wipefs", "mkswap", "fdisk", "sfdisk", "cfdisk", "gdisk", "sgdisk", "parted", "blkdiscard",
    "truncate", "srm", "wipe", "cryptsetup", "lvremove", "vgremove", "pvremove", "hdparm", "badblocks", "debugfs",
    "dropdb", "userdel", "deluser", "groupdel",
})  # fmt: skip
_FORMATS = ("mkfs", "mke2fs", "newfs")
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "ash"})
_INTERPRETERS = frozenset({
    "fish", "csh", "tcsh", "perl", "ruby", "php", "lua", "awk", "gawk", "mawk", "tclsh", "osascript", "bun", "deno",
    "eval", "source", ".", "exec",
})  # fmt: skip
_SHELL_OPTIONS = re.compile(r"-[leux]*c")
_DIRECTORY = re.compile(r"(?:/usr|/usr/local|/opt/homebrew)?/s?bin/")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_HARMLESS_VARIABLE = re.compile(r"LANG|LANGUAGE|LC_[A-Z]+|TZ|NO_COLOR|CI|TERM|DEBIAN_FRONTEND")


@dataclass(frozen=True)
class _Judge:
    """Judges commands inside commands, down to a depth."""

    protected: tuple[str, ...]
    depth: int = 0

    def refusal(self, argv: Sequence[str]) -> str:
        argv = list(argv)
        while argv and (assigned := _ASSIGNMENT.fullmatch(argv[0])) and self.depth:
            if not _HARMLESS_VARIABLE.fullmatch(assigned[1]):
                return f"the variable {assigned[1]} could change what runs"
            argv = argv[1:]
        if not argv:
            return "it names no program"
        program = argv[0]
        if "/" in program:
            if not _DIRECTORY.fullmatch(program[: program.rfind("/") + 1]):
                return f"{program} is not in a directory of the system's programs"
            program = program.rpartition("/")[2]
        return self._program(program, argv[1:])

    def _program(self, program: str, arguments: list[str]) -> str:
        if program in _GAINS_PRIVILEGE:
            return f"{program} would gain privilege"
        if program in _BEYOND_REPAIR or program.startswith(_FORMATS):
            return f"what {program} does cannot be undone"
        if program in _INTERPRETERS:
            return f"what {program} would run cannot be judged"
        if program not in _SHELLS and program not in _WRAPPERS:
            return self._known(program, arguments)
        if self.depth >= _DEEPEST:
            return "it is nested too deeply to be judged"
        judge = self._script if program in _SHELLS else self._wrapped
        return judge(program, arguments)

    def _script(self, program: str, arguments: list[str]) -> str:
        if len(arguments) != 2 or not _SHELL_OPTIONS.fullmatch(arguments[0]):  # noqa: PLR2004 - -c and its script
            return f"{program} would run what cannot be judged: only {program} -c SCRIPT can be read"
        try:
            found = commands(arguments[1])
        except Unreadable as reason:
            return str(reason)
        inner = _Judge(self.protected, self.depth + 1)
        return next(filter(None, map(inner.refusal, found)), "" if found else "the script is empty")

    def _wrapped(self, program: str, arguments: list[str]) -> str:
        rest = _WRAPPERS[program](arguments)
        if rest is None:
            return f"{program} has an option that is not known here"
        reason = _Judge(self.protected, self.depth + 1).refusal(rest)
        # What comes through a pipe is known to nobody beforehand.
        return reason or ("what xargs would hand on is not known" if program == "xargs" else "")

    def _known(self, program: str, arguments: list[str]) -> str:
        check = READERS.get(program) or PROGRAMS.get(program)
        if check is None:
            return f"{program} is not among the programs that may run"
        reasons = (words.refusal(word, self.protected) for word in arguments)
        return next(filter(None, reasons), "") or check(arguments)


def refusal(argv: Sequence[str], protected: Sequence[str] = ()) -> str:
    """Why this argument vector may not run; nothing where it may. ``protected`` are paths of the desired state."""
    return _Judge(tuple(protected)).refusal(argv)


def _after_env(arguments: list[str]) -> list[str] | None:
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option == "--":
            break
        if option == "-u" and rest:
            rest.pop(0)
        elif option not in ("-i", "--ignore-environment"):
            return None
    return rest


def _after(flags: str, valued: str = "", operands: int = 0) -> Callable[[list[str]], list[str] | None]:
    """What follows the options of a wrapper: letters without a value, letters with one, then fixed operands."""

    def rest_of(arguments: list[str]) -> list[str] | None:
        rest = list(arguments)
        while rest and rest[0].startswith("-"):
            option = rest.pop(0)
            if option == "--":
                break
            if re.fullmatch(rf"-[{valued or ' '}]", option) and rest:
                rest.pop(0)
            elif not re.fullmatch(rf"-[{flags or ' '}]+|-[{valued or ' '}]\w+", option):
                return None
        return rest[operands:]

    return rest_of


_WRAPPERS: dict[str, Callable[[list[str]], list[str] | None]] = {
    "env": _after_env,
    "nice": _after("", "n"),
    "ionice": _after("t", "cn"),
    "nohup": _after(""),
    "setsid": _after("fw"),
    "time": _after("p"),
    "timeout": _after("v", "ks", operands=1),
    "stdbuf": _after("", "ioe"),
    "xargs": _after("0rt", "nLPIds"),
}
