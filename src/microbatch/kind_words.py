"""Name the kind of a value in an error: with "a" or "an", as it is spoken."""

from __future__ import annotations

import re

_SPOKEN_WITH_AN = frozenset("AEFHILMNORSX")  # letters whose names begin with a vowel: an "LSTM", an "SGD"
_SOUNDS_LIKE_YOU = re.compile(r"(?:uni|use|usa|uti|eu|one\b)", re.IGNORECASE)


def with_article(name: str) -> str:
    """Put "a" or "an" before a name.

    Args:
        name: Any name, such as that of a class.

    Returns:
        Both.

    Example:
        >>> [with_article(name) for name in ("int", "list", "AdamW", "SGD", "UNet", "UserDict", "_Own")]
        ['an int', 'a list', 'an AdamW', 'an SGD', 'a UNet', 'a UserDict', 'an _Own']
    """
    spoken = name.lstrip("_")
    if re.match("[A-Z][A-Z]", spoken):
        vowel = spoken[0] in _SPOKEN_WITH_AN
    else:
        vowel = spoken[:1].lower() in tuple("aeiou") and not _SOUNDS_LIKE_YOU.match(spoken)
    return f"{'an' if vowel else 'a'} {name}"


def kind_of(value: object) -> str:
    """Name the kind of a value.

    Args:
        value: Any value.

    Returns:
        The name of its class, with "a" or "an".

    Example:
        >>> kind_of(3), kind_of([])
        ('an int', 'a list')
    """
    return with_article(type(value).__name__)
