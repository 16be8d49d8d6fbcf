"""A program: kill trainings at many moments, resume them, and count what was lost.

``python tests/faults/campaign.py --kills 200 --runs 50 --failures 200`` prints a table and ends with 1 if anything was lost.
"""

import argparse
import collections
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from fnlight import load, newest, save
from fnlight.errors import CheckpointError
from fnlight.testing import assert_trees_equal
from tests.faults.processes import Shared, Watch, dying, every_instant, failing, in_a_child, instants, vanishing
from tests.faults.training import STEPS, make_loaders, make_task, train


def uninterrupted(root):
    """Train without a fault; what a resumed run must end in, the calls that its saves make, and the seconds that it takes."""

    def watched():
        watch = Watch(root / "whole" / "checkpoints")
        then = time.perf_counter()
        save(train(root / "whole"), root / "final")
        return "\n".join([f"{time.perf_counter() - then}", *(label for label in watch.seen)])

    code, text = in_a_child(watched)
    assert code == 0, text
    seconds, *labels = text.split("\n")
    return load(root / "final", make_task()), labels, float(seconds)


def killed(folder, at, instant, durable):
    Watch(folder / "checkpoints", at, dying(instant), durable)
    train(folder)


def leftovers(folder):
    """Hidden files and folders, which a killed save may leave until the next one, and nobody after that."""
    return [p.relative_to(folder) for p in folder.rglob("*") if p.name.startswith(".")]


def went_on(folder, whole, durable, reference, workers=0, vanished=False):
    """Go on with a run that was killed: nothing that was saved may be missing, and its end is bitwise that of the whole."""
    found = newest(folder)
    step = 0 if found is None else int(found[-8:])
    assert step >= durable, f"step {durable} was in its place, but the newest valid checkpoint is {found}"
    if found is not None:
        assert load(found, make_task()).progress.step == step
    resumed = train(folder, loaders=make_loaders(workers))
    if vanished:  # what somebody has deleted is not listed any more
        for state in (resumed, whole):
            state.store.memory.pop("checkpoint_every")
    assert_trees_equal(resumed, whole)
    assert resumed.stopped == whole.stopped
    assert not leftovers(folder), f"left behind: {leftovers(folder)}"
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    wanted = [f"step-{s:08d}" for s in (STEPS - 1, STEPS)]
    assert names == wanted or (vanished and names == wanted[1:]), f"checkpoints: {names}"
    assert (folder / "log.jsonl").read_bytes() == (reference / "log.jsonl").read_bytes(), "the log differs"


OF_WORKERS = ("pymp-",)
"""What Python's multiprocessing leaves in the temporary folder when a process with workers is killed."""

OF_TORCH = ([], ["_remote_module_non_scriptable.py"])
"""What is in the folder that torch 2.9 makes there when a part of it is imported, and leaves when a process is killed."""


class Tally:
    """What was tried, and what was lost."""

    def __init__(self):
        self.tried, self.lost = collections.Counter(), []

    def take(self, kind, code, text):
        self.tried[kind] += 1
        if code:
            self.lost.append(f"{kind}: {code}\n{text}")


def kills(root, count, seed, tally):
    """Die at so many instants of saves and deletions, each kind of call among them, and go on."""
    whole, labels, _ = uninterrupted(root)
    chosen = instants(labels, count, seed)
    for i, (at, instant) in enumerate(chosen):
        folder, durable = root / f"kill-{i}", Shared()
        code, text = in_a_child(killed, folder, at, instant, durable)
        if code != -signal.SIGKILL:
            tally.take("kills that did not happen", code or 1, f"{at} {instant}\n{text}")
            continue
        code, text = in_a_child(went_on, folder, whole, durable.get(), root / "whole")
        tally.take(f"killed {instant} a call of {at[0].split()[0]}", code, f"{at}\n{text}")
        shutil.rmtree(folder, ignore_errors=True)
    return len(every_instant(labels)), len(chosen)


def runs(root, count, seed, tally):
    """Kill whole runs at random times, again and again until they end; every fifth with workers."""
    whole, _, seconds = uninterrupted(root)
    rng = random.Random(seed)
    for i in range(count):
        folder, workers = root / f"run-{i}", 2 * (i % 5 == 0)
        for _ in range(100):
            durable = Shared()
            code, text = in_a_child(watched_run, folder, durable, workers, kill_after=rng.uniform(0, seconds * (3 if workers else 1)))
            if code != -signal.SIGKILL:
                break
            tally.tried["deaths at random times"] += 1
            tally.tried["... of them in a save or a deletion"] += bool(folder.exists() and leftovers(folder))
        code, text = in_a_child(went_on, folder, whole, durable.get(), root / "whole") if code == 0 else (code, text)
        tally.take("whole runs killed at random times until they ended", code, text)
        shutil.rmtree(folder, ignore_errors=True)


FAULTS = {
    "no space left, once": (errno.ENOSPC, False),
    "no space left, from then on": (errno.ENOSPC, True),
    "input/output error, once": (errno.EIO, False),
    "input/output error, from then on": (errno.EIO, True),
    "permission denied, once": (errno.EACCES, False),
    "permission denied, from then on": (errno.EACCES, True),
    "the directory vanished": (None, False),
}
"""What a file system does to a call."""


def faulty(folder, at, fault, durable):
    """Train while the file system fails at a call; how it ended."""
    code, lasting = FAULTS[fault]
    act = vanishing(folder / "checkpoints") if code is None else failing(code)
    watch = Watch(folder / "checkpoints", at, act, durable, lasting)
    try:
        train(folder)
    except CheckpointError as error:
        end = f"ended with an error: {error}"
        assert code is None or os.strerror(code) in end, end
    else:
        end = "went on"
    watch.stop()
    if not lasting or code == errno.ENOSPC:
        assert watch.seen[-1].startswith(("unlink", "rmdir")) or not leftovers(folder), f"left behind: {leftovers(folder)}"
    return end if watch.begun else "nothing happened"


def failures(root, count, seed, tally):
    """Let the file system fail at so many calls of saves and deletions, and go on when it works again."""
    whole, labels, _ = uninterrupted(root)
    rng = random.Random(seed)
    kinds = [(label, fault) for label in dict.fromkeys(labels) for fault in FAULTS]
    rng.shuffle(kinds)
    for i in range(count):
        label, fault = kinds[i % len(kinds)]
        folder, durable, at = root / f"failure-{i}", Shared(), (label, rng.randint(1, labels.count(label)))
        code, text = in_a_child(faulty, folder, at, fault, durable)
        end = text if not code else fault
        if not code:
            code, text = in_a_child(
                went_on, folder, whole, durable.get() if FAULTS[fault][0] else 0, root / "whole", 0, FAULTS[fault][0] is None
            )
        tally.take(f"{fault}: the run {end.partition(':')[0]}" if not code else fault, code, f"{at} {end}\n{text}")
        shutil.rmtree(folder, ignore_errors=True)
    return len(kinds)


def disks(root, count, tally):
    """Train on real disks that are too small, each a little larger than the one before, and go on when there is room; it takes the right to mount."""
    whole, _, _ = uninterrupted(root)
    for i in range(count):
        folder, durable = root / f"disk-{i}", Shared()
        folder.mkdir()
        size = f"{32 + 4 * i}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        try:
            code, text = in_a_child(squeezed, folder, durable)
            end = text.partition(":")[0]
            if not code:
                subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
                code, text = in_a_child(went_on, folder, whole, durable.get(), root / "whole")
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        tally.take(f"disks that were full: the run {end}" if not code else "disks that were full", code, f"{size}\n{text}")


def squeezed(folder, durable):
    Watch(folder / "checkpoints", renamed=durable)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(folder)
    except CheckpointError as error:
        assert "No space left on device; free disk space" in str(error), str(error)  # noqa: PT017  # this is no test
        assert not leftovers(folder), f"left behind: {leftovers(folder)}"
        return f"ended with an error: {error}"
    return "went on"


def watched_run(folder, durable, workers):
    Watch(folder / "checkpoints", renamed=durable)
    train(folder, loaders=make_loaders(workers))


def main():
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="deaths at chosen system calls")
    parser.add_argument("--runs", type=int, default=50, help="whole runs killed at random times")
    parser.add_argument("--failures", type=int, default=200, help="calls of the file system that fail")
    parser.add_argument("--disks", type=int, default=0, help="real disks that are too small; takes the right to mount")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", default=None, help="where the runs lie; TMPDIR may be on another file system {left or ''}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="faults-temporary-") as temporary, tempfile.TemporaryDirectory(dir=given.dir) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        if given.kills:
            kinds, chosen = kills(Path(folder) / "kills", given.kills, given.seed, tally)
            print(f"{kinds:6} kinds of instants of a save, {chosen} deaths chosen")
        if given.runs:
            runs(Path(folder) / "runs", given.runs, given.seed, tally)
        if given.failures:
            print(f"{failures(Path(folder) / 'failures', given.failures, given.seed, tally):6} kinds of failures of a call")
        if given.disks:
            disks(Path(folder) / "disks", given.disks, tally)
        left, tempfile.tempdir = [n for n in os.listdir(temporary) if not n.startswith(OF_WORKERS)], None
        left = [n for n in left if not (Path(temporary, n).is_dir() and os.listdir(Path(temporary, n)) in OF_TORCH)]
        same = os.stat(temporary).st_dev == os.stat(folder).st_dev
    for kind, number in sorted(tally.tried.items()):
        print(f"{number:6} {kind}")
    print(f"{len(left):6} files left in the temporary folder, which is on {'the same' if same else 'another'} file system {left or ''}")
    print(f"{len(tally.lost):6} lost")
    for text in tally.lost:
        print("\n".join([*text.splitlines()[:2], *text.splitlines()[-4:]]))
    sys.exit(bool(tally.lost))


if __name__ == "__main__":
    main()
