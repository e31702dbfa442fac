"""Independent unknown regions: found, solved side by side, identical to solving each alone."""

import tracemalloc

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


@pytest.mark.parametrize("method", ["cf", "lb"])
@pytest.mark.parametrize("options", [{}, dict(constraint_weight=50.0)])
def test_each_lesion_is_solved_as_if_alone_to_the_last_bit(method, options):
    image, trimap = study(CENTRES)
    together = mm.matte(image, trimap, method, **options)
    groups = list(independent_groups(trimap))
    assert len(groups) == len(CENTRES)
    for box, labels in groups:
        assert np.array_equal(mm.matte(image[box], labels, method, **options)[labels == 128], together[box][labels == 128])


def test_a_lesion_reaches_only_its_own_box():
    "One lesion in a study costs and gives what it does in its crop; the rest is background, exactly."
    image, trimap = study(CENTRES[:1])
    alone = mm.matte(image[:24, :24, :24], trimap[:24, :24, :24])
    alpha = mm.matte(image, trimap)
    assert np.array_equal(alpha[:24, :24, :24], alone) and alpha.sum() == pytest.approx(alone.sum())


@pytest.mark.parametrize("method", ["cf", "cf+"])
def test_memory_beyond_the_matte_follows_the_lesions(method, monkeypatch):
    "Allocated at any time beyond the matte: less than half a byte for each voxel of the study, and some systems of one lesion."
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    image, trimap = study(CENTRES)
    hu = np.full((160, 240, 240), -900, np.int16)
    large = np.zeros(hu.shape, np.uint8)
    hu[:48, :60, :64], large[:48, :60, :64] = image * 1400 - 1000, trimap
    hu[-48:, -60:, -64:], large[-48:, -60:, -64:] = image * 1400 - 1000, trimap
    mm.matte(hu[:48, :60, :64], trimap, method, hu_range=(-1000, 400))  # compiled, imported
    tracemalloc.start()
    alpha, info = mm.matte(hu, large, method, hu_range=(-1000, 400), return_info=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - alpha.nbytes < hu.size / 2 + 5e6 * info.megabytes


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
