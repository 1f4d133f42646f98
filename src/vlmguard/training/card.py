"""The model card of a trained rewriter: what it was made from, how, and how well it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from vlmguard.training.calibration import FEW

if TYPE_CHECKING:
    from vlmguard.training.sft import SFT, Prepared, Trained


VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; it is 16 unless told


def write_card(options: SFT, ready: Prepared, done: Trained) -> None:
    (options.out / "README.md").write_text("\n".join(_lines(options, ready, done)) + "\n", "utf-8")


def _lines(options: SFT, ready: Prepared, done: Trained) -> Iterator[str]:
    yield from (f"# {options.out.name}: a rewriter for VLMGuard", "")
    yield f"Trained on {options.base} by `vlmguard train sft`. It judges a request and rewrites a risky one; see `rewriter.json`."
    yield from ("", "## Data", "", "| what | value |", "|---|---|")
    yield f"| file | {options.data} |"
    yield f"| SHA-256 | `{ready.rows.sha256}` |"
    for name, rows in (("learned from", ready.learn), ("held out", ready.held)):
        kinds = Counter("risky" if row.risky else "harmless" for row in rows)
        yield f"| {name} | {len(rows)} rows: {kinds['risky']} risky, {kinds['harmless']} harmless |"
    licences = Counter(str(row.origin.get("licence", "unknown")) for row in ready.learn)
    yield f"| licences of the samples | {'; '.join(f'{name} ({count})' for name, count in licences.most_common())} |"
    for reason, count in done.dropped.most_common():
        yield f"| left out: {reason} | {count} rows |"
    yield from ("", "## Training", "", "| setting | value |", "|---|---|")
    for name, value in options.told().items():
        if name not in ("data", "out", "images", "resume") and value is not None:
            yield f"| {name.replace('_', ' ')} | {value} |"
    yield f"| steps taken | {done.steps} |"
    yield f"| minutes | {done.seconds / 60:.1f} |"
    yield f"| tokens a second | {done.tokens_per_second:.0f} |"
    yield f"| mean loss | {done.loss:.3f} |"
    yield from ("", "## Measured", "", *_measured(done), "")
    yield from _serving(options, done)


def _measured(done: Trained) -> Iterator[str]:
    found = done.calibration
    yield "On the rows that were held out, by the adapter as it was loaded again from disk:"
    yield ""
    yield f"- Threshold {found.threshold:.4f}, set for {100 * found.false_positive_rate:g} % false alarms."
    yield f"- {found.risky} risky and {found.harmless} harmless rows; the first token of {found.unreadable} was no verdict."
    if found.harmless < FEW:
        yield f"- **So few harmless rows ({found.harmless}) make the threshold a guess.** Set it on requests of your own."
    if found.auroc is not None and found.recall is not None:
        area, low, high = found.auroc
        yield f"- AUROC {area:.3f} (95 % {low:.3f}-{high:.3f}); recall at the threshold {found.recall:.3f}."
    good, tried = done.parsed
    yield f"- Outputs in the format: {good} of {tried} risky rows."
    if tried and good < tried:
        yield "- **Not every output can be read:** the guard's failure policy decides what is sent then. Train longer."


def _serving(options: SFT, done: Trained) -> Iterator[str]:
    yield from ("## Use", "", "```sh", f"vlmguard guard TEXT --image PICTURE --rewriter {options.out}")
    if options.method == "full":
        yield f"vllm serve {options.out}"
    elif done.servable is None:
        rank = next((most for most in VLLM_RANKS if most >= options.rank), VLLM_RANKS[-1])
        place = options.base.removeprefix("hf:")
        yield f"vllm serve {place} --enable-lora --max-lora-rank {rank} --lora-modules rewriter={options.out}"
    else:
        yield f"vlmguard train merge {options.out} --out MERGED"
    yield "```"
    if done.servable:
        yield from ("", f"vLLM cannot serve the adapter as it is: {done.servable}.")
