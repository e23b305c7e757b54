"""Claiming a folder for a run: a kill at any moment of it leaves a folder that can be claimed."""

import pytest
import toy_experiment as toy

from moejax.config.run_directory import CONFIG_JSON, CONFIG_TEXT, check_workdir, claim
from moejax.errors import UserError


@pytest.fixture
def config():
    return toy.config.as_buildable()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_claimed_once(tmp_path, config):
    check_workdir(tmp_path / "run", config, None)
    claim(tmp_path / "run", config, {})
    assert names(tmp_path / "run") == [CONFIG_JSON, CONFIG_TEXT]
    before = (tmp_path / "run" / CONFIG_JSON).read_text()
    claim(tmp_path / "run", config, {"other": "1"})
    assert (tmp_path / "run" / CONFIG_JSON).read_text() == before


@pytest.mark.parametrize("left", ["", "{", '{"half": '])
def test_what_a_kill_left_of_a_claim_is_nobodys(tmp_path, config, left):
    (tmp_path / (CONFIG_JSON + ".partial")).write_text(left)
    check_workdir(tmp_path, config, None)
    claim(tmp_path, config, {})
    assert names(tmp_path) == [CONFIG_JSON, CONFIG_TEXT]


def test_a_kill_before_the_text_is_made_up_for(tmp_path, config):
    claim(tmp_path, config, {})
    text = (tmp_path / CONFIG_TEXT).read_text()
    (tmp_path / CONFIG_TEXT).rename(tmp_path / (CONFIG_TEXT + ".partial"))
    claim(tmp_path, config, {})
    assert (tmp_path / CONFIG_TEXT).read_text() == text
    assert names(tmp_path) == [CONFIG_JSON, CONFIG_TEXT]


@pytest.mark.parametrize("name", ["notes.txt", CONFIG_TEXT, "config.json.bak"])
def test_anything_else_is_somebodys(tmp_path, config, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no config.json"):
        check_workdir(tmp_path, config, None)
