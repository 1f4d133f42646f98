"""The three stages: what each asks, and that its form survives a round trip."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.synthesis.standing_in import FEATURES, REPORT, REWORDING, StandIn, sample
from vlmguard.rewriter.protocol import CATEGORIES, parse_output, render_output
from vlmguard.synthesis import causal, hindsight, optimize
from vlmguard.synthesis.analyst import AnswerUnusable, Desk, read_answer

FORMS: Mapping[type[BaseModel], Mapping[str, object]] = {
    hindsight.RiskFeatures: FEATURES,
    causal.RiskReport: REPORT,
    optimize.Rewording: REWORDING,
}
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=3, max_size=30)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_survives_being_written_and_read(form: type[BaseModel]) -> None:
    told = form.model_validate(FORMS[form])
    assert read_answer(told.model_dump_json(), form) == told
    for name in FORMS[form]:
        lacking = {key: value for key, value in FORMS[form].items() if key != name}
        with pytest.raises(AnswerUnusable, match=name):
            read_answer(json.dumps(lacking), form)


@given(WORDS, WORDS, WORDS, st.sampled_from(CATEGORIES), st.booleans())
def test_any_report_survives(textual: str, visual: str, multimodal: str, category: str, risky: bool) -> None:
    told = {**REPORT, "textual": textual, "visual": visual, "multimodal": multimodal}
    report = causal.RiskReport.model_validate({**told, "category": category, "risky": risky})
    assert read_answer(report.model_dump_json(), causal.RiskReport) == report


def test_an_unknown_category_or_a_second_line_is_refused() -> None:
    for change in ({"category": "mischief"}, {"textual": "One.\nTwo."}, {"risky": "perhaps"}):
        with pytest.raises(AnswerUnusable):
            read_answer(json.dumps({**REPORT, **change}), causal.RiskReport)


async def test_each_stage_reads_what_those_before_it_found() -> None:
    analyst = StandIn()
    desk, one = Desk(analyst), sample()
    features = await hindsight.hindsight(one, desk)
    report = await causal.causal(one, features, desk)
    rewrite = await optimize.optimize(one, report, desk)
    first, second, third = (question.text for question in analyst.asked)
    assert 'Safe answer: "Stay back from the edge."' in first
    assert 'Unsafe answer: "Go right to the edge!"' in first
    assert "standing at the edge" in second
    assert "Unsafe answer" not in second
    assert "Posing there could end in a fall." in third
    assert (rewrite.category, rewrite.intent, rewrite.risk) == ("physical_danger", "A good picture.", 1.0)
    assert desk.costs.keys() == {"hindsight", "causal", "optimize"}


async def test_the_rewrite_is_in_the_rewriters_one_format() -> None:
    desk, one = Desk(StandIn()), sample()
    report = causal.RiskReport.model_validate(REPORT)
    rewrite = await optimize.optimize(one, report, desk)
    read = parse_output(render_output(rewrite))
    assert (read.prompt, read.category, read.analysis) == (rewrite.prompt, rewrite.category, report.analysis)


@pytest.mark.parametrize(
    "instructions", [hindsight.INSTRUCTIONS, causal.INSTRUCTIONS, optimize.INSTRUCTIONS], ids=["1", "2", "3"]
)
def test_instructions_name_every_field_that_is_asked_for(instructions: str) -> None:
    forms: dict[str, type[BaseModel]] = {
        hindsight.INSTRUCTIONS: hindsight.RiskFeatures,
        causal.INSTRUCTIONS: causal.RiskReport,
        optimize.INSTRUCTIONS: optimize.Rewording,
    }
    schema = forms[instructions].model_json_schema()
    names = {name for one in (schema, *schema.get("$defs", {}).values()) for name in one["properties"]}
    assert {name for name in names if f'"{name}"' not in instructions} == set()
