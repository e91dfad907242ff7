"""Each form of the findings holds all of them, in the syntax that its readers take."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tests.linting.findings import LOOP, judge

from microbatch.linting.examine import examine, examine_path
from microbatch.linting.finding import Finding
from microbatch.linting.formats.explain_form import explain_form
from microbatch.linting.formats.github_form import github_form
from microbatch.linting.formats.json_form import SCHEMA, json_form, json_lines_form
from microbatch.linting.formats.sarif_form import sarif_form
from microbatch.linting.formats.text_form import clean, text_form
from microbatch.linting.report import Report
from microbatch.linting.rules.rule import Rule
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source, read_text

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def notebook(*cells: str) -> str:
    return json.dumps({"cells": [{"cell_type": "code", "source": cell} for cell in cells]})


def report(*texts: str, path: str = "train.py", rules: Mapping[str, Rule] = RULES, **options: Any) -> Report:
    """Judge texts as files; one that is a notebook is named so."""
    findings, sources = list[Finding](), dict[str, Source]()
    for number, text in enumerate(texts):
        name = path if number == 0 else f"other_{number}.py"
        source = read_text(text, path=name)
        findings += examine(source, judge)
        if isinstance(source, Source):
            sources[name] = source
    return Report(findings, sources, rules, len(texts), **options)


def lines(form: Callable[[Report], Iterator[str]], of: Report) -> list[str]:
    return "\n".join(form(of)).split("\n")


# -- text -------------------------------------------------------------------------------------------------------------


def test_text_teaches() -> None:
    assert lines(text_form, report(LOOP)) == [
        "train.py:6:9: MB105 [certain] MB105 of if i % N == 0:",
        "  6 |         if i % N == 0:  # MB105!~",
        "    |         ^",
        "  what happens: Step 1 takes microbatch 0 alone.",
        "  how much: 19 % with SGD.",
        "  fix: Count from 1.",
        "             print(loss.item())  # MB601!",
        "    -        if i % N == 0:  # MB105!~",
        "    +        if i % N == 0:",
        "                 optimizer.step()  # MB110?",
        "",
        "train.py:7:13: MB110 [depends] MB110 of optimizer.step()",
        "  7 |             optimizer.step()  # MB110?",
        "    |             ^",
        "  depends on: len(loader) % N",
        "  settle it: put the loop into loop(model, optimizer, batch) beside a job (docs/check.md); then",
        "    `microbatch check train.py:job --loop train.py:loop` runs it on your own model",
        "",
        "train.py:3:9: [speed] MB601 host-sync (lines 3, 5); MB501 reduces-every-microbatch (line 4)",
        "",
        "1 certain, 1 depends, 3 speed notes (1 file read)",
    ]


def test_the_window_is_drawn_when_it_is_asked_for() -> None:
    drawn = ["  the window:", "    step 1: 0", "    step 2: 1 2 3 4"]
    text = lines(text_form, report(LOOP, show_window=True))
    at = text.index(drawn[0])
    assert text[at : at + 3] == drawn
    assert drawn[0] not in lines(text_form, report(LOOP))


def test_nothing_found_is_one_line() -> None:
    assert lines(text_form, report("x.backward()\n", "y.backward()\n")) == [
        "0 certain, 0 depends, 0 speed notes (2 files read)"
    ]


def test_what_could_not_be_judged_is_counted() -> None:
    text = lines(text_form, report("for in:\n", "x.backward()  # MB002.\ny = 1  # microbatch: ignore\n"))
    assert text[0] == f"train.py:1:5: MB000 [error] cannot be read: it is not Python {PYTHON}: invalid syntax"
    assert text[-1] == "0 certain, 0 depends, 0 speed notes, 1 unused comment; could not judge: 2 (2 files read)"


def test_a_notebook_says_cell_and_line() -> None:
    text = lines(text_form, report(notebook("x = 1", "%time\n\ny.backward()  # MB105!~"), path="a.ipynb"))
    assert text[:2] == ["a.ipynb:cell 2:3:1: MB105 [certain] MB105 of y.backward()", "  3 | y.backward()  # MB105!~"]
    assert "    -y.backward()  # MB105!~" in text


def test_speed_notes_of_two_functions_are_two_lines() -> None:
    found = report(LOOP)
    apart = [
        *found.findings,
        Finding(rule="MB601", path="train.py", line=9, column=1, confidence="certain", message="x", function="other"),
    ]
    text = lines(text_form, Report(apart, found.sources, RULES, 1))
    assert [line.split(":")[1] for line in text if "[speed]" in line] == ["3", "9"]


@pytest.mark.parametrize("before", ["\t\t", "    ", ""])
def test_the_caret_is_below_its_column(before: str) -> None:
    text = lines(text_form, report(f"if x:\n{before or ' '}y.backward()  # MB105!\n"))
    code, caret = text[1], text[2]
    assert code[caret.index("^")] == "y"
    assert caret.count("\t") == before.count("\t")


def test_a_terminal_cannot_be_taken_over() -> None:
    text = lines(text_form, report("x = '\x1b[2J\x07'; y.backward()  # MB105!\n", path="a\x1b]0;b\x07\n.py"))
    assert all(line.isprintable() for line in text)
    assert "\\x1b[2J\\x07" in text[1]
    assert clean("é\tü 漢") == "é\tü 漢"


def test_a_long_line_is_shown_in_part() -> None:
    text = lines(text_form, report("x = '" + "a" * 1_000_000 + "'; y.backward()  # MB105!\n"))
    assert max(map(len, text)) < 1_000_100  # the message has the line; what is shown of the source is short
    assert all(len(line) < 120 for line in text[1:])


def test_what_was_said_is_not_said_again() -> None:
    found = report(LOOP + LOOP, show_window=True)
    text = lines(text_form, found)
    assert [line for line in text if " MB105 [" in line] == [
        "train.py:6:9: MB105 [certain] MB105 of if i % N == 0:",
        "train.py:13:9: MB105 [certain] MB105 of if i % N == 0:",
    ]
    assert text.count("  what happens: Step 1 takes microbatch 0 alone.") == 1
    assert text.count("  the window:") == 1
    assert sum(line.startswith("  settle it") for line in text) == 1
    assert text.count("    -        if i % N == 0:  # MB105!~") == 2
    assert lines(text_form, report(LOOP, LOOP)).count("  what happens: Step 1 takes microbatch 0 alone.") == 2


def test_long_words_are_wrapped() -> None:
    finding = Finding(
        rule="MB105", path="a.py", line=1, column=1, confidence="certain", message="m", happens="word " * 100
    )
    text = lines(text_form, Report([finding], {}, RULES, 1))
    assert max(map(len, text)) <= 100
    assert sum(line.count("word") for line in text) == 100


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_json_holds_every_field_of_every_finding() -> None:
    found = report(LOOP)
    whole = json.loads("".join(json_form(found)))
    assert (whole["schema"], whole["files"], len(whole["findings"])) == (SCHEMA, 1, 5)
    assert whole["summary"] == {"certain": 1, "depends": 1, "speed": 3, "not_judged": 0, "unused_comments": 0}
    wanted = {each.name for each in fields(Finding)} | {"name", "severity"}
    assert all(set(each) == wanted for each in whole["findings"])
    fault = next(each for each in whole["findings"] if each["rule"] == "MB105")
    assert (fault["name"], fault["severity"], fault["line"]) == ("window-phase", "error", 6)
    assert fault["edits"] == [{"first": 6, "last": 6, "text": "        if i % N == 0:\n"}]


def test_json_lines_hold_the_same() -> None:
    found = report(LOOP)
    *events, last = [json.loads(line) for line in json_lines_form(found)]
    assert all(each.pop("event") == "finding" and each.pop("schema") == SCHEMA for each in events)
    assert events == json.loads("".join(json_form(found)))["findings"]
    assert last == {"event": "summary", "schema": SCHEMA, "files": 1, **found.counts()}


# -- GitHub -----------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"::(?P<kind>error|warning|notice) (?P<properties>[^:]*)::(?P<data>.*)")


def as_github_reads(line: str) -> tuple[str, dict[str, str], str]:
    """Read a workflow command as the runner does: properties are divided at commas, then unescaped."""
    match = COMMAND.fullmatch(line)
    assert match is not None
    properties = dict(each.split("=", 1) for each in match["properties"].split(","))
    return match["kind"], {key: unquote(value) for key, value in properties.items()}, unquote(match["data"])


def test_github_reads_kind_place_and_text() -> None:
    commands = [as_github_reads(line) for line in github_form(report(LOOP))]
    assert [kind for kind, _, _ in commands] == ["notice", "notice", "notice", "error", "warning"]
    _, properties, text = commands[3]
    assert properties == {"file": "train.py", "line": "6", "col": "9", "title": "MB105 window-phase [certain]"}
    assert text.split("\n")[1:] == ["Step 1 takes microbatch 0 alone.", "19 % with SGD.", "Count from 1."]


def test_github_escapes_what_would_end_a_command() -> None:
    text = "100% of a, b::c\n::error::no"
    [line] = github_form(
        Report(
            [Finding(rule="MB105", path="a,b:c%.py", line=1, column=1, confidence="certain", message=text)],
            {},
            RULES,
            1,
        )
    )
    assert "\n" not in line
    _, properties, data = as_github_reads(line)
    assert properties["file"] == "a,b:c%.py"
    assert data == text


def test_github_has_no_line_of_a_notebook() -> None:
    [line] = github_form(report(notebook("x = 1", "y.backward()  # MB105!"), path="a.ipynb"))
    _, properties, _ = as_github_reads(line)
    assert properties == {"file": "a.ipynb", "title": "MB105 window-phase [certain] cell 2, line 1"}


# -- SARIF ------------------------------------------------------------------------------------------------------------


def sarif(found: Report) -> dict[str, Any]:
    return json.loads("".join(sarif_form(found)))


def faults_of_sarif(log: Mapping[str, Any]) -> list[str]:
    """Check a log against what the standard and its schema require of the properties that are used here.

    The schema itself is not at hand in the tests. This is the part of it that concerns the objects that we write.
    """
    faults = list[str]()

    def need(holds: object, what: str) -> None:
        if not holds:
            faults.append(what)

    def only(value: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], what: str) -> None:
        need(set(required) <= set(value), f"{what} lacks {sorted(set(required) - set(value))}")
        need(set(value) <= {*required, *optional}, f"{what} has {sorted(set(value) - {*required, *optional})}")

    only(log, ["version", "runs"], ["$schema"], "log")
    need(log["version"] == "2.1.0", "version")
    for run in log["runs"]:
        only(run, ["tool"], ["results", "originalUriBaseIds", "columnKind", "invocations"], "run")
        need(run["columnKind"] in {"utf16CodeUnits", "unicodeCodePoints"}, "columnKind")
        only(run["tool"], ["driver"], [], "tool")
        driver = run["tool"]["driver"]
        only(driver, ["name"], ["version", "rules"], "driver")
        rules = driver["rules"]
        need(len({rule["id"] for rule in rules}) == len(rules), "rules are unique")
        for rule in rules:
            optional = ["name", "shortDescription", "fullDescription", "help", "defaultConfiguration", "properties"]
            only(rule, ["id"], optional, "rule")
            for message in (rule["shortDescription"], rule["fullDescription"], rule["help"]):
                only(message, ["text"], ["markdown"], "message")
                need(message["text"], "an empty text")
            need(rule["defaultConfiguration"]["level"] in {"none", "note", "warning", "error"}, "level of a rule")
            need(all(isinstance(tag, str) for tag in rule["properties"]["tags"]), "tags")
        for invocation in run["invocations"]:
            only(invocation, ["executionSuccessful"], [], "invocation")
            need(isinstance(invocation["executionSuccessful"], bool), "executionSuccessful")
        for result in run["results"]:
            optional = ["ruleId", "ruleIndex", "level", "locations", "partialFingerprints", "properties"]
            only(result, ["message"], optional, "result")
            need(rules[result["ruleIndex"]]["id"] == result["ruleId"], "ruleIndex")
            need(result["level"] in {"none", "note", "warning", "error"}, "level")
            need(result["message"]["text"], "an empty message")
            need(all(isinstance(each, str) for each in result["partialFingerprints"].values()), "fingerprints")
            for location in result["locations"]:
                only(location, [], ["physicalLocation", "logicalLocations"], "location")
                physical = location["physicalLocation"]
                only(physical, ["artifactLocation"], ["region"], "physicalLocation")
                artifact = physical["artifactLocation"]
                only(artifact, ["uri"], ["uriBaseId"], "artifactLocation")
                need(re.fullmatch(r"[A-Za-z0-9._~!$&'()*+;=@,/:%-]+", artifact["uri"]), "a URI")
                need(("uriBaseId" in artifact) == (not artifact["uri"].startswith("file:")), "uriBaseId")
                need(artifact.get("uriBaseId", "%SRCROOT%") in run["originalUriBaseIds"], "uriBaseId is known")
                region = physical.get("region", {"startLine": 1})
                only(region, ["startLine"], ["startColumn", "snippet"], "region")
                need(region["startLine"] >= 1, "startLine")
                need(region.get("startColumn", 1) >= 1, "startColumn")
    return faults


ODD = ["train.py", "a folder/ü #1?.py", "/abs/train.py", "<stdin>", "a.ipynb"]


@pytest.mark.parametrize("path", ODD)
def test_sarif_is_what_the_standard_asks_for(path: str) -> None:
    text = notebook(LOOP) if path.endswith(".ipynb") else LOOP
    log = sarif(report(text, "for in:\n", path=path))
    assert faults_of_sarif(log) == []
    assert log["runs"][0]["invocations"] == [{"executionSuccessful": False}]
    assert {rule["id"] for rule in log["runs"][0]["tool"]["driver"]["rules"]} == set(RULES)
    assert [each["level"] for each in log["runs"][0]["results"]] == ["note"] * 3 + ["error", "warning", "error"]
    fault = log["runs"][0]["results"][3]
    assert fault["properties"]["confidence"] == "certain"
    region = fault["locations"][0]["physicalLocation"].get("region")
    if path.endswith(".ipynb"):
        assert region is None
        assert fault["locations"][0]["logicalLocations"][0]["name"] == "cell 1"
    else:
        assert region == {"startLine": 6, "startColumn": 9, "snippet": {"text": "if i % N == 0:  # MB105!~"}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda log: log.update(version="2.0"),
        lambda log: log["runs"][0].update(columns=1),
        lambda log: log["runs"][0]["results"][0].update(level="fatal"),
        lambda log: log["runs"][0]["results"][0].update(ruleIndex=0),
        lambda log: log["runs"][0]["results"][0]["message"].update(text=""),
        lambda log: log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"].update(startLine=0),
        lambda log: log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"].update(
            uri="a b"
        ),
        lambda log: log["runs"][0]["tool"]["driver"].pop("name"),
    ],
)
def test_a_log_that_is_not_would_be_seen(spoil: Callable[[dict[str, Any]], object]) -> None:
    log = sarif(report(LOOP))
    spoil(log)
    assert faults_of_sarif(log) != []


def prints(found: Report) -> list[str]:
    return [each["partialFingerprints"]["microbatchLoop/v1"] for each in sarif(found)["runs"][0]["results"]]


def test_fingerprints_stay_when_lines_move_and_differ_for_different_faults() -> None:
    before = prints(report(LOOP))
    assert len(set(before)) == len(before)
    assert prints(report("import torch\n\n\n" + LOOP)) == before
    assert prints(report(LOOP.replace("    ", "\t"))) == before
    changed = prints(report(LOOP.replace("i % N == 0", "i % N == 1")))
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, True, True, False, True]
    twice = prints(report(LOOP + LOOP))
    assert len(set(twice)) == len(twice)


# -- levels and exit codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "level", "code", "strict"),
    [
        ("MB105!", "error", 1, 1),
        ("MB201!", "warning", 1, 1),
        ("MB105?", "warning", 0, 1),
        ("MB110?", "warning", 0, 1),
        ("MB601!", "note", 0, 0),
        ("MB701!", "note", 0, 0),
        ("MB601?", "note", 0, 0),
        ("MB002.", "note", 0, 0),
    ],
)
def test_levels_and_exit_codes(mark: str, level: str, code: int, strict: int) -> None:
    found = report(f"x.backward()  # {mark}\n")
    assert [found.level(each) for each in found.findings] == [level]
    assert (found.exit_code(), found.exit_code(strict=True)) == (code, strict)


def test_what_could_not_be_read_wins() -> None:
    found = report("x.backward()  # MB105!\n", "for in:\n")
    assert (found.exit_code(), found.exit_code(strict=True)) == (2, 2)
    assert found.level(found.findings[-1]) == "error"
    assert report("x.backward()\n").exit_code() == 0


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(RULES))
def test_every_rule_can_be_explained(code: str) -> None:
    rule = RULES[code]
    text = explain_form(rule)
    assert text.startswith(f"{code} {rule.name} ({rule.severity})\n\n")
    assert max(map(len, text.split("\n"))) <= 110
    joined = " ".join(text.split())
    assert all(" ".join(part.split()) in joined for part in (rule.summary, rule.happens, rule.fix, rule.certain))


def test_a_fault_of_the_doctor_itself_is_a_finding() -> None:
    def broken(source: Source, folder: Path | None) -> list[Finding]:
        if "x" in source.text:
            raise KeyError("x")
        return []

    def deep(source: Source, folder: Path | None) -> list[Finding]:
        return deep(source, folder)

    [found] = examine(Source("a.py", "x.backward()"), broken)
    assert (found.rule, "KeyError('x')" in found.message) == ("MB000", True)
    [found] = examine(Source("a.py", "y.backward()"), deep)
    assert (found.rule, "nested too deeply" in found.message) == ("MB000", True)
    assert examine(Source("a.py", "y.backward()"), broken) == []


def test_text_files_and_folders_are_examined(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.py").write_text(LOOP)
    (tmp_path / "a.py").write_text("x = 1\n")
    looked = list[tuple[str, Path | None]]()

    def watch(source: Source, folder: Path | None) -> list[Finding]:
        looked.append((source.path, folder))
        return judge(source, folder)

    file = tmp_path / "b" / "train.py"
    for given in (LOOP, file, str(file), tmp_path, str(tmp_path)):
        found = examine_path(given, watch)
        assert [each.rule for each in found] == ["MB601", "MB501", "MB601", "MB105", "MB110"]
    of_file, of_folder = (file.as_posix(), file.parent), (file.as_posix(), tmp_path)
    assert looked == [("<source>", None), of_file, of_file, of_folder, of_folder]
    assert [each.rule for each in examine_path(tmp_path / "a.py", judge)] == ["MB001"]
    assert [each.rule for each in examine_path("", judge)] == ["MB001"]
    assert [each.rule for each in examine_path(tmp_path / "gone.py", judge)] == ["MB000"]
    assert [each.rule for each in examine_path("x\0", judge)] == ["MB000"]
    assert [each.rule for each in examine_path("x" * 5_000, judge)] == ["MB001"]


def test_what_is_found_in_an_imported_file_is_its_own(tmp_path: Path) -> None:
    inner, outer = tmp_path / "loop.py", tmp_path / "train.py"
    inner.write_text(LOOP.replace("# MB110?", "# MB110?  # microbatch: ignore[MB110]"))
    outer.write_text("from loop import train  # microbatch: ignore[MB601]\ntrain.backward()\n" + "x = 1\n" * 9)

    def follow(source: Source, folder: Path | None) -> list[Finding]:
        imported = read_text(inner.read_text(), path=inner.as_posix())
        assert isinstance(imported, Source)
        return judge(imported, folder)

    found = examine_path(outer, follow)
    # The comments of each file hold for its own lines.
    assert {each.path for each in found if each.rule != "MB003"} == {inner.as_posix()}
    assert [each.rule for each in found] == ["MB003", "MB601", "MB501", "MB601", "MB105"]
    # Found from both files, and said once.
    both = [each for each in examine_path(tmp_path, follow) if each.rule != "MB003"]
    assert [each.rule for each in both] == ["MB601", "MB501", "MB601", "MB105"]
