"""The table from first principles, with scipy, and the results that come with the package."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import RidgeCV

from dtrak.evaluation.lds.table import (
    Entry,
    Family,
    Results,
    ResultsError,
    dense_ranks,
    digest,
    fitted_entries,
    load_results,
    make_table,
    packaged_results,
    save_results,
    select_rows,
)
from dtrak.methods.baselines import empirical_influence
from dtrak.pages.lds_report import render_markdown

ROOT = Path(__file__).parents[1]
RULES = ("0.1", "1", "10", "auto")


def split(models):
    """The halves, by the definition."""
    order = torch.randperm(models, generator=torch.Generator().manual_seed(0))
    return order[: models - models // 2].tolist(), order[models - models // 2 :].tolist()


def small_results(models=12, samples=20):
    generator = torch.Generator().manual_seed(1)
    subsets = torch.rand(models, samples, generator=generator) < 0.5
    losses = {
        "validation": torch.randn(models, 3, generator=generator),
        "generated": torch.randn(models, 2, generator=generator),
    }
    truth = torch.cat(list(losses.values()), 1).double()

    def entry(method, rules, noises, kinds=("validation", "generated"), S=10, projection="sjlt"):
        target = torch.cat([losses[kind] for kind in kinds], 1).double()
        values = torch.stack(
            [target + n * torch.randn(target.shape, generator=generator).double() for n in noises]
        )
        dampings = tuple(float(i + 1) if rule else float("nan") for i, rule in enumerate(rules))
        return Entry(method, S, projection, kinds, rules, dampings, dense_ranks(values))

    entries = [
        entry("D-TRAK", RULES, (0.5, 1.0, 2.0, 0.8)),
        entry("TRAK", RULES, (3.0, 1.0, 2.0, 1.5)),
        entry("Journey-TRAK", RULES, (3.0, 1.0, 2.0, 1.5), kinds=("generated",)),
        entry("Gradient dot", ("",), (2.0,)),
        entry("Random", ("",), (1e3,), S=0, projection=""),
    ]
    entries += fitted_entries(subsets, losses)
    assert truth.shape == (models, 5)
    about = {"preset": "small", "models": models, "queries": {"validation": 3, "generated": 2}}
    return Results(about, subsets, losses, entries)


def mean_spearman(ranks, losses, rows):
    """Of columns of float64: by definition the correlation of the ranks that scipy gives."""
    a, b = (rankdata(values[rows], axis=0) for values in (ranks, losses))
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore"):
        values = (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return float(np.nan_to_num(values).mean())


def test_spearman_is_scipys():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 6, (2, 12, 5)).astype(float)
    # a column of one value has no correlation
    b[:, 4] = 3.0
    rows = list(range(3, 12))
    values = [spearmanr(a[rows, q], b[rows, q]).statistic for q in range(4)]
    assert mean_spearman(a, b, rows) == pytest.approx(sum(values) / 5, abs=1e-12)


def check_points(results, table):
    """Every point of a table, recomputed from losses and ranks."""
    rows = {
        (row["queries"], row["method"], row["timesteps"], row["projection"]): row
        for row in table["rows"]
    }
    count = 0
    for kind, losses in results.losses.items():
        losses = losses.double().numpy()
        first, second = split(len(losses))
        for entry in results.entries:
            if kind not in entry.kinds:
                continue
            begin = sum(results.losses[k].shape[1] for k in entry.kinds[: entry.kinds.index(kind)])
            ranks = entry.ranks[:, :, begin : begin + losses.shape[1]].numpy().astype(float)
            row = rows[kind, entry.method, entry.num_timesteps, entry.projection]
            a, b = ([mean_spearman(r, losses, half) for r in ranks] for half in (first, second))
            chosen = int(np.argmax(a)), int(np.argmax(b))
            expected = (b[chosen[0]] + a[chosen[1]]) / 2
            assert row["held_out"]["lds"] == pytest.approx(expected, abs=2e-6)
            low, high = row["held_out"]["bca"]
            assert low < high
            everything = list(range(len(losses)))
            whole = [mean_spearman(r, losses, everything) for r in ranks]
            if entry.rules == ("",):
                assert "sweep" not in row
                if not entry.is_fitted:
                    assert row["all"]["lds"] == pytest.approx(whole[0], abs=2e-6)
            else:
                assert row["chosen"] == [entry.rules[number] for number in chosen]
                assert row["in_sample"]["lds"] == pytest.approx(max(whole), abs=2e-6)
                found = {rule: point["lds"] for rule, point in row["sweep"].items()}
                assert found == pytest.approx(dict(zip(entry.rules, whole, strict=True)), abs=2e-6)
                for rule in ("1", "auto"):
                    assert row[rule]["lds"] == found[rule]
            count += 1
    assert count == len(table["rows"])
    for difference in table["differences"]:
        assert difference["bca"][0] <= difference["bca"][1]


def test_every_figure_follows_from_losses_and_ranks():
    results = small_results()
    table = make_table(results, num_resamples=200)
    check_points(results, table)
    names = {d["name"] for d in table["differences"]}
    assert {"D-TRAK - TRAK", "TRAK - Gradient dot", "D-TRAK: mean squared norm - auto"} <= names
    held_out = {(row["queries"], row["method"]): row["held_out"]["lds"] for row in table["rows"]}
    for entry in table["differences"]:
        if entry["name"] == "D-TRAK - TRAK":
            kind = entry["queries"]
            expected = held_out[kind, "D-TRAK"] - held_out[kind, "TRAK"]
            assert entry["difference"] == pytest.approx(expected, abs=3e-6)
    best = select_rows(table, "validation")
    assert [row["held_out"]["lds"] for row in best] == sorted(
        (row["held_out"]["lds"] for row in best), reverse=True
    )
    assert json.loads(json.dumps(table)) == table


def test_a_resample_chooses_its_damping_anew_on_one_half():
    # by hand: draw within each half, choose there, judge on the other
    results = small_results()
    row = next(r for r in make_table(results, num_resamples=400)["rows"] if r["method"] == "D-TRAK")
    losses = results.losses["validation"].double().numpy()
    ranks = results.entries[0].ranks[:, :, :3].numpy().astype(float)
    generator, halves, values = np.random.default_rng(0), split(12), []
    for _ in range(400):
        drawn = [generator.choice(half, len(half)) for half in halves]
        a, b = ([mean_spearman(r, losses, rows) for r in ranks] for rows in drawn)
        values.append((b[int(np.argmax(a))] + a[int(np.argmax(b))]) / 2)
    low, high = row["held_out"]["percentile"]
    assert (low, high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.12)


def test_fitted_methods_are_judged_on_models_they_have_not_seen():
    results = small_results()
    (entry,) = [e for e in results.entries if e.method == "Empirical influence, cross-fitted"]
    first, second = split(12)
    losses = torch.cat(list(results.losses.values()), 1)
    for here, there in ((first, second), (second, first)):
        scores = empirical_influence(results.subsets[here], losses[here])
        expected = -(results.subsets[there].double() @ scores.T)
        for q in range(5):
            correlation = spearmanr(expected[:, q], entry.ranks[0, there, q]).statistic
            assert correlation == pytest.approx(1)
    # a datamodel needs more models in each half
    assert not [e for e in results.entries if e.method == "Datamodel, cross-fitted"]
    larger = small_results(models=20)
    assert [e for e in larger.entries if e.method == "Datamodel, cross-fitted"]


def retrain_family(models, kinds=("validation", "generated"), samples=20):
    """Models whose losses depend on which of the samples they hold, a little at random."""
    generator = torch.Generator().manual_seed(7)
    subsets = torch.rand(models, samples, generator=generator) < 0.5
    losses = {}
    for kind, queries in zip(kinds, (3, 2), strict=True):
        weights = torch.randn(samples, queries, generator=generator)
        noise = torch.randn(models, queries, generator=generator)
        losses[kind] = subsets.float() @ weights + noise
    return Family(subsets, losses)


def test_methods_fitted_to_a_family_of_their_own_are_judged_on_the_others():
    results, retrain = small_results(), retrain_family(70)
    entries = fitted_entries(results.subsets, results.losses, retrain)
    names = ("Empirical influence", "Datamodel")
    assert [e.method for e in entries] == [f"{n}, {M} models" for M in (64, 70) for n in names]
    masks = retrain.subsets.double().numpy()
    judged = results.subsets.double().numpy()
    targets = np.concatenate([values.double().numpy() for values in retrain.losses.values()], 1)
    for entry in entries:
        name, M = entry.method.split(", ")
        M = int(M.split()[0])
        assert entry.kinds == ("validation", "generated")
        assert not entry.is_fitted
        for q in range(5):
            if name == "Datamodel":
                ridge = RidgeCV(alphas=(0.1, 1.0, 10.0), cv=5).fit(masks[:M], targets[:M, q])
                expected = ridge.predict(judged)
            else:
                with_sample = masks[:M].T @ targets[:M, q] / masks[:M].sum(0)
                without = (1 - masks[:M]).T @ targets[:M, q] / (1 - masks[:M]).sum(0)
                expected = judged @ (with_sample - without)
            assert entry.ranks[0, :, q].tolist() == (rankdata(expected) - 1).tolist()
    # judged on all models, with nothing chosen
    rows = make_table(replace(results, entries=entries), num_resamples=100)["rows"]
    for row in rows:
        kind = row["queries"]
        columns = slice(0, 3) if kind == "validation" else slice(3, 5)
        (entry,) = [e for e in entries if e.method == row["method"]]
        ranks = entry.ranks[0, :, columns].numpy()
        whole = mean_spearman(ranks, results.losses[kind].numpy(), list(range(12)))
        assert row["all"]["lds"] == pytest.approx(whole, abs=2e-6)


def test_a_family_too_small_to_fit_leaves_the_halves():
    results = small_results(models=20)
    halves = fitted_entries(results.subsets, results.losses)
    for family in (None, retrain_family(9)):
        entries = fitted_entries(results.subsets, results.losses, family)
        assert [e.method for e in entries] == [
            "Empirical influence, cross-fitted",
            "Datamodel, cross-fitted",
        ]
        for a, b in zip(entries, halves, strict=True):
            assert a.is_fitted
            assert torch.equal(a.ranks, b.ranks)
    assert len(fitted_entries(results.subsets, results.losses, retrain_family(10))) == 2


def test_a_file_holds_what_the_fits_can_be_made_from_again(tmp_path):
    results, retrain = small_results(), retrain_family(12)
    entries = fitted_entries(results.subsets, results.losses, retrain)
    save_results(tmp_path / "r.npz", replace(results, entries=entries, retrain=retrain))
    found = load_results(tmp_path / "r.npz")
    assert torch.equal(found.retrain.subsets, retrain.subsets)
    assert list(found.losses) == list(found.retrain.losses) == ["validation", "generated"]
    again = fitted_entries(found.subsets, found.losses, found.retrain)
    assert all(torch.equal(a.ranks, b.ranks) for a, b in zip(again, found.entries, strict=True))
    assert digest(found) == digest(replace(results, entries=entries, retrain=retrain))
    assert digest(found) != digest(replace(results, entries=entries))
    # a file of before there was such a family
    save_results(tmp_path / "old.npz", results)
    with np.load(tmp_path / "old.npz") as arrays:
        assert not [name for name in arrays.files if name.startswith("retrain")]
    assert load_results(tmp_path / "old.npz").retrain is None


def test_ensembles_are_compared_with_one_model():
    results = small_results()
    one = results.entries[0]
    names = ("D-TRAK, single half-data model", "D-TRAK, mean of 8 models")
    entries = [*results.entries, *(replace(one, method=name) for name in names)]
    table = make_table(replace(results, entries=entries), num_resamples=50)
    found = {d["name"]: d for d in table["differences"] if d["queries"] == "validation"}
    for other in ("D-TRAK", "D-TRAK, single half-data model"):
        assert found[f"D-TRAK, mean of 8 models - {other}"]["difference"] == 0


def test_results_survive_the_disk(tmp_path):
    results = small_results()
    save_results(tmp_path / "r.npz", results)
    for found in (
        load_results(tmp_path / "r.npz"),
        load_results((tmp_path / "r.npz").read_bytes()),
    ):
        assert digest(found) == digest(results)
        assert found.about == results.about
        assert torch.equal(found.subsets, results.subsets)
        for kind, losses in results.losses.items():
            assert torch.equal(found.losses[kind], losses)
        for a, b in zip(found.entries, results.entries, strict=True):
            assert torch.equal(a.ranks, b.ranks)
            assert (a.method, a.kinds, a.rules, a.is_fitted) == (
                b.method,
                b.kinds,
                b.rules,
                b.is_fitted,
            )
            assert a.dampings == pytest.approx(b.dampings, nan_ok=True)
    (tmp_path / "half.npz").write_bytes((tmp_path / "r.npz").read_bytes()[:500])
    with pytest.raises(
        ResultsError, match=r"half\.npz must be results of dtrak\.lds, but is damaged"
    ):
        load_results(tmp_path / "half.npz")
    with pytest.raises(FileNotFoundError):
        load_results(tmp_path / "none.npz")


def test_dense_ranks_keep_order_and_ties():
    values = torch.tensor([[[3.0], [-1.0], [3.0], [7.5]]])
    assert dense_ranks(values)[0, :, 0].tolist() == [1, 0, 1, 2]
    with pytest.raises(ValueError, match="at most 256, got 257"):
        dense_ranks(torch.zeros(1, 257, 1))
    with pytest.raises(ValueError, match="must be finite"):
        dense_ranks(torch.full((1, 4, 1), float("nan")))


def test_too_few_models_are_refused():
    with pytest.raises(ValueError, match="at least 4 models to split, got 3"):
        make_table(small_results(models=3), num_resamples=10)


PACKAGED = ("digits", "cifar2-16")


@pytest.mark.parametrize("preset", PACKAGED)
def test_the_packaged_results_reproduce_the_published_table(preset):
    results, table = packaged_results(preset)
    assert table["results"] == digest(results)
    assert table["num_resamples"] >= 1000
    assert table["about"] == results.about
    assert len(results.subsets) == results.about["models"] >= 32
    assert (results.subsets.sum(1) == 500).all()
    check_points(results, table)
    folder = ROOT / "dtrak" / "lds_results"
    assert sum(file.stat().st_size for file in folder.glob(f"{preset}.*")) < 2e6
    page = (ROOT / "docs" / f"lds_{preset}.md").read_text(encoding="utf-8")
    assert page == render_markdown(table)


def test_the_packaged_results_say_what_the_documentation_says():
    _, table = packaged_results("digits")
    for kind in ("validation", "generated"):
        by_method = {
            (row["method"], row["timesteps"], row["projection"]): row["held_out"]
            for row in select_rows(table, kind)
        }
        for method in ("D-TRAK", "TRAK"):
            # above chance and above the plain gradient product, beyond its interval
            assert by_method[method, 100, "sjlt"]["bca"][0] > 0
            assert (
                by_method[method, 100, "sjlt"]["lds"]
                > by_method["Gradient dot", 100, "sjlt"]["lds"]
            )
        low, high = by_method["Random", 0, ""]["bca"]
        assert low < 0.05
        assert high > -0.05


def test_a_preset_without_results_has_none():
    assert packaged_results("cifar2") is None
