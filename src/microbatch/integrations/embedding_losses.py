"""The losses of sentence-transformers as losses of a whole batch's embeddings, for ``encode=``.

A loss of sentence-transformers takes the tokens of every column, and calls the model itself. Here, each microbatch is
encoded first. Then the loss is called once, and where it calls the model, it gets the embeddings of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.errors import ConfigError

_COLUMN = "microbatch_column"
_PLAIN = ("GISTEmbedLoss", "MSELoss", "SoftmaxLoss")
_WRAPPERS = ("MatryoshkaLoss",)
_REFUSED = {
    "CachedMultipleNegativesRankingLoss": "use MultipleNegativesRankingLoss: the window encodes in microbatches itself",
    "CachedMultipleNegativesSymmetricRankingLoss": "use MultipleNegativesSymmetricRankingLoss: the window encodes in "
    "microbatches itself",
    "CachedGISTEmbedLoss": "use GISTEmbedLoss: the window encodes in microbatches itself",
    "MegaBatchMarginLoss": "it encodes parts of the batch itself; use MultipleNegativesRankingLoss or "
    "BatchHardTripletLoss",
    "AdaptiveLayerLoss": "it needs the outputs of every layer; use MatryoshkaLoss",
    "Matryoshka2dLoss": "it needs the outputs of every layer; use MatryoshkaLoss",
    "DenoisingAutoEncoderLoss": "it decodes the tokens; train it without the mixin",
    "ContrastiveTensionLoss": "it trains two models; use MultipleNegativesRankingLoss",
    "ContrastiveTensionLossInBatchNegatives": "it trains two models; use MultipleNegativesRankingLoss",
}


def check_loss(loss: Any) -> None:
    """Refuse a loss that does more than compare the embeddings of the batch's columns.

    Args:
        loss: A loss of sentence-transformers, one of your own, or a dict of them.

    Raises:
        ConfigError: The loss is refused; the message says what to use.
    """
    for each in loss.values() if isinstance(loss, Mapping) else [loss]:
        kinds = [kind.__name__ for kind in type(each).__mro__]
        name = kinds[0]
        if refused := next((kind for kind in kinds if kind in _REFUSED), None):
            raise ConfigError(f"{name} is not exact in microbatches: {_REFUSED[refused]}")
        if set(kinds) & set(_WRAPPERS):
            check_loss(each.loss)
        elif not hasattr(each, "compute_loss_from_embeddings") and not set(kinds) & set(_PLAIN):
            raise ConfigError(
                f"{name} has no method compute_loss_from_embeddings(embeddings, labels), so it may run the model in a "
                "way that a window cannot repeat: write the loss as such a method, and call it in forward()"
            )


class ModelAndLoss(nn.Module):
    """A model together with its loss, which may have parameters of its own.

    Args:
        model: The model that the loss calls.
        loss: The loss, or a dict of losses by the name of a dataset.

    Attributes:
        model: The model.
        losses: The losses by name; a single one has the name ``"loss"``.
    """

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self.single = not isinstance(loss, Mapping)
        self.names = ["loss"] if self.single else list(loss)
        self.losses = nn.ModuleList([loss] if self.single else loss.values())

    def loss_of(self, dataset: str | None) -> nn.Module:
        """Return the loss of a dataset."""
        return self.losses[0 if self.single else self.names.index(str(dataset))]


class EmbeddingLoss:
    """``encode`` and ``loss_fn`` for a batch of a sentence-transformers collator.

    Args:
        columns_of: Splits a batch into the features of every column and the labels: ``trainer.collect_features``.

    Attributes:
        dataset: Name of the dataset that the batch is from; `None` for a single dataset.
        parts: The terms of the last loss by name, if it has several.
    """

    def __init__(self, columns_of: Callable[[Any], tuple[Sequence[Any], Any]]) -> None:
        self._columns_of = columns_of
        self.dataset: str | None = None
        self.parts: Mapping[str, Tensor] = {}

    def encode(self, model: Any, microbatch: Mapping[str, Any]) -> dict[str, Any]:
        """Embed every column of a microbatch.

        Args:
            model: A `ModelAndLoss`.
            microbatch: Rows of a batch.

        Returns:
            The embeddings, and the labels if there are any.
        """
        columns, labels = self._columns_of({name: each for name, each in microbatch.items() if name != "dataset_name"})
        encoded: dict[str, Any] = {} if labels is None else {"labels": labels}
        guided = _guided(model.loss_of(self.dataset))
        if guided is not None:  # before the model, which fills the features
            with torch.no_grad():
                encoded["guide"] = _embed(guided.guide, [_tokens_for_guide(guided, each) for each in columns])
        return {**encoded, "columns": _embed(model.model, columns)}

    def loss(self, model: Any, encoded: Mapping[str, Any]) -> Tensor:
        """Call the loss, and give it the embeddings of the whole batch where it calls the model.

        Args:
            model: A `ModelAndLoss`.
            encoded: What `encode` returned, for the whole batch.

        Returns:
            The loss.
        """
        columns, labels = encoded["columns"], encoded.get("labels")
        loss = model.loss_of(self.dataset)
        guided = _guided(loss)
        with ExitStack() as stack:
            if guided is not None:
                stack.enter_context(_gives(guided.guide, [each.detach() for each in encoded["guide"]]))
                _put(guided, "must_retokenize", False, stack)
            for each in loss.modules():
                if getattr(each, "gather_across_devices", False) is True:
                    _put(each, "gather_across_devices", False, stack)  # the window has gathered already
            stack.enter_context(_gives(model.model, columns))
            stack.enter_context(_unmerged())
            found: Any = loss([{_COLUMN: index} for index in range(len(columns))], _plain(labels))
        self.parts = {}
        if isinstance(found, Mapping):
            self.parts = {str(name): value.detach() for name, value in found.items()}
            found = torch.stack(list(found.values())).sum()
        return found


@contextmanager
def _gives(model: nn.Module, columns: Sequence[Tensor]) -> Generator[None]:
    """Return embeddings that exist already where the model is called."""

    def forward(features: Mapping[str, Any], *_: Any, **__: Any) -> _Embedded:
        if set(features) - {_COLUMN, *_Embedded.keys_of_its_own} or _COLUMN not in features:
            raise ConfigError("the loss calls the model with tokens of its own: it is not exact in microbatches")
        return _Embedded(sentence_embedding=columns[features[_COLUMN]])

    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


class _Embedded(dict[str, Any]):
    """The output of a model of which only the embeddings are known."""

    keys_of_its_own = ("sentence_embedding",)

    def __missing__(self, name: str) -> Any:
        raise ConfigError(f"the loss uses the model's {name!r}, and only sentence_embedding exists for a whole batch")


def _put(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    """Set an attribute until the stack is closed."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _embed(model: nn.Module, columns: Sequence[Any]) -> list[Tensor]:
    return [model(features)["sentence_embedding"] for features in columns]


def _guided(loss: nn.Module) -> Any:
    """Return the loss inside that has a guide model, or `None`."""
    return next((each for each in loss.modules() if isinstance(getattr(each, "guide", None), nn.Module)), None)


def _tokens_for_guide(loss: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    """Return a column's tokens for the guide model, which may have another tokenizer."""
    if not loss.must_retokenize:
        return dict(features)
    texts = loss.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
    device = next(loss.guide.parameters()).device
    tokens = loss.guide.preprocess(texts)
    return {name: each.to(device) if isinstance(each, Tensor) else each for name, each in tokens.items()}


def _unmerged() -> Any:
    """Keep losses from merging columns of tokens, which stand-ins have not."""
    try:
        from sentence_transformers.base.losses.merged_forward import column_merging_disabled
    except ImportError:
        return nullcontext()
    return column_merging_disabled()


def _plain(labels: Any) -> Any:
    return labels.detach() if isinstance(labels, Tensor) else labels
