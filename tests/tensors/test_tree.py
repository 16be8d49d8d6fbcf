"""Laws of `fnlight.tensors.tree`: every kind of container is walked, rebuilt and compared."""

import collections
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.tensors import differences, equal, leaves, map_tensors


class Pair(NamedTuple):
    """A named tuple."""

    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Data:
    """A frozen dataclass with a field that its constructor does not take."""

    x: Any
    y: Any
    size: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        """Compute the field."""
        object.__setattr__(self, "size", 7)


@attrs.frozen(eq=False)
class Frozen:
    """A frozen attrs class with slots, a private field and one that its constructor does not take."""

    x: Any
    _y: Any
    cache: Any = attrs.field(init=False, default=None)


@attrs.define
class Mutable:
    """An attrs class whose constructor refuses what a mapped tree may hold."""

    x: Any = attrs.field(validator=attrs.validators.instance_of(torch.Tensor))
    y: Any = 1


class Batch(collections.UserDict[str, Any]):
    """A mapping of the user, as tokenisers return."""


ONE = torch.ones(2)
CONTAINERS: dict[str, tuple[Any, list[str]]] = {
    "dict": ({"x": ONE, "y": 3}, ["x", "y"]),
    "OrderedDict": (collections.OrderedDict(x=ONE, y=3), ["x", "y"]),
    "defaultdict": (collections.defaultdict(list, {"x": ONE, "y": 3}), ["x", "y"]),
    "read-only mapping": (MappingProxyType({"x": ONE, "y": 3}), ["x", "y"]),
    "mapping of the user": (Batch(x=ONE, y=3), ["x", "y"]),
    "list": ([ONE, 3], ["0", "1"]),
    "tuple": ((ONE, 3), ["0", "1"]),
    "namedtuple": (Pair(ONE, 3), ["x", "y"]),
    "dataclass": (Data(ONE, 3), ["x", "y", "size"]),
    "attrs": (Frozen(ONE, 3), ["x", "_y", "cache"]),
    "mutable attrs": (Mutable(ONE, 3), ["x", "y"]),
    "keys of any type": ({0.9: ONE, 1: 3}, ["0.9", "1"]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_walked(name: str) -> None:
    """The leaves come with their paths, first to last, alone and inside of others."""
    container, names = CONTAINERS[name]
    assert [path for path, _ in leaves(container)] == names
    assert next(leaves(container))[1] is ONE
    assert [path for path, _ in leaves({"a": [container]})] == [f"a/0/{n}" for n in names]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_keeps_its_type(name: str) -> None:
    """Mapping over tensors gives the same type with the other leaves as they were; the original is unchanged."""
    container, names = CONTAINERS[name]
    found = map_tensors(lambda t: t + 1, container)
    assert type(found) is type(container)
    assert found is not container
    assert dict(leaves(found))[names[0]].tolist() == [2.0, 2.0]
    assert [leaf for _, leaf in leaves(found)][1:] == [leaf for _, leaf in leaves(container)][1:]
    assert next(leaves(container))[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_compared(name: str) -> None:
    """A container equals its copy, and not the same with another tensor, which is named."""
    container, names = CONTAINERS[name]
    assert equal(container, map_tensors(torch.clone, container))
    changed = map_tensors(lambda t: t + torch.tensor([0.0, 0.5]), container)
    assert list(differences(container, changed)) == [f"{names[0]}: largest difference 0.5"]


def test_a_defaultdict_keeps_its_factory() -> None:
    """The rebuilt mapping makes the same defaults."""
    assert map_tensors(torch.clone, collections.defaultdict(list, x=ONE))["new"] == []


def test_what_a_function_gives_for_a_tensor_may_be_anything() -> None:
    """Mapping may turn tensors into other things, even where a constructor would refuse them."""
    assert map_tensors(lambda t: t.tolist(), Mutable(ONE)).x == [1.0, 1.0]


def test_other_leaves_are_the_same_objects() -> None:
    """What is neither tensor nor container is handed on untouched."""
    thing = object()
    assert map_tensors(torch.clone, {"a": thing, "b": None, "c": "text"}) == {"a": thing, "b": None, "c": "text"}


def test_empty_containers_have_no_leaves() -> None:
    """An empty tree is a tree, and equals its like only."""
    assert list(leaves({"a": [], "b": ()})) == []
    assert map_tensors(torch.clone, {"a": [], "b": ()}) == {"a": [], "b": ()}
    assert not equal([], ())


def test_a_class_is_a_leaf() -> None:
    """Dataclasses and attrs classes themselves, not instances of them, are no containers."""
    assert [leaf for _, leaf in leaves([Data, Frozen])] == [Data, Frozen]


UNEQUAL: list[tuple[Any, Any, str]] = [
    ({"x": 1}, {"x": 2}, "x: 1 against 2"),
    ({"x": 1}, {"x": 1.0}, "x: 1 against 1.0"),
    ({"x": 1}, {"x": True}, "x: 1 against True"),
    ({"x": 1}, {}, "x: only in the first"),
    ({}, {"x": {"y": 1}}, "x: only in the second"),
    ({"x": [1]}, {"x": (1,)}, "x: list against tuple"),
    ({"x": (1, 2)}, {"x": Pair(1, 2)}, "x: tuple against Pair"),
    ({"x": [1]}, {"x": 1}, r"x: [1] against 1"),
    ({"a": {1: 2}}, {"a": {"1": 2}}, "a: keys of other types, [1] against ['1']"),
    ([ONE], [ONE.double()], "0: torch.float32 [2] against torch.float64 [2]"),
    ([ONE], [torch.ones(1, 2)], "0: torch.float32 [2] against torch.float32 [1, 2]"),
    ([ONE], [torch.tensor([1.0, float("nan")])], "0: largest difference nan"),
    ([torch.tensor(True)], [torch.tensor(False)], "0: largest difference 1"),
    ([torch.tensor(3 + 4j)], [torch.tensor(0j)], "0: largest difference 5"),
    ([ONE.to_sparse()], [(2 * ONE).to_sparse()], "0: largest difference 1"),
]


@pytest.mark.parametrize("a, b, line", UNEQUAL)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_every_difference_is_named_with_its_place(a: Any, b: Any, line: str) -> None:
    """Values, types, keys, shapes and dtypes that differ are each one line."""
    assert list(differences(a, b)) == [line]
    assert not equal(a, b)
    assert not equal(b, a)


def test_nan_equals_nan() -> None:
    """NaN in the same place is no difference, in tensors, numbers and arrays."""
    nan = float("nan")
    assert equal([nan, torch.tensor([nan, 1.0]), np.array([nan])], [float("nan"), torch.tensor([nan, 1.0]), np.array([nan])])


def test_arrays_are_compared_as_a_whole() -> None:
    """NumPy's arrays and scalars are leaves with a shape and a dtype."""
    one = np.arange(3)
    assert equal({"x": one, "y": np.float32(1)}, {"x": one.copy(), "y": np.float32(1)})
    for other in (one + 1, one.astype(np.float32), one[:2], one.reshape(3, 1)):
        assert not equal(one, other)


def test_the_type_of_a_mapping_is_no_difference() -> None:
    """A read-only view equals the dict that it shows; the order of keys does not matter."""
    assert equal(MappingProxyType({"a": 1, "b": 2}), {"b": 2, "a": 1})


TREES = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.floats(width=32), max_size=3).map(torch.tensor)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.builds(Frozen, inner, inner),
    ),
    max_leaves=8,
)


@given(TREES)
def test_any_tree_equals_its_copy(tree: Any) -> None:
    """Rebuilding changes nothing: same types, same leaves, same paths."""
    twin = map_tensors(torch.clone, tree)
    assert list(differences(tree, twin)) == []
    assert [path for path, _ in leaves(twin)] == [path for path, _ in leaves(tree)]


@given(TREES, TREES)
def test_being_equal_does_not_depend_on_the_side(a: Any, b: Any) -> None:
    """`equal` is symmetric, and says what `differences` lists."""
    assert equal(a, b) == equal(b, a) == (list(differences(a, b)) == [])


def test_a_mapping_of_the_user_is_a_mapping() -> None:
    """What tokenisers return is walked like a dict."""
    assert isinstance(Batch(), Mapping)
    assert dict(leaves(Batch(ids=ONE))) == {"ids": ONE}


def test_a_zero_of_another_sign_is_a_difference():
    """Bitwise means the sign of zero too, while NaN equals NaN of any sign."""
    assert list(differences(torch.tensor([0.0]), torch.tensor([-0.0]))) == [": zeros of another sign"]
    assert equal(torch.tensor([float("nan"), 1.0]), torch.tensor([-float("nan"), 1.0]))
    assert not equal(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]))
