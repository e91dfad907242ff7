"""What a name or a constructor says about a value: optimizer, scheduler, scaler, model, loader and so on.

A guess decides how a call is read: `x.step()` of a scheduler is no optimizer's step. The simulation decides what is
wrong.
"""

import re
from functools import lru_cache

__all__ = [
    "CLIP_CALLS",
    "COUPLED_LOSSES",
    "GROUPS",
    "LOADER_WORDS",
    "MEAN_LOSSES",
    "MEASURED",
    "PIECE_CALLS",
    "PIECE_NAMES",
    "PIECE_WORDS",
    "SHARED",
    "kind_of_constructor",
    "kind_of_name",
    "names_window",
]

# The word for N in a loop. A counter that counts up to it is told apart by what the loop does with it.
_WINDOW = re.compile(
    r"(grad\w*_?)?accum\w*_?(steps?|iters?|factor|num|size|grad\w*|every|freq\w*|batches|period|count|n)?$|"
    r"(steps?|iters?|batches|num|n)_?(to|per|for)?_?(grad\w*_)?accum\w*|"
    r"update_freq\w*|virtual_batch\w*|(num_|n_)?micro_?(batches|steps)|gradient_accumulat\w*|grad_acc\w*|"
    r"^N$|(ga|acc)_?steps?|accumulate(_grad)?(_batches|_every|_steps)?|iter_size|batch_multiplier|batch_split|batch_chunks?|"
    r"optimizer_every|opt_step_every|subdivisions?|backward_passes_per_step|(steps|iters|batches)_per_update|batches_per_step",
    re.IGNORECASE,
)
# Words that are near it and mean a flag, a counter, or something that is added up.
_NO_WINDOW = re.compile(
    r"(is|do|should|use|enable|has|with|no)_|(^|_)(last|remain\w*|rest|tail|left|current|cur)_|accumulat(ed|or|ing)|"
    r"_?(loss|grads?|tokens|batch_size|samples|counter|idx|index|flag|fn|func\w*|type|dtype|mode|context|ctx|metrics?|"
    r"(?<!grad_)(?<!gradient_)acc|accuracy|correct|scale)$|^accuracy",
    re.IGNORECASE,
)

_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("ema", r"(^|_)(ema|swa|averag(er|ed)(_model)?)(_|$|\d|[a-z]*model)|ema$|^ema"),
        ("scheduler", r"sched|(^|_)lr_?(adjust|policy|warm|decay)|warmup_?(s|$)"),
        ("optimizer", r"optim|(^|_)opts?(_?[a-z]{1,3}|_?\d)?$|^trainer_[dg]$"),
        ("native_scaler", r"loss_scaler|native_?scaler|loss_and_?scaler"),
        ("scaler", r"scaler$|^scaler|grad_?scaler"),
        ("accelerator", r"^_?accelerator$|^accel$"),
        ("fabric", r"^_?fabric$"),
        ("engine", r"(^|_)engine$|model_engine|ds_model|deepspeed_engine"),
        ("clipper", r"clipper"),
        (
            "loader",
            (
                r"loader|(^|_)(data|train|training|trn)_?(iter|iterator|gen|generator|set|dl)$|dataset$|batches$|^dl$|_dl$|"
                r"^train_data$"
            ),
        ),
        (
            "criterion",
            (
                r"criterion|loss_?(fn|func|function|fct|fun|compute|module|layer)$|"
                r"^(ce|bce|mse|l1|nll|kl)_?loss(es)?(_fn)?$|^loss_?f$|^compute_loss$|_criterion"
            ),
        ),
        (
            "model",
            (
                r"(^|_)(model|net|network|unet|encoder|decoder|generator|discriminator|policy|actor|critic|backbone|module|"
                r"netd|netg|gpt|bert|llm|student|teacher|transformer)s?\d?$"
            ),
        ),
        (
            "meter",
            (
                r"meter|metric_logger|losses$|loss_(meter|avg|log|history|hist|list)|metrics?$|^stats$|^history$|tracker$|"
                r"averages?$"
            ),
        ),
        ("log", r"logger|writer|wandb|tensorboard|^tb$|^run$|mlflow|neptune|progress|pbar|p_?bar|bar$|tqdm"),
    )
)

_CONSTRUCTORS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (
            "scheduler",
            (
                r"(lr_scheduler\.\w+|get_\w*sched\w*|\w*(Scheduler|Schedule|AnnealingLR|StepLR|LambdaLR|CycleLR|"
                r"ExponentialLR|Plateau|WarmRestarts|PolynomialLR|SequentialLR|LinearLR|ConstantLR|NoamLR|"
                r"AnnealingWarmRestarts|ChainedScheduler)|(build|create|make|get|init|setup)_\w*sched\w*)$"
            ),
        ),
        ("ddp", r"(^|\.)(DistributedDataParallel|DDP)$"),
        (
            "optimizer",
            (
                r"(^|\.)(?!Local)(optim\.\w+|(\w*(Adam|AdamW|SGD|RMSprop|Adagrad|Adadelta|Adafactor|LAMB|Lamb|LARS|Lion|NAdam|RAdam|"
                r"Ranger|Muon|Adan|LBFGS|SparseAdam|NovoGrad|ASGD|Rprop|BertAdam|Optimizer\w*|optimizer\w*|AdamW8bit|"
                r"Adam8bit|AdaBelief))|(configure|create|build|make|get|setup|init\w*)_optimizers?)$"
            ),
        ),
        ("native_scaler", r"NativeScaler\w*$|ApexScaler$|NativeScalerWithGradNormCount$"),
        ("scaler", r"GradScaler$"),
        ("accelerator", r"(^|\.)Accelerator$"),
        ("fabric", r"(^|\.)Fabric$"),
        ("loader", r"(DataLoader|\w*Loader|DistributedSampler|BucketIterator\w*)$"),
        ("ema", r"(ModelEma\w*|EMA\w*|ExponentialMovingAverage|AveragedModel|EMAModel)$"),
        ("criterion", r"(nn\.\w*Loss|\w*Loss|LabelSmoothing\w*|\w*Criterion|SoftTargetCrossEntropy)$"),
        (
            "meter",
            r"(AverageMeter|Metrics?(Logger|Tracker)|LossTracker|SmoothedValue|MeanMetric|defaultdict|AvgMeter|Averager)$",
        ),
        ("log", r"(SummaryWriter|tqdm|trange|getLogger|Progbar|ProgressBar)$"),
        ("clipper", r"\w*Clipper$"),
    )
)

# Numbers, texts and settings that bear the name of an object.
_NO_OBJECT = re.compile(
    r"_(num|steps?|size|lr|rate|epochs?|path|names?|dir|type|config|cfg|args|kwargs|state|dict|state_dict|id|idx|count|freq|every|interval|file|"
    r"params|parameters|groups?|cls|class|key|keys|prefix|dim|dtype|weights?)$|^(num|n|use|is|has|do|save|load)_",
    re.IGNORECASE,
)

# What a call of these returns is a mean over rows or counted tokens, if its `reduction` says nothing else.
MEAN_LOSSES = re.compile(
    r"(^|\.)(cross_entropy|nll_loss|mse_loss|l1_loss|smooth_l1_loss|huber_loss|binary_cross_entropy(_with_logits)?|bce_loss|"
    r"CrossEntropyLoss|NLLLoss|MSELoss|L1Loss|SmoothL1Loss|HuberLoss|BCELoss|BCEWithLogitsLoss|LabelSmoothing\w*|"
    r"SoftTargetCrossEntropy|KLDivLoss|kl_div|CTCLoss|ctc_loss)$"
)

# A parameter of the loss itself, which is in the loss of every microbatch.
SHARED = re.compile(r"\b(logit_scale|log_scale|temperature|log_temperature|logit_bias|scale_param)\b")

# A loss that compares the rows of one batch.
COUPLED_LOSSES = re.compile(
    r"InfoNCE|info_nce|NT_?Xent|contrastive_loss|ContrastiveLoss|BiEncoderNll|MultipleNegatives|SupCon|ClipLoss|CLIPLoss|clip_loss|"
    r"BarlowTwins|VICReg|HardTriplet|BatchHard|in_batch_neg",
)

CLIP_CALLS = re.compile(
    r"^(clip_grad_norm_?|clip_grad_value_?|clip_gradients?|clip_master_grads|clip_grads?|clip_grad_fun|clip_grad_norm_fp32|_clip_gradients?|"
    r"dispatch_clip_grad|adaptive_clip_grad|gradient_clipping)$"
)

LOADER_WORDS = re.compile(
    r"loader|iterator|batches|train_iter|data_iter|dataset|train_data|(^|_)(data|dl|train|batch_iter)$", re.IGNORECASE
)


# Calls that cut a batch into pieces, words of an iterable of pieces, and words in the name of a piece.
PIECE_CALLS = frozenset({"split", "chunk", "tensor_split"})
PIECE_WORDS = re.compile(r"\b(split|chunk|tensor_split|chunks|microbatches|micro_batches|mini_chunks)\b")
# Functions that give several items at a time.
GROUPS = re.compile(r"batched|chunk|group|window|slice|partition", re.IGNORECASE)
# A loss that is measured and not trained on, and the functions that measure it.
MEASURED = re.compile(r"_?(eval|val|valid|validation|dev|test)_|_?(evaluate|validate)", re.IGNORECASE)
PIECE_NAMES = re.compile(r"batch|chunk", re.IGNORECASE)


@lru_cache(4096)
def names_window(name: str) -> bool:
    """Whether a name (its last part) is a usual word for the number of microbatches of a window."""
    return bool(_WINDOW.search(name)) and not _NO_WINDOW.search(name)


@lru_cache(4096)
def kind_of_name(name: str) -> str | None:
    """What a name is usually used for, or `None`."""
    last = name.rsplit(".", 1)[-1]
    if _NO_OBJECT.search(last):
        return None
    for kind, pattern in _NAMES:
        if pattern.search(last):
            return kind
    return None


@lru_cache(4096)
def kind_of_constructor(name: str) -> str | None:
    """What a call of this (dotted) name makes, or `None`."""
    for kind, pattern in _CONSTRUCTORS:
        if pattern.search(name):
            return kind
    return None
