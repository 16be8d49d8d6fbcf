#!/usr/bin/env bash
# datasets 5.2.0: a state that was loaded into an IterableDataset holds for every later pass, too.
#
# Expected: load_state_dict resumes the pass that was under way; the next pass over the data set begins at its first row, as it does for a data set
# that was read to its end without a resume.
# Actual: every pass begins where the state was taken, until set_epoch is called with another number. A loop over several epochs sees the rows
# before that place never again.
# Seen: [4, 5], then [4, 5], then [4, 5] of six rows.
# Exit code: 0 while this is so, 1 once the second pass begins at the first row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0
venv/bin/python -W ignore - <<'PY'
import sys

import datasets


def make():
    return datasets.Dataset.from_dict({"x": list(range(6))}).to_iterable_dataset()


data = make()
rows = iter(data)
for _ in range(4):
    next(rows)
state = data.state_dict()
resumed = make()
resumed.load_state_dict(state)
passes = [[row["x"] for row in resumed] for _ in range(3)]
print(passes)
sys.exit(passes[1] == list(range(6)))
PY
