"""Implicit upsampling: the fast forms against Eq. 1 and 2 written as loops, and what is refused."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medmatting.checks import InputError
from medmatting.implicit import (SUMS, ImplicitUpsample, _routes, keep_inside, literal, regular_taps, sample_deform,
                                 sample_grid, saved_bytes, target_size)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    "Small tensors: one thread is quickest, and sums have one order."
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def upsample(disturb=True, dtype=torch.float64, **settings):
    "A small module whose offsets point elsewhere."
    module = ImplicitUpsample(**{"channels": 3, "out_channels": 2, "hidden": 5, **settings}).to(dtype)
    if disturb and module.offsets is not None:
        nn.init.normal_(module.offsets.weight, std=0.3)
        nn.init.normal_(module.offsets.bias, std=1)
    return module


def bilinear(code_map, y, x):
    "A code between codes, written out."
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, code_map.shape[1] - 1), min(x0 + 1, code_map.shape[2] - 1)
    fy, fx = y - y0, x - x0
    return ((1 - fy) * (1 - fx) * code_map[:, y0, x0] + (1 - fy) * fx * code_map[:, y0, x1]
            + fy * (1 - fx) * code_map[:, y1, x0] + fy * fx * code_map[:, y1, x1])  # fmt: skip


def by_loops(module, code_map, size):
    "Eq. 1 and 2 for one map (C, H, W), one query and one code at a time; offsets only at s times the map's size."
    (rows, columns), k, s = code_map.shape[1:], module.kernel, module.scale
    raw = None if module.offsets is None else module.offsets(code_map[None])[0]
    answer = torch.zeros(module.out_channels, *size, dtype=code_map.dtype)
    for i, j in itertools.product(*map(range, size)):
        qy, qx = (i + 0.5) * rows / size[0] - 0.5, (j + 0.5) * columns / size[1] - 0.5
        start = [int((q + (0.5 if k % 2 else 0) + 1e-9) // 1) - (k - 1) // 2 for q in (qy, qx)]
        for a, b in itertools.product(range(k), range(k)):
            dy = dx = 0.0
            if raw is not None:
                phase = (i % s) * s + j % s
                dy, dx = (float(raw[(2 * (a * k + b) + axis) * s * s + phase, i // s, j // s]) for axis in (0, 1))
            y, x = min(max(start[0] + a + dy, 0.0), rows - 1.0), min(max(start[1] + b + dx, 0.0), columns - 1.0)
            seen = (qy - y, qx - x) if module.coordinates == "relative" else (dy, dx)
            answer[:, i, j] += module.mlp(torch.cat([bilinear(code_map, y, x), code_map.new_tensor(seen)]))
    return answer


@pytest.mark.parametrize("backend", SUMS)
@pytest.mark.parametrize("coordinates", ["relative", "offset"])
@pytest.mark.parametrize("kernel, scale", [(1, 1), (1, 3), (2, 2), (2, 3), (3, 2)])
def test_region_aware_equals_loops_over_equation_2(kernel, scale, coordinates, backend):
    module = upsample(kernel=kernel, scale=scale, coordinates=coordinates, backend=backend)
    features = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        got = module(features)
        want = torch.stack([by_loops(module, one, got.shape[2:]) for one in features])
    assert torch.allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (7, 11), (2, 1)])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_regular_codes_equal_loops_over_equation_1_at_any_size(kernel, size):
    module = upsample(kernel=kernel, learn_offsets=False)
    features = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(module(features, size=size)[0], by_loops(module, features[0], size), atol=1e-10)


@pytest.mark.parametrize("scale", [1, 2, 3.5, 0.5])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_starts_as_the_local_ensemble(kernel, scale):
    aware, fixed = upsample(False, kernel=kernel), upsample(kernel=kernel, learn_offsets=False)
    fixed.mlp.load_state_dict(aware.mlp.state_dict())
    features = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert torch.equal(aware(features, scale=scale), fixed(features, scale=scale))


def test_offsets_learn_from_the_first_step():
    module = upsample(False)
    module(torch.randn(1, 3, 5, 4, dtype=torch.float64)).sum().backward()
    assert module.offsets.weight.grad.abs().max() > 0


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kernel, scale", [(1, 2), (2, 2), (3, 1), (2, 3.5)])
def test_backends_and_the_literal_form_agree_in_single_precision(kernel, scale, start):
    module = upsample(not start, torch.float32, channels=8, hidden=16, kernel=kernel)
    features = torch.randn(2, 8, 9, 7, requires_grad=True)
    size = target_size((9, 7), scale=scale)
    leaves, weights = [features, *module.parameters()], torch.randn(2, 2, *size)
    answers = []
    for call in (lambda: literal(module, features, size), lambda: literal(module, features, size, sample_deform),
                 *(lambda b=b: setattr(module, "backend", b) or module(features, size=size) for b in SUMS)):  # fmt: skip
        answer = call()
        answers.append([answer, *torch.autograd.grad((answer * weights).sum(), leaves)])
    for other in answers[1:]:
        for a, b in zip(answers[0], other):
            assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize("backend", SUMS)
def test_gradients_in_double_precision(backend):
    module = upsample(backend=backend, hidden=3)
    features = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    call = lambda codes, *values: torch.func.functional_call(module, dict(zip(names, values)), (codes,))
    assert torch.autograd.gradcheck(call, (features, *parameters))


def test_samplers_agree_on_the_codes_where_the_kinks_are():
    positions = torch.randint(-2, 9, (2, 4, 6, 5, 2)).float()
    values = torch.randn(2, 3, 6, 7)
    grads = []
    for sampler in (sample_grid, sample_deform):
        leaves = values.clone().requires_grad_(), positions.clone().requires_grad_()
        grads.append(torch.autograd.grad(sampler(leaves[0], keep_inside(leaves[1], (6, 7))).sin().sum(), leaves))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))
    assert (grads[0][1][(positions < 0) | (positions >= torch.tensor([5, 6]))] == 0).all()


def test_a_tie_goes_to_the_next_code():
    assert regular_taps(3, 9, 2)[1][1::3].tolist() == [[0, 1], [1, 2], [2, 3]]  # a query exactly on each code
    assert regular_taps(4, 2, 1)[1].ravel().tolist() == [1, 3]  # halfway between two


def test_phases_are_interleaved_as_pixel_shuffle_does():
    module = upsample(False, kernel=1, scale=2)
    with torch.no_grad():
        module.offsets.bias[:] = torch.arange(8.0)
    offsets = module.learned_offsets(torch.zeros(1, 3, 2, 2, dtype=torch.float64), (4, 4))
    assert offsets[0, 0, :2, :2, 0].tolist() == [[0, 1], [2, 3]] and offsets[0, 0, 2:, 2:, 1].tolist() == [[4, 5], [6, 7]]


def test_the_result_does_not_depend_on_threads(monkeypatch):
    module, features = upsample(dtype=torch.float32), torch.randn(4, 3, 9, 8, requires_grad=True)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("NUMBA_NUM_THREADS", threads)
        answer = module(features)
        results.append([answer, *torch.autograd.grad(answer.sum(), [features, *module.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_half_the_activation_memory_at_most():
    module, features = upsample(dtype=torch.float32, channels=16, hidden=16), torch.randn(1, 16, 16, 16, requires_grad=True)
    given = [features, *module.parameters()]
    kept = {name: saved_bytes(call, given) for name, call in _routes(module, features, (32, 32)).items()}
    assert kept["ours, compiled"] <= kept["literal"] / 2 and kept["ours, grid_sample"] <= kept["literal"] / 2
    # Sixteen hidden numbers for each of four codes of each query: at least their ReLU is remembered.
    assert kept["literal"] > 4 * 32 * 32 * 16 * 4


def test_mixed_precision_keeps_positions_exact():
    module, features = upsample(dtype=torch.float32), torch.randn(1, 3, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(features)
    assert torch.allclose(got.float(), module(features), atol=0.05)


@pytest.mark.parametrize("backend", SUMS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 5), (1, 3, 7, 3), (0, 3, 4, 4)])
def test_small_odd_and_empty_input(shape, backend):
    module = upsample(dtype=torch.float32, backend=backend)
    for scale in (1, 2, 3.5):
        features = torch.randn(shape, requires_grad=True)
        answer = module(features, scale=scale)
        assert answer.shape == (shape[0], 2, *target_size(shape[2:], scale=scale)) and answer.isfinite().all()
        answer.sum().backward()
        assert features.grad.shape == shape


def test_vanilla_with_the_identity_is_nearest_interpolation():
    module = upsample(kernel=1, learn_offsets=False, out_channels=3, hidden=6)
    with torch.no_grad():
        [p.zero_() for p in module.parameters()]
        module.mlp[0].weight[:, :3] = torch.cat([torch.eye(3), -torch.eye(3)])
        module.mlp[2].weight[:] = module.mlp[0].weight[:, :3].T
        picture = torch.randn(1, 3, 5, 8, dtype=torch.float64)
        assert torch.allclose(module(picture, size=(17, 9)), F.interpolate(picture, (17, 9), mode="nearest-exact"))


def test_names_of_the_paper():
    assert [upsample(kernel=k, learn_offsets=learn).function for k, learn in ((1, False), (2, False), (2, True))] == [
        "vanilla", "local ensemble", "region-aware"]  # fmt: skip


@pytest.mark.parametrize("settings", [
    dict(kernel=0), dict(kernel=2.0), dict(kernel=True), dict(scale=0), dict(scale=-1), dict(scale=3.5), dict(channels=0),
    dict(hidden=-3), dict(coordinates="absolute"), dict(backend="triton"), dict(coordinates="offset", learn_offsets=False)])  # fmt: skip
def test_settings_are_refused_by_name(settings):
    with pytest.raises(InputError, match="^" + next(iter(settings))):
        ImplicitUpsample(**{"channels": 3, "out_channels": 2, **settings})


@pytest.mark.parametrize("features", [
    torch.zeros(1, 4, 5, 5), torch.zeros(3, 5, 5), torch.zeros(1, 3, 0, 5), torch.zeros(1, 3, 5, 5, dtype=torch.int64),
    torch.full((1, 3, 2, 2), torch.nan), torch.full((1, 3, 2, 2), torch.inf), [[1.0]]])  # fmt: skip
def test_features_are_refused_by_name(features):
    with pytest.raises(InputError, match="^features"):
        upsample(dtype=torch.float32)(features)


@pytest.mark.parametrize("target", [
    dict(scale=0), dict(scale=-1), dict(scale=torch.nan), dict(scale="2"), dict(scale=(2, 0)), dict(scale=0.01), dict(scale=(1, 2, 3)),
    dict(size=(0, 4)), dict(size=8), dict(size=(4.0, 4)), dict(size=(4, 4), scale=2)])  # fmt: skip
def test_targets_are_refused_by_name(target):
    with pytest.raises(InputError, match="^(size|scale)"):
        upsample(dtype=torch.float32)(torch.zeros(1, 3, 4, 4), **target)


def test_diverged_offsets_are_refused():
    module = upsample(dtype=torch.float32)
    nn.init.constant_(module.offsets.bias, torch.nan)
    with pytest.raises(InputError, match="^offsets.*diverged"):
        module(torch.zeros(1, 3, 4, 4))
