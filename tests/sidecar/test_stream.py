"""The relay: any split of the bytes gives the same stream, and no end is silent."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import fake
from sidecar.model import Backend, Cost, Dialect, ModelMapping, Usage
from sidecar.payload import parse, usage_of
from sidecar.stream import BrokenStream, Relay
from tests.sidecar.harness import sse

CHAT = b"".join(fake.chat_stream(("héllo ", "wörld 你好 🎈")).body)
MESSAGES = b"".join(fake.message_stream(("héllo ", "你好")).body)


def play(relay: Relay, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    out = b"".join(relay.feed(data[a:b]) for a, b in itertools.pairwise(edges) if b > a)
    return out + relay.end()


@given(st.lists(st.integers(0, 5000), max_size=30), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_split_and_any_line_end_gives_the_same_chat(cuts: list[int], newline: bytes) -> None:
    relay = Relay(Dialect.CHAT, "gpt", hide_usage=True)
    events = sse(
        play(relay, CHAT.replace(b"\n", newline), cuts).decode().replace("\r\n", "\n").replace("\r", "\n")
    )
    assert events[-1] == "[DONE]"
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1])  # type: ignore[index]
    assert text == "héllo wörld 你好 🎈"
    assert {e["model"] for e in events[:-1]} == {"gpt"}  # type: ignore[index]
    assert all("usage" not in e for e in events[:-1])
    assert relay.seen.usage == Usage(10, 5)


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_any_split_gives_the_same_messages(cuts: list[int]) -> None:
    relay = Relay(Dialect.MESSAGES, "glm", hide_usage=False)
    out = play(relay, MESSAGES, cuts).decode()
    assert out.count("event: ") == MESSAGES.count(b"event: ")
    assert sse(out)[0]["message"]["model"] == "glm"  # type: ignore[index]
    assert relay.seen.usage == Usage(10, 5)


@given(st.integers(0, len(CHAT) - 1))
def test_no_prefix_of_a_stream_passes_for_the_whole(at: int) -> None:
    whole_from = CHAT.index(b'"finish_reason": "stop"')
    relay = Relay(Dialect.CHAT, "gpt", hide_usage=True)
    try:
        relay.feed(CHAT[:at])
        relay.end()
    except BrokenStream:
        return
    assert at >= whole_from


def test_nothing_leaves_before_the_first_token() -> None:
    relay = Relay(Dialect.MESSAGES, "glm", hide_usage=False)
    start = MESSAGES.index(b"event: content_block_start")
    assert relay.feed(MESSAGES[:start]) == b""
    with pytest.raises(BrokenStream, match="overloaded"):
        relay.feed(
            b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"overloaded"}}\n\n'
        )


def test_every_choice_needs_its_finish_reason() -> None:
    relay = Relay(Dialect.CHAT, "gpt", hide_usage=False)
    two = {"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]}
    relay.feed(b"data: " + json.dumps(two).encode() + b"\n\n")
    relay.feed(fake.chunk({}, "stop"))
    with pytest.raises(BrokenStream):
        relay.feed(fake.DONE)


def test_a_nested_model_in_the_answer_is_not_touched() -> None:
    relay = Relay(Dialect.CHAT, "gpt", hide_usage=False)
    out = relay.feed(fake.chunk({"tool_calls": [{"function": {"arguments": '{"model":"native-model"}'}}]}))
    assert sse(out.decode())[0]["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] == '{"model":"native-model"}'  # type: ignore[index]  # fmt: skip


def test_unknown_fields_and_big_numbers_pass_byte_for_byte() -> None:
    body = b'{"x_big": 123456789012345678901234567890, "model":"gpt", "x": 1.10,  "y":{"model":"gpt"}}'
    backend = Backend(
        id="a", name="a", api_base_url="http://h/v1", model_mappings={"gpt": ModelMapping(native_id="n")}
    )
    out, asked = parse(body, streams=True).for_backend(backend, Dialect.CHAT)
    assert b"123456789012345678901234567890" in out
    assert b'"x":1.10' in out
    assert b'"y":{"model":"gpt"}' in out
    assert json.loads(out)["model"] == "n"
    assert not asked


def test_usage_of_both_dialects_counts_cached_tokens_once() -> None:
    openai = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 60}}
    anthropic = {
        "input_tokens": 30,
        "output_tokens": 7,
        "cache_read_input_tokens": 60,
        "cache_creation_input_tokens": 10,
    }
    assert usage_of(openai) == Usage(100, 7, 60, 0)
    assert usage_of(anthropic) == Usage(100, 7, 60, 10)
    price = Cost(input=1.0, output=10.0, cache_read=0.1, cache_write=2.0)
    assert Usage(100, 7, 60, 10).cost(price) == pytest.approx(30 * 1 + 70 + 6 + 20)


def test_a_stream_without_usage_is_estimated_and_marked() -> None:
    relay = Relay(Dialect.CHAT, "gpt", hide_usage=False)
    relay.feed(fake.chunk({"content": "x" * 40}))
    assert relay.estimate(12) == Usage(12, 10, estimated=True)


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=12)


def slow(relay: Relay) -> Relay:
    """The same relay, but one that never learns."""
    relay._patience = 0
    return relay


def both_ways(dialect: Dialect, data: bytes, cuts: list[int], *, hide_usage: bool) -> tuple[Relay, bytes]:
    """Play a stream through a relay that learns and one that reads every event: they must agree."""
    learned, read = (Relay(dialect, "gpt", hide_usage=hide_usage) for _ in range(2))
    out = play(learned, data, cuts)
    assert out == play(slow(read), data, cuts)
    assert learned.seen == read.seen
    return learned, out


@given(
    texts=TEXTS,
    cuts=st.lists(st.integers(0, 9000), max_size=20),
    ascii_only=st.booleans(),
    hide=st.booleans(),
)
def test_learning_what_events_look_like_changes_no_byte_of_a_chat(
    texts: list[str], cuts: list[int], *, ascii_only: bool, hide: bool
) -> None:
    def event(delta: dict[str, object], finish: str | None = None, **extra: object) -> bytes:
        shown = {
            "id": "c",
            "model": "native",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
            **extra,
        }
        return b"data: " + json.dumps(shown, ensure_ascii=ascii_only).encode() + b"\n\n"

    names = itertools.cycle(["content", "content", "content", "reasoning_content", "content", "content"])
    parts = [event({"role": "assistant", "content": ""}), *(event({next(names): text}) for text in texts)]
    data = b"".join(
        [
            *parts,
            event({}, "stop"),
            event({}, choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2}),
            fake.DONE,
        ]
    )
    relay, out = both_ways(Dialect.CHAT, data, cuts, hide_usage=hide)
    # Not by lines as `str` sees them: a text may hold any of the other line ends there are.
    events = [json.loads(line[6:]) for line in out.split(b"\n") if line.startswith(b"data: {")]
    said = ["".join(map(str, e["choices"][0]["delta"].values())) for e in events[1:] if e["choices"]]
    assert said == [*texts, ""]
    assert {e["model"] for e in events} == {"gpt"}
    assert relay.seen.usage == Usage(3, 2)


@given(TEXTS, st.lists(st.integers(0, 9000), max_size=20))
def test_learning_what_events_look_like_changes_no_byte_of_a_message(
    texts: list[str], cuts: list[int]
) -> None:
    both_ways(Dialect.MESSAGES, b"".join(fake.message_stream(tuple(texts)).body), cuts, hide_usage=False)


STRANGERS = [
    b'data: {"error":{"message":"exploded"}}\n\n',
    fake.chunk({"content": "more"}, "length"),
    fake.chunk({"content": 'a"},"finish_reason":"stop"}]}'}),
    fake.chunk({"content": "more"}).replace(b'"more"', b'"more","content":"twice"'),
    fake.chunk({"content": "more"}).replace(b"more", b"\\x"),
    fake.chunk({"content": "more"}).replace(b"more", b"\xff"),
    fake.chunk({"content": "more"}).replace(b"more", b"a\nb"),
    fake.chunk({"content": "more"}).replace(b'"more"', b"7"),
    fake.chunk({"content": "more"}, usage={"prompt_tokens": 9, "completion_tokens": 9}),
    fake.chunk({"content": "more", "tool_calls": [{"index": 0}]}),
    fake.chunk({"content": "more"}).replace(b"data: ", b"data:"),
    fake.chunk({"content": "more"}).replace(b"\n", b"\r\n"),
    b": a comment\n\n",
]


@pytest.mark.parametrize("number", range(len(STRANGERS)))
def test_an_event_that_only_resembles_the_last_is_read(number: int) -> None:
    stream = [fake.chunk({"content": "a"}), fake.chunk({"content": "b"}), STRANGERS[number]]
    outcomes = []
    for make in (slow, lambda relay: relay):
        relay = make(Relay(Dialect.CHAT, "gpt", hide_usage=False))
        try:
            outcomes.append((b"".join(map(relay.feed, stream)), relay.seen))
        except BrokenStream as broken:
            outcomes.append((str(broken).encode(), relay.seen))
    assert outcomes[0] == outcomes[1]


def test_events_that_are_all_different_are_not_studied_for_ever() -> None:
    relay = Relay(Dialect.CHAT, "gpt", hide_usage=False)
    for number in range(100):
        relay.feed(fake.chunk({"content": "x"}, obfuscation="y" * (number % 7), number=number))
    assert relay._patience == 0
    assert relay.seen.text_bytes == 100
