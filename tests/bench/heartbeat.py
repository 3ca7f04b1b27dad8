"""What a round of heartbeats costs: CPU of all agents of one node, and how often the task commands are called.

    python -m tests.bench heartbeat [--agents 200] [--cards 2000] [--rounds 5] [--at-once 16]

One account, a declared number of agents, the stand-in commands on its PATH. Every round starts the program once
for each agent, some at once, as timers do. CPU is user and system time of the beats and all they start, turns that
outlive them and their watchers too (this process adopts and reaps them), by `getrusage`. What a task command uses is
measured by itself and shown. Beside it, in the same rounds: the naive way, where each agent's beat calls its commands
itself (its own cache directory), and starting Python so often at all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.unit.heartbeat_support import MULTICA, Account, card, claimed, issue

PYTHON = shutil.which("python3", path="/usr/bin") or sys.executable


@dataclass
class Cost:
    """Seconds of one round, and calls of each command."""

    cpu: float
    wall: float
    calls: dict[str, int]


def node(home: Path, agents: int, cards: int) -> Account:
    """An account with its agents: a board with cards for all of them, an issue and three boxes each."""
    home.mkdir()
    account = Account(home)
    sources = account.declare()["sources"]
    (account.home / ".config" / "heartbeat" / "architect.json").unlink()
    for status in ("todo", "in_progress"):
        key = "list_all" if status == "todo" else "list_all_in_progress"
        sources["multica"][key] = [*MULTICA, "--limit", "5000", "--status", status]
    for number in range(agents):
        name = f"agent-{number}"
        (account.home / name).mkdir()
        (account.home / name / "TODO.md").write_text("# Things\n- [ ] Write (P1)\n- [x] Read\n- [~] Think\n")
        account.declare(
            name,
            sources=sources,
            multica=f"uuid-{number}",
            workspace=f"~/{name}",
            cache_seconds=60,
            source_timeout=60,
        )
    board = [
        card(f"c{n}", agentId=f"agent-{n % agents}", notes="A card as people write them. " * 8)
        for n in range(cards)
    ]
    account.cards(*board, *[claimed(f"p{n}", agent=f"agent-{n}") for n in range(agents)])
    account.issues(*[issue(f"i{n}", assignee_id=f"uuid-{n}") for n in range(agents)])
    account.turn("exit 0\n")
    return account


def used() -> float:
    """CPU seconds of all children that ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def together(commands: Iterable[tuple[list[str], dict[str, str]]], at_once: int) -> tuple[float, float]:
    """CPU and wall seconds of all those processes, some at once."""
    before, began = used(), time.monotonic()
    waiting = list(commands)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            argv, env = waiting.pop(0)
            running.append(
                subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            )
        if running.pop(0).wait() != 0:
            sys.exit("a beat failed")
    wall = time.monotonic() - began
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return used() - before, wall


def beats(account: Account, agents: int) -> list[tuple[list[str], dict[str, str]]]:
    """One beat of every agent, as the installed timers start it."""
    program = str(account.installed / "heartbeat")
    return [([PYTHON, "-IS", program, f"agent-{n}"], account.environment()) for n in range(agents)]


def naive(account: Account, agents: int) -> list[tuple[list[str], dict[str, str]]]:
    """The same with a cache of its own for everybody: a home that is the account's but for that."""
    found = []
    for number, (argv, env) in enumerate(beats(account, agents)):
        own = account.home.parent / "naive" / str(number)
        own.mkdir(parents=True, exist_ok=True)
        for name in (".config", ".local", ".stand_ins", f"agent-{number}"):
            if not (own / name).exists():
                (own / name).symlink_to(account.home / name)
        found.append((argv, {**env, "HOME": str(own)}))
    return found


def one_round(
    account: Account, commands: Callable[[], Iterable[tuple[list[str], dict[str, str]]]], at_once: int
) -> Cost:
    """A round from cold caches; turns that it starts are over before the next begins."""
    for cache in [account.home / ".cache", *account.home.parent.glob("naive/*/.cache")]:
        shutil.rmtree(cache, ignore_errors=True)
    (account.stand_ins / "calls").unlink(missing_ok=True)
    cpu, wall = together(commands(), at_once)
    calls: dict[str, int] = {}
    for line in account.calls():
        if not line.startswith("openclaw agent"):
            calls[line] = calls.get(line, 0) + 1
    return Cost(cpu, wall, calls)


def shown(name: str, costs: list[Cost], agents: int) -> float:
    """A line of the table; the median's CPU seconds."""
    cpu = statistics.median(cost.cpu for cost in costs)
    wall = statistics.median(cost.wall for cost in costs)
    calls = sum(costs[-1].calls.values())
    print(f"{name:44} {cpu:8.2f} {1000 * cpu / agents:10.1f} {wall:8.2f} {calls:8}")
    return cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench heartbeat", description=__doc__.partition("\n")[0]
    )
    for name, default in (("agents", 200), ("cards", 2000), ("rounds", 5), ("at-once", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(
        36, 1
    )  # PR_SET_CHILD_SUBREAPER: turns and their watchers become this process's children
    with tempfile.TemporaryDirectory(prefix="heartbeats-") as directory:
        account = node(Path(directory) / "home", options.agents, options.cards)
        command = [str(account.bin / "openclaw"), "workboard", "list", "--json"]
        size = (account.stand_ins / "cards.json").stat().st_size
        bare = [([PYTHON, "-IS", "-c", "pass"], account.environment())] * options.agents
        rows: dict[str, list[Cost]] = {"shared": [], "naive": [], "bare": []}
        for _ in range(options.rounds):
            rows["shared"].append(one_round(account, lambda: beats(account, options.agents), options.at_once))
            rows["naive"].append(one_round(account, lambda: naive(account, options.agents), options.at_once))
            rows["bare"].append(Cost(*together(bare, options.at_once), {}))
        state = json.loads(account.file("json", "agent-0").read_text())
        listed = together([(command, {**account.environment(), "HOME": str(account.home)})] * 20, 1)[0] / 20
    print(f"\n{options.agents} agents on one node, {options.cards} cards ({size / 1e6:.1f} MB), {os.cpu_count()} cores, "
          f"{options.rounds} rounds, medians; each agent sees {state['open'] + state['in_progress_total']} tasks, "
          f"outcome {state['outcome']}\n")  # fmt: skip
    print(f"{'':44} {'CPU s':>8} {'ms a beat':>10} {'wall s':>8} {'calls':>8}")
    cost = shown("one round of beats", rows["shared"], options.agents)
    other = shown("the same, each calling for itself", rows["naive"], options.agents)
    shown("starting Python that often, and nothing else", rows["bare"], options.agents)
    print(
        f"\none stand-in listing uses {1000 * listed:.1f} ms; the real commands start a runtime of their own"
    )
    for call, number in sorted(rows["shared"][-1].calls.items()):
        print(f"  called {number} x: {call}")
    print(f"each for itself costs {other / cost:.1f} times the CPU")
    if cost >= 10 or max(rows["shared"][-1].calls.values()) > 1:
        sys.exit("a round must cost less than 10 s of CPU and call each command once")


if __name__ == "__main__":
    main()
