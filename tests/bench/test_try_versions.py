"""Trying other versions: what is refused, what is not done twice, and that the committed table is current."""

import json
import re
import subprocess

import pytest

from bench import try_versions


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with one op to compile; environments that take no time; the steps that were taken."""
    for path in ("vptm_kernels/one/aot_cases.py", "vptm_kernels/one/kernels.py", "vptm_kernels/other.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    monkeypatch.setattr(try_versions, "ROOT", tmp_path)
    commit(tmp_path, "--quiet", first=True)
    steps = []
    monkeypatch.setattr(try_versions.Environment, "prepare", lambda self: steps.append("prepare"))
    tested = {"passed": 7, "failed": 0, "skipped": 1, "failures": [], "minutes": 1.0, "commit": "", "date": ""}
    tested["versions"] = dict.fromkeys(try_versions.SHOWN, "2.11.0")

    def tests(environment, selection):
        steps.append("tests")
        return tested | {"commit": environment.commit}

    def kernels(environment, target, op):
        steps.append(f"{target} {op}")
        return {"kernels": 3, "spilled": ["`a b` spills 8 bytes"] if target == "sm100" else [], "failed": []}

    monkeypatch.setattr(try_versions, "try_tests", tests)
    monkeypatch.setattr(try_versions, "try_kernels", kernels)
    return tmp_path, steps


def commit(folder, *options, first=False):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ([*git[:1], "init", "--quiet"],) * first + ([*git, "add", "-A"], [*git, "commit", "-qm", "x"]):
        subprocess.run(command, cwd=folder, check=True)


def run(*arguments):
    return try_versions.main(arguments)


def test_a_version_is_tested_once_for_a_commit(checkout, capsys):
    """Repeated, a quarter of an hour is lost; not repeated after a commit, the table tells of sources that are gone."""
    folder, steps = checkout
    assert run("tests", "--torch", "2.11.0") == 0 and steps == ["prepare", "tests"]
    assert run("tests", "--torch", "2.11.0") == 0 and steps == ["prepare", "tests"]
    assert "--again" in capsys.readouterr().out
    assert run("tests", "--torch", "2.12.0") == 0 and len(steps) == 4
    (folder / "new.py").write_text("")
    commit(folder)
    assert run("tests", "--torch", "2.11.0") == 0 and len(steps) == 6
    assert "| 2.11.0 | 2.11.0 | 2.11.0 | 2.11.0 | 7 | 0 | 1 | 1.0 |" in (folder / try_versions.TABLE).read_text()


def test_kernels_are_compiled_again_only_where_their_sources_changed(checkout):
    """The full list takes half an hour a version: an interrupted run goes on with the next op."""
    folder, steps = checkout
    arguments = ("kernels", "--triton", "3.9.0", "--targets", "sm90")
    assert run(*arguments) == 0 and steps == ["prepare", "sm90 one"]
    (folder / "vptm_kernels" / "other.py").write_text("other")
    commit(folder)
    assert run(*arguments) == 0 and len(steps) == 2
    (folder / "vptm_kernels" / "one" / "kernels.py").write_text("other")
    commit(folder)
    assert run(*arguments) == 0 and len(steps) == 4


def test_a_spill_fails_and_is_tabled(checkout):
    folder, _ = checkout
    assert run("kernels", "--triton", "3.9.0", "--targets", "sm90,sm100") == 1
    table = (folder / try_versions.TABLE).read_text()
    assert "| 3.9.0 | not yet compiled | 3 kernels, 0 spilled | 3 kernels, 1 spilled |" in table
    assert "- Triton 3.9.0, sm100: `a b` spills 8 bytes" in table


def test_a_run_killed_while_it_writes_loses_nothing(tmp_path):
    entry = {"kernels": 1, "spilled": [], "failed": [], "sources": "1a2b"}
    try_versions.record(tmp_path, ["kernels", "3.9.0", "sm90", "one"], entry)
    with pytest.raises(KeyError):  # while the table is made
        try_versions.record(tmp_path, ["tests", "x"], {})
    assert json.loads((tmp_path / try_versions.JSON).read_text())["tests"] == {}


@pytest.mark.parametrize(
    "printed,line",
    [
        ("ERROR: No matching distribution found for torch===2.99.0", "pip has no torch 2.99.0 for Python 3.12.1"),
        ("ERROR: No matching distribution found for numpy==9.9.*", "pip has no numpy 9.9.* for Python 3.12.1"),
        (
            "ERROR: Cannot install torch==2.15.0 because these package versions have conflicting dependencies.\n\n"
            "The conflict is caused by:\n    The user requested torch==2.15.0\n"
            "    The user requested (constraint) torch<=2.14.1\n\nAdditionally, some packages\n"
            "ERROR: ResolutionImpossible: for help visit",
            "pip cannot install torch==2.15.0: The user requested torch==2.15.0; "
            "The user requested (constraint) torch<=2.14.1",
        ),
        ("Collecting torch\nERROR: no space left on device", "pip failed: ERROR: no space left on device"),
        ("", "pip failed: no output"),
    ],
)
def test_what_pip_refuses_is_told_in_one_line(printed, line):
    assert try_versions.refusal(printed, "3.12.1") == line


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("tests", "--python", "3.99"), "--python must be a version such as 3.12 or a program, got '3.99'"),
        (("kernels", "--triton", "3.9.0", "--targets", "sm42"), "--targets must be of sm80, .*, got sm42"),
    ],
)
def test_bad_arguments_are_told_in_one_line(checkout, capsys, arguments, words):
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


def test_a_python_that_does_not_run_is_told_in_one_line(checkout, capsys, tmp_path):
    """A version manager's stand-in for a version that is not chosen: what it says would name the environment."""
    stand_in = tmp_path / "python3.98"
    stand_in.write_text("#!/bin/sh\necho python3.98 is not chosen; echo more; exit 127\n")
    stand_in.chmod(0o755)
    assert run("tests", "--python", str(stand_in)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("does not run: python3.98 is not chosen"), line


def test_without_a_commit_there_is_nothing_to_try(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(try_versions, "ROOT", tmp_path)
    assert run("tests") == 2
    assert capsys.readouterr().err.startswith("a git checkout is needed")


def test_failures_and_errors_of_the_suite_are_counted_once(tmp_path):
    report = tmp_path / "junit.xml"
    cases = {"a": "", "b": "<failure/>", "c": "<error/>", "d": "<skipped/>"}
    inner = "".join(f'<testcase classname="t" name="{name}">{child}</testcase>' for name, child in cases.items())
    report.write_text(f"<testsuites><testsuite>{inner}</testsuite></testsuites>")
    counted = try_versions.counts(report)
    assert counted == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["t::b", "t::c"]}


def test_committed_table_is_current():
    content = try_versions.read(try_versions.ROOT)
    assert (try_versions.ROOT / try_versions.TABLE).read_text(encoding="utf-8") == try_versions.markdown(content)
    assert content["kernels"]
