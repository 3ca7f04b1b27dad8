"""Many passes in one process: `make soak` runs 500, this as many as there is time for."""

import os
import subprocess
import sys
from pathlib import Path

PASSES = os.environ.get("RECONCILER_SOAK", "25")
ROOT = Path(__file__).parents[2]


def test_memory_files_and_directories_stay_flat() -> None:
    """With real Ansible, and drift every tenth pass."""
    argv = [sys.executable, "-m", "tests.bench", "soak", "--passes", PASSES]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
