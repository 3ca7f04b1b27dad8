"""A pass without drift over 5, 20 and 100 nodes, beside what others take for the same.

In the same run: `ansible-playbook --check` with the same desired state, pyinfra gathering the same facts,
and bare ssh through open control sockets with the very scripts of a pass, which is the limit.
"""

import argparse
import compileall
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from reconciler import node, requests
from reconciler.desired.load import load
from reconciler.inventory import Inventory
from reconciler.model import Resource
from tests.bench.fleet import ROOT, BenchFleet
from tests.bench.measure import Cost, Meter, allow_many_files
from tests.lab import LabError

WARM, COLD, LIMIT, ANSIBLE, PYINFRA = (
    "reconcile, warm",
    "reconcile, cold",
    "bare ssh (limit)",
    "ansible-playbook --check",
    "pyinfra",
)
AT_ONCE = 25
REPEATS = 3


@dataclass(frozen=True)
class Target:
    """A promise: what it says, what was measured, and the bound it has to keep."""

    what: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """Whether the bound holds."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


class Bench:
    """All contenders over one fleet."""

    def __init__(self, fleet: BenchFleet, meter: Meter) -> None:
        self.fleet, self.meter = fleet, meter
        self.run = partial(meter.run, env=fleet.environment(), cwd=ROOT)

    def over(self, count: int, *, with_ansible: bool, with_pyinfra: bool) -> dict[str, Cost]:
        """Costs of all contenders on ``count`` nodes."""
        inventory = self.fleet.inventory(count)
        one_pass = self.fleet.reconcile(inventory, "--check")
        self.fleet.close_sockets()
        found = {COLD: self.run(one_pass)}
        found[WARM] = self._typical(lambda: self.run(one_pass))
        memory = self.run(one_pass, memory=True)
        warm = found[WARM]
        found[WARM] = Cost(warm.wall, warm.cpu, warm.node_cpu, memory.memory, memory.masters)
        plan = self._bare_plan(inventory)
        found[LIMIT] = self._typical(lambda: self.run([sys.executable, "-m", "tests.bench.bare", str(plan)]))
        if with_pyinfra:
            module = "tests.bench.pyinfra_facts"
            found[PYINFRA] = self.run([sys.executable, "-m", module, str(inventory), str(AT_ONCE)])
        if with_ansible:
            playbook = ["ansible-playbook", "-i", str(inventory), "playbooks/site.yml", "--check"]
            found[ANSIBLE] = self.run(playbook, deadline=3600)
        return found

    @staticmethod
    def _typical(measure: Callable[[], Cost]) -> Cost:
        """The run with the median wall time: the machine may have other things to do."""
        runs = [measure() for _ in range(REPEATS)]
        return sorted(runs, key=lambda cost: cost.wall)[len(runs) // 2]

    def _bare_plan(self, inventory: Path) -> Path:
        """What `tests.bench.bare` is to do: per node the ssh command line and the script of a pass."""
        directory = self.fleet.directory / "scripts"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        hosts = yaml.safe_load(inventory.read_text())["all"]["hosts"]
        read = Inventory(inventory)
        by_node: dict[str, list[Resource]] = {name: [] for name in hosts}
        for rid, resource in load(self.fleet.desired, read).resources.items():
            by_node[rid.node].append(resource)
        jobs = []
        for name, address in hosts.items():
            request, _ = requests.looks(by_node[name], read.variables[name], fresh=False)
            (batch,) = request["batches"]
            script = directory / f"{name}.py"
            script.write_bytes(node.call(batch["script"], {"connection": "ssh", "control_socket": "alive"}))
            jobs.append({"argv": self._ssh(address), "script": str(script)})
        plan = directory / "plan.json"
        plan.write_text(json.dumps(jobs))
        return plan

    def _ssh(self, address: dict[str, str]) -> list[str]:
        """A command line that uses the socket Ansible opened; its name is Ansible's hash of the address."""
        host, port = address["ansible_host"], str(address["ansible_port"])
        name = hashlib.sha1(f"{host}-{port}-agent".encode(), usedforsecurity=False).hexdigest()[:10]
        options = [
            "-F",
            "/dev/null",
            "-o",
            "ControlMaster=no",
            "-o",
            f"ControlPath={self.fleet.sockets / name}",
        ]
        return ["ssh", *options, "-p", port, f"agent@{host}", f"python3 {node.INTERPRETER_FLAGS}"]


def table(count: int, found: dict[str, Cost]) -> str:
    """One row per contender; ratios are wall times by that of a warm pass."""
    lines = [
        f"\n{count} nodes",
        f"{'':26}{'wall s':>8}{'CPU s':>8}{'node CPU ms':>13}{'memory MB':>11}{'x warm':>8}",
    ]
    for name in (WARM, COLD, LIMIT, PYINFRA, ANSIBLE):
        if name in found:
            cost = found[name]
            memory = f"{cost.memory:11.0f}" if cost.memory else f"{'':>11}"
            per_node = cost.node_cpu / count * 1000
            ratio = cost.wall / found[WARM].wall
            lines.append(f"{name:26}{cost.wall:8.2f}{cost.cpu:8.2f}{per_node:13.0f}{memory}{ratio:8.1f}")
    lines.append(
        f"(besides, {found[WARM].masters:.0f} MB for open SSH masters, {found[WARM].masters / count:.1f} each)"
    )
    return "\n".join(lines)


def targets(costs: dict[int, dict[str, Cost]]) -> list[Target]:
    """The fixed promises, for those node counts and contenders that were measured."""
    found = []
    if 5 in costs:
        found.append(Target("5 nodes, warm: s", costs[5][WARM].wall, 3.0))
    if 100 in costs:
        row = costs[100]
        found.append(Target("100 nodes, warm: s, 1.5 x limit + 2", row[WARM].wall, 1.5 * row[LIMIT].wall + 2))
        found.append(Target("100 nodes, warm: MB", row[WARM].memory, 250))
        # Small fleets tell nothing about these two: what programs take to start outweighs the nodes.
        for rival, times in ((PYINFRA, 4), (ANSIBLE, 50)):
            if rival in row:
                ratio = row[rival].wall / row[WARM].wall
                found.append(
                    Target(f"100 nodes, warm: times faster than {rival}", ratio, times, at_least=True)
                )
    return found


def main() -> int:
    """Measure, print, and return 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench reconciler", description=__doc__)
    parser.add_argument("--nodes", default="5,20,100", help="numbers of nodes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="ansible-playbook on the smallest fleet only")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp/reconciler-bench"))
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    counts = sorted(int(word) for word in options.nodes.split(","))
    allow_many_files()
    # As an installation has it; a checkout may never have written any, where the environment forbids it.
    compileall.compile_dir(ROOT / "reconciler", quiet=1)
    pyinfra = importlib.util.find_spec("pyinfra") is not None
    if not pyinfra:
        print("without pyinfra, which is not installed: pip install -e .[bench]", file=sys.stderr)
    shutil.rmtree(options.directory / "desired_state", ignore_errors=True)
    fleet = BenchFleet(options.directory)
    try:
        fleet.up()
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    meter = Meter(fleet.lab, options.directory / "log")
    try:
        costs = {}
        for count in counts:
            ansible = count == counts[0] or not options.quick
            costs[count] = Bench(fleet, meter).over(count, with_ansible=ansible, with_pyinfra=pyinfra)
            print(table(count, costs[count]), flush=True)
    finally:
        meter.close()
        fleet.close_sockets()
        fleet.lab.down()
    if options.json:
        figures = {count: {name: vars(cost) for name, cost in row.items()} for count, row in costs.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return report(targets(costs))


def report(wanted: Sequence[Target]) -> int:
    """Print the targets with what was measured; 1 where one is missed."""
    load_average = statistics.fmean(os.getloadavg()[:2])
    print(f"\ntargets (load average of the machine: {load_average:.1f} on {os.cpu_count()} cores)")
    for target in wanted:
        sign = ">=" if target.at_least else "<="
        verdict = "kept" if target.kept else "MISSED"
        print(f"{target.what:60}{target.measured:8.2f} {sign} {target.bound:6.2f}  {verdict}")
    return 0 if all(target.kept for target in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
