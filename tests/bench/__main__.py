"""`python -m tests.bench NAME [OPTIONS]`: measure one part of the product on this machine."""

import importlib
import sys
from pathlib import Path

# Modules beside this one that can be run by name.
NAMES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if "def run_from_command_line" in path.read_text()
)


def main() -> int:
    """Run the benchmark that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"usage: python -m tests.bench {{{','.join(NAMES)}}} [--help]", file=sys.stderr)
        return 2
    module = importlib.import_module(f"tests.bench.{sys.argv[1]}")
    return int(module.run_from_command_line(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
