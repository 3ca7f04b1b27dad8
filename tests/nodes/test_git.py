"""A commit reaches real nodes by itself; a wrong one reaches none and says where it is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.local.test_demo import until
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet

SLOW = 120.0
WRAPPERS = """\
wrappers:
  - {name: w, nodes: all, src: files/w.sh, dest: ~/w.sh, mode: "0755", validate: sh -n %s}
"""


def test_commit_reaches_all_nodes_and_a_wrong_one_changes_nothing(
    nodes: Pool, fleet: Fleet, tmp_path: Path
) -> None:
    """The interval of passes is an hour: it is the push that brings it there, within one fetch and one pass."""
    workers = nodes(3)
    bare = tmp_path / "fleet.git"
    subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(bare)], check=True, timeout=60)

    def push(name: str, text: str) -> None:
        (fleet.desired / name).write_text(text)
        for words in (
            ["add", "-A", "desired_state"],
            ["commit", "--quiet", "-m", name],
            ["push", "--quiet", str(bare), "main"],
        ):
            identity = ["-c", "user.name=dana", "-c", "user.email=dana@example.org"]
            subprocess.run(
                ["git", *identity, *words], cwd=tmp_path, check=True, timeout=60, capture_output=True
            )

    subprocess.run(["git", "init", "--quiet", "-b", "main"], cwd=tmp_path, check=True, timeout=60)
    inventory = tmp_path / "desired_state/hosts.ini"
    inventory.write_text((fleet.inventory).read_text())
    inventory.rename(inventory.with_name("hosts.json"))
    (fleet.desired / "files/w.sh").write_text("#!/bin/sh\n# one\n")
    push("state.yml", WRAPPERS)
    (tmp_path / "reconciler.toml").write_text(
        f'inventory = "desired_state/hosts.json"\ninterval = "1h"\nlog_format = "json"\n'
        f'[http]\nenabled = false\n[git]\nurl = "{bare}"\ninterval = "5s"\n'
    )
    env = {**os.environ, "XDG_RUNTIME_DIR": str(fleet.runtime)}
    log = tmp_path / "log"
    with log.open("wb") as errors:
        argv = [sys.executable, "-m", "reconciler", "--db", str(fleet.db)]
        process = subprocess.Popen(argv, cwd=tmp_path, env=env, stderr=errors, stdout=subprocess.DEVNULL)

    def lines(event: str) -> list[dict[str, str]]:
        found = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in found if line["event"] == event]

    def arrived(word: str) -> bool:
        return all(word in node.run("cat ~/w.sh", user="agent", check=False).stdout for node in workers)

    try:
        assert until(lambda: len(lines("pass")) == 1, SLOW), log.read_text()
        began = time.monotonic()
        push("files/w.sh", "#!/bin/sh\n# two\n")
        assert until(lambda: arrived("two"), SLOW), log.read_text()
        print(f"from the push to all nodes: {time.monotonic() - began:.1f} s")
        assert until(lambda: len(lines("pass")) == 2, SLOW)
        assert lines("pass")[1]["why"] == "new revision"
        push("more.yml", "wrappers:\n  - {name: v, nodes: all, dest: ~/v, contant: x}\n")
        assert until(lambda: bool(lines("revision rejected")), SLOW), log.read_text()
        assert "desired_state/more.yml:2:" in lines("revision rejected")[0]["reason"]
        assert arrived("two")
        assert all(node.run("test -e ~/v", user="agent", check=False).returncode == 1 for node in workers)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(SLOW)
    assert process.returncode == 0
