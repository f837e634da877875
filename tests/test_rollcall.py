"""The roll call: processes that do not belong together are told so, all of them, before JAX joins any."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import free_port

from mplug2 import processes, rollcall
from mplug2.processes import ProcessError


def called(
    told: list[tuple[int, int]], count: int, patience: float = 5.0, strangers: bytes = b""
) -> list[str]:
    """What process 0, told that there are `count`, and the others, each `(process, processes)`, learn."""
    with rollcall.listening(0) as server, ThreadPoolExecutor() as pool:
        address = ("127.0.0.1", server.getsockname()[1])
        first = pool.submit(rollcall.take, server, count, patience)
        if strangers:
            with socket.create_connection(address) as line:
                line.sendall(strangers)
        others = [pool.submit(rollcall.answer, address, *one, patience) for one in told]
        return [future.result() for future in (first, *others)]


def test_processes_that_belong_together_are_joined_in_any_order():
    assert called([(2, 4), (3, 4), (1, 4)], count=4) == [""] * 4


def test_two_processes_of_one_number_are_told_so():
    sentences = called([(1, 3), (1, 3)], count=3)
    assert set(sentences) == {"two processes were started as --process 1"}


def test_a_process_that_was_started_again_takes_the_place_of_the_one_that_ended():
    with rollcall.listening(0) as server, ThreadPoolExecutor() as pool:
        address = ("127.0.0.1", server.getsockname()[1])
        first = pool.submit(rollcall.take, server, 3, 5.0)
        with socket.create_connection(address) as line:
            line.sendall(b'{"process": 1, "processes": 3}\n')
        with socket.create_connection(address) as again:  # before process 2 comes, whatever the threads do
            again.sendall(b'{"process": 1, "processes": 3}\n')
            other = pool.submit(rollcall.answer, address, 2, 3, 5.0)
            assert first.result() == other.result() == ""
            assert again.makefile().readline() == '{"refused": ""}\n'


def test_another_number_of_processes_is_told_to_all():
    sentences = called([(1, 2)], count=3)
    assert set(sentences) == {"process 1 was told --processes 2, process 0 was told 3"}


def test_who_did_not_come_is_named():
    assert (
        called([(2, 4)], count=4, patience=0.5)
        == ["not all processes joined within 0.5 s (--patience): missing are 1, 3"] * 2
    )


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"process": "x"}\n', b"\xff\n", b"5" * 9999]
)
def test_strangers_at_the_door_are_not_counted(said):
    assert called([(1, 2)], count=2, strangers=said) == ["", ""]


def test_a_second_process_0_cannot_have_the_port():
    with rollcall.listening(0) as server:
        with pytest.raises(ProcessError, match="cannot be had here.*another process 0"):
            processes._called(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, patience=1)


def test_a_process_0_that_ends_is_not_waited_for_longer_than_patience():
    port = free_port()
    with pytest.raises(ProcessError, match="cannot be reached"):
        processes._called(f"127.0.0.1:{port}", 2, 1, patience=1)
