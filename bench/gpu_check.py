"""A GPU that is borrowed for minutes, in two commands: what is right on it, and what is fast.

    python -m bench.kernel_cache pack kernels/sm90.tar.xz          # before, on any machine with the GPU's versions
    python -m bench.gpu_check first --budget 360 --out DIR         # correctness, headlines, compiled peers, block sizes
    python -m bench.gpu_check second --budget 240 --out DIR        # after mending: headlines again, float16, sanitizer
    python -m bench.gpu_check first --list                         # stages, their seconds and commands
    python -m bench.gpu_check --rehearse                           # no GPU needed: every stage to its end, tiny

The order is that of worth, and a run that is cut short has what came before: `first.json` in the folder is rewritten
after every stage, and `first.jsonl` gets every timing when it is made. A stage runs in a process of its own within a
limit; what it leaves over goes to the later ones, and one that would get less than it needs is skipped by name.
Compiled peers are compiled from the first second on by processes that are stopped while anything is timed. Kernels come
from `--kernels`, the archive of `bench.kernel_cache`; whether Triton takes them is asked first and said, and without
them they are compiled when first launched. `--wheels FOLDER` installs what is in it for this run alone. Where there is
no git folder, VPTM_COMMIT says of which commit the results are.

Afterwards, where the results are to stand: `cp DIR/first.json bench/results/NAME.json && python -m bench.report`.

Exit status: 0 if every stage that ran and every warmer passed, 1 if one did not, 2 without a GPU or for arguments that
select nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import kernel_cache, timing
from vptm.weights.files import write_atomically

ROOT = Path(__file__).parent.parent
BUDGETS = {"first": 360.0, "second": 240.0}
KERNELS = ROOT / "kernels" / f"{kernel_cache.TARGET}.tar.xz"
# Of a machine with 16 cores; compiled peers are being compiled beside them.
WORKERS = 14
# How long an interrupted stage has to write its results.
GRACE = 5.0

# ------------------------------------------------------------------ what is measured

# those that `-m gpu` selects from: every worker collects all it is given
OPS = ("prompted_attention", "readout_attention", "prototype_cosine", "residual_norm")
TESTS = ("tests/kernels/test_on_gpu.py", *(f"tests/kernels/test_{op}.py" for op in OPS))
FILES = ("bench_prompted_attention.py", "bench_model.py", "bench_training_step.py")
ATTENTION = tuple(f"B=64 H=12 N=197 P={prompts}" for prompts in (0, 50, 100))
# the last one is what the package does by default
MODELS = ("deep-100-64", "deep-100-1", "shallow-10-64", "shallow-10-64-mask")
OTHER_BATCHES = ("B=8 H=12 N=197 P=50", "B=256 H=12 N=197 P=50", "deep-100-8", "deep-100-256")
HALF = ("B=64 H=12 N=197 P=50", "deep-100-64")
# Compiled for minutes, so for one setting alone, and of the strongest peer.
MAX_AUTOTUNE = "PEFT-style prefix compiled max-autotune"


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        command: follows `python`, with {result} for the json it writes, {each} for lines of json as they are made and
            {seconds} for its time.
        seconds: its share of the budget.
        needs: with less it is not begun.
        program: what must be on the path for it, and runs it.
        environment: added to that of the run.
        timed: nothing else may run meanwhile.
        warmed: it waits for what compiles from the first second on.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: float
    program: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    timed: bool = False
    warmed: bool = False


@dataclass(frozen=True)
class Plan:
    """Stages, most important first, and the commands that compile for them from the first second on."""

    stages: tuple[Stage, ...]
    warmers: tuple[Stage, ...]


def _peers(compiled: bool, files: Sequence[str]) -> str:
    """Names for --peers: of these benches, which know no others, those that torch.compile makes, or the others."""
    found: dict[str, None] = {}
    for file in files:
        peers = importlib.import_module(f"bench.{file.removesuffix('.py')}").PEERS
        wanted = {name: peer for name, peer in peers.items() if not peer.named and "cpu" not in peer.needs}
        found |= dict.fromkeys(name for name, peer in wanted.items() if (peer.mode is not None) == compiled)
    return ",".join(found)


def _bench(settings: Sequence[str], peers: str, rehearse: bool, dtype: str, files: Sequence[str]) -> tuple[str, ...]:
    if rehearse:
        # one of each kind; a tiny attention has few tokens and heads whatever it is asked for
        kinds = {"=" in label: label for label in reversed(settings)}
        settings = [" ".join(w for w in label.split() if not w.startswith(("H=", "N="))) for label in kinds.values()]
    place = ("--device", "cpu", "--grid", "tiny") if rehearse else ("--device", "cuda", "--grid", "full")
    quiet = ("-q", "--no-header", "-rs", "-p", "no:cacheprovider", "-k", "vptm]")
    which = ("--dtype", dtype, "--settings", ",".join(settings), "--peers", peers)
    result = ("--benchmark-only", "--benchmark-json", "{result}", "--each", "{each}")
    return ("-m", "pytest", *(f"bench/{file}" for file in files), *quiet, *place, *which, *result)


def plan(part: str, rehearse: bool = False) -> Plan:
    """Of "first" or "second". rehearse: the same stages on a CPU, on tiny models and in the interpreter."""
    if rehearse:
        timing.select(timing.Selection("cpu", (torch.bfloat16,), (), True, True))
    everything, models_first = (*ATTENTION, *MODELS), (*FILES[1:], *FILES[:1])

    def bench(
        name: str,
        seconds: float,
        needs: float,
        settings: Sequence[str],
        dtype: str = "bfloat16",
        files: Sequence[str] = FILES,
        compiled: bool = False,
        warmed: bool = False,
        peers: str | None = None,
    ) -> Stage:
        command = _bench(settings, peers or _peers(compiled, files), rehearse, dtype, files)
        return Stage(name, command, seconds, needs, timed=True, warmed=warmed)

    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    tiny = ("--rehearse",) if rehearse else ()
    facts = ("-m", "bench.gpu_check", "facts", "--out", "{result}", *tiny)
    environment = Stage("environment", facts, 15, 8)
    if part == "first":
        # all of them where there is a GPU; elsewhere a few in the interpreter
        tests = (
            "-m",
            "pytest",
            *(TESTS[:1] if rehearse else TESTS),
            "-m",
            "gpu",
            "-v",
            "--no-header",
            "--tb=short",
            "-p",
            "no:cacheprovider",
        )
        few = ("-k", "residual_norm") if rehearse else ("--hypothesis-profile", "quick")
        # a whole model takes as long as thirty small calls: whoever is done takes from the others
        workers = (
            ("-n", str(WORKERS), "--dist", "worksteal") if not rehearse and importlib.util.find_spec("xdist") else ()
        )
        tuning = ("-m", "bench.autotune", "--exhaustive", "--seconds", "{seconds}", "--json", "{result}")
        stages: tuple[Stage, ...] = (
            environment,
            Stage("correctness", (*tests, *few, *workers), 60, 30),
            bench("headlines", 60, 35, everything),
            bench("compiled peers", 120, 60, everything, files=models_first, compiled=True, warmed=True),
            Stage("block sizes", (*tuning, *tiny), 50, 20, "", interpreted, timed=True),
        )
    else:
        small = ("-m", "bench.small_case", "--ops", *tiny)
        tool = () if rehearse else ("--tool", "memcheck", "--error-exitcode", "1", sys.executable)
        program = "" if rehearse else "compute-sanitizer"
        slow = MODELS[:1]
        stages = (
            environment,
            bench("headlines", 45, 35, everything),
            bench("compiled peers", 55, 40, everything, files=models_first, compiled=True, warmed=True),
            bench("float16", 20, 15, HALF, dtype="float16", files=FILES[:2]),
            bench("other batches", 25, 15, OTHER_BATCHES, files=FILES[:2]),
            bench("max-autotune", 45, 30, slow, files=FILES[1:2], peers=MAX_AUTOTUNE),
            Stage("sanitizer", (*tool, *small), 20, 12, program, interpreted),
        )
    # one process for every setting of a model, whose compiling takes half a minute each
    groups = [(FILES[:1], ATTENTION), *((FILES[1:2], (setting,)) for setting in MODELS), (FILES[2:], MODELS[:1])]
    warmers = [
        replace(bench(f"compiling {settings[-1]}", 0, 0, settings, files=files, compiled=True), timed=False)
        for files, settings in (groups[:1] if rehearse else groups)
    ]
    return Plan(stages, tuple(warmers))


# ------------------------------------------------------------------ running them


class Check:
    """Runs the stages of a part within a budget and keeps its json up to date.

    out: gets `{part}.json`, `{part}.jsonl` and `{part}.log`. work: a folder for caches. environment: of every process.
    """

    def __init__(
        self, part: str, out: Path, work: Path, budget: float, describe: Mapping[str, Any], environment: dict[str, str]
    ) -> None:
        self.budget, self.work, self.environment = budget, work, environment
        self.started = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self.json, self.each, self.log = (out / f"{part}{suffix}" for suffix in (".json", ".jsonl", ".log"))
        self.warmers: dict[str, Running] = {}
        self.document: dict[str, Any] = {
            **describe,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "budget seconds": budget,
            "finished": False,
            "stages": [],
        }
        for path in (self.each, self.log):
            path.write_text("", encoding="utf-8")
        self.write()

    def write(self) -> None:
        write_atomically(self.json, json.dumps(self.document, indent=1))

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def run(self, plan: Plan) -> bool:
        """Whether every stage that was begun passed, and all that compiled for them and came to its end."""
        try:
            for stage in plan.warmers:
                command = self._filled(stage, self.work / "warm.json", self.work / "warm.jsonl", 0)
                log = self.work / f"{len(self.warmers)}.log"
                self.warmers[stage.name] = Running(command, log, self.environment | dict(stage.environment))
            for i, stage in enumerate(plan.stages):
                later = sum(other.seconds for other in plan.stages[i + 1 :])
                limit = min(self.left(), max(stage.seconds, self.left() - later))
                self.document["stages"].append(self._run_one(stage, limit))
                join(self.document["stages"])
                self.document["seconds"] = round(time.monotonic() - self.started, 1)
                self.write()
                print(_line(self.document["stages"][-1]), flush=True)
        finally:
            self._end_warmers()
        self.document["gpu state after"] = timing.gpu_state()
        self.document["finished"] = True
        self.write()
        passed = all(entry["status"] in ("passed", "skipped") for entry in self.document["stages"])
        return passed and "failed warmers" not in self.document

    def _run_one(self, stage: Stage, limit: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": stage.name, "limit": round(limit, 1), "seconds": 0.0}
        if stage.program and shutil.which(stage.program) is None:
            return entry | {"status": "skipped", "why": f"{stage.program} is not installed"}
        if limit < stage.needs:
            return entry | {"status": "skipped", "why": f"needs {stage.needs:.0f} s, {max(limit, 0):.0f} s are left"}
        if stage.warmed:
            entry["compiled before"] = self._wait_for_warmers(limit - stage.needs)
            limit -= sum(entry["compiled before"].values())
            entry["limit"] = round(limit, 1)
        result, log = self.work / f"{stage.name}.json", self.work / f"{stage.name}.log"
        work = limit - min(GRACE, limit / 4)
        command = self._filled(stage, result, self.each, 0.9 * work)
        shown = [stage.program or "python", *stage.command]
        entry["command"] = " ".join("python" if part == sys.executable else part for part in shown)
        written = self.each.stat().st_size
        started = time.monotonic()
        with self._alone() if stage.timed else contextlib.nullcontext():
            running = Running(command, log, self.environment | dict(stage.environment))
            code = running.bounded(work, limit - work)
        entry["seconds"] = round(time.monotonic() - started, 1)
        text = log.read_text(encoding="utf-8", errors="replace")
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"=== {stage.name}\n{text}\n")
        status = "stopped at its limit" if code is None else "passed" if code == 0 else "failed"
        entry |= {"status": status, "exit status": code}
        self._read(entry, result, written)
        if "-v" in stage.command:
            entry["tests"] = outcomes(text)
        if status != "passed":
            entry["tail"] = text.strip().splitlines()[-25:]
        return entry

    def _filled(self, stage: Stage, result: Path, each: Path, seconds: float) -> list[str]:
        filled = {"{result}": str(result), "{each}": str(each), "{seconds}": str(int(seconds))}
        return [stage.program or sys.executable, *(filled.get(part, part) for part in stage.command)]

    def _read(self, entry: dict[str, Any], result: Path, written: int) -> None:
        """The result of a stage: its json, or the lines that it had written when it was stopped."""
        if result.is_file() and result.stat().st_size:
            try:
                entry["result"] = _without_samples(json.loads(result.read_text(encoding="utf-8")))
                return
            except json.JSONDecodeError as error:
                entry["why"] = f"its json is not complete: {error}"
        with self.each.open(encoding="utf-8") as file:
            file.seek(written)
            lines = [line for line in file if line.endswith("\n")]
        if lines:
            machine = self.document.get("environment", {}) | {"command": entry["command"]}
            entry["result"] = {"machine_info": machine, "benchmarks": [json.loads(line) for line in lines]}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, what compiles in the background stands still."""
        waiting = [warmer for warmer in self.warmers.values() if warmer.child.poll() is None]
        for warmer in waiting:
            warmer.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for warmer in waiting:
                warmer.signal(signal.SIGCONT)

    def _wait_for_warmers(self, most: float) -> dict[str, float]:
        """Seconds that were waited for each; what is not done by then is ended, and compiled by the stage itself."""
        found, end = {}, time.monotonic() + max(0.0, most)
        for name, warmer in self.warmers.items():
            started = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                warmer.child.wait(max(0.0, end - time.monotonic()))
            found[name] = round(time.monotonic() - started, 1)
        self._end_warmers()
        return found

    def _end_warmers(self) -> None:
        for name, warmer in self.warmers.items():
            status = warmer.child.poll()
            if status:
                self.document.setdefault("failed warmers", {})[name] = status
                print(f"{name} failed with exit status {status}", flush=True)
            warmer.kill()
            with self.log.open("a", encoding="utf-8") as file:
                how = "not done" if status is None else f"exit status {status}"
                file.write(f"=== {name}: {how}\n{warmer.log.read_text(encoding='utf-8', errors='replace')}\n")
        self.warmers = {}


def _restore_interrupt() -> None:
    """What a shell runs in its background ignores SIGINT, and so would the processes it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A process with all of its children in a group of its own."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as file:
            self.child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_restore_interrupt,
            )

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.child.wait()

    def bounded(self, work: float, grace: float) -> int | None:
        """Exit status; None if it was interrupted after `work` seconds, and killed `grace` later if it still ran."""
        interrupted = False
        try:
            return self.child.wait(work)
        except subprocess.TimeoutExpired:
            interrupted = True
            self.signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(grace)
            return None
        finally:
            # also when this process is interrupted itself: nothing may go on using the GPU
            if interrupted or self.child.poll() is None:
                self.kill()


def _without_samples(result: dict[str, Any]) -> dict[str, Any]:
    for bench in result.get("benchmarks", []):
        bench.get("stats", {}).pop("data", None)
    return result


def join(stages: Sequence[dict[str, Any]]) -> None:
    """Benches that an earlier stage has timed are taken out of the last one and add to that what it lacks: compiled
    peers have a stage of their own, and a row is measured once."""
    *earlier, last = (stage.get("result", {}).get("benchmarks", []) for stage in stages)
    known = {bench["fullname"]: bench for benches in earlier for bench in benches}
    for bench in [bench for bench in last if bench["fullname"] in known]:
        first = known[bench["fullname"]]
        first["extra_info"] = timing.merged(bench["extra_info"], first["extra_info"])
        last.remove(bench)


_OUTCOME = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
# alone: "tests/x.py::name OUTCOME (reason) [ 5%]"; with several workers: "[gw0] [ 5%] OUTCOME tests/x.py::name"
_PROGRESS = (
    re.compile(rf"^(?P<name>\S+?::.*?) (?P<outcome>{_OUTCOME})(?: \(.*)?\s*(?:\[\s*\d+%\])?$"),
    re.compile(rf"^\[gw\d+\] \[\s*\d+%\] (?P<outcome>{_OUTCOME}) (?P<name>\S+?::.*)$"),
)


def outcomes(text: str) -> dict[str, Any]:
    """Counts of what `pytest -v` printed, complete or not, and the names of the tests that failed."""
    lines = [line.rstrip() for line in text.splitlines()]
    found = [match for line in lines for pattern in _PROGRESS if (match := pattern.match(line))]
    failed = [match["name"].strip() for match in found if match["outcome"] in ("FAILED", "ERROR")]
    return {"counts": dict(Counter(match["outcome"].lower() for match in found)), "failed": failed}


def _line(entry: dict[str, Any]) -> str:
    text = f"{entry['name']:28s} {entry['status']:21s} {entry['seconds']:6.1f} s of {entry['limit']:.0f}"
    if "why" in entry:
        text += f"  {entry['why']}"
    if "tests" in entry:
        text += "  " + ", ".join(f"{count} {what}" for what, count in entry["tests"]["counts"].items())
    benches = entry.get("result", {}).get("benchmarks", [])
    if benches:
        text += f"  {len(benches)} timings"
    return text


def closing(document: dict[str, Any]) -> list[str]:
    """The ratios of every comparison, and what the search proposes."""
    lines = []
    for entry in document["stages"]:
        result = entry.get("result", {})
        for bench in result.get("benchmarks", []):
            info = bench["extra_info"]
            ratios = [f"{v:.2f}x {k.removeprefix('speed-up ')}" for k, v in info.items() if k.startswith("speed-up ")]
            if ratios:
                lines.append(f"{bench['group']}: {', '.join(ratios)}")
        for found in result.get("proposals", []):
            arguments = ", ".join(map(repr, found["arguments"]))
            lines.append(f"{found['op']}.{found['function']}({arguments}) -> {found['proposed']} {found['speed_up']}x")
        lines += [f"{entry['name']}: {name}" for name in entry.get("tests", {}).get("failed", [])]
    return lines


# ------------------------------------------------------------------ before the stages


def another_card(architecture: str | None, name: str | None) -> str | None:
    """One line if the card is not of the kind that the plan and its kernels were made for."""
    if architecture in (None, kernel_cache.TARGET):
        return None
    return f"another card than planned: {name} is {architecture}, planned was {kernel_cache.TARGET}; its numbers stand"


def _card() -> str | None:
    from vptm_kernels._runtime.triton_support import architecture

    return architecture(torch.device("cuda")) if torch.cuda.is_available() else None


def prepare(
    work: Path, kernels: Path | None = None, wheels: Path | None = None, rehearse: bool = False
) -> tuple[dict[str, str], list[str]]:
    """The environment of every stage, and a line for everything that is not as planned.

    Raises:
        ValueError: an archive or folder that was named cannot be used.
    """
    notes = []
    cache = work / "triton"
    environment = kernel_cache.environment(cache)
    environment |= {
        "PYTHONUNBUFFERED": "1",
        # of a run before, where one is named: compiling its peers took longer than timing them
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(work / "inductor"),
        # several processes compile at a time
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }
    if rehearse:
        # so small that threads would wait for each other
        environment["OMP_NUM_THREADS"] = "1"
    card = _card()
    if card is not None and (line := another_card(card, torch.cuda.get_device_name())):
        notes.append(line)
    if kernels is not None:
        manifest = kernel_cache.unpack(kernels, cache)
        if line := kernel_cache.misfit(manifest, card):
            notes.append(line)
    if wheels is not None:
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files:
            raise ValueError(f"wheels must be a folder of wheels, got {wheels}")
        site = str(work / "site")
        quiet = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *quiet, "--target", site, *files], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"wheels must install here, got {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
        environment["PYTHONPATH"] = os.pathsep.join([site, environment["PYTHONPATH"]])
    if timing.commit() is None:
        notes.append("the commit is unknown, and no result of it can be published: set VPTM_COMMIT")
    return environment, notes


def facts(rehearse: bool) -> dict[str, Any]:
    """What this machine is, reaches and takes: versions, measured ceilings, programs, and the packed kernels."""
    device, dtypes = ("cpu", (torch.float32,)) if rehearse else ("cuda", (torch.bfloat16, torch.float16, torch.float32))
    found: dict[str, Any] = {"environment": timing.environment(), "cores": os.cpu_count(), "ceilings": {}}
    if rehearse:
        timing.select(timing.Selection(device, dtypes, (), True, True))
    for dtype in dtypes:
        copied, multiplied = timing.ceilings(device, dtype)
        found["ceilings"][str(dtype)] = {"bytes per second": copied, "operations per second": multiplied}
    programs = ("compute-sanitizer", "ncu", "nvcc", "gcc")
    found["programs"] = {name: shutil.which(name) is not None for name in programs}
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    found["packed kernels"] = len(kernel_cache.kernels(folder))
    found["packed kernels are accepted"] = None
    if found["packed kernels"]:
        target = kernel_cache.TARGET if rehearse else None
        found["packed kernels are accepted"] = kernel_cache.accepted(folder, target)
    return found


def rehearsed_report(out: Path, parts: Sequence[str]) -> None:
    """`results.md` and a README of the rehearsal beside its json, by the code that makes those of the project."""
    from bench import plots, report

    parts = [
        part
        for part in parts
        if any(result["benchmarks"] for result in plots.results_of(json.loads((out / f"{part}.json").read_text())))
    ]
    if not parts:
        return
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        # results of one machine must be of one commit, and this may be the one that measured those of a CPU
        shutil.copytree(report.RESULTS, results, ignore=lambda at, names: [n for n in names if n.startswith("cpu")])
        for part in parts:
            shutil.copy(out / f"{part}.json", results / f"rehearsal_{part}.json")
        kept, report.RESULTS = report.RESULTS, results
        try:
            sources = [source for part in parts for source in report.read(results / f"rehearsal_{part}.json")]
            (out / report.TABLES).write_text(report.tables(sources), encoding="utf-8")
            readme = (ROOT / "README.md").read_text(encoding="utf-8")
            (out / "README.md").write_text(report.updated(readme), encoding="utf-8")
        finally:
            report.RESULTS = kept


# ------------------------------------------------------------------ command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=(*BUDGETS, "facts"), help="without one, --rehearse runs both")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"of a part (default: {BUDGETS})")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", metavar="FOLDER")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="archive of bench.kernel_cache")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages to install for this run")
    parser.add_argument("--only", metavar="NAMES", help="comma separated stages")
    parser.add_argument("--list", action="store_true", help="print the stages and what they run")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: every stage to its end, tiny")
    options = parser.parse_args(argv)
    if options.part == "facts":
        options.out.write_text(json.dumps(facts(options.rehearse)), encoding="utf-8")
        return 0
    if options.part is None and not options.rehearse:
        parser.error("a part must be named, first or second")
    if options.budget is not None and options.budget <= 0:
        parser.error(f"--budget must be positive, got {options.budget:g}")
    parts = [options.part] if options.part else list(BUDGETS)
    if not (options.list or options.rehearse or torch.cuda.is_available()):
        print("no GPU here: torch sees none (--rehearse runs every stage without one)", file=sys.stderr)
        return 2
    if options.kernels is None and KERNELS.is_file():
        options.kernels = KERNELS
    # asked to end, it ends its stage too; a default SIGTERM would leave that running on the GPU
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        passed = [_run(part, options, [*(sys.argv[1:] if argv is None else argv)]) for part in parts]
        if options.rehearse and not options.list:
            rehearsed_report(options.out, parts)
    except ValueError as error:
        parser.error(str(error))
    return 0 if all(passed) else 1


def _run(part: str, options: argparse.Namespace, argv: Sequence[str]) -> bool:
    chosen = plan(part, options.rehearse)
    if options.only is not None:
        names = [name.strip() for name in options.only.split(",") if name.strip()]
        known = [stage.name for stage in chosen.stages]
        if not names or not set(names) <= set(known):
            wrong = ", ".join(sorted(set(names) - set(known))) or "nothing"
            raise ValueError(f"--only must be of {', '.join(known)}, got {wrong}")
        stages = tuple(stage for stage in chosen.stages if stage.name in names)
        warmers = chosen.warmers if any(stage.warmed for stage in stages) else ()
        chosen = Plan(stages, warmers)
    if options.list:
        for stage in chosen.stages:
            command = " ".join([stage.program or "python", *stage.command])
            print(f"{stage.name:16s} {stage.seconds:4.0f} s, needs {stage.needs:3.0f}  {command}")
        return True
    # a rehearsal is to come to its end on a machine of any speed
    budget = options.budget or (24 * 3600.0 if options.rehearse else BUDGETS[part])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment, notes = prepare(work, options.kernels, options.wheels, options.rehearse)
        for note in notes:
            print(note, flush=True)
        describe = {
            "part": part,
            "command": " ".join(["python -m bench.gpu_check", *_without_folders(argv)]),
            "rehearsal": options.rehearse,
            "notes": notes,
            "environment": timing.environment(),
        }
        check = Check(part, options.out, work, budget - (time.monotonic() - started), describe, environment)
        passed = check.run(chosen)
    print(*closing(check.document), sep="\n")
    print(f"wrote {check.json}")
    return passed


def _without_folders(argv: Sequence[str]) -> list[str]:
    return [Path(part).name if "/" in part else part for part in argv]


if __name__ == "__main__":
    sys.exit(main())
