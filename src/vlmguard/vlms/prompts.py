"""A chat -> the tensors a transformers model takes, through the model's own processor and chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmguard.chat import Chat, Image, Message, Text
from vlmguard.errors import ContextTooLong, TargetError
from vlmguard.images import frames, model_ready
from vlmguard.parts import Part, flat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A processor's names for what stands for a picture in the template's text.
PLACEHOLDERS = ("image_token", "boi_token")


@dataclass(frozen=True)
class Prompt:
    """One row of model inputs. `tokens` counts the prompt's tokens, those of its pictures included."""

    tensors: Mapping[str, Tensor]
    image: bool

    @property
    def tokens(self) -> int:
        return int(self.tensors["input_ids"].shape[1])

    @property
    def shape(self) -> Hashable:
        """Rows with equal shapes can be one batch: what is not a sequence is laid end to end."""
        return tuple(
            sorted((name, *value.shape[1:]) for name, value in self.tensors.items() if not self.sequence(name))
        )

    def sequence(self, name: str) -> bool:
        """Whether a tensor has one entry a token, and so is padded."""
        return not name.startswith(("pixel", "image")) and self.tensors[name].shape == self.tensors["input_ids"].shape


class Prompter:
    """Writes prompts for one model.

    Text of any turn is data: what would become a special token in it is broken by a space (F042). Templates
    that refuse or drop a system turn get it in front of the first user turn (F041). Nothing is ever cut off
    (F100).
    """

    def __init__(self, processor: Any, context_tokens: int | None, name: str) -> None:
        self.processor = processor
        self.context_tokens = context_tokens
        self.name = name
        self.plain = neutraliser(processor)

    def __call__(self, chat: Chat) -> Prompt:
        """Raises ContextTooLong, or TargetError where the processor cannot take the conversation."""
        turns = [self._turn(message) for message in chat.messages]
        rendered, pictures = self._render(turns)
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        try:
            tensors = self.processor(
                text=[rendered],
                images=[pictures] if pictures else None,
                return_tensors="pt",
                truncation=False,
                add_special_tokens=not (bos and rendered.startswith(bos)),
            )
        except (ValueError, TypeError, IndexError) as error:
            raise TargetError(f"the processor of {self.name} cannot take this conversation: {error}") from error
        prompt = Prompt(dict(tensors), bool(pictures))
        if self.context_tokens is not None and prompt.tokens >= self.context_tokens:
            raise ContextTooLong(
                f"the conversation has {prompt.tokens} tokens, {self.name} takes {self.context_tokens - 1}",
                "Shorten it, or send fewer pictures.",
            )
        return prompt

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message as templates take it: its pieces in place, adjacent texts joined by a line break."""
        role = message.role.strip().lower()
        content: list[dict[str, Any]] = []
        for piece in _pieces(message, role):
            if not isinstance(piece, str):
                content.append({"type": "image", "image": piece})
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += "\n" + piece
            else:
                content.append({"type": "text", "text": piece})
        for part in content:
            if part["type"] == "text":
                part["text"] = self.plain(part["text"])
        known = {"developer": "system", "system": "system", "assistant": "assistant"}
        return {"role": known.get(role, "user"), "content": content or [{"type": "text", "text": ""}]}

    def _render(self, turns: list[dict[str, Any]]) -> tuple[str, list[Any]]:
        """What the template makes of the first layout that it keeps whole, and the pictures in order."""
        from jinja2 import TemplateError

        problem = "it has no chat template"
        layouts: list[Callable[[], list[dict[str, Any]]]] = [lambda: turns, lambda: merged(turns)]
        layouts += [] if _pictures(turns) else [lambda: as_strings(turns), lambda: as_strings(merged(turns))]
        for layout in layouts:
            written = layout()
            try:
                rendered = self.processor.apply_chat_template(written, tokenize=False, add_generation_prompt=True)
            except (TemplateError, ValueError, TypeError) as error:  # TypeError: it adds strings to lists
                problem = str(error)
                continue
            if self._keeps(rendered, written):
                return rendered, _pictures(written)
            problem = "it drops a turn or a picture"
        raise TargetError(
            f"the chat template of {self.name} cannot write this conversation: {problem}",
            "Try a conversation of user and assistant turns with text and pictures in the user's.",
        )

    def _keeps(self, rendered: str, turns: Iterable[dict[str, Any]]) -> bool:
        """Whether the users' and system's words are there, not as Python's repr, with every picture."""
        texts = [text.strip() for turn in turns if turn["role"] != "assistant" for text in _texts(turn)]
        if not all(text in rendered for text in texts):
            return False
        if rendered.count("{'type'") > sum(text.count("{'type'") for turn in turns for text in _texts(turn)):
            return False
        marks = [mark for name in PLACEHOLDERS if (mark := getattr(self.processor, name, None))]
        count = len(_pictures(turns))
        return not marks or any(rendered.count(mark) == count for mark in marks)


def _pieces(message: Message, role: str) -> Iterable[Any]:
    """A message's texts (str) and pictures, in order; what is neither becomes a few words in brackets."""
    if role in ("tool", "function"):
        yield f"[result of {message.raw.get('name') or message.raw.get('tool_call_id') or 'a tool'}]"
    for part in flat(message.parts):
        yield from _piece(part)
    for call in message.raw.get("tool_calls") or ():
        function = (call.get("function") or {}) if isinstance(call, Mapping) else {}
        yield f"[called {function.get('name', 'a tool')}({function.get('arguments', '')})]"


def _piece(part: Part) -> Iterable[Any]:
    if isinstance(part, Text):
        yield part.text
    elif isinstance(part, Image):
        yield from (model_ready(frame) for frame in frames(part))
    elif not part.parts:
        kind = part.raw.get("type") if isinstance(part.raw, Mapping) else None
        yield f"[{kind or 'part'}: not shown]"


def _texts(turn: Mapping[str, Any]) -> list[str]:
    content = turn["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _pictures(turns: Iterable[Mapping[str, Any]]) -> list[Any]:
    contents = (turn["content"] for turn in turns if not isinstance(turn["content"], str))
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def merged(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with the system's in front of the first user's, and without two of one role in a row."""
    gap = {"type": "text", "text": "\n\n"}
    lead = [part for turn in turns if turn["role"] == "system" for part in (*turn["content"], gap)]
    rest = [turn for turn in turns if turn["role"] != "system"]
    if lead and (not rest or rest[0]["role"] != "user"):
        rest.insert(0, {"role": "user", "content": []})
    joined: list[dict[str, Any]] = []
    for turn in rest:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1]["content"] += [gap, *turn["content"]]
        else:
            joined.append({"role": turn["role"], "content": [*(lead if not joined else ()), *turn["content"]]})
    return joined


def as_strings(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns for a template that takes text only, as strings."""
    return [{"role": turn["role"], "content": "".join(_texts(turn))} for turn in turns]


def neutraliser(processor: Any) -> Callable[[str], str]:
    """A function that breaks whatever would be read as a special token: `<image>` -> `< image>`."""
    tokenizer = processor.tokenizer
    added = [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special or _markup(token.content)
    ]
    tags = [
        value for name, value in vars(processor).items() if name.endswith(("_token", "_tag")) and isinstance(value, str)
    ]
    marks = sorted(
        {mark for mark in (*tokenizer.all_special_tokens, *added, *tags) if mark.strip()},
        key=len,
        reverse=True,
    )
    if not marks:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, marks)))
    special = set(tokenizer.convert_tokens_to_ids(marks)) - {getattr(tokenizer, "unk_token_id", None), None}

    def plain(text: str) -> str:
        for _ in range(4):
            spans = [match.span() for match in pattern.finditer(text)] or _special_spans(tokenizer, text, special)
            if not spans:
                return text
            for start, end in reversed(spans):
                text = f"{text[: start + 1]} {text[start + 1 :]}" if end - start > 1 else text[:start] + text[end:]
        return pattern.sub(" ", text)

    return plain


def _markup(token: str) -> bool:
    """Of tokens not called special: `<|...|>`, `<tool_call>`, `[INST]`; not HTML, which Gemma has."""
    return re.search(r"[|_\[\]]", token) is not None


def _special_spans(tokenizer: Any, text: str, special: set[int]) -> list[tuple[int, int]]:
    """Where the tokenizer still finds special tokens, once it has normalised width or case."""
    if not tokenizer.is_fast:
        return []
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [span for token, span in zip(read["input_ids"], read["offset_mapping"], strict=True) if token in special]


def collate(prompts: Sequence[Prompt], pad: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """One batch of rows of equal `shape`: sequences padded on the left, pictures end to end in their
    order."""
    import torch

    longest = max(prompt.tokens for prompt in prompts)
    batch: dict[str, Tensor] = {}
    for name, sequence in {name: prompt.sequence(name) for prompt in prompts for name in prompt.tensors}.items():
        if sequence:
            blank = torch.zeros((1, 0), dtype=torch.long)
            rows = [prompt.tensors.get(name, blank) for prompt in prompts]
            fill = pad if name == "input_ids" else 0
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill) for row in rows]
        else:
            rows = [prompt.tensors[name] for prompt in prompts if name in prompt.tensors]
        joined = torch.cat(rows).to(device)
        batch[name] = joined.to(dtype) if joined.is_floating_point() else joined
    return batch
