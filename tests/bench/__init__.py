"""Measurements: `python -m tests.bench NAME`; see `--help`."""
