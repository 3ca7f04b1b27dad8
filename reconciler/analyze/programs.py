"""The programs that an analyzer's command may name, each with the options and operands that are known to be safe.

What overwrites or deletes is not here, or only in the form that keeps what was there. Adding a program means adding
a line, with the options that were looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from reconciler.analyze import words

Check = Callable[[list[str]], str]
_NUMBER = re.compile(r"\d{1,6}[smhd]?")
_MODE = re.compile(r"0?[0-7]{3}|[ugoa]*[-+=][rwxX]*(?:,[ugoa]*[-+=][rwxX]*)*")
_OWNER = re.compile(r"[a-z_][a-z0-9_-]*(?::[a-z_][a-z0-9_-]*)?")
_REF = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)*")
_MODULE_FLAG = "-m"


def anything(_operand: str) -> bool:
    """No more to check than what every word is checked for."""
    return True


def nothing(_operand: str) -> bool:
    """No operands."""
    return False


def a_number(text: str) -> bool:
    """A count or a duration."""
    return bool(_NUMBER.fullmatch(text))


def a_word(text: str) -> bool:
    """Letters, digits and what joins them."""
    return bool(_REF.fullmatch(text))


def of(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    """An operand of that form."""
    return lambda text: bool(pattern.fullmatch(text))


@dataclass(frozen=True)
class Grammar:
    """The options and operands of one program or one of its verbs. Called with arguments, says why they are refused."""

    options: str = ""
    """Options without a value, as people write them: ``-f --force``."""
    valued: Mapping[str, Callable[[str], bool]] = field(default_factory=dict)
    """Options with a value, each with what the value has to be."""
    operand: Callable[[str], bool] = anything
    first: Callable[[str], bool] | None = None
    """What the first operand has to be, where it is another."""
    least: int = 0
    one_of: str = ""
    """Options of which one has to be there, because without it something is lost."""

    def __call__(self, arguments: list[str]) -> str:
        """Why these arguments are refused; nothing where they are not."""
        known, rest = self.options.split(), list(arguments)
        operands, given = [], set()
        while rest:
            word = rest.pop(0)
            if word == "--":
                operands += rest
                if any(operand.startswith("-") for operand in rest):
                    return "operands that look like options are not known here"
                break
            if not word.startswith("-") or word == "-":
                operands.append(word)
                continue
            reason = self._option(word, known, rest)
            if reason:
                return reason
            given |= {word, *(f"-{letter}" for letter in word[1:] if not word.startswith("--"))}
        if self.one_of and not given & set(self.one_of.split()):
            return f"it could overwrite something: it needs one of {self.one_of}"
        return self._operands(operands)

    def _option(self, word: str, known: list[str], rest: list[str]) -> str:
        name, equals, value = word.partition("=")
        if name in self.valued:
            if not equals:
                if not rest:
                    return f"the option {name} lacks its value"
                value = rest.pop(0)
            return "" if self.valued[name](value) else f"{value!r} is no value for {name} here"
        if word in known:
            return ""
        # Letters may stand together, as long as each is known by itself.
        if re.fullmatch(r"-[A-Za-z0-9]{2,}", word) and all(f"-{letter}" in known for letter in word[1:]):
            return ""
        return f"the option {word} is not known here"

    def _operands(self, operands: list[str]) -> str:
        if len(operands) < self.least:
            return "something is missing after the program"
        for number, operand in enumerate(operands):
            check = self.first if self.first is not None and number == 0 else self.operand
            if not check(operand):
                return f"{operand!r} is not allowed there"
        return ""


@dataclass(frozen=True)
class Verbs:
    """A program whose first word that is no option says what it does; ``options`` may stand before it."""

    verbs: Mapping[str, Check]
    options: str = ""
    valued: Mapping[str, Callable[[str], bool]] = field(default_factory=dict)

    def __call__(self, arguments: list[str]) -> str:
        """Why these arguments are refused; nothing where they are not."""
        rest = list(arguments)
        while rest and rest[0].startswith("-"):
            option = rest.pop(0)
            if option in self.valued and rest and self.valued[option](rest[0]):
                rest.pop(0)
            elif option not in self.options.split():
                return f"the option {option} is not known here"
        if not rest or rest[0] not in self.verbs:
            return f"{rest[0]!r} is not allowed there" if rest else "something is missing after the program"
        return self.verbs[rest[0]](rest[1:])


def _systemctl(arguments: list[str]) -> str:
    """Units of the account may be stopped; those of the system only started: one of them is how we get in."""
    rest = [word for word in arguments if word not in ("--user", "--no-pager", "--quiet", "-q")]
    own = "--user" in arguments
    read = {verb: Grammar(operand=words.is_unit) for verb in _UNIT_READS.split()}
    start = {verb: Grammar("--now", operand=words.is_unit) for verb in _UNIT_STARTS.split()}
    stop = {verb: Grammar("--now", operand=words.is_unit, least=1) for verb in _UNIT_STOPS.split()}
    return Verbs({**read, **start, **(stop if own else {})})(rest)


_UNIT_READS = "status is-active is-enabled is-failed show cat list-units list-timers daemon-reload"
_UNIT_STARTS = "start restart try-restart reload reload-or-restart enable reset-failed"
_UNIT_STOPS = "stop disable"


def _last_is_target(grammar: Grammar, *, all_of_them: bool = False) -> Check:
    def check(arguments: list[str]) -> str:
        operands = [word for word in arguments if not word.startswith("-")]
        for path in operands if all_of_them else operands[-1:]:
            if not words.is_target(path):
                return f"{path} is not a place that a command may write to"
        return grammar(arguments)

    return check


def _rm(arguments: list[str]) -> str:
    for word in arguments:
        letters = word[1:] if re.fullmatch(r"-[A-Za-z]+", word) else ""
        if "r" in letters.lower() or (word.startswith("--r") and "--recursive".startswith(word)):
            return "what is deleted with everything below it cannot be brought back"
    return _REMOVE(arguments)


_REMOVE = Grammar("-f -v --force --verbose", operand=words.is_leftover, least=1)


def _python(arguments: list[str]) -> str:
    if len(arguments) > 2 and arguments[0] == _MODULE_FLAG and arguments[1] in _MODULES:  # noqa: PLR2004 - -m, module, words
        return _MODULES[arguments[1]](arguments[2:])
    return "what Python would run cannot be judged"


def _date(arguments: list[str]) -> str:
    return "" if all(word == "-u" or word.startswith("+") for word in arguments) else "it could set the clock"


def _install(options: str, **valued: Callable[[str], bool]) -> Grammar:
    named = {f"--{name}": check for name, check in valued.items()}
    return Grammar(options, valued=named, operand=words.is_package, least=1)


_NPM = "-g --global --no-audit --no-fund --ignore-scripts --silent --no-progress"
_PIP = "--user --upgrade -U -q --quiet --no-input --no-cache-dir --disable-pip-version-check"
_READ = Grammar(operand=a_word)

_PIP_VERBS = Verbs({"install": _install(_PIP), "list": _READ, "show": _READ, "check": _READ})
_MODULES: dict[str, Check] = {
    "pip": _PIP_VERBS,
    "venv": Grammar("--upgrade-deps --system-site-packages", operand=words.is_target, least=1),
}
_NPM_INSTALL = _install(_NPM, prefix=words.is_target, loglevel=a_word)
_NPM_VERBS = dict.fromkeys(("install", "i", "add", "update"), _NPM_INSTALL)
_NPM_READS = {
    verb: Grammar(_NPM, operand=a_word) for verb in ("ls", "list", "view", "outdated", "root", "prefix")
}
_GIT_FLAGS = "--ff-only --short --oneline --stat --tags --prune -v -q --quiet --all"
_GIT_VERBS = {
    verb: Grammar(_GIT_FLAGS, operand=a_word, valued={"-n": a_number})
    for verb in ("status", "fetch", "pull", "log", "diff", "show", "rev-parse")
}
_CHANGED = "-R -v --recursive --verbose"
_JOURNAL = {
    "-u": words.is_unit,
    "--unit": words.is_unit,
    "-n": a_number,
    "--lines": a_number,
    "--since": a_word,
}

PROGRAMS: dict[str, Check] = {
    "mkdir": Grammar("-p -v --parents", valued={"-m": of(_MODE)}, operand=words.is_target, least=1),
    "touch": Grammar("-a -m -c", operand=words.is_target, least=1),
    "cp": _last_is_target(
        Grammar("-a -r -R -p -v -n -b -f --no-clobber --backup", least=2, one_of="-n -b --no-clobber --backup")
    ),
    "mv": _last_is_target(
        Grammar("-v -n -b --no-clobber --backup", least=2, one_of="-n -b --no-clobber --backup"), all_of_them=True
    ),
    "ln": _last_is_target(Grammar("-s -n -r -v --symbolic", least=2)),
    "chmod": Grammar(_CHANGED, operand=words.is_target, first=of(_MODE), least=2),
    "chown": Grammar(_CHANGED, operand=words.is_target, first=of(_OWNER), least=2),
    "chgrp": Grammar(_CHANGED, operand=words.is_target, first=of(_OWNER), least=2),
    "rm": _rm,
    "cd": Grammar(operand=words.is_target, least=1),
    "systemctl": _systemctl,
    "loginctl": Verbs({"enable-linger": Grammar(operand=a_word), "list-sessions": Grammar(operand=nothing)}),
    "launchctl": Verbs({"list": _READ, "kickstart": Grammar("-k", operand=a_word, least=1)}),
    "npm": Verbs({**_NPM_VERBS, **_NPM_READS}, options=_NPM, valued={"--prefix": words.is_target}),
    "pip": _PIP_VERBS,
    "pip3": _PIP_VERBS,
    "pipx": Verbs({"install": _install(""), "upgrade": _install(""), "reinstall": _install(""), "list": _READ}),
    "brew": Verbs({"install": _install("-q"), "upgrade": _install("-q"), "list": _READ}),
    "cargo": Verbs({"install": _install("-q --locked")}),
    "python": _python,
    "python3": _python,
    "git": Verbs(_GIT_VERBS, valued={"-C": words.is_target}),
    "curl": Grammar(
        "-f -s -S -L -I --fail --silent --show-error --location --head",
        valued={
            "-o": words.is_scratch, "--output": words.is_scratch, "-m": a_number, "--max-time": a_number,
            "--connect-timeout": a_number, "--retry": a_number,
        },
        operand=words.is_url, least=1,
    ),
    "wget": Grammar("-q --quiet", valued={"-O": words.is_scratch}, operand=words.is_url, least=1, one_of="-O"),
}  # fmt: skip

# With every option: they have none that writes.
_ONLY_LOOK = (
    "cat", "head", "tail", "ls", "stat", "wc", "which", "readlink", "realpath", "basename", "dirname", "echo", "printf",
    "id", "whoami", "df", "du", "free", "pgrep", "true", "false", "test", "sleep", "sha256sum", "md5sum", "cmp",
    "diff", "uptime", "tr", "cut", "grep", "uname", "nproc", "lsof",
)  # fmt: skip


def _no_objection(_arguments: list[str]) -> str:
    return ""


READERS: dict[str, Check] = {
    **dict.fromkeys(_ONLY_LOOK, _no_objection),
    "date": _date,
    "ps": Grammar("-e -f -A", operand=of(re.compile("aux|ax"))),  # "e" shows everybody's environment
    "journalctl": Grammar("--user --no-pager -q", valued=_JOURNAL, operand=nothing),
    "command": Grammar("-v", operand=a_word, one_of="-v", least=1),
}
