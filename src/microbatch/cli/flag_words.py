"""Put an error of the library into the words of the command line: flags, and no Python arguments."""

from __future__ import annotations

import re

_TOLD_TWICE = re.compile(r" The original error: OutOfMemoryError: the memory budget of .*", re.DOTALL)
_WORDS: tuple[tuple[str, str], ...] = (
    (r'(?<![\w.])checkpoint="(all|auto)"', r"--checkpoint \1"),
    (r"(?<=repeated blocks in )(\w+); pass the names of submodules", r"\1; leave it out"),
    (r"\ba larger memory_budget\b", "a larger --memory"),
    (r"\ba smaller microbatch_size\b", "a smaller --microbatch-size"),
    (r'pass nonfinite="skip" to', 'write nonfinite = "skip" in a file for --config to'),
    (r'Pass nonfinite="skip" to', 'Write nonfinite = "skip" in a file for --config to'),
    (r"\bpass (?=--)", "use "),
    (r"\bPass (?=--)", "Use "),
    # An argument with its value, and then an argument alone.
    (r"(?<![\w(])microbatch_size=(?=\d)", "--microbatch-size "),
    (r"(?<![\w(])memory_budget=(?=\d)", "--memory "),
    (r"(?<![\w(])batch_size=(?=\d)", "--batch-size "),
    (r"(?<![\w(])max_grad_norm=(?=\d)", "--max-grad-norm "),
    (r"(?<![\w.'\"`(-])(?<!job's )memory_budget\b", "--memory"),
    (r"(?<![\w.'\"`(-])(?<!job's )microbatch_size\b", "--microbatch-size"),
)


def in_flags(text: str) -> str:
    """Replace the library's arguments by the flags that set them.

    Args:
        text: The text of an error.

    Returns:
        The same for someone who has a command line and no Python.

    Example:
        >>> in_flags("pass a smaller microbatch_size, or a larger memory_budget")
        'pass a smaller --microbatch-size, or a larger --memory'
    """
    text = _TOLD_TWICE.sub("", text)
    for written, flag in _WORDS:
        text = re.sub(written, flag, text)
    return text
