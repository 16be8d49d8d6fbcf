#!/usr/bin/env bash
# torchdata 0.11.0 with torch 2.13.0: after a resume in mid-epoch, workers of StatefulDataLoader draw the epoch's first random numbers again.
#
# Expected: the batches after a resume are those that the loader would have given without it; or other random numbers than before.
# Actual: the first batch after the resume draws the very numbers of the first batch of the epoch, so augmentation repeats itself.
# Seen: first batch [0.303, 0.605]; fourth batch without a resume [0.892, 0.528]; after a resume at the fourth [0.303, 0.605].
# Exit code: 0 while this is so, 1 once the numbers of the first batch do not come again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/pip install --quiet torchdata==0.11.0
venv/bin/python -W ignore - <<'PY'
import sys

import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader


class Noise(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(()).item()


def make():
    return StatefulDataLoader(Noise(), batch_size=2, num_workers=1, multiprocessing_context="fork")


loader = make()
batches = iter(loader)
first = [next(batches).tolist() for _ in range(3)]
state = loader.state_dict()
rest = [batch.tolist() for batch in batches]
resumed = make()
resumed.load_state_dict(state)
again = [batch.tolist() for batch in resumed]
print("first", first[0], "fourth", rest[0], "fourth after a resume", again[0])
sys.exit(again[0] != first[0])
PY
