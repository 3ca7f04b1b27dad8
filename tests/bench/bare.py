"""The limit: bare ssh through open control sockets, 25 nodes at a time, with the very scripts of a pass.

python -m tests.bench.bare PLAN     # JSON: [{argv: [...], script: PATH}]
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

AT_ONCE = 25


def ask(job: dict[str, str | list[str]]) -> int:
    """One node's answer; its size."""
    with Path(str(job["script"])).open("rb") as script:
        done = subprocess.run(job["argv"], stdin=script, capture_output=True, timeout=60, check=True)
    return len(done.stdout)


def main() -> None:
    """Ask them all."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sizes = list(pool.map(ask, jobs))
    assert all(sizes), "a node said nothing"


if __name__ == "__main__":
    main()
