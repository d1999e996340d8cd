"""The search behind the tables of block sizes: it finds what is faster, never what is wrong, and ends in time."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import autotune


class Config(NamedTuple):
    block_m: int
    num_warps: int
    num_stages: int


BEST = Config(128, 8, 1)


class Op:
    """An op whose time follows from the block sizes its table gave: the farther from BEST, the slower."""

    def __init__(self) -> None:
        self.table_answer = Config(32, 4, 2)
        self.module = SimpleNamespace(forward_config=lambda arch, bits: self.table_answer, next_power_of_2=len)
        self.ran = []

    def run(self):
        self.config = self.module.forward_config("sm90", 16)
        self.ran.append(self.config)
        if self.config.block_m == 256:
            raise RuntimeError("out of resource: shared memory")
        wrong = self.config.num_warps == 16
        return (torch.full((4,), float("nan")) if wrong else torch.ones(4),)

    def prepare(self, run):
        run()
        config = self.config
        return lambda: config

    def clock(self, timed):
        distance = sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(timed(), BEST))
        # the wrong one would win if it were let through
        return 0.1 if timed().num_warps == 16 else 1.0 + distance

    def search(self, out_of_time=lambda: False):
        log = []
        found = autotune.search(self.module, self.run, self.prepare, self.clock, out_of_time, log.append)
        return list(found), log


def test_search_finds_the_fastest_block_sizes_and_refuses_wrong_ones():
    """Two doublings of the block, one of the warps, one stage less; 16 warps give NaN and 256 rows do not launch."""
    op = Op()
    [(setting, table, best, speed_up, seconds)], log = op.search()
    assert setting == ("forward_config", ("sm90", 16))
    assert (table, best) == (op.table_answer, BEST)
    assert seconds == 1 + 2 + 1 + 1 and speed_up == 5
    assert any("gives another result" in line for line in log)
    assert any("shared memory" in line for line in log)
    assert op.module.forward_config("sm90", 16) == op.table_answer, "the table is put back"


def test_a_candidate_that_breaks_the_gpu_ends_the_search_with_what_was_found():
    """After an illegal access nothing can be launched: every later candidate would fail, and the measurements before it
    be lost with the final comparison that cannot be made."""
    op, log = Op(), []
    found = autotune.search(
        op.module, op.run, op.prepare, op.clock, lambda: False, log.append, works=lambda: op.config.block_m < 256
    )
    setting, table, best, speed_up, seconds = next(found)
    assert (setting[0], table, best.block_m, seconds) == ("forward_config", op.table_answer, 128, 5)
    assert speed_up == pytest.approx(5 / 3)
    ran = len(op.ran)
    with pytest.raises(autotune.Broken, match=r"forward_config with block_m=256 .*: out of resource: shared memory"):
        next(found)
    assert len(op.ran) == ran and op.module.forward_config("sm90", 16) == op.table_answer
    assert autotune.usable("cpu")


def test_a_broken_gpu_is_named_and_what_was_not_reached_as_well(monkeypatch, tmp_path):
    def search(*arguments, **options):
        raise autotune.Broken("query_grad_config with num_warps=8: CUDA error: an illegal memory access")
        yield

    monkeypatch.setattr(autotune, "search", search)
    monkeypatch.setattr(autotune, "rehearsal", lambda: autotune.Place("cpu", torch.float32, tiny=True))
    calls = [autotune.Call("prompted_attention", name, lambda place: lambda: ()) for name in ("a", "b")]
    monkeypatch.setattr(autotune, "calls", lambda: calls)
    monkeypatch.setattr(autotune, "REHEARSED", 2)
    path = tmp_path / "found.json"
    assert autotune.main(["--rehearse", "--json", str(path)]) == 1
    found = json.loads(path.read_text())
    assert found["broken by"].startswith("prompted_attention: a: query_grad_config with num_warps=8")
    assert found["not reached"] == ["prompted_attention: b"]


def test_no_table_of_attention_gives_two_warpgroups_the_same_rows():
    """On an H200 query gradients of 64 rows by eight warps came out wrong, or read where they must not."""
    from vptm_kernels.prompted_attention import configs

    flags = (False, True)
    found = []
    for dim, tokens in itertools.product((16, 32, 48, 64, 80, 128), (5, 50, 197, 577)):
        shape = ("sm90", 16, dim, tokens)
        for extra, bits, scaled, pooled, attend in itertools.product((0, 50), (0, 16, 32), flags, flags, flags):
            forward = (*shape, tokens + extra, bits, scaled, pooled, attend)
            found += [configs.forward_config(*forward, gathered=gathered) for gathered in flags]
            found += configs.forward_candidates(*forward)
        for attend, columns, values, turned, bits in itertools.product(flags, flags, flags, flags, (0, 16, 32)):
            options = {"prompts_attend": attend, "prompt_columns": columns, "bias_bits": bits}
            found.append(configs.query_grad_config(*shape, **options, column_bias=values, rotary=turned))
        for of_prompts, attend, gathered in itertools.product(flags, flags, flags):
            options = {"of_prompts": of_prompts, "prompts_attend": attend, "gathered": gathered}
            found.append(configs.key_grad_config(*shape, **options))
        found += [configs.bias_grad_config(*shape), *configs.query_grad_candidates(*shape)]
    assert len(set(found)) > 5 and not [config for config in found if autotune.shares_rows(config)]
    wide = configs.query_grad_config("sm90", 16, 64, 197)
    assert autotune.shares_rows(wide._replace(block_m=64, num_warps=8))
    tried = autotune.block_sizes(wide, "sm90")
    assert (
        tried
        and not any(map(autotune.shares_rows, tried))
        and any(map(autotune.shares_rows, autotune.block_sizes(wide)))
    )


def test_search_proposes_nothing_where_the_table_is_best():
    op = Op()
    op.table_answer = BEST
    [(_, table, best, speed_up, _)], _ = op.search()
    assert table == best and speed_up == 1


@pytest.mark.parametrize(
    "answer, found",
    [
        ((2, 4), [(1, 4), (4, 4), (2, 2), (2, 8)]),
        (Config(16, 16, 1), [Config(32, 16, 1), Config(16, 8, 1), Config(16, 16, 2)]),
    ],
    ids=["plain numbers", "at its limits"],
)
def test_neighbours_change_one_thing(answer, found):
    assert autotune.neighbours(answer) == found


def test_other_forms_of_a_kernel_are_tried_whatever_lies_between():
    """Twice the rows and the warps, and keys resident: each step alone is slower, or is no step of a search."""

    class Form(NamedTuple):
        block_m: int
        num_warps: int
        max_registers: int = 0
        keys_resident: bool = False

    small, large = Form(64, 4), Form(128, 8, 128, True)
    configs = SimpleNamespace(forward_candidates=lambda arch, keys: [large._replace(keys_resident=False), large])
    module = SimpleNamespace(forward_config=lambda arch, keys: small)
    taken = []

    def run():
        taken.append(module.forward_config("sm90", 247))
        return (torch.ones(2),)

    def prepare(run):
        run()
        form = taken[-1]
        return lambda: form

    clock = lambda timed: 1.0 if timed() == large else 2.0 if timed() == small else 3.0  # noqa: E731
    others = lambda setting: autotune.candidates(configs, setting)  # noqa: E731
    found = autotune.search(module, run, prepare, clock, lambda: False, lambda _: None, others)
    [(setting, table, best, speed_up, _)] = found
    assert (setting, table, best, speed_up) == (("forward_config", ("sm90", 247)), small, large, 2)
    assert autotune.candidates(configs, ("query_grad_config", ())) == []


def test_forms_of_the_attention_kernel_can_be_chosen_by_a_card():
    """The forms that static counts cannot decide between are all there for the shapes that are timed, and none that
    the kernel cannot take: pooled prompts have no number of keys to write out."""
    from vptm_kernels.prompted_attention import configs

    arguments = ("sm90", 16, 64, 197, 247, 16, False, False, False)
    found = autotune.candidates(configs, ("forward_config", arguments))
    table = configs.forward_config(*arguments)
    assert table not in found and len(set(found)) == len(found)
    forms = {(c.block_m, c.keys_resident, c.scores_resident) for c in [table, *found]}
    assert forms == {(64, False, False), (128, False, False), (128, True, False), (64, True, True)}
    assert any(c.heads_first for c in found)
    pooled = configs.forward_candidates(*arguments[:7], True, False)
    assert pooled and not any(c.keys_resident or c.scores_resident for c in pooled)
    assert not any(c.max_registers for c in configs.forward_candidates("gfx942", *arguments[1:]))
    assert autotune.candidates(configs, ("query_grad_config", arguments[:4]))[0].block_m == 128


def test_search_stops_when_time_is_up():
    op = Op()
    found, _ = op.search(out_of_time=lambda: len(op.ran) > 5)
    assert len(op.ran) <= 10
    assert found[0][2] != BEST, "it had no time to get there"


@pytest.mark.parametrize("op", sorted({call.op for call in autotune.calls()}))
def test_ops_that_are_tuned_have_tables_to_tune(op):
    """A renamed table function would leave the search without anything to vary."""
    pytest.importorskip("triton")
    module = __import__(f"vptm_kernels.{op}.triton_impl", fromlist=["_"])
    assert {"forward_config", "row_block"} & set(autotune.tables(module))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert autotune.main([]) == 2
    assert capsys.readouterr().err == "no GPU here: block sizes are timed on one\n"
    assert autotune.main(["--list"]) == 0
    assert "prompted_attention: forward, B=64" in capsys.readouterr().out


@pytest.mark.parametrize("call", autotune.calls(), ids=lambda call: f"{call.op} {call.name}")
def test_calls_are_what_the_ops_take(call, monkeypatch):
    """Traced with tensors that claim a GPU: an argument that an op no longer takes would cost time on a real one."""
    pytest.importorskip("triton")

    def grad(outputs, inputs, gradients):
        """What the backward pass is given; it cannot run on tensors without a device."""
        for output, gradient in zip(outputs, gradients, strict=True):
            assert output.requires_grad and output.shape == gradient.shape
        assert all(t.requires_grad and t.is_leaf for t in inputs)
        return tuple(torch.empty_like(t) for t in inputs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with FakeTensorMode():
        found = call.make(autotune.Place())()
    assert found and all(t.device.type == "cuda" and t.dtype == torch.bfloat16 for t in found)
