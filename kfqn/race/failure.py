"""What went wrong in one line that says what to do: printed by the command line, exit status 2."""


class Failure(Exception):
    """A mistake or a missing thing the user can mend; its text is the whole message."""
