"""Nearest neighbours: equality with brute force to the last bit, the tie rule, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmatting import neighbours as module
from medmatting.checks import InputError
from medmatting.energy import Problem
from medmatting.neighbours import displacements, nearest, possible_targets, reachable, squared_distance


def make_problem(image, spacing=(1.0, 1.0, 1.0), limits=(0.0, 1.0)):
    labels = np.full(image.shape[:3], 128, np.uint8)
    return Problem(image, limits, labels, np.zeros(image.shape[:3], np.float32), spacing)


def brute_force(problem, queries, neighbours, weight, targets=None, include_self=False):
    "All distances, sorted by distance and then by position."
    shape = problem.labels.shape
    targets = np.ones(shape, bool) if targets is None else targets
    values = problem.scaled((slice(None),) * 3, np.ones(shape, bool)).T
    places = np.argwhere(np.ones(shape, bool))
    scale = [weight * s for s in problem.spacing]
    rows, chosen = np.flatnonzero(queries), np.flatnonzero(targets)
    indices, distances = np.empty((2, rows.size, neighbours))
    for n, row in enumerate(rows):
        d = np.zeros(chosen.size)
        for c in range(values.shape[1]):
            d += (values[row, c] - values[chosen, c]) ** 2
        z, y, x = [(s * abs(places[row, a] - places[chosen, a])) ** 2 for a, s in enumerate(scale)]
        d += z + y + x
        if not include_self:
            d[chosen == row] = np.inf
        order = np.lexsort((chosen, d))[:neighbours]
        indices[n], distances[n] = chosen[order], d[order]
    return rows, indices, distances


def assert_equal(problem, queries, neighbours, weight, **options):
    found = nearest(problem, queries, neighbours, weight, distances=True, **options)
    rows, indices, distances = brute_force(problem, queries, neighbours, weight, **options)
    assert np.array_equal(found.rows, rows)
    assert np.array_equal(found.indices, indices)
    assert np.array_equal(found.distances, distances)


@st.composite
def searches(draw):
    "Small images of all kinds: flat, few levels, noise; volumes and slices; cubes and needles."
    shape = draw(st.sampled_from([(1, 5, 6), (1, 1, 12), (3, 4, 5), (6, 3, 4), (1, 9, 9)]))
    channels = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([1, 2, 5, 0]))
    image = random.random((*shape, channels)) if levels == 0 else random.integers(0, levels, (*shape, channels)) / 8
    spacing = draw(st.sampled_from([(1.0, 1.0, 1.0), (100.0, 1.0, 1.0), (2.5, 0.7, 0.7), (0.01, 1.0, 3.0)]))
    weight = draw(st.sampled_from([1e-9, 0.01, 0.1, 1.0, 30.0]))
    targets = draw(st.sampled_from([None, random.random(shape) < 0.6]))
    queries = random.random(shape) < draw(st.sampled_from([0.2, 1.0]))
    return make_problem(image, spacing), queries, weight, targets, draw(st.booleans()), draw(st.integers(1, 12))


@settings(max_examples=150, deadline=None)
@given(searches(), st.sampled_from([8000, 20]), st.sampled_from([0, 2000]))
def test_equals_brute_force(search, reach, price):
    problem, queries, weight, targets, include_self, neighbours = search
    available = queries.size if targets is None else int(targets.sum())
    if neighbours < available:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "REACH", reach)  # 20: nearly everything is left to the tree or the sweep
            patch.setattr(module, "TREE_QUERY", price)  # 0: the tree costs nothing, there is no sweep
            patch.setattr(module, "TREE_TARGET", price)
            displacements.cache_clear()
            assert_equal(problem, queries, neighbours, weight, targets=targets, include_self=include_self)
        displacements.cache_clear()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tree_alone_equals_brute_force(data):
    "Leaves full and not, nodes without a leaf, duplicate points, axes of length 1, one to four channels; no bound from a walk."
    shape = data.draw(st.sampled_from([(1, 1, 1), (1, 1, 33), (1, 13, 17), (17, 1, 3), (5, 6, 7), (4, 4, 4)]))
    channels, levels = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 4, 1000]))
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    problem = make_problem(random.integers(0, levels, (*shape, channels)) / levels, data.draw(st.sampled_from([(1.0,) * 3, (40.0, 0.3, 1.0)])))
    targets, weight = random.random(shape) < data.draw(st.sampled_from([0.1, 0.5, 1.0])), data.draw(st.sampled_from([1e-9, 0.02, 1.0]))
    targets.flat[0] = True
    include_self, queries = data.draw(st.booleans()), random.random(shape) < 0.3
    neighbours = data.draw(st.integers(1, 10))
    if not queries.any() or neighbours > targets.sum() - (not include_self):
        return
    scale, rows = tuple(weight * s for s in problem.spacing), np.flatnonzero(queries)
    found, squares = np.empty((rows.size, neighbours), np.int32), np.empty((rows.size, neighbours))
    tree = module.Tree(problem, np.flatnonzero(targets), scale)
    module._climb(problem, tree, scale, include_self, rows, np.arange(rows.size), np.full(rows.size, module.FAR), found, squares)
    _, indices, distances = brute_force(problem, queries, neighbours, weight, targets, include_self)
    assert np.array_equal(found, indices) and np.array_equal(squares, distances)


@pytest.mark.parametrize("levels", [1, 3, 0])
def test_walk_and_tree_agree_on_a_larger_image(levels, monkeypatch):
    random = np.random.default_rng(levels)
    image = random.integers(0, levels, (12, 20, 22, 1)) / 4 if levels else random.random((12, 20, 22, 1))
    problem, queries = make_problem(image, (2.0, 0.5, 0.5)), random.random((12, 20, 22)) < 0.3
    for weight in (0.01, 0.3):
        walked = nearest(problem, queries, 7, weight, distances=True)
        monkeypatch.setattr(module, "TREE_QUERY", 0)
        monkeypatch.setattr(module, "TREE_TARGET", 0)  # the tree costs nothing: it gets all it can
        climbed = nearest(problem, queries, 7, weight, distances=True)
        monkeypatch.undo()
        assert np.array_equal(walked.indices, climbed.indices) and np.array_equal(walked.distances, climbed.distances)
        rows = np.zeros(queries.shape, bool)
        rows.flat[walked.rows[::97]] = True
        assert_equal(problem, rows, 7, weight)


@settings(max_examples=60, deadline=None)
@given(searches())
def test_possible_targets_are_all_there_is_to_find(search):
    problem, targets, weight, _, _, neighbours = search
    if neighbours <= targets.sum() < targets.size:
        near = possible_targets(problem, targets, neighbours, weight)
        assert not (near & ~targets).any() and near.sum() >= neighbours
        few, all_ = (nearest(problem, ~targets, neighbours, weight, targets=t) for t in (near, targets))
        assert np.array_equal(few.indices, all_.indices)


def test_possible_targets_leave_out_deep_ones():
    targets = np.zeros((20, 40, 40), bool)
    targets[:, 5:] = True
    problem = make_problem(np.random.default_rng(0).random((20, 40, 40, 1)))
    near = possible_targets(problem, targets, 7, 0.5)
    assert near[:, 5:8].all() and not near[:, 15:].any()
    found = [nearest(problem, ~targets, 7, 0.5, targets=t).indices for t in (near, targets)]
    assert np.array_equal(*found)


@settings(max_examples=60, deadline=None)
@given(searches())
def test_reachable_misses_nobody(search):
    problem, wanted, weight, _, _, neighbours = search
    if neighbours >= wanted.size or wanted.all() or not wanted.any():
        return
    found = nearest(problem, ~wanted, neighbours, weight)
    has_one = wanted.ravel()[found.indices].any(axis=1)
    may_have = reachable(problem, ~wanted, wanted, neighbours, weight)
    assert may_have.ravel()[found.rows[has_one]].all() and not (may_have & wanted).any()


@pytest.mark.parametrize("levels", [4, 0])
def test_reachable_misses_nobody_where_a_short_walk_cannot_tell(levels, monkeypatch):
    random = np.random.default_rng(levels)
    image = random.integers(0, levels, (1, 40, 40, 3)) / 4 if levels else random.random((1, 40, 40, 3))
    problem, wanted = make_problem(image), random.random((1, 40, 40)) < 0.3
    wanted[..., 8:] = False
    found = nearest(problem, ~wanted, 6, 1e-3)
    has_one = wanted.ravel()[found.indices].any(axis=1)
    monkeypatch.setattr(module, "LONG", 1600)  # to the end of the image
    counts = []
    for price in (0, 10**9):  # the distance to the nearest wanted voxel is left out, or asked of a tree
        monkeypatch.setattr(module, "FIRST", price)
        may_have = reachable(problem, ~wanted, wanted, 6, 1e-3)
        assert may_have.ravel()[found.rows[has_one]].all() and not (may_have & wanted).any()
        counts.append(may_have.sum())
    assert counts[1] < (1.0 if levels else 0.8) * counts[0]


def test_reachable_leaves_out_the_far_ones():
    wanted = np.zeros((1, 60, 60), bool)
    wanted[0, 30, 30] = True
    random = np.random.default_rng(0)
    problem = make_problem(0.5 + random.normal(0, 0.01, (1, 60, 60, 1)))
    assert 1 <= reachable(problem, ~wanted, wanted, 8, 1.0).sum() < 50


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 7, 8), (5, 6, 7), (3, 1, 9)]), st.sampled_from([(1.0, 1.0, 1.0), (100.0, 1.0, 0.3)]), st.integers(0, 10**6))
def test_squared_distance_is_the_distance(shape, spacing, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.08
    places = np.argwhere(np.ones(shape, bool)) * spacing
    expected = np.full(mask.size, np.inf)
    for place in np.argwhere(mask) * spacing:
        expected = np.minimum(expected, ((places - place) ** 2).sum(1))
    assert np.allclose(squared_distance(mask, spacing).ravel(), expected, rtol=1e-5)


def test_ties_go_to_the_smaller_position():
    found = nearest(make_problem(np.zeros((1, 5, 5, 1))), np.arange(25).reshape(1, 5, 5) == 12, 6, 1.0, distances=True)
    assert found.indices.tolist() == [[7, 11, 13, 17, 6, 8]] and found.distances.tolist() == [[1, 1, 1, 1, 2, 2]]


def test_spacing_decides_who_is_near():
    image, centre = np.zeros((5, 5, 5, 1)), np.arange(125).reshape(5, 5, 5) == 62
    assert nearest(make_problem(image, (9.0, 1.0, 1.0)), centre, 2, 1.0).indices.tolist() == [[57, 61]]
    assert nearest(make_problem(image, (1.0, 9.0, 9.0)), centre, 2, 1.0).indices.tolist() == [[37, 87]]


@pytest.mark.parametrize("limits, image", [((0, 1e300), [0, 1e300, 5e299, 3.0]), ((0, 1e-300), [0, 1e-300, 5e-301, 0])])
def test_huge_and_tiny_intensities(limits, image):
    problem = make_problem(np.array(image, float).reshape(1, 1, 4, 1), limits=limits)
    assert_equal(problem, np.ones((1, 1, 4), bool), 3, 0.1)


@pytest.mark.parametrize("neighbours", [0, -1, 16, 1.5])
def test_more_neighbours_than_voxels_are_refused(neighbours):
    with pytest.raises(InputError, match="^neighbours: .*from 1 to 15"):
        nearest(make_problem(np.zeros((1, 4, 4, 1))), np.ones((1, 4, 4), bool), neighbours, 1.0)


def test_self_counts_among_the_targets_only_if_it_is_one():
    targets = np.arange(16).reshape(1, 4, 4) < 3
    problem = make_problem(np.zeros((1, 4, 4, 1)))
    assert nearest(problem, ~targets, 3, 1.0, targets).indices.shape == (13, 3)
    with pytest.raises(InputError, match="from 1 to 2"):
        nearest(problem, targets, 3, 1.0, targets)


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf, 1e-90])
def test_weight_must_be_a_weight(weight):
    with pytest.raises(InputError, match="^weight: "):
        nearest(make_problem(np.zeros((1, 4, 4, 1))), np.ones((1, 4, 4), bool), 3, weight)


def test_no_queries_no_neighbours():
    found = nearest(make_problem(np.zeros((1, 4, 4, 1))), np.zeros((1, 4, 4), bool), 3, 1.0)
    assert found.rows.size == 0 and found.indices.shape == (0, 3)
