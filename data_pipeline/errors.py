"""The one error that a user of the pipeline is meant to read, and what may become one."""

import errno


class DataError(Exception):
    """Something about the input, the settings or a store is wrong.

    The message names the file or value, what was expected, and the way out. The command line prints it as
    `error: <message>` and exits with code 2; a traceback would add nothing to it.
    """


class Exhausted(DataError):
    """This process has no more files or memory, which says nothing of what was to be read."""


_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN)


def reading_failed(error: Exception, damaged: str) -> DataError:
    """What an error of reading a part of a store means: `damaged`, unless it is this process that lacks something."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _EXHAUSTED:
        return Exhausted(f"nothing can be read any more: {error or 'out of memory'}. Free memory, or raise `ulimit -n`")
    return DataError(damaged)


class InputChanged(DataError):
    """An input file is not what was found before."""

    @property
    def what(self) -> str:
        """What happened, without the way out, which in a build that has begun is another."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.what}: run the command again"


class BadDocument(Exception):
    """Something is wrong with one document. What is done about it is the policy of its class of problem."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(problem, detail)
        self.problem = problem
        """One of `config.POLICIES`."""
        self.detail = detail
        """What is wrong and where, to be read after the document's name."""

    def __str__(self) -> str:
        return self.detail
