"""Single words of commands: paths that may be written, packages, units, addresses. Deny by default."""

from __future__ import annotations

import fnmatch
import ipaddress
import posixpath
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

# What nobody proposes for a machine's good: keys, and the files that controllers depend on.
_PRIVATE = re.compile(
    r"(?:^|/)(?:\.ssh|\.gnupg|\.aws|\.netrc|\.npmrc|\.pypirc|\.kube|\.docker|\.env|shadow|gshadow|sudoers(?:\.d)?|"
    r"nodes\.json|projects\.json|id_[a-z0-9]+)(?:/|$)",
    re.IGNORECASE,
)
_SYSTEM = re.compile(r"/+(?:dev|proc|sys|boot)(?:/|$)", re.IGNORECASE)
_BELOW = re.compile(
    r"(?:~|/home/[^/]+|/Users/[^/]+|/root|/tmp|/var/tmp|/opt/[^/]+|/srv|/usr/local/[^/]+)/[^/].*|[^/~.-][^~]*|\.[^/.~].*"
)
_SCRATCH = re.compile(r"(?:/tmp|/var/tmp)/[^/].*")
_LEFTOVER = re.compile(r".*[^/]\.(?:lock|lck|pid|sock|socket|tmp|part)")
_EXPANDED = re.compile(r"[$`\\]|\{\{|\{%|\{#")
_PACKAGE = re.compile(
    r"(?:@[a-z0-9][a-z0-9._-]{0,100}/)?[A-Za-z0-9][A-Za-z0-9._+-]{0,100}(?:\[[A-Za-z0-9,_-]{1,60}\])?"
    r"(?:(?:@[\^~]?|===?|[<>~!]=|[<>]|=)[A-Za-z0-9][A-Za-z0-9.+_:~-]{0,60})?"
)
_ARCHIVE = re.compile(r"\.(?:tgz|tar|gz|xz|bz2|zst|zip|whl|deb|rpm|jar|git|egg)$", re.IGNORECASE)
_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._:-]{0,120}")
_UNIT_OF_THE_END = re.compile(
    r"systemd-|(?:reboot|poweroff|halt|kexec|emergency|rescue|debug-shell|suspend|hibernate)\b"
)
_MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]*(?:/[A-Za-z0-9_][A-Za-z0-9._+@-]*)*")
_URL_PATH = re.compile(r"[A-Za-z0-9._~/+@%:,=&?-]*")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")


def refusal(word: str, protected: Sequence[str] = ()) -> str:
    """Why no command may have this word, whatever the program."""
    if not word.isprintable():
        return "a word has characters that cannot be printed"
    if _EXPANDED.search(word):
        return f"something could expand {word}"
    return next(filter(None, (_path_refusal(path, protected) for path in _paths(word))), "")


def _path_refusal(path: str, protected: Sequence[str]) -> str:
    if ".." in path.split("/"):
        return f"where {path} leads is not certain"
    normal = posixpath.normpath(path)
    if _SYSTEM.match(normal) and normal != "/dev/null":
        return f"{path} belongs to the system"
    if _PRIVATE.search(normal):
        return f"{path} is protected"
    for pattern in protected:
        if _is_protected(normal, pattern):
            return f"{path} is protected (by the entry {pattern} of the desired state)"
    return ""


def _paths(word: str) -> list[str]:
    """The word, and what could be a path in it: after ``=``, ``:`` or ``,``, or right after an option's letter."""
    found = [word, *re.split(r"[=:,]", word)]
    glued = [re.sub(r"^-+[A-Za-z-]*(?=[/~.])", "", part) for part in found]
    return list(dict.fromkeys(part for part in (*found, *glued) if part))


def _is_protected(path: str, pattern: str) -> bool:
    wanted = pattern.rstrip("/")
    if "/" not in wanted:
        return any(fnmatch.fnmatchcase(part, wanted) for part in path.split("/"))
    # The home directory has several spellings; what is below a protected directory is protected, too.
    tail = re.sub(r"^(?:~|/home/[^/]+|/Users/[^/]+|/root)(?=/)", "~", path)
    parts = tail.split("/")
    spellings = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    relative = wanted.removeprefix("~/")
    return any(fnmatch.fnmatchcase(spelling, wanted) or spelling == relative for spelling in spellings)


def is_target(path: str) -> bool:
    """Whether a command may write there: below homes, /tmp, /opt, /srv, /usr/local, never those themselves."""
    normal = posixpath.normpath(path)
    return bool(_BELOW.fullmatch(normal)) and not re.search(r"[*?\[\]{}:\s]", path)


def is_scratch(path: str) -> bool:
    """Whether nothing can be lost there."""
    return bool(_SCRATCH.fullmatch(posixpath.normpath(path))) and is_target(path)


def is_leftover(path: str) -> bool:
    """Whether deleting it loses nothing: locks, sockets, temporary files."""
    return is_target(path) and (is_scratch(path) or bool(_LEFTOVER.fullmatch(path)))


def is_package(name: str) -> bool:
    """A package of a registry, perhaps with a version: no option, address, path, file or shell character."""
    if not _PACKAGE.fullmatch(name) or _ARCHIVE.search(name) or name.endswith("-"):
        return False
    version = re.split(r"(?<=.)@|[=<>~!]", name, maxsplit=1)[1:]
    # npm reads "x@file:y" and "x@npm:y" as other sources; only Debian's epochs have a colon ("x=1:2.0").
    return not version or ":" not in version[0] or bool(re.fullmatch(r"[^=]+=\d{1,3}:[\d][^:]*", name))


def is_unit(name: str) -> bool:
    """The name of a unit, not of one that ends or isolates the machine."""
    kinds_apart = (".target", ".mount", ".swap", ".slice", ".scope")
    return bool(_UNIT.fullmatch(name)) and not name.endswith(kinds_apart) and not _UNIT_OF_THE_END.match(name)


def is_member(path: str) -> bool:
    """A relative path inside an archive."""
    return bool(_MEMBER.fullmatch(path))


def is_url(text: str, *, secure: bool = False) -> bool:
    """An address without user, password and fragment; not that of a cloud's metadata."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    if (
        parts.scheme not in (("https",) if secure else ("https", "http"))
        or "@" in parts.netloc
        or parts.fragment
    ):
        return False
    if not _HOST.fullmatch(host) or parts.netloc.lower() not in (host, f"{host}:{port}"):
        return False
    rest = text.split("://", 1)[1]
    return bool(_URL_PATH.fullmatch(rest)) and not _is_metadata(host)


def _is_metadata(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_link_local
    except ValueError:
        # 2852039166 and 0xa9fea9fe are spellings of an address, too.
        return bool(re.fullmatch(r"[\d.]+|0x[0-9a-f.x]+", host)) or host.startswith("metadata.")
