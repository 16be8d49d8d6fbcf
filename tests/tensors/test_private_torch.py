"""A canary for new releases of torch: every private name that fnlight uses is there as expected, and the public fallbacks give the same values.

All of it was seen to pass with torch 2.9.0 and 2.13.0.
"""

import importlib.util
import inspect
import pkgutil
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

import fnlight as fl
from fnlight.tensors import _private_torch as door

_SOME = "Tensor(a!)[] self"
_KERNEL = "grad_scale=None, Tensor? found_inf=None) -> ()"
SCHEMAS = {
    "_foreach_add_.List": f"({_SOME}, Tensor[] other, *, Scalar alpha=1) -> ()",
    "_foreach_add_.Tensor": f"({_SOME}, Tensor other, *, Scalar alpha=1) -> ()",
    "_foreach_add_.Scalar": f"({_SOME}, Scalar scalar) -> ()",
    "_foreach_mul_.List": f"({_SOME}, Tensor[] other) -> ()",
    "_foreach_mul_.Tensor": f"({_SOME}, Tensor other) -> ()",
    "_foreach_mul_.Scalar": f"({_SOME}, Scalar scalar) -> ()",
    "_foreach_div_.List": f"({_SOME}, Tensor[] other) -> ()",
    "_foreach_div_.Scalar": f"({_SOME}, Scalar scalar) -> ()",
    "_foreach_clamp_min_.Scalar": f"({_SOME}, Scalar scalar) -> ()",
    "_foreach_clamp_max_.Scalar": f"({_SOME}, Scalar scalar) -> ()",
    "_foreach_lerp_.List": f"({_SOME}, Tensor[] tensors1, Tensor[] weights) -> ()",
    "_foreach_lerp_.Scalar": f"({_SOME}, Tensor[] tensors1, Scalar weight) -> ()",
    "_foreach_copy_.default": f"({_SOME}, Tensor[] src, bool non_blocking=False) -> ()",
    "_foreach_norm.Scalar": "(Tensor[] self, Scalar ord=2, ScalarType? dtype=None) -> Tensor[]",
    "_amp_foreach_non_finite_check_and_unscale_.default": f"({_SOME}, Tensor(b!) found_inf, Tensor inv_scale) -> ()",
    "_amp_update_scale_.default": (
        "(Tensor(a!) self, Tensor(b!) growth_tracker, Tensor found_inf, float scale_growth_factor, float scale_backoff_factor, "
        "int growth_interval) -> Tensor(a!)"
    ),
    **{
        f"_fused_{name}_.default": (
            f"({_SOME}, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor[] state_steps"
            f", *, float lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize, Tensor? {_KERNEL}"
        )
        for name in ("adam", "adamw")
    },
    "_fused_adagrad_.default": (
        f"({_SOME}, Tensor(b!)[] grads, Tensor(c!)[] state_sums, Tensor(d!)[] state_steps, *, float lr, float lr_decay, float weight_decay, "
        f"float eps, bool maximize, Tensor? {_KERNEL}"
    ),
    "_fused_sgd_.default": (
        f"({_SOME}, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffer_list, *, float weight_decay, float momentum, float lr, float dampening, "
        f"bool nesterov, bool maximize, bool is_first_step, Tensor? {_KERNEL}"
    ),
}
"""Operations, and what they take and give."""

SIGNATURES = {
    "torch:_register_device_module": ["device_type", "module"],
    "torch.nn:Module._apply": ["self", "fn", "recurse"],
    "torch.distributed.device_mesh:DeviceMesh._flatten": ["self", "mesh_dim_name", "backend_override"],
    "torch.utils.data:DataLoader._get_iterator": ["self"],
}
"""Functions, and the names of their parameters."""

REMOVED = [name.partition(".")[0] for name in SCHEMAS]
BATCH_NORM = nn.modules.batchnorm


@pytest.fixture
def public(monkeypatch) -> ModuleType:
    """The same module, as it is if torch has none of the private names that have a fallback."""
    with monkeypatch.context() as patch:
        for name in dict.fromkeys(REMOVED):
            patch.delattr(torch, name)
        patch.delattr(torch._C, "_set_grad_enabled")
        patch.delattr(BATCH_NORM, "_NormBase")
        patch.delattr(BATCH_NORM, "_BatchNorm")
        patch.delattr(import_module("torch.optim.optimizer"), "_global_optimizer_pre_hooks")
        spec = importlib.util.spec_from_file_location("public_torch", door.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCHEMAS)
def test_operations_take_and_give_what_is_expected(name):
    """A private operation of torch has the parameters that fnlight gives it."""
    operation, overload = name.split(".")
    found = str(getattr(getattr(torch.ops.aten, operation), overload)._schema)
    assert found[found.index("(") :] == SCHEMAS[name]
    assert callable(getattr(torch, operation))


@pytest.mark.parametrize("path", SIGNATURES)
def test_functions_take_what_is_expected(path):
    """A private function of torch has the parameters that fnlight gives it."""
    assert list(inspect.signature(pkgutil.resolve_name(path)).parameters)[: len(SIGNATURES[path])] == SIGNATURES[path]


def test_the_broadcast_of_many_tensors_takes_what_is_expected():
    """A function that Python cannot inspect says so in its docstring."""
    said = distributed._broadcast_coalesced.__doc__
    assert [name in said for name in ("process_group: ", "tensors: ", "buffer_size: ", "src: ")] == [True] * 4


def test_attributes_are_where_they_are_expected():
    """Tensors, modules, optimizers and torch's modules have the private attributes that fnlight reads."""
    weight, layer = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(2)
    layer.register_buffer("derived", torch.ones(1), persistent=False)
    assert door.version_of(weight) == 0
    with torch.no_grad():
        weight.add_(1)
    assert door.version_of(weight) == 1
    assert (list(door.parameters_of(layer)), list(door.buffers_of(layer))[:2]) == (["weight", "bias"], ["running_mean", "running_var"])
    assert set(door.derived_buffers(layer)) == {"derived"}
    assert door.stored_values(torch.eye(2).to_sparse()).tolist() == [1.0, 1.0]
    assert torch.autograd.profiler._is_profiler_enabled is False
    assert (door.NORMS, door.BATCH_NORMS, door.BatchNorm) == ((BATCH_NORM._NormBase,), (BATCH_NORM._BatchNorm,), BATCH_NORM._BatchNorm)
    assert [hooks for hooks in door._GLOBAL_HOOKS if hooks] == []
    assert torch.optim.SGD([weight], fused=True)._step_supports_amp_scaling
    assert {"_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"} <= vars(layer).keys()


def test_hooks_of_tensors_and_optimizers_are_seen():
    """Functions that a user registers are found, and so is a scheduler of torch."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    seen = [len(hooks) for hooks in door.gradient_hooks(weight)], door.has_step_hooks(optimizer), door.has_scheduler(optimizer)
    assert seen == ([0, 0], False, False)
    weight.register_hook(lambda grad: grad)
    weight.register_post_accumulate_grad_hook(lambda p: None)
    optimizer.register_step_pre_hook(lambda *_: None)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    seen = [len(hooks) for hooks in door.gradient_hooks(weight)], door.has_step_hooks(optimizer), door.has_scheduler(optimizer)
    assert seen == ([1, 1], True, True)


def test_a_profiler_is_seen():
    """It is on while it records, and off before and after."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert door.is_profiling()
    assert not door.is_profiling()


def test_the_part_of_a_sharded_tensor_is_where_it_is_expected():
    """A ``DTensor`` keeps it in the attribute that fnlight reads, and its mesh and ``fully_shard`` have what fnlight calls."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    assert door.LOCAL in DTensor.__slots__
    assert callable(FSDPModule._get_fsdp_state)
    assert "_remove_autograd_hooks" in dir(distributed.Reducer)


def test_a_loader_with_an_iterator_of_its_own_is_seen():
    """A subclass that replaces a part of the iteration is not torch's own any more."""

    class Own(DataLoader):
        def _get_iterator(self):
            return iter(())

    assert (door.has_own_iterator(DataLoader([1])), door.has_own_iterator(Own([1]))) == (False, True)
    assert not door.has_own_iterator(Own([1]), also=(Own.__module__,))


def _tensors(*, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in [(), (3,), (2, 5)]]


CALLS = {
    "add a list": ("foreach_add_", (_tensors(),), {"alpha": 0.3}),
    "add a number": ("foreach_add_", (2,), {}),
    "add a tensor": ("foreach_add_", (torch.tensor(2.0),), {"alpha": 1.0}),
    "multiply by a list": ("foreach_mul_", ([torch.tensor(2.0), torch.tensor(0.1), torch.tensor(3.0)],), {}),
    "multiply by a tuple": ("foreach_mul_", ((torch.tensor(2.0), torch.tensor(0.1), torch.tensor(3.0)),), {}),
    "multiply by a number": ("foreach_mul_", (0.3,), {}),
    "multiply by a tensor": ("foreach_mul_", (torch.tensor(0.3),), {}),
    "divide by a list": ("foreach_div_", (_tensors(),), {}),
    "divide by a number": ("foreach_div_", (3.0,), {}),
    "raise": ("foreach_clamp_min_", (0.1,), {}),
    "lower": ("foreach_clamp_max_", (0.1,), {}),
    "interpolate by a number": ("foreach_lerp_", (_tensors()[::-1], 0.1), {}),
    "interpolate by a list": ("foreach_lerp_", (_tensors(), [torch.tensor(0.1)] * 3), {}),
    "copy": ("foreach_copy_", (_tensors(),), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_the_fallback_of_an_operation_on_lists_gives_the_same_values(public, call, dtype):
    """One call for all tensors is a call for each: bitwise in float32, and in bfloat16 up to the rounding of a number that is given."""
    name, args, options = CALLS[call]
    if name == "foreach_lerp_":
        args = ([end.expand(tensor.shape) for end, tensor in zip(_tensors(), _tensors(), strict=True)], *args[1:])
    args = tuple([t.to(dtype) for t in arg] if isinstance(arg, list | tuple) else arg for arg in args)
    found, wanted = _tensors(dtype=dtype), _tensors(dtype=dtype)
    getattr(door, name)(wanted, *args, **options)
    assert inspect.isfunction(getattr(public, name))
    getattr(public, name)(found, *args, **options)
    torch.testing.assert_close(found, wanted, rtol=0 if dtype == torch.float32 else 2**-7, atol=0)


def test_the_fallback_of_norms_gives_the_same_values(public):
    """One call for all tensors is bitwise a call for each."""
    assert all(map(torch.equal, public.foreach_norm(_tensors()), door.foreach_norm(_tensors())))


@pytest.mark.parametrize("entry", [1.0, torch.inf, torch.nan])
def test_the_fallback_of_unscaling_gives_the_same_values(public, entry):
    """Gradients are multiplied, and what is not finite is found."""
    found = []
    for each in (door, public):
        tensors, bad = [*_tensors(), torch.tensor([entry, 2.0])], torch.zeros(())
        each.unscale_(tensors, bad, torch.tensor(0.25))
        found.append([*tensors, bad])
    assert found[0][-1].item() == float(entry != 1.0)
    assert all(torch.equal(a.nan_to_num(nan=7), b.nan_to_num(nan=7)) for a, b in zip(*found, strict=True))


def test_the_fallback_of_a_loss_scale_gives_the_same_values(public):
    """Over good and bad steps, scale and count are the same, and a scale that would overflow is not raised."""
    courses = []
    for each in (door, public):
        scale, good = torch.tensor(2.0**124), torch.zeros((), dtype=torch.int32)
        course = []
        for bad in [0, 0, 0, 1, 0, 0, 1, 1, 0, *[0] * 20]:
            each.update_scale_(scale, good, torch.tensor(float(bad)), 2.0, 0.5, 2)
            course.append((scale.item(), good.item()))
        courses.append(course)
    assert courses[0] == courses[1]
    assert courses[0][-1][0] == 2.0**127


def test_the_fallbacks_of_single_names_give_the_same_values(public):
    """Autograd is switched, norms are recognised, and buffers that are not saved are found."""
    for each in (door, public):
        each.set_grad_enabled(False)
        assert not torch.is_grad_enabled()
        each.set_grad_enabled(True)
        assert torch.is_grad_enabled()
    norms = [nn.BatchNorm1d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(1), nn.LayerNorm(1)]
    for kinds in ("NORMS", "BATCH_NORMS"):
        assert [isinstance(m, getattr(public, kinds)) for m in norms] == [isinstance(m, getattr(door, kinds)) for m in norms]
    layer = nn.BatchNorm1d(2)
    layer.register_buffer("derived", torch.ones(1), persistent=False)
    vars(layer)["_non_persistent_buffers_set"], kept = None, vars(layer)["_non_persistent_buffers_set"]
    layer.state_dict = lambda: {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0, "num_batches_tracked": 0}
    assert set(public.derived_buffers(layer)) == kept == {"derived"}


def test_without_its_private_names_an_optimizer_takes_its_own_step(public):
    """Where torch does not say whether a hook is called, ``optimizer.step()`` is, and there is no kernel to call directly."""
    assert public.has_step_hooks(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch, "_fused_adam_")
        assert public.fused_kernel("adam") is None


def test_buffers_are_sent_one_by_one_without_the_private_function(monkeypatch):
    """Each goes from the first rank of the group to the others."""
    sent = []
    monkeypatch.delattr(distributed, "_broadcast_coalesced")
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, group, group_src: sent.append((tensor, group, group_src)))
    tensors = _tensors()
    door.broadcast_each(tensors, "a group")
    assert [(id(t), "a group", 0) for t in tensors] == [(id(t), group, src) for t, group, src in sent]


def test_a_training_gives_the_same_bits_with_the_fallbacks(public, monkeypatch):
    """Clipping, accumulation and averages do not depend on which of both ways is taken."""

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        step = lambda model, batch: model(batch).square().mean()
        task = fl.Task(model, step, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=0.1))
        pipe = fl.pipe(step, fl.grad(), fl.accumulate(2), fl.clip_norm(0.1), fl.clip_value(0.05), fl.apply(), fl.ema(0.5))
        data = list(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1)))
        *_, (state, _) = fl.run(fl.pipe(pipe, fl.stop_when(fl.max_epochs(1))), fl.TrainState.create(task), data)
        return [*state.params.values(), *state.store.memory["ema"].values()]

    wanted = trained()
    for module in ("gradients.clip", "pipe.mean", "step.averages", "optim.fused"):
        target = import_module(f"fnlight.{module}")
        for name in vars(target).keys() & {name for name in vars(public) if name.startswith("foreach_")}:
            monkeypatch.setattr(target, name, getattr(public, name))
    found = trained()
    assert len(found) == 8
    assert all(map(torch.equal, found, wanted))
