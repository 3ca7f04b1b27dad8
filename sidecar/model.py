"""The values everything else speaks about: backends, model mappings, endpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_RATE = 10_000_000
MAX_NAME = 200
MAX_TOKENS = 1_000_000_000
MAX_TIMEOUT_SECONDS = 86_400.0
_PRINTABLE = r"^[^\x00-\x1f\x7f]+$"


def _whole(value: object) -> object:
    """JSON knows one kind of number: 1.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The bounds stand before the validator: the other way round they would be missing in the schema.
TokenLimit = Annotated[int, Field(ge=1, le=MAX_TOKENS), BeforeValidator(_whole)]
TokenCount = Annotated[int, Field(ge=0, le=MAX_TOKENS), BeforeValidator(_whole)]
RateLimit = Annotated[int, Field(ge=1, le=MAX_RATE), BeforeValidator(_whole)]
Priority = Annotated[int, Field(ge=-1_000_000, le=1_000_000), BeforeValidator(_whole)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME, pattern=_PRINTABLE)]
Label = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
BackendId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Dollars = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Api(StrEnum):
    """The dialect a backend speaks."""

    OPENAI = "openai-completions"
    ANTHROPIC = "anthropic-messages"


class Pool(StrEnum):
    """Primary is used first; fallback when primary cannot take the request."""

    PRIMARY = "primary"
    FALLBACK = "fallback"


class Source(StrEnum):
    """Who declared a backend; `desired` ones belong to a file and are not edited here."""

    WEBUI = "webui"
    ENV = "env"
    IMPORT = "import"
    DESIRED = "desired"


class Frozen(BaseModel):
    """Base of all declared values: unknown fields are errors, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Cost(Frozen):
    """US dollars per token."""

    input: Dollars = 0.0
    output: Dollars = 0.0
    cache_read: Dollars = Field(default=0.0, alias="cacheRead")
    cache_write: Dollars = Field(default=0.0, alias="cacheWrite")


class ModelMapping(Frozen):
    """What a canonical model is called at one backend, and what it costs there."""

    native_id: ModelName
    reasoning: bool = False
    reasoning_effort: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,20}$")] | None = None
    input_modalities: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z]{1,20}$")], ...] = ("text",)
    cost: Cost = Cost()
    context_window: TokenLimit = 128_000
    max_tokens: TokenLimit = 65_536
    compat: Mapping[str, Any] = Field(default_factory=dict)


class Backend(Frozen):
    """One key at one address.

    A backend without mappings serves every model under its own name: that is what
    an installation of V1 looked like, and what a newcomer with one key wants.
    """

    id: BackendId
    name: Label
    label: Label = ""
    api_base_url: str
    api_key: str = Field(default="", repr=False)
    api: Api = Api.OPENAI
    timeout_seconds: float = Field(default=120.0, gt=0, le=MAX_TIMEOUT_SECONDS)
    rpm_limit: RateLimit = 40
    tpm_limit: TokenLimit | None = None
    pool: Pool = Pool.PRIMARY
    priority: Priority = 0
    enabled: bool = True
    include_usage: bool = True
    model_mappings: Mapping[ModelName, ModelMapping] = Field(default_factory=dict)
    source: Source = Source.WEBUI
    metadata: Mapping[str, Any] = Field(default_factory=dict)
    key_error: str = ""

    def serves(self, model: str) -> bool:
        """Whether a request for this canonical name may come here."""
        return not self.model_mappings or model in self.model_mappings

    def mapping(self, model: str) -> ModelMapping | None:
        """The mapping of a canonical name; None means the name is used as it is."""
        return self.model_mappings.get(model)


class Dialect(StrEnum):
    """The shape of a stream and of an error body."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"
    MESSAGES = "messages"
    COUNT_TOKENS = "count_tokens"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One allowed path, and where it goes at a backend."""

    path: str
    suffix: str
    api: Api
    dialect: Dialect
    streams: bool


ENDPOINTS: Mapping[str, Endpoint] = {
    e.path: e
    for e in (
        Endpoint("/v1/chat/completions", "/chat/completions", Api.OPENAI, Dialect.CHAT, streams=True),
        Endpoint("/v1/completions", "/completions", Api.OPENAI, Dialect.COMPLETIONS, streams=True),
        Endpoint("/v1/embeddings", "/embeddings", Api.OPENAI, Dialect.EMBEDDINGS, streams=False),
        Endpoint("/v1/responses", "/responses", Api.OPENAI, Dialect.RESPONSES, streams=True),
        Endpoint("/v1/messages", "/messages", Api.ANTHROPIC, Dialect.MESSAGES, streams=True),
        Endpoint(
            "/v1/messages/count_tokens",
            "/messages/count_tokens",
            Api.ANTHROPIC,
            Dialect.COUNT_TOKENS,
            streams=False,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `prompt` includes cached ones; `estimated` marks a guess."""

    prompt: int = 0
    completion: int = 0
    cache_read: int = 0
    cache_write: int = 0
    estimated: bool = False

    @property
    def total(self) -> int:
        """Prompt and completion together."""
        return self.prompt + self.completion

    def cost(self, price: Cost | None) -> float:
        """US dollars; cached tokens are charged at the cache's price instead of input's."""
        if price is None:
            return 0.0
        plain = max(0, self.prompt - self.cache_read - self.cache_write)
        return (
            plain * price.input
            + self.completion * price.output
            + self.cache_read * price.cache_read
            + self.cache_write * price.cache_write
        )
