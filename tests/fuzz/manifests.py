"""Every field of every kind of manifest, changed to every value of a list, with digests made anew; every reader answers.

As a program it tries all of them and prints the figures: ``python -m tests.fuzz.manifests``; the suite tries a sample (`test_manifests`).
What the right answer is, `tests.fuzz.rules` says by class: a clear error that names the file and the field, or sound.
"""

import contextlib
import copy
import io
import json
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

import fnlight as fl
from fnlight import cli
from fnlight.checkpoint.manifest import digest_of
from fnlight.checkpoint.migrations import FORMAT
from tests.checkpoint.golden import ASSETS, case_of, data, unpacked
from tests.checkpoint.tasks import make_task, trained
from tests.fuzz.rules import SOUND, right

Steps = tuple[str | int, ...]
"""Where a value is in a manifest: the keys and indices that lead to it."""

DELETED, RENAMED = "deleted", "renamed"


def _deep(levels: int) -> Any:
    tree: Any = []
    for _ in range(levels):
        tree = [tree]
    return tree


VALUES: dict[str, Any] = {
    "null": None, "true": True, "false": False, "0": 0, "1": 1, "-1": -1, "7": 7, "2**31": 1 << 31, "2**63": 1 << 63, "-2**70": -(1 << 70),
    "10**400": 10**400, "0.5": 0.5, "-0.5": -0.5, "1e308": 1e308, "an empty text": "", "a text": "x", "a line break": "a\nb\x1b[31m",
    "half a character": "\ud800", "a long text": "x" * 5000, "a path": "../../etc/passwd", "an empty list": [], "a list": [0], "lists": [[]],
    "a list of nothing": [None], "an empty object": {}, "an object": {"x": 0}, "a tensor": {"$tensor": "x"}, "a tuple": {"$tuple": [1]},
    "no number": {"$float": "nan"}, "a dict": {"$dict": [[1, 2]]}, "bad bytes": {"$bytes": "!"}, "a tally": {"$tally": [{"x": ["Sum", 1]}, None]},
    "an unknown tag": {"$exec": "os"}, "depth": _deep(600),
}  # fmt: skip


@attrs.frozen
class Kind:
    """A kind of manifest.

    Args:
        name: What it is called.
        task: The task of its checkpoint.
        path: The checkpoint.
        format: Its format.
        body: Its sections.
    """

    name: str
    task: fl.Task
    path: Path
    format: int
    body: dict[str, Any]


class Extra(nn.Module):
    """A module with a state of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner, self.told = nn.Linear(3, 2), {"seen": 3, "names": ("a", "b")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.inner(x)

    def get_extra_state(self) -> Any:
        """What it keeps."""
        return self.told

    def set_extra_state(self, state: Any) -> None:
        """Take it back."""
        self.told = state


def _loss(model: nn.Module, batch: Any) -> Any:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _score(model: nn.Module, batch: Any) -> Any:
    return {"loss": _loss(model, batch)}


def _phases(model: Any) -> Any:
    return {"a": torch.optim.Adam(model[0].parameters(), lr=0.1), "b": torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)}


def _ran(task: fl.Task, folder: Path, **options: Any) -> Path:
    """What a run leaves: its newest checkpoint."""
    x, y = data()
    config = fl.FitConfig(max_epochs=2, dir=str(folder / "run"), keep=fl.last(2), progress=False, device="cpu", **options)
    fl.fit(fl.TrainState.create(task, seed=7), fl.Loaders(train=[(x[:8], y[:8]), (x[8:16], y[8:16])], val=[(x, y)]), config)
    return Path(str(fl.newest(folder / "run")))


def kinds(folder: Path) -> list[Kind]:
    """A checkpoint of every kind.

    Args:
        folder: An empty folder, best in memory.

    Returns:
        Kept ones of every format, and what today's runs leave.
    """
    found: list[tuple[str, fl.Task, Path]] = []
    for kept in sorted((*ASSETS.glob("format-[12]/norm*.json"), *ASSETS.glob(f"format-{FORMAT}/*.json"))):
        golden = json.loads(kept.read_text())
        name = f"{kept.parent.name}-{kept.stem}"
        found.append((name, case_of(golden["case"]).task(), unpacked(golden, folder / name)))
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    task = fl.Task(net, _loss, _score, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=0.1))
    found.append(("a run", task, _ran(task, folder / "a", ema=0.9)))
    found.append(("a run in bf16", task, _ran(task, folder / "b", precision="bf16-true")))
    found.append(("a run in fp16", task, _ran(task, folder / "f", precision="fp16")))
    both = fl.Task(net, {"a": _loss, "b": _loss}, _score, configure_optimizers=_phases)
    found.append(("two optimizers", both, _ran(both, folder / "c")))
    odd = make_task()
    found.append(("odd memory", odd, Path(fl.save(trained(task=odd), folder / "odd"))))
    none = fl.Task(Extra(), _loss)
    found.append(("no optimizer", none, Path(fl.save(fl.TrainState.create(none), folder / "none"))))
    return [_kind(name, task, path) for name, task, path in found]


def _kind(name: str, task: fl.Task, path: Path) -> Kind:
    body = json.loads((path / "state.json").read_bytes())
    return Kind(name, task, path, body.pop("format"), {key: value for key, value in body.items() if key != "digest"})


def places(tree: Any, at: Steps = ()) -> Iterator[Steps]:
    """Where every value of a manifest is."""
    if at:
        yield at
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*at, key))


def changed(body: Any, at: Steps, value: str) -> Any:
    """A manifest with another value in one place; None if the value is there already."""
    made = copy.deepcopy(body)
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    if value == DELETED:
        del inner[at[-1]]
    elif value == RENAMED:
        if not isinstance(inner, dict):
            return None
        inner[f"{at[-1]}?"] = inner.pop(at[-1])
    else:
        same = json.dumps(inner[at[-1]]) == json.dumps(VALUES[value])
        inner[at[-1]] = VALUES[value]
        return None if same else made
    return made


def attempts(found: list[Kind]) -> Iterator[tuple[Kind, Steps, str]]:
    """All that can be tried, one after the other."""
    for kind in found:
        for at in places(kind.body):
            for value in (*VALUES, DELETED, RENAMED):
                yield kind, at, value


def written(format: int, body: Any) -> bytes:
    """A manifest with a digest that holds."""
    rest = (",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in body.items()) + "\n}\n").encode()
    return f'{{"format": {format}, "digest": "{digest_of(rest)}",\n'.encode() + rest


class Campaign:
    """Runs in which the newer of two checkpoints is changed, and all that reads them.

    Args:
        folder: An empty folder, best in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        (folder / "kinds").mkdir()
        self.kinds = kinds(folder / "kinds")
        self.runs: dict[str, Path] = {}
        self.states: dict[str, fl.TrainState] = {}
        for kind in self.kinds:
            run = self.runs[kind.name] = folder / "runs" / kind.name.replace(" ", "-")
            for step in (1, 2):
                shutil.copytree(kind.path, run / "checkpoints" / f"step-{step:08d}")
            self.states[kind.name] = fl.TrainState.create(kind.task)

    def __call__(self, kind: Kind, at: Steps, value: str) -> tuple[str, list[str]]:
        """Try one change.

        Args:
            kind: What is changed.
            at: Where.
            value: The name of what it is changed to.

        Returns:
            The answer of all readers, and what is wrong with it.
        """
        body = changed(kind.body, at, value)
        if body is None:
            return "unchanged", []
        run, where = self.runs[kind.name], f"{kind.name}, {'.'.join(map(str, at))} = {value}"
        newer, older = run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000001"
        (newer / "state.json").write_bytes(written(kind.format, body))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problems = _tried("verify", lambda: fl.verify(newer))
            if isinstance(problems, Raw):
                return "raw", [f"{where}: {problems.text}"]
            expected, field = right(body, at)
            answer = "refused" if problems else SOUND
            wrong = [f"{where}: {each}" for each in self._read(kind, run, newer, older, problems)]
        if expected is not None and answer != expected:
            wrong.append(f"{where}: {answer}, but must be {expected}: {'; '.join(problems)[:200]}")
        if problems and field and not any(re.search(field, each) for each in problems):
            wrong.append(f"{where}: {problems[0][:200]} does not name {field}")
        return answer, wrong

    def _read(self, kind: Kind, run: Path, newer: Path, older: Path, problems: list[str]) -> Iterator[str]:
        task, state = kind.task, self.states[kind.name]
        here, out = self.folder / "out.safetensors", (older if problems else newer)
        for name, read in {
            "load": lambda: fl.load(newer, task),
            "restore": lambda: fl.restore(newer, state, allow=("model", "dtype", "optimizer")),
            "load_weights": lambda: fl.load_weights(state, newer, partial=True),
        }.items():
            found = _tried(name, read)
            if isinstance(found, Raw):
                yield found.text
            elif problems and not isinstance(found, fl.errors.BrokenCheckpointError):
                yield f"{name} gives {found!r:.80}, but verify says {problems[0]:.120}"
            elif not problems and isinstance(found, fl.errors.BrokenCheckpointError):
                yield f"verify calls it sound, but {name} says {found!s:.200}"
        for name, read in {"newest": lambda: fl.newest(run), "load of the run": lambda: fl.load(run, task)}.items():
            found = _tried(name, read)
            if isinstance(found, Raw):
                yield found.text
            elif problems and isinstance(found, Exception):
                yield f"{name} does not fall back: {found!s:.200}"
            elif name == "newest" and found != str(out):
                yield f"newest gives {found!r:.80}"
        for mode in ("min", "max"):
            found = _tried("best_checkpoint", lambda mode=mode: fl.best_checkpoint(run, "val/loss", mode))
            if isinstance(found, Raw):
                yield found.text
            elif found is not None and found not in ((str(older),) if problems else (str(older), str(newer))):
                yield f"best_checkpoint gives {found!r:.120}"
        yield from self._commands(str(run), str(newer), str(here), problems)

    def _of_the_run(self, run: str) -> Iterator[tuple[str, Callable[[], int], tuple[int, ...]]]:
        """These print much, so they are asked now and then."""
        self.count += 1
        if self.count % 8 == 0:
            yield "inspect of the run", lambda: cli.inspect(run, rows=1), (0,)
            yield "verify of the run", lambda: cli.verify(run), (0, 1)

    def _commands(self, run: str, newer: str, here: str, problems: list[str]) -> Iterator[str]:
        weights = {"weights": "ema"}
        for name, call, codes in (
            ("inspect", lambda: cli.inspect(newer, rows=1), (0,)),
            ("verify", lambda: cli.verify(newer), (0, 1)),
            *self._of_the_run(run),
            ("diff", lambda: cli.diff(newer, newer), (0,)),
            ("export", lambda: cli.export(newer, here, overwrite=True), (0,)),
            ("export of averages", lambda: cli.export(newer, here, overwrite=True, **weights), (0, 2)),
            ("prune", lambda: cli.prune(run, "last(1) | best('val/loss')", dry_run=True), (0, 2)),
        ):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = _tried(name, lambda call=call: cli.answered(call))
            if isinstance(code, Raw | Exception):
                yield code.text if isinstance(code, Raw) else f"{name}: {code!r}"
                continue
            told = [line for line in err.getvalue().splitlines() if "skipped a broken checkpoint" not in line]
            alone = " of the run" not in name and name != "prune"
            allowed = (1,) if problems and name.startswith("verify") else (2,) if problems and alone else codes
            if code not in allowed:
                yield f"fnlight {name} ends with {code}: {err.getvalue()[:200]}"
            if code == 2 and len(told) != 1:
                yield f"fnlight {name} says {len(told)} lines: {err.getvalue()[:300]}"
            if (
                problems
                and alone
                and "state.json" not in out.getvalue() + err.getvalue()
                and ".safetensors" not in out.getvalue() + err.getvalue()
            ):
                yield f"fnlight {name} does not name the file: {err.getvalue()[:200]}"
            if any(not c.isprintable() and c != "\n" for c in out.getvalue() + err.getvalue()):
                yield f"fnlight {name} prints what a terminal obeys"


@attrs.frozen
class Raw:
    """An error that no reader may raise."""

    text: str


def _tried(name: str, call: Callable[[], Any]) -> Any:
    """What a reader gives, or the error that it may raise, or one that it may not."""
    try:
        return call()
    except fl.errors.CheckpointError as error:
        return error
    except BaseException as error:  # whatever it is, it is what was looked for
        if isinstance(error, KeyboardInterrupt):
            raise
        return Raw(f"{name} raises {type(error).__name__}: {error!s:.160}")


def main() -> None:
    """Try everything, or every n-th: ``python -m tests.fuzz.manifests [n]``."""
    torch.set_num_threads(1)
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    begun, ends, wrong = time.monotonic(), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        campaign = Campaign(Path(folder))
        for number, attempt in enumerate(attempts(campaign.kinds)):
            if number % every == 0:
                answer, found = campaign(*attempt)
                ends[answer] += 1
                wrong += found
    for line in wrong:
        print(line)
    print(f"{sum(ends.values()):,} manifests of {len(campaign.kinds)} kinds (format {FORMAT} and older), {dict(ends)}, {len(wrong)} wrong answers,"
          f" {time.monotonic() - begun:,.0f} s")  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
