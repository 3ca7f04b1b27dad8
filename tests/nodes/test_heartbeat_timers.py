"""What starts heartbeats besides a user's systemd timer: a real cron, and the system's own systemd, on real nodes."""

import json
import time
from typing import Any

from tests.lab import Lab, Node
from tests.nodes import heartbeats as h
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet
from tests.nodes.safety import wait_for

FOREIGN = "MAILTO=someone\n# by hand\n@daily /usr/local/bin/of-my-own  # 100% mine\n"
DEFAULTS = {"retry_interval": "1s"}


def scheduled(node: Node, agent: str, after: float = 0.0) -> bool:
    """Whether its timer has made the agent beat after that moment."""
    return bool((h.state(node, agent).get("scheduled_beat") or 0) > after)


def crontab(node: Node) -> str:
    """What the account's crontab holds."""
    return node.run("crontab -l", user="agent", check=False).stdout


def test_cron_starts_the_beats_and_lines_of_others_stay_as_they_are(nodes: Pool, fleet: Fleet) -> None:
    """Debian's cron: from no crontab at all, over lines edited and lost, to an undo after a start that failed."""
    (node,) = nodes(1)
    h.prepare([node])
    agent, other = h.agents([node], timer="cron", every="1m", late_after="3m", service=None)[:2]
    name, second = agent["agent"], other["agent"]
    fleet.declare({"defaults": DEFAULTS, "heartbeats": [agent]})
    node.run("systemctl unmask cron && systemctl start cron")
    began = time.time()
    answer = fleet.once()
    assert answer.code == 0, answer.out + answer.err
    assert crontab(node).splitlines()[0] == f"# reconciler heartbeat {name} begin"
    # One that a pass asked for is not taken for one of cron's.
    wait_for(lambda: scheduled(node, name, began), "cron makes it beat", 150)
    assert fleet.once().report["drifts"] == []

    lines = crontab(node)
    edited = FOREIGN + lines.replace("* * * *", "0 3 * *")
    node.write("/tmp/edited", edited, mode="0644")
    node.run("crontab /tmp/edited", user="agent")
    fleet.declare({"defaults": DEFAULTS, "heartbeats": [agent, other]})
    answer = fleet.once()
    assert answer.outcomes[f"node-1/heartbeat/{name}"] == "fixed", answer.out
    assert answer.outcomes[f"node-1/heartbeat/{second}"] == "fixed", answer.out
    now = crontab(node)
    assert now.startswith(FOREIGN + lines), now
    assert now.count("# reconciler heartbeat") == 4
    repaired = time.time()
    for each in (name, second):
        wait_for(lambda each=each: scheduled(node, each, repaired), f"cron makes {each} beat again", 150)
    node.run("printf %s '" + FOREIGN + "' | crontab -", user="agent")
    assert set(fleet.once().outcomes.values()) == {"fixed"}
    assert crontab(node).startswith(FOREIGN)
    assert crontab(node).count("# reconciler heartbeat") == 4

    # cron refuses what it is given: the step is undone, and the lines of others are still there.
    before = crontab(node)
    refusing = '#!/bin/sh\\ncase "$1" in -l) exec /usr/bin/crontab -l ;; *) echo "quota exceeded" >&2; exit 1 ;; esac\\n'
    node.run(f"printf '{refusing}' > /usr/local/bin/crontab; chmod 755 /usr/local/bin/crontab")
    changed = [{**agent, "every": "2m"}, other]
    fleet.declare({"defaults": DEFAULTS, "heartbeats": changed})
    answer = fleet.once()
    assert answer.code == 3
    assert "quota exceeded" in answer.out
    assert crontab(node) == before
    node.run("rm /usr/local/bin/crontab")
    assert fleet.once("--retry").code == 0
    assert "/2 * * * *" in crontab(node)
    assert fleet.once().report["drifts"] == []


def test_another_timer_takes_the_place_of_the_former(nodes: Pool, fleet: Fleet) -> None:
    """Between cron and systemd; while the new one does not run or cannot be started, the former one goes on."""
    (node,) = nodes(1)
    h.prepare([node])
    agent = h.agents([node], every="1m", late_after="3m", service=None)[0]
    name = agent["agent"]
    node.run("printf %s '" + FOREIGN + "' | crontab -", user="agent")

    def declare(timer: str) -> None:
        fleet.declare({"defaults": DEFAULTS, "heartbeats": [{**agent, "timer": timer}]})

    def runs() -> str:
        return node.run(
            f"systemctl --user is-active heartbeat-{name}.timer", user="agent", check=False
        ).stdout.strip()

    declare("systemd")
    assert fleet.once().code == 0
    declare("cron")
    answer = fleet.once()
    assert answer.code == 3
    assert (
        "former is systemd (it stays until the declared one runs)" in answer.report["outcomes"][0]["detail"]
    )
    assert (crontab(node).startswith(FOREIGN + "# reconciler heartbeat"), runs()) == (True, "active")
    node.run("systemctl unmask cron && systemctl start cron")
    assert fleet.once("--retry").code == 0
    assert runs() == "inactive"
    declare("systemd")
    (drift,) = fleet.check().report["drifts"]
    assert {"timer", "schedule", "former"} <= {change["field"] for change in drift["changes"]}
    before = time.time()
    assert fleet.once().code == 0
    assert (crontab(node), runs()) == (FOREIGN, "active")
    wait_for(lambda: scheduled(node, name, before), "systemd makes it beat", 150)
    assert fleet.once().report["drifts"] == []

    declare("cron")
    refusing = '#!/bin/sh\\ncase "$1" in -l) exec /usr/bin/crontab -l ;; *) echo "quota exceeded" >&2; exit 1 ;; esac\\n'
    node.run(f"printf '{refusing}' > /usr/local/bin/crontab; chmod 755 /usr/local/bin/crontab")
    assert fleet.once().code == 3
    assert (crontab(node), runs()) == (FOREIGN, "active")
    node.run("rm /usr/local/bin/crontab")
    assert fleet.once("--retry").code == 0
    assert crontab(node).startswith(FOREIGN)
    assert runs() == "inactive"
    left = node.run("find ~/.config/systemd -name 'heartbeat-*' ! -name '*.bak'", user="agent").stdout
    assert left == ""
    assert fleet.once().report["drifts"] == []


def test_cron_that_does_not_run_is_said_and_is_not_ours_to_start(nodes: Pool, fleet: Fleet) -> None:
    """Its lines are in place, and the pass says why nothing beats."""
    (node,) = nodes(1)
    h.prepare([node])
    agent = h.agents([node], timer="cron", every="1m", late_after="3m", service=None)[0]
    fleet.declare({"defaults": DEFAULTS, "heartbeats": [agent]})
    first = fleet.once()
    assert first.code == 3, first.out
    (outcome,) = first.report["outcomes"]
    assert "cron is not running (cron is not ours to start)" in outcome["detail"]
    assert "# reconciler heartbeat" in crontab(node), "what could be done was done, and stays"
    assert node.read(f"{h.HOME}/.openclaw/workspace-{agent['agent']}/HEARTBEAT.md")
    seen = fleet.check()
    changes = [change for row in seen.report["drifts"] for change in row["changes"]]
    assert [change["observed"] for change in changes if change["field"] == "schedule"] == [
        "cron is not running"
    ]
    node.run("systemctl unmask cron && systemctl start cron")
    assert fleet.once("--retry").code == 0
    assert fleet.once().report["drifts"] == []


def as_root(lab: Lab, node: Node) -> None:
    """From here on the inventory reaches the node as root."""
    lab.write_inventory({node.name: {**lab.host_vars(node), "ansible_user": "root"}}, {"fleet": [node.name]})


def test_a_timer_of_the_system_beats_for_root_and_is_put_right(nodes: Pool, fleet: Fleet, lab: Lab) -> None:
    """Everything belongs to root then: program, files, timer, and the service that is restarted for the agent."""
    (node,) = nodes(1)
    h.prepare([node])
    node.run("mkdir -p /root/.stand_ins; cp /home/agent/.stand_ins/* /root/.stand_ins/")
    node.write(
        "/etc/systemd/system/gateway.service",
        h.GATEWAY.replace("%h", "/root"),
    )
    as_root(lab, node)
    agent = h.agents([node], scope="system", turn=["openclaw", "agent", "--agent", "{agent}"])[0]
    name = agent["agent"]
    fleet.declare({"defaults": DEFAULTS, "heartbeats": [agent]})
    began = time.time()
    answer = fleet.once()
    assert answer.code == 0, answer.out + answer.err

    def state() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            node.run(f"cat /root/.local/state/heartbeat/{name}.json").stdout or "{}"
        )
        return found

    def fires(after: float) -> None:
        wait_for(lambda: (state().get("scheduled_beat") or 0) > after, "the system's timer makes it beat", 60)

    fires(began)
    assert node.run(f"systemctl is-enabled heartbeat-{name}.timer").stdout.strip() == "enabled"
    assert fleet.once().report["drifts"] == []

    # A task starts a turn: in the account's own home, and it goes on after the beat.
    node.run(
        "printf '#!/bin/sh\\nsleep 2; echo $HOME > ~/turned\\n' > /root/.stand_ins/turn; chmod +x /root/.stand_ins/turn"
    )
    node.write("/root/.stand_ins/cards.json", json.dumps({"cards": [h.card(name, "T-1")]}))
    wait_for(
        lambda: node.run("cat /root/turned", check=False).stdout == "/root\n", "a turn ran to its end", 60
    )

    node.run(
        f"systemctl disable --now heartbeat-{name}.timer; echo broken > /etc/systemd/system/heartbeat-{name}.service"
    )
    stopped = time.time()
    assert fleet.once("--retry").outcomes[f"node-1/heartbeat/{name}"] == "fixed"
    fires(stopped)
    node.run(
        f"systemctl mask --now heartbeat-{name}.timer --runtime; rm /etc/systemd/system/heartbeat-{name}.timer"
    )
    stopped = time.time()
    assert fleet.once("--retry").outcomes[f"node-1/heartbeat/{name}"] == "fixed"
    fires(stopped)
    # All it has is on the board, and the board is down: the service that answers for it is one of the system.
    only = {"workboard": agent["sources"]["workboard"], "documents": None, "multica": None}
    fleet.declare({"defaults": DEFAULTS, "heartbeats": [{**agent, "sources": only}]})
    assert fleet.once("--retry").code == 0
    node.run("echo fail > /root/.stand_ins/openclaw.mode")
    wait_for(lambda: state().get("outcome") == "degraded", "it sees nothing", 60)
    assert fleet.once("--retry").outcomes[f"node-1/heartbeat/{name}"] == "rolled_back"
    assert fleet.once("--retry").outcomes[f"node-1/heartbeat/{name}"] == "fixed"
    assert node.read("/root/gateway") == b"started\n"
    assert node.run("test -e /home/agent/.local/state/heartbeat", check=False).returncode != 0
