"""Everything that needs a GPU, in one command: `PYTHONPATH=. python -m bench.gpu_check --out bench/results/h200`.

    python -m bench.gpu_check --list                 # stages, most important first, with their shares of the time
    python -m bench.gpu_check --only model,training  # some of them
    python -m bench.gpu_check --dry-run              # no GPU needed: every stage's command is tried without its work

Every stage runs in a process of its own within a limit; what a stage leaves over goes to the later ones. At its limit
it is interrupted, which lets pytest write what it has. A stage that fails is recorded and the others run.
`gpu_check.json` in the output folder is rewritten after every stage and `gpu_check.log` as it runs, so that an early
stop loses one stage at most.

Exit status: 0 if every stage passed, 1 if one did not, 2 without a GPU or for arguments that select nothing.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import timing

ROOT = Path(__file__).parent.parent
MINUTES = 9.0
# How long an interrupted stage has to write its results.
GRACE = 12.0
JSON, LOG = "gpu_check.json", "gpu_check.log"


@dataclass(frozen=True)
class Stage:
    """One process. `command` follows `python`, with {result} for the json it writes; `seconds` is its share."""

    name: str
    command: tuple[str, ...]
    seconds: float
    program: str = ""
    """What must be on the path for it, and runs it."""


# ------------------------------------------------------------------ the stages

# Benches in this order; one that is not named here runs after them.
BENCHES = {
    "bench_prompted_attention.py": 60,
    "bench_model.py": 65,
    "bench_training_step.py": 45,
    "bench_readout_attention.py": 28,
    "bench_residual_norm.py": 26,
    "bench_prototype_cosine.py": 33,
}
# Compiled for minutes, so late and for the first setting alone: files, what -k selects, the peer by name.
MAX_AUTOTUNE = (
    *("bench/bench_model.py", "bench/bench_training_step.py"),
    *("-k", "deep-100-64-bfloat16-vptm", "--peers", "torch.compile max-autotune"),
)
# They need no GPU or time nothing that one changes.
CPU_BENCHES = {"bench_import.py", "bench_prompt_init.py"}


def _kernel_tests() -> list[str]:
    """Test files of the ops and of the encoder on them. Compiling for other GPUs is tested where there is none."""
    ops = sorted(path.parent.name for path in (ROOT / "vptm_kernels").glob("*/api.py"))
    found = [path for op in ops for path in sorted((ROOT / "tests").glob(f"test_{op}*.py"))]
    return [f"tests/{path.name}" for path in found if not path.name.endswith("_aot.py")] + ["tests/test_encoder.py"]


def _pytest_tests(files: Sequence[str]) -> tuple[str, ...]:
    workers = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    quiet = ("-v", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-profile", "quick")
    return ("-m", "pytest", *files, *quiet, *workers)


def _pytest_bench(*arguments: str) -> tuple[str, ...]:
    quiet = ("-q", "--no-header", "-rs", "-p", "no:cacheprovider")
    result = ("--benchmark-only", "--benchmark-json", "{result}")
    return ("-m", "pytest", *arguments, *quiet, *result, "--device", "cuda")


def stages() -> list[Stage]:
    """Most important first. The shares sum to the budget or less."""
    present = {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    benches = [name for name in BENCHES if name in present]
    kernels = _kernel_tests()
    found = [Stage("kernel tests", _pytest_tests(kernels), 85)]
    found += [Stage(_title(name), _pytest_bench(f"bench/{name}"), BENCHES[name]) for name in benches]
    found.append(Stage("autotune", ("-m", "bench.autotune", "--seconds", "{seconds}", "--json", "{result}"), 45))
    for tool, seconds in (("memcheck", 28), ("racecheck", 20)):
        command = ("--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "bench.small_case")
        found.append(Stage(f"compute-sanitizer {tool}", command, seconds, program="compute-sanitizer"))
    found.append(Stage("max-autotune", _pytest_bench(*MAX_AUTOTUNE), 75))
    rest = sorted(present - set(benches) - CPU_BENCHES)
    found += [Stage(_title(name), _pytest_bench(f"bench/{name}"), 10) for name in rest]
    others = sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py"))
    others = [
        name for name in others if name not in kernels and not re.search(r"aot|bench|gpu_check|interpreter", name)
    ]
    found.append(Stage("other tests", _pytest_tests(others), 10))
    return found


def _title(file: str) -> str:
    return file.removeprefix("bench_").removesuffix(".py").replace("_", " ")


def dry(stage: Stage) -> Stage:
    """The same stage without its work: pytest collects, a module is imported."""
    command = list(stage.command)
    if "pytest" not in command:
        return Stage(stage.name, ("-c", f"import {command[command.index('-m') + 1]}"), stage.seconds)
    if "-n" in command:
        del command[command.index("-n") : command.index("-n") + 2]
    kept = [part for part in command if part not in ("-v", "--benchmark-only")]
    return Stage(stage.name, (*kept, "--collect-only", "-qq"), stage.seconds)


# ------------------------------------------------------------------ running them


class Check:
    """Runs stages within a budget and keeps `gpu_check.json` up to date."""

    def __init__(self, out: Path, budget: float, describe: dict[str, Any]) -> None:
        self.out, self.budget = out, budget
        self.started = time.monotonic()
        self.document: dict[str, Any] = {
            **describe,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "budget seconds": budget,
            "finished": False,
            "stages": [],
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / LOG).write_text("", encoding="utf-8")
        self.write()

    def write(self) -> None:
        temporary = self.out / (JSON + ".tmp")
        temporary.write_text(json.dumps(self.document, indent=1), encoding="utf-8")
        temporary.replace(self.out / JSON)

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def run(self, stages: Sequence[Stage]) -> bool:
        """Whether every stage passed."""
        for i, stage in enumerate(stages):
            later = sum(other.seconds for other in stages[i + 1 :])
            limit = min(self.left(), max(stage.seconds, self.left() - later))
            self.document["stages"].append(self._run_one(stage, limit))
            join(self.document["stages"])
            self.document["seconds"] = round(time.monotonic() - self.started, 1)
            self.write()
            print(_line(self.document["stages"][-1]), flush=True)
        self.document["gpu state after"] = timing.gpu_state()
        self.document["finished"] = True
        self.write()
        return all(entry["status"] in ("passed", "skipped") for entry in self.document["stages"])

    def _run_one(self, stage: Stage, limit: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": stage.name, "limit": round(limit, 1), "seconds": 0.0}
        if stage.program and shutil.which(stage.program) is None:
            return entry | {"status": "skipped", "why": f"{stage.program} is not installed"}
        if limit <= 1:
            return entry | {"status": "not run", "why": "no time left"}
        with tempfile.TemporaryDirectory() as folder:
            result, log = Path(folder) / "result.json", Path(folder) / "log"
            work = max(1.0, limit - GRACE)
            filled = {"{result}": str(result), "{seconds}": str(int(work * 0.9))}
            command = [stage.program or sys.executable, *(filled.get(part, part) for part in stage.command)]
            shown = [stage.program or "python", *stage.command]
            entry["command"] = " ".join("python" if part == sys.executable else part for part in shown)
            started = time.monotonic()
            code = _bounded(command, log, work, min(GRACE, limit - work))
            entry["seconds"] = round(time.monotonic() - started, 1)
            text = log.read_text(encoding="utf-8", errors="replace")
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(f"=== {stage.name}\n{text}\n")
            status = "stopped at its limit" if code is None else "passed" if code == 0 else "failed"
            entry |= {"status": status, "exit status": code}
            if result.is_file() and result.stat().st_size:
                try:
                    entry["result"] = _without_samples(json.loads(result.read_text(encoding="utf-8")))
                except json.JSONDecodeError as error:
                    entry["why"] = f"its json is not complete: {error}"
            if "-v" in stage.command:
                entry["tests"] = outcomes(text)
            if status != "passed":
                entry["tail"] = text.strip().splitlines()[-25:]
        return entry


def _bounded(command: Sequence[str], log: Path, work: float, grace: float) -> int | None:
    """Exit status of a command whose whole process group is interrupted after `work` seconds and killed `grace` later;
    None if it had to be interrupted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("w") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        interrupted = False
        try:
            return child.wait(work)
        except subprocess.TimeoutExpired:
            interrupted = True
            os.killpg(child.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(grace)
            return None
        finally:
            # also when this process is interrupted itself: nothing may go on using the GPU
            if interrupted or child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _without_samples(result: dict[str, Any]) -> dict[str, Any]:
    for bench in result.get("benchmarks", []):
        bench.get("stats", {}).pop("data", None)
    return result


def join(stages: Sequence[dict[str, Any]]) -> None:
    """Benches that an earlier stage has timed are taken out of the last one and add to that what it lacks: peers that
    take minutes have a stage of their own, and a row is measured once."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything (default: {MINUTES:g})")
    parser.add_argument("--only", metavar="NAMES", help="comma separated stages")
    parser.add_argument("--list", action="store_true", help="print the stages and what they run")
    parser.add_argument("--dry-run", action="store_true", help="try every command without its work; needs no GPU")
    options = parser.parse_args(argv)
    chosen = stages()
    if options.only is not None:
        names = [name.strip() for name in options.only.split(",") if name.strip()]
        known = {stage.name for stage in chosen}
        if not names or not set(names) <= known:
            wrong = ", ".join(sorted(set(names) - known)) or "nothing"
            parser.error(f"--only must be of {', '.join(stage.name for stage in chosen)}, got {wrong}")
        chosen = [stage for stage in chosen if stage.name in names]
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if options.list:
        for stage in chosen:
            runner = stage.program or "python"
            print(f"{stage.name:28s} {stage.seconds:4.0f} s  {runner} {' '.join(stage.command)}")
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU here: torch sees none (--dry-run tries the commands without one)", file=sys.stderr)
        return 2
    describe = {"command": " ".join(["python -m bench.gpu_check", *_without_folders(argv)]), "dry run": options.dry_run}
    # asked to end, it ends its stage too; a default SIGTERM would leave that running on the GPU
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    check = Check(options.out, 60 * options.minutes, describe | {"environment": timing.environment()})
    passed = check.run([dry(stage) for stage in chosen] if options.dry_run else chosen)
    print(*closing(check.document), sep="\n")
    print(f"wrote {options.out / JSON}")
    return 0 if passed else 1


def _without_folders(argv: Sequence[str] | None) -> list[str]:
    return [Path(part).name if "/" in part else part for part in (sys.argv[1:] if argv is None else argv)]


if __name__ == "__main__":
    sys.exit(main())
