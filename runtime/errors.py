"""The one exception for mistakes people can mend: scripts print it without a traceback and exit with status 2."""


class InputError(ValueError):
    """Bad configuration, file or command line. The message names the file or key and says what to do."""

    for_people = True
