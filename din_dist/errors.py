"""What a run can end with, and the exit code that says so."""

EXIT_INPUT_ERROR = 2  # wrong input: running it again changes nothing
EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h: stopped on request after a checkpoint, run it again

EXIT_GAVE_UP = 79  # of a worker to its launcher, which stops the elastic job and ends with EXIT_RETRY
EXIT_HUNG = 80  # of a worker that gave no sign of life, or whose disk did not answer
EXIT_SIGINT = 130  # ended by Ctrl-C, as shells have it


class InputError(ValueError):
    """Something the user gave is wrong. Its text is one line: the rule, what came, what to do.

    Commands print it as `error: ...` and exit with `EXIT_INPUT_ERROR`.
    """


class Interrupted(Exception):
    """SIGTERM or SIGINT came: the step was finished and a checkpoint written."""


class Left(Interrupted):
    """This rank leaves an elastic job, which goes on without it; the text says why."""


class LostPeer(Exception):
    """Another rank went away during a collective; the text is Horovod's."""


class CannotJoin(Exception):
    """This rank did not get into connection with the others; the text says why."""


class FailedElsewhere(Exception):
    """Another rank reports what went wrong; this one leaves without a word of its own."""
