"""The error of bad input: one sentence that says where and what. Anything else that is raised is a fault of the program, and
shows its traceback."""


class InputError(ValueError):
    """A file, a setting, a folder or an argument that cannot be used. The message names it and says what was expected."""


class MissingInput(InputError, FileNotFoundError):
    """A file or folder that is not there."""

    def __str__(self):  # FileNotFoundError's own would print the arguments as errno and name
        return str(self.args[0]) if self.args else ""
