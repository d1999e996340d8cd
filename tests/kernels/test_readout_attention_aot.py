"""Every readout_attention kernel compiles for GPUs that are not there: no spills, tensor cores, nothing serialised."""

import importlib.util

import pytest
from compiled import each, reports

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the triton package is not installed"
)


@pytest.mark.parametrize("target", each())
def test_kernels_compile_without_spills(target, against_baseline):
    """A spill, a lost tensor-core instruction or a kernel that is gone costs more than any tuning wins."""
    found = reports(target, "readout_attention/")
    assert {report.kernel for report in found} == {"split", "merge", "grad"}
    assert not [report.row() for report in found if report.problems]
    against_baseline(found)
    for report in found:
        if report.kernel != "merge":
            assert report.tensor_core > 0, report.row()
        if report.kernel == "split" and target.startswith("sm"):
            # Tokens and weights come 16 bytes at a time; what is left are single numbers and rows of the bias.
            assert report.loads.get("async", 0) + report.loads.get("128", 0) >= 7, report.row()
