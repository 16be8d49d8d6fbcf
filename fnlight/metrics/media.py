"""Values that sinks show: images, histograms, figures and text. Of several, the last one is kept."""

from typing import Any

import attrs


@attrs.frozen(eq=False)
class Image:
    """A picture, or a batch of them drawn as a grid, for the sinks that show pictures.

    Args:
        data: A tensor, shape [C, H, W], [H, W] or [N, C, H, W]; floats in 0..1 or uint8.

    Example:
        >>> import torch
        >>> Image(torch.zeros(3, 8, 8)).data.shape
        torch.Size([3, 8, 8])
    """

    data: Any


@attrs.frozen(eq=False)
class Histogram:
    """The distribution of a tensor's values, for the sinks that show histograms.

    Args:
        data: A tensor of any shape.

    Example:
        >>> import torch
        >>> Histogram(torch.arange(3.0)).data.numel()
        3
    """

    data: Any


@attrs.frozen(eq=False)
class Figure:
    """A matplotlib figure, for the sinks that show pictures.

    Args:
        data: A ``matplotlib.figure.Figure``.

    Example:
        >>> Figure(None).data
    """

    data: Any


@attrs.frozen(eq=False)
class Text:
    """A piece of text, for the sinks that show text.

    Args:
        data: The text; TensorBoard reads it as Markdown.

    Example:
        >>> Text("a *note*").data
        'a *note*'
    """

    data: str


MEDIA = (Image, Histogram, Figure, Text)
