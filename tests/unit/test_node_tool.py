"""The tool role's steps on this machine, offline: every method that needs no root."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.support import converge, look, step

SCRIPT = "#!/bin/sh\necho mm {version}\n"


def tool(install: dict[str, Any], version: str = ">=2.0", **given: Any) -> dict[str, Any]:
    """A tool as the role gets it."""
    return {
        "command": "mm",
        "version": version,
        "version_args": ["--version"],
        "version_regex": None,
        "path": [],
        "bin_dir": "~/.local/bin",
        "install": install,
        **given,
    }


def by_file(text: str) -> dict[str, Any]:
    """Install a file that travels along."""
    body = text.encode()
    digest = hashlib.sha256(body).hexdigest()
    found = {
        "method": "file",
        "source": "files/mm",
        "sha256": digest,
        "body": base64.b64encode(body).decode(),
    }
    return tool(found, content=digest)


def by_url(path: Path, member: str | None = None, digest: str | None = None) -> dict[str, Any]:
    """Install from a file:// address."""
    seen = hashlib.sha256(path.read_bytes()).hexdigest()
    return tool({"method": "url", "source": f"file://{path}", "sha256": digest or seen, "member": member})


@pytest.fixture
def command(account: Path) -> Path:
    """Where the command appears."""
    return account / ".local" / "bin" / "mm"


@pytest.fixture
def old(command: Path) -> Path:
    """Version 1 of it, put there by somebody else."""
    command.parent.mkdir(parents=True)
    command.write_text(SCRIPT.format(version="1.0"))
    command.chmod(0o755)
    return command


def seen(**given: Any) -> Any:
    """What the probe says."""
    return look("tool", {**tool({}), "installable": True, **given})


def payloads(account: Path) -> list[str]:
    """What is installed under our own directory."""
    directory = account / ".local/share/reconciler/tools/thing"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def archive(path: Path, *members: tuple[str, str], links: dict[str, str] | None = None) -> Path:
    """A tar or zip of text files, and of symbolic links."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as bundle:
            for name, text in members:
                bundle.writestr(name, text)
        return path
    with tarfile.open(path, f"w:{path.suffix[1:]}") as tar:
        for name, text in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


GOOD = SCRIPT.format(version="2.1")


def test_file_is_installed_and_found(command: Path) -> None:
    """The command appears as a link, and a second pass finds nothing to do."""
    resource = by_file(GOOD)
    assert converge("tool", resource)["result"]["changed"]
    assert command.is_symlink()
    assert seen()["facts"] == {"path": str(command), "installable": True, "version": "2.1"}
    assert step("apply", "tool", resource, attempt="a2")["result"]["changed"] is False


def test_rollback_brings_back_what_was_replaced(old: Path, account: Path) -> None:
    """The very file, and nothing of ours stays."""
    resource = by_file(GOOD)
    converge("tool", resource)
    assert seen()["facts"]["version"] == "2.1"
    step("rollback", "tool", resource)
    assert not old.is_symlink()
    assert seen()["facts"]["version"] == "1.0"
    assert payloads(account) == []


def test_rollback_of_a_first_installation_leaves_nothing(command: Path, account: Path) -> None:
    """Directories that were made for it included."""
    resource = by_file(GOOD)
    converge("tool", resource)
    step("rollback", "tool", resource)
    assert not command.exists()
    assert not (account / ".local/share").exists()
    assert not command.parent.exists()


@pytest.mark.parametrize("name", ["mm-2.1.tar.gz", "mm-2.1.tar.xz", "mm-2.1.zip"])
@pytest.mark.parametrize("member", [None, "mm-2.1/bin/mm"])
def test_archive_is_unpacked(tmp_path: Path, name: str, member: str | None) -> None:
    """By its member's name, or by the only file that is called like the command."""
    path = archive(tmp_path / name, ("mm-2.1/README", "x"), ("mm-2.1/bin/mm", GOOD))
    answer = converge("tool", by_url(path, member))
    assert answer.get("result", answer).get("changed"), answer
    assert seen()["facts"]["version"] == "2.1"


def test_plain_download_is_installed(tmp_path: Path) -> None:
    """One executable file."""
    path = tmp_path / "mm-linux"
    path.write_text(GOOD)
    assert converge("tool", by_url(path))["result"]["changed"]
    assert seen()["facts"]["version"] == "2.1"


Build = Callable[[Path], dict[str, Any]]


def wrong_digest(tmp_path: Path) -> dict[str, Any]:
    """Not what was declared."""
    (tmp_path / "mm").write_text(GOOD)
    return by_url(tmp_path / "mm", digest="0" * 64)


def missing(tmp_path: Path) -> dict[str, Any]:
    """An address that leads nowhere."""
    (tmp_path / "mm").write_text(GOOD)
    resource = by_url(tmp_path / "mm")
    (tmp_path / "mm").unlink()
    return resource


def missing_member(tmp_path: Path) -> dict[str, Any]:
    """The archive is another one."""
    return by_url(archive(tmp_path / "a.tar.gz", ("mm", GOOD)), "bin/mm")


def two_members(tmp_path: Path) -> dict[str, Any]:
    """Nobody can tell which of them is meant."""
    return by_url(archive(tmp_path / "a.tar.gz", ("a/mm", GOOD), ("b/mm", GOOD)))


def upwards(tmp_path: Path) -> dict[str, Any]:
    """A member that climbs out."""
    return by_url(archive(tmp_path / "a.tar.gz", ("mm", GOOD), ("../../../../evil", "x")))


def absolute(tmp_path: Path) -> dict[str, Any]:
    """A member with a full path."""
    return by_url(archive(tmp_path / "a.tar.gz", ("mm", GOOD), (f"{tmp_path}/evil", "x")))


def through_a_link(tmp_path: Path) -> dict[str, Any]:
    """A link that leads out, and a file behind it."""
    path = archive(tmp_path / "a.tar", links={"out": str(tmp_path)})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("out/evil")
        tar.addfile(info, io.BytesIO(b""))
    return by_url(path)


def device(tmp_path: Path) -> dict[str, Any]:
    """No file at all."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("mm")
        info.type = tarfile.CHRTYPE
        tar.addfile(info)
    return by_url(tmp_path / "a.tar")


def member_outside(tmp_path: Path) -> dict[str, Any]:
    """The declaration itself climbs out of the archive."""
    return by_url(
        archive(tmp_path / "a.tar.gz", ("mm", GOOD)), "../" * 40 + str(tmp_path).lstrip("/") + "/a.tar.gz"
    )


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (wrong_digest, "has the SHA-256"),
        (missing, "cannot be downloaded"),
        (missing_member, "the archive has no member bin/mm"),
        (two_members, "the archive has 2 files named mm: declare member"),
        (upwards, "suspicious member: ../../../../evil"),
        (absolute, "suspicious member"),
        (through_a_link, "suspicious member: out"),
        (device, "suspicious member: mm"),
        (member_outside, "the archive has no member"),
    ],
)
def test_bad_source_installs_nothing(
    old: Path, account: Path, tmp_path: Path, build: Build, reason: str
) -> None:
    """The old command stays, no half-installed one appears, nothing is written outside."""
    answer = converge("tool", build(tmp_path))
    assert reason in answer["failed"]
    assert old.read_text() == SCRIPT.format(version="1.0")
    assert payloads(account) == []
    assert list(tmp_path.rglob("evil")) == []


def test_zip_that_climbs_out_stays_inside(account: Path, tmp_path: Path) -> None:
    """Python's own module takes upward names apart."""
    path = archive(tmp_path / "a.zip", ("mm", GOOD), ("../../evil", "x"))
    converge("tool", by_url(path))
    assert all(".local/share/reconciler/tools" in str(found) for found in account.rglob("evil"))
    assert list(tmp_path.glob("evil")) == []


def test_command_that_is_a_directory_is_refused(account: Path, command: Path) -> None:
    """Only files and links are ever replaced."""
    command.mkdir(parents=True)
    assert "only files and links are ever replaced" in converge("tool", by_file(GOOD))["failed"]
    assert payloads(account) == []


def test_protected_command_is_refused(command: Path) -> None:
    """The link counts as what is written."""
    assert "is protected" in converge("tool", by_file(GOOD), protected=["~/.local/bin/mm"])["failed"]
    assert not command.exists()


def wheel(directory: Path) -> Path:
    """The smallest wheel with a command, made by hand: no index is asked for anything."""
    path = directory / "mm-2.1-py3-none-any.whl"
    info = "mm-2.1.dist-info"
    files = {
        "mm.py": "def main():\n    print('mm 2.1')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: mm\nVersion: 2.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nmm = mm:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return path


def test_python_package_gets_an_environment_of_its_own(account: Path, command: Path, tmp_path: Path) -> None:
    """From a wheel on the node, offline; the undo removes all of it."""
    resource = tool({"method": "pip", "source": str(wheel(tmp_path))})
    answer = converge("tool", resource, env={"PIP_NO_INDEX": "1"})
    assert answer.get("result", answer).get("changed"), answer
    assert seen()["facts"]["version"] == "2.1"
    assert command.resolve().is_relative_to(account / ".local/share/reconciler/tools/thing/a1")
    step("rollback", "tool", resource)
    assert payloads(account) == []
    assert not command.exists()


def test_package_without_the_command_says_what_it_brings(account: Path) -> None:
    """A stand-in for npm that installs something else."""
    npm = account / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text('#!/bin/sh\nmkdir -p "$4/bin"; echo "$@" > "$4/bin/other"; exit 0\n')
    npm.chmod(0o755)
    answer = converge("tool", tool({"method": "npm", "source": "@scope/mm@2.1"}))
    assert "@scope/mm@2.1 brings no command mm (it brings other)" in answer["failed"]
    assert payloads(account) == []


def test_npm_that_is_missing_or_fails_says_so(account: Path) -> None:
    """In npm's own words."""
    resource = tool({"method": "npm", "source": "mm"}, path=[])
    npm = account / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho 'E404 no such package' >&2; exit 1\n")
    npm.chmod(0o755)
    assert "E404 no such package" in converge("tool", resource)["failed"]


# --- the probe --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("echo v2.3.4", {"version": "2.3.4"}),
        ("echo 'mm 2.3.4 (build 99.1)'", {"version": "2.3.4"}),
        ("echo 2.3.4-rc.1", {"version": "2.3.4-rc.1"}),
        ("echo 2.3 >&2", {"version": "2.3"}),
        ("echo no numbers", {}),
        ("echo 1.5; exit 3", {"version": "1.5"}),
        ("echo oops >&2; exit 3", {"broken": "ended with 3: oops"}),
    ],
)
def test_version_is_found_where_tools_print_it(old: Path, body: str, expected: dict[str, str]) -> None:
    """On standard output, else on standard error."""
    old.write_text(f"#!/bin/sh\n{body}\n")
    assert seen()["facts"] == {"path": str(old), "installable": True, **expected}


def test_version_regex_and_arguments(old: Path) -> None:
    """The first group counts."""
    old.write_text('#!/bin/sh\necho "9.9 args=$* release 3.1 of 1.0"\n')
    found = seen(version_regex=r"release (\S+)", version_args=["version", "--short"])
    assert found["facts"]["version"] == "3.1"


def test_tool_that_cannot_be_started_or_hangs(old: Path) -> None:
    """A fact, and an unknown."""
    old.write_bytes(b"\x7fELF nonsense")
    assert "cannot be started" in seen()["facts"]["broken"]
    old.write_text("#!/bin/sh\nexec sleep 60\n")
    assert "did not answer within" in look("tool", tool({}), timeout=0.5)["error"]


def test_declared_directories_come_first(old: Path, account: Path) -> None:
    """Before the account's own."""
    other = account / "other" / "mm"
    other.parent.mkdir()
    other.write_text(SCRIPT.format(version="7.0"))
    other.chmod(0o755)
    assert seen()["facts"]["path"] == str(old)
    assert seen(path=["~/other"])["facts"]["version"] == "7.0"
    other.chmod(0o644)
    assert seen(path=["~/other"])["facts"]["path"] == str(old)


def test_missing_tool_is_a_fact() -> None:
    """Not an error."""
    assert seen(command="no-such-tool-anywhere")["facts"] == {"path": None, "installable": True}
    assert json.dumps(seen(command="no-such-tool-anywhere"))
