#!/usr/bin/python3 -IS
"""One beat of one agent: look at its three task sources, write one state file, start its turn.

``heartbeat AGENT [--full | --dry-run | --health]`` or ``heartbeat AGENT --release TASK --reason TEXT [--block]``.
Described in docs/heartbeats.md. Python 3.6 or newer, standard library only, one file. Two hundred agents on a node
start it two hundred times a round: what it imports is measured (no json, re, subprocess, argparse or datetime).
"""

import _signal as signal  # the module signal makes its numbers readable, which takes 3 ms
import errno
import fcntl
import io
import os
import select
import sys
import time

MAX_OUTPUT = 8 << 20  # bytes that a listing may print; more is rubbish, and memory stays bounded
MAX_DOCUMENT = 1 << 20
MAX_LOG = 256 << 10  # bytes of a turn's log, kept twice
MAX_TASKS = 50  # in the state file, as with what is in progress, remembered and warned of
MAX_LOOKUPS = 10  # dependencies that no listing names and that are asked for one by one, per beat
LONG_FILE = 5 << 10  # bytes of AGENTS.md and HEARTBEAT.md, which every turn of the agent reads
PRIORITIES = ("urgent", "high", "normal", "low", "lowest")
RANKS = {
    "urgent": 0, "critical": 0, "blocker": 0, "highest": 0, "p0": 0, "紧急": 0, "特急": 0, "最高": 0,
    "high": 1, "important": 1, "p1": 1, "高": 1, "重要": 1,
    "normal": 2, "medium": 2, "none": 2, "p2": 2, "中": 2, "普通": 2, "一般": 2,
    "low": 3, "minor": 3, "p3": 3, "低": 3,
    "lowest": 4, "trivial": 4, "p4": 4, "最低": 4,
}  # fmt: skip
STATES = {
    "open": ("", "open", "todo", "to do", "ready", "new", "pending", "unstarted", "待办", "待处理", "未开始"),
    "in_progress": ("in progress", "running", "doing", "started", "claimed", "working", "active", "进行中", "处理中"),
    "review": ("review", "in review", "评审中", "待评审"),
    "later": ("triage", "backlog", "scheduled", "draft", "on hold", "计划中"),
    "blocked": ("blocked", "阻塞", "已阻塞"),
    "done": ("done", "completed", "complete", "closed", "resolved", "finished", "完成", "已完成"),
    "cancelled": ("cancelled", "canceled", "archive", "archived", "abandoned", "rejected", "wontfix", "取消", "已取消"),
}  # fmt: skip
STATE_OF = {word: state for state, words in STATES.items() for word in words}
LIVE = ("open", "in_progress")
BOXES = {
    " ": "open",
    "~": "in_progress",
    "/": "in_progress",
    "!": "blocked",
    "-": "cancelled",
    "x": "done",
    "X": "done",
}
SOURCES = ("workboard", "multica", "documents")
USAGE = "usage: heartbeat AGENT [--full | --dry-run | --health | --release TASK --reason TEXT [--block]]"


class Wrong(Exception):
    """A configuration or command line that a person has to put right; the message names the place."""


class Deadline(Exception):
    """Something took longer than it may."""


# --- JSON: the C parts of the module json without its Python parts, which take 9 ms to load -------

try:
    from _json import encode_basestring_ascii, make_scanner
except ImportError:  # another Python than CPython
    from json.encoder import encode_basestring_ascii
    from json.scanner import make_scanner


class Reading:
    """What the scanner asks for: control characters in strings pass, numbers that are none become null."""

    strict, object_hook, object_pairs_hook, memo = False, None, None, {}
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(_name):
        """NaN and the infinities."""
        return


scan = make_scanner(Reading)


def loads(text):
    """The one JSON value that ``text`` holds. Raises ValueError."""
    try:
        value, end = scan(text, len(text) - len(text.lstrip()))
    except StopIteration:
        raise ValueError("this is not JSON") from None
    except SystemError:  # the scanner has no words for its complaint until the module json is there
        from json import loads as complain

        complain(text)
        raise ValueError("this is not JSON") from None
    except RecursionError:
        raise ValueError("this is nested too deeply") from None
    if text[end:].strip():
        raise ValueError("something follows the JSON")
    return value


def dumps(value):
    """JSON text in ASCII, so that neither a locale nor half a character can spoil it."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, int):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if -1e300 < value < 1e300 else "null"
    if isinstance(value, dict):
        return "{%s}" % ", ".join(
            ["%s: %s" % (encode_basestring_ascii(k), dumps(v)) for k, v in value.items()]
        )
    return "[%s]" % ", ".join([dumps(item) for item in value])


# --- small things ---------------------------------------------------------------------------------


def home(*parts):
    """A path below the account's home; ``~`` in the first part is it, too."""
    return os.path.join(os.path.expanduser("~"), *[os.path.expanduser(part) for part in parts])


def digest(text):
    """The SHA-256 of bytes, in hexadecimal; hashlib would load OpenSSL for it."""
    try:
        from _sha256 import sha256
    except ImportError:
        try:
            from _sha2 import sha256  # its name since Python 3.12
        except ImportError:
            from hashlib import sha256
    return sha256(text).hexdigest()


def cut(text, length=200):
    """``text`` in one line that is not longer than that."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def say(text, stream=1):
    """Print a line, whatever the locale; a reader that went away is no reason to stop."""
    try:
        os.write(stream, (text + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def write_atomically(path, data):
    """Bytes at ``path``: the old file or the whole new one, also after a crash. The caller holds the file's lock."""
    temporary = path + ".new"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_json(path):
    """The object in a file; None where there is none, ``{}`` where it cannot be read as one."""
    try:
        with open(path, "rb") as stream:
            value = loads(stream.read().decode("utf-8", "replace"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def on_alarm(_number, _frame):
    """What ``within`` waits for."""
    raise Deadline


class within:
    """``with within(20):`` raises Deadline in whatever hangs, also in the kernel. Not to be nested."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 0.001))

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)


def hold(path, seconds=None):
    """A lock file's descriptor, locked until it is closed or this process ends. None where it stays taken."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if seconds is None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            with within(seconds):
                fcntl.flock(handle, fcntl.LOCK_EX)
    except (BlockingIOError, Deadline):
        os.close(handle)
        return None
    return handle


def born(pid):
    """When a process began, in the kernel's own unit: with its pid this names it for ever. Empty where unknown."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def is_alive(pid, birth):
    """Whether that very process still runs; where the kernel does not tell its birth, any process of that pid."""
    if birth:
        return born(pid) == birth
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return not os.path.isdir("/proc/self")


def kill_group(pid, number):
    """Signal a process group that may be gone."""
    try:
        os.killpg(pid, number)
    except OSError:
        pass


# --- configuration --------------------------------------------------------------------------------

NUMBERS = {
    "interval": None, "suspected_after": 1800, "recover_after": 2700, "task_limit": 7200, "rounds_max": 100,
    "rounds_warn": 0.8, "dependency_wait": 7200, "source_timeout": 20, "cache_seconds": 60, "turn_timeout": 3600,
}  # fmt: skip


class Configuration:
    """What is declared for one agent, checked; see docs/heartbeats.md for every key."""

    def __init__(self, agent):
        if not agent or agent[0] in "-." or not all(c.isalnum() or c in "-_." for c in agent):
            raise Wrong("%r is no name of an agent\n%s" % (agent, USAGE))
        self.agent, self.path = agent, home(".config/heartbeat", agent + ".json")
        self.state_path = home(".local/state/heartbeat", agent + ".json")
        self.environment = dict(os.environ)

    def beside(self, ending):
        """A file of this agent beside its state file."""
        return self.state_path[: -len("json")] + ending

    def load(self):
        """Read and check the file. Raises Wrong."""
        try:
            with open(self.path, "rb") as stream:
                given = loads(stream.read().decode("utf-8"))
        except FileNotFoundError:
            raise Wrong(
                "%s: there is no such file; one is written for every agent that is declared" % self.path
            ) from None
        except (OSError, ValueError) as error:
            raise Wrong("%s: %s" % (self.path, error)) from None
        self.need(isinstance(given, dict), "", "an object is needed")
        self.given = given
        self.need(given.get("version") == 1, "version", "this program reads version 1")
        self.need(given.get("agent") == self.agent, "agent", "this is the file of %s" % self.agent)
        for key, default in NUMBERS.items():
            setattr(self, key, self.number(given, key, default))
        self.late_after = self.number(given, "late_after", 2 * self.interval)
        for key in ("workspace", "timezone", "multica", "label"):
            value = given.get(key)
            self.need(value is None or isinstance(value, str), key, "a text is needed")
            setattr(self, key, value or "")
        self.need(self.workspace, "workspace", "a directory is needed")
        self.workspace = home(self.workspace)
        rate = given.get("rate_limit") or {}
        self.need(isinstance(rate, dict), "rate_limit", 'an object like {"calls": 6, "per": 60} is needed')
        self.rate = (
            self.number(rate, "calls", 6, "rate_limit."),
            self.number(rate, "per", 60, "rate_limit."),
        )
        self.path_entries = self.texts(given.get("path", []), "path")
        self.turn = self.texts(given.get("turn") or [], "turn")
        self.check_conversation(given.get("conversation") or {})
        self.check_sources(given.get("sources"))
        self.environment["PATH"] = os.pathsep.join(self.search_path())
        # A service of the system has none; what the agent's commands read lies there all the same.
        self.environment.setdefault("HOME", os.path.expanduser("~"))
        if self.timezone:
            os.environ["TZ"] = self.environment["TZ"] = self.timezone
            time.tzset()
        return self

    def need(self, condition, key, what):
        """Raise Wrong that names file and key."""
        if not condition:
            found = self.given.get(key.partition(".")[0]) if hasattr(self, "given") and key else None
            shown = "" if found is None else " (found %s)" % cut(dumps(found), 80)
            raise Wrong("%s: %s%s%s" % (self.path, key and "key %s: " % key, what, shown))

    def number(self, given, key, default, prefix=""):
        """A number above zero."""
        value = given.get(key, default)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        self.need(fits, prefix + key, "a number above zero is needed")
        return value

    def texts(self, value, key):
        """A list of texts."""
        fits = isinstance(value, list) and all(isinstance(item, str) and "\0" not in item for item in value)
        self.need(fits, key, "a list of texts is needed, a command as one text per argument")
        return value

    def check_conversation(self, given):
        """How it is known that the agent talks to somebody."""
        self.need(isinstance(given, dict), "conversation", "an object with command or marker is needed")
        self.talk_command = self.texts(given.get("command") or [], "conversation.command")
        self.talk_marker = given.get("marker") or ""
        self.need(isinstance(self.talk_marker, str), "conversation.marker", "a path is needed")
        self.talk_fresh = self.number(given, "fresh", 600, "conversation.")

    def check_sources(self, given):
        """Commands are lists, and every source is one of the three."""
        self.need(
            isinstance(given, dict) and given, "sources", "an object of %s is needed" % ", ".join(SOURCES)
        )
        self.sources = {}
        for name, source in given.items():
            self.need(name in SOURCES, "sources." + name, "known are %s" % ", ".join(SOURCES))
            self.need(isinstance(source, dict), "sources." + name, "an object is needed")
            for key, words in source.items():
                self.texts(words, "sources.%s.%s" % (name, key))
            needed = "files" if name == "documents" else "list"
            self.need(source.get(needed), "sources.%s.%s" % (name, needed), "it is missing or empty")
            self.sources[name] = source

    def search_path(self):
        """Declared directories first; then the account's own, the session's and the usual: cron's path is short."""
        late = ["/usr/local/bin", "/usr/bin", "/bin", "/opt/homebrew/bin"]
        entries = (
            self.path_entries + ["~/.local/bin", "~/bin"] + self.environment.get("PATH", "").split(os.pathsep)
        )
        seen = {}
        for entry in entries + late:
            seen.setdefault(os.path.expanduser(entry), None)
        return [entry for entry in seen if entry]

    def command(self, words, **more):
        """A declared command with this agent's values in place."""
        values = dict({"agent": self.agent, "multica": self.multica, "label": self.label}, **more)
        found = []
        for word in words:
            for name, value in values.items():
                word = word.replace("{%s}" % name, value)
            found.append(os.path.expanduser(word))
        return found

    def listings(self, name):
        """The commands whose output is this source, as (template, command), and whether they list for everybody."""
        source = self.sources[name]
        shared = sorted(key for key in source if key.startswith("list_all"))
        if shared and is_shared():
            return [source[key] for key in shared], True
        return [source[key] for key in sorted(source) if key.startswith("list") and key not in shared], False


def is_shared():
    """Whether more than one agent is declared on this account."""
    return len([name for name in os.listdir(home(".config/heartbeat")) if name.endswith(".json")]) > 1


# --- commands -------------------------------------------------------------------------------------


def which(name, environment):
    """The program of that name, or None."""
    for entry in [""] if os.sep in name else environment["PATH"].split(os.pathsep):
        candidate = os.path.join(entry, name)
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    return None


def spawn(program, argv, environment, out, err, gate=None, greeting=""):
    """Fork a program in a session of its own; with a ``gate`` it starts only once a byte comes through that pipe.

    Then it prints ``greeting`` first. What goes wrong before the program runs is written to ``err``.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        if gate is None or (os.read(gate, 1) and os.write(1, greeting.encode("utf-8", "replace"))):
            words = [word.encode("utf-8", "surrogateescape") for word in argv]
            os.execve(program, words, environment)
    except BaseException as error:
        say("%s: %s" % (program, error), 2)
    os._exit(126)


def reap(pid, seconds):
    """The exit status of a child, negative for a signal; None if it still runs after that time."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return -(status & 127) if status & 127 else status >> 8
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.01)


class Ran:
    """How a command went: a status word of docs/heartbeats.md, why, what it printed, and how long it took."""

    def __init__(self, status, detail="", output=b"", code=None):
        self.status, self.detail, self.output, self.code = status, detail, output, code
        self.seconds = 0.0


def run(argv, timeout, environment, started=None):
    """Run a command within ``timeout`` seconds; whatever happens, nothing of its process group is left afterwards."""
    program = which(argv[0], environment)
    if program is None:
        return Ran("missing", "there is no command %s" % cut(argv[0]))
    began = time.monotonic()
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    pid = code = None
    try:
        pid = spawn(program, argv, environment, out_end, err_end)
        os.close(out_end)
        os.close(err_end)
        if started:
            started(pid)
        ran, code = collect(pid, out, err, began + timeout)
    finally:
        if pid:
            kill_group(pid, signal.SIGKILL)
            if code is None:
                os.waitpid(pid, 0)
        os.close(out)
        os.close(err)
    if ran.status == "timeout":
        ran.detail = "no answer within %g s" % timeout
    ran.seconds = time.monotonic() - began
    return ran


def collect(pid, out, err, deadline):
    """What a child prints until it ends; a grandchild that keeps the pipe open delays nobody."""
    kept, sizes, pipes, code = {out: [], err: []}, {out: 0, err: 0}, [out, err], None
    while pipes or code is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return Ran("timeout"), code
        ready = select.select(pipes, [], [], min(left, 0.1 if pipes else 0.01))[0]
        for pipe in ready:
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                pipes.remove(pipe)
            sizes[pipe] += len(chunk)
            if pipe == err:
                kept[err] = kept[err][-1:]
            kept[pipe].append(chunk)
        if sizes[out] > MAX_OUTPUT:
            return Ran("rubbish", "it printed more than %d MB" % (MAX_OUTPUT >> 20)), code
        if code is None:
            code = reap(pid, 0)
        elif not ready:
            break
    complaint = b"".join(kept[err]).decode("utf-8", "replace").strip().splitlines()
    if code:
        ended = "signal %d" % -code if code < 0 else "exit status %d" % code
        return Ran("failed", cut(": ".join([ended] + complaint[-1:])), code=code), code
    return Ran("ok", output=b"".join(kept[out]), code=0), code


# --- listings: what commands print, in one shape --------------------------------------------------


def entries(text):
    """The list that a command printed, and whether it says that there is more. Raises ValueError.

    Banners before the JSON are passed over: some commands greet on standard output.
    """
    starts, tries = [0], 0
    while True:
        try:
            value = loads(text[starts[0] :])
            break
        except ValueError:
            tries += 1
            at = starts[0]
            starts = sorted(found + 1 for found in (text.find("\n{", at), text.find("\n[", at)) if found >= 0)
            if not starts or tries > 20:
                raise
    more = isinstance(value, dict) and value.get("has_more") is True
    for _ in range(2):  # {"data": {"cards": [...]}} is two deep
        if isinstance(value, dict) and not names_of(value, "id", "uuid", "identifier"):
            for key in ("cards", "issues", "tasks", "items", "results", "data", "card", "issue", "task"):
                if isinstance(value.get(key), (list, dict)):
                    value = value[key]
                    break
    if isinstance(value, dict) and names_of(value, "id", "uuid", "identifier"):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("there is no list in it")  # noqa: TRY004 - what a command printed, not what a caller passed
    return value, more


def understood(text):
    """The tasks that a command printed with their owners, whether there are more, and what is odd about them."""
    listed, more = entries(text)
    tasks = [pair for pair in map(normal, listed) if pair[0]]
    detail = ""
    if len(tasks) < len(listed):
        detail = "%d of %d entries are no tasks" % (len(listed) - len(tasks), len(listed))
        if not tasks:
            raise ValueError(detail)
    if more:
        detail = "the list was cut off after %d entries; declare a higher limit" % len(listed)
    return tasks, more, detail


def names_of(item, *keys):
    """Texts and numbers under those keys, as texts; of objects their id, of lists each."""
    found = []
    for key in keys:
        values = item.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, dict):
                value = (
                    value.get("id") or value.get("issue_id") or value.get("targetCardId") or value.get("name")
                )
            if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
                found.append(cut(str(value), 120))
    return found


def moment(value):
    """Seconds since 1970 of a number (also milliseconds) or an ISO 8601 text (without a zone: UTC), else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value / 1000.0 if value > 1e11 else float(value)
    if not isinstance(value, str):
        return None
    date, clock = value.strip()[:10], value.strip()[11:]
    try:
        year, month, day = [int(part) for part in date.split("-")]
        sign = next((c for c in clock if c in "+-Z"), "")
        clock, _, zone = clock.partition(sign) if sign else (clock, "", "")
        hours, minutes, seconds = ([float(part) for part in clock.split(":") if part] + [0, 0, 0])[:3]
        zone = zone.replace(":", "")
        offset = (int(zone[:2]) * 60 + int(zone[2:4] or 0)) * (-60 if sign == "-" else 60) if zone else 0
    except ValueError:
        return None
    if not (1 <= month <= 12 and 1970 <= year < 3000):
        return None
    year -= month <= 2  # days of the civil calendar, as if years began in March
    days = 365 * (year - 1970) + (year // 4 - year // 100 + year // 400) - 477
    days += (153 * (month + (9 if month <= 2 else -3)) + 2) // 5 + day - 1 + 59
    return days * 86400 + hours * 3600 + minutes * 60 + seconds - offset


def rank_of(value):
    """How urgent: 0 to 4 for a number or a word, 2 where nothing is said."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(min(max(value, 0), 4))
    word = str(value or "").strip().lower()
    return int(min(int(word), 4)) if word.isdigit() else RANKS.get(word, 2)


def depends(item):
    """The ids that a card or issue waits for: fields, links, and a line ``depends on: ID, ID`` in its text."""
    found = names_of(
        item, "depends_on", "dependsOn", "dependencies", "blocked_by", "blockedBy", "depends_on_task_ids"
    )
    meta = item.get("metadata")
    links = meta.get("links") if isinstance(meta, dict) else item.get("links")
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict) and link.get("type") in ("blocked_by", "parent", "depends_on"):
            found += names_of(link, "targetCardId", "target", "target_id")
    for key in ("notes", "description"):
        for line in str(item.get(key) or "")[:20000].splitlines():
            found += after_colon(line.strip(" -*>\t"))
    return found[:MAX_TASKS]


def after_colon(line):
    """The ids of a line ``depends on: A, B``, else nothing."""
    head, colon, rest = line.replace("：", ":").partition(":")
    if not colon or head.strip().lower() not in (
        "depends on",
        "depends_on",
        "dependencies",
        "blocked by",
        "after",
        "依赖",
    ):
        return []
    return [cut(name, 120) for name in rest.replace("，", ",").replace("、", ",").split(",") if name.strip()]


def normal(item):
    """One card or issue in the program's own shape, and the names of those it belongs to. None where it is neither."""
    if not isinstance(item, dict):
        return None, []
    ids = names_of(item, "id", "uuid", "identifier", "key") or names_of(item, "number")
    title = item.get("title") or item.get("name")
    if not ids or not isinstance(title, str):
        return None, []
    meta = item.get("metadata") if isinstance(item.get("metadata"), dict) else {}
    claim = meta.get("claim") if isinstance(meta.get("claim"), dict) else {}
    word = (
        str(item.get("status") or item.get("state") or "").strip().lower().replace("_", " ").replace("-", " ")
    )
    state = STATE_OF.get(word, "unknown")
    if state == "open" and claim:
        state = "in_progress"
    if state != "done" and (meta.get("archivedAt") or item.get("archived_at")):
        state = "cancelled"
    updated = item.get("updatedAt") or item.get("updated_at") or item.get("updated")
    checks = item.get("checklist") or item.get("subtasks") or item.get("progress")
    task = {
        "id": ids[0],
        "names": ids[1:],
        "title": cut(title),
        "state": state,
        "rank": rank_of(item.get("priority")),
        "due": moment(item.get("due_date") or item.get("dueDate") or item.get("due")),
        "created": moment(item.get("createdAt") or item.get("created_at") or item.get("created")),
        "updated": moment(updated),
        "started": moment(claim.get("claimedAt") or item.get("startedAt") or item.get("started_at")),
        "mark": digest(dumps([word, checks]).encode())[:12],
        "deps": depends(item),
    }
    owners = names_of(item, "agentId", "agent_id", "agent", "assignee_id", "assigneeId", "assignee", "owner")
    return task, [name.lower() for name in names_of(claim, "ownerId") + owners]


def pack(head, tasks):
    """A listing as it stands in the cache: a line about it, then one line per owner, so that nobody reads it all.

    The line ``graph`` tells of every task its state and what it waits for.
    """
    owned, graph = {}, {}
    for task, owners in tasks:
        for owner in set(owners) or {""}:
            owned.setdefault(owner, []).append(task)
        graph[task["id"]] = [task["state"], task["deps"], task["names"]]
    lines, offset, places = [], 0, {}
    for owner, mine in owned.items():
        lines.append(dumps(mine).encode())
        places[owner] = [offset, len(lines[-1])]
        offset += len(lines[-1])
    lines.append(dumps(graph).encode())
    head = dict(head, version=1, owners=places, graph=[offset, len(lines[-1])])
    return dumps(head).encode() + b"\n" + b"".join(lines)


class Listing:
    """The result of one command, read only as far as it is asked for."""

    def __init__(self, stream, cached=False):
        self.stream, self.cached = stream, cached
        self.head = loads(stream.readline(MAX_OUTPUT).decode())
        self.base = stream.tell()
        if not isinstance(self.head, dict) or self.head.get("version") != 1:
            raise ValueError("another version wrote this")

    def part(self, place):
        """A line of it."""
        self.stream.seek(self.base + place[0])
        return loads(self.stream.read(place[1]).decode())

    def tasks(self, names):
        """The tasks of an owner."""
        places = self.head["owners"]
        return [task for name in names if name in places for task in self.part(places[name])]

    def graph(self):
        """State, dependencies and other names of every task by its id."""
        return self.part(self.head["graph"])


class Shared:
    """The commands' results, shared by all agents of this account: one calls, the others wait and read."""

    def __init__(self, conf, oldest, writing=True):
        self.conf, self.oldest, self.writing = conf, oldest, writing
        self.directory = home(".cache/heartbeat")

    def get(self, words, timeout, **more):
        """The result of a declared command, from whoever called it last; never raises."""
        argv = self.conf.command(words, **more)
        key = digest(dumps(argv).encode())
        path = os.path.join(self.directory, key[:24] + ".json")
        found = self.cached(path, argv, self.oldest)
        if found or not self.writing:
            return found or self.call(argv, timeout)
        try:
            # One of 4096 locks: they are never removed, so that nobody ever waits at one that was.
            lock = hold(os.path.join(self.directory, key[:3] + ".lock"), timeout + 5)
        except OSError:
            return self.call(argv, timeout)  # no room for a lock: better hammered once than blind
        if lock is None:
            return self.failed(argv, "timeout", "another beat has been calling this for %g s" % (timeout + 5))
        try:
            # Whoever held the lock may have called meanwhile.
            return self.cached(path, argv, self.oldest) or self.renew(path, lock, words, argv, timeout)
        finally:
            os.close(lock)

    def renew(self, path, lock, words, argv, timeout):
        """Call the command, unless it was called too often, and leave the result for the others."""
        end_leftover(lock)
        if not self.is_permitted(words):
            stale = self.cached(path, argv, 0)
            if stale is None or stale.head["status"] != "ok":
                return self.failed(argv, "limited", "called %d times within %g s already" % self.conf.rate)
            age = time.time() - stale.head["at"]
            stale.head.update(status="limited", detail="called often enough; this is %d s old" % age)
            return stale
        listing = self.call(argv, timeout, lambda pid: note_child(lock, pid))
        try:
            os.ftruncate(lock, 0)
            self.prune()
            listing.stream.seek(0)
            write_atomically(path, listing.stream.read())
        except OSError:
            pass  # a full disk costs the others a call of their own
        return listing

    def cached(self, path, argv, oldest):
        """What somebody called since ``oldest``, and not in the future, or None."""
        try:
            found = Listing(open(path, "rb"), cached=True)  # noqa: SIM115 - read as far as needed, closed with the process
            fits = found.head["argv"] == argv and oldest <= found.head["at"] <= time.time() + 1
            return found if fits else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def call(self, argv, timeout, started=None):
        """Run the command and bring what it prints into one shape."""
        at = time.time()
        ran = run(argv, timeout, self.conf.environment, started)
        tasks, more = [], False
        if ran.status == "ok":
            try:
                tasks, more, ran.detail = understood(ran.output.decode("utf-8", "replace"))
            except (ValueError, RecursionError) as error:
                ran.status, ran.detail = "rubbish", cut("no list of tasks: %s" % error)
        return self.listing(argv, at, ran, tasks, more)

    def failed(self, argv, status, detail):
        """What a command's result would be that was not called."""
        return self.listing(argv, time.time(), Ran(status, detail), [], False)

    @staticmethod
    def listing(argv, at, ran, tasks, more):
        """A listing in memory."""
        head = {
            "argv": argv,
            "at": at,
            "seconds": round(ran.seconds, 3),
            "status": ran.status,
            "detail": ran.detail,
        }
        return Listing(io.BytesIO(pack(dict(head, count=len(tasks), more=more), tasks)))

    def is_permitted(self, words):
        """Whether the declared command, for whomever, was called less often than its rate allows; notes the call."""
        calls, per = self.conf.rate
        path = os.path.join(self.directory, digest(dumps(words).encode())[:24] + ".rate")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # held for microseconds
            now, stamps = time.time(), []
            for word in os.read(handle, 1 << 16).split():
                try:
                    stamps += [float(word)] if now - per < float(word) <= now else []
                except ValueError:
                    pass
            if len(stamps) >= calls:
                return False
            os.ftruncate(handle, 0)
            os.pwrite(handle, "".join(["%f\n" % stamp for stamp in stamps + [now]]).encode(), 0)
            return True
        except OSError:
            return True  # on a full disk nothing can be counted
        finally:
            os.close(handle)

    def prune(self):
        """Remove results that nobody renewed for a day: of commands that are no longer declared."""
        for name in os.listdir(self.directory):
            path = os.path.join(self.directory, name)
            if not name.endswith(".lock") and time.time() - os.stat(path).st_mtime > 86400:
                os.unlink(path)

    def forget(self, words):
        """What was listed is no longer so."""
        try:
            os.unlink(
                os.path.join(self.directory, digest(dumps(self.conf.command(words)).encode())[:24] + ".json")
            )
        except OSError:
            pass


def note_child(lock, pid):
    """Say in the lock file which process is called: should this one be killed, the next one ends it."""
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, ("%d %s" % (pid, born(pid))).encode(), 0)
    except OSError:
        pass


def end_leftover(lock):
    """End the command of a caller that was killed."""
    words = os.pread(lock, 100, 0).decode("ascii", "replace").split()
    if len(words) == 2 and words[0].isdigit() and born(int(words[0])) == words[1]:
        kill_group(int(words[0]), signal.SIGKILL)


# --- the three sources ----------------------------------------------------------------------------


class Look:
    """What the sources say now: the agent's tasks, every task's state and dependencies, and how each source is."""

    def __init__(self, conf, shared):
        self.conf, self.shared = conf, shared
        self.tasks, self.sources, self.warnings, self.graphs = [], {}, [], []
        for name in SOURCES:
            if name == "documents" and name in conf.sources:
                self.read_documents()
            elif name in conf.sources:
                self.read_listings(name)
        self.known = None

    def warn(self, code, detail, tasks=()):
        """Something that a person or the reconciler should know."""
        self.warnings.append({"code": code, "detail": cut(detail, 400), "tasks": list(tasks)[:20]})

    def read_listings(self, name):
        """A source that is one command or several."""
        conf = self.conf
        commands, for_all = conf.listings(name)
        if not conf.multica and (
            (name == "multica" and for_all) or any("{multica}" in w for c in commands for w in c)
        ):
            return  # an agent without an id there has no tasks there
        deadline = time.monotonic() + conf.source_timeout
        report = {"status": "ok", "detail": "", "count": 0, "seconds": 0.0, "cached": True, "at": 0}
        for words in commands:
            listing = self.shared.get(words, max(0.5, deadline - time.monotonic()))
            head = listing.head
            own = any("{agent}" in word or "{multica}" in word for word in words)
            found = listing.tasks(self.names(own))
            self.tasks += [dict(task, source=name) for task in found]
            self.graphs.append(listing)
            report["count"] += len([task for task in found if task["state"] in LIVE])
            report["seconds"] = round(report["seconds"] + (0 if listing.cached else head["seconds"]), 3)
            report["cached"] = report["cached"] and listing.cached
            report["at"] = min(report["at"] or head["at"], head["at"])
            if head["status"] != "ok" or head["detail"]:
                report["detail"] = head["detail"]
            if head["status"] != "ok" and report["status"] in ("ok", "limited"):
                report["status"] = head["status"]
            if head["more"]:
                self.warn("ListCutOff", "%s: %s" % (name, head["detail"]))
        self.sources[name] = report

    def names(self, own):
        """Under which names this agent's tasks stand; what a command lists for it alone needs no name."""
        conf = self.conf
        return ([""] if own else []) + sorted(
            {conf.agent.lower(), conf.multica.lower(), conf.label.lower()} - {""}
        )

    def read_documents(self):
        """The boxes in the workspace's files."""
        began, conf = time.time(), self.conf
        report = {"status": "ok", "detail": "", "count": 0, "seconds": 0.0, "cached": False, "at": began}
        try:
            with within(conf.source_timeout):
                os.listdir(conf.workspace)
                for name in conf.sources["documents"]["files"]:
                    self.read_document(name)
        except Deadline:
            report.update(status="timeout", detail="not read within %g s" % conf.source_timeout)
        except FileNotFoundError:
            report.update(status="missing", detail="there is no directory %s" % conf.workspace)
        except OSError as error:
            report.update(status="failed", detail=str(error))
        found = [task for task in self.tasks if task["source"] == "documents" and task["state"] in LIVE]
        report.update(count=len(found), seconds=round(time.time() - began, 3))
        self.sources["documents"] = report

    def read_document(self, name):
        """The boxes of one file; that there is none is as good as empty."""
        try:
            with open(os.path.join(self.conf.workspace, name), "rb") as stream:
                text = stream.read(MAX_DOCUMENT + 1)
        except FileNotFoundError:
            return
        if name in ("AGENTS.md", "HEARTBEAT.md") and len(text) > LONG_FILE:
            self.warn(
                "FileTooLong",
                "%s has %d bytes; every turn reads it, keep it under %d" % (name, len(text), LONG_FILE),
            )
        if len(text) > MAX_DOCUMENT:
            self.warn(
                "FileTooLong", "%s is longer than %d bytes; the rest was not read" % (name, MAX_DOCUMENT)
            )
        self.tasks += boxes(name, text[:MAX_DOCUMENT].decode("utf-8", "replace"))

    def facts(self):
        """State and dependencies of everything that was listed, by every name it has."""
        if self.known is None:
            self.known = {}
            for listing in self.graphs:
                for main, (state, deps, names) in listing.graph().items():
                    for name in [main] + names:
                        self.known.setdefault(name.lower(), (main, state, deps))
            for task in self.tasks:
                for name in [task["id"]] + task["names"]:
                    self.known.setdefault(name.lower(), (task["id"], task["state"], task["deps"]))
        return self.known

    def look_up(self, name, budget):
        """A dependency that no listing names, asked for by itself: (id, state, dependencies), or None."""
        for source in ("multica", "workboard"):
            words = self.conf.sources.get(source, {}).get("show")
            if words and budget:
                budget.pop()
                listing = self.shared.get(words, self.conf.source_timeout, id=name)
                for main, (state, deps, _) in (
                    listing.graph().items() if listing.head["status"] == "ok" else ()
                ):
                    self.facts()[name.lower()] = (main, state, deps)
                    return self.facts()[name.lower()]
        return None


def boxes(name, text):
    """The tasks of a document: its boxes, ticked ones too, since others may wait for them."""
    found, parents, fence, comment, seen = [], [], "", False, {}
    for number, line in enumerate(text.lstrip("\ufeff").splitlines()):
        line = line.expandtabs(4)
        bare = line.strip()
        if fence:
            fence = "" if bare.startswith(fence) and not bare.strip(fence[0]) else fence
            continue
        if bare.startswith(("```", "~~~")):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
            continue
        comment = (comment or bare.startswith("<!--")) and "-->" not in bare
        indent, mark, label = box(line)
        if comment or mark is None:
            continue
        task = described(name, label, mark, seen)
        task["line"] = number
        while parents and parents[-1][0] >= indent:
            parents.pop()
        for _, parent in parents:
            parent["checks"] += mark  # a box that was ticked below it is progress of what stands above
        parents.append((indent, task))
        found.append(task)
    for task in found:
        task["mark"] = task.pop("checks")
    return found


def box(line):
    """Indentation, mark and text of a line ``- [ ] text``; the mark is None where it is none."""
    bare = line.lstrip()
    head, _, rest = bare.partition(" ")
    rest = rest.lstrip()
    if not (head in ("-", "*", "+") or (head[:-1].isdigit() and head[-1:] in (".", ")"))):
        return 0, None, ""
    if len(rest) < 4 or rest[0] != "[" or rest[2:4] != "] " or rest[1] not in BOXES or not rest[4:].strip():
        return 0, None, ""
    return len(line) - len(bare), rest[1], rest[4:].strip()


def described(name, label, mark, seen):
    """A task of a document: ``(P1)``, ``!high``, ``due:2026-12-01`` and ``(depends on: ID)`` in its text are read."""
    rank, due, title = 2, None, []
    deps, begin = [], label.replace("（", "(").rfind("(")
    inside = label[begin + 1 :].rstrip(" )）.") if begin >= 0 else ""
    if after_colon(inside):
        deps, label = after_colon(inside), label[:begin].rstrip()
    for word in label.replace("（", " （").replace("）", "） ").split():
        core = word.strip("()[]（）!！*_,;").lower()
        if core in RANKS and word[0] in "([（!！":
            rank = RANKS[core]
        elif core.startswith("due:") and moment(core[4:]) is not None:
            due = moment(core[4:])
        else:
            title.append(word)
    title = " ".join(title) or label
    own = "%s#%s" % (name, digest(" ".join(title.lower().split()).encode("utf-8", "replace"))[:8])
    seen[own] = seen.get(own, 0) + 1
    return {
        "id": own if seen[own] == 1 else "%s-%d" % (own, seen[own]), "names": [cut(title).lower()], "title": cut(title),
        "state": BOXES[mark], "rank": rank, "due": due, "created": None, "updated": None, "started": None,
        "checks": mark, "deps": deps, "source": "documents",
    }  # fmt: skip


# --- what to make of it ---------------------------------------------------------------------------


def merged(tasks):
    """The live tasks without duplicates, by id and then by title, most urgent first.

    What is one task in two sources is kept as the first source has it, with the other's name, dependencies and
    urgency, and in progress where either says so.
    """
    found, by_name = [], {}
    for task in tasks:
        title = "".join(c for c in task["title"].lower() if c.isalnum())
        if task["state"] not in LIVE:
            continue
        names = [name.lower() for name in [task["id"]] + task["names"]] + (
            ["title " + title] if title else []
        )
        first = next((by_name[name] for name in names if name in by_name), None)
        if first is None:
            first = dict(task, also=[])
            found.append(first)
        else:
            first["also"] += [task["id"]] if task["id"] != first["id"] else []
            first["deps"] = first["deps"] + task["deps"]
            first["rank"] = min(first["rank"], task["rank"])
            first["updated"] = max(first["updated"] or 0, task["updated"] or 0) or None
            first["state"] = max(first["state"], task["state"], key=LIVE.index)
        for name in names:
            by_name.setdefault(name, first)
    return sorted(
        found, key=lambda task: (task["rank"], task["due"] or 1e12, task["created"] or 1e12, task["id"])
    )


def remember(task, memory, released, now):
    """What is known of a task over several beats: when it moved last, since when it is in progress, its rounds."""
    known = memory.get(task["id"])
    whole = isinstance(known, dict) and all(
        isinstance(known.get(k), (int, float)) for k in ("since", "rounds", "moved")
    )
    if not whole or released > known["since"]:
        known = {"since": now, "rounds": 0, "moved": min(task["updated"] or task["started"] or now, now)}
    elif known.get("mark") != task["mark"] or known.get("state") != task["state"]:
        known["moved"] = now
    elif task["updated"] and (task["updated"] <= now or known.get("stamp") != task["updated"]):
        # A clock that is ahead would make it look fresh for ever: then only a change of that time counts.
        known["moved"] = max(known["moved"], min(task["updated"], now))
    if task["state"] == "in_progress":
        fresh = now if known.get("state") else known["moved"]
        known["began"] = min(task["started"] or known.get("began") or fresh, now)
    else:
        known["began"] = None
    return dict(known, mark=task["mark"], stamp=task["updated"], state=task["state"], source=task["source"])


class Judgement:
    """Which task the next turn is for, and what has to be said about the others."""

    def __init__(self, conf, look, old, ledger, now):
        self.conf, self.look, self.now = conf, look, now
        self.tasks = merged(look.tasks)
        memory = old.get("memory") if isinstance(old.get("memory"), dict) else {}
        self.ledger = ledger.get("tasks") if isinstance(ledger.get("tasks"), dict) else {}
        self.memory = {}
        for task in self.tasks:
            released = self.entry(task["id"]).get("released")
            self.memory[task["id"]] = remember(
                task, memory, released if isinstance(released, (int, float)) else 0, now
            )
        self.paused, self.waiting = set(), set()
        self.check_dependencies()
        for task in self.tasks:
            self.check_limits(task)
        self.in_progress = [self.progress(task) for task in self.tasks if task["state"] == "in_progress"]
        self.carry_over(old, memory)

    def entry(self, name):
        """What the ledger says of a task."""
        found = self.ledger.get(name)
        return found if isinstance(found, dict) else {}

    def carry_over(self, old, memory):
        """A source that does not answer has not finished anything: what was in progress there stays remembered."""
        down = [
            name for name, report in self.look.sources.items() if report["status"] not in ("ok", "limited")
        ]
        before = old.get("in_progress")
        for item in before if isinstance(before, list) else []:
            if isinstance(item, dict) and item.get("source") in down and item.get("id") not in self.memory:
                began, moved = item.get("started") or self.now, item.get("progress_at") or self.now
                self.in_progress.append(dict(item, age=int(self.now - began), stalled=int(self.now - moved)))
        for name, known in memory.items():
            if isinstance(known, dict) and known.get("source") in down:
                self.memory.setdefault(name, known)

    def check_dependencies(self):
        """Who waits for what: done is done; what is cancelled, unknown or in a circle is told, never guessed."""
        waiting = [task for task in self.tasks if task["deps"]]
        if not waiting:
            return
        facts, budget = self.look.facts(), [None] * MAX_LOOKUPS
        for circle in cycles(facts, [task["id"] for task in waiting]):
            self.look.warn(
                "Cycle", "these wait for each other: %s" % " -> ".join(circle + circle[:1]), circle
            )
        for task in waiting:
            left = [
                name for name in dict.fromkeys(task["deps"]) if not self.is_done(task, name, facts, budget)
            ]
            known = self.memory[task["id"]]
            if not left:
                known.pop("waiting", None)
                continue
            self.waiting.add(task["id"])
            since = known.setdefault("waiting", self.now)
            if self.now - since > self.conf.dependency_wait:
                detail = "%s has waited for %s for %d s" % (task["id"], ", ".join(left), self.now - since)
                self.look.warn("DependencyWait", detail, [task["id"]])

    def is_done(self, task, name, facts, budget):
        """Whether a dependency is done; warns where that will not come by itself."""
        main, state, _ = facts.get(name.lower()) or self.look.look_up(name, budget) or (name, None, [])
        if state == "cancelled":
            detail = "%s waits for %s, which was cancelled" % (task["id"], main)
            self.look.warn("DependencyCancelled", detail, [task["id"], main])
        elif state is None:
            detail = "%s waits for %s, which no source knows" % (task["id"], name)
            self.look.warn("DependencyUnknown", detail, [task["id"], name])
        return state == "done"

    def check_limits(self, task):
        """Rounds, and the time that a task may take."""
        conf, known = self.conf, self.memory[task["id"]]
        rounds, most, named = known["rounds"], conf.rounds_max, "%s (%s)" % (task["id"], task["title"])
        if rounds >= most:
            self.paused.add(task["id"])
            self.look.warn(
                "RoundsLimit", "%s had %d of %d turns and is paused" % (named, rounds, most), [task["id"]]
            )
        elif rounds >= conf.rounds_warn * most:
            self.look.warn("RoundsWarn", "%s had %d of %d turns" % (named, rounds, most), [task["id"]])
        if known["began"]:
            age, stalled = self.now - known["began"], self.now - max(known["moved"], known["began"])
            if age > conf.task_limit:
                detail = "%s has been in progress for %d s, %d s are the limit" % (
                    named,
                    age,
                    conf.task_limit,
                )
                self.look.warn("TaskTooLong", detail, [task["id"]])
            if stalled > conf.suspected_after:
                self.look.warn("Stalled", "%s has not moved for %d s" % (named, stalled), [task["id"]])

    def progress(self, task):
        """A task in progress as the state file tells it."""
        known, entry = self.memory[task["id"]], self.entry(task["id"])
        moved = max(known["moved"], known["began"])
        return {
            "id": task["id"], "title": task["title"], "source": task["source"], "started": known["began"],
            "progress_at": moved, "age": int(self.now - known["began"]), "stalled": int(self.now - moved),
            "rounds": known["rounds"], "timeouts": entry.get("timeouts") or 0, "depends_on": task["deps"],
            "seen": self.now,
        }  # fmt: skip

    def next_task(self):
        """What the turn is for: work in progress before new work. Or None, and whether all waits, is paused or done."""
        for state in reversed(LIVE):
            for task in self.tasks:
                if task["state"] == state and task["id"] not in self.paused | self.waiting:
                    return task, "turn"
        down = [report for report in self.look.sources.values() if report["status"] not in ("ok", "limited")]
        if not self.tasks:
            return None, "degraded" if down else "idle"
        return None, "paused" if self.paused else "waiting"


def cycles(facts, names):
    """Circles of tasks that wait for each other, reachable from ``names``, each once (Tarjan, without recursion)."""
    order, low, stack, waiting, found = {}, {}, [], set(), []

    def successors(name):
        _, state, deps = facts.get(name.lower(), (name, "done", []))
        return [] if state == "done" else [facts[dep.lower()][0] for dep in deps if dep.lower() in facts]

    for root in names:
        work = [] if root in order else [(root, iter(successors(root)))]
        if work:
            order[root] = low[root] = len(order)
            stack.append(root)
            waiting.add(root)
        while work:
            name, rest = work[-1]
            child = next(rest, None)
            if child is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == order[name]:
                    circle = [stack.pop()]
                    while circle[-1] != name:
                        circle.append(stack.pop())
                    waiting.difference_update(circle)
                    circle.reverse()
                    if len(circle) > 1 or name in successors(name):
                        found.append(circle)
            elif child not in order:
                order[child] = low[child] = len(order)
                stack.append(child)
                waiting.add(child)
                work.append((child, iter(successors(child))))
            elif child in waiting:
                low[name] = min(low[name], order[child])
    return found


def conversation(conf, now):
    """Whether the agent talks to somebody: True, False, or None where the declared command does not tell."""
    if conf.talk_marker:
        try:
            if now - os.stat(home(conf.command([conf.talk_marker])[0])).st_mtime < conf.talk_fresh:
                return True
        except OSError:
            pass
    if not conf.talk_command:
        return False
    ran = run(conf.command(conf.talk_command), min(conf.source_timeout, 10), conf.environment)
    return {0: True, 1: False}.get(ran.code)


# --- the turn: a process of its own that outlives the beat, and one that watches it ---------------


class Turn:
    """The agent's turn: whether one runs, and the start of the next."""

    def __init__(self, conf):
        self.conf, self.path = conf, conf.beside("turn.json")
        self.record, self.lock, self.gate = {}, None, None

    def is_running(self, acting):
        """Whether a turn runs, by its watcher's lock or, should that have been killed, by its own process.

        Where there is none and this beat is ``acting``, the lock is this beat's from now on.
        """
        self.record = read_json(self.path) or {}
        self.lock = hold(self.conf.beside("turn.lock")) if acting else peek(self.conf.beside("turn.lock"))
        if self.lock is None:
            return True
        pid, started = self.record.get("pid"), self.record.get("started")
        if (
            not isinstance(pid, int)
            or self.record.get("ended")
            or not is_alive(pid, self.record.get("birth"))
        ):
            return False
        late = isinstance(started, (int, float)) and time.time() - started > self.conf.turn_timeout
        if acting and late:  # nobody else does it any more
            kill_group(pid, signal.SIGKILL)
            return False
        return True

    def told(self, running):
        """The turn as the state file tells it."""
        if not self.record:
            return None
        told = {
            key: self.record.get(key) for key in ("pid", "started", "ended", "status", "task", "timed_out")
        }
        return dict(told, running=running)

    def prepare(self, program, task, now):
        """Fork the turn and its watcher; it waits until ``let_go``. Should this beat be killed, it never starts."""
        gate, self.gate = os.pipe()
        told, tell = os.pipe()
        values = {"task": task["id"], "title": task["title"]}
        self.before = self.record
        self.record = {"pid": None, "started": now, "status": None, "task": task["id"], "timed_out": False}
        if os.fork() == 0:
            try:
                os.setsid()
                if os.fork() == 0:
                    os.close(self.gate)
                    os.close(told)
                    self.watch(program, self.conf.command(self.conf.turn, **values), gate, tell)
            finally:
                os._exit(0)
        os.close(gate)
        os.close(tell)
        os.wait()
        word = os.read(told, 40)  # the watcher has the lock, and its own copy of everything
        os.close(told)
        os.close(self.lock)
        self.record["pid"] = int(word) if word else None
        return bool(word)

    def let_go(self):
        """Start it."""
        os.write(self.gate, b"!")

    def watch(self, program, argv, gate, tell):
        """Keep the turn's output and time, and record its end; one that was never let go leaves no trace."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(self.conf.own_lock)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        out, out_end = os.pipe()
        greeting = "--- %s %s\n" % (local_time(self.record["started"]), self.record["task"])
        pid = spawn(program, argv, self.conf.environment, out_end, out_end, gate, greeting)
        os.close(out_end)
        self.record.update(pid=pid, birth=born(pid))
        self.write()
        try:
            os.write(tell, b"%d" % pid)
        except OSError:
            pass  # the beat was killed: the turn will not be let go
        os.close(tell)
        log = Log(self.conf.beside("turn.log"))
        status, timed_out = self.keep(pid, out, log)
        self.record.update(ended=time.time(), status=status, timed_out=timed_out)
        self.record = self.record if log.used else self.before
        self.write()

    def keep(self, pid, out, log):
        """Pass output on to the log until the turn ends; after its time, end its process group."""
        deadline, timed_out, status, pipes = time.monotonic() + self.conf.turn_timeout, False, None, [out]
        while True:
            left = deadline - time.monotonic()
            if left <= 0 and status is not None:
                return status, timed_out  # something that it left behind still prints
            if left <= 0:
                kill_group(pid, signal.SIGKILL if timed_out else signal.SIGTERM)
                timed_out, deadline, left = True, time.monotonic() + 10, 10
            ready = select.select(pipes, [], [], min(left, 1.0 if pipes and status is None else 0.1))[0]
            chunk = os.read(out, 1 << 16) if ready else b""
            log.write(chunk)
            pipes = pipes if chunk or not ready else []
            if status is None:
                status = reap(pid, 0)
                if status is not None:
                    deadline = min(deadline, time.monotonic() + 1)
                    kill_group(pid, signal.SIGKILL if timed_out else 0)
            elif not chunk:
                return status, timed_out

    def write(self):
        """Record how it stands; on a full disk the next beat finds out by itself."""
        try:
            write_atomically(self.path, dumps(self.record).encode())
        except OSError:
            pass


def peek(path):
    """Like ``hold`` for one who must not write: True where nobody holds the lock, None where somebody does."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return None
    finally:
        os.close(handle)


class Log:
    """The turns' output: a file and the one before it, neither longer than MAX_LOG."""

    def __init__(self, path):
        self.path, self.used = path, False

    def write(self, data):
        """Append. A full disk must not stop a turn."""
        self.used = self.used or bool(data)
        try:
            if os.path.isfile(self.path) and os.stat(self.path).st_size + len(data) > MAX_LOG:
                os.rename(self.path, self.path + ".1")
            with open(self.path, "ab") as stream:
                stream.write(data)
        except OSError:
            pass


def local_time(moment_):
    """A time as people in the declared time zone read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(moment_))


# --- one beat -------------------------------------------------------------------------------------


def beat(conf, full, dry):
    """Look, judge, write, start the turn. Returns the exit code."""
    if not dry:
        conf.own_lock = hold(conf.beside("lock"))
        if conf.own_lock is None:
            say("another beat of %s is running" % conf.agent, 2)
            return 3
    began = time.time()
    try:
        conf.load()
    except Wrong as error:
        if not dry:
            record_wrong(conf, str(error), began)
        raise
    old, ledger = read_json(conf.state_path), read_json(conf.beside("ledger.json"))
    shared = Shared(conf, began if full else began - conf.cache_seconds, writing=not dry)
    look = Look(conf, shared)
    if old == {}:
        look.warn("StateLost", "the state file could not be read; ages and rounds are counted anew")
    if ledger == {}:
        look.warn("LedgerLost", "the ledger could not be read")
    now = time.time()
    judged = Judgement(conf, look, old or {}, ledger or {}, now)
    turn = Turn(conf)
    running = turn.is_running(acting=not dry)
    task, outcome, talking = decide(conf, judged, turn, running)
    for name, report in look.sources.items():
        if report["status"] != "ok":
            look.warn("SourceDown", "%s: %s %s" % (name, report["status"], report["detail"]))
    state = state_of(conf, judged, outcome, talking, task)
    scheduled = now if not full else (old or {}).get("scheduled_beat")
    state.update(turn=turn.told(running), full=full, scheduled_beat=scheduled)
    if dry:
        return show(conf, state, task)
    return finish(conf, state, turn, task)


def decide(conf, judged, turn, running):
    """The task for the turn (None: no turn), the outcome, and whether the agent is in a conversation."""
    look, record = judged.look, turn.record
    if running:
        return None, "turn", False
    failed = record.get("ended") and (record.get("status") or record.get("timed_out"))
    if failed:
        how = "its time was over" if record.get("timed_out") else "status %s" % record.get("status")
        look.warn("TurnFailed", "the last turn ended with: %s" % how, [str(record.get("task"))])
    elif record.get("pid") and not record.get("ended"):
        look.warn("TurnLost", "nobody saw how the last turn ended", [str(record.get("task"))])
    if look.sources and all(report["status"] not in ("ok", "limited") for report in look.sources.values()):
        return None, "degraded", False
    task, outcome = judged.next_task()
    if task is None or not conf.turn:
        return None, "idle" if task else outcome, False
    talking = conversation(conf, judged.now)
    if talking is None:
        look.warn("ConversationUnknown", "%s does not tell whether there is one" % conf.talk_command[0])
    if talking is not False:
        return None, "conversation", talking
    if which(conf.command(conf.turn)[0], conf.environment) is None:
        look.warn("TurnMissing", "there is no command %s" % conf.turn[0], [task["id"]])
        return None, "turn-failed", False
    return task, "turn", False


def state_of(conf, judged, outcome, talking, turn_for):
    """The state file's content. The turn that is about to start counts as a round of its task."""
    now = judged.now
    if turn_for:
        judged.memory[turn_for["id"]]["rounds"] += 1
        for item in judged.in_progress:
            item["rounds"] += item["id"] == turn_for["id"]
    with open(__file__, "rb") as stream:
        program = digest(stream.read())[:12]
    listed = [
        {"id": task["id"], "title": task["title"], "source": task["source"], "priority": PRIORITIES[task["rank"]],
         "status": task["state"], "also": task["also"][:5], "waiting": task["id"] in judged.waiting,
         "paused": task["id"] in judged.paused}
        for task in judged.tasks
    ]  # fmt: skip
    kept = {
        name: known
        for name, known in judged.memory.items()
        if known.get("began") or known.get("rounds") or known.get("waiting")
    }
    counts = {state: len([task for task in judged.tasks if task["state"] == state]) for state in LIVE}
    return {
        "version": 1, "agent": conf.agent, "program": program, "beat": now, "beat_at": iso(now),
        "beat_local": local_time(now), "interval": conf.interval, "late_after": conf.late_after, "outcome": outcome,
        "sources": judged.look.sources, "open": counts["open"], "in_progress_total": counts["in_progress"],
        "tasks": listed[:MAX_TASKS], "in_progress": judged.in_progress[: 2 * MAX_TASKS],
        "warnings": judged.look.warnings[:MAX_TASKS], "turn": None, "conversation": talking,
        "memory": dict(list(kept.items())[: 4 * MAX_TASKS]),
    }  # fmt: skip


def iso(now):
    """A time in ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))


def finish(conf, state, turn, task):
    """Write the state, and only then let the turn go: what cannot be counted is not started."""
    if task:
        program = which(conf.command(conf.turn)[0], conf.environment)
        turn.prepare(program, task, state["beat"])
        state["turn"] = turn.told(running=True)
    try:
        write_atomically(conf.state_path, dumps(state).encode())
    except OSError as error:
        say(
            "%s: %s; the state of the last beat stays, and no turn is started"
            % (conf.state_path, error.strerror),
            2,
        )
        return 2
    if task:
        turn.let_go()
    return 2 if state["outcome"] == "degraded" and not any_source(state) else 0


def any_source(state):
    """Whether any source could be used."""
    return any(report["status"] in ("ok", "limited") for report in state["sources"].values())


def record_wrong(conf, why, now):
    """A configuration that cannot be used stands in the state file; what the last beat saw stays, its time too."""
    state = read_json(conf.state_path) or {"version": 1, "agent": conf.agent, "beat": 0}
    warning = {"code": "Configuration", "detail": why, "tasks": []}
    state.update(outcome="misconfigured", attempted=now, warnings=[warning])
    try:
        os.makedirs(os.path.dirname(conf.state_path), mode=0o700, exist_ok=True)
        write_atomically(conf.state_path, dumps(state).encode())
    except OSError as error:
        say("%s: %s" % (conf.state_path, error.strerror), 2)


def show(conf, state, task):
    """What a beat would do, for a person; nothing was written and nothing is started."""
    say("%s at %s: %s" % (conf.agent, state["beat_local"], state["outcome"]))
    for name, report in state["sources"].items():
        detail = ": " + report["detail"] if report["detail"] else ""
        say("  source %s: %s, %d tasks%s" % (name, report["status"], report["count"], detail))
    for item in state["tasks"]:
        marks = [word for word in ("waiting", "paused") if item[word]]
        words = (item["priority"], item["status"], item["id"], item["title"], ", ".join(marks))
        say(("  %s %s %s %s %s" % words).rstrip())
    for warning in state["warnings"]:
        say("  warning %s: %s" % (warning["code"], warning["detail"]))
    if task:
        say("  would start: %s" % " ".join(conf.command(conf.turn, task=task["id"], title=task["title"])))
    else:
        say("  would start no turn")
    return 0


def health(conf, now):
    """Whether the last beat is recent and its content healthy: exit code and one line why."""
    state = read_json(conf.state_path)
    why = "no beat yet" if state is None else illness(state, now)
    say(
        "%s: %s"
        % (conf.agent, why or "healthy, %s, %d open" % (state.get("outcome"), state.get("open") or 0))
    )
    return 2 if why else 0


def illness(state, now):
    """Why a state file is not that of a healthy agent, or nothing."""
    last, late = state.get("beat"), state.get("late_after")
    if not isinstance(last, (int, float)) or isinstance(last, bool):
        return "the state file cannot be read"
    if state.get("outcome") == "misconfigured":
        return str((state.get("warnings") or [{}])[0].get("detail"))
    if now - last > (late if isinstance(late, (int, float)) else 1800):
        return "the last beat is %d s old" % (now - last)
    if last - now > 300:
        return "the last beat lies %d s in the future" % (last - now)
    sources = state.get("sources")
    if not isinstance(sources, dict):
        return "the state file cannot be read"
    down = ["%s is %s" % (name, sources[name]["status"]) for name in sorted(sources)]
    down = [text for text in down if not text.endswith((" ok", " limited"))]
    if down:
        return "degraded: %s" % ", ".join(down)
    if state.get("outcome") in ("turn-failed", "paused"):
        return "%s: %s" % (state["outcome"], "; ".join([w["detail"] for w in state["warnings"]][-1:]))
    return ""


# --- release: give a task back --------------------------------------------------------------------


def release(conf, name, reason, block):
    """Give a task back through the declared commands, once; the ledger records it when all of it was done."""
    conf.load()
    path = conf.beside("ledger.json")
    lock = hold(conf.beside("ledger.lock"), 30)
    if lock is None:
        say("the ledger is in use", 2)
        return 2
    state, ledger = read_json(conf.state_path) or {}, read_json(path)
    if ledger == {}:
        raise Wrong("%s: this is no ledger; move it away" % path)
    ledger = ledger or {"version": 1, "forced_beat": 0, "restarted": 0, "tasks": {}}
    entry = ledger["tasks"].setdefault(name, {})
    task = find(state, name)
    if "releasing" not in entry and (task is None or (entry.get("released") or 0) >= task["since"]):
        known = entry.get("released") and (entry.get("blocked") or not block)
        say(
            "%s was released already" % name
            if known
            else "%s: the last beat saw no such task in progress" % name
        )
        return 0 if known else 1
    if "releasing" not in entry:
        entry["releasing"] = {"at": time.time(), "source": task["source"], "reason": reason, "done": []}
        write_atomically(path, dumps(ledger).encode())
    doing = entry["releasing"]
    for step in steps(conf, doing["source"], block):
        if step not in doing["done"]:
            why = take(conf, doing["source"], step, name, reason, block)
            if why:
                say("%s was not released: %s" % (name, why), 2)
                return 2
            doing["done"].append(step)
            write_atomically(path, dumps(ledger).encode())
    entry.pop("releasing")
    entry.update(
        timeouts=(entry.get("timeouts") or 0) + 1,
        released=time.time(),
        blocked=block,
        reason=cut(reason, 400),
    )
    write_atomically(path, dumps(ledger).encode())
    say("%s: %s" % (name, said(name, doing)))
    return 0


def said(name, doing):
    """What was done, in words."""
    words = {"release": "card released", "block": "issue blocked", "comment": "commented"}
    if doing["source"] == "workboard":
        words["block"] = "card blocked"
    words["note"] = "note added to %s" % name.partition("#")[0]
    return ", ".join([words[step] for step in doing["done"]]) or "no command is declared for it"


def find(state, name):
    """A task in the last beat's state: its source, and since when it stands as it stands."""
    for item in state.get("in_progress") or []:
        if item.get("id") == name:
            return {"source": item["source"], "since": max(item["started"], item["progress_at"])}
    for item in state.get("tasks") or []:
        if item.get("id") == name:
            return {"source": item["source"], "since": state["beat"]}
    return None


def steps(conf, source, block):
    """What releasing means there, in order."""
    if source == "documents":
        return ["note"]
    declared = conf.sources.get(source, {})
    first = ["block", "release"] if block or source == "multica" else ["release"]
    first = [step for step in first if declared.get(step)][:1]
    return first + [step for step in ("comment",) if declared.get(step)]


def take(conf, source, step, name, reason, block):
    """One step. Returns why it failed, or nothing."""
    if step == "note":
        return write_note(conf, name, reason, block)
    ran = run(
        conf.command(conf.sources[source][step], id=name, reason=reason),
        conf.source_timeout,
        conf.environment,
    )
    if ran.status == "ok":
        shared = Shared(conf, 0)
        for words in conf.listings(source)[0]:
            shared.forget(words)
    return "" if ran.status == "ok" else "%s %s: %s" % (step, ran.status, ran.detail)


def write_note(conf, name, reason, block):
    """Unmark a box that is in progress, and say below it why. Returns why that failed, or nothing."""
    path = os.path.realpath(os.path.join(conf.workspace, name.partition("#")[0]))
    try:
        with open(path, "rb") as stream:
            data = stream.read()
        text = data.decode("utf-8", "surrogateescape")
        task = next((task for task in boxes(name.partition("#")[0], text) if task["id"] == name), None)
        if task is None:
            return "the box is no longer there"
        lines = text.splitlines(True)
        line = lines[task["line"]]
        ending = line[len(line.rstrip("\r\n")) :] or "\n"
        at = line.index("[")
        lines[task["line"]] = line[:at] + ("[!]" if block else "[ ]") + line[at + 3 :].rstrip("\r\n") + ending
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        what = "blocked" if block else "released"
        lines.insert(
            task["line"] + 1,
            "%s> %s %s: %s%s" % (indent, local_time(time.time()), what, cut(reason, 400), ending),
        )
        mode = os.stat(path).st_mode & 0o7777
        write_atomically(path, "".join(lines).encode("utf-8", "surrogateescape"))
        os.chmod(path, mode)
    except OSError as error:
        return str(error)
    return ""


# --- command line ---------------------------------------------------------------------------------


def arguments(words):
    """Agent and options. Raises Wrong."""
    options, names, rest = {}, [], list(words)
    while rest:
        word = rest.pop(0)
        if word in ("--full", "--dry-run", "--health", "--block"):
            options[word] = True
        elif word in ("--release", "--reason") and rest:
            options[word] = rest.pop(0)
        elif word.startswith("-"):
            raise Wrong("%s is no option, or lacks its value\n%s" % (word, USAGE))
        else:
            names.append(word)
    alone = [word for word in options if word not in ("--reason", "--block")]
    if len(names) != 1 or len(alone) > 1 or ("--release" in options) != ("--reason" in options):
        raise Wrong(USAGE)
    return names[0], options


def on_end(number, _frame):
    """Asked to stop: leave through the ``finally`` of whatever runs, so that no command is left behind."""
    raise SystemExit(128 + number)


def main(words):
    """The command. Returns its exit code."""
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, on_end)
    try:
        name, options = arguments([os.fsencode(word).decode("utf-8", "surrogateescape") for word in words])
        conf = Configuration(name)
        if "--health" in options:
            return health(conf, time.time())
        if "--release" in options:
            return release(conf, options["--release"], options["--reason"], "--block" in options)
        return beat(conf, "--full" in options, "--dry-run" in options)
    except Wrong as error:
        say("error: %s" % error, 2)
        return 1
    except OSError as error:
        say("error: %s" % error, 2)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
