"""``python -m reconciler`` is ``reconcile``."""

import signal
import sys

from reconciler import early


def main() -> None:
    """Start what takes long, then load the rest."""
    try:
        early.begin(sys.argv[1:])
        from reconciler.cli import main as command  # noqa: PLC0415 - the whole point
    except KeyboardInterrupt:  # from here on typer knows of it
        sys.stderr.write("interrupted: nothing was begun\n")
        sys.exit(128 + signal.SIGINT)
    command()


if __name__ == "__main__":
    main()
