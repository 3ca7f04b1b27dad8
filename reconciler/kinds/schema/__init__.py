"""schema (C1): tables, columns and indexes of a SQLite database. Only ever adds."""

from __future__ import annotations

import posixpath
import sqlite3
from contextlib import closing
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from reconciler.kinds.base import Context, Declaration, FieldError, Resolved, Strict
from reconciler.model import Resource

Identifier = Annotated[str, Field(min_length=1, max_length=128, pattern=r'^[^"\x00-\x1f]+$')]
ColumnType = Annotated[
    str, BeforeValidator(lambda value: "" if value is None else value, json_schema_input_type=str | None)
]


class Index(Strict):
    """An index over columns of one table."""

    columns: list[Identifier] = Field(min_length=1, examples=[["status", "priority"]])
    """Columns, in order."""
    unique: bool = Field(default=False, examples=[True])
    """Whether the values must differ."""


class Table(Strict):
    """Columns and indexes that a table has at least; others are left alone."""

    columns: dict[Identifier, ColumnType] = Field(
        min_length=1, examples=[{"id": "INTEGER PRIMARY KEY", "status": "TEXT NOT NULL DEFAULT 'pending'"}]
    )
    """Column name to its declaration, as it would stand in CREATE TABLE; empty means no type."""
    indexes: dict[Identifier, Index] = Field(
        default_factory=dict, examples=[{"tasks_by_status": {"columns": ["status"]}}]
    )
    """Index name to what it covers."""


class Schema(Declaration):
    """A SQLite database on a node."""

    KIND: ClassVar[str] = "schema"
    SECTION: ClassVar[str] = "schema"
    CHECK_TYPE: ClassVar[str] = "C1"
    ORDER: ClassVar[int] = 20
    SHARES_PATHS: ClassVar[bool] = True
    NO_ROLLBACK: ClassVar[str] = (
        "All additions are one transaction: they are there or they are not. A backup is made all the same."
    )

    database: str = Field(min_length=1, examples=["~/dispatch/dispatch.db"])
    """Path on the node; created when missing, if its directory exists."""
    tables: dict[Identifier, Table] = Field(min_length=1)
    """Table name to what it has at least."""

    def resolve(self, context: Context) -> Resolved:  # noqa: ARG002 - the same for every node
        """Columns in SQLite's own words: SQLite itself reads the declarations, so nothing is guessed."""
        if not self.database.startswith(("/", "~")):
            raise FieldError("database", f"{self.database!r} is not absolute", "begin with / or ~")
        tables = {name: _normalized(name, table) for name, table in self.tables.items()}
        written = frozenset({posixpath.normpath(self.database)})
        return Resolved({"tables": tables}, {"database": self.database}, paths_written=written)

    @classmethod
    def probe_args(cls, resource: Resource) -> dict[str, Any]:
        """Only which tables to look at."""
        return {
            "database": resource.args["database"],
            "tables": dict.fromkeys(resource.fields.get("tables", {})),
        }


def _normalized(name: str, table: Table) -> dict[str, Any]:
    """One table as SQLite understands it: per column type, not-null, default, key, and whether it can be added."""
    with closing(sqlite3.connect(":memory:")) as database:
        parts = ", ".join(f'"{column}" {declared}' for column, declared in table.columns.items())
        try:
            database.execute(f'CREATE TABLE "{name}" ({parts})')
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise FieldError(("tables", name, "columns"), f"SQLite refuses these columns: {error}") from None
        rows = database.execute(f'PRAGMA table_info("{name}")').fetchall()
        if [row[1] for row in rows] != list(table.columns):
            raise FieldError(
                ("tables", name, "columns"), "a declaration contains a comma: one column per entry"
            )
        indexes = {index: _index(database, name, index, spec) for index, spec in table.indexes.items()}
    columns = {
        row[1]: {
            "declared": table.columns[row[1]],
            "type": row[2].upper(),
            "notnull": bool(row[3]),
            "default": row[4],
            "key": bool(row[5]),
            "refused": _refusal(row[1], table.columns[row[1]]),
        }
        for row in rows
    }
    return {"columns": columns, "indexes": indexes}


def _index(database: sqlite3.Connection, table: str, name: str, index: Index) -> dict[str, Any]:
    path = ("tables", table, "indexes", name)
    unknown = [column for column in index.columns if column not in _columns(database, table)]
    if unknown:
        raise FieldError(path, f"column {unknown[0]!r} is not declared for table {table!r}")
    return {"columns": list(index.columns), "unique": index.unique}


def _columns(database: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]


@cache
def _refusal(column: str, declared: str) -> str:
    """Why SQLite cannot add this column to a table that has rows; empty if it can. SQLite itself is asked."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE probe (existing_row)")
        database.execute("INSERT INTO probe VALUES (1)")
        try:
            database.execute(f'ALTER TABLE probe ADD COLUMN "{column}" {declared}')
        except (sqlite3.Error, sqlite3.Warning) as error:
            return str(error)
    return ""


DECLARATION = Schema
