"""``python -m reconciler`` is ``reconcile``."""

import sys

from reconciler import early


def main() -> None:
    """Start what takes long, then load the rest."""
    early.begin(sys.argv[1:])
    from reconciler.cli import main as command  # noqa: PLC0415 - the whole point

    command()


if __name__ == "__main__":
    main()
