"""One look at the first gradients of a run: do they reach the model that is trained? Not in `grad`, whose every line costs time at every step."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from fnlight.errors import StepError, TaskWarning, warn
from fnlight.protocols import StoreView
from fnlight.state import TrainState
from fnlight.tensors import is_sharded, leaves

_KEY = "first_look"
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_ADVICE = (
    "use the model that the function is given. A lambda, a hook or a bound method that was made in __init__ and refers to `self` still refers to "
    "the task's model, of which a run trains a copy: make it a method of the class, or let it take the module as an argument"
)


@attrs.define(eq=False)
class FirstLook:
    """What the first step of a run is compared with. It is among the resources of the run until then.

    Args:
        model: The task's own model, of which the run trains a copy.
        known: The identities of its gradients, and of tensors with a graph among its attributes, before the run.
        train_step: The task's, for its name.

    Example:
        >>> FirstLook(nn.Linear(1, 1)).known
        set()
    """

    model: nn.Module
    known: set[int] = attrs.field(factory=set)
    train_step: Any = None
    reached: bool = attrs.field(
        default=False, init=False
    )  # whether the loss depends on the model that is trained, as far as its graph says

    def outside(self, loss: Tensor, store: StoreView) -> list[Tensor]:
        """The tensors that a loss will give gradients to, and that are no parameters of the model that is trained."""
        inside, found = {id(p) for p in store.module.parameters()}, list(_leaves_of(loss))
        self.reached = any(id(t) in inside for t in found)
        return [t for t in found if id(t) not in inside]

    def check(self, fn: Any, store: StoreView, values: Sequence[Tensor | None], outside: Sequence[Tensor]) -> None:
        """Raise where gradients went past the model that is trained; warn where some of them went to parameters outside of it.

        Args:
            fn: The loss function, for its name.
            store: The live store.
            values: The gradients of its parameters.
            outside: What `outside` gave before the backward pass.
        """
        self.check_task(fn, outside)
        if any(map(is_sharded, store.params)):
            return  # their gradients come later
        found = [t for t in outside if isinstance(t, nn.Parameter)]
        if not self.reached and all(v is None for v in values):  # a graph may hide its ends, and gradients may be gone already
            whom = f"only on tensors outside of it, of the shapes {_shapes(outside)}" if outside else "on none of its parameters"
            raise StepError(
                f"the loss of {_named(fn, self.train_step)} does not depend on the model that it is given, {whom}, so nothing would be trained; {_ADVICE}"
            )
        if found and store.place is None:
            warn(
                f"{_named(fn, self.train_step)} also computes gradients of {len(found)} parameters outside of the model, of the shapes {_shapes(found)}, which nothing "
                "trains: make them part of the model if they are to be trained (a list of modules belongs into nn.ModuleList), or freeze them with "
                "requires_grad_(False) or torch.no_grad()",
                TaskWarning,
            )

    def check_task(self, fn: Any, outside: Sequence[Tensor] = ()) -> None:
        """Raise where gradients, or tensors with a graph, came to the task's own model."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = [names[id(t)] for t in outside if id(t) in names]
        for name, p in self.model.named_parameters():
            if p.grad is not None and id(p.grad) not in self.known:
                found.append(name)
                p.grad = None  # the task's model is left as it was
        found = [*dict.fromkeys(found)] or [name for name, t in _held(self.model) if id(t) not in self.known]
        if found:
            raise StepError(
                f"{_named(fn, self.train_step)} computes with the task's own model, not with the one that it is given: gradients went to {found[:5]} there, so the "
                f"model that is trained does not learn them; {_ADVICE}"
            )


@attrs.define(eq=False)
class _Due:
    """The looks that are due in a run, by the identity of the store: each phase of several optimizers has its own."""

    looks: dict[int, FirstLook] = attrs.field(factory=dict)

    def close(self, error: BaseException | None) -> None:
        """Nothing is open."""


def begin(state: TrainState) -> TrainState:
    """Let the first step of a run be looked at.

    Args:
        state: At the start of a run; of a phase, its own.

    Returns:
        The same state.

    Example:
        >>> from fnlight.state import Task
        >>> state = begin(TrainState.create(Task(nn.Linear(1, 1), max)))
        >>> taken(state.store) is None, taken(state.store) is None
        (False, True)
    """
    model = state.task.model
    known = {id(p.grad) for p in model.parameters() if p.grad is not None} | {id(t) for _, t in _held(model)}
    due = state.store.run.resources.setdefault(_KEY, _Due())
    due.looks[id(state.store)] = FirstLook(model, known, state.task.train_step)
    return state


def taken(store: StoreView) -> FirstLook | None:
    """The look that is due, once; while a step is traced, there is one that knows no task.

    Args:
        store: The live store, or that of a trace.

    Returns:
        None at all later steps.

    Example:
        >>> from fnlight.optim import Optim
        >>> from fnlight.state import Store
        >>> taken(Store(nn.Linear(1, 1), Optim(None), {})) is None
        True
    """
    if store.host.traced:
        return FirstLook(nn.Identity())
    due = store.run.resources.get(_KEY)
    if due is None:
        return None
    look = due.looks.pop(id(store), None)
    if not due.looks:
        del store.run.resources[_KEY]
    return look


def _leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """The tensors at the ends of a graph, where gradients are added up."""
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        waiting += [following for following, _ in node.next_functions]


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The attributes of a module, and of its parts, that are tensors with a graph."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for place, leaf in () if name.startswith("_") else leaves(value):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    yield ".".join(filter(None, (path, name, place))), leaf


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")


def _named(*functions: Any) -> str:
    """The first function that is not one of fnlight's, with its place."""
    for fn in functions:
        code = getattr(fn, "__code__", None)
        if code is not None and not code.co_filename.startswith(_HERE):
            return f"{fn.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
    return "train_step"
