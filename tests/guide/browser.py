"""A real browser: the machine's own Chromium, driven by Playwright."""

import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str:
    """Find the machine's Chromium, or skip and say what to install."""
    pytest.importorskip("playwright", reason="the browser tests need playwright, which `make test` installs")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the path; install one, for example: apt-get install chromium")
    return found


@contextmanager
def launched() -> Generator[Any, None, None]:
    """Start the browser."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def until(page: Any, true: str) -> None:
    """Wait until an expression is true of a page. Playwright's own waiting needs what the page's policy forbids."""
    ends = time.monotonic() + 30
    while not page.evaluate(true):
        if time.monotonic() > ends:
            pytest.fail(f"it never became true: {true}")
        page.wait_for_timeout(40)


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Generator[Any, None, None]:
    """Open a page of one's own, and fail if it complained or asked anyone else for anything."""
    origin = "/".join(url.split("/")[:3])
    expected = options.pop("expected", ())
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce", **options})
    complaints: list[str] = []
    foreign: list[str] = []
    page = context.new_page()
    page.on("console", lambda told: complaints.append(told.text) if told.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    own = (origin, "data:")  # what is in the page itself is asked of nobody
    page.on("request", lambda request: None if request.url.startswith(own) else foreign.append(request.url))
    # Counted before anything of the page runs: frames that were asked for, and what each of them took.
    page.add_init_script(
        """(() => {
          const ask = window.requestAnimationFrame.bind(window);
          window.frames_ = [];
          window.requestAnimationFrame = (draw) => ask((now) => {
            const began = performance.now();
            draw(now);
            window.frames_.push(performance.now() - began);
          });
        })()"""
    )
    try:
        page.goto(url)
        yield page
        assert foreign == []
        assert [words for words in complaints if not any(part in words for part in expected)] == []
    finally:
        context.close()


COLOURS = ("color-contrast", "link-in-text-block")
"""The rules of axe whose answer depends on the theme."""


def violations(page: Any, part: str, *, widths: Iterable[Any] = (), dark: bool = True) -> list[Any]:
    """Return what axe finds wrong with a part of a page, in both themes, at each width.

    Args:
        page: Open.
        part: A selector.
        widths: Viewports; the page's own where none is named.
        dark: Whether the dark theme is looked at as well; what is not a colour is the same there.

    Returns:
        Theme, viewport, rule and the first elements of each violation; and the words that are `crowded`.
    """
    from axe_playwright_python.sync_playwright import Axe

    wrong: list[Any] = []
    for viewport in list(widths) or [None]:
        if viewport is not None:
            page.set_viewport_size(viewport)
        for scheme in ("light", "dark")[: 1 + dark]:
            page.emulate_media(color_scheme=scheme)
            # What axe passes need not be described, which takes most of its time.
            options: dict[str, Any] = {"resultTypes": ["violations"]}
            if scheme == "dark":
                options["runOnly"] = {"type": "rule", "values": COLOURS}
            found = Axe().run(page, context=part, options=options).response["violations"]
            wrong += [
                (scheme, viewport, each["id"], [node["html"][:160] for node in each["nodes"][:3]]) for each in found
            ]
        wrong += crowded(page)
    return wrong


def crowded(page: Any) -> list[Any]:
    """Return the words of pictures that are cut off, or that lie over others."""
    return page.evaluate(
        """() => [...document.querySelectorAll('svg[role=img]')].flatMap((svg) => {
          const room = svg.getBoundingClientRect();
          if (!room.width) return [];
          const boxes = [...svg.querySelectorAll('text')]
            .map((each) => [each.textContent, each.getBoundingClientRect()]).filter(([words]) => words);
          const cut = boxes.filter(([, box]) => box.left < room.left - 1 || box.right > room.right + 1
            || box.top < room.top - 1 || box.bottom > room.bottom + 1).map(([words]) => ['cut off', words]);
          // A line is as high as its font, which leaves room above and below what is written.
          const over = (one, other) => Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1
            && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > one.height / 4;
          const lies = boxes.flatMap(([words, box], index) => boxes.slice(index + 1)
            .filter(([, other]) => over(box, other)).map(([others]) => ['one over the other', words, others]));
          return [...cut, ...lies];
        })"""
    )
