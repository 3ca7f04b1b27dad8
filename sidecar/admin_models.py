"""The admin API's requests and answers; its OpenAPI document is generated from these."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sidecar.addresses import URL_PATTERN
from sidecar.model import (
    MAX_TIMEOUT_SECONDS,
    Api,
    BackendId,
    Label,
    ModelMapping,
    ModelName,
    Pool,
    Priority,
    RateLimit,
    Source,
    TokenCount,
    TokenLimit,
)

Url = Annotated[str, StringConstraints(pattern=URL_PATTERN, max_length=500)]
SecretText = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[\x21-\x7e]*$")]


class Strict(BaseModel):
    """Base of requests: unknown fields are errors, and text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class BackendIn(Strict):
    """A backend to create, or what replaces one. An omitted or masked key keeps the stored one."""

    id: BackendId | None = None
    name: Label
    label: Label = ""
    api_base_url: Url
    api_key: SecretText | None = None
    api: Api = Api.OPENAI
    timeout_seconds: float = Field(default=120.0, gt=0, le=MAX_TIMEOUT_SECONDS)
    rpm_limit: RateLimit | None = None
    tpm_limit: TokenLimit | None = None
    pool: Pool = Pool.PRIMARY
    priority: Priority = 0
    enabled: bool = True
    include_usage: bool = True
    model_mappings: dict[ModelName, ModelMapping] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)


class BackendOut(BaseModel):
    """A backend as it is shown: the key is masked."""

    id: str
    name: str
    label: str
    api_base_url: str
    api_key: str
    api: Api
    timeout_seconds: float
    rpm_limit: int
    tpm_limit: int | None
    pool: Pool
    priority: int
    enabled: bool
    include_usage: bool
    model_mappings: Mapping[str, ModelMapping]
    source: Source
    metadata: Mapping[str, Any]
    status: str
    status_detail: str
    cooldown_seconds: float
    cooldown_level: int
    starts_last_minute: int
    in_flight: int


class BackendList(BaseModel):
    """All backends."""

    backends: list[BackendOut]


class TestOut(BaseModel):
    """What a look at the provider said."""

    reachable: bool
    key_ok: bool | None
    status: int
    detail: str


class PoolOut(BaseModel):
    """One pool in numbers."""

    pool: Pool
    healthy: int
    cooling: int
    error: int
    disabled: int


class Pools(BaseModel):
    """Both pools and the queue."""

    pools: list[PoolOut]
    queue_depth: int
    emergency_count: int


class TotalOut(BaseModel):
    """Sums since the first day."""

    total_requests: int
    total_errors: int
    total_tokens: int
    total_prompt_tokens: int
    total_completion_tokens: int
    total_cost: float


class HourRow(BaseModel):
    """One hour of one backend, model and client."""

    hour_bucket: int
    backend_id: str
    model: str
    client_id: str
    request_count: int
    error_count: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    total_tokens: int
    cost: float
    estimated_count: int
    avg_latency_ms: float
    ttft_ms: float | None


class DayRow(TotalOut):
    """One day of one pool."""

    date: str
    pool: str


class CooldownRow(BaseModel):
    """One cooldown, ejection or quarantine."""

    id: int
    backend_id: str
    kind: str
    level: int
    at: float
    until: float
    detail: str


class Hourly(BaseModel):
    """Rows by hour, newest first."""

    rows: list[HourRow]


class Daily(BaseModel):
    """Rows by day, newest first."""

    rows: list[DayRow]


class CooldownLog(BaseModel):
    """Cooldown events, newest first."""

    rows: list[CooldownRow]


class ConfigEntry(BaseModel):
    """One setting: its value now and where it comes from (environment, database or default)."""

    key: str
    value: int | float | bool | str | None
    origin: str
    variable: str


class ConfigOut(BaseModel):
    """All settings that can be changed while running."""

    settings: list[ConfigEntry]


class ConfigValue(Strict):
    """A new value."""

    value: int | float | bool


class ClientIn(Strict):
    """A client key to create. Budget in US dollars per calendar month."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
    budget: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None = None
    models: list[ModelName] = Field(default_factory=list, max_length=100)


class RecentOut(BaseModel):
    """A client's attempts of the last minutes. The share of 429 and the mean time of an answer are null without any."""

    window_seconds: int
    attempts: int
    rate_429: float | None
    response_seconds: float | None


class ClientOut(BaseModel):
    """A client key without its secret."""

    id: str
    name: str
    budget: float | None
    models: list[str]
    spent_this_month: float
    recent: RecentOut


class ClientCreated(ClientOut):
    """A new client key; the key itself is shown this once."""

    key: str


class ClientList(BaseModel):
    """All client keys."""

    clients: list[ClientOut]


class ExplainIn(Strict):
    """A request to route without sending it."""

    model: ModelName
    api: Api = Api.OPENAI
    tokens: TokenCount = 0


class ExplainRow(BaseModel):
    """One backend: whether it is a candidate, and why not."""

    backend_id: str
    pool: Pool
    candidate: bool
    reason: str


class ExplainOut(BaseModel):
    """What would happen to the request now."""

    way: str
    order: list[str]
    backends: list[ExplainRow]
    wait_seconds: float


class Deleted(BaseModel):
    """Something was deleted."""

    deleted: bool = True


class ErrorDetail(BaseModel):
    """What is wrong, in which field, and a constant code."""

    code: str
    message: str
    field: str | None = None


class ErrorOut(BaseModel):
    """Every error of the admin API."""

    error: ErrorDetail
