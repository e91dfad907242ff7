"""From text to numbers: a byte-pair vocabulary trained on the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microbatch.errors import MissingDependencyError

BOUNDARY = 0
"""Number of the token before and after every document."""

BOUNDARY_TEXT = "<|document|>"
"""How the boundary is spelled in the vocabulary."""


def train_vocabulary(documents: Sequence[str], *, size: int) -> str:
    """Train a byte-level byte-pair vocabulary.

    Its alphabet is the 256 bytes, so every text can be written in it and no token stands for the unknown.

    Args:
        documents: Texts to learn the frequent byte pairs of.
        size: Most different tokens, the boundary and the 256 bytes among them; fewer if the text has fewer pairs.

    Returns:
        The tokenizer in JSON, as the ``tokenizers`` library writes it; the same for the same documents.

    Raises:
        MissingDependencyError: The ``tokenizers`` package is not installed.

    Cost:
        About 1 s for 7 MB of Python.
    """
    library = _tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOUNDARY_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return tokenizer.to_str()


def open_tokenizer(vocabulary: str) -> Any:
    """Make a tokenizer from its JSON.

    Args:
        vocabulary: What `train_vocabulary` returned.

    Returns:
        A ``tokenizers.Tokenizer`` that reads the spelling of the boundary, met in a text, as ordinary characters.

    Raises:
        MissingDependencyError: The ``tokenizers`` package is not installed.
    """
    tokenizer = _tokenizers().Tokenizer.from_str(vocabulary)
    tokenizer.encode_special_tokens = True
    return tokenizer


def version() -> str:
    """Tell which ``tokenizers`` is installed.

    Returns:
        Its version.

    Raises:
        MissingDependencyError: It is not installed.
    """
    return _tokenizers().__version__


def _tokenizers() -> Any:
    """Import the library that makes vocabularies."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            'jobs on text need the package "tokenizers"; install it with: pip install "microbatch[jobs]"'
        ) from error
    return tokenizers
