"""tool (C4): a command on PATH, of a version in the declared range."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from reconciler.kinds.base import Context, Declaration, FieldError, Resolved, Strict, encode
from reconciler.kinds.tool import probe

MAX_FILE = 32 * 1024 * 1024


def _range(text: str) -> str:
    probe.parse_range(text)
    return text


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("a SHA-256 has 64 hexadecimal digits")
    return text.lower()


class Install(Strict):
    """How the command gets onto the node: exactly one of apt, pip, pipx, npm, url and file."""

    apt: str | None = Field(None, min_length=1, examples=["jq", "jq=1.6-2.1", "/srv/packages/mm_2.1_all.deb"])
    """Debian package, NAME=VERSION, or a .deb on the node. Needs ``allow_become`` or a root connection."""
    pip: str | None = Field(
        None, min_length=1, examples=["aider-chat==0.60", "/srv/packages/mm-2.1-py3-none-any.whl"]
    )
    """Python package; gets a virtual environment of its own."""
    pipx: str | None = Field(None, min_length=1, examples=["aider-chat==0.60"])
    """The same as pip: one environment per tool, its command linked into the bin directory."""
    npm: str | None = Field(None, min_length=1, examples=["@anthropic-ai/claude-code@2.0.1"])
    """npm package, version or tarball; gets a prefix of its own, its command linked into the bin directory."""
    url: str | None = Field(
        None, pattern=r"^(https?|file)://", examples=["https://example.org/mm-2.1.tar.gz"]
    )
    """A file to download; a .tar.gz, .tgz, .tar.xz or .zip is unpacked. Needs ``sha256``."""
    sha256: Annotated[str, AfterValidator(_sha256)] | None = Field(None, examples=["9f86d081884c7d65" * 4])
    """What the download has to hash to."""
    member: str | None = Field(None, examples=["mm-2.1/bin/mm"])
    """The command's path inside an archive; absent means the only file of the command's name."""
    file: str | None = Field(None, min_length=1, examples=["files/mm"])
    """An executable file beside the desired state; its content is compared as well."""


METHODS: tuple[Literal["apt", "pip", "pipx", "npm", "url", "file"], ...] = (
    "apt",
    "pip",
    "pipx",
    "npm",
    "url",
    "file",
)


class Tool(Declaration):
    """A command-line tool that agents need."""

    KIND: ClassVar[str] = "tool"
    SECTION: ClassVar[str] = "tools"
    CHECK_TYPE: ClassVar[str] = "C4"
    ORDER: ClassVar[int] = 30
    PROBE_SECONDS: ClassVar[float] = 15.0
    OBSERVE_PRIVILEGED: ClassVar[bool] = False
    PROPOSABLE: ClassVar[str] = "install"

    command: str | None = Field(None, min_length=1, pattern=r"^[^/\s]+$", examples=["claude"])
    """The command; the resource's name when absent."""
    version: Annotated[str, AfterValidator(_range)] | None = Field(
        None, examples=[">=2.0", ">=2.0,<3", "==2.1.*"]
    )
    """Versions that will do; absent means any."""
    version_args: list[str] = Field(["--version"], examples=[["version", "--short"]])
    """Arguments that make the command print its version."""
    version_regex: str | None = Field(None, examples=[r"release (\S+)"])
    """Where the version stands in what is printed: the first group. Absent: the first thing like a version."""
    path: list[str] = Field(default_factory=list, examples=[["~/.npm-global/bin"]])
    """Directories to look in before the account's own bin directories and the session's PATH."""
    bin_dir: str | None = Field(None, examples=["~/.local/bin"])
    """Where the command is linked to; ~/.local/bin, or /usr/local/bin for root."""
    install: Install | None = None
    """How to install it; absent means that a missing tool is only reported."""

    def resolve(self, context: Context) -> Resolved:
        """What to look for and how to get it."""
        args: dict[str, Any] = {
            "command": self.command or self.name,
            "version_args": self.version_args,
            "version_regex": self._regex(),
            "path": self.path,
            "bin_dir": self.bin_dir,
            "install": self._method(context),
        }
        fields: dict[str, Any] = {"version": self.version or "any"}
        if self.install and self.install.file:
            fields["content"] = args["install"]["sha256"]
        return Resolved(fields=fields, args=args)

    def _regex(self) -> str | None:
        if self.version_regex is not None:
            try:
                groups = re.compile(self.version_regex).groups
            except re.error as error:
                raise FieldError("version_regex", f"is no regular expression: {error}") from None
            if groups < 1:
                raise FieldError("version_regex", "has no group", "put the version's part in parentheses")
        return self.version_regex

    def _method(self, context: Context) -> dict[str, Any] | None:
        if self.install is None:
            return None
        given = [method for method in METHODS if getattr(self.install, method) is not None]
        if len(given) != 1:
            raise FieldError("install", "takes exactly one of " + ", ".join(METHODS))
        method = given[0]
        if method == "url" and self.install.sha256 is None:
            raise FieldError(
                "install", "a url needs its sha256", "what is downloaded is checked before it is run"
            )
        if method != "url" and (self.install.sha256 or self.install.member):
            raise FieldError("install", "sha256 and member go with url")
        found: dict[str, Any] = {"method": method, "source": getattr(self.install, method)}
        if method == "url":
            found |= {"sha256": self.install.sha256, "member": self.install.member}
        if method == "file":
            found |= self._file(context, str(self.install.file))
        return found

    @staticmethod
    def _file(context: Context, path: str) -> dict[str, Any]:
        try:
            body = context.read(path)
        except OSError as error:
            hint = "paths are relative to the directory of the desired state"
            raise FieldError("install.file", f"cannot read {path!r}: {error.strerror}", hint) from None
        if len(body) > MAX_FILE:
            raise FieldError(
                "install.file", f"{len(body)} bytes are too many to send", "offer it by url instead"
            )
        return {"sha256": hashlib.sha256(body).hexdigest(), "body": encode(body)}

    @classmethod
    def probe_args(cls, resource: Any) -> dict[str, Any]:
        """How to look, without what is installed."""
        keys = ("command", "version_args", "version_regex", "path")
        wanted = {key: resource.args[key] for key in keys}
        return {
            **wanted,
            "content": resource.fields.get("content"),
            "installable": bool(resource.args["install"]),
        }


DECLARATION = Tool
