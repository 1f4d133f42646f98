"""Stage 3: what the rewriter's adapter learns: the verdict on every kind of case, and the protocol's output for risky ones."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from runs.packaged import learn
from runs.packaged.album import Album, Table, read_as
from runs.packaged.rows import Case
from vlmguard.chat import Chat
from vlmguard.rewriter.packaged import MAX_PICTURES
from vlmguard.rewriter.protocol import VERDICTS, Analysis, Rewrite, Seen, render_input, render_output

PER_SITUATION = 2  # of the risky pairs of words and pictures
SAFE = 450  # situations that teach the word "safe"
VERDICTS_PER_SITUATION = 4
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


def verdict_rows(
    tokenizer: Any,
    image_token: int,
    cases: Sequence[Case],
    book: Album,
    labels: Sequence[tuple[str, ...]],
    rng: random.Random,
) -> list[learn.Row]:
    """One token each, `risky` or `safe`: VERDICTS_PER_SITUATION cases of every situation, pairs of the same words first."""
    found: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if not case.held:
            found[case.situation].append(case)
    chosen = [case for every in found.values() for case in _with_contrasts(every, rng)]
    return [row for row in (verdict_row(tokenizer, image_token, case, book, labels, rng) for case in chosen) if row]


def verdict_row(
    tokenizer: Any, image_token: int, case: Case, book: Album, labels: Sequence[tuple[str, ...]], rng: random.Random
) -> learn.Row | None:
    """None where it is too long to learn from."""
    pictures = [book.row(key) for key in case.pictures[:MAX_PICTURES]]
    row = learn.encode(tokenizer, image_token, asked(case, book, labels, rng), VERDICTS[case.risk], pictures)
    row.ids = row.ids[: row.start + 1]
    return row if len(row.ids) < LONGEST_TOKENS else None


def _with_contrasts(cases: Sequence[Case], rng: random.Random) -> list[Case]:
    every = rng.sample(cases, len(cases))
    chosen: list[Case] = []
    for risky in (case for case in every if case.risk and case.pictures):
        same = [case for case in every if not case.risk and case.text == risky.text]
        if same and len(chosen) + 2 <= VERDICTS_PER_SITUATION:
            chosen += [risky, rng.choice(same)]
    rest = [case for case in every if case not in chosen]
    return chosen + rest[: VERDICTS_PER_SITUATION - len(chosen)]


@torch.inference_mode()
def first_token_logits(
    model: Any, tokenizer: Any, rows: Sequence[learn.Row], features: Table, image_token: int
) -> torch.Tensor:
    """(N,) how much likelier the answer begins with "risky" than with "safe"."""
    safe, risky = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in VERDICTS)
    direction = (model.lm_head.weight[risky].float() - model.lm_head.weight[safe].float())[:, None]
    order = sorted(range(len(rows)), key=lambda k: len(rows[k].ids))
    out = torch.zeros(len(rows))
    for start in range(0, len(order), 16):
        chosen = order[start : start + 16]
        embedded = learn.embed(model, [rows[k] for k in chosen], features, image_token)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        last = torch.stack([hidden[place, rows[k].start - 1] for place, k in enumerate(chosen)])
        out[chosen] = (last.float() @ direction).squeeze(1)
    return out


def rewrite_of(case: Case) -> Rewrite:
    return Rewrite(1.0, case.category, Analysis(**case.analysis), case.prompt) if case.analysis else Rewrite(0.0)


def asked(case: Case, book: Album, labels: Sequence[tuple[str, ...]], rng: random.Random) -> str:
    """The rewriter's input for a case."""
    seen = [Seen(labels[book.row(key)], read_as(book.words(key), rng)) for key in case.pictures[:MAX_PICTURES]]
    turns = [{"role": role, "content": text} for role, text in case.turns]
    return render_input(Chat.of(case.text, system=case.system, turns=turns), seen)
