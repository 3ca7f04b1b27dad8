"""Look at a SQLite database's tables; node side, read-only, Python 3.6 or newer."""

lib = None  # set by the driver

COMPARED = ("tables",)


def observe(args, _connection):
    """Columns and indexes of the tables asked for; a missing database has none."""
    import os

    try:
        import _sqlite3 as sqlite3  # the part that is written in C: the rest takes every node 3 ms to load
    except ImportError:
        import sqlite3

    path = lib.expand(args["database"])
    if not os.path.lexists(path):
        return {"database": "absent", "directory": os.path.isdir(os.path.dirname(path)), "tables": {}}
    database = _open(sqlite3, os, path)
    try:
        return {"database": "present", "tables": {name: _table(database, name) for name in args["tables"]}}
    finally:
        database.close()


def _open(sqlite3, os, path):
    """Read-only, leaving no file behind.

    Reading a database in WAL mode creates its -wal and -shm files where they are missing. Where there is
    no -wal file nobody has the database open, so it can be read as it lies on the disk.
    """
    idle = not os.path.exists(path + "-wal")
    quoted = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    database = sqlite3.connect(
        "file:%s?%s" % (quoted, "immutable=1" if idle else "mode=ro"), uri=True, timeout=5
    )
    database.execute("PRAGMA schema_version")
    return database


def _table(database, name):
    """``{columns, indexes}``, or None where there is no such table."""
    quoted = '"%s"' % name.replace('"', '""')
    rows = database.execute("PRAGMA table_info(%s)" % quoted).fetchall()
    if not rows:
        return None
    columns = {
        row[1]: {
            "type": (row[2] or "").upper(),
            "notnull": bool(row[3]),
            "default": row[4],
            "key": bool(row[5]),
        }
        for row in rows
    }
    indexes = {}
    for row in database.execute("PRAGMA index_list(%s)" % quoted).fetchall():
        info = database.execute('PRAGMA index_info("%s")' % row[1].replace('"', '""')).fetchall()
        indexes[row[1]] = {"columns": [item[2] for item in info], "unique": bool(row[2])}
    return {"columns": columns, "indexes": indexes}


# --- from here on only for steps: a look leaves it away ---


def changes(declared, facts):
    """What is missing (will be added) and what is otherwise (is reported: nothing is ever rewritten)."""
    found = []
    if facts["database"] == "absent" and not facts.get("directory", True):
        return [_reported("database", "present", "absent", "its directory does not exist on the node")]
    for name, table in sorted(declared.get("tables", {}).items()):
        observed = facts["tables"].get(name)
        if observed is None:
            found.append({"field": name, "desired": _columns_text(table), "observed": "absent"})
            continue
        for column, wanted in table["columns"].items():
            seen = lookup(observed["columns"], column)
            found.extend(_column_changes("%s.%s" % (name, column), wanted, seen))
        for index, wanted in sorted(table["indexes"].items()):
            seen = lookup(observed["indexes"], index)
            if seen is None:
                found.append(
                    {"field": "%s.%s" % (name, index), "desired": _index_text(wanted), "observed": "absent"}
                )
            elif seen != wanted:
                note = "an index of this name covers something else; it is never dropped"
                found.append(_reported("%s.%s" % (name, index), _index_text(wanted), _index_text(seen), note))
    return found


def lookup(found, name):
    """The entry of that name; SQLite does not tell upper from lower case in names."""
    for key, value in found.items():
        if key.lower() == name.lower():
            return value
    return None


def _column_changes(field, wanted, seen):
    if seen is None:
        desired = wanted["declared"] or "a column"
        if wanted["refused"]:
            return [_reported(field, desired, "absent", "SQLite cannot add it: " + wanted["refused"])]
        return [{"field": field, "desired": desired, "observed": "absent"}]
    differing = [key for key in ("type", "notnull", "default", "key") if wanted[key] != seen[key]]
    if not differing:
        return []
    return [_reported(field, _text(wanted), _text(seen), "existing columns are never rewritten")]


def _reported(field, desired, observed, note):
    return {"field": field, "desired": desired, "observed": observed, "fixable": False, "note": note}


def _text(column):
    """A column the way a person would declare it."""
    words = [column["type"]]
    words += ["PRIMARY KEY"] if column["key"] else []
    words += ["NOT NULL"] if column["notnull"] else []
    words += ["DEFAULT %s" % column["default"]] if column["default"] is not None else []
    return " ".join(word for word in words if word) or "no type"


def _columns_text(table):
    return "table (%s)" % ", ".join(table["columns"])


def _index_text(index):
    return "%sindex (%s)" % ("unique " if index["unique"] else "", ", ".join(map(str, index["columns"])))
