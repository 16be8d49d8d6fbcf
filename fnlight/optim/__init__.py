"""Optimizers: what `configure_optimizers` may return, checked against its model, with memory by qualified parameter name.

An optimizer keeps memory in ``state`` and, some of them, in ``param_groups``; both are saved. What the user configured is kept
beside it (`Optim.configured`), so that a value that was changed in the code wins over the one in a checkpoint.
"""

from fnlight.optim.conditional_step import buffers_before, step_where
from fnlight.optim.groups import GroupRule, frozen, layer_decay, matches, meant, no_decay, param_groups
from fnlight.optim.host import HOST, take_step_on_host
from fnlight.optim.kernels import choose_fused, take_step
from fnlight.optim.lookahead import Lookahead
from fnlight.optim.memory import OTHER, RAW, class_name, named_groups, named_state, place_slot, to_device, weights_to_use
from fnlight.optim.names import optimizer, optimizer_class, optimizer_classes
from fnlight.optim.needs import UNFIT, by_itself
from fnlight.optim.prepare import prepare, prepare_each
from fnlight.optim.rates import ends, monitored, reported, set_lr
from fnlight.optim.spec import Optim

__all__ = [
    "UNFIT",
    "GroupRule",
    "Lookahead",
    "Optim",
    "frozen",
    "layer_decay",
    "no_decay",
    "optimizer",
    "optimizer_class",
    "optimizer_classes",
    "param_groups",
]
