"""Kernel tests on compiled code, which an emulator executes; processes of their own.

In this one kernels are interpreted, and an interpreted kernel cannot be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CARDS = ("sm_80", "sm_90")
# of every form of the kernels a bfloat16 case, and mistakes that the emulator must reject
TELLING = {
    "test_sketch_kernel.py": (
        "bfloat16 and (three or groups or (linear and 1000) or (tap and not same))"
    ),
    "test_projection.py": "triton and oracle and 333 and (rademacher-dtype or normal-dtype9)",
    "test_gram.py": "triton and formed_gram and bfloat16 and 71",
    "test_whitening_kernel.py": "entries and (groups or many) and rolled",
    "test_emulator_mutations.py": "not full",
}
# the cases that launch kernels, in processes that share the cores evenly, also where everything is
# still to be compiled; both cards in one share what judges them
FULL = {
    "sketches": {"test_sketch_kernel.py": "not overlap and not unet"},
    "matrices": {
        "test_projection.py": "triton or tiling or anywhere",
        "test_gram.py": "triton or tiling or groups or bit_for_bit",
    },
    "whitening": {
        "test_whitening_kernel.py": (
            "entries or second_launch or without or half_precision or (gradients and conv2d)"
        ),
    },
    "mistakes and the main job": {
        "test_emulator_mutations.py": "mutations",
        "test_emulator_traffic.py": "roll or wait",
        "test_emulated_main_job.py": "job",
    },
}


def emulate(cases, cards, folder):
    """One row per test that ran in the child process, which must have gone well."""
    chosen = " or ".join(
        f"({file.removesuffix('.py')} and ({words}))" for file, words in cases.items()
    )
    report = folder / "report.jsonl"
    paths = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
    hidden = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "emulator.plugin", "-p", "no:cacheprovider"]
    command += ["--emulate", ",".join(cards), "--emulate-report", str(report), "-q", "-k", chosen]
    # the caller's limit holds for all of them
    command += ["--timeout", "0", "--full"]
    done = subprocess.run(
        [*command, *(str(HERE / file) for file in cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    failed = [f"{row['test']}\n{row.get('why', '')}" for row in rows if row["outcome"] == "failed"]
    assert done.returncode == 0, "\n\n".join(failed) or done.stdout[-3000:] + done.stderr[-3000:]
    return [row for row in rows if row["outcome"] == "passed" and "launches" in row]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
def test_a_telling_case_of_every_form(tmp_path, pytestconfig):
    if pytestconfig.option.full:
        pytest.skip("the full lane runs all cases, on both cards")
    rows = emulate(TELLING, CARDS[-1:], tmp_path)
    assert sum(row["launches"] > 0 for row in rows) >= 9, rows


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
@pytest.mark.parametrize("part, launched", list(zip(FULL, (200, 600, 250, 800), strict=True)))
def test_kernels_are_right_on_emulated_cards(part, launched, tmp_path):
    rows = emulate(FULL[part], CARDS, tmp_path)
    ran = {
        (card, file)
        for card in CARDS
        for file in FULL[part]
        for row in rows
        if card in row["test"] and file in row["test"]
    }
    assert len(ran) == len(CARDS) * len(FULL[part]), ran
    assert sum(row["launches"] for row in rows) >= launched, len(rows)
