"""The learning-rate curve at hand-computed steps, and the moving average against a plain loop."""

import math

import pytest
import torch
from torch import nn

from cad_models.common.ema import ExponentialMovingAverage
from cad_models.common.schedule import lr_factor


def test_lr_factor_at_landmarks_has_hand_values():
    def factor(step):
        return lr_factor(step, num_steps=110, num_warmup_steps=10, min_ratio=0.01)

    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == 1.0
    assert factor(10) == 1.0
    assert factor(35) == pytest.approx(0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)
    assert factor(60) == pytest.approx(0.505)
    assert factor(110) == factor(1000) == 0.01


def test_lr_factor_without_warmup_starts_at_peak_and_never_rises():
    curve = [lr_factor(step, num_steps=50, num_warmup_steps=0, min_ratio=0.0) for step in range(60)]
    assert curve[0] == 1.0
    assert all(later <= earlier for earlier, later in zip(curve, curve[1:], strict=False))


@pytest.mark.parametrize(
    "arguments", [{"num_warmup_steps": 11, "min_ratio": 0.0}, {"num_warmup_steps": 0, "min_ratio": 1.5}]
)
def test_lr_factor_impossible_settings_raise(arguments):
    with pytest.raises(ValueError, match="warm-up|min_ratio"):
        lr_factor(0, num_steps=10, **arguments)


def small_module(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_ema_over_updates_equals_plain_loop():
    module = small_module(0)
    ema = ExponentialMovingAverage(module, decay=0.3)
    expected = module[0].weight.detach().clone()
    for n in range(6):
        with torch.no_grad():
            module[0].weight.add_(torch.randn(2, 3))
        module(torch.randn(4, 3))
        ema.update(module)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
    torch.testing.assert_close(ema.average["0.weight"], expected, atol=1e-6, rtol=0)
    assert ema.average["1.num_batches_tracked"].item() == 6
    assert not torch.equal(ema.average["1.running_mean"], module[1].running_mean)


def test_ema_applied_to_restores_the_module_bit_for_bit_also_after_an_error():
    module = small_module(0)
    ema = ExponentialMovingAverage(small_module(1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError), ema.applied_to(module):
        assert torch.equal(module[0].weight, ema.average["0.weight"])
        raise RuntimeError
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_ema_resumed_from_its_state_continues_equally():
    module, resumed = small_module(0), ExponentialMovingAverage(small_module(3), decay=0.9)
    ema = ExponentialMovingAverage(module, decay=0.9)
    module[0].weight.data.add_(1)
    ema.update(module)
    resumed.load_state_dict(ema.state_dict())
    module[0].weight.data.add_(1)
    ema.update(module)
    resumed.update(module)
    assert all(torch.equal(tensor, resumed.average[name]) for name, tensor in ema.average.items())


def test_ema_of_bfloat16_module_moves_by_small_steps():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    ema = ExponentialMovingAverage(module, decay=0.999)
    nn.init.constant_(module.weight, 2.0)
    ema.num_updates = 100_000  # past the decay's warm-up
    for _ in range(10):
        ema.update(module)
    assert ema.average["weight"].item() == pytest.approx(2 - 0.999**10, abs=1e-5)


def test_ema_state_of_another_module_raises():
    with pytest.raises(ValueError, match="another module"):
        ExponentialMovingAverage(nn.Linear(2, 2)).load_state_dict(ExponentialMovingAverage(nn.ReLU()).state_dict())
