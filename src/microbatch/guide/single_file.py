"""The guide as one file that works by double click: its modules, its style and its recorded runs are in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.guide.page import POLICY

IMPORTED = re.compile(r'from "\./(?P<name>[\w-]+\.js)"')
START = 'import "guide/main.js";'


def single_file(text: str, static: Path, recorded: Mapping[str, Any]) -> str:
    """Put everything that a page loads into the page.

    A browser refuses modules of files beside a page that was opened from a disk. So they are in it, as an import map of
    data addresses.

    Args:
        text: The page, as a copy for any web server has it.
        static: The folder of its modules, its style and its icon.
        recorded: What each recording holds, by the name of its preset.

    Returns:
        The page.

    Raises:
        ConfigError: The page does not load what it is known to load.
    """
    names = {name: f"guide/{name}" for name in _modules(static, "main.js")}
    imports = json.dumps({"imports": {name: _module(static / file) for file, name in names.items()}})
    style = (static / "guide.css").read_text(encoding="utf-8")
    runs = json.dumps(recorded, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; script-src data: {_hash(imports)} {_hash(START)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    icon = base64.b64encode((static / "icon.svg").read_bytes()).decode()
    pieces = {
        POLICY: policy,
        "static/icon.svg": f"data:image/svg+xml;base64,{icon}",
        '<link rel="stylesheet" href="static/guide.css">': f"<style>{style}</style>",
        '<script type="module" src="static/main.js"></script>': (
            f'<script type="importmap">{imports}</script>\n<script type="module">{START}</script>'
        ),
        "</body>": f'<script type="application/json" id="recorded">{runs}</script>\n</body>',
    }
    for piece, instead in pieces.items():
        if text.count(piece) != 1:
            raise ConfigError(f"the page holds {piece!r} {text.count(piece)} times, and one file can replace it once")
        text = text.replace(piece, instead)
    return text


def _modules(static: Path, name: str, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Name a module and all that it imports."""
    if name in known:
        return known
    known = (*known, name)
    for match in IMPORTED.finditer((static / name).read_text(encoding="utf-8")):
        known = _modules(static, match["name"], known)
    return known


def _module(path: Path) -> str:
    source = IMPORTED.sub(r'from "guide/\g<name>"', path.read_text(encoding="utf-8"))
    return f"data:text/javascript;base64,{base64.b64encode(source.encode()).decode()}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
