"""`check_finite` names the first step whose loss was not finite, however late it is asked."""

import pytest
import torch

from fnlight.errors import NonFiniteError
from fnlight.loop import stop_when
from fnlight.nonfinite import check_finite
from fnlight.triggers import epochs, max_epochs, max_steps, steps
from tests.loop.runs import ran
from tests.small_runs import train_step


def test_a_loss_that_is_not_finite_names_its_step():
    """It is noticed when looked at, and the first bad step is named."""

    def failing(model, batch):
        return train_step(model, batch) * (float("nan") if batch.sum() == 0 else 1.0)

    data = [torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)]
    with pytest.raises(
        NonFiniteError, match=r"at step 3 \(in epoch 0, up to its batch 3; noticed at step 4\); by now NaN or infinite: weight, bias"
    ):
        ran(check_finite(epochs(1)), stop_when(max_epochs(2)), fn=failing, data=data)


def test_a_loss_that_is_not_finite_is_noticed_at_the_end_of_a_run():
    """Nothing is let through because the run was short."""
    with pytest.raises(NonFiniteError, match="at step 2"):
        ran(check_finite(steps(100)), stop_when(max_steps(2)), fn=lambda m, b: train_step(m, b) / 0)
