#!/usr/bin/env bash
# grain 0.2.18: the state of a batched data set counts batches, so another batch size goes on elsewhere, without a word.
#
# Expected: a state that was taken after three batches of four goes on at row 12 whatever the batch size is, or is refused.
# Actual: it says {"next_index": 3}, and a data set with batches of eight goes on at row 24: twelve rows are left out. With smaller batches, rows
# come twice.
# Seen: {'next_index': 3}, then [24 25 26 27 28 29 30 31].
# Exit code: 0 while this is so, 1 once it goes on at row 12 or is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet grain==0.2.18
venv/bin/python -W ignore - <<'PY'
import sys

import grain


def make(size):
    return iter(grain.MapDataset.source(list(range(64))).batch(size).to_iter_dataset())


batches = make(4)
for _ in range(3):
    next(batches)
state = batches.get_state()
resumed = make(8)
try:
    resumed.set_state(state)
    found = list(next(resumed))
except ValueError as error:
    print("refused:", error)
    sys.exit(1)
print(state, found)
sys.exit(int(found[0]) == 12)
PY
