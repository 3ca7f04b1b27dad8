"""The lab: real nodes (systemd as PID 1, sshd, a user manager) on one Debian machine, no container images.

Nodes share the machine's network; each sshd has a port of its own on the loopback range, and nothing
of the lab listens or sends anywhere else. Needs root; see `tests.lab.host.check_host`.
"""

from tests.lab.host import LabError
from tests.lab.lab import Lab
from tests.lab.node import AGENT, Node
from tests.lab.trees import Entry, Tree

__all__ = ["AGENT", "Entry", "Lab", "LabError", "Node", "Tree"]
