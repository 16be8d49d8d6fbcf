"""Run by tests/faults/test_network.py, one process a host: the run of runs.py, by ranks that give up waiting after so many seconds."""

import sys

import torch

import fnlight as fl
from tests.parallel.runs import main

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    with fl.parallel.join(timeout=float(sys.argv[1])):
        main(sys.argv[2], "", sys.argv[3])
