"""UserError keeps to one line, also when a worker process hands over a whole traceback."""

from __future__ import annotations

import traceback

from isomorphic.errors import UserError


def test_message_is_kept_as_written():
    assert str(UserError("no such  file: 'a  b.png'")) == "no such  file: 'a  b.png'"


def test_line_breaks_become_spaces():
    assert str(UserError("first\nsecond\r\nthird")) == "first second third"


def test_only_the_last_line_of_a_worker_traceback_is_kept():
    try:
        raise UserError("cannot read image a.png: UserError: odd name") from OSError("cut short")
    except UserError as error:
        formatted = "".join(traceback.format_exception(error))
    handed_over = f"Caught UserError in DataLoader worker process 0.\nOriginal {formatted}"
    assert "cut short" in handed_over
    assert str(UserError(handed_over)) == "cannot read image a.png: UserError: odd name"
