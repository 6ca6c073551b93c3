"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A bad input. The message is one line that says what is wrong and what to do; the CLI exits with 2."""
