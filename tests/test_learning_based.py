"""Learning-based matting against its definition, closed form, PyMatting and laws."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medmatting as mm
from medmatting.assembled import assemble
from medmatting.closed_form import ClosedForm
from medmatting.energy import make_region
from medmatting.learning_based import LearningBased, TorchLearningBased

RANDOM = np.random.default_rng(11)


def literal(image, trimap, ridge):
    "Sum of (I - F)'(I - F) over all windows that touch an unknown voxel; image is (voxels, channels)."
    matrix, number = np.zeros((trimap.size, trimap.size)), np.arange(trimap.size).reshape(trimap.shape)
    reach = [range(-1, 2) if n > 1 else range(1) for n in trimap.shape]
    for centre in itertools.product(*[range(1, n - 1) if n > 1 else range(1) for n in trimap.shape]):
        members = [number[tuple(np.add(centre, shift))] for shift in itertools.product(*reach)]
        if 128 not in trimap.ravel()[members]:
            continue
        features = np.column_stack([image[members], np.ones(len(members))])
        # I - K (K + ridge)^-1 = ridge (K + ridge)^-1; by eigenvectors, which keeps the digits at a small ridge
        vectors, values, _ = np.linalg.svd(features, full_matrices=True)
        left_over = ridge / (np.append(values**2, np.zeros(len(members) - len(values))) + ridge)
        matrix[np.ix_(members, members)] += (vectors * left_over**2) @ vectors.T
    return matrix


def case(shape, channels):
    image = RANDOM.random((*shape, channels))
    trimap = RANDOM.choice([0, 128, 255], size=shape, p=[0.3, 0.4, 0.3]).astype(np.uint8)
    trimap.ravel()[[0, 1, 2]] = 0, 128, 255
    return image, trimap


def system_of(image, trimap, make=LearningBased, *options, **named):
    region = make_region(trimap)
    gather = lambda values: region.spans.gather(values[region.box])
    channels = np.stack([gather(image[..., c]) for c in range(image.shape[-1])])
    system = make(region, channels, gather((trimap == 255).astype(float)), *options, **named)
    return system, gather(np.arange(trimap.size).reshape(trimap.shape))


SHAPES = [((4, 5, 6), 1), ((3, 4, 7), 2), ((4, 4, 5), 3), ((1, 6, 9), 1), ((1, 7, 8), 3)]


@pytest.mark.parametrize("ridge", [1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("shape, channels", SHAPES)
def test_operator_is_the_definition(shape, channels, ridge):
    image, trimap = case(shape, channels)
    dense = literal(image.reshape(-1, channels), trimap, ridge)
    system, voxels = system_of(image, trimap, LearningBased, ridge, constraint_weight=1e-300)
    p = np.zeros(trimap.size)
    p[voxels] = RANDOM.normal(size=voxels.size)
    out = np.empty(voxels.size)
    system.apply(p[voxels], out)
    assert abs(out - (dense @ p)[voxels]).max() < 1e-10
    assert abs(system.diagonal - np.diag(dense)[voxels]).max() < 1e-10
    assert abs(assemble(system).toarray() - dense[np.ix_(voxels, voxels)]).max() < 1e-10


@pytest.mark.parametrize("weight", [None, 30.0])
@pytest.mark.parametrize("shape, channels", SHAPES)
def test_torch_is_the_same_operator(shape, channels, weight):
    image, trimap = case(shape, channels)
    system, voxels = system_of(image, trimap, LearningBased, 1e-3, weight)
    card, _ = system_of(image, trimap, TorchLearningBased, 1e-3, weight)
    p = np.where(system.free, RANDOM.normal(size=voxels.size), 0)
    out, tensor = np.empty_like(p), card.zeros()
    system.apply(p, out)
    card.apply(card._dense(p), tensor)
    gather = card.region.spans.gather
    assert abs(gather(tensor.numpy()) - out).max() < 1e-9
    assert abs(gather(card.rhs.numpy()) - system.rhs).max() < 1e-9
    assert abs(gather(card.diagonal.numpy()) - system.diagonal)[system.free == 1].max() < 1e-9


@pytest.mark.parametrize("shape, channels", SHAPES)
def test_alpha_is_the_dense_solution(shape, channels):
    image, trimap = case(shape, channels)
    dense, u = literal(image.reshape(-1, channels), trimap, 1e-3), (trimap == 128).ravel()
    exact = (trimap.ravel() == 255).astype(float)
    exact[u] = np.linalg.solve(dense[u][:, u], -dense[u][:, ~u] @ exact[~u])
    for solver in ("direct", "matrix-free"):
        alpha = mm.matte(image, trimap, "lb", eps=1e-3, solver=solver, tol=1e-11)
        assert abs(alpha.ravel() - exact.clip(0, 1)).max() < 1e-6


def nodule_phantom():
    distance = np.sqrt(sum((axis - n / 2) ** 2 for axis, n in zip(np.ogrid[:24, :32, :32], (24, 32, 32))))
    hu = -850 + 880 * np.clip((9 - distance) / 4, 0, 1) + np.random.default_rng(1).normal(0, 20, distance.shape)
    return hu, np.where(distance < 5, 255, np.where(distance > 10, 0, 128)).astype(np.uint8)


def test_closed_form_is_the_limit_of_a_small_ridge_and_not_of_a_large_one():
    hu, trimap = nodule_phantom()
    gap = lambda ridge: abs(mm.matte(hu, trimap, "lb", hu_range=(-1000, 400), eps=ridge, tol=1e-9)
                            - mm.matte(hu, trimap, "cf", hu_range=(-1000, 400), eps=ridge, tol=1e-9)).max()
    assert gap(1e-9) < 1e-6 and gap(1e-7) < 1e-4 and gap(1e-3) > 2e-3


@pytest.mark.parametrize("name", ["coffee", "chelsea"])
def test_agrees_with_pymatting_at_its_settings(name):
    "All windows, weight 100, its own ridge; both converged."
    import pymatting

    scene = mm.composite(name)
    rows, columns = np.nonzero(np.asarray(scene.trimap_r10) == 128)
    middle = len(rows) // 2
    piece = np.s_[max(rows[middle] - 40, 0) : rows[middle] + 40, max(columns[middle] - 40, 0) : columns[middle] + 40]
    image, trimap = np.asarray(scene.image)[piece] / 255, np.asarray(scene.trimap_r10)[piece]
    known = np.select([trimap == 0, trimap == 255], [0.0, 1.0], 0.5)
    theirs = pymatting.estimate_alpha_lbdm(image, known, laplacian_kwargs=dict(epsilon=1e-4), cg_kwargs=dict(rtol=1e-10))
    ours = mm.matte(image, trimap, "lb", eps=1e-4, constraint_weight=100.0, windows="all")
    assert abs(ours - theirs).max() < 1e-4


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([((4, 5, 6), 1), ((1, 6, 7), 3)]))
def test_affine_alpha_has_no_energy_without_ridge(seed, shape_channels):
    random, (shape, channels) = np.random.default_rng(seed), shape_channels
    image, trimap = random.random((*shape, channels)), np.full(shape, 128, np.uint8)
    system, _ = system_of(image, trimap, LearningBased, 1e-12, constraint_weight=1e-300)
    affine = random.normal(size=channels) @ system.image + random.normal()
    out = np.empty_like(affine)
    assert abs(system.apply(affine, out)) < 1e-6


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_flipping_the_image_flips_the_matte(axes):
    hu, trimap = nodule_phantom()
    alpha = mm.matte(hu, trimap, "lb+", tol=1e-8)
    flipped = mm.matte(np.flip(hu, axes), np.flip(trimap, axes), "lb+", tol=1e-8)
    assert abs(np.flip(alpha, axes) - flipped).max() < 1e-5


def test_calibrated_foreground_and_info():
    hu, trimap = nodule_phantom()
    alpha, info = mm.matte(hu, trimap, "lb+", window=mm.MEDIASTINUM, return_info=True)
    assert np.array_equal(alpha[trimap == 255], mm.calibrate(hu, mm.MEDIASTINUM)[trimap == 255])
    assert info.method == "lb+" and info.residual <= 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("method", ["cf", "lb"])
def test_a_volume_of_one_slice_may_lie_along_any_axis(method, axis):
    image, trimap = RANDOM.random((9, 8)), np.tile(np.uint8([0, 0, 128, 128, 128, 128, 255, 255]), (9, 1))
    flat = mm.matte(image, trimap, method)
    volume = mm.matte(np.expand_dims(image, axis), np.expand_dims(trimap, axis), method, tol=1e-9)
    assert abs(np.squeeze(volume, axis) - flat).max() < 1e-5
