"""The structure of a trigger or a stop rule, with ``|``, ``&`` and ``~``, by which both are compared, hashed and printed.

It is not part of `when` or `rules` because both use it, and neither uses the other.
"""

from typing import Any

import attrs


@attrs.frozen(repr=False)
class Form:
    """A named function with its arguments, a user's function, or an operator with its operands.

    Two are equal if their parts are equal, not if they print alike: two different lambdas print alike and are not equal.

    Args:
        name: The name of the function, ``"|"``, ``"&"`` or ``"~"``; ``""`` for a user's function.
        parts: The arguments, or the operands, or the user's function.
        text: Its source text.

    Example:
        >>> Form("steps", (5,), "steps(5)") | Form("at_end", (), "at_end")
        steps(5) | at_end
    """

    name: str
    parts: tuple[Any, ...]
    text: str = attrs.field(eq=False)

    @classmethod
    def of(cls, function: Any) -> "Form":
        """The form of a user's function, which is equal to itself only."""
        return cls("", (function,), getattr(function, "__name__", repr(function)))

    def __or__(self, other: "Form") -> "Form":
        return self._joined("|", other)

    def __and__(self, other: "Form") -> "Form":
        return self._joined("&", other)

    def __invert__(self) -> "Form":
        return Form("~", (self,), f"~({self.text})" if self.name in ("|", "&") else f"~{self.text}")

    def _joined(self, operator: str, other: "Form") -> "Form":
        """Operands of the same operator are flattened, so grouping makes no difference, as in the text."""
        parts = tuple(part for form in (self, other) for part in (form.parts if form.name == operator else (form,)))
        texts = [f"({part.text})" if operator == "&" and part.name == "|" else part.text for part in parts]
        return Form(operator, parts, f" {operator} ".join(texts))

    def __repr__(self) -> str:
        return self.text
