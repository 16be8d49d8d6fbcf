"""Weights from plain safetensors files, whole or in part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fnlight.checkpoint import load_weights, save, step_path
from fnlight.errors import BrokenCheckpointError, CheckpointError, MismatchError
from fnlight.state import Task, TrainState
from tests.checkpoint.tasks import content, files, trained, unlike


def linear(**options: Any) -> TrainState:
    """A state of one layer."""
    return TrainState.create(Task(nn.Sequential(nn.Linear(2, 1, **options)).requires_grad_(requires_grad=False), train_step=max))


def test_a_plain_file_fills_the_weights_and_nothing_else(tmp_path: Path) -> None:
    """Weights of any writer are taken by name; the state that was given stays as it was."""
    state, file = trained(), tmp_path / "a.safetensors"
    before = state.copy()
    tensors = {name: torch.randn_like(p) for name, p in state.params.items()}
    save_file({**tensors, "norm.running_mean": torch.ones(4), **_rest(state)}, file)
    found, report = load_weights(state, file)
    assert report.fits
    assert len(report.loaded) == len(tensors) + 4
    assert all(found.params[name].equal(tensor) for name, tensor in tensors.items())
    assert found.buffers["norm.running_mean"].tolist() == [1.0] * 4
    assert found.module().head.weight is found.store.module.head.weight or found.params["embed.weight"].equal(tensors["embed.weight"])
    assert {k: v for k, v in content(found).items() if k in ("progress", "rest")} == {k: content(state)[k] for k in ("progress", "rest")}
    assert unlike(state, before) == []


def _rest(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: b.contiguous() for name, b in state.buffers.items() if name not in ("seen", "norm.running_mean")}


def test_weights_are_strict_unless_asked(tmp_path: Path) -> None:
    """What differs is an error with all names, or, when partial, a report with all names."""
    state, file = linear(), tmp_path / "a.safetensors"
    save_file({"0.weight": torch.ones(1, 3), "1.weight": torch.ones(2)}, file)
    with pytest.raises(
        MismatchError, match=r"0 loaded, 1 missing, 1 unexpected, 1 mismatched\n(.*\n)*Pass partial=True to load those that match"
    ):
        load_weights(state, file)
    found, report = load_weights(state, file, partial=True)
    assert (report.loaded, dict(report.missing), dict(report.unexpected)) == ((), {"0.bias": "float32 [1]"}, {"1.weight": "float32 [2]"})
    assert dict(report.mismatched) == {"0.weight": ("float32 [1, 3]", "float32 [1, 2]")}
    assert not report.fits
    assert unlike(found, state) == []


def test_a_partial_load_takes_what_fits(tmp_path: Path) -> None:
    """Names that fit are loaded, and counted."""
    save_file({"0.bias": torch.full((1,), 9.0)}, tmp_path / "a.safetensors")
    found, report = load_weights(linear(), tmp_path / "a.safetensors", partial=True)
    assert report.loaded == ("0.bias",)
    assert found.params["0.bias"].item() == 9.0


def test_floating_point_is_converted_and_said(tmp_path: Path) -> None:
    """Half weights fill a float model; integers do not."""
    save_file({"0.weight": torch.ones(1, 2).half(), "0.bias": torch.ones(1).half()}, tmp_path / "a.safetensors")
    found, report = load_weights(linear(), tmp_path / "a.safetensors")
    assert found.params["0.weight"].dtype == torch.float32
    assert report.converted["0.bias"] == ("float16 [1]", "float32 [1]")
    assert "2 loaded, 2 converted" in str(report)
    save_file({"0.weight": torch.ones(1, 2).int(), "0.bias": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(MismatchError, match=r"0\.weight +int32 \[1, 2\] +float32 \[1, 2\]"):
        load_weights(linear(), tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "rename", [{"body.weight": "0.weight", "body.bias": "0.bias", "step": "x"}, lambda name: name.replace("body", "0")]
)
def test_names_may_be_mapped(tmp_path: Path, rename: Any) -> None:
    """A mapping or a function translates the names of the file."""
    save_file({"body.weight": torch.ones(1, 2), "body.bias": torch.ones(1)}, tmp_path / "a.safetensors")
    state, report = load_weights(linear(), tmp_path / "a.safetensors", rename=rename)
    assert report.fits
    assert [p.flatten().tolist() for p in state.params.values()] == [[1.0, 1.0], [1.0]]


def test_names_may_be_left_out_but_not_joined(tmp_path: Path) -> None:
    """A function that gives None leaves a tensor out; two tensors under one name are an error."""
    save_file({"0.weight": torch.ones(1, 2), "0.bias": torch.ones(1), "head": torch.ones(1)}, tmp_path / "a.safetensors")
    assert load_weights(linear(), tmp_path / "a.safetensors", rename=lambda name: None if name == "head" else name)[1].fits
    with pytest.raises(CheckpointError, match=r"rename= maps two tensors of the file to '0\.bias', 'head' is the second"):
        load_weights(linear(), tmp_path / "a.safetensors", rename={"head": "0.bias"}, partial=True)


@pytest.mark.parametrize("names", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
def test_tied_weights_are_found_under_any_of_their_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Other writers name a tied weight once under either name, or twice."""
    state = trained()
    tensors = {name: p.clone() for name, p in state.params.items() if name != "embed.weight"}
    save_file(
        {**tensors, **_rest(state), **{name: torch.ones(6, 4) for name in names}, "norm.running_mean": torch.ones(4)},
        tmp_path / "a.safetensors",
    )
    found, report = load_weights(state, tmp_path / "a.safetensors")
    assert report.fits
    assert found.params["embed.weight"].equal(torch.ones(6, 4))


def test_a_checkpoint_gives_its_weights(tmp_path: Path) -> None:
    """The directory of a checkpoint, its model file, and a run's directory all hold weights."""
    state = trained()
    path = save(state, step_path(tmp_path / "a", 2))
    for source in (path, f"{path}/model.safetensors", tmp_path / "a"):
        found, report = load_weights(trained(seed=9, steps=0), source)
        assert report.fits
        assert all(found.params[name].equal(p) for name, p in state.params.items())
    assert len(files(path)) == 4


def test_a_torn_file_is_an_error(tmp_path: Path) -> None:
    """A safetensors file that is cut short is named."""
    file = tmp_path / "a.safetensors"
    save_file({"0.weight": torch.ones(1, 2)}, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BrokenCheckpointError, match=r"a\.safetensors cannot be read as a safetensors file"):
        load_weights(linear(), file)
