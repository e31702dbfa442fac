"""Training: rate, order, restarts that change nothing, clear ends."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_training import RECIPE, Toy, run, samples

from medmatting import InputError
from medmatting.train import Recipe, TrainingError, chosen, learning_rate, make_fabric, read_weights, save_weights, train


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_in_bf16(tmp_path_factory):
    return run(tmp_path_factory.mktemp("bf16"), fabric=make_fabric("cpu", precision="bf16-mixed"))


@given(st.integers(1, 300), st.floats(1e-6, 1.0), st.data())
def test_the_rate_peaks_once_at_the_base_rate(steps, rate, data):
    recipe = Recipe(steps=steps, rate=rate, warmup=data.draw(st.integers(0, steps)))
    rates = [learning_rate(step, recipe) for step in range(steps)]
    assert max(rates) == pytest.approx(rate) and min(rates) > 0
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top + 1]) + sorted(rates[top + 1:], reverse=True)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 5))
def test_each_epoch_visits_every_sample_once(count, batch, seed):
    recipe = Recipe(steps=3 * count, batch=batch, seed=seed)
    order = [i for step in range(recipe.steps) for i in chosen(step, count, recipe)]
    for epoch in range(len(order) // count):
        assert sorted(order[epoch * count:(epoch + 1) * count]) == list(range(count))


def test_the_order_changes_with_epoch_and_seed():
    first, second = (chosen(step, 50, Recipe(steps=2, batch=50)) for step in (0, 1))
    assert first != second != chosen(1, 50, Recipe(steps=2, batch=50, seed=1))


@pytest.mark.parametrize("precision, uninterrupted, draw", [("32-true", "whole", n) for n in range(3)] + [("bf16-mixed", "whole_in_bf16", 3)])
def test_killed_anywhere_and_continued_ends_bit_identical(tmp_path, request, precision, uninterrupted, draw):
    seed = int(os.environ.get("KILL_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"the same kills again: KILL_SEED={seed}")  # pytest shows it where the test fails
    chance = random.Random(seed + draw)
    script = Path(__file__).with_name("toy_training.py")
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, script, tmp_path, precision], stdout=subprocess.PIPE, text=True, env=threads)
    for _ in range(chance.randint(1, RECIPE.steps)):
        assert process.stdout.readline() == "step\n"
    time.sleep(chance.uniform(0, 0.01))  # so that a checkpoint can be half written
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert same(run(tmp_path, fabric=make_fabric("cpu", precision=precision)), request.getfixturevalue(uninterrupted))
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["checkpoint.pt"]


def test_half_precision_changes_the_result(whole, whole_in_bf16):
    assert not same(whole, whole_in_bf16)


def test_a_finished_run_is_not_run_again(tmp_path):
    run(tmp_path)
    stamp = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert same(run(tmp_path), run(tmp_path)) and (tmp_path / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_two_processes_equal_one(tmp_path):
    alone = run(tmp_path / "alone", Toy(dropout=0.0))
    code = (f"from medmatting.train import make_fabric; from toy_training import shared; from pathlib import Path\n"
            f"if __name__ == '__main__':\n"
            f"    fabric = make_fabric('cpu', 2)\n    fabric.launch(shared, Path({str(tmp_path / 'two')!r}), {str(tmp_path / 'two.pt')!r})\n")
    (tmp_path / "start.py").write_text(code)
    subprocess.run([sys.executable, tmp_path / "start.py"], check=True, capture_output=True,
                   env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    for name, value in torch.load(tmp_path / "two.pt", weights_only=True).items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-4, atol=1e-5)


class Breaks(Toy):
    def forward(self, batch):
        terms = super().forward(batch)
        self.calls = getattr(self, "calls", 0) + 1
        return {"loss": terms["loss"] * (float("nan") if self.calls == 18 else 1)}


def test_a_loss_that_is_no_number_stops_with_step_and_samples(tmp_path):
    with pytest.raises(TrainingError, match=r"step 17: .* on point \d+, point \d+, point \d+, point \d+; the last good checkpoint"):
        run(tmp_path, Breaks())
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(kept["history"]) == 15 and all(v.isfinite().all() for v in kept["model"].values())


class BreaksBackward(Breaks):
    def forward(self, batch):
        terms = Toy.forward(self, batch)
        self.calls = getattr(self, "calls", 0) + 1
        root = (0 * terms["loss"]).sqrt() if self.calls == 20 else 0  # 0, and its slope is infinite
        return {"loss": terms["loss"] + root}


def test_weights_that_are_no_numbers_do_not_replace_a_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"step 19: the loss was finite, its gradient on point \d+, .* was not; the last good checkpoint"):
        run(tmp_path, BreaksBackward())
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(kept["history"]) == 15 and all(v.isfinite().all() for v in kept["model"].values())


def test_clipping_does_not_hide_the_step_of_a_gradient_that_is_no_number(tmp_path):
    with pytest.raises(TrainingError, match="step 19: the loss was finite, its gradient on point"):
        run(tmp_path, BreaksBackward(), Recipe(**{**RECIPE.__dict__, "clip": 5.0}))
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(kept["history"]) == 15 and all(v.isfinite().all() for v in kept["model"].values())


def test_another_recipe_is_refused(tmp_path, whole):
    run(tmp_path, recipe=RECIPE)
    with pytest.raises(InputError, match="rate=0.5 where the run in .* has 0.01"):
        run(tmp_path, recipe=Recipe(**{**RECIPE.__dict__, "rate": 0.5}))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainingError, match="not a whole checkpoint .* delete it to start again"):
        run(tmp_path)


PARTS = ["model", "optimiser", "scaler", "recipe", "history"]
INNER = ["model/body.0.weight", "optimiser/state", "optimiser/param_groups"]


@pytest.mark.parametrize("damage", ["removed", "None"])
@pytest.mark.parametrize("part", PARTS + INNER)
def test_a_checkpoint_with_a_part_missing_is_named(tmp_path, part, damage):
    run(tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert sorted(kept) == sorted(PARTS)
    *outer, last = part.split("/")
    holder = kept[outer[0]] if outer else kept
    if damage == "removed":
        del holder[last]
    else:
        holder[last] = None
    torch.save(kept, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match=f"{'or damaged' if outer else part + ' missing or damaged'}.* delete it to start again"):
        run(tmp_path)


@pytest.mark.parametrize("content", [None, [], {}, {"history": [None]}])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    run(tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**kept, **content} if content else content, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="not a whole checkpoint .*history.* delete it to start again"):
        run(tmp_path)


def test_the_checkpoint_of_another_network_is_named(tmp_path):
    run(tmp_path)
    other = Toy()
    other.body[0] = torch.nn.Linear(6, 31)
    other.body[3] = torch.nn.Linear(31, 1)
    with pytest.raises(TrainingError, match="the checkpoint of another network"):
        run(tmp_path, other)


def test_the_watcher_does_not_change_the_run(tmp_path, whole):
    seen = []
    watched = run(tmp_path, watch=lambda step, model: seen.append(step) or {"noise": torch.rand(3).sum()})
    assert same(watched, whole) and seen == list(range(4, 60, 5))


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=3, batch=0), dict(steps=3, rate=float("nan")), dict(steps=3, rate=0),
                                 dict(steps=3, warmup=4), dict(steps=3, clip=-1.0), dict(steps=2.5),
                                 dict(steps=3, rate=None), dict(steps=3, rate="fast"), dict(steps=3, weight_decay=None)])
def test_impossible_recipes_are_refused(bad):
    with pytest.raises(InputError):
        Recipe(**bad)


def test_no_samples_and_unknown_devices_are_refused(tmp_path):
    with pytest.raises(InputError, match="samples: got none"):
        train(Toy(), [], RECIPE, tmp_path)
    with pytest.raises(InputError, match="save_every: got 0"):
        run(tmp_path, save_every=0)
    with pytest.raises(InputError, match="device: got 'gpu'"):
        make_fabric("gpu")
    with pytest.raises(InputError, match="precision: got '8'"):
        make_fabric(precision="8")
    with pytest.raises(InputError, match="processes: got 0"):
        make_fabric("cpu", 0)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_fp16_without_cuda_is_refused_and_not_replaced(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="precision: got '16-mixed' without a CUDA device.*'32-true' or 'bf16-mixed'.*take bf16-mixed"):
        make_fabric(device, 1, "16-mixed")


CARD = dict(data="d", recipe={}, metrics={"sad": 1.0}, licence="CC0-1.0", limits="none known")


def test_weights_come_back_with_their_card(tmp_path):
    toy = Toy()
    toy.kind, toy.config = "toy", {"width": 32}
    save_weights(tmp_path / "a.safetensors", toy, CARD)
    kind, config, card, tensors = read_weights(tmp_path / "a.safetensors")
    assert (kind, config, card) == ("toy", {"width": 32}, CARD)
    assert all(torch.equal(tensors[name], value) for name, value in toy.state_dict().items())


def test_bad_weights_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="a file that exists"):
        read_weights(tmp_path / "none.safetensors")
    toy = Toy()
    toy.kind, toy.config = "toy", {}
    with pytest.raises(InputError, match="nothing for limits"):
        save_weights(tmp_path / "a.safetensors", toy, {k: v for k, v in CARD.items() if k != "limits"})
    save_weights(tmp_path / "a.safetensors", toy, CARD)
    whole = (tmp_path / "a.safetensors").read_bytes()
    for content in (whole[:100], whole[:-10], b"", b"\x80\x04."):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="not a whole weights file"):
            read_weights(tmp_path / "a.safetensors")
