"""A row as tokens: what the guard sends at inference, token for token, then the output that is learned.

The prompt side is written by the very code that the local backend uses (`vlms.prompts`), so that a rewriter meets in service
what it was trained on. Nothing is ever cut off: a row that is too long is left out whole (F100).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vlmguard.errors import BadRequest, ConfigError, ContextTooLong, ImageError, TargetError
from vlmguard.rewriter.rewriter import MAX_OUTPUT_TOKENS, question
from vlmguard.synthesis.sample import Row
from vlmguard.training.rows import Rows
from vlmguard.vlms.prompts import Prompt, Prompter

if TYPE_CHECKING:
    from torch import Tensor

    from vlmguard.vlms.generation import Engine

IGNORED: Final = -100  # the label of what is not learned


@dataclass(frozen=True)
class Encoder:
    """Rows to tokens.

    Args:
        end: the token that ends a turn of the assistant.
        instructed: with the instructions in front, for a model that was not trained on the format.
        lead: what the chat template puts between its prompt for an answer and the answer: a space, or nothing.
    """

    prompter: Prompter
    end: int
    instructed: bool
    lead: str = ""

    @classmethod
    def of(cls, engine: Engine, *, instructed: bool) -> Encoder:
        """Raises ConfigError where the model would not stop at the end that its template writes."""
        lead, end = around_answer(engine.processor)
        if end not in engine.stop_tokens:
            mark = engine.tokenizer.decode([end])
            raise ConfigError(
                f"{engine.name} ends a turn with {mark!r}, which does not stop its generation",
                "Add its id to eos_token_id in the model's generation_config.json.",
            )
        return cls(engine.prompt, end, instructed, lead)

    def prompt(self, rows: Rows, row: Row) -> Prompt:
        """Raises ImageError, ContextTooLong, TargetError."""
        return self.prompter(question(rows.chat(row), instructed=self.instructed))

    def output(self, row: Row) -> list[int]:
        """The output's tokens and the end of the turn."""
        tokenizer = self.prompter.processor.tokenizer
        # Behind a line break, and without it: by themselves words begin in another way with some tokenizers.
        before, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in ("\n", f"\n{self.lead}{self.prompter.plain(row.output)}")
        )
        ids: list[int] = whole[len(before) :]
        if whole[: len(before)] != before:
            ids = tokenizer(self.prompter.plain(row.output), add_special_tokens=False)["input_ids"]
        return [*ids, self.end]


def around_answer(processor: Any) -> tuple[str, int]:
    """(blanks that the chat template puts before an assistant's words, the token that it puts behind them).

    A template that puts no token there means the end of the sequence.
    """
    tokenizer, answer = processor.tokenizer, "ANSWER"
    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    told = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    before, _, after = processor.apply_chat_template(told, tokenize=False).rpartition(answer)
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if after.strip() else []
    return "" if lead.strip() else lead, int(ids[0] if ids else tokenizer.eos_token_id)


@dataclass(frozen=True)
class Fitting:
    """The rows that fit, with their lengths in tokens, pictures included; and why the others do not."""

    rows: list[Row]
    lengths: list[int]
    dropped: Counter[str]


def fitting(encoder: Encoder, rows: Rows, chosen: Sequence[Row], max_tokens: int | None) -> Fitting:
    """Leaves out what no batch could hold."""
    found = Fitting([], [], Counter())
    for row in chosen:
        output = len(encoder.output(row))
        try:
            length = encoder.prompt(rows, row).tokens + output
        except ImageError:
            found.dropped["a picture of it cannot be read"] += 1
            continue
        except ContextTooLong:
            found.dropped["it is longer than the model takes"] += 1
            continue
        except (TargetError, BadRequest) as error:
            found.dropped[error.message] += 1
            continue
        if problem := _too_long(length, output, max_tokens, encoder.prompter.context_tokens):
            found.dropped[problem] += 1
            continue
        found.rows.append(row)
        found.lengths.append(length)
    return found


def _too_long(length: int, output: int, max_tokens: int | None, context_tokens: int | None) -> str | None:
    if output > MAX_OUTPUT_TOKENS:
        return f"its output has more than {MAX_OUTPUT_TOKENS} tokens, where the guard stops reading"
    if max_tokens is not None and length > max_tokens:
        return f"it has more than {max_tokens} tokens, its pictures' included"
    if context_tokens is not None and length > context_tokens:
        return "it is longer than the model takes"
    return None


@dataclass(frozen=True)
class Collator:
    """Rows by number -> one batch, padded on the right; pictures end to end in their rows' order (F103)."""

    encoder: Encoder
    rows: Rows
    chosen: Sequence[Row]
    pad: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        picked = [self.chosen[example["number"]] for example in examples]
        return batch([(self.encoder.prompt(self.rows, row), self.encoder.output(row)) for row in picked], self.pad)


def batch(encoded: Sequence[tuple[Prompt, Sequence[int]]], pad: int) -> dict[str, Tensor]:
    """
    Args:
        encoded: (prompt, output ids) of each row.

    Returns:
        the model's inputs, (B, T) for sequences; `labels` (B, T) int64, IGNORED where nothing is learned.
    """
    import torch
    from torch.nn.functional import pad as padded

    longest = max(prompt.tokens + len(output) for prompt, output in encoded)
    made: dict[str, Tensor] = {}
    sequences = {name for prompt, _ in encoded for name in prompt.tensors if prompt.sequence(name)}
    for name in sorted({name for prompt, _ in encoded for name in prompt.tensors}):
        if name not in sequences:
            made[name] = _end_to_end([prompt.tensors[name] for prompt, _ in encoded if name in prompt.tensors])
            continue
        lines = []
        for prompt, output in encoded:
            own = prompt.tensors.get(name, torch.zeros((1, prompt.tokens), dtype=torch.long))
            more = {"input_ids": list(output), "attention_mask": [1] * len(output)}.get(name, [0] * len(output))
            line = torch.cat((own, torch.tensor([more], dtype=own.dtype)), dim=1)
            fill = pad if name == "input_ids" else 0
            lines.append(padded(line, (0, longest - line.shape[1]), value=fill))
        made[name] = torch.cat(lines)
    labels = torch.full((len(encoded), longest), IGNORED)
    for line, (prompt, output) in zip(labels, encoded, strict=True):
        line[prompt.tokens : prompt.tokens + len(output)] = torch.tensor(output)
    return {**made, "labels": labels}


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of pictures, one after the other; those of fewer tiles are filled up with empty ones, as processors do."""
    import torch
    from torch.nn.functional import pad as padded

    shapes = [tensor.shape[1:] for tensor in tensors]
    if len(set(shapes)) > 1:
        widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        tensors = [padded(tensor, _missing(tensor.shape[1:], widest)) for tensor in tensors]
    return torch.cat(list(tensors))


def _missing(own: Sequence[int], widest: Sequence[int]) -> list[int]:
    """How much `torch.nn.functional.pad` has to add behind each side, the last side first."""
    return [more for size, most in zip(reversed(own), reversed(widest), strict=True) for more in (0, most - size)]


def shown(encoder: Encoder, rows: Rows, row: Row, mark: Callable[[str], str] = lambda text: f"«{text}»") -> str:
    """A row as the model reads it; what is learned is marked. Runs of picture tokens are counted."""
    made = batch([(encoder.prompt(rows, row), encoder.output(row))], 0)
    tokenizer = encoder.prompter.processor.tokenizer
    pieces: list[str] = []
    run: list[int] = []
    learned = False
    for token, label in zip(made["input_ids"][0].tolist(), made["labels"][0].tolist(), strict=True):
        if (label != IGNORED) != learned:
            pieces.append(_decoded(tokenizer, run, mark if learned else None))
            run, learned = [], not learned
        run.append(token)
    pieces.append(_decoded(tokenizer, run, mark if learned else None))
    return "".join(pieces)


def _decoded(tokenizer: Any, ids: list[int], mark: Callable[[str], str] | None) -> str:
    parts: list[str] = []
    at = 0
    while at < len(ids):
        end = at
        while end < len(ids) and ids[end] == ids[at]:
            end += 1
        text = tokenizer.decode([ids[at]])
        if end - at > 4:
            parts.append(f"{text}×{end - at}")
            at = end
        else:
            stop = at + 1
            while stop < len(ids) and not all(token == ids[stop] for token in ids[stop : stop + 5]):
                stop += 1
            parts.append(tokenizer.decode(ids[at:stop]))
            at = stop
    text = "".join(parts)
    return mark(text) if mark and text else text
