"""The errors that the command line and the live view raise; they are here because `errors` imports torch."""

from __future__ import annotations


class MicrobatchError(Exception):
    """Base of every error that this library raises on purpose."""

    __module__ = "microbatch.errors"


class ConfigError(MicrobatchError, ValueError):
    """An argument or an option cannot work."""

    __module__ = "microbatch.errors"


class CheckpointError(MicrobatchError, RuntimeError):
    """A checkpoint is missing, damaged, or from another run."""

    __module__ = "microbatch.errors"


class MissingDependencyError(MicrobatchError, ImportError):
    """An optional package is needed and is not installed."""

    __module__ = "microbatch.errors"
