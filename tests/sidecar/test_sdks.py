"""The official SDKs and litellm, unmodified, against a real sidecar."""

import asyncio
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from sidecar import fake
from sidecar.fake import Script, Seen
from tests.sidecar.harness import Providers, SidecarProcess, backend

USER: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
]
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}


def choose(seen: Seen) -> Script:
    if seen.method == "POST" and seen.json().get("tools") and seen.path.endswith("/chat/completions"):
        more = {"index": 0, "function": {"arguments": '{"model": "native-model"}'}}
        parts = (
            fake.chunk({"role": "assistant", "tool_calls": [CALL]}),
            fake.chunk({"tool_calls": [more]}),
            fake.chunk({}, "tool_calls"),
            fake.usage_chunk(),
            fake.DONE,
        )
        if seen.json().get("stream"):
            return Script(body=parts, content_type="text/event-stream", chunked=True)
        answer = json.loads(fake.chat().body[0])
        called = {**CALL, "function": {"name": "look", "arguments": "{}"}}
        answer["choices"][0] = {
            "index": 0, "finish_reason": "tool_calls", "message": {"role": "assistant", "content": None, "tool_calls": [called]},
        }  # fmt: skip
        return Script(body=(json.dumps(answer).encode(),))
    if seen.path.endswith("/responses"):
        return _responses(streaming=bool(seen.json().get("stream")))
    return fake.default_script(seen)


def _responses(*, streaming: bool) -> Script:
    item = {
        "type": "message", "id": "m1", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "hello", "annotations": []}],
    }  # fmt: skip
    whole = {
        "id": "r1", "object": "response", "created_at": 1, "model": fake.NATIVE, "status": "completed", "output": [item],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15},
    }  # fmt: skip
    if not streaming:
        return Script(body=(json.dumps(whole).encode(),))
    delta = {
        "item_id": "m1",
        "output_index": 0,
        "content_index": 0,
        "delta": "hello",
        "sequence_number": 1,
        "logprobs": [],
    }
    parts = (
        fake.message_event(
            "response.created", response={**whole, "status": "in_progress", "output": []}, sequence_number=0
        ),
        fake.message_event("response.output_text.delta", **delta),
        fake.message_event("response.completed", response=whole, sequence_number=2),
    )
    return Script(body=parts, content_type="text/event-stream", chunked=True)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    providers = Providers()
    provider = providers.new(choose)
    process = SidecarProcess(
        tmp_path_factory.mktemp("sdks"),
        [
            backend("openai", provider.url),
            backend("anthropic", provider.url, api="anthropic-messages"),
        ],
    ).start()
    yield process
    process.stop()
    providers.close()


def test_openai_sync(process: SidecarProcess) -> None:
    with openai.OpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0) as client:
        answer = client.chat.completions.create(model="gpt", messages=USER)
        assert (answer.choices[0].message.content, answer.model, answer.usage.total_tokens) == (
            "hello",
            "gpt",
            15,
        )  # type: ignore[union-attr]
        assert client.embeddings.create(model="gpt", input="x", encoding_format="float").data[
            0
        ].embedding == [0.1, 0.2]
        assert [model.id for model in client.models.list()] == ["gpt"]
        assert client.models.retrieve("gpt").id == "gpt"
        with pytest.raises(openai.NotFoundError, match="known: gpt"):
            client.chat.completions.create(model="nope", messages=USER)


def test_openai_streaming_and_tools(process: SidecarProcess) -> None:
    with openai.OpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="gpt", messages=USER, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello"
        assert {c.model for c in chunks} == {"gpt"}
        with_usage = list(
            client.chat.completions.create(
                model="gpt", messages=USER, stream=True, stream_options={"include_usage": True}
            )
        )
        assert with_usage[-1].usage is not None
        assert with_usage[-1].usage.total_tokens == 15
        tool = (
            client.chat.completions.create(model="gpt", messages=USER, tools=TOOLS)
            .choices[0]
            .message.tool_calls
        )
        assert tool is not None
        assert tool[0].function.name == "look"  # type: ignore[union-attr]
        streamed = list(client.chat.completions.create(model="gpt", messages=USER, tools=TOOLS, stream=True))
        arguments = "".join(
            call.function.arguments or ""
            for c in streamed
            for call in c.choices[0].delta.tool_calls or []
            if call.function
        )
        assert arguments == '{"model": "native-model"}', "a tool's arguments are not ours to rewrite"


def test_openai_responses(process: SidecarProcess) -> None:
    with openai.OpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0) as client:
        answer = client.responses.create(model="gpt", input="hi")
        assert (answer.output_text, answer.model) == ("hello", "gpt")
        events = list(client.responses.create(model="gpt", input="hi", stream=True))
        assert [event.type for event in events] == [
            "response.created",
            "response.output_text.delta",
            "response.completed",
        ]
        assert events[-1].response.model == "gpt"  # type: ignore[union-attr]


def test_openai_async(process: SidecarProcess) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0) as client:
            answer = await client.chat.completions.create(model="gpt", messages=USER)
            assert answer.choices[0].message.content == "hello"
            stream = await client.chat.completions.create(model="gpt", messages=USER, stream=True)
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello"

    asyncio.run(run())


def test_anthropic_sync_streaming_and_counting(process: SidecarProcess) -> None:
    with anthropic.Anthropic(base_url=process.url, api_key="any", max_retries=0) as client:
        answer = client.messages.create(model="gpt", max_tokens=9, messages=USER)
        assert (answer.content[0].text, answer.model) == ("hello", "gpt")  # type: ignore[union-attr]
        with client.messages.stream(model="gpt", max_tokens=9, messages=USER) as stream:
            assert stream.get_final_text() == "Hello"
            assert stream.get_final_message().model == "gpt"
        assert client.messages.count_tokens(model="gpt", messages=USER).input_tokens == 12
        assert [model.id for model in client.models.list()] == ["gpt"]
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nope", max_tokens=9, messages=USER)


def test_anthropic_async(process: SidecarProcess) -> None:
    async def run() -> None:
        async with (
            anthropic.AsyncAnthropic(base_url=process.url, api_key="any", max_retries=0) as client,
            client.messages.stream(model="gpt", max_tokens=9, messages=USER) as stream,
        ):
            assert await stream.get_final_text() == "Hello"

    asyncio.run(run())


def test_a_cut_stream_is_an_error_in_the_sdks(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    def cut(seen: Seen) -> Script:
        if seen.path.endswith("/messages"):
            return fake.message_stream(whole=False, gap=0.02)
        return replace(fake.chat_stream(finish=None, done=False, usage=False), gap=0.02)

    provider = providers.new(cut)
    process = sidecar([backend("o", provider.url), backend("a", provider.url, api="anthropic-messages")])
    with (
        openai.OpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0) as client,
        pytest.raises(openai.APIError, match="broke off"),
    ):
        list(client.chat.completions.create(model="gpt", messages=USER, stream=True))
    with (
        anthropic.Anthropic(base_url=process.url, api_key="any", max_retries=0) as talker,
        pytest.raises(anthropic.APIStatusError, match="broke off"),
    ):
        list(talker.messages.create(model="gpt", max_tokens=9, messages=USER, stream=True))


LITELLM = """
import asyncio, sys
import litellm
litellm.telemetry = False
base = sys.argv[1]
known = dict(model="openai/gpt", api_base=base + "/v1", api_key="any", messages=[{"role": "user", "content": "hi"}], num_retries=0)
assert litellm.completion(**known).choices[0].message.content == "hello"
parts = [c.choices[0].delta.content or "" for c in litellm.completion(stream=True, **known)]
assert "".join(parts) == "Hello", parts
native = dict(known, model="anthropic/gpt", api_base=base)
assert litellm.completion(max_tokens=9, **native).choices[0].message.content == "hello"
async def main():
    answer = await litellm.acompletion(stream=True, **known)
    assert "".join([c.choices[0].delta.content or "" async for c in answer]) == "Hello"
asyncio.run(main())
print("litellm is content")
"""


def litellm_python() -> Path:
    """Litellm pins its own openai and more: it lives in a virtualenv of its own, made once."""
    home = Path(
        os.environ.get("SIDECAR_TEST_LITELLM_VENV")
        or Path(__file__).resolve().parents[2] / ".cache" / "litellm"
    )
    python = home / "bin" / "python"
    marker = home / "installed"
    if not marker.exists():
        venv.create(home, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "litellm>=1.60,<2"],
            check=True,
            timeout=600,
            capture_output=True,
        )
        marker.touch()
    return python


def test_litellm_as_a_client_library(process: SidecarProcess) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the map of prices comes with the package
    ended = subprocess.run(
        [litellm_python(), "-c", LITELLM, process.url],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert "litellm is content" in ended.stdout, ended.stderr
    assert sys.version_info >= (3, 11)
