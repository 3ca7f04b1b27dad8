"""Who may call, for which models, and within which budget."""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sidecar.errors import Refusal

PREFIX = "sk-sc-"
_ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Client:
    """A caller's key, known by its hash. Budget in US dollars per calendar month (UTC)."""

    id: str
    name: str
    key_hash: str
    budget: float | None = None
    models: tuple[str, ...] = ()


@dataclass(slots=True)
class Spent:
    """What a client has spent in a month, and what its running requests may still cost."""

    month: str = ""
    dollars: float = 0.0
    held: float = 0.0


ANONYMOUS = Client(_ANONYMOUS, _ANONYMOUS, "")


def new_key() -> tuple[str, str, str]:
    """A fresh key as (public id, whole key, hash). The whole key is shown once."""
    public = secrets.token_hex(6)
    key = f"{PREFIX}{public}-{secrets.token_urlsafe(32)}"
    return public, key, digest(key)


def digest(key: str) -> str:
    """SHA-256: the key has 256 random bits, so there is nothing to slow down guessing of."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def month_of(now: float) -> str:
    """The month a budget counts in, like 2026-11."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")


@dataclass
class Access:
    """The clients, and the rule for callers without a key."""

    open: bool
    clients: Mapping[str, Client] = field(default_factory=dict)
    spent: dict[str, Spent] = field(default_factory=dict)

    def identify(self, headers: Mapping[bytes, bytes]) -> Client:
        """The caller. Raises Refusal 401.

        SDKs always send some key; without clients on loopback any is welcome, but one
        that claims to be ours must be right.
        """
        token = bearer(headers)
        if token.startswith(PREFIX):
            client = self.clients.get(token[len(PREFIX) :].partition("-")[0])
            if client is not None and hmac.compare_digest(digest(token), client.key_hash):
                return client
            raise Refusal(
                401, "invalid_api_key", "this client key is unknown or was deleted; ask for a new one"
            )
        if self.open:
            return ANONYMOUS
        raise Refusal(
            401,
            "missing_api_key",
            "a client key is needed: send it as 'Authorization: Bearer sk-sc-...' or 'x-api-key'",
        )

    def admit(self, client: Client, model: str, now: float) -> None:
        """Raises Refusal when the model or the budget forbids this request."""
        if client.models and model not in client.models:
            raise Refusal(
                403,
                "model_not_allowed",
                f"this client key may not use {model!r}; it may use: {', '.join(client.models)}",
                "model",
            )
        if client.budget is None:
            return
        spent = self.of(client.id, now)
        if spent.dollars + spent.held >= client.budget:
            raise Refusal(
                402,
                "budget_exceeded",
                f"this client key has spent its budget of ${client.budget:g} for {spent.month}",
                headers=((b"x-should-retry", b"false"),),
            )

    def of(self, client_id: str, now: float) -> Spent:
        """A client's account of the running month."""
        month = month_of(now)
        account = self.spent.get(client_id)
        if account is None:
            account = self.spent[client_id] = Spent(month)
        elif account.month != month:
            account.month, account.dollars = month, 0.0
        return account


def bearer(headers: Mapping[bytes, bytes]) -> str:
    """The token of `Authorization: Bearer` or of `x-api-key`; empty when there is none."""
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()
