import logging
import re

import pytest

from slime.observability.logging import setup_logging

pytestmark = pytest.mark.usefixtures("root_logger_as_before")


def test_a_line_says_when_how_bad_who_and_what(capsys: pytest.CaptureFixture[str]):
    setup_logging("INFO", "train 0")
    logging.getLogger("slime.x").warning("lost %d of %d", 1, 4)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING train 0 \| lost 1 of 4\n", capsys.readouterr().err)


def test_setting_up_twice_prints_every_line_once(capsys: pytest.CaptureFixture[str]):
    setup_logging("INFO", "first")
    setup_logging("INFO", "100% second")
    logging.getLogger("slime.x").info("hello")
    assert capsys.readouterr().err.count("hello") == 1


def test_lines_under_the_level_and_of_chatty_libraries_are_left_out(
    capsys: pytest.CaptureFixture[str],
):
    setup_logging("INFO", "driver")
    logging.getLogger("slime.x").debug("detail")
    logging.getLogger("httpx").info("HTTP Request: POST ...")
    assert capsys.readouterr().err == ""


def test_a_log_file_per_role_has_dates_and_logger_names(tmp_path, capsys):
    setup_logging("INFO", "train 0", folder=tmp_path)
    logging.getLogger("slime.x").info("hello")
    line = (tmp_path / "train-0.log").read_text()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    train 0 \| slime\.x: hello\n", line
    )
