"""A canary for new releases of torch: every private name of its compiler that fnlight uses is there, and without one a step is still taken.

All of it was seen to pass with torch 2.9.0 and 2.13.0.
"""

import inspect
from importlib import import_module

import pytest
import torch
from torch import nn

import fnlight as fl
from fnlight.compile import _private_torch as door

PARAMETERS = {
    "torch.fx.experimental.proxy_tensor:make_fx": ["decomposition_table", "tracing_mode", "_allow_non_fake_inputs"],
    "torch.fx.experimental.symbolic_shapes:ShapeEnv": [],
    "torch._subclasses.fake_tensor:FakeTensorMode": ["allow_fallback_kernels", "allow_non_fake_inputs", "shape_env", "static_shapes"],
    "torch._inductor.compile_fx:compile_fx_inner": ["gm", "example_inputs"],
    "torch._inductor.decomposition:select_decomp_table": [],
    "torch._inductor.scheduler:SchedulerNode.recompute_size_and_body": ["self"],
    "torch._inductor.scheduler:SchedulerNode.set_read_writes": ["self"],
    "torch._inductor.dependencies:ReadWrites.rename": ["self", "renames"],
    "torch._inductor.ir:TensorBox.create": [],
    "torch._inductor.mkldnn_ir:LinearUnary.create": ["x", "w", "B", "attr", "scalars", "algorithm"],
    "torch._guards:TracingContext": ["fake_mode"],
    "torch._guards:tracing": [],
    "torch.nn:Module._call_impl": ["self"],
}
"""Functions and classes, and the parameters that are given to them."""

NAMES = [
    "torch.compiler:_is_compiling_flag",
    "torch._functorch:config.fake_tensor_allow_unsafe_data_ptr_access",
    "torch._inductor:config.fallback_random",
    "torch._inductor:config.cpp_wrapper",
    "torch._inductor:config.layout_optimization",
    "torch._inductor:config.size_asserts",
    "torch._inductor.exc:InductorError",
    "torch._inductor.lowering:lowerings",
    "torch._C:_aoti.unsafe_alloc_void_ptrs_from_tensors",
    "torch._C:_aoti.alloc_tensors_by_stealing_from_void_ptrs",
    "torch.nn:Module._compiled_call_impl",
]
"""Other names that are there."""

SCHEMAS = {
    "_foreach_norm.Scalar": "aten::_foreach_norm.Scalar(Tensor[] self, Scalar ord=2, ScalarType? dtype=None) -> Tensor[]",
    "_foreach_lerp.List": "aten::_foreach_lerp.List(Tensor[] self, Tensor[] tensors1, Tensor[] weights) -> Tensor[]",
}
"""Operations that get another decomposition, and what they take and give."""


@pytest.mark.parametrize("path", PARAMETERS)
def test_functions_take_what_is_expected(path):
    """A private function of torch's compiler has the parameters that fnlight gives it."""
    found = inspect.signature(door.find(path)).parameters
    missing = [name for name in PARAMETERS[path] if name not in found]
    assert not missing, f"torch {torch.__version__}: {path} takes {list(found)}"


@pytest.mark.parametrize("path", NAMES)
def test_names_are_where_they_are_expected(path):
    """A private name of torch's compiler is found."""
    door.find(path)
    assert path.partition(":")[0]


@pytest.mark.parametrize("name", SCHEMAS)
def test_operations_take_and_give_what_is_expected(name):
    """An operation that is decomposed has the parameters of what takes its place."""
    operation, overload = name.split(".")
    assert str(getattr(getattr(torch.ops.aten, operation), overload)._schema) == SCHEMAS[name]


def test_operations_without_a_public_name_are_there():
    """They are operations of a graph, of which one writes."""
    import_module("torch._inductor.lowering")
    found = [door.realized(), door.writing_norm(), door.linear()]
    assert [isinstance(operation, door.Operation) for operation in found] == [True] * 3
    assert [door.writes(operation) for operation in found] == [False, True, False]


def test_a_name_that_is_missing_is_said():
    """The error names the release of torch, and the name."""
    with pytest.raises(door.UntraceableError, match=r"torch \d+\.\d+.* has no torch\._inductor\.compile_fx\.nothing, which compiled steps"):
        door.find("torch._inductor.compile_fx:nothing")
    with pytest.raises(door.UntraceableError, match=r"has no torch\._nothing\.at_all"):
        door.find("torch._nothing:at_all")


def _trained(*levels) -> list[torch.Tensor]:
    torch.manual_seed(0)
    step = lambda model, batch: model(batch).square().mean()
    task = fl.Task(nn.Linear(3, 2), step, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    pipe = fl.pipe(step, fl.grad(), fl.apply(), *map(fl.compile, levels), fl.stop_when(fl.max_epochs(1)))
    data = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    *_, (state, _) = fl.run(pipe, fl.TrainState.create(task), data)
    return list(state.params.values())


@pytest.mark.parametrize(
    ("module", "name", "says"),
    [
        ("torch._inductor.compile_fx", "compile_fx_inner", r"has no torch\._inductor\.compile_fx\.compile_fx_inner.*continuing"),
        (
            "torch._inductor.decomposition",
            "select_decomp_table",
            r"has no torch\._inductor\.decomposition\.select_decomp_table.*continuing",
        ),
        ("torch._subclasses.fake_tensor", "FakeTensorMode", r"has no torch\._subclasses\.fake_tensor\.FakeTensorMode.*continuing"),
    ],
)
def test_without_a_private_name_the_step_is_taken_at_a_lower_level(monkeypatch, module, name, says):
    """One warning says which name is missing, and the training ends with the bits of a step that is not compiled."""
    wanted = _trained()
    monkeypatch.delattr(import_module(module), name)
    with pytest.warns(fl.errors.CompileWarning, match=says) as warned:
        found = _trained("step")
    assert len(warned) <= 2
    assert all(map(torch.equal, found, wanted))
