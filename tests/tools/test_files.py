"""Locks: whose file they may touch, and what they lock after the file was removed."""

import os
import threading

import pytest

from s2sent_kernels.files import locked


@pytest.mark.parametrize("target", ["notes.txt", "not there", "."])
def test_no_lock_through_a_link(tmp_path, target):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / target)
    with (
        pytest.raises(ValueError, match=r"\.lock: expected a file to lock, got a symbolic link: remove it"),
        locked(tmp_path / ".lock", wait=True),
    ):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "not there").exists()


def test_a_lock_keeps_what_is_in_its_file(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with locked(tmp_path / ".lock", wait=False):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_a_lock_that_is_removed_while_another_waits(tmp_path):
    """The one that waited locks the file that is there now, not the one that is gone."""
    path, waits, held = tmp_path / ".lock", threading.Event(), threading.Event()

    def second():
        waits.set()
        with locked(path, wait=True):
            held.set()
            assert done.wait(10)

    done, thread = threading.Event(), threading.Thread(target=second)
    with locked(path, wait=False):
        thread.start()
        assert waits.wait(10) and not held.wait(0.2)
        os.unlink(path)
    assert held.wait(10)
    with pytest.raises(ValueError, match="another process is writing there"), locked(path, wait=False):
        pass
    done.set()
    thread.join()
