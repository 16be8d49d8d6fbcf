"""XLA as far as it can be tested without it; tests/xla holds the rest."""

import sys

import pytest

from fnlight import parallel
from fnlight.errors import ParallelError
from fnlight.parallel import OnXLA


def test_without_torch_xla_it_is_refused(monkeypatch):
    """What is missing, for which torch it must be, and how to go on without."""
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ParallelError, match=r"needs torch_xla, and torch_xla is missing here .*goes with torch [0-9.]+.*leave place= out"):
        parallel.xla()


def test_it_shows_as_it_was_written():
    """The placement is a value: equal ones are equal, and its text is the call."""
    place = OnXLA((("data", 2), ("model", 2)), (("head", ("model", None)),))
    assert repr(place) == "xla(mesh={'data': 2, 'model': 2}, shard={'head': ('model', None)})"
    assert (repr(OnXLA()), OnXLA() == OnXLA()) == ("xla()", True)
