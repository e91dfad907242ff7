"""What must be true of the page, in a real browser."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from tests.guide.browser import crowded, launched, opened, until, violations
from tests.guide.conftest import serving, within_a_second

from microbatch.guide.server import Guide

FIGURED = ["hero", "tank", "split", "loop", "mathematics", "code", "memory", "differences", "when"]
SECTIONS = [*FIGURED, "quiz", "playground", "use"]
WIDTHS = {"phone": {"width": 390, "height": 844}, "desk": {"width": 1280, "height": 860}}
MANY = "?model=mlp&batch=32&microbatch=8&steps=5"
SLOW = "?model=mlp&steps=300&pace=0.6"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as started:
        yield started


def wait_for_end(page: Any, kind: str = "done") -> None:
    page.wait_for_selector(f'#playground[data-kind="{kind}"]', timeout=300_000)


def press_run(page: Any, *, key: str = "") -> None:
    """Begin a run, by its button or by a key, and wait until the page shows it: the one before may be there still."""
    # As the server knows it: the page may still be asking.
    before = page.evaluate("fetch('api/run').then((answer) => answer.json()).then(({ run }) => run?.name ?? '')")
    # A press before the page shows the run that was is a press before it listens.
    until(page, f"(document.querySelector('#playground').dataset.runName ?? '') === {before!r}")
    if key:
        page.keyboard.press(key)
    else:
        page.click("[data-run]")
    until(page, f"![{before!r}, ''].includes(document.querySelector('#playground').dataset.runName ?? '')")


def more(page: Any) -> None:
    """Open what the playground does not ask first."""
    page.locator(".more > summary").click()


# -- the text ---------------------------------------------------------------------------------------------------------


def test_it_paints_within_a_second(browser: Any, idle: Any) -> None:
    def paint() -> float:
        with opened(browser, idle.url) as page:
            until(page, "performance.getEntriesByName('first-contentful-paint').length")
            return page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000

    assert within_a_second(paint)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_reads_without_javascript(browser: Any, idle: Any, width: str) -> None:
    with opened(browser, idle.url, java_script_enabled=False, viewport=WIDTHS[width]) as page:
        for name in SECTIONS:
            section = page.locator(f"section#{name}")
            assert section.locator("h1, h2").first.is_visible()
        assert page.locator("[data-drawing] > svg:visible").count() == 9
        assert page.locator(".remember:visible").count() == 9
        assert page.locator("[data-controls]:visible").count() == 0
        assert page.locator("noscript p").is_visible()
        assert page.locator("#playground button:visible, #playground input:visible").count() == 0
        page.locator("#split .question summary").click()
        assert page.locator("#split details[open] p").first.is_visible()
        assert page.locator(".question legend:visible").count() == 8
        page.locator("#tank .twin summary").click()
        assert page.locator("#tank table").is_visible()


def test_it_prints_its_text_and_figures(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.locator("#split svg").is_visible()
        assert not page.locator(".top").is_visible()
        assert not page.locator("#playground").is_visible()
        assert page.locator("#split .question details p").is_visible()
        assert len(page.pdf()) > 20_000


# -- figures ----------------------------------------------------------------------------------------------------------


def test_a_link_leads_to_its_moments_and_a_reload_too(browser: Any, idle: Any) -> None:
    def drawn(page: Any) -> list[str]:
        return [page.inner_html(f'[data-figure="{name}"] [data-drawing]') for name in ("hero", "loop", "code")]

    with opened(browser, idle.url) as page:
        began = drawn(page)
        for name, cut, moment in (("hero", 8, 351), ("loop", 4, 702), ("code", 2, 93)):
            figure = page.locator(f'[data-figure="{name}"]')
            figure.locator(f'.cuts button[value="{cut}"]').click()
            figure.locator("input[type=range]").fill(str(moment))
            until(page, f"location.search.includes('{name}={cut}-{moment}')")
        stepped, url = drawn(page), page.url
        assert not set(stepped) & set(began)
        page.reload()
        assert drawn(page) == stepped
    with opened(browser, url, reduced_motion="no-preference") as page:
        assert drawn(page) == stepped


def test_the_code_and_the_stage_follow_each_other(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url) as page:
        code = page.locator('[data-figure="code"]')
        code.locator("input[type=range]").fill("0")
        seen: list[str] = []
        for _ in range(6):
            now = page.locator("#code .line.now").evaluate_all("lines => lines.map(line => line.dataset.phase)")
            assert len(now) == 2  # by hand and with the library; the whole batch is not cut
            seen.append(now[0].split()[0])
            code.locator(".player button").nth(2).click()
        assert seen == ["begin", "take", "forward", "backward", "backward", "take"]
        page.locator("#code .listing").nth(1).locator(".line[data-phase~=step]").click()
        assert "One step" in str(code.locator("[data-say]").text_content())
        code.locator("input[type=range]").fill("0")
        page.locator("#code .listing").nth(1).focus()
        for words in ("Microbatch 1 of 4 goes", "Forward", "Backward", "One step", "One step"):
            page.keyboard.press("ArrowDown")
            assert str(code.locator("[data-say]").text_content()).startswith(words)
        page.keyboard.press("ArrowUp")
        assert str(code.locator("[data-say]").text_content()).startswith("Backward")


def test_the_code_has_the_figures_size_and_the_whole_batch_is_shown_whole(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url) as page:
        code, listings = page.locator('[data-figure="code"]'), page.locator("#code .listing")

        def said() -> str:
            return str(code.locator("[data-say]").text_content())

        assert said() == "Microbatch 1 of 4 goes into the model: 16 rows."
        assert "len(x), 16)" in str(listings.nth(1).text_content())
        code.locator('.cuts button[value="8"]').click()
        assert "len(x), 8)" in str(listings.nth(1).text_content())
        assert "rows + 8]" in str(listings.nth(1).text_content())
        assert "microbatch_size=8" in str(listings.nth(2).text_content())
        listings.nth(0).locator(".line[data-phase~=take]").click()
        assert said() == "The batch goes into the model: 64 rows."
        assert listings.nth(0).locator(".now").count() == page.locator("#code .line.now").count() == 1
        listings.nth(0).locator(".line[data-phase~=step]").click()
        assert said().startswith("Out of memory: all 64 rows at once")
        listings.nth(1).locator(".line[data-phase~=take]").click()
        assert said() == "Microbatch 1 of 4 goes into the model: 16 rows."


def test_the_hero_plays_by_itself_once_and_ends_with_one_step(browser: Any, idle: Any) -> None:
    """The whole batch does not fit, four microbatches do; the picture keeps its nodes, and then nothing is drawn."""
    with opened(browser, idle.url, reduced_motion="no-preference") as page:
        hero = "document.querySelector('[data-figure=hero]')"
        until(page, f"{hero}.dataset.playing === 'true'")
        page.evaluate(f"window.kept_ = {hero}.querySelector('.network .layer')")
        until(page, f"{hero}.querySelector('[data-say]').textContent.startsWith('Out of memory: all 64 rows')")
        assert page.evaluate("window.kept_.isConnected")
        until(page, f"{hero}.querySelector('.cuts [aria-pressed=true]').value === '4'")
        until(page, f"{hero}.querySelector('[data-say]').textContent.startsWith('One step')")
        until(page, f"{hero}.dataset.playing === 'false'")
        page.wait_for_timeout(100)
        page.evaluate("window.frames_.length = 0")
        page.wait_for_timeout(1300)
        assert page.evaluate("window.frames_.length") == 0
        assert page.evaluate(f"{hero}.querySelector('input').value") == "1000"
        assert page.evaluate("location.search") == ""  # where it plays by itself, the address stays


def test_nothing_moves_while_it_is_paused_or_off_screen(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, reduced_motion="no-preference") as page:
        hero = page.locator('[data-figure="hero"]')
        moment = "document.querySelector('[data-figure=hero] input').value"
        until(page, "document.querySelector('[data-figure=hero]').dataset.playing === 'true'")
        before = page.evaluate(moment)
        until(page, f"{moment} !== {before!r}")
        hero.locator(".player button").first.click()
        page.wait_for_timeout(100)
        page.evaluate("window.frames_.length = 0")
        stood = page.evaluate(moment)
        page.wait_for_timeout(500)
        assert page.evaluate("window.frames_.length") == 0
        assert page.evaluate("document.getAnimations().length") == 0
        assert page.evaluate(moment) == stood
        hero.locator(".player button").first.click()
        until(page, f"{moment} !== {stood!r}")
        page.evaluate("document.querySelector('#memory').scrollIntoView({ behavior: 'instant' })")
        until(page, "document.querySelector('[data-figure=hero]').dataset.playing === 'false'")
        page.wait_for_timeout(100)  # a frame that was requested before may still come
        page.evaluate("window.frames_.length = 0")
        page.wait_for_timeout(500)
        assert page.evaluate("window.frames_.length") == 0


def test_a_microbatch_is_clicked_and_the_curve_is_dragged(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url) as page:
        loop = page.locator('[data-figure="loop"]')
        loop.locator("[data-microbatch='2']").click()
        assert str(loop.locator("[data-say]").text_content()).startswith("Microbatch 3 of 4")
        curve = loop.locator("[data-scrub]").bounding_box()
        assert curve is not None
        middle = curve["y"] + curve["height"] / 2
        page.mouse.move(curve["x"] + curve["width"] * 0.25, middle)
        page.mouse.down()
        page.mouse.move(curve["x"] + curve["width"] * 0.75, middle)
        page.mouse.up()
        assert 730 <= int(loop.locator("input[type=range]").input_value()) <= 770


def test_reduced_motion_is_honoured(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, reduced_motion="reduce") as page:
        page.wait_for_timeout(300)
        assert page.evaluate("window.frames_.length") == 0
        hero = page.locator('[data-figure="hero"]')
        assert str(hero.locator("[data-say]").text_content()).startswith("One step")
        hero.locator('.cuts button[value="1"]').click()  # the end of it, at once
        assert str(hero.locator("[data-say]").text_content()).startswith("Out of memory")
        unit = "getComputedStyle(document.documentElement).getPropertyValue('--1s').trim()"
        scroll = "getComputedStyle(document.documentElement).scrollBehavior"
        assert (page.evaluate(unit), page.evaluate(scroll)) == ("1ms", "auto")
        page.emulate_media(reduced_motion="no-preference")
        assert (page.evaluate(unit), page.evaluate(scroll)) == ("1s", "smooth")


def test_turning_the_phone_keeps_what_was_chosen(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, viewport=WIDTHS["phone"]) as page:
        loop = page.locator('[data-figure="loop"]')
        loop.locator("input[type=range]").fill("420")
        page.locator("#f-batch").fill("48")
        before = loop.locator("[data-say]").text_content()
        page.set_viewport_size({"width": 844, "height": 390})
        assert loop.locator("input[type=range]").input_value() == "420"
        assert loop.locator("[data-say]").text_content() == before
        assert page.input_value("#f-batch") == "48"
        assert page.evaluate("document.documentElement.scrollWidth") <= 844


def test_memory_ends_under_the_readers_hand_and_the_batch_is_cut(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url) as page:
        tank = page.locator('[data-figure="tank"]')
        assert page.locator("section:has(.question) .remember:visible").count() == 0  # it would answer the guess
        page.locator("#tank .question input").nth(1).check()
        remember = str(page.locator("#tank .remember").text_content()).replace("\N{NO-BREAK SPACE}", " ")
        for stop in range(7):
            tank.locator("input").first.fill(str(stop))
            words, picture = tank.locator("[data-say]").text_content(), tank.locator("svg").inner_html()
            heads, sizes = (tank.locator(f"tbody {cell}").all_text_contents() for cell in ("th", "td"))
            cells = dict(zip(heads, sizes, strict=True))
            assert cells["together"] in words
            assert f">{cells['activations']}<" in picture
            if stop in (0, 6):  # one row, all of them
                assert cells["activations"] in remember
            assert ("Out of memory" in words) == ("Out of memory" in picture.partition("plate")[2]) == (stop == 6)
            assert tank.get_by_role("button", name="Cut it in half").is_visible() == (stop == 6)
        tank.get_by_role("button", name="Cut it in half").click()
        assert str(tank.locator("[data-say]").text_content()).startswith("2 × 32 rows take")
        assert page.evaluate("document.activeElement.hash") == "#split"
        assert "64 rows in microbatches of 32" in str(page.locator('[data-figure="split"] [data-say]').text_content())


def test_the_tank_is_filled_and_its_rim_is_moved_by_hand(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url) as page:
        tank = page.locator('[data-figure="tank"]')
        for what, by, words in (("batch", -150, "Out of memory: 64 rows"), ("tank", -200, "of the tank’s 192 MiB")):
            tank.locator("svg").scroll_into_view_if_needed()
            box = tank.locator(f"[data-drag={what}]").bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + by, steps=4)
            page.mouse.up()
            assert words in str(tank.locator("[data-say]").text_content())


def test_the_fill_is_drawn_from_its_middle_and_the_rim_from_where_it_crosses_it(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url) as page:
        tank = page.locator('[data-figure="tank"]')
        tank.locator("svg").scroll_into_view_if_needed()
        rim, top = (tank.locator(part).bounding_box()["y"] for part in (".rim", "[data-drag=batch]"))
        assert top > rim + 20  # at first the rim covers nothing of what is in the tank
        tank.locator("input").first.fill("5")

        def draw(x: float, y: float, by: float) -> str:
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x, y + by, steps=6)
            page.mouse.up()
            return str(tank.locator("[data-say]").text_content())

        fill = tank.locator("[data-drag=batch]").bounding_box()
        assert fill is not None
        x, middle = fill["x"] + fill["width"] / 2, fill["y"] + fill["height"] * 0.6
        assert "32 rows at once" in draw(x, middle, 2)  # it does not jump to where it is taken
        assert "64 rows at once" in draw(x, middle, -60)
        assert page.evaluate("getSelection().toString()") == ""
        assert "32 rows at once" in draw(x, middle, 60)
        rim = tank.locator(".rim").bounding_box()
        assert rim is not None
        told = draw(x, rim["y"], -40)
        assert "32 rows at once" in told
        assert "96 MiB" not in told


CHOSEN = {
    "tank": [(0, 16), (0, 192), (6, 16), (6, 192)],
    "split": [(1, 1), (7, 2), (96, 1), (96, 5), (96, 96)],
    "memory": [(0, 6), (3, 3), (6, 0), (6, 5)],
    "hero": [(0,), (200,), (500,), (1000,)],
    "loop": [(0,), (333,)],
    "mathematics": [(16, 1, 1, 16), (1, 16, 16, 16)],
}


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_too_wide_and_no_words_of_a_picture_are_cut_off_or_lie_over_others(
    browser: Any, idle: Any, width: str
) -> None:
    with opened(browser, idle.url, viewport=WIDTHS[width]) as page:
        open_folds(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]["width"]
        page.reload()
        assert crowded(page) == []
        for figure, positions in CHOSEN.items():
            place = page.locator(f'[data-figure="{figure}"]')
            ranges = place.locator("input[type=range]").all()
            for position in positions:
                for at, where in zip(ranges, position, strict=True):
                    at.fill(str(where))
                for rule in range(place.locator("option").count() or 1):
                    if place.locator("select").count():
                        place.locator("select").select_option(index=rule)
                    assert crowded(page) == [], (figure, position)
        for cut in (1, 8, 2):
            page.locator(f'[data-figure="hero"] .cuts button[value="{cut}"]').click()
            assert crowded(page) == [], cut
        for view in range(4):
            page.locator('[data-figure="differences"] select').select_option(index=view)
            assert crowded(page) == [], view
        for microbatches in (16, 256):
            page.evaluate(f"""import('/static/figures.js').then(({{ loop }}) => {{
                document.querySelector('[data-figure=loop] [data-drawing]').innerHTML =
                    loop(9999, {{ microbatches: {microbatches} }}).svg; }})""")
            assert crowded(page) == [], microbatches
        page.evaluate("document.querySelector('[data-figure=hero] svg text').setAttribute('x', '-20')")
        assert [why for why, *_ in crowded(page)] == ["cut off"]


# -- keyboard and other senses ----------------------------------------------------------------------------------------


def test_everything_is_reached_by_keyboard_with_visible_focus(browser: Any, idle: Any) -> None:
    """Tab meets every control, and each shows that it is met."""
    seen = """() => {
      const at = document.activeElement, style = getComputedStyle(at);
      return { body: at === document.body, tag: at.tagName,
        words: at.getAttribute('aria-label') ?? at.textContent.trim().slice(0, 30),
        outlined: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 };
    }"""
    with opened(browser, idle.url) as page:
        wanted = page.locator(":is(a[href], button:enabled, select, summary, input, [tabindex='0']):visible").count()
        met: list[dict[str, Any]] = []
        for _ in range(3 * wanted):
            page.keyboard.press("Tab")
            here = page.evaluate(seen)
            if here["body"]:
                break
            met.append(here)
        assert [each for each in met if not each["outlined"]] == []
        # Radios of one question are one stop.
        radios = (
            page.locator("input[type=radio]:visible").count() - page.locator("fieldset:has(input[type=radio])").count()
        )
        assert len(met) >= wanted - radios


def test_the_player_and_the_quiz_by_keyboard_alone(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url + MANY) as page:
        loop = page.locator('[data-figure="loop"]')
        words = loop.locator("[data-say]")
        loop.get_by_role("button", name="Next").focus()
        page.keyboard.press("Enter")
        assert str(words.text_content()).startswith("Its gradient, divided by 4, is added")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert str(words.text_content()).startswith("Forward")
        page.locator('input[name="q1"]').first.focus()
        page.keyboard.press("ArrowDown")
        assert page.locator("#tank [data-verdict]").text_content() == "✓ Right."
        assert page.locator("#tank .question details").get_attribute("open") is not None
        assert page.locator("[data-score]").text_content() == "1 of 8 right, 7 to go."
        assert page.locator("[data-share]").is_visible()


def open_folds(page: Any) -> None:
    """Open whatever is folded."""
    page.evaluate("document.querySelectorAll('details:not([hidden])').forEach((fold) => { fold.open = true; })")
    page.wait_for_timeout(50)


def open_up(page: Any) -> None:
    """Open, choose and answer whatever can be."""
    open_folds(page)
    page.locator('[data-figure="tank"] input').first.fill("6")
    page.locator('input[name="q2"]').first.check()
    page.locator('[data-figure="decision"]').get_by_role("button", name="No").click()
    page.locator("#tank .question input").nth(1).check()


CONV = {"model": "conv", "batch": 32, "microbatch": 32}
AXE_STATES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "everything open": (None, "idle"),
    "overflow": ({**CONV, "tank": 0.3, "recover": "no"}, "overflow"),
    "under way, right": ({**CONV, "microbatch": 16, "steps": 400, "pace": "0.15", "compare": "yes"}, "step"),
    "after a run, wrong": ({**CONV, "tank": 0.3, "steps": 3, "compare": "yes", "divide": "none"}, "done"),
}


def test_axe_finds_nothing_where_no_run_was_named(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url + "run") as page:
        until(page, "document.querySelector('[data-notice]').textContent.includes('No run was named')")
        assert violations(page, "html") == []
        # What is there to be found is found, in both themes.
        page.evaluate("document.querySelector('[data-notice]').style.color = '#888'")
        assert [(scheme, rule) for scheme, _, rule, _ in violations(page, ".live")] == [("light", "color-contrast")]
        page.evaluate("document.querySelector('[data-notice]').style.color = '#444'")
        assert [(scheme, rule) for scheme, _, rule, _ in violations(page, ".live")] == [("dark", "color-contrast")]


@pytest.mark.parametrize("state", AXE_STATES)
def test_axe_finds_nothing(browser: Any, idle: Any, state: str) -> None:
    """The whole page as a reader leaves it, and the playground in each of its states."""
    settings, kind = AXE_STATES[state]
    run = "" if settings is None else idle.start(**settings)
    if run:
        idle.wait_for(run, kind)
    with opened(browser, idle.url + "?batch=nonsense") as page:
        open_up(page)
        if settings is not None:
            until(page, "Boolean(document.querySelector('#playground').dataset.runName)")
        if state == "after a run, wrong":
            said = str(page.locator("[data-badge]").text_content())
            assert said.startswith("✗ This is not the whole batch’s gradient")
            pieces = {event["microbatches"] for event in idle.events(run) if event["kind"] == "step"}
            assert f", × {pieces.pop()}.00 as large." in said
        assert violations(page, "html" if settings is None else "#playground", widths=WIDTHS.values()) == []


# -- charts that are read off -----------------------------------------------------------------------------------------


def test_a_chart_is_read_off_by_the_arrow_keys_and_under_the_pointer(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url) as page:
        figure = page.locator('[data-figure="differences"]')
        chart, words = figure.locator("[data-drawing]"), figure.locator("[data-say]")
        before = str(words.text_content())
        assert figure.locator(".cursor").count() == 0
        chart.focus()
        assert chart.get_attribute("role") == "slider"
        assert str(words.text_content()).startswith("rows of a microbatch, of a batch of 32: 32.")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        cells = figure.locator("tbody tr").nth(3).locator("td").all_text_contents()
        assert f": 8. BatchNorm: {cells[0]}, exact mode: {cells[1]}, GroupNorm: {cells[2]}." in str(
            words.text_content()
        )
        assert chart.get_attribute("aria-valuetext") == words.text_content()  # what a screen reader announces
        assert figure.locator(".cursor circle").count() == 3
        page.keyboard.press("Home")
        assert chart.get_attribute("aria-valuenow") == "1"
        page.keyboard.press("Tab")
        assert (words.text_content(), figure.locator(".cursor").count()) == (before, 0)
        box = chart.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] / 2)
        assert ": 4. BatchNorm" in str(words.text_content())
        page.mouse.move(0, 0)
        assert words.text_content() == before
        figure.locator("select").select_option(index=3)
        assert "rows a second" in str(words.text_content())


# -- the playground ---------------------------------------------------------------------------------------------------


def test_a_run_by_keyboard_is_counted_its_badge_is_the_logs_and_no_frame_is_late(browser: Any, idle: Any) -> None:
    def slowest() -> float:
        """Return the 95th percentile of what a frame took, as a share of what it has."""
        with opened(browser, idle.url + MANY) as page:
            page.locator("#f-batch").focus()
            press_run(page, key="Enter")
            wait_for_end(page)
            is_told(page)
            frames = sorted(page.evaluate("window.frames_"))
            return frames[int(len(frames) * 0.95)] / 20

    def is_told(page: Any) -> None:
        assert page.get_attribute("#playground", "data-microbatches") == "20"
        assert page.get_attribute("#playground", "data-steps") == "5"
        last = [event for event in idle.events(idle.get("/api/run")[1]["run"]["name"]) if event["kind"] == "step"][-1]
        badge = page.locator("[data-badge]")
        assert float(badge.get_attribute("data-error")) == last["error"] <= last["tolerance"]
        assert str(badge.text_content()).startswith("✓")
        page.locator("[data-pane=loss] [data-drawing]").focus()
        page.keyboard.press("ArrowLeft")
        assert str(page.locator("[data-pane=loss] [data-say]").text_content()).startswith("step: 4. this run: ")
        assert page.locator("[data-pane=tank] [data-drawing]").get_attribute("role") is None  # it is no chart

    assert within_a_second(slowest)


def test_the_playground_starts_by_itself_when_it_is_first_reached(browser: Any) -> None:
    """A recording stands for the run, until its process has told something; who wants less motion presses Train."""
    for client in serving(Guide()):
        reached = f"{client.url}#playground"
        with opened(browser, reached, reduced_motion="reduce") as page:
            page.wait_for_timeout(1000)
            assert client.get("/api/run")[1]["run"] is None
        with opened(browser, reached, reduced_motion="no-preference") as page:
            shown = "document.querySelector('[data-shown]').textContent"
            until(page, f"{shown}.startsWith('A recorded run, until yours has taken its first step. ')")
            assert page.locator('[data-pane="loss"] .series').count()  # it has something to show
            assert "Started by itself" in str(page.locator("[data-status]").text_content())
            assert page.evaluate("document.activeElement === document.body")
            until(page, f"{shown}.startsWith('32 = 4 × 8 rows')")
            page.locator("[data-stop]").click()
            wait_for_end(page, "stopped")
        name = client.get("/api/run")[1]["run"]["name"]
        with opened(browser, reached, reduced_motion="no-preference") as page:  # it never starts over what is there
            page.wait_for_timeout(1000)
            assert client.get("/api/run")[1]["run"]["name"] == name


def test_a_preset_runs_at_once_and_its_result_carries_its_name(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url + SLOW) as page:
        press_run(page)
        page.get_by_role("button", name="BatchNorm drifts").click()  # what is under way makes room
        until(
            page, "document.querySelector('[data-shown]').textContent.startsWith('BatchNorm drifts: 32 = 8 × 4 rows')"
        )
        wait_for_end(page)
        assert "✗" in str(page.locator("[data-badge]").text_content())
        assert page.input_value("#f-model") == "conv"
        assert "norm=batch" in page.url
        until(page, "document.querySelector('[data-copy-text=program]').textContent.includes('norm=\"batch\"')")
        assert not page.locator("[data-stale]").is_visible()
        assert page.evaluate("document.querySelector('[data-progress]').value") == 1
        page.reload()
        more(page)
        assert page.input_value("#f-norm") == "batch"
        pressed = page.locator("[data-preset][aria-pressed=true]")
        assert pressed.all_text_contents() == ["7 BatchNorm drifts"]
        until(page, "document.querySelector('#playground').dataset.kind === 'done'")
        page.select_option("#f-norm", "exact")
        assert pressed.all_text_contents() == ["8 BatchNorm, exact"]
        assert page.locator("[data-stale]").is_visible()  # an edit: the results are the old ones
        assert "old" in str(page.locator("[data-results]").get_attribute("class"))
        assert str(page.locator("[data-shown]").text_content()).startswith("BatchNorm drifts")
        page.locator("#f-seed").fill("7")
        page.locator("#f-seed").press("Tab")
        assert pressed.all_text_contents() == []
    with opened(browser, idle.url + "?preset=recovers&seed=3") as page:
        assert [page.input_value(f"#f-{name}") for name in ("microbatch", "tank", "seed")] == ["32", "10", "3"]


def test_an_address_that_cannot_be_falls_back_and_says_so(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url + "?model=rocket&batch=-4&nonsense=1&loop=3-99") as page:
        notice = page.locator("[data-notice]")
        assert notice.is_visible()
        words = str(notice.text_content())
        assert all(part in words for part in ("Model", "Effective batch", "nonsense", "loop"))
        assert page.input_value("#f-model") == "transformer"
        assert page.input_value("#f-batch") == "32"


def test_a_field_of_one_model_is_not_there_for_the_others(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url + "?model=conv&norm=batch") as page:
        more(page)
        assert page.locator("#f-norm").is_visible()
        assert not page.locator("#f-coupling").is_visible()
        page.select_option("#f-model", "pairs")
        assert page.locator("#f-coupling").is_visible()
        assert not page.locator("#f-norm").is_visible()
        assert page.input_value("#f-norm") == "group"
        assert "norm" not in page.url


def test_the_knobs_say_what_they_make_together(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, expected=("400",)) as page:
        assert page.locator(".knobs input").count() == 3
        for batch, size, words in (("32", "8", "32 = 4 × 8"), ("50", "8", "50 = 6 × 8 + 2"), ("4", "8", "")):
            page.locator("#f-batch").fill(batch)
            page.locator("#f-microbatch").fill(size)
            assert page.locator("[data-cutting]").text_content() == words


def test_a_setting_that_cannot_be_is_marked_and_explained(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, expected=("400",)) as page:
        page.locator("#f-batch").fill("many")
        page.click("[data-run]")
        assert "Effective batch must be" in str(page.locator("[data-notice]").text_content())
        assert page.get_attribute("#f-batch", "aria-invalid") == "true"
        assert page.evaluate("document.activeElement.id") == "f-batch"
        page.locator("#f-batch").fill("4")
        page.click("[data-run]")
        until(page, "document.querySelector('[data-notice]').textContent.includes('larger than')")


def test_stop_a_reload_a_second_run_and_a_killed_trainer(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url + SLOW) as page:
        press_run(page)
        page.wait_for_selector('#playground[data-steps="1"]', timeout=300_000)
        page.reload()
        page.wait_for_selector('#playground[data-steps]:not([data-steps="0"])', timeout=10_000)
        run = idle.get("/api/run")[1]["run"]["name"]
        with opened(browser, idle.url + SLOW, expected=("409",)) as other:
            # Its button waits for the run that is under way; whoever asks all the same is refused.
            other.evaluate("document.querySelector('[data-form]').requestSubmit()")
            until(other, "document.querySelector('[data-notice]').textContent.includes('under way')")
        page.locator("[data-stop]").click()
        wait_for_end(page, "stopped")
        told = [event["kind"] for event in idle.events(run)]
        assert page.get_attribute("#playground", "data-microbatches") == str(told.count("microbatch"))
        assert page.get_attribute("#playground", "data-steps") == str(told.count("step"))
        press_run(page)
        page.wait_for_selector('#playground[data-steps="1"]', timeout=300_000)
        os.kill(idle.guide.playground.run.pid, signal.SIGKILL)
        wait_for_end(page, "failed")
        assert "ended by signal 9" in str(page.locator("[data-status]").text_content())
        assert page.locator("[data-run]").is_enabled()


def test_the_theme_is_kept(browser: Any, idle: Any) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, idle.url, color_scheme="light") as page:
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
        page.locator("[data-theme-switch]").click()
        page.locator("[data-theme-switch]").click()
        assert page.evaluate(paper) == "rgb(16, 21, 28)"
        page.reload()
        assert page.evaluate(paper) == "rgb(16, 21, 28)"
