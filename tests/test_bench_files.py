"""The checks inside the bench files: what each refuses to time."""

from __future__ import annotations

import pytest
import torch

from bench import bench_import, bench_prompt_init, bench_task_bank, timing


def test_prompts_that_are_no_tokens_are_refused(monkeypatch):
    """Prompts drawn from noise cost nothing to make: they must not count as a fast initialisation."""
    loader = bench_prompt_init._loader().dataset
    few = torch.utils.data.DataLoader(torch.utils.data.Subset(loader, range(20)), batch_size=8)
    monkeypatch.setattr(bench_prompt_init, "_loader", lambda: few)
    check = bench_prompt_init.each_is_a_token("random")
    honest = bench_prompt_init._ours("random")
    check("vptm", honest)
    check("every image forwarded", bench_prompt_init._published("random"))
    with pytest.raises(AssertionError, match="noise: a prompt of layer 0 is no token"):
        check("noise", torch.randn_like(honest))
    with pytest.raises(AssertionError, match="copies: the prompts of layer 0 are copies"):
        check("copies", honest[:, :1].expand_as(honest))


def test_a_failing_import_is_refused_by_name():
    with pytest.raises(RuntimeError, match="no_such_package: ModuleNotFoundError"):
        bench_import.seconds_to_import("no_such_package")


def test_an_import_that_starts_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(bench_import, "_CHILD", "print('[0.01, true]')")
    with pytest.raises(RuntimeError, match="vptm: importing it started CUDA"):
        bench_import.seconds_to_import("vptm")


def test_a_slower_import_lowers_the_ratio(monkeypatch):
    """The clock of the import bench is the child's own report: twice the seconds of ours, half the ratio."""
    for seconds, ratio in ((0.05, 8.0), (0.1, 4.0)):
        runs = {"vptm": lambda s=seconds: s, "timm": lambda: 0.4}
        found = timing.compare(runs, check=None, clock=bench_import.by_its_own_report)
        assert found.speed_up("timm") == ratio


@pytest.mark.parametrize("where", bench_task_bank.WHERE)
def test_images_that_get_another_tasks_prompts_or_prototypes_are_refused(where, monkeypatch):
    """A pool read at the wrong rows is as fast as the right one."""
    monkeypatch.setattr(bench_task_bank, "TOKENS", 5)
    monkeypatch.setattr(bench_task_bank, "CLASSES", 7)
    for cached in (bench_task_bank._problem, bench_task_bank._check):
        cached.cache_clear()
    x = bench_task_bank._problem(4)
    shifted = x._replace(ranges=x.ranges.roll(1, 0), task_ids=x.task_ids.roll(1, 0))
    ours, peer = bench_task_bank.WHERE[where]["vptm"], bench_task_bank.WHERE[where]["call per task"]
    check = bench_task_bank._check(where, 4)
    runs = {"shifted": lambda: ours(shifted), "peer": lambda: peer(x), "vptm": lambda: ours(x)}
    found = timing.compare(runs, check=check)
    assert set(found.seconds) == {"vptm", "peer"} and "exceeds the budget" in found.refused["shifted"]
    for cached in (bench_task_bank._problem, bench_task_bank._check):
        cached.cache_clear()
