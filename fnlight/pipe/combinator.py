"""A combinator: a value that wraps one function into another, and declares what it takes, gives and remembers.

The kinds of function, from the user's to the loop's: ``loss`` (`LossFn`), ``grad_sum`` (a `GradFn` of one batch whose gradients are sums),
``grad`` (a `GradFn` of a group of batches whose gradients are true means) and ``step`` (`Step`). There is also ``kernel``: a function
``(store, batches, key) -> metrics`` that changes the store itself; `fnlight.step.manual` turns it into a step.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import attrs

from fnlight.errors import check_type
from fnlight.state import Store, TrainState

Kind = Literal["kernel", "loss", "grad_sum", "grad", "step"]

TICK = ("update", "schedule", "evaluate", "history", "log", "save", "stop")
"""The order of a tick; combinators that have a phase must follow it."""


def _read_only(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(facts))


@attrs.frozen(eq=False)
class Combinator:
    """A function that wraps one function into another of the same or the next kind, with a description of itself.

    Args:
        name: Its name, for ``print(step)`` and for errors.
        wrap: Maps the inner function to the outer one.
        takes: The kind of function it wraps: ``"loss"``, ``"grad_sum"``, ``"grad"`` or ``"step"``.
        gives: The kind of function that results.
        args: Its arguments, as ``print(step)`` shows them.
        key: Its key in ``state.memory``, unique in a pipe; the name if left out.
        init: Maps a `Store` to the tree that this combinator owns there as ``store.memory[key]``; None if it remembers nothing.
        phase: The phase of `TICK` it acts in; None if its order does not matter.
        batches_per_step: Batches that one step consumes: a number, or a mapping of epochs to numbers; None leaves it to other combinators.
        repeats: A factor: one call takes this many times ``batches_per_step``.
        start: Maps the state before the first step of a run to a state.
        finish: Maps the state after the last step of a run, and that state as changed by earlier combinators, to a state.
        close: Called when a run ends, also after an error. `start` puts what belongs to one run into ``store.run.resources``.
        requires: Names in the history that it needs.
        provides: Prefixes of the names that it adds to the history.
        validate: Maps all combinators of a finished step to an error message, or None if it can work with them.
        facts: Values that other combinators may read, such as ``{"dtype": torch.float16}``; `args` is only for people.
        why: The reason that the error of a wrong order adds.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If `takes`, `gives` or `phase` is unknown.

    Example:
        >>> double = Combinator("double", lambda loss_fn: lambda model, batch: 2 * loss_fn(model, batch), "loss", "loss")
        >>> double(lambda model, batch: batch)(None, 3)
        6
    """

    name: str
    wrap: Callable[[Any], Any]
    takes: Kind
    gives: Kind
    args: str = attrs.field(default="", kw_only=True)
    key: str = attrs.field(default=attrs.Factory(lambda self: self.name, takes_self=True), kw_only=True)
    init: Callable[[Store], Any] | None = attrs.field(default=None, kw_only=True)
    phase: str | None = attrs.field(default=None, kw_only=True)
    batches_per_step: int | Mapping[int, int] | None = attrs.field(default=None, kw_only=True)
    repeats: int = attrs.field(default=1, kw_only=True)
    start: Callable[[TrainState], TrainState] | None = attrs.field(default=None, kw_only=True)
    finish: Callable[[TrainState, TrainState], TrainState] | None = attrs.field(default=None, kw_only=True)
    close: Callable[[], None] | None = attrs.field(default=None, kw_only=True)
    requires: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    provides: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    validate: Callable[[tuple["Combinator", ...]], str | None] | None = attrs.field(default=None, kw_only=True)
    facts: Mapping[str, Any] = attrs.field(factory=dict, converter=_read_only, kw_only=True)
    why: str = attrs.field(default="", kw_only=True)

    def __attrs_post_init__(self) -> None:
        check_type("Combinator(name=...)", self.name, str, "a name")
        check_type(f"Combinator({self.name!r}, key=...)", self.key, str, "a string")
        check_type(f"Combinator({self.name!r}, wrap)", self.wrap, Callable, "a function that wraps another one")
        for field in ("init", "start", "finish", "close", "validate"):
            check_type(f"{self.name}({field}=...)", getattr(self, field), Callable | None, "a function, or None")
        for kind in (self.takes, self.gives):
            if kind not in get_args(Kind):
                raise ValueError(f"Combinator({self.name!r}): takes and gives must be among {get_args(Kind)}, but got {kind!r}")
        if self.phase is not None and self.phase not in TICK:
            raise ValueError(f"Combinator({self.name!r}, phase=...) must be one of {TICK}, or None, but got {self.phase!r}")

    def __call__(self, fn: Any) -> Any:
        """Wrap one function, without a pipe."""
        return self.wrap(fn)

    def __str__(self) -> str:
        return f"{self.name}({self.args})" if self.args else self.name
