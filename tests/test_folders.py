import json
from contextlib import ExitStack, contextmanager

import pytest
from claims import claimed_elsewhere

from dtrak.runs import folders
from dtrak.runs.files import LOCK_FILE, claim
from dtrak.runs.folders import OutputError, check_folder, claim_folder

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


def test_what_is_known_so_far_is_compared(tmp_path):
    assert check_folder(tmp_path / "run", "run.json", {"model": "abd"}, partly=True) is None
    assert not (tmp_path / "run").exists(), "nothing is written"
    first = claim_folder(tmp_path / "run", "run.json", SETTINGS)
    assert check_folder(tmp_path / "run", "run.json", {"model": "abc"}, partly=True) == first
    with pytest.raises(OutputError, match='model is "abc" there and "abd" here'):
        check_folder(tmp_path / "run", "run.json", {"model": "abd"}, partly=True)
    with pytest.raises(OutputError, match="recipe is"):
        check_folder(tmp_path / "run", "run.json", {"model": "abc"})


def test_one_command_at_a_time_writes(tmp_path):
    folder = tmp_path / "run"
    with claim(folder / LOCK_FILE):
        with pytest.raises(OutputError, match=r"another command is at work in \S+run: wait"):
            claim_folder(folder, "run.json", SETTINGS, ExitStack())
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    # a lock without a run makes the folder nobody's
    with ExitStack() as held:
        first = claim_folder(folder, "run.json", SETTINGS, held)
        with pytest.raises(OutputError, match="another command is at work"):
            claim_folder(folder, "run.json", SETTINGS, ExitStack())
        # whoever only reads is not kept away
        assert claim_folder(folder, "run.json", SETTINGS) == first
        assert check_folder(folder, "run.json", SETTINGS) == first
    with ExitStack() as held:
        assert claim_folder(folder, "run.json", SETTINGS, held) == first
    # a folder of something else gets no lock
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(OutputError, match="not empty"):
        claim_folder(tmp_path / "photos", "run.json", SETTINGS, ExitStack())
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]


def test_a_folder_that_another_command_took_in_between(tmp_path, monkeypatch):
    @contextmanager
    def late(folder, part):
        claim_folder(folder, "run.json", {"model": "other"})
        yield

    monkeypatch.setattr(folders, "alone_in", late)
    with pytest.raises(OutputError, match='model is "other" there and "abc" here'):
        claim_folder(tmp_path / "run", "run.json", SETTINGS, ExitStack())


def test_parts_of_the_work_exclude_those_they_overlap(tmp_path):
    folder = tmp_path / "run"
    claim_folder(folder, "run.json", SETTINGS)
    with claimed_elsewhere(folder, range(4, 8)):
        for part in (range(4), range(8, 10)):
            with ExitStack() as held:
                claim_folder(folder, "run.json", SETTINGS, held, part)
        for part in (range(5), range(7, 9), range(5, 6), range(10)):
            with pytest.raises(OutputError, match="another command is at work"):
                claim_folder(folder, "run.json", SETTINGS, ExitStack(), part)
    with ExitStack() as held:
        claim_folder(folder, "run.json", SETTINGS, held, range(10))
