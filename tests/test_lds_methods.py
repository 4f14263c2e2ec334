"""Group predictions of every method, from features computed in one go."""

import json
import shutil
import threading
from contextlib import contextmanager

import pytest
import torch
from diffusers import DDIMScheduler
from numerics import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_lds import CPU, PRESET, quiet, register

from dtrak.evaluation.lds import methods as lds_methods
from dtrak.evaluation.lds.experiment import ExperimentError, load_experiment, prepare
from dtrak.evaluation.lds.methods import METHODS, Predictor, Setting, list_settings
from dtrak.evaluation.lds.queries import query_sets
from dtrak.features import extraction
from dtrak.features.extraction import FeatureSettings, FusedExtractor
from dtrak_kernels import Projection

BY_NAME = {method.title: method for method in METHODS}
K = 512


@pytest.fixture(autouse=True)
def small(monkeypatch):
    register()
    dims = {"sjlt": K, "rademacher": 64, "none": 0}
    monkeypatch.setattr(lds_methods, "DEFAULT_PROJ_DIM", dims)


@pytest.fixture(scope="module")
def experiment(trained_lds, tmp_path_factory):
    register()
    return load_experiment(shutil.copytree(trained_lds, tmp_path_factory.mktemp("lds") / "run"))


@pytest.fixture
def predictor(experiment):
    return Predictor(experiment, query_sets(experiment, CPU), CPU, quiet)


def features(experiment, model, function, timesteps, kind="sjlt"):
    """(training, queries) in float64, all images in one batch."""
    projection = Projection(kind, {"sjlt": K, "none": 0}[kind])
    settings = FeatureSettings(function, tuple(timesteps), 0, projection)
    extractor = FusedExtractor(model, settings, CPU)
    queries = query_sets(experiment, CPU)
    images = torch.cat([q.images for q in queries.values()])
    ids = [name for q in queries.values() for name in q.ids]
    return tuple(
        extractor.extract(pictures, [role + name for name in names]).double()
        for pictures, names, role in (
            (experiment.data.images, experiment.data.ids, "train/"),
            (images, ids, "query/"),
        )
    )


def groups(experiment, scores):
    """Minus the sum over the images of each subset, by a loop."""
    return torch.stack([-scores[:, mask].sum(1) for mask in experiment.subsets])


def ridge(train, queries, damping):
    gram = train.T @ train + damping * torch.eye(train.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, train.T)


@pytest.mark.parametrize(
    "name", ["D-TRAK", "TRAK", "Relative influence", "Renormalised influence", "D-TRAK, l1_norm"]
)
def test_damped_methods_equal_their_formula_at_every_damping(experiment, predictor, name):
    method = BY_NAME[name]
    (found,) = predictor.predict([Setting(method, 5, "sjlt")])
    train, queries = features(
        experiment, experiment.load_model(), method.output_function, range(0, 1000, 200)
    )
    assert found.rules == (*(f"{f:g}" for f in lds_methods.DAMPING_FACTORS), "auto")
    assert found.kinds == ("validation", "generated")
    assert found.values.shape == (17, 4, 11)
    unit = float(train.square().sum(1).mean())
    for number in (6, 8, 12):
        damping = lds_methods.DAMPING_FACTORS[number] * unit
        assert found.dampings[number] == pytest.approx(damping, rel=1e-5)
        solved = ridge(train, queries, damping)
        scores = queries @ solved
        if name == "Relative influence":
            scores /= solved.norm(dim=0)
        if name == "Renormalised influence":
            scores /= train.norm(dim=1)
        assert relative_error(found.values[number], groups(experiment, scores)) < 1e-4


def test_the_exact_kernel_is_the_limit_of_the_projections(experiment, predictor):
    exact, sketched = predictor.predict(
        [Setting(BY_NAME["TRAK"], 5, "none"), Setting(BY_NAME["TRAK"], 5, "sjlt")]
    )
    train, queries = features(
        experiment, experiment.load_model(), "loss", range(0, 1000, 200), "none"
    )
    damping = exact.dampings[8]
    inner = train @ train.T + damping * torch.eye(40, dtype=torch.float64)
    scores = torch.linalg.solve(inner, train @ queries.T).T
    assert relative_error(exact.values[8], groups(experiment, scores)) < 1e-4
    assert 1e-3 < relative_error(sketched.values[8], exact.values[8]) < 0.7
    # as large as all gradients together: not kept
    assert not list((experiment.folder / "features").glob("loss-none-*"))


def test_similarities_of_one_model_and_of_its_checkpoints(experiment, predictor):
    names = ("Gradient dot", "Gradient cosine", "TracInCP", "GAS")
    found = {
        p.setting.method.title: p
        for p in predictor.predict([Setting(BY_NAME[n], 2, "sjlt") for n in names])
    }
    dots, cosines = [], []
    for model in map(experiment.load_model, experiment.checkpoint_names):
        train, queries = features(experiment, model, "loss", (0, 500))
        dots.append(queries @ train.T)
        cosines.append(dots[-1] / queries.norm(dim=1)[:, None] / train.norm(dim=1))
    expected = {
        "Gradient dot": dots[-1],
        "Gradient cosine": cosines[-1],
        "TracInCP": sum(dots) / 4,
        "GAS": sum(cosines) / 4,
    }
    for name, scores in expected.items():
        assert found[name].rules == ("",)
        assert relative_error(found[name].values[0], groups(experiment, scores)) < 1e-4, name


def test_journeys_average_the_gradients_along_the_path(experiment, predictor):
    (found,) = predictor.predict([Setting(BY_NAME["Journey-TRAK"], 5, "sjlt")])
    assert found.kinds == ("generated",)
    assert found.values.shape == (17, 4, 5)
    model = experiment.load_model()
    train, _ = features(experiment, model, "loss", range(0, 1000, 200))
    scheduler = DDIMScheduler.from_config(model.process.scheduler.config)
    scheduler.set_timesteps(3)
    (batch,) = model.draw(range(5), num_inference_steps=3, trajectories=True)
    total = 0
    for step, t in enumerate(scheduler.timesteps.tolist()):
        settings = FeatureSettings("loss", (t,), 0, Projection("sjlt", K))
        ids = [f"journey/{seed}" for seed in range(5)]
        extractor = FusedExtractor(experiment.load_model(), settings, CPU)
        total = total + extractor.extract(batch.trajectories[:, step], ids).double() / 3
    scores = total @ ridge(train, total, found.dampings[8])
    assert relative_error(found.values[8], groups(experiment, scores)) < 1e-4


def test_methods_without_gradients(experiment, predictor):
    found = {
        p.setting.method.title: p
        for p in predictor.predict([s for s in list_settings([5], ["sjlt"]) if not s.projection])
    }
    assert set(found) == {"Raw pixels, dot", "Raw pixels, cosine", "Random"}
    queries = torch.cat([q.images for q in query_sets(experiment, CPU).values()])
    scores = queries.flatten(1).double() @ experiment.data.images.flatten(1).double().T
    assert relative_error(found["Raw pixels, dot"].values[0], groups(experiment, scores)) < 1e-5


def test_predictions_are_kept_and_made_anew_when_the_run_grows(experiment, predictor, monkeypatch):
    setting = Setting(BY_NAME["Gradient dot"], 2, "sjlt")
    (before,) = predictor.predict([setting])
    with monkeypatch.context() as patched:
        patched.setattr(FusedExtractor, "extract", lambda *_: pytest.fail("computed again"))
        (again,) = predictor.predict([setting])
    assert torch.equal(again.values, before.values)
    larger = prepare(experiment.folder, PRESET, num_subsets=5)
    (grown,) = Predictor(larger, query_sets(larger, CPU), CPU, quiet).predict([setting])
    assert torch.equal(grown.values[:, :4], before.values)
    file = experiment.folder / "predictions" / f"{setting.key}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ExperimentError, match="is damaged: delete it and run again"):
        list(predictor.predict([setting]))
    file.unlink()


def test_predictions_of_a_full_model_that_was_trained_anew_are_not_passed_over(
    experiment, tmp_path
):
    copy = load_experiment(shutil.copytree(experiment.folder, tmp_path / "run"))
    settings = [Setting(BY_NAME[name], 2, "none") for name in ("TRAK", "Gradient dot")]
    queries = query_sets(copy, CPU)

    def predict():
        return list(Predictor(copy, queries, CPU, quiet).predict(settings))

    before = predict()
    weights = next(copy.model_folder("full").rglob("*.safetensors"))
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights)
    for one, other in zip(before, predict(), strict=True):
        assert relative_error(one.values[0], other.values[0]) > 1e-2
    # a file of an older version does not say, and is taken as it is
    for setting in settings:
        file = copy.folder / "predictions" / f"{setting.key}.safetensors"
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
        del about["weights"]
        values = torch.zeros_like(load_file(file)["values"])
        save_file({"values": values}, file, metadata={"about": json.dumps(about)})
    assert not any(prediction.values.any() for prediction in predict())


def test_what_shares_features_shares_a_solver_also_when_the_run_grows(
    trained_lds, tmp_path, monkeypatch
):
    experiment, made = load_experiment(shutil.copytree(trained_lds, tmp_path / "run")), []

    def make(*arguments, **options):
        made.append(arguments)
        return solver(*arguments, **options)

    solver = lds_methods.RidgeSolver
    monkeypatch.setattr(lds_methods, "RidgeSolver", make)
    names = ("TRAK", "Relative influence", "Gradient dot")
    settings = [Setting(BY_NAME[name], 2, "none") for name in names]
    larger = prepare(experiment.folder, PRESET, num_subsets=5)
    for run in (experiment, larger):
        found = Predictor(run, query_sets(run, CPU), CPU, quiet).predict(settings)
        assert {p.values.shape[1] for p in found} == {len(run.subsets)}
    assert len(made) == 2


def test_two_commands_make_features_once(trained_lds, tmp_path, monkeypatch):
    experiment = load_experiment(shutil.copytree(trained_lds, tmp_path / "run"))
    queries = query_sets(experiment, CPU)
    begun, waiting, go_on = (threading.Event() for _ in range(3))
    filled, labels = [], []
    fill = extraction.fill_store

    def wait_and_fill(store, *arguments, **options):
        filled.append(store.folder.name)
        begun.set()
        assert go_on.wait(60)
        fill(store, *arguments, **options)

    @contextmanager
    def bar(label):
        labels.append(label)
        waiting.set()
        yield lambda done, total: None

    monkeypatch.setattr(extraction, "fill_store", wait_and_fill)
    settings = [Setting(BY_NAME[name], 2, "sjlt") for name in ("TRAK", "Gradient dot")]
    found = [[], []]

    def evaluate(place, progress_bar):
        found[place] += Predictor(experiment, queries, CPU, progress_bar).predict(settings)

    one, other = (
        threading.Thread(target=evaluate, args=arguments) for arguments in ((0, quiet), (1, bar))
    )
    one.start()
    assert begun.wait(60)
    other.start()
    waiting.wait(20)
    go_on.set()
    one.join(60)
    other.join(60)
    assert labels == ["wait for another command: loss-sjlt-2-3"]
    assert filled == ["train", "query"]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.values, b.values)


def test_what_is_evaluated():
    settings = list_settings([10, 100], ["sjlt", "none"])
    assert len({setting.key for setting in settings}) == len(settings)
    exact = [s for s in settings if s.projection == "none"]
    assert {(s.method.title, s.num_timesteps) for s in exact} == {
        (name, S) for name in ("D-TRAK", "TRAK") for S in (10, 100)
    }
    assert {s.method.title for s in settings} == set(BY_NAME)
    functions = {method.output_function for method in METHODS}
    assert {"loss", "mean_squared_l2_norm", "mean", "l1_norm", "l2_norm", "linf_norm"} < functions
