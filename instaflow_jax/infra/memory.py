"""The memory of a CPU's programs."""
import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of malloc.h, M_ before each


def keep() -> None:
    """Has the C library keep what is freed, where it would give it back to the system.

    XLA asks for a program's temporaries at every call. From 32 MiB on glibc maps them anew each time, and the system
    clears every page when it is touched: a quarter of the embedded training step. Call it early, before the large
    imports: a thread that has a heap of its own by then is not reached. Does nothing without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):  # -1: never
            mallopt(option, value)
