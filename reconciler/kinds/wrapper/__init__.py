"""wrapper (C2): a file with the declared content, permissions and owner."""

from __future__ import annotations

import hashlib
import posixpath
import shlex
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

from pydantic import Field

from reconciler.kinds.base import (
    BodyFields,
    Context,
    Declaration,
    FieldError,
    FileMode,
    Resolved,
    body_change,
    encode,
)
from reconciler.model import Change, Mode, Resource

MAX_BODY = 8 * 1024 * 1024
LOGIN_FILES = (
    "/etc/ssh/*", "*/.ssh/*", "/etc/pam.d/*", "/etc/security/*", "/etc/sudoers*", "/etc/hosts.allow", "/etc/hosts.deny",
    "/etc/passwd", "/etc/shadow", "/etc/group", "/etc/nsswitch.conf", "/etc/network/*", "/etc/netplan/*",
    "/etc/systemd/network/*", "/etc/NetworkManager/*", "/etc/nftables*", "/etc/iptables/*", "/etc/ufw/*",
    "/etc/profile", "/etc/profile.d/*", "/etc/environment", "/etc/bash.bashrc", "/etc/zshenv", "/etc/zsh/zshenv",
    "~*/.profile", "~*/.bashrc", "~*/.bash_profile", "~*/.bash_login", "~*/.zshenv", "~*/.zprofile",
    "/home/*/.profile", "/home/*/.bashrc", "/home/*/.bash_profile", "/home/*/.zshenv", "/root/.*",
)  # fmt: skip


class Wrapper(Declaration, BodyFields):
    """A managed file: a wrapper script, a configuration file, anything that is one file."""

    KIND: ClassVar[str] = "wrapper"
    SECTION: ClassVar[str] = "wrappers"
    CHECK_TYPE: ClassVar[str] = "C2"
    ORDER: ClassVar[int] = 40

    dest: str = Field(min_length=1, examples=["~/task-wrapper.sh"])
    """Where it stands on the node; ``~`` is the home of the account that is connected to."""
    mode: Annotated[Mode, Field(strict=False)] | FileMode | None = Field(  # type: ignore[assignment]
        None, examples=["0755", "warn"]
    )
    """Octal permissions in quotes, as in Ansible, or enforce, warn, ignore; to give both, use ``permissions``."""
    permissions: FileMode | None = Field(None, examples=["0755"])
    """Octal permissions, in quotes. Unset: left as they are, and 0644 for a new file."""
    owner: str | None = Field(None, examples=["agent"])
    """User name; changing it needs ``allow_become`` or a root connection."""
    group: str | None = Field(None, examples=["agent"])
    """Group name; the same."""
    validate_with: str | None = Field(None, alias="validate", examples=["bash -n %s"])
    """Command that has to succeed on the new file (in place of %s) before it replaces the old one."""

    def can_lock_out(self) -> bool:
        """Files that sshd, PAM, the network or a login shell read."""
        return any(fnmatchcase(posixpath.normpath(self.dest), pattern) for pattern in LOGIN_FILES)

    def resolve(self, context: Context) -> Resolved:
        """The file's bytes, digest and permissions."""
        if len(self.sources()) != 1:
            raise FieldError("", "a wrapper takes exactly one of src, template and content")
        if not self.dest.startswith(("/", "~")):
            raise FieldError("dest", f"{self.dest!r} is not absolute", "begin with / or ~")
        if self.dest.endswith("/"):
            raise FieldError("dest", f"{self.dest!r} is a directory", "name the file itself")
        body = context.body(self) or b""
        if len(body) > MAX_BODY:
            raise FieldError(
                self.sources()[0], f"{len(body)} bytes are more than a managed file may have ({MAX_BODY})"
            )
        fields = {"type": "file", "content": hashlib.sha256(body).hexdigest(), "mode": self._permissions()}
        fields |= {"owner": self.owner, "group": self.group}
        return Resolved(
            fields={key: value for key, value in fields.items() if value is not None},
            args={"dest": self.dest, "body": encode(body), "validate": self._validation()},
            paths_written=frozenset({posixpath.normpath(self.dest)}),
        )

    def _permissions(self) -> str | None:
        if self.permissions is None and not isinstance(self.mode, Mode):
            return self.mode
        return self.permissions

    def _validation(self) -> list[str]:
        if self.validate_with is None:
            return []
        try:
            words = shlex.split(self.validate_with)
        except ValueError as error:
            raise FieldError("validate", f"cannot be split into words: {error}") from None
        if not any("%s" in word for word in words):
            raise FieldError(
                "validate", "has no %s", 'put %s where the file\'s name goes, as in "bash -n %s"'
            )
        return words

    @classmethod
    def probe_args(cls, resource: Resource) -> dict[str, Any]:
        """The digest travels, the content does not."""
        return {"dest": resource.args["dest"], "content": resource.fields.get("content")}

    @classmethod
    def changes(cls, resource: Resource, facts: Mapping[str, Any]) -> tuple[Change, ...]:
        """As the node sees them, with a text diff for the content."""
        return tuple(
            body_change(resource, facts, change, resource.args["dest"])
            if change.field == "content"
            else change
            for change in super().changes(resource, facts)
        )


DECLARATION = Wrapper
