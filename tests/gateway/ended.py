"""A request at its end, and what a scrape then shows."""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from vlmguard.chat import Step

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

ROUTES = ("/v1/chat/completions", "/v1/messages", "/v1/models")


@dataclass
class Request:
    route: str = ROUTES[0]
    action: str = "passed"
    status: int = 200
    step: Step | None = None
    guard_seconds: float | None = None
    upstream_first_byte_seconds: float | None = None
    seconds: float = 0.2
    pictures: int = 0


def series(text: str | bytes) -> Series:
    text = text if isinstance(text, str) else text.decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}
