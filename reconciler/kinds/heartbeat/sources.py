"""The usual commands of the three task sources, and how a declaration replaces some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

WORDS = (
    "list", "list_all", "list_in_progress", "show", "release", "block", "comment", "files",
)  # fmt: skip


def _known(name: str) -> str:
    if name not in WORDS and not name.startswith("list_"):
        raise ValueError(f"known are {', '.join(WORDS)}, and other names that begin with list_")
    return name


Commands = dict[
    Annotated[str, AfterValidator(_known)], Annotated[list[str], Field(min_length=1, max_length=50)]
]

_ISSUES = ["multica", "issue", "list", "--limit", "500", "--output", "json", "--status"]
SOURCES: Mapping[str, Mapping[str, list[str]]] = {
    "workboard": {
        "list": ["openclaw", "workboard", "list", "--json"],
        "show": ["openclaw", "workboard", "show", "{id}", "--json"],
        # WorkBoard's command line only reads; its gateway does the rest.
        "release": ["openclaw", "gateway", "call", "workboard.cards.release", "--params", '{"id":"{id}"}'],
    },
    "multica": {
        "list": [*_ISSUES, "todo", "--assignee-id", "{multica}"],
        "list_in_progress": [*_ISSUES, "in_progress", "--assignee-id", "{multica}"],
        # For several agents of one account: each command is called once, and everybody picks what is assigned to it.
        "list_all": [*_ISSUES, "todo"],
        "list_all_in_progress": [*_ISSUES, "in_progress"],
        "show": ["multica", "issue", "get", "{id}", "--output", "json"],
        "block": ["multica", "issue", "status", "{id}", "blocked"],
        "comment": ["multica", "issue", "comment", "add", "{id}", "--content", "{reason}"],
    },
    "documents": {"files": ["TODO.md", "AGENTS.md"]},
}


def merged(
    usual: Mapping[str, Mapping[str, list[str]]], declared: Mapping[Any, Commands | None]
) -> dict[str, Any]:
    """The usual commands with the declared ones in their place; a source that is declared as nothing is left out."""
    found: dict[str, Any] = {name: dict(source) for name, source in usual.items()}
    for name, source in declared.items():
        if source is None:
            found.pop(name, None)
        else:
            found[name] = {**found.get(name, {}), **source}
    return found
