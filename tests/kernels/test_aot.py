"""Kernels compiled for GPUs that are not there: what the binaries prove, and that a fault in them would be seen."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

from compiled import each, reports

from vptm_kernels import aot


def of(target, kernel=None):
    found = [r for r in reports(target, "prompted_attention/") if kernel in (None, r.kernel)]
    assert found, f"nothing compiled for {target} {kernel or ''}"
    return found


def of_16_bits(target, kernel):
    """Without float32, whose products at full precision have no tensor core, nor the blocks that go with one."""
    return [r for r in of(target, kernel) if "fp32" not in r.case]


@pytest.mark.parametrize("target", each())
def test_no_spills_no_serialised_tensor_cores_and_matrix_instructions_everywhere(target):
    """Each costs more than any tuning wins, and none shows in a result."""
    for report in reports(target):
        assert not report.problems, report.row()


@pytest.mark.parametrize("target", each())
def test_nothing_is_lost_against_the_committed_baseline(target, against_baseline):
    """More spills, mma for wgmma or a kernel that is gone fails; every other difference is printed at the end."""
    against_baseline(reports(target))


@pytest.mark.parametrize("target", each())
def test_every_kernel_is_compiled(target):
    """One that no case reaches could spill unseen."""
    kernels = {
        op: {report.kernel for report in reports(target, f"{op}/")}
        for op in ("prototype_cosine", "readout_attention", "residual_norm")
    }
    assert kernels["prototype_cosine"] >= {"readout", "combine", "reader_grad", "hidden_grad", "cosine"}
    assert kernels["readout_attention"] == {"split", "merge", "grad"}
    assert kernels["residual_norm"] == {"forward", "backward"}


@pytest.mark.parametrize("target", each())
def test_readout_attention_uses_tensor_cores_and_wide_loads(target):
    for report in reports(target, "readout_attention/"):
        if report.kernel != "merge":
            assert report.tensor_core > 0, report.row()
        if report.kernel == "split" and target.startswith("sm"):
            # Tokens and weights come 16 bytes at a time; what is left are single numbers and rows of the bias.
            assert report.loads.get("async", 0) + report.loads.get("128", 0) >= 7, report.row()


@pytest.mark.parametrize("target", each(["sm80", "sm90", "sm100", "sm120"]))
def test_residual_norm_reads_rows_16_bytes_at_a_time(target):
    for report in reports(target, "residual_norm/"):
        assert report.loads.get("128"), report.row()


KINDS = {"sm80": "mma", "sm90": "wgmma", "sm100": "tcgen05", "sm120": "mma", "gfx942": "mfma", "gfx950": "mfma"}


@pytest.mark.parametrize("target", each())
def test_the_tensor_core_of_the_architecture_is_used(target):
    """Short tails and narrow prompt blocks may use any; blocks of 64 must use the architecture's own."""
    for kernel in ("forward", "query_grad"):
        for report in of_16_bits(target, kernel):
            assert report.tensor_core_kind == KINDS[target], report.row()


@pytest.mark.parametrize("target", each(["sm80", "sm90", "sm100", "sm120"]))
def test_no_two_byte_loads_of_aligned_inputs(target):
    for report in of(target):
        assert not report.loads.get("16") and not report.loads.get("8"), report.row()
        # Kernels without products read ids and entries of a table.
        assert not report.dots or report.loads.get("128", 0) + report.loads.get("async", 0) > 0, report.row()


def scores_and_counts(report):
    """Scores per thread of a forward kernel, and its instructions for them: of one trip of its loop, or of all."""
    constants = report.constants
    keys = constants["BLOCK_N"]
    if constants["SCORES_RESIDENT"]:
        blocks = constants["TOKEN_BLOCKS"] + constants["PROMPT_BLOCKS"]
        keys = blocks * keys + constants["TAIL_1"] + constants["TAIL_2"]
    counts = report.counts if constants["SCORES_RESIDENT"] else report.main_loop
    return constants["BLOCK_M"] * keys / (report.num_warps * 32), counts


@pytest.mark.parametrize("target", each(["sm80", "sm90", "sm120"]))
def test_softmax_is_computed_once(target):
    """Twice as many exponentials as scores would mean that the scores exist in two layouts."""
    for report in of(target, "forward"):
        scores, counts = scores_and_counts(report)
        assert counts["MUFU"] <= 1.15 * scores + 8, report.row()
        assert counts["FMNMX"] <= 1.35 * scores + 16, report.row()


def test_size_of_the_forward_loop_on_sm90():
    """Instructions for 32 scores a thread, 299 to 320 with a bias, and 22 more for the copies of the next block; for
    16, with rotary positions, 203 to 211. Compilers differ by a few."""
    limits = {(64, 64, 4): 326, (128, 64, 8): 326, (128, 32, 8): 216}
    for report in of_16_bits("sm90", "forward"):
        tile = report.constants["BLOCK_M"], report.constants["BLOCK_N"], report.num_warps
        assert tile in limits and (tile == (128, 32, 8)) == ("-rotary-" in report.case), report.row()
        if not report.constants["SCORES_RESIDENT"]:
            copies = 0 if report.num_stages == 1 else 22
            assert report.main_loop["total"] <= limits[tile] + copies, report.row()


def test_queries_that_come_scaled_have_more_programs_at_a_time_on_sm90():
    """Four for three, whose loads an H200 waits for: 128 registers and two blocks of keys in shared memory leave room
    for them."""
    one = {r.case.rpartition("/")[2]: r for r in of_16_bits("sm90", "forward")}
    folded = [r for name, r in one.items() if name.endswith("-folded")]
    assert len(folded) >= 3
    for report in folded:
        assert report.num_stages == 2 and report.registers <= 128, report.row()
        assert report.blocks_per_sm == 4 and report.num_warps == 4, report.row()
    scaled_there = one["forward-bf16-P50"]
    # 64 images of 197 tokens, 12 heads of 64 channels: 79 MB from DRAM.
    assert scaled_there.memory_bytes == pytest.approx(79.2e6, rel=0.01)
    assert scaled_there.programs == 3072 and scaled_there.tail_efficiency > 0.9


def test_resident_scores_save_instructions_and_leave_room_for_three_blocks_on_sm90():
    """The whole program for N=197 with up to 11 prompts; streaming it takes over 1700 instructions.

    Prompts that attend cost 280 more, for rows without a bias.
    """
    resident = [r for r in of("sm90", "forward") if r.constants["SCORES_RESIDENT"]]
    assert len(resident) >= 3
    for report in resident:
        limit = 1830 if report.constants["PROMPT_QUERIES"] else 1550
        assert report.instructions <= limit and report.blocks_per_sm >= 3, report.row()


@pytest.mark.parametrize(
    "registers,shared,tensor_memory,target,blocks",
    [(125, 49152, 0, "sm90", 4), (64, 1024, 0, "sm90", 8), (255, 16384, 0, "sm80", 2), (86, 26624, 128, "sm100", 4)],
)
def test_occupancy_follows_the_cuda_rules(registers, shared, tensor_memory, target, blocks):
    assert aot.occupancy(registers, shared, 4, target, tensor_memory)[0] == blocks


@pytest.mark.parametrize(
    "waves,shared,warps,target,expected",
    [
        (3, 8192, 4, "gfx942", (3, 0.375, "registers")),
        (8, 0, 8, "gfx942", (4, 1.0, "waves")),
        (4, 40000, 4, "gfx942", (1, 0.125, "shared memory")),
        (4, 40000, 4, "gfx950", (4, 0.5, "registers and shared memory")),
    ],
)
def test_occupancy_of_amd_targets(waves, shared, warps, target, expected):
    assert aot.amd_occupancy(waves, shared, warps, target) == expected


@pytest.mark.parametrize("target", each(["gfx942", "gfx950"]))
def test_loops_and_occupancy_of_amd_kernels_are_read(target):
    """Kernels that stream over keys or images have a loop, with matrix instructions and exponentials in it."""
    smallest = {"gfx942": 100, "gfx950": 60}[target]
    for report in of(target, "query_grad"):
        assert report.blocks_per_sm >= 1 and 0 < report.occupancy <= 1, report.row()
        assert smallest < report.main_loop["total"] < report.instructions and report.main_loop["MUFU"] > 0, report.row()


@pytest.mark.parametrize("target", each(["gfx942", "gfx950"]))
def test_amd_kernels_compute_softmax_once(target):
    """A matrix instruction too large for the tile makes warps repeat each other's scores: twice the exponentials."""
    for kernel in ("forward", "query_grad"):
        for report in of(target, kernel):
            block_m, block_n = report.constants["BLOCK_M"], report.constants["BLOCK_N"]
            if block_m >= 64:
                scores = block_m * block_n / (report.num_warps * 64)
                assert report.main_loop["MUFU"] <= 1.5 * scores, report.row()


def test_faults_are_seen(tmp_path):
    """A kernel given too few registers spills, one that reads rows at odd places reads 2 bytes at a time, and one that
    chooses between pointers would end the process of Triton 3.6 on AMD, though the Triton here may compile it."""
    script = tmp_path / "faulty.py"
    script.write_text(
        textwrap.dedent(
            """
            import json
            import torch, triton, triton.language as tl
            from dataclasses import asdict
            from vptm_kernels.aot import Case, compile_case

            @triton.jit
            def _product_kernel(x, y, stride, N: tl.constexpr, CHOOSE: tl.constexpr = False):
                i = tl.arange(0, N)
                rows = x + i * stride
                if CHOOSE:
                    rows = tl.where(i < stride - 100, rows, y.to(x.dtype) + i * N)
                a = tl.load(rows[:, None] + i[None, :])
                tl.store(y + i[:, None] * N + i[None, :], tl.dot(a, tl.dot(a, a).to(tl.float16)))

            def run(stride, **options):
                x = torch.empty(64 * 200, dtype=torch.float16)
                _product_kernel[(1,)](x, torch.empty(64, 64), stride, N=64, **options)

            cases = [Case("good", lambda t: run(128)), Case("narrow", lambda t: run(131))]
            cases.append(Case("spill", lambda t: run(128, maxnreg=40)))
            cases.append(Case("choice", lambda t: run(128, CHOOSE=True)))
            reports = [r for only in (False, True) for case in cases for r in compile_case(case, "sm80", only)]
            print(json.dumps([asdict(r) for r in reports]))
            """
        )
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    good, narrow, spill, choice, *quick = (aot.Report(**values) for values in json.loads(done.stdout))
    assert not good.problems and good.tensor_core_kind == "mma" and not good.loads.get("16"), good.row()
    assert narrow.loads.get("16"), narrow.row()
    assert spill.problems and ("spills" in spill.problems[0] or spill.error), spill.row()
    assert "chooses between pointers" in choice.problems[0]
    # read from the binary alone: the same
    assert [r.registers for r in quick] == [r.registers for r in (good, narrow, spill, choice)]
    assert [bool(r.problems) for r in quick] == [False, False, True, True], quick


def test_only_a_candidate_may_spill():
    """Forms that a card may choose are compiled beside the others and must not hide a spill of those."""
    assert aot.Report("c", "k", "sm90", spills=8).problems == ["spills 8 bytes"]
    assert aot.Report("c", "k", "sm90", spills=8, candidate=True).problems == []
    assert not any(case.candidate for case in aot.all_cases() if case.ci)


def test_a_kernel_without_its_tensor_core_or_with_a_warning_is_a_problem():
    assert aot.Report("c", "k", "sm90", dots=2).problems == ["no tensor-core instruction"]
    assert aot.Report("c", "k", "sm90", dots=2, tensor_core=4, warnings=["C7515"]).problems == ["ptxas C7515"]


@pytest.mark.parametrize("arguments", [["--targets", "sm42"], ["--cases", "no such kernel", "--targets", "sm90"]])
def test_a_selection_of_nothing_is_an_error(arguments):
    with pytest.raises(SystemExit) as caught:
        aot.main(arguments)
    assert caught.value.code == 2
