"""The lock that keeps two runs from writing the same files."""

import errno
import fcntl
import threading
import time

import pytest

from ram.errors import UserError
from ram.storage import files
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


def test_second_run_can_wait_for_the_first(tmp_path, caplog):
    """Two evaluations at once ask a judge in turn, so that the second finds the first's answers."""
    order = []

    def second():
        with only_run(tmp_path / "cache", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with only_run(tmp_path / "cache", wait=True):
        thread.start()
        while "waiting for another run that writes" not in caplog.text:
            time.sleep(0.01)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch, number):
    """Finished work on a read-only mount is read again; whatever has to be written fails by itself."""

    def refuse(self, *args, **given):
        raise OSError(number, "Read-only file system")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with only_run(tmp_path / "run"):
        assert list(tmp_path.iterdir()) == []
