"""The error classes: distinct exit codes, message and hint; what the system refuses."""

import errno

import pytest

from affmae_engine import errors


def test_exit_codes_are_those_of_the_documentation():
    codes = {
        errors.AffmaeError: 1,
        errors.ConfigError: 2,
        errors.InputError: 3,
        errors.ResourceError: 4,
        errors.BusyError: 5,
        errors.CorruptError: 6,
        errors.DivergedError: 7,
    }
    assert {kind: kind("x").exit_code for kind in codes} == codes


@pytest.mark.parametrize(("signal_number", "code"), [(1, 129), (2, 130), (15, 143)])
def test_a_clean_stop_has_the_code_of_its_signal(signal_number, code):
    assert errors.Interrupted("stopped", signal_number=signal_number).exit_code == code


def test_message_and_hint():
    error = errors.InputError("it broke", "mend it")
    assert (str(error), error.message, error.hint) == ("it broke", "it broke", "mend it")
    assert errors.InputError("it broke").hint == ""


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (errno.EACCES, errors.InputError, "permission was denied"),
        (errno.ENAMETOOLONG, errors.InputError, "the name is too long"),
        (errno.ELOOP, errors.InputError, "its links lead in a circle"),
        (errno.ENOSPC, errors.ResourceError, "the disk is full"),
        (errno.EIO, errors.ResourceError, "the device reported an input/output error"),
        (errno.ESTALE, errors.ResourceError, "the network file system has lost it"),
        (errno.EMFILE, errors.ResourceError, "this process has too many files open"),
    ],
)
def test_what_the_system_refuses(code, kind, reason):
    refused = errors.of_system(OSError(code, "in the system's words", "a/b"))
    assert type(refused) is kind and refused.message == f"cannot use a/b: {reason}" and refused.hint


def test_a_refusal_behind_another_exception():
    try:
        try:
            raise OSError(errno.EIO, "in the system's words", "a/b")
        except OSError as error:
            raise ValueError("the codec stumbled") from error
    except ValueError as error:
        refused = errors.of_system(error)
    assert refused is not None and "a/b" in refused.message


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no such file", "a"), OSError(errno.EACCES, "no file named")])
def test_what_only_a_bug_explains(error):
    assert errors.of_system(error) is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOTCONN, "in the system's words"), "the network file system is not connected"),
        (OSError(errno.ENFILE, "in the system's words"), "this machine has too many files open"),
        (MemoryError(), "there is not enough memory"),
        (OSError(errno.EACCES, "in the system's words"), None),
        (OSError("a decoder's words"), None),
        (ValueError("damaged"), None),
    ],
)
def test_what_says_nothing_about_the_file(error, reason):
    try:
        try:
            raise error
        except type(error) as first:
            raise RuntimeError("the codec stumbled") from first
    except RuntimeError as second:
        found = errors.passing(second)
    assert found == errors.passing(error)
    assert found is None if reason is None else (found is not None and found[0] == reason and found[1])
