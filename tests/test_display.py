"""Every message reaches the person: in training.log with its time, and in the panel at once."""

import io
import logging
import re

import pytest
from rich.console import Console

from conftest import with_keys
from limbeck.console import logger, say, warn
from limbeck.training.callbacks import LogLines, tag
from limbeck.training.dashboard import Dashboard
from limbeck.training.display import LOG, Display, LogFile
from limbeck.training.phases import train_recipe

CLOCK = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


@pytest.fixture(autouse=True)
def messages_at_info():
    level = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(level)


def test_the_log_has_every_message_with_its_time(recipe, packed):
    folder = recipe.student_dir
    train_recipe(with_keys(recipe, teacher={"use_cached_logits": False}, training={"save_steps": 2}), folder)
    lines = (folder / LOG).read_text().splitlines()
    assert all(re.match(CLOCK, line) for line in lines)
    text = "\n".join(re.sub(CLOCK, "", line) for line in lines)
    for message in ("student: LlamaForCausalLM", "optimizer groups:", f"saved {folder / 'step_2'}", "trained 4 steps",
                    "advice: "):  # fmt: skip
        assert text.count(message) == 1, message
    assert not any(handler.__class__.__name__ == "_LogFile" for handler in logger.handlers)


def test_one_kind_of_step_line_and_the_other_forms_by_key():
    class State:
        is_world_process_zero, global_step, max_steps = True, 1000, 100_000

    logs = {"loss": 2.3456, "ce_loss": 2.1234, "kl_loss": 0.4567, "learning_rate": 0.02, "grad_norm": 1.2,
            "tokens_per_second": 8500.0}  # fmt: skip
    users = r"\[  1000/ 100000\] loss=2.35 lr=0.020 gnorm=1.2 tok/s=8500 elapsed=0s"
    parts = r"Step 1000: Total Loss: 2.3456, CE Loss: 2.1234, KL Loss: 0.4567"
    ours = r"\[  1000/ 100000\] loss=2.3456 ce=2.1234 kl=0.4567 lr=0.020 gnorm=1.2 tok/s=8500 elapsed=0s"
    for form, wanted in {"combined": [ours], "throughput": [users], "parts": [parts], "both": [users, parts]}.items():
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record, heard=heard: heard.append(record.getMessage())
        logger.addHandler(handler)
        LogLines(form).on_log(None, State, None, logs)
        logger.removeHandler(handler)
        assert len(heard) == len(wanted), form
        assert all(re.fullmatch(pattern, line) for pattern, line in zip(wanted, heard, strict=True)), heard


def test_the_panel_shows_the_newest_messages_at_once_and_no_step_lines(tmp_path, monkeypatch):
    out = io.StringIO()
    args = type("Args", (), {"output_dir": str(tmp_path), "dashboard": "on", "step_line": "combined"})()
    state = type("State", (), {"global_step": 1, "max_steps": 4})()
    display = Display(args, main=True)
    panel = next(callback for callback in display.callbacks if isinstance(callback, Dashboard))
    panel._console = Console(file=out, force_terminal=True, width=140, height=40)
    with display:
        panel.on_train_begin(args, state, None)
        for number in range(9):
            say(f"message {number}")
        say("a step", step_line=True)
        warn("the teacher is lost")
        panel.close()
    shown = out.getvalue().rpartition("╭")[2]
    assert "WARNING: the teacher is lost" in shown
    assert "message 8" in shown
    assert "message 2" not in shown, "only the newest"
    assert "a step" not in shown
    log = (tmp_path / LOG).read_text()
    assert all(f"message {number}" in log for number in range(9))
    assert "a step" in log


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    with LogFile(tmp_path / "file" / "x.log"):
        say("one")
        say("two")
    logger.removeHandler(handler)
    assert sum("cannot be written" in message for message in heard) == 1
    assert "two" in heard


def test_tags_have_no_spaces():
    assert tag("all others · muon · no decay") == "all_others.muon.no_decay"
