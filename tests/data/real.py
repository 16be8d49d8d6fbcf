"""Loaders of real packages, one a row of the table in docs/loaders.md; none of the packages is imported before its row is made."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, get_worker_info

import fnlight as fl

ROWS, SIZE = 40, 8  # rows, and rows a batch


@attrs.frozen(eq=False)
class Kind:
    """A loader of a package: how it is made, and what the table says of it.

    Args:
        name: The first column.
        package: What must be installed.
        make: ``(folder, workers) -> loader``.
        resumes: ``"exact"``, or ``"refused"`` where it cannot be resumed.
        skip: ``"free"``, or ``"reads"`` what was done.
        workers: The numbers of workers that are tried.
        orders: Whether epochs have orders of their own.
    """

    name: str
    package: str
    make: Callable[[Path, int], Any]
    resumes: str = "exact"
    skip: str = "reads"
    workers: tuple[int, ...] = (0, 2)
    orders: bool = True

    @property
    def there(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.package) is not None


class Noisy(Dataset[Any]):
    """Rows with noise."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)]) + torch.rand(1) / 8


class NoisyStream(IterableDataset[Any]):
    """A stream of rows with noise, which workers share."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        for index in range(ROWS) if info is None else range(info.id, ROWS, info.num_workers):
            yield torch.tensor([float(index)]) + torch.rand(1) / 8


def _torchdata(data: Any, workers: int, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(data, batch_size=SIZE, num_workers=workers, **options)


def _rows() -> Any:
    import datasets

    return datasets.Dataset.from_dict({"x": [[float(i)] for i in range(ROWS)]}).with_format("torch")


def _stream() -> Any:
    return _rows().to_iterable_dataset(num_shards=4).with_format("torch")


def _shuffled() -> Any:
    return _stream().shuffle(seed=1, buffer_size=16)


def _shards(folder: Path, **options: Any) -> Any:
    import webdataset as wds

    if not (folder / "0.tar").exists():
        with wds.ShardWriter(f"{folder}/%d.tar", maxcount=10, verbose=0) as writer:
            for i in range(ROWS):
                writer.write({"__key__": f"{i:04}", "x.json": json.dumps([float(i)])})
    return wds.WebDataset(f"{folder}/{{0..3}}.tar", **{"shardshuffle": False, "empty_check": False, **options}).decode().map(_decoded)


def _decoded(sample: Any) -> Any:
    return torch.tensor(sample["x.json"])


def _web(pipeline: Any, workers: int) -> Any:
    return DataLoader(pipeline.batched(SIZE, collation_fn=torch.stack), batch_size=None, num_workers=workers)


def _web_loader(pipeline: Any, workers: int) -> Any:
    import webdataset as wds

    return wds.WebLoader(pipeline.batched(SIZE, collation_fn=torch.stack), batch_size=None, num_workers=workers)


def _web_per_epoch(folder: Path, workers: int) -> Any:
    return fl.per_epoch(
        lambda seed, epoch: _web(_shards(folder, shardshuffle=4, seed=seed + epoch).shuffle(16, seed=seed + epoch), workers)
    )


def _array_rows() -> Any:
    import numpy as np

    return [np.array([float(i)]) for i in range(ROWS)]


def _grain_loader(folder: Path, workers: int) -> Any:
    import grain.python as grain

    sampler = grain.IndexSampler(ROWS, shuffle=True, seed=1, num_epochs=1, shard_options=grain.NoSharding())
    return grain.DataLoader(data_source=_array_rows(), sampler=sampler, operations=[grain.Batch(SIZE)], worker_count=0)


def _grain(seed: int) -> Any:
    import grain

    return grain.MapDataset.source(_array_rows()).shuffle(seed=seed).batch(SIZE)


def _mosaic(folder: Path, workers: int, kind: str) -> Any:
    _torchvision()
    import streaming

    if not (folder / "index.json").exists():
        with streaming.MDSWriter(out=str(folder), columns={"x": "float64"}, size_limit=200) as writer:
            for i in range(ROWS):
                writer.write({"x": float(i)})
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=SIZE, num_canonical_nodes=1, shuffle_seed=1)
    return (streaming.StreamingDataLoader if kind == "own" else DataLoader)(data, batch_size=SIZE, num_workers=workers)


def _torchvision() -> None:
    """Where torchvision was built for another torch, what it looks for as it is imported is made known."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")  # it must live as long as the process
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["fnlight_tests_torchvision"] = library  # pyright: ignore[reportArgumentType]


def _graphs(folder: Path, workers: int) -> Any:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    edges = torch.tensor([[0, 1], [1, 2]])
    graphs = [Data(x=torch.full((3, 1), float(i)), edge_index=edges) for i in range(ROWS)]
    return GraphLoader(graphs, batch_size=SIZE, shuffle=True, num_workers=workers)


def _neighbours(folder: Path, workers: int) -> Any:
    from torch_geometric.data import Data
    from torch_geometric.loader import ShaDowKHopSampler

    edges = torch.randint(ROWS, (2, 200), generator=torch.Generator().manual_seed(0))
    graph = Data(x=torch.arange(float(ROWS))[:, None], edge_index=edges)
    return ShaDowKHopSampler(graph, depth=1, num_neighbors=3, batch_size=SIZE, shuffle=True, num_workers=workers)


def _same(batch: Any) -> Any:
    return batch


def _tensordict(folder: Path, workers: int) -> Any:
    from tensordict import TensorDict

    data = TensorDict({"x": torch.arange(float(ROWS))[:, None]}, batch_size=[ROWS])
    return DataLoader(data, batch_size=SIZE, shuffle=True, num_workers=workers, collate_fn=_same)  # pyright: ignore[reportArgumentType]


KINDS = (
    Kind("torchdata `StatefulDataLoader`, shuffled rows", "torchdata", lambda f, w: _torchdata(Noisy(), w, shuffle=True), skip="free"),
    Kind(
        "torchdata `StatefulDataLoader`, `SubsetRandomSampler`",
        "torchdata",
        lambda f, w: _torchdata(Noisy(), w, sampler=SubsetRandomSampler(range(ROWS))),
        skip="free",
    ),
    Kind("torchdata `StatefulDataLoader`, a stream", "torchdata", lambda f, w: _torchdata(NoisyStream(), w), orders=False),
    Kind(
        "Hugging Face `Dataset` in a `DataLoader`",
        "datasets",
        lambda f, w: DataLoader(_rows(), batch_size=SIZE, shuffle=True, num_workers=w),
        skip="free",
    ),
    Kind(
        "Hugging Face `IterableDataset` in a `DataLoader`", "datasets", lambda f, w: DataLoader(_shuffled(), batch_size=SIZE, num_workers=w)
    ),
    Kind("... not shuffled, in a `StatefulDataLoader`", "datasets", lambda f, w: _torchdata(_stream(), w), skip="free", orders=False),
    Kind("... shuffled, in a `StatefulDataLoader`", "datasets", lambda f, w: _torchdata(_shuffled(), w)),
    Kind("webdataset in `fl.per_epoch`", "webdataset", _web_per_epoch),
    Kind(
        "webdataset with `detshuffle`",
        "webdataset",
        lambda f, w: _web(_shards(f, shardshuffle=4, detshuffle=True, seed=1), w),
        workers=(0,),
    ),
    Kind(
        "webdataset `WebLoader`",
        "webdataset",
        lambda f, w: _web_loader(_shards(f, shardshuffle=4, detshuffle=True, seed=1), w),
        workers=(0,),
    ),
    Kind(
        "webdataset `.shuffle(n)` without a seed",
        "webdataset",
        lambda f, w: _web(_shards(f).shuffle(16), w),
        resumes="refused",
        workers=(0,),
    ),
    Kind("Grain `DataLoader`", "grain", _grain_loader, workers=(0,), orders=False),
    Kind("Grain `MapDataset`", "grain", lambda f, w: _grain(1), workers=(0,), orders=False),
    Kind("Grain `IterDataset`", "grain", lambda f, w: _grain(1).to_iter_dataset(), workers=(0,), orders=False),
    Kind(
        "Grain in `fl.per_epoch`, from any batch on",
        "grain",
        lambda f, w: fl.per_epoch(lambda seed, epoch, start: _grain(seed + epoch)[start:]),
        skip="free",
        workers=(0,),
    ),
    Kind("MosaicML `StreamingDataset` in a `DataLoader`", "streaming", lambda f, w: _mosaic(f, w, "plain")),
    Kind("MosaicML `StreamingDataLoader`", "streaming", lambda f, w: _mosaic(f, w, "own"), skip="free"),
    Kind("PyTorch Geometric `DataLoader`", "torch_geometric", _graphs, skip="free"),
    Kind("TensorDict in a `DataLoader`", "tensordict", _tensordict, skip="free"),
)


def table() -> str:
    """The table of docs/loaders.md."""
    lines = ["| loader | resumes | cost of a skip to batch k | workers | epochs differ |", "|---|---|---|---|---|"]
    for kind in KINDS:
        cost = {"free": "nothing is read", "reads": "k batches are read"}[kind.skip]
        workers, orders = " and ".join(map(str, kind.workers)), "yes" if kind.orders else "as its order says"
        lines.append(f"| {kind.name} | {kind.resumes} | {cost if kind.resumes == 'exact' else ''} | {workers} | {orders} |")
    return "\n".join(lines)
