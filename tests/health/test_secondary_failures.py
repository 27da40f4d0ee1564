"""Messages that only tell of another rank: those of the list stand in the installed torch, or are the system's."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from ds_moe_ep.health.secondary_failures import GLOO, MESSAGES, is_secondary_message

LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
OF_THE_SYSTEM = {os.strerror(errno.ECONNRESET), os.strerror(errno.EPIPE)}


def missing_in_torch(messages: set[str]) -> list[str]:
    with LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return [message for message in messages if text.find(message.encode()) < 0]


@pytest.mark.skipif(not LIBRARY.is_file(), reason="no libtorch_cpu.so: torch was built otherwise")
def test_the_messages_of_gloo_are_those_of_the_installed_torch() -> None:
    assert missing_in_torch(set(GLOO) - OF_THE_SYSTEM) == []
    assert missing_in_torch({"Connection closed by a peer"}) == ["Connection closed by a peer"]
    assert set(GLOO) >= OF_THE_SYSTEM


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_is_found_inside_of_a_longer_one(message: str) -> None:
    assert is_secondary_message(f"RuntimeError: [pair.cc:553] {message} [127.0.0.1]:5525")
    assert not is_secondary_message(message[: len(message) // 2])
