"""What is said beside scores: their noise, what stands out, groups, look-alikes."""

import math

import pytest
import torch
from test_explain import HOW, pictures
from test_sketcher import small_unet

import dtrak
from dtrak.attribute import main as attribute
from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.features.extraction import FusedExtractor
from dtrak.features.halves import Columns, order_halves
from dtrak.features.noise import sample_noise
from dtrak.features.settings import FeatureSettings
from dtrak.features.store import StoreInMemory
from dtrak.methods.errors import ScoreNoise, repeated_rows
from dtrak.methods.groups import group_names, score_groups
from dtrak.methods.self_influence import self_influence
from dtrak.methods.verdicts import describe, discoveries, p_values
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.runs.options import ExplainOptions, Options
from dtrak.runs.record import ResultsError
from dtrak.runs.results import load_attribution, read_scores
from dtrak.self_influence import main as list_self_influence
from dtrak_kernels import Projection
from dtrak_kernels.ridge import RidgeSolver

N, M, HELD = 48, 4, 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return UNet(small_unet().float(), linear_process())


def test_halves_are_interleaved():
    assert order_halves(tuple(range(0, 60, 10))) == (0, 20, 40, 10, 30, 50)


def test_half_differences_are_those_of_single_backwards(model):
    steps = (0, 250, 500, 750)
    settings = FeatureSettings("loss", steps, 0, Projection("none"), dtype="float64", halves=True)
    x, ids = pictures(3), ["a", "b", "c"]
    found = FusedExtractor(UNet(small_unet(), linear_process()), settings, CPU).extract(x, ids)
    net, process, rows = small_unet().double(), linear_process(), []
    for image, name in zip(x.double(), ids, strict=True):
        by_step = []
        for t in steps:
            noise = sample_noise([name], [t], (1, 8, 8), seed=0, dtype=torch.float64)[0]
            kept = process.scheduler.alphas_cumprod.double()[t]
            noisy = kept.sqrt() * image[None] + (1 - kept).sqrt() * noise
            loss = (net(noisy, torch.tensor([t])).sample - noise).square().mean()
            parts = torch.autograd.grad(loss, list(net.parameters()))
            by_step.append(torch.cat([part.flatten() for part in parts]))
        a, b, c, d = by_step
        rows.append(torch.cat([(a + b + c + d) / 4, (a + c - b - d) / 4]))
    expected = torch.stack(rows)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-6 * expected.norm()


def columns(features, differences):
    """Features and their half differences, as a store gives them."""
    store = StoreInMemory([str(i) for i in range(len(features))], 2 * features.shape[1], 4)
    for shard in store.missing():
        rows = store.rows(shard)
        store.write(shard, torch.cat([features[rows], differences[rows]], dim=1))
    return Columns(store, 0), Columns(store, 1)


class Linear:
    """Features that are signal and noise, with halves, drawn as often as wanted; float64."""

    def __init__(self, N=150, M=12, K=60, shift=3.0):
        self.generator = torch.Generator().manual_seed(0)
        self.shape = (N, M, K)
        # of very different energies by direction, and by image
        self.spectrum = self.noise_spectrum = torch.logspace(0, -1, K, dtype=torch.float64)
        self.train, self.query = self.normal(N), self.normal(M)
        self.size = 0.5 + torch.rand(N, 1, generator=self.generator).double()
        # in the difference of halves of all images, and no noise
        self.common = shift * self.normal(1)
        # the part of the noise that is in the first half; the parts of signals that differ
        self.first, self.own_shift, self.relative = 0.5, 0.0, 1.0

    def normal(self, rows, spectrum=None):
        values = torch.randn(rows, self.shape[2], generator=self.generator, dtype=torch.float64)
        return values * (self.spectrum if spectrum is None else spectrum)

    def noisy(self, signal, size):
        """A draw: features, and half their difference."""
        one, other = (
            size * part**0.5 * self.normal(len(signal), self.noise_spectrum)
            for part in (self.first, 1 - self.first)
        )
        common = self.common + self.own_shift * signal
        return signal + (one + other) / 2**0.5, (one - other) / 2**0.5 + common

    def draw(self):
        train, train_noise = self.noisy(self.train, self.size)
        query, query_noise = self.noisy(self.query, 1.0)
        rows = repeated_rows(len(train))
        again = self.noisy(self.train, self.size)[0][rows]
        solver = RidgeSolver(train)
        damping = self.relative * float(train.square().sum(1).mean())
        measured = ScoreNoise.measure(
            solver, query, query_noise, *columns(train, train_noise), again, damping
        )
        return solver.scores(query, damping).double(), measured


class FewDirections(Linear):
    """As gradients of a loss are, unwhitened: little damping, noise in few directions, and nearly
    all of it in one timestep, with a part of the signal."""

    def __init__(self):
        super().__init__(M=40, K=400)
        K = self.shape[2]
        self.spectrum = torch.logspace(0, -1.5, K, dtype=torch.float64)
        self.train, self.query = self.normal(self.shape[0]), self.normal(self.shape[1])
        self.noise_spectrum = torch.logspace(0.54, -10, K, dtype=torch.float64)
        self.common = 3.0 * self.normal(1)
        self.size, self.first, self.own_shift, self.relative = 1.0, 0.95, 0.4, 0.3


def covered(values, errors):
    """Share of 95 % intervals of a draw that hold the mean of the other draws."""
    count = len(values)
    others = (values.sum(0) - values) / (count - 1)
    return float(
        ((values - others).abs() < 1.96 * errors * math.sqrt(1 + 1 / (count - 1))).double().mean()
    )


def repeated(world):
    """Twelve draws of all noise: scores, errors, sums over five groups, their errors, and the
    correlation of two draws' scores as it is and as it was expected."""
    N, M, _ = world.shape
    members = torch.arange(N)[:, None] % 5 == torch.arange(5)
    scores, errors, sums, group_errors, expected = [], [], [], [], []
    for _ in range(12):
        found, noise = world.draw()
        scores.append(found)
        errors.append(noise.errors().double())
        sums.append(found @ members.double())
        group_errors.append(noise.group_errors(members).double())
        expected.append(noise.reliabilities(found))
    values = torch.stack(scores)
    alike = [torch.corrcoef(values[:, row]).sub(torch.eye(12)).sum() / 132 for row in range(M)]
    return (
        values,
        torch.stack(errors),
        torch.stack(sums),
        torch.stack(group_errors),
        float(torch.stack(alike).mean()),
        float(torch.stack(expected).mean()),
    )


def test_errors_cover_what_repeats_do():
    """An oracle that shares no formula: the scores of twelve draws of all noise."""
    scores, errors, sums, group_errors, alike, expected = repeated(Linear())
    assert 0.93 <= covered(scores, errors) <= 0.97
    assert 0.9 <= covered(sums, group_errors) <= 0.985
    # an image of more noise has larger errors
    assert torch.corrcoef(torch.stack([errors.mean((0, 1)), scores.std(0).mean(0)]))[0, 1] > 0.5
    assert alike == pytest.approx(expected, abs=0.05)


def test_errors_cover_noise_in_few_directions():
    """Where half differences hold the very noise of the features, and signal."""
    world = FewDirections()
    scores, errors, sums, group_errors, alike, expected = repeated(world)
    assert 0.93 <= covered(scores, errors) <= 0.97
    assert 0.9 <= covered(sums, group_errors) <= 0.985
    assert alike == pytest.approx(expected, abs=0.05)
    # as said
    noise = world.noise_spectrum.square()
    assert noise.sum().square() / noise.square().sum() < 20
    assert 0.1 < alike < 0.6


def inverse_without(features, damping, *rows):
    """``A`` of the other rows."""
    kept = features[[row not in rows for row in range(len(features))]]
    return torch.linalg.inv(kept.T @ kept + damping * torch.eye(features.shape[1]).double())


def beyond_chance(sizes, draws):
    """The part of a spread that is none of chance, from dot products."""
    J = len(draws)
    pairs = [float(draws[i] @ draws[j]) ** 2 for i in range(J) for j in range(J) if i != j]
    mean = sum(float(row @ row) for row in draws) / J
    chance = 2 * sum(pairs) / len(pairs) / mean**2
    spread = float(torch.tensor(sizes).var() / torch.tensor(sizes).mean() ** 2)
    return max(0.0, (1 + spread) / (1 + chance) - 1) / spread


def test_errors_are_the_formula_image_by_image():
    """Its words in loops over dense matrices without a row, where images weigh a lot."""
    generator = torch.Generator().manual_seed(5)
    N, M, K, damping = 12, 3, 6, 0.4
    phi, psi, d, e, noise = (
        torch.randn(n, K, generator=generator, dtype=torch.float64) for n in (N, M, N, M, N)
    )
    # copies, whose errors add up in a sum; sizes that differ by more than chance
    phi[1], d = phi[0], (0.5 + 3 * torch.arange(N)[:, None] / N) * d + 2
    psi, e, again = 2 * psi, 0.2 * e, phi + 0.3 * noise
    made = ScoreNoise.measure(RidgeSolver(phi), psi, e, *columns(phi, d), again, damping)
    A = inverse_without(phi, damping)
    common = d.mean(0)
    d, e, noise = d - common, e - common, 0.3 * noise / 2**0.5
    others = [inverse_without(phi, damping, j) for j in range(N)]
    along = [
        [float(noise[j] @ others[j] @ phi[i]) if i != j else 0 for i in range(N)] for j in range(N)
    ]

    def moved(x, kept, j):
        """Half the square that the score of x and image j moves with the other features."""
        found = []
        for row in (phi[j], again[j]):
            inverse = torch.linalg.inv(kept + torch.outer(row, row))
            found.append(float(x @ inverse @ row))
        return (found[1] - found[0]) ** 2 / 2

    def gram(*rows):
        return torch.linalg.inv(inverse_without(phi, damping, *rows))

    moves = [sum(moved(psi[q], gram(j), j) for j in range(N)) / N for q in range(M)]
    pairs = [moved(noise[k], gram(j, k), j) for k in range(N) for j in range(N) if j != k]
    own_moves = sum(pairs) / len(pairs)
    # through A: j is replaced, and the score of x on y moves; less what moves noise in place of y
    swapped = [gram(j) + torch.outer(again[j], again[j]) for j in range(N)]
    changes = [torch.linalg.inv(new) - A for new in swapped]
    h = [float(row @ A @ row) for row in phi]
    # times A they are noises times A without the image
    left = [noise[k] + phi[k] * float(noise[k] @ A @ phi[k]) / (1 - h[k]) for k in range(N)]

    def through(x, skip=None):
        """Mean over j and another image."""
        found = []
        for j in range(N):
            for i in range(N):
                if j not in (i, skip):
                    on, of = (float(x @ changes[j] @ y) for y in (phi[i], (1 - h[i]) * left[i]))
                    found.append((on**2 - of**2) / 2)
        return found

    of_others = [sum(through(row)) / (N * (N - 1)) for row in psi]
    found = [value for k in range(N) for value in through(left[k], k)]
    others_of_noise = sum(found) / len(found)
    scored = [sum(float(e[q] @ A @ row) ** 2 for row in phi) / N for q in range(M)]
    sizes = [
        sum(float(d[j] @ others[j] @ phi[i]) ** 2 for i in range(N) if i != j) / (N - 1)
        for j in range(N)
    ]
    query = [value / (sum(sizes) / N) for value in scored]
    centre, part = (1 + sum(query)) / (1 + M), beyond_chance(sizes, torch.tensor(along).double())
    query = [centre + part * (value - centre) for value in query]
    train = [float(d[n] @ d[n]) * float(1 - phi[n] @ A @ phi[n]) ** 2 for n in range(N)]
    real = beyond_chance(train, d)
    train = [1 + real * (value / (sum(train) / N) - 1) for value in train]
    assert 0 < part < 1
    assert 0 < real < 1
    # every part of it counts
    clean = [max(moves[q] - query[q] * own_moves, 0) for q in range(M)]
    assert sum(value > 0 for value in clean) >= 2
    members = torch.arange(N)[:, None] % 2 == torch.arange(2)
    found, sums = made.errors().double(), made.group_errors(members).double()
    typical = sum(value**2 for row in along for value in row) / (N * (N - 1))
    beyond = [max(of_others[q] - query[q] * others_of_noise, 0) for q in range(M)]
    beyond = [value * (N - 1) / typical for value in beyond]
    assert sum(value > 0.05 for value in beyond) >= 2
    query = [a + b for a, b in zip(query, beyond, strict=True)]
    for q in range(M):
        for n in range(N):
            E = sum(along[j][n] ** 2 for j in range(N) if j != n) / (N - 1)
            variance = query[q] * E + clean[q] * train[n]
            assert float(found[q, n]) == pytest.approx(variance**0.5, rel=1e-4)
        for g in range(2):
            inside = [n for n in range(N) if n % 2 == g]
            E = sum(sum(along[j][n] for n in inside) ** 2 for j in range(N)) / N
            variance = query[q] * E + clean[q] * sum(train[n] for n in inside)
            assert float(sums[q, g]) == pytest.approx(variance**0.5, rel=1e-4)
    scores = RidgeSolver(phi).scores(psi, damping).double()
    flat = [value for j in range(N) for i, value in enumerate(along[j]) if i != j]
    mean = [sum(along[j]) / (N - 1) for j in range(N)]
    apart = sum(v * v for v in flat) / len(flat) - sum(m * m for m in mean) / N
    for q, value in enumerate(made.reliabilities(scores).tolist()):
        noise_of = query[q] * apart + clean[q] * sum(train) / N
        assert value == pytest.approx(max(0.0, 1 - noise_of / float(scores[q].var())), abs=1e-4)


def test_p_values_below_the_tail_are_counted():
    generator = torch.Generator().manual_seed(6)
    null, scores = (torch.randn(2, n, generator=generator) for n in (60, 80))
    found = p_values(scores, null)
    for row in range(2):
        start = sorted(null[row].tolist())[-21]
        for score, p in zip(scores[row].tolist(), found[row].tolist(), strict=True):
            if score <= start:
                as_high = sum(held >= score for held in null[row].tolist())
                assert p == pytest.approx((1 + as_high) / 61)
            else:
                assert 0 < p < 21 / 61 + 1e-6


def test_p_values_of_images_like_the_held_out_ones_are_uniform():
    generator = torch.Generator().manual_seed(1)
    null, scores = (torch.randn(40, n, generator=generator) for n in (100, 500))
    p = p_values(scores, null)
    assert float((p <= 0.05).double().mean()) < 0.06
    assert (p[0].sort().values == p[0][scores[0].argsort(descending=True)]).all()
    found = discoveries(p)
    assert int(found.any(1).sum()) <= 4
    # a planted one, a long way off
    scores[:, 7] = 25
    found = discoveries(p_values(scores, null))
    assert found[:, 7].all()
    assert int(found.sum()) <= 40 + 4
    with pytest.raises(ValueError, match="at least 40 images that are no training images"):
        p_values(scores, null[:, :39])


def test_discoveries_are_the_step_up_procedure():
    p = torch.rand(30, 25, generator=torch.Generator().manual_seed(2)) ** 4
    for row, found in zip(p.tolist(), discoveries(p).tolist(), strict=True):
        ordered = sorted(row)
        fits = [i for i in range(25) if ordered[i] <= 0.05 * (i + 1) / 25]
        limit = ordered[fits[-1]] if fits else -1
        assert found == [value <= limit for value in row]


def test_the_nearest_by_an_encoder_are_those_of_its_embeddings(model, dino_folder, capsys):
    from dtrak.methods.baselines import dino_embeddings, load_dino
    from dtrak.pages.summary import print_findings

    train, queries = pictures(12), pictures(2, seed=1)
    queries[0] = train[5]
    found = dtrak.explain(
        model, train, queries, method="random", look_alikes=3, dino=dino_folder, device="cpu",
        progress=False,
    )  # fmt: skip
    known = found.findings
    a, b = (dino_embeddings(side, load_dino(dino_folder)).double() for side in (queries, train))
    cosine = (a @ b.T) / a.norm(dim=1)[:, None] / b.norm(dim=1)
    assert known.look_alikes.tolist() == cosine.argsort(1, descending=True)[:, :3].tolist()
    assert known.look_alikes[0, 0] == 5
    assert known.likeness == "DINO"
    highest = [set(row) for row in found.scores.argsort(1, descending=True)[:, :3].tolist()]
    nearest = map(set, known.look_alikes.tolist())
    both = [len(high & near) / 3 for high, near in zip(highest, nearest, strict=True)]
    assert known.agreement.tolist() == pytest.approx(both)
    print_findings(found.query_ids, found.scores, known)
    assert "Look-alikes, by DINO, among the 3" in " ".join(capsys.readouterr().out.split())


def test_verdicts():
    scores, errors = torch.tensor([[1.0, -3.0, 2.5], [0.0, 0.0, 0.0]]), torch.ones(2, 3)
    out = torch.tensor([[True, False, False], [False] * 3])
    first, second = describe(scores, errors, out, 50)
    assert first.startswith("2 of 3 scores are beyond their noise")
    assert first.endswith("1 stands out against 50 held-out images.")
    assert second.endswith("Nothing stands out against 50 held-out images.")


@pytest.fixture(scope="module")
def asked(model):
    """An untrained model; the first two queries are copies of training images."""
    train, queries = pictures(N), pictures(M, seed=1)
    queries[:2] = train[[10, 20]]
    held = torch.cat([pictures(HELD, seed=2), queries[3:], train[:1]])
    found = dtrak.explain(
        model, train, queries, held_out=held, groups=[f"g{i % 3}" for i in range(N)],
        noise_halves=True, look_alikes=3, **HOW,
    )  # fmt: skip
    return found, train, queries


def test_copies_stand_out_and_nothing_else_does(asked):
    found = asked[0].findings
    assert found.stands_out[0].nonzero().tolist() == [[10]]
    assert found.stands_out[1].nonzero().tolist() == [[20]]
    assert not found.stands_out[2:].any()
    # what is a query or a training image is not held out
    assert found.num_held_out == HELD
    assert found.verdicts[2].endswith(f"Nothing stands out against {HELD} held-out images.")
    assert (found.look_alikes[:2, 0] == torch.tensor([10, 20])).all()
    assert (found.agreement[:2] >= 1 / 3).all()
    assert (found.errors > 0).all()
    assert found.errors.shape == found.p_values.shape == (M, N)


@pytest.mark.full
def test_scores_with_halves_are_those_without(asked, model):
    found, train, queries = asked
    plain = dtrak.explain(model, train, queries, **HOW)
    assert (plain.scores - found.scores).norm() < 1e-4 * plain.scores.norm()
    assert plain.findings is None


def test_findings_lie_beside_the_scores(asked, tmp_path):
    found = asked[0]
    again = dtrak.Attribution.open(found.save(tmp_path))
    assert torch.equal(again.scores, found.scores)
    for name, value in vars(found.findings).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again.findings, name), value), name
    assert again.findings.verdicts == found.findings.verdicts
    groups = again.findings.groups
    assert (groups.names, groups.sizes) == (("g0", "g1", "g2"), (16, 16, 16))
    assert torch.equal(groups.errors, found.findings.groups.errors)
    assert groups.members.tolist() == [i % 3 for i in range(N)]
    file = tmp_path / "scores.safetensors"
    metadata = read_scores(file)[1]
    file.write_bytes(file.read_bytes().replace(b"likeness", b"lickness"))
    with pytest.raises(ResultsError, match="its findings cannot be read"):
        dtrak.Attribution.open(tmp_path)
    assert set(metadata) == {"columns", "findings", "rows", "settings", "sign"}


def test_groups_sum_scores_and_share_what_is_positive():
    scores = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-1.0, -1.0, -1.0, -1.0]])
    found = score_groups(scores, ["b", "a", "b", None])
    assert found.members.tolist() == [0, 1, 0, -1]
    assert found.names == ("b", "a")
    assert found.scores.tolist() == [[4.0, -2.0], [-2.0, -1.0]]
    assert torch.allclose(found.shares, torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    assert found.describe(0) == "b +4 (50%), a -2 (0%)"


def test_copies_are_most_alike_and_the_odd_one_is_by_itself():
    """Against dense algebra, in float64."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    features[20] = 2 * features[4] + 0.01 * features[5]
    features[7] *= 30
    found = self_influence(features, 2.0, [f"i{n}" for n in range(30)])
    scores = features @ torch.linalg.inv(features.T @ features + 2 * torch.eye(12)) @ features.T
    own = scores.diagonal()
    assert torch.allclose(found.own, own)
    assert int(found.own.argmax()) == 7
    alike = scores / (own[:, None] * own).sqrt() - 9 * torch.eye(30)
    assert found.nearest.tolist() == alike.argmax(1).tolist()
    assert torch.allclose(found.likeness, alike.amax(1), atol=1e-5)
    assert int(found.likeness.argmax()) in (4, 20)
    assert (int(found.nearest[4]), int(found.nearest[20])) == (20, 4)
    pairs = found.pairs()
    assert pairs[0][:2] == (4, 20)
    assert pairs[0][2] == pytest.approx(float(alike[4, 20]))
    # the best partner of each, once
    wanted = {tuple(sorted((i, int(row.argmax())))) for i, row in enumerate(alike)}
    assert len(pairs) == len(wanted)
    assert {pair[:2] for pair in pairs} == wanted
    values = [pair[2] for pair in pairs]
    assert values == sorted(values, reverse=True)


def test_no_image_is_most_like_itself():
    """Not even where all others are unlike it: the corners of a triangle."""
    corners = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    found = self_influence(corners.double(), 1.0, list("abc"))
    assert all(int(found.nearest[row]) != row for row in range(3))
    assert torch.allclose(found.likeness, torch.full((3,), -0.5, dtype=torch.float64), atol=1e-5)


def test_where_groups_come_from(tmp_path):
    train = dtrak.images(pictures(3), labels=[4, 4, 9], ids=["x/1.png", "x/2.png", "y/1.png"])
    assert group_names(train, "label") == ["4", "4", "9"]
    assert group_names(train, "folder") == ["x", "x", "y"]
    assert group_names(train, {"x/1.png": "ann"}) == ["ann", None, None]
    file = tmp_path / "who.csv"
    file.write_text('image,artist\nx/2.png,bob\ny/1.png,"cy, d"\n')
    assert group_names(train, file) == [None, "bob", "cy, d"]
    file.write_text("image,artist\nx/2.png,bob\nx/2.png,ann\n")
    with pytest.raises(ValueError, match="an image again as entry 3: 'x/2"):
        group_names(train, file)
    file.write_text("image,artist\nz,bob\n")
    with pytest.raises(ValueError, match="got 'z' and 0 others that are none; one is called 'x/1"):
        group_names(train, file)
    with pytest.raises(ValueError, match="must have training images with captions, got none"):
        group_names(train, "caption")
    with pytest.raises(FileNotFoundError, match="label, folder, caption or a CSV file"):
        group_names(train, str(tmp_path / "no.csv"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": "5"}, "even number of timesteps, got 5"),
        ({"method": "gradient-dot"}, "TRAK's formula on fused features, .* got gradient-dot"),
        ({"fused": False}, "got d-trak with --no-fused"),
    ],
)
def test_what_has_no_halves_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        ExplainOptions(noise_halves=True, **options)


def test_what_has_no_held_out_scores_says_so():
    with pytest.raises(ValueError, match="--held-out is for TRAK's formula"):
        Options(method="relative-influence", held_out="validation")
    with pytest.raises(ValueError, match="--held-out is for TRAK's formula"):
        dtrak.explain(None, None, 1, method="relative-influence", held_out=1)


def test_a_run_says_what_it_found_and_again(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    others = tmp_path / "others"
    others.mkdir()
    for number, image in enumerate(load_data("digits", limit=110).images[60:]):
        (others / f"{number}.png").write_bytes(encode_png(to_uint8(image)))
    groups = tmp_path / "groups.csv"
    groups.write_text("image,who\n" + "".join(f"{n:03d}.png,w{n % 2}\n" for n in range(50)))
    here = finished.parent
    arguments = [
        *("--model", here / "model", "--data", here / "images", "--output", tmp_path / "run"),
        *("--timesteps", 2, "--proj-dim", 256, "--num-queries", 3, "--device", "cpu"),
        *("--noise-halves", "--look-alikes", 2),
    ]
    with pytest.raises(SystemExit) as end:
        attribute(list(map(str, [*arguments, "--held-out", others, "--groups", groups])))
    assert not end.value.code
    text = capsys.readouterr()
    assert "held-out images: 50 images" in text.err
    for words in (
        "reliability",
        "stand out",
        "of 2 look-alikes",
        "w0 ",
        "Noise alone puts 3 of 60",
    ):
        assert words in text.out
    run = load_attribution(tmp_path / "run")
    assert run.findings.num_held_out == 50
    assert run.findings.groups.sizes == (25, 25)
    assert run.manifest["settings"]["proj_dim"] == 256
    # without files from elsewhere a second run has nothing to do
    for _ in range(2):
        with pytest.raises(SystemExit):
            attribute(list(map(str, arguments)))
        text = capsys.readouterr()
        assert "reliability" in text.out
        assert "stand out" not in text.out
    assert "reused" in text.out
    assert "report: " in text.out
    with pytest.raises(SystemExit) as end:
        list_self_influence([str(tmp_path / "run"), "--top-k", "3"])
    assert not end.value.code
    lines = (run.results / "self_influence.csv").read_text().splitlines()
    assert len(lines) == 61
    values = [float(line.split(",")[1]) for line in lines[1:]]
    assert values == sorted(values, reverse=True)
    assert lines[1].split(",")[0] in capsys.readouterr().out
