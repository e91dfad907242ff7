"""What does not go with what is one table: it refuses, and the page of the docs is written from it."""

from typing import Any

import pytest
import torch
from tests.house.combinations_page import PAGE, page
from torch import nn
from torch.optim import SGD

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.step.combinations import CLASHES, FEATURES, USES

# How to ask for a feature in a plain process; the others need ranks, or a model of their own.
ASKED: dict[str, dict[str, Any]] = {
    "Ranks(deterministic=True)": {"ranks": mb.Ranks(deterministic=True)},
    "Ranks(overlap=True)": {"ranks": mb.Ranks(overlap=True)},
    'batch_norm="exact"': {"batch_norm": "exact"},
    'batch_norm="pooled"': {"batch_norm": "pooled"},
    'Sums(buffer="none")': {"sums": mb.Sums(buffer="none")},
    'dropout="by_row"': {"dropout": "by_row"},
    "lengths=": {"lengths": "mask"},
    "compile=": {"compile": True},
    "checkpoint=": {"checkpoint": ["0"]},
    'checkpoint="auto"': {"checkpoint": "auto"},
    "grad_scaler=": {"grad_scaler": torch.amp.GradScaler("cpu")},
    "max_grad_norm=": {"max_grad_norm": 1.0},
    'Sums(how="compensated")': {"sums": mb.Sums(how="compensated", dtype=torch.bfloat16)},
    'Ranks(sync="lean")': {"ranks": mb.Ranks(sync="lean")},
    'coupled="twice"': {"coupled": "twice"},
    'coupled="keep"': {"coupled": "keep"},
    'microbatch_size="auto"': {"microbatch_size": "auto"},
}


# Pairs whose two features are fields of one record.
BOTH_FIELDS: dict[frozenset[str], dict[str, Any]] = {
    frozenset(('Sums(buffer="none")', 'Sums(how="compensated")')): {
        "sums": mb.Sums(buffer="none", how="compensated", dtype=torch.bfloat16)
    },
    frozenset(("Ranks(overlap=True)", "Ranks(deterministic=True)")): {
        "ranks": mb.Ranks(overlap=True, deterministic=True)
    },
}


def make(**options: Any) -> mb.Accumulator:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    given: dict[str, Any] = {"microbatch_size": 2, **options}
    return mb.Accumulator(model, SGD(model.parameters(), lr=0.1, momentum=0.9), **given)


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/house/combinations_page.py"


def test_the_table_names_what_there_is() -> None:
    known = {*FEATURES, *USES}
    assert all({each.first, each.second} <= known for each in CLASHES)
    pairs = [frozenset((each.first, each.second)) for each in CLASHES]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize(
    "clash",
    [each for each in CLASHES if each.first in ASKED and each.second in ASKED],
    ids=lambda clash: f"{clash.first} with {clash.second}",
)
def test_what_the_table_refuses_is_refused_with_its_words(clash: Any) -> None:
    first, second = ASKED[clash.first], ASKED[clash.second]
    asked = BOTH_FIELDS.get(frozenset((clash.first, clash.second)), {**first, **second})
    with pytest.raises(ConfigError, match="does not go with") as caught:
        make(**asked)
    assert clash.why in str(caught.value)


@pytest.mark.parametrize("name", [name for name in ASKED if name != 'batch_norm="pooled"'])
def test_alone_each_is_allowed(name: str) -> None:
    make(**ASKED[name])
