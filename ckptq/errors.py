"""Every error ckptq raises on purpose, and the exit code it ends the process with.

    CkptqError                      2
    |-- RecipeError                 2   the YAML, --set, or a pattern in it
    |-- SourceError                 2   the checkpoint to read: absent, truncated, at odds with itself
    |-- UnsupportedError            2   no scope, format or scheme for what was asked
    |-- CalibrationError            2   the calibration samples can't be had or read
    |-- OutputError                 2   the folder to write: exists, is read-only, is full
    `-- DataError                   1   the numbers are at fault: NaN, infinity, an observer no sample reached, findings

Ctrl-C and SIGTERM end the process with 130, anything unforeseen with 70.
Each message names its subject, what was expected and what was found; `hint` is the next thing to do.
"""

from __future__ import annotations


class CkptqError(Exception):
    """Base of the tree. `hint` is one line that says what to do next, or None."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(CkptqError):
    """The recipe, an override of it, or a pattern in it is wrong."""


class SourceError(CkptqError):
    """The source checkpoint can't be read or contradicts itself."""


class UnsupportedError(CkptqError):
    """There is no scope, exporter or scheme for what was asked."""


class CalibrationError(CkptqError):
    """Calibration samples can't be found, read or encoded."""


class OutputError(CkptqError):
    """The output folder can't be created, written or published."""


class DataError(CkptqError):
    """The numbers are at fault; no setting of ckptq would mend them."""

    exit_code = 1
