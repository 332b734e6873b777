"""Following a file that grows, is cut, replaced, or damaged."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affmae_cli.dashboard.tail import LineTail, tail_bytes

TEXT = "première ligne\nзначение 2\n\n第三行\nlast\n".encode()


def everything(tail: LineTail) -> bytes:
    data = b""
    while True:
        lines = tail.read()
        data += lines.data
        if not lines.more:
            return data


@pytest.mark.parametrize("cut", range(len(TEXT) + 1))
def test_lines_split_at_any_byte_come_whole_and_once(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = LineTail(path)
    assert everything(tail) == b""  # not there yet
    path.write_bytes(TEXT[:cut])
    first = everything(tail)
    assert first == TEXT[: TEXT[:cut].rfind(b"\n") + 1]
    with path.open("ab") as file:
        file.write(TEXT[cut:])
    assert first + everything(tail) == TEXT
    assert everything(tail) == b"" and tail.offset == len(TEXT)


@given(st.lists(st.binary(min_size=1, max_size=12), max_size=12), st.integers(4, 9))
def test_whatever_is_appended_in_whatever_pieces(tmp_path_factory: pytest.TempPathFactory, pieces, chunk) -> None:
    path = tmp_path_factory.mktemp("tail") / "m"
    tail, read = LineTail(path, chunk=chunk), b""
    written = b""
    for piece in pieces:
        with path.open("ab") as file:
            file.write(piece)
        written += piece
        read += everything(tail)
    # A stretch of a whole chunk without a line end is damage: it is left out, everything else comes in order.
    kept = [line for line in written[: written.rfind(b"\n") + 1].split(b"\n") if len(line) < chunk]
    long = any(len(line) >= chunk for line in written.split(b"\n"))
    if not long:
        assert read == written[: written.rfind(b"\n") + 1]
    found = read.split(b"\n")
    assert all(line in found for line in kept)


def test_a_file_cut_short_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(TEXT)
    tail = LineTail(path)
    everything(tail)
    path.write_bytes(b"new\n")
    lines = tail.read()
    assert lines.restarted and lines.data == b"new\n" and lines.offset == 0


def test_a_file_rewritten_in_place_and_longer_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"a\nb\n")
    tail = LineTail(path)
    everything(tail)
    path.write_bytes(b"c\nd\ne\nf\n")
    lines = tail.read()
    assert lines.restarted and lines.data == b"c\nd\ne\nf\n"


def test_another_file_of_that_name_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"a\nb\n")
    tail = LineTail(path)
    everything(tail)
    (tmp_path / "n").write_bytes(b"a\nb\nc\n")  # begins with the same bytes
    (tmp_path / "n").replace(path)
    lines = tail.read()
    assert lines.restarted and lines.data == b"a\nb\nc\n"


def test_a_file_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"a\n")
    tail = LineTail(path)
    everything(tail)
    path.unlink()
    assert tail.read().restarted and not tail.read().restarted
    path.write_bytes(b"b\n")
    assert everything(tail) == b"b\n"


def test_appending_does_not_restart(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = LineTail(path)
    for number in range(50):
        with path.open("ab") as file:
            file.write(b"%d\n" % number)
        lines = tail.read()
        assert not lines.restarted and lines.data == b"%d\n" % number


def test_a_folder_or_an_unreadable_file_is_one_without_lines(tmp_path: Path) -> None:
    assert everything(LineTail(tmp_path)) == b""


def test_the_end_of_a_file_begins_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert tail_bytes(path, 10) == b""
    path.write_bytes(b"one\ntwo\n\xff three\nfour")
    assert tail_bytes(path, 100) == b"one\ntwo\n\xff three\nfour"
    assert tail_bytes(path, 6) == b"four" and tail_bytes(path, 4) == b"four"
