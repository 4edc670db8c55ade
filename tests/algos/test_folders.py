"""A folder knows the settings of what is made in it."""

import json

import pytest
from swirl_algos.folders import claim, read_claim

from swirl_env.errors import ConfigError


def test_other_settings_stop_where_something_was_made(tmp_path):
    path = tmp_path / "run" / "run.json"
    claim(path, {"seed": 0, "a": {"b": 1}}, "--out")
    claim(path, {"seed": 1, "a": {"b": 1}}, "--out")  # nothing was made with the first
    assert read_claim(path) == {"seed": 1, "a": {"b": 1}}
    (tmp_path / "run" / "trajectories.jsonl").touch()
    claim(path, {"seed": 1, "a": {"b": 1}}, "--out")
    with pytest.raises(ConfigError, match=r"another config \(a.b: 1 there, 2 now\). Use another --out"):
        claim(path, {"seed": 1, "a": {"b": 2}}, "--out")


def test_what_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / "run.json"
    (tmp_path / "notes").touch()
    with pytest.raises(ConfigError, match="not empty and holds no run.json"):
        claim(path, {}, "--out")
    (tmp_path / "notes").unlink()
    path.write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="is not a run's config"):
        claim(path, {}, "--out")
    assert json.loads(path.read_text()) == {"mine": 1}


def test_a_process_killed_while_it_claimed_leaves_the_folder_usable(tmp_path):
    (tmp_path / "run.json.part").write_text('{"conf')
    claim(tmp_path / "run.json", {"seed": 0}, "--out")
    assert read_claim(tmp_path / "run.json") == {"seed": 0}
    assert not (tmp_path / "run.json.part").exists()
