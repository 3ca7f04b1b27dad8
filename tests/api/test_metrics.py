"""Metrics: what they say, that they only ever grow, and that the real Prometheus takes them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from reconciler.api.state import DaemonState
from reconciler.kinds.registry import kinds
from reconciler.model import Sample
from reconciler.store import MIGRATIONS, Store
from tests.api.conftest import Site
from tests.api.showcase import Showcase, busy_night

Start = Callable[..., Site]


def missing(program: str) -> None:
    """Skip where Debian's package is not installed; an automatic run installs it, and must not be green for nothing."""
    if shutil.which(program):
        return
    reason = f"needs {program}: apt-get install prometheus"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def scraped(site: Site) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by name and labels."""
    answer = site.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: Mapping[Any, float], name: str, **labels: str) -> float:
    """One sample."""
    return found[f"reconciler_{name}", frozenset(labels.items())]


def test_metrics_of_a_busy_night(fleet: Showcase, site: Start) -> None:
    """Passes by result, drift by kind and node, attempts, unknown nodes, time to repair, alerts, conditions."""
    busy_night(fleet)
    now = datetime.now(UTC)
    state = DaemonState(now, now, 3, "4f2a", ("trouble",), 2, {"busy": 4, "as_desired": 99})
    found = scraped(site(state))
    assert value(found, "reconcile_total", result="as_desired") == 9
    assert value(found, "reconcile_total", result="not_fixed") == 11
    assert value(found, "reconcile_total", result="busy") == 4
    assert value(found, "reconcile_errors_total") == 2
    assert value(found, "reconcile_time_seconds_count") == 20
    assert value(found, "reconcile_time_seconds_bucket", le="+Inf") == 20
    assert (value(found, "active_passes"), value(found, "queue_depth")) == (1, 3)
    assert value(found, "drift", kind="service", node="node-4") == 1
    assert value(found, "drift", kind="service", node="node-3") == 0
    assert value(found, "attempts_total", kind="service", status="fixed") == 2
    assert value(found, "attempts_total", kind="service", status="rolled_back") == 5
    assert value(found, "unknown_nodes") == 1
    assert value(found, "nodes") == 8
    assert value(found, "suspended") == 3
    assert value(found, "condition", node="node-7", kind="tool", status="Unknown") == 3
    assert value(found, "condition", node="node-1", kind="wrapper", status="True") == 2
    assert value(found, "repair_seconds_count", kind="service") == 2
    assert value(found, "alerts", level="P1") == 3
    assert value(found, "build_info", version="0.1.0", revision="4f2a") == 1
    assert now.timestamp() - 86400 < value(found, "last_success_timestamp_seconds") < now.timestamp()


def test_repairs_are_sorted_into_buckets_by_how_long_they_took(fleet: Showcase, site: Start) -> None:
    """From the detection on, however many attempts it took; a recovery without us counts as well."""
    from reconciler.model import Event, ResourceId, Status  # noqa: PLC0415

    rid, began = ResourceId("node-1", "tool", "a/b"), datetime.now(UTC)
    steps = (
        ("detected", 0, 0),
        ("fixing", 1, 1),
        ("rolled_back", 2, 1),
        ("fixing", 200, 2),
        ("fixed", 250, 2),
        ("detected", 300, 0),
        ("fixed", 304, 0),
        ("fixed", 400, 1),
    )
    for status, after, attempts in steps:
        moment = began + timedelta(seconds=after)
        fleet.store.record([Event(rid, "C4", Status(status), 2, {}, attempts, moment)])
    found = scraped(site())
    buckets = {
        bound: value(found, "repair_seconds_bucket", kind="tool", le=bound)
        for bound in ("5.0", "60.0", "300.0", "+Inf")
    }
    assert buckets == {"5.0": 1, "60.0": 1, "300.0": 2, "+Inf": 2}
    assert value(found, "repair_seconds_sum", kind="tool") == pytest.approx(254)
    assert value(found, "attempts_total", kind="tool", status="fixed") == 2


def test_no_time_that_stands_there_keeps_anything_from_being_recorded(fleet: Showcase) -> None:
    """A clock that was set back, or a text that is no time: the event counts, the sum does not shrink."""
    row = {
        "check_type": "C4",
        "issue_key": "node-1/tool/mm",
        "severity": 2,
        "fix_attempts": 1,
        "details": "{}",
        "node": "node-1",
    }
    events = fleet.store.db.table("guardian_events")
    for detected, fixed in (
        ("2026-05-04T12:00:00+00:00", "2026-05-04T11:00:00+00:00"),
        ("some time", "later"),
    ):
        events.insert_all(
            [
                {**row, "timestamp": detected, "status": "detected"},
                {**row, "timestamp": fixed, "status": "fixed"},
            ]
        )
    sums = {row[0]: row[3] for row in fleet.store.db.execute("SELECT * FROM totals").fetchall()}
    assert sums == {"attempts": 2, "repair_seconds_bucket": 1, "repair_seconds_sum": 0}


def test_counters_only_grow_whatever_is_pruned(fleet: Showcase, site: Start) -> None:
    """Rows go, sums stay; what another process writes is counted, too."""
    busy_night(fleet)
    here = site()
    before = scraped(here)
    with fleet.store.transaction():
        fleet.store.db.execute("DELETE FROM guardian_events")
        fleet.store.db.execute("DELETE FROM passes")
    fleet.run()
    after = scraped(here)
    grown = [key for key in before if key[0].endswith(("_total", "_count", "_sum", "_bucket"))]
    assert len(grown) > 30
    assert [key for key in grown if after[key] < before[key]] == []
    assert value(after, "reconcile_time_seconds_count") == value(before, "reconcile_time_seconds_count") + 1


def test_what_was_recorded_before_there_were_sums_is_counted(tmp_path: Path) -> None:
    """A database of the version before gets the sums of what it holds, as if it had always kept them."""
    made = Showcase(tmp_path / "fleet", ("controller", *(f"node-{n}" for n in range(1, 8))))
    busy_night(made)

    def sums() -> list[tuple[Any, ...]]:
        rows = made.store.db.execute("SELECT * FROM totals WHERE name != 'last_success' ORDER BY 1, 2, 3")
        return [(name, kind, label, round(number, 1)) for name, kind, label, number in rows.fetchall()]

    kept = [row for row in sums() if not row[0].startswith("repair_seconds")]
    before = [migration.__name__ for migration in MIGRATIONS].index("_m006_totals")
    for table in ("passes", "guardian_events"):
        made.store.db.execute(f"DROP TRIGGER totals_of_{table}")
    made.store.db.execute("DROP TABLE totals")
    made.store.db.conn.execute(f"PRAGMA user_version = {before}")
    made.store.close()
    made.store = Store(made.db)
    again = sums()
    assert [row for row in again if not row[0].startswith("repair_seconds")] == kept
    # Their times were moved into the past since: now the sums are of the times that stand there.
    assert sum(number for name, _k, _l, number in again if name == "repair_seconds_bucket") == 9
    assert ("repair_seconds_bucket", "service", "900.0", 1) in again
    made.run()
    assert sums() != again, "and goes on counting"
    made.close()


def test_kinds_add_their_own(fleet: Showcase, site: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from facts, without anybody else knowing the kind; one that fails costs only its own."""

    def samples(_kind: Any, name: str, node: str, observed: Mapping[str, Any]) -> Iterator[Sample]:
        if node == "node-2":
            raise KeyError("facts of another version")
        yield Sample(
            "agent_tool_found", {"node": node, "tool": name}, float(bool(observed["path"])), "Found."
        )

    monkeypatch.setattr(kinds()["tool"], "samples", classmethod(samples))
    fleet.run()
    found = scraped(site())
    mine = {
        dict(labels)["node"]: number for (name, labels), number in found.items() if name == "agent_tool_found"
    }
    assert mine == dict.fromkeys(("controller", *(f"node-{n}" for n in (1, 3, 4, 5, 6, 7))), 1.0)
    assert value(found, "nodes") == 8


def test_promtool_has_nothing_to_say(fleet: Showcase, site: Start) -> None:
    """Names, units, types and help are as Prometheus wants them: before the first pass and after a busy night."""
    missing("promtool")
    here = site(DaemonState(passes={"busy": 1}, next_pass=datetime.now(UTC)))
    for _ in range(2):
        text = here.http.get("/metrics").content
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        busy_night(fleet)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Call it with a configuration for a running Prometheus; it gives its address."""
    missing("prometheus")
    running: list[subprocess.Popen[bytes]] = []

    def start(config: str) -> str:
        (tmp_path / "prometheus.yml").write_text(config)
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        argv = [
            "prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with (tmp_path / "prometheus.log").open("wb") as log:
            running.append(subprocess.Popen(argv, stdout=log, stderr=log, cwd=tmp_path))
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.terminate()
        process.wait(60)


def asked(url: str, query: str) -> list[Any]:
    """What a query finds; nothing while Prometheus is not ready."""
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10, trust_env=False)
        return list(answer.json()["data"]["result"]) if answer.status_code == 200 else []
    except (httpx.HTTPError, json.JSONDecodeError):
        return []


def documented(target: str, token_file: Path) -> str:
    """The scrape configuration of docs/http.md, for this target."""
    text = (Path(__file__).parents[2] / "docs/http.md").read_text()
    block = text.split("<!-- scrape -->")[1].split("```")[1].removeprefix("yaml\n")
    assert "127.0.0.1:9180" in block
    block = block.replace("127.0.0.1:9180", target).replace(
        "/etc/prometheus/reconciler.token", str(token_file)
    )
    return "global: {scrape_interval: 1s}\n" + block.replace("scrape_interval: 30s", "scrape_interval: 1s")


def test_prometheus_itself_scrapes_it(
    fleet: Showcase,
    site: Start,
    prometheus: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the documented configuration, token and all; what it stored is what the fleet is."""
    busy_night(fleet)
    monkeypatch.setenv("FLEET_TOKEN", "a-token-of-some-length")
    (tmp_path / "token").write_text("a-token-of-some-length")
    here = site(host="0.0.0.0", token="$env:FLEET_TOKEN")
    url = prometheus(documented(f"127.0.0.1:{here.url.rpartition(':')[2]}", tmp_path / "token"))
    deadline = time.monotonic() + 90
    while not asked(url, "up == 1"):
        assert time.monotonic() < deadline, (tmp_path / "prometheus.log").read_text()[-2000:]
        time.sleep(0.2)
    (drift,) = asked(url, "sum(reconciler_drift)")
    assert drift["value"][1] == "3"
    (unknown,) = asked(url, "reconciler_unknown_nodes")
    assert unknown["value"][1] == "1"
    (worst,) = asked(url, "topk(1, reconciler_drift{kind='service'})")
    assert worst["metric"]["node"] == "node-4"
    (slow,) = asked(
        url, "histogram_quantile(0.5, sum by (le) (reconciler_repair_seconds_bucket{kind='service'}))"
    )
    assert 0 <= float(slow["value"][1]) <= 900
    assert float(asked(url, "scrape_duration_seconds")[0]["value"][1]) < 5
