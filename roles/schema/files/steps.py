"""Add what a SQLite database lacks, in one transaction; node side, Python 3.6 or newer."""

import contextlib
import os
import sqlite3
import time

lib = writing = None  # set by the driver
probe = None  # this kind's probe, set by the driver

BUSY_SECONDS = 15


def paths(resource):
    """What a step may write."""
    return [lib.expand(resource["database"])]


def backup(resource, attempt):
    """A whole copy through SQLite's backup API: copying the file of a database in WAL mode loses data."""
    path = lib.expand(resource["database"])
    if not os.path.lexists(path):
        return {"database": path, "type": "absent"}
    target = "%s.%s.bak" % (path, attempt)
    temporary = target + ".part"
    source = sqlite3.connect(path, timeout=BUSY_SECONDS)
    copy = sqlite3.connect(temporary)
    with contextlib.closing(source), contextlib.closing(copy):
        _copy(source, copy)
        _check(copy, temporary)
    os.chmod(temporary, os.stat(path).st_mode & 0o777)
    writing.replace(temporary, target)
    return {"database": path, "backup": target}


def _copy(source, copy):
    """``Connection.backup`` is new in Python 3.7; before, a dump inside a read transaction does the same."""
    if hasattr(source, "backup"):
        deadline = time.monotonic() + 60

        def progress(_status, _remaining, _total):
            if time.monotonic() > deadline:
                raise lib.Refused(
                    "the database was written to for a minute without a pause; no backup, no change"
                )

        source.backup(copy, pages=1024, progress=progress)
    else:
        source.execute("BEGIN")
        copy.executescript("\n".join(source.iterdump()))
    # The copy is one file: without this it would be in WAL mode too, with two more files beside it.
    copy.execute("PRAGMA journal_mode=DELETE")


def _check(copy, path):
    answer = copy.execute("PRAGMA quick_check").fetchone()[0]
    if answer != "ok":
        os.unlink(path)
        raise lib.Refused("the database is damaged (%s); it is left as it is" % answer)


def apply(resource, _saved):
    """Create tables, add columns and indexes; never drops, renames or rewrites."""
    path = lib.expand(resource["database"])
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        try:
            done = [_execute(database, sql) for sql in _statements(database, resource["tables"])]
            database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise
    return "; ".join(done)


def _execute(database, sql):
    try:
        database.execute(sql)
    except sqlite3.Error as error:
        raise lib.CommandFailed("%s: %s" % (sql, error)) from None
    return sql


def _statements(database, tables):
    """What is missing, as SQL, computed inside the transaction that adds it."""
    for name, table in sorted(tables.items()):
        seen = probe._table(database, name)
        if seen is None:
            columns = ", ".join(
                "%s %s" % (_quoted(c), spec["declared"]) for c, spec in table["columns"].items()
            )
            yield "CREATE TABLE %s (%s)" % (_quoted(name), columns)
            seen = probe._table(database, name)
        for column, spec in table["columns"].items():
            if probe.lookup(seen["columns"], column) is None and not spec["refused"]:
                yield "ALTER TABLE %s ADD COLUMN %s %s" % (_quoted(name), _quoted(column), spec["declared"])
        for index, spec in sorted(table["indexes"].items()):
            if probe.lookup(seen["indexes"], index) is None:
                unique = "UNIQUE " if spec["unique"] else ""
                columns = ", ".join(map(_quoted, spec["columns"]))
                yield "CREATE %sINDEX %s ON %s (%s)" % (unique, _quoted(index), _quoted(name), columns)


def _quoted(name):
    return '"%s"' % name.replace('"', '""')
