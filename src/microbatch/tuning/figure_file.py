"""Write figures with matplotlib, which is imported when something is drawn: the same figure gives the same file."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError, MissingDependencyError

FORMATS = (".svg", ".png")


def check_figure(path: Path) -> None:
    """Check that a figure can be drawn, before anything is run.

    Args:
        path: The file.

    Raises:
        ConfigError: Its name ends with something else than .svg or .png.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a figure is an SVG or a PNG; give it a name that ends with .svg or .png")
    _matplotlib()


@contextmanager
def drawn(file: Any, *, kind: str, size: tuple[float, float], style: Mapping[str, Any]) -> Generator[Any]:
    """Open an empty figure, and write it to a file when the block ends.

    Args:
        file: A path, or an open file.
        kind: ``"svg"`` or ``"png"``.
        size: Width and height, in inches.
        style: Settings of matplotlib for this figure.

    Yields:
        The figure.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    mpl = _matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415 - not pyplot, which keeps figures and picks a screen

    # The same identifiers and no date, so that a file differs only where the figure does.
    with mpl.rc_context({"svg.hashsalt": "microbatch", **style}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl  # noqa: PLC0415 - of an extra, and it is slow
    except ImportError as error:
        raise MissingDependencyError(
            'a figure is drawn with matplotlib, which is not installed: pip install "microbatch[figures]"'
        ) from error
    return mpl
