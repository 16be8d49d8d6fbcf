#!/usr/bin/env bash
# webdataset 1.0.2: WebLoader.with_epoch(n) begins with the first sample again in every epoch, so a shorter epoch never sees the rest.
#
# Expected: with_epoch divides a stream that goes on into epochs of n batches: "Change the epoch to return the given number of samples/batches".
# The second epoch goes on where the first one ended.
# Actual: every epoch yields the first n batches of the data set. With n below its length, what comes later is never trained on.
# Seen: three epochs of 5 batches of 4 of 40 samples: 0 to 19, three times; samples 20 to 39 never.
# Exit code: 0 while this is so, 1 once other samples are seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/pip install --quiet webdataset==1.0.2
venv/bin/python -W ignore - <<'PY'
import json
import sys

import webdataset as wds

with wds.ShardWriter("rows-%d.tar", maxcount=10, verbose=0) as writer:
    for i in range(40):
        writer.write({"__key__": f"{i:04}", "x.json": json.dumps(i)})
data = wds.WebDataset("rows-{0..3}.tar", shardshuffle=False).decode().map(lambda sample: sample["x.json"]).batched(4, collation_fn=list)
loader = wds.WebLoader(data, batch_size=None).with_epoch(5)
epochs = [sorted(i for batch in loader for i in batch) for _ in range(3)]
print(epochs)
sys.exit(any(max(epoch) > 19 for epoch in epochs))
PY
