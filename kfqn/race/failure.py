"""What went wrong in one line that says what to do: printed by the command line, exit status 2."""

import difflib
from collections.abc import Iterable


class Failure(Exception):
    """A mistake or a missing thing the user can mend; its text is the whole message."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a clause, as in "no setting rl, did you mean lr?"; empty if nothing known is near."""
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f", did you mean {folded[near[0]]}?" if near else ""
