"""How a process finds the others, or that it is alone; and the commands in a job of several."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import pytest
from cluster import environ, finish, free_port

from mplug2 import processes
from mplug2.processes import ProcessError


@pytest.mark.parametrize(
    "coordinator, count, process, told",
    [
        ("localhost:1234", 2, 2, "--process is 2, expected from 0 to 1"),
        ("localhost:1234", 2, -1, "--process is -1, expected from 0 to 1"),
        ("localhost:1234", 0, 0, "--processes is 0, expected at least 1"),
        ("localhost", 2, 0, '--coordinator is "localhost", expected HOST:PORT'),
        ("localhost:99999", 2, 0, "expected HOST:PORT"),
        (None, 2, 0, "--coordinator is missing"),
        ("localhost:1234", None, None, "--processes, --process are missing"),
    ],
)
def test_what_does_not_make_a_job_is_one_sentence(coordinator, count, process, told):
    with pytest.raises(ProcessError, match=told), processes.joined(coordinator, count, process):
        pass


def test_a_coordinator_that_is_not_there_is_given_up(capfd):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ProcessError, match=f"cannot be reached at {address} within 1 s.*Connection refused"):
        with processes.joined(address, 2, 1, patience=1):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_one_sentence(host):
    with socket.create_server((host, 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ProcessError, match=f"--coordinator {address} cannot be had here.*in use"):
            with processes.joined(address, 2, 0, patience=1):
                pass


def test_half_a_job_in_the_environment_is_refused_and_none_is_one_process():
    command = [sys.executable, "-c", "from mplug2 import processes as p\nwith p.joined(): print(p.first())"]
    each = [{}, {"JAX_COORDINATOR_ADDRESS": "localhost:1234"}]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, env=environ(1) | one, **pipes) for one in each]
    alone, half = finish(started)
    assert alone == (0, "True\n")
    assert half[0] == 1
    assert "ProcessError: the processes could not be joined at" in half[1]
    assert "Number of processes must be defined" in half[1]


@pytest.mark.parametrize("error", [ValueError("not enough values to unpack"), KeyError("worker-network")])
def test_a_cluster_that_jax_cannot_read_is_not_one_process(error, monkeypatch):
    def initialize(*_, **__):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ProcessError, match="the cluster that JAX found"), processes.joined():
        pass


# ------------------------------------------------------------------------------------------------------------
# The commands


def mplug2(*words: object, devices: int, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mplug2.tools.main", *map(str, words)],
        env=environ(devices) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_sigterm_ends_an_evaluation_in_processes_at_once():
    program = (
        "import sys, time\n"
        "from mplug2.tools import evaluate\n"
        "evaluate._evaluate = lambda *_: (print('begun', flush=True), time.sleep(600))\n"
        "evaluate.main(['--coordinator', sys.argv[1], '--processes', '1', '--process', '0'])"
    )
    command = [sys.executable, "-c", program, f"127.0.0.1:{free_port()}"]
    with subprocess.Popen(command, env=environ(1), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_process_0_that_nobody_joins_says_so():
    named = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process", 0, "--patience", 2)
    ((status, said),) = finish([mplug2("eval", "text_classify.small", *named, devices=1)])
    assert status == 2 and "not all processes joined within 2 s" in said and "missing are 1" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_commands_train_and_score_in_processes_that_are_named_or_that_slurm_started(tmp_path):
    run_dir, scores = tmp_path / "run", tmp_path / "scores.json"
    words = ("train", "text_classify.tiny", "mesh.data=2", "steps=3", "--run-dir", run_dir)
    address = f"127.0.0.1:{free_port()}"
    by_name = [("--coordinator", address, "--processes", 2, "--process", process) for process in range(2)]
    ended = finish([mplug2(*words, *named, devices=1) for named in by_name])
    assert [status for status, _ in ended] == [0, 0], ended
    assert "finished after step 3" in ended[0][1]

    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    each = [slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    told = ("eval", run_dir, "--limit", 150, "--out", scores)
    ended = finish([mplug2(*told, devices=1, **variables) for variables in each])
    assert [status for status, _ in ended] == [0, 0], ended
    two = json.loads(scores.read_text())["tasks"]
    ((status, said),) = finish([mplug2(*told, devices=1)])
    assert status == 0, said
    assert json.loads(scores.read_text())["tasks"] == two and two
