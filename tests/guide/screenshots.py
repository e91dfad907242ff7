"""Take a picture of every section, in both themes and widths: ``python -m tests.guide.screenshots [RUN]...``.

They go to ``screenshots/``, which git ignores, together with the live view of the runs that are named.

With ``--readme`` it takes the README's picture instead, ``docs/guide.png``: one step, on its way.
"""

import sys
from pathlib import Path
from typing import Any

from tests.guide.browser import launched, opened, until
from tests.guide.conftest import serving
from tests.guide.test_browser import SECTIONS, WIDTHS

from microbatch.guide.live import open_runs
from microbatch.guide.server import Guide

ROOT = Path(__file__).parents[2]
RUN = "?model=conv&batch=128&microbatch=128&tank=1&compare=yes&steps=12"
MOMENT = "?hero=4-545"
UNSTUCK = """
.top, .bar, .results, .pasted, section > .figure, section > .pair, .beside > .figure { position: static !important }
"""


def main() -> None:
    """Take the pictures."""
    runs = open_runs([Path(path) for path in sys.argv[1:] if not path.startswith("--")])
    with launched() as browser:
        for client in serving(Guide(runs)):
            if "--readme" in sys.argv:
                with opened(browser, client.url + MOMENT, bypass_csp=True) as page:
                    picture(page, ROOT / "docs" / "guide.png")
                return
            with opened(browser, client.url + RUN, bypass_csp=True) as page:
                page.locator("[data-run]").click()
                page.wait_for_selector('#playground[data-kind="done"]', timeout=600_000)
            with opened(browser, client.url, bypass_csp=True) as page:
                page.emulate_media(media="print")
                page.screenshot(path=folder() / "print.png", full_page=True)
            with opened(browser, client.url, java_script_enabled=False) as page:
                page.screenshot(path=folder() / "plain.png", full_page=True)
            for width, viewport in WIDTHS.items():
                for scheme in ("light", "dark"):
                    look = {"color_scheme": scheme, "viewport": viewport}
                    with opened(browser, client.url + RUN, bypass_csp=True, **look) as page:
                        until(page, "document.querySelector('#playground').dataset.kind === 'done'")
                        sections(page, f"{width}-{scheme}")
                    if runs:
                        with opened(browser, f"{client.url}run", **look) as page:
                            page.wait_for_timeout(1500)
                            page.screenshot(path=folder() / f"run-{width}-{scheme}.png", full_page=True)


def sections(page: Any, name: str) -> None:
    """Take a picture of each section.

    Args:
        page: Open.
        name: Of the theme and the width.
    """
    # The bar would lie over what it follows.
    page.add_style_tag(content=UNSTUCK)
    for section in SECTIONS:
        page.locator(f"section#{section}").screenshot(path=folder() / f"{section}-{name}.png")


def picture(page: Any, path: Path) -> None:
    """Take the README's picture.

    Args:
        page: At a moment of the hero.
        path: Where it goes.
    """
    page.add_style_tag(content=UNSTUCK + ".lead { padding: 1rem !important } .lead .twin { display: none }")
    page.set_viewport_size({"width": 1160, "height": 900})
    page.locator("section#hero").screenshot(path=path)


def folder() -> Path:
    """Make the folder, which git ignores."""
    made = ROOT / "screenshots"
    made.mkdir(exist_ok=True)
    return made


if __name__ == "__main__":
    main()
