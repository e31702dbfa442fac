"""Independent unknown regions: found, solved side by side, identical to solving each alone."""

import numpy as np
import pytest

import medmatting as mm
from medmatting.regions import BLOCK, independent_groups

RANDOM = np.random.default_rng(3)


def study(centres, shape=(48, 60, 64), radius=5):
    "A volume with balls at some centres, each with an unknown shell."
    grid = np.indices(shape)
    nearest = np.min([np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre))) for centre in centres], axis=0)
    image = np.clip((radius + 2 - nearest) / 4, 0, 1) * 0.6 + 0.2 + RANDOM.normal(0, 0.02, shape)
    return image.clip(0, 1), np.where(nearest < radius - 2, 255, np.where(nearest > radius + 2, 0, 128)).astype(np.uint8)


CENTRES = [(10, 10, 10), (10, 45, 12), (36, 20, 50)]


def test_groups_cover_every_unknown_voxel_once_and_share_no_window():
    labels = (RANDOM.random((40, 50, 60)) > 0.9995) * np.uint8(128)
    labels[0, 0, 0], labels[-1, -1, -1] = 128, 128
    owner = np.zeros(labels.shape, int)
    for number, (box, inside) in enumerate(independent_groups(labels), start=1):
        assert (owner[box][inside == 128] == 0).all()
        owner[box][inside == 128] = number
    assert ((owner > 0) == (labels == 128)).all() and owner.max() > 1
    voxels = np.argwhere(owner)
    for voxel in voxels:
        near = abs(voxels - voxel).max(1) <= 2
        assert len(set(owner[tuple(voxels[near].T)])) == 1


@pytest.mark.parametrize("method", ["cf", "lb"])
@pytest.mark.parametrize("options", [{}, dict(windows="centred"), dict(constraint_weight=50.0), dict(device="cpu", solver="matrix-free")])
def test_a_study_is_its_lesions(method, options):
    image, trimap = study(CENTRES)
    together, info = mm.matte(image, trimap, method, return_info=True, **options)
    for centre in CENTRES:
        box = tuple(slice(max(c - 12, 0), c + 13) for c in centre)
        alone = mm.matte(image[box], trimap[box], method, **options)
        assert abs(alone - together[box]).max() < 1e-5
    assert info.unknown == (trimap == 128).sum() and info.residual <= 1e-6


def test_result_does_not_depend_on_threads(monkeypatch):
    image, trimap = study(CENTRES)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("NUMBA_NUM_THREADS", threads)
        results.append(mm.matte(image, trimap))
    assert np.array_equal(*results)


def test_regions_agree_with_one_joint_solve():
    image, trimap = study(CENTRES)
    assert abs(mm.matte(image, trimap, tol=1e-10) - mm.matte(image, trimap, windows="all", tol=1e-10)).max() < 1e-5


def test_memory_is_that_of_the_largest_regions(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    one = mm.matte(*study(CENTRES[:1]), return_info=True)[1]
    three = mm.matte(*study(CENTRES), return_info=True)[1]
    assert three.megabytes < 1.2 * one.megabytes and three.unknown > 2 * one.unknown


def test_progress_counts_regions_and_errors_surface():
    image, trimap = study(CENTRES)
    seen = []
    mm.matte(image, trimap, progress=lambda solved, left: seen.append((solved, left)))
    assert sorted(seen) == [(1, pytest.approx(2 / 3)), (2, pytest.approx(1 / 3)), (3, pytest.approx(0))]
    with pytest.raises(mm.ConvergenceError):
        mm.matte(image, trimap, max_iterations=2)


def test_block_is_wider_than_a_window():
    assert BLOCK > 2
