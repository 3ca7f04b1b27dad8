"""The node's end of one round trip: runs probes or one step, and prints one framed JSON answer.

Sent after ``lib.py`` as part of one script. Python 3.6 or newer, standard library only.
"""

import _signal as signal  # the module signal makes its numbers readable, which takes every node 3 ms
import os
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


def prepare(modules, probes):
    """Let each kind that can ask for several resources at once do so; where it fails, each probe asks for itself."""
    for kind, module in modules.items():
        mine = [item for item in probes if item["kind"] == kind]
        if len(mine) == 1 or not hasattr(module, "prepare"):
            continue
        signal.setitimer(signal.ITIMER_REAL, max(item["timeout"] for item in mine))
        try:
            module.prepare([item["args"] for item in mine])
        except Exception:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)


def probe(lib, modules, request, connection):
    """The facts of one resource, or its own error; never disturbs the others, whatever it raises."""
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    try:
        answer = {"facts": modules[request["kind"]].observe(request["args"], connection)}
        lib.dumps(answer)  # what cannot be sent is this probe's error, not everybody's
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
    if "confirm" in request:
        modules["writing"].lib = lib
        try:
            with modules["writing"].node_lock(30):
                modules["writing"].confirm(*request["confirm"])
            answer["result"] = {"changed": False}
        except (lib.Refused, OSError) as error:
            answer["failed"] = str(error)
    elif "step" in request:
        try:
            answer["result"] = Step(lib, modules, request).take()
        except (lib.Refused, lib.CommandFailed) as error:
            answer["failed"] = str(error)
        except Exception as error:
            answer["failed"] = "%s: %s" % (type(error).__name__, error)
    else:
        if "fence" in request:
            modules["writing"].lib = lib
            modules["writing"].remember_epoch(request["fence"])
        prepare(modules, request["probes"])
        answer["probes"] = [
            {"error": broken[item["kind"]]}
            if item["kind"] in broken
            else probe(lib, modules, item, connection)
            for item in request["probes"]
        ]
    sys.stdout.flush()
    os.write(1, ("\n%s%s%s\n" % (request["nonce"], lib.dumps(answer), request["nonce"])).encode())
    if "probes" in request:
        os._exit(0)  # tidying up takes every node 2 ms


# --- from here on only for steps: a look leaves it away ---

FAILPOINTS = (
    "saved",  # copies were made; the journal does not know of them
    "backed-up",  # the journal knows of them; nothing was changed
    "applying",  # the journal says that the change begins
    "changed",  # the change was made; the journal does not say so
    "applied",  # it does
    "restoring",  # the undo was asked for, and not begun
    "restored",  # the undo was made; the journal does not say so
    "rolled-back",  # it does
)


def reached(name, kind):
    """Stand still here until a test ends this process (RECONCILER_FAILPOINT=node:NAME:KIND); leaves a mark."""
    if os.environ.get("RECONCILER_FAILPOINT") == "node:%s:%s" % (name, kind):
        with open(os.path.join(os.path.expanduser("~"), "failpoint"), "w") as stream:
            stream.write("%d" % os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP)


class Step:
    """One step with one resource: under the node's lock, after its guards, journalled before it is taken."""

    def __init__(self, lib, modules, request):
        self.lib, self.writing = lib, modules["writing"]
        self.steps, self.probe = modules["steps"], modules["probe"]
        self.writing.lib = lib
        self.steps.writing, self.steps.probe = self.writing, self.probe
        self.request, self.resource = request, request["resource"]
        self.journal = (request["kind"], self.resource["name"], request["attempt"])

    def take(self):
        """The result of the step. Raises Refused or CommandFailed with a reason for a person."""
        if self.request["step"] == "rollback" and self.writing.read_journal(*self.journal) is None:
            return self.roll_back()  # what was refused or could not be recorded has changed nothing
        self.refuse_protected()
        if self.request["check"]:
            return self.foretell()
        with self.writing.node_lock(self.request.get("lock_timeout", 30)):
            step = self.request["step"]
            self.writing.refuse_stale(self.request.get("epoch"), must_remember=step != "rollback")
            return {"backup": self.back_up, "apply": self.apply, "rollback": self.roll_back}[step]()

    def refuse_protected(self):
        """Raise Refused where the step would write to a protected place, by whatever way."""
        for path in self.steps.paths(self.resource):
            self.writing.refuse_protected(path, self.request.get("protected") or ())

    def undo_by_itself(self):
        """What nobody confirmed; nobody asks for it, so what stands before every step is asked here."""
        self.refuse_protected()
        if not self.writing.was_superseded(*self.journal):
            self.roll_back()

    def foretell(self):
        """What the step would change."""
        applies = self.request["step"] == "apply"
        changes = self.due()
        if applies and not changes:
            self.refuse_what_only_people_can_do()
        shown = self.difference() if changes else []
        return {"changed": bool(changes) and applies, "changes": changes, "difference": shown}

    def back_up(self):
        """Save what the next step will overwrite; nothing is overwritten before every copy's place is on record."""
        if self.writing.read_journal(*self.journal) is not None:
            return {"changed": False, "detail": "already saved by this attempt"}
        changes = self.due()
        if not changes:
            return {"changed": False, "changes": []}
        self.writing.prune_journal(self.request.get("keep_days", 7), self.request.get("keep") or ())
        saved = self.steps.backup(self.resource, self.request["attempt"])
        reached("saved", self.request["kind"])
        self.note("backed up", saved)
        reached("backed-up", self.request["kind"])
        return {"changed": False, "saved": self.writing.backups_in(saved), "changes": changes}

    def apply(self):
        """Make the changes that are still due."""
        changes = self.due()
        if not changes:
            self.refuse_what_only_people_can_do()
            return {"changed": False, "changes": []}
        record = self.writing.read_journal(*self.journal)
        if record is None:
            raise self.lib.Refused(
                "nothing was backed up for attempt %s; nothing is changed without" % self.journal[2]
            )
        shown = self.difference()
        self.note("applying", record["saved"])
        if self.request.get("confirm_within"):
            self.writing.watch(self.journal, self.request["confirm_within"], self.undo_by_itself)
        reached("applying", self.request["kind"])
        detail = self.make(record["saved"])
        reached("changed", self.request["kind"])
        self.note("applied", record["saved"])
        reached("applied", self.request["kind"])
        self.refuse_what_only_people_can_do()
        return {"changed": True, "detail": detail or "", "changes": changes, "difference": shown}

    def due(self):
        """What this step is about: with commands proposed also what the role itself could not put right."""
        look = self.lib.differences if self.request.get("proposed") else self.lib.pending
        return look(self.probe, self.resource)

    def make(self, saved):
        """The role's own fix, or the commands that were proposed in its place, with what they printed."""
        if not self.request.get("proposed"):
            return self.steps.apply(self.resource, saved)
        said = []
        for words in self.request["proposed"]:
            # Judged as a path below the home directory, and no shell is there to make it one.
            argv = [os.path.expanduser(word) if word.startswith("~/") else word for word in words]
            done = self.lib.must(argv, timeout=300, env=self.lib.environment())
            said.append("%s: %s" % (" ".join(argv), (done.out.strip() or done.err.strip())[-300:]))
        return "; ".join(said)

    def roll_back(self):
        """Put back what this attempt saved."""
        record = self.writing.read_journal(*self.journal)
        if record is None:
            return {"changed": False, "detail": "nothing was saved, so nothing was changed"}
        reached("restoring", self.request["kind"])
        detail = self.steps.rollback(self.resource, record["saved"])
        reached("restored", self.request["kind"])
        self.note("rolled back", record["saved"])
        reached("rolled-back", self.request["kind"])
        return {"changed": True, "detail": detail or ""}

    def note(self, state, saved):
        """How far this attempt came, on disk before this returns."""
        self.writing.write_journal(*(self.journal + (state, saved)))

    def difference(self):
        """Texts before and after, where they were asked for and the kind manages text."""
        wanted = (
            self.request.get("diff") and self.request["step"] == "apply" and hasattr(self.steps, "difference")
        )
        return self.steps.difference(self.resource) if wanted else []

    def refuse_what_only_people_can_do(self):
        """A step that leaves a reported difference behind has not brought the resource into its declared state."""
        found = self.lib.differences(self.probe, self.resource)
        left = [change for change in found if not change.get("fixable", True)]
        if left:
            what = "; ".join("%s is %s (%s)" % (c["field"], c["observed"], c.get("note", "")) for c in left)
            raise self.lib.Refused("only a person can put this right: " + what)
