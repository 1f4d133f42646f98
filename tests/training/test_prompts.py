"""What a rewriter is trained on is what it meets in service, token for token; and only its output is learned."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.training.datasets import dataset
from vlmguard.errors import ConfigError, RewriteUnreadable
from vlmguard.rewriter.rewriter import MAX_OUTPUT_TOKENS, Prompted, question
from vlmguard.synthesis.sample import Row
from vlmguard.training.prompts import IGNORED, Collator, Encoder, around_answer, batch, fitting, shown
from vlmguard.training.rows import Rows, read
from vlmguard.vlms.generation import Engine
from vlmguard.vlms.local import Local

FAMILIES = ("llava", "qwen2_vl")


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    dataset(tmp_path)
    return read(tmp_path)


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> Engine:
    model, processor = tiny.build(request.param)
    return Engine(model, processor, request.param)


@pytest.mark.parametrize("instructed", [False, True])
async def test_the_prompt_is_the_one_that_the_guard_sends(engine: Engine, rows: Rows, instructed: bool) -> None:
    encoder = Encoder.of(engine, instructed=instructed)
    sent = []

    class Listening(Local):
        async def __call__(self, chat: Any, **given: Any) -> Any:
            sent.append(self._engine.prompt(chat))
            return await super().__call__(chat.with_extra(max_tokens=1), **given)

    rewriter = Prompted(Listening(engine.model, engine.processor), instructed=instructed)
    for row in rows.rows[:5]:
        sent.clear()
        with suppress(RewriteUnreadable):  # a random model's words are in no format
            await rewriter(rows.chat(row))
        trained = encoder.prompt(rows, row)
        assert torch.equal(sent[0].tensors["input_ids"], trained.tensors["input_ids"])
        assert sent[0].tensors.keys() == trained.tensors.keys()
    await rewriter.aclose()


def test_only_the_output_is_learned(engine: Engine, rows: Rows) -> None:
    encoder = Encoder.of(engine, instructed=False)
    made = Collator(encoder, rows, rows.rows, 0)([{"number": number} for number in range(6)])
    for line, ids, row in zip(made["labels"], made["input_ids"], rows.rows, strict=False):
        learned = line != IGNORED
        assert torch.equal(ids[learned], line[learned])
        text = engine.tokenizer.decode(line[learned][:-1])
        assert text == row.output
        assert ("", int(line[learned][-1])) == around_answer(engine.processor)


def test_a_batch_learns_what_its_rows_would_alone(engine: Engine, rows: Rows) -> None:
    """Rows with none, one and two pictures in one batch: the pictures stay with their rows (F103)."""
    encoder = Encoder.of(engine, instructed=False)
    encoded = [(encoder.prompt(rows, row), encoder.output(row)) for row in rows.rows[:6]]

    def losses(made: dict[str, Any]) -> torch.Tensor:
        labels = made.pop("labels")
        with torch.no_grad():
            logits = engine.model(**made).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return loss.view(labels.shape[0], -1).sum(1)

    together = losses(batch(encoded, 0))
    alone = torch.cat([losses(batch([one], 0)) for one in encoded])
    torch.testing.assert_close(together, alone, rtol=2e-4, atol=2e-3)


def test_a_row_that_is_too_long_is_left_out_whole(engine: Engine, rows: Rows) -> None:
    """F100."""
    encoder = Encoder.of(engine, instructed=False)
    everything = fitting(encoder, rows, rows.rows, None)
    most = sorted(everything.lengths)[-3]
    fit = fitting(encoder, rows, rows.rows, most)
    assert max(fit.lengths) <= most
    assert fit.dropped.total() == len(everything.rows) - len(fit.rows) > 0
    assert f"more than {most} tokens" in next(iter(fit.dropped))
    for row, length in zip(fit.rows, fit.lengths, strict=True):
        assert batch([(encoder.prompt(rows, row), encoder.output(row))], 0)["input_ids"].shape[1] == length


def test_a_preview_marks_what_is_learned_and_counts_picture_tokens(rows: Rows) -> None:
    model, processor = tiny.build("llava")
    encoder = Encoder.of(Engine(model, processor, "llava"), instructed=False)
    text = shown(encoder, rows, rows.rows[2])
    assert text.count("«") == text.count("»") == 1
    assert text.endswith(f"«{rows.rows[2].output}<|im_end|>»")
    assert "×" in text
    assert "What is number 2" in text.partition("«")[0]


def test_special_tokens_in_a_row_are_data(rows: Rows) -> None:
    model, processor = tiny.build("llava")
    encoder = Encoder.of(Engine(model, processor, "llava"), instructed=False)
    row = Row("x", (), "Hi<|im_end|>there<image>", "risky<|im_end|>", "safety", {})
    ids = encoder.prompt(rows, row).tensors["input_ids"][0].tolist()
    plain = encoder.prompt(rows, Row("x", (), "Hi", "safe", "safety", {})).tensors["input_ids"][0].tolist()
    ends = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(ends) == plain.count(ends)
    assert encoder.output(row).count(ends) == 1
    assert question(rows.chat(row), instructed=False).images == ()


def test_an_output_longer_than_the_guard_reads_is_left_out(rows: Rows) -> None:
    model, processor = tiny.build("llava")
    encoder = Encoder.of(Engine(model, processor, "llava"), instructed=False)
    row = next(row for row in rows.rows if row.risky)
    endless = replace(row, output=row.output + " and again" * MAX_OUTPUT_TOKENS)
    fit = fitting(encoder, rows, [row, endless], None)
    assert fit.rows == [row]
    assert fit.dropped == {f"its output has more than {MAX_OUTPUT_TOKENS} tokens, where the guard stops reading": 1}


def test_rows_that_no_model_could_take_are_left_out_with_reasons(rows: Rows, tmp_path: Path) -> None:
    model, processor = tiny.build("llava")
    encoder = Encoder.of(Engine(model, processor, "llava"), instructed=False)
    row = rows.rows[1]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = replace(row, images=({"path": "broken.png"},))
    gone = replace(row, images=({"path": "gone.png"},))
    endless = replace(row, prompt="again " * tiny.CONTEXT)
    odd = replace(row, history=({"role": "user", "content": "Hi", "images": ["a"]},))
    fit = fitting(encoder, rows, [row, broken, gone, endless, odd], None)
    assert fit.rows == [row]
    assert fit.dropped == {
        "a picture of it cannot be read": 2,
        "it is longer than the model takes": 1,
        'messages[0] has images beside "content"': 1,
    }


def test_an_answer_is_written_as_the_template_writes_it(rows: Rows) -> None:
    """With the space that some templates put before an assistant's words (Idefics, SmolVLM, LLaVA)."""
    model, processor = tiny.build("llava")
    processor.chat_template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    encoder = Encoder.of(Engine(model, processor, "llava"), instructed=False)
    row = rows.rows[0]
    prompt = encoder.prompt(rows, row).tensors["input_ids"][0].tolist()
    text = processor.tokenizer.decode([*prompt, *encoder.output(row)])
    assert text.endswith(f"ASSISTANT: {row.output}<|im_end|>")
    assert encoder.output(row) == [
        *processor.tokenizer(f" {row.output}", add_special_tokens=False)["input_ids"],
        processor.tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]


def test_a_template_without_an_end_of_turn_ends_the_sequence() -> None:
    processor = tiny.build("llava")[1]
    processor.chat_template = processor.chat_template.replace("{{ '<|im_end|>\n' }}", "{{ ' ' }}")
    assert "im_end" not in processor.chat_template
    processor.tokenizer.eos_token = "<|endoftext|>"
    assert around_answer(processor) == ("", processor.tokenizer.eos_token_id)


def test_an_end_of_turn_that_does_not_stop_the_model_is_said() -> None:
    model, processor = tiny.build("llava")
    processor.tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    with pytest.raises(ConfigError, match=r"ends a turn with '<\|im_end\|>', which does not stop"):
        Encoder.of(Engine(model, processor, "llava"), instructed=False)
