"""What holds for every command: help, version, exit codes, quick start-up."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest

from hf_sqf_command import app, sentence
from tests.cli.conftest import ROOT

COMMANDS = ("compress", "inspect", "report", "evaluate", "compare", "verify", "export", "push", "run")


def alone(program: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


def test_these_are_all():
    assert [command.callback.__name__ for command in app.registered_commands] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, typed):
    assert f"hf-sqf {command} " in typed(command, "--help").stdout.partition("Options")[0]


def test_help_and_version_come_at_once():
    """Nothing heavy is imported, which is what takes time; neither is it for completing what is typed."""
    for arguments in (["--help"], ["compress", "--help"], ["--version"]):
        done = alone(
            "import json, sys\n"
            "from hf_sqf_command import main\n"
            f"sys.argv[1:] = {arguments}\n"
            "try:\n"
            "    main()\n"
            "finally:\n"
            "    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
        )
        assert done.returncode == 0, done.stderr
        assert not {"torch", "transformers", "numpy", "hf_sqf"} & set(json.loads(done.stdout.splitlines()[-1]))
        assert arguments != ["--version"] or done.stdout.startswith(f"hf-sqf {version('hf-sqf')}\n")


def test_the_console_script_is_declared():
    found = [point.value for point in entry_points(group="console_scripts", name="hf-sqf")]
    if not found:
        pytest.skip("hf-sqf was installed before it had a console script")
    assert set(found) == {"hf_sqf_command:main"}


def test_a_shell_can_complete(process):
    env = os.environ | {"PYTHONPATH": str(ROOT), "_HF_SQF_COMPLETE": "complete_bash"}
    done = process(env=env | {"COMP_WORDS": "hf-sqf ver", "COMP_CWORD": "1"})
    assert done.stdout.split() == ["verify"]


def test_termination_unwinds_as_an_error_does():
    """SIGTERM, which job schedulers send, ends the program through its ``finally`` blocks, where half-written folders
    are removed."""
    done = alone(
        "import hf_sqf_command, os, signal, time\n"
        "def work(**options):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleared')\n"
        "hf_sqf_command.app = work\n"
        "hf_sqf_command.main()\n"
    )
    assert (done.returncode, done.stdout) == (143, "cleared\n")


def test_no_arguments_and_unknown_commands_are_errors_of_usage(typed):
    assert "Usage" in typed(code=2).output
    assert "No such command" in typed("shrink", code=2).stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("a is 1\nand more"), "a is 1"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (RuntimeError("odd"), "RuntimeError: odd (--debug shows where)"),
        (ValueError(""), "ValueError:  (--debug shows where)"),
    ],
)
def test_errors_in_a_line(error: Exception, says: str):
    assert sentence(error) == says
