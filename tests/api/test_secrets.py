"""What is declared as a secret is in nothing that is answered, however the pass that used it ended."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from reconciler import demo
from reconciler.settings import Settings
from tests.api.conftest import Site
from tests.local.test_demo import COMMAND

SECRET = "sk-very-secret-4711"


def test_a_secret_is_in_no_answer(tmp_path: Path) -> None:
    """Neither desired nor observed nor in what a failed validation printed."""
    directory = tmp_path / "demo"
    demo._make(directory)
    state = directory / "desired_state/secret.yml"
    state.write_text(
        "wrappers:\n  - name: key\n    nodes: workers\n    dest: ~/key\n    mode: '0600'\n"
        "    validate: sh -c 'cat %s; exit 1'\n    content: {$env: AGENT_KEY}\n"
    )
    env = {**os.environ, "AGENT_KEY": SECRET}
    settings = Settings(db=directory / "reconciler.db", http={"port": 0})  # type: ignore[arg-type]
    site = Site(settings)
    try:
        for fails in (True, False):
            if not fails:
                state.write_text(state.read_text().replace("; exit 1", ""))
            done = subprocess.run(
                [*COMMAND, "--once"], cwd=directory, env=env, capture_output=True, timeout=180, check=False
            )
            assert done.returncode == (3 if fails else 0), done.stderr
            said = "".join(
                site.http.get(path).text
                for path in (
                    "/",
                    "/metrics",
                    "/readyz",
                    "/api/status",
                    "/api/events?limit=500",
                    "/api/nodes/node-1",
                )
            )
            assert "node-1/wrapper/key" in said
            assert "(secret)" in said
            assert SECRET not in said
    finally:
        site.close()
