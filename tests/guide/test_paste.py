"""A loop that is pasted into the page: judged by the guide's own server, within bounds, and shown as text."""

import asyncio
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.guide.browser import launched, opened, until, violations
from tests.guide.test_browser import WIDTHS

import microbatch as mb
from microbatch.guide import paste_check, paste_worker
from microbatch.guide.page import RECORDED, load_drawn, load_measured, page
from microbatch.guide.paste_check import MOST_PASTED, MOST_SOURCE
from microbatch.guide.paste_loops import LOOPS
from microbatch.linting.finding import Finding
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source

WRONG, RIGHT = RULES["MB105"].wrong, RULES["MB105"].right
TOLD = "document.querySelector('[data-told]').textContent"


def check(client: Any, source: str) -> Any:
    status, answer = client.post("/api/doctor", {"source": source})
    assert status == 200, answer
    return answer


# -- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [WRONG, RIGHT, "print('no loop')"])
def test_the_answer_is_what_the_doctor_finds(client: Any, source: str) -> None:
    answer = check(client, source)
    wanted = [(each.rule, each.line, each.confidence, each.message, each.window) for each in mb.doctor(source)]
    keys = ("rule", "line", "confidence", "message", "window")
    assert [tuple(each[key] for key in keys) for each in answer["findings"]] == wanted
    assert (answer["schema"], answer["files"]) == (1, 1)


FOUND = {
    "Two faults": {"MB101", "MB105"},
    "Cleared too early": {"MB103"},
    "Clipped too often": {"MB201"},
    "A short last window": {"MB112"},
    "Without a fault": set[str](),
}


@pytest.mark.parametrize("title", LOOPS)
def test_each_loop_that_is_there_to_try_has_its_faults(title: str) -> None:
    found = mb.doctor(LOOPS[title])
    assert {each.rule for each in found} >= FOUND[title]
    assert bool(found) == bool(FOUND[title])


def test_a_text_that_names_a_file_does_not_open_it(client: Any, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(WRONG)
    assert [each.rule for each in mb.doctor(str(file))] != []  # the negative control
    assert {each["rule"] for each in check(client, str(file))["findings"]} <= {"MB000", "MB001"}


def test_nothing_that_a_text_imports_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path | None] = []

    def judge(_: Source, folder: Path | None) -> list[Finding]:
        folders.append(folder)
        return []

    monkeypatch.setattr(paste_worker, "judge", judge)
    paste_worker.findings_json(f"from helper import train\n\n{WRONG}")
    assert folders == [None]


def test_the_process_that_reads_it_needs_no_torch() -> None:
    code = "import sys, microbatch.guide.paste_worker; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "False"


# -- who may ask, and how much ----------------------------------------------------------------------------------------


def test_other_hosts_origins_methods_and_types_are_refused(client: Any) -> None:
    value = {"source": RIGHT}
    assert client.post("/api/doctor", value, host="evil.example")[0] == 403
    assert client.post("/api/doctor", value, origin="http://evil.example")[0] == 403
    assert client.post("/api/doctor", value, sec_fetch_site="cross-site")[0] == 403
    assert client.post("/api/doctor", value, content_type="text/plain")[0] == 415
    for method in ("GET", "PUT", "DELETE"):
        assert client.ask(method, "/api/doctor")[0] == 405
    assert client.post("/api/doctor", value)[0] == 200


@pytest.mark.parametrize(
    "value", [None, [], "text", {}, {"source": 1}, {"source": None}, {"source": "", "path": "x"}, {"path": "train.py"}]
)
def test_anything_but_a_text_is_refused_in_words(client: Any, value: Any) -> None:
    status, told = client.post("/api/doctor", value)
    assert status == 400
    assert '"source"' in told["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\0" * 100, b'{"source": NaN}'])
def test_a_body_that_is_no_json_is_refused(client: Any, body: bytes) -> None:
    status, told = client.post("/api/doctor", body)
    assert status == 400
    assert "Traceback" not in str(told)


def test_the_largest_text_is_read_and_a_larger_one_is_not(client: Any) -> None:
    largest = WRONG + "#" * (MOST_SOURCE - len(WRONG))
    assert "MB105" in {each["rule"] for each in check(client, largest)["findings"]}
    status, told = client.post("/api/doctor", {"source": largest + "#"})
    assert status == 400
    assert "200,001 characters" in told["error"]
    status, told = client.post("/api/doctor", b" " * (MOST_PASTED + 1))
    assert status == 413
    assert "at most" in told["error"]


# -- hostile texts ----------------------------------------------------------------------------------------------------


UNREADABLE = {
    "nulls": "loss.backward()\0\0",
    "half of a pair": "loss.backward()  # \ud800",
    "binary": "".join(map(chr, range(256))) * 300 + "backward",
    "brackets": "backward" + "[" * 100_000,
    "signs": "backward = " + "-" * 100_000 + "1",
    "calls": "backward" + "()" * 90_000,
    "a sum": "backward = " + "1+" * 90_000 + "1",
    "digits": "backward = " + "9" * 100_000,
    "markup": "<script>alert('backward')</script>",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_a_finding(client: Any, name: str) -> None:
    # As a browser writes it: with escapes for what UTF-8 cannot hold.
    body = json.dumps({"source": UNREADABLE[name]}, ensure_ascii=name == "half of a pair").encode()
    status, answer = client.post("/api/doctor", body)
    assert status == 200
    assert [each["rule"] for each in answer["findings"]] == ["MB000"]
    assert len(answer["findings"][0]["message"]) < 300
    assert "Traceback" not in str(answer)


def test_a_text_that_takes_too_long_ends_with_its_process(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def kept(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await start(*command, **options))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", kept)
    with monkeypatch.context() as short:
        short.setattr(paste_check, "MOST_SECONDS", 0.02)  # in which no process is up
        status, told = client.post("/api/doctor", {"source": WRONG})
    assert status == 503
    assert "did not finish" in told["error"]
    assert [process.returncode for process in started] == [-9] * len(started)
    assert "MB105" in {each["rule"] for each in check(client, WRONG)["findings"]}


def test_a_process_that_fails_is_told_in_words(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paste_check, "WORKER", "microbatch.guide.no_such_worker")
    status, told = client.post("/api/doctor", {"source": WRONG})
    assert status == 503
    assert "exit code 1" in told["error"]
    assert "Traceback" not in told["error"]


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_begins_with_the_first_loop_and_a_copy_without_a_server_names_the_command() -> None:
    text = page(load_measured(), load_drawn())
    area = re.search(r"<textarea[^>]*>(.*?)</textarea>", text, re.DOTALL)
    assert area is not None
    assert html.unescape(area[1]) == next(iter(LOOPS.values()))
    assert [html.unescape(each) for each in re.findall(r'data-loop="([^"]*)"', text)] == list(LOOPS.values())
    copy = page(load_measured(), load_drawn(), mode=RECORDED)
    assert "<textarea" not in copy
    assert "data-check" not in copy
    for each in (text, copy):
        assert "microbatch doctor train.py" in each
    assert "works in <code>microbatch guide</code>" in copy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as started:
        yield started


def checked(opened_page: Any) -> str:
    until(opened_page, f"!/Reading|Not checked yet|Changed/.test({TOLD})")
    return opened_page.evaluate(TOLD)


def test_a_wrong_loop_is_pasted_then_the_right_one(browser: Any, client: Any) -> None:
    with opened(browser, client.url) as page:
        page.fill("#pasted", WRONG)
        page.click("[data-check]")
        assert checked(page).startswith("Found: 1 certain")
        first = page.locator(".finding").first
        words = str(first.text_content())
        assert all(part in words for part in ("MB105 window-phase", "certain", "Line 7", "SGD 5 %", "(i + 1) % N == 0"))
        assert "step 1 (line 7): 1*1/4" in str(first.locator("pre").text_content())
        first.locator("button").click()
        chosen = "(({ value, selectionStart, selectionEnd }) => value.slice(selectionStart, selectionEnd).trim())"
        assert page.evaluate(f"{chosen}(document.querySelector('#pasted'))") == "optimizer.step()"
        assert page.evaluate("document.activeElement.id") == "pasted"
        page.fill("#pasted", RIGHT)
        assert page.evaluate(TOLD) == "Changed since it was checked."
        page.keyboard.press("Control+Enter")
        assert checked(page).startswith("Nothing found.")
        assert page.locator(".finding").count() == 0


def test_a_loop_that_steps_for_every_batch_is_told_so_and_how_to_accumulate(browser: Any, client: Any) -> None:
    with opened(browser, client.url) as page:
        page.fill(
            "#pasted", "for x, y in loader:\n    opt.zero_grad()\n    loss(model(x), y).backward()\n    opt.step()\n"
        )
        page.click("[data-check]")
        assert checked(page).startswith("This loop takes a step for every batch.")
        assert page.locator(".finding").count() == 0
        page.fill("#pasted", "print('no loop')")
        page.click("[data-check]")
        assert checked(page).startswith("There is no training loop here")


def test_another_loop_is_tried_and_ones_own_comes_back(browser: Any, client: Any) -> None:
    with opened(browser, client.url) as page:
        assert not page.locator("[data-mine]").is_visible()
        page.fill("#pasted", "for mine in loader: pass" + " " * 400)
        page.evaluate("document.querySelector('#pasted').scrollLeft = 999")
        page.get_by_role("button", name="Cleared too early").click()
        assert page.input_value("#pasted") == LOOPS["Cleared too early"]
        assert page.evaluate("document.querySelector('#pasted').scrollLeft") == 0
        assert page.locator("[data-loop][aria-pressed=true]").all_text_contents() == ["Cleared too early"]
        checked(page)  # at once
        assert "MB103" in str(page.locator(".finding").first.text_content())
        page.locator("[data-mine]").click()
        assert page.input_value("#pasted").rstrip() == "for mine in loader: pass"
        assert page.locator(".finding").count() == 0


def test_a_line_far_down_is_brought_into_view(browser: Any, client: Any) -> None:
    with opened(browser, client.url) as page:
        page.fill("#pasted", "# before\n" * 300 + WRONG + "# after\n" * 300)
        page.click("[data-check]")
        checked(page)
        page.locator(".finding button").first.click()
        top, height = page.evaluate(
            "(({ scrollTop, clientHeight }) => [scrollTop, clientHeight])(document.querySelector('#pasted'))"
        )
        line = page.evaluate("parseFloat(getComputedStyle(document.querySelector('#pasted')).lineHeight)")
        assert top < 307 * line < top + height


MARKUP = "<img src=x onerror=\"document.title='taken'\"> `<b>x</b>`"


def test_markup_in_an_answer_stays_text(browser: Any, client: Any) -> None:
    names = ("rule", "name", "confidence", "message", "happens", "how_much", "fix", "window", "severity")
    finding = {"line": 1, "needs": [MARKUP]} | dict.fromkeys(names, MARKUP)
    answer = {"findings": [finding] * 41 + [finding | {"confidence": "depends"}], "summary": {"certain": MARKUP}}
    with opened(browser, client.url) as page:
        page.route("**/api/doctor", lambda route: route.fulfill(json=answer))
        page.click("[data-check]")
        assert "These are the first 40" in checked(page)
        assert page.locator(".finding").count() == 40
        assert page.locator(".paste :is(img, b)").count() == 0
        assert MARKUP in str(page.locator(".finding pre").first.text_content())
        assert page.title() != "taken"


def test_what_is_not_checked_is_said(browser: Any, client: Any) -> None:
    with opened(browser, client.url, expected=("ERR_FAILED",)) as page:
        page.evaluate(f"document.querySelector('#pasted').value = '#'.repeat({MOST_SOURCE} + 1)")
        page.click("[data-check]")
        assert "200,001 characters" in checked(page)
        page.route("**/api/doctor", lambda route: route.abort())
        page.fill("#pasted", RIGHT)
        page.click("[data-check]")
        assert "the server does not answer" in checked(page)


@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing_and_nothing_is_too_wide(browser: Any, client: Any, width: str) -> None:
    with opened(browser, client.url, viewport=WIDTHS[width]) as page:
        if width == "phone":
            page.click(".paste > summary")
        for source in (LOOPS["Two faults"], "for " + "x" * 400, RIGHT):
            page.fill("#pasted", source)
            for state in ("changed", "checked"):
                if state == "checked":
                    page.click("[data-check]")
                    checked(page)
                if state == "checked" or source == RIGHT:  # what was changed looks the same, whatever it is
                    assert violations(page, ".paste") == [], (source, state)
                assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]["width"], source
