import torch

from fastwm import ops, selftest
from fastwm.ops import _backend
from fastwm.ops._cases import CASES, compare


def test_passes(capsys):
    assert selftest.main(["--device", "cpu"]) == 0
    assert f"{len(CASES)} of {len(CASES)} agree" in capsys.readouterr().out


def test_every_op_has_a_case():
    with_reference = {n.replace("_ref", "") for n in ops.__all__ if "_ref" in n}
    assert set(CASES) == with_reference


def test_every_raw_op_runs():
    """A kernel that no public op calls is dead, or untested."""
    seen = set().union(*(compare(name, "cpu")[2] for name in CASES))
    assert _backend._names - {"build_info", "cpu_capability"} <= seen


def test_notices_a_wrong_gradient(monkeypatch, capsys):
    def wrong(logits, bins):
        mean = ops.twohot_mean_ref(logits, bins)
        return mean.detach() + 1.01 * (mean - mean.detach())

    monkeypatch.setattr(ops, "twohot_mean", wrong)
    assert selftest.main(["--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_notices_nan(monkeypatch):
    monkeypatch.setattr(ops, "rms_silu", lambda x, scale: ops.rms_silu_ref(x, scale) * torch.nan)
    assert compare("rms_silu", "cpu")[0] == float("inf")
