"""The record of one mistake."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A text in a file that is replaced by another.

    Args:
      file: path from the root of the repository.
      what: the mistake in a few words.
      right: a text that occurs in the file exactly once.
      wrong: its replacement, with which the file must still import.
      tests: arguments of pytest: files, or FILE::TEST, separated by spaces. The fewer tests, the
        faster; fixtures that train are the slowest.
      equivalent: why no test can notice it, for the few mistakes without a visible effect.
    """

    file: str
    what: str
    right: str
    wrong: str
    tests: str
    equivalent: str = ""
