"""The one error that a user of the pipeline is meant to read."""


class DataError(Exception):
    """Something about the input, the settings or a store is wrong.

    The message names the file or value, what was expected, and the way out. The command line prints it as
    `error: <message>` and exits with code 2; a traceback would add nothing to it.
    """
