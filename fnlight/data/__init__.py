"""Data as a function of (seed, epoch).

`Source` reads any loader in keyed order and from any batch on; `batches` makes of it the endless stream of `Item`s that a run
consumes; `TensorLoader` cuts batches out of tensors that lie in memory; `per_epoch` makes the loader of each epoch; `LengthBuckets` makes batches of about equally long samples; `Loaders` holds the loaders of a run; `zip_shortest`, `zip_longest` and `concat` join several into one.
"""

from fnlight.data.buckets import LengthBuckets
from fnlight.data.combine import Combined, concat, zip_longest, zip_shortest
from fnlight.data.digest import digest_of
from fnlight.data.item import Item, Loaders, batches
from fnlight.data.kept import check_data, kept_by, without_digests
from fnlight.data.known import inexact, is_plain
from fnlight.data.order import length_of
from fnlight.data.part import Part
from fnlight.data.per_epoch import PerEpoch, per_epoch
from fnlight.data.place import placed
from fnlight.data.prepare import prepare
from fnlight.data.samples import num_samples
from fnlight.data.share import Sharded, Share, cut, sharded
from fnlight.data.source import Source
from fnlight.data.tensor_loader import TensorLoader

__all__ = [
    "Combined",
    "Item",
    "LengthBuckets",
    "Loaders",
    "PerEpoch",
    "Sharded",
    "Source",
    "TensorLoader",
    "batches",
    "concat",
    "per_epoch",
    "prepare",
    "sharded",
    "zip_longest",
    "zip_shortest",
]
