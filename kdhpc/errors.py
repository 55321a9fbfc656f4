"""Every error that kdhpc raises on purpose.

KdhpcError
├── InputError      what was typed or configured cannot be done       exit code 2
├── ClusterError    Slurm is missing, refused or did not answer       exit code 2
├── DamagedError    a file is not what its record says, or unwritable exit code 1
└── BusyError       another launcher holds the run                    exit code 3

A message is one line: what and where, what was expected, what to do. They are caught once, at the
command line (`launch/`), and shown without a traceback.
"""


class KdhpcError(Exception):
    """Base of all errors with a message for the user."""

    exit_code = 1


class InputError(KdhpcError):
    """A preset, key, value, path or model that cannot be used."""

    exit_code = 2


class ClusterError(KdhpcError):
    """Slurm is not there, refused a job, or did not answer."""

    exit_code = 2


class DamagedError(KdhpcError):
    """A published file does not match its record, or the disk refuses to take one."""

    exit_code = 1


class BusyError(KdhpcError):
    """Another launcher is working on the same run at this moment."""

    exit_code = 3
