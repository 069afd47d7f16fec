"""The lock that keeps two runs from writing the same files."""

import errno
import fcntl

import pytest

from ram.errors import UserError
from ram.storage.files import only_run


def test_second_run_is_refused_until_the_first_ends(tmp_path):
    with only_run(tmp_path / "run"):
        assert (tmp_path / ".run.lock").exists()
        with pytest.raises(UserError, match="another run is writing it"), only_run(tmp_path / "run"):
            pass
        with only_run(tmp_path / "other"):
            pass
    with only_run(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_other_processes_of_a_run_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with only_run(tmp_path / "run"), only_run(tmp_path / "run"):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks_is_not_checked(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run(tmp_path / "run"), only_run(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_lock_are_raised(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EACCES + 1000, "something else")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="something else"), only_run(tmp_path / "run"):
        pass
