"""Look at an agent's heartbeat: its files, its timer, its last beat; node side, read-only, Python 3.6 or newer."""

import os
import time

lib = None  # set by the driver
# What prepare() was told, for the one request that this process answers.
_ANSWERS = {}  # type: dict[object, object]

COMPARED = ("file", "program", "config", "timer", "schedule", "former", "beat", "tasks")
PROPERTIES = ("Id", "LoadState", "ActiveState", "UnitFileState", "NeedDaemonReload")
UNHEALTHY = {
    "degraded": "none of its task sources answers",
    "turn-failed": "the agent's turn cannot be started",
    "misconfigured": "the program refuses its configuration",
}
# A clock that was set back makes a beat seem to come; by so much it may differ from the file's writer.
CLOCK_SKEW = 60
# After so long nobody is told any more of a task that was taken away.
FORGET_AFTER = 86400


def observe(args, _connection):
    """Files, timer, last beat and stuck tasks; ``provider`` is what the controller knows of the model providers."""
    files = args["files"]
    workspace = os.path.dirname(lib.expand(files["file"]["path"]))
    facts = {
        "agent": args["agent"], "label": args["settings"]["label"], "late_after": args["settings"]["late_after"],
        "file": lib.describe(lib.expand(files["file"]["path"]), files["file"]["sha256"]),
        "program": _program(files), "config": _content(files["config"]["path"]),
        "sizes": {name: _size(os.path.join(workspace, name)) for name in ("HEARTBEAT.md", "AGENTS.md")},
        "provider": args.get("provider"),
    }  # fmt: skip
    facts.update(_timer(args))
    facts["former"] = ", ".join(map(title, former(args))) or "none"
    facts.update(beat(args, read_json(args["state"]), read_json(args["ledger"]), time.time()))
    return facts


def _content(path):
    """The digest of a file, or what stands there in its place."""
    facts = lib.describe(lib.expand(path), want_text=False)
    return facts["content"] if facts["type"] == "file" else facts["type"]


def _program(files):
    """The digest of the program, or what is wrong with what starts it."""
    content, launcher = _content(files["program"]["path"]), files["launcher"]
    if content != files["program"]["sha256"]:
        return content
    if _content(launcher["path"]) != launcher["sha256"] or not os.access(
        lib.expand(launcher["path"]), os.X_OK
    ):
        return "cannot be started: %s is not as shipped" % launcher["path"]
    if os.path.realpath(lib.expand(launcher["link"])) != os.path.realpath(lib.expand(launcher["path"])):
        return "not linked from %s" % launcher["link"]
    return content


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


# --- the timer ---


def prepare(several):
    """Ask each manager once for all agents of the node."""
    wanted = {}
    for args in several:
        if args["manager"] == "systemd":
            wanted.setdefault(args["scope"], []).append(args["timer_files"]["unit"] + ".timer")
    for scope, units in wanted.items():
        try:
            answers = _show(scope, units)
        except lib.TimedOut as error:
            answers = [error] * len(units)
        if len(answers) == len(units):
            _ANSWERS.update({(scope, unit): answers[number] for number, unit in enumerate(units)})


def _show(scope, units):
    return lib.show_units(scope, units, PROPERTIES, ": declare timer: cron or launchd")


def _timer(args):
    """What its files are (``timer``) and whether it will fire (``schedule``)."""
    return {"systemd": _systemd, "cron": _cron, "launchd": _launchd}[args["manager"]](args)


def _systemd(args):
    unit = args["timer_files"]["unit"] + ".timer"
    key = (args["scope"], unit)
    answer = _ANSWERS[key] if key in _ANSWERS else _show(args["scope"], [unit])[0]
    if isinstance(answer, Exception):
        raise answer
    seen = dict(line.split("=", 1) for line in answer.splitlines() if "=" in line)
    if seen.get("LoadState") == "not-found":
        state = "missing"
    elif seen.get("UnitFileState", "").startswith("masked"):
        state = "masked"
    elif seen.get("ActiveState") != "active":
        state = "stopped" if seen.get("ActiveState") == "inactive" else seen.get("ActiveState", "stopped")
    elif seen.get("UnitFileState") not in ("enabled", "enabled-runtime"):
        state = "not enabled"
    else:
        state = "systemd has not read it" if seen.get("NeedDaemonReload") == "yes" else "active"
    return {"timer": _timer_files(args), "schedule": state}


def _timer_files(args):
    """The declared digest where all files are as declared, else what is wrong with the first that is not."""
    for file in args["timer_files"]["files"]:
        found = _content(file["path"])
        if found != file["sha256"]:
            return "%s is %s" % (
                file["name"],
                found if found in ("absent", "symlink", "directory", "special file") else "other",
            )
    return args["timer_files"]["sha256"]


def crontab():
    """The lines of this account's crontab; none where there is no crontab."""
    if "crontab" not in _ANSWERS:
        result = lib.run(["crontab", "-l"], timeout=8)
        if result.status != 0 and "no crontab" not in result.err.lower():
            raise RuntimeError("crontab: %s" % result.complaint())
        _ANSWERS["crontab"] = result.out.splitlines(True) if result.status == 0 else []
    return _ANSWERS["crontab"]


def block(lines, agent):
    """Where the lines of an agent begin and end in a crontab; both None where they are missing."""
    marks = ["# reconciler heartbeat %s %s\n" % (agent, word) for word in ("begin", "end")]
    if marks[0] not in lines or marks[1] not in lines[lines.index(marks[0]) :]:
        return None, None
    first = lines.index(marks[0])
    return first, lines.index(marks[1], first) + 1


def _cron(args):
    try:
        lines = crontab()
    except FileNotFoundError:
        return {"timer": "absent", "schedule": "no crontab on this node"}
    first, end = block(lines, args["agent"])
    if first is None:
        return {"timer": "absent", "schedule": "missing"}
    digest = lib._new_sha256(0)
    digest.update("".join(lines[first:end]).encode("utf-8"))
    alike = [file for file in args["timer_files"]["files"] if file["sha256"] == digest.hexdigest()]
    content = args["timer_files"]["sha256"] if alike else "crontab is other"
    return {"timer": content, "schedule": "active" if _cron_runs() else "cron is not running"}


def _cron_runs():
    """Whether a cron daemon runs; taken for granted where processes cannot be listed so."""
    if "cron" not in _ANSWERS:
        names = set()
        for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
            if entry.isdigit():
                try:
                    with open("/proc/%s/comm" % entry) as stream:
                        names.add(stream.read().strip())
                except OSError:
                    continue
        _ANSWERS["cron"] = not names or bool(names & {"cron", "crond", "cronie", "fcron", "busybox"})
    return _ANSWERS["cron"]


def _launchd(args):
    if "launchd" not in _ANSWERS:
        try:
            result = lib.run(["launchctl", "list"], timeout=8)
        except FileNotFoundError:
            raise RuntimeError("no launchctl on this node: declare timer: systemd or cron") from None
        _ANSWERS["launchd"] = {line.split("\t")[-1].strip() for line in result.out.splitlines()[1:]}
    loaded = args["timer_files"]["unit"] in _ANSWERS["launchd"]
    return {"timer": _timer_files(args), "schedule": "active" if loaded else "not loaded"}


def former(args):
    """Other timers that still start this agent: what was declared before."""
    return [way for way in args["other_timers"] if _is_there(args, way)]


def title(way):
    """A timer's manager, for people."""
    return way["manager"] + (" of the machine" if way["scope"] == "system" else "")


def _is_there(args, way):
    if way["manager"] == "cron":
        try:
            return block(crontab(), args["agent"])[0] is not None
        except (OSError, RuntimeError, lib.TimedOut):  # there is none, or none for us
            return False
    if way["scope"] == "system" and os.geteuid() != 0:
        return False  # of root's own agent, which may have the same name
    return any(os.path.lexists(lib.expand(file["path"])) for file in way["timer_files"]["files"])


# --- the beat ---


def read_json(path):
    """The object in a file; None where there is none, a text that says why where it cannot be used."""
    import json

    try:
        with open(lib.expand(path), "rb") as stream:
            found = json.loads(stream.read(4 << 20).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return "unreadable: %s" % error
    return found if isinstance(found, dict) else "unreadable: no object"


def beat(args, state, ledger, now):
    """What the state file and the ledger say at ``now``; pure."""
    provider = args.get("provider") or {}
    facts = {"outage": provider.get("outage") is True, "installed": _installed(args, now)}
    ledger = ledger if isinstance(ledger, dict) else {}
    facts["ledger"] = {key: _number(ledger.get(key)) for key in ("forced_beat", "restarted")}
    if not isinstance(state, dict) or not _number(state.get("beat")):
        said = state if isinstance(state, str) else "never"
        return dict(facts, beat=said, healthy=False, age=None, stuck=[], released=[], warnings=[])
    config, age = args["settings"], now - _number(state["beat"])
    word = condition(state, age, config["late_after"])
    # A full beat counts as one that arrived by itself only where nothing tells them apart.
    scheduled = _number(state.get("scheduled_beat", state["beat"]))
    tasks = [task for task in state.get("in_progress") or [] if isinstance(task, dict) and task.get("id")]
    known = ledger.get("tasks") if isinstance(ledger.get("tasks"), dict) else {}
    return dict(
        facts, beat=word, healthy=word == "fresh", age=round(age, 1), at=_number(state["beat"]),
        outcome=str(state.get("outcome", "")),
        scheduled_age=round(now - scheduled, 1) if scheduled else None,
        stuck=stuck(tasks, known, _number(state["beat"]), config), released=released(tasks, known, now),
        in_progress=[_shown(task) for task in tasks[:10]], warnings=_warnings(state), open=state.get("open"),
        titles=_titles(state),
        pending={name: source.get("count") for name, source in _sources(state) if source.get("status") == "ok"},
        stagnation=max([_number(task.get("stalled")) for task in tasks] or [0.0]),
    )  # fmt: skip


def condition(state, age, late_after):
    """``fresh``, or what is wrong with the last beat in a few words."""
    if age > late_after or age < -CLOCK_SKEW:
        return "late: %s" % (_span(age) + " old" if age > 0 else "in the future")
    word = UNHEALTHY.get(state.get("outcome"), "fresh")
    # Where one source of several is down, the others are looked at, and people are told which one it is.
    usable = [source for _, source in _sources(state) if source.get("status") in ("ok", "limited")]
    return "fresh" if state.get("outcome") == "degraded" and usable else word


def stuck(tasks, known, at, config):
    """Tasks in progress that stand still at ``at``, each with its stage: ``suspected`` or ``recover``.

    The clock of a task begins anew with every sign of progress, and when it was taken away from the agent: one that
    is taken up again has all of its time. What was flagged since then is not flagged again.
    """
    found = []
    for task in tasks:
        entry = known.get(str(task["id"])) or {}
        sign = max(
            _number(task.get("started")), _number(task.get("progress_at")), _number(entry.get("released"))
        )
        still = at - sign if sign else _number(task.get("stalled"))
        if still >= config["recover_after"]:
            stage = "recover"
        elif still >= config["suspected_after"]:
            stage = "flagged" if _number(entry.get("flagged")) > sign else "suspected"
        else:
            continue
        found.append(
            {
                "id": str(task["id"]), "title": str(task.get("title") or "")[:200],
                "source": str(task.get("source") or ""), "stage": stage, "still": round(still, 1),
                "timeouts": int(_number(entry.get("timeouts"))),
            }
        )  # fmt: skip
    return found


def released(tasks, known, now):
    """Tasks that were taken away lately, and not taken up again since: who is told follows from ``timeouts``."""
    signs = {
        str(task["id"]): max(_number(task.get("started")), _number(task.get("progress_at"))) for task in tasks
    }
    found = []
    for name, entry in sorted(known.items()):
        moment = _number(entry.get("released")) if isinstance(entry, dict) else 0
        if moment and now - moment < FORGET_AFTER and signs.get(name, 0) <= moment:
            keys = ("title", "source", "reason", "blocked")
            found.append(
                dict(
                    {key: entry.get(key) for key in keys if entry.get(key) is not None},
                    id=name, timeouts=int(_number(entry.get("timeouts"))), at=moment,
                )
            )  # fmt: skip
    return found


def _warnings(state):
    found = state.get("warnings")
    return [item for item in found if isinstance(item, dict)][:50] if isinstance(found, list) else []


def _shown(task):
    found = {"id": str(task["id"]), "title": str(task.get("title") or "")[:200]}
    return dict(found, **{key: _number(task.get(key)) for key in ("age", "stalled", "rounds")})


def _titles(state):
    """What is left to do, for people: the first few."""
    tasks = state.get("tasks")
    named = [task for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
    return [str(task.get("title") or task.get("id"))[:80] for task in named[:5]]


def _sources(state):
    sources = state.get("sources")
    return [(k, v) for k, v in sources.items() if isinstance(v, dict)] if isinstance(sources, dict) else []


def _installed(args, now):
    """Seconds since the agent's configuration was written, or None: one that is new has not beaten yet."""
    try:
        return round(now - os.stat(lib.expand(args["files"]["config"]["path"])).st_mtime, 1)
    except OSError:
        return None


def _number(value):
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


def _span(seconds):
    for size, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return "%d %s" % (seconds // size, word)
    return "%d s" % seconds


# --- comparing ---


def changes(declared, facts):
    """Declared fields that differ. While every provider rests, nothing that only they explain does."""
    found = []
    for field in ("file", "program", "config", "timer"):
        if field not in declared:
            continue
        seen, fixable = facts[field], True
        if isinstance(seen, dict):
            fixable = seen["type"] in ("file", "symlink", "absent")
            seen = seen.get("content", seen["type"])
        if seen != declared[field]:
            note = "" if fixable else "only files and links are ever replaced"
            found.append(_change(field, declared[field], seen, fixable, note))
    idle = "cron" in facts.get("schedule", "")
    if "schedule" in declared and facts["schedule"] != declared["schedule"]:
        note = "cron is not ours to start" if idle else ""
        found.append(_change("schedule", declared["schedule"], facts["schedule"], not idle, note))
    if "former" in declared and facts["former"] != declared["former"]:
        note = "it stays until the declared one runs" if idle else ""
        found.append(_change("former", declared["former"], facts["former"], not idle, note))
    if facts["outage"]:
        return found
    if "beat" in declared and not facts["healthy"]:
        found.append(_change("beat", declared["beat"], facts["beat"]))
    due = [task for task in facts["stuck"] if task["stage"] != "flagged"]
    if "tasks" in declared and due:
        seen = ", ".join("%s: %s" % (task["id"], task["stage"]) for task in due)
        found.append(_change("tasks", declared["tasks"], seen))
    return found


def _change(field, desired, observed, fixable=True, note=""):
    return {"field": field, "desired": desired, "observed": observed, "fixable": fixable, "note": note}
