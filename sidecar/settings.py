"""Typed settings: environment over database over defaults.

A field is hot when a running process takes a change over; the others belong to the
start (addresses, files, secrets) and cannot be set through the admin API.
"""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

_DAY = 86_400.0
Seconds = Annotated[float, Field(gt=0, le=7 * _DAY, allow_inf_nan=False)]
Network = Annotated[str, StringConstraints(min_length=1, max_length=64)]

# Names the specification gives that are not SIDECAR_<FIELD>.
ALIASES: Mapping[str, str] = {
    "queue_max_depth": "SIDECAR_QUEUE_MAX",
    "queue_timeout_seconds": "SIDECAR_QUEUE_TIMEOUT",
    "rate_rpm": "SIDECAR_RATE_RPM",
    "cooldown_base_seconds": "SIDECAR_COOLDOWN_BASE",
    "cooldown_max_seconds": "SIDECAR_COOLDOWN_MAX",
    "log_level": "LOG_LEVEL",
    "log_format": "LOG_FORMAT",
    "v1_upstream": "SIDECAR_UPSTREAM",
    "v1_api_key": "SIDECAR_API_KEY",
}


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the variable and the way out."""


class HotSettings(BaseModel):
    """What a running process takes over without a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue_max_depth: int = Field(default=500, ge=0, le=100_000)
    queue_timeout_seconds: Seconds = 30.0
    rate_rpm: int = Field(default=40, ge=1, le=10_000_000)
    cooldown_base_seconds: Seconds = 30.0
    cooldown_max_seconds: Seconds = 600.0
    cooldown_decay_seconds: Seconds = 600.0
    cooldown_quota_seconds: Seconds = 3600.0
    cooldown_precheck_seconds: float = Field(default=10.0, ge=0, le=_DAY)
    exponential_backoff: bool = True
    emergency_rpm_fraction: float = Field(default=0.10, gt=0, le=1)
    max_pool_retries: int = Field(default=5, ge=1, le=100)
    request_timeout_seconds: Seconds = 120.0
    connect_timeout_seconds: Seconds = 5.0
    first_token_timeout_seconds: Seconds = 60.0
    idle_timeout_seconds: Seconds = 60.0
    stream_total_seconds: Seconds = 3600.0
    body_timeout_seconds: Seconds = 30.0
    caller_write_timeout_seconds: Seconds = 60.0
    breaker_window_seconds: Seconds = 60.0
    breaker_min_samples: int = Field(default=5, ge=1, le=1000)
    breaker_error_ratio: float = Field(default=0.5, gt=0, le=1)
    breaker_base_seconds: Seconds = 15.0
    breaker_max_seconds: Seconds = 300.0
    completion_estimate_tokens: int = Field(default=512, ge=0, le=1_000_000)
    max_body_bytes: int = Field(default=20 * 2**20, ge=1024, le=2**31)
    max_answer_bytes: int = Field(default=64 * 2**20, ge=1024, le=2**31)
    health_check_interval_seconds: Seconds = 60.0
    health_check_timeout_seconds: Seconds = 10.0
    router_refresh_seconds: Seconds = 5.0
    backup_retention_days: int = Field(default=7, ge=1, le=3650)
    backup_interval_seconds: Seconds = _DAY
    dashboard_sse_seconds: float = Field(default=1.0, ge=0.1, le=60)
    stats_refresh_seconds: Seconds = 30.0
    access_log: bool = True
    gen_ai_metrics: bool = False


class Settings(HotSettings):
    """Everything, hot or not."""

    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    port: int = Field(default=9190, ge=0, le=65535)
    metrics_host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    metrics_port: int = Field(default=9191, ge=0, le=65535)
    admin_token: str = Field(default="", repr=False)
    admin_token_file: Path | None = None
    encryption_key: str = Field(default="", repr=False)
    encryption_key_file: Path | None = None
    old_encryption_keys: str = Field(default="", repr=False)
    db_path: Path = Path("data/sidecar_v2.db")
    backup_dir: Path = Path("data/backups")
    backends_file: Path | None = None
    v1_upstream: str = ""
    v1_api_key: str = Field(default="", repr=False)
    allow_open: bool = False
    private_networks: tuple[Network, ...] = ()
    max_header_bytes: int = Field(default=65_536, ge=1024, le=2**20)
    header_timeout_seconds: Seconds = 15.0
    drain_seconds: Seconds = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    def hot(self) -> HotSettings:
        """The hot part alone."""
        return HotSettings(**{name: getattr(self, name) for name in HotSettings.model_fields})

    @property
    def token_file(self) -> Path:
        """Where the admin token is kept when it is not in the environment."""
        return self.admin_token_file or self.db_path.parent / "admin_token"

    @property
    def key_file(self) -> Path:
        """Where the encryption keyring is kept when it is not in the environment."""
        return self.encryption_key_file or self.db_path.parent / "encryption_key"

    @property
    def loopback_only(self) -> bool:
        """Whether the data plane is reachable from this machine alone."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is of the loopback range."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def variable(field: str) -> str:
    """The environment variable of a field."""
    return ALIASES.get(field, f"SIDECAR_{field.upper()}")


def from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """The fields the environment sets, as text; an empty variable counts as unset."""
    found: dict[str, Any] = {}
    for field in Settings.model_fields:
        for name in (variable(field), f"SIDECAR_{field.upper()}"):
            value = env.get(name, "").strip()
            if value:
                found[field] = value.split(",") if field == "private_networks" else value
                break
    for field in ("log_level", "log_format"):
        if field in found:
            found[field] = str(found[field]).lower()
    return found


def load(env: Mapping[str, str], stored: Mapping[str, Any] | None = None) -> Settings:
    """Merge environment over database over defaults.

    `stored` holds only hot fields. Raises SettingsError naming every value at fault.
    """
    given = from_environment(env)
    merged = {**(stored or {}), **given}
    try:
        settings = Settings.model_validate(merged)
        for network in settings.private_networks:
            ipaddress.ip_network(network)
    except ValidationError as error:
        raise SettingsError(_explain(error, given)) from None
    except ValueError as error:
        raise SettingsError(f"SIDECAR_PRIVATE_NETWORKS: {error}; write networks like 10.0.0.0/8") from None
    return settings


def _explain(error: ValidationError, given: Mapping[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        field = str(problem["loc"][0]) if problem["loc"] else "?"
        place = variable(field) if field in given else f"setting {field!r} in the database"
        # The value of a secret must not come back in an error.
        shown = (
            "" if field in {"admin_token", "encryption_key", "v1_api_key"} else f", got {problem['input']!r}"
        )
        lines.append(f"{place}: {problem['msg']}{shown}")
    return "; ".join(lines)
