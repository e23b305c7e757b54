"""Claiming a folder for a run: a kill at any moment of it leaves a folder that can be claimed."""

import pathlib

import pytest
import toy_experiment as toy

from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.config.run_directory import CONFIG_JSON, CONFIG_TEXT, check_workdir, claim
from moejax.config.text import config_diff
from moejax.errors import UserError


@pytest.fixture
def config():
    return toy.config.as_buildable()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def take(folder, config, versions=None):
    claim(folder, config, versions or {}, read=lambda: load_config(folder, trusted=True))


def test_a_folder_is_claimed_once(tmp_path, config):
    check_workdir(tmp_path / "run", config, None)
    take(tmp_path / "run", config)
    assert names(tmp_path / "run") == [CONFIG_JSON, CONFIG_TEXT]
    before = (tmp_path / "run" / CONFIG_JSON).read_text()
    take(tmp_path / "run", config, {"other": "1"})
    assert (tmp_path / "run" / CONFIG_JSON).read_text() == before


def test_of_two_that_saw_an_empty_folder_the_second_is_refused(tmp_path, config, monkeypatch):
    other = apply_overrides(config, ["steps=7"])
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: False)  # what both saw
    take(tmp_path, config)
    before = (tmp_path / CONFIG_JSON).read_text()
    with pytest.raises(UserError, match="holds another experiment .steps"):
        take(tmp_path, other)
    assert (tmp_path / CONFIG_JSON).read_text() == before
    assert names(tmp_path) == [CONFIG_JSON, CONFIG_TEXT]


def test_code_of_the_same_name_and_another_text_is_another_experiment(tmp_path, config):
    configs = []
    for folder, default in (("a", "2.0"), ("b", "3.0")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "twin_toy.py"
        file.write_text(
            f"import toy_experiment\nclass Mine(toy_experiment.Top):\n    x = {default}\n"
        )
        configs.append(apply_overrides(config, [f"block.ffn.router={file}:Mine"]))
    check_workdir(tmp_path / "run", configs[0], configs[0])
    with pytest.raises(UserError, match="holds another experiment .*twin_toy.py: another text"):
        check_workdir(tmp_path / "run", configs[1], configs[0])


def test_a_folder_goes_on_with_what_its_last_session_changed(tmp_path):
    config = load_config("configs/tiny.py:smoke")
    take(tmp_path, config)
    changed = apply_overrides(config, ["log_every=3"])
    take(tmp_path, changed)
    assert not config_diff(load_config(tmp_path, trusted=True), changed)
    assert "log_every = 3" in (tmp_path / CONFIG_TEXT).read_text()


@pytest.mark.parametrize("left", ["", "{", '{"half": '])
def test_what_a_kill_left_of_a_claim_is_nobodys(tmp_path, config, left):
    (tmp_path / (CONFIG_JSON + ".partial")).write_text(left)
    check_workdir(tmp_path, config, None)
    take(tmp_path, config)
    assert set(names(tmp_path)) >= {CONFIG_JSON, CONFIG_TEXT}


def test_a_kill_before_the_text_is_made_up_for(tmp_path, config):
    take(tmp_path, config)
    text = (tmp_path / CONFIG_TEXT).read_text()
    (tmp_path / CONFIG_TEXT).rename(tmp_path / (CONFIG_TEXT + ".partial"))
    take(tmp_path, config)
    assert (tmp_path / CONFIG_TEXT).read_text() == text
    assert set(names(tmp_path)) >= {CONFIG_JSON, CONFIG_TEXT}


@pytest.mark.parametrize("name", ["notes.txt", CONFIG_TEXT, "config.json.bak"])
def test_anything_else_is_somebodys(tmp_path, config, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no config.json"):
        check_workdir(tmp_path, config, None)
