"""What a check gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmguard.chat import Usage


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        reason: why the row is dropped, as a plain sentence that holds nothing a user wrote; None where it stays.
        facts: what was measured, as JSON values; "skipped" says why a check could not look.
        usage: what the check's models cost.
    """

    reason: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)


def skipped(why: str) -> Finding:
    return Finding(facts={"skipped": why})


NO_PROMPT = skipped("the request is kept as it is")  # a safe one has no rewritten prompt
