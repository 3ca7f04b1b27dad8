"""`python -m sidecar` and the `sidecar` command."""

import sys


def main() -> None:
    """Entry point; what the package `[sidecar]` brings may be missing where only the reconciler was installed."""
    try:
        from sidecar.cli import main as run  # noqa: PLC0415 - what it needs may be missing
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "sidecar":
            raise
        sys.exit(
            f"error: {error.name} is not installed; the sidecar needs: pip install 'fleet-reconciler[sidecar]'"
        )
    run()


if __name__ == "__main__":
    main()
