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
    Device(r"B200", fp32=80, tf32=1125, fp16=2250, bf16=2250, source="NVIDIA, DGX B200 datasheet, an eighth of it"),
    Device(r"H200", fp32=67, tf32=494.7, fp16=989.4, bf16=989.4, source="NVIDIA, H200 Tensor Core GPU datasheet"),
    Device(r"H100 PCIe", fp32=51.2, tf32=378, fp16=756, bf16=756, source="NVIDIA, H100 Tensor Core GPU datasheet, PCIe"),
    Device(r"H100 NVL", fp32=60, tf32=417.5, fp16=835, bf16=835, source="NVIDIA, H100 Tensor Core GPU datasheet, NVL"),
    Device(r"H100", fp32=66.9, tf32=494.7, fp16=989.4, bf16=989.4, source="NVIDIA, H100 Tensor Core GPU datasheet, SXM"),
    Device(r"A100", fp32=19.5, tf32=156, fp16=312, bf16=312, source="NVIDIA, A100 Tensor Core GPU datasheet"),
    Device(r"L40S", fp32=91.6, tf32=183, fp16=362, bf16=362, source="NVIDIA, L40S datasheet"),
    Device(r"\bL4\b", fp32=30.3, tf32=60, fp16=121, bf16=121, source="NVIDIA, L4 Tensor Core GPU datasheet"),
    Device(r"\bA10\b", fp32=31.2, tf32=62.5, fp16=125, bf16=125, source="NVIDIA, A10 Tensor Core GPU datasheet"),
    Device(r"V100-SXM", fp32=15.7, tf32=None, fp16=125, bf16=None, source="NVIDIA, V100 Tensor Core GPU datasheet, SXM2"),
    Device(r"V100-PCIE", fp32=14, tf32=None, fp16=112, bf16=None, source="NVIDIA, V100 Tensor Core GPU datasheet, PCIe"),
    Device(r"\bT4\b", fp32=8.1, tf32=None, fp16=65, bf16=None, source="NVIDIA, T4 Tensor Core GPU datasheet"),
    Device(r"MI300X", fp32=163.4, tf32=653.7, fp16=1307.4, bf16=1307.4, source="AMD, Instinct MI300X data sheet"),
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
