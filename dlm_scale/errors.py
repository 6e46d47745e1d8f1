"""The one exception that a user's mistake raises; every main turns it into exit code 2."""


class UsageError(Exception):
    """Bad usage, config or input: the message names the thing, the cause and the next step."""
