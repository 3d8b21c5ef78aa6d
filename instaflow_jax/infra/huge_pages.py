"""Large arrays in huge pages, where Linux gives those only to programs that ask."""

import os
import sys
from pathlib import Path

_GIVEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"


def wish() -> dict[str, str]:
    """What to add to a process' environment so that its C library (glibc from 2.35; others ignore it) asks for them.

    Nothing where the system gives huge pages to all or to none, or where the environment already says something of them.
    """
    said = os.environ.get(_VARIABLE, "")
    if _TUNABLE in said or not _GIVEN.is_file() or "[madvise]" not in _GIVEN.read_text():
        return {}
    return {_VARIABLE: ":".join(filter(None, (said, f"{_TUNABLE}=1")))}


def ask() -> None:
    """Starts this process again as it was called, with `wish` in its environment, which glibc reads at the start alone.

    XLA's CPU runtime takes the memory of a program's temporaries anew at each call, and the system hands it out at first
    touch, page by page: in pages of 4 KiB that is a sixth of the time of most that the package does on a CPU
    (`benchmarks/RESULTS.md`). It costs some 30 ms, before the first heavy import.
    """
    if added := wish():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)
