"""Laws of loaders of real packages: `pip install -e ".[test,test-data]"` brings them, and what is absent is skipped, saying so."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fnlight as fl
from tests.data.real import KINDS, ROWS, SIZE, Kind, table
from tests.repo.source import ROOT

PIP = 'pip install -e ".[test,test-data]"'
MOSAIC = 'pip install mosaicml-streaming==0.13.0, then pip install "transformers>=5.20" datasets==5.2.0 again'
STEPS = 2 * ROWS // SIZE + 3
TRIED = [pytest.param(kind, workers, id=f"{kind.name}, {workers} workers") for kind in KINDS for workers in kind.workers]


@pytest.fixture(autouse=True)
def _leaves_no_traces() -> None:
    """Other packages set variables of the environment and levels of logging as they are imported."""


pytestmark = pytest.mark.filterwarnings("default")  # other packages warn of this and that


def rows(batch: Any) -> Any:
    """The rows of a batch of any package."""
    found = getattr(batch, "x", None)
    if found is None:
        found = batch["x"] if not isinstance(batch, torch.Tensor) and callable(getattr(batch, "keys", None)) else batch
    return torch.as_tensor(found).double().reshape(-1, 1)


def run(loader: Any, steps: int, **options: Any) -> list[Any]:
    """What the steps of a run see."""
    seen = []

    def train_step(model: Any, batch: Any) -> Any:
        seen.append(rows(batch).flatten().tolist())
        return model(rows(batch).float()).square().mean()

    task = fl.Task(nn.Linear(1, 1), train_step, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=1e-6))
    fl.fit(fl.TrainState.create(task, seed=3), loader, fl.FitConfig(max_steps=steps, progress=False, **options))
    return seen


def needs(kind: Kind) -> None:
    """Skip a row whose package is absent, saying how to get it."""
    if not kind.there:
        pytest.skip(f"needs {kind.package}: {PIP if kind.package != 'streaming' else MOSAIC}")


@pytest.mark.parametrize("kind, workers", TRIED)
def test_a_resumed_run_reads_what_the_whole_one_does(kind: Kind, workers: int, tmp_path: Path) -> None:
    """In the middle of an epoch and at its end, or it is refused; batches are read again only where the table says so."""
    needs(kind)
    data = tmp_path / "data"
    data.mkdir()
    whole = run(kind.make(data, workers), STEPS)
    for done in (2, 5, 7, 10):
        folder = str(tmp_path / str(done))
        first = run(kind.make(data, workers), done, dir=folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if kind.resumes == "refused":
                with pytest.raises(fl.errors.LoaderError, match="not what it was|does not begin epoch"):
                    run(kind.make(data, workers), STEPS, dir=folder, resume=True)
                continue
            assert first + run(kind.make(data, workers), STEPS, dir=folder, resume=True) == whole, f"resumed at step {done}"
        reads = any("are read and thrown away" in str(each.message) for each in caught)
        assert reads <= (kind.skip == "reads"), f"resumed at step {done}: the table says that nothing is read"


@pytest.mark.parametrize("kind, workers", [each for each in TRIED if each.values[0].resumes == "exact"])
def test_a_second_run_on_one_loader_is_the_first_one_again(kind: Kind, workers: int, tmp_path: Path) -> None:
    """A run leaves the loader as it found it; and epochs differ where the table says so."""
    needs(kind)
    loader = kind.make(tmp_path, workers)
    first = run(loader, STEPS)
    assert run(loader, STEPS) == first
    per_epoch = ROWS // SIZE
    assert (first[:per_epoch] != first[per_epoch : 2 * per_epoch]) or not kind.orders


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.resumes == "refused"], ids=lambda kind: kind.name)
def test_what_cannot_be_resumed_is_said_as_a_run_that_saves_begins(kind: Kind, tmp_path: Path) -> None:
    """Once, with the line to change."""
    needs(kind)
    with pytest.warns(fl.errors.LoaderWarning, match="can be saved, but not resumed exactly.*seed"):
        run(kind.make(tmp_path, 0), 1, dir=str(tmp_path / "run"))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_bare_data_set_of_hugging_face_is_refused(lazy: bool) -> None:
    """It gives rows, not batches, as a data set of torch does."""
    datasets = pytest.importorskip("datasets", reason=f"needs datasets: {PIP}")
    data = datasets.Dataset.from_dict({"x": [1, 2]})
    with pytest.raises(TypeError, match="but got the dataset .*wrap it: DataLoader"):
        fl.Loaders(train=data.to_iterable_dataset() if lazy else data)


def test_random_transforms_of_monai_are_keyed() -> None:
    """What a transform draws for a sample does not depend on workers or on what was read before."""
    monai = pytest.importorskip("monai.transforms", reason=f"needs monai: {PIP}")
    transform = monai.Compose([monai.RandGaussianNoise(prob=1.0), monai.RandScaleIntensity(0.5, prob=1.0)])
    check_transform(lambda index: transform(torch.full((1, 2, 2), float(index))).as_tensor())


def test_random_transforms_of_albumentations_are_keyed() -> None:
    """What a transform draws for a sample does not depend on workers or on what was read before."""
    albumentations = pytest.importorskip("albumentations", reason=f"needs albumentations: {PIP}")
    numpy = pytest.importorskip("numpy")
    transform = albumentations.Compose([albumentations.RandomBrightnessContrast(p=1.0), albumentations.HorizontalFlip(p=0.5)])
    picture = numpy.arange(48, dtype=numpy.uint8).reshape(4, 4, 3)
    check_transform(lambda index: torch.from_numpy(transform(image=picture + index)["image"].copy()))


class Transformed(torch.utils.data.Dataset[Any]):
    """Rows that are transformed as they are read."""

    def __init__(self, read: Any, transform: Any) -> None:
        self.read, self.transform = read, transform

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


def check_transform(read: Any) -> None:
    """Read rows with 0 and 2 workers, and from the middle on."""
    (transform,) = (cell.cell_contents for cell in read.__closure__ if type(cell.cell_contents).__name__ == "Compose")
    found = []
    for workers, start in ((0, 0), (2, 0), (0, 2)):
        loader = torch.utils.data.DataLoader(Transformed(read, transform), batch_size=2, shuffle=True, num_workers=workers)
        found.append([batch.tolist() for batch, _, _ in fl.data.Source(loader).epoch(0, 1, start)])
    assert found[0] == found[1]
    assert found[0][2:] == found[2]


def test_the_page_shows_the_table() -> None:
    """docs/loaders.md holds what is tried here, row by row."""
    assert table() in (ROOT / "docs" / "loaders.md").read_text(encoding="utf-8"), f"put this into docs/loaders.md:\n{table()}"


def test_the_extra_pins_what_is_tried() -> None:
    """Versions are exact: what a package does is known of those."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = json.loads("[" + text.split("test-data = [", 1)[1].split("]", 1)[0].strip().rstrip(",") + "]")
    assert all("==" in each for each in pinned)
