"""`vlmguard guard --batch`: a file of requests."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from vlmguard.batch import Batch, Setting, Summary
from vlmguard.chat import Chat
from vlmguard.commands.guard import Opened, Options
from vlmguard.commands.terminal import Bar, print_json, quietly, say
from vlmguard.errors import ConfigError, VLMGuardError
from vlmguard.record import gated, guarded

INTERRUPTED = 130


def guard_batch(
    source: Path, out: Path | None, options: Options, *, gate_only: bool, at_once: int, as_json: bool
) -> int:
    """Guards the rows of `source` and says how it went; gives the exit code."""
    if out is None:
        raise ConfigError("--batch needs a file to write to", "Add --out OUT.jsonl.")
    if gate_only and options.target:
        raise ConfigError("--gate-only asks no target", "Leave one of them out.")
    with Batch(source, out) as batch:
        summary = batch.summary
        if summary.done_before:
            say(f"{out} has {summary.done_before} of {summary.total} rows already")
        try:
            if summary.done < summary.total:
                opened = Opened.of(options)
                with quietly():
                    asyncio.run(_run(batch, opened, gate_only=gate_only, at_once=at_once))
        except KeyboardInterrupt:
            say(
                f"interrupted: {summary.done} of {summary.total} rows are in {out}; "
                "run the same command again to go on from there"
            )
            return INTERRUPTED
        except VLMGuardError:
            if summary.written:
                say(f"{summary.done} of {summary.total} rows are in {out}")
            raise
    if as_json:
        print_json(_fields(summary))
    say(_line(summary))
    return 0


async def _run(batch: Batch, opened: Opened, *, gate_only: bool, at_once: int) -> None:
    def work(chat: Chat) -> Awaitable[dict[str, Any]]:
        return (gated if gate_only else guarded)(opened.guard, chat, opened.models)

    setting = Setting(opened.models, opened.threshold, gate_only)
    async with opened:
        with Bar(batch.total, batch.summary.done) as bar:
            await batch.run(
                work,
                setting,
                at_once=at_once,
                report=lambda now: bar.update(now.done, now.total, now.rows_per_second),
            )


def _line(summary: Summary) -> str:
    counts = ", ".join(f"{count} {action}" for action, count in sorted(summary.actions.items()) if action != "error")
    errors = summary.actions["error"]
    parts = [f"{summary.written} rows", *([counts] if counts else []), f"{errors} with an error"]
    if summary.notes:
        parts.append(f"{summary.notes} with a note (the guard failed, or is off)")
    if summary.written:
        parts.append(f"{summary.rows_per_second:.1f} rows/s")
    if summary.done_before:
        parts.append(f"{summary.done_before} were done before")
    return f"{'; '.join(parts)}; written to {summary.out}"


def _fields(summary: Summary) -> dict[str, Any]:
    actions = {action: count for action, count in sorted(summary.actions.items()) if action != "error"}
    return {
        "rows": summary.total,
        "done_before": summary.done_before,
        "actions": actions,
        "errors": summary.actions["error"],
        "notes": summary.notes,
        "seconds": round(summary.seconds, 3),
        "rows_per_second": round(summary.rows_per_second, 2),
        "out": str(summary.out),
    }
