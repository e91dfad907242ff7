"""The page as text: short, whole, with no number that was not measured, and every picture with its table."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from microbatch.errors import ConfigError
from microbatch.guide import experiments, measure, stage_numbers
from microbatch.guide.page import (
    POLICY,
    ROOM,
    STATIC,
    TITLES,
    derived,
    example,
    listings,
    load_drawn,
    load_measured,
    page,
)
from microbatch.guide.paste_loops import LOOPS

REPOSITORY = Path(__file__).parents[2]
SOURCES = [
    *("page.html", "playground.html", "use.html", "cards.html", "paste.html", "paste_recorded.html", "quiz.json"),
    *("live.html", "macros.html", "code.html"),
]
FIGURED = ["hero", "tank", "split", "loop", "mathematics", "code", "memory", "differences", "when"]
SECTIONS = [*FIGURED, "quiz", "playground", "use"]
EXAMPLES = ["full_batch", "by_hand", "with_microbatch"]


class Reader(HTMLParser):
    """Read a page's words, section by section; pictures, code, tables and formulas left out."""

    SILENT = ("svg", "pre", "table", "math", "script", "code", "select", "noscript", "style", "title", "button")
    VOID = ("meta", "link", "input", "br", "rect", "path", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: dict[str, list[str]] = {}
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not any(tag in self.SILENT for tag, _ in self.open):
            self.words.setdefault(self.section, []).extend(data.split())

    @property
    def section(self) -> str:
        return next((str(attributes.get("id")) for tag, attributes in self.open if tag == "section"), "")


@pytest.fixture(scope="module")
def text() -> str:
    return page(load_measured(), load_drawn())


def test_all_twelve_sections_are_there_in_order(text: str) -> None:
    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_short(text: str, name: str) -> None:
    source = (ROOM / "page.html").read_text(encoding="utf-8")
    # The questions, the cards, the form and the pasted loop are parts of their own; what introduces them is counted.
    parts = r"\{%.*?%\}|\{\{ (figure|asks)\(.*?\}\}"
    words = Reader(re.sub(r"\{\{.*?\}\}", "number", re.sub(parts, "", source))).words.get(name, [])
    assert len(words) <= 60


@pytest.mark.parametrize("name", FIGURED)
def test_a_section_has_a_heading_a_figure_its_table_and_one_line_to_remember(text: str, name: str) -> None:
    body = text.split(f'<section id="{name}"')[1].split("</section>", maxsplit=1)[0]
    assert len(re.findall(r"<h[12] ", body)) == 1
    assert body.count('class="remember"') == 1
    assert len(re.findall(r'<figure class="figure[ "]', body)) == body.count("<table>") >= 1
    assert re.search(r'class="remember">[^<]*\d', body) or name == "code"


SPELT = "two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|hundred|thousand"


def numbers(source: str) -> list[str]:
    """Return the numbers of a source's words that no measurement put there; one inside of a name is none."""
    plain = re.sub(r"<!--.*?-->|\{[{%#].*?[}%#]\}|<(svg|script|math)\b.*?</\1>", " ", source, flags=re.DOTALL)
    plain = re.sub(r"<[^>]*>", " ", plain)
    return re.findall(rf"(?<!\w)\d[^\s<>]*|\b(?:{SPELT}) (?:times|per ?cent)\b", plain)


@pytest.mark.parametrize("name", SOURCES)
def test_no_number_of_the_text_was_typed_in(name: str) -> None:
    source = (ROOM / name).read_text(encoding="utf-8")
    if name.endswith(".json"):
        source = " ".join(
            str(value) for question in json.loads(source) for key, value in question.items() if key != "right"
        )
    assert numbers(source) == []


def test_a_number_that_was_typed_in_would_be_seen() -> None:
    assert numbers('<p class="x3">It is <b>5.2</b> times {{ derived.total_ratio|times }} faster</p>') == ["5.2"]
    assert numbers("it falls eight times") == ["eight times"]


def test_a_number_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"do not hold.*ones"):
        page({**load_measured(), "sums": {}}, load_drawn())
    reference = {name: value for name, value in load_measured()["reference"].items() if name != "length"}
    with pytest.raises(ConfigError, match=r"do not hold.*length"):
        page({**load_measured(), "reference": reference}, load_drawn())
    with pytest.raises(ConfigError, match=r"do not hold.*hero"):
        page(load_measured(), {})


def test_what_is_written_into_the_page_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the pictures, which the page's own functions draw, are taken as they are."""
    bad = "<img src=x>"
    drawn = load_drawn()
    drawn["tank"]["say"] = bad
    monkeypatch.setitem(LOOPS, bad, bad)
    monkeypatch.setitem(TITLES, "by_hand", bad)
    written = page({**load_measured(), "made": {**load_measured()["made"], "processor": bad}}, drawn)
    assert bad not in written
    assert written.count("&lt;img src=x&gt;") == 7  # say, processor, loop twice, title three times
    assert json.loads(written.split('id="data">')[1].split("</script>")[0])["measured"]["made"]["processor"] == bad


def test_nothing_runs_from_within_the_page_and_nothing_comes_from_elsewhere(text: str) -> None:
    assert not re.search(r'<script(?! type="application/json"| type="module" src="static/)', text)
    assert not re.search(r'\s(style|on\w+)="', text)
    assert "<style" not in text
    assert f'<meta http-equiv="content-security-policy" content="{POLICY}">' in text
    assert "unsafe" not in POLICY
    outside = [url for url in re.findall(r'(?:src|href|action)="([^"]*)"', text) if re.match(r"\w+:|//", url)]
    assert outside == []
    for file in STATIC.glob("*.js"):
        source = file.read_text(encoding="utf-8")
        assert not re.search(r"""(import|fetch|EventSource)\(?[^"'`;]*["'`](https?:)?//""", source), file
        assert "eval(" not in source
        assert "new Function" not in source


def test_the_static_files_and_the_page_are_small(text: str) -> None:
    # The live view's files are another page's, and the numbers are in the page itself.
    loaded = [file for file in STATIC.iterdir() if not file.name.startswith(("live", "measured"))]
    assert sum(file.stat().st_size for file in loaded) + len(text.encode()) <= 250 * 1024


def test_the_readme_shows_one_picture_of_it_that_is_small() -> None:
    picture = REPOSITORY / "docs" / "guide.png"
    assert f"](docs/{picture.name})" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert picture.stat().st_size <= 200_000


# -- the code ---------------------------------------------------------------------------------------------------------


def trained(name: str) -> list[torch.Tensor]:
    made: dict[str, Any] = {}
    exec(compile(example(name), name, "exec"), made)  # noqa: S102
    return [parameter.detach() for parameter in made["model"].parameters()]


@pytest.mark.parametrize("name", ["by_hand", "with_microbatch"])
def test_the_code_that_is_shown_takes_the_full_batchs_step(name: str) -> None:
    for ours, whole in zip(trained(name), trained("full_batch"), strict=True):
        assert torch.allclose(ours, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["by_hand", "with_microbatch"])
def test_every_phase_has_a_line(name: str) -> None:
    (lines,) = listings([name]).values()
    assert {phase for line in lines for phase in line.phases.split()} == {
        "begin",
        "take",
        "forward",
        "backward",
        "step",
    }
    assert not any("#:" in line.code for line in lines)


def test_the_lines_that_are_added_are_marked() -> None:
    added = [[line.phases for line in lines if line.added] for lines in listings(EXAMPLES).values()]
    assert added[0] == []
    assert added[1] == ["", "take", "forward", "backward"]  # the loop, and what is in it


def test_an_example_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no example"):
        example("../pyproject")


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_the_numbers_say_where_they_come_from() -> None:
    made = load_measured()["made"]
    assert set(made) == {"by", "torch", "python", "processor", "cores", "threads"}
    assert set(load_measured()) == {"made", *measure.EXPERIMENTS}


def test_the_gradients_agree_as_they_did() -> None:
    known, now = load_measured()["reference"], experiments.agreement()
    for name in ("error", "own_error", "apart"):
        assert known[name] / 4 <= now[name] <= known[name] * 4
    assert {name: now[name] for name in ("batch", "microbatches", "parameters")} == {
        name: known[name] for name in ("batch", "microbatches", "parameters")
    }
    assert now["error"] <= 2 * now["own_error"]


def test_the_memory_is_as_it_was() -> None:
    known, now = load_measured()["memory"], experiments.memory([1, 8])
    for how in ("window", "alone"):
        for size, parts in now[how].items():
            for kind, found in parts.items():
                assert found == pytest.approx(known[how][size][kind], rel=0.02, abs=2**16), (how, size, kind)


def test_the_recorded_run_is_as_it_was() -> None:
    known, now = json.loads(measure.RECORDED.read_text(encoding="utf-8")), measure.recorded()
    assert known["settings"] == now["settings"]
    assert [(each["kind"], set(each)) for each in known["events"]] == [
        (each["kind"], set(each)) for each in now["events"]
    ]
    steps = [[each for each in run["events"] if each["kind"] == "step"] for run in (known, now)]
    for before, after in zip(*steps, strict=True):
        assert before["loss"] == pytest.approx(after["loss"], rel=0.02)
        assert before["peak_bytes"] == pytest.approx(after["peak_bytes"], rel=0.02)
        assert before["error"] <= before["tolerance"]


def test_what_differs_differs_as_it_did() -> None:
    known = load_measured()
    for name, norm in (("batch_norm", "batch"), ("group_norm", "group")):
        now = experiments.differences("conv", norm=norm)
        for error, before in zip(now["errors"], known[name]["errors"], strict=True):
            assert error == pytest.approx(before, rel=0.05, abs=1e-14)
    for name, exact in (("pairs", "pairs_coupled"), ("conv", "batch_norm_exact")):
        now = experiments.differences(name, norm="batch", exact=True)
        assert max(now["errors"] + known[exact]["errors"]) < 1e-13
    pairs = experiments.differences("pairs")
    assert pairs["errors"] == pytest.approx(known["pairs"]["errors"], rel=0.05, abs=1e-14)


def test_denominators_and_sums_are_as_wrong_as_they_were() -> None:
    known, now = load_measured()["denominators"], experiments.denominators()
    assert now["right"]["error"] < 1e-13
    assert now["none"]["scale"] == pytest.approx(known["none"]["scale"], rel=0.05)
    # Other versions of Python have other sources.
    assert known["means"]["error"] / 3 <= now["means"]["error"] <= known["means"]["error"] * 3
    known, now = load_measured()["sums"], experiments.sums()
    for name in ("bfloat16", "float32"):
        assert now[name] == pytest.approx(known[name], rel=0.1, abs=1e-12)
    assert (now["counts"], now["ones"]) == (known["counts"], known["ones"])


def test_the_words_of_the_tank_are_of_the_series_that_its_figure_draws() -> None:
    series, found = load_measured()["memory"]["window"], derived(load_measured())
    assert [found["activations_first"], found["activations_whole"]] == [
        series[size]["activations"] for size in ("1", "64")
    ]
    for each in series.values():
        assert found["fixed"] == sum(each[kind] for kind in ("parameters", "gradients", "optimizer state"))


def test_the_hero_and_the_sentence_beside_it_are_of_one_step(text: str) -> None:
    found, said = derived(load_measured())["hero"], load_drawn()["hero"]["say"]
    took, whole = (float(size) for size in re.findall(r"([\d.]+) MiB", said))
    assert found["share"] == pytest.approx(took / whole, abs=0.005)
    remember = text.split('class="remember">')[1].split("</p>", maxsplit=1)[0]
    assert f"Cut in {found['cut']}: " in remember
    assert f"{100 * took / whole:.0f}\N{NO-BREAK SPACE}% of the memory" in remember
    assert load_drawn()["hero"]["svg"].count("data-microbatch=") == 2 * found["cut"]  # wide and narrow
    assert load_drawn()["loop"]["svg"].count("data-microbatch=") == found["cut"]


BESIDE = {"split": r";.*", "memory": r"\d+\.\d", "differences": r"\d+ %|\d\.\d × 10\S+(?= *\.)"}
"""What a section's sentence says of what its figure shows."""


@pytest.mark.parametrize("name", BESIDE)
def test_a_figure_and_the_sentence_beside_it_say_the_same_numbers(text: str, name: str) -> None:
    assert differing(text, name) == []
    # Of another measurement, they would not.
    measured = load_measured()
    measured["cuts"]["tail"]["microbatches"] += 3
    measured["memory"]["window"]["8"]["activations"] *= 2
    measured["batch_norm"]["errors"] = [each / 3 for each in measured["batch_norm"]["errors"]]
    assert differing(page(measured, load_drawn()), name)


def differing(written: str, name: str) -> list[str]:
    said = load_drawn()[name]["say"].replace("\N{NO-BREAK SPACE}", " ")
    sentence = written.split(f'<section id="{name}"')[1].split('class="remember">')[1].split("</p>", maxsplit=1)[0]
    parts = re.findall(BESIDE[name], sentence.replace("\N{NO-BREAK SPACE}", " "))
    numbers = re.findall(r"\d+", parts[0]) if name == "split" else parts
    assert len(numbers) >= 2
    return [number for number in numbers if not re.search(rf"(?<!\d){re.escape(number)}(?!\d)", said)]


def test_eight_cards_have_a_small_figure_and_a_measured_number_and_nothing_is_stale(text: str) -> None:
    cards = text.split('<div class="cards">')[1].split("</section>", maxsplit=1)[0].split("<details ")[1:]
    assert [("gain" in card[:30], card.count("<svg")) for card in cards] == [(True, 1)] * 4 + [(False, 1)] * 4
    assert [card for card in cards if not re.search(r"<p>[^<]*\d", card)] == []
    assert [re.findall("<s>(.*?)</s>", card) for card in cards].count(["Stale gradients?"]) == 1


def test_the_shares_of_the_gradient_add_up_as_they_did() -> None:
    known, now = load_measured()["shares"], stage_numbers.shares([8])
    assert now["entries"] == known["entries"]
    assert now["whole"] == pytest.approx(known["whole"], rel=2e-3)
    for cut, found in [*known["cuts"].items(), *now["cuts"].items()]:
        assert len(found["shares"]) == int(cut)
        assert [sum(each) for each in zip(*found["shares"], strict=True)] == pytest.approx(known["whole"], rel=2e-3)
        assert found["apart"] < 1e-6
    for before, after in zip(known["cuts"]["8"]["shares"], now["cuts"]["8"]["shares"], strict=True):
        assert after == pytest.approx(before, rel=2e-3, abs=1e-7)
    # A share of fewer rows is the sum of the shares that it is cut into.
    for larger, smaller in ((1, 2), (2, 4), (4, 8)):
        whole, parts = (known["cuts"][str(cut)]["shares"] for cut in (larger, smaller))
        pairs = [
            [one + other for one, other in zip(*two, strict=True)] for two in zip(parts[::2], parts[1::2], strict=True)
        ]
        assert pairs == [pytest.approx(each, rel=2e-3, abs=1e-7) for each in whole]


def highest(turns: list[dict[str, dict[str, list[int]]]]) -> int:
    """Return the most KiB that come and go, of all that was kept of a step."""
    return max(max(map(sum, zip(*half.values(), strict=True))) for turn in turns for half in turn.values())


def test_the_memory_of_the_stage_is_the_meters() -> None:
    known = load_measured()
    for cut, turns in known["traces"].items():
        series = known["memory"]["alone" if cut == "1" else "window"][str(64 // int(cut))]
        fixed = series["parameters"] + series["optimizer state"]
        # Of fewer rows in all: its inputs are a little smaller.
        assert fixed + highest(turns) * 1024 == pytest.approx(series["total"], rel=1e-3)
    now = stage_numbers.trace(4)
    assert now[1] == now[2] == now[3]
    assert highest(now) == pytest.approx(highest(known["traces"]["4"]), rel=0.01)


def test_cuts_are_as_they_were() -> None:
    assert experiments.cuts() == load_measured()["cuts"]


def test_what_is_derived_follows_from_what_was_measured() -> None:
    found = derived(load_measured())
    assert 0 < found["share"] < 1 < found["total_ratio"] < found["activations_ratio"]
    assert found["total_ratio"] == pytest.approx(1 / found["share"])
