"""What `configure_optimizers` returned, checked against its model and completed."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn
from torch.optim import Optimizer

from fnlight.errors import OptimizerError, OptimizerWarning, described, warn
from fnlight.optim.kernels import choose_fused, leaves_open
from fnlight.optim.needs import is_second_order, public_name, wants_closure, why_unfit
from fnlight.optim.rates import courses_of, group_name
from fnlight.optim.spec import Optim
from fnlight.tensors import has_scheduler


def prepare(made: Any, module: nn.Module) -> Optim:
    """Check what `configure_optimizers` returned against the module, and complete it.

    The fused form of a torch optimizer is switched on where it has one, all parameters allow it and the user did not choose.

    Args:
        made: An optimizer, an `Optim`, or None where nothing is trainable.
        module: The module whose parameters it must hold.

    Returns:
        An `Optim` whose groups have ``initial_lr`` and whose `configured` is filled.

    Raises:
        OptimizerError: If it is no optimizer, holds parameters of another model, or has a torch scheduler on it.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> prepare(torch.optim.SGD(model.parameters(), lr=0.1), model).configured[0]["lr"]
        0.1
    """
    optim = made if isinstance(made, Optim) else Optim(made)
    if optim.optimizer is None:
        trainable = [name for name, p in module.named_parameters() if p.requires_grad]
        if trainable:
            raise OptimizerError(
                f"configure_optimizers must return an optimizer or Optim, but returned None; trainable: {_some(trainable)}"
            )
        return Optim(None)
    optim = _completed(optim, module)
    _check_all_held([optim.optimizer], module)
    return optim


def prepare_each(made: Any, phases: Sequence[str], module: nn.Module) -> dict[str, Optim]:
    """Check the optimizers of a task with several phases, and complete them.

    Args:
        made: What `configure_optimizers` returned: a mapping of phases to optimizers or `Optim`s.
        phases: The names of the phases that the task has.
        module: The module whose parameters they must hold; one parameter may be held by several.

    Returns:
        Prepared optimizers by phase, in the order of the phases.

    Raises:
        OptimizerError: If the names differ, a phase has no optimizer or nothing to train, or an optimizer does not fit the module.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"disc": nn.Linear(2, 1), "gen": nn.Linear(1, 2)})
        >>> made = {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in model.items()}
        >>> list(prepare_each(made, ["gen", "disc"], model))
        ['gen', 'disc']
    """
    if not isinstance(made, Mapping):
        raise OptimizerError(
            f"this task has the phases {', '.join(phases)}, so configure_optimizers must return a dict of an optimizer for each, "
            f"but returned {_describe(made)}"
        )
    if set(made) != set(phases):
        raise OptimizerError(
            f"the phases of train_step and the optimizers must have the same names, but the phases are {sorted(phases)} and "
            f"configure_optimizers returned {sorted(map(str, made))}"
        )
    found: dict[str, Optim] = {}
    for name in phases:
        optim = made[name] if isinstance(made[name], Optim) else Optim(made[name])
        held = [p for group in optim.optimizer.param_groups for p in group["params"]] if isinstance(optim.optimizer, Optimizer) else []
        if optim.optimizer is None or (isinstance(optim.optimizer, Optimizer) and not any(p.requires_grad for p in held)):
            raise OptimizerError(
                f"the phase {name!r} has no parameters to train: its optimizer holds none that requires a gradient; "
                "give it some, or leave the phase out"
            )
        found[name] = _completed(optim, module)
    _check_all_held([optim.optimizer for optim in found.values()], module)
    return found


def _completed(optim: Optim, module: nn.Module) -> Optim:
    if not isinstance(optim.optimizer, Optimizer):
        raise OptimizerError(
            "configure_optimizers must return a torch.optim.Optimizer or fl.Optim(optimizer, schedule), but returned "
            f"{_describe(optim.optimizer)}"
        )
    if has_scheduler(optim.optimizer):
        raise OptimizerError(
            f"a torch scheduler was made on this {type(optim.optimizer).__name__}, and nobody would step it; "
            "return fl.Optim(optimizer, schedule=fl.from_torch(lambda optimizer: Scheduler(optimizer, ...))) instead"
        )
    unfit = why_unfit(optim.optimizer)
    if unfit is not None:
        raise OptimizerError(f"{public_name(type(optim.optimizer))} {unfit}; take another one, or a combinator of your own")
    _check_own(optim.optimizer, module)
    chooses = leaves_open(optim.optimizer)
    if chooses:
        choose_fused(optim.optimizer, module)
    _check_groups(optim.optimizer)
    train = getattr(optim.optimizer, "train", None)
    if callable(train):
        train()  # a schedule-free optimizer rests in the mode in which it trains
    for group in optim.optimizer.param_groups:
        if optim.schedule is not None and group.get("lr") is None:
            raise OptimizerError(f"a schedule multiplies a learning rate, but {type(optim.optimizer).__name__} has lr=None; give it one")
        group.setdefault("initial_lr", _plain(group.get("lr")))
    configured = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optim.optimizer.param_groups]
    graph = is_second_order(optim.optimizer) if optim.create_graph is None else optim.create_graph
    closure = wants_closure(optim.optimizer) if optim.closure is None else optim.closure
    if optim.offload and (closure or graph or callable(train)):
        raise OptimizerError(
            f"{public_name(type(optim.optimizer))} cannot step on the host: it {_wants(closure, graph)}; leave offload=True out, or take another one"
        )
    optim = attrs.evolve(optim, configured=configured, create_graph=graph, closure=closure, chooses=chooses)
    return attrs.evolve(optim, courses=courses_of(optim))


def _wants(closure: bool, graph: bool) -> str:
    if closure or graph:
        return "computes the loss itself" if closure else "differentiates the gradients once more"
    return "keeps other weights beside those that are trained"


def _check_groups(optimizer: Optimizer) -> None:
    names = [group_name(group, i) for i, group in enumerate(optimizer.param_groups)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OptimizerError(
            f"two groups of the optimizer are called {twice[0]!r}; give each a name of its own, or none; there are {names}"
        )


def _check_own(optimizer: Optimizer, module: nn.Module) -> None:
    own = {id(p) for p in module.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [list(p.shape) for p in held if id(p) not in own]
    if foreign:
        raise OptimizerError(
            f"configure_optimizers(model) must use the parameters of the model it is given, but {type(optimizer).__name__} holds "
            f"{len(foreign)} of another one (shapes {foreign[:5]}); write model.parameters() of the argument, not of a model outside"
        )


def _check_all_held(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        warn(
            f"{' and '.join(type(optimizer).__name__ for optimizer in optimizers)} holds no {_some(missing)}, which require gradients but will never change; "
            "give them to the optimizer, or freeze them with requires_grad_(False)",
            OptimizerWarning,
        )


def _plain(lr: Any) -> Any:
    return float(lr) if isinstance(lr, Tensor) else lr


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _describe(made: Any) -> str:
    if isinstance(made, Mapping):
        return f"a dict of {sorted(map(str, made))}"
    if isinstance(made, list | tuple):
        return f"a {type(made).__name__} of {', '.join(type(each).__name__ for each in made) or 'nothing'}"
    if isinstance(made, type):
        return f"{described(made)}; call it, as in {made.__name__}(model.parameters(), ...)"
    return described(made)
