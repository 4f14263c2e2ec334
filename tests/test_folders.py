import json

import pytest

from dtrak.folders import claim_folder
from dtrak.runs import OutputError

SETTINGS = {"recipe": {"steps": 3, "betas": (0.9, 0.99)}, "model": "abc"}


def test_a_folder_is_claimed_once(tmp_path):
    folder = tmp_path / "deep" / "run"
    first = claim_folder(folder, "run.json", SETTINGS)
    assert first["settings"]["recipe"]["betas"] == [0.9, 0.99]
    file = folder / "run.json"
    assert json.loads(file.read_text()) == first
    # what a finished run adds to the file stays
    file.write_text(json.dumps(first | {"facts": {"steps": 3}}))
    assert claim_folder(folder, "run.json", SETTINGS) == first | {"facts": {"steps": 3}}


def test_other_settings_are_refused_by_name(tmp_path):
    claim_folder(tmp_path / "run", "run.json", SETTINGS)
    content = (tmp_path / "run" / "run.json").read_bytes()
    other = {"recipe": {"steps": 4, "betas": (0.9, 0.99)}, "model": "abd"}
    message = (
        'holds another run: model is "abc" there and "abd" here; recipe.steps is 3 there and 4'
    )
    with pytest.raises(OutputError, match=message):
        claim_folder(tmp_path / "run", "run.json", other)
    assert (tmp_path / "run" / "run.json").read_bytes() == content


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3}', "{}"])
def test_damaged_settings(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputError, match=r"run.json is damaged: delete"):
        claim_folder(tmp_path, "run.json", SETTINGS)


def test_folders_of_something_else(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"is not empty and holds no run.json: choose another"):
        claim_folder(tmp_path, "run.json", SETTINGS)
    with pytest.raises(OutputError, match="--output must be a folder, got the file"):
        claim_folder(tmp_path / "holiday.jpg", "run.json", SETTINGS)
    # what a killed writer left does not count
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json.partial").write_bytes(b"x")
    claim_folder(tmp_path / "new", "run.json", SETTINGS)
