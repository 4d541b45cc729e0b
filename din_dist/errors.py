"""The errors that can end a run, and their exit codes."""

EXIT_INPUT_ERROR = 2  # wrong input: running the command again changes nothing
EXIT_RETRY = 75  # EX_TEMPFAIL in sysexits.h: stopped on request after a checkpoint; run the command again

EXIT_GAVE_UP = 79  # tells the launcher to stop the elastic job, which then ends with EXIT_RETRY
EXIT_HUNG = 80  # a worker gave no sign of life, or its disk did not answer
EXIT_QUALITY_FELL = 81  # daily training stops before a day on which the model is worse by more than is allowed
EXIT_DAY_MISSING = 82  # daily training waits for a day, because a later one is there
EXIT_SIGINT = 130  # ended by Ctrl-C, as in shells


class InputError(ValueError):
    """An input of the user is wrong. The text is one line: the rule, what was received, what to do.

    Commands print it as `error: ...` and exit with `EXIT_INPUT_ERROR`.
    """


class Interrupted(Exception):
    """A signal asked the job to stop; the step was finished and a checkpoint written."""


class Left(Interrupted):
    """This rank leaves an elastic job; the text says why.

    Attributes:
        after: what becomes of the job.
    """

    def __init__(self, reason: str, after: str = "the other workers go on") -> None:
        super().__init__(reason)
        self.after = after


class LostPeer(Exception):
    """Another rank went away during a collective; the text is Horovod's."""


class CannotJoin(Exception):
    """This rank could not connect to the others; the text says why."""


class FailedElsewhere(Exception):
    """Another rank reports the error; this rank ends without a message of its own."""
