"""Data as a function of (seed, epoch).

`Source` reads any loader in keyed order, from any batch on; `batches` turns it into the endless stream of `Item`s that a run
consumes; `TensorLoader` makes batches from tensors in memory; `LengthBuckets` makes batches of samples of similar length; `Loaders` holds the loaders of a run; `zip_shortest`, `zip_longest` and `concat` join several loaders into one.
"""

from fnlight.data.buckets import LengthBuckets
from fnlight.data.combine import Combined, concat, zip_longest, zip_shortest
from fnlight.data.item import Item, Loaders, batches
from fnlight.data.order import length_of
from fnlight.data.part import Part
from fnlight.data.place import placed
from fnlight.data.samples import num_samples
from fnlight.data.share import Sharded, Share, cut, sharded
from fnlight.data.source import Source
from fnlight.data.tensor_loader import TensorLoader

__all__ = [
    "Combined",
    "Item",
    "LengthBuckets",
    "Loaders",
    "Sharded",
    "Source",
    "TensorLoader",
    "batches",
    "concat",
    "sharded",
    "zip_longest",
    "zip_shortest",
]
