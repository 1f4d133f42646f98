"""The sections of the gateway's settings: what each may hold, checked by itself.

docs/vlmguard.example.toml explains every key.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from yarl import URL

from vlmguard.errors import ConfigError
from vlmguard.gateway.addresses import pattern
from vlmguard.gateway.config_text import got
from vlmguard.guards import GUARDS
from vlmguard.guards.policy import Failure, Mode, Pictures, Policy
from vlmguard.load import unknown
from vlmguard.strict_json import MAX_BODY_BYTES

GUARDED: Final = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
GUARDRAILS: Final = ("/v1/guard", "/beta/litellm_basic_guardrail_api", "/v1/webhook")
MODELS: Final = "/v1/models"
OWN: Final[tuple[str, ...]] = (*GUARDED, *GUARDRAILS)
ANONYMOUS: Final = "anonymous"  # the id of a caller where no keys are configured

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]  # a list in TOML


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Server(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    workers: Count = 1
    max_body_bytes: Count = MAX_BODY_BYTES
    drain_seconds: Annotated[float, Field(ge=0)] = 30
    docs: bool = False
    open: bool = False

    @property
    def is_loopback(self) -> bool:
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class Target(Section):
    spec: str | None = None
    url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    pass_key: bool = False
    connect_seconds: Seconds = 5
    first_byte_seconds: Seconds = 120
    total_seconds: Seconds = 600

    @model_validator(mode="before")
    @classmethod
    def _one(cls, raw: Any) -> Any:
        """One target, by default the packaged one. A spec that is an address (http://HOST/v1#MODEL) becomes the url."""
        if not isinstance(raw, dict):
            return raw
        spec = raw.get("spec")
        if spec is not None and raw.get("url") is not None:
            raise ValueError("expected spec or url, got both")
        if isinstance(spec, str) and spec.startswith(("http://", "https://")):
            url, _, model = spec.partition("#")
            if model and raw.get("model") not in (None, model):
                raise ValueError("expected one model, got one in spec and another in model")
            return {**raw, "spec": None, "url": url, "model": model or raw.get("model")}
        return raw if raw.get("url") is not None else {"spec": "packaged:assistant", **raw}

    @field_validator("url")
    @classmethod
    def _root(cls, url: str | None) -> str | None:
        return None if url is None else api_root(url)

    @field_validator("api_key_env")
    @classmethod
    def _is_set(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                "expected the name of an environment variable, got something else; a key itself never "
                "stands in the file"
            )
        if name is not None and not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set; set it to the target's key")
        return name

    @model_validator(mode="after")
    def _key_of_a_server(self) -> Self:
        if self.url is None and (self.api_key_env is not None or self.pass_key):
            raise ValueError("api_key_env and pass_key go with url: a model in this process takes no key")
        if self.api_key_env is not None and self.pass_key:
            raise ValueError("expected api_key_env (the gateway's key) or pass_key (the caller's), got both")
        return self

    @property
    def api_key(self) -> str | None:
        """The gateway's key for the target, from the environment."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None


class Guard(Section):
    name: str = "vlmguard-r1"
    rewriter: str = Field(default="packaged:rewriter", repr=False)  # its query may hold a key
    seconds: Seconds = 20
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" not in name and name not in GUARDS:
            raise ValueError(str(unknown("guard", name, GUARDS)))
        return name

    @field_validator("rewriter")
    @classmethod
    def _without_a_key(cls, spec: str) -> str:
        if spec.startswith(("http://", "https://")):
            _address(spec, "Set VLMGUARD_API_KEY instead.")
        return spec


class PolicySection(Section):
    mode: Mode = "rewrite"
    categories: Mapping[str, Mode] = Field(default_factory=dict)
    failure: Failure = "closed"
    timeout: Failure | None = None
    unreadable: Failure | None = None
    overload: Failure | None = None
    upstream: Failure | None = None
    pictures: Pictures = "keep"
    routes: Mapping[str, Mode] = Field(default_factory=dict)
    response_headers: bool = True

    @model_validator(mode="after")
    def _is_a_policy(self) -> Self:
        try:
            self.policy(self.mode)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return self

    def policy(self, mode: Mode) -> Policy:
        return Policy(mode, **self.model_dump(exclude={"mode", "routes", "response_headers"}))


class Key(Section):
    """A caller: `images` and `pixels` are the most in one request, `routes` the only ones it may call."""

    id: str
    sha256: str = Field(repr=False)
    requests_per_minute: Count | None = None
    images: Annotated[int, Field(ge=0)] | None = None
    pixels: Annotated[int, Field(ge=0)] | None = None
    mode: Mode | None = None
    routes: Texts | None = None

    @field_validator("id")
    @classmethod
    def _fit_for_logs(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name) or name == ANONYMOUS:
            raise ValueError(f"expected up to 64 of A-Z a-z 0-9 . _ @ -, and not {ANONYMOUS}, got {got(name)}")
        return name

    @field_validator("sha256")
    @classmethod
    def _hex(cls, digest: str) -> str:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError(
                f"expected 64 hexadecimal digits, got {len(digest)} characters; `vlmguard key` makes a key and its hash"
            )
        return digest.lower()


class Images(Section):
    hosts: Texts = ()
    seconds: Seconds = 10
    max_bytes: Count = 10 * 2**20
    redirects: Annotated[int, Field(ge=0, le=20)] = 3
    ports: Annotated[tuple[Port, ...], Field(strict=False)] = (443, 80)

    @field_validator("hosts")
    @classmethod
    def _names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            try:
                pattern(host)
            except ConfigError:
                expected = '"images.example.com" or "*.example.com"'
                raise ValueError(f"expected names such as {expected}, got {got(host)}") from None
        return hosts


class Admission(Section):
    concurrent: Count = 256
    waiting: Annotated[int, Field(ge=0)] = 512
    wait_seconds: Seconds = 10


class Breaker(Section):
    failures: Count = 5
    seconds: Seconds = 30


class AuditLog(Section):
    url: str = Field(default="sqlite:///vlmguard-audit.sqlite3", repr=False)
    texts: bool = False
    retention_days: Count = 30
    enabled: bool = True

    @field_validator("url")
    @classmethod
    def _of_a_database(cls, url: str) -> str:
        if not re.match(r"(sqlite|postgresql)(\+\w+)?://", url):
            raise ValueError(f"expected sqlite:///FILE or postgresql://USER@HOST/NAME, got {got(url)}")
        return url


class Telemetry(Section):
    metrics: bool = True
    otlp_endpoint: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("otlp_endpoint")
    @classmethod
    def _without_a_key(cls, url: str | None) -> str | None:
        if url is not None:
            _address(url, "Set OTEL_EXPORTER_OTLP_HEADERS instead.")
        return url


class Routes(Section):
    allow: Texts = ()
    guardrails: bool = True

    @field_validator("allow")
    @classmethod
    def _plain(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+", path):
                raise ValueError(f'expected whole paths such as "/v1/embeddings", got {got(path)}')
            if path in (*OWN, MODELS):
                raise ValueError(f"{path} is the gateway's own; set its mode in [policy] routes")
        return paths


def api_root(url: str) -> str:
    """A server's address up to and with /v1, which is added where there is no path.

    Raises:
        ValueError: it is no http(s) address, or holds more than one: a key, a query, a model's name.
    """
    address = _address(url, "Name the variable that holds it: api_key_env.")
    if address.query_string or address.fragment:
        raise ValueError("expected an address without ? and #; a model's name goes to model")
    path = address.path.rstrip("/").removesuffix("/chat/completions")
    return str(address.with_path(path or "/v1"))


def _address(text: str, remedy: str) -> URL:
    """Raises ValueError where it is no http(s) address, or has a user or password."""
    try:
        url = URL("" if re.search(r"\s", text) else text)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"expected an address such as http://127.0.0.1:8000/v1, got {got(text)}")
    if url.user is not None or url.password is not None:
        raise ValueError(f"the address holds a user or a password. {remedy}")
    return url
