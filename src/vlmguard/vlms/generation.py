"""Decoding of one batch on a transformers model, and each row's own progress in it.

A row ends, streams and samples by itself (its own generator, stop strings and logprobs), so its answer does
not depend on the rows beside it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmguard.chat import Chat, Response, TokenLogprob, Usage
from vlmguard.errors import TargetError
from vlmguard.vlms.batching import settle
from vlmguard.vlms.prompts import Prompt, Prompter, collate
from vlmguard.vlms.settings import Settings
from vlmguard.vlms.steering import Contrast, Patch, patched

if TYPE_CHECKING:
    from torch import Tensor

# (prompt and generated ids (B, T), logits (B, V) float32) -> logits: a transformers LogitsProcessor, or any
# function.
Processor: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


class Engine:
    """A transformers model with its processor: prompts in, decoded rows out. For one thread at a time."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name
        self.context_tokens = _context_tokens(model.config)
        self.prompt = Prompter(processor, self.context_tokens, name)
        self.stop_tokens = _stop_tokens(model, self.tokenizer)
        pads = (self.tokenizer.pad_token_id, model.generation_config.pad_token_id, *sorted(self.stop_tokens))
        self.pad = next((pad for pad in pads if pad is not None), 0)

    def first_tokens(self, word: str) -> frozenset[int]:
        """The tokens that `word` starts with, spelled with and without a space before it."""
        spelled = (self.tokenizer.encode(text, add_special_tokens=False)[:1] for text in (word, f" {word}"))
        return frozenset(token for tokens in spelled for token in tokens if self.tokenizer.decode([token]).strip())

    def probe(self) -> Tensor:
        """The next token's logits (V,) after a fixed question about a fixed picture, to tell models apart."""
        from PIL import Image

        picture = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").save(picture, "PNG")
        prompt = self.prompt(Chat.of("Describe this picture in one sentence.", [picture.getvalue()]))
        inputs = collate([prompt], self.pad, self.model.device, self.model.dtype)
        logits: Tensor = self.model(**inputs).logits[0, -1].float()
        return logits

    def decode(self, rows: Sequence[Row]) -> None:
        """Generate for rows of one key, until each has settled its future. Raises TargetError."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        first = rows[0]
        prompts = [row.prompt for row in rows] + [row.other for row in rows if row.other is not None]
        inputs = collate(prompts, self.pad, self.model.device, self.model.dtype)
        image = torch.tensor([prompt.image for prompt in prompts])
        progress = _Progress(rows, first.contrast, first.processors)
        try:
            with torch.no_grad(), patched(self.model, first.patches, inputs["attention_mask"], image):
                self.model.generate(
                    **inputs,
                    generation_config=self._plain_config(first.settings.max_tokens),
                    logits_processor=LogitsProcessorList([progress.choose]),
                    stopping_criteria=StoppingCriteriaList([progress.watch]),
                )
        except (RuntimeError, ValueError, IndexError) as error:  # out of memory is a RuntimeError
            what = str(error).partition("\n")[0]
            raise TargetError(f"{self.name} failed: {what}", "Out of memory? Lower max_batch.") from error
        for row in rows:
            row.end()

    def _plain_config(self, max_tokens: int | None) -> Any:
        """What was asked and nothing else: a checkpoint's own sampling defaults do not apply."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,  # sampling happens in _Progress.choose, a generator a row
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            eos_token_id=sorted(self.stop_tokens) or None,
            pad_token_id=self.pad,
            use_cache=True,
        )


def _context_tokens(config: Any) -> int | None:
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    return next((int(value) for name in names if (value := getattr(text, name, None))), None)


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


@dataclass(eq=False)
class Row:
    """One call of a local model: a job of the batcher, and its progress.

    Args:
        emit: gets the text as it comes.
        inspect: gets the first token's logits (V,), after contrast and processors.
    """

    engine: Engine
    chat: Chat
    wanted: Settings
    processors: tuple[Processor, ...] = ()
    patches: tuple[Patch, ...] = ()
    contrast: Contrast | None = None
    seed: int | None = None
    emit: Callable[[str], None] | None = None
    inspect: Callable[[Tensor], None] | None = None
    future: Future[Response] = field(default_factory=Future)
    other: Prompt | None = None
    done: bool = False
    generated: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def prepare(self) -> Hashable:
        self.prompt = self.engine.prompt(self.chat)
        self.other = None if self.contrast is None else self.engine.prompt(self.contrast.chat)
        tokens = max(self.prompt.tokens, self.other.tokens if self.other else 0)
        self.settings = self.wanted.fitted(tokens, self.engine.context_tokens, self.engine.name)
        self.transcript = Transcript(self.engine.tokenizer, self.settings.stop)
        against = (self.contrast.function, self.other.shape) if self.contrast and self.other else None
        return (self.settings, self.processors, self.patches, against, self.prompt.shape)

    def run(self, batch: Sequence[Row]) -> None:
        self.engine.decode(batch)

    def choose(self, logits: Tensor, greedy: int) -> int:
        """The row's next token; `greedy` is the likeliest."""
        if self.inspect is not None and self.generated == 0:
            self.inspect(logits)
        token = self._sample(logits) if self.settings.temperature > 0 else greedy
        if self.settings.top_logprobs is not None:
            self.logprobs.append(self._logprob(logits, token, self.settings.top_logprobs))
        return token

    def _sample(self, logits: Tensor) -> int:
        import torch

        if self.generated == 0:  # on the CPU, so that a seed means the same on every device
            self._generator = torch.Generator()
            self._generator.manual_seed(self.seed) if self.seed is not None else self._generator.seed()
        probabilities = (logits.float().cpu() / self.settings.temperature).softmax(-1)
        if self.settings.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= self.settings.top_p] = 0.0
            return int(index[torch.multinomial(ordered, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _logprob(self, logits: Tensor, token: int, count: int) -> TokenLogprob:
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(count)
        words = [self.engine.tokenizer.decode([index]) for index in best.indices.tolist()]
        top: dict[str, float] = {}
        for word, logprob in zip(words, best.values.tolist(), strict=True):
            top.setdefault(word, logprob)  # likeliest first
        return TokenLogprob(self.engine.tokenizer.decode([token]), float(logprobs[token]), top)

    def accept(self, token: int) -> None:
        """Take the token, and finish where it ends the answer."""
        if self.done or self.future.cancelled():
            self.done = True
            return
        self.generated += 1
        if token in self.engine.stop_tokens:
            del self.logprobs[-1:]
            self._finish("stop")
            return
        self._show(self.transcript.add(token))
        if self.transcript.stopped:
            self._finish("stop")
        elif self.generated == self.settings.max_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self.done = True
        self._show(self.transcript.close())
        read = self.prompt.tokens + (self.other.tokens if self.other else 0)
        usage = Usage(2 if self.other else 1, read, self.generated, time.perf_counter() - self.started)
        settle(self.future, Response(self.transcript.text, reason, usage, logprobs=tuple(self.logprobs)))

    def end(self) -> None:
        """Settle what the model left unfinished, if anything."""
        if not self.done:
            self._finish("length")

    def _show(self, text: str) -> None:
        if text and self.emit is not None:
            self.emit(text)


class _Progress:
    """The hooks of `generate`: choose every row's next token, then tell which rows are done.

    With a contrast the batch is the rows, then their other conversations in the same order, which get the
    same tokens.
    """

    def __init__(self, rows: Sequence[Row], contrast: Contrast | None, processors: Sequence[Processor]) -> None:
        self.rows = rows
        self.contrast = contrast
        self.processors = processors
        self.tokens: list[int] = []

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        import torch

        count, total = len(self.rows), len(logits)
        if self.contrast is not None:
            ids, logits = ids[:count], self.contrast.function(logits[:count], logits[count:])
        for processor in self.processors:
            logits = processor(ids, logits)
        greedy = logits.argmax(-1).tolist()
        if bool(logits.isnan().any()):
            raise TargetError("the model's logits are not numbers", "Weaken the patches, or load it in float32.")
        self.tokens = [
            token if row.done else row.choose(logits[at], token)
            for at, (row, token) in enumerate(zip(self.rows, greedy, strict=True))
        ]
        chosen = torch.tensor(self.tokens, device=logits.device).repeat(total // count)
        nothing = torch.full((total, logits.shape[-1]), -torch.inf, device=logits.device)
        return nothing.scatter(1, chosen[:, None], 0.0)

    def watch(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        import torch

        for row, token in zip(self.rows, self.tokens, strict=True):
            row.accept(token)
        done = torch.tensor([row.done for row in self.rows], device=ids.device)
        return done.repeat(len(ids) // len(self.rows))


class Transcript:
    """Tokens to text, a piece at a time: whole characters only, ending before the first stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._start = self._end = 0  # of the tokens last turned to text: the context of the next
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that this token lets through."""
        self._tokens.append(token)
        new = self._decoded()[len(self._decoded(self._end)) :]
        if not new or new.endswith("\ufffd"):  # a character's bytes may be spread over tokens
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return self._let_through(new, last=False)

    def close(self) -> str:
        """The text that was still held back."""
        if self.stopped:
            return ""
        return self._let_through(self._decoded()[len(self._decoded(self._end)) :], last=True)

    def _decoded(self, end: int | None = None) -> str:
        tokens = self._tokens[self._start : end]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _let_through(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = text[: min(found)], ""
        else:
            keep = 0 if last else _overlap(text, self._stop)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of `text` could begin one of `stops`."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)
