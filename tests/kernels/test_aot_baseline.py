"""The committed costs of compiled kernels: what counts as lost against them, and how they are kept."""

import os
import threading
from pathlib import Path

import pytest

from vptm_kernels import aot

AOT_BASELINE = Path(__file__).parents[2] / "bench" / "results" / "aot_baseline.json"


def test_what_counts_as_lost_and_what_as_changed():
    """A spill, another tensor-core instruction, a vanished kernel: lost. More registers, a new kernel: only changed."""

    def report(kernel="forward", **values):
        given = {"registers": 100, "dots": 2, "tensor_core": 8, "tensor_core_kind": "wgmma", **values}
        return aot.Report("case", kernel, "sm90", **given)

    baseline = {"versions": {}, "kernels": aot._entries([report(), report(), report("gone")])}
    other = {"sm80 case forward": {"spills": 0}, "sm90 other forward": {"spills": 0}}
    baseline["kernels"] |= other
    assert aot.compare([report(), report(), report("gone")], baseline) == ([], [])
    lost, changed = aot.compare(
        [report(registers=120), report(spills=16, tensor_core_kind="mma"), report("fresh")], baseline
    )
    assert lost == [
        "sm90 case forward #2: spills 0 -> 16 bytes",
        "sm90 case forward #2: tensor cores wgmma -> mma",
        "sm90 case gone: gone",
    ]
    assert "sm90 case forward: registers 100 -> 120" in changed
    assert "sm90 case fresh: new" in changed
    lost, _ = aot.compare([report(tensor_core=0, tensor_core_kind="")], baseline)
    assert lost == [
        "sm90 case forward: tensor cores wgmma -> none",
        *("sm90 case forward #2: gone", "sm90 case gone: gone"),
    ]
    assert (
        aot.compare([aot.Report("case", "", "sm90", error="does not compile")], baseline)[0][-1]
        == "sm90 case gone: gone"
    )


def test_every_target_has_the_same_kernels_and_every_case_of_ci_is_there():
    """A kernel that one target's baseline lacks could spill there, or vanish, and no comparison would see it."""
    pytest.importorskip("triton")
    kernels = aot.read_baseline(AOT_BASELINE)["kernels"]
    of = {target: {key.split(" ", 1)[1] for key in kernels if key.startswith(f"{target} ")} for target in aot.TARGETS}
    for target, names in of.items():
        assert names == of["sm90"], f"{target}: {sorted(names ^ of['sm90'])}"
    assert len(kernels) == len(aot.TARGETS) * len(of["sm90"])
    assert {name.split()[0] for name in of["sm90"]} == {case.name for case in aot.all_cases() if case.ci}


def test_targets_compile_side_by_side_and_report_in_order(monkeypatch):
    """Six targets one after the other take more than the time there is; a target that waits for none stays in place."""
    both = threading.Barrier(2, timeout=60)

    def one(target, pattern, ci, spills_only):
        both.wait()
        yield aot.Report(pattern, "forward", target)

    monkeypatch.setattr(aot, "_run_target", one)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    seen = []
    reports = aot.run(["sm90", "sm80"], "a", on_report=seen.append)
    assert [report.target for report in reports] == ["sm90", "sm80"]
    assert sorted(report.target for report in seen) == ["sm80", "sm90"]


def test_baseline_keeps_what_was_not_compiled_again(tmp_path, monkeypatch):
    """Regenerating one op must not drop the others; a case that no op has any more goes."""
    monkeypatch.setattr(aot, "all_cases", lambda: [aot.Case(name, print) for name in ("a", "b")])
    path = tmp_path / "baseline.json"
    made = [aot.Report(case, "forward", target, registers=1) for case in ("a", "b") for target in ("sm80", "sm90")]
    assert aot.write_baseline(path, [*made, aot.Report("removed", "forward", "sm90")]) == 5
    assert aot.write_baseline(path, [aot.Report("a", "backward", "sm90", registers=2)]) == 4
    assert set(aot.read_baseline(path)["kernels"]) == {
        "sm80 a forward",
        "sm80 b forward",
        "sm90 b forward",
        "sm90 a backward",
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"kernels": {}}'])
def test_a_file_that_is_no_baseline_is_refused(tmp_path, content):
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="baseline must"):
        aot.read_baseline(path)
    with pytest.raises(SystemExit) as caught:
        aot.main(["--baseline", str(path)])
    assert caught.value.code == 2
