"""The committed costs of compiled kernels: what counts as lost against them, and how they are kept."""

import pytest

from vptm_kernels import aot


def test_what_counts_as_lost_and_what_as_changed():
    """A spill and another tensor-core instruction are lost; registers, new and vanished kernels only differ."""

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
    ]
    assert "sm90 case forward: registers 100 -> 120" in changed
    assert {"sm90 case gone: gone", "sm90 case fresh: new"} < set(changed)
    lost, _ = aot.compare([report(tensor_core=0, tensor_core_kind="")], baseline)
    assert lost == ["sm90 case forward: tensor cores wgmma -> none"]


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
