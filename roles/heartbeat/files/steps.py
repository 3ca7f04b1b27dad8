"""Install an agent's heartbeat, make it beat, take stuck tasks away, and undo it; node side, Python 3.6 or newer."""

import base64
import contextlib
import fcntl
import json
import os
import time

lib = writing = None  # set by the driver
probe = None  # this kind's probe, set by the driver

FIELDS = (
    "program",
    "config",
    "file",
)  # in the order in which they are put in place: each needs the one before
MANAGER_SECONDS = 90
BUSY_SECONDS = 60  # how long another beat of the same agent is waited for
# Ledger entries of tasks that nothing was heard of for so long are dropped.
KEEP_TASKS = 7 * 86400
THIRD = 2  # timeouts before this one


def paths(resource):
    """What a step may write."""
    files = [file["path"] for file in resource["files"].values()]
    for timer in [resource] + resource["other_timers"]:
        files += [file["path"] for file in timer["timer_files"]["files"] if file["path"]]
    return [lib.expand(path) for path in files + [resource["files"]["launcher"]["link"]]]


def difference(resource):
    """HEARTBEAT.md as it is there and as it is declared."""
    file = resource["files"]["file"]
    return writing.text_difference(lib.expand(file["path"]), resource.get("file"), file["body"])


def backup(resource, attempt):
    """Save every file that is going to be replaced or removed, and what the timers do."""
    due = {change["field"] for change in lib.pending(probe, resource)}
    saved = {"schedule": probe._timer(resource)["schedule"], "files": [], "created": []}
    saved["timer"] = bool(due & {"timer", "schedule"})
    wanted = [lib.expand(resource["files"][name]["path"]) for name in FIELDS if name in due]
    if "program" in due:
        wanted += [lib.expand(resource["files"]["launcher"][key]) for key in ("path", "link")]
    if "timer" in due and resource["manager"] == "cron":
        saved["crontab"] = _own_lines(resource)
    elif "timer" in due:
        wanted += [lib.expand(file["path"]) for file in resource["timer_files"]["files"]]
    saved["former"] = []
    for way in probe.former(resource) if "former" in due else ():
        before = {"way": way, "schedule": probe._timer(dict(resource, **way))["schedule"]}
        if way["manager"] == "cron":
            before["crontab"] = _own_lines(resource)
        saved["former"].append(before)
        wanted += [lib.expand(file["path"]) for file in way["timer_files"]["files"]]
    for path in wanted:
        saved["files"].append(writing.save(path, attempt))
        saved["created"] += writing.missing_parents(path)
    return saved


def apply(resource, _saved):
    """Files, then the timer, then a beat, then the tasks that stand still; each only where it is due."""
    due = {change["field"] for change in lib.pending(probe, resource)}
    done = []
    for name in FIELDS:
        if name in due:
            install(resource["files"][name])
            if name == "program":
                install(resource["files"]["launcher"])
            done.append("wrote %s" % resource["files"][name]["path"])
    if due & {"timer", "schedule"}:
        manager(resource).start("timer" in due)
        done.append("started its timer")
    runs = "former" in due and probe._timer(resource)["schedule"] == "active"
    for way in probe.former(resource) if runs else ():
        manager(dict(resource, **way)).remove()
        done.append("removed its former timer (%s)" % probe.title(way))
    # Asked again: what was wrong with the beat may have been the program.
    due = {change["field"] for change in lib.pending(probe, resource)}
    if "beat" in due:
        done += wake(resource)
    if "tasks" in due:
        done += settle(resource)
    return "; ".join(done)


def rollback(resource, saved):
    """The files and the timer that were there before; a beat cannot be taken back, nor does it do harm."""
    manager_, others = manager(resource), _others(resource)
    launcher = resource["files"]["launcher"]
    shared = set(map(lib.expand, [resource["files"]["program"]["path"], launcher["path"], launcher["link"]]))
    for record in saved["files"]:
        if record["type"] == "absent" and record["path"] in shared and others:
            continue  # other agents of this account have come to use the program
        writing.put_back(record)
    for directory in reversed(saved["created"]):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    if saved["timer"]:
        manager_.restore(saved)
    for before in saved.get("former", []):
        manager(dict(resource, **before["way"])).restore(before)
    return "restored the heartbeat's files and timer"


def install(file):
    """One file in its place; the program with its link."""
    path = lib.expand(file["path"])
    writing.make_parents(path)
    writing.write_atomically(path, base64.b64decode(file["body"]), int(file["mode"], 8))
    if file.get("link"):
        link = lib.expand(file["link"])
        if os.path.realpath(link) != os.path.realpath(path):
            writing.make_parents(link)
            writing.link_atomically(path, link)


def remove(timer):
    """The files of a timer, where they are."""
    for file in timer["timer_files"]["files"]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(lib.expand(file["path"]))


def _others(resource):
    """Whether another agent of this account is declared, too."""
    path = lib.expand(resource["files"]["config"]["path"])
    try:
        names = os.listdir(os.path.dirname(path))
    except OSError:
        return False
    return any(name.endswith(".json") and name != os.path.basename(path) for name in names)


# --- beats ---


def wake(resource):
    """A full beat; where one was forced before and the agent is still late, its service is restarted first."""
    state, known = probe.read_json(resource["state"]), probe.read_json(resource["ledger"])
    step = escalation(state, known, resource["settings"], time.time())
    done = []
    if step == "restart":
        done.append(restart(resource, state, known.get("forced_beat") or 0))
        note(resource, restarted=time.time())
    else:
        # On record before it is tried: a beat that hangs was one, too.
        note(resource, forced_beat=time.time())
    done.append(full_beat(resource))
    if looked(resource)["healthy"]:
        note(resource, forced_beat=0, restarted=0)  # it helped: the next time begins anew
    elif step == "nothing left":
        raise lib.CommandFailed("a full beat and a restart of its service did not help: %s" % done[-1])
    return done


def escalation(state, ledger, config, now):
    """What is due for an agent whose beat is late or not healthy: ``beat``, ``restart``, or ``nothing left``; pure.

    Read off the node: a beat that was forced lately and did not help makes a restart due. Lately is within twice the
    time after which a beat is late; what was forced before belongs to another story.
    """
    ledger = ledger if isinstance(ledger, dict) else {}
    lately = now - 2 * max(config["late_after"], 300)
    last = state.get("beat", 0) if isinstance(state, dict) else 0
    late = now - last > config["late_after"]
    forced, restarted = ledger.get("forced_beat") or 0, ledger.get("restarted") or 0
    # What beat since then, and is late again now, begins anew.
    if forced <= lately or (late and last > max(forced, restarted)):
        return "beat"
    return "nothing left" if restarted > lately and restarted >= forced else "restart"


def full_beat(resource):
    """Run a beat now. Raises CommandFailed with the program's own words where it could not."""
    argv = [lib.expand(resource["files"]["launcher"]["path"]), resource["agent"], "--full"]
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        result = run(resource, argv)
        if result.status != 3 or time.monotonic() >= deadline:  # noqa: PLR2004 - another beat is running
            break
        time.sleep(0.5)
    if result.status not in (0, 2):
        raise lib.CommandFailed("a full beat ended with %s: %s" % (result.status, result.complaint()))
    return "ran a full beat" + (": %s" % result.complaint() if result.status == 2 else "")  # noqa: PLR2004 - degraded


def run(resource, argv):
    """Run the agent's program. Its commands have time-outs of their own; this one is for what hangs all the same."""
    sources = resource["settings"]["sources"]
    seconds = resource["settings"]["source_timeout"] * sum(map(len, sources.values())) + 30
    try:
        return lib.run(argv, timeout=seconds, env=lib.environment())
    except lib.TimedOut as error:
        raise lib.CommandFailed(str(error)) from None
    except OSError as error:
        raise lib.CommandFailed("%s cannot be started: %s" % (argv[0], error.strerror)) from None


def restart(resource, state, since):
    """Restart the agent's service, after a running turn had its grace.

    Agents may share one: what was started after ``since``, when a beat was forced, was restarted for another of them.
    """
    config = resource["settings"]
    if not config["service"]:
        return "there is no service to restart"
    if since and started(resource) > since:
        return "%s was restarted since" % config["service"]
    waited = grace(resource, state, config["turn_grace"])
    if resource["manager"] == "launchd":
        lib.must(
            ["launchctl", "kickstart", "-k", "gui/%d/%s" % (os.getuid(), config["service"])], MANAGER_SECONDS
        )
    else:
        argv, env = lib.systemctl(config["service_scope"])
        lib.must(argv + ["restart", config["service"]], timeout=MANAGER_SECONDS, env=env)
    return "%srestarted %s" % (waited, config["service"])


def started(resource):
    """When the agent's service was started, in seconds since the epoch; 0 where nobody tells."""
    config = resource["settings"]
    if resource["manager"] == "launchd":
        return 0
    argv, env = lib.systemctl(config["service_scope"])
    show = ["show", config["service"], "--property=ActiveState,ActiveEnterTimestampMonotonic"]
    said = lib.run(argv + show, timeout=10, env=env).out
    seen = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    moment = int(seen.get("ActiveEnterTimestampMonotonic") or 0)
    if seen.get("ActiveState") != "active" or not moment:
        return 0
    return time.time() - (time.monotonic() - moment / 1e6)


def grace(resource, state, seconds):
    """Wait until the agent's turn has ended, but no longer than that. Says how it went."""
    turn = state.get("turn") if isinstance(state, dict) else None
    if not turn or not turn.get("running") or not turn.get("pid"):
        return ""
    deadline = time.monotonic() + seconds
    while is_running(resource, turn["pid"]):
        if time.monotonic() >= deadline:
            return "a turn still ran after %g s; " % seconds
        time.sleep(0.25)
    return "waited for the turn; "


def is_running(resource, pid):
    """Whether that turn goes on: its watcher holds a lock as long as it does."""
    path = lib.expand(resource["state"])[: -len("json")] + "turn.lock"
    try:
        with open(path) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return False
    return not os.path.exists(path)


# --- tasks ---


def settle(resource):
    """Tasks that stand still: the suspected ones get a full beat, and what still stands then too long is taken away."""
    done = [full_beat(resource)]
    for task in _stuck(resource):
        if task["stage"] == "recover":
            done.append(release(resource, task))
        elif task["stage"] == "suspected":
            note_task(resource, task, flagged=time.time())
            done.append("flagged %s" % task["id"])
    return done


def _stuck(resource):
    """As the last beat saw them."""
    return looked(resource)["stuck"]


def looked(resource):
    """What the state file and the ledger say now."""
    state, known = probe.read_json(resource["state"]), probe.read_json(resource["ledger"])
    return probe.beat(resource, state, known, time.time())


def release(resource, task):
    """Take a task away from the agent: the first time it is only rescheduled, the third time it is blocked."""
    note_task(resource, task)
    reason = "no progress for %d minutes, which is the %s time" % (
        task["still"] // 60,
        {0: "first", 1: "second", 2: "third"}.get(task["timeouts"], "%dth" % (task["timeouts"] + 1)),
    )
    program = lib.expand(resource["files"]["launcher"]["path"])
    argv = [program, resource["agent"], "--release", task["id"], "--reason", reason]
    block = task["timeouts"] >= THIRD
    result = run(resource, argv + (["--block"] if block else []))
    if result.status != 0:
        raise lib.CommandFailed("%s could not be taken away: %s" % (task["id"], result.complaint()))
    told = {0: "nobody is told", 1: "the coo is told"}.get(task["timeouts"], "its owner is told")
    return "%s %s (%s): %s" % ("blocked" if block else "released", task["id"], reason, told)


@contextlib.contextmanager
def ledger(resource):
    """The ledger, to be changed: under the lock that the program takes, too, and written in one step."""
    path = lib.expand(resource["ledger"])
    writing.make_parents(path)
    with open(path[: -len("json")] + "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = probe.read_json(path)
        found = found if isinstance(found, dict) else {"version": 1, "forced_beat": 0, "restarted": 0}
        if not isinstance(found.get("tasks"), dict):
            found["tasks"] = {}
        yield found
        writing.write_atomically(path, json.dumps(found, ensure_ascii=False).encode(), 0o600)


def note(resource, **values):
    """Write down what was done for the agent."""
    with ledger(resource) as found:
        found.update(values)


def note_task(resource, task, **values):
    """Write down what was done about a task, and forget those that nothing was heard of for long."""
    now = time.time()
    with ledger(resource) as found:
        entry = found["tasks"].setdefault(task["id"], {})
        entry.update(values, title=task["title"], source=task["source"], noted=now)
        for name, known in list(found["tasks"].items()):
            heard = [known.get(key) or 0 for key in ("noted", "flagged", "released")]
            if max(heard) < now - KEEP_TASKS and "releasing" not in known:
                del found["tasks"][name]


# --- timers ---


def manager(resource):
    """What starts the program on this node."""
    return {"systemd": Systemd, "cron": Cron, "launchd": Launchd}[resource["manager"]](resource)


class Systemd:
    """A timer and the service that it starts."""

    def __init__(self, resource):
        self.resource = resource
        self.unit = resource["timer_files"]["unit"] + ".timer"
        self.argv, self.env = lib.systemctl(resource["scope"])

    def call(self, *words):
        """Run systemctl; what it says becomes the error."""
        return lib.must(self.argv + list(words), timeout=MANAGER_SECONDS, env=self.env)

    def start(self, changed):
        """Install what differs, and let the timer run from now on and after every boot."""
        for file in self.resource["timer_files"]["files"] if changed else ():
            install(file)
        self.call("daemon-reload")
        if "LoadState=masked" in self.call("show", self.unit, "--property=LoadState").out:
            self.call("unmask", self.unit)
        self.call("enable", self.unit)
        self.call("restart" if changed else "start", self.unit)

    def remove(self):
        """Stop it, and take its files away."""
        lib.run(self.argv + ["stop", self.unit], timeout=MANAGER_SECONDS, env=self.env)
        remove(self.resource)
        self.call("daemon-reload")

    def restore(self, saved):
        """As before: running, stopped, or not there."""
        before = saved["schedule"]
        if before == "missing":
            lib.run(self.argv + ["disable", "--now", self.unit], timeout=MANAGER_SECONDS, env=self.env)
        self.call("daemon-reload")
        if before in ("stopped", "not enabled", "failed", "inactive"):
            if before != "not enabled":
                self.call("stop", self.unit)
        elif before == "active":
            self.call("restart", self.unit)


class Cron:
    """A few marked lines in the account's crontab; the others are never touched."""

    def __init__(self, resource):
        self.resource = resource

    def start(self, _changed):
        """Put the lines in place of those that are there, or after all others."""
        body = base64.b64decode(self.resource["timer_files"]["files"][0]["body"]).decode()
        self.replace(body.splitlines(True))

    def remove(self):
        """Take the lines away."""
        self.replace([])

    def restore(self, saved):
        """The lines that were there before."""
        if "crontab" in saved:
            self.replace(saved["crontab"])

    def replace(self, own):
        """Install the crontab with these lines of ours."""
        probe._ANSWERS.clear()
        lines = list(probe.crontab())
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        first, end = probe.block(lines, self.resource["agent"])
        if first is None:
            first = end = len(lines)
        path = lib.expand("~/.local/state/reconciler/crontab.new")
        writing.make_parents(path)
        writing.write_atomically(path, "".join(lines[:first] + own + lines[end:]).encode("utf-8"), 0o600)
        try:
            lib.must(["crontab", path], timeout=30)
        finally:
            os.unlink(path)
        probe._ANSWERS.clear()


def _own_lines(resource):
    """Of the crontab, the lines of this agent."""
    lines = probe.crontab()
    first, end = probe.block(lines, resource["agent"])
    return lines[first:end] if first is not None else []


class Launchd:
    """A job of the account; a changed property list is only read by loading it again."""

    def __init__(self, resource):
        self.resource = resource
        self.name = resource["timer_files"]["unit"]
        self.domain = "gui/%d" % os.getuid()

    def start(self, changed):
        """Install what differs, and load it."""
        file = self.resource["timer_files"]["files"][0]
        if changed:
            install(file)
            self.unload()
        lib.must(["launchctl", "enable", "%s/%s" % (self.domain, self.name)], MANAGER_SECONDS)
        lib.must(["launchctl", "bootstrap", self.domain, lib.expand(file["path"])], MANAGER_SECONDS)
        probe._ANSWERS.clear()

    def remove(self):
        """Unload it, and take its file away."""
        self.unload()
        remove(self.resource)
        probe._ANSWERS.clear()

    def unload(self):
        """Unload it where it is loaded."""
        lib.run(["launchctl", "bootout", "%s/%s" % (self.domain, self.name)], MANAGER_SECONDS)

    def restore(self, saved):
        """As before: loaded with the file of before, or not loaded."""
        self.unload()
        if saved["schedule"] == "active":
            path = lib.expand(self.resource["timer_files"]["files"][0]["path"])
            lib.must(["launchctl", "bootstrap", self.domain, path], MANAGER_SECONDS)
        probe._ANSWERS.clear()
