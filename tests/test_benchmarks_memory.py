"""The page of planned memory: its models are the published ones, its table the newest row."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("diffusers", reason="diffusers is not installed")
planned_memory = importlib.import_module("planned_memory")

# of the checkpoints on the hub
PARAMETERS = {
    "SDXL": 2_567_463_684,
    "SD 3.5 medium": 2_243_171_520,
    "FLUX.1-dev": 11_901_408_320,
}


def test_the_documented_table_is_the_newest_row(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["planned_memory.py", "--check"])
    # it exits with the reason where the table is another
    planned_memory.main()


def test_models_have_their_published_sizes():
    rows = json.loads(planned_memory.RESULTS.read_text().splitlines()[-1])["rows"]
    assert {row["model"]: row["parameters"] for row in rows} == PARAMETERS
    for row in rows:
        assert row["side"] == 1024
        kept = sum(row["weight_bytes"].values())
        assert kept >= 2 * row["parameters"] + 4 * row["lora"]
        # checkpointing is what lets most of them fit
        other = next(r for r in rows if (r["model"], r is row) == (row["model"], False))
        more = row if row["checkpointed"] else other
        assert more["fitting"] > (other if more is row else row)["fitting"]


@pytest.mark.parametrize("name", ["SD 3.5 medium", pytest.param("SDXL", marks=pytest.mark.full)])
def test_a_smaller_one_is_planned(name):
    pytest.importorskip("peft", reason="peft is not installed")
    small = planned_memory.SMALL[name]
    rows = [planned_memory.plan_model(name, 128, way, **small) for way in (True, False)]
    assert rows[0]["peak_bytes"] < rows[1]["peak_bytes"]
    assert rows[0]["activation_bytes"] < 0.5 * rows[1]["activation_bytes"]
    assert set(rows[0]["weight_bytes"]) == {"bfloat16", "float32"}
