"""A combinator wraps a function, and prints as what it was called with."""

import attrs
import pytest

from fnlight.pipe import Combinator


def test_a_combinator_is_called_with_the_function_that_it_wraps():
    """Outside of any pipe it is a plain function of a function."""
    twice = Combinator("twice", lambda loss_fn: lambda model, batch: 2 * loss_fn(model, batch), "loss", "loss")
    assert twice(lambda model, batch: batch)(None, 3) == 6


def test_a_combinator_prints_as_a_call():
    """Its arguments stand in brackets, and there are none where there is nothing to say."""
    assert str(Combinator("clip_norm", lambda fn: fn, "grad", "grad", args="1.0")) == "clip_norm(1.0)"
    assert str(Combinator("grad", lambda fn: fn, "loss", "grad_sum")) == "grad"


def test_the_memory_of_a_combinator_is_called_as_it_is_unless_told_otherwise():
    """`key` defaults to the name, so one of each kind needs none."""
    assert Combinator("ema", lambda fn: fn, "step", "step").key == "ema"
    assert Combinator("ema", lambda fn: fn, "step", "step", key="slow").key == "slow"


def test_a_combinator_never_changes():
    """It is a value: two pipes may share it."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError, match="can't set attribute"):
        Combinator("grad", lambda fn: fn, "loss", "grad_sum").name = "other"
