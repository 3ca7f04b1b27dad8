"""ssh (C3): the node can be logged in to, and its control socket lives."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from reconciler.kinds.base import Context, Declaration, Duration, Name, Resolved, seconds


class Ssh(Declaration):
    """The connection itself. Never touches ``~/.ssh/config``."""

    KIND: ClassVar[str] = "ssh"
    SECTION: ClassVar[str] = "ssh"
    CHECK_TYPE: ClassVar[str] = "C3"
    ORDER: ClassVar[int] = 10
    NO_ROLLBACK: ClassVar[str] = (
        "A dead control socket is of no use to anybody: there is nothing to go back to."
    )
    VERIFY_FRESH: ClassVar[bool] = True
    CHANGES_NODE: ClassVar[bool] = False

    name: Name = Field("control", examples=["control"])
    """What the resource is called; one per node is enough."""
    fresh_login_every: Duration = Field("1h", examples=["1h", "10m"])
    """How often a new login is tried beside an open control socket, which outlives a dead sshd."""

    def resolve(self, context: Context) -> Resolved:  # noqa: ARG002 - the same for every node
        """A living socket and a working login."""
        return Resolved(
            fields={"control_socket": "alive", "login": "working"},
            args={"fresh_login_every": seconds(self.fresh_login_every)},
        )


DECLARATION = Ssh
