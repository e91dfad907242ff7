"""How the simulation reads forwards, losses and the methods of tensors."""

import ast
from dataclasses import replace
from fractions import Fraction
from typing import Any

from microbatch.linting.guesses import COUPLED_LOSSES, PIECE_CALLS
from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import last_name, text_of
from microbatch.linting.values import Data, Unknown, tags

__all__ = ["TensorCalls", "is_zeros", "pairs_rows", "within_rows"]

_SYNCS = frozenset({"item", "tolist", "numpy", "cpu"})
# Methods whose result is the same value, in another form or place.
_SAME = frozenset(
    {
        "to",
        "cuda",
        "half",
        "float",
        "double",
        "view",
        "reshape",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "flatten",
        "clone",
        "transpose",
        "permute",
        "t",
        "type",
        "requires_grad_",
        "bfloat16",
        "gather",
        "values",
        "logits",
    }
)


def within_rows(node: ast.Call, first: int) -> bool:
    """Whether a sum or mean goes over dimensions inside of each row: `x.sum(dim=1)`.

    Args:
        node: The call.
        first: Where the dimension stands among its arguments.

    Returns:
        Whether it does; the first dimension is the one of the rows.
    """
    dims = [k.value for k in node.keywords if k.arg in ("dim", "axis")] or node.args[first : first + 1]
    if not dims:
        return False
    try:
        found = ast.literal_eval(dims[0])
    except (ValueError, TypeError):
        return False
    return found is not None and 0 not in (found if isinstance(found, (tuple, list)) else (found,))


def is_zeros(node: ast.Call) -> bool:
    """Whether a call makes the label 0 for every row: each row is to be found at the first place."""
    return last_name(node.func) == "zeros" and any(
        keyword.arg == "dtype" and last_name(keyword.value) in ("long", "int64") for keyword in node.keywords
    )


def pairs_rows(node: ast.Call) -> bool:
    """Whether an `einsum` compares each row of one tensor with each row of another: "i d, j d -> i j"."""
    said = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    left, arrow, right = said[0].partition("->") if said else ("", "", "")
    words = [part.split() if " " in part.strip() else list(part.strip()) for part in left.split(",")]
    if not arrow or len(words) != 2 or not all(words):
        return not said
    first, second = (part[0] for part in words)
    return first != second and first in right and second in right


class TensorCalls(Simulated):
    """The part of the machine that knows tensors."""

    def this_microbatch(self) -> dict[int, Fraction]:
        """The weights of what the microbatch at hand makes."""
        return {self.trace.tick: Fraction(1)}

    def opaque_loss(self, what: str) -> Data:
        """A loss of this microbatch, of which the file does not show how it is made."""
        return Data(self.this_microbatch(), kind="loss", opaque=(f"`{what}`",))

    def unseen_loss(self, value: Any, what: str) -> Data:
        """The loss that a value stands for which is not followed; where the value was divided by N, so was the loss."""
        divided = not tags(value).isdisjoint({"n", "by n"})
        return replace(self.opaque_loss(what), opaque=(f"divided in `{what}`" if divided else f"`{what}`",))

    def forward(self, node: ast.Call) -> Any:
        """A model's output, made by the microbatch at hand."""
        _, keywords = self.arguments(node)
        if not self.trace.begun:
            return Unknown(text_of(node))
        if any("label" in name or name in ("targets", "target") for name in keywords):
            self.trace.settings["labels"] = node
        if any(name.startswith(("num_items", "num_tokens", "normalizer")) for name in keywords):
            self.trace.settings["criterion"] = node  # the model divides by the count of the window
        labelled = any("label" in name for name in keywords)  # then the model computes the loss, a mean over the labels
        self.output = Data(
            self.this_microbatch(),
            reduction="mean" if labelled else "",
            forward_synced=self.sync_off == 0,
            blurred=self.without_graph > 0 or self.trace.evaluating > 0,  # no loss that is trained on
        )
        return self.output

    def loss_call(self, node: ast.Call, reduction: str, name: str, *, info: dict[str, Any] | None = None) -> Data:
        """A loss of this microbatch, with what its `reduction` says."""
        args, keywords = self.arguments(node)
        if self.trace.begun:
            self.trace.settings["criterion"] = node
        if isinstance(said := keywords.get("reduction"), str):
            reduction = said
        if keywords.get("size_average") is False:
            reduction = "sum"
        values = self.flat([*args, *keywords.values()])
        data = [v for v in values if isinstance(v, Data)]
        base = self.combine(data) if data else Data({})
        is_one_hot = any(isinstance(v, Unknown) and ("rows" in v.tags or "range(" in v.key) for v in values) or any(
            "arange" in text_of(a) for a in node.args
        )
        coupled = node.lineno if COUPLED_LOSSES.search(name) or (base.coupled and is_one_hot) else 0
        ignore = (info or {}).get("ignore") or (node.lineno if "ignore_index" in keywords else 0)
        return replace(
            base,
            weights=base.weights if data and all(v.kind == "loss" for v in data) else self.this_microbatch(),
            kind="loss",
            reduction=reduction if reduction != "none" else "",
            number=False,
            opaque=tuple(o for v in data if v.kind == "loss" for o in v.opaque) if reduction else base.opaque,
            coupled=coupled,
            blurred=base.blurred or self.trace.evaluating > 0,
            tokens=(ignore or base.tokens) if reduction == "mean" else 0,
        )

    def reduce(self, data: Data, how: str, count: int = 0) -> Data:
        """A sum or a mean of data: over the rows of one microbatch, or over a list of microbatches."""
        if len(data.weights) > 1 and count > 1:
            return data.times(Fraction(1, count), data.divided) if how == "mean" else data
        if data.kind == "loss" and (data.reduction in ("mean", "sum") or data.inside):
            return data
        return replace(data, reduction=how, kind=data.kind if data.kind != "batch" else "tensor")

    def _all_rows(self, base: Data, how: str) -> Data:
        return Data({}, kind="batch", reduction=how) if base.kind == "batch" else self.reduce(base, how)

    def data_method(self, node: ast.Call, base: Data, func: ast.Attribute) -> Any:
        """A method of a tensor."""
        attr = func.attr
        if attr in _SYNCS and base.kind != "batch":
            self.trace.mark("sync", node, attr)
            return replace(base, number=True)
        if attr == "detach":
            return replace(base, number=True) if base.kind == "loss" else base
        if attr in _SAME:
            return base
        if attr in ("mean", "sum"):
            self.arguments(node)
            return base if within_rows(node, 0) else self._all_rows(base, attr)
        if attr.rstrip("_") in ("div", "mul", "true_divide", "divide", "multiply") and node.args:
            op = ast.Mult() if attr.startswith("mul") else ast.Div()
            value = self.operate(base, op, self.evaluate(node.args[0]), node=node)
            if attr.endswith("_") and isinstance(func.value, (ast.Name, ast.Attribute)):
                self.store(func.value, value)
            return value
        args, keywords = self.arguments(node)
        if attr in PIECE_CALLS:
            self.trace.mark("pieces", node, text_of(func))
        if attr in ("size", "dim", "numel", "__len__", "nelement"):
            return Unknown(text_of(node), data=True)
        data = [v for v in self.flat([*args, *keywords.values()]) if isinstance(v, Data)]
        if attr in ("matmul", "mm", "bmm") and data:
            return replace(self.combine([base, *data]), coupled=node.lineno)
        made = [v for v in data if v.kind != "batch"]
        if any("n" in tags(v) for v in [*args, *keywords.values()]) and (made or base.kind == "loss"):
            value = self.combine(made) if made else base
            return replace(value, opaque=(*value.opaque, f"divided inside of `{text_of(func)}`"))
        if base.kind == "batch" and not base.weights and attr not in ("items", "get", "pop", "keys"):
            return self.combine(made) if made else base
        return self.combine([base, *made]) if made else base
