"""The desired state in git: real repositories on this machine."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from reconciler import settings
from reconciler.assemble import Scope, desired_state, located
from reconciler.model import ConfigurationError
from reconciler.revisions import Follower, InForce
from reconciler.source import Mirror, Origin, SourceError
from tests.unit.support import HOSTS, reconcile

GOOD = "wrappers: [{name: w, nodes: node-1, dest: ~/w, content: one}]\n"
BAD = "wrappers: [{name: w, nodes: node-1, dest: ~/w, contnt: two}]\n"


@dataclass
class Remote:
    """A bare repository, and a working copy to push from."""

    bare: Path
    work: Path

    def git(self, *words: str) -> str:
        """In the working copy."""
        identity = ["-c", "user.name=dana", "-c", "user.email=dana@example.org"]
        done = subprocess.run(
            ["git", *identity, *words], cwd=self.work, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    def push(self, text: str, *, force: bool = False) -> str:
        """Commit a desired state and push it; the revision."""
        (self.work / "desired_state/a.yml").write_text(text)
        self.git("add", "-A")
        self.git("commit", "--quiet", "--allow-empty", "-m", "change")
        self.git("push", "--quiet", *(["--force"] if force else []), "origin", "HEAD:main")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """With one good revision; the working directory is elsewhere."""
    bare, work = tmp_path / "fleet.git", tmp_path / "work"
    subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(bare)], check=True, timeout=60)
    subprocess.run(
        ["git", "clone", "--quiet", str(bare), str(work)], check=True, timeout=60, capture_output=True
    )
    (work / "desired_state").mkdir()
    (work / "inventory").mkdir()
    (work / "inventory/hosts.yml").write_text(HOSTS)
    made = Remote(bare, work)
    made.git("checkout", "--quiet", "-B", "main")
    made.push(GOOD)
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    return made


@pytest.fixture
def follower(remote: Remote, tmp_path: Path) -> Callable[..., Follower]:
    """A follower of the repository; each call is a new process's."""

    def make(**git: str) -> Follower:
        found = settings.load(db=tmp_path / "state/r.db", git={"url": str(remote.bare), **git})
        return Follower.of(found)

    return make


def is_running(pid: int) -> bool:
    """Whether a process is there, and not merely waiting to be buried."""
    argv = ["ps", "-o", "state=", "-p", str(pid)]
    state = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20).stdout
    return state.strip() not in ("", "Z")


def content(force: InForce) -> str:
    """What is declared there."""
    _everything, wanted, _inventory = desired_state(force.settings, Scope())
    return next(iter(wanted.resources.values())).digest


def test_newest_revision_is_in_force_and_nobodys_files_are_touched(
    remote: Remote, follower: Callable[..., Follower]
) -> None:
    """A pass works from a directory of its own."""
    followed = follower()
    assert followed.fetch()
    first = followed.in_force()
    assert first.revision == remote.git("rev-parse", "HEAD")[:12]
    assert not followed.fetch(), "nothing new"
    second = remote.push(GOOD.replace("one", "two"))
    assert followed.fetch()
    found = followed.in_force()
    assert found.revision == second[:12]
    assert content(found) != content(first), "the older directory still holds what it held"
    assert remote.git("status", "--porcelain") == ""


def test_invalid_revision_keeps_the_last_good_one_and_says_where(
    remote: Remote, follower: Callable[..., Follower]
) -> None:
    """Until it is mended."""
    followed = follower()
    followed.fetch()
    good = followed.in_force()
    bad = remote.push(BAD)
    assert followed.fetch()
    found = followed.in_force()
    assert (found.revision, found.rejected) == (good.revision, bad[:12])
    (problem,) = found.problems
    assert str(problem.mark).startswith(f"{bad[:12]}:desired_state/a.yml:1:")
    assert "content" in problem.hint
    again = follower().in_force()
    assert (again.revision, again.rejected) == (good.revision, bad[:12]), (
        "also for a process that was started later"
    )
    remote.push(GOOD.replace("one", "three"))
    followed.fetch()
    assert followed.in_force().rejected == ""


def test_first_revision_that_is_invalid_touches_nothing(
    remote: Remote, follower: Callable[..., Follower]
) -> None:
    """There is no good one to keep."""
    remote.push(BAD)
    followed = follower()
    followed.fetch()
    with pytest.raises(ConfigurationError, match="contnt"):
        followed.in_force()


def test_rewritten_history_is_followed(remote: Remote, follower: Callable[..., Follower]) -> None:
    """Even where the last good revision is gone from the remote, it stays readable here."""
    followed = follower()
    followed.fetch()
    first = followed.in_force()
    remote.git("checkout", "--quiet", "--orphan", "other")
    bad = remote.push(BAD, force=True)
    subprocess.run(["git", "gc", "--quiet", "--prune=now"], cwd=remote.bare, check=True, timeout=60)
    assert followed.fetch()
    found = follower().in_force()
    assert (found.revision, found.rejected) == (first.revision, bad[:12])
    forced = remote.push(GOOD.replace("one", "four"), force=True)
    assert followed.fetch()
    assert followed.in_force().revision == forced[:12]


def test_vanished_remote_leaves_what_was_fetched(
    remote: Remote, follower: Callable[..., Follower], tmp_path: Path
) -> None:
    """And says why; when it is back, all goes on."""
    followed = follower()
    followed.fetch()
    revision = followed.in_force().revision
    remote.bare.rename(tmp_path / "gone.git")
    assert not followed.fetch()
    assert "does not" in followed.in_force().unreachable
    assert follower().in_force().revision == revision
    (tmp_path / "gone.git").rename(remote.bare)
    newest = remote.push(GOOD.replace("one", "five"))
    assert followed.fetch()
    assert (followed.in_force().revision, followed.unreachable) == (newest[:12], "")


def test_remote_that_was_never_reached_is_a_clear_error(tmp_path: Path) -> None:
    """With the address, and what git said."""
    found = settings.load(db=tmp_path / "r.db", git={"url": str(tmp_path / "nowhere.git")})
    followed = Follower.of(found)
    followed.fetch()
    with pytest.raises(ConfigurationError, match=r"nowhere\.git was never fetched: .*does not"):
        followed.in_force()


def test_remote_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that git had started."""
    hanging = tmp_path / "hang"
    hanging.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(hanging))
    mirror = Mirror(tmp_path / "git", Origin("ssh://127.0.0.1/fleet.git", "main"), timeout=1.0)
    with pytest.raises(SourceError, match="did not answer within 1 seconds"):
        mirror.fetch()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


@pytest.mark.parametrize("damage", ["missing", "half", "more", "mode"])
def test_half_written_checkout_is_written_anew(
    remote: Remote, follower: Callable[..., Follower], damage: str
) -> None:
    """What a machine that lost its power leaves is not what was committed."""
    assert remote.git("rev-parse", "HEAD")
    followed = follower()
    followed.fetch()
    path = followed.in_force().settings.desired / "a.yml"
    if damage == "missing":
        path.unlink()
    elif damage == "half":
        path.write_text("wrappers: [{name")
    elif damage == "more":
        path.with_name("b.yml").write_text("wrappers: []\n")
    else:
        path.chmod(0o755)
    found = follower().in_force()
    assert found.rejected == ""
    assert (found.settings.desired / "a.yml").read_text() == GOOD
    assert sorted(found.settings.desired.iterdir()) == [found.settings.desired / "a.yml"]


def test_damaged_mirror_is_made_anew(remote: Remote, follower: Callable[..., Follower]) -> None:
    """It is a copy: nothing is lost with it."""
    followed = follower()
    followed.fetch()
    repository = followed.mirror.repository
    shutil.rmtree(repository / "objects")
    (repository / "HEAD").write_text("")
    newest = remote.push(GOOD.replace("one", "six"))
    again = follower()
    again.fetch()
    assert again.in_force().revision == newest[:12]


def test_tag_can_be_followed_and_moved(remote: Remote, follower: Callable[..., Follower]) -> None:
    """Annotated or not."""
    first = remote.git("rev-parse", "HEAD")
    remote.git("tag", "-a", "prod", "-m", "first")
    remote.git("push", "--quiet", "origin", "prod")
    remote.push(GOOD.replace("one", "seven"))
    followed = follower(tag="prod")
    followed.fetch()
    assert followed.in_force().revision == first[:12]
    remote.git("tag", "-f", "prod")
    remote.git("push", "--quiet", "--force", "origin", "prod")
    assert followed.fetch()
    assert followed.in_force().revision == remote.git("rev-parse", "HEAD")[:12]


def test_pull_without_settings_follows_the_repository_around_the_desired_state(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its remote branch, not its files: what somebody is editing there is not carried out."""
    newest = remote.push(GOOD.replace("one", "eight"))
    remote.git("reset", "--quiet", "--hard", "HEAD~1")
    monkeypatch.chdir(remote.work)
    followed = Follower.of(settings.load(db=tmp_path / "r.db"))
    followed.fetch()
    assert followed.in_force().revision == newest[:12]


def test_pull_outside_a_repository_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is touched."""
    (tmp_path / "desired_state").mkdir()
    monkeypatch.chdir(tmp_path)
    said = reconcile(
        "--once", "--pull", "--db", "r.db", env={"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    )
    assert said.code == 1
    assert "is not in a git repository" in said.err
    assert "[git]" in said.err


def test_other_commands_use_the_revision_in_force(remote: Remote, tmp_path: Path) -> None:
    """Also before the first pass."""
    assert remote.work.exists()
    found = located(settings.load(db=tmp_path / "r.db", git={"url": str(remote.bare)}))
    assert desired_state(found, Scope())[0].resources


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('url = "https://dana:hunter2@git.example.org/fleet"', "credential helper"),
        ('url = "--upload-pack=evil"', "as for git clone"),
        ('branch = "a..b"', "no name of a branch"),
        ('url = "x"\ninterval = "0s"', "longer than nothing"),
        ('brnch = "main"', "known: url, branch, tag, interval, timeout"),
    ],
)
def test_mistakes_in_the_settings_have_a_name(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a password that was written there is not repeated."""
    monkeypatch.chdir(tmp_path)
    Path("reconciler.toml").write_text(f"[git]\n{line}\n")
    with pytest.raises(ConfigurationError) as error:
        settings.load()
    assert told in str(error.value)
    assert "hunter2" not in str(error.value)


def test_absolute_paths_do_not_lead_into_a_repository(remote: Remote, tmp_path: Path) -> None:
    """They would silently be taken from this machine."""
    found = settings.load(db=tmp_path / "r.db", git={"url": str(remote.bare)}, desired=tmp_path)
    with pytest.raises(ConfigurationError, match="has to lead into the repository"):
        Follower.of(found)
