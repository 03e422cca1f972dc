"""pytest, as the command line calls it, with a notebook client that cannot miss the end of a cell.

Where a cell shows an ``ipywidgets.Output`` (live viewers do), nbclient answers the kernel on the
socket on which it awaits that the cell is done. libzmq tells of a message once, and sending takes
that in: a reply that has come just before is then in the socket, and nobody knows. nbclient waits
for the rest of its time limit and goes on as if nothing had been (nbclient 0.11, issue 312 there).
Whoever looks again now and then finds it.
"""

from __future__ import annotations

import math
import sys
import time
from queue import Empty
from typing import Any

import pytest
from jupyter_client.channels import AsyncZMQSocketChannel

SECONDS = 1.0  # between two looks


_look = AsyncZMQSocketChannel.get_msg


async def get_msg(channel: AsyncZMQSocketChannel, timeout: float | None = None) -> dict[str, Any]:
    """The next message of a channel, looked for every second.

    Raises:
        queue.Empty: if none came in ``timeout`` seconds.
    """
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    while True:
        left = end - time.monotonic()
        try:
            return await _look(channel, max(min(left, SECONDS), 0.0))
        except Empty:
            if left <= SECONDS:
                raise


if __name__ == "__main__":
    AsyncZMQSocketChannel.get_msg = get_msg
    sys.exit(pytest.main(sys.argv[1:]))
