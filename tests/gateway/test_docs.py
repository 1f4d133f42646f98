"""docs/gateway.md's blocks run against real servers on this machine, and the files beside it are what it says."""

import json
import re
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import Result

from tests.gateway.echo_target import EchoTarget, asked, echo_target, pictures
from tests.gateway.served import ROOT, serving
from vlmguard.gateway.config import load
from vlmguard.gateway.sections import MODELS, OWN

DOCS = ROOT / "docs"
GATEWAY = (DOCS / "gateway.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([^\n]+)\n(.*?)^```$", GATEWAY, re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8080"
RUN_HERE = {"sh serve", "sh request", "json answer", "sh commands", "python openai", "python anthropic"}
NOT_RUN = {"text", "sh install", "sh theirs"}  # a drawing, what needs an index, other projects' programs
ELSEWHERE = {"litellm-model.yaml", "litellm-guardrail.yaml"}  # test_litellm.py
Run = Callable[..., Result]


def blocks(info: str) -> list[str]:
    """The blocks whose opening line says exactly `info`."""
    found = [text for said, text in BLOCKS if said == info]
    assert found, f"docs/gateway.md has no block {info!r}"
    return found


def named(kind: str) -> dict[str, str]:
    """The blocks of a kind by their file's name."""
    return {info.split()[1]: text for info, text in BLOCKS if info.startswith(f"{kind} ")}


def commands(info: str) -> list[list[str]]:
    lines = [line for text in blocks(info) for line in text.splitlines()]
    return [shlex.split(re.sub(r"\s#\s.*", "", line)) for line in lines]


@pytest.fixture(scope="module")
def target() -> Iterator[EchoTarget]:
    with echo_target() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def served(target: EchoTarget, folder: Path) -> Iterator[str]:
    """A gateway as the text starts one; what the scripted rewriter calls unreadable is refused."""
    with serving(f'[target]\nurl = "{target.url}/v1"\n[policy]\nunreadable = "refuse"\n', folder) as address:
        yield address


def ask(address: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """The status and the body that a request is answered with."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address + path, data, {"content-type": "application/json"}), timeout=20
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_every_block_is_of_a_kind_that_a_test_knows() -> None:
    files = {info for info, _ in BLOCKS if info.split()[0] in ("toml", "yaml", "nginx")}
    assert {info for info, _ in BLOCKS} - files == RUN_HERE | NOT_RUN
    assert set(named("yaml")) == ELSEWHERE | {"prometheus.yml"}
    assert len(named("toml")) == sum(info.startswith("toml") for info, _ in BLOCKS)


@pytest.mark.parametrize("name", named("toml"))
def test_settings_are_the_gateways(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of a test")
    path = tmp_path / name
    path.write_text(named("toml")[name])
    assert load(path) != load(None), "it says nothing but the defaults"


@pytest.mark.parametrize("command", commands("sh serve"), ids=" ".join)
def test_serving_commands_are_understood(vlmguard: Run, working_folder: Path, command: list[str]) -> None:
    (working_folder / "vlmguard.toml").write_text(named("toml")["vllm.toml"])
    result = vlmguard(*command[1:], *([] if "--check-config" in command else ["--check-config"]))
    assert result.exit_code == 0, result.output
    assert 'url = "http://127.0.0.1:8000/v1"' in result.output
    assert 'rewriter = "http://127.0.0.1:8001/v1#my-rewriter"' in result.output


def test_the_request_gets_the_answer(served: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    [request], [answer] = blocks("sh request"), blocks("json answer")
    done = subprocess.run(["bash", "-c", request.replace(ADDRESS, served)], capture_output=True, check=True, timeout=30)
    said, expected = json.loads(done.stdout), json.loads(answer)
    assert re.fullmatch(r"req_[0-9a-f]{24}", said.pop("request_id"))
    assert re.fullmatch(r"req_[0-9a-f]{24}", expected.pop("request_id"))
    assert said == expected


@pytest.mark.parametrize("command", commands("sh commands"), ids=" ".join)
def test_commands_run(
    vlmguard: Run, served: str, folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    assert ask(served, "/v1/guard", {"messages": [{"role": "user", "content": "Hello"}]})[0] == 200
    monkeypatch.chdir(folder)
    result = vlmguard(*command[1:])
    assert result.exit_code == 0, result.output


def test_the_log_has_what_was_asked(vlmguard: Run, served: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _ = ask(served, "/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "risky"}]})
    assert status == 200
    monkeypatch.chdir(folder)
    told = vlmguard("audit-log", "query", "--config", "vlmguard.toml", "--action", "rewrote", "--json").output
    newest, *_ = json.loads(told)["records"]
    assert (newest["route"], newest["category"], newest["mode"]) == ("/v1/chat/completions", "fraud", "rewrite")
    assert "risky" not in told  # the words are not in it


@pytest.fixture
def label(working_folder: Path) -> None:
    Image.new("RGB", (64, 48), "white").save(working_folder / "label.png")


def run(info: str, served: str) -> None:
    [text] = blocks(info)
    assert ADDRESS in text
    exec(compile(text.replace(ADDRESS, served), "docs/gateway.md", "exec"), {"__name__": "docs"})


def test_the_openai_sdk(served: str, target: EchoTarget, label: None, capsys: pytest.CaptureFixture[str]) -> None:
    target.requests.clear()
    run("python openai", served)
    said = "You said: What does this label say?"
    assert capsys.readouterr().out == f"passed 0.100\n{said}\n {said}  You said: Hello\n"
    assert [pictures(body) for body in target.requests] == [1, 1, 0]


def test_the_anthropic_sdk(served: str, target: EchoTarget, label: None, capsys: pytest.CaptureFixture[str]) -> None:
    target.requests.clear()
    run("python anthropic", served)
    assert capsys.readouterr().out == "You said: What does this label say?\n"
    assert [pictures(body) for body in target.requests] == [1]


def paths_of_the_table() -> set[str]:
    [table] = re.findall(r"^## What is served\n\n(.*?)\n\n", GATEWAY, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`(/[^`]+)`", "\n".join(row.split("|")[1] for row in table.splitlines())))


def test_what_is_served_is_and_nothing_else(served: str) -> None:
    assert paths_of_the_table() == {*OWN, MODELS, "/health/live", "/health/ready", "/metrics"}
    told = {path: ask(served, path, {} if path in OWN else None)[0] for path in paths_of_the_table()}
    assert {path: status for path, status in told.items() if status not in (200, 400)} == {}
    refused = [path for path in re.findall(r"`(/(?:v1|api)/[a-z/]+)`", GATEWAY) if path not in told]
    assert {"/v1/embeddings", "/api/chat"} <= set(refused)
    assert {ask(served, path, {})[0] for path in refused} == {404}


def test_the_series_that_are_named_are_there(served: str) -> None:
    families = text_string_to_metric_families(ask(served, "/metrics")[1].decode())
    known = {name for family in families for name in (family.name, f"{family.name}_total")}
    named_here = set(re.findall(r"`(vlmguard_[a-z_]+)`", GATEWAY))
    assert len(named_here) >= 8
    assert named_here <= known


def test_prometheus_scrapes_where_metrics_are() -> None:
    [job] = yaml.safe_load(named("yaml")["prometheus.yml"])["scrape_configs"]
    assert job["static_configs"] == [{"targets": [ADDRESS.removeprefix("http://")]}]
    assert "metrics_path" not in job  # /metrics is Prometheus's own default


def test_an_open_failure_policy_leaves_everybody_unguarded(target: EchoTarget, tmp_path: Path) -> None:
    """As the text warns: a few slow requests in a row, and the next one goes on as it came, whoever sent it."""
    settings = f'[target]\nurl = "{target.url}/v1"\n[guard]\nseconds = 0.1\n[policy]\nfailure = "open"\n[breaker]\nfailures = 3\n'
    with serving(settings, tmp_path) as address:
        said = []
        for words in ("something risky", "slow", "slow", "slow", "something risky"):
            body = {"model": "m", "messages": [{"role": "user", "content": words}]}
            assert ask(address, "/v1/chat/completions", body)[0] == 200
            said.append(asked(target.requests[-1]))
        exposed = ask(address, "/metrics")[1].decode()
    assert said[0] == "Safely: something risky"
    assert said[-1] == "something risky"
    assert "\nvlmguard_breaker_open 1.0\n" in exposed


def test_shadow_changes_nothing_but_for_a_refused_key(target: EchoTarget, tmp_path: Path) -> None:
    with serving(f'[target]\nurl = "{target.url}/v1"\n[policy]\nmode = "shadow"\n', tmp_path) as address:
        said = []
        for words in ("something risky", "unreadable", "locked"):
            body = {"model": "m", "messages": [{"role": "user", "content": words}]}
            assert ask(address, "/v1/chat/completions", body)[0] == 200
            said.append(asked(target.requests[-1]))
    assert said[:2] == ["something risky", "unreadable"]
    assert said[2].endswith('Request: "locked"')  # within the plea for caution


def test_nginx_takes_its_settings(tmp_path: Path) -> None:
    program, openssl = shutil.which("nginx"), shutil.which("openssl")
    if program is None or openssl is None:
        pytest.skip("there is no nginx, or no openssl to make it a certificate")
    [text] = blocks("nginx gateway.conf")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=vlm.example.com"]
    subprocess.run(
        [openssl, *made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60
    )
    text = text.replace("/etc/ssl/vlm.example.com.pem", str(certificate))
    text = text.replace("/etc/ssl/private/vlm.example.com.key", str(key))
    whole = tmp_path / "nginx.conf"
    whole.write_text(f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\nhttp {{\n{text}\n}}\n")
    done = subprocess.run([program, "-t", "-c", str(whole), "-p", str(tmp_path)], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", GATEWAY)
    assert len(links) >= 4
    assert [link for link in links if not (DOCS / link).exists()] == []
