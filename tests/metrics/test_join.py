"""Metrics of a group of batches are joined exactly."""

from functools import reduce

import pytest
import torch

from fnlight.metrics import join_metrics


def test_means_of_few_digits_are_exact():
    """A thousand numbers in bfloat16 have the mean that they have, although their sum has no more digits than they."""
    value = torch.tensor(1.0078125, dtype=torch.bfloat16)
    found = reduce(join_metrics, [{"loss": value}] * 1000)
    assert float(found["loss"].compute()) == pytest.approx(1.0078125, rel=1e-6)
