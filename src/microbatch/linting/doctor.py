"""The doctor: reads a file, runs its loops in a simulation, and says what is wrong with them."""

from pathlib import Path

from microbatch.linting.examine import examine_path
from microbatch.linting.finding import Finding
from microbatch.linting.sources import Source

__all__ = ["doctor", "judge"]


def doctor(source_or_path: str | Path, *, folder: str | Path | None = None) -> list[Finding]:
    """Find what is wrong with gradient accumulation loops, from their source, without running them.

    Args:
        source_or_path: Source text, or the path of a Python file, of a notebook or of a folder.
        folder: Where imports of the project itself are looked up. `None` for the folder of the file.

    Returns:
        The findings in the order of their lines. Of a file that cannot be read or parsed there is one, MB000; of a file
        without a loop that accumulates gradients there is one, MB001.

    Example:
        >>> loop = '''
        ... for i, (x, y) in enumerate(loader):
        ...     loss = criterion(model(x), y) / N
        ...     loss.backward()
        ...     if i % N == 0:
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ... '''
        >>> finding = doctor(loop)[0]
        >>> finding.rule, finding.line, finding.confidence
        ('MB105', 6, 'certain')
        >>> finding.message
        'the first window has 1 microbatch instead of 4 (each with weight 1/4)'
    """
    return examine_path(source_or_path, judge, folder=None if folder is None else Path(folder))


def judge(source: Source, folder: Path | None = None) -> list[Finding]:
    """Find the faults of a source that parses; lines are those of its text."""
    # Importing `microbatch` must not cost more than a part of what torch costs; the reader is many files.
    from microbatch.linting.judge_source import judge_source  # noqa: PLC0415

    return judge_source(source, folder)
