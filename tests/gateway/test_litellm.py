"""A real LiteLLM proxy beside the gateway, set up as docs/gateway.md says: it asks our guardrail, or has us as a model.

LiteLLM has an environment of its own: make counterparts
"""

from __future__ import annotations

import base64
import json
import re
import socket
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import yaml  # type: ignore[import-untyped]

from tests.gateway.echo_target import EchoTarget, asked, echo_target
from tests.gateway.served import ROOT, process, serving, until_ready
from vlmguard.gateway.keys import new_key
from vlmguard.guards.policy import REFUSAL

PROGRAM = ROOT / "build" / "litellm" / "bin" / "litellm"
DOCS = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
MASTER_KEY = "sk-of-a-test-0123456789abcdef"
TARGET_KEY = "the-targets-own"
# It may reach this machine and nothing else: what is not on it goes to a proxy that is not there.
ALONE = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1",
}
START_SECONDS = 90.0
WAYS = ("guarded", "direct")  # the gateway as a model; a model of LiteLLM's own, and the gateway as a guardrail

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="there is no build/litellm; make counterparts makes it")


@pytest.fixture(scope="module")
def target() -> Iterator[EchoTarget]:
    with echo_target() as server:
        yield server


@pytest.fixture(scope="module")
def keys() -> dict[str, tuple[str, str]]:
    """A key and its hash for each mode."""
    return {"rewrite": new_key(), "block": new_key()}


@pytest.fixture(scope="module")
def served(
    target: EchoTarget, keys: dict[str, tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    callers = "".join(
        f'[[keys]]\nid = "{mode}"\nsha256 = "{sha256}"\nmode = "{mode}"\n' for mode, (_, sha256) in keys.items()
    )
    settings = f'[target]\nurl = "{target.url}/v1"\n[policy]\npictures = "withhold"\n{callers}'
    with serving(settings, tmp_path_factory.mktemp("gateway")) as address:
        yield address


def documented(name: str, served: str, target: EchoTarget) -> dict[str, Any]:
    """A block of the text, with this test's addresses."""
    [text] = re.findall(rf"^```yaml {re.escape(name)}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    told: dict[str, Any] = yaml.safe_load(
        text.replace("http://127.0.0.1:8080", served).replace("http://127.0.0.1:8000", target.url)
    )
    return told


def settings_of(served: str, target: EchoTarget) -> dict[str, Any]:
    """Both ways in one proxy, each a second time with the key whose mode is block; a request asks for its guardrail."""
    model = documented("litellm-model.yaml", served, target)
    guard = documented("litellm-guardrail.yaml", served, target)
    guard["guardrails"][0]["litellm_params"]["default_on"] = False
    blocking = json.loads(json.dumps([*model["model_list"], *guard["guardrails"]]).replace("VLMGUARD_KEY", "BLOCK_KEY"))
    return {
        "model_list": [*model["model_list"], *guard["model_list"], {**blocking[0], "model_name": "guarded-block"}],
        "guardrails": [*guard["guardrails"], {**blocking[1], "guardrail_name": "vlmguard-block"}],
        "litellm_settings": {"telemetry": False},
        "general_settings": {"master_key": "os.environ/LITELLM_MASTER_KEY"},
    }


@pytest.fixture(scope="module")
def litellm(
    served: str, target: EchoTarget, keys: dict[str, tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("litellm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, log = folder / "litellm.yaml", folder / "litellm.log"
    config.write_text(yaml.safe_dump(settings_of(served, target)))
    secrets = {
        "LITELLM_MASTER_KEY": MASTER_KEY,
        "TARGET_KEY": TARGET_KEY,
        "VLMGUARD_KEY": keys["rewrite"][0],
        "BLOCK_KEY": keys["block"][0],
    }
    command = [str(PROGRAM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with process(command, log, {**ALONE, **secrets}):
        address = f"http://127.0.0.1:{port}"
        until_ready(f"{address}/health/liveliness", log, START_SECONDS)
        yield address


@pytest.fixture
def client(litellm: str, target: EchoTarget) -> Iterator[openai.OpenAI]:
    target.requests.clear()
    target.keys.clear()
    with openai.OpenAI(base_url=f"{litellm}/v1", api_key=MASTER_KEY, max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, way: str, content: Any, *, blocking: bool = False) -> str:
    """The answer to a chat of two turns, by one of the two ways."""
    turns: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    suffix = "-block" if blocking else ""
    model, guard = (way, [f"vlmguard{suffix}"]) if way == "direct" else (f"{way}{suffix}", [])
    answered = client.chat.completions.create(model=model, messages=turns, extra_body={"guardrails": guard})
    return answered.choices[0].message.content or ""


def picture_of(png: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("way", WAYS)
def test_a_harmless_request_goes_on_as_it_came(client: openai.OpenAI, target: EchoTarget, png: bytes, way: str) -> None:
    assert ask(client, way, "Hello") == "You said: Hello"
    parts = [words("What is this?"), picture_of(png)]
    assert ask(client, way, parts) == "You said: What is this?"
    assert [body["messages"][-1]["content"] for body in target.requests] == ["Hello", parts]


@pytest.mark.parametrize("way", WAYS)
def test_a_risky_request_is_rewritten(client: openai.OpenAI, target: EchoTarget, way: str) -> None:
    assert ask(client, way, "a risky thing") == "You said: Safely: a risky thing"
    assert target.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("way", WAYS)
def test_a_risky_requests_pictures_follow_the_policy(
    client: openai.OpenAI, target: EchoTarget, png: bytes, way: str
) -> None:
    assert ask(client, way, [words("a risky thing"), picture_of(png)]) == "You said: Safely: a risky thing"
    assert target.requests[-1]["messages"][-1]["content"] == [words("Safely: a risky thing")]  # it is withheld


def test_a_guardrail_that_blocks_is_an_error_of_litellms(client: openai.OpenAI, target: EchoTarget, png: bytes) -> None:
    for content in ("a risky thing", [words("a risky thing"), picture_of(png)]):
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, "direct", content, blocking=True)
        assert REFUSAL in str(raised.value)
    assert target.requests == []


def test_a_gateway_that_blocks_answers_with_a_refusal(client: openai.OpenAI, target: EchoTarget, png: bytes) -> None:
    for content in ("a risky thing", [words("a risky thing"), picture_of(png)]):
        assert ask(client, "guarded", content, blocking=True) == REFUSAL
    assert target.requests == []


@pytest.mark.parametrize("way", WAYS)
def test_a_remote_picture_is_refused(client: openai.OpenAI, target: EchoTarget, way: str) -> None:
    remote = {"type": "image_url", "image_url": {"url": "http://192.0.2.1/a.png"}}
    with pytest.raises(openai.BadRequestError, match="remote address"):
        ask(client, way, [words("What is this?"), remote])
    assert target.requests == []


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_is_guarded_and_streams(client: openai.OpenAI, target: EchoTarget, way: str) -> None:
    turns: Any = [{"role": "user", "content": "a risky thing"}]
    guard = {"guardrails": ["vlmguard"]} if way == "direct" else {}
    with client.chat.completions.create(model=way, messages=turns, stream=True, extra_body=guard) as stream:
        pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert [piece for piece in pieces if piece] == ["You", "said:", "Safely:", "a", "risky", "thing"]
    assert asked(target.requests[-1]) == "Safely: a risky thing"


@pytest.mark.parametrize("way", WAYS)
def test_responses_and_messages_are_guarded_too(
    client: openai.OpenAI, litellm: str, target: EchoTarget, way: str
) -> None:
    guard = {"guardrails": ["vlmguard"]} if way == "direct" else {}
    said = client.responses.create(model=way, input="a risky thing", extra_body=guard)
    assert said.output_text == "You said: Safely: a risky thing"
    with anthropic.Anthropic(base_url=litellm, api_key=MASTER_KEY, max_retries=0) as theirs:
        turns: Any = [{"role": "user", "content": "a risky thing"}]
        answered = theirs.messages.create(model=way, max_tokens=64, messages=turns, extra_body=guard)
    assert [block.text for block in answered.content if block.type == "text"] == ["You said: Safely: a risky thing"]
    assert [asked(body) for body in target.requests] == ["Safely: a risky thing"] * 2


def test_every_turn_of_a_conversation_keeps_its_place(client: openai.OpenAI, target: EchoTarget) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    earlier: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Nothing there."},
        {"role": "assistant", "content": "Nothing."},
    ]
    last: Any = {"role": "user", "content": [words("a risky"), words("thing")]}
    client.chat.completions.create(model="direct", messages=[*earlier, last], extra_body={"guardrails": ["vlmguard"]})
    sent = target.requests[-1]["messages"]
    assert [turn.get("content") for turn in sent[:-1]] == ["Hi", None, "Nothing there.", "Nothing."]
    assert asked(target.requests[-1]).strip() == "Safely: a risky\nthing"


def judged(served: str) -> dict[str, int]:
    """How many requests each route of the gateway has answered."""
    with urllib.request.urlopen(f"{served}/metrics", timeout=20) as answer:
        rows = re.findall(
            r'^vlmguard_requests_total\{.*route="([^"]+)".*\} (\S+)$', answer.read().decode(), re.MULTILINE
        )
    counts: Counter[str] = Counter()
    for route, count in rows:
        counts[route] += round(float(count))
    return counts


def test_a_chat_without_any_text_is_not_shown_to_a_guardrail(
    client: openai.OpenAI, target: EchoTarget, served: str, png: bytes
) -> None:
    """LiteLLM's own gap, of which the text warns; the gateway as a model has it not."""
    before = judged(served)
    turns: Any = [{"role": "user", "content": [picture_of(png)]}]
    client.chat.completions.create(model="direct", messages=turns, extra_body={"guardrails": ["vlmguard"]})
    assert judged(served) == before
    client.chat.completions.create(model="guarded", messages=turns)
    assert judged(served)["/v1/chat/completions"] == before["/v1/chat/completions"] + 1
    assert [body["messages"] for body in target.requests] == [turns, turns]


def test_keys_end_where_they_belong(client: openai.OpenAI, target: EchoTarget) -> None:
    for way in WAYS:
        ask(client, way, "Hello")
    assert target.keys == [None, f"Bearer {TARGET_KEY}"]  # neither LiteLLM's key nor the gateway's
