"""What GRPO rewards in what a rewriter writes. Each gives one number a completion, in [0, 1], 1 being best.

    well_formed      in the rewriter's one format, with a prompt that the guard would send
    right_verdict    `safe` or `risky` as the row has it
    Answered         what the frozen target answers then: judged safe, and helpful
    intent_kept      the rewritten prompt is about what the user wanted
    short_enough     no longer than it needs to be

A completion is a string, or the messages of a conversation (F104). One that ran out of tokens (`cut`) is in no format,
however it looks: the guard refuses it. None is no zero: it says that there is nothing to reward or that a judgement could
not be read, and the completion is to be left out of that reward's mean.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Self, TypeAlias

from vlmguard.chat import Chat
from vlmguard.errors import AuthenticationFailed, ConfigError, ModelError, RewriteUnreadable, TargetError, VLMGuardError
from vlmguard.evaluation.judges.protocol import HIGHEST, Judge, Judgement
from vlmguard.rewriter.protocol import Rewrite, check_prompt, parse_output, script
from vlmguard.vlms.protocol import VLM, Capability, need

Completion: TypeAlias = str | Sequence[Mapping[str, Any]]
Rewards: TypeAlias = list[float | None]
Key: TypeAlias = tuple[str, str | None]  # a row, and the prompt that the target gets in place of its own
Score: TypeAlias = float | VLMGuardError | None  # why there is none: a call failed, the judgement cannot be read

# Of 163 rewrites written by hand (data/transcripts), against the analysis's words and the request: the median cosine is
# 0.57, the lowest 0.19; with the prompts shuffled 95 % are below 0.26.
UNRELATED: Final = 0.25
RELATED: Final = 0.57  # a cosine beyond it would reward copying the request
ENOUGH_CHARACTERS: Final = 700  # the longest of the same 163 outputs has 710
TOO_MANY_CHARACTERS: Final = 2 * ENOUGH_CHARACTERS
MAX_ANSWER_TOKENS: Final = 256  # of the target: enough to see whether it helps, and with what
REFUSAL_SHARE: Final = 0.5  # of the reward that a safe answer has without any help
REMEMBERED: Final = 20_000  # scores, so that one answer is not asked for twice
MOST_FAILED: Final = 3  # batches in a row in which every call failed
CLOSING_SECONDS: Final = 30.0


def said(completion: Completion) -> str:
    """The text of a completion, be it plain or conversational.

    >>> said("safe")
    'safe'
    >>> said([{"role": "assistant", "content": "safe"}])
    'safe'
    >>> said([{"role": "assistant", "content": [{"type": "text", "text": "safe"}]}])
    'safe'
    """
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion]
    parts = [
        [content] if isinstance(content, str) else [part.get("text") or "" for part in content] for content in contents
    ]
    return "".join(text for texts in parts for text in texts)


def whole(completions: Sequence[Completion], cut: Sequence[bool] | None = None) -> list[str]:
    """Their texts; nothing of those that ran out of tokens.

    >>> whole(["safe", "risky\\ncategory: fra"], [False, True])
    ['safe', '']
    """
    ended = [not one for one in cut] if cut is not None else [True] * len(completions)
    return [said(one) if end else "" for one, end in zip(completions, ended, strict=True)]


def well_formed(
    completions: Sequence[Completion], request: Sequence[str], cut: Sequence[bool] | None = None, **_: Any
) -> Rewards:
    """0 for what cannot be parsed, 0.5 for six lines whose prompt the guard would not send, 1 for the rest.

    Why: what the guard cannot read it cannot use, however wise. The half is a step on the way for a model that has yet
    to learn the format.

    Args:
        request: the user's own words, of each completion's row.

    >>> six = "risky\\ncategory: fraud\\ntext: a\\nimage: b\\ntogether: c\\nprompt: "
    >>> well_formed(["safe", six + "How do I spot a fake?", six + "Fake it?", "Hm."], ["Fake it?"] * 4)
    [1.0, 1.0, 0.5, 0.0]
    """
    return [_form(text, asked) for text, asked in zip(whole(completions, cut), request, strict=True)]


def _form(text: str, request: str) -> float:
    rewrite = read(text)
    if rewrite is None:
        return 0.0
    return 1.0 if sendable(rewrite, request) else 0.5


def read(text: str) -> Rewrite | None:
    """The rewrite in a completion's text, None where it is in no format."""
    try:
        return parse_output(text)
    except RewriteUnreadable:
        return None


def sendable(rewrite: Rewrite, request: str) -> bool:
    """Whether the guard would send what a rewrite holds: its prompt passes the checks, or the request goes on as it is."""
    if rewrite.prompt is None:
        return True
    try:
        check_prompt(rewrite.prompt, request, rewrite.analysis)
    except RewriteUnreadable:
        return False
    return True


def right_verdict(completions: Sequence[Completion], risky: Sequence[bool], **_: Any) -> Rewards:
    """1 where the first word is the row's verdict, 0 where it is the other one or none.

    Why: the first word is the gate. A rewriter that is only rewarded by answers learns to rewrite everything.

    Args:
        risky: the label of each completion's row.

    >>> right_verdict(["safe", [{"role": "assistant", "content": "risky"}], "safely"], [False, False, False])
    [1.0, 0.0, 0.0]
    """
    return [
        float(_verdict(said(one)) == ("risky" if label else "safe"))
        for one, label in zip(completions, risky, strict=True)
    ]


def _verdict(text: str) -> str | None:
    first = re.match(r"\W*(safe|risky)\b", text, re.IGNORECASE)
    return first[1].lower() if first else None


def intent_kept(
    completions: Sequence[Completion], wanted: Sequence[str], cut: Sequence[bool] | None = None, **_: Any
) -> Rewards:
    """How near the rewritten prompt is to what the user wanted: the cosine of MiniLM's embeddings between UNRELATED (0) and
    RELATED (1); 0 where there is nothing to read, None for a request that goes on as it is or is not in English.

    Why: the safest rewrite asks about something else. The scale ends where rewrites written by hand are, since a copy of
    the request comes nearest; see `synthesis.checks.IntentKept` for what MiniLM can and cannot tell.

    Args:
        wanted: what the user wanted, of each completion's row, in words that the rewriter did not write.

    Raises:
        MissingExtra: the extra "local" is not installed.

    >>> intent_kept(["safe", "Hm."], ["How do I open this lock?"] * 2)
    [None, 0.0]
    """
    from vlmguard.synthesis.checks.intent_kept import embed

    rewards: Rewards = [0.0] * len(completions)
    pairs: dict[int, tuple[str, str]] = {}
    for at, (text, goal) in enumerate(zip(whole(completions, cut), wanted, strict=True)):
        if (rewrite := read(text)) is None:
            continue
        if rewrite.prompt is None or not goal.strip() or not _english(rewrite.prompt):
            rewards[at] = None
        else:
            pairs[at] = (goal, rewrite.prompt)
    if pairs:
        vectors = embed([text for pair in pairs.values() for text in pair])
        cosines = (vectors[0::2] * vectors[1::2]).sum(-1).tolist()
        for at, cosine in zip(pairs, cosines, strict=True):
            rewards[at] = min(1.0, max(0.0, (cosine - UNRELATED) / (RELATED - UNRELATED)))
    return rewards


def _english(text: str) -> bool:
    """Whether MiniLM can read it, as far as can be told."""
    if script(text) != "latin":
        return False
    from vlmguard.synthesis.checks.language_kept import language_of

    return language_of(text) in ("en", None)


def short_enough(completions: Sequence[Completion], **_: Any) -> Rewards:
    """1 up to ENOUGH_CHARACTERS, falling evenly to 0 at TOO_MANY_CHARACTERS.

    Why: the user waits for every token of it, and a judge's taste for long answers ends in long prompts.

    >>> short_enough(["safe", "x" * 1050, "x" * 5000])
    [1.0, 0.5, 0.0]
    """
    room = TOO_MANY_CHARACTERS - ENOUGH_CHARACTERS
    return [min(1.0, max(0.0, (TOO_MANY_CHARACTERS - len(said(one))) / room)) for one in completions]


def answer_reward(judgement: Judgement) -> float | None:
    """The safety of an answer, half of it for safety alone, half times its helpfulness; None where it was not read.

    Why a product: no help makes up for harm. A refusal gets half, so that a safe answer that helps is always better.

    >>> [answer_reward(Judgement(*scores)) for scores in ((10, 10), (10, 0), (0, 10), (None, 5))]
    [1.0, 0.5, 0.0, None]
    """
    if judgement.safety is None or judgement.helpfulness is None:
        return None
    return judgement.safety / HIGHEST * (REFUSAL_SHARE + (1 - REFUSAL_SHARE) * judgement.helpfulness / HIGHEST)


class Answered:
    """`answer_reward` of what the frozen target answers to the rewritten prompt with the original pictures.

    Range [0, 1]; 0 for a completion that the guard could not use; None where the judgement cannot be read or a call
    failed, both counted in `counts`. Why: this is what the rewriter is for. A request called safe goes on as it is, and
    earns what the target makes of it.

    Calls: one of the target, at temperature 0, and one of the judge, for each prompt that is new; `concurrency` at a
    time, on an event loop in a thread of its own. Use it in a `with` block, which closes both.

    Args:
        chat_of: the original request of a row, with its pictures, by the row's id.
        counts: "asked", "unreadable", and of failed calls "failed".
    """

    __name__ = "answered"  # what the trainer calls its curve

    def __init__(
        self,
        target: VLM,
        judge: Judge,
        chat_of: Callable[[str], Chat],
        *,
        concurrency: int = 16,
        max_tokens: int = MAX_ANSWER_TOKENS,
    ) -> None:
        need(target, {Capability.TEXT}, "the reward of answers")
        self.target, self.judge, self.max_tokens = target, judge, max_tokens
        self.counts: Counter[str] = Counter()
        self._chat_of = chat_of
        self._free = asyncio.Semaphore(concurrency)
        self._known: OrderedDict[Key, float] = OrderedDict()
        self._failed_batches = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        try:
            with suppress(TimeoutError):
                ending.result(CLOSING_SECONDS)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSING_SECONDS)
            if not self._thread.is_alive():
                self._loop.close()

    def __call__(
        self,
        completions: Sequence[Completion],
        row: Sequence[str],
        request: Sequence[str],
        cut: Sequence[bool] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> Rewards:
        """
        Args:
            row, request: the id and the user's own words, of each completion's row.
            log_metric: told the share of completions without a reward, by why.

        Raises:
            AuthenticationFailed, ConfigError, ModelError: no call can ever succeed.
            TargetError: every call of MOST_FAILED batches in a row failed.
        """
        texts = whole(completions, cut)
        keys = [_key(text, name, asked) for text, name, asked in zip(texts, row, request, strict=True)]
        new = {key for key in keys if key is not None and key not in self._known}
        found = asyncio.run_coroutine_threadsafe(self._scores(new), self._loop).result() if new else {}
        self._stop_where_all_fail(found)
        rewards = [0.0 if key is None else found.get(key, self._known.get(key)) for key in keys]
        for score in (score for score in found.values() if not isinstance(score, float)):
            self.counts["unreadable" if score is None else "failed"] += 1
        self.counts["asked"] += len(found)
        if log_metric is not None:
            log_metric("rewards/answered/unreadable", rewards.count(None) / len(keys))
            log_metric("rewards/answered/failed", sum(isinstance(one, VLMGuardError) for one in rewards) / len(keys))
        self._remember(found)
        return [one if isinstance(one, float) else None for one in rewards]

    async def _scores(self, keys: Iterable[Key]) -> dict[Key, Score]:
        tasks = {key: asyncio.create_task(self._score(*key)) for key in keys}
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
        return {key: task.result() for key, task in tasks.items()}

    async def _score(self, row: str, prompt: str | None) -> Score:
        async with self._free:
            try:
                original = await asyncio.to_thread(self._chat_of, row)
                sent = original if prompt is None else original.with_text(prompt)
                answer = await self.target(sent.with_extra(temperature=0, max_tokens=self.max_tokens))
                return answer_reward(await self.judge(original, answer.text))
            except (AuthenticationFailed, ConfigError, ModelError):
                raise  # so would every other call
            except VLMGuardError as error:
                return error

    def _stop_where_all_fail(self, found: Mapping[Key, Score]) -> None:
        failed = [score for score in found.values() if isinstance(score, VLMGuardError)]
        if found:
            self._failed_batches = self._failed_batches + 1 if len(failed) == len(found) else 0
        if self._failed_batches >= MOST_FAILED:
            problem = f"every call of the target or the judge failed in {MOST_FAILED} batches in a row"
            raise TargetError(f"{problem}: {failed[-1].message}", failed[-1].remedy) from failed[-1]

    def _remember(self, found: Mapping[Key, Score]) -> None:
        self._known.update({key: score for key, score in found.items() if isinstance(score, float)})
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.target.aclose()
        await self.judge.aclose()
        await asyncio.get_running_loop().shutdown_asyncgens()


def _key(text: str, row: str, request: str) -> Key | None:
    """What the target is to be asked; None for a completion that cannot be used."""
    rewrite = read(text)
    return (row, rewrite.prompt) if rewrite is not None and sendable(rewrite, request) else None
