"""Whether a rewrite is in the rewriter's one format and can be read back from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmguard.errors import RewriteUnreadable
from vlmguard.rewriter.protocol import Rewrite, check_prompt, parse_output, render_output
from vlmguard.synthesis.checks.finding import NO_PROMPT, Finding
from vlmguard.synthesis.sample import Sample


@dataclass(frozen=True)
class Form:
    """The rules that the guard holds every rewritten prompt to, and a round trip through the training target.

    Calls: none.
    """

    name: ClassVar[str] = "form"

    async def __call__(self, sample: Sample, rewrite: Rewrite) -> Finding:
        if rewrite.prompt is None:
            return NO_PROMPT
        try:
            check_prompt(rewrite.prompt, sample.prompt, rewrite.analysis)
            back = parse_output(render_output(rewrite))
        except RewriteUnreadable as error:
            return Finding(error.message)
        if (back.category, back.prompt) != (rewrite.category, rewrite.prompt.strip()):
            return Finding("its row would be read back as another rewrite")
        return Finding(facts={"characters": len(rewrite.prompt)})
