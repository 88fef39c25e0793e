"""What must hold of the code of kernels for Hopper, whose warps hand data over to each other and to the hardware."""

from __future__ import annotations

import re


def stores(code: str) -> int:
    """How often the hardware stores what lies in shared memory. Fails where it does, or multiplies it, before threads
    have handed over what they wrote there: such a race need not show in results."""
    handed_over, found = True, 0
    for line in code.splitlines():
        if "ttg.local_store" in line:
            handed_over = False
        elif "fence_async_shared" in line:
            handed_over = True
        elif "async_tma_copy_local_to_global" in line or "ttng.warp_group_dot " in line:
            assert handed_over, line
            found += "async_tma" in line
    return found


def waits_for_stores(code: str) -> list[int]:
    """How many stores may still be on their way after each wait."""
    return [int(pending) for pending in re.findall(r"async_tma_store_wait {pendings = (\d+)", code)]


def buffers_of_stores(code: str) -> str:
    """Which of a ring's buffers each store leaves from, where the code says so by number."""
    at: dict[str, str] = {}
    found = ""
    for line in code.splitlines():
        if made := re.search(r"(%\w+) = ttg\.memdesc_index %\w+\[%c(\d)_i32", line):
            at[made[1]] = made[2]
        elif stored := re.search(r"async_tma_copy_local_to_global .*\] (%\w+) :", line):
            found += at.get(stored[1], "?")
    return found
