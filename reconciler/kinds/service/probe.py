"""Look at a unit of systemd or launchd; node side, read-only, Python 3.6 or newer."""

import os
import time

lib = None  # set by the driver
# What prepare() was told, by scope and unit, for the one request that this process answers.
_ANSWERS = {}  # type: dict[tuple[str, str], object]

COMPARED = ("unit", "enabled", "state", "fresh")
PROPERTIES = (
    "LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "NRestarts", "NeedDaemonReload",
    "FragmentPath", "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic", "Result",
)  # fmt: skip


def observe(args, _connection):
    """Unit file, whether enabled, state, and ``stale``: why the running process is older than its inputs."""
    facts = (
        {"file": lib.describe(lib.expand(args["unit_path"]), args.get("unit"))} if args.get("unit") else {}
    )
    manager = _launchd if args["manager"] == "launchd" else _systemd
    facts.update(manager(args))
    return facts


def prepare(several):
    """Ask each manager once for all units: a program per unit costs a node some 6 ms, a hung manager 8 s."""
    wanted = {}
    for args in several:
        if args["manager"] == "systemd":
            wanted.setdefault(args["scope"], []).append(args["unit_name"])
    for scope, units in wanted.items():
        try:
            answers = _show(scope, units)
        except lib.TimedOut as error:
            answers = [error] * len(units)
        except RuntimeError:
            continue  # perhaps because of one of them: each is asked for alone
        if len(answers) == len(units):
            _ANSWERS.update({(scope, unit): answers[number] for number, unit in enumerate(units)})


def _show(scope, units):
    return lib.show_units(scope, units, PROPERTIES, " (is its service manager launchd?)")


def _systemd(args):
    key = (args["scope"], args["unit_name"])
    answer = _ANSWERS[key] if key in _ANSWERS else _show(args["scope"], [args["unit_name"]])[0]
    if isinstance(answer, Exception):
        raise answer
    seen = dict(line.split("=", 1) for line in answer.splitlines() if "=" in line)
    enabled = seen.get("UnitFileState", "")
    return {
        "state": _state(seen), "substate": seen.get("SubState", ""), "result": seen.get("Result", ""),
        "enabled": enabled, "masked": enabled.startswith("masked") or seen.get("LoadState") == "masked",
        "restarts": int(seen.get("NRestarts") or 0), "pid": int(seen.get("MainPID") or 0),
        "fragment": seen.get("FragmentPath", ""), "stale": _stale(seen, args),
    }  # fmt: skip


def _state(seen):
    """``running``, ``stopped``, ``failed``, ``starting`` (which includes waiting to be restarted) or ``missing``."""
    active = seen.get("ActiveState", "")
    if active in ("active", "reloading"):
        return "running"
    if active == "failed":
        return "failed"
    if active == "activating":
        return "starting"
    return "missing" if seen.get("LoadState") == "not-found" else "stopped"


def _stale(seen, args):
    """Why a restart is due, read off the node alone: one lost to a crash is due still."""
    if seen.get("NeedDaemonReload") == "yes":
        return "systemd has not read the unit file as it is now"
    started = int(seen.get("ExecMainStartTimestampMonotonic") or 0)
    started = started or int(seen.get("ActiveEnterTimestampMonotonic") or 0)
    if not started:
        return ""
    return newer_input(args, time.time() - (time.monotonic() - started / 1e6))


def newer_input(args, started):
    """The first input that changed after ``started`` (seconds since the epoch), or nothing.

    The time of the last status change counts: unlike the modification time, no copying tool sets it back.
    """
    inputs = list(args.get("restart_on") or ())
    if args.get("unit"):
        inputs.insert(0, args["unit_path"])
    for path in inputs:
        try:
            info = os.stat(lib.expand(path))
        except OSError:
            continue
        # What lies in the future was written before the clock was set back, and would be newer for ever.
        now = time.time()
        if max(moment if moment < now else 0 for moment in (info.st_ctime, info.st_mtime)) > started:
            return "%s is newer than the running process" % path
    return ""


def _launchd(args):
    """State by ``launchctl print``; the start of the process by ``ps``."""
    import re

    target = "system" if args["scope"] == "system" else "gui/%d" % os.getuid()
    try:
        result = lib.run(["launchctl", "print", "%s/%s" % (target, args["unit_name"])], timeout=8)
        disabled = lib.run(["launchctl", "print-disabled", target], timeout=8)
    except FileNotFoundError:
        raise RuntimeError("no launchctl on this node (is its service manager systemd?)") from None
    off = re.search(r'"%s" => (disabled|true)' % re.escape(args["unit_name"]), disabled.out)
    facts = {
        "enabled": "disabled" if off else "enabled",
        "masked": False,
        "restarts": 0,
        "pid": 0,
        "stale": "",
    }
    if result.status != 0:
        return dict(facts, state="missing", substate="not loaded", result="")
    state = re.search(r"^\s*state = (.+)$", result.out, re.MULTILINE)
    pid = re.search(r"^\s*pid = (\d+)$", result.out, re.MULTILINE)
    facts["substate"] = state.group(1) if state else "unknown"
    facts["result"] = ""
    facts["state"] = "running" if pid else "stopped"
    if pid:
        facts["pid"] = int(pid.group(1))
        started = lib.run(
            ["ps", "-o", "lstart=", "-p", pid.group(1)], env=lib.environment(LC_ALL="C")
        ).out.strip()
        with_epoch = time.mktime(time.strptime(started)) + 1 if started else 0
        facts["stale"] = newer_input(args, with_epoch) if with_epoch else ""
    return facts


# --- from here on only for steps: a look leaves it away ---


def changes(declared, facts):
    """Declared parts that differ; a running service whose inputs are newer needs a restart."""
    found = []
    if "unit" in declared:
        found.extend(_file_changes(declared["unit"], facts["file"], facts))
    if (
        "enabled" in declared
        and (facts["enabled"] in ("enabled", "enabled-runtime", "static")) != declared["enabled"]
    ):
        settled = facts["enabled"] in ("static", "indirect", "generated", "alias") and not declared["enabled"]
        if not settled:
            seen = facts["enabled"] or "disabled"
            found.append({"field": "enabled", "desired": declared["enabled"], "observed": seen})
    if "state" in declared:
        wanted = declared["state"]
        right = (
            facts["state"] == "running"
            if wanted == "running"
            else facts["state"] not in ("running", "starting")
        )
        if not right:
            found.append({"field": "state", "desired": wanted, "observed": _seen_state(facts)})
        elif wanted == "running" and facts["stale"] and "fresh" in declared:
            found.append(
                {"field": "fresh", "desired": "started after its inputs", "observed": facts["stale"]}
            )
    return found


def _seen_state(facts):
    if facts["masked"]:
        return "masked"
    detail = facts["result"] if facts["result"] not in ("", "success") else facts["substate"]
    return "%s (%s)" % (facts["state"], detail) if detail and detail != facts["state"] else facts["state"]


def _file_changes(wanted, file, facts):
    if file["type"] == "file" and file["content"] == wanted:
        return []
    if file["type"] == "file":
        seen = file["content"]
    elif file["type"] == "symlink":
        seen = "masked" if facts["masked"] else "symlink to %s" % file["target"]
    else:
        seen = file["type"]
    fixable = file["type"] in ("file", "symlink", "absent")
    note = "" if fixable else "only files and links are ever replaced"
    return [{"field": "unit", "desired": wanted, "observed": seen, "fixable": fixable, "note": note}]
