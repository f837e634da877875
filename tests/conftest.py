"""Tests run on one CPU device; those marked `devices(n)` run in a child pytest, one per file, that has n.

The number of virtual CPU devices is fixed when JAX starts, and one device compiles and runs fastest. So the
child runs all of a file's tests that need n devices and sends its reports back; a test reads as any other:

    @pytest.mark.devices(8)
    def test_loss_is_the_same_on_eight_devices(): ...
"""

import atexit
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts: an accelerator must not decide a test

# The same examples in every run: a change's tests fail because of the change. To look for new ones:
# make test HYPOTHESIS_PROFILE=default
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Most of the time goes into compiling programs that run a few times. A flag that is given twice holds as it
# is given last: by the user.
QUICK = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"

if "MPLUG2_TESTS_CACHE" not in os.environ:  # else a process of a run that has begun
    # No test touches the user's own folders: all processes of this run share a home and a cache of their own.
    _OWN = tempfile.mkdtemp(prefix="mplug2-tests-")
    atexit.register(shutil.rmtree, _OWN, ignore_errors=True)
    os.environ |= {"MPLUG2_TESTS_CACHE": _OWN, "MPLUG2_CACHE": _OWN, "HOME": f"{_OWN}/home"}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLUG2_HOME"):
        os.environ.pop(name, None)
    os.mkdir(os.environ["HOME"])
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"

PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=900"
"""XLA aborts where a device is late by more than 40 s, which a busy machine's may be."""

_CHILD = "MPLUG2_TEST_REPORTS"  # set in a child: the file that takes its reports, one JSON object per line
_REPORTS = pytest.StashKey[dict[tuple[Path, int], dict[str, list[pytest.TestReport]]]]()


LONGEST = ("test_processes", "test_commands", "test_meshes", "test_recipes", "test_kills", "test_bench")
"""Files that begin first, so that no process is left with one of them at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in any order"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a file stay together, for what they share."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = sorted(files, key=lambda path: path.stem not in LONGEST)
    if (seed := config.getoption("shuffle")) is not None:
        order = random.Random(seed).sample(order, len(order))
        files = {path: random.Random(seed).sample(own, len(own)) for path, own in files.items()}
    items[:] = [item for path in order for item in files[path]]


def _devices(item: pytest.Item) -> int | None:
    marker = item.get_closest_marker("devices")
    return marker.args[0] if marker else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    count = _devices(item)
    if count is None or _CHILD in os.environ:
        return None
    known = item.session.stash.setdefault(_REPORTS, {})
    if (item.path, count) not in known:
        known[item.path, count] = _run_child(item, count)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in known[item.path, count][item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    # The test before this one left its file's fixtures standing for us; if the file ends here, they must go.
    setup_state = item.session._setupstate
    call = pytest.CallInfo.from_call(lambda: setup_state.teardown_exact(nextitem), when="teardown")
    if call.excinfo is not None:
        report = item.ihook.pytest_runtest_makereport(item=item, call=call)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_child(item: pytest.Item, count: int) -> dict[str, list[pytest.TestReport]]:
    """Reports by node id of the file's tests that need `count` devices; a test the child lost has failed."""
    items = [other for other in item.session.items if other.path == item.path and _devices(other) == count]
    path = item.config.rootpath / ".pytest_cache" / f"devices-{os.getpid()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    environ = os.environ | {
        _CHILD: str(path),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(count),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {PATIENT}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
    child = subprocess.run(
        [*command, *(other.nodeid for other in items)],
        cwd=item.config.rootpath,
        env=environ,
        capture_output=True,
        text=True,
    )
    reports: dict[str, list[pytest.TestReport]] = {other.nodeid: [] for other in items}
    for line in path.read_text().splitlines():
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=json.loads(line))
        if isinstance(report.longrepr, list):  # a skip's place and reason: JSON made a list of the tuple
            report.longrepr = tuple(report.longrepr)
        reports[report.nodeid].append(report)
    path.unlink()
    for other in items:
        if not any(report.when == "teardown" for report in reports[other.nodeid]):
            output = f"the process with {count} devices ended without a result:\n{child.stdout}{child.stderr}"
            reports[other.nodeid].append(
                pytest.TestReport(other.nodeid, other.location, {}, "failed", output, "call")
            )
    return reports


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _CHILD in os.environ:
        assert _config is not None
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        with open(os.environ[_CHILD], "a") as file:
            file.write(json.dumps(data) + "\n")


_config: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    """An empty cache of the test's own."""
    from mplug2.hub.cache import Cache  # and with it JAX, which this file prepares

    return Cache(tmp_path / "cache")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: the test's server is on this machine."""
    monkeypatch.delenv("MPLUG2_OFFLINE", raising=False)
