"""What the role that installs us writes: units, the launchd daemon, log rotation."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tests.unit.support import ROOT

ROLE = ROOT / "roles/controller"


def needs(program: str) -> None:
    """Skip without it; but an automatic run installs it, and may not be green for nothing."""
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is missing")
        pytest.skip(f"needs {program}")


def rendered(name: str, **given: Any) -> str:
    """A template of the role with its defaults; they are plain Jinja2."""
    values = {**yaml.safe_load((ROLE / "defaults/main.yml").read_text()), **given}
    environment = Environment(
        loader=FileSystemLoader(ROLE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,
    )
    return environment.get_template(f"{name}.j2").render(values)


@pytest.mark.parametrize(
    ("mode", "words", "key"), [("service", 1, "KeepAlive"), ("timer", 2, "StartInterval")]
)
def test_launchd_daemon_is_a_property_list(mode: str, words: int, key: str) -> None:
    """With whatever stands in the environment."""
    text = rendered(
        "org.reconciler.plist",
        controller_mode=mode,
        controller_environment={"KEY": 'a <"b"> & c'},
        controller_interval="90s",
    )
    found = plistlib.loads(text.encode())
    assert len(found["ProgramArguments"]) == words
    assert found["EnvironmentVariables"]["KEY"] == 'a <"b"> & c'
    assert found["UserName"] == "reconciler"
    assert found[key] == (90 if mode == "timer" else True)


@pytest.mark.parametrize(
    "name", ["reconciler.service", "reconciler-once.service", "reconciler-backup.service"]
)
@pytest.mark.parametrize("log", ["", "/var/log/reconciler.log"])
def test_systemd_understands_every_line_of_the_units(name: str, log: str, tmp_path: Path) -> None:
    """As its own tool says, where there is one."""
    text = rendered(name, controller_log_file=log, controller_venv=tmp_path)
    assert ("append:/var/log" in text) == bool(log)
    assert "NoNewPrivileges=true" in text
    needs("systemd-analyze")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/reconcile").write_text("#!/bin/sh\n")
    (tmp_path / "bin/reconcile").chmod(0o755)
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if name in line]
    assert ours == []


def test_environment_survives_quotes_and_backslashes() -> None:
    """Systemd unquotes it; the node test sees what arrives."""
    text = rendered("environment", controller_environment={"B": 'say "x"', "A": "back\\slash"})
    assert text == 'A="back\\\\slash"\nB="say \\"x\\""\n'


def test_log_file_is_rotated(tmp_path: Path) -> None:
    """In a way that logrotate understands, where it is installed."""
    text = rendered("logrotate", controller_log_file=str(tmp_path / "reconciler.log"))
    assert "copytruncate" in text
    needs("logrotate")
    (tmp_path / "conf").write_text(text)
    (tmp_path / "conf").chmod(0o644)
    argv = ["/usr/sbin/logrotate", "--debug", "--state", str(tmp_path / "state"), str(tmp_path / "conf")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
