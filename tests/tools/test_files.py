"""Locks: whose file they may touch, and what they lock after the file was removed. Folders that appear whole."""

import os
import shutil
import threading

import killing
import pytest

from s2sent_kernels.files import locked, new_folder, scratch


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


def fill(target):
    with new_folder(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
        (folder / "sub").mkdir()
        (folder / "sub" / "c").write_text("c")


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_whole(tmp_path, there):
    """Killed at each operation, and once more: what was left half-written is gone."""
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
        target.chmod(0o750)
    count = killing.operations(tmp_path, lambda: fill(target))
    assert entries(target) == ["a", "b", "sub", "sub/c"] and os.listdir(target.parent) == ["out"]
    assert not there or target.stat().st_mode & 0o777 == 0o750
    for step in range(1, count + 1):
        shutil.rmtree(tmp_path / "deep")
        if there:
            target.mkdir(parents=True)
        assert killing.killed_at(step, tmp_path, lambda: fill(target))
        assert not target.exists() or entries(target) in ([], ["a", "b", "sub", "sub/c"]), step
        if target.exists() and entries(target):
            continue
        fill(target)
        assert entries(target) == ["a", "b", "sub", "sub/c"] and os.listdir(target.parent) == ["out"], step


def test_a_folder_that_a_living_process_fills_is_left_alone(tmp_path):
    (tmp_path / ".out.notes.new").mkdir()
    with new_folder(tmp_path / "out") as first:
        (first / "a").write_text("first")
        fill(tmp_path / "other")
        with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as second:
            assert first.exists() and first != second
            raise RuntimeError
        assert not second.exists()
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [".out.notes.new", "other", "out"]


def test_one_process_alone_fills_a_folder(tmp_path):
    target = tmp_path / "out"
    (tmp_path / f".out.{'0' * 32}.new").mkdir()  # a killed process's
    with new_folder(target, alone=True) as first:
        (first / "a").write_text("first")
        for _ in range(2):
            with (
                pytest.raises(ValueError, match=r"/out: another process is writing there"),
                new_folder(target, alone=True),
            ):
                raise AssertionError("it began")
        with new_folder(tmp_path / "other", alone=True) as other:
            (other / "b").write_text("another folder")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"] and os.listdir(target) == ["a"]


def test_a_folder_in_one_that_cannot_be_written_to(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(tmp_path))
    fill(target)
    assert entries(target) == ["a", "b", "sub", "sub/c"] and os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b" / "c") as folder:
        (folder / "x").write_text("x")
        raise RuntimeError
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_beside_a_file_is_removed(tmp_path):
    def write():
        with scratch(tmp_path, "a.onnx") as folder:
            (folder / "a.onnx").write_text("x")
            os.replace(folder / "a.onnx", tmp_path / "a.onnx")

    assert killing.killed_at(3, tmp_path, write) and len(os.listdir(tmp_path)) == 1
    write()
    assert os.listdir(tmp_path) == ["a.onnx"]
