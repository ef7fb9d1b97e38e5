"""What Linux says of processes: memory, and those that read data for another."""

import ctypes
import gc
import os
import sys
from pathlib import Path


def tidy() -> None:
    """Frees what nothing refers to, so that what is counted next is in use."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else glibc keeps what was freed


def memory(pid: int | str = "self") -> float:
    """Resident, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def readers(pid: int | str = "self") -> list[int]:
    """The children of a process that read data; one that only cleans up after them is none."""
    pids = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children")).split()
    said = {int(p): Path(f"/proc/{p}/cmdline").read_bytes() for p in pids}
    return [
        p for p, text in said.items() if b"spawn_main" in text and b"resource_tracker" not in text
    ]


def shared(pid: int | str = "self") -> set[str]:
    """The files of /dev/shm that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if line.split()[-1].startswith("/dev/shm/")}
