"""Every prototype_cosine kernel compiles for GPUs that are not there: no spills, tensor cores, nothing serialised."""

import importlib.util

import pytest
from compiled import each, reports

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the triton package is not installed"
)


@pytest.mark.parametrize("target", each())
def test_kernels_compile_without_spills(target, against_baseline):
    """A spill, a lost tensor-core instruction or a kernel that is gone costs more than any tuning wins."""
    found = reports(target, "prototype_cosine/")
    assert {report.kernel for report in found} >= {"readout", "combine", "reader_grad", "hidden_grad", "cosine"}
    assert not [report.row() for report in found if report.problems]
    against_baseline(found)
