"""The loops that throughput.py compares both train."""

import plain_loop
import pytest
import torch
from models import flow_grpo, make_run


@pytest.mark.parametrize("loop", [plain_loop, flow_grpo], ids=["plain", "flow_grpo"])
def test_a_loop_begins_with_ratios_of_1_and_changes_the_adapter(loop, monkeypatch):
    monkeypatch.setattr(flow_grpo, "DEVICE", "cpu")
    monkeypatch.setattr(plain_loop, "DEVICE", "cpu")
    run = make_run("tiny-sd3", prompts_per_epoch=2, group_size=4, batch_size=4)
    before = [p.detach().clone() for p in run.parameters]
    stats = loop.optimize(run, loop.sample(run))
    assert stats["ratio_deviation"] < 1e-6
    assert not all(map(torch.equal, run.parameters, before))
