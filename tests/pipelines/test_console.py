"""Exit codes and the result: what scripts around `nst` rely on."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from nst.presets import preset
from pipelines.cli import VERBS, main
from pipelines.console import GateRefused, Progress, Stage, StageFailed


def run(work):
    @click.command("work", cls=Stage)
    def command():
        return work()

    return CliRunner().invoke(command, ["--json"], prog_name="nst work")


def test_success_prints_the_result_as_the_last_line():
    result = run(lambda: {"num": 3})
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[-1]) == {"num": 3, "exit_code": 0}


@pytest.mark.parametrize(("error", "exit_code"), [(StageFailed, 1), (GateRefused, 3)])
def test_a_failed_stage_still_prints_what_it_did(error, exit_code):
    def work():
        raise error("2 of 3 failed", {"num": 1})

    result = run(work)
    assert result.exit_code == exit_code
    assert result.stderr.strip() == "nst work: 2 of 3 failed"
    assert json.loads(result.stdout.splitlines()[-1])["num"] == 1


def test_where_nobody_reads_any_more_the_work_goes_on():
    script = """
import click
from pipelines.console import Stage, say

@click.command(cls=Stage)
def work():
    for _ in range(20_000):
        say("a line")
    click.echo("all done", err=True)

work()
"""
    command = ["bash", "-c", '"$0" -c "$1" | head -1', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("a line\n", "all done\n")


def test_our_own_value_error_is_the_users_mistake():
    result = run(lambda: preset("gigantic"))
    assert result.exit_code == 2
    assert "there is no preset 'gigantic'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("work", [lambda: int("x"), lambda: math.sqrt(-1), lambda: {}["missing"]])
def test_a_fault_of_ours_is_no_mistake_of_the_user(work):
    result = run(work)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_an_io_error_is_one_line():
    def work():
        raise OSError("s3://bucket/key: the store closed the connection")

    result = run(work)
    assert result.exit_code == 1
    assert result.stderr.strip() == "nst work: OSError: s3://bucket/key: the store closed the connection"


def test_an_interruption_says_how_to_go_on():
    def work():
        raise KeyboardInterrupt

    result = run(work)
    assert result.exit_code == 130
    assert "goes on from here" in result.stderr


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_with_an_example(verb):
    result = CliRunner().invoke(main, [verb, "--help"])
    assert result.exit_code == 0, result.output
    assert "--json" in result.output
    assert f"nst {verb}" in result.output


def test_progress_without_a_terminal_prints_lines(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "seconds_between_lines", 0.0)
    with Progress("shard", total=10) as progress:
        progress.advance(4, failed=1)
    assert capsys.readouterr().err.startswith("shard: 4/10 img, ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_any_verb_with_130_and_what_helps(number: signal.Signals) -> None:
    program = (
        "import os, signal, sys, click\n"
        "from pipelines.console import Stage\n"
        "@click.command('work', cls=Stage)\n"
        "def work():\n"
        "    if sys.argv[1] == 'ray':\n"  # what Ray's own handler does
        "        signal.signal(int(sys.argv[2]), lambda number, frame: sys.exit(number))\n"
        "    try:\n"
        "        os.kill(os.getpid(), int(sys.argv[2]))\n"
        "        signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        raise KeyboardInterrupt if sys.argv[1] == 'plain' else RuntimeError('Query interrupted')\n"
        "work(['--json'])\n"
    )
    for handler in ("plain", "duckdb", "ray"):
        command = [sys.executable, "-c", program, handler, str(int(number))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 130, done.stderr
        assert "the same command goes on from here" in done.stderr
        assert json.loads(done.stdout)["exit_code"] == 130
