"""deploy/ holds together: its files name only what is there, and each other's ports, paths and models."""

import json
import re
import tomllib

import yaml  # type: ignore[import-untyped]

from tests.gateway.served import ROOT
from vlmguard.gateway.config import load

DEPLOY = ROOT / "deploy"
GATEWAY = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")


def test_compose_names_what_there_is() -> None:
    told = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    server, target = told["services"]["gateway"], told["services"]["target"]
    context = DEPLOY / server["build"]["context"]
    assert context.resolve() == ROOT
    assert (context / server["build"]["dockerfile"]).is_file()
    mounts = [mount.split(":") for service in (server, target) for mount in service["volumes"]]
    files = [source for source, *_ in mounts if source.startswith(".")]
    assert files == ["./vlmguard.toml"]
    assert (DEPLOY / files[0]).is_file()
    assert {source for source, *_ in mounts if not source.startswith(".")} == set(told["volumes"])


def test_the_composed_gateway_reaches_only_what_compose_starts() -> None:
    told = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    settings = load(DEPLOY / "vlmguard.toml")
    assert settings.target.url == "http://target:11434/v1"
    assert "target" in told
    assert told["gateway"]["ports"] == [f"127.0.0.1:{settings.server.port}:{settings.server.port}"]
    assert "ports" not in told["target"]  # it would be a way round the guard
    assert int(told["gateway"]["stop_grace_period"].removesuffix("s")) > settings.server.drain_seconds
    pulled = re.findall(r"ollama pull (\S+)", (DEPLOY / "compose.yaml").read_text() + GATEWAY)
    assert set(pulled) == {settings.guard.rewriter.partition("#")[2]}


def test_the_image_is_made_of_what_there_is() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [words[1:-1] for line in lines if (words := line.split()) and words[0] == "COPY" and "--from" not in line]
    assert [name for names in copied for name in names if not (ROOT / name).exists()] == []
    [install] = [line for line in lines if "pip install" in line]
    assert "-c constraints.txt" in install
    [extras] = re.findall(r"\.\[([a-z,]+)\]", install)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known) - {"local", "train", "dev"}  # these bring torch
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["vlmguard"]
    assert any(line.startswith("HEALTHCHECK") and "/health/ready" in line for line in lines)


def test_the_image_starts_with_what_compose_mounts() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    [command] = re.findall(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    mounts = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["gateway"]["volumes"]
    assert json.loads(command) == ["serve", "--config", mounts[0].split(":")[1]]
    log = load(DEPLOY / "vlmguard.toml").audit_log.url
    assert log.startswith(f"sqlite:///{mounts[1].split(':')[1]}/")
    assert f"WORKDIR {mounts[1].split(':')[1]}\n" in dockerfile
