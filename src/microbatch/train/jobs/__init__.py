"""The jobs that come with the library.

`BUILT_IN` names them as ``module:function`` texts, so that listing them imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "language": "microbatch.train.jobs.language:language",
        "images": "microbatch.train.jobs.images:images",
        "images-batchnorm": "microbatch.train.jobs.images:images_batchnorm",
        "pairs": "microbatch.train.jobs.pairs:pairs",
    }
)
"""Where the function lies that makes the job of a name."""
