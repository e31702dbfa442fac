"""Bayesian matting against a literal loop, analytic cases, laws and bad input."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmatting import linear
from medmatting.bayesian import MAX_CLUSTERS, solve
from medmatting.brain_growth import load
from medmatting.checks import InputError
from medmatting.energy import Problem
from medmatting.photographs import composite


def problem(image, trimap, spacing=(1.0, 1.0), limits=(0.0, 1.0)):
    voxels = np.asarray(image).reshape(1, *trimap.shape, -1)
    return Problem(voxels, limits, trimap[None], (trimap[None] == 255).astype(np.float32), (1.0, *spacing))


def matte(image, trimap, spacing=(1.0, 1.0), limits=(0.0, 1.0), tol=1e-7, max_iterations=20_000, **options):
    solved = solve(problem(image, trimap, spacing, limits), tol, max_iterations, None, **options)
    alpha = solved.alpha[0]
    assert solved.alpha.dtype == np.float32 and np.isfinite(alpha).all() and alpha.min() >= 0 and alpha.max() <= 1
    assert (alpha[trimap == 255] == 1).all() and (alpha[trimap == 0] == 0).all()
    return alpha


# The method once more, literally: plain loops, printed equations, no shared code.


def literal_clusters(samples, limit):
    "Split the cluster of largest variance at its mean; samples are (colour, weight)."
    def model(members):
        weights = np.array([w for _, w in members])
        values = np.array([v for v, _ in members])
        mean = (weights[:, None] * values).sum(0) / weights.sum()
        spread = sum(w * np.outer(v - mean, v - mean) for v, w in members) / weights.sum()
        return mean, spread + 1e-5 * np.eye(values.shape[1])

    clusters = [samples]
    while len(clusters) < MAX_CLUSTERS:
        models = [model(members) for members in clusters]
        values = [np.linalg.eigvalsh(spread)[-1] for _, spread in models]
        worst = int(np.argmax(values))
        if values[worst] <= limit:
            break
        mean, axis = models[worst][0], np.linalg.eigh(models[worst][1])[1][:, -1]
        members = clusters.pop(worst)
        above = [(v - mean) @ axis > 0 for v, _ in members]
        clusters += [[m for m, a in zip(members, above) if a == side] for side in (False, True)]
    return [model(members) for members in clusters]


def literal_pair(c, alpha, front, back, noise, rounds, tol):
    "Alternate the 6 x 6 system and the projection; returns alpha, F, B and the log-likelihood."
    (mean_f, cov_f), (mean_b, cov_b), eye = front, back, np.eye(len(c))
    p, q = np.linalg.inv(cov_f), np.linalg.inv(cov_b)

    def colours(a):
        matrix = np.block([[p + eye * a * a / noise, eye * a * (1 - a) / noise],
                           [eye * a * (1 - a) / noise, q + eye * (1 - a) ** 2 / noise]])
        return np.split(np.linalg.solve(matrix, np.concatenate([p @ mean_f + c * a / noise, q @ mean_b + c * (1 - a) / noise])), 2)

    for _ in range(rounds):
        f, b = colours(alpha)
        before, alpha = alpha, float(np.clip((c - b) @ (f - b) / ((f - b) @ (f - b)), 0, 1))
        if abs(alpha - before) <= tol:
            break
    f, b = colours(alpha)
    rest = c - alpha * f - (1 - alpha) * b
    likelihood = -(rest @ rest / noise + (f - mean_f) @ p @ (f - mean_f) + (b - mean_b) @ q @ (b - mean_b)) / 2
    return alpha, f, b, likelihood


def literal_samples(side, y, x, share, colours, trimap, spacing, radius, sigma, wanted):
    "Samples of one class at a pixel, and their shares."
    pitch = np.array(spacing) / min(spacing)
    distance = {(v, u): np.hypot((v - y) * pitch[0], (u - x) * pitch[1]) for v, u in np.ndindex(trimap.shape)}
    chosen = [i for i, d in distance.items() if d <= radius + 1e-9 and share[side][i] > 0]
    if sum(share[side][i] ** 2 for i in chosen) < wanted:
        known = sorted(d for i, d in distance.items() if trimap[i] == (255, 0)[side])
        far = max(radius, known[:wanted][-1])
        chosen += [i for i, d in distance.items() if radius + 1e-9 < d <= far + 1e-9 and trimap[i] == (255, 0)[side]]
        sigma = sigma * far / radius
    samples = [(colours[side][i], share[side][i] ** 2 * np.exp(-distance[i] ** 2 / (2 * sigma**2))) for i in chosen]
    return samples, sum(share[side][i] for i in chosen)


def literal_matte(image, trimap, spacing=(1.0, 1.0), radius=16.0, sigma=8.0, min_samples=10, sigma_c=0.01,
                  cluster_variance=0.05, alternations=50, tol=1e-7):
    share = np.stack([trimap == 255, trimap == 0]).astype(float)
    colours = np.stack([image, image])
    while True:
        solved = share.sum(0) > 0
        near = np.pad(solved, 1)
        layer = [(y, x) for y, x in np.argwhere(~solved) if near[y:y + 3, x:x + 3].any()]
        if not layer:
            return share[0]
        results = []
        for y, x in layer:
            sides = [literal_samples(s, y, x, share, colours, trimap, spacing, radius, sigma, min_samples) for s in range(2)]
            start = sides[0][1] / (sides[0][1] + sides[1][1])
            fronts, backs = (literal_clusters(samples, cluster_variance) for samples, _ in sides)
            results.append(max((literal_pair(image[y, x], start, f, b, sigma_c**2, alternations, tol) for f in fronts for b in backs),
                               key=lambda result: result[3]))
        for (y, x), (alpha, f, b, _) in zip(layer, results):
            share[:, y, x] = alpha, 1 - alpha
            colours[:, y, x] = np.clip(f, 0, 1), np.clip(b, 0, 1)


def case(seed, shape=(9, 11), channels=3, contrast=0.5):
    "Two noisy tissues, an unknown band, unknown pixels on every border, and one alone in the foreground."
    random = np.random.default_rng(seed)
    alpha = np.clip((np.tile(np.arange(shape[1]), (shape[0], 1)) - 3) / (shape[1] - 7), 0, 1)
    front, back = 0.5 + contrast * (random.random((2, channels)) - 0.5)
    image = alpha[..., None] * front + (1 - alpha[..., None]) * back + random.normal(0, 0.08, (*shape, channels))
    trimap = np.where(alpha == 1, 255, np.where(alpha == 0, 0, 128)).astype(np.uint8)
    trimap[2, -2] = trimap[0, 0] = trimap[4, 0] = trimap[3, -1] = 128
    return np.clip(image, 0, 1), trimap


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("options", [
    {},
    dict(radius=3.0, sigma=2.0, min_samples=12),  # windows grow
    dict(cluster_variance=0.002, radius=5.0),  # clusters split
    dict(spacing=(0.5, 1.7), radius=4.0, sigma=1.5),
    dict(sigma_c=0.1, alternations=400, tol=1e-9),
])
def test_equals_the_literal_method(channels, options):
    image, trimap = case(channels, channels=channels)
    exact = literal_matte(image, trimap, **options)
    alpha = matte(image, trimap, **options)
    assert np.abs(alpha - exact).max() <= 6e-8 + 1e-8  # half a unit of float32 at 1


@pytest.mark.parametrize("seed", [6, 10])
def test_estimated_colours_stay_colours(seed):
    "Near black and white the estimates leave the range; they are cut before they serve as samples."
    image, trimap = case(seed, contrast=2.5)
    exact = literal_matte(image, trimap, sigma_c=0.003)
    assert np.abs(matte(image, trimap, sigma_c=0.003) - exact).max() <= 7e-8


def test_kernel_equals_the_literal_method_in_double_precision():
    from medmatting.bayesian import _State

    image, trimap = case(5)
    task = problem(image, trimap)
    state, pixels = _State(task, (slice(None),) * 3), np.argwhere(trimap == 128)
    options = 400, np.ones(2), 14.0, 8.0, 10, 1e-4, 0.004, 50, 1e-7
    state.peel(pixels, np.zeros((2, len(pixels))), options, None)
    assert np.abs(state.share[0] - literal_matte(image, trimap, radius=14.0, cluster_variance=0.004)).max() < 1e-8


def test_clusters_do_split():
    "The literal comparison would prove little about pairs if one pair were always enough."
    image, trimap = case(3)
    assert np.abs(matte(image, trimap, cluster_variance=0.002) - matte(image, trimap, cluster_variance=1.0)).max() > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_flat_colours_give_the_projection(channels):
    truth = np.tile(np.linspace(0, 1, 20), (8, 1))
    front, back = np.array([0.9, 0.2, 0.4])[:channels], np.array([0.2, 0.3, 0.8])[:channels]
    image = truth[..., None] * front + (1 - truth[..., None]) * back
    image[:, :4], image[:, -4:] = back, front
    trimap = np.full(truth.shape, 128, np.uint8)
    trimap[:, :4], trimap[:, -4:] = 0, 255
    unknown = trimap == 128
    assert np.abs(matte(image, trimap) - truth)[unknown].max() < 1e-6


def test_the_most_likely_pair_wins():
    "Two foreground colours; each unknown pixel is a mixture with one of them, in another part."
    image, trimap = np.zeros((12, 12, 3)), np.zeros((12, 12), np.uint8)
    red, green, back = np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), np.array([0, 0, 0.2])
    image[:], image[:, 8:], image[6:, 8:] = back, red, green
    trimap[:, 8:], trimap[2, 5], trimap[9, 5] = 255, 128, 128
    image[2, 5], image[9, 5] = 0.2 * red + 0.8 * back, 0.7 * green + 0.3 * back
    alpha = matte(image, trimap, alternations=1000)
    assert abs(alpha[2, 5] - 0.2) < 1e-3 and abs(alpha[9, 5] - 0.7) < 1e-3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), channels=st.sampled_from([1, 3]), radius=st.sampled_from([3.0, 16.0]))
def test_laws(seed, channels, radius):
    image, trimap = case(seed, channels=channels)
    alpha = matte(image, trimap, radius=radius, sigma=4.0)
    same = lambda other: np.abs(other - alpha).max() < 1e-5
    swapped = np.select([trimap == 0, trimap == 255], [255, 0], 128).astype(np.uint8)
    assert same(1 - matte(image, swapped, radius=radius, sigma=4.0))
    for turn in (np.flipud, np.fliplr, np.rot90):
        back = {np.rot90: lambda a: np.rot90(a, -1)}.get(turn, turn)
        assert same(back(matte(turn(image).copy(), turn(trimap).copy(), radius=radius, sigma=4.0)))
    assert same(matte(1 - image, trimap, radius=radius, sigma=4.0))
    assert same(matte(image[..., ::-1].copy(), trimap, radius=radius, sigma=4.0))


def test_units():
    "Image values count only through the declared limits, distances only through the shape of a pixel."
    image, trimap = case(1)
    alpha = matte(image, trimap)
    assert np.abs(matte(image * 1400 - 1000, trimap, limits=(-1000.0, 400.0)) - alpha).max() < 1e-5
    assert np.array_equal(matte(image, trimap, spacing=(0.25, 0.25)), alpha)
    assert np.abs(matte(image, trimap, spacing=(1.0, 3.0)) - alpha).max() > 1e-4
    wide = np.clip(image * 1.5 - 0.2, 0, 1)
    assert np.array_equal(matte(image * 1.5 - 0.2, trimap), matte(wide, trimap))  # clipped


def test_threads_do_not_matter(monkeypatch):
    image, trimap = case(2, shape=(30, 40))
    alpha = matte(image, trimap, radius=6.0, sigma=3.0)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "5")
    assert linear.thread_count() == 5 and np.array_equal(matte(image, trimap, radius=6.0, sigma=3.0), alpha)


def test_pixels_out_of_reach_do_not_matter():
    image, _ = case(2, shape=(60, 70))
    trimap = np.where(np.arange(70) < 35, 0, 255)[None].repeat(60, 0).astype(np.uint8)
    trimap[26:34, 31:39] = 128
    near = slice(19, 41), slice(24, 46)  # the window of 7 pixels around the unknown ones
    assert np.array_equal(matte(image, trimap, radius=7.0, sigma=3.0)[near], matte(image[near], trimap[near], radius=7.0, sigma=3.0))


def test_a_real_composite():
    lion = composite("chelsea")
    image, trimap, truth = (a[::3, ::3] for a in (lion.image, lion.trimap_r10, lion.alpha))
    alpha = matte(image, trimap, limits=(0.0, 255.0))
    error = ((alpha - truth)[trimap == 128] ** 2).mean()
    guess = ((0.5 - truth)[trimap == 128] ** 2).mean()
    assert error < 0.02 and error < guess / 5


def test_the_row_of_the_paper(brain_growth_dir):
    "Bayesian row of Table 1 of the 2D paper, Brain-growth: SAD 0.8435, MSE 0.1662, scored where the trimap is 128."
    sums, squares = [], []
    for case in load(brain_growth_dir):
        alpha = np.floor(255 * matte(case.image, case.trimap, limits=(0.0, 255.0))) / 255
        error = (alpha - case.alpha)[case.region]
        sums.append(np.abs(error).sum() / 1000)
        squares.append((error**2).mean())
    assert np.mean(sums) == pytest.approx(0.8435, rel=0.02) and np.mean(squares) == pytest.approx(0.1662, rel=0.02)


def test_account_and_progress():
    image, trimap = case(4)
    seen = []
    solved = solve(problem(image, trimap), 1e-7, 20_000, lambda *step: seen.append(step))
    assert [layer for layer, _ in seen] == list(range(1, len(seen) + 1)) and seen[-1][1] == 0 and len(seen) > 1
    assert solved.iterations <= 50 and solved.stored <= trimap.size and solved.nbytes > 0
    assert solve(problem(image, trimap), 1e-7, 3, None).iterations == 3
    settled = solve(problem(image, trimap), 1e-7, 10**6, None, alternations=100_000)
    assert settled.residual <= 1e-7 < solve(problem(image, trimap), 1e-7, 3, None).residual


# Bad input


def test_extreme_trimaps():
    random = np.random.default_rng(0)
    image = random.random((40, 30, 3))
    corners = np.full((40, 30), 128, np.uint8)
    corners[0, 0], corners[-1, -1] = 255, 0  # one sample of each class; unknown on every border
    matte(image, corners)
    matte(image, corners, radius=2.0, sigma=0.1, min_samples=1000)
    matte(image, corners, spacing=(100.0, 1.0))
    matte(image, corners, spacing=(1.0, 100.0))
    alone = np.where(np.arange(30) < 15, 255, 0)[None].repeat(40, 0).astype(np.uint8)
    alone[5, 3] = alone[20, 15] = alone[0, 0] = alone[39, 29] = 128
    matte(image, alone)
    matte(image[:1], np.array([[255] + [128] * 28 + [0]], np.uint8))  # one row


def test_constant_image_is_undecided():
    trimap = np.full((10, 12), 128, np.uint8)
    trimap[:, :2], trimap[:, -2:] = 0, 255
    alpha = matte(np.full((10, 12), 0.3), trimap)
    assert np.abs(alpha + alpha[:, ::-1] - 1).max() < 1e-5  # nothing but the trimap decides
    image = np.full((10, 12), 0.3)
    image[4, 5] = 0.9  # a colour that neither class has
    matte(image, trimap)


def test_tiny_and_huge_intensities():
    image, trimap = case(6, channels=1)
    alpha = matte(image, trimap)
    for scale in (1e-30, 1e30):
        assert np.abs(matte(image * scale, trimap, limits=(0.0, scale)) - alpha).max() < 1e-5
    matte(image * 1e-30, trimap)


def test_huge_window_is_the_whole_image():
    image, trimap = case(7)
    assert np.array_equal(matte(image, trimap, radius=1e6, sigma=4e4), matte(image, trimap, radius=500.0, sigma=4e4))


def test_volume_is_refused():
    labels = np.full((3, 4, 4), 128, np.uint8)
    labels[0], labels[2] = 0, 255
    volume = Problem(np.zeros((3, 4, 4, 1)), (0.0, 1.0), labels, (labels == 255).astype(np.float32), (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="matte slices, or use method='cf'"):
        solve(volume, 1e-7, 50, None)


@pytest.mark.parametrize("missing", [0, 128, 255])
def test_trimaps_without_a_class_are_refused(missing):
    image, trimap = case(0)
    trimap[trimap == missing] = 255 if missing != 255 else 0
    with pytest.raises(InputError, match=f"no pixel of value {missing}"):
        matte(image, trimap)


def test_calibrated_foreground_is_refused():
    image, trimap = case(0)
    task = problem(image, trimap)
    with pytest.raises(InputError, match="calibrated"):
        solve(replace(task, known=task.known * np.float32(0.7)), 1e-7, 50, None)


@pytest.mark.parametrize("name, values", [
    ("radius", (0.5, -1, np.nan, np.inf, "25", None, True)),
    ("sigma", (0, 0.5, np.nan, "8")),
    ("min_samples", (0, 2.5, -3, None)),
    ("sigma_c", (0, -0.1, np.nan, 100)),
    ("cluster_variance", (0, 1e-9, np.nan, 5)),
    ("alternations", (0, 1.5, np.nan, "50")),
])
def test_options_out_of_range_are_refused(name, values):
    image, trimap = case(0)
    for value in values:
        with pytest.raises(InputError, match=f"^{name}: got .*leave it out"):
            matte(image, trimap, **{name: value})
