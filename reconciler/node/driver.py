"""The node's end of one round trip: runs probes or one step, and prints one framed JSON answer.

Sent after ``lib.py`` as part of one script. Python 3.6 or newer, standard library only.
"""

import json
import os
import signal
import sys
import time
import types


class Deadline(BaseException):
    """A probe took longer than it may. No Exception: a probe that suppresses those must not go on for ever."""


def load(name, source, lib):
    """A module made from source text, with ``lib`` at hand: nothing is written to the node's disk."""
    module = types.ModuleType(name)
    exec(compile(source, "<%s>" % name, "exec"), module.__dict__)
    module.lib = lib
    return module


def on_alarm(_signum, _frame):
    """Turn the alarm into an exception inside whatever hangs."""
    raise Deadline


def probe(modules, request, connection):
    """The facts of one resource, or its own error; never disturbs the others, whatever it raises."""
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    try:
        answer = {"facts": modules[request["kind"]].observe(request["args"], connection)}
        json.dumps(answer)  # what cannot be sent is this probe's error, not everybody's
    except Deadline:
        answer = {"error": "the probe did not answer within %g s" % request["timeout"]}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        answer = {"error": "%s: %s" % (type(error).__name__, error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    answer["seconds"] = round(time.monotonic() - started, 4)
    return answer


def take_step(lib, modules, request):
    """Back up, apply or roll back one resource, under the node's lock and after its guards."""
    steps, probe_module = modules["steps"], modules["probe"]
    steps.probe = probe_module
    resource, attempt, step = request["resource"], request["attempt"], request["step"]
    kind, name = request["kind"], resource["name"]
    for path in steps.paths(resource):
        lib.refuse_protected(path, request.get("protected") or ())
    if request["check"]:
        changes = lib.pending(probe_module, resource)
        shown = difference(steps, request) if changes else []
        if step == "apply" and not changes:
            refuse_what_only_people_can_do(lib, probe_module, resource)
        return {"changed": bool(changes) and step != "backup", "changes": changes, "difference": shown}
    with lib.node_lock(request.get("lock_timeout", 30)):
        if step == "backup":
            return back_up(lib, steps, probe_module, request)
        record = lib.read_journal(kind, name, attempt)
        if step == "rollback":
            if record is None:
                return {"changed": False, "detail": "nothing was saved, so nothing was changed"}
            detail = steps.rollback(resource, record["saved"])
            lib.write_journal(kind, name, attempt, "rolled back", record["saved"])
            return {"changed": True, "detail": detail or ""}
        changes = lib.pending(probe_module, resource)
        if not changes:
            refuse_what_only_people_can_do(lib, probe_module, resource)
            return {"changed": False, "changes": []}
        if record is None:
            raise lib.Refused("nothing was backed up for attempt %s; nothing is changed without" % attempt)
        shown = difference(steps, request)
        lib.write_journal(kind, name, attempt, "applying", record["saved"])
        detail = steps.apply(resource, record["saved"])
        lib.write_journal(kind, name, attempt, "applied", record["saved"])
        refuse_what_only_people_can_do(lib, probe_module, resource)
        return {"changed": True, "detail": detail or "", "changes": changes, "difference": shown}


def difference(steps, request):
    """Texts before and after, where they were asked for and the kind manages text."""
    wanted = request.get("diff") and request["step"] == "apply" and hasattr(steps, "difference")
    return steps.difference(request["resource"]) if wanted else []


def refuse_what_only_people_can_do(lib, probe_module, resource):
    """A step that leaves a reported difference behind has not brought the resource into its declared state."""
    left = [change for change in lib.differences(probe_module, resource) if not change.get("fixable", True)]
    if left:
        what = "; ".join("%s is %s (%s)" % (c["field"], c["observed"], c.get("note", "")) for c in left)
        raise lib.Refused("only a person can put this right: " + what)


def back_up(lib, steps, probe_module, request):
    """Save what the next step will overwrite; nothing is overwritten before every copy's place is on record."""
    kind, resource, attempt = request["kind"], request["resource"], request["attempt"]
    name = resource["name"]
    if lib.read_journal(kind, name, attempt) is not None:
        return {"changed": False, "detail": "already saved by this attempt"}
    changes = lib.pending(probe_module, resource)
    if not changes:
        return {"changed": False, "changes": []}
    lib.prune_journal(request.get("keep_days", 7))
    saved = steps.backup(resource, attempt)
    lib.write_journal(kind, name, attempt, "backed up", saved)
    return {"changed": False, "saved": lib.backups_in(saved), "changes": changes}


def main(lib, sources, request, connection):
    """Answer one request. Exactly one framed line goes to standard output, whatever programs print before it."""
    signal.signal(signal.SIGALRM, on_alarm)
    os.environ.update(request.get("environment") or {})
    os.umask(0o022)
    modules = {}
    answer = {"python": "%d.%d" % sys.version_info[:2]}
    broken = {}
    for name, source in sources.items():
        try:
            modules[name] = load(name, source, lib)
        except Exception as error:
            broken[name] = "%s: %s" % (type(error).__name__, error)
    if "step" in request:
        try:
            answer["result"] = take_step(lib, modules, request)
        except (lib.Refused, lib.CommandFailed) as error:
            answer["failed"] = str(error)
        except Exception as error:
            answer["failed"] = "%s: %s" % (type(error).__name__, error)
    else:
        answer["probes"] = [
            {"error": broken[item["kind"]]} if item["kind"] in broken else probe(modules, item, connection)
            for item in request["probes"]
        ]
    sys.stdout.flush()
    os.write(1, ("\n%s%s%s\n" % (request["nonce"], json.dumps(answer), request["nonce"])).encode())
