"""Floating-point operations: the number per step, and the peak rate of a device."""

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
    """The peak rates of a device, in TFLOP/s (10^12 operations per second), without sparsity.

    Args:
        name: A regular expression that is searched in the device name of torch; case does not matter.
        fp32: The rate in float32.
        tf32: The rate in float32 with rounded products (``torch.set_float32_matmul_precision("high")``); None if the device has no tf32.
        fp16: The rate in float16, with sums in float32.
        bf16: The rate in bfloat16; None if the device has no bfloat16.
        source: The datasheet. If it gives rates for sparse matrices, half of them is used.

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
"""Devices with a known peak rate; the first matching name is used."""

_PRECISIONS = {"fp32": "fp32", "tf32": "tf32", "bf16": "bf16", "bf16-true": "bf16", "fp16": "fp16", "fp16-true": "fp16"}


def flops(state: TrainState, batch: Any) -> int:
    """Count the floating-point operations of one step: matrix products, convolutions and attention, forward and backward.

    One step is computed on a copy of the state. A multiplication and its addition count as two operations. Recomputed activations count,
    too.

    Args:
        state: The training state; it is not changed.
        batch: One batch, or an `Item`, as for `fnlight.step.update`.

    Returns:
        The number of operations.

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
    """The peak rate of a device.

    Args:
        device: A device, or its name in torch, such as ``"NVIDIA H100 80GB HBM3"``.
        precision: As in ``FitConfig(precision=...)``, or ``"tf32"``.

    Returns:
        FLOP/s; None if it is not known, as for every CPU.

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
    """The name of a device in torch.

    Args:
        device: Any device.

    Returns:
        The name of a CUDA device's model; the device type for other devices.

    Example:
        >>> device_name(torch.device("cpu"))
        'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
