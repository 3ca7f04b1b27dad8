"""Routes of the admin API, who may use them, and the OpenAPI document made from the same table."""

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from sidecar import __version__
from sidecar import admin_models as m
from sidecar.access import bearer
from sidecar.admin import Admin, Problem, dump, problem_of
from sidecar.dashboard import Sessions, dashboard_routes
from sidecar.model import MAX_NAME
from sidecar.runtime import Runtime
from sidecar.wire import Receive, Scope, Send

_MAX_BODY_BYTES = 2**20
_JSON = "application/json"


@dataclass(frozen=True)
class Parameter:
    """A query parameter with its JSON schema."""

    name: str
    schema: Mapping[str, Any]
    default: Any


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    handler: str
    answer: type[BaseModel]
    body: type[BaseModel] | None = None
    query: tuple[Parameter, ...] = ()
    status: int = 200
    errors: tuple[int, ...] = ()


_BACKEND_ID = Parameter("backend_id", {"type": "string", "minLength": 1, "maxLength": 64}, None)


def _whole(name: str, default: int, most: int) -> Parameter:
    return Parameter(name, {"type": "integer", "minimum": 1, "maximum": most, "default": default}, default)


OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/backends", "list_backends", m.BackendList),
    Operation("POST", "/backends", "create_backend", m.BackendOut, m.BackendIn, status=201, errors=(409,)),
    Operation("GET", "/backends/{id}", "get_backend", m.BackendOut, errors=(404,)),
    Operation("PUT", "/backends/{id}", "put_backend", m.BackendOut, m.BackendIn, errors=(404, 409)),
    Operation("DELETE", "/backends/{id}", "delete_backend", m.Deleted, errors=(404, 409)),
    Operation("POST", "/backends/{id}/test", "test_backend", m.TestOut, errors=(404,)),
    Operation("POST", "/backends/{id}/clear", "clear_backend", m.BackendOut, errors=(404,)),
    Operation("GET", "/pools", "pools", m.Pools),
    Operation("GET", "/stats/total", "total", m.TotalOut),
    Operation("GET", "/stats/hourly", "hourly", m.Hourly, query=(_BACKEND_ID, _whole("hours", 168, 8784))),
    Operation("GET", "/stats/daily", "daily", m.Daily, query=(_whole("days", 30, 3660),)),
    Operation(
        "GET", "/stats/cooldown", "cooldown", m.CooldownLog, query=(_BACKEND_ID, _whole("limit", 50, 1000))
    ),
    Operation("GET", "/config", "list_config", m.ConfigOut),
    Operation("DELETE", "/config", "reset_config", m.ConfigOut),
    Operation("GET", "/config/{key}", "get_config", m.ConfigEntry, errors=(404,)),
    Operation("PUT", "/config/{key}", "put_config", m.ConfigEntry, m.ConfigValue, errors=(404, 409)),
    Operation("DELETE", "/config/{key}", "delete_config", m.ConfigEntry, errors=(404,)),
    Operation("GET", "/clients", "list_clients", m.ClientList),
    Operation("POST", "/clients", "create_client", m.ClientCreated, m.ClientIn, status=201),
    Operation("DELETE", "/clients/{id}", "delete_client", m.Deleted, errors=(404,)),
    Operation("POST", "/route/explain", "explain", m.ExplainOut, m.ExplainIn),
)


def create_management(runtime: Runtime) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The admin API and the dashboard as one ASGI application."""
    admin = Admin(runtime)
    sessions = Sessions(runtime)
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = operation
    routes = [
        Route("/api/admin" + path, _PathEndpoint(runtime, admin, sessions, methods))
        for path, methods in by_path.items()
    ]
    routes.append(Route("/api/admin/openapi.json", _document, methods=["GET"]))
    application = Starlette(
        routes=[*routes, *dashboard_routes(runtime, admin, sessions)],
        exception_handlers={404: _missing, 405: _not_allowed},
    )
    application.router.redirect_slashes = False
    return application


class _PathEndpoint:
    """All methods of one path, as an ASGI application so that Starlette adds none of its own."""

    def __init__(
        self, runtime: Runtime, admin: Admin, sessions: Sessions, methods: Mapping[str, Operation]
    ) -> None:
        self._runtime = runtime
        self._admin = admin
        self._sessions = sessions
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate, validate, run, answer."""
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except Problem as problem:
            response = problem_response(problem)
        except ValidationError as error:
            response = problem_response(problem_of(error))
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        operation = self._methods.get(request.method)
        if operation is None:
            allow = ", ".join(sorted(self._methods))
            response = problem_response(Problem(405, "method_not_allowed", f"use {allow}"))
            response.headers["allow"] = allow
            return response
        authorize(self._runtime, self._sessions, request)
        arguments: dict[str, Any] = {"path": request.path_params, "query": _query(operation, request)}
        if operation.body is not None:
            arguments["body"] = operation.body.model_validate_json(await _body(request), strict=True)
        answer = await getattr(self._admin, operation.handler)(**arguments)
        return Response(
            dump(answer),
            operation.status,
            {"cache-control": "no-store", "x-content-type-options": "nosniff"},
            _JSON,
        )


def authorize(runtime: Runtime, sessions: Sessions, request: Request) -> None:
    """The admin token, or the dashboard's session with an Origin of our own. Raises Problem 401 or 403."""
    token = bearer({k.encode(): v.encode("latin-1") for k, v in request.headers.items()})
    if token and hmac.compare_digest(token.encode(), runtime.admin_token.encode()):
        return
    if not token and sessions.valid(request):
        sessions.check_origin(request)
        return
    raise Problem(401, "unauthorized", "send the admin token as 'Authorization: Bearer ...'")


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if kind != _JSON:
        raise Problem(415, "wrong_content_type", "send Content-Type: application/json")
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > _MAX_BODY_BYTES:
            raise Problem(413, "body_too_large", f"the body is larger than {_MAX_BODY_BYTES} bytes")
    return b"".join(parts)


_INTEGER: TypeAdapter[int] = TypeAdapter(int)


def _query(operation: Operation, request: Request) -> dict[str, Any]:
    known = {parameter.name: parameter for parameter in operation.query}
    unknown = sorted(set(request.query_params) - set(known))
    if unknown:
        raise Problem(422, "invalid", f"unknown query parameter {unknown[0]!r}", unknown[0])
    values: dict[str, Any] = {}
    for name, parameter in known.items():
        given = request.query_params.getlist(name)
        if len(given) > 1:
            raise Problem(422, "invalid", f"{name} is given more than once", name)
        values[name] = _value(parameter, given[0]) if given else parameter.default
    return values


def _value(parameter: Parameter, text: str) -> Any:
    schema, name = parameter.schema, parameter.name
    if schema["type"] == "string":
        if not schema["minLength"] <= len(text) <= schema["maxLength"]:
            raise Problem(422, "invalid", f"{name} must have 1 to {schema['maxLength']} characters", name)
        return text
    plain = text.isascii() and text.lstrip("-").isdigit() and len(text) < 20  # noqa: PLR2004 - no integer of ours is longer
    number = int(text) if plain and text.count("-") <= 1 else 0
    if not schema["minimum"] <= number <= schema["maximum"]:
        text = f"{name} must be a whole number from {schema['minimum']} to {schema['maximum']}"
        raise Problem(422, "invalid", text, name)
    return number


def problem_response(problem: Problem) -> Response:
    """An error in the one shape."""
    detail = m.ErrorDetail(code=problem.code, message=str(problem), field=problem.field)
    headers = {"cache-control": "no-store"}
    if problem.status == 401:  # noqa: PLR2004 - the status that needs a challenge
        headers["www-authenticate"] = "Bearer"
    return Response(dump(m.ErrorOut(error=detail)), problem.status, headers, _JSON)


async def _missing(request: Request, _error: Exception) -> Response:
    return problem_response(Problem(404, "not_found", f"there is nothing at {request.url.path}"))


async def _not_allowed(_request: Request, error: Exception) -> Response:
    response = problem_response(Problem(405, "method_not_allowed", "this method is not offered here"))
    allow = (getattr(error, "headers", None) or {}).get("Allow", "GET")
    response.headers["allow"] = allow
    return response


async def _document(_request: Request) -> Response:
    return Response(json.dumps(openapi()), media_type=_JSON)


def openapi() -> dict[str, Any]:
    """The document, generated from the operations and their models."""
    models: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        described: dict[str, Any] = {
            "operationId": operation.handler,
            "summary": (getattr(Admin, operation.handler).__doc__ or "").strip(),
            "parameters": _parameters(operation),
            "responses": _responses(operation, models),
        }
        if operation.body is not None:
            schema = _ref(operation.body, models, "validation")
            described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
        paths.setdefault("/api/admin" + operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "sidecar admin API", "version": __version__},
        "paths": paths,
        "components": {"schemas": models, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}],
    }


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in operation.path.split("/"):
        if part.startswith("{"):
            schema = {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[A-Za-z0-9_-]+$"}
            found.append({"name": part[1:-1], "in": "path", "required": True, "schema": schema})
    found += [
        {"name": p.name, "in": "query", "required": False, "schema": dict(p.schema)} for p in operation.query
    ]
    return found


_TEXTS = {
    400: "The body is not JSON",
    401: "No admin token",
    403: "A page of another origin",
    404: "Not there",
    409: "Refused as things are",
    413: "Too large",
    415: "Not JSON",
    422: "A value is wrong; the field is named",
}


def _responses(operation: Operation, models: dict[str, Any]) -> dict[str, Any]:
    good = {
        "description": "Done",
        "content": {_JSON: {"schema": _ref(operation.answer, models, "serialization")}},
    }
    error = {_JSON: {"schema": _ref(m.ErrorOut, models, "serialization")}}
    codes = {401, 403, 422, *operation.errors, *((400, 413, 415) if operation.body else ())}
    return {
        str(operation.status): good,
        **{str(code): {"description": _TEXTS[code], "content": error} for code in sorted(codes)},
    }


def _ref(model: type[BaseModel], models: dict[str, Any], mode: Any) -> dict[str, str]:
    schema = model.model_json_schema(mode=mode, ref_template="#/components/schemas/{model}")
    _close_keys(schema)
    inner = schema.pop("$defs", {})
    suffix = "In" if mode == "validation" else ""
    text = json.dumps({model.__name__: schema, **inner})
    for name in inner:
        # The same model reads and writes differently (defaults); keep both apart.
        if suffix:
            text = text.replace(f'"#/components/schemas/{name}"', f'"#/components/schemas/{name}{suffix}"')
    for name, found in json.loads(text).items():
        models[name + (suffix if name in inner else "")] = found
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _close_keys(schema: Any) -> None:
    """A pattern for keys means that no other key is accepted; pydantic leaves that unsaid."""
    if isinstance(schema, dict):
        if "patternProperties" in schema:
            schema.setdefault("additionalProperties", False)
            schema.setdefault("propertyNames", {"maxLength": MAX_NAME})
        for inner in schema.values():
            _close_keys(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _close_keys(inner)
