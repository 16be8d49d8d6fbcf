"""TensorBoard's file format: events as protocol buffers, each with its length and checksums. TensorBoard is imported when a file is opened.

TensorBoard's own writers start a thread that writes later: after ``kill -9``, 989 of 1,000 scalars were in the file of tensorboard 2.21, and
all 1,000 in the file written here. They also load TensorFlow wherever it is installed. What is left to write by hand is the frame of an event, four
lines; events and checksums are TensorBoard's. The import takes 0.25 s either way.
"""

import importlib
import io
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnlight.errors import StepError
from fnlight.metrics import Figure, Histogram, Image, Text
from fnlight.tensors import leaves

_BINS = 64
_GAP = 2  # pixels between the pictures of a grid


def _proto(name: str) -> Any:
    """A module of TensorBoard's protocol buffers, whose names no type checker can see; loaded late, as it is heavy."""
    return importlib.import_module(f"tensorboard.{name}_pb2")


def file_name(folder: Path, seconds: float, host: str) -> str:
    """The name of a new event file that sorts behind those in the folder, which is the order in which they are read."""
    stamps = [
        int(match[1]) for path in folder.glob("events.out.tfevents.*") if (match := re.match(r"events\.out\.tfevents\.(\d+)", path.name))
    ]
    return f"events.out.tfevents.{max([int(seconds), *(s + 1 for s in stamps)]):010d}.{host}.{os.getpid()}.0"


def framed(event: Any) -> bytes:
    """An event as the bytes of a file: length, checksum, data, checksum."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # heavy, for this sink only

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def head(seconds: float, step: int) -> bytes:
    """What an event file begins with: its version, and the step from which on earlier files of the run no longer count."""
    proto = _proto("compat.proto.event")
    version = proto.Event(wall_time=seconds, step=step, file_version="brain.Event:2")
    restart = proto.Event(wall_time=seconds, step=step, session_log=proto.SessionLog(status=proto.SessionLog.START))
    return framed(version) + framed(restart)


def metrics_event(seconds: float, step: int, numbers: Mapping[str, float], media: Mapping[str, Any]) -> bytes:
    """The metrics of one record."""
    summary = _proto("compat.proto.summary").Summary()
    for name, value in numbers.items():
        summary.value.add(tag=name, simple_value=value)
    for name, value in media.items():
        summary.value.add(tag=name, **_media(name, value, step))
    return framed(_proto("compat.proto.event").Event(wall_time=seconds, step=step, summary=summary))


def _media(name: str, media: Any, step: int) -> dict[str, Any]:
    try:
        if isinstance(media, Text):
            return _text(media.data)
        if isinstance(media, Histogram):
            return {"histo": _histogram(media.data)}
        png = _figure(media.data) if isinstance(media, Figure) else _png(_picture(media))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StepError(f"{type(media).__name__} {name!r} at step {step} cannot be drawn: {error}") from error
    width, height = struct.unpack(">II", png[16:24])
    image = {"height": height, "width": width, "colorspace": _colorspace(png), "encoded_image_string": png}
    return {"image": _proto("compat.proto.summary").Summary.Image(**image)}


def _colorspace(png: bytes) -> int:
    return {0: 1, 2: 3, 4: 2, 6: 4}[png[25]]  # PNG's colour type to its number of channels


def _text(text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise TypeError(f"it must be text, but is {type(text).__name__}")
    tensor = _proto("compat.proto.tensor").TensorProto(dtype=_proto("compat.proto.types").DT_STRING, string_val=[text.encode()])
    tensor.tensor_shape.dim.add(size=1)
    metadata = _proto("compat.proto.summary").SummaryMetadata()
    metadata.plugin_data.plugin_name = "text"
    return {"tensor": tensor, "metadata": metadata}


def _histogram(data: Any) -> Any:
    """Equally wide bins over the finite values."""
    import numpy as np  # comes with tensorboard

    values = torch.as_tensor(data).detach().cpu().double().flatten()
    values = values[values.isfinite()].numpy()
    kind = _proto("compat.proto.summary").HistogramProto
    if not values.size:
        return kind(min=0, max=0, num=0, sum=0, sum_squares=0, bucket_limit=[0.0], bucket=[0.0])
    counts, edges = np.histogram(values, bins=_BINS)
    return kind(
        min=values.min(), max=values.max(), num=values.size, sum=values.sum(), sum_squares=values @ values,
        bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
    )  # fmt: skip


def _picture(image: Image) -> Tensor:
    """The picture as bytes, shape [C, H, W]; several of them in a grid."""
    data = torch.as_tensor(image.data).detach().cpu()
    if data.dim() == 2:
        data = data[None]
    if data.dim() not in (3, 4) or data.shape[-3] not in (1, 3, 4) or not data.numel():
        raise ValueError(f"it must have shape [H, W], [C, H, W] or [N, C, H, W] with 1, 3 or 4 channels, but has {list(image.data.shape)}")
    if data.is_floating_point():
        data = (data.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    elif data.dtype == torch.bool:
        data = data.to(torch.uint8) * 255
    elif data.dtype != torch.uint8:
        raise TypeError(f"its dtype must be floating (values in 0..1), uint8 or bool, but is {data.dtype}")
    return _grid(data) if data.dim() == 4 else data


def _grid(pictures: Tensor) -> Tensor:
    n, channels, height, width = pictures.shape
    across = math.ceil(math.sqrt(n))
    down = math.ceil(n / across)
    canvas = torch.zeros(channels, down * (height + _GAP) - _GAP, across * (width + _GAP) - _GAP, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // across * (height + _GAP), i % across * (width + _GAP)
        canvas[:, top : top + height, left : left + width] = picture
    return canvas


def _png(picture: Tensor) -> bytes:
    from PIL import Image as Pillow  # comes with tensorboard

    array = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
    out = io.BytesIO()
    Pillow.fromarray(array.contiguous().numpy()).save(out, "PNG")
    return out.getvalue()


def _figure(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def hparams_begin(seconds: float, hparams: Mapping[str, Any]) -> bytes:
    """What makes a run a row of the HParams tab; its last scalars are the row's metrics."""
    data = _proto("plugins.hparams.plugin_data").HParamsPluginData(version=0)
    info = data.session_start_info
    info.start_time_secs = seconds
    for name, value in leaves(dict(hparams)):
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[name].number_value = value
        else:
            info.hparams[name].string_value = str(value)
    return _hparams_event(seconds, "session_start_info", data)


def hparams_end(seconds: float) -> bytes:
    """What marks such a run as ended."""
    data = _proto("plugins.hparams.plugin_data").HParamsPluginData(version=0)
    data.session_end_info.status = _proto("plugins.hparams.api").STATUS_SUCCESS
    data.session_end_info.end_time_secs = seconds
    return _hparams_event(seconds, "session_end_info", data)


def _hparams_event(seconds: float, name: str, data: Any) -> bytes:
    summary = _proto("compat.proto.summary").Summary()
    value = summary.value.add(tag=f"_hparams_/{name}")
    value.metadata.plugin_data.plugin_name = "hparams"
    value.metadata.plugin_data.content = data.SerializeToString()
    value.tensor.dtype = _proto("compat.proto.types").DT_FLOAT  # an empty tensor: all there is to say stands in the metadata
    value.tensor.tensor_shape.dim.add(size=0)
    return framed(_proto("compat.proto.event").Event(wall_time=seconds, step=0, summary=summary))
