"""What a step costs in fnlight, in a loop by hand and in other libraries: bare, and with what people really turn on.

    python tests/benchmarks/peers.py --install peers           # a virtual environment for each group of libraries, below that folder
    python tests/benchmarks/peers.py --venvs peers             # the table
    python tests/benchmarks/peers.py --venvs peers --only plain fnlight lightning --rounds 3

Every side runs in a process of its own, see `side.py`, and trains an epoch of 500 steps when it is its turn, one after the other, in another
direction each round. So whatever else the machine does falls on all of them. The table gives medians of an epoch, by step, and the median of
the ratios to the plain loop of the same round. After 20 steps all sides must have the same loss.
"""

import argparse
import math
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.side import STEPS
from tests.benchmarks.tables import PAGE, header, write_section

TORCH = "torch==2.13.0"
GROUPS = {
    "lightning": ["pytorch-lightning==2.6.6", "torchmetrics"],
    "mixed": ["accelerate==1.15.0", "pytorch-ignite==0.5.5", "skorch==1.4.0", "poutyne==1.19.0", "tqdm"],
    "tnt": ["torchtnt==0.2.4", "setuptools<81"],
    "transformers": ["transformers==5.23.0", "accelerate==1.15.0", "datasets"],
    "keras": ["keras==3.15.1"],
}
"""What is installed together. Versions 2.6.2 and 2.6.3 of pytorch-lightning were malicious."""

PEERS = {
    "plain": ("a loop by hand", None),
    "fnlight_run": ("fnlight, `run`", None),
    "fnlight": ("fnlight, `fit`", None),
    "ignite": ("pytorch-ignite 0.5.5", "mixed"),
    "poutyne": ("poutyne 1.19", "mixed"),
    "accelerate": ("accelerate 1.15", "mixed"),
    "skorch": ("skorch 1.4", "mixed"),
    "torchtnt": ("torchtnt 0.2.4", "tnt"),
    "lightning": ("pytorch-lightning 2.6.6", "lightning"),
    "transformers": ("transformers 5.23 `Trainer`", "transformers"),
    "keras": ("keras 3.15 on torch", "keras"),
}


class Side:
    """A process that trains an epoch when it is asked to."""

    def __init__(self, name, mode, python, folder):
        self.name, self.losses, self.started = name, [], []
        (read, theirs), (own, write) = os.pipe(), os.pipe()
        terminal, screen = pty.openpty()  # what draws a bar draws it
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("side.py"), name, mode, folder, str(own), str(theirs)],
            pass_fds=(own, theirs), stdin=subprocess.DEVNULL, stdout=screen, stderr=screen, env=environment, cwd=folder,
        )  # fmt: skip
        for each in (own, theirs, screen):
            os.close(each)
        self.read, self.write, self.shown = os.fdopen(read), os.fdopen(write, "w"), bytearray()
        threading.Thread(target=self._drain, args=(terminal,), daemon=True).start()
        self.torch = self._told("torch")[0]

    def _drain(self, terminal):
        while True:
            try:
                self.shown += os.read(terminal, 65536)
            except OSError:
                return
            del self.shown[:-20000]

    def _told(self, what):
        line = self.read.readline().split()
        if line[:1] in (["loss"], ["started"]):
            (self.losses if line[0] == "loss" else self.started).extend(map(float, line[1:]))
            return self._told(what)
        if line[:1] != [what]:
            raise RuntimeError(f"{self.name} ended: {bytes(self.shown).decode(errors='replace')[-1500:]}")
        return line[1:]

    def epoch(self):
        """Seconds of one epoch: of the wall's clock, and of the processor."""
        self.write.write("go\n")
        self.write.flush()
        wall, cpu = self._told("seconds")
        return float(wall), float(cpu)

    def end(self):
        self.write.close()
        self.process.kill()
        self.process.wait()


def python_of(venvs, group):
    """The Python of a side; None where it is not installed."""
    if group is None:
        return sys.executable
    found = None if venvs is None else Path(venvs, group, "bin", "python")
    return str(found.absolute()) if found is not None and found.exists() else None


def measure(mode, names, venvs, rounds, folder, cpu):
    """Seconds of every epoch of every side that can be started, what its start took, and why the others cannot."""
    sides, missing = {}, {}
    for name in names:
        python = python_of(venvs, PEERS[name][1])
        if python is None:
            missing[name] = "not installed"
            continue
        if (name, mode) == ("fnlight_run", "full"):
            continue  # that is `fit`
        place = tempfile.mkdtemp(dir=folder)
        try:
            side = Side(name, mode, python, place)
            side.epoch()  # warms up
            sides[name] = side
        except RuntimeError as error:
            print(error, file=sys.stderr)
            missing[name] = "could not be run"
    found = {name: [] for name in sides}
    for i in range(rounds):
        for name in sides if i % 2 else reversed(sides):
            found[name].append(sides[name].epoch()[cpu])
    checked(sides)
    for side in sides.values():
        side.end()
    return found, {name: side.started[cpu] for name, side in sides.items()}, missing


def checked(sides):
    """All sides train the same, on the same torch."""
    base = next(iter(sides.values()))
    for side in sides.values():
        assert side.torch == base.torch, f"{side.name} has torch {side.torch}, {base.name} has {base.torch}"
        assert math.isclose(side.losses[0], base.losses[0], rel_tol=1e-5), (
            f"{side.name} comes to {side.losses[0]}, {base.name} to {base.losses[0]}"
        )


def row(name, found):
    """Microseconds a step, and times the plain loop."""
    if name not in found:
        return ["", ""]
    ratios = [a / b for a, b in zip(found[name], found["plain"], strict=True)]
    return [f"{statistics.median(found[name]) / STEPS * 1e6:,.0f}", f"{statistics.median(ratios):.2f}"]


def table(names, bare, full, started, missing):
    """The table of both modes, fastest first."""
    by_time = sorted((n for n in names if n in bare), key=lambda n: statistics.median(bare[n]))
    lines = ["| MLP 32-64-10, batch 32 | bare, us a step | x plain | full, us a step | x plain | start, s |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join([PEERS[name][0], *row(name, bare), *row(name, full), f'{started[name]:.2f}'])} |" for name in by_time]
    lines += [f"| {PEERS[name][0]} | {why} | | | | |" for name, why in missing.items()]
    return "\n".join(lines)


def plot(bare, full):
    """The same as bars, into docs/benchmarks.svg."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fnlight", "font.size": 9})
    from matplotlib import pyplot as plt

    names = sorted((n for n in bare if n != "plain"), key=lambda n: -statistics.median(bare[n]))
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1))
    for shift, found, label in ((0.2, bare, "bare"), (-0.2, full, "full")):
        width = [statistics.median([a / b for a, b in zip(found[n], found["plain"], strict=True)]) if n in found else 0 for n in names]
        axes.barh([i + shift for i in range(len(names))], width, 0.38, label=label)
    axes.set_yticks(range(len(names)), [PEERS[n][0].replace("`", "") for n in names])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time of a step, in those of a loop by hand")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})


def install(folder):
    """A virtual environment for each group; each keeps the torch that it is given first."""
    for name, packages in GROUPS.items():
        place = Path(folder, name)
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        for wanted in ([TORCH, "numpy"], packages):
            subprocess.run([place / "bin" / "python", "-m", "pip", "install", "-q", *wanted], check=False)


def main():
    """Measure, print, and write where asked."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--install", help="make the virtual environments below this folder, and end")
    options.add_argument("--venvs", help="where they are; without it, only what is installed beside fnlight runs")
    options.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    options.add_argument("--rounds", type=int, default=11, help="epochs that each side trains")
    options.add_argument(
        "--cpu", action="store_true", help="time of the processor, where others use the machine; the wall's clock otherwise"
    )
    options.add_argument("--write", action="store_true", help="put the table and a plot into docs/")
    given = options.parse_args()
    if given.install:
        install(given.install)
        return
    names = list(dict.fromkeys(["plain", *given.only]))
    with tempfile.TemporaryDirectory() as folder:
        bare, started, missing = measure("bare", names, given.venvs, given.rounds, folder, given.cpu)
        full, _, more = measure("full", names, given.venvs, given.rounds, folder, given.cpu)
    command = f"`python tests/benchmarks/peers.py --venvs peers{' --cpu' if given.cpu else ''}`"
    what = "processor time, as others used the machine" if given.cpu else "wall time"
    says = f"{header()}; {command}: {what}, {given.rounds} epochs of {STEPS} steps a side, taken in turns.\n\n"
    says += table(names, bare, full, started, missing | more)
    print(says)
    if given.write:
        write_section("peers", says)
        plot(bare, full)


if __name__ == "__main__":
    main()
