"""Every prototype_cosine kernel compiles for GPUs that are not there: no spills, tensor cores, nothing serialised."""

import importlib.util

import pytest

from vptm_kernels import aot

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the triton package is not installed"
)


@pytest.mark.parametrize("target", aot.CI_TARGETS)
def test_kernels_compile_without_spills(target, against_baseline):
    reports = aot.run([target], "prototype_cosine/", ci=True)
    assert {report.kernel for report in reports} >= {"readout", "combine", "reader_grad", "hidden_grad", "cosine"}
    assert not [report.row() for report in reports if report.problems]
    against_baseline(reports)
