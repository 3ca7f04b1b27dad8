"""What leaves for an analyzer: a planted secret never does, and what is harmless stays readable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reconciler.analyze import Analyzer
from reconciler.analyze.redact import LONGEST, entropy, is_secret_name, redact
from reconciler.model import SECRET, Change
from reconciler.settings import AnalysisSettings
from tests.unit.analyzers import ANSWER, Loopback, completion, executable, question, says

PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\nAAAA\n-----END OPENSSH PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("failed with sk-live-1234567890", "sk-live-1234567890"),
        ("sk-ant-api03-abcDEF_123-x", "abcDEF"),
        ("clone with ghp_0123456789abcdefABCD", "ghp_0123456789"),
        ("github_pat_11ABCDEFG0123456789", "11ABCDEFG"),
        ("AKIAIOSFODNN7EXAMPLE is unknown", "IOSFODNN7"),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI"),
        (f"bad token {JWT}", "dozjgNryP4J3jVmN"),
        (f"key is\n{PEM}\nend", "b3BlbnNzaC1rZXk"),
        (PEM[:60], "b3Blbn"),
        ("https://bob:hunter2@example.org/x", "hunter2"),
        ("postgres://bob:p@ss/w0rd@db/x", "w0rd"),
        ("https://:tokenonly@example.org", "tokenonly"),
        ("redis://bob:1234@db", "1234"),
        ("PASSWORD=hunter2", "hunter2"),
        ("export API_KEY='two words' x", "two words"),
        ('{"db_password": "hun\\"ter2", "a": 1}', "ter2"),
        ("my-token: hunter2", "hunter2"),
        ("Token hunter2 is invalid", "hunter2"),
        ("the password is hunter2!", "hunter2"),
        ("machine x login bob password hunter2", "hunter2"),
        ("mysql -u root -phunter2 db", "hunter2"),
        ("sshpass -p hunter2 ssh x", "hunter2"),
        ("curl -u bob:hunter2 https://x", "hunter2"),
        ('{"passwords":["a1","hunter2"]}', "hunter2"),
        ("token: |\n  one\n  hunter2\nnext: x", "hunter2"),
        ("https://hooks.slack.com/services/T0/B0/hunter", "hunter"),
        ("secret = hunter2;", "hunter2"),
        ("tool --api-key hunter2 --verbose", "hunter2"),
        ("tool --token=hunter2", "hunter2"),
        ("Authorization: Basic aHVudGVyMg== extra", "aHVudGVyMg"),
        ("curl -H 'Cookie: session=hunter2; b=c'", "hunter2"),
        ("Bearer abcdef123", "abcdef123"),
        ("xoxb-1234-abcdefgh", "abcdefgh"),
        ("random Zq3xV9kLm2Pt7RwY5bNc8HdJ here", "Zq3xV9"),
        ("random qzjxvkwpfhgmbtrnlcdyqzjx here", "qzjxvk"),
        (f"sha1 {hashlib.sha1(b'x').hexdigest()}", hashlib.sha1(b"x").hexdigest()),
    ],
)
def test_secrets_in_texts_are_taken_out(text: str, hidden: str) -> None:
    said = redact(text)
    assert hidden not in said
    assert SECRET in said


@pytest.mark.parametrize(
    "text",
    [
        "task-wrapper.sh: line 4: syntax error near unexpected token",
        "E: Unable to locate package claude-code-router",
        "/srv/agents/workspace-architect/files/task-watcher.service",
        "https://example.org:8443/npm/@scope/pkg@1.0",
        f"content {hashlib.sha256(b'x').hexdigest()}",
        "ConnectionRefusedErrorException at 12:30:45",
        "npm ERR! code EACCES, syscall mkdir, path /usr/local/lib/node_modules",
        "std::vector, foo::bar, 1.2.3, 2026-11-21T09:54:05",
        "started_at TEXT is missing in table tasks",
        "password authentication failed, mkdir -p /srv/x",
        "unit fleet-reconciler-node-12-watcher.service failed",
    ],
)
def test_harmless_texts_stay(text: str) -> None:
    """An analyzer that is told nothing knows nothing."""
    assert redact(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "token", "API_KEY", "apiKey", "GitHubToken", "client-secret", "PASSWORD", "db.passwd", "authorization",
        "Set-Cookie", "aws_credentials", "key", "keys", "pwd", "x-auth", "privateKey", "passphrase",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    """The value goes, whatever it is."""
    assert is_secret_name(name)
    assert redact({name: "a", "more": {name: [1, {"b": "c"}]}}) == {name: SECRET, "more": {name: SECRET}}


@pytest.mark.parametrize("name", ["monkey", "author", "keyboard", "compass", "version", "pinned", "content"])
def test_names_of_no_secrets(name: str) -> None:
    assert redact({name: "a"}) == {name: "a"}


def test_a_secret_named_by_its_neighbour() -> None:
    """Lists of variables, options and their values, fields of a change."""
    assert redact([{"name": "API_TOKEN", "value": "a"}]) == [{"name": "API_TOKEN", "value": SECRET}]
    assert redact(["--token", "a", "--level", "b"]) == ["--token", SECRET, "--level", "b"]
    assert redact({"field": "password", "desired": "a", "observed": None}) == {
        "field": "password", "desired": SECRET, "observed": None,
    }  # fmt: skip


def test_names_and_addresses_get_the_same_placeholder_everywhere() -> None:
    value = {
        "a": "/home/alice/x and /Users/bob/y",
        "b": ["~alice/z at 10.0.0.7:22", "fe80::1 and [2001:db8::7]:443", "10.0.0.7, then 10.0.0.8."],
        "/home/bob/k": "~/x /root/y ::",
    }
    assert redact(value) == {
        "a": "/home/(user-1)/x and /Users/(user-2)/y",
        "b": ["~(user-1)/z at (ip-1):22", "(ip-2) and [(ip-3)]:443", "(ip-1), then (ip-4)."],
        "/home/(user-2)/k": "~/x /root/y ::",
    }
    assert redact(value) == redact(value)


def test_long_texts_are_cut_with_a_note() -> None:
    assert redact("a b " * 1_000) == ("a b " * 500)[:LONGEST] + " (cut here)"
    assert redact("x y" * 600) == "x y" * 600
    assert len(redact({"l": list(range(500))})["l"]) == 51
    assert redact({str(n): n for n in range(60)})["(cut)"] == "10 more"


def test_half_a_secret_at_the_cut_is_not_let_through() -> None:
    """What is looked through ends somewhere: never inside a word."""
    for shift in range(60):
        text = (
            "-----BEGIN X-----"
            + "a" * (19_900 - 40 + shift)
            + "-----END X----- ghp_0123456789abcdefABCDEF0123"
        )
        assert "ghp_" not in redact(text)


def test_everything_becomes_json() -> None:
    found = redact({1: {2, 1}, "b": b"\x00", "f": float("inf"), "n": None, "t": (True, 1.5), "d": {"d": {}}})
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_it_is_quick_on_large_and_hostile_text() -> None:
    """Nothing here may look at a text again and again."""
    for piece in ("a", "key", "a=", "-", "'", ":", "/", "eyJ", "-----BEGIN ", "a.key_", "https://a:", '"\\', "1.", "password", 'token="',
                  "a@", "--key ", "/home/", "bearer ", "::", "a.-_", "cookie=", "\n"):  # fmt: skip
        for text in (piece * (19_990 // len(piece)), (piece * (9_000 // len(piece)) + " ") * 50):
            before = time.monotonic()
            redact(text)
            assert time.monotonic() - before < 5.0, piece


# --- a planted secret, on its way to real backends ---------------------------------------------------

ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
BODY = st.text(ALNUM, min_size=24, max_size=48).filter(
    lambda text: entropy(text) > 3.5 and any(map(str.isdigit, text)) and any(map(str.isupper, text))
)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SHAPES = {
    "sk-{}": 1, "ghp_{}": 1, "AKIA{}": 1, "eyJ{}.eyJ{}.x": 1, "password={}": 1, "Authorization: Bearer {}": 1, "{}": 1,
    "https://bob:{}@example.org/": 1, "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----": 1,
    "--token {}": 1, 'api_key: "{}"': 1,
}  # fmt: skip


@st.composite
def planted(draw: st.DrawFn) -> tuple[str, Any]:
    """A secret, and where it stands in a question."""
    body = draw(BODY)
    text = f"{draw(WORDS)} {draw(st.sampled_from(sorted(SHAPES))).replace('{}', body)} {draw(WORDS)}"
    named = {draw(st.sampled_from(["token", "password", "API_KEY"])): body[:8]}
    change = Change(
        draw(st.sampled_from(["content", "token"])), text, draw(st.sampled_from(["absent", text])), note=text
    )
    history = ({"timestamp": "2026-01-01T00:00:00", "status": "failed", "reason": text, **named},)
    return body, question(
        reason=text, desired={"env": named, "x": [text]}, changes=(change,), history=history
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    found = Loopback(says(completion(ANSWER)))
    yield found
    found.close()


@given(planted())
def test_a_planted_secret_never_reaches_the_endpoint(server: Loopback, case: tuple[str, Any]) -> None:
    """Whole requests as they arrived, headers and all."""
    body, asked = case
    server.seen.clear()
    Analyzer(AnalysisSettings(endpoint=server.url)).analyze([asked], 20)
    (seen,) = server.seen
    received = seen.body.decode() + json.dumps(seen.json(), ensure_ascii=False) + repr(seen.headers)
    assert body not in received
    assert f'"{body[:8]}"' not in received


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(planted())
def test_a_planted_secret_never_reaches_a_command(tmp_path: Path, case: tuple[str, Any]) -> None:
    """Neither on standard input, nor among its arguments, nor in its environment."""
    body, asked = case
    source = f"""
import os, sys
open(SAID, "wb").write(sys.stdin.buffer.read() + repr((sys.argv, dict(os.environ))).encode())
print({json.dumps(ANSWER)!r})
"""
    program = executable(tmp_path, "judge", source)
    found = Analyzer(AnalysisSettings(commands=((str(program),),))).analyze([asked], 20)
    assert found[asked.id].backend.startswith("command")
    assert body not in (tmp_path / "judge.said").read_text("utf-8")


@given(planted())
def test_a_planted_secret_is_not_in_what_the_rules_say(case: tuple[str, Any]) -> None:
    """Their words go into alerts."""
    body, asked = case
    found = Analyzer(AnalysisSettings()).analyze([asked], 20)[asked.id]
    assert body not in repr(found)


@given(
    st.recursive(st.none() | st.integers() | st.floats() | st.text() | st.binary(), st.lists, max_leaves=5)
)
def test_any_value_becomes_json(value: Any) -> None:
    found = redact({"x": value})
    json.dumps(found, allow_nan=False)
