"""Writing is all or nothing: the old file or the new one, never a part, never a leftover."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isomorphic.errors import UserError
from isomorphic.files import atomic_write, check_writable, remove_leftovers
from tests.faults import contents, file_size_limit, one_line


def test_a_written_file_appears_whole_with_the_usual_rights(tmp_path: Path):
    path = tmp_path / "a" / "b" / "file.txt"
    mask = os.umask(0o027)
    try:
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text("new")
            assert not path.exists()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)
    assert contents(path.parent) == {"file.txt": b"new"}
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failure", [KeyError("bug"), KeyboardInterrupt(), UserError("said")], ids=repr)
def test_an_exception_inside_leaves_the_old_file_and_nothing_else(failure: BaseException, tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(failure)) as error, atomic_write(path) as temporary:
        temporary.write_text("half")
        raise failure
    assert error.value is failure
    assert contents(tmp_path) == {"file.txt": b"old"}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    full = pytest.raises(UserError, match="cannot write .*file.txt: File too large")
    with full as error, file_size_limit(1000), atomic_write(path) as temporary:
        temporary.write_bytes(bytes(5000))
    one_line(error)
    assert contents(tmp_path) == {"file.txt": b"old"}


def test_places_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    places = {
        tmp_path / "file" / "x.safetensors": "Not a directory|File exists",
        tmp_path / "file" / "deeper" / "x.safetensors": "Not a directory",
        tmp_path / "folder": "Is a directory|it is a folder",
        tmp_path / "folder" / ("x" * 300): "File name too long",
    }
    for place, reason in places.items():
        with pytest.raises(UserError, match=f"cannot write {place}: ({reason})") as error, atomic_write(place) as new:
            new.write_text("new")
        one_line(error)
        with pytest.raises(UserError, match=f"cannot write {place}: ({reason})") as error:
            check_writable(place)
        one_line(error)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder"}


def test_checking_a_place_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "old.txt").write_text("old")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "new" / "folder" / "x.txt", tmp_path / "old.txt", "relative/x.txt", "x.txt"):
        check_writable(place)
    assert contents(tmp_path) == {"old.txt": b"old"}


def test_leftovers_are_those_of_the_named_file_alone(tmp_path: Path):
    others = {
        "state.pt": b"",
        ".state.pt": b"",
        ".state.1.pt.abcdefgh": b"",
        ".state.pt.gz": b"",
        "xstate.pt.abcdefgh": b"",
    }
    for name in (*others, ".state.pt.abcdefgh", ".state.pt._0z9_aaa"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "state.pt")
    assert contents(tmp_path) == others


def test_what_a_killed_process_leaves_is_a_leftover(tmp_path: Path):
    path = tmp_path / "[a]*.txt"
    pid = os.fork()
    if not pid:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            os._exit(0)
    os.waitpid(pid, 0)
    assert len(contents(tmp_path)) == 1
    remove_leftovers(path)
    assert contents(tmp_path) == {}
