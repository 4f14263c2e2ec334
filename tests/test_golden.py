"""No number changes unnoticed: hashes where they were recorded, a few digits everywhere.

The fast lane has those of the digits' main job, plain and whitened.
"""

import json
import os
from pathlib import Path

import golden
import pytest
from conftest import is_full
from filelock import FileLock

# the jobs take half a minute, and many times that where other tests want the processor too
pytestmark = pytest.mark.timeout(1800)
RECORDED = json.loads(golden.FILE.read_text())
NAMES = tuple(RECORDED["summaries"])
MORE_OF_DIGITS = (
    "picture",
    "scores of pictures",
    "features, k",
    "scores, k",
    "features, n",
    "scores, n",
)
SLOW = ("counterfactual", "LoRA", "LDS", "wide", *(f"digits: {name}" for name in MORE_OF_DIGITS))
CASES = [
    pytest.param(name, marks=pytest.mark.full) if name.startswith(SLOW) else name for name in NAMES
]


@pytest.fixture(scope="session")
def found(tmp_path_factory, pytestconfig):
    """What this machine computes, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "golden"
    with FileLock(shared / "golden.lock"):
        if not folder.exists():
            folder.mkdir()
            golden.measure_in_child(folder, golden.PARTS if is_full(pytestconfig) else ["digits"])
    return read(folder)


def read(folder: Path) -> dict:
    file = folder / "found.json"
    if not file.is_file():
        pytest.fail("the golden jobs failed, as another case says")
    return json.loads(file.read_text())


def test_every_artefact_is_recorded(found, pytestconfig):
    names = [n for n in NAMES if is_full(pytestconfig) or not n.startswith(SLOW)]
    assert list(found["artefacts"]) == names, golden.ADVICE


@pytest.mark.parametrize("name", CASES)
def test_a_few_digits(found, name):
    artefact = found["artefacts"][name]
    moved = golden.movement(RECORDED["summaries"][name], artefact["summary"])
    limit = artefact["tolerance"]
    assert moved <= limit, (
        f"{name} moved by {moved:.1e} of its norm, more than {limit:.0e}. {golden.ADVICE}"
    )


@pytest.mark.parametrize("name", CASES)
def test_every_bit(found, name):
    hashes = RECORDED["hashes"].get(found["key"])
    if hashes is None or name not in hashes:
        pytest.skip(f"no hash is recorded for {found['key']}")
    now = {each: artefact["hash"] for each, artefact in found["artefacts"].items()}
    changed = [each for each in now if hashes.get(each, now[each]) != now[each]]
    moved = golden.movement(RECORDED["summaries"][name], found["artefacts"][name]["summary"])
    assert name not in changed, (
        f"{name} has other bits; its summary moved by {moved:.1e} of its norm. All that changed, "
        f"causes first: {'; '.join(changed)}. {golden.ADVICE}"
    )


class TestRecording:
    """A change that one machine records takes the other machines' hashes of it along."""

    BEFORE = {  # noqa: RUF012
        "summaries": {"a": [1.0, 0.5], "b": [2.0, 1.0]},
        "hashes": {"here": {"a": "1", "b": "2"}, "there": {"a": "3", "b": "4"}},
    }

    @pytest.fixture
    def write(self, tmp_path, monkeypatch):
        file = tmp_path / "golden.json"
        file.write_text(json.dumps(self.BEFORE))
        monkeypatch.setattr(golden, "FILE", file)

        def write(key, a, b, moved=0.0):
            summaries = [1.0, 0.5 + moved], [2.0, 1.0]
            artefacts = {
                name: {"hash": digest, "tolerance": 1e-4, "summary": summary}
                for name, digest, summary in zip("ab", (a, b), summaries, strict=True)
            }
            golden.write({"key": key, "artefacts": artefacts})
            return json.loads(file.read_text())

        return write

    def test_nothing_changed(self, write):
        assert write("here", "1", "2", 1e-6) == self.BEFORE

    def test_another_machine_adds_its_own(self, write):
        after = write("new", "5", "6", 1e-6)
        assert after["summaries"] == self.BEFORE["summaries"]
        assert after["hashes"] == {**self.BEFORE["hashes"], "new": {"a": "5", "b": "6"}}

    def test_other_bits_here(self, write):
        after = write("here", "7", "2", 1e-6)
        assert after["summaries"]["a"] == [1.0, 0.5 + 1e-6]
        assert after["hashes"] == {"here": {"a": "7", "b": "2"}, "there": {"b": "4"}}

    def test_other_digits_on_another_machine(self, write):
        after = write("new", "5", "6", 1e-2)
        assert after["hashes"] == {
            "here": {"b": "2"},
            "there": {"b": "4"},
            "new": {"a": "5", "b": "6"},
        }
