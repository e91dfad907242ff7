"""The rules are one table: codes that never move, plain words, loops that can be read at a glance."""

import ast
import re

import pytest

from microbatch.errors import LintError
from microbatch.linting.rules.how_much import how_much_for
from microbatch.linting.rules.rule import OFF
from microbatch.linting.rules.table import FAMILIES, RULES, rule_of, select

# Code, name and severity of every rule. Files, suppressions and settings name them: none may change its meaning.
PUBLISHED = """
MB000 unreadable input              MB001 no-accumulation-found input    MB002 opaque input
MB003 unused-suppression input      MB101 loss-not-divided error         MB102 loss-divided-twice error
MB103 zero-grad-in-window error     MB104 step-every-microbatch error    MB105 window-phase error
MB106 backward-only-at-boundary error MB107 zero-grad-missing error
MB110 tail-leaks warning            MB111 tail-dropped warning           MB112 tail-scale warning
MB113 tail-step-differs warning     MB114 skip-in-window warning
MB201 clip-every-microbatch warning MB202 clip-scaled-gradients error    MB203 unscale-twice error
MB204 scaler-order error
MB301 schedule-units error          MB302 scheduler-not-prepared warning MB303 ema-every-microbatch warning
MB304 counter-units warning         MB305 optimizer-recreated error
MB401 mean-of-means warning         MB402 batch-coupled-loss error       MB403 batch-norm warning
MB404 uneven-microbatch warning     MB405 shared-parameter warning
MB501 reduces-every-microbatch speed MB502 no-sync-ineffective speed     MB503 never-reduces error
MB601 host-sync speed               MB602 graph-retained speed           MB603 empty-cache speed
MB701 logged-loss-scaled logging    MB702 logged-last logging
"""


def test_every_rule_has_its_code_name_and_severity() -> None:
    words = PUBLISHED.split()
    published = list(zip(words[::3], words[1::3], words[2::3], strict=True))
    assert [(code, rule.name, rule.severity) for code, rule in RULES.items()] == published
    assert all(rule.code == code for code, rule in RULES.items())
    assert all(sum(code.startswith(family) for family in FAMILIES) == 1 for code in RULES)


@pytest.mark.parametrize("code", list(RULES))
def test_its_loops_are_short_and_can_be_parsed(code: str) -> None:
    rule = RULES[code]
    for source in (rule.wrong, rule.right):
        assert 5 <= len(source.splitlines()) <= 15
        assert max(map(len, source.splitlines())) <= 100
        if (code, source) == ("MB000", rule.wrong):
            with pytest.raises(SyntaxError):
                ast.parse(source)
        else:
            ast.parse(source)
    assert rule.wrong != rule.right


def long_or_archaic(text: str) -> list[str]:
    """Return the sentences of a rule with more than 30 words, or with a word that a reader would have to look up."""
    sentences = re.split(r"(?<=[.!?;:])\s+", re.sub(r"`[^`]*`", "code", text))
    hard = re.compile(r"\b(?:thereof|whilst|hence|upon|shall|lest|anew|aught)\b")
    return [each for each in sentences if len(each.split()) > 30 or hard.search(each)]


@pytest.mark.parametrize("code", list(RULES))
def test_its_words_are_plain(code: str) -> None:
    rule = RULES[code]
    for text in (rule.summary, rule.happens, rule.how_much, rule.fix, rule.certain):
        assert long_or_archaic(text) == []
    assert all(text.endswith((".", ")")) for text in (rule.summary, rule.happens, rule.fix, rule.certain))
    assert len(re.findall(r"[.!?](?:\s|$)", rule.happens)) in range(1, 5)


def test_a_sentence_that_is_not_plain_is_seen() -> None:
    assert long_or_archaic("Short. " + "word " * 31 + ".")
    assert long_or_archaic("It begins anew.")
    assert not long_or_archaic("Call `a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f` once.")


def test_a_rule_is_found_by_its_code_and_its_name() -> None:
    assert rule_of("MB105") is rule_of("mb105") is rule_of("window-phase") is RULES["MB105"]
    for wrong in ("MB1", "MB999", "", "window"):
        with pytest.raises(LintError, match="no rule has the code or name"):
            rule_of(wrong)


@pytest.mark.parametrize(
    ("choices", "codes"),
    [
        ((), []),
        (("MB7",), ["MB701", "MB702"]),
        (("mb20", "MB201"), ["MB201", "MB202", "MB203", "MB204"]),
        (("MB702", "tail-leaks"), ["MB110", "MB702"]),
        (("ALL",), list(RULES)),
        (("MB",), list(RULES)),
    ],
)
def test_rules_are_selected_by_prefix(choices: tuple[str, ...], codes: list[str]) -> None:
    assert [rule.code for rule in select(*choices)] == codes


@pytest.mark.parametrize("choice", ["MB9", "E501", "", "tail"])
def test_what_selects_nothing_is_refused(choice: str) -> None:
    with pytest.raises(LintError, match="selects no rule; there are MB000"):
        select("MB1", choice)


@pytest.mark.parametrize(
    ("code", "optimizer", "clipped", "measured"),
    [
        ("MB101", "SGD", False, "SGD 92 %. The gradient"),
        ("MB101", "AdamW", True, "AdamW with clipping at 1.0 15 %. The gradient"),
        ("MB101", "Adam8bit", False, "AdamW nothing that can be seen (3e-7). The gradient"),
        ("MB104", "Adam", True, "AdamW 61 %. There are"),
        ("MB305", "SGD", None, "SGD with momentum 50 %; SGD without momentum nothing. There are"),
    ],
)
def test_how_much_for_one_optimizer(code: str, optimizer: str, clipped: bool | None, measured: str) -> None:
    assert how_much_for(RULES[code], optimizer, clipped=clipped).startswith(OFF + measured)


@pytest.mark.parametrize(("code", "optimizer"), [("MB101", ""), ("MB101", "Lion"), ("MB601", "SGD"), ("MB001", "SGD")])
def test_how_much_for_others_is_everything(code: str, optimizer: str) -> None:
    assert how_much_for(RULES[code], optimizer) == RULES[code].how_much
