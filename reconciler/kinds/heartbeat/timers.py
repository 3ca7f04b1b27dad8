"""What starts a heartbeat: a systemd timer, lines of a crontab, or a launchd job. Pure texts.

Agents of a fleet must not all look at the same moment. Where in its interval an agent beats follows from its name and
its node, and systemd adds a little chance; so a pass that renders the same declaration twice renders the same text.
"""

from __future__ import annotations

import hashlib
import plistlib
from dataclasses import dataclass
from typing import Any

from reconciler.kinds.base import encode

MINUTE, HOUR, DAY = 60, 3600, 86400
LONGEST = 300
"""Seconds after which a beat that hangs is ended, so that the next one can begin."""


@dataclass(frozen=True, slots=True)
class Timer:
    """What is started how often (seconds)."""

    agent: str
    label: str
    interval: float
    timezone: str
    program: str
    node: str

    @property
    def phase(self) -> int:
        """Seconds into the interval at which this agent beats on this node."""
        found = int(hashlib.sha256(f"{self.node}/{self.agent}".encode()).hexdigest()[:8], 16)
        return found % max(1, int(self.interval))

    def unit(self, manager: str) -> str:
        """What its manager calls it."""
        return f"reconciler.heartbeat.{self.agent}" if manager == "launchd" else f"heartbeat-{self.agent}"


WAYS = (("systemd", "user"), ("systemd", "system"), ("cron", "user"), ("launchd", "user"))
"""Managers with their scopes; only systemd has two."""


def files(timer: Timer, manager: str, scope: str) -> list[dict[str, Any]]:
    """Files to install: name, path (empty for a part of the crontab), digest and body. Raises ValueError."""
    if manager == "cron":
        return [_file("crontab", "", cron(timer).encode())]
    base, unit = _base(manager, scope), timer.unit(manager)
    if manager == "launchd":
        return [_file(f"{unit}.plist", f"{base}/{unit}.plist", launchd(timer))]
    texts = {f"{unit}.service": systemd_service(timer), f"{unit}.timer": systemd_timer(timer)}
    return [_file(name, f"{base}/{name}", text.encode()) for name, text in texts.items()]


def others(timer: Timer, manager: str, scope: str) -> list[dict[str, Any]]:
    """Every other way in which this agent may have been started before, with the files that are there then."""
    own = (manager, scope if manager == "systemd" else "user")
    names = {"systemd": (".service", ".timer"), "cron": (), "launchd": (".plist",)}
    found = []
    for other, where in WAYS:
        base, unit = _base(other, where), timer.unit(other)
        paths = [f"{base}/{unit}{ending}" for ending in names[other]]
        # Enabling it made this link, which is saved and put back like any file.
        paths += [f"{base}/timers.target.wants/{unit}.timer"] if other == "systemd" else []
        files = [{"name": path.rpartition("/")[2], "path": path, "sha256": ""} for path in paths]
        if (other, where) != own:
            found.append(
                {
                    "manager": other,
                    "scope": where,
                    "timer_files": {"sha256": "", "unit": unit, "files": files},
                }
            )
    return found


def _base(manager: str, scope: str) -> str:
    """Where its files are."""
    if manager == "launchd":
        return "~/Library/LaunchAgents"
    return "/etc/systemd/system" if scope == "system" else "~/.config/systemd/user"


def systemd_service(timer: Timer) -> str:
    """One beat. The turn that it starts goes on after it: only the beat itself is ended with the unit."""
    label = timer.label.replace("%", "%%").replace("\n", " ")
    return f"""\
[Unit]
Description=Heartbeat of {timer.agent} ({label})

[Service]
Type=oneshot
ExecStart=%h{timer.program.removeprefix("~")} {timer.agent}
Environment=TZ={timer.timezone}
SuccessExitStatus=2 3
KillMode=process
TimeoutStartSec={LONGEST}
"""


def systemd_timer(timer: Timer) -> str:
    """Counted from the last beat, so that none is made up for after a sleep, and none overlaps."""
    return f"""\
[Unit]
Description=Heartbeat of {timer.agent}, every {timer.interval:g} s

[Timer]
OnActiveSec={timer.phase}
OnUnitActiveSec={timer.interval:g}
RandomizedDelaySec={timer.interval / 10:g}
AccuracySec=1

[Install]
WantedBy=timers.target
"""


def cron(timer: Timer) -> str:
    """The lines of this agent. Raises ValueError where cron cannot say such an interval."""
    name = f"reconciler heartbeat {timer.agent}"
    when, wait = _cron_times(timer)
    command = f'exec env TZ={timer.timezone} "$HOME{timer.program.removeprefix("~")}" {timer.agent}'
    return f"# {name} begin\n{when} sleep {wait}; {command} >/dev/null 2>&1\n# {name} end\n"


def _cron_times(timer: Timer) -> tuple[str, int]:
    interval = timer.interval
    minute, wait = divmod(timer.phase, MINUTE)
    if interval % MINUTE == 0 and interval < HOUR and HOUR % interval == 0:
        return (f"{minute}-59/{interval // MINUTE:g}" if interval > MINUTE else "*") + " * * * *", wait
    if interval % HOUR == 0 and DAY % interval == 0:
        hours = f"{minute // 60}-23/{interval // HOUR:g}" if interval > HOUR else "*"
        return f"{minute % 60} {hours} * * *", wait
    raise ValueError(
        "cron beats every 1, 2, 3, 4, 5, 6, 10, 12, 15, 20 or 30 minutes, or 1, 2, 3, 4, 6, 8, 12 or 24 hours"
    )


def launchd(timer: Timer) -> bytes:
    """A property list. launchd knows no jitter, so the job waits for its phase first."""
    wait = min(timer.phase, MINUTE)
    command = f'sleep {wait}; exec "$HOME{timer.program.removeprefix("~")}" {timer.agent}'
    content: dict[str, Any] = {
        "Label": timer.unit("launchd"),
        "ProgramArguments": ["/bin/sh", "-c", command],
        "StartInterval": max(1, int(timer.interval)),
        "RunAtLoad": True,
        "AbandonProcessGroup": True,
        "EnvironmentVariables": {"TZ": timer.timezone},
    }
    return plistlib.dumps(content)


def _file(name: str, path: str, body: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(body).hexdigest()
    return {"name": name, "path": path, "sha256": digest, "mode": "0644", "body": encode(body)}
