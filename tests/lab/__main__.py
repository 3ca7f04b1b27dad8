"""`python -m tests.lab`: a fleet of real nodes for people; see --help."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lab.host import LabError
from tests.lab.lab import CONTROLLER, DEFAULT_DIRECTORY, FLEET, Lab
from tests.lab.node import AGENT, Node


def _names(options: argparse.Namespace) -> list[str]:
    if options.count:
        width = len(str(options.count))
        return [f"node-{number:0{width}d}" for number in range(1, options.count + 1)]
    return options.nodes.split(",") if options.nodes else list(FLEET)


def _up(options: argparse.Namespace) -> int:
    names = _names(options)
    groups = {
        "controllers": [name for name in names if name == CONTROLLER],
        "nodes": [name for name in names if name != CONTROLLER],
    }
    begin = time.monotonic()
    lab = Lab(names, options.directory, groups=groups, first_port=options.first_port)
    lab.up(keep=True)
    _say(f"{len(names)} nodes up in {time.monotonic() - begin:.1f} s")
    _say(f"inventory: {lab.inventory}")
    _say(f"reach one: {lab[names[0]].user}@{names[0]} with: python -m tests.lab ssh {names[0]}")
    return 0


def _status(options: argparse.Namespace) -> int:
    lab = Lab.attach(options.directory)
    width = max(map(len, lab.nodes))
    for node in lab:
        sshd = "answers" if node.answers(timeout=1) else "does not answer"
        _say(f"{node.name:{width}}  {node.address}:{node.port}  {node.state:8} sshd {sshd}")
    return 0


def _ssh(options: argparse.Namespace) -> int:
    node = Lab.attach(options.directory)[options.node]
    argv = [*node.ssh_command(options.user), *([" ".join(options.command)] if options.command else [])]
    sys.stdout.flush()
    os.execvp(argv[0], argv)


def _down(options: argparse.Namespace) -> int:
    if not Lab.sweep(options.directory):
        raise LabError(f"no lab is up in {options.directory}")
    return 0


def _on_node(work: Callable[[Node], None]) -> Callable[[argparse.Namespace], int]:
    def command(options: argparse.Namespace) -> int:
        work(Lab.attach(options.directory)[options.node])
        return 0

    return command


ON_NODE: dict[str, tuple[Callable[[Node], None], str]] = {
    "pause": (Node.pause, "freeze a node: it accepts connections and never answers"),
    "resume": (Node.resume, "let a paused node go on"),
    "cut": (Node.cut, "make a node unreachable: connections are refused, open ones die"),
    "uncut": (Node.uncut, "make a cut node reachable again"),
    "stop": (Node.stop, "power a node off"),
    "start": (Node.start, "boot a node that is off, with the files it had"),
    "reset": (Node.reset, "throw away what was changed on a node, and boot it afresh"),
}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tests.lab", description="Real nodes on this machine.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="default: %(default)s")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, work: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, parents=[common])
        command.set_defaults(work=work)
        return command

    up = add("up", _up, "boot nodes and write their inventory")
    which = up.add_mutually_exclusive_group()
    which.add_argument("--nodes", help="names, separated by commas (default: the fleet's)")
    which.add_argument("--count", type=int, help="this many nodes: node-1, node-2, ...")
    up.add_argument("--first-port", type=int, help="sshd's port on the first node (default: any free ones)")
    add("status", _status, "show the nodes")
    ssh = add("ssh", _ssh, "log in to a node, or run a command there")
    ssh.add_argument("--user", default=AGENT, help="default: %(default)s")
    ssh.add_argument("node", metavar="NODE")
    ssh.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER)
    for name, (work, text) in ON_NODE.items():
        add(name, _on_node(work), text).add_argument("node", metavar="NODE")
    add("down", _down, "remove the nodes and everything of them")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(options.work(options))
    except LabError as error:
        sys.stderr.write(f"lab: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
