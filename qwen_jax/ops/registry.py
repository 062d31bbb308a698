"""Implementations of one operation: their names, their platforms, and the choice among them.

Each operation's `api.py` declares its implementations once, as an `Operation`. A choice is made
from platforms, shapes and dtypes while a program is traced; the compiled program holds none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


def _no_reason(*arguments, **options) -> None:
    """No reason against an implementation, whatever the call."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of an operation.

    compute: the function, or whatever holds the functions, that the operation calls.
    platforms: platforms that it is chosen on; None: every platform.
    unsupported: the reason why it cannot run a call, from the call's arguments; None: it can.
    not_preferred: the reason why another implementation is chosen for a call that this one can run;
        None: there is none. A call by name does not ask for it.
    elsewhere: whether a call by name is accepted on other platforms. Pallas's interpreter and
        compilation ahead of time need that.
    """

    name: str
    compute: Any
    platforms: tuple[str, ...] | None = None
    unsupported: Callable[..., str | None] = _no_reason
    not_preferred: Callable[..., str | None] = _no_reason
    elsewhere: Literal["refused", "by name"] = "refused"

    def is_chosen_on(self, platform: str) -> bool:
        """Whether the implementation may be chosen on this platform."""
        return self.platforms is None or platform in self.platforms


@dataclass(frozen=True)
class Operation:
    """An operation's implementations, the preferred first; the last one runs every call."""

    name: str
    implementations: tuple[Implementation, ...]

    def __post_init__(self) -> None:
        last = self.implementations[-1]
        assert len(set(self.names)) == len(self.names), self.names
        assert last.platforms is None and last.unsupported is _no_reason, last
        assert last.not_preferred is _no_reason, last

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the implementations, the most general first."""
        return tuple(one.name for one in reversed(self.implementations))

    def __getitem__(self, name: str) -> Implementation:
        """The implementation of this name. Raises `ValueError` for an unknown name."""
        for one in self.implementations:
            if one.name == name:
                return one
        raise ValueError(
            f"unknown {self.name} implementation {name!r}; known: {', '.join(self.names)}"
        )

    def unsupported(self, name: str, *arguments, platform: str, **options) -> str | None:
        """The reason why the named implementation refuses a call on `platform`; None: it runs."""
        one = self[name]
        reason = one.unsupported(*arguments, **options)
        if reason is None and one.elsewhere == "refused" and not one.is_chosen_on(platform):
            return f"platform {platform!r} is not {' or '.join(map(repr, one.platforms))}"
        return reason

    def choose(
        self, *arguments, platform: str, name: str | None = None, **options
    ) -> Implementation:
        """The named implementation, or the first that can run the call and is preferred.

        `arguments` and `options` describe the call to `unsupported` and `not_preferred`.
        Raises `ValueError` for a name that is unknown, or that cannot run the call.
        """
        if name is None:
            return next(
                one
                for one in self.implementations
                if one.is_chosen_on(platform)
                and one.unsupported(*arguments, **options) is None
                and one.not_preferred(*arguments, **options) is None
            )
        reason = self.unsupported(name, *arguments, platform=platform, **options)
        if reason is None:
            return self[name]
        able = [
            other
            for other in self.names
            if self.unsupported(other, *arguments, platform=platform, **options) is None
        ]
        raise ValueError(
            f"{self.name} implementation {name!r} cannot run: {reason}; use {' or '.join(able)}"
        )
