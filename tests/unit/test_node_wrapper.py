"""The wrapper role's steps on real files: the bundle that a node would run, run here."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.support import converge, look, step


def declared(dest: Path | str, text: str | bytes = "new\n", **given: Any) -> dict[str, Any]:
    """A wrapper as the role gets it."""
    body = text.encode() if isinstance(text, str) else text
    return {
        "dest": str(dest),
        "type": "file",
        "content": hashlib.sha256(body).hexdigest(),
        "body": base64.b64encode(body).decode(),
        "validate": [],
        **given,
    }


def mode(path: Path) -> str:
    """Permissions as text."""
    return f"{path.stat().st_mode & 0o7777:04o}"


@pytest.fixture
def dest(account: Path) -> Path:
    """A file with last month's content."""
    path = account / "w.sh"
    path.write_text("old\n")
    path.chmod(0o700)
    return path


def test_file_is_replaced_and_the_old_one_kept_beside(dest: Path) -> None:
    """One rename: the inode is another one, the backup has the old content and permissions."""
    before = dest.stat()
    answer = converge("wrapper", declared(dest, mode="0755"))
    assert answer["result"]["changed"]
    assert (dest.read_text(), mode(dest)) == ("new\n", "0755")
    assert dest.stat().st_ino != before.st_ino
    backup = dest.with_name("w.sh.a1.bak")
    assert (backup.read_text(), mode(backup)) == ("old\n", "0700")
    assert backup.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in dest.parent.glob("*w.sh*")) == ["w.sh", "w.sh.a1.bak"]


def test_permissions_that_are_not_declared_stay(dest: Path) -> None:
    """And a new file gets 0644."""
    converge("wrapper", declared(dest))
    assert mode(dest) == "0700"
    converge("wrapper", declared(dest.with_name("n")), attempt="a2")
    assert mode(dest.with_name("n")) == "0644"


def test_rollback_restores_content_permissions_and_time(dest: Path) -> None:
    """As if nothing had been."""
    before = dest.stat()
    converge("wrapper", declared(dest, mode="0755"))
    assert step("rollback", "wrapper", declared(dest))["result"]["changed"]
    assert (dest.read_text(), mode(dest), dest.stat().st_mtime_ns) == ("old\n", "0700", before.st_mtime_ns)


def test_symlink_is_replaced_itself_and_comes_back(account: Path) -> None:
    """What it points to is never written."""
    target, dest = account / "target", account / "link"
    target.write_text("precious\n")
    dest.symlink_to(target)
    converge("wrapper", declared(dest))
    assert not dest.is_symlink()
    assert (dest.read_text(), target.read_text()) == ("new\n", "precious\n")
    step("rollback", "wrapper", declared(dest))
    assert dest.is_symlink()
    assert dest.readlink() == target
    assert target.read_text() == "precious\n"


def test_symlink_to_nowhere_is_replaced(account: Path) -> None:
    """Its target is not created."""
    dest = account / "link"
    dest.symlink_to(account / "nowhere")
    converge("wrapper", declared(dest))
    assert dest.read_text() == "new\n"
    assert not (account / "nowhere").exists()


def test_directory_is_refused(account: Path) -> None:
    """Nothing in it is touched."""
    (account / "d").mkdir()
    (account / "d" / "f").write_text("x")
    answer = converge("wrapper", declared(account / "d"))
    assert "only a person can put this right" in step("apply", "wrapper", declared(account / "d"))["failed"]
    assert not answer.get("result", {}).get("changed")
    assert (account / "d" / "f").read_text() == "x"


def test_file_that_does_not_validate_never_gets_its_name(dest: Path) -> None:
    """The old one stays in place, whole, and nothing is left beside it."""
    answer = converge("wrapper", declared(dest, "if\n", validate=["bash", "-n", "%s"]))
    assert "bash -n" in answer["failed"]
    assert "syntax error" in answer["failed"]
    assert (dest.read_text(), mode(dest)) == ("old\n", "0700")
    assert sorted(path.name for path in dest.parent.glob("*w.sh") if path.suffix != ".bak") == ["w.sh"]
    assert [path.name for path in dest.parent.glob(".w.sh*")] == []


def test_validation_program_that_is_missing_says_so(dest: Path) -> None:
    """Not a traceback."""
    answer = converge("wrapper", declared(dest, validate=["no-such-checker", "%s"]))
    assert "no-such-checker cannot be started" in answer["failed"]
    assert dest.read_text() == "old\n"


def test_created_parents_are_removed_by_rollback(account: Path) -> None:
    """Those that were created, and only while they are empty."""
    dest = account / "a" / "b" / "c"
    converge("wrapper", declared(dest))
    assert dest.read_text() == "new\n"
    step("rollback", "wrapper", declared(dest))
    assert not (account / "a").exists()
    converge("wrapper", declared(dest), attempt="a2")
    (account / "a" / "other").write_text("somebody else's")
    step("rollback", "wrapper", declared(dest), attempt="a2")
    assert [path.name for path in (account / "a").iterdir()] == ["other"]


def test_parents_of_an_attempt_that_failed_are_removed_too(account: Path) -> None:
    """They are on record before they are made."""
    resource = declared(account / "a" / "b" / "w", "if\n", validate=["bash", "-n", "%s"])
    assert "failed" in converge("wrapper", resource)
    step("rollback", "wrapper", resource)
    assert not (account / "a").exists()


def test_apply_without_backup_is_refused(dest: Path) -> None:
    """Nothing is changed that could not be undone."""
    answer = step("apply", "wrapper", declared(dest))
    assert answer["failed"] == "nothing was backed up for attempt a1; nothing is changed without"
    assert dest.read_text() == "old\n"


def test_rollback_without_backup_does_nothing(dest: Path) -> None:
    """There is nothing to go back to."""
    assert step("rollback", "wrapper", declared(dest))["result"]["changed"] is False
    assert dest.read_text() == "old\n"


def test_backup_that_was_tampered_with_is_not_restored(dest: Path) -> None:
    """Better no undo than a wrong one."""
    converge("wrapper", declared(dest))
    dest.with_name("w.sh.a1.bak").write_text("evil\n")
    assert "was changed since it was made" in step("rollback", "wrapper", declared(dest))["failed"]
    assert dest.read_text() == "new\n"


def test_nothing_is_done_where_nothing_differs(dest: Path) -> None:
    """Not even a backup."""
    resource = declared(dest, "old\n", mode="0700")
    before = dest.stat()
    assert step("backup", "wrapper", resource)["result"] == {"changed": False, "changes": []}
    assert step("apply", "wrapper", resource)["result"] == {"changed": False, "changes": []}
    # Looking reads it: only the time of that may differ.
    after = dest.stat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino, before.st_mode, before.st_mtime_ns, before.st_ctime_ns,
    )  # fmt: skip
    assert [path.name for path in dest.parent.glob("*w.sh*")] == ["w.sh"]


def test_check_mode_changes_nothing_and_tells_what_would(dest: Path) -> None:
    """For ansible-playbook --check."""
    for name, changed in (("backup", False), ("apply", True)):
        answer = step(name, "wrapper", declared(dest), check=True)["result"]
        assert answer["changed"] is changed
        assert [change["field"] for change in answer["changes"]] == ["content"]
    assert sorted(path.name for path in dest.parent.rglob("*")) == ["w.sh"]


def test_second_backup_of_an_attempt_keeps_the_first(dest: Path) -> None:
    """A step that is repeated after a crash must not save what the attempt itself wrote."""
    resource = declared(dest)
    converge("wrapper", resource)
    dest.write_text("half\n")
    assert step("backup", "wrapper", resource)["result"]["detail"] == "already saved by this attempt"
    step("rollback", "wrapper", resource)
    assert dest.read_text() == "old\n"


def test_ignored_content_stays_while_permissions_change(dest: Path) -> None:
    """What is ignored is left alone by the fix as by the comparison."""
    resource = declared(dest, mode="0755")
    del resource["content"]
    converge("wrapper", resource)
    assert (dest.read_text(), mode(dest)) == ("old\n", "0755")


def test_unknown_owner_is_refused(dest: Path) -> None:
    """With the account's name."""
    answer = converge("wrapper", declared(dest, owner="nobody-of-that-name"))
    assert "no such account on this node" in answer["failed"]
    assert dest.read_text() == "old\n"


def test_journal_is_on_record_and_private(dest: Path, account: Path) -> None:
    """What was saved, how far the attempt came; readable by the account alone."""
    converge("wrapper", declared(dest))
    path = account / ".local/state/reconciler/journal/a1/wrapper.thing.json"
    record = json.loads(path.read_text())
    assert (record["state"], record["saved"]["file"]["backup"]) == ("applied", f"{dest}.a1.bak")
    assert (mode(path), mode(path.parent)) == ("0600", "0700")
    step("rollback", "wrapper", declared(dest))
    assert json.loads(path.read_text())["state"] == "rolled back"


def age(path: Path, days: float) -> None:
    """Make a journal's directory look old."""
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_old_backups_are_pruned_but_never_those_of_an_unfinished_attempt(dest: Path, account: Path) -> None:
    """Seven days by default; an attempt that never came to an end keeps what it saved."""
    journal = account / ".local/state/reconciler/journal"
    converge("wrapper", declared(dest, "1\n"), attempt="a1")
    converge("wrapper", declared(dest, "2\n"), attempt="a2")
    record = journal / "a2" / "wrapper.thing.json"
    record.write_text(record.read_text().replace('"applied"', '"applying"'))
    (journal / "a3").mkdir()
    (journal / "a3" / ".wrapper.thing.json.77.new").write_text('{"half')
    for name in ("a1", "a2", "a3"):
        age(journal / name, 8)
    converge("wrapper", declared(dest, "3\n"), attempt="a4")
    assert sorted(path.name for path in journal.iterdir()) == ["a2", "a4"]
    assert sorted(path.name for path in account.glob("*.bak")) == ["w.sh.a2.bak", "w.sh.a4.bak"]


def test_lock_held_by_another_controller_is_respected(dest: Path, account: Path) -> None:
    """Two controllers never change one account at once."""
    lock = account / ".local/state/reconciler/lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        answer = step("backup", "wrapper", declared(dest), lock_timeout=0.2)
    assert answer["failed"] == "another controller is changing this node right now"
    assert "result" in step("backup", "wrapper", declared(dest), lock_timeout=0.2)


@pytest.mark.parametrize(
    ("dest", "pattern"),
    [
        ("~/.ssh/config", "~/.ssh/config"),
        ("~/x/../.ssh/./config", "~/.ssh/config"),
        ("~/../home/.ssh/config", "~/.ssh/config"),
        ("~/link/config", "~/.ssh/config"),
        ("~/alias", "~/.ssh/config"),
        ("~/deep/projects.json", "projects.json"),
        ("~/keys/a/b", "~/keys"),
        ("~/keys/a/b", "~/keys/"),
        ("~/by-link/a", "~/keys"),
        ("~/a.pem", "~/*.pem"),
        ("~/a.pem", "*.pem"),
    ],
)
def test_protected_path_is_refused_by_any_spelling(account: Path, dest: str, pattern: str) -> None:
    """By dots, by links above it, by a link that stands there."""
    (account / ".ssh").mkdir()
    (account / ".ssh" / "config").write_text("mine\n")
    (account / "keys").mkdir()
    (account / "link").symlink_to(account / ".ssh")
    (account / "by-link").symlink_to(account / "keys")
    (account / "alias").symlink_to(account / ".ssh" / "config")
    for name in ("backup", "apply"):
        answer = step(name, "wrapper", declared(dest), protected=[pattern])
        assert answer["failed"].endswith(f"is protected (by the entry {pattern} of the desired state)")
    assert (account / ".ssh" / "config").read_text() == "mine\n"
    assert list(account.rglob("*.bak")) == []


def test_neighbours_of_protected_paths_may_be_written(account: Path) -> None:
    """A prefix of a name is not a directory."""
    resource = declared(account / "keys-of-others", "x")
    assert converge("wrapper", resource, protected=["~/keys", "config", "~/.ssh/config"])["result"]["changed"]


def test_probe_reports_short_text_for_a_diff_and_never_long_or_binary(dest: Path) -> None:
    """Only where it differs."""
    want = hashlib.sha256(b"new\n").hexdigest()
    assert look("wrapper", {"dest": str(dest), "content": want})["facts"]["text"] == "old\n"
    same = hashlib.sha256(b"old\n").hexdigest()
    assert "text" not in look("wrapper", {"dest": str(dest), "content": same})["facts"]
    assert "text" not in look("wrapper", {"dest": str(dest), "content": None})["facts"]
    dest.write_bytes(b"\xff\x00")
    assert "text" not in look("wrapper", {"dest": str(dest), "content": want})["facts"]
    dest.write_text("x" * 70_000)
    assert "text" not in look("wrapper", {"dest": str(dest), "content": want})["facts"]


def test_probe_never_follows_a_link(account: Path) -> None:
    """Type and target are the facts."""
    (account / "l").symlink_to("/etc/passwd")
    assert look("wrapper", {"dest": "~/l"})["facts"] == {"type": "symlink", "target": "/etc/passwd"}
    assert look("wrapper", {"dest": "~/none/of/it"})["facts"] == {"type": "absent"}
    os.mkfifo(account / "pipe")
    assert look("wrapper", {"dest": "~/pipe"})["facts"] == {"type": "special file"}
