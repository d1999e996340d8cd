"""The tests on other versions of torch, Triton, numpy and Python; every kernel compiled by other versions of Triton.

    python -m bench.try_versions tests --torch 2.11.0 --numpy 2.5 --python 3.12
    python -m bench.try_versions tests --torch 2.13.0 --triton 3.8.0
    python -m bench.try_versions kernels --triton 3.9.0     # all targets; no GPU needed
    python -m bench.try_versions table                      # docs/versions.md again from docs/versions.json

`tests` makes a fresh environment, installs what is committed with its test extra, and runs the suite in it; `kernels`
runs `python -m vptm_kernels.aot --spills` there. Changes that are not committed are not tried. Environments are kept in
`--venvs` and used again. What was tried already is not tried again unless `--again` is given: tests of the same
commit, and kernels of an op whose sources are the same. Both files are written after every step.

Exit status: 0 if nothing failed or spilled, 1 if something did, 2 for arguments or versions that are not to be had.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
JSON, TABLE = Path("docs", "versions.json"), Path("docs", "versions.md")
SHOWN = ("python", "torch", "triton", "numpy")


class NotToBeHad(Exception):
    """One line: what cannot be had, and why."""


def _targets() -> tuple[str, ...]:
    """`TARGETS` of `vptm_kernels.aot`, read and not imported, as that needs torch."""
    source = (ROOT / "vptm_kernels" / "aot.py").read_text(encoding="utf-8")
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "TARGETS")


TARGETS = _targets()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise NotToBeHad("a git checkout is needed, whose commit is tried: git clone the repository") from None


def _name(thing: str) -> str:
    return _git("rev-parse", "--short=9", thing).strip()


def ops(commit: str) -> dict[str, str]:
    """The ops that have kernels to compile, with git's name of their sources."""
    listed = _git("ls-tree", "-r", "--name-only", commit, "vptm_kernels").split()
    names = sorted(path.split("/")[1] for path in listed if path.endswith("/aot_cases.py"))
    return {name: _name(f"{commit}:vptm_kernels/{name}") for name in names}


# ------------------------------------------------------------------ environments


def interpreter(wanted: str | None) -> str:
    """The program for "3.12", a name or a path; this one for None."""
    if wanted is None:
        return sys.executable
    found = shutil.which(f"python{wanted}" if re.fullmatch(r"3\.\d+", wanted) else wanted)
    if found is None:
        raise NotToBeHad(
            f"--python must be a version such as 3.12 or a program, got {wanted!r}, which is not on the path"
        )
    return found


def refusal(output: str, python: str) -> str:
    """One line for what pip printed when it failed."""
    if missing := re.search(r"No matching distribution found for (\S+)", output):
        return f"pip has no {re.sub('={2,3}', ' ', missing[1])} for Python {python}"
    if clash := re.search(r"Cannot install (.+?) because.*?caused by:\s*\n(.+?)(?:\n\s*\n|\Z)", output, re.DOTALL):
        return f"pip cannot install {clash[1]}: {'; '.join(line.strip() for line in clash[2].splitlines())}"
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines() or ["no output"]
    return f"pip failed: {errors[-1]}"


def _run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


class Environment:
    """A virtual environment of the wanted versions, with the committed sources beside it and installed."""

    def __init__(self, venvs: Path, python: str | None, wanted: dict[str, str | None]) -> None:
        self.program = interpreter(python)
        asked = _run([self.program, "-c", "import platform; print(platform.python_version())"])
        if asked.returncode:  # a stand-in on the path for a version that is not chosen
            said, *_ = asked.stdout.splitlines() or ["no output"]
            raise NotToBeHad(f"--python {python}: {self.program} does not run: {said}")
        self.wanted = {"python": asked.stdout.strip(), **{name: v for name, v in wanted.items() if v}}
        self.name = "-".join(f"{name}{version}" for name, version in self.wanted.items())
        self.folder = venvs / self.name
        self.source = self.folder / "source"
        self.commit = _name("HEAD")

    def pip(self, *arguments: str) -> None:
        done = _run([str(self.folder / "bin" / "python"), "-m", "pip", "install", *arguments])
        if done.returncode:
            if not (self.folder / "ready").is_file():
                shutil.rmtree(self.folder)
            raise NotToBeHad(refusal(done.stdout, self.wanted["python"]))

    def prepare(self) -> None:
        """Make it, or bring the one that is there up to the commit."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = self.folder.with_name(f"{self.name}.lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotToBeHad(f"{self.folder} is in use by another run") from None
        ready = self.folder / "ready"
        wanted = {name: v for name, v in self.wanted.items() if name in ("torch", "numpy")}
        # "2.5" is any 2.5.x; a whole version is that build alone: torchvision does not load beside a +cpu one of torch
        pins = [f"{name}=={v}.*" if v.count(".") < 2 else f"{name}==={v}" for name, v in wanted.items()]
        known = ready.is_file()
        if not known:
            shutil.rmtree(self.folder, ignore_errors=True)
            done = _run([self.program, "-m", "venv", str(self.folder)])
            if done.returncode:
                raise NotToBeHad(f"no environment with {self.program}: {done.stdout.strip().splitlines()[-1]}")
        shutil.rmtree(self.source, ignore_errors=True)
        _git("clone", "--quiet", str(ROOT), str(self.source))
        _git("-C", str(self.source), "checkout", "--quiet", self.commit)
        self.pip(f"{self.source}[test]", *pins)  # also where it is known: what is committed may need more than before
        # torch names the one version of Triton it came with, so another one is put there behind its back
        if "triton" in self.wanted:
            self.pip("--no-deps", f"triton=={self.wanted['triton']}")
        if known:
            self.pip("--no-deps", "--force-reinstall", str(self.source))
        ready.touch()

    def variables(self) -> dict[str, str]:
        dropped = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return kept | {"PATH": path, "VIRTUAL_ENV": str(self.folder), "CI": "true"}

    def versions(self) -> dict[str, str]:
        code = "import importlib.metadata as m, platform; print(platform.python_version())\n"
        code += f"for name in {SHOWN[1:]}: print(m.version(name))"
        printed = _run([str(self.folder / "bin" / "python"), "-c", code], env=self.variables()).stdout.split()
        return dict(zip(SHOWN, printed))


# ------------------------------------------------------------------ what is tried


def counts(report: Path) -> dict[str, Any]:
    """Of pytest's junit file."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": sorted(f"{c.get('classname', '')}::{c.get('name', '')}" for c in failed),
    }


def try_tests(environment: Environment, selection: Sequence[str]) -> dict[str, Any]:
    report = environment.folder / "junit.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    command = [str(environment.folder / "bin" / "pytest"), "-q", f"--junitxml={report}", *selection]
    # In a shell's background Ctrl-C is ignored, by children too, and the suite has tests that send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(command, cwd=environment.source, env=environment.variables())
    result = {
        "versions": environment.versions(),
        "commit": environment.commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    if not report.is_file():
        return result | {"passed": 0, "failed": 1, "skipped": 0, "failures": [f"pytest ended with {done.returncode}"]}
    return result | counts(report)


def try_kernels(environment: Environment, target: str, op: str) -> dict[str, Any]:
    command = [str(environment.folder / "bin" / "python"), "-m", "vptm_kernels.aot", "--json"]
    command += ["--targets", target, "--cases", f"^{op}/", "--spills"]
    done = subprocess.run(
        command, cwd=environment.folder, env=environment.variables(), stdout=subprocess.PIPE, text=True
    )
    try:
        reports = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise NotToBeHad(f"python -m vptm_kernels.aot ended with {done.returncode} and no json") from None
    # what only a card may choose may spill
    named = [(f"{r['case']} {r['kernel']}".strip(), r) for r in reports if not r["candidate"]]
    return {
        "kernels": sum(not report["error"] for _, report in named),
        "spilled": [f"`{name}` spills {report['spills']} bytes" for name, report in named if report["spills"]],
        "failed": [f"`{name}` {report['error']}" for name, report in named if report["error"]],
    }


# ------------------------------------------------------------------ tables


def _rows(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _compiled(by_op: dict[str, dict[str, Any]], current: dict[str, str]) -> str:
    """A cell: every kernel of a target and a version of Triton."""
    missing = [op for op in current if op not in by_op]
    if missing:
        return "not yet compiled" + (f": {', '.join(missing)}" if by_op else "")
    kernels = sum(entry["kernels"] for entry in by_op.values())
    faults = [
        f"{count} {word}" for word in ("spilled", "failed") if (count := sum(len(e[word]) for e in by_op.values()))
    ]
    return f"{kernels} kernels, {', '.join(faults) or '0 spilled'}"


def markdown(content: dict[str, Any]) -> str:
    tests = sorted(content["tests"].values(), key=lambda row: [_numbers(row["versions"][name]) for name in SHOWN[1:]])
    kernels = content["kernels"]
    lines = [
        "# Versions",
        "",
        "Made by `python -m bench.try_versions` from `versions.json`: its docstring says how to add a version.",
        "",
        "## Tests",
        "",
        "The whole suite in a fresh environment on a CPU: kernels run in Triton's interpreter, and are compiled.",
        "",
    ]
    heading = ("Python", "torch", "Triton", "numpy", "passed", "failed", "skipped", "minutes", "commit")
    figures = ("passed", "failed", "skipped", "minutes", "commit")
    lines += _rows(heading, [[*(row["versions"][n] for n in SHOWN), *(row[n] for n in figures)] for row in tests])
    for row in tests:
        if row["failures"]:
            versions = ", ".join(f"{name} {row['versions'][name]}" for name in SHOWN)
            lines += ["", f"Failed with {versions}:", "", *(f"- `{name}`" for name in row["failures"])]
    lines += [
        "",
        "## Kernels",
        "",
        "All cases of `python -m vptm_kernels.aot --spills`, compiled on a CPU for GPUs that were not there.",
        "",
    ]
    names = sorted({op for by_target in kernels.values() for by_op in by_target.values() for op in by_op})
    current = dict.fromkeys(names, "")
    ordered = sorted(kernels, key=_numbers)
    lines += _rows(
        ("Triton", *TARGETS),
        [
            [version, *(_compiled(kernels[version].get(target, {}), current) for target in TARGETS)]
            for version in ordered
        ],
    )
    faults = [
        f"- Triton {version}, {target}: {fault}"
        for version in ordered
        for target in TARGETS
        for entry in kernels[version].get(target, {}).values()
        for fault in (*entry["spilled"], *entry["failed"])
    ]
    lines += ["", *faults] if faults else []
    sources = {(op, e["sources"]) for v in kernels.values() for t in v.values() for op, e in t.items()}
    told = ", ".join(f"{op} {tree}" for op, tree in sorted(sources))
    return "\n".join(
        [*lines, "", f"Sources, as `git rev-parse --short=9 COMMIT:vptm_kernels/OP` names them: {told or 'none'}.", ""]
    )


def read(root: Path) -> dict[str, Any]:
    path = root / JSON
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tests": {}, "kernels": {}}


def write(root: Path, content: dict[str, Any]) -> None:
    """Both files, each in one step, so that an interruption leaves the one before."""
    for path, text in (
        (root / JSON, json.dumps(content, indent=1, sort_keys=True) + "\n"),
        (root / TABLE, markdown(content)),
    ):
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def record(root: Path, place: Sequence[str], result: dict[str, Any]) -> None:
    """Put a result where it belongs, also while others run beside this one."""
    (root / JSON).parent.mkdir(exist_ok=True)
    with (root / JSON).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = at = read(root)
        for name in place[:-1]:
            at = at.setdefault(name, {})
        at[place[-1]] = result
        write(root, content)


# ------------------------------------------------------------------ command line


def _tests(environment: Environment, options: argparse.Namespace) -> bool:
    known = read(ROOT)["tests"].get(environment.name)
    if known and known["commit"] == environment.commit and not options.again:
        print(f"{environment.name}: tried at {known['commit']}, {known['failed']} failed; --again tries once more")
        return not known["failed"]
    environment.prepare()
    result = try_tests(environment, options.select)
    print(f"{environment.name}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
    if not options.select:
        record(ROOT, ["tests", environment.name], result)
    return not result["failed"]


def _kernels(environment: Environment, options: argparse.Namespace) -> bool:
    targets = TARGETS if options.targets is None else options.targets.split(",")
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise NotToBeHad(f"--targets must be of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    prepared, fine = False, True
    for target in targets:
        for op, sources in ops(environment.commit).items():
            entry = read(ROOT)["kernels"].get(options.triton, {}).get(target, {}).get(op)
            if entry is None or entry["sources"] != sources or options.again:
                if not prepared:
                    environment.prepare()
                    prepared = True
                entry = try_kernels(environment, target, op) | {"sources": sources}
                record(ROOT, ["kernels", options.triton, target, op], entry)
            print(f"Triton {options.triton} {target} {op}: {_compiled({op: entry}, {op: ''})}", flush=True)
            fine = fine and not entry["spilled"] and not entry["failed"]
    return fine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.try_versions", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("tests", "run the suite"),
        ("kernels", "compile every kernel"),
        ("table", "write the table again"),
    ):
        command = commands.add_parser(name, help=words)
        if name == "table":
            continue
        command.add_argument("--torch", help="version; the newest that pip finds if not given")
        command.add_argument(
            "--triton", required=name == "kernels", help="version; the one torch asks for if not given"
        )
        command.add_argument("--numpy", help="version")
        command.add_argument("--python", help="version or program; the one that runs this if not given")
        command.add_argument("--venvs", type=Path, default=ROOT / ".versions", help="folder of the environments")
        command.add_argument("--again", action="store_true", help="also what was tried already")
        if name == "kernels":
            command.add_argument("--targets", help=f"comma separated, of {', '.join(TARGETS)}")
        else:
            command.add_argument("select", nargs="*", help="pytest's arguments after --; such a run is not tabled")
    options = parser.parse_args(argv)
    try:
        if options.command == "table":
            write(ROOT, read(ROOT))
            return 0
        wanted = {name: getattr(options, name) for name in SHOWN[1:]}
        environment = Environment(options.venvs.absolute(), options.python, wanted)
        return int(not (_tests if options.command == "tests" else _kernels)(environment, options))
    except NotToBeHad as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
