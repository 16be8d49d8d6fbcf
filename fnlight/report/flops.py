"""Floating-point operations: how many a step makes, and how many a device can make at most."""

import re
from typing import Any

import attrs
import torch
from torch.utils.flop_counter import FlopCounterMode

from fnlight.errors import ConfigError
from fnlight.state import TrainState
from fnlight.step import update


@attrs.frozen
class Device:
    """What a device can do at most, in TFLOP/s (10^12 operations a second), without sparsity.

    Args:
        name: A regular expression that the name which torch gives holds, whatever the case.
        fp32: In float32.
        tf32: In float32 whose products may be rounded (``torch.set_float32_matmul_precision("high")``); None where it has none.
        fp16: In float16, with sums in float32.
        bf16: In bfloat16; None where it has none.
        source: Where the figures are from. Where it gives those of sparse matrices, half of them is taken.

    Example:
        >>> Device("L4", 30.3, 60, 121, 121, "a datasheet").bf16
        121
    """

    name: str
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None
    source: str


PEAKS = (
    Device(r"B200", 80, 1125, 2250, 2250, "NVIDIA, DGX B200 datasheet, an eighth of it"),
    Device(r"H200", 67, 494.7, 989.4, 989.4, "NVIDIA, H200 Tensor Core GPU datasheet"),
    Device(r"H100 PCIe", 51.2, 378, 756, 756, "NVIDIA, H100 Tensor Core GPU datasheet, PCIe"),
    Device(r"H100 NVL", 60, 417.5, 835, 835, "NVIDIA, H100 Tensor Core GPU datasheet, NVL"),
    Device(r"H100", 66.9, 494.7, 989.4, 989.4, "NVIDIA, H100 Tensor Core GPU datasheet, SXM"),
    Device(r"A100", 19.5, 156, 312, 312, "NVIDIA, A100 Tensor Core GPU datasheet"),
    Device(r"L40S", 91.6, 183, 362, 362, "NVIDIA, L40S datasheet"),
    Device(r"\bL4\b", 30.3, 60, 121, 121, "NVIDIA, L4 Tensor Core GPU datasheet"),
    Device(r"\bA10\b", 31.2, 62.5, 125, 125, "NVIDIA, A10 Tensor Core GPU datasheet"),
    Device(r"V100-SXM", 15.7, None, 125, None, "NVIDIA, V100 Tensor Core GPU datasheet, SXM2"),
    Device(r"V100-PCIE", 14, None, 112, None, "NVIDIA, V100 Tensor Core GPU datasheet, PCIe"),
    Device(r"\bT4\b", 8.1, None, 65, None, "NVIDIA, T4 Tensor Core GPU datasheet"),
    Device(r"MI300X", 163.4, 653.7, 1307.4, 1307.4, "AMD, Instinct MI300X data sheet"),
)
"""Devices whose peak is known; the first whose name fits counts. Of others nothing is claimed."""

_PRECISIONS = {"fp32": "fp32", "tf32": "tf32", "bf16": "bf16", "bf16-true": "bf16", "fp16": "fp16", "fp16-true": "fp16"}


def flops(state: TrainState, batch: Any) -> int:
    """Count the floating-point operations of one step: those of matrix products, convolutions and attention, forward and backward.

    The step is taken for real, on a copy of the state. A product and the sum that it goes into count as two. What is computed again
    because activations were not kept counts as well.

    Args:
        state: Where training stands; it is left as it was.
        batch: One batch, or an `Item`, as `fnlight.step.update` takes it.

    Returns:
        The number.

    Example:
        >>> from fnlight.state import Task
        >>> task = Task(torch.nn.Linear(32, 8), lambda model, batch: model(batch).sum(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> flops(TrainState.create(task), torch.ones(4, 32))  # forward, and the gradient of the weight
        4096
    """
    counter = FlopCounterMode(display=False)
    with counter:
        update(state, batch)
    return counter.get_total_flops()


def peak_flops(device: torch.device | str, precision: str = "fp32") -> float | None:
    """What a device can compute at most.

    Args:
        device: A device, or the name that torch gives it, such as ``"NVIDIA H100 80GB HBM3"``.
        precision: As ``FitConfig(precision=...)``, or ``"tf32"``.

    Returns:
        FLOP/s; None where it is not known, as for every CPU.

    Raises:
        ConfigError: If there is no such precision.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16"), peak_flops(torch.device("cpu"))
        (989400000000000.0, None)
    """
    if precision not in (*_PRECISIONS, "fp64"):
        raise ConfigError(f"precision must be one of {', '.join(map(repr, (*_PRECISIONS, 'fp64')))}, but got {precision!r}")
    name = device if isinstance(device, str) and not device.startswith(("cpu", "cuda")) else device_name(torch.device(device))
    found = next((each for each in PEAKS if re.search(each.name, name, re.I)), None)
    most = None if found is None or precision == "fp64" else getattr(found, _PRECISIONS[precision])
    return None if most is None else most * 1e12


def device_name(device: torch.device) -> str:
    """What torch calls a device.

    Args:
        device: Any.

    Returns:
        The name of its model where torch knows it, else its type.

    Example:
        >>> device_name(torch.device("cpu"))
        'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
