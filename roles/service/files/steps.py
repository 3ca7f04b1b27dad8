"""Bring a unit of systemd or launchd into its declared state and back; node side, Python 3.6 or newer."""

import base64
import os
import time

lib = writing = None  # set by the driver
probe = None  # this kind's probe, set by the driver

START_SECONDS = 90


def paths(resource):
    """What a step may write."""
    return [lib.expand(resource["unit_path"])]


def difference(resource):
    """The unit file that is there and the declared one."""
    if not resource.get("unit"):
        return []
    return writing.text_difference(lib.expand(resource["unit_path"]), resource["unit"], resource["body"])


def backup(resource, attempt):
    """Save the unit file and remember whether it was enabled and running."""
    facts = probe.observe(resource, {})
    saved = {"state": facts["state"], "enabled": facts["enabled"], "masked": facts["masked"], "created": []}
    if resource.get("unit"):
        path = lib.expand(resource["unit_path"])
        saved["file"], saved["created"] = writing.save(path, attempt), writing.missing_parents(path)
    return saved


def apply(resource, _saved):
    """File, then manager, then enablement, then state; each only where it differs."""
    before = {change["field"] for change in lib.pending(probe, resource)}
    if "unit" in before:
        path = lib.expand(resource["unit_path"])
        writing.make_parents(path)
        writing.write_atomically(path, base64.b64decode(resource["body"]), 0o644)
    control = Launchd(resource) if resource["manager"] == "launchd" else Systemd(resource)
    control.reload(unit_changed="unit" in before)
    # Asked again: a unit that could not be enabled before its file was replaced is merely disabled now.
    if "enabled" in {change["field"] for change in lib.pending(probe, resource)}:
        control.enable(resource["enabled"])
    return control.bring(resource.get("state"), restart=bool(before & {"unit", "fresh"}))


def rollback(resource, saved):
    """The unit file, enablement and state that were there before."""
    control = Launchd(resource) if resource["manager"] == "launchd" else Systemd(resource)
    facts = probe.observe(resource, {})
    if saved["state"] == "missing" and facts["state"] != "missing":
        control.stop()
        if resource.get("enabled"):
            control.enable(False)
    if "file" in saved:
        writing.put_back(saved["file"], saved.get("created", ()))
        control.reload(unit_changed=True)
    if saved["state"] == "missing" or saved["masked"]:
        return "removed what was installed"
    if resource.get("enabled") is not None and saved["enabled"] in ("enabled", "disabled"):
        control.enable(saved["enabled"] == "enabled")
    if saved["state"] in ("running", "starting"):
        control.restart()
    elif facts["state"] in ("running", "starting"):
        control.stop()
    return "restored the unit's file and state"


class Systemd:
    """One unit under systemd."""

    def __init__(self, resource):
        self.resource, self.name = resource, resource["unit_name"]
        self.argv, self.env = lib.systemctl(resource["scope"])

    def call(self, *words):
        """Run systemctl; what it says becomes the error."""
        return lib.must(self.argv + list(words), timeout=START_SECONDS, env=self.env)

    def reload(self, unit_changed):
        """Make systemd read the unit files, when they changed or it says that they did."""
        show = self.call("show", self.name, "--property=NeedDaemonReload,LoadState").out
        if unit_changed or "NeedDaemonReload=yes" in show:
            self.call("daemon-reload")
        if "LoadState=masked" in self.call("show", self.name, "--property=LoadState").out:
            self.call("unmask", self.name)

    def enable(self, wanted):
        """Start it at boot, or not."""
        self.call("enable" if wanted else "disable", self.name)

    def stop(self):
        """Stop it and forget a failure."""
        self.call("stop", self.name)
        lib.run(self.argv + ["reset-failed", self.name], env=self.env)

    def restart(self):
        """Start it anew; the count of failed starts begins anew too."""
        lib.run(self.argv + ["reset-failed", self.name], env=self.env)
        self.call("restart", self.name)

    def bring(self, state, restart):
        """Start, restart or stop as wanted, and see that a start holds."""
        facts = probe.observe(self.resource, {})
        if state == "stopped":
            if facts["state"] in ("running", "starting", "failed"):
                self.stop()
            return "stopped %s" % self.name
        if state == "running" and (restart or facts["state"] != "running"):
            try:
                self.restart()
            except lib.CommandFailed as error:
                raise lib.CommandFailed("%s%s" % (error, self.last_words())) from None
            self.settle()
            return "started %s" % self.name
        return "changed %s" % self.name

    def settle(self):
        """A start is believed when the unit stayed up; a program that dies at once starts successfully too."""
        first = probe.observe(self.resource, {})
        deadline = time.monotonic() + float(self.resource.get("settle") or 0)
        while True:
            facts = probe.observe(self.resource, {})
            if facts["state"] != "running" or facts["restarts"] != first["restarts"]:
                raise lib.CommandFailed(
                    "%s does not stay up: %s%s" % (self.name, _story(facts), self.last_words())
                )
            if time.monotonic() >= deadline:
                return
            time.sleep(0.25)

    def last_words(self):
        """The end of the unit's journal, where this account may read it."""
        argv = ["journalctl", "--quiet", "--no-pager", "--lines=3", "--output=cat"]
        argv += ["--user-unit" if self.resource["scope"] == "user" else "--unit", self.name]
        try:
            said = lib.run(argv, timeout=10, env=self.env).out.strip().replace("\n", " | ")
        except (OSError, RuntimeError):
            return ""
        return " (journal: %s)" % said[-400:] if said else ""


def _story(facts):
    return "%s, %s, result %s, %d restarts" % (
        facts["state"],
        facts["substate"],
        facts["result"],
        facts["restarts"],
    )


class Launchd:
    """One job under launchd; a changed plist is only read by loading it again."""

    def __init__(self, resource):
        self.resource, self.name = resource, resource["unit_name"]
        self.domain = "system" if resource["scope"] == "system" else "gui/%d" % os.getuid()
        self.target = "%s/%s" % (self.domain, self.name)

    def call(self, *words):
        """Run launchctl; what it says becomes the error."""
        return lib.must(["launchctl"] + list(words), timeout=START_SECONDS)

    def loaded(self):
        """Whether launchd knows the job."""
        return lib.run(["launchctl", "print", self.target], timeout=10).status == 0

    def reload(self, unit_changed):
        """Unload a job whose plist changed; it is loaded again when it is brought up."""
        if unit_changed and self.loaded():
            self.call("bootout", self.target)

    def enable(self, wanted):
        """Let it start by itself, or not."""
        self.call("enable" if wanted else "disable", self.target)

    def stop(self):
        """Unload it."""
        if self.loaded():
            self.call("bootout", self.target)

    def restart(self):
        """Load it where it is not loaded, and start it anew."""
        if not self.loaded():
            self.call("bootstrap", self.domain, lib.expand(self.resource["unit_path"]))
        self.call("kickstart", "-k", self.target)

    def bring(self, state, restart):
        """Start, restart or stop as wanted, and see that a start holds."""
        facts = probe.observe(self.resource, {})
        if state == "stopped":
            self.stop()
            return "stopped %s" % self.name
        if state == "running" and (restart or facts["state"] != "running"):
            self.restart()
            deadline = time.monotonic() + float(self.resource.get("settle") or 0)
            while time.monotonic() < deadline:
                time.sleep(0.25)
            facts = probe.observe(self.resource, {})
            if facts["state"] != "running":
                raise lib.CommandFailed("%s does not stay up: %s" % (self.name, facts["substate"]))
        return "started %s" % self.name
