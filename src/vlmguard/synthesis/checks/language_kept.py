"""Whether the rewritten prompt is in the request's own language."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Final

from vlmguard.errors import missing_extra
from vlmguard.rewriter.protocol import Rewrite, neutral, script
from vlmguard.synthesis.checks.finding import NO_PROMPT, Finding
from vlmguard.synthesis.sample import Sample

# Of the 5,245 texts in data/situations (ten languages, 1 to 929 characters) py3langid names 95 % with these two or more, all of
# them rightly; of those below 30 characters 43 %. With neither, 24 are named wrongly.
LEAST_CONFIDENCE: Final = 0.8
LEAST_BYTES: Final = 20  # UTF-8: a letter of Chinese counts three times


@dataclass(frozen=True)
class LanguageKept:
    """Script and language are the same before and after; the language counts where both texts are long enough to tell.

    Calls: none.
    """

    name: ClassVar[str] = "language_kept"

    def __post_init__(self) -> None:
        _identifier()  # its absence is an error now, not at the first row

    async def __call__(self, sample: Sample, rewrite: Rewrite) -> Finding:
        if rewrite.prompt is None:
            return NO_PROMPT
        was, now = script(sample.prompt), script(rewrite.prompt)
        languages = language_of(sample.prompt), language_of(rewrite.prompt)
        facts: dict[str, Any] = {"script": [was, now], "language": list(languages)}
        if was == "none":
            return Finding(facts=facts | {"skipped": "the request has no letters"})
        if None not in languages:
            if languages[0] != languages[1]:
                return Finding(f"it is rewritten in another language ({languages[0]} to {languages[1]})", facts)
        elif was != now:
            return Finding(f"it is rewritten in other letters ({was} to {now})", facts)
        return Finding(facts=facts)


def language_of(text: str) -> str | None:
    """The text's language as an ISO 639-1 code; None where it is too short or too mixed to tell.

    Raises MissingExtra.
    """
    plain = re.sub(r"https?://\S+", " ", neutral(text)).strip()
    if len(plain.encode("utf-8", "ignore")) < LEAST_BYTES:
        return None
    code, confidence = _identifier().classify(plain)
    return str(code) if confidence >= LEAST_CONFIDENCE else None


@cache
def _identifier() -> Any:
    """One of our own: the module's functions share one that anybody may restrict to some languages."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise missing_extra("py3langid", "synthesis") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
