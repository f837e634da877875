"""The `devices` mark of conftest.py gives a test its devices, and cannot lose a failure."""

import os
from pathlib import Path

import jax
import pytest
from conftest import QUICK

from mplug2.data.builders import data_dir
from mplug2.files import cache_folder


def test_an_unmarked_test_has_one_device():
    assert jax.device_count() == 1


def test_the_home_of_tests_is_not_the_users():
    assert Path.home().is_relative_to(os.environ["MPLUG2_TESTS_CACHE"])
    assert data_dir().is_relative_to(Path.home()) and cache_folder().is_relative_to(Path.home().parent)


@pytest.mark.devices(8)
def test_a_marked_test_has_its_devices_and_the_compilers_flags_of_the_others():
    assert jax.device_count() == 8
    assert QUICK in os.environ["XLA_FLAGS"]


@pytest.mark.devices(8)
@pytest.mark.xfail(strict=True, reason="a failure in the child process is a failure here")
def test_a_failure_in_the_child_is_reported():
    assert jax.device_count() == 1
