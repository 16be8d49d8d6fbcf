"""Bytes from anybody in the place of a checkpoint: the readers refuse them with an error of their own, or read them.

As a program it fuzzes with coverage: ``pip install atheris && python -m tests.fuzz.checkpoints -max_total_time=600``; the suite runs the
same attempts on mutations that a seed gives (`test_mutations`).
"""

import json
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import fnlight as fl
from fnlight.checkpoint.manifest import digest_of
from fnlight.checkpoint.migrations import FORMAT
from tests.checkpoint.golden import ASSETS, case_of, unpacked

KEPT = {name: json.loads(path.read_text()) for path in sorted((ASSETS / f"format-{FORMAT}").glob("*.json")) for name in [path.stem]}
TASKS = {name: case_of(kept["case"]).task() for name, kept in KEPT.items()}
REFUSED = (fl.errors.BrokenCheckpointError, fl.errors.MismatchError, fl.errors.CheckpointError)


class Attempt:
    """What is tried on bytes.

    Args:
        folder: An empty folder, best in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.names = list(KEPT)
        self.places = {name: unpacked(KEPT[name], folder / name) for name in self.names}
        self.manifests = {name: place.joinpath("state.json").read_bytes() for name, place in self.places.items()}
        self.plain = folder / "plain.safetensors"
        self.states = {name: fl.TrainState.create(task) for name, task in TASKS.items()}

    def corpus(self) -> list[bytes]:
        """What the mutations begin with: sound manifests and sound weights, each with a byte that says what it is."""
        bodies = [self.manifests[name].partition(b"\n")[2] for name in self.names]
        models = [min(self.places[name].glob("model*.safetensors")).read_bytes() for name in self.names]
        return [bytes([i]) + body for i, body in enumerate(bodies)] + [bytes([128 + i]) + model for i, model in enumerate(models)]

    def __call__(self, data: bytes) -> str:
        """Try it; anything but a refusal or a state is a finding.

        Args:
            data: A byte that says what the others are, and these.

        Returns:
            How it ended.
        """
        kind, rest = (data[0], data[1:]) if data else (0, b"")
        name = self.names[kind % len(self.names)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state = self._weights(name, rest) if kind & 128 else self._manifest(name, rest)
            except REFUSED as error:
                return type(error).__name__
            if not kind & 64:
                return "read"
            return self._step(name, state)

    def _manifest(self, name: str, rest: bytes) -> fl.TrainState:
        place = self.places[name]
        place.joinpath("state.json").write_bytes(f'{{"format": {FORMAT}, "digest": "{digest_of(rest)}",\n'.encode() + rest)
        return fl.restore(place, self.states[name], allow=("model", "dtype", "optimizer"))

    def _weights(self, name: str, rest: bytes) -> fl.TrainState:
        self.plain.write_bytes(rest)
        return fl.load_weights(self.states[name], self.plain, partial=True)[0]

    def _step(self, name: str, state: fl.TrainState) -> str:
        """A step from a state that was read: hostile memory may raise in it, but must not bring the process down."""
        x = torch.zeros(4, 3)
        try:
            fl.update(state, (x, torch.zeros(4, dtype=torch.int64)))
        except Exception as error:  # noqa: BLE001  # whatever torch says to hostile memory
            return f"read, then {type(error).__name__}"
        return "read, then trained"


_TOKENS = [
    b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 400, b"{}", b"[]", b'""', b'{"$tensor": "x"}', b'{"$tally": [1, 2]}', b'{"$dict": [[1, 2]]}',
    b'{"$float": "nan"}', b'{"$bytes": "!"}', b'{"$complex": [1, 2]}', b'{"$tuple": 3}', b"[" * 3000, b"float64", b"\x00", b"\xff",
]  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes of bytes, places and words."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if len(out) < 2:
            break
        at = draw.randrange(1, len(out))
        kind = draw.randrange(5)
        if kind == 0:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at : at + draw.randint(1, 40)]
        elif kind == 2:
            end = out.find(b",", at)
            out[at : end if 0 < end < at + 60 else at + 1] = draw.choice(_TOKENS)
        elif kind == 3:
            out[at:at] = out[at : at + draw.randint(1, 200)]
        else:
            digits = bytes(str(draw.choice([0, 1, 7, 1 << 31, 1 << 63, -(1 << 40)])), "ascii")
            out[at : at + 1] = digits
    return bytes(out)


def main() -> None:
    """Fuzz until it is told to stop."""
    import atheris

    atheris.enabled_hooks.add("RegEx")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        attempt = Attempt(Path(folder))
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for i, seed in enumerate(attempt.corpus()):
            seeds.joinpath(str(i)).write_bytes(seed)
        for function in _readers():
            atheris.instrument_func(function)
        draw = random.Random(0)
        run: Any = attempt

        def once(data: bytes) -> None:
            run(data)

        def mutate(data: bytes, size: int, seed: int) -> bytes:
            draw.seed(seed)
            return mutated(data, draw)[:size] if len(data) > 2 and seed % 2 else atheris.Mutate(data, size)

        atheris.Setup([sys.argv[0], *sys.argv[1:], "-max_len=20000", str(seeds)], once, custom_mutator=mutate)
        atheris.Fuzz()


def _readers() -> list[Any]:
    from fnlight.checkpoint import encode, groups, header, manifest, migrations, read, rename, tensors, weights

    modules = (encode, groups, header, manifest, migrations, read, rename, tensors, weights)
    return [
        f for module in modules for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__ and hasattr(f, "__code__")
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
