"""The packaged gate: a calibrated probability that a chat is risky, before anything is generated.

Two judges are weighed together: the rewriter's own first token (`risky` against `safe`), and small networks that read the request,
every earlier turn, and each picture's labels, words and pooled features. A long request is judged in overlapping windows, and the
riskiest counts, so that a wish buried in it is not averaged away.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from vlmguard.chat import Chat
from vlmguard.rewriter.protocol import CATEGORIES, Seen, neutral, said_in

if TYPE_CHECKING:
    from torch import Tensor

    from vlmguard.rewriter.network import RiskNetwork

WINDOW_WORDS: Final = 110
STRIDE_WORDS: Final = 80
QUOTED_CHARACTERS: Final = 400  # of an earlier turn, in the context; what is beyond is judged by itself
WORDS: Final = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]|[^\s\u3040-\u9fff\uac00-\ud7af]{1,40}")

FOREIGN_LETTERS: Final = re.compile(r"[^\w']+")
# Frequent small words: enough to tell English from its neighbours on short requests; a language we can't tell counts as English.
ENGLISH: Final = frozenset(
    (
        *(
            "the",
            "a",
            "an",
            "and",
            "or",
            "of",
            "to",
            "in",
            "on",
            "for",
            "with",
            "is",
            "are",
            "was",
            "be",
            "it",
            "this",
            "that",
        ),
        *(
            "what",
            "how",
            "why",
            "who",
            "when",
            "where",
            "can",
            "could",
            "do",
            "does",
            "should",
            "would",
            "there",
            "have",
            "has",
        ),
        *(
            "i",
            "my",
            "you",
            "your",
            "me",
            "we",
            "they",
            "not",
            "from",
            "at",
            "by",
            "as",
            "if",
            "any",
            "some",
            "tell",
            "give",
        ),
        *("write", "explain"),
    )
)
OTHER_LANGUAGES: Final = frozenset(
    (
        *(
            "el",
            "la",
            "los",
            "las",
            "un",
            "una",
            "de",
            "del",
            "que",
            "en",
            "y",
            "por",
            "para",
            "con",
            "como",
            "cómo",
            "qué",
        ),
        *(
            "es",
            "son",
            "mi",
            "tu",
            "su",
            "se",
            "si",
            "puedo",
            "cuál",
            "cuánto",
            "sin",
            "le",
            "les",
            "des",
            "du",
            "et",
            "est",
        ),
        *(
            "une",
            "je",
            "vous",
            "mon",
            "ma",
            "mes",
            "pour",
            "dans",
            "avec",
            "comment",
            "quoi",
            "pas",
            "ne",
            "sur",
            "au",
            "aux",
        ),
        *(
            "il",
            "elle",
            "ce",
            "cette",
            "puis",
            "der",
            "das",
            "den",
            "dem",
            "ein",
            "eine",
            "einen",
            "und",
            "ist",
            "sind",
            "ich",
        ),
        *(
            "du",
            "mein",
            "meine",
            "wie",
            "kann",
            "nicht",
            "mit",
            "für",
            "auf",
            "zu",
            "im",
            "wo",
            "wann",
            "gli",
            "di",
            "che",
        ),
        *(
            "per",
            "come",
            "sono",
            "mio",
            "mia",
            "os",
            "um",
            "uma",
            "em",
            "não",
            "meu",
            "minha",
            "het",
            "een",
            "van",
            "ik",
        ),
        *("mijn", "hoe"),
    )
)


class Look(Protocol):
    """One picture: tower features (49, 1280), labels and words."""

    @property
    def features(self) -> Tensor: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def words(self) -> str: ...


def request_windows(text: str) -> list[str]:
    """The request as the network reads it: lower case, disguises undone, in windows of 110 words, one where it is short.

    A Chinese or Japanese character counts as a word, and so does every 40 letters without a blank.
    """
    read = neutral(text).lower()
    words = WORDS.findall(read)
    if len(words) <= WINDOW_WORDS:
        return [" ".join(read.split())]
    starts = range(0, len(words) - (WINDOW_WORDS - STRIDE_WORDS), STRIDE_WORDS)
    return [" ".join(words[start : start + WINDOW_WORDS]) for start in starts]


def context_of(seen: Sequence[Seen], turns: Sequence[tuple[str, str]]) -> str:
    """Pictures and earlier turns (role, text) as the network reads them."""
    parts = [
        f"picture: {', '.join(one.labels)}"
        + (f" words: {neutral(one.words)[:QUOTED_CHARACTERS]}" if one.words.strip() else "")
        for one in seen
    ]
    for role, text in turns:
        name = {"developer": "system", "system": "system", "assistant": "earlier assistant"}.get(role, "earlier user")
        parts.append(f"{name}: {neutral(text)[:QUOTED_CHARACTERS]}")
    return " | ".join(parts).lower()


def earlier_turns(chat: Chat) -> list[tuple[str, str]]:
    """(role, everything said) of every other turn."""
    said = [(message.role, said_in(message)) for index, message in enumerate(chat.messages) if index != chat.last_user]
    return [(role, text) for role, text in said if text.strip()]


def buried(turns: Sequence[tuple[str, str]]) -> list[str]:
    """What the context leaves out of long turns that a user or a tool wrote, as windows of their own."""
    return [
        window
        for role, text in turns
        if role not in ("assistant", "system", "developer") and len(neutral(text)) > QUOTED_CHARACTERS
        for window in request_windows(text)
    ]


@dataclass
class Gate:
    """
    Args:
        networks: their logits are averaged.
        weights: of that mean, and of the rewriter's first token (the logit of "risky" above "safe").
        offsets: added to the weighed sum; one for each kind of request (`kind_of`).
        doubt: the networks' logit below which a request with a picture is harmless without asking the first token, whose
            place `expected` then takes.
        expected: slope and intercept of the first token's logit over that of the networks.
        threshold: the calibrated probability from which a request counts as risky; how it was set stands in the model card.
    """

    networks: Sequence[RiskNetwork]
    weights: tuple[float, float]
    offsets: dict[str, float]
    doubt: float
    expected: tuple[float, float]
    threshold: float

    @classmethod
    def load(cls, folder: Path) -> Gate:
        from safetensors.torch import load_file

        from vlmguard.rewriter.network import RiskNetwork

        told: dict[str, Any] = json.loads((folder / "gate.json").read_text())
        first = RiskNetwork.make(len(CATEGORIES), told["rank"])
        networks = [first, *(first.twin() for _ in told["networks"][1:])]
        for name, network in zip(told["networks"], networks, strict=True):
            network.load_own_state(load_file(folder / name))
            network.eval()
        return cls(
            networks, tuple(told["weights"]), told["offsets"], told["doubt"], tuple(told["expected"]), told["threshold"]
        )

    def __call__(
        self, chat: Chat, looks: Sequence[Look], first_token: Callable[[Chat], float]
    ) -> tuple[float, str | None]:
        """(risk in [0, 1], likeliest category)."""
        import torch

        turns = earlier_turns(chat)
        context = context_of([Seen(look.labels, look.words) for look in looks], turns)
        request = said_in(chat.messages[chat.last_user]) if chat.last_user is not None else ""
        windows = [*request_windows(request), *buried(turns)]
        pictures = torch.stack([look.features.float().mean(0) for look in looks]) if looks else torch.zeros(0, 1280)
        with torch.inference_mode():
            made = [
                network([(window, context) for window in windows], [pictures] * len(windows))
                for network in self.networks
            ]
        logits = torch.stack([logit for logit, _ in made]).mean(0)
        worst = int(logits.argmax())
        category = torch.stack([one for _, one in made]).mean(0)[worst]
        mean = float(logits[worst])
        if looks and mean < self.doubt:
            spoken = self.expected[0] * mean + self.expected[1]
        else:
            asked = [chat] if len(windows) == 1 else [chat, chat.with_text(windows[worst])]
            spoken = max(first_token(one) for one in asked)
        judged = mean, spoken
        calibrated = (
            sum(w * x for w, x in zip(self.weights, judged, strict=True)) + self.offsets[kind_of(looks, request)]
        )
        return 1 / (1 + math.exp(-calibrated)), CATEGORIES[int(category.argmax())]


def kind_of(looks: Sequence[Any], request: str) -> str:
    """Without a picture `text`, or `foreign` where it is not English; `words` where a picture has some, else `photo`."""
    if not looks:
        return "foreign" if is_foreign(request) else "text"
    return "words" if any(look.words.strip() for look in looks) else "photo"


def is_foreign(text: str) -> bool:
    """Whether a text is hardly English, which both judges know best: in other languages they see harm too easily."""
    words = FOREIGN_LETTERS.sub(" ", neutral(text).lower()).split()
    strange = sum(not word.isascii() for word in words)
    if 4 * strange > len(words):  # names and loan words have such letters too
        return True
    return sum(word in OTHER_LANGUAGES for word in words) > sum(word in ENGLISH for word in words)
