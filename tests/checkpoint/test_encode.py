"""Trees as strict JSON."""

import collections
import contextlib
import json
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.checkpoint import decode, encode
from fnlight.errors import CheckpointError
from fnlight.metrics import Mean, Tally

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
KEYS = SCALARS | st.tuples(SCALARS, SCALARS)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner), max_leaves=30)


def _no_tensor(name: str, *_: Any) -> Any:
    raise AssertionError(name)


def there_and_back(tree: Any) -> Any:
    """The tree after a trip through the bytes of a file."""
    text = json.dumps(encode(tree, _no_tensor, "memory"), allow_nan=False)
    return decode(json.loads(text), _no_tensor)


@given(TREES)
def test_every_tree_comes_back_with_its_types_order_and_values(tree: Any) -> None:
    """Decoding what was encoded gives the same tree, to the last bit, sign of zero, NaN and type of key."""
    assert repr(there_and_back(tree)) == repr(tree)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text("$tupleflodic", max_size=6),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text("$tupleflodic", max_size=6), inner), max_leaves=20))  # fmt: skip
def test_any_json_is_decoded_or_refused(value: Any) -> None:
    """Untrusted JSON gives a tree or one of the errors that the reader turns into a broken checkpoint."""
    tree = None
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        tree = decode(value, {}.__getitem__)
    assert repr(there_and_back(tree)) == repr(tree)


def test_tensors_stand_as_names_in_order() -> None:
    """A tensor is handed over under its path, and found again under the name it was given."""
    held: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> str:
        held[name] = tensor
        return name

    tree = {"a": [torch.ones(2), (torch.zeros(1),)], 0.5: torch.tensor(3)}
    assert list(held) == []
    assert decode(encode(tree, put, "t"), held.__getitem__)["a"][0] is tree["a"][0]
    assert list(held) == ["t/a/0", "t/a/1/0", "t/0.5"]


def test_a_tally_comes_back_as_a_tally() -> None:
    """A window of metrics goes on after loading where it stood, with the first bad step."""
    tally = Tally()
    tally.add(1, {"loss": Mean(torch.tensor(4.0), 2), "top": torch.tensor(1.0)})
    tally.add(2, {"loss": Mean(torch.tensor(2.0), 1), "top": torch.tensor(math.inf)})
    tally.settle()
    found = there_and_back({"log": tally})["log"]
    assert isinstance(found, Tally)
    assert (found.totals, found.bad) == (tally.totals, (2, "top"))
    assert found.read()["loss"] == 2.0


@pytest.mark.parametrize("value", [np.float32(0.1), np.float64(0.1), np.int64(7)])
def test_numbers_of_numpy_come_back_as_numbers(value: Any) -> None:
    """A subclass comes back as its plain type, with its exact value."""
    found = there_and_back([value])[0]
    assert found == value
    assert type(found) in (int, float)


def test_subclasses_of_containers_come_back_plain() -> None:
    """An ordered or default dict and a torch.Size come back as dict and tuple."""
    tree = collections.OrderedDict(x=collections.defaultdict(list, y=[1]), s=torch.Size([2, 3]))
    assert repr(there_and_back(tree)) == "{'x': {'y': [1]}, 's': (2, 3)}"


@pytest.mark.parametrize("value", [{1, 2}, lambda: 0, object(), time.gmtime(0), np.zeros(2), torch.float32])
def test_what_is_no_data_is_refused_with_its_path(value: Any) -> None:
    """An object that only code could bring back is refused, and the message says where it is."""
    with pytest.raises(CheckpointError, match=r"memory/a/1 has type \w+: .* but a checkpoint holds only dicts, lists, tuples"):
        encode({"a": [0, value]}, _no_tensor, "memory")


def test_a_tensor_as_a_key_is_refused() -> None:
    """A dict keyed by tensors has no names, so it cannot be saved."""
    with pytest.raises(CheckpointError, match="memory has a tensor as the key of a dict"):
        encode({torch.ones(1): 1}, _no_tensor, "memory")


@pytest.mark.parametrize(
    "value",
    [
        {"$unknown": 1}, {"$float": "1.5"}, {"$float": 2.0}, {"$tuple": 3}, {"$dict": [[1]]}, {"$dict": [[[1], 2]]}, {"$bytes": "!"},
        {"$tensor": "absent"}, {"$tensor": ["x"]}, {"$tuple": [], "a": 1}, {"a": 1, "$tuple": []}, {"$complex": [1]},
        {"$tally": [{"loss": ["Exec", 1, 2]}, None]}, {"$tally": [{"loss": ["Mean", 1]}, None]}, {"$tally": [{"loss": ["Sum", "x"]}, None]},
        {"$tally": [{}, 3]}, {"$tally": [{"x": {"$tensor": "x"}}, None]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_malformed_tags_are_refused(value: Any) -> None:
    """What `encode` never gives is refused by `decode` with an error that the reader expects."""
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError), match=r"."):
        decode(value, {}.__getitem__)
