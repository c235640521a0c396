"""Returns memory that the process has freed to the operating system."""

import ctypes


def give_back() -> None:
    """Returns freed memory to the system, if the C library is glibc.

    glibc keeps freed blocks of up to 32 MB, the size of most arrays in published networks, in case
    the process needs them again. Call this after reading and freeing large arrays, not in every
    step.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
