"""Memory of the process that is free but not given back to the system."""

import ctypes


def give_back() -> None:
    """Gives freed memory back to the system, where the C library is glibc.

    It keeps freed blocks of up to 32 MB, as most arrays of published networks are, in case the
    process needs them again. Call it after large arrays were read and freed, not in every step.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
