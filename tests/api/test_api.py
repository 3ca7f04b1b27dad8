"""The API over a real socket and a real store: what it says, to whom, and what it refuses."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from reconciler import asks
from reconciler.api.server import Server
from reconciler.api.state import DaemonState
from reconciler.model import ConfigurationError, Suspension
from reconciler.settings import Settings
from reconciler.settings import load as load_settings
from tests.api.conftest import Site
from tests.api.showcase import Showcase, busy_night

Start = Callable[..., Site]
TOKEN = "a-token-of-some-length"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the token is."""
    monkeypatch.setenv("FLEET_TOKEN", TOKEN)
    return "$env:FLEET_TOKEN"


# --- health -----------------------------------------------------------------------------------------


def test_it_lives_before_the_first_pass_and_says_that_nothing_is_known(site: Start) -> None:
    """Alive is not ready."""
    here = site()
    assert here.get("/healthz") == {"status": "ok"}
    found = here.get("/readyz", 503)
    assert (found["ready"], [row["code"] for row in found["reasons"]]) == (False, ["NoPass"])
    assert here.get("/api/status")["nodes"] == {}


def test_it_is_ready_after_a_pass_and_until_that_is_too_old(fleet: Showcase, site: Start) -> None:
    """Three intervals of five minutes."""
    here = site()
    fleet.run()
    assert here.get("/readyz") == {"ready": True, "reasons": []}
    fleet.age(timedelta(minutes=14))
    assert here.get("/readyz")["ready"]
    fleet.age(timedelta(minutes=2))
    assert [row["code"] for row in here.get("/readyz", 503)["reasons"]] == ["TooOld"]


def test_what_the_daemon_complains_of_makes_it_unready(fleet: Showcase, site: Start) -> None:
    """In its own words; so does its end."""
    fleet.run()
    here = site(DaemonState(problems=("the desired state is invalid: a.yml:3:4",), stopping=True))
    reasons = here.get("/readyz", 503)["reasons"]
    assert [row["message"] for row in reasons] == [
        "the desired state is invalid: a.yml:3:4",
        "the daemon is stopping",
    ]


# --- what it shows ----------------------------------------------------------------------------------


def test_the_status_says_what_drifts_since_when_and_what_was_repaired(fleet: Showcase, site: Start) -> None:
    """Matrix, differences, episodes, alerts, suspensions, times to repair: one document."""
    busy_night(fleet)
    now = datetime.now(UTC)
    found = site(DaemonState(running_since=now, next_pass=now, queue=2)).get("/api/status")
    assert len(found["nodes"]) == 8
    assert found["unknown_nodes"] == ["node-7"]
    rows = {row["issue_key"]: row for node in found["nodes"].values() for row in node["resources"]}
    assert len(rows) == 64
    watcher = rows["node-4/service/task-watcher"]
    assert (watcher["status"], watcher["message"]) == (
        "False",
        "it was started and is failed again: exit status 3",
    )
    assert watcher["changes"][0]["desired"] == "running"
    assert rows["node-6/tool/claude-glm"]["suspended"] == "disk is being replaced"
    episodes = {(row["resource"], row["state"]) for row in found["episodes"]}
    assert {
        ("node-4/service/task-watcher", "open"),
        ("node-4/service/task-watcher", "fixed"),
        ("node-3/wrapper/task-wrapper", "fixed"),
    } <= episodes
    took = {row["kind"]: row for row in found["repairs"]}
    assert took["service"]["count"] == 2
    assert took["service"]["open"] == 1
    assert took["service"]["longest_seconds"] == pytest.approx(610, abs=30)
    assert {row["reason"] for row in found["alerts"]} >= {"NodeUnknown", "NeedsPerson"}
    assert found["suspensions"][0]["owner"] == "dana@controller"
    assert (found["daemon"]["queue"], found["daemon"]["running_since"] is not None) == (2, True)


def test_an_unchanged_status_is_not_sent_twice(fleet: Showcase, site: Start) -> None:
    """Its revision is the content's; compressed for who takes that."""
    fleet.run()
    here = site()
    first = here.http.get("/api/status")
    revision = first.headers["etag"]
    assert first.headers["content-encoding"] == "gzip"
    assert f'"{first.json()["revision"]}"' == revision
    assert here.http.get("/api/status", headers={"if-none-match": revision}).status_code == 304
    with fleet.store.transaction():  # a write that says nothing new, as that of a lease
        fleet.store.db.execute("UPDATE conditions SET name = name")
    fleet.drift("node-1/tool/mm", "absent")
    fleet.stubborn("node-1/tool/mm", "npm failed")
    fleet.run()
    changed = here.http.get("/api/status", headers={"if-none-match": revision, "accept-encoding": "identity"})
    while changed.status_code == 304:  # within the moment in which nobody asks again
        time.sleep(0.1)
        changed = here.http.get(
            "/api/status", headers={"if-none-match": revision, "accept-encoding": "identity"}
        )
    assert "content-encoding" not in changed.headers
    assert changed.headers["etag"] != revision


def test_a_node_in_full(fleet: Showcase, site: Start) -> None:
    """With what it said, what was tried and what happened there; never a file's text."""
    busy_night(fleet)
    here = site()
    found = here.get("/api/nodes/node-4")
    (watcher,) = [row for row in found["resources"] if row["issue_key"] == "node-4/service/task-watcher"]
    assert watcher["observed"]["state"] == "failed"
    assert "text" not in json.dumps(watcher["observed"])
    assert watcher["attempts"] >= 1
    assert watcher["next_attempt"] > watcher["since"]
    assert {event["node"] for event in found["events"]} == {"node-4"}
    assert here.get("/api/nodes/node-99", 404)["error"]["message"].startswith("nothing is known of a node")


def test_events_by_every_filter(fleet: Showcase, site: Start) -> None:
    """Newest first."""
    busy_night(fleet)
    here = site()
    query = here.http.get
    rows = query("/api/events", params={"resource": "node-3/wrapper/task-wrapper"}).json()["events"]
    assert [row["status"] for row in rows][:2] == ["fixed", "fixing"]
    assert {r["node"] for r in query("/api/events?node=node-2").json()["events"]} == {"node-2"}
    assert {r["check_type"] for r in query("/api/events?kind=tool").json()["events"]} == {"C4"}
    assert {r["status"] for r in query("/api/events?status=rolled_back").json()["events"]} == {"rolled_back"}
    assert query("/api/events?since=1s").json()["events"] == []
    assert query("/api/events?search=exit").json()["events"]
    assert len(query("/api/events?limit=3").json()["events"]) == 3


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("nod=x", "nod: there is no such parameter (did you mean 'node'?)"),
        ("status=fixd", "status: there is no 'fixd' (did you mean 'fixed'?)"),
        ("kind=wraper", "kind: there is no 'wraper' (did you mean 'wrapper'?)"),
        ("limit=0", "limit: write a number from 1 to 500"),
        ("limit=９", "limit: write a number from 1 to 500"),  # noqa: RUF001
        ("since=yesterday", "since: 'yesterday' is neither a duration"),
        ("resource=node-1", "resource: 'node-1' is not NODE/KIND/NAME"),
        ("node=a&node=b", "node: give it once"),
        ('search="', "search: this is not understood"),
    ],
)
def test_a_wrong_parameter_is_named(fleet: Showcase, site: Start, query: str, said: str) -> None:
    """With the way out."""
    fleet.run()
    assert said in site().get(f"/api/events?{query}", 422)["error"]["message"]


def test_wrong_addresses_and_methods(site: Start) -> None:
    """Told apart, as JSON."""
    here = site()
    assert here.get("/api/nothing", 404)["error"]["message"] == "there is nothing at this address"
    assert "such parameter" in here.get("/readyz?x=1", 422)["error"]["message"]
    wrong = here.http.request("GET", "/api/reconcile")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"]
    for path in ("/static/..%2f..%2fpyproject.toml", "/static/nothing.js", "/static/index.html"):
        assert here.http.get(path).status_code == 404


def test_a_database_of_a_newer_version_is_said_and_healed(fleet: Showcase, site: Start) -> None:
    """503 and words, then the truth again: nothing is remembered of it."""
    fleet.run()
    here = site()
    fleet.store.db.conn.execute("PRAGMA user_version = 999")
    assert "newer version" in here.get("/api/status", 503)["error"]["message"]
    assert here.http.get("/metrics").status_code == 503
    assert here.get("/healthz") == {"status": "ok"}
    from reconciler.migrations import MIGRATIONS  # noqa: PLC0415

    fleet.store.db.conn.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    assert here.get("/api/status")["score"] == 100


def test_a_database_that_takes_the_place_of_another_is_read(
    fleet: Showcase, site: Start, tmp_path: Path
) -> None:
    """As after a restore."""
    fleet.run()
    here = site()
    assert here.get("/api/status")["score"] == 100
    other = Showcase(tmp_path / "other", ("solo",))
    other.run()
    other.close()
    for name in ("", "-wal", "-shm"):
        Path(f"{fleet.db}{name}").unlink(missing_ok=True)
    other.db.rename(fleet.db)
    deadline = time.monotonic() + 30
    while list(here.get("/api/status")["nodes"]) != ["solo"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- live -------------------------------------------------------------------------------------------


def test_a_stream_tells_of_changes_only(fleet: Showcase, site: Start) -> None:
    """A revision at once, another one after a pass that changed something, and an end with the server."""
    fleet.run()
    here = site()
    seen: list[str] = []
    ended = threading.Event()

    def listen() -> None:
        with httpx.stream("GET", here.url + "/api/stream", timeout=60, trust_env=False) as answer:
            seen.extend(
                json.loads(line[6:])["revision"] for line in _lines(answer) if line.startswith("data: ")
            )
        ended.set()

    def _lines(answer: httpx.Response):  # type: ignore[no-untyped-def] # noqa: ANN202
        for line in answer.iter_lines():
            if line.startswith("data: "):
                got.release()
            yield line

    got = threading.Semaphore(0)
    threading.Thread(target=listen, daemon=True).start()
    assert got.acquire(timeout=30)
    first = here.get("/api/status")["revision"]
    fleet.drift("node-1/tool/mm", "absent")
    fleet.run()
    assert got.acquire(timeout=30)
    here.server.stop(20)
    assert ended.wait(30), "an open page does not keep the daemon from ending"
    assert seen[0] == first
    assert seen[-1] != first


def test_streams_are_bounded(fleet: Showcase, site: Start) -> None:
    """So that nobody's forgotten tabs cost the fleet its daemon; one that is closed makes room."""
    fleet.run()
    here = site()
    assert here.server._streams is not None
    here.server._streams.most = 2
    with httpx.Client(base_url=here.url, timeout=30, trust_env=False) as client:
        with client.stream("GET", "/api/stream") as one, client.stream("GET", "/api/stream") as two:
            lines = (
                one.iter_lines(),
                two.iter_lines(),
            )  # one that nobody holds ends, and its connection with it
            assert [next(line) for line in lines] == ["retry: 2000"] * 2
            refused = client.get("/api/stream")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
        deadline = time.monotonic() + 30
        while here.server._streams.open:
            assert time.monotonic() < deadline
            time.sleep(0.1)


# --- asking for a pass ------------------------------------------------------------------------------


def test_a_request_goes_into_the_store_and_is_followed_to_its_end(
    fleet: Showcase, site: Start, token: str
) -> None:
    """202 with a number; then waiting, taken, done with the pass that was made for it."""
    fleet.run()
    here = site(token=token)
    answer = here.http.post("/api/reconcile", json={"target": "node-2/tool"}, headers=BEARER)
    assert answer.status_code == 202
    see = answer.json()["see"]
    (wanted,) = asks.waiting(fleet.store)
    assert wanted.target == "node-2/tool"
    assert here.get(see)["state"] == "waiting"
    asks.take(fleet.store, [wanted])
    assert here.get(see)["state"] == "taken"
    asks.done(fleet.store, [wanted], "run-7", 0)
    found = here.get(see)
    assert (found["state"], found["run_id"], found["exit_code"]) == ("done", "run-7", 0)
    assert here.http.post("/api/reconcile", headers=BEARER).status_code == 202, "without a target: everything"
    here.get("/api/requests/999", 404)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b'{"target": "node-22"}', 422, "did you mean 'node-2'?"),
        (b'{"target": "node-2/tol"}', 422, "did you mean 'node-2/tool'?"),
        (b'{"target": 3}', 422, "target: write NODE"),
        (b'{"node": "x"}', 422, "node: there is no such field"),
        (b"[1]", 422, "write an object"),
        (b"{", 422, "this is not JSON"),
        (b"[" * 4000, 422, "this is not JSON"),
        (b"x" * 5000, 413, "longer than 4096 bytes"),
    ],
)
def test_a_mistaken_request_changes_nothing(  # noqa: PLR0917 - a case is three of them
    fleet: Showcase, site: Start, token: str, body: bytes, code: int, said: str
) -> None:
    """And says what was meant, perhaps."""
    fleet.run()
    answer = site(token=token).http.post("/api/reconcile", content=body, headers=BEARER)
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (code, True), answer.text
    assert asks.waiting(fleet.store) == []


def test_without_a_token_nobody_asks_for_anything(fleet: Showcase, site: Start) -> None:
    """Reading on this machine is open; acting says how to set one."""
    answer = site().http.post("/api/reconcile", headers=BEARER)
    assert answer.status_code == 403
    assert "[http]" in answer.json()["error"]["message"]
    assert asks.waiting(fleet.store) == []


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong-token-of-a-length", f"Basic {TOKEN}", f"Bearer {TOKEN}x"]
)
def test_a_wrong_token_is_refused(fleet: Showcase, site: Start, token: str, given: str) -> None:
    """Whatever is wrong with it."""
    answer = site(token=token).http.post("/api/reconcile", headers={"authorization": given} if given else {})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert asks.waiting(fleet.store) == []


# --- who may come in --------------------------------------------------------------------------------


def test_bound_wider_reading_needs_the_token_too(fleet: Showcase, site: Start, token: str) -> None:
    """But the page, which says nothing, and whether it lives."""
    fleet.run()
    here = site(host="0.0.0.0", token=token)
    port = here.server.url.rpartition(":")[2]
    url = f"http://127.0.0.1:{port}"
    for path in ("/", "/healthz", "/static/app.js"):
        assert httpx.get(url + path, trust_env=False).status_code == 200
    for path in ("/readyz", "/metrics", "/api/status", "/api/events", "/api/nodes/node-1", "/api/stream"):
        assert httpx.get(url + path, trust_env=False).status_code == 401, path
    assert httpx.get(url + "/api/status", headers=BEARER, trust_env=False).status_code == 200
    assert httpx.get(url + "/metrics", headers=BEARER, trust_env=False).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:9180", "10.0.0.1", ""])
def test_a_name_that_was_made_to_mean_this_machine_is_refused(site: Start, host: str) -> None:
    """DNS rebinding: a page from elsewhere must not read the fleet through a browser here."""
    assert site().http.get("/api/status", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:9180", "127.0.0.1:1", "[::1]:9180"])
def test_names_of_this_machine_are_welcome(site: Start, host: str) -> None:
    """Also through a tunnel with another port."""
    assert site().http.get("/api/status", headers={"host": host}).status_code == 200


def test_every_answer_keeps_itself_to_itself(site: Start) -> None:
    """Headers of pages, data and refusals alike."""
    here = site()
    for path in ("/", "/static/style.css", "/api/status", "/metrics", "/nothing"):
        headers = here.http.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers


# --- starting and ending ----------------------------------------------------------------------------


def server(fleet: Showcase, **http: object) -> Server:
    """One that was not started."""
    return Server(Settings(db=fleet.db, http={"port": 0, **http}), DaemonState)  # type: ignore[arg-type]


def test_an_address_that_is_taken_is_a_clear_mistake(fleet: Showcase) -> None:
    """Not a daemon that nobody can see."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port}.*in use.*name another port"):
            server(fleet, port=port).start()
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1"):
        server(fleet, host="192.0.2.1", token=f"$file:{_token_file(fleet)}").start()


def _token_file(fleet: Showcase) -> Path:
    path = fleet.directory / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.mark.parametrize(
    ("http", "said"),
    [
        ({"host": "0.0.0.0"}, "can be reached from elsewhere, so a token is needed"),
        ({"token": "$env:NO_SUCH_TOKEN"}, "the environment has no NO_SUCH_TOKEN"),
        ({"token": "$file:/nowhere/token"}, "/nowhere/token cannot be read"),
        ({"token": "$env:SHORT_TOKEN"}, "shorter than 16 characters"),
    ],
)
def test_a_server_that_would_be_open_to_all_does_not_start(
    fleet: Showcase, monkeypatch: pytest.MonkeyPatch, http: dict[str, str], said: str
) -> None:
    """The message says what to do, and never the token."""
    monkeypatch.setenv("SHORT_TOKEN", "sesame")
    with pytest.raises(ConfigurationError, match=said) as raised:
        server(fleet, **http).start()
    assert "sesame" not in str(raised.value)


def test_it_ends_in_time_and_twice_without_harm(fleet: Showcase) -> None:
    """Also one that never began; its port is free again."""
    one = server(fleet)
    one.stop()
    one.start()
    url = one.url
    assert httpx.get(url + "/healthz", trust_env=False).status_code == 200
    began = time.monotonic()
    one.stop(20)
    assert time.monotonic() - began < 15
    one.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/healthz", trust_env=False)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("http")]


def test_mistakes_in_the_table_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key, place and way out; a token that stands in the file itself is not repeated."""
    monkeypatch.chdir(tmp_path)
    for text, said in (
        ("prot = 1", "unknown key 'prot'"),
        ("port = 70000", "port: Input should be less than or equal to 65535"),
        ('token = "hunter2"', "refer to it with $env:NAME or $file:/path"),
    ):
        Path("reconciler.toml").write_text(f"[http]\n{text}\n")
        with pytest.raises(ConfigurationError) as raised:
            load_settings()
        assert said in str(raised.value)
        assert "hunter2" not in str(raised.value)


def test_a_pass_pays_nothing_for_the_server() -> None:
    """Its libraries are imported where one is started: neither by the command nor by the daemon's module."""
    code = (
        "import sys, reconciler.cli, reconciler.daemon;"
        "print([name for name in ('starlette', 'uvicorn', 'prometheus_client') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_suspensions_that_were_made_since_the_last_pass_are_shown(fleet: Showcase, site: Start) -> None:
    """At once: somebody just did that and looks."""
    fleet.run()
    here = site()
    fleet.store.suspend("node-1", Suspension("moving it", "dana"))
    found = here.get("/api/status")
    assert all(row["suspended"] == "moving it" for row in found["nodes"]["node-1"]["resources"])
    packed = here.http.get("/api/status", headers={"accept-encoding": "gzip"})
    assert len(gzip.compress(packed.content)) < len(packed.content)
