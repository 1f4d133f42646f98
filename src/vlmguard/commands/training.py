"""`vlmguard train`: rows to a rewriter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmguard.commands.guard import make_base
from vlmguard.commands.terminal import quietly, say
from vlmguard.training import sft

if TYPE_CHECKING:
    from vlmguard.training.grpo import GRPO
    from vlmguard.training.sft import SFT, Trained


def preview_sft(options: SFT) -> None:
    make_base(options.base)
    with quietly():
        text = sft.preview(options)
    print(text)


def run_sft(options: SFT) -> None:
    """Trains, telling how it goes on standard error."""
    make_base(options.base)
    with quietly():
        done = sft.train_sft(options, say)
    if done is not None:
        say(_line(done))


def run_grpo(options: GRPO) -> None:
    """Trains on, telling how it goes on standard error."""
    from vlmguard.training.grpo import train_grpo

    for spec in (options.base, options.target, options.judge):
        make_base("packaged:base" if spec == "packaged" else spec)
    with quietly():
        done = train_grpo(options, say)
    if done is not None:
        say(_line(done))


def run_merge(folder: Path, out: Path) -> None:
    with quietly():
        sft.merge(folder, out)
    say(f"the whole model is in {out}")


def _line(done: Trained) -> str:
    good, tried = done.parsed
    parts = [
        f"{done.steps} steps in {done.seconds / 60:.1f} minutes ({done.tokens_per_second:.0f} tokens/s)",
        f"threshold {done.calibration.threshold:.3f}",
        f"{good} of {tried} outputs in the format",
    ]
    return f"{'; '.join(parts)}; {done.folder / 'README.md'} tells more"
