"""The direct solver for images: against SuperLU and dense solves, its tree and factor by definition, and what it refuses."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.sparse import diags_array
from scipy.sparse.linalg import splu

import medmatting as mm
from medmatting import assembled
from medmatting.assembled import LEAF, assemble, factorise, make_stencil, make_tree, solve_direct
from medmatting.closed_form import ClosedForm
from medmatting.energy import make_region
from medmatting.learning_based import LearningBased
from medmatting.linear import ConvergenceError, pcg

RANDOM = np.random.default_rng(12)


def system_of(image, trimap, make=ClosedForm, windows="touching", **options):
    "System of a (D, H, W, C) image."
    region = make_region(trimap, windows)
    gather = lambda values: region.spans.gather(np.ascontiguousarray(values[region.box]))
    return make(region, np.stack([gather(image[..., c]) for c in range(image.shape[-1])]), gather((trimap == 255) * 1.0), **options)


def picture(kind, shape, channels, random):
    "Images that are easy, smooth, flat, quantised, empty but for a spike, and like CT."
    image = random.random((1, *shape, channels))
    smooth = gaussian_filter(image, (0, 5, 5, 0), mode="wrap")
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    spike = np.full_like(image, 0.3)
    spike[:, shape[0] // 2, shape[1] // 2] = 1
    return dict(noise=image, smooth=smooth, flat=np.full_like(image, 0.5), steps=np.round(smooth * 20) / 20, spike=spike,
                ct=np.clip(np.round(1400 * smooth + 20 * image), 0, 1400) / 1400)[kind]


def band(shape, random, density=0.01):
    "A trimap with unknown blots, all borders included."
    unknown = binary_dilation(random.random(shape) < density, iterations=3)
    trimap = np.where(unknown, 128, random.choice([0, 255], size=shape)).astype(np.uint8)[None]
    trimap.ravel()[:3] = 0, 128, 255
    return trimap


def exact(system):
    "Solution with SuperLU in double precision, scaled and refined."
    free = system.free == 1
    matrix, rhs, scale = assemble(system), system.rhs[free], system.jacobi[free] ** 0.5
    factor = splu((diags_array(scale) @ matrix @ diags_array(scale)).tocsc(), permc_spec="MMD_AT_PLUS_A")
    x = np.zeros_like(rhs)
    for _ in range(4):
        x += scale * factor.solve(scale * (rhs - matrix @ x))
    return x


KINDS = ("noise", "smooth", "flat", "steps", "spike", "ct")


@pytest.mark.parametrize("make", [ClosedForm, LearningBased])
@pytest.mark.parametrize("windows, weight", [("touching", None), ("all", 100.0), ("all", None), ("touching", 1.0)])
@pytest.mark.parametrize("kind, channels", list(itertools.product(KINDS, (1, 3))))
def test_direct_is_superlu(kind, channels, windows, weight, make):
    random = np.random.default_rng(3)
    system = system_of(picture(kind, (48, 61), channels, random), band((48, 61), random), make, windows, constraint_weight=weight)
    solution = solve_direct(system)
    assert abs(solution.x[system.free == 1] - exact(system)).max() < 1e-5
    assert solution.residual < 1e-9 and solution.iterations == 0


@pytest.mark.parametrize("shape", [(3, 300), (300, 3), (3, 3), (40, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_thin_strips(shape, channels):
    random = np.random.default_rng(4)
    trimap = np.full((1, *shape), 128, np.uint8)
    trimap.ravel()[[0, 1, -1]] = 0, 255, 255
    system = system_of(picture("smooth", shape, channels, random), trimap)
    assert abs(solve_direct(system).x[system.free == 1] - exact(system)).max() < 1e-5


def test_isolated_unknown_pixels():
    trimap = np.where(np.indices((1, 60, 60)).sum(0) % 7 == 0, 128, 255).astype(np.uint8)
    trimap[:, :, 30:] = np.where(trimap[:, :, 30:] == 128, 128, 0)
    system = system_of(picture("ct", (60, 60), 1, np.random.default_rng(5)), trimap)
    assert abs(solve_direct(system).x[system.free == 1] - exact(system)).max() < 1e-7


@pytest.mark.parametrize("shape", [(1, 40, 50), (7, 8, 9)])
def test_the_factor_is_that_of_the_matrix(shape):
    "U'U is the scaled matrix in order of elimination, for one front and for many."
    trimap = np.full(shape, 128, np.uint8)
    trimap[:, 20:], trimap.ravel()[0] = 255, 0
    system = system_of(RANDOM.random((*shape, 1)), trimap)
    matrix = assemble(system).toarray()
    for leaf in (LEAF, 10**6):
        tree = make_tree(system, leaf)
        factor = factorise(make_stencil(system, tree.order), tree, np.float64)
        upper, at = np.zeros_like(matrix), 0
        for t in range(len(tree.reach)):
            own = range(tree.begin[t], tree.begin[t + 1])
            columns = [*own, *factor.rows[factor.ends[t] : factor.ends[t + 1]]]
            for i in own:
                later = columns[i - own.start :]
                upper[i, later] = factor.values[at : at + len(later)]
                at += len(later)
        assert at == len(factor.values) and (leaf == LEAF) == (len(tree.reach) > 1)
        scaled = matrix[np.ix_(tree.order, tree.order)] * np.outer(factor.scale, factor.scale)
        assert abs(upper.T @ upper - scaled).max() < 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(30, 40), (3, 200), (90, 5), (64, 64)]), st.sampled_from([0.001, 0.02, 0.3]))
def test_separators_separate(seed, shape, density):
    "Each voxel is eliminated once, and no two voxels on different sides of a separator share a window."
    random = np.random.default_rng(seed)
    system = system_of(random.random((1, *shape, 1)), band(shape, random, density))
    tree = make_tree(system)
    assert sorted(tree.order) == list(range(len(tree.order))) and tree.begin[0] == 0 and tree.begin[-1] == len(tree.order)
    matrix = assemble(system)[tree.order][:, tree.order].tocoo()
    node = np.searchsorted(tree.begin, np.arange(len(tree.order)), side="right") - 1
    early, late = np.minimum(*matrix.coords), np.maximum(*matrix.coords)
    assert (tree.reach[node[late]] <= early).all()  # what a voxel is linked to lies in a part that its node completes


def test_the_tree_does_not_grow_with_empty_space():
    random = np.random.default_rng(6)
    trimap = np.zeros((1, 400, 400), np.uint8)
    trimap[0, 2:8, 2:8] = trimap[0, -8:-2, -8:-2] = 128
    trimap[0, 200, 200] = 255
    system = system_of(random.random((1, 400, 400, 1)), trimap)
    tree = make_tree(system)
    assert len(tree.order) == 72 and np.diff(tree.begin).min() > 0


def test_the_promise_on_a_photograph():
    "At the default tolerance the matte lies within 1e-4 of the exact solution: default, direct and iterated."
    case = mm.composite("coffee")
    part = np.s_[100:260, 200:420]
    image, trimap = case.image[part] / 255, case.trimap_r10[part]
    system = system_of(image[None], trimap[None])
    true = np.clip(exact(system), 0, 1)
    for options in ({}, dict(solver="direct"), dict(solver="matrix-free")):
        alpha, info = mm.matte(image, trimap, return_info=True, **options)
        assert abs(alpha[trimap == 128] - true).max() < 1e-4
        assert info.solver == options.get("solver", "direct") and info.residual <= 1e-7


def test_double_precision_takes_over(monkeypatch):
    tried = []

    def count(stencil, tree, precision):
        tried.append(precision)
        return factorise(stencil, tree, precision) if precision is np.float64 else None

    system = system_of(picture("smooth", (30, 30), 1, RANDOM), band((30, 30), RANDOM))
    monkeypatch.setattr(assembled, "factorise", count)
    assert abs(solve_direct(system).x[system.free == 1] - exact(system)).max() < 1e-7
    assert tried == [np.float32, np.float64]


def test_an_uncertain_alpha_is_refused(monkeypatch):
    "A small residual is not enough: the last correction must be small as well."
    system = system_of(picture("ct", (30, 30), 1, RANDOM), band((30, 30), RANDOM))
    monkeypatch.setattr(assembled, "CLOSE", 1e-30)
    with pytest.raises(ConvergenceError, match="alpha may be wrong by"):
        solve_direct(system)


def test_a_huge_constraint_weight_is_the_exact_constraint():
    image, trimap = picture("ct", (30, 30), 1, RANDOM), band((30, 30), RANDOM)
    hard = solve_direct(system_of(image, trimap)).x
    assert abs(solve_direct(system_of(image, trimap, constraint_weight=1e9)).x - hard).max() < 1e-5


def test_one_stored_triangle_in_single_precision():
    system = system_of(RANDOM.random((1, 120, 130, 1)), np.pad(np.full((1, 110, 120), 128, np.uint8), ((0, 0), (5, 5), (5, 5)), constant_values=255))
    tree = make_tree(system)
    values = factorise(make_stencil(system, tree.order), tree).values
    assert values.dtype == np.float32 and values.nbytes < 700 * len(tree.order)


def test_volumes_are_solved_as_well():
    trimap = np.full((7, 9, 11), 128, np.uint8)
    trimap.ravel()[[0, 3, -1]] = 0, 255, 255
    system = system_of(RANDOM.random((7, 9, 11, 1)), trimap)
    assert abs(solve_direct(system).x - pcg(system, 1e-12).x).max() < 1e-8
