"""Malicious files: a clear error, in a process whose memory and time are limited."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fnlight.checkpoint.encode import decode, encode
from fnlight.checkpoint.listing import check_files
from fnlight.checkpoint.manifest import digest_of
from fnlight.checkpoint.migrations import FORMAT
from fnlight.errors import CheckpointError
from tests.checkpoint.golden import ASSETS, unpacked
from tests.repo.source import ROOT

KEPT = json.loads((ASSETS / f"format-{FORMAT}" / "momentum.json").read_text())
X = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def plain(header: str | bytes, tail: bytes = bytes(4), length: int | None = None) -> bytes:
    """The bytes of a safetensors file with a header of any kind."""
    text = header if isinstance(header, bytes) else header.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + tail


def entry(shape: str, offsets: str, dtype: str = "F32") -> str:
    """A header that lists one tensor."""
    return f'{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'


PLAIN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "a header beyond the end": lambda: plain("{}", length=1 << 62),
    "a header of many gigabytes": lambda: plain("{}", length=(1 << 64) - 1),
    "millions of tensors": lambda: plain(
        "{" + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1_200_000)) + "}", b""
    ),
    "a deep header": lambda: plain("[" * 5_000_000),
    "a shape that overflows": lambda: plain(entry("[4611686018427387904,4]", "[0,0]")),
    "a shape of nothing times too much": lambda: plain(entry("[0,4611686018427387903,4611686018427387903]", "[0,0]"), b""),
    "a huge shape": lambda: plain(entry("[1000000000000]", "[0,4000000000000]")),
    "a negative offset": lambda: plain(entry("[1]", "[-4,0]")),
    "offsets turned around": lambda: plain(entry("[1]", "[4,0]")),
    "offsets beyond the end": lambda: plain(entry("[2]", "[0,8]")),
    "tensors that overlap": lambda: plain(f'{{"x":{X},"y":{X}}}'),
    "a hole": lambda: plain(entry("[1]", "[4,8]"), bytes(8)),
    "bytes that nobody owns": lambda: plain(f'{{"x":{X}}}', bytes(8)),
    "a name twice": lambda: plain(f'{{"x":{X},"x":{X}}}'),
    "no number": lambda: plain(entry("[NaN]", "[0,4]")),
    "an unknown dtype": lambda: plain(entry("[1]", "[0,4]", "os.system")),
    "no JSON": lambda: plain(b"\xff\xfe{}"),
    "thousands of digits": lambda: plain(entry(f"[{'9' * 100_000}]", "[0,4]")),
}


def manifest(place: Path, change: Callable[[str], str]) -> None:
    """Another manifest, its digest right."""
    file = place / "state.json"
    rest = change(file.read_text().partition("\n")[2]).encode()
    file.write_bytes(f'{{"format": {FORMAT}, "digest": "{digest_of(rest)}",\n'.encode() + rest)


def added(text: str) -> Callable[[Path], Any]:
    """A manifest with more in its memory."""
    return lambda place: manifest(place, lambda old: old.replace('"memory": {', f'"memory": {{{text}, ', 1))


def terabytes(place: Path) -> None:
    """Weights of four terabytes that take no space, and a manifest that agrees."""
    count = 1 << 40
    head = plain(entry(f"[{count}]", f"[0,{4 * count}]"), b"")
    with (place / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 4 * count)
    listed = {"size": len(head) + 4 * count, "digest": "xxh3:" + "0" * 32, "tensors": {"x": ["float32", [count]]}}
    body = json.loads((place / "state.json").read_text())
    body["files"]["model.safetensors"] = listed
    body |= {"parameters": [], "optimizer": None}
    manifest(place, lambda old: json.dumps({key: value for key, value in body.items() if key not in ("format", "digest")})[1:] + "\n")


def sparse(place: Path) -> None:
    """A manifest of a gigabyte, which takes no space."""
    with (place / "state.json").open("r+b") as file:
        file.truncate(1 << 30)


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Something else in the place of a file."""

    def change(place: Path) -> None:
        (place / name).unlink()
        make(place / name)

    return change


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "a manifest of a gigabyte": sparse,
    "a manifest of millions of lists": added('"x": [' + "[]," * 30_000_000 + "[]]"),
    "numbers as keys that have one hash": added('"x": {"$dict": [' + ",".join(f"[{i * ((1 << 61) - 1)},0]" for i in range(40_000)) + "]}"),
    "complex numbers as keys that have one hash": added(
        '"x": {"$dict": [' + ",".join(f'[{{"$complex":[{1000003 * i}.0,{-i}.0]}},0]' for i in range(25_000)) + "]}"
    ),
    "a key of a dict twice": added('"x": {"$dict": [[1,0],[1,1]]}'),
    "a depth of 600": added('"x": ' + "[" * 600 + "]" * 600),
    "weights of terabytes": terabytes,
    "cuts without an end": lambda place: manifest(
        place, lambda old: old.replace('"layouts": []', '"layouts": [{"cuts": [' + ",".join(["[0,1]"] * 80_000) + '], "files": [0]}]')
    ),
    "a manifest that the system makes up": instead("state.json", lambda path: path.symlink_to("/proc/version")),
    "weights that the system makes up": instead("model.safetensors", lambda path: path.symlink_to("/proc/self/mem")),
    "a deep memory": added('"x": ' + "[" * 3_000_000 + "]" * 3_000_000),
    "one tensor a million times": added('"x": [' + '{"$tensor":"ema/0.weight"},' * 500_000 + "0]"),
    "a step of thousands of digits": lambda place: manifest(place, lambda old: old.replace('"step": 5', f'"step": {"9" * 4000}', 1)),
    "a number beyond all": lambda place: manifest(place, lambda old: old.replace('"seed": 7', '"seed": 1e999', 1)),
    "a history of lists": lambda place: manifest(place, lambda old: old.replace('"history": [', '"history": [[1, 1, {"a": [1]}], ', 1)),
    "a pipe for a manifest": instead("state.json", os.mkfifo),
    "a pipe for weights": instead("model.safetensors", os.mkfifo),
    "a device for a manifest": instead("state.json", lambda path: path.symlink_to("/dev/zero")),
    "a device for weights": instead("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
    "a folder for weights": instead("model.safetensors", Path.mkdir),
    "a link in a circle": instead("model.safetensors", lambda path: path.symlink_to(path)),
    "a link to a secret": instead("state.json", lambda path: (path.parent.parent.parent.joinpath("secret").write_text("hush"), path.symlink_to(path.parent.parent.parent / "secret"))),
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How every case ended, read in one process under limits."""
    folder = tmp_path_factory.mktemp("hostile") / "cases"
    folder.mkdir()
    for name, make in PLAIN.items():
        folder.joinpath(f"{name}.safetensors").write_bytes(make())
    for name, change in FOLDERS.items():
        change(unpacked(KEPT, folder / name))
    linked = unpacked(KEPT, folder / "links that are harmless")
    shutil.move(linked / "model.safetensors", folder.parent / "blob")
    (linked / "model.safetensors").symlink_to(folder.parent / "blob")
    os.link(linked / "optimizer.safetensors", folder.parent / "second name")
    command = [sys.executable, "-m", "tests.checkpoint.hostile", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are set from /proc")
@pytest.mark.parametrize("case", [*(f"{name}.safetensors" for name in PLAIN), *FOLDERS])
def test_a_hostile_file_is_refused_within_bounds(case: str, ended: dict[str, dict[str, Any]]) -> None:
    """A gigabyte of memory and a minute for all of them are more than enough, and the error is that for broken files."""
    assert ended[case]["end"].startswith("BrokenCheckpointError: ")
    assert "hush" not in ended[case]["end"]


def test_all_keys_of_one_hash_are_counted_before_a_dict_is_made_of_them() -> None:
    """Sixty-four are read, which no honest dict has; one more is refused, for each is compared with all before it."""
    pairs = [[i * ((1 << 61) - 1), i] for i in range(65)]
    assert len(decode({"$dict": pairs[:64]}, {}.__getitem__)) == 64
    with pytest.raises(ValueError, match="65 keys of a dict have one hash"):
        decode({"$dict": pairs}, {}.__getitem__)


def test_what_is_written_is_as_deep_as_what_is_read() -> None:
    """A tree of a hundred levels comes back, one of a hundred and one is refused on both sides."""
    tree: Any = 0
    for _ in range(101):
        tree = [tree]
    put: Any = None
    assert decode(encode(tree, put, "x"), put) == tree
    with pytest.raises(CheckpointError, match=r"x/0/0.* is nested too deeply, or contains itself: a checkpoint holds 100 containers"):
        encode([tree], put, "x")
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        decode([tree], put)


def test_more_parts_and_tensors_than_their_bytes_can_hold_are_refused() -> None:
    """Every pair of a part and a tensor is looked at, so that their number is held against what honest parts need for each."""
    parts = [[100, "xxh3:" + "0" * 32]] * 1000
    listed = {"parts": parts, "tensors": {str(i): ["uint8", [0]] for i in range(1000)}, "cut": {}}
    with pytest.raises(ValueError, match=r"files\.model\.safetensors lists 1000 tensors in 1000 parts, whose sizes are too small"):
        check_files({"model.safetensors": listed}, [])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are set from /proc")
def test_links_to_files_are_followed(ended: dict[str, dict[str, Any]]) -> None:
    """What a link leads to is only data as well, and caches of downloads are made of links."""
    assert ended["links that are harmless"]["end"] == "read"
