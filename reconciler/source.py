"""Where the desired state comes from when it lives in git: a mirror of our own, and a directory per revision.

Nobody's working tree is touched. A revision is written beside and renamed when it is complete, so that a pass never
reads half of one; one that turns out to be invalid is remembered, and the last good one stays in force.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from reconciler import systemd
from reconciler.model import ConfigurationError, Problem

REFERENCE = "refs/reconciler/wanted"
KEEP_SECONDS = 86400.0
SHORT = 12


class SourceError(Exception):
    """The repository could not be asked; what was fetched before is still there. The message says what git said."""


@dataclass(frozen=True)
class Origin:
    """Which line of history is wanted: a branch or a tag of the repository at ``url``."""

    url: str
    branch: str = ""
    tag: str = ""

    @property
    def name(self) -> str:
        """As git calls it."""
        return f"refs/tags/{self.tag}" if self.tag else f"refs/heads/{self.branch}"


@dataclass(frozen=True)
class Checkout:
    """One revision, whole, in a directory that is never written to again."""

    revision: str
    directory: Path


class Mirror:
    """Our copy of a repository. ``home`` is where everything of it stands; ``timeout`` is seconds for one fetch."""

    def __init__(self, home: Path, origin: Origin, timeout: float = 60.0) -> None:
        self.origin, self.timeout = origin, timeout
        key = hashlib.sha256(f"{origin.url} {origin.name}".encode()).hexdigest()[:SHORT]
        self.home = home / key
        self.repository = self.home / "repository.git"
        self._seen: dict[str, Path] = {}

    def fetch(self) -> str:
        """The newest revision there is. Raises SourceError; a history that was rewritten is simply followed."""
        with self._lock():
            self._prepare()
            self._git("fetch", "--force", "--no-tags", "--quiet", "--no-write-fetch-head", self.origin.url,
                      f"+{self.origin.name}:{REFERENCE}")  # fmt: skip
        return self._fetched() or ""

    def fetched(self) -> str | None:
        """The newest revision that was ever fetched; None before the first time, or where the copy is damaged."""
        try:
            return self._fetched()
        except SourceError:
            return None

    def _fetched(self) -> str | None:
        if not self.repository.exists():
            return None
        return self._git("rev-parse", "--verify", "--quiet", f"{REFERENCE}^{{commit}}").strip() or None

    def checkout(self, revision: str) -> Checkout:
        """The files of a revision. Raises SourceError."""
        found = self._seen.get(revision)
        if found is None:
            with self._lock():
                found = self._seen[revision] = self._whole(revision)
        return Checkout(revision, found)

    # --- the last good one ---

    def good(self) -> str | None:
        """The last revision that was found to be valid, if it is still there."""
        with suppress(OSError, SourceError):
            revision = (self.home / "good").read_text(encoding="ascii").strip()
            if revision and self._git("cat-file", "-t", revision).strip() == "commit":
                return revision
        return None

    def keep(self, revision: str) -> None:
        """From now on this is the last good one; a history that is rewritten does not take it away."""
        with self._lock():
            self._git("update-ref", "refs/reconciler/good", revision)
            _write(self.home / "good", revision)
            self._forget(revision)

    # --- how it is done ---

    def _prepare(self) -> None:
        if (self.repository / "HEAD").exists():
            with suppress(SourceError):
                self._git("rev-parse", "--git-dir")
                return
        # Half made when the power went, or by hand: it is a copy, nothing is lost with it.
        shutil.rmtree(self.repository, ignore_errors=True)
        self._run(["git", "init", "--quiet", "--bare", str(self.repository)])

    def _whole(self, revision: str) -> Path:
        """A directory with exactly the files of the revision; one that was damaged is written anew."""
        parent = self.home / "revisions"
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        final = parent / revision
        if final.exists() and self._is_exact(final, revision):
            return final
        beside = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        with tempfile.NamedTemporaryFile(dir=self.home, suffix=".tar") as archive:
            self._git("archive", "--format=tar", f"--output={archive.name}", revision)
            self._run(["tar", "-x", "-f", archive.name, "-C", str(beside)])
        if final.exists():
            final.rename(beside.with_name(f".new-{beside.name[5:]}-damaged"))
        beside.rename(final)
        return final

    def _is_exact(self, directory: Path, revision: str) -> bool:
        """Whether every file is there as it was committed; a machine that lost its power may have lost some."""
        with tempfile.TemporaryDirectory(dir=self.home) as scratch:
            more = {"GIT_INDEX_FILE": str(Path(scratch) / "index"), "GIT_WORK_TREE": str(directory)}
            try:
                self._git("read-tree", revision, environment=more)
                said = self._git("status", "--porcelain", "--no-renames", environment=more)
            except SourceError:
                return False
        # Staged differences are between the index and HEAD, which means nothing here: only the second column counts.
        return not any(line[1:2] not in ("", " ") for line in said.splitlines())

    def _forget(self, revision: str) -> None:
        """Remove what nobody can be reading any more."""
        for directory in (self.home / "revisions").glob("[0-9a-f]*"):
            is_old = time.time() - directory.stat().st_mtime > KEEP_SECONDS
            if directory.name not in (revision, *self._seen) and is_old:
                shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time works on the mirror."""
        try:
            self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SourceError(f"{self.home} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _git(self, *words: str, environment: dict[str, str] | None = None) -> str:
        return self._run(["git", "--git-dir", str(self.repository), *words], environment)

    def _run(self, argv: Sequence[str], environment: dict[str, str] | None = None) -> str:
        """Run a program with a deadline for it and all that it starts; what it says becomes the error."""
        quiet = {
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes -o ConnectTimeout=10"),
            "LC_ALL": "C",
        }
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                errors="replace", start_new_session=True, env={**os.environ, **quiet, **(environment or {})},
            )  # fmt: skip
        except OSError as error:
            raise SourceError(f"{argv[0]} cannot be started: {error.strerror}") from error
        with process:
            try:
                out, err = _communicate(process, self.timeout)
            except subprocess.TimeoutExpired:
                raise SourceError(f"git did not answer within {self.timeout:g} seconds") from None
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode != 0:
            raise SourceError(" ".join(err.split())[-400:] or f"git ended with status {process.returncode}")
        return out


def _communicate(process: subprocess.Popen[str], timeout: float) -> tuple[str, str]:
    """Wait, alive: a remote that hangs is no reason for a supervisor to end us."""
    until = time.monotonic() + timeout
    while True:
        systemd.alive()
        try:
            return process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                raise


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="ascii") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.rename(path)


def enclosing(directory: Path) -> tuple[Origin, Path]:
    """The remote branch that the repository around ``directory`` follows, and its top. Raises ConfigurationError."""

    def said(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *words], capture_output=True, text=True, timeout=20, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    top = said("rev-parse", "--show-toplevel") if directory.is_dir() else ""
    if not top:
        hint = "make it one, or set url in the table [git] of reconciler.toml"
        raise ConfigurationError(
            [Problem(f"{directory} is not in a git repository: nothing to pull", hint=hint)]
        )
    branch = said("rev-parse", "--abbrev-ref", "HEAD")
    remote = said("config", f"branch.{branch}.remote") or "origin"
    url = said("remote", "get-url", remote)
    merged = said("config", f"branch.{branch}.merge").removeprefix("refs/heads/") or branch
    if not url or branch == "HEAD":
        hint = "set url and branch or tag in the table [git] of reconciler.toml"
        raise ConfigurationError([Problem(f"the repository at {top} follows no remote branch", hint=hint)])
    # A remote that is a path is meant from the repository, not from wherever we were started.
    if "://" not in url and ":" not in url.split("/", 1)[0]:
        url = str((Path(top) / url).resolve())
    return Origin(url, branch=merged), Path(top)
