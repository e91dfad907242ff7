"""What the loss is: a mean over tokens, a loss that compares rows, BatchNorm, unequal slices: MB401 to MB404."""

import ast
import re
from collections.abc import Iterator

from microbatch.linting.faults import Fault, View
from microbatch.linting.module import Loop, last_name, text_of

__all__ = ["judge_loss"]

_TOKENS = re.compile(r"\b(input_ids|attention_mask|\w*loss_mask|lm_mask|mel_lens?|ntokens|packing|use_packing|\w*ignore_index|chunked_cross_entropy)\b")
_SHARED = re.compile(r"\b(logit_scale|log_scale|temperature|log_temperature|logit_bias|scale_param)\b")
_CACHED = re.compile(r"grad_?cache|GradCache|cached_?(multiple|loss|contrast)|CachedMultiple", re.IGNORECASE)


def judge_loss(view: View) -> Iterator[Fault]:
    """The faults of the loss itself."""
    if not (view.accumulates or view.managed) or not any(len(s.since) > 1 for s in view.trace.steps) and not view.managed:
        return
    yield from _token_means(view)
    yield from _coupled(view)
    yield from view.module.once("MB403", lambda: list(_batch_norm(view)))
    yield from _slices(view)


def _token_means(view: View) -> Iterator[Fault]:
    said: set[ast.AST] = set()
    counted = view.module.once("counted", lambda: _counted_apart(view))
    if counted is not None:
        yield Fault("MB401", view.trace.backwards[0].node, f"valid labels are counted (line {counted.lineno}) and not used as the divisor: each microbatch is "
                    "averaged over its own, and all microbatches weigh the same")  # fmt: skip
        return
    for b in view.trace.backwards:
        loss = b.loss
        if b.node in said or loss.reduction == "sum":
            continue
        if loss.reduction != "mean" or not (loss.tokens or "labels" in view.trace.settings and _masked_labels(view)):
            if _TOKENS.search(view.module.names_text):
                said.add(b.node)
                yield Fault("MB401", b.node, "if the loss is a mean over the tokens or labels that are not masked, one of a microbatch with few of them "
                            "weighs more", certain=False, needs=("whether labels are masked or padded",))  # fmt: skip
            continue
        if loss.tokens:
            said.add(b.node)
            yield Fault("MB401", _at_line(view, loss.tokens) or b.node, "each microbatch is averaged over its own counted tokens, and then all "
                        "microbatches weigh the same: a token of a short microbatch weighs more")  # fmt: skip
        elif "labels" in view.trace.settings and (line := _masked_labels(view)):
            said.add(b.node)
            yield Fault("MB401", view.trace.settings["labels"], f"the model's loss is a mean over the labels that are not -100 (line {line}), and all "
                        "microbatches weigh the same: a token of a short microbatch weighs more")  # fmt: skip


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
        statement = view.module.statement_of(node)
        names = {last_name(t) for t in (statement.targets if isinstance(statement, ast.Assign) else [statement.target] if isinstance(statement, ast.AugAssign) else [])}
        for other in view.module.nodes:
            if isinstance(other, ast.AugAssign) and names & {last_name(x) for x in ast.walk(other.value)}:
                names.add(last_name(other.target))
        used = any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div | ast.Mult) and names & {last_name(x) for x in ast.walk(n)} and not _is_inside(view, node, n) for n in view.module.nodes)
        if names and not used and any(view.module.contains_backward(p, view.module.owner_of(p)) for p in view.module.above(node) if isinstance(p, Loop)):
            return node
    return None


def _is_inside(view: View, node: ast.AST, outer: ast.AST) -> bool:
    """Whether one node stands inside of another."""
    while node in view.module.parents:
        node = view.module.parents[node]
        if node is outer:
            return True
    return False


def _is_label_test(test: ast.Compare) -> bool:
    """`y >= 0`, `labels != -100`, `ids != pad`."""
    other = text_of(test.comparators[0])
    if isinstance(test.ops[0], ast.GtE):
        return other == "0"
    return isinstance(test.ops[0], ast.NotEq) and (other in ("-100", "-1") or re.search(r"pad|ignore", other, re.IGNORECASE) is not None)


def _at_line(view: View, line: int) -> ast.AST | None:
    return next((n for n in view.module.nodes if isinstance(n, ast.expr) and n.lineno == line), None)


def _masked_labels(view: View) -> int:
    """The line where labels are filled with -100, 0 if there is none."""
    return int(view.module.once("masked", lambda: _find_masked(view)))


def _find_masked(view: View) -> int:
    for node in view.module.nodes:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and node.operand.value == 100:
            return node.lineno
    return 0


def _coupled(view: View) -> Iterator[Fault]:
    words = view.module.names_text
    if _CACHED.search(words) or "cached" in view.trace.settings:
        return
    cached = "no_grad" in words and any(b.loss.coupled and _SHARED.search(words) for b in view.trace.backwards)
    if cached:
        b = next(b for b in view.trace.backwards if b.loss.coupled)
        yield Fault("MB405", b.node, f"a parameter that is in every one of the {view.n} losses of a window gets {view.n} times its gradient", certain=False,
                    needs=("whether a scale or a bias of the loss is trained",))  # fmt: skip
        return
    for b in view.trace.backwards:
        if b.loss.coupled:
            yield Fault("MB402", _at_line(view, b.loss.coupled) or b.node, "the loss compares the rows of one batch: a microbatch sees only its own rows, "
                        f"so {view.n} microbatches are another loss than one large batch")  # fmt: skip
            return


def _batch_norm(view: View) -> Iterator[Fault]:
    for node in view.module.nodes:
        if isinstance(node, ast.Call) and re.match(r"BatchNorm[123]d$", last_name(node.func)):
            yield Fault("MB403", node, "BatchNorm computes its statistics from one microbatch, not from the effective batch", certain=False,
                        needs=("the rows of a microbatch",))  # fmt: skip
            return


def _slices(view: View) -> Iterator[Fault]:
    if "cached" in view.trace.settings or any(o.startswith("multiplied") for o in view.opaque_losses()):
        return  # each microbatch is weighted, or gradients of cached outputs are handed on
    for mark in view.marks("pieces"):
        if any(isinstance(p, Loop) and mark.node in ast.walk(p.iter) and len(view.module.above(p)) > 0 for p in view.module.above(mark.node) if isinstance(p, ast.For)):
            yield Fault("MB404", mark.node, f"`{mark.name}` may cut a shorter last microbatch, and all weigh the same", certain=False,
                        needs=("whether the rows divide evenly",))  # fmt: skip
            return
    for mark in view.marks("slice"):
        loops = [p for p in view.module.above(mark.node) if isinstance(p, Loop)]
        if not loops or not view.module.is_microbatch_loop(loops[0], view.module.owner_of(loops[0])) or len(loops) < 2:
            continue
        names = {last_name(n) for n in ast.walk(loops[0].target)} if isinstance(loops[0], ast.For) else set()
        if names & {last_name(n) for n in ast.walk(mark.node)} and not any(isinstance(n, ast.Assert) for n in ast.walk(loops[1])):
            yield Fault("MB404", mark.node, f"`{mark.name}` may cut a shorter last microbatch, and all weigh the same", certain=False,
                        needs=("whether the rows divide evenly",))  # fmt: skip
            return
