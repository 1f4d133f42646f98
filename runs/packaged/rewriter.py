"""Stage 3: what the rewriter's adapter learns: the protocol's output for risky cases, and its one word for some safe ones."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from runs.packaged import learn
from runs.packaged.album import Album, read_as
from runs.packaged.rows import Case
from vlmguard.chat import Chat
from vlmguard.rewriter.packaged import MAX_PICTURES
from vlmguard.rewriter.protocol import Analysis, Rewrite, Seen, render_input, render_output

PER_SITUATION = 2  # of the risky pairs of words and pictures
SAFE = 450  # situations that teach the word "safe"
LONGEST_TOKENS = 700


def rows(
    tokenizer: Any,
    image_token: int,
    cases: Sequence[Case],
    book: Album,
    labels: Sequence[tuple[str, ...]],
    rng: random.Random,
) -> list[learn.Row]:
    risky: dict[str, list[Case]] = defaultdict(list)
    safe: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.held:
            continue
        if case.risk and case.analysis:
            risky[case.situation].append(case)
        elif not case.risk:
            safe[case.situation].append(case)
    chosen = [case for found in risky.values() for case in rng.sample(found, min(PER_SITUATION, len(found)))]
    harmless = [rng.choice(found) for found in safe.values()]
    chosen += rng.sample(harmless, min(SAFE, len(harmless)))
    made = [
        learn.encode(
            tokenizer,
            image_token,
            asked(case, book, labels, rng),
            render_output(rewrite_of(case)),
            [book.row(key) for key in case.pictures[:MAX_PICTURES]],
            first_weight=2.0,
        )
        for case in chosen
    ]
    return [row for row in made if len(row.ids) < LONGEST_TOKENS]


def rewrite_of(case: Case) -> Rewrite:
    return Rewrite(1.0, case.category, Analysis(**case.analysis), case.prompt) if case.analysis else Rewrite(0.0)


def asked(case: Case, book: Album, labels: Sequence[tuple[str, ...]], rng: random.Random) -> str:
    """The rewriter's input for a case."""
    seen = [Seen(labels[book.row(key)], read_as(book.words(key), rng)) for key in case.pictures[:MAX_PICTURES]]
    turns = [{"role": role, "content": text} for role, text in case.turns]
    return render_input(Chat.of(case.text, system=case.system, turns=turns), seen)
