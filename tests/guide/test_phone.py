"""What must be true of the page on a phone: short, readable, and nothing to sweep sideways."""

from collections.abc import Iterator
from typing import Any

import pytest
from tests.guide.browser import launched, opened

PHONE = {"width": 390, "height": 844}
LYING = {"width": 844, "height": 390}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as started:
        yield started


def test_it_takes_eleven_screens_at_most(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, viewport=PHONE) as page:
        assert page.evaluate("document.documentElement.scrollHeight") <= 11 * PHONE["height"]
        page.locator("details[data-fold]").evaluate_all("folds => folds.forEach((fold) => { fold.open = true; })")
        assert page.evaluate("document.documentElement.scrollHeight") > 11 * PHONE["height"]


def test_nothing_is_swept_sideways_and_words_of_figures_are_large_enough(browser: Any, idle: Any) -> None:
    """A table and what the reader writes may be as wide as they are."""
    sideways = """() => [...document.querySelectorAll('main *, header *')]
      .filter((each) => each.scrollWidth > each.clientWidth + 1 && each.clientWidth
        && ['auto', 'scroll'].includes(getComputedStyle(each).overflowX) && !each.matches('textarea, .scroll'))
      .map((each) => each.outerHTML.slice(0, 90))"""
    small = """() => [...document.querySelectorAll('.drawing svg text')].filter((each) => each.checkVisibility())
      .map((each) => [each.textContent, parseFloat(getComputedStyle(each).fontSize) * each.getScreenCTM().a])
      .filter(([words, size]) => words && size < 12)"""
    with opened(browser, idle.url, viewport=PHONE) as page:
        page.locator("details[data-fold]").evaluate_all("folds => folds.forEach((fold) => { fold.open = true; })")
        for shown in range(3):
            page.locator(".tabs label").nth(shown).click()
            assert page.locator(".listings pre:visible").count() == 1
            assert page.evaluate(sideways) == []
        for viewport in (LYING, PHONE):
            page.set_viewport_size(viewport)
            assert page.evaluate(small) == []
        page.evaluate(
            "document.querySelectorAll('.listing code').forEach((code) => { code.style.whiteSpace = 'pre'; })"
        )
        page.evaluate("document.querySelector('#tank svg text').style.fontSize = '14px'")
        assert len(page.evaluate(sideways)) == 2
        assert len(page.evaluate(small)) == 1


def test_what_is_folded_opens_and_stays_open_when_the_phone_is_turned(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, viewport=PHONE) as page:
        card = page.locator(".card").nth(1)
        assert not card.locator("p:not(.key)").is_visible()
        card.locator("summary").click()
        assert card.locator("p:not(.key)").is_visible()
        page.locator(".top summary").click()
        page.locator(".top a[href='#when']").click()
        assert not page.locator(".top a[href='#when']").is_visible()  # the list is out of the way
        for viewport in (LYING, PHONE):
            page.set_viewport_size(viewport)
            assert page.locator(".card[open]").count() == 1
        page.set_viewport_size({"width": 1280, "height": 860})
        assert page.locator(".card[open]").count() == 8
        page.set_viewport_size(PHONE)
        page.wait_for_timeout(50)
        assert page.locator(".card[open]").count() == 1


def test_everything_can_be_done_by_a_finger(browser: Any, idle: Any) -> None:
    with opened(browser, idle.url, viewport=PHONE, has_touch=True, is_mobile=True) as page:
        page.locator(".top summary").tap()
        page.locator(".top a[href='#code']").tap()
        page.locator(".tabs label").nth(1).tap()
        page.locator("#code .line[data-phase~=step]:visible").first.tap()
        code = page.locator('[data-figure="code"]')
        assert "One step" in str(code.locator("[data-say]").text_content())
        code.locator("[data-microbatch='1']").tap()
        assert str(code.locator("[data-say]").text_content()).startswith("Microbatch 2 of 4")
        tank = page.locator('[data-figure="tank"]')
        tank.locator("input").first.fill("6")
        tank.get_by_role("button", name="Cut it in half").tap()
        assert "2 × 32 rows" in str(tank.locator("[data-say]").text_content())
        chart = page.locator('[data-figure="differences"]')
        chart.locator("[data-drawing]").tap(position={"x": 140, "y": 100})
        assert ": 4. BatchNorm" in str(chart.locator("[data-say]").text_content())
        page.locator(".card summary").first.tap()
        assert page.locator(".card p:not(.key)").first.is_visible()
        small = """() => [...document.querySelectorAll('main :is(button, .button, select, summary, .tabs label)')]
          .filter((each) => each.checkVisibility()).map((each) => [each.textContent, each.getBoundingClientRect()])
          .filter(([, { width, height }]) => Math.min(width, height) < 20).map(([words]) => words)"""
        assert page.evaluate(small) == []
