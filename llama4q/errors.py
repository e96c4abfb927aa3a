"""The user's mistakes: one line that says what is wrong, the value seen, and what to do next."""


class UserError(Exception):
    """Something the user can mend. The command line shows its one line and exits with code 1."""
