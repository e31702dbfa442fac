"""Single precision against dense exact solutions, and the residual it reports against float64."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import medmatting as mm
from medmatting.assembled import assemble
from medmatting.checks import InputError
from medmatting.closed_form import ClosedForm
from medmatting.closed_form_torch import TorchClosedForm
from medmatting.energy import make_region
from medmatting.learning_based import LearningBased, TorchLearningBased
from medmatting.linear import Stalled, pcg

HOST, CARD = (ClosedForm, LearningBased), (TorchClosedForm, TorchLearningBased)


def nodule(seed, shape=(7, 12, 13), noise=2.0, channels=1):
    "Scaled CT with weak noise, a flat part, single spikes, and a trimap with unknown voxels up to the border."
    random = np.random.default_rng(seed)
    grid = np.indices(shape) - np.array(shape)[:, None, None, None] * random.uniform(0.35, 0.65, 3)[:, None, None, None]
    distance = np.sqrt((grid**2).sum(0))
    hu = -850 + 880 / (1 + np.exp(distance - 3.5)) + random.normal(0, noise, shape)
    hu[:, : random.integers(0, 5)] = -900
    hu[random.random(shape) < 0.01] = 400
    trimap = np.where(distance < 2, 255, np.where(distance > random.uniform(4.5, 6), 0, 128)).astype(np.uint8)
    image = np.stack([np.clip((hu * (1 - 0.1 * c) + 1000) / 1400, 0, 1) for c in range(channels)])
    return image, trimap


def system_of(make, image, trimap, number=np.float64, weight=None):
    region = make_region(trimap)
    values = np.stack([region.spans.gather(channel[region.box]) for channel in image]).astype(number)
    return make(region, values, region.spans.gather((trimap[region.box] == 255) * 1.0), 1e-7, weight)


def exact_alpha(system):
    "Solution of the assembled matrix by dense elimination."
    x, free = system.start(), system.free == 1
    x[free] = np.linalg.solve(assemble(system).toarray(), system.rhs[free])
    return x


@pytest.mark.parametrize("make, card", list(zip(HOST, CARD)))
@given(seed=st.integers(0, 2**32 - 1), weight=st.sampled_from([None, 100.0]))
@settings(max_examples=5, deadline=None)
def test_single_precision_keeps_the_promise(make, card, seed, weight):
    image, trimap = nodule(seed)
    double = system_of(make, image, trimap, weight=weight)
    assume(double.diagonal.min() > 1e-3)  # otherwise `matte` takes double precision
    exact = exact_alpha(double)
    for one in (make, card):
        single = system_of(one, image, trimap, np.float32, weight)
        solution = pcg(single, 1e-6)
        assert abs(single.alpha(solution.x) - exact).max() < 1e-4
        assert solution.residual <= 1e-6


@pytest.mark.parametrize("make", CARD)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_tensors_keep_the_promise_in_both_precisions(make, seed, number):
    image, trimap = nodule(seed)
    exact = exact_alpha(system_of(dict(zip(CARD, HOST))[make], image, trimap))
    system = system_of(make, image, trimap, number)
    solution = pcg(system, 1e-6)
    assert str(system.zeros().dtype) == f"torch.{np.dtype(number)}" and str(solution.x.dtype) == "torch.float64"
    assert abs(system.alpha(solution.x) - exact).max() < 1e-4 and solution.residual <= 1e-6


@pytest.mark.parametrize("make", HOST)
@pytest.mark.parametrize("weight", [None, 50.0])
def test_reported_residual_is_that_of_float64(make, weight, monkeypatch):
    monkeypatch.setattr("medmatting.energy.CHUNK", 128)  # several chunks, in several slabs
    monkeypatch.setattr("medmatting.closed_form.SLAB", 2)
    image, trimap = nodule(5, (9, 20, 22))
    image = image.astype(np.float32).astype(float)
    single, double = system_of(make, image, trimap, np.float32, weight), system_of(make, image, trimap, weight=weight)
    solution = pcg(single, 1e-5)
    assert single.voxels.chunks > 4 and single.image.dtype == single.fits.dtype == single.jacobi.dtype == np.float32
    left, right = double.residual(solution.x, double.zeros()), np.linalg.norm(double.rhs)
    assert np.linalg.norm(left) / right == pytest.approx(solution.residual, rel=1e-4)
    assert abs(single.residual(solution.x, single.zeros()) - left).max() < 1e-6 * abs(left).max()


def test_volumes_with_channels():
    image, trimap = nodule(2, noise=20.0, channels=3)
    image[1:] += np.random.default_rng(0).normal(0, 0.02, image[1:].shape)
    exact = exact_alpha(system_of(ClosedForm, image, trimap))
    for make in (ClosedForm, TorchClosedForm):
        single = system_of(make, image, trimap, np.float32)
        assert abs(single.alpha(pcg(single, 1e-6).x) - exact).max() < 1e-4


def test_iterations_are_those_of_double_precision():
    image, trimap = nodule(1, (12, 24, 24), noise=20.0)
    counts = [pcg(system_of(ClosedForm, image, trimap, number), 1e-6).iterations for number in (np.float32, np.float64)]
    assert abs(counts[0] - counts[1]) <= 1


def test_matte_chooses_and_names_the_precision():
    image, trimap = nodule(3)
    one, info = mm.matte(image[0], trimap, return_info=True)
    two, other = mm.matte(image[0], trimap, precision="double", return_info=True)
    assert (info.precision, other.precision) == ("single", "double") and abs(one - two).max() < 1e-5
    assert mm.matte(image[0][3], trimap[3], return_info=True)[1].precision == "double"


def test_single_precision_says_where_it_stalls():
    image, trimap = nodule(4)
    with pytest.raises(Stalled):
        pcg(system_of(ClosedForm, image * 0 + 0.5, trimap, np.float32), 1e-18)


@pytest.mark.parametrize("options", [dict(precision="half"), dict(precision="single", solver="direct")])
def test_impossible_precision_is_refused(options):
    image, trimap = nodule(3)
    with pytest.raises(InputError, match="precision"):
        mm.matte(image[0], trimap, **options)
    with pytest.raises(InputError, match="precision"):
        mm.matte(image[0][3], trimap[3], precision="single")
