import io
import re
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from vlmguard.chat import Usage
from vlmguard.errors import MissingExtra, VLMGuardError
from vlmguard.rewriter.protocol import Analysis, Rewrite, render_output
from vlmguard.synthesis.report import MOST_REASONS, Reasons, Tally, escaped, fenced, write_report
from vlmguard.synthesis.sample import Outcome, Row

PLOTS = ["report-categories.png", "report-costs.png", "report-funnel.png", "report-languages.png"]
ANALYSIS = Analysis("Asks for a pose.", "A cliff.", "A fall.")
HOSTILE = (
    "</code></pre><script>alert(1)</script>\n```\n# A heading\n| a | b |\n[x](javascript:alert) **bold** $x^2$ \u202e"
)


def row(name: str, category: str | None = "fraud", prompt: str = "Which pose looks best in this place?") -> Row:
    output = render_output(Rewrite(1.0, category, ANALYSIS, "Stay back.")) if category else "safe"
    origin = {"name": "made-up", "licence": "CC0"}
    kind = "safety" if category else "helpfulness"
    return Row(name, ({"path": f"images/{name}.png", "sha256": "0"},), prompt, output, kind, origin)


def kept(name: str, category: str | None = "fraud", prompt: str = "Which pose looks best in this place?") -> Outcome:
    return Outcome(name, "kept", row=row(name, category, prompt), costs={"hindsight": Usage(1, 100, 10, 2.0)})


def dropped(name: str, place: str = "form", reason: str = "the rewritten prompt is empty") -> Outcome:
    return Outcome(name, place, reason, costs={"hindsight": Usage(1, 50, 5, 1.0), place: Usage(2, 7, 3, 0.5)})


def some() -> list[Outcome]:
    return [
        *(kept(f"k{at}") for at in range(5)),
        kept("w1", "weapons"),
        *(kept(f"h{at}", None, "Wie alt ist dieses Haus, und wer hat es gebaut?") for at in range(2)),
        Outcome("s1", "source", "it has no picture"),
        *(dropped(f"f{at}") for at in range(3)),
        dropped("m1", "my_check", "mine"),
        dropped("d1", "duplicate", "it is nearly the same as k1"),
    ]


def written(folder: Path, outcomes: Any, **told: Any) -> str:
    path = write_report(folder, iter(outcomes), told)
    assert path == folder / "report.md"
    return path.read_text("utf-8")


def tables(text: str) -> dict[str, list[list[str]]]:
    """The cells of the tables by their sections' titles, without escapes."""
    found: dict[str, list[list[str]]] = {}
    for section in re.split(r"(?m)^#+ ", text):
        cells = [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
        found[section.split("\n")[0]] = [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells[2:]]
    return found


def numbers(rows: list[list[str]], column: int) -> list[int]:
    return [int(row[column].replace(",", "")) for row in rows]


def test_the_numbers_add_up(tmp_path: Path) -> None:
    text = written(tmp_path, some(), checks=["form", "language_kept"])
    told = re.search(r"(\d+) samples were read: (\d+) are kept and (\d+) dropped", text)
    assert told is not None
    read, stay, gone = map(int, told.groups())
    assert (read, stay, gone) == (14, 8, 6)
    assert stay + gone == read
    funnel = tables(text)["Where they ended"]
    assert sum(numbers(funnel, 1)) == gone
    left = read
    for place in funnel:
        left -= int(place[1])
        assert int(place[2]) == left
    assert left == stay
    assert sum(numbers(tables(text)["Why they were dropped"], 2)) == gone
    for section in ("Categories of the rows", "Languages of the requests"):
        assert sum(numbers(tables(text)[section], 1)) == stay
    assert sum(numbers(tables(text)["Sources of the rows"], 2)) == stay


def test_places_stand_in_the_pipelines_order(tmp_path: Path) -> None:
    funnel = tables(written(tmp_path, some(), checks=["language_kept", "form"]))["Where they ended"]
    assert [place for place, *_ in funnel] == [
        *("source", "answers", "hindsight", "causal", "optimize"),
        *("language_kept", "form", "my_check"),
        *("overlap", "duplicate", "share"),
    ]


def test_costs_are_summed_by_stage(tmp_path: Path) -> None:
    costs = {stage: rest for stage, *rest in tables(written(tmp_path, some()))["Costs"]}
    assert costs["hindsight"] == ["13", "1,050", "105", "21.0"]  # 8 that are kept, 5 that are dropped
    assert costs["form"] == ["6", "21", "9", "1.5"]
    assert costs["all"] == ["23", "1,085", "120", "23.5"]
    assert costs["of these for dropped samples"] == ["15", "285", "40", "7.5"]


def test_categories_languages_and_sources(tmp_path: Path) -> None:
    found = tables(written(tmp_path, some()))
    assert found["Categories of the rows"] == [["fraud", "5"], ["harmless (kept as it is)", "2"], ["weapons", "1"]]
    assert found["Languages of the requests"] == [["en", "6"], ["de", "2"]]
    assert found["Sources of the rows"] == [["made-up", "CC0", "8"]]


def test_an_output_that_cannot_be_read_is_a_category_of_its_own(tmp_path: Path) -> None:
    broken = Outcome("a", "kept", row=Row("a", (), "?", "risky and so on", "safety", {}))
    found = tables(written(tmp_path, [broken]))
    assert found["Categories of the rows"] == [["unreadable output", "1"]]
    assert found["Languages of the requests"] == [["no letters", "1"]]
    assert found["Sources of the rows"] == [["unknown", "unknown", "1"]]


def test_the_share_of_harmless_rows_is_told(tmp_path: Path) -> None:
    assert "2 of the rows are of harmless requests: 25.0 % (the paper" in written(tmp_path, some())


def test_samples_of_every_category_and_of_drops_are_shown(tmp_path: Path) -> None:
    text = written(tmp_path, some())
    shown = re.findall(r"(?m)^Row (\w+) ", text)
    assert len([name for name in shown if name.startswith("k")]) == 3
    assert {"w1", "h0", "h1"} < set(shown)
    assert "prompt: Stay back." in text
    assert ["duplicate", "d1", "it is nearly the same as k1"] in tables(text)["Some that were dropped"]
    # the same ones in whatever order they come
    assert set(re.findall(r"(?m)^Row (\w+) ", written(tmp_path, reversed(some())))) == set(shown)


def test_earlier_turns_are_told(tmp_path: Path) -> None:
    turns = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
    later = Outcome("a", "kept", row=Row("a", (), "And this?", "safe", "helpfulness", {}, turns))
    assert "Row a (pictures: none, after 2 earlier turns)" in written(tmp_path, [later])


# What users wrote


def test_markup_in_what_users_wrote_shows_as_text(tmp_path: Path) -> None:
    outcomes = [kept("<b>id</b> | `x` _y_ ![p](http://h/p.png)", "fraud", HOSTILE), dropped("*a* | b", "form", HOSTILE)]
    text = written(tmp_path, outcomes, analyst="http://host/v1#<i>m</i>", note="a | b\n\n# c")
    page = MarkdownIt("commonmark").enable("table").render(text)
    tags = set(re.findall(r"<(\w+)", page))
    assert tags <= {"h1", "h2", "h3", "p", "img", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}
    assert re.findall('<img src="([^"]*)"', page) == [
        f"report-{name}.png" for name in ("funnel", "categories", "languages", "costs")
    ]
    assert page.count("<h1>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n```\n# A heading\n| a | b |\n" in page  # in a block, line by line
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt; ``` # A heading | a | b | [x](javascript:alert) **bold** $x^2$ \\u202e"
        in page
    )
    assert "Row &lt;b&gt;id&lt;/b&gt; | `x` _y_ ![p](http://h/p.png) (pictures" in page
    assert "<td>a | b # c</td>" in page
    assert "\u202e" not in page


@pytest.mark.parametrize(
    "text", [HOSTILE, "`" * 9, "```\n~~~\n````", "a\rb\r\n```", "", "\ud800\x00\x1b[31m", "    indented"]
)
def test_a_block_holds_its_text_and_ends_after_it(text: str) -> None:
    page = MarkdownIt("commonmark").render("\n".join([*fenced(text), "", "after"]))
    assert re.fullmatch(r'<pre><code class="language-text">[^<]*</code></pre>\n<p>after</p>\n', page)
    page.encode()


def test_a_line_is_one_line_and_a_long_text_is_cut() -> None:
    assert escaped("a\n\n  b\tc") == "a b c"
    assert len(escaped("x" * 5000)) == 800
    assert fenced("x" * 5000)[1] == "x" * 800 + " …"
    assert escaped("www.a.org, http://b:80 @c") == r"www\.a.org, http\://b\:80 \@c"


# Reasons


def test_few_reasons_are_told_as_they_are_and_many_by_what_they_share() -> None:
    few, many = Reasons(), Reasons()
    for status in (400, 413, 400):
        few.add(f"a model's server refused the request ({status})")
    assert few.counts == {
        "a model's server refused the request (400)": 2,
        "a model's server refused the request (413)": 1,
    }
    for at in range(100):
        many.add(f"it is nearly the same as spa-{at}-x")
        many.add(f"the text of eval/set2/items.jsonl, row {at} (similarity 0.{at})")
        many.add(f"the picture eval/set2/images/{at}_1.png")
    assert many.counts == {
        "it is nearly the same as …": 100,
        "the text of eval/set2/items.jsonl, row … (similarity …)": 100,
        "the picture eval/set2/images/…": 100,
    }


def test_reasons_without_end_are_counted_together() -> None:
    reasons = Reasons()
    for at in range(3000):
        reasons.add("".join(chr(97 + int(digit)) for digit in str(at)))
    assert len(reasons.counts) <= MOST_REASONS + 1
    assert reasons.counts["other reasons"] == 3000 - MOST_REASONS
    assert reasons.counts.total() == 3000


# The files


def test_plots_show_their_bars(tmp_path: Path) -> None:
    written(tmp_path, some())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*PLOTS, "report.md"])
    for name in PLOTS:
        with Image.open(tmp_path / name) as picture:
            colours = picture.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert sum(count for count, colour in colours if colour == (0x33, 0x65, 0x8A)) > 1000


def test_without_samples_nothing_is_drawn_and_old_plots_go(tmp_path: Path) -> None:
    written(tmp_path, some())
    text = written(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert "0 samples were read: 0 are kept and 0 dropped." in text
    assert "![" not in text
    for line in ("There is no row.", "None was dropped.", "No model was asked."):
        assert line in text


def test_names_that_no_font_or_formula_has(tmp_path: Path) -> None:
    odd = [dropped(f"a{at}", rf"検査 $\frac$ {'long ' * 20}{at}", "no") for at in range(3)]
    assert r"| 検査 \$\\frac\$ long" in written(tmp_path, odd)
    many = [kept(str(at), None, text) for at, text in enumerate("é" * at for at in range(40))]
    written(tmp_path, many)


def test_a_stage_that_took_no_time_is_drawn(tmp_path: Path) -> None:
    costs = tables(written(tmp_path, [Outcome("a", "form", "no", costs={"form": Usage(1)})]))["Costs"]
    assert costs[0] == ["form", "1", "0", "0", "0.0"]


def test_no_state_of_matplotlib_is_changed(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    written(tmp_path, some())
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_what_is_told_of_the_run_stands_on_top(tmp_path: Path) -> None:
    told = {"source": "spa-vl", "share": 977 / 9881, "checks": ["form"], "limit": None, "failed": 0, "x": {"a": True}}
    found = tables(written(tmp_path, [], **told))["What became of the samples"]
    assert found == [["source", "spa-vl"], ["share", "0.09888"], ["checks", "form"], ["failed", "0"], ["x", "a: yes"]]


def test_an_error_on_the_way_leaves_the_old_report(tmp_path: Path) -> None:
    before = written(tmp_path, some())

    def broken() -> Iterator[Outcome]:
        yield kept("a")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_report(tmp_path, broken(), {})
    assert (tmp_path / "report.md").read_text("utf-8") == before
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VLMGuardError, match=r"report\.md cannot be written: "):
        write_report(tmp_path / "file", [], {})


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"vlmguard-r1\[synthesis\]"):
        write_report(tmp_path, some(), {})


def test_memory_does_not_grow_with_the_samples() -> None:
    def most(count: int) -> int:
        tally = Tally()
        tracemalloc.start()
        for at in range(count):
            tally.add(kept(f"k{at}", ("fraud", None)[at % 2], f"? {'!' * 300}{at}"))
            tally.add(dropped(f"d{at}", "duplicate", f"it is nearly the same as {at}"))
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert tally.read == 2 * count
        return used

    assert most(1500) < most(300) + 20_000


def test_a_plot_is_a_picture_of_moderate_size(tmp_path: Path) -> None:
    written(tmp_path, some())
    for name in PLOTS:
        with Image.open(io.BytesIO((tmp_path / name).read_bytes())) as picture:
            assert 600 < picture.width < 1800
            assert 150 < picture.height < 900
