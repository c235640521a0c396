"""The record of one mistake."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A text of a file that is replaced by another.

    Args:
      file: path from the root of the repository.
      what: the mistake in a few words.
      right: a text that stands in the file exactly once.
      wrong: what takes its place; the file must still import.
      tests: what pytest is given: files, or FILE::TEST, separated by spaces. The fewer tests, the
        faster; fixtures that train are the slowest.
      equivalent: why no test can notice it, for the few that change nothing that can be seen.
    """

    file: str
    what: str
    right: str
    wrong: str
    tests: str
    equivalent: str = ""
