"""The wheel alone, in an empty environment: what somebody has who never saw the checkout."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def call(*argv: str | Path, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program outside the checkout, without anything of this environment's Python."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "VIRTUAL_ENV", "RECONCILER"))
    }
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an empty virtual environment with the wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", directory, REPOSITORY, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    venv.create(directory / "venv", with_pip=True)
    call(directory / "venv/bin/python", "-m", "pip", "install", "--quiet", wheel, cwd=directory)
    return directory / "venv" / "bin"


def test_init_and_a_pass_work_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    reconcile = installed / "reconcile"
    where = call(
        installed / "python", "-c", "import reconciler; print(reconciler.__file__)", cwd=tmp_path
    ).stdout
    assert str(REPOSITORY) not in where
    call(reconcile, "init", cwd=tmp_path, **env)
    call(reconcile, "validate", cwd=tmp_path, **env)
    call(reconcile, "--once", "--check", cwd=tmp_path, code=2, **env)
    first = json.loads(call(reconcile, "--once", "--output", "json", cwd=tmp_path, **env).stdout)
    assert {row["status"] for row in first["outcomes"]} == {"fixed"}
    assert (home / "reconciler-example/example.sh").stat().st_mode & 0o777 == 0o755
    second = json.loads(call(reconcile, "--once", "--output", "json", cwd=tmp_path, **env).stdout)
    assert second["drifts"] == []


def test_plain_ansible_finds_the_same_state_as_desired(installed: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    env["PATH"] = f"{installed}:{os.environ['PATH']}"
    call(installed / "reconcile", "init", cwd=tmp_path, **env)
    code = "from reconciler.paths import playbook; print(playbook('site.yml'))"
    site = call(installed / "python", "-c", code, cwd=tmp_path).stdout.strip()
    done = call(installed / "ansible-playbook", site, cwd=tmp_path, **env)
    assert "failed=0" in done.stdout
    assert (home / "reconciler-example/example.sh").exists()
    again = call(installed / "ansible-playbook", site, "--check", cwd=tmp_path, **env)
    assert "changed=0" in again.stdout
    call(installed / "reconcile", "--check", cwd=tmp_path, **env)


def test_the_fleet_page_is_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Every file of it, served by what was installed."""
    code = """
import re, sys, urllib.request
from pathlib import Path
from reconciler.api.server import Server
from reconciler.api.state import DaemonState
from reconciler.settings import Settings
server = Server(Settings(db=Path("r.db"), http={"port": 0}), DaemonState)
server.start()
page = urllib.request.urlopen(server.url + "/").read().decode()
files = re.findall(r'(?:src|href)="(/[^"]+)"', page)
for file in files:
    print(file, len(urllib.request.urlopen(server.url + file).read()))
print(urllib.request.urlopen(server.url + "/api/status").status)
server.stop()
"""
    said = call(installed / "python", "-W", "error", "-c", code, cwd=tmp_path).stdout.split()
    assert said[0::2] == [
        "/static/icon.svg",
        "/static/style.css",
        "/static/words.js",
        "/static/app.js",
        "200",
    ]
    assert all(int(size) > 100 for size in said[1::2])


def test_the_sidecar_says_what_it_needs_where_only_the_reconciler_is_installed(
    installed: Path, tmp_path: Path
) -> None:
    done = call(installed / "sidecar", cwd=tmp_path, code=1)
    assert "pip install 'fleet-reconciler[sidecar]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_heartbeats_bring_their_templates_and_their_program(installed: Path, tmp_path: Path) -> None:
    """Both are read when the desired state is."""
    (tmp_path / "desired_state").mkdir()
    (tmp_path / "inventory").write_text("here ansible_connection=local\n")
    entry = "{{agent: {0}, nodes: all, class: business, workspace: ~/{0}, language: {0}, timezone: Asia/Shanghai}}"
    entries = "".join(f"  - {entry.format(language)}\n" for language in ("en", "zh"))
    (tmp_path / "desired_state" / "a.yml").write_text(f"heartbeats:\n{entries}")
    said = call(installed / "reconcile", "validate", cwd=tmp_path, HOME=str(tmp_path)).stdout
    assert "valid: 2 resources" in said
