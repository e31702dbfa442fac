"""The promise of `matte` on random small problems: within 1e-4 of a dense solve, or a named refusal; every method, both precisions."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medmatting as mm
from medmatting import information_flow, knn, linear
from medmatting.assembled import assemble
from medmatting.checks import InputError
from medmatting.closed_form import ClosedForm
from medmatting.energy import make_region
from medmatting.information_flow import InformationFlow, assemble_flow
from medmatting.learning_based import LearningBased
from medmatting.linear import ConvergenceError, InDoubt, Stalled, pcg, pcg_within, probe
from problems import make_problem

SINGULAR = 1e-10  # smallest eigenvalue from which a dense solve deserves to be called exact


def image_of(kind, shape, channels, random):
    "Constant tissue, steps, spikes, noise of any strength, few levels."
    step = (np.arange(shape[2]) > shape[2] // 2) * 0.6
    image = np.full((*shape, channels), 0.2) + (step[:, None] if "step" in kind else 0)
    if "noise" in kind:
        image = image + random.normal(0, 10 ** random.uniform(-5, -1), image.shape)
    if "levels" in kind:
        image = random.integers(0, 3, image.shape) / 4
    if "spikes" in kind:
        image[random.random(shape) < 0.03] = 1.0
    return image.clip(0, 1)


@st.composite
def hard_problems(draw):
    "Small volumes and images of which two voxels to nearly all are known."
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(1, 9, 12), (4, 6, 9), (7, 7, 7), (3, 12, 5)]))
    image = image_of(draw(st.sampled_from(["", "step", "spikes", "noise", "step noise", "spikes noise", "step spikes", "levels"])), shape,
                     draw(st.integers(1, 3)), random)
    labels = np.full(shape, 128, np.uint8)
    known = random.choice(labels.size, draw(st.sampled_from([2, 8, labels.size // 2])), replace=False)
    labels.flat[known[::2]], labels.flat[known[1::2]] = 0, 255
    return make_problem(image, labels, draw(st.sampled_from([(1.0, 1.0, 1.0), (100.0, 1.0, 1.0), (1.0, 1.0, 100.0)])))


def dense_system(method, problem):
    "Matrix over the unknown voxels and right-hand side, assembled in double precision."
    if method in ("cf", "lb"):
        region = make_region(problem.labels)
        system = (ClosedForm if method == "cf" else LearningBased)(
            region, problem.scaled(region.box, region.spans.covered), region.spans.gather(problem.known[region.box]))
        return assemble(system).toarray(), system.rhs[system.free == 1]
    if method == "knn":
        system = knn.KNN(problem, weights=knn.default_weights(problem))
        matrix = np.empty((system.rhs.size,) * 2)
        for row, unit in zip(matrix, np.eye(len(matrix))):
            system.apply(unit, row)
        return matrix, system.rhs
    colour = problem.image.shape[3] > 1
    system = InformationFlow(problem, weights=information_flow.WEIGHTS[colour], strengths=information_flow.STRENGTHS[colour],
                             regulariser=information_flow.REGULARISERS[colour])
    matrix = assemble_flow(system).toarray()
    return matrix[np.ix_(system.home, system.home)], system.residual(system.start(), system.zeros())[system.home]


def keeps_the_promise(method, problem, **options):
    "None, or by how much alpha is wrong."
    flat = problem.labels.shape[0] == 1
    image, labels, spacing = (problem.image[0], problem.labels[0], problem.spacing[1:]) if flat else (problem.image, problem.labels, problem.spacing)
    try:
        alpha = mm.matte(image, labels, method, spacing=spacing, **options)
    except (InputError, ConvergenceError) as refusal:
        assert "but accepted is" in str(refusal) or "not converged" in str(refusal) and "Raise" in str(refusal) or "Mark" in str(refusal)
        return None
    assert np.isfinite(alpha).all() and alpha.min() >= 0 and alpha.max() <= 1
    matrix, rhs = dense_system(method, problem)
    scale = 1 / np.sqrt(np.diag(matrix))
    if not np.isfinite(matrix).all() or np.linalg.eigvalsh(scale[:, None] * matrix * scale)[0] < SINGULAR:
        return None  # rounding decides the dense solve as well
    exact = scale * np.linalg.solve(scale[:, None] * matrix * scale, scale * rhs)
    return abs(alpha[labels == 128] - exact.clip(0, 1)).max()


@pytest.mark.parametrize("method", ["cf", "lb", "knn", "if"])
@given(problem=hard_problems(), precision=st.sampled_from([None, "double", "single"]))
@settings(max_examples=12, deadline=None)
def test_alpha_is_exact_or_refused(method, problem, precision):
    options = dict(precision=precision) if precision and method != "knn" else {}
    error = keeps_the_promise(method, problem, **options)
    assert error is None or error < 1e-4


def blind_problem(seed):
    "Two tissues and spikes without noise, in three equal channels; two voxels are known."
    random = np.random.default_rng(seed)
    image, labels = image_of("step spikes", (7, 7, 7), 3, random), np.full((7, 7, 7), 128, np.uint8)
    labels.flat[random.choice(labels.size, 2, replace=False)] = 0, 255
    return make_problem(image, labels)


@pytest.mark.parametrize("method", ["cf", "if"])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_an_answer_that_the_residual_hides_is_still_right(method, seed):
    "Conjugate gradients alone end with a residual of 1e-6 and an error of 0.3 to 0.9."
    problem = blind_problem(seed)
    error = keeps_the_promise(method, problem)
    assert error is not None and error < 1e-5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm.matting if method == "cf" else information_flow, "pcg_within", lambda *arguments: pcg(*arguments[:4]))
        assert keeps_the_promise(method, problem) > 0.1


@pytest.mark.parametrize("method", ["cf", "lb", "if"])
def test_where_iterations_alone_cannot_it_is_said(method, monkeypatch):
    monkeypatch.setattr(mm.matting, "RESCUED", 0)
    monkeypatch.setattr(information_flow, "DENSE", 0)
    problem = blind_problem(0)
    with pytest.raises(Stalled, match="not converged.*rounding"):
        mm.matte(problem.image, problem.labels, method)


@pytest.mark.parametrize("make", [ClosedForm, LearningBased])
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_the_probe_finds_the_smallest_eigenvalue(make, number):
    random = np.random.default_rng(0)
    image, labels = random.random((6, 8, 9, 1)), np.full((6, 8, 9), 128, np.uint8)
    labels[:, :, :3], labels[:, :, -1] = 0, 255
    problem = make_problem(image, labels)
    region = make_region(labels)
    system = make(region, problem.scaled(region.box, region.spans.covered, number), region.spans.gather(problem.known[region.box]))
    matrix, scale = assemble(system).toarray(), np.sqrt(system.jacobi[system.free == 1])
    assert probe(system) == pytest.approx(np.linalg.eigvalsh(scale[:, None] * matrix * scale)[0], rel=1e-2)


def test_larger_systems_use_what_their_own_iteration_has_seen(monkeypatch):
    monkeypatch.setattr(linear, "PROBED", 0)
    monkeypatch.setattr(linear, "probe", None)
    problem = make_problem(np.random.default_rng(0).random((6, 8, 9, 1)), np.array([0, 0, 0, 128, 128, 128, 128, 255, 255]) * np.ones((6, 8, 1)))
    region = make_region(problem.labels)
    system = ClosedForm(region, problem.scaled(region.box, region.spans.covered), region.spans.gather(problem.known[region.box]))
    solution = pcg_within(system, 1e-6)
    assert 0 < solution.smallest < 1 and solution.residual <= 1e-6
    with pytest.raises(Stalled, match="rounding"):
        monkeypatch.setattr(ClosedForm, "rounding", 1e-3, raising=False)
        pcg_within(system, 1e-6)


def test_a_large_system_whose_voxels_are_in_doubt_is_solved_as_far_as_arithmetic_goes_and_says_so(monkeypatch):
    monkeypatch.setattr(linear, "PROBED", 0)
    monkeypatch.setattr(mm.matting, "RESCUED", 0)
    distance = np.sqrt(((np.indices((16, 16, 16)) - 8) ** 2).sum(0))
    trimap = np.where(distance < 3, 255, np.where(distance > 7, 0, 128)).astype(np.uint8)
    image = np.random.default_rng(1).normal(0.5, 0.01, distance.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scan, which has noise, is in no doubt
        exact = mm.matte(image, trimap)
    monkeypatch.setattr(linear.HostSystem, "rounding", 1e-3)
    with pytest.warns(InDoubt, match="some voxels are in doubt.*rounding may leave alpha wrong"):
        alpha = mm.matte(image, trimap)
    assert abs(alpha - exact).max() < 1e-4


@pytest.mark.parametrize("seed, noise_hu", [(0, 5), (3, 14)])
def test_single_voxels_among_spikes_in_a_large_volume(seed, noise_hu):
    "Held to the mean square alone, the first is wrong by 3e-4."
    random, distance = np.random.default_rng(seed), np.sqrt(((np.indices((56,) * 3) - 27.5) ** 2).sum(0))
    hu = -850 + 880 * (0 if seed else np.clip((15 - distance) / 4 + 0.5, 0, 1)) + random.normal(0, noise_hu, distance.shape)
    hu[random.random(distance.shape) < 0.002] = -1000 if seed else 400
    trimap = np.where(distance < 9, 255, np.where(distance > 24, 0, 128)).astype(np.uint8)
    alpha, exact = (mm.matte(hu.astype(np.float32), trimap, hu_range=(-1000, 400), tol=tol) for tol in (1e-6, 1e-10))
    assert abs(alpha - exact).max() < 1e-4
