"""Run the benchmarks and write their tables into docs/benchmarks.md, each between its marks ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    python tests/benchmarks/run.py                         # all of them: an hour or two, on an otherwise idle machine
    python tests/benchmarks/run.py overhead work --cpu     # some, by processor time where they can, on a machine that others use
    python tests/benchmarks/run.py peers --venvs peers     # with the other libraries, see peers.py

Each is a program of its own; what this one does is to run them one after the other and to copy what they print.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.tables import PAGE, header, write_section

PROGRAMS = ("overhead", "steps", "size", "memory", "microbatch", "savings", "checkpoint", "compiled", "kept", "peers", "work")


def takes(program, option):
    """Whether a program knows an option."""
    return option in program.read_text(encoding="utf-8")


def one(name, given):
    """Run one and write down what it says."""
    program = Path(__file__).with_name(f"{name}.py")
    if not program.exists():
        print(f"{name}: there is no such program", file=sys.stderr)
        return
    more = ["--cpu"] if given.cpu and takes(program, '"--cpu"') else []
    more += ["--venvs", given.venvs] if given.venvs and name == "peers" else []
    more += ["--fashion", given.fashion] if given.fashion and name == "work" else []
    print(f"== {' '.join([program.name, *more])}", flush=True)
    if takes(program, '"--write"'):  # it knows where its tables stand
        subprocess.run([sys.executable, program, *more, "--write"], check=False)
        return
    done = subprocess.run([sys.executable, program, *more], check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode == 0 and f"<!-- {name} -->" in PAGE.read_text(encoding="utf-8"):
        above = (
            "" if done.stdout.startswith("torch") else f"{header()}; `{' '.join(['python tests/benchmarks/' + program.name, *more])}`\n\n"
        )
        write_section(name, above + done.stdout)


def main():
    """Run what was asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", help="which; all if left out", choices=[*PROGRAMS, []])
    options.add_argument("--cpu", action="store_true", help="processor time, where a program can")
    options.add_argument("--venvs", help="the virtual environments of the other libraries")
    options.add_argument("--fashion", help="where Fashion-MNIST lies")
    given = options.parse_args()
    for name in given.names or PROGRAMS:
        one(name, given)


if __name__ == "__main__":
    main()
