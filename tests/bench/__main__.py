"""`python -m tests.bench [NAME] [OPTIONS]`: measure one part of the product on this machine (default: reconciler)."""

import runpy
import sys

NAMES = ("reconciler", "sidecar", "soak", "heartbeat")


def main() -> None:
    """Run the benchmark that the first argument names, with the others."""
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    name = sys.argv.pop(1) if named else NAMES[0]
    if name not in NAMES:
        sys.exit(f"usage: python -m tests.bench [{'|'.join(NAMES)}] [--help]")
    runpy.run_module(f"tests.bench.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
