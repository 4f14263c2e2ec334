"""The table of kernels against the reference: every kernel and dtype has cases, wrong ones show."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
agreement = importlib.import_module("agreement")

CPU = torch.device("cpu")


def test_every_kernel_file_is_covered():
    """A new kernel file needs cases here."""
    folder = Path(__file__).parents[1] / "kernels" / "dtrak_kernels"
    launching = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if "@triton.jit" in path.read_text()
    } - {"random/words_triton.py"}
    covered = {
        "dense/triton.py": {"rademacher", "normal"},
        "sjlt/triton.py": {"sketch"},
        "ridge/gram_triton.py": {"gram_product"},
    }
    assert launching == set(covered)
    assert set().union(*covered.values()) == set(agreement.KERNELS)


@pytest.mark.parametrize("kernel", agreement.KERNELS)
def test_every_dtype_has_cases(kernel):
    for dtype in agreement.DTYPES:
        cases = list(agreement.make_cases(kernel, dtype, small=True))
        assert len(cases) >= 2
        assert {(c.kernel, c.dtype) for c in cases} == {(kernel, dtype)}
        assert len(list(agreement.make_cases(kernel, dtype, small=False))) > len(cases)


@pytest.mark.parametrize("kernel", agreement.KERNELS)
def test_a_right_kernel_passes_and_a_wrong_one_fails(kernel, device):
    case = list(agreement.make_cases(kernel, torch.float32, small=True))[-1]
    row = agreement.judge(case, device)
    assert row["status"] == "passed"
    assert 0 < row["error"] <= row["allowed"] <= 1e-5
    result = case.run(device)

    def wrong(_):
        other = result.clone()
        other.view(-1)[0] += 1e-4 * result.norm()
        return other

    row = agreement.judge(replace(case, run=wrong), device)
    assert row["status"] == "failed"
    assert row["note"].startswith("error 1.0e-04 > ")
    row = agreement.judge(replace(case, run=lambda _: result * float("nan")), device)
    assert row["status"] == "failed"
    # right both times, but not to the bit
    answers = iter([result, result * (1 + 1e-7)])
    row = agreement.judge(replace(case, run=lambda _: next(answers)), device)
    assert (row["status"], row["note"]) == ("failed", "another run gives other bits")


def test_one_case_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    judged = []

    def judge(case, device):
        judged.append(case)
        if len(judged) == 2:
            raise RuntimeError("no shared\nmemory left")
        return {
            "kernel": case.kernel,
            "dtype": "x",
            "shape": case.shape,
            "error": 0.0,
            "allowed": 1.0,
            "status": "passed",
        }

    monkeypatch.setattr(agreement, "judge", judge)
    arguments = ["--kernel", "gram_product", "--smoke", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["agreement.py", *arguments])
    assert agreement.main() == 1
    rows = [json.loads(line) for line in (tmp_path / "agreement.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows].count("failed") == 1
    assert len(rows) == 6
    assert rows[1]["note"] == "RuntimeError: no shared memory left"


def test_a_lost_device_is_said_and_nothing_more_is_run(monkeypatch, tmp_path, capsys):
    def judge(case, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(agreement, "judge", judge)
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--kernel", "gram_product", "--smoke"])
    assert agreement.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert "failed" in lines[0]
    assert all("skipped the device was lost in gram_product" in line for line in lines[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the interpreter cannot do")
def test_bfloat16_products_are_skipped_by_the_interpreter():
    wrong = {
        k for k in agreement.KERNELS if agreement.is_multiplied_wrongly(k, torch.bfloat16, CPU)
    }
    assert wrong == {"rademacher", "sketch"}
    assert not agreement.is_multiplied_wrongly("sketch", torch.float16, CPU)
    assert not agreement.is_multiplied_wrongly("sketch", torch.bfloat16, torch.device("cuda"))
