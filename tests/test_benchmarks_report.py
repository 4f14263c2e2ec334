"""REPORT.md, its pictures and the README's table are what the rows give."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
plots = importlib.import_module("plots")
report = importlib.import_module("report")
rows = importlib.import_module("rows")

README = f"before\n{report.BEGIN}\nanything\n{report.END}\nafter\n"


def environment(device_type="cpu", run="2026-01-02T00:00:00Z"):
    cuda = device_type == "cuda"
    return {
        "device": "Some GPU" if cuda else "Some CPU, 2 threads",
        "device_type": device_type,
        "driver": "1.2" if cuda else None,
        "torch": "2.13",
        "triton": "3.7",
        "commit": "abc1234",
        "run": run,
    }


def row(suite, group, provider, seconds, *, ratio=1.0, baseline="base", sizes=None, **more):
    return {
        "suite": suite,
        "group": group,
        "provider": provider,
        "sizes": sizes or {"B": 8, "P": 1000},
        "baseline": baseline,
        "ratio": ratio,
        "rounds": 3,
        "p20_seconds": 0.9 * seconds,
        "p50_seconds": seconds,
        "p80_seconds": 1.2 * seconds,
        "peak_bytes": 2_000_000,
        "agreement": [{"with": "float64", "error": 1e-7, "allowed": 1e-5}],
        "dtype": "float32",
        "flops": 1e9,
        "bytes": 1e6,
        "roof_fraction": 0.25,
        "roof_bytes_per_second": 2e10,
        "roof_flops_per_second": 2e11,
        **environment(),
        **more,
    }


def growth_row(provider="sketcher, sjlt", axis="B", **more):
    return {
        "suite": "growth",
        "group": f"against {axis}",
        "provider": provider,
        "axis": axis,
        "sizes": {"S": 4},
        "x": [2, 4, 8],
        "p20_seconds": [1.0, 2.0, 4.0],
        "p50_seconds": [1.1, 2.1, 4.1],
        "p80_seconds": [1.2, 2.2, 4.2],
        "peak_bytes": [1000, 2000, 4000],
        "time_exponent": 0.95,
        "time_exponent_end": 0.97,
        "memory_exponent": 1.0,
        "memory_exponent_end": 1.0,
        "rounds": 3,
        **environment(),
        **more,
    }


def main_job(**more):
    sizes = {"N": 52, "S": 10, "P": 186_081, "K": 8192}
    facts = {"fused_batch_size": 11, "published_batch_size": 52, "sizes": sizes, **more}
    group = "features of the main job"
    return [
        row("attribute", group, "published: vmap(grad), step by step", 1.0, **facts),
        row("attribute", group, "published: TRAK's projector", 7.0, **facts),
        row("attribute", group, "fused", 0.5, **(facts | {"peak_bytes": 500_000})),
    ]


def everything(**more):
    sjlt = "features: sjlt, K = 8"
    return {
        "sketcher": [
            row("sketcher", "digits U-Net, float32", "training step", 0.01, **more),
            row(
                "sketcher",
                "digits U-Net, float32",
                "features: sjlt, K = 8",
                0.012,
                ratio=1.2,
                **more,
            ),
            row(
                "sketcher",
                "thin CIFAR U-Net, float32",
                "features: sjlt, K = 8",
                1,
                ratio=1.5,
                **more,
            ),
        ],
        "layers": [
            row("layers", "conv", "training step", 0.01, baseline="training step", **more),
            row("layers", "conv", sjlt, 0.02, ratio=2.0, **more),
        ],
        "projection": [
            row("projection", "rademacher, digits", "philox", 0.5, **more),
            row("projection", "rademacher, digits", "trak", 2.0, **more),
        ],
        "attribute": main_job(**more),
        "ridge": [
            row("ridge", "inverse", "published: one float32 inverse", 2.0, dampings=27, **more),
            row("ridge", "inverse", "published: float32 Gram", 0.5, dampings=27, **more),
            row("ridge", "inverse", "dual, 27 dampings", 0.1, dampings=27, **more),
        ],
        "growth": [growth_row(**more), growth_row("sketcher, rademacher", "K", **more)],
    }


@pytest.fixture
def folder(tmp_path):
    """An empty folder of rows."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def put(folder, suites):
    for suite, found in suites.items():
        for one in found:
            rows.append(folder, suite, one)


def test_the_committed_report_is_what_the_rows_give():
    assert report.stale(rows.RESULTS, ROOT / "benchmarks", ROOT / "README.md") == []


def test_the_command_says_what_is_stale(tmp_path, folder, monkeypatch):
    put(folder, everything())

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        report.main()

    elsewhere = ("--rows", folder, "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^REPORT.md, plots/.*: not what the rows give"):
        command(*elsewhere, "--check")
    assert not (tmp_path / "out").exists()
    command(*elsewhere)
    command(*elsewhere, "--check")
    # the README is left alone when the rows lie elsewhere
    assert report.stale(rows.RESULTS, ROOT / "benchmarks", ROOT / "README.md") == []
    with pytest.raises(SystemExit, match="--rows must be an existing folder, got"):
        command("--rows", tmp_path / "nowhere")


def test_every_change_of_rows_makes_it_stale(tmp_path, folder):
    put(folder, everything())
    output, readme = tmp_path / "out", tmp_path / "README.md"
    readme.write_text(README)
    report.write(folder, output, readme)
    assert report.stale(folder, output, readme) == []
    changed = main_job(run="2026-01-03T00:00:00Z", torch="2.14")
    put(folder, {"attribute": changed})
    assert "REPORT.md" in report.stale(folder, output, readme)
    assert "README.md" in report.stale(folder, output, readme)
    report.write(folder, output, readme)
    assert report.stale(folder, output, readme) == []
    # whiskers are in no table, and yet in the picture
    later = [growth_row(p80_seconds=[9.0, 9.0, 9.0]), growth_row("sketcher, rademacher", "K")]
    put(folder, {"growth": [one | {"run": "2026-01-02T00:00:01Z"} for one in later]})
    assert report.stale(folder, output, readme) == ["plots/growth-some-cpu-2-threads.svg"]
    text = readme.read_text()
    readme.write_text(text.replace("0.50 s", "0.40 s"))
    assert "README.md" in report.stale(folder, output, readme)


def test_what_no_row_shows_is_removed(tmp_path, folder):
    put(folder, everything())
    report.write(folder, tmp_path, None)
    (tmp_path / "plots/old.svg").write_text("<svg/>")
    report.write(folder, tmp_path, None)
    assert not (tmp_path / "plots/old.svg").exists()
    assert len(list((tmp_path / "plots").glob("*.svg"))) == len(everything())


# all go one way
@pytest.mark.parametrize(
    "missing",
    [pytest.param(s, marks=pytest.mark.full if n else ()) for n, s in enumerate(everything())],
)
def test_rows_may_be_missing(missing, tmp_path, folder):
    suites = everything()
    del suites[missing]
    put(folder, suites)
    report.write(folder, tmp_path / "out", None)
    text = (tmp_path / "out/REPORT.md").read_text()
    title = report.SUITES[missing][0]
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    assert "No row yet." in section
    for suite, (other, _) in report.SUITES.items():
        if suite != missing:
            assert "No row yet." not in text.split(f"\n## {other}\n")[1].split("\n## ")[0]


def test_without_any_row(tmp_path, folder):
    report.write(folder, tmp_path / "out", None)
    text = (tmp_path / "out/REPORT.md").read_text()
    assert text.count("No row yet.") == len(report.SUITES)
    assert not list((tmp_path / "out").glob("plots/*"))


def test_every_gpu_column_says_so_until_a_row_has_one(folder):
    put(folder, everything())
    text = report.report(folder)
    glance = text.split("## At a glance")[1].split("\n## ")[0]
    lines = [line for line in glance.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 6
    assert all(line.endswith("| not yet run on a GPU |") for line in lines)
    assert text.count("Not yet run on a GPU.") == len(report.SUITES)
    assert "Not yet run on a GPU." in report.readme_table(folder)
    put(folder, everything(**environment("cuda")))
    text = report.report(folder)
    assert "not yet run on a gpu" not in text.lower()
    assert "not yet run on a gpu" not in report.readme_table(folder).lower()
    assert "Some GPU, driver 1.2" in text


def test_a_gpu_row_of_one_suite_leaves_the_others_alone(folder):
    put(folder, everything())
    put(folder, {"ridge": everything(**environment("cuda"))["ridge"]})
    text = report.report(folder)
    assert text.count("Not yet run on a GPU.") == len(report.SUITES) - 1
    assert "Not yet run on a GPU." in report.readme_table(folder)


def test_figures_at_a_glance(folder):
    put(folder, everything())
    found = {claim: cpu for claim, cpu, _ in report.headlines(folder)}
    assert found["features over a training step, digits U-Net"] == "1.20x sjlt"
    assert found["features over a training step, CIFAR U-Net"] == "1.50x sjlt"
    assert found["features over a training step, LoRA"] == "no row yet"
    assert found["main job, fused against published"] == "16.0x faster, 4.0x less memory"
    assert found["dense projection, rademacher"] == "4.00x the speed of trak"
    assert found["dense projection, normal"] == "no row yet"
    # 0.5 + 27 · 2 over 0.1
    sweep = found["27 dampings, dual against float32 inverses"]
    assert sweep == "545x faster (inverses extrapolated from one)"


def test_a_model_of_several_sizes_is_shown_in_each():
    whole = "CIFAR U-Net, float32"
    rows = [
        row("sketcher", group, f"features: {kind}, K = 8", 1.0, ratio=ratio)
        for group, kind, ratio in (
            (f"thin {whole}", "sjlt", 1.5),
            (whole, "sjlt", 1.25),
            (whole, "kronecker", 0.5),
        )
    ]
    assert report.price(rows, "CIFAR") == (
        "1.50x sjlt (thin CIFAR U-Net, float32); 1.25x sjlt, 0.50x kronecker (CIFAR U-Net, float32)"
    )


def test_only_the_newest_run_of_a_device_counts(folder):
    put(folder, {"ridge": everything()["ridge"]})
    newer = row("ridge", "inverse", "dual, one damping", 3.0, run="2026-05-01T00:00:00Z")
    put(folder, {"ridge": [newer]})
    text = report.report(folder)
    assert "dual, one damping" in text
    assert "one float32 inverse" not in text


def test_devices_share_no_table_and_no_picture(folder):
    put(folder, everything())
    put(folder, everything(device="Another CPU, 8 threads", run="2026-02-01T00:00:00Z"))
    names = [name for suite, name, _ in report.pictures(folder) if suite == "ridge"]
    assert names == ["ridge-some-cpu-2-threads.svg", "ridge-another-cpu-8-threads.svg"]
    section = report.report(folder).split("## The regularised inverse: CPU")[1]
    assert section.index("Some CPU") < section.index("Another CPU")


def test_the_readme_keeps_everything_but_its_table(folder):
    put(folder, everything())
    text = report.rewritten(README, folder)
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "| time | 0.50 s | 8.00 s (gradients 1.00, projection 7.00) | 16.0x |" in text
    assert "| tensors alive at the peak | 0 MB | 2 MB | 4.0x |" in text
    assert "anything" not in text
    assert report.rewritten(text, folder) == text


def test_pictures_are_the_same_for_the_same_rows(tmp_path):
    for suite, found in everything().items():
        plots.save(suite, found, tmp_path / "a.svg")
        plots.save(suite, found, tmp_path / "b.svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        assert plots.is_current(tmp_path / "a.svg", found)
        assert not plots.is_current(tmp_path / "a.svg", found[:-1])
        text = (tmp_path / "a.svg").read_text()
        for one in found:
            # every provider is named in its picture, the baseline of the layers being its line
            if suite != "layers" or one["provider"] != one["baseline"]:
                assert one["provider"].split(" (")[0] in text


def test_rows_are_appended_whole_and_read_in_order(tmp_path):
    for number in range(3):
        rows.append(tmp_path / "new", "x", {"number": number})
    assert [row["number"] for row in rows.read(tmp_path / "new", "x")] == [0, 1, 2]
    assert rows.read(tmp_path, "nothing") == []


def test_rows_say_where_they_come_from():
    found = rows.environment()
    assert {"device", "device_type", "torch", "triton", "commit", "utc"} <= set(found)
    if shutil.which("git") and (ROOT / ".git").exists():
        assert found["commit"] != "unknown"


@pytest.mark.parametrize(
    "seconds, text", [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 µs"), (1.0, "1 s")]
)
def test_seconds(seconds, text):
    assert rows.format_seconds(seconds) == text


def test_a_line_per_row():
    line = rows.summary(row("ridge", "inverse", "dual", 0.5, ratio=3.25))
    assert line.split() == ["500", "ms", "3.25x", "2", "MB", "25.0%", "of", "roof"]
    assert rows.summary(row("ridge", "inverse", "dual", 0.5, ratio=None)).split()[2] == "2"
    line = rows.summary(growth_row())
    assert line.startswith("exponents over 2 to 8 (over the last step): time +0.95 (+0.97), memory")
