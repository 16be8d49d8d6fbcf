"""A model and its optimizer are cast in place, and the counts of its steps are not."""

import torch
from torch import nn

from fnlight.tensors import convert


def test_what_holds_the_numbers_stays_the_same_object():
    """The optimizer goes on with the parameters that it holds; whole numbers stay as they are."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    held = list(model.parameters())
    convert(model, [optimizer, None], torch.bfloat16)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert {p.dtype for p in held} == {torch.bfloat16}
    assert {name: b.dtype for name, b in model.named_buffers()} == {
        "1.running_mean": torch.bfloat16, "1.running_var": torch.bfloat16, "1.num_batches_tracked": torch.int64,
    }  # fmt: skip
    slots = optimizer.state[held[0]]
    assert (slots["exp_avg"].dtype, slots["step"].dtype) == (torch.bfloat16, torch.float32)
