"""Settings: command line over environment (``RECONCILER_*``) over ``reconciler.toml`` over defaults."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from reconciler import paths
from reconciler.kinds.base import Duration, seconds
from reconciler.model import ConfigurationError, Mark, Problem

FILE = "reconciler.toml"
REFERENCE = re.compile(r"\$env:[A-Za-z_][A-Za-z0-9_]*|\$file:(?:/|~/).+")
# An endpoint on this very machine has no secret to give away: tests, and relays that hold the secret themselves.
LOOPBACK = re.compile(r"jsons?://(?:127\.0\.0\.1|localhost|\[::1\])(?::\d+)?(?:/[^@?]*)?")

Level = Literal["P0", "P1", "P2"]


def _no_secret(url: str) -> str:
    if REFERENCE.fullmatch(url) or LOOPBACK.fullmatch(url):
        return url
    raise PydanticCustomError(
        "secret",
        "an Apprise URL is a secret: refer to it with $env:NAME or $file:/path (only json://127.0.0.1 may stand here)",
    )


class Route(BaseModel):
    """Who is told of alerts: one ``[[notify]]`` table."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """What it is called where deliveries are shown."""
    url: Annotated[str, AfterValidator(_no_secret)]
    """Where the Apprise URL stands: ``$env:NAME`` or ``$file:/path``."""
    levels: tuple[Level, ...] = Field(("P0", "P1", "P2"), min_length=1)
    """The levels that are told there."""
    to: tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)], ...] = ()
    """Audiences: only alerts for one of them are told there. Without any, all alerts are."""
    resolved: bool = True
    """Whether it is also told when an alert is over."""
    reports: bool = False
    """Whether ``reconcile report --send`` goes there."""


def _distinct(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    for name, count in Counter(route.name for route in routes).items():
        if count > 1:
            raise PydanticCustomError(
                "twice", "{count} routes are called {name}", {"count": count, "name": name}
            )
    return routes


def _http(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        message = "write the base URL, such as http://127.0.0.1:9190/v1, without user or password"
        raise PydanticCustomError("address", message)
    return url.rstrip("/")


def _reference(text: str) -> str:
    if not REFERENCE.fullmatch(text):
        raise PydanticCustomError(
            "secret", "refer to it with $env:NAME or $file:/path; it may not stand here"
        )
    return text


def _positive(text: str) -> str:
    if seconds(text) <= 0:
        raise PydanticCustomError("duration", "has to be longer than nothing")
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise PydanticCustomError("variable", "write the names of variables, without values")
    if name.upper().startswith("RECONCILER_"):
        raise PydanticCustomError("variable", "the settings of the reconciler are not handed on")
    return name


def _repository(url: str) -> str:
    """An address may not hold a secret: it is shown, and stands in process lists while git runs."""
    if re.match(r"https?://[^/@]+@", url):
        message = "an address with a user or password is a secret: let git's credential helper or an ssh key hold it"
        raise PydanticCustomError("address", message)
    if not url or url.startswith("-"):
        raise PydanticCustomError("address", "write the address of a repository, as for git clone")
    return url


def _reference_name(name: str) -> str:
    if not re.fullmatch(
        r"(?!.*(\.\.|//|@\{|\.lock$))[^\s~^:?*\[\\\x00-\x1f/.-][^\s~^:?*\[\\\x00-\x1f]*", name
    ):
        raise PydanticCustomError("reference", "this is no name of a branch or a tag")
    return name


Word = Annotated[str, Field(min_length=1)]


class AnalysisSettings(BaseModel):
    """Who judges new and recurring issues, and what may be done with what they propose.

    Without an endpoint and without commands only the built-in rules do, and nothing is contacted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Literal["suggest", "allowlisted", "full"] = "suggest"
    """What a proposal may lead to: nothing, an install method that is shipped, or commands as well."""
    endpoint: Annotated[str, AfterValidator(_http)] | None = None
    """Base URL of an OpenAI-compatible endpoint, such as the sidecar's."""
    model: Word = "default"
    """The model that the endpoint is asked for."""
    api_key: Annotated[str, AfterValidator(_reference)] | None = None
    """Where its key is: ``$env:NAME`` or ``$file:/path``."""
    commands: tuple[Annotated[tuple[Word, ...], Field(min_length=1)], ...] = ()
    """Commands that are asked, in order, when the endpoint has no answer."""
    timeout: Annotated[Duration, AfterValidator(_positive)] = "30s"
    """The longest that one call may take."""
    total: Annotated[Duration, AfterValidator(_positive)] = "2m"
    """The longest that all analysis of a pass may take."""
    environment: tuple[Annotated[str, AfterValidator(_variable)], ...] = ()
    """Variables that commands are given besides PATH, HOME and LANG."""


class GitSettings(BaseModel):
    """Which repository the desired state is taken from. Without ``url`` only ``--pull`` looks for one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, AfterValidator(_repository)] | None = None
    """The repository, as git understands it; ``desired`` and ``inventory`` are paths in it."""
    branch: Annotated[str, AfterValidator(_reference_name)] = "main"
    """The branch to follow."""
    tag: Annotated[str, AfterValidator(_reference_name)] | None = None
    """A tag to follow instead; it may be moved."""
    interval: Annotated[Duration, AfterValidator(_positive)] = "1m"
    """Continuous mode: how often the repository is asked."""
    timeout: Annotated[Duration, AfterValidator(_positive)] = "1m"
    """The longest that asking may take."""


class HttpSettings(BaseModel):
    """Where a daemon answers over HTTP: health, metrics, the fleet page."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    """Whether it does."""
    host: Word = "127.0.0.1"
    """The address that it listens on; any but this machine's own needs a token."""
    port: int = Field(9180, ge=0, le=65535)
    """The port; 0 takes a free one."""
    token: Annotated[str, AfterValidator(_reference)] | None = None
    """Where the token is that callers show: ``$env:NAME`` or ``$file:/path``."""


class SidecarSettings(BaseModel):
    """Where the language-model proxy's admin API is, which knows whether the providers rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, AfterValidator(_http)] | None = None
    """Its base URL, such as ``http://127.0.0.1:9190``."""
    token: Annotated[str, AfterValidator(_reference)] | None = None
    """Where its admin token is: ``$env:NAME`` or ``$file:/path``."""
    timeout: Annotated[Duration, AfterValidator(_positive)] = "3s"
    """The longest that a pass waits for it."""


class Settings(BaseSettings):
    """Where things are and how Ansible is run."""

    model_config = SettingsConfigDict(
        env_prefix="RECONCILER_",
        env_nested_delimiter="__",
        toml_file=FILE,
        extra="forbid",
    )

    desired: Path = Path("desired_state")
    """Directory of the desired state."""
    inventory: Path = Path("inventory")
    """Ansible inventory: a file or a directory."""
    db: Path = Field(default_factory=lambda: paths.state_home() / "reconciler.db")
    """The SQLite file with events and conditions."""
    forks: int = Field(25, ge=1, le=500)
    """Nodes that are talked to at the same time."""
    interval: Annotated[Duration, AfterValidator(_positive)] = "5m"
    """Continuous mode: time from the start of one pass to the start of the next, give or take a tenth."""
    timeout: Duration = "1h"
    """The longest that one playbook may run."""
    idle_timeout: Duration = "40m"
    """The longest that a playbook may be silent; installing a tool is silent."""
    lease: Annotated[Duration, AfterValidator(_positive)] = "30s"
    """After so long without a sign of life of a pass, such as one that was stopped, another one may take over."""
    stop_timeout: Annotated[Duration, AfterValidator(_positive)] = "1m"
    """Continuous mode: so long a pass may go on after it was asked to end; then it is left, for the next start."""
    log_format: Literal["auto", "console", "json", "none"] = "auto"
    """How logs are written to standard error; auto: for people in continuous mode, and none of a single pass."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    git: GitSettings = GitSettings()
    """Which repository the desired state is taken from."""
    alert_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default_factory=lambda known: known.get("db", paths.state_home() / "reconciler.db").parent / "alerts"
    )
    """Directory that receives a file per alert; by default ``alerts`` beside the database."""
    notify: Annotated[tuple[Route, ...], AfterValidator(_distinct)] = ()
    """Who is told of alerts."""
    analysis: AnalysisSettings = AnalysisSettings()
    """Who judges issues, and what may be done with what they propose."""
    http: HttpSettings = HttpSettings()
    """Where a daemon answers over HTTP."""
    sidecar: SidecarSettings = SidecarSettings()
    """Who knows whether the language-model providers rest."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - no .env files
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def referred(reference: str) -> str:
    """What ``$env:NAME`` or ``$file:/path`` refers to; any other text is itself. Raises LookupError."""
    kind, _, name = reference.partition(":")
    if kind == "$env":
        if not os.environ.get(name):
            raise LookupError(f"the environment has no {name}")
        return os.environ[name].strip()
    if kind == "$file":
        try:
            found = Path(name).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise LookupError(f"{name} cannot be read: {reason}") from None
        if not found:
            raise LookupError(f"{name} is empty")
        return found
    return reference


def load(**given: Any) -> Settings:
    """Settings, with what was given on the command line (None means not given). Raises ConfigurationError."""
    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigurationError([_problem(item) for item in error.errors()]) from error
    except SettingsError as error:  # a list in the environment that is not JSON
        raise ConfigurationError([Problem(f"the environment cannot be used: {error}")]) from None
    except ValueError as error:  # TOML syntax
        raise ConfigurationError([Problem(f"this is not TOML: {error}", Mark(FILE))]) from error


def _problem(item: Any) -> Problem:
    name = str(item["loc"][0]) if item["loc"] else "settings"
    if name == "notify":
        return _route_problem(item)
    if name in _TABLES:
        return _table_problem(name, item)
    if item["type"] == "extra_forbidden":
        return Problem(f"unknown setting {name!r}", Mark(FILE), "known: " + ", ".join(Settings.model_fields))
    place = f"the setting {name} (RECONCILER_{name.upper()}, or {name} in {FILE})"
    return Problem(f"{place}: {item['msg']}, not {item.get('input')!r}")


def _route_problem(item: Any) -> Problem:
    """A mistake in ``[[notify]]``. What was written is not repeated: it may be a secret."""
    place, hint = "[[notify]]", "see the chapter on routes in docs/alerts.md"
    if len(item["loc"]) > 1:
        place += f" number {int(item['loc'][1]) + 1}"
    field = ".".join(map(str, item["loc"][2:]))
    if item["type"] == "extra_forbidden":
        hint = "known: " + ", ".join(Route.model_fields)
        return Problem(f"{place}: unknown key {field!r}", Mark(FILE), hint)
    return Problem(f"{place}: {field + ': ' if field else ''}{item['msg']}", Mark(FILE), hint)


_TABLES: dict[str, tuple[type[BaseModel], str]] = {
    "analysis": (AnalysisSettings, "docs/analysis.md"),
    "git": (GitSettings, "docs/running.md"),
    "http": (HttpSettings, "docs/http.md"),
    "sidecar": (SidecarSettings, "docs/heartbeats.md"),
}


def _table_problem(name: str, item: Any) -> Problem:
    """A mistake in a table such as ``[analysis]``. What was written is not repeated: it may be a key."""
    model, page = _TABLES[name]
    field, hint = ".".join(map(str, item["loc"][1:])), f"see the chapter on settings in {page}"
    if item["type"] == "extra_forbidden":
        hint = "known: " + ", ".join(model.model_fields)
        return Problem(f"[{name}]: unknown key {field!r}", Mark(FILE), hint)
    variable = "__".join(["RECONCILER", *map(str, item["loc"][:2])]).upper().replace("__", "_", 1)
    place = f"[{name}] (or {variable})" if field else f"[{name}]"
    return Problem(f"{place}: {field + ': ' if field else ''}{item['msg']}", Mark(FILE), hint)
