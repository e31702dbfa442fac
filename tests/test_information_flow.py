"""Information-flow matting: the literal energy, mixture weights, laws, and input without an answer."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmatting import information_flow, linear
from medmatting.checks import InputError
from medmatting.energy import Problem
from medmatting.information_flow import InformationFlow, bhattacharyya, known_estimate, mix, mixture_weights, solve, transparency, trim
from medmatting.linear import pcg
from problems import make_problem, noisy

OPTIONS = dict(trimming="both", neighbours=(8, 3, 4), weights=(0.1, 1.0, 0.005), strengths=(1.0, 0.05, 0.01, 0.7), regulariser=1e-3, eps=1e-5)


def literal_weights(values, own, regulariser):
    "Constrained least squares with a multiplier."
    m, count = values - own, len(values)
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = m @ m.T + regulariser * np.eye(count)
    system[count, count] = 0
    return np.linalg.solve(system, np.append(np.zeros(count), 1.0))[:count]


def near(i, values, places, targets, neighbours, weight):
    "K nearest targets from all distances, in the order of our sums; equal ones in the order of the array."
    squares = np.zeros(len(values))
    for c in range(values.shape[1]):
        squares += (values[i, c] - values[:, c]) ** 2
    z, y, x = [(weight * s) ** 2 for s in (places - places[i]).T]
    squares += z + y + x
    squares[~targets] = np.inf
    squares[i] = np.inf
    return np.lexsort((np.arange(len(values)), squares))[: min(neighbours, np.isfinite(squares).sum())]


def literal(problem, trimming, neighbours, weights, strengths, regulariser, eps):
    "Dense matrix and right-hand side of the energy over all voxels."
    shape, n = problem.labels.shape, problem.labels.size
    values = problem.scaled((slice(None),) * 3, np.ones(shape, bool)).T
    places = np.argwhere(np.ones(shape, bool)) * problem.spacing
    labels, known, channels = problem.labels.ravel(), problem.known.ravel(), values.shape[1]
    rows, like, matrix, right = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n)), np.zeros(n)
    sided = (labels == 255).any() and (labels == 0).any()
    claimed = np.full(n, np.nan)
    claimed[labels == 128] = trim(problem, problem.labels == 128, trimming) if sided else np.nan
    for i in np.flatnonzero(labels == 128):
        some = near(i, values, places, np.ones(n, bool), neighbours[0], weights[0])
        rows[i, i] = 1
        rows[i, some] = -literal_weights(values[some], values[i], regulariser)
        front, back = (near(i, values, places, labels == s, neighbours[1], weights[1]) for s in (255, 0))
        if len(front) and len(back):
            both = np.append(front, back)
            confidence = sum((values[front].mean(0) - values[back].mean(0)) ** 2) / channels
            estimate = literal_weights(values[both], values[i], regulariser) @ known[both]
            estimate, confidence = (estimate, confidence) if np.isnan(claimed[i]) else (claimed[i], 1.0)
            matrix[i, i] += strengths[1] * confidence
            right[i] += strengths[1] * confidence * estimate
        some = near(i, values, places, labels == 128, neighbours[2], weights[2])
        gap = abs(values[some] - values[i]).sum(1) + weights[2] * abs(places[some] - places[i]).sum(1)
        like[i, some] = np.maximum(0, 1 - gap / (channels + sum(s > 1 for s in shape)))
    like = (like + like.T) / 2
    matrix += strengths[0] * rows.T @ rows + strengths[2] * (np.diag(like.sum(1)) - like)
    sides, number = [min(3, s) for s in shape], np.arange(n).reshape(shape)
    for corner in np.ndindex(*(s - w + 1 for s, w in zip(shape, sides))):
        w = number[tuple(slice(a, a + k) for a, k in zip(corner, sides))].ravel()
        if (labels[w] == 128).any():
            offset = values[w] - values[w].mean(0)
            inverse = np.linalg.inv(offset.T @ offset / len(w) + eps / len(w) * np.eye(channels))
            matrix[np.ix_(w, w)] += strengths[3] / len(w) * (np.eye(len(w)) - (1 + offset @ inverse @ offset.T) / len(w))
    return matrix, right


@st.composite
def problems(draw):
    "4x4 and 3x4x5 images: noise, few levels, constant; cubes and needles."
    shape = draw(st.sampled_from([(1, 4, 4), (3, 4, 5), (4, 1, 5), (5, 4, 1)]))
    channels, levels = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 3]))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    image = random.integers(0, levels, (*shape, channels)) / 4 if levels else random.random((*shape, channels))
    labels = random.choice(np.array([0, 128, 128, 255], np.uint8), shape)
    labels.flat[:2] = 128, draw(st.sampled_from([0, 255]))
    return make_problem(image, labels, draw(st.sampled_from([(1.0, 1.0, 1.0), (2.5, 0.5, 0.5), (100.0, 1.0, 1.0)])))


@pytest.mark.parametrize("stored", [0, information_flow.STORED])  # lists in steps, and as they are
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_equals_the_literal_energy(problem, stored):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(information_flow, "STORED", stored)
        compare_with_the_literal_energy(problem)


def compare_with_the_literal_energy(problem):
    fixed, known = problem.labels.ravel() != 128, problem.known.ravel().astype(float)
    if problem.labels.shape[2] > 1:
        dense, right = literal(problem, **OPTIONS)
        inner, inner_right = dense[~fixed][:, ~fixed], (right - dense[:, fixed] @ known[fixed])[~fixed]
        system = InformationFlow(problem, **OPTIONS)
        p, out = system.zeros(), system.zeros()
        p[system.home] = np.random.default_rng(0).normal(size=len(inner))
        q = p[system.home]
        assert abs(system.apply(p, out) - q @ inner @ q) < 1e-10
        assert abs(out[system.home] - inner @ q).max() < 1e-10 and not out[~np.isin(np.arange(out.size), system.home)].any()
        assert abs(system.residual(system.start(), out)[system.home] - inner_right).max() < 1e-10
        assert abs(system.diagonal[system.home] - np.diag(inner)).max() < 1e-10
    else:  # an axis of one voxel goes first; neighbours at equal distances come in that order
        turned = [np.swapaxes(a, 0, 2) for a in (problem.image, problem.labels, problem.known)]
        flat = Problem(turned[0], problem.limits, *turned[1:], problem.spacing[::-1])
        dense, right = literal(flat, **OPTIONS)
        fixed, known = turned[1].ravel() != 128, turned[2].ravel().astype(float)
        inner, inner_right = dense[~fixed][:, ~fixed], (right - dense[:, fixed] @ known[fixed])[~fixed]
    alpha = solve(problem, 1e-13, 5000, **OPTIONS).alpha
    alpha = (alpha if problem.labels.shape[2] > 1 else np.swapaxes(alpha, 0, 2)).ravel()
    assert abs(alpha[~fixed] - np.linalg.solve(inner, inner_right)).max() < 1e-5  # alpha is float32, and few constraints may hold it


@settings(max_examples=30, deadline=None)
@given(problems(), st.sampled_from([1.0, 100.0]))
def test_soft_form_equals_the_literal_energy(problem, weight):
    if problem.labels.shape[2] == 1:
        return
    dense, right = literal(problem, **OPTIONS)
    fixed, known = problem.labels.ravel() != 128, problem.known.ravel()
    exact = np.linalg.solve(dense + weight * np.diag(fixed), right + weight * fixed * known)
    solved = solve(problem, 1e-13, 5000, **OPTIONS, constraint_weight=weight)
    assert abs(solved.alpha.ravel() - exact).max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200_000))
def test_steps_of_two_bytes_give_the_lists_back(seed, reach):
    random = np.random.default_rng(seed)
    lists, free = random.integers(0, reach, (50, 6)).astype(np.int32), random.integers(0, 7, 50).astype(np.int16)
    lists[0] = 0, 65534, 131069, 196605, 262140, 400000  # steps of 65534, 65535, 65536, 65535
    expected, head = [sorted(row[:count]) for row, count in zip(lists, free)], np.empty(50, np.uint32)
    steps, near, at = information_flow._shorten(lists, free, head), np.empty(6, np.uint32), 0
    for first, row in zip(head, expected):
        at = information_flow._unpack(at, first, len(row), steps, near)
        assert near[: len(row)].tolist() == row
    assert at == steps.size


def test_soft_form_moves_known_voxels_that_no_window_holds():
    labels = np.full((1, 4, 9), 128)
    labels[..., 2:5], labels[..., 5:] = 0, 255
    problem = make_problem(np.random.default_rng(0).random((1, 4, 9, 1)), labels)
    assert InformationFlow(problem, **OPTIONS, constraint_weight=1.0).far.size == 3
    dense, right = literal(problem, **OPTIONS)
    fixed, known = labels.ravel() != 128, problem.known.ravel()
    exact = np.linalg.solve(dense + np.diag(fixed * 1.0), right + fixed * known)
    assert abs(solve(problem, 1e-13, 5000, **OPTIONS, constraint_weight=1.0).alpha.ravel() - exact).max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.sampled_from([1e-6, 1e-3, 1.0]), st.integers(0, 10**6), st.booleans())
def test_mixture_weights_are_the_constrained_least_squares(channels, count, regulariser, seed, constant):
    random = np.random.default_rng(seed)
    values, own = random.random((3, count, channels)), random.random((3, channels))
    values[0, :] = values[0, 0] if constant else values[0]
    weights = mixture_weights(values, *mix(values, own, regulariser))
    for w, v, o in zip(weights, values, own):
        assert abs(w - literal_weights(v, o, regulariser)).max() < 1e-14 / regulariser + 1e-12
    assert abs(weights.sum(1) - 1).max() < 1e-14 / regulariser + 1e-12


def test_known_voxels_are_kept():
    problem = noisy((5, 12, 32))
    solved = solve(problem, 1e-8, 1000)
    known = problem.labels != 128
    assert (solved.alpha[known] == problem.known[known]).all() and solved.alpha.dtype == np.float32 and solved.residual <= 1e-8


def test_soft_constraints_converge_to_the_exact_ones():
    problem = noisy((3, 10, 24))
    exact = solve(problem, 1e-11, 5000).alpha
    gaps = [abs(solve(problem, 1e-11, 5000, constraint_weight=w).alpha - exact).max() for w in (10.0, 1e3, 1e5)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_affine_alpha_has_no_colour_mixture_energy(channels):
    problem = noisy((3, 10, 24), channels=channels)
    linear_alpha = Problem(problem.image, problem.limits, problem.labels, np.where(problem.labels == 128, 0, problem.image.sum(3) - 0.3), problem.spacing)
    system = InformationFlow(linear_alpha, strengths=(1.0, 1e-12, 1e-12, 1e-12), known_to_unknown=False, regulariser=1e-9)
    affine = system.local.image.sum(0) - 0.3
    assert abs(system.residual(affine, system.zeros())).max() < 1e-6
    assert abs(system.residual(affine**2, system.zeros())).max() > 1e-3


def test_exchanging_foreground_and_background_mirrors_alpha():
    problem = noisy((3, 10, 24))
    mirrored = make_problem(problem.image, np.where(problem.labels == 128, 128, 255 - problem.labels))
    assert abs(solve(problem, 1e-9, 1000).alpha + solve(mirrored, 1e-9, 1000).alpha - 1).max() < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flipping_the_image_flips_alpha(axis):
    problem = noisy((3, 10, 24))
    flipped = replace(problem, **{name: np.flip(getattr(problem, name), axis) for name in ("image", "labels", "known")})
    assert abs(np.flip(solve(flipped, 1e-9, 1000).alpha, axis) - solve(problem, 1e-9, 1000).alpha).max() < 1e-5


@pytest.mark.parametrize("limits", [(0.0, 1e300), (0.0, 1e-300), (-1e6, 1e6), (1.0, 0.0)])
def test_units_and_sign_of_intensities_do_not_matter(limits):
    problem = noisy((3, 10, 24))
    image = limits[0] + problem.image * (limits[1] - limits[0])
    limits = tuple(sorted(limits))
    alpha = solve(make_problem(image, problem.labels, limits=limits), 1e-9, 1000).alpha
    assert abs(alpha - solve(problem, 1e-9, 1000).alpha).max() < 1e-5


def test_scaling_all_units_of_intensity_changes_nothing():
    """Half the contrast, with half the spatial weights, a quarter of the regularisers and four times the strength of the
    known (its confidence is a squared contrast); the likeness within the unknown has no such law."""
    problem, strengths = noisy((3, 10, 24)), (1.0, 0.05, 1e-12, 1.0)
    faint = replace(problem, image=problem.image / 2)
    one = solve(problem, 1e-10, 1000, weights=(0.1, 1.0, 0.005), strengths=strengths, regulariser=4e-3, eps=4e-6)
    two = solve(faint, 1e-10, 1000, weights=(0.05, 0.5, 0.0025), strengths=(1.0, 0.2, 1e-12, 1.0), regulariser=1e-3, eps=1e-6)
    assert abs(one.alpha - two.alpha).max() < 1e-5


def test_spacing_is_part_of_the_distance():
    problem = noisy((4, 10, 24))
    flat = replace(problem, spacing=(10.0, 1.0, 1.0))
    assert abs(solve(problem, 1e-8, 1000).alpha - solve(flat, 1e-8, 1000).alpha).max() > 1e-4


def test_more_weight_is_the_same_as_larger_voxels():
    problem = noisy((3, 10, 24))
    large = replace(problem, spacing=(4.0, 4.0, 4.0))
    assert np.array_equal(solve(problem, 1e-8, 1000, weights=(0.04, 0.4, 0.004)).alpha, solve(large, 1e-8, 1000, weights=(0.01, 0.1, 0.001)).alpha)


def test_result_does_not_depend_on_threads(monkeypatch):
    problem, results = noisy((20, 64, 130)), []
    for threads in (1, 2, 5):
        monkeypatch.setenv("NUMBA_NUM_THREADS", str(threads))
        results.append(solve(problem, 1e-6, 1000).alpha)
    assert InformationFlow(problem).low.size > 1
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("shape, tol", [((6, 16, 32), 1e-6), ((1, 24, 48), 1e-7)])
def test_agrees_with_an_exact_solution(shape, tol):
    problem = noisy(shape)
    system = InformationFlow(problem)
    matrix, unit, out = np.empty((system.home.size,) * 2), system.zeros(), system.zeros()
    for row, i in zip(matrix, system.home):
        unit[i] = 1.0
        system.apply(unit, out)
        row[:], unit[i] = out[system.home], 0.0
    assert abs(matrix - matrix.T).max() < 1e-12
    exact = np.linalg.solve(matrix, system.residual(system.start(), out)[system.home])
    assert abs(solve(problem, tol, 5000).alpha[problem.labels == 128] - exact).max() < 1e-4


def test_known_estimate_lies_between_the_sides():
    problem = noisy((1, 10, 24))
    estimate, confidence = known_estimate(problem, problem.labels == 128, 7, 0.02, 1e-3)
    middle = problem.image[problem.labels == 128][:, 0]
    assert np.corrcoef(estimate, middle)[0, 1] > 0.99 and (0.2 < confidence).all() and (confidence < 0.6).all()


def test_term_can_be_left_out_and_is_out_without_foreground():
    problem = noisy((1, 10, 24))
    with_it, without = solve(problem, 1e-9, 5000), solve(problem, 1e-9, 5000, known_to_unknown=False)
    assert abs(with_it.alpha - without.alpha).max() > 1e-4
    labels = np.where(problem.labels == 255, 0, problem.labels)
    assert (solve(make_problem(problem.image, labels), 1e-9, 100).alpha == 0).all()


def test_isolated_unknown_voxels_everywhere():
    labels = np.zeros((6, 8, 8), int)
    labels[:, :, 4:] = 255
    for place in [(0, 0, 0), (5, 7, 7), (3, 4, 4), (0, 7, 0), (2, 2, 6)]:
        labels[place] = 128
    alpha = solve(make_problem(np.where(labels == 255, 0.9, 0.1)[..., None], labels), 1e-8, 500).alpha
    assert np.isfinite(alpha).all() and abs(alpha - (labels == 255))[labels != 128].max() == 0


def test_one_unknown_voxel_and_one_of_each_side():
    labels = np.full((3, 8, 8), 128)
    labels[0, 0, 0], labels[2, 7, 7] = 0, 255
    alpha = solve(make_problem(np.random.default_rng(0).random((3, 8, 8, 1)), labels), 1e-8, 2000).alpha
    assert np.isfinite(alpha).all()
    labels[:], labels[1, 4, 4], labels[0] = 0, 128, 255
    assert np.isfinite(solve(make_problem(np.random.default_rng(0).random((3, 8, 8, 1)), labels), 1e-8, 100).alpha).all()


@pytest.mark.parametrize("shape", [(1, 1, 12), (1, 12, 1), (12, 1, 1)])
def test_a_single_line_of_voxels_is_refused(shape):
    labels = np.array([0, 0, 128, 128, 128, 128, 128, 128, 128, 255, 255, 255]).reshape(shape)
    with pytest.raises(InputError, match="at least 3 voxels along each axis"):
        solve(make_problem(np.random.default_rng(0).random((*shape, 1)), labels), 1e-7, 1000)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (100.0, 1.0, 1.0), (1.0, 100.0, 1.0)])
def test_constant_image_gives_an_interpolation(spacing):
    problem = noisy((4, 10, 24))
    alpha = solve(make_problem(np.full_like(problem.image, 0.5), problem.labels, spacing), 1e-8, 5000).alpha
    assert np.isfinite(alpha).all() and alpha.min() > -0.01 and alpha.max() < 1.01


def test_nothing_unknown_gives_what_is_known():
    labels = np.array([[[0, 255, 0, 255]] * 8])
    assert np.array_equal(solve(make_problem(np.zeros((1, 8, 4, 1)), labels), 1e-6, 100).alpha, labels == 255)


def test_nothing_known_is_refused():
    with pytest.raises(InputError, match="^trimap: "):
        solve(make_problem(np.random.default_rng(0).random((1, 8, 8, 1)), np.full((1, 8, 8), 128)), 1e-6, 1000)


@pytest.mark.parametrize("options, name", [
    (dict(neighbours=(500, 7, 5)), "neighbours"), (dict(neighbours=(0, 7, 5)), "neighbours"), (dict(neighbours=20), "neighbours"),
    (dict(neighbours=(2.5, 3, 4)), "neighbours"), (dict(neighbours=(20, 7)), "neighbours"), (dict(neighbours=(True, 7, 5)), "neighbours"),
    (dict(weights=(0.0, 1.0, 1.0)), "weights"), (dict(weights=(np.nan, 1.0, 1.0)), "weights"), (dict(weights=("a", 1.0, 1.0)), "weights"),
    (dict(weights=(1e-80, 1.0, 1.0)), "weight"), (dict(strengths=(1.0, 1.0, 1.0)), "strengths"), (dict(weights=()), "weights"),
    (dict(strengths=(1.0, -1.0, 1.0, 1.0)), "strengths"), (dict(known_to_unknown="yes"), "known_to_unknown"),
    (dict(trimming="all"), "trimming"), (dict(trimming=True), "trimming"), (dict(trimming=np.zeros(2)), "trimming"),
    (dict(regulariser=1e-30), "regulariser"), (dict(regulariser=0), "regulariser"), (dict(regulariser=np.nan), "regulariser"),
    (dict(regulariser="a"), "regulariser"), (dict(precision="half"), "precision"), (dict(precision="single"), "precision"),
])
def test_options_without_meaning_are_refused(options, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        solve(noisy((1, 4, 16)), 1e-6, 100, **options)


def literal_edges(problem, p, side):
    "The edge rule for one voxel, over all known voxels of a side; the nearest one speaks."
    values, places = problem.image.reshape(problem.labels.size, -1), np.argwhere(np.ones(problem.labels.shape, bool)) * problem.spacing
    length = np.sqrt(((places - places[p]) ** 2).sum(1))
    alike = (256 * np.sqrt(((values - values[p]) ** 2).sum(1)) <= 9 - length) & (problem.labels.ravel() == side)
    return problem.known.flat[np.where(alike, length, np.inf).argmin()] if alike.any() else np.nan


def literal_patches(problem, p):
    "The patch rule for one voxel: the windows written out, all known voxels sorted by the distance of their means."
    shape, channels = problem.labels.shape, problem.image.shape[3]
    edge = [(int(n >= 3), int(n >= 3)) for n in shape]
    padded = np.pad(problem.image, [*edge, (0, 0)], mode="edge")
    windows = [padded[tuple(slice(i, i + 1 + 2 * e[0]) for i, e in zip(at, edge))].reshape(-1, channels) for at in np.ndindex(*shape)]
    means = np.array([w.mean(0) for w in windows])
    covariances = np.array([(w - w.mean(0)).T @ (w - w.mean(0)) / len(w) + np.eye(channels) / 256**2 for w in windows])
    places, closest = np.argwhere(np.ones(shape, bool)) * problem.spacing, []
    for side in (255, 0):
        some = near(p, means, places, problem.labels.ravel() == side, 5, 0.0015)
        distances = []
        for q in some:
            middle, step = (covariances[p] + covariances[q]) / 2, means[p] - means[q]
            volume = np.linalg.det(middle) / np.sqrt(np.linalg.det(covariances[p]) * np.linalg.det(covariances[q]))
            distances.append(step @ np.linalg.inv(middle) @ step / 8 + np.log(volume) / 2)
        closest.append((min(distances), problem.known.flat[some[np.argmin(distances)]]))
    (front, inner), (back, outer) = closest
    return inner if front < 0.25 and back > 0.9 else outer if back < 0.25 and front > 0.9 else np.nan


@pytest.mark.parametrize("shape, channels", [((1, 10, 12), 1), ((1, 10, 12), 3), ((4, 6, 14), 1), ((4, 6, 14), 2)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 0.7)])
def test_trimming_is_its_definition(shape, channels, spacing):
    random = np.random.default_rng(channels)
    right = np.arange(shape[2]) >= shape[2] // 2
    labels = np.where(random.random(shape) < 0.5, 128, np.where(right, 255, 0)).astype(np.uint8)
    image = 0.3 + 0.2 * right[:, None] + random.normal(0, 0.02, (*shape, channels))
    problem = replace(make_problem(image, labels, spacing), known=(labels / 255).astype(np.float32) * (labels != 128) * 0.9)
    rows = np.flatnonzero(labels == 128)
    edges = [(literal_edges(problem, p, 255), literal_edges(problem, p, 0)) for p in rows]
    edges = np.array([f if np.isnan(b) else b if np.isnan(f) else np.nan for f, b in edges])
    patches = np.array([literal_patches(problem, p) for p in rows])
    found = {rule: trim(problem, labels == 128, rule) for rule in ("edges", "patches", "both")}
    assert np.array_equal(found["edges"], edges, equal_nan=True) and np.isnan(edges).sum() < edges.size
    assert np.allclose(found["patches"], patches, rtol=1e-6, equal_nan=True) and np.isnan(patches).sum() < patches.size
    assert np.allclose(found["both"], np.where(np.isnan(edges), patches, edges), rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("trimming", ["edges", "patches", "both"])
def test_trimmed_voxels_are_tied_to_the_known_value(trimming):
    problem = noisy((3, 10, 24))
    unknown = problem.labels == 128
    claimed = trim(problem, unknown, trimming)
    estimate, confidence = known_estimate(problem, unknown, 7, 0.3, 1e-3, trimming)
    plain, plain_confidence = known_estimate(problem, unknown, 7, 0.3, 1e-3)
    sure = ~np.isnan(claimed)
    assert sure.any() and not sure.all()
    assert np.array_equal(estimate[sure], claimed[sure]) and (confidence[sure] == 1).all()
    assert np.array_equal(estimate[~sure], plain[~sure]) and np.array_equal(confidence[~sure], plain_confidence[~sure])
    system, without = (InformationFlow(problem, trimming=t) for t in (trimming, "none"))
    assert np.allclose(system.anchor, 0.05 * confidence) and np.allclose((system.flow - without.flow)[system.home],
        0.05 * (confidence * estimate - plain_confidence * plain))


def test_bhattacharyya_distance_of_equal_distributions_is_zero_and_it_is_symmetric():
    random = np.random.default_rng(0)
    a, b = random.random((2, 5, 3))
    s, t = (m @ m.swapaxes(1, 2) + np.eye(3) for m in random.random((2, 5, 3, 3)))
    assert abs(bhattacharyya(a, s, a, s)).max() < 1e-12
    assert np.allclose(bhattacharyya(a, s, b, t), bhattacharyya(b, t, a, s)) and (bhattacharyya(a, s, b, t) > 0).all()


def test_opaque_and_transparent_objects_are_told_apart():
    random, labels = np.random.default_rng(0), np.full((1, 30, 60), 128, np.uint8)
    labels[..., :20], labels[..., 40:] = 0, 255
    opaque = np.where(np.arange(60) < 30, 0.2, 0.8)[:, None] + random.normal(0, 0.03, (1, 30, 60, 1))
    glass = np.where(labels == 128, 0.5, np.where(labels == 0, 0.2, 0.8))[..., None] + random.normal(0, 0.03, (1, 30, 60, 1))
    opaque, glass = make_problem(opaque, labels), make_problem(glass, labels)
    assert transparency(opaque, labels == 128) < 0.0099 < transparency(glass, labels == 128)
    for problem, used in ((opaque, True), (glass, False)):
        auto = solve(problem, 1e-9, 5000, known_to_unknown="auto").alpha
        assert np.array_equal(auto, solve(problem, 1e-9, 5000, known_to_unknown=used).alpha)
    assert transparency(make_problem(opaque.image, np.minimum(labels, 128)), labels == 128) == np.inf


@pytest.mark.parametrize("trimming", ["edges", "patches", "both"])
def test_trimming_survives_constant_images_and_missing_sides(trimming):
    for labels in (noisy((3, 8, 16)).labels, np.minimum(noisy((3, 8, 16)).labels, 128)):
        alpha = solve(make_problem(np.full((3, 8, 16, 1), 0.5), labels), 1e-8, 2000, trimming=trimming, known_to_unknown="auto").alpha
        assert np.isfinite(alpha).all() and alpha.min() > -0.01 and alpha.max() < 1.01


def test_stored_weights_change_only_the_order_of_sums(monkeypatch):
    from medmatting import information_flow as module

    problem = noisy((4, 10, 24), channels=3)
    stored = solve(problem, 1e-8, 1000).alpha
    monkeypatch.setattr(module, "STORED", 0)
    assert abs(stored - solve(problem, 1e-8, 1000).alpha).max() < 1e-6  # packed lists are sorted


@pytest.mark.parametrize("shape, channels", [((1, 40, 90), 1), ((1, 40, 90), 3), ((40, 1, 90), 3)])
@pytest.mark.parametrize("constraint_weight", [None, 20.0])
@pytest.mark.parametrize("local", [1e-9, 1.0, 30.0, 1e4])
def test_factor_of_the_local_term_gives_the_alpha_of_jacobi(shape, channels, constraint_weight, local):
    system = InformationFlow(noisy(shape, channels=channels), strengths=(1.0, 0.01, 0.001, local), constraint_weight=constraint_weight)
    quick = pcg(system, 1e-9)
    system.inner = None
    slow = pcg(system, 1e-9)
    assert abs(quick.x - slow.x).max() < 1e-5 and quick.residual <= 1e-9
    assert quick.iterations < slow.iterations / 3 or local < 1


def test_local_term_that_cannot_be_factorised_falls_back_to_jacobi(monkeypatch):
    from medmatting import information_flow as module

    problem = noisy((1, 20, 40))
    alpha = solve(problem, 1e-9, 5000).alpha
    for name, value in (("factorise", lambda *arguments: None), ("LARGEST", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert abs(solve(problem, 1e-9, 5000).alpha - alpha).max() < 1e-5


@pytest.mark.parametrize("shape, channels", [((6, 24, 60), 1), ((4, 12, 40), 3)])
@pytest.mark.parametrize("options", [{}, dict(constraint_weight=10.0), dict(regulariser=1e-4), dict(strengths=(1.0, 0.01, 0.001, 30.0))])
def test_single_precision_keeps_the_promise(shape, channels, options):
    problem = noisy(shape, channels=channels)
    exact, single = (solve(problem, tol, 20_000, precision=name, **options) for tol, name in ((1e-12, "double"), (1e-6, "single")))
    assert single.precision == "single" and single.residual <= 1e-6
    assert single.nbytes < exact.nbytes  # not by half: lists of positions, and in a small region the windows of the residual, are the same
    assert abs(single.alpha - exact.alpha).max() < 1e-4


def test_single_precision_is_refused_where_its_rounding_may_show():
    "Nothing but the mixture holds alpha; the smallest eigenvalue is 2e-5, and weights are stored with seven digits."
    problem, weak = noisy((6, 24, 60)), dict(strengths=(1.0, 1e-9, 1e-9, 1e-3))
    with pytest.raises(linear.Stalled, match="in this precision"):
        solve(problem, 1e-6, 20_000, precision="single", **weak)
    assert solve(problem, 1e-6, 20_000, **weak).precision == "double"


def test_double_precision_takes_over_where_single_cannot(monkeypatch):
    from medmatting import information_flow as module

    problem = noisy((4, 10, 24))
    assert solve(problem, 1e-6, 1000).precision == "single"
    assert solve(problem, 1e-6, 1000, regulariser=1e-8).precision == "double"

    def stalls(system, *arguments):
        if system.number is np.float32:
            raise linear.Stalled("stalled")
        return linear.pcg_within(system, *arguments)

    monkeypatch.setattr(module, "pcg_within", stalls)
    assert solve(problem, 1e-6, 1000).precision == "double"
    with pytest.raises(linear.ConvergenceError):
        solve(problem, 1e-6, 1000, precision="single")
