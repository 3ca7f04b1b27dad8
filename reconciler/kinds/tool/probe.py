"""Look for a command and its version, and say whether a version will do.

Runs on nodes (Python 3.6 or newer) and, for the comparison, on the controller.
"""

lib = None  # set by the driver

COMPARED = ("version", "content")
RELEASE = 9  # what sorts after every kind of pre-release
_VERSION = r"(?<![\w.])v?(\d+(?:\.\d+)+(?:[-.]?(?:a|b|c|rc|alpha|beta|dev|pre|next)[-.]?\d*)?)"


def observe(args, _connection):
    """``{path, version, content}`` of the first such command; ``broken`` where it does not even say its version."""
    path = lib.which(args["command"], args.get("path") or ())
    facts = {"path": path, "installable": args.get("installable", bool(args.get("install")))}
    if path is None:
        return facts
    if args.get("content"):
        facts["content"] = lib.sha256(path)
    try:
        result = lib.run(
            [path] + list(args["version_args"]), timeout=10, env=lib.environment(args.get("path") or ())
        )
    except lib.TimedOut:
        raise RuntimeError("%s %s did not end within 10 s" % (path, " ".join(args["version_args"]))) from None
    except OSError as error:
        facts["broken"] = "cannot be started: %s" % error.strerror
        return facts
    pattern = args.get("version_regex")
    version = find_version(result.out, pattern) or find_version(result.err, pattern)
    if version is not None:
        facts["version"] = version
    elif result.status != 0:
        facts["broken"] = "ended with %s: %s" % (result.status, result.complaint())
    return facts


def find_version(text, pattern=None):
    """The first group of ``pattern`` in ``text``, or the first thing like a version; None where there is none."""
    if pattern is None:
        for word in text.split():
            numbers = word[1:].split(".") if word.startswith("v") else word.split(".")
            if len(numbers) > 1 and all(number.isdecimal() for number in numbers):
                return ".".join(numbers)
            if any(character.isdecimal() for character in word):
                break  # not as simple as that
        else:
            return None
    import re  # takes every node 5 ms to load, and most tools say no more than "name 1.2.3"

    match = re.search(pattern or _VERSION, text)
    return match.group(1) if match else None


# --- from here on only for steps: a look leaves it away ---


def changes(declared, facts):
    """Absent, broken, of another version, or of other content; fixable where an install method is declared."""
    fixable = bool(facts.get("installable"))
    note = "" if fixable else "no install method is declared"
    wanted = declared.get("version", "any")
    if facts.get("path") is None:
        seen = "absent"
    elif facts.get("broken"):
        seen = "%s %s" % (facts["path"], facts["broken"])
    elif wanted != "any" and not facts.get("version"):
        seen = "%s prints no version" % facts["path"]
    elif wanted != "any" and not satisfies(facts["version"], wanted):
        seen = "%s (%s)" % (facts["version"], facts["path"])
    elif declared.get("content") and facts.get("content") != declared["content"]:
        return [_change("content", declared["content"], facts.get("content"), fixable, note)]
    else:
        return []
    return [_change("version", "any version" if wanted == "any" else wanted, seen, fixable, note)]


def _change(field, desired, observed, fixable, note):
    return {"field": field, "desired": desired, "observed": observed, "fixable": fixable, "note": note}


# --- versions ---------------------------------------------------------------------------------------
# The controller's plan and the node's last look before it acts must agree, and nodes have no packaging
# library: one small comparison serves both. Its results are tested against packaging's.


def parse_version(text):
    """A key that sorts as versions do: numbers count, a pre-release comes before its release."""
    import re

    match = re.match(
        r"^v?(\d+(?:\.\d+)*)(?:[-.]?(a|alpha|b|beta|c|rc|pre|next|dev)[-.]?(\d*))?", text.strip()
    )
    if not match:
        raise ValueError("%r is no version" % text)
    numbers = [int(part) for part in match.group(1).split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    ranks = {
        "dev": 0,
        "a": 1,
        "alpha": 1,
        "b": 2,
        "beta": 2,
        "c": 3,
        "rc": 3,
        "pre": 3,
        "next": 3,
        None: RELEASE,
    }
    return (numbers, ranks[match.group(2)], int(match.group(3) or 0))


_BOUND = r"\d+(?:\.\d+)*(?:\.\*|[-.]?(?:a|alpha|b|beta|c|rc|pre|next|dev)[-.]?\d*)?"


def parse_range(text):
    """``>=2.0,<3`` as (operator, version text) pairs. Raises ValueError."""
    import re

    found = []
    for part in text.split(","):
        match = re.match(r"^\s*(>=|<=|==|!=|~=|>|<|)\s*v?(%s)\s*$" % _BOUND, part)
        if not match or (match.group(2).endswith(".*") and match.group(1) not in ("==", "!=", "")):
            raise ValueError('%r is no version range; write it like ">=2.0", ">=2.0,<3" or "==2.1.*"' % text)
        operator, version = match.group(1) or "==", match.group(2)
        parse_version(version[:-2] if version.endswith(".*") else version)
        if operator == "~=" and "." not in version:
            raise ValueError("~= needs two parts at least, as in ~=2.1")
        found.append((operator, version))
    return found


def satisfies(version, wanted):
    """Whether a version lies in a range."""
    try:
        seen = parse_version(version)
    except ValueError:
        return False
    return all(_holds(seen, operator, bound) for operator, bound in parse_range(wanted))


def _holds(seen, operator, bound):
    if bound.endswith(".*"):
        prefix = [int(part) for part in bound[:-2].lstrip("v").split(".")]
        numbers = (seen[0] + [0] * len(prefix))[: len(prefix)]
        return (numbers == prefix) == (operator == "==")
    import re

    other = parse_version(bound)
    if operator == "~=":
        prefix = [int(part) for part in re.match(r"\d+(?:\.\d+)*", bound).group(0).split(".")][:-1]
        numbers = (seen[0] + [0] * len(prefix))[: len(prefix)]
        return seen >= other and numbers == prefix
    if operator == "<" and seen[0] == other[0] and other[1] == RELEASE:
        return False  # 3.0rc1 is no version below 3 for whoever excludes 3
    return {
        ">=": seen >= other, "<=": seen <= other, ">": seen > other,
        "<": seen < other, "==": seen == other, "!=": seen != other,
    }[operator]  # fmt: skip
