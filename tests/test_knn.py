"""KNN matting: the literal formula, laws, PyMatting at its settings, and input without an answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import spsolve

from medmatting import knn, linear
from medmatting.checks import InputError
from medmatting.energy import Problem
from medmatting.knn import KNN, SLAB, default_weights, solve
from medmatting.neighbours import in_parts
from problems import make_problem, noisy


def literal(problem, searches, kernel):
    "D - A from all distances, dense."
    n, channels = problem.labels.size, problem.image.shape[3]
    values = problem.scaled((slice(None),) * 3, np.ones(problem.labels.shape, bool)).T
    places = np.argwhere(np.ones(problem.labels.shape, bool))
    affinity = np.zeros((n, n))
    for neighbours, weight in searches:
        for i in range(n):
            squares = np.zeros(n)
            for c in range(channels):
                squares += (values[i, c] - values[:, c]) ** 2
            z, y, x = [(weight * s * (p - p[i])) ** 2 for s, p in zip(problem.spacing, places.T)]
            squares += z + y + x
            squares[i] = np.inf
            for j in np.lexsort((np.arange(n), squares))[:neighbours]:
                k = 1.0 if kernel == "binary" else max(0.0, 1 - np.sqrt(squares[j] / channels))
                affinity[i, j] += k
                affinity[j, i] += k
    return np.diag(affinity.sum(1)) - affinity


@st.composite
def problems(draw):
    "4x4 and 3x4x5 images: noise, few levels, constant; cubes and needles."
    shape = draw(st.sampled_from([(1, 4, 4), (3, 4, 5)]))
    channels, levels = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 3]))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    image = random.integers(0, levels, (*shape, channels)) / 4 if levels else random.random((*shape, channels))
    labels = random.choice(np.array([0, 128, 128, 255], np.uint8), shape)
    labels.flat[:3] = 0, 255, 128
    return make_problem(image, labels, draw(st.sampled_from([(1.0, 1.0, 1.0), (2.5, 0.7, 0.7), (100.0, 1.0, 1.0)])))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["binary", "linear"]), st.sampled_from([0.1, 1.0]))
def test_equals_the_literal_formula(problem, kernel, weight):
    options = dict(neighbours=(9, 4), weights=(weight, weight / 10), kernel=kernel)
    dense = literal(problem, zip(options["neighbours"], options["weights"]), kernel)
    fixed, known = problem.labels.ravel() != 128, problem.known.ravel().astype(float)
    inner, right = dense[~fixed][:, ~fixed], -dense[~fixed][:, fixed] @ known[fixed]
    if np.linalg.matrix_rank(inner) < len(inner):
        with pytest.raises(InputError, match="no chain of neighbours"):
            solve(problem, 1e-12, 1000, **options)
        return
    system = KNN(problem, **options)
    p, out = np.random.default_rng(0).normal(size=len(inner)), np.empty(len(inner))
    assert abs(system.apply(p, out) - p @ inner @ p) < 1e-10
    assert abs(out - inner @ p).max() < 1e-10
    assert abs(system.rhs - right).max() < 1e-10 and abs(system.diagonal - np.diag(inner)).max() < 1e-10
    alpha = linear.pcg(system, 1e-13).x
    assert abs(alpha - np.linalg.solve(inner, right)).max() < 1e-10
    penalty = np.where(fixed, 50.0, 0.0)
    soft = linear.pcg(KNN(problem, **options, constraint_weight=50.0), 1e-14).x
    assert abs(soft - np.linalg.solve(dense + np.diag(penalty), penalty * known)).max() < 1e-10


def test_known_voxels_are_kept_and_alpha_stays_between():
    problem = noisy((5, 12, 32))
    solved = solve(problem, 1e-8, 1000)
    known = problem.labels != 128
    assert (solved.alpha[known] == problem.known[known]).all() and solved.alpha.dtype == np.float32
    assert -1e-6 < solved.alpha.min() and solved.alpha.max() < 1 + 1e-6 and solved.residual <= 1e-8


def test_soft_constraints_converge_to_the_exact_ones():
    problem = noisy((3, 10, 24))
    exact = solve(problem, 1e-11, 5000).alpha
    gaps = [abs(solve(problem, 1e-11, 5000, constraint_weight=w).alpha - exact).max() for w in (10.0, 1e3, 1e5)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


def test_exchanging_foreground_and_background_mirrors_alpha():
    problem = noisy((3, 10, 24))
    mirrored = make_problem(problem.image, np.where(problem.labels == 128, 128, 255 - problem.labels))
    assert abs(solve(problem, 1e-9, 1000).alpha + solve(mirrored, 1e-9, 1000).alpha - 1).max() < 1e-6


def test_surroundings_out_of_reach_change_nothing():
    problem = noisy((3, 40, 40))
    problem.labels[:, 10:] = 0
    problem.known[:, 10:] = 0
    box = (slice(None), slice(0, 38), slice(None))
    crop = Problem(problem.image[box], problem.limits, problem.labels[box], problem.known[box], problem.spacing)
    whole, part = solve(problem, 1e-10, 1000, weights=(0.3, 0.3)), solve(crop, 1e-10, 1000, weights=(0.3, 0.3))
    assert abs(whole.alpha[box] - part.alpha).max() < 1e-6 and whole.stored == part.stored


def test_spacing_is_part_of_the_distance():
    problem = noisy((4, 10, 24))
    flat = make_problem(problem.image, problem.labels, (10.0, 1.0, 1.0))
    assert abs(solve(problem, 1e-8, 1000).alpha - solve(flat, 1e-8, 1000).alpha).max() > 1e-3


def test_more_weight_is_the_same_as_larger_voxels():
    problem = noisy((3, 10, 24))
    large = make_problem(problem.image, problem.labels, (4.0, 4.0, 4.0))
    assert np.array_equal(solve(problem, 1e-8, 1000, weights=(0.04, 0.02)).alpha, solve(large, 1e-8, 1000, weights=(0.01, 0.005)).alpha)


def test_result_does_not_depend_on_threads(monkeypatch):
    problem = noisy((20, 64, 130))
    assert (problem.labels == 128).sum() > 2 * SLAB
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("NUMBA_NUM_THREADS", str(threads))
        results.append(solve(problem, 1e-6, 1000).alpha)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("kernel", ["binary", "linear"])
def test_known_and_free_voxels_may_be_asked_in_parts(kernel, monkeypatch):
    problem = noisy((3, 10, 24))
    whole = KNN(problem, kernel=kernel)
    monkeypatch.setattr(knn, "in_parts", lambda asked: in_parts(asked, 37))
    parts = KNN(problem, kernel=kernel)
    assert all(np.array_equal(getattr(whole, name), getattr(parts, name)) for name in ("first", "end", "weight"))
    assert np.allclose(whole.anchor, parts.anchor, rtol=1e-13) and np.allclose(whole.rhs, parts.rhs, rtol=1e-13)


def test_agrees_with_an_exact_solution():
    problem = noisy((6, 20, 40))
    system = KNN(problem)
    matrix, unit = np.empty((system.rhs.size,) * 2), np.zeros(system.rhs.size)
    for i in range(unit.size):
        unit[i] = 1.0
        system.apply(unit, matrix[i])
        unit[i] = 0.0
    assert np.array_equal(matrix, matrix.T)
    exact = np.linalg.solve(matrix, system.rhs)
    assert abs(solve(problem, 1e-6, 1000).alpha[problem.labels == 128] - exact).max() < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_pymatting_at_its_settings(seed):
    """PyMatting counts the pixel itself among its neighbours (20 and 10 are our 19 and 9), scales each axis to 0..1, and
    normalises the rows of A + A': multiplied by the row sums its system with eliminated pixels is ours. Its
    search runs in single precision, so the image is kept small, and its system is solved directly."""
    from pymatting.laplacian.knn_laplacian import knn_laplacian

    problem = noisy((1, 18, 22), seed, channels=3)
    fixed = problem.labels.ravel() != 128
    theirs = knn_laplacian(problem.image[0]).tocsc()
    alpha = spsolve(theirs[~fixed][:, ~fixed], -theirs[~fixed][:, fixed] @ problem.known.ravel()[fixed].astype(float))
    ours = make_problem(problem.image, problem.labels, (1.0, 1 / 17, 1 / 21))
    solved = solve(ours, 1e-10, 5000, neighbours=(19, 9), weights=(2.0, 0.1))
    assert abs(solved.alpha.ravel()[~fixed] - alpha).max() < 1e-6


def test_default_weights_of_colour_follow_the_size_of_the_image():
    problem = noisy((1, 18, 22), channels=3)
    assert default_weights(problem) == (2.0 / 22, 0.1 / 22) and default_weights(noisy((3, 10, 24))) == (0.1, 0.03)
    larger = make_problem(problem.image, problem.labels, (1.0, 5.0, 5.0))
    assert np.array_equal(solve(problem, 1e-8, 1000).alpha, solve(larger, 1e-8, 1000).alpha)
    explicit = solve(problem, 1e-8, 1000, weights=(2.0 / 22, 0.1 / 22)).alpha
    assert np.array_equal(solve(problem, 1e-8, 1000).alpha, explicit)


def test_pymatting_matrix_is_ours_with_divided_rows():
    from pymatting.laplacian.knn_laplacian import knn_laplacian

    problem = noisy((1, 12, 14), channels=3)
    theirs = knn_laplacian(problem.image[0]).toarray()
    ours = literal(make_problem(problem.image, problem.labels, (1.0, 1 / 11, 1 / 13)), [(19, 2.0), (9, 0.1)], "binary")
    assert np.array_equal(ours, ours.T) and abs(theirs - theirs.T).max() > 1e-3
    assert abs((np.diag(ours) / np.diag(theirs))[:, None] * theirs - ours).max() < 1e-10


def test_island_is_refused_by_name_and_place():
    image = np.full((1, 30, 30, 1), 0.2)
    image[0, 10:20, 12:20] = 0.9
    labels = np.full((1, 30, 30), 128)
    labels[:, :3], labels[:, -3:] = 0, 255
    with pytest.raises(InputError, match=r"^trimap: got 80 unknown voxels .groups of them: 1. .* first at index \(10, 12\)"):
        solve(make_problem(image, labels), 1e-6, 1000)


def test_nothing_known_is_refused():
    with pytest.raises(InputError, match="no chain of neighbours"):
        solve(make_problem(np.random.default_rng(0).random((1, 8, 8, 1)), np.full((1, 8, 8), 128)), 1e-6, 1000)


def test_isolated_unknown_voxels_everywhere():
    labels = np.zeros((6, 8, 8), int)
    labels[:, :, 4:] = 255
    for place in [(0, 0, 0), (5, 7, 7), (3, 4, 4), (0, 7, 0), (2, 2, 6)]:
        labels[place] = 128
    alpha = solve(make_problem(np.where(labels == 255, 0.9, 0.1)[..., None], labels), 1e-8, 100).alpha
    assert np.isfinite(alpha).all() and alpha[0, 0, 0] < 0.01 and alpha[2, 2, 6] == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (100.0, 1.0, 1.0), (1.0, 100.0, 1.0)])
def test_constant_image_gives_an_interpolation(spacing):
    problem = noisy((4, 10, 24))
    alpha = solve(make_problem(np.full_like(problem.image, 0.5), problem.labels, spacing), 1e-8, 2000, weights=(1.0, 0.1)).alpha
    assert np.isfinite(alpha).all() and (np.diff(alpha.mean((0, 1))) >= -1e-6).all()


@pytest.mark.parametrize("limits", [(0.0, 1e300), (0.0, 1e-300), (-1e6, 1e6)])
def test_scale_of_intensities_does_not_matter(limits):
    problem = noisy((3, 10, 24))
    image = limits[0] + problem.image * (limits[1] - limits[0])
    alpha = solve(make_problem(image, problem.labels, limits=limits), 1e-9, 1000).alpha
    assert abs(alpha - solve(problem, 1e-9, 1000).alpha).max() < 1e-5


def test_only_background_gives_background():
    labels = np.zeros((1, 9, 9), int)
    labels[0, 3:6] = 128
    solved = solve(make_problem(np.random.default_rng(0).random((1, 9, 9, 1)), labels), 1e-6, 100)
    assert (solved.alpha == 0).all() and solved.iterations == 0


def test_nothing_unknown_gives_what_is_known():
    labels = np.array([[[0, 255, 0, 255]] * 8])
    assert np.array_equal(solve(make_problem(np.zeros((1, 8, 4, 1)), labels), 1e-6, 100).alpha, labels == 255)


@pytest.mark.parametrize("options, name", [
    (dict(neighbours=(500, 10)), "neighbours"), (dict(neighbours=(0, 10)), "neighbours"), (dict(neighbours=20), "neighbours"),
    (dict(neighbours=(2.5, 3)), "neighbours"), (dict(neighbours=(100, 90)), "neighbours"), (dict(neighbours=(20,)), "neighbours, weights"),
    (dict(weights=(0.0, 1.0)), "weights"), (dict(weights=(np.nan, 1.0)), "weights"), (dict(weights=("a", 1.0)), "weights"),
    (dict(weights=(1e-80, 1.0)), "weight"), (dict(kernel="gauss"), "kernel"), (dict(neighbours=(90, 10)), "neighbours"),
])
def test_options_without_meaning_are_refused(options, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        solve(noisy((1, 4, 16)), 1e-6, 100, **options)
