"""Every error that kdhpc raises on purpose.

KdhpcError
├── InputError      what was typed or configured cannot be done       exit code 2
├── ClusterError    Slurm is missing, refused or did not answer       exit code 2
├── DamagedError    a file differs from its record, or is unwritable  exit code 1
└── BusyError       another launcher holds the run                    exit code 3

A message is one line: what is wrong and where, what was expected, what to do. The launch scripts
catch these errors once, at the command line, and show them without a traceback.
"""


class KdhpcError(Exception):
    """Base class of all errors with a message for the user."""

    exit_code = 1


class InputError(KdhpcError):
    """A preset, key, value, path or model cannot be used."""

    exit_code = 2


class ClusterError(KdhpcError):
    """Slurm is missing, refused a job, or did not answer."""

    exit_code = 2


class DamagedError(KdhpcError):
    """A published file does not match its record, or a file cannot be written to the disk."""

    exit_code = 1


class BusyError(KdhpcError):
    """Another launcher is working on the same run."""

    exit_code = 3
