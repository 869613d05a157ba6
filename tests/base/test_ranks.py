"""Processes that meet, exchange small things, and end together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprune.base.ranks import Agreement, Ranks, device_of_rank

ROOT = Path(__file__).parents[2]

EXCHANGE = """
import torch
from fastprune.base.ranks import join_ranks

for _ in range(2):
    with join_ranks() as ranks:
        assert ranks.world == 2
        assert ranks.from_first("table" if ranks.is_first else None) == "table"
        assert ranks.all_gather(ranks.rank) == [0, 1]
        assert ranks.all_sum(torch.tensor([1.0, ranks.rank])).tolist() == [2.0, 1.0]
        parts = ranks.gather(torch.full((ranks.rank + 1,), ranks.rank), 2)
        assert [part.tolist() for part in parts] == ([[0], [1, 1]] if ranks.is_first else [])
"""

STANDSTILL = """
import sys
import fastprune.base.ranks as distributed
from fastprune.base.errors import TrainingError

distributed.TIMEOUT_MINUTES = 0.05
try:
    with distributed.join_ranks() as ranks:
        if ranks.is_first:
            ranks.all_gather(None)
        else:
            sys.stdin.read()
except TrainingError as error:
    print(error)
"""


@pytest.fixture
def two_ranks():
    """Start a script as two ranks; their processes, whose standard input is a pipe."""
    started = []

    def start(script):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
            }
            pipe = subprocess.PIPE
            command = [sys.executable, "-c", script]
            started.append(
                subprocess.Popen(
                    command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_ranks_exchange_values_and_meet_a_second_time(two_ranks):
    ended = [process.communicate() for process in two_ranks(EXCHANGE)]
    assert ended == [("", ""), ("", "")]


def test_rank_that_stands_still_is_noticed_after_the_time_out(two_ranks):
    first, second = two_ranks(STANDSTILL)
    said, _ = first.communicate()
    assert "rank 0 lost the other ranks" in said
    assert "did not answer for 0.05 minutes. Start the command again" in said
    assert second.poll() is None


def test_process_alone_keeps_what_it_has():
    tensor = torch.arange(3)
    assert Ranks().gather(tensor, 5) == [tensor]
    assert Ranks().from_first("table") == "table"
    assert Ranks().all_gather("mine") == ["mine"]
    assert Ranks().all_sum(torch.tensor([2.0])).item() == 2.0


def test_process_alone_agrees_with_itself():
    agreement = Agreement(Ranks())
    assert [agreement.ask(request) for request in (0, 15, 0)] == [0, 15, 0]
    assert agreement.close() == 0


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")]
)
def test_each_rank_of_a_node_has_its_own_device(monkeypatch, device, expected):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_rank(torch.device(device)) == torch.device(expected)
