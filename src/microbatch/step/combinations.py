"""Options that exclude each other: one table, with the error messages; `docs/combinations.md` is generated from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microbatch.arguments import attribute
from microbatch.errors import ConfigError
from microbatch.gradients.momentum_buffer import check_folds
from microbatch.loss.batchnorm import layers_of
from microbatch.ranks.fsdp import narrowest, wrapped_by_the_older
from microbatch.ranks.stage_ranks import check_beside
from microbatch.shards import is_shard
from microbatch.step.options import EXACT, FROZEN, MEAN, ONCE, POOLED, Options

SHARDED, PIPELINE = "a fully sharded model", "a Pipeline"
DETERMINISTIC, OVERLAP = "Ranks(deterministic=True)", "Ranks(overlap=True)"
NORM, BUFFERLESS = 'batch_norm="exact"', 'Sums(buffer="none")'
BUFFERS = 'buffers="once" or "mean"'
ENCODE, WINDOW, WINDOWS, COUNTS = "encode=", "accumulator.window()", "accumulator.windows()", "counts="
UNFROZEN = 'BatchNorm without batch_norm="frozen"'
GRADIENT, STEP = "accumulator.gradient()", "accumulator.step()"
BATCHES = "mb.Batches"
NOISE = "noise_scale="
LAZY, SPREAD_TABLE = "SparseAdam", "a sharded Embedding(sparse=True)"

Given = Callable[[Options], object]

# The features that a user can choose, by their names in error messages, and how to detect each in the options.
FEATURES: Mapping[str, Given] = {
    SHARDED: lambda o: o.is_sharded,
    PIPELINE: lambda o: o.pipeline is not None,
    DETERMINISTIC: lambda o: o.ranks.deterministic,
    OVERLAP: lambda o: o.ranks.overlap,
    NORM: lambda o: o.batch_norm == EXACT,
    BUFFERLESS: lambda o: any(o.linear_states),
    'batch_norm="pooled"': lambda o: o.batch_norm == POOLED,
    UNFROZEN: lambda o: o.batch_norm != FROZEN and bool(layers_of(o.bare_model)),
    BUFFERS: lambda o: o.buffers in {ONCE, MEAN},
    'dropout="by_row"': lambda o: o.dropout,
    "lengths=": lambda o: o.lengths,
    "compile=": lambda o: o.compile,
    "a model from torch.compile": lambda o: attribute(o.bare_model, "_orig_mod") is not None,
    "checkpoint=": lambda o: o.checkpoint,
    'checkpoint="auto"': lambda o: o.checkpoint == "auto",
    "offload=": lambda o: o.offload,
    NOISE: lambda o: o.noise_scale,
    "grad_scaler=": lambda o: o.grad_scaler,
    "max_grad_norm=": lambda o: o.max_grad_norm,
    'Sums(how="compensated")': lambda o: o.sums.how != "plain",
    'Ranks(sync="lean")': lambda o: o.ranks.sync == "lean",
    'coupled="twice"': lambda o: o.coupled == "twice",
    'coupled="keep"': lambda o: o.coupled == "keep",
    'coupled="spill"': lambda o: o.coupled == "spill",
    'microbatch_size="auto"': lambda o: o.microbatch_size == "auto",
    "memory_budget=": lambda o: isinstance(o.memory_budget, int),
    "SyncBatchNorm": lambda o: any(isinstance(each, nn.SyncBatchNorm) for each in o.model.modules()),
    LAZY: lambda o: any(isinstance(each, torch.optim.SparseAdam) for each in o.optimizers),
    SPREAD_TABLE: lambda o: any(is_shard(each.weight) for each in _sparse_tables(o)),
    "parameters spread over ranks": lambda o: any(map(is_shard, _parameters(o))),
    "parameters narrower than Sums(dtype=...)": lambda o: any(_widens(each, o) for each in _parameters(o)),
}
# Ways to use an accumulator: they are chosen for each call.
USES = (STEP, GRADIENT, WINDOW, WINDOWS, ENCODE, COUNTS, BATCHES)


@dataclass(frozen=True, slots=True)
class Clash:
    """Two features, or a feature and a use, that exclude each other.

    Attributes:
        first: Name of a feature or a use.
        second: Name of another one.
        why: The reason, and what to do.
    """

    first: str
    second: str
    why: str


def _with(first: str, others: Mapping[str, str]) -> list[Clash]:
    return [Clash(first, second, why) for second, why in others.items()]


_ONE = "leave one of them out"
_KEPT = ('coupled="keep"', 'coupled="spill"')
_LOOP = "use accumulator.step(batch, loss_fn), which takes the same batch"
_LOCKSTEP = "it encodes once, in lockstep, and offloads waiting activations; leave coupled= out"
_PADDED = 'passes are padded with rows that would change the statistics; pass batch_norm="frozen"'
CLASHES: Sequence[Clash] = (
    *_with(
        NORM,
        {
            "compile=": "compiled code cannot stop at a batch statistic: leave compile= out, or compile the modules "
            "without batch normalisation with torch.compile",
            'checkpoint="auto"': "the activations of waiting microbatches are offloaded already; leave checkpoint= "
            "out, or name blocks without batch normalisation",
            **dict.fromkeys(('coupled="twice"', 'coupled="keep"'), _LOCKSTEP),
            'dropout="by_row"': "masks are drawn one microbatch at a time, and microbatches run in lockstep; " + _ONE,
            BUFFERLESS: "all microbatches share one backward, in which autograd adds up the gradients; " + _ONE,
            'Ranks(sync="lean")': "all microbatches share one backward, so gradients cannot be reduced after each "
            'microbatch; pass sync="fast" or "auto"',
            **dict.fromkeys(
                (WINDOW, WINDOWS),
                f"it needs all microbatches at once, and a hand-written loop runs one after the other: {_LOOP}",
            ),
        },
    ),
    *_with('batch_norm="pooled"', {"compile=": "compiled code cannot stop at a batch statistic: leave compile= out"}),
    *_with(
        BUFFERS,
        {
            NORM: "microbatches run in lockstep, and move buffers together; leave buffers= out",
            PIPELINE: "a stage runs forward passes ahead of their backward; leave buffers= out",
            **dict.fromkeys(_KEPT, "graphs that wait for their backward may need the buffers; leave coupled= out"),
        },
    ),
    *_with('dropout="by_row"', {"compile=": "masks are drawn in Python, which compiled code would skip; " + _ONE}),
    *_with(
        "checkpoint=",
        dict.fromkeys(
            ("compile=", "a model from torch.compile"),
            "the compiler itself decides which activations to save for backward; " + _ONE,
        ),
    ),
    *_with(
        BUFFERLESS,
        {
            "max_grad_norm=": "gradients are added into the momentum, so their norm is not known; " + _ONE,
            "grad_scaler=": "gradients are added into the momentum, where a scaler cannot find infinities; " + _ONE,
            'Sums(how="compensated")': "gradients are added into the optimizer's state, in its precision; " + _ONE,
            GRADIENT: "gradients are added into the optimizer's state, so there is no .grad; leave buffer= out",
        },
    ),
    *_with(
        DETERMINISTIC,
        {
            "lengths=": "the groups of rows would depend on a rank's share of the batch; " + _ONE,
            "compile=": "the shapes that are compiled would depend on a rank's share of the batch; " + _ONE,
            "grad_scaler=": "the loss scale would depend on the ranks that overflow; " + _ONE,
            'Sums(how="compensated")': "the sums are float32 or wider; " + _ONE,
            BUFFERLESS: "the tree of sums needs its own buffers; " + _ONE,
            LAZY: "its tree adds up dense gradients, and SparseAdam takes only sparse ones; use Adam or SGD",
            UNFROZEN: 'running statistics would depend on a rank\'s microbatches; pass batch_norm="frozen"',
            'microbatch_size="auto"': "each size rounds differently, and another machine may choose another size; pass "
            "a number as microbatch_size",
            BATCHES: "it numbers the rows of one batch; pad the batches to one",
            ENCODE: "it adds up gradients microbatch by microbatch, and with encode= the loss is of the whole batch; "
            + _ONE,
            WINDOWS: "it numbers microbatches, and must cut the batch itself: use accumulator.step(batch, loss_fn), or "
            "window.split(batch)",
        },
    ),
    *_with(
        SHARDED,
        {
            BUFFERLESS: "each rank has only a shard of each gradient; leave buffer= out",
            "grad_scaler=": "use bfloat16, which needs no scaler",
            DETERMINISTIC: "torch adds up the gradients of the ranks itself; leave deterministic= out",
            SPREAD_TABLE: "torch cannot reduce-scatter sparse gradients; pass sparse=False to the Embedding, or its "
            "weight as ignored_params= to fully_shard",
            "compile=": "compile its blocks with torch.compile before fully_shard",
            "offload=": "use fully_shard's CPUOffloadPolicy, or checkpoint blocks",
            **dict.fromkeys(_KEPT, "the graphs would keep the gathered weights of every pass; leave coupled= out"),
            "checkpoint=": "apply torch's checkpoint wrapper before fully_shard",
        },
    ),
    *_with(
        PIPELINE,
        {
            'microbatch_size="auto"': "pass a number as microbatch_size: the rows that stages pass on at once",
            "memory_budget=": "a stage that stops would leave the other stages waiting; leave memory_budget= out",
            UNFROZEN: f"{_PADDED}, or use mb.convert_batch_norm",
            **dict.fromkeys((NORM, 'batch_norm="pooled"'), _PADDED),
            BUFFERLESS: "only the last stage knows the counts; leave buffer= out",
            "grad_scaler=": "use bfloat16, which needs no scaler",
            DETERMINISTIC: "torch's schedule adds up the gradients itself; leave deterministic= out",
            "compile=": "compile each stage's module with torch.compile",
            "offload=": "split into more stages, or checkpoint blocks",
            "checkpoint=": "apply torch's checkpoint wrapper to blocks of the stages",
            "lengths=": "stages pass on tensors of equal shapes; leave lengths= out, and pad all rows to one length",
            'dropout="by_row"': "each rank draws the masks of its own stages; leave dropout= out",
            SHARDED: "keep each stage unsharded on its rank, or split into more stages",
            BATCHES: "stages send equal shapes; pad the batches to one",
            ENCODE: "its schedule runs each microbatch once, forward and backward; use DistributedDataParallel or a "
            "bare model for losses that couple samples",
            **dict.fromkeys(
                (WINDOW, WINDOWS),
                f"its schedule runs several microbatches at once, and a loop one after the other: {_LOOP}",
            ),
        },
    ),
    *_with(
        OVERLAP,
        {
            PIPELINE: "its schedule runs the backward of all microbatches; leave overlap= out",
            SHARDED: "torch itself reduces its gradients during backward; leave overlap= out",
            "parameters spread over ranks": "leave overlap= out",
            DETERMINISTIC: "its sums are made in one order, at the end; " + _ONE,
            NORM: "all microbatches share one backward; " + _ONE,
            BUFFERLESS: "gradients are added into the optimizer's state; " + _ONE,
            'Sums(how="compensated")': _ONE,
            'dropout="by_row"': _ONE,
            LAZY: "its buckets are dense, and SparseAdam takes only sparse gradients; leave overlap= out",
            "SyncBatchNorm": "its backward communicates, too; leave overlap= out",
            "parameters narrower than Sums(dtype=...)": "their sums are not in .grad during backward; leave overlap= "
            "out",
            ENCODE: "the backward of a loss of the whole batch communicates, too; " + _ONE,
        },
    ),
    *_with(
        NOISE,
        {
            NORM: "all microbatches share one backward, so their gradients cannot be separated; " + _ONE,
            SHARDED: "torch itself reduces the gradients of each microbatch, and adds them up in shards; leave "
            "noise_scale= out",
            "parameters spread over ranks": "each rank has only a shard of each microbatch's gradient; leave "
            "noise_scale= out",
            PIPELINE: "torch's schedule adds up the gradients of all microbatches itself; leave noise_scale= out",
            ENCODE: "the gradient of a sample depends on all others, so microbatches have none of their own; leave "
            "noise_scale= out",
        },
    ),
    *_with(COUNTS, {ENCODE: "the loss of the whole batch gives its own denominators; leave counts= out"}),
)


def refuse(options: Options, *, use: Collection[str] = ()) -> None:
    """Raise an error for two options that exclude each other, or for a use that the options do not allow."""
    known = {name: name in use for name in USES}
    for clash in CLASHES:
        uses = clash.first in USES or clash.second in USES
        if uses != bool(use) or _set_internally(clash, options):
            continue
        if _given(clash.first, options, known) and _given(clash.second, options, known):
            raise ConfigError(f"{clash.first} does not go with {clash.second}: {clash.why}")


def goes_with(feature: str, options: Options) -> bool:
    """Return whether a feature could be added to the options."""
    known: dict[str, bool] = dict.fromkeys(USES, False)
    pairs = [(each.first, each.second) for each in CLASHES if feature in {each.first, each.second}]
    return not any(_given(name, options, known) for pair in pairs for name in pair if name != feature)


def check_together(options: Options) -> None:
    """Check that the options go together, and that they fit the model and the optimizers."""
    if (path := wrapped_by_the_older(options.model)) is not None:
        raise ConfigError(
            f"{path or 'the model'!r} is wrapped in FullyShardedDataParallel, which flattens parameters and averages "
            "gradients itself; apply torch.distributed.fsdp.fully_shard to its modules instead"
        )
    if any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(options.model).__mro__):
        raise ConfigError(
            "a DeepSpeed engine adds up gradients, reduces them and steps itself: use mb.DeepSpeed(engine), which "
            "gives it the exact denominator"
        )
    refuse(options)
    for optimizer, state in zip(options.optimizers, options.linear_states, strict=True):
        if state is not None:
            check_folds(optimizer, state)
            _check_width(optimizer, options)
    if options.is_sharded:
        _check_sharded_dtypes(options)
    group = options.group  # raises if it is not a process group
    if options.pipeline is not None:
        check_beside(options.pipeline, group, given=options.ranks.group is not None)


def _given(name: str, options: Options, known: dict[str, bool]) -> bool:
    """Return whether a feature is in use, and remember it: some take a walk through the model to find out."""
    if name not in known:
        known[name] = bool(FEATURES[name](options))
    return known[name]


def _set_internally(clash: Clash, options: Options) -> bool:
    """Return whether the accumulator itself set the option: ``batch_norm="exact"`` offloads activations."""
    return "offload=" in {clash.first, clash.second} and options.batch_norm == EXACT


def _check_width(optimizer: Optimizer, options: Options) -> None:
    wide = options.sums.dtype
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if _widens(parameter, options):
                raise ConfigError(
                    f'Sums(buffer="none"): gradients would add up in the {parameter.dtype} state of group {index}, and '
                    f"dtype is {wide}. Pass dtype={parameter.dtype} if that precision is enough, or keep a gradient "
                    "buffer"
                )


def _check_sharded_dtypes(options: Options) -> None:
    """Raise an error if a fully sharded model would add up gradients in a narrower dtype than ``Sums(dtype=...)``."""
    wide = options.sums.dtype
    dtype = narrowest(options.model, alone=True)
    if options.batch_norm == EXACT and dtype is not None and torch.promote_types(dtype, wide) != dtype:
        raise ConfigError(
            f'batch_norm="{EXACT}" with a fully sharded model adds gradients up in {dtype}, in which it computes, and '
            f"Sums(dtype=...) is {wide}. Keep the weights in {wide} and use autocast="
        )
    dtype = narrowest(options.model)
    if options.ranks.sync == "fast" and dtype is not None and torch.promote_types(dtype, wide) != dtype:
        raise ConfigError(
            f'sync="fast" would add up gradients in {dtype}, the dtype of the model\'s MixedPrecisionPolicy, and '
            f'Sums(dtype=...) is {wide}; pass reduce_dtype={wide} to the policy, or sync="lean"'
        )


def _parameters(options: Options) -> list[Tensor]:
    groups = [group for optimizer in options.optimizers for group in optimizer.param_groups]
    return [each for group in groups for each in group["params"] if each.requires_grad]


def _sparse_tables(options: Options) -> list[nn.Embedding | nn.EmbeddingBag]:
    modules = options.bare_model.modules()
    return [each for each in modules if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse]


def _widens(parameter: Tensor, options: Options) -> bool:
    return torch.promote_types(parameter.dtype, options.sums.dtype) != parameter.dtype
