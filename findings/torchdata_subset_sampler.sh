#!/usr/bin/env bash
# torchdata 0.11.0 with torch 2.13.0: StatefulDataLoader with a SubsetRandomSampler repeats and loses items after a resume.
#
# Expected: a loader that is given the state of another one, taken after three of six batches, yields the items that are left, each once; the
# package offers state_dict for this, and takes the sampler without a warning.
# Actual: the new loader draws another permutation and skips six of its items, so some come twice and as many never.
# Seen: before [[5, 4], [0, 9], [7, 8]], after [[4, 3], [2, 1], [9, 7]]: 4, 7 and 9 twice, 6, 10 and 11 never.
# Exit code: 0 while this is so, 1 once every item comes once.
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
from torch.utils.data import SubsetRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader


def make():
    return StatefulDataLoader(list(range(12)), batch_size=2, sampler=SubsetRandomSampler(range(12)))


torch.manual_seed(0)
loader = make()
batches = iter(loader)
before = [next(batches).tolist() for _ in range(3)]
state = loader.state_dict()
resumed = make()
resumed.load_state_dict(state)
after = [batch.tolist() for batch in resumed]
print("before", before, "after", after)
sys.exit(sorted(sum(before + after, [])) == list(range(12)))
PY
