"""The Triton row kernel under cross_entropy and linear_cross_entropy, interpreted, by the checks of test_losses.py."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import test_losses as losses

from seqfuse.kernels import cross_entropy

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", losses.OPTIONS, ids=losses.ids)
@pytest.mark.parametrize("block", [16, 4096], ids=["several-blocks", "one-block"])
def test_keeps_the_error_rule(options, reduction, block, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_BLOCK", block)
    options = dict(options)
    tensors, target, cw = losses.sample(5, 37, 6, torch.float32, class_weight=options.pop("class_weight", False))
    losses.check(tensors, target, cw, reduction, backend="triton", **options)
    logits = (torch.randn(5, 37).mul(2).half(),)
    losses.check(logits, target, cw, reduction, given_logits=True, backend="triton", **options)


def test_a_target_out_of_range_gives_nan():
    target = torch.tensor([1, 9, -100])
    loss, _ = cross_entropy.cross_entropy_rows(torch.randn(3, 5), target, None, None, None, None, -100, 0.0, 0.0, 0.0)
    assert loss.isnan().tolist() == [False, True, False] and loss[2] == 0
