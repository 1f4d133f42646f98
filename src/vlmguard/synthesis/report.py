"""The report of a synthesis: what became of every sample, what the rows are about, what they cost, and some to read.

    FOLDER/report.md    report-funnel.png  report-categories.png  report-languages.png  report-costs.png

Reads the outcomes once and keeps counts, the reasons (numbers in them aside) and a few samples: its memory doesn't grow with
their number. Which samples are shown depends on their ids alone. What users and models wrote is shown as text, whatever
Markdown or HTML stands in it.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import unicodedata
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlmguard.chat import Usage
from vlmguard.errors import RewriteUnreadable, VLMGuardError, missing_extra
from vlmguard.rewriter.protocol import parse_output, script
from vlmguard.synthesis.checks.language_kept import language_of
from vlmguard.synthesis.sample import Outcome, Row

KEPT: Final = "kept"
BEFORE_CHECKS: Final = ("source", "answers", "hindsight", "causal", "optimize")
AFTER_CHECKS: Final = ("overlap", "duplicate", "share")
HARMLESS: Final = "harmless (kept as it is)"
PAPERS_SHARE: Final = "the paper: 977 of 9,881, 9.9 %"
FEW_REASONS: Final = 12  # of a place are told as they are; of more, those that differ in a number or an id are one
MOST_REASONS: Final = 200
OTHER_REASONS: Final = "other reasons"
SAMPLES: Final = 3  # shown of a category, and of a place's drops
MOST_CHARACTERS: Final = 800  # shown of a text
MOST_BARS: Final = 20


def write_report(folder: Path, outcomes: Iterable[Outcome], told: Mapping[str, Any], samples: int = SAMPLES) -> Path:
    """Writes the report and its plots; nothing is touched before all outcomes are read.

    Args:
        outcomes: one of every sample that was read.
        told: what the reader should know of the run, such as its options; None values are left out. "checks" are the
            names of the checks in their order.
        samples: how many rows of a category, and drops of a place, are shown.

    Returns:
        the path of report.md.

    Raises:
        VLMGuardError: the folder takes no more.
        MissingExtra: "synthesis" is not installed.
    """
    tally = Tally(samples, tuple(told.get("checks") or ()))
    for outcome in outcomes:
        tally.add(outcome)
    drawn = {f"report-{name}.png": picture for name, picture in _plots(tally)}
    text = "\n".join(_lines(tally, told, drawn.keys())) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("funnel", "categories", "languages", "costs"):
            (folder / f"report-{old}.png").unlink(missing_ok=True)  # of an earlier report that had something to draw
        for name, picture in drawn.items():
            (folder / name).write_bytes(picture)
        unfinished = folder / "report.md.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        return unfinished.replace(folder / "report.md")
    except OSError as error:
        raise VLMGuardError(
            f"{folder / 'report.md'} cannot be written: {error.strerror}", "Make room, or check your rights."
        ) from error


@dataclass
class Reasons:
    """How often each reason was given at one place, without end of them."""

    exact: Counter[str] = field(default_factory=Counter)
    alike: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str) -> None:
        whole = " ".join(reason.split())[:MOST_CHARACTERS]
        if len(self.exact) <= FEW_REASONS:
            self.exact[whole] += 1
        like = re.sub(r"[^\s/(]*\d[^\s/),;]*(?!\S*/)", "…", whole)  # of a path the folders stay
        self.alike[like if like in self.alike or len(self.alike) < MOST_REASONS else OTHER_REASONS] += 1

    @property
    def counts(self) -> Counter[str]:
        return self.exact if len(self.exact) <= FEW_REASONS else self.alike


@dataclass
class Tally:
    """Counts over outcomes, and a few of them: `shown` by category or place, those whose ids' hashes are least."""

    samples: int = SAMPLES
    checks: tuple[str, ...] = ()
    ended: Counter[str] = field(default_factory=Counter)
    reasons: defaultdict[str, Reasons] = field(default_factory=lambda: defaultdict(Reasons))
    kinds: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    sources: Counter[tuple[str, str]] = field(default_factory=Counter)
    costs: dict[str, Usage] = field(default_factory=dict)
    in_vain: Usage = field(default_factory=Usage)  # spent on samples that were dropped
    kept: defaultdict[str, list[tuple[str, Outcome]]] = field(default_factory=lambda: defaultdict(list))
    dropped: defaultdict[str, list[tuple[str, Outcome]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, outcome: Outcome) -> None:
        self.ended[outcome.ended] += 1
        for stage, usage in outcome.costs.items():
            self.costs[stage] = self.costs.get(stage, Usage()) + usage
        if outcome.row is None:
            self.in_vain += sum(outcome.costs.values(), Usage())
            self.reasons[outcome.ended].add(outcome.reason or "")
            self._show(self.dropped[outcome.ended], outcome)
            return
        row, category = outcome.row, category_of(outcome.row)
        self.kinds[row.kind] += 1
        self.categories[category] += 1
        self.languages[_language(row.prompt)] += 1
        self.sources[str(row.origin.get("name", "unknown")), str(row.origin.get("licence", "unknown"))] += 1
        self._show(self.kept[category], outcome)

    @property
    def read(self) -> int:
        return self.ended.total()

    @property
    def places(self) -> list[str]:
        """Where a sample may be dropped, in the pipeline's order."""
        seen = dict.fromkeys((*self.checks, *sorted({*self.costs, *self.ended} - {KEPT})))
        checks = [place for place in seen if place not in (*BEFORE_CHECKS, *AFTER_CHECKS)]
        return [*BEFORE_CHECKS, *checks, *AFTER_CHECKS]

    def _show(self, shown: list[tuple[str, Outcome]], outcome: Outcome) -> None:
        key = hashlib.sha256(outcome.id.encode("utf-8", "backslashreplace")).hexdigest()
        insort(shown, (key, outcome), key=lambda one: one[0])
        del shown[self.samples :]


def category_of(row: Row) -> str:
    if not row.risky:
        return HARMLESS
    try:
        return parse_output(row.output).category or HARMLESS
    except RewriteUnreadable:
        return "unreadable output"


def _language(text: str) -> str:
    letters = script(text)
    return language_of(text) or ("no letters" if letters == "none" else f"{letters} letters, unclear")


# The text


def _lines(tally: Tally, told: Mapping[str, Any], drawn: Iterable[str]) -> Iterator[str]:
    drawn = set(drawn)

    def plot(name: str, what: str) -> Iterator[str]:
        if f"report-{name}.png" in drawn:
            yield from (f"![{what}](report-{name}.png)", "")

    yield from ("# What became of the samples", "")
    yield from _table(("what", "value"), ((name, _told(value)) for name, value in told.items() if _told(value)))
    kept, read = tally.ended[KEPT], tally.read
    harmless = tally.kinds["helpfulness"]
    share = f": {100 * harmless / kept:.1f} % ({PAPERS_SHARE})" if kept else ""
    yield from (
        f"{read:,} samples were read: {kept:,} are kept and {read - kept:,} dropped.",
        f"{harmless:,} of the rows are of harmless requests{share}.",
        "",
    )
    yield from ("## Where they ended", "", *plot("funnel", "samples left after each place"))
    yield from _table(("place", "dropped", "left"), _funnel(tally))
    yield from ("## Why they were dropped", "")
    reasons = [
        (place, reason, count)
        for place in tally.places
        if place in tally.reasons
        for reason, count in _ranked(tally.reasons[place].counts)
    ]
    yield from _table(("place", "reason", "samples"), reasons, none="None was dropped.")
    yield from ("## Categories of the rows", "", *plot("categories", "rows by category"))
    yield from _table(("category", "rows"), _ranked(tally.categories), none="There is no row.")
    yield from ("## Languages of the requests", "", *plot("languages", "rows by language"))
    yield from _table(("language", "rows"), _ranked(tally.languages), none="There is no row.")
    yield from ("## Sources of the rows", "")
    sources = ((name, licence, count) for (name, licence), count in _ranked(tally.sources))
    yield from _table(("source", "licence", "rows"), sources, none="There is no row.")
    yield from _costs(tally, plot("costs", "costs by stage"))
    yield from _kept(tally)
    yield from _dropped(tally)


def _funnel(tally: Tally) -> Iterator[tuple[str, int, int]]:
    left = tally.read
    for place in tally.places:
        left -= tally.ended[place]
        yield place, tally.ended[place], left


def _costs(tally: Tally, plot: Iterable[str]) -> Iterator[str]:
    yield from ("## Costs", "", *plot)
    rows = [(stage, *_spent(tally.costs[stage])) for stage in tally.places if stage in tally.costs]
    total = sum(tally.costs.values(), Usage())
    if rows:
        rows += [("all", *_spent(total)), ("of these for dropped samples", *_spent(tally.in_vain))]
    head = ("stage", "calls", "tokens read", "tokens written", "seconds of models")
    yield from _table(head, rows, none="No model was asked.")


def _spent(usage: Usage) -> tuple[int, int, int, str]:
    return usage.calls, usage.prompt_tokens, usage.completion_tokens, f"{usage.seconds:,.1f}"


def _kept(tally: Tally) -> Iterator[str]:
    yield from ("## Some rows", "")
    for category, _ in _ranked(tally.categories):
        yield from (f"### {escaped(category)}", "")
        for _, outcome in tally.kept[category]:
            row = outcome.row
            assert row is not None
            pictures = ", ".join(str(image.get("path", "?")) for image in row.images) or "none"
            turns = f", after {len(row.history)} earlier turns" if row.history else ""
            yield from (f"Row {escaped(row.id)} (pictures: {escaped(pictures)}{turns})", "")
            yield from (*fenced(row.prompt), "")
            if row.risky:
                yield from (*fenced(row.output), "")


def _dropped(tally: Tally) -> Iterator[str]:
    yield from ("## Some that were dropped", "")
    rows = [(place, one.id, one.reason) for place in tally.places for _, one in tally.dropped.get(place, ())]
    yield from _table(("place", "sample", "reason"), rows, none="None was dropped.")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], none: str = "") -> Iterator[str]:
    """A table whose numbers stand right; without rows the line `none`."""
    rows = list(rows)
    if not rows:
        yield from (none, "") if none else ()
        return
    yield f"| {' | '.join(head)} |"
    right = [all(re.fullmatch(r"[\d,.]+", str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    yield f"|{'|'.join('---:' if one else '---' for one in right)}|"
    for row in rows:
        yield f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else escaped(str(cell)) for cell in row)} |"
    yield ""


def _ranked(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_told(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_told, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


_HIDING: Final = re.compile("[\u202a-\u202e\u2066-\u2069\u2028\u2029\U000e0000-\U000e007f]")  # they turn or hide text


def _visible(text: str) -> str:
    """The text with what would hide, turn or break it written out."""
    return "".join(
        ascii(char)[1:-1]
        if (unicodedata.category(char) in ("Cc", "Cs", "Co") and char not in "\n\t") or _HIDING.match(char)
        else char
        for char in text
    )


def escaped(text: str) -> str:
    """One line of Markdown that shows the text as it is, in a table too; also its links and formulas."""
    line = html.escape(_visible(" ".join(text[:MOST_CHARACTERS].split())), quote=False)
    return re.sub(r"[\\`*_{}\[\]|~$@]|:(?=\S)|(?<=www)\.", r"\\\g<0>", line)


def fenced(text: str) -> list[str]:
    """A Markdown block that shows the text as it is, whatever fences stand in it."""
    whole = _visible("\n".join(text[:MOST_CHARACTERS].splitlines())) + (" …" if len(text) > MOST_CHARACTERS else "")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", whole)), default=0))
    return [f"{fence}text", *whole.split("\n"), fence]


# The plots


def _plots(tally: Tally) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of each plot that has something to show."""
    if tally.read:
        rows = [("read", 0, tally.read), *_funnel(tally)]
        labels = [place for place, _, _ in rows]
        bars = [("left", [left for _, _, left in rows]), ("dropped there", [dropped for _, dropped, _ in rows])]
        yield "funnel", _drawn("Samples: where they ended", labels, [bars])
    for name, counts in (("categories", tally.categories), ("languages", tally.languages)):
        if counts:
            ranked = _ranked(counts)
            if len(ranked) > MOST_BARS:
                rest = sum(count for _, count in ranked[MOST_BARS - 1 :])
                ranked = [*ranked[: MOST_BARS - 1], ("others", rest)]
            rows_of = [("rows", [count for _, count in ranked])]
            yield name, _drawn(f"Rows: {name}", [label for label, _ in ranked], [rows_of])
    stages = [stage for stage in tally.places if stage in tally.costs]
    if stages:
        spent = [tally.costs[stage] for stage in stages]
        read = [one.prompt_tokens for one in spent]
        written = [one.completion_tokens for one in spent]
        panels: list[Bars] = [
            [("calls", [one.calls for one in spent])],
            [("tokens read", read), ("tokens written", written)],
            [("seconds of models", [one.seconds for one in spent])],
        ]
        yield "costs", _drawn("Costs: stages", stages, panels)


Bars = Sequence[tuple[str, Sequence[float]]]  # stacked, each with its name
COLOURS: Final = ("#33658a", "#f6ae2d")  # told apart in grey too, and by the colour-blind


def _drawn(title: str, labels: Sequence[str], panels: Sequence[Bars]) -> bytes:
    """Horizontal bars, one panel beside the other, as a PNG; without pyplot, whose state is the whole process's."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "synthesis") from error
    figure = Figure(figsize=(3.2 + 3.6 * len(panels), 1.5 + 0.3 * len(labels)), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    at = range(len(labels))
    for axis, bars in zip(axes, panels, strict=True):
        ends: list[float] = [0.0] * len(labels)
        for (name, values), colour in zip(bars, COLOURS, strict=False):
            axis.barh(at, values, left=ends, color=colour, label=name, height=0.7)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        for place, end in enumerate(ends):
            told = " + ".join(_short(values[place]) for _, values in bars if values[place] or values is bars[0][1])
            axis.text(end, place, f" {told}", va="center", fontsize=8)
        axis.set_xlim(0, (max(ends) or 1) * 1.3)  # room for the numbers
        axis.margins(y=0.01)
        axis.set_xlabel(bars[0][0] if len(bars) == 1 else "")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda value, _: _short(value))
        axis.xaxis.get_major_locator().set_params(nbins=4, integer=max(ends) >= 4)
        if len(bars) > 1:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8)
    axes[0].set_yticks(at, [_label(label) for label in labels], parse_math=False)
    axes[0].invert_yaxis()
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png")
    return file.getvalue()


def _label(text: str) -> str:
    """What fits beside a bar, in letters that the plots' font has."""
    plain = "".join(char if char.isascii() and char.isprintable() else "?" for char in text)
    return plain if len(plain) <= 28 else f"{plain[:26]}..."


def _short(value: float) -> str:
    """A number in few characters: 950, 12.3k, 4.5M."""
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:.{1 if value < 100 * size else 0}f}".removesuffix(".0") + unit
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
