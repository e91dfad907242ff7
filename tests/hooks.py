"""Which hooks of a window's parts were reached: a part that replaces another one's hook is found out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from microbatch.step.part import Part, Passes, Peers
from microbatch.step.setup import Setup

HOOKS = (
    *("open", "cut", "around", "call", "whole", "backward"),
    *("check", "reduced", "figures", "done", "failed", "put_back"),
)


class Reached:
    """Watch every hook that the parts of an accumulator override.

    A hook that wraps something (`call`, `backward`, `around`) is reached once what it returned was used.
    """

    def __init__(self, accumulator: Any) -> None:
        self.reached: set[tuple[str, str]] = set()
        self.watched: dict[int, Part] = {}
        made = accumulator._it.setup

        def setup(*args: Any) -> Setup:
            found = made(*args)
            for part in found.parts:
                self.watch(part)
            return found

        accumulator._it.setup = setup

    @property
    def missed(self) -> set[str]:
        """The hooks that were not reached, as ``Part.hook``."""
        every = {(type(part).__name__, hook) for part in self.watched.values() for hook in overridden(part)}
        return {".".join(each) for each in every - self.reached}

    def watch(self, part: Part) -> None:
        if id(part) in self.watched:
            return
        self.watched[id(part)] = part
        for hook in overridden(part):
            setattr(part, hook, self.reaching(part, hook, getattr(part, hook)))

    def reaching(self, part: Part, hook: str, method: Callable[..., Any]) -> Callable[..., Any]:
        key = type(part).__name__, hook

        def reach(*args: Any, **kwargs: Any) -> Any:
            found = method(*args, **kwargs)
            if hook in {"call", "backward"}:

                def used(*given: Any) -> Any:
                    self.reached.add(key)
                    return found(*given)

                return used
            if isinstance(found, AbstractContextManager):
                return Entered(found, lambda: self.reached.add(key))
            self.reached.add(key)
            return found

        return reach


class Entered(AbstractContextManager[Any]):
    """Notes that a context manager was entered."""

    def __init__(self, inner: AbstractContextManager[Any], note: Callable[[], object]) -> None:
        self.inner, self.note = inner, note

    def __enter__(self) -> Any:
        self.note()
        return self.inner.__enter__()

    def __exit__(self, *error: object) -> Any:
        leave: Any = self.inner.__exit__
        return leave(*error)


def overridden(part: Part) -> list[str]:
    plain = [getattr(kind, hook) for kind in (Part, Passes, Peers) for hook in HOOKS]
    return [hook for hook in HOOKS if getattr(type(part), hook) not in plain]
