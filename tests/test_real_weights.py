"""The main claim on a real network: pretrained EfficientNet-Lite0, real photos, no data for the conversion.

The bounds are loose: there are 28 photos here, so one photo is 0.036. `examples/benchmarks/data_free.py` measures on
279. What must not happen is that a change makes the conversion as bad as the naive one without anybody noticing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gnswap._baselines import fresh_group_norm, naive_group_norm
from gnswap._convert import convert
from gnswap._fidelity import Fidelity, compare
from gnswap._revert import revert


@pytest.fixture(scope="module")
def measure(lite0: nn.Module, sample_batch: Tensor, sample_labels: Tensor) -> Callable[[nn.Module], Fidelity]:
    """Fidelity of a converted Lite0; the original's answers are computed once."""
    with torch.no_grad():
        answers = lite0(sample_batch)

    class Recorded(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return answers

    return lambda converted: compare(Recorded(), converted, [(sample_batch, sample_labels)], layers=False)


@pytest.mark.filterwarnings("ignore:.*groups.*:UserWarning")  # narrow layers get fewer groups, as they should
@pytest.mark.parametrize(
    ("options", "agreement", "sure"),
    [
        pytest.param({"groups": 8, "softness": 0.0}, 0.6, 0.7, id="8 groups"),
        pytest.param({"groups": 32, "softness": 0.0}, 0.4, 0.45, id="32 groups"),
        pytest.param({}, 0.75, 0.9, id="default"),
    ],
)
def test_data_free_conversion_keeps_answers(
    lite0: nn.Module, measure: Callable[[nn.Module], Fidelity], options: dict[str, Any], agreement: float, sure: float
) -> None:
    conversion = convert(lite0, **options)
    fidelity = measure(conversion.model)
    assert (conversion.report.swapped, conversion.report.kept) == (49, 0)
    assert fidelity.agreement is not None
    assert fidelity.agreement_sure is not None
    assert fidelity.agreement >= agreement
    assert fidelity.agreement_sure >= sure


@pytest.mark.parametrize("baseline", [naive_group_norm, fresh_group_norm])
def test_the_swaps_that_everybody_tries_lose_them(
    lite0: nn.Module, measure: Callable[[nn.Module], Fidelity], baseline: Callable[[nn.Module], nn.Module]
) -> None:
    fidelity = measure(baseline(lite0))
    assert fidelity.agreement is not None
    assert fidelity.agreement <= 0.1
    assert fidelity.accuracy_converted == 0


def test_one_sample_or_many_the_same_answer(lite0: nn.Module, sample_batch: Tensor) -> None:
    """Batch independence on the real network, in training mode too; only the convolutions may round differently."""
    model = convert(lite0).model
    with torch.no_grad():
        alone, together = model(sample_batch[:1]), model(sample_batch[:3])[:1]
        training = model.train()(sample_batch[:3])[:1]
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(training, together, rtol=1e-3, atol=1e-3)


def test_the_original_comes_back(lite0: nn.Module, sample_batch: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in lite0.state_dict().items()}
    original = revert(convert(lite0).model)
    state = original.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        assert torch.equal(original(sample_batch[:2]), lite0(sample_batch[:2]))
