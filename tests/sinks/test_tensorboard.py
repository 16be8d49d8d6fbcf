"""`TensorBoard`: real event files, read back by TensorBoard's own readers."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure as Drawing
from tensorboard import context
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from fnlight.errors import ConfigError, StepError
from fnlight.metrics import Figure, Histogram, Image, Mean, Text
from fnlight.sinks import TensorBoard
from fnlight.state import Record
from tests.repo.source import ROOT


def read(folder: Path) -> EventAccumulator:
    """What TensorBoard finds in a directory."""
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    return found


def write(folder: Path, *records: Record, **options: Any) -> EventAccumulator:
    """Write records, close, and read them back."""
    sink = TensorBoard(folder, **options)
    for record in records:
        sink(record)
    sink.close()
    return read(folder)


def pixels(folder: Path, picture: Any) -> np.ndarray:
    """The pixels that TensorBoard shows of a picture, shape [H, W] or [H, W, C]."""
    (event,) = write(folder, Record(1, 0, {"picture": picture})).Images("picture")
    shown = PIL.Image.open(io.BytesIO(event.encoded_image_string))
    assert (event.width, event.height) == shown.size
    return np.asarray(shown)


def curve(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    """The steps and values of a scalar."""
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_scalars_are_read_back(tmp_path: Path) -> None:
    """Numbers, tensors of any dtype, monoids and infinities are points of a curve."""
    found = write(
        tmp_path,
        Record(10, 0, {"train/loss": 0.5, "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": Mean(3.0, 2)}),
        Record(20, 1, {"train/loss": float("inf"), "b": True}),
    )
    assert found.Tags()["scalars"] == ["train/loss", "b", "c"]
    assert curve(found, "train/loss") == [(10, 0.5), (20, float("inf"))]
    assert curve(found, "b") == [(10, 1.5), (20, 1.0)]
    assert curve(found, "c") == [(10, 1.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_grey_picture_has_its_pixels(dtype: torch.dtype, tmp_path: Path) -> None:
    """Floats in 0..1 of any precision become bytes; what lies outside is clipped and NaN is black."""
    picture = torch.tensor([[0.0, 0.5, 1.0], [-3.0, 7.0, float("nan")]], dtype=dtype, requires_grad=True)
    assert pixels(tmp_path, Image(picture)).tolist() == [[0, 128, 255], [0, 255, 0]]


def test_bytes_and_bools_are_pixels_as_they_are(tmp_path: Path) -> None:
    """uint8 is taken as it is, and True is white."""
    assert pixels(tmp_path / "a", Image(torch.tensor([[[0, 7, 255]]], dtype=torch.uint8))).tolist() == [[0, 7, 255]]
    assert pixels(tmp_path / "b", Image(torch.tensor([[True, False]]))).tolist() == [[255, 0]]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_coloured_picture_has_its_channels(channels: int, tmp_path: Path) -> None:
    """A picture of shape [C, H, W] keeps its channels; NumPy arrays do as well."""
    picture = torch.arange(channels * 6, dtype=torch.uint8).reshape(channels, 2, 3)
    assert np.array_equal(pixels(tmp_path / "a", Image(picture)), picture.permute(1, 2, 0).numpy())
    assert np.array_equal(pixels(tmp_path / "b", Image(picture.numpy())), picture.permute(1, 2, 0).numpy())


def test_a_batch_of_pictures_is_a_grid(tmp_path: Path) -> None:
    """Five pictures stand in two rows of three, two pixels apart, in reading order."""
    batch = torch.stack([torch.full((1, 3, 4), 40 * (i + 1), dtype=torch.uint8) for i in range(5)])
    shown = pixels(tmp_path, Image(batch))
    assert shown.shape == (2 * 3 + 2, 3 * 4 + 2 * 2)
    assert [int(shown[r, c]) for r in (0, 5) for c in (0, 6, 12)] == [40, 80, 120, 160, 200, 0]
    assert not shown[3:5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_histogram_counts_every_value(dtype: torch.dtype, tmp_path: Path) -> None:
    """Counts, bounds and sums are those of the values, whatever their dtype and shape."""
    values = torch.tensor([[0, 1, 1], [3, 3, 3]]).to(dtype)
    (event,) = write(tmp_path, Record(1, 0, {"weights": Histogram(values)})).Histograms("weights")
    found, numbers = event.histogram_value, values.double()
    assert (found.min, found.max, found.num, found.sum) == (numbers.min(), numbers.max(), 6, numbers.sum())
    assert found.sum_squares == numbers.square().sum()
    assert sum(found.bucket) == 6
    filled = [(limit, count) for limit, count in zip(found.bucket_limit, found.bucket, strict=True) if count]
    assert [count for _, count in filled] == ([1, 5] if dtype == torch.bool else [1, 2, 3])
    assert filled[-1][0] == numbers.max()


def test_a_histogram_leaves_out_what_has_no_place(tmp_path: Path) -> None:
    """NaN and infinities are not counted; where nothing is left the histogram is empty; equal values fill one bin."""
    nan, inf = float("nan"), float("inf")
    shown = {"a": Histogram(torch.tensor([1.0, nan, inf, 1.0])), "b": Histogram(torch.tensor([nan])), "c": Histogram(torch.zeros(0))}
    found = write(tmp_path, Record(1, 0, shown))
    counts = {name: found.Histograms(name)[0].histogram_value for name in shown}
    assert {name: (value.num, sum(value.bucket)) for name, value in counts.items()} == {"a": (2, 2), "b": (0, 0), "c": (0, 0)}


def test_a_figure_is_drawn_and_stays_usable(tmp_path: Path) -> None:
    """A matplotlib figure is a picture of its size, and the figure is the caller's as before."""
    drawing = Drawing(figsize=(2, 1), dpi=50)
    drawing.add_subplot().plot([1, 2, 3])
    shown = pixels(tmp_path, Figure(drawing))
    assert shown.shape == (50, 100, 4)
    assert len(np.unique(shown)) > 2
    assert len(drawing.axes) == 1


def test_a_text_is_read_back(tmp_path: Path) -> None:
    """A text stands in the Text tab, letter by letter."""
    found = write(tmp_path, Record(5, 0, {"note": Text("a *note*, ünïcode")}))
    (event,) = found.Tensors("note")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (5, "a *note*, ünïcode")
    assert found.SummaryMetadata("note").plugin_data.plugin_name == "text"


def test_all_kinds_in_one_record(tmp_path: Path) -> None:
    """A record may hold numbers and media together, and one event file holds them all."""
    shown = {"loss": 0.5, "i": Image(torch.zeros(2, 2)), "h": Histogram(torch.ones(3)), "f": Figure(Drawing()), "t": Text("x")}
    tags = write(tmp_path, Record(1, 0, shown)).Tags()
    assert {kind: tags[kind] for kind in ("scalars", "images", "histograms", "tensors")} == {
        "scalars": ["loss"], "images": ["i", "f"], "histograms": ["h"], "tensors": ["t"],
    }  # fmt: skip
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_a_resumed_run_has_no_zigzag(tmp_path: Path) -> None:
    """What earlier files say of the steps from the first new one on is no longer shown, and nothing else is lost."""
    for first in (10, 30, 20):
        found = write(
            tmp_path, *(Record(step, 0, {"loss": step + first / 100, "t": Text(f"{first}")}) for step in range(first, first + 30, 10))
        )
    assert [step for step, _ in curve(found, "loss")] == [10, 20, 30, 40]
    assert [round(value % 1, 2) for _, value in curve(found, "loss")] == [0.1, 0.2, 0.2, 0.2]
    server = PluginAccumulator(str(tmp_path))  # the reader behind the tabs, which takes everything for a tensor
    server.Reload()
    assert [event.step for event in server.Tensors("loss")] == [10, 20, 30, 40]
    assert [event.tensor_proto.string_val[0].decode() for event in server.Tensors("t")] == ["10", "20", "20", "20"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_that_starts_over_without_closing_has_no_zigzag(tmp_path: Path) -> None:
    """A step below the last one counts as reopening."""
    assert curve(write(tmp_path, *(Record(step, 0, {"a": 1.0}) for step in (10, 20, 30, 15, 20))), "a") == [(10, 1.0), (15, 1.0), (20, 1.0)]


def test_a_file_torn_anywhere_does_not_hide_the_next_one(tmp_path: Path) -> None:
    """Wherever a killed run broke off, TensorBoard shows its whole records and those of the resumed run."""
    write(tmp_path / "whole", Record(1, 0, {"a": 1.0}), Record(2, 0, {"a": 2.0}))
    (whole,) = (tmp_path / "whole").iterdir()
    data = whole.read_bytes()
    for cut in (0, 5, 40, len(data) // 2, len(data) - 20, len(data) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / whole.name).write_bytes(data[:cut])
        found = curve(write(folder, Record(3, 0, {"a": 3.0})), "a")
        assert found[-1] == (3, 3.0)
        assert found[:-1] == [(1, 1.0), (2, 2.0)][: len(found) - 1]


def test_files_sort_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    """Each file's name sorts behind all others, also of one second or of a clock that was ahead."""
    (tmp_path / "events.out.tfevents.9999999000.elsewhere.1.0").write_bytes(b"")
    for step in (1, 2, 3):
        write(tmp_path, Record(step, 0, {"a": float(step)}))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    steps = [event.step for name in names[1:] for event in EventFileLoader(str(tmp_path / name)).Load() if event.HasField("summary")]
    assert steps == [1, 2, 3]


def hparams_tab(folder: Path) -> list[Any]:
    """The rows of the HParams tab, from the very code that fills it."""
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=10, allowed_statuses=statuses, aggregation_type=api_pb2.AGGREGATION_AVG, include_metrics=True
    )
    return list(list_session_groups.Handler(context.RequestContext(), backend, "", request).run().session_groups)


def test_the_hparams_tab_compares_runs_with_their_final_metrics(tmp_path: Path) -> None:
    """Two runs are two rows: their hyperparameters, nested ones by path, and the last value of each metric."""
    for name, lr in (("a", 0.1), ("b", 0.2)):
        given = {"lr": lr, "model": {"layers": 2, "act": "relu", "bias": True}, "note": None}
        write(tmp_path / name, Record(1, 0, {"val/loss": 9.0}), Record(2, 1, {"val/loss": lr / 2}), hparams=given)
    tab = sorted(hparams_tab(tmp_path), key=lambda group: group.name)
    assert [group.name for group in tab] == ["a", "b"]
    values = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in tab[1].hparams.items()}
    assert values == {"lr": 0.2, "model/layers": 2.0, "model/act": "relu", "model/bias": True, "note": "None"}
    metrics = [[(m.name.tag, round(m.value, 6), m.training_step) for m in group.metric_values] for group in tab]
    assert metrics == [[("val/loss", 0.05, 2)], [("val/loss", 0.1, 2)]]
    assert [session.status for group in tab for session in group.sessions] == [api_pb2.STATUS_SUCCESS] * 2


def test_a_run_that_is_under_way_or_resumed_keeps_its_row(tmp_path: Path) -> None:
    """The row is there before the run ends, and stays one row when it goes on from its first step."""
    sink = TensorBoard(tmp_path / "a", hparams={"lr": 0.1})
    sink(Record(0, 0, {"loss": 1.0}))
    assert [list(group.hparams) for group in hparams_tab(tmp_path)] == [["lr"]]
    sink.close()
    sink(Record(0, 0, {"loss": 2.0}))
    sink.close()
    (row,) = hparams_tab(tmp_path)
    assert [metric.value for metric in row.metric_values] == [2.0]


@pytest.mark.parametrize(
    "picture, message",
    [
        (Image(torch.zeros(2, 5, 5)), r"Image 'x' at step 3 cannot be drawn: it must have shape \[H, W\], .* but has \[2, 5, 5\]"),
        (Image(torch.zeros(0, 3, 5, 5)), r"Image 'x' at step 3 cannot be drawn: it must have shape"),
        (Image(torch.zeros(5, 5, dtype=torch.int64)), r"its dtype must be floating \(values in 0..1\), uint8 or bool, but is torch.int64"),
        (Figure("a figure"), r"Figure 'x' at step 3 cannot be drawn: 'str' object has no attribute 'savefig'"),
        (Histogram("numbers"), r"Histogram 'x' at step 3 cannot be drawn"),
        (Text(3), r"Text 'x' at step 3 cannot be drawn: it must be text, but is int"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_media_that_cannot_be_drawn_are_named(picture: Any, message: str, tmp_path: Path) -> None:
    """The error names the metric, the step and what is wrong, and writes nothing."""
    with pytest.raises(StepError, match=message):
        TensorBoard(tmp_path)(Record(3, 0, {"x": picture}))
    assert list(tmp_path.iterdir()) == []


def test_hparams_must_be_a_mapping() -> None:
    """Anything else is refused when the sink is made."""
    with pytest.raises(ConfigError, match=r"TensorBoard\(hparams=...\) must be a mapping of names to values, but got list"):
        TensorBoard("a", hparams=[1])  # pyright: ignore[reportArgumentType]


def test_it_is_light_and_quiet(tmp_path: Path) -> None:
    """In a process of its own: nothing heavy before the first record, then no TensorFlow, no thread and no word on any stream."""
    program = """
import sys, threading, warnings
warnings.simplefilter("error")
import torch
from fnlight.metrics import Histogram, Image, Text
from fnlight.sinks import TensorBoard
from fnlight.state import Record
sink = TensorBoard(sys.argv[1], hparams={"lr": 0.1})
assert not {"tensorboard", "PIL", "rich"} & sys.modules.keys()
sink(Record(1, 0, {"a": 1.0, "i": Image(torch.zeros(2, 2)), "h": Histogram(torch.zeros(2)), "t": Text("x")}))
sink.flush()
sink.close()
assert not {"tensorflow", "torch.utils.tensorboard", "matplotlib"} & sys.modules.keys()
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
