"""A plan as a figure: speed and memory by microbatch size, as an SVG that needs no library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from microbatch.memory.budget import format_bytes
from microbatch.planning.plan import Plan

_WIDTH, _HEIGHT, _LEFT, _TOP = 720, 200, 20, 44
_CHOSEN, _OTHER, _LIMIT = "#0b7285", "#a5b4bd", "#c92a2a"


def svg(plan: Plan) -> str:
    """Draw a plan.

    Args:
        plan: It.

    Returns:
        An SVG document: rows per second of the sizes that were timed, and the peak memory of all sizes against the
        budget; the chosen size stands out.
    """
    sizes = [each.microbatch_size for each in plan.candidates]
    speeds = [None if not each.seconds else plan.batch_size / each.seconds for each in plan.candidates]
    peaks = [each.measured_bytes or each.predicted_bytes for each in plan.candidates]
    total = 2 * (_HEIGHT + _TOP + 40)
    title = escape(plan.words[0] if plan.words else plan.why)
    box = f'viewBox="0 0 {_WIDTH} {total}" font-family="sans-serif" font-size="12" role="img"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}><title>{title}</title>',
        f'<rect width="{_WIDTH}" height="{total}" fill="white"/>',
        *_panel(sizes, speeds, chosen=plan.microbatch_size, title="rows per second, as timed", top=0),
        *_panel(sizes, peaks, chosen=plan.microbatch_size, title="peak memory", top=total // 2, limit=plan.budget),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(
    sizes: Sequence[int],
    values: Sequence[float | None],
    *,
    chosen: int,
    title: str,
    top: int,
    limit: int | None = None,
) -> Iterator[str]:
    most = max((value for value in values if value is not None), default=0.0)
    # A budget far above what is used would make every bar a line.
    shown = limit is not None and limit <= 3 * most
    scale = max(most, limit or 0.0) if shown else most
    base, step = top + _TOP + _HEIGHT, (_WIDTH - 2 * _LEFT) / max(1, len(sizes))
    beyond = "" if limit is None or shown else f" (budget {format_bytes(limit)})"
    yield f'<text x="{_LEFT}" y="{top + 20}" font-weight="bold">{title}{beyond}</text>'
    for index, (size, value) in enumerate(zip(sizes, values, strict=True)):
        x = _LEFT + index * step
        middle = x + step / 2
        yield f'<text x="{middle:.1f}" y="{base + 16}" text-anchor="middle">{size}</text>'
        if value is None or not scale:
            continue
        height = _HEIGHT * value / scale
        color = _CHOSEN if size == chosen else _OTHER
        bar = f'x="{x + step * 0.15:.1f}" y="{base - height:.1f}" width="{step * 0.7:.1f}" height="{height:.1f}"'
        yield f'<rect {bar} fill="{color}"/>'
        label = f"{value:,.4g}" if limit is None and title.startswith("rows") else format_bytes(value)
        yield f'<text x="{middle:.1f}" y="{base - height - 4:.1f}" text-anchor="middle">{label}</text>'
    if shown and limit is not None:
        y = base - _HEIGHT * limit / scale
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_LIMIT}"/>'
        label = f"budget {format_bytes(limit)}"
        yield f'<text x="{_WIDTH - _LEFT}" y="{y - 4:.1f}" text-anchor="end" fill="{_LIMIT}">{label}</text>'
