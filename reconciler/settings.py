"""Settings: command line over environment (``RECONCILER_*``) over ``reconciler.toml`` over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from reconciler import paths
from reconciler.kinds.base import Duration
from reconciler.model import ConfigurationError, Mark, Problem

FILE = "reconciler.toml"


class Settings(BaseSettings):
    """Where things are and how Ansible is run."""

    model_config = SettingsConfigDict(
        env_prefix="RECONCILER_", toml_file=FILE, extra="forbid", use_attribute_docstrings=True
    )

    desired: Path = Path("desired_state")
    """Directory of the desired state."""
    inventory: Path = Path("inventory")
    """Ansible inventory: a file or a directory."""
    db: Path = Field(default_factory=lambda: paths.state_home() / "reconciler.db")
    """The SQLite file with events and conditions."""
    forks: int = Field(25, ge=1, le=500)
    """Nodes that are talked to at the same time."""
    interval: Duration = "5m"
    """Continuous mode: time from the start of one pass to the start of the next, give or take a tenth."""
    timeout: Duration = "1h"
    """The longest that one playbook may run."""
    idle_timeout: Duration = "40m"
    """The longest that a playbook may be silent; installing a tool is silent."""

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


def load(**given: Any) -> Settings:
    """Settings, with what was given on the command line (None means not given). Raises ConfigurationError."""
    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigurationError([_problem(item) for item in error.errors()]) from error
    except ValueError as error:  # TOML syntax
        raise ConfigurationError([Problem(f"this is not TOML: {error}", Mark(FILE))]) from error


def _problem(item: Any) -> Problem:
    name = str(item["loc"][0]) if item["loc"] else "settings"
    if item["type"] == "extra_forbidden":
        return Problem(f"unknown setting {name!r}", Mark(FILE), "known: " + ", ".join(Settings.model_fields))
    place = f"the setting {name} (RECONCILER_{name.upper()}, or {name} in {FILE})"
    return Problem(f"{place}: {item['msg']}, not {item.get('input')!r}")
