"""What the loss is: a mean over tokens, a loss that compares rows, BatchNorm, unequal slices: MB401 to MB404."""

import ast
import re
from collections.abc import Iterator
from typing import TypeGuard

from microbatch.linting.faults import Fault, View
from microbatch.linting.guesses import SHARED
from microbatch.linting.syntax import last_name, text_of
from microbatch.linting.trace import Mark

__all__ = ["judge_loss"]

_TOKENS = re.compile(
    r"\b(input_ids|attention_mask|\w*loss_mask|lm_mask|mel_lens?|ntokens|packing|use_packing|\w*ignore_index|"
    r"chunked_cross_entropy|DataCollatorFor(LanguageModeling|Seq2Seq|TokenClassification))\b"
)
_PADS = re.compile(r"pad", re.IGNORECASE)
_CACHED = re.compile(r"grad_?cache|GradCache|cached_?(multiple|loss|contrast)|CachedMultiple", re.IGNORECASE)


def judge_loss(view: View) -> Iterator[Fault]:
    """The faults of the loss itself."""
    if not view.has_windows and not view.managed:
        return
    yield from _token_means(view)
    yield from _coupled(view)
    yield from view.module.once("MB403", lambda: list(_batch_norm(view)))
    yield from _slices(view)


def _token_means(view: View) -> Iterator[Fault]:
    """MB401: a mean over counted tokens, of which each microbatch has another number."""
    said: set[ast.AST] = set()
    counted = view.module.once("counted", lambda: _counted_apart(view))
    if counted is not None:
        opaque = view.opaque_losses()
        yield Fault(
            "MB401",
            view.trace.backwards[0].node,
            f"valid labels are counted (line {counted.lineno}) and not used as the divisor: each microbatch is "
            "averaged over its own, and all microbatches weigh the same",
            certain=not opaque,
            needs=(f"whether the loss is a mean over labels (it comes out of {opaque[0]})",) if opaque else (),
        )
        return
    for b in view.trace.backwards:
        loss = b.loss
        if b.node in said or loss.reduction == "sum" or b.node not in view.contributes:
            continue
        by_model = loss.forward_synced is not None and "criterion" not in view.trace.settings
        masked = _masked_labels(view) if by_model else 0
        if not masked and (loss.reduction != "mean" or not loss.tokens):
            if view.module.once("token words", lambda: _TOKENS.search(view.module.names_text) is not None):
                said.add(b.node)
                yield Fault(
                    "MB401",
                    b.node,
                    "if the loss is a mean over the tokens or labels that are not masked, one of a microbatch with few "
                    "of them weighs more",
                    certain=False,
                    needs=("whether labels are masked or padded",),
                )
            continue
        said.add(b.node)
        if loss.tokens:
            unsure = _ignores_by_number(view, loss.tokens) and not _masked_labels(view)
            yield Fault(
                "MB401",
                _at_line(view, loss.tokens) or b.node,
                "each microbatch is averaged over its own counted tokens, and then all "
                "microbatches weigh the same: a token of a short microbatch weighs more",
                certain=not unsure,
                needs=("whether any label is ignored",) if unsure else (),
            )
        else:
            yield Fault(
                "MB401",
                view.trace.settings.get("labels", b.node),
                f"the model's loss is a mean over the labels that are not masked (line {masked} masks them), and all "
                "microbatches weigh the same: a token of a short microbatch weighs more",
                certain=not loss.opaque,
                needs=(f"whether the loss is a mean over labels (it comes out of {loss.opaque[0]})",)
                if loss.opaque
                else (),
            )


def _ignores_by_number(view: View, line: int) -> bool:
    """Whether a loss only names a number as the label to ignore, which no label may have: nothing is padded with it."""
    given = [each for each in view.module.nodes if isinstance(each, ast.keyword) and each.arg]
    for node in given:
        if node.arg == "ignore_index" and node.value.lineno == line:
            label = text_of(node.value)
            pads = (each for each in given if _PADS.search(str(each.arg)) and text_of(each.value) == label)
            return not _PADS.search(label) and not any(pads)
    return False


def _counted_apart(view: View) -> ast.AST | None:
    """Where a loop counts its valid labels, and divides by the count nowhere."""
    if any(b.loss.reduction == "sum" or b.loss.tokens for b in view.trace.backwards):
        return None
    for node in view.module.nodes:
        if not (isinstance(node, ast.Call) and last_name(node.func) == "sum" and isinstance(node.func, ast.Attribute)):
            continue
        test = node.func.value
        if not (isinstance(test, ast.Compare) and _is_label_test(test)) or not view.module.is_inside_loop(node):
            continue
        names = _names_of_count(view, node)
        around = view.module.around(node)
        used = any(
            isinstance(n, ast.BinOp)
            and isinstance(n.op, ast.Div | ast.Mult)
            and names & {last_name(x) for x in ast.walk(n)}
            and n not in around
            for n in view.module.nodes
        )
        loops = view.module.loops_above(node)
        if names and not used and any(view.module.contains_backward(p, view.module.owner_of(p)) for p in loops):
            return node
    return None


def _names_of_count(view: View, node: ast.AST) -> set[str]:
    """The names that a count goes to: its target, and the counters that the target is added to."""
    statement = view.module.statement_of(node)
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AugAssign):
        targets = [statement.target]
    names = {last_name(target) for target in targets}
    for other in view.module.nodes:
        if isinstance(other, ast.AugAssign) and names & {last_name(x) for x in ast.walk(other.value)}:
            names.add(last_name(other.target))
    return names


def _is_label_test(test: ast.Compare) -> bool:
    """`y >= 0`, `labels != -100`, `ids != pad`."""
    other = text_of(test.comparators[0])
    if isinstance(test.ops[0], ast.GtE):
        return other == "0"
    return isinstance(test.ops[0], ast.NotEq) and (
        other in ("-100", "-1") or re.search(r"pad|ignore", other, re.IGNORECASE) is not None
    )


def _at_line(view: View, line: int) -> ast.AST | None:
    """The first expression of a line."""
    return next((n for n in view.module.nodes if isinstance(n, ast.expr) and n.lineno == line), None)


def _masked_labels(view: View) -> int:
    """The line where labels are filled with -100, 0 if there is none."""
    return int(view.module.once("masked", lambda: _find_masked(view)))


def _find_masked(view: View) -> int:
    for node in view.module.nodes:
        if isinstance(node, ast.Attribute) and node.attr == "ignore_index" and isinstance(node.value, ast.Call):
            return node.lineno  # `CrossEntropyLoss().ignore_index`, to write into labels
    for node in view.module.nodes:
        if _is_minus_100(node) and not _only_names_it(view, node):
            return node.lineno
    return 0


def _is_minus_100(node: ast.AST) -> TypeGuard[ast.UnaryOp]:
    return (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and node.operand.value == 100
    )


def _only_names_it(view: View, node: ast.UnaryOp) -> bool:
    """Whether -100 is not written into labels here: it is compared with, a default, an option, or part of a slice."""
    parent = view.module.parents.get(node)
    if isinstance(parent, (ast.Compare, ast.BinOp, ast.Slice, ast.arguments)):
        return True
    if isinstance(parent, ast.keyword):
        return parent.arg in ("ignore_index", "default", "pad_index")
    if isinstance(parent, ast.IfExp):
        return any(_is_minus_100(each) for each in ast.walk(parent.test))  # it stays what it was
    if isinstance(parent, (ast.Assign, ast.AnnAssign)):
        target = parent.targets[0] if isinstance(parent, ast.Assign) else parent.target
        return isinstance(target, (ast.Name, ast.Attribute))
    return isinstance(parent, ast.Call) and last_name(parent.func) in ("eq", "ne", "equal", "not_equal")


def _coupled(view: View) -> Iterator[Fault]:
    """MB402 and MB405: the loss compares the rows of a batch with one another."""
    b = next((b for b in view.trace.backwards if b.loss.coupled), None)
    words = view.module.names_text
    if b is None or _CACHED.search(words) or "cached" in view.trace.settings:
        return
    if not view.module.caches_outputs:
        yield Fault(
            "MB402",
            _at_line(view, b.loss.coupled) or b.node,
            "the loss compares the rows of one batch: a microbatch sees only its own rows, "
            f"so {view.n} microbatches are another loss than one large batch",
        )
    elif "shared" not in view.trace.settings and SHARED.search(words):
        yield Fault(
            "MB405",
            b.node,
            f"a parameter that is in every one of the {view.n} losses of a window gets {view.n} times its gradient",
            certain=False,
            needs=("whether a scale or a bias of the loss is trained",),
        )


def _batch_norm(view: View) -> Iterator[Fault]:
    """MB403: a layer computes statistics of the rows of a batch."""
    for node in view.module.nodes:
        if isinstance(node, ast.Call) and re.match(r"BatchNorm[123]d$", last_name(node.func)):
            yield Fault(
                "MB403",
                node,
                "BatchNorm computes its statistics from one microbatch, not from the effective batch",
                certain=False,
                needs=("the rows of a microbatch",),
            )
            return


def _slices(view: View) -> Iterator[Fault]:
    """MB404: a batch is cut into pieces, of which the last may be shorter."""
    if "cached" in view.trace.settings or any(o.startswith("multiplied") for o in view.opaque_losses()):
        return  # each microbatch is weighted, or gradients of cached outputs are handed on
    pieces = (mark for mark in view.marks("pieces") if _feeds_inner_loop(view, mark))
    slices = (mark for mark in view.marks("slice") if _moves_with_loop(view, mark))
    mark = next(pieces, None) or next(slices, None)
    if mark is not None:
        yield Fault(
            "MB404",
            mark.node,
            f"`{mark.name}` may cut a shorter last microbatch, and all weigh the same",
            certain=False,
            needs=("whether the rows divide evenly",),
        )


def _feeds_inner_loop(view: View, mark: Mark) -> bool:
    """Whether a loop inside of another statement runs over the pieces."""
    return any(
        isinstance(p, ast.For) and mark.node in ast.walk(p.iter) and view.module.above(p)
        for p in view.module.loops_above(mark.node)
    )


def _moves_with_loop(view: View, mark: Mark) -> bool:
    """Whether a slice is cut anew in each turn of an inner loop over microbatches, and nothing checks the rows."""
    loops = view.module.loops_above(mark.node)
    if len(loops) < 2 or not view.module.is_microbatch_loop(loops[0], view.module.owner_of(loops[0])):
        return False
    names = {last_name(n) for n in ast.walk(loops[0].target)} if isinstance(loops[0], ast.For) else set[str]()
    reads_turn = bool(names & {last_name(n) for n in ast.walk(mark.node)})
    return reads_turn and not any(isinstance(n, ast.Assert) for n in ast.walk(loops[1]))
