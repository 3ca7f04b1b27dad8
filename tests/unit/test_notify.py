"""Delivery over real HTTP: what fails is kept and tried again, and nobody can hold up a pass."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reconciler import notify, settings
from reconciler.alerts import Alerts
from reconciler.model import Alert, ConfigurationError
from reconciler.notify import Notifier, address, pause, try_routes
from reconciler.sender import without_secrets
from reconciler.settings import Route
from reconciler.store import Store
from tests.unit.support import ROOT, reconcile

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
# More than a start of Apprise takes on a busy machine.
ENOUGH = 20.0


@dataclass
class Receiver:
    """An endpoint on this machine; ``answer`` is a status, or what it does instead."""

    answer: int | str = 200
    got: list[dict[str, Any]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = receiver.answer
                if answer == "hangs":
                    receiver.release.wait(60)
                    return
                if answer == "drips":
                    self._drip()
                    return
                receiver.got.append(body)
                if answer == "refuses one":
                    answer = 400 if "poison" in body["title"] else 200
                self.send_response(int(answer))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _drip(self) -> None:
                """A byte now and then: no timeout of a read ever ends this."""
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    while not receiver.release.wait(0.2):
                        self.wfile.write(b".")
                except OSError:
                    return

            def log_message(self, *_args: object) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """As Apprise wants it."""
        return f"json://127.0.0.1:{self.server.server_port}/"

    def route(self, name: str = "ops", **given: Any) -> Route:
        """A route that ends here."""
        return Route(name=name, url=self.url, **given)

    def close(self) -> None:
        """Let go of everybody who waits."""
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """An endpoint that answers 200."""
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def second() -> Iterator[Receiver]:
    """Another one."""
    found = Receiver()
    yield found
    found.close()


def raised(
    store: Store, *routes: Route, keys: tuple[str, ...] = ("node-1/tool/claude",), severity: int = 3
) -> Alerts:
    """Alerts that wait to be told."""
    alerts = Alerts(store, None, routes)
    for key in keys:
        alert = Alert(
            key, "RepairFailed", severity, f"npm said no to {key.rpartition('/')[2]}", "look at npm's log"
        )
        alerts.raise_(alert, {"run": "r1"}, NOW)
    alerts.settle(NOW)
    return alerts


def row(store: Store, number: int = 1) -> dict[str, Any]:
    """One delivery."""
    return next(store.db.query("SELECT * FROM deliveries WHERE id = ?", [number]))


def refused_port() -> int:
    """Nobody listens there."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- sending ----------------------------------------------------------------------------------------


def test_notification_arrives_once(store: Store, receiver: Receiver) -> None:
    """With its title, its text and how bad it is; a second delivery finds nothing to do."""
    route = receiver.route()
    raised(store, route)
    for _ in range(2):
        Notifier(store, [route]).deliver(NOW, ENOUGH)
    [message] = receiver.got
    assert message["title"] == "[P1] node-1: tool/claude: npm said no to claude"
    assert message["message"].startswith(
        "What: tool/claude RepairFailed, since 2026-01-02 03:04 UTC\nWhy: npm said"
    )
    assert message["type"] == "warning"
    assert (row(store)["status"], row(store)["attempts"], row(store)["ended"]) == (
        "sent",
        1,
        "2026-01-02T03:04:05+00:00",
    )


def test_text_arrives_as_it_is(store: Store, receiver: Receiver) -> None:
    """No markup, no escapes, no pictures are read into what a node said."""
    route = receiver.route()
    alerts = Alerts(store, None, [route])
    detail = r"C:\new :smile: <b>*bold*</b> {{ x }} &amp; @all é中"
    alerts.raise_(Alert("fleet", "Strange", 5, detail), {}, NOW)
    alerts.settle(NOW)
    Notifier(store, [route]).deliver(NOW, ENOUGH)
    assert f"Why: {detail}\n" in receiver.got[0]["message"]
    assert receiver.got[0]["type"] == "failure"
    assert receiver.got[0]["attachments"] == []


def test_end_arrives_after_its_beginning(store: Store, receiver: Receiver) -> None:
    """Also where the beginning could not be told for a while: one never comes without the other."""
    route = receiver.route()
    receiver.answer = 500
    alerts = raised(store, route)
    notifier = Notifier(store, [route])
    notifier.deliver(NOW, ENOUGH)
    alerts.resolve("node-1/tool/claude", NOW, "fixed by hand")
    alerts.settle(NOW)
    notifier.deliver(NOW, ENOUGH)
    assert len(receiver.got) == 1
    receiver.answer = 200
    notifier.deliver(NOW + HOUR, ENOUGH)
    notifier.deliver(NOW + HOUR, ENOUGH)
    assert [message["title"][:15] for message in receiver.got[1:]] == ["[P1] node-1: to", "[P1 resolved] n"]
    assert receiver.got[-1]["type"] == "success"


# --- failures ---------------------------------------------------------------------------------------


def test_failure_is_kept_with_its_reason_and_tried_again_later(store: Store, receiver: Receiver) -> None:
    """Not before its time; then it arrives."""
    route = receiver.route()
    receiver.answer = 500
    raised(store, route)
    notifier = Notifier(store, [route])
    notifier.deliver(NOW, ENOUGH)
    found = row(store)
    assert (found["status"], found["attempts"], found["error"]) == ("due", 1, "it answered HTTP 500")
    assert NOW + 45 * SECOND <= datetime.fromisoformat(found["next_try"]) <= NOW + MINUTE
    notifier.deliver(NOW + 30 * SECOND, ENOUGH)
    assert len(receiver.got) == 1
    receiver.answer = 200
    notifier.deliver(NOW + 2 * MINUTE, ENOUGH)
    assert (row(store)["status"], row(store)["attempts"], row(store)["error"]) == ("sent", 2, "")


def test_nobody_listens(store: Store) -> None:
    """It says so without the address."""
    port = refused_port()
    route = Route(name="ops", url=f"json://127.0.0.1:{port}/hook-1234")
    raised(store, route)
    Notifier(store, [route]).deliver(NOW, ENOUGH)
    assert "onnection error" in row(store)["error"]
    assert "127.0.0.1" not in row(store)["error"]


@pytest.mark.parametrize("way", ["hangs", "drips"])
def test_endpoint_that_never_answers_holds_nobody(
    store: Store, receiver: Receiver, second: Receiver, way: str
) -> None:
    """The deadline is kept, the other route has its message, and once the endpoint is well it has its own."""
    receiver.answer = way
    routes = [receiver.route("slow"), second.route("quick")]
    raised(store, *routes)
    notifier = Notifier(store, routes)
    began = time.monotonic()
    notifier.deliver(NOW, 4.0)
    assert time.monotonic() - began < 5.5
    assert len(second.got) == 1
    found = dict(store.db.execute("SELECT route, status FROM deliveries").fetchall())
    assert found == {"slow": "due", "quick": "sent"}
    assert row(store)["error"]
    receiver.answer = 200
    notifier.deliver(NOW + HOUR, ENOUGH)
    assert len(receiver.got) == 1


def test_failing_route_is_not_hammered(store: Store, receiver: Receiver) -> None:
    """One message finds out; the others wait with it, and follow when it works."""
    route = receiver.route()
    receiver.answer = 500
    raised(store, route, keys=tuple(f"node-1/tool/t{letter}" for letter in "abcde"))
    notifier = Notifier(store, [route])
    notifier.deliver(NOW, ENOUGH)
    assert len(receiver.got) == 1
    assert [row(store, number)["attempts"] for number in range(1, 6)] == [1, 0, 0, 0, 0]
    assert row(store, 2)["error"] == "it waits: the route failed with another notification"
    assert {row(store, number)["next_try"] for number in range(1, 6)} == {row(store)["next_try"]}
    receiver.answer = 200
    notifier.deliver(NOW + MINUTE, ENOUGH)
    assert len(receiver.got) == 6


def test_message_that_an_endpoint_refuses_does_not_block_the_others(store: Store, receiver: Receiver) -> None:
    """It goes last."""
    route = receiver.route()
    receiver.answer = "refuses one"
    raised(store, route, keys=("node-1/tool/poison", "node-1/tool/tb", "node-1/tool/tc"))
    notifier = Notifier(store, [route])
    for minutes in range(0, 10, 2):
        notifier.deliver(NOW + minutes * MINUTE, ENOUGH)
    assert [row(store, number)["status"] for number in (1, 2, 3)] == ["due", "sent", "sent"]
    assert row(store)["error"] == "it answered HTTP 400"


def test_pauses_grow_to_an_hour() -> None:
    """With some chance in them."""
    for attempts, longest in ((1, 60), (2, 120), (5, 960), (7, 3600), (500, 3600)):
        found = [pause(attempts).total_seconds() for _ in range(50)]
        assert 0.75 * longest <= min(found) < max(found) <= longest


def test_giving_up_takes_seven_days_and_is_told(store: Store, receiver: Receiver) -> None:
    """Never before; then it is no longer tried, and shown as given up."""
    route = receiver.route()
    receiver.answer = 500
    alerts = raised(store, route)
    notifier = Notifier(store, [route])
    for later in (timedelta(), DAY, 7 * DAY - SECOND):
        notifier.deliver(NOW + later, ENOUGH)
        assert row(store)["status"] == "due"
    notifier.deliver(NOW + 7 * DAY + HOUR, ENOUGH)
    assert row(store)["status"] == "given_up"
    notifier.deliver(NOW + 9 * DAY, ENOUGH)
    assert len(receiver.got) == 4
    [told] = alerts.undelivered()
    assert (told["status"], told["attempts"], told["error"]) == ("given_up", 4, "it answered HTTP 500")


def test_process_that_dies_is_a_failure_like_any_other(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is not lost."""
    route = receiver.route()
    raised(store, route)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/bin/false")
        Notifier(store, [route]).deliver(NOW, ENOUGH)
    assert row(store)["error"] == "the process that sends did not get as far as sending"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/no/such/python")
        Notifier(store, [route]).deliver(NOW + 2 * MINUTE, ENOUGH)
    Notifier(store, [route]).deliver(NOW + HOUR, ENOUGH)
    assert row(store)["status"] == "sent"


def test_process_that_was_killed_between_leaves_the_message_due(store: Store, receiver: Receiver) -> None:
    """Nobody else takes it meanwhile; it is due again soon."""
    route = receiver.route()
    raised(store, route)
    notifier = Notifier(store, [route])

    def killed(*_args: object) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt
        yield

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(notify, "conversation", killed)
        with pytest.raises(KeyboardInterrupt):
            notifier.deliver(NOW, 10)
    Notifier(store, [route]).deliver(NOW, ENOUGH)
    assert receiver.got == []
    Notifier(store, [route]).deliver(NOW + 2 * MINUTE, ENOUGH)
    assert len(receiver.got) == 1


def test_message_that_another_process_took_is_not_sent_again(store: Store, receiver: Receiver) -> None:
    """Between reading what is due and taking it."""
    route = receiver.route()
    raised(store, route)
    first, other = Notifier(store, [route]), Notifier(store, [route])
    due = first._due(NOW)
    assert other._claimed(due[0], NOW, 10)
    assert not first._claimed(due[0], NOW, 10)


@pytest.mark.parametrize("table", ["deliveries", "tellings"])
def test_delivery_never_raises(
    store: Store, receiver: Receiver, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is broken; it says so in the log."""
    route = receiver.route()
    raised(store, route)
    store.db.execute(f"DROP TABLE {table}")
    Notifier(store, [route]).deliver(NOW, ENOUGH)
    assert "could not be delivered" in caplog.text


# --- addresses --------------------------------------------------------------------------------------


def test_address_stands_in_the_environment_or_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blanks around it do not count."""
    path = tmp_path / "address"
    path.write_text("slack://token\n")
    monkeypatch.setenv("ADDRESS", " slack://other ")
    assert address(Route(name="a", url=f"$file:{path}")) == "slack://token"
    assert address(Route(name="a", url="$env:ADDRESS")) == "slack://other"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("$env:MISSING", "the environment has no MISSING"),
        ("$file:/no/such/file", "/no/such/file cannot be read: No such file or directory"),
        ("$file:/tmp", "/tmp cannot be read: Is a directory"),
        ("$env:STRANGE", "Apprise does not understand the address of this route (slak://…)"),
        ("$env:SHORT", "Apprise does not understand the address of this route (?://…)"),
    ],
)
def test_address_that_cannot_be_used_is_a_failure_that_names_no_secret(
    store: Store, monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    """The configuration may be mended; until then it waits."""
    monkeypatch.setenv("STRANGE", "slak://hidden-token")
    monkeypatch.setenv("SHORT", "hidden-token")
    route = Route(name="ops", url=url)
    raised(store, route, keys=("node-1/tool/ta", "node-1/tool/tb"))
    Notifier(store, [route]).deliver(NOW, ENOUGH)
    assert (row(store)["error"], row(store)["status"]) == (reason, "due")


def test_route_that_is_gone_is_told_and_given_up_in_the_end(store: Store, receiver: Receiver) -> None:
    """Not silently."""
    alerts = raised(store, receiver.route("old"))
    Notifier(store, []).deliver(NOW, ENOUGH)
    assert alerts.undelivered()[0]["error"] == "there is no route of this name in the settings"
    Notifier(store, [receiver.route("new")]).deliver(NOW + 8 * DAY, ENOUGH)
    assert alerts.undelivered()[0]["status"] == "given_up"
    assert receiver.got == []


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach json://user:pass1234@host.example/T0KEN99?key=abcd1234",
        "pass1234 was refused by host.example",
        "POST /T0KEN99 for user with abcd1234",
    ],
)
def test_no_part_of_an_address_is_shown(text: str) -> None:
    """Whatever the library says of it."""
    shown = without_secrets(text, "json://user:pass1234@host.example/T0KEN99?key=abcd1234")
    assert not any(part in shown for part in ("user", "pass1234", "T0KEN99", "abcd1234", "host.example"))


# --- what Apprise does by itself --------------------------------------------------------------------

WATCHED = """
import sys
seen = []
def hook(name, args):
    if name in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        if (name, args[-1]) != ("socket.bind", ("::1", 0)):  # asks the system whether it has IPv6
            seen.append((name, args[-1]))
    if name == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append((name, args[0]))
sys.addaudithook(hook)
import apprise
from reconciler.sender import _asset
box = apprise.Apprise(asset=_asset())
assert box.add("slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#ops")
assert box.add("mailto://user:secret@example.com")
assert box.add("json://127.0.0.1/")
print(seen)
"""


def test_apprise_talks_to_nobody_and_writes_nothing_until_it_sends() -> None:
    """Neither when it is imported nor when it is told of an address."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_apprise_is_not_loaded_by_the_reconciler(store: Store, receiver: Receiver) -> None:
    """Not even where it sends: that is another process."""
    route = receiver.route()
    raised(store, route)
    code = (
        "import sys, reconciler.cli, reconciler.notify, reconciler.alerts; sys.exit('apprise' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=False).returncode == 0


def test_nothing_is_started_while_there_is_nothing_to_send(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With routes and without."""

    def started(*_args: object, **_given: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    Notifier(store, []).deliver(NOW, ENOUGH)
    Notifier(store, [receiver.route()]).deliver(NOW, ENOUGH)


def test_sender_ends_with_whoever_started_it() -> None:
    """It never goes on sending on behalf of a process that was killed."""
    hanging = Receiver("hangs")
    message = {"id": 1, "url": hanging.url, "level": "P0", "what": "opened", "title": "t", "body": "b"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "reconciler.sender"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"timeout": 60, "messages": [message]}).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["state"] == "started"
        process.stdin.close()
        assert process.wait(timeout=20) == 1
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
        hanging.close()


# --- settings ---------------------------------------------------------------------------------------


def configure(text: str) -> settings.Settings:
    """With this reconciler.toml."""
    Path("reconciler.toml").write_text(text)
    return settings.load()


def test_routes_and_directory_come_from_the_settings(monkeypatch: pytest.MonkeyPatch, account: Path) -> None:
    """The file, or the environment."""
    found = configure(
        'db = "x/r.db"\n[[notify]]\nname = "ops"\nurl = "$env:OPS"\nlevels = ["P0", "P1"]\nresolved = false\n'
    )
    assert found.notify == (Route(name="ops", url="$env:OPS", levels=("P0", "P1"), resolved=False),)
    assert found.alert_dir == Path("x/alerts")
    monkeypatch.setenv("RECONCILER_ALERT_DIR", "~/mine")
    monkeypatch.setenv("RECONCILER_NOTIFY", '[{"name": "b", "url": "$file:/run/secrets/b"}]')
    assert settings.load().alert_dir == account / "mine"
    assert [route.name for route in settings.load().notify] == ["b"]


SECRET_URL = "slack://T1JJ3T3L2/A1BRTD4JD/hidden"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f'[[notify]]\nname = "a"\nurl = "{SECRET_URL}"',
            "[[notify]] number 1: url: an Apprise URL is a secret: refer to it with $env:NAME",
        ),
        ('[[notify]]\nname = "a"\nurl = "json://user:hidden@127.0.0.1/"', "an Apprise URL is a secret"),
        ('[[notify]]\nname = "a"\nurl = "json://127.0.0.1/?token=hidden"', "an Apprise URL is a secret"),
        ('[[notify]]\nname = "a"\nurl = "json://127.0.0.1.example/hidden"', "an Apprise URL is a secret"),
        ('[[notify]]\nname = "a"\nurl = "$file:relative"', "an Apprise URL is a secret"),
        (
            '[[notify]]\nname = "a"\nurl = "$env:A"\n[[notify]]\nname = "b"\nurl = "$env:B"\nlevels = ["P7"]',
            "[[notify]] number 2: levels.0: ",
        ),
        ('[[notify]]\nname = "a"\nurl = "$env:A"\nlevels = []', "[[notify]] number 1: levels: "),
        ('[[notify]]\nname = "a b"\nurl = "$env:A"', "[[notify]] number 1: name: "),
        ('[[notify]]\nurl = "$env:A"', "[[notify]] number 1: name: Field required"),
        (
            f'[[notify]]\nname = "a"\nulr = "{SECRET_URL}"\nurl = "$env:A"',
            "[[notify]] number 1: unknown key 'ulr'",
        ),
        (
            '[[notify]]\nname = "a"\nurl = "$env:A"\n[[notify]]\nname = "a"\nurl = "$env:B"',
            "2 routes are called a",
        ),
        (f'notify = "{SECRET_URL}"', "[[notify]]: "),
    ],
)
def test_mistakes_in_routes_name_the_place_and_repeat_no_secret(text: str, reason: str) -> None:
    """With the way out."""
    with pytest.raises(ConfigurationError) as caught:
        configure(text)
    assert reason in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert all(problem.hint for problem in caught.value.problems)


def test_environment_that_is_no_list_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what it is."""
    monkeypatch.setenv("RECONCILER_NOTIFY", SECRET_URL)
    with pytest.raises(ConfigurationError) as caught:
        settings.load()
    assert "notify" in str(caught.value)
    assert "TOML" not in str(caught.value)
    assert "hidden" not in str(caught.value)


# --- commands ---------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> str:
    """A file with alerts of three levels, one of them over, and a notification that did not arrive."""
    path = tmp_path / "r.db"
    store = Store(path)
    alerts = Alerts(store, tmp_path / "alerts", [Route(name="ops", url="$env:NOWHERE")])
    for key, severity, detail in (
        ("node-1/tool/claude", 3, "npm said no"),
        ("node-2/ssh/fleet", 5, "the key was [refused]"),
        ("node-3", 2, "it is slow\x1b[31m"),
        ("node-3/tool/gone", 3, "it was missing"),
    ):
        alerts.raise_(Alert(key, "RepairFailed", severity, detail, "look there"), {}, NOW)
    alerts.resolve("node-3/tool/gone", NOW + HOUR, "it is as desired again")
    alerts.settle(NOW)
    Notifier(store, alerts.routes).deliver(NOW, ENOUGH)
    store.close()
    return str(path)


def keys(database: str, *words: str) -> list[str]:
    """Of the alerts that the command lists."""
    said = reconcile("alerts", *words, "--db", database, "-o", "json")
    assert said.code == 0
    return [row["key"] for row in said.json()["alerts"]]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], ["node-2/ssh/fleet", "node-1/tool/claude", "node-3"]),
        (["--all"], ["node-2/ssh/fleet", "node-1/tool/claude", "node-3", "node-3/tool/gone"]),
        (["-a", "--since", "2026-01-02T04:00:00+00:00"], ["node-3/tool/gone"]),
        (["--since", "1h"], []),
        (["--node", "node-3"], ["node-3"]),
        (["--kind", "tool"], ["node-1/tool/claude"]),
        (["--level", "p0,P2"], ["node-2/ssh/fleet", "node-3"]),
        (["-n", "1"], ["node-2/ssh/fleet"]),
        (["REFUSED key"], ["node-2/ssh/fleet"]),
        (["100%"], []),
        (["repairfailed"], ["node-2/ssh/fleet", "node-1/tool/claude", "node-3"]),
    ],
)
def test_alerts_are_listed_worst_first_and_filtered(
    database: str, words: list[str], wanted: list[str]
) -> None:
    """Every option."""
    assert keys(database, *words) == wanted


def test_alerts_are_shown_with_advice_and_with_what_was_not_delivered(database: str) -> None:
    """Text that a node sent does not reach the terminal as it is."""
    said = reconcile("alerts", "--all", "--db", database)
    assert said.code == 0
    first = said.out.splitlines()[1]
    assert first.split()[:5] == ["P0", "2026-01-02", "03:04", "node-2/ssh/fleet", "RepairFailed"]
    assert first.rstrip().endswith("the key was [refused]")
    assert "→ look there" in said.out
    assert "resolved 2026-01-02 04:04: it is as desired again" in said.out
    assert (
        "not delivered on ops: the environment has no NOWHERE (tried once, next try 2026-01-02 03:0"
        in said.out
    )
    assert "the route failed with another notification (not tried yet, next try" in said.out
    assert "\x1b" not in said.out


def test_no_alert_is_said_as_well(tmp_path: Path) -> None:
    """Rather than nothing."""
    Store(tmp_path / "r.db").close()
    said = reconcile("alerts", "--db", str(tmp_path / "r.db"))
    assert (said.code, said.out) == (0, "No alert matches.\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--level", "P7"], "--level is one or more of P0, P1, P2, not 'P7'"),
        (["--level", ","], "--level is one or more of"),
        (["--since", "yesterday"], "neither a duration"),
    ],
)
def test_filters_that_make_no_sense_are_usage_errors(database: str, words: list[str], reason: str) -> None:
    """Exit code 1, and why."""
    said = reconcile("alerts", *words, "--db", database)
    assert said.code == 1
    assert reason in said.err


def test_routes_can_be_tried(receiver: Receiver, second: Receiver) -> None:
    """Each says whether it works; 3 where one does not."""
    second.answer = 500
    configure(
        f'[[notify]]\nname = "good"\nurl = "{receiver.url}"\n'
        f'[[notify]]\nname = "bad"\nurl = "{second.url}"\n[[notify]]\nname = "unset"\nurl = "$env:UNSET"\n'
    )
    said = reconcile("notify-test")
    assert said.code == 3
    assert said.out.splitlines() == [
        f"good ({receiver.url}): sent",
        f"bad ({second.url}): failed: it answered HTTP 500",
        "unset ($env:UNSET): failed: the environment has no UNSET",
    ]
    assert receiver.got[0]["title"] == "[test] reconcile: notifications arrive"
    second.answer = 200
    os.environ["UNSET"] = receiver.url
    try:
        said = reconcile("notify-test", "-o", "json")
    finally:
        del os.environ["UNSET"]
    assert (said.code, [route["error"] for route in said.json()]) == (0, ["", "", ""])


def test_trying_routes_ends_in_time(receiver: Receiver) -> None:
    """Also where one hangs."""
    receiver.answer = "drips"
    began = time.monotonic()
    assert try_routes([receiver.route()], 3.0)["ops"]
    assert time.monotonic() - began < 4.5


def test_trying_without_routes_says_how_to_add_one() -> None:
    """A configuration error."""
    said = reconcile("notify-test")
    assert said.code == 1
    assert "no route is configured" in said.err
    assert "add a [[notify]] table to reconciler.toml" in said.err
