"""Where a page of the documentation is, for errors and warnings: an installed package has no folder of pages."""

from __future__ import annotations

__all__ = ["page"]

_UNFILLED = "//OWNER."  # what stands in pyproject.toml until a release fills it in


def page(name: str) -> str:
    """Return where a reader finds a page: its address, or its file in a clone of the repository.

    The address is that of the package's metadata, so it stands only in pyproject.toml.

    Args:
        name: Name of the page, such as ``"losses"``.

    Returns:
        An address for an installed release, and ``docs/NAME.md`` for a clone.

    Cost:
        Reads the package's metadata: up to a tenth of a second, so call it for an error or a warning only.

    Example:
        >>> page("losses").removesuffix(".html").removesuffix(".md").endswith("docs/losses")
        True
    """
    from importlib.metadata import PackageNotFoundError, metadata  # noqa: PLC0415 - only errors need it

    try:
        links = metadata("microbatch").get_all("Project-URL") or []
    except PackageNotFoundError:
        links = []
    site = next((link.removeprefix("Documentation, ") for link in links if link.startswith("Documentation, ")), "")
    return f"docs/{name}.md" if not site or _UNFILLED in site else f"{site}docs/{name}.html"
