"""Compiled regions: one graph each, without breaks, and the same function; and when a run is compiled at all."""

from types import SimpleNamespace

import pytest
import torch

from affmae_engine.config import KernelsConfig, LossConfig, MaskConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder
from affmae_engine.model.masking import draw_mask
from affmae_engine.train import checkpoint, loop
from affmae_engine.train.compile import STEPS_WORTH_COMPILING, compile_regions
from affmae_engine.train.device import pick_device
from affmae_engine.train.distributed import Ranks
from affmae_engine.train.state import Snapshot, TrainState, restore_state, take_snapshot


def losses_and_gradients(model, seed=0):
    torch.manual_seed(seed)
    image = torch.randn(2, 1, 64, 96)
    masks = [draw_mask((8, 12), MaskConfig(), seed=0, index=i) for i in range(2)]
    visible, masked = (torch.stack(part) for part in zip(*masks, strict=True))
    loss = model(image, visible, masked)["loss"]
    return loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_regions_compile_without_breaks_to_the_same_function() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    config = ModelConfig(size="tiny", drop_path=0.0, decoder_dropout=0.0)
    model = MaskedAutoencoder(config, LossConfig())
    names = list(model.state_dict())
    expected, expected_gradients = losses_and_gradients(model)
    # Forward traces, autograd traces and functionalisation as for a card; the code generator itself is left out.
    assert compile_regions(model, backend="aot_eager") == 1 + 5 + 3 + 1 + 4 + 3 + 4
    found, gradients = losses_and_gradients(model)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)
    assert list(model.state_dict()) == names


LONG, SHORT = STEPS_WORTH_COMPILING, STEPS_WORTH_COMPILING - 1


@pytest.fixture
def begin(make_toy, make_config, monkeypatch: pytest.MonkeyPatch):
    """begin(state, steps, compile, device): what the loop decides before the first step on a card with all kernels.

    Returns whether the model was compiled, and the warnings.
    """
    models: list[object] = []
    monkeypatch.setattr(loop, "compile_regions", models.append)
    monkeypatch.setattr(loop, "kernel_backends", lambda *of: {"cluster_attention": "triton"})

    def decide(state: TrainState, steps: int, compile: object = "auto", device: str = "cuda") -> tuple[bool, list[str]]:
        said: list[str] = []
        session = SimpleNamespace(
            config=make_config(steps=steps), state=state, choice=SimpleNamespace(device=torch.device(device)),
            ranks=Ranks(), task=make_toy().task, warn=said.append,
        )  # fmt: skip
        session.config = session.config.model_copy(update={"kernels": KernelsConfig(compile=compile)})
        models.clear()
        loop._accelerate(session)
        return len(models) == 1, said

    return decide


@pytest.fixture
def resumed(make_toy, make_config, make_run):
    """resumed(state, steps, asked, early): a state after step `state.step` of `steps`, saved and restored to be
    continued to `asked`; early: by a release that did not note whether steps are compiled."""

    def make(state: TrainState, steps: int, asked: int, *, early: bool = False) -> TrainState:
        config, task = make_config(steps=steps), make_toy().task
        snapshot: Snapshot = take_snapshot(state, config, task)
        if early:
            del snapshot.state["compiled"]
        run = make_run(config)
        snapshot.write(run)
        new = loop._new_state(make_config(steps=asked), task, pick_device(config.train))
        restore_state(
            checkpoint.Checkpoint(run.checkpoint(state.step), state.step), new, task, make_config(steps=asked)
        )
        return new

    return make


@pytest.fixture
def state(make_toy, make_config) -> TrainState:
    config = make_config()
    return loop._new_state(config, make_toy().task, pick_device(config.train))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("steps", "compiled"), [(LONG, True), (SHORT, False)])
def test_a_run_killed_near_its_end_goes_on_as_it_began(steps, compiled, early, state, begin, resumed) -> None:
    assert begin(state, steps) == (compiled, [])
    assert begin(state, steps) == (compiled, []), "again, with smaller micro-batches"
    state.step = steps - 1
    assert begin(resumed(state, steps, steps, early=early), steps) == (compiled, [])


def test_a_run_that_was_compiled_otherwise_stays_so(state, begin, resumed) -> None:
    """By an earlier release, or by the setting."""
    state.step, state.compiled = LONG - 1, False
    again = resumed(state, LONG, LONG)
    assert begin(again, LONG) == (False, []) and again.compiled is False


@pytest.mark.parametrize(
    ("before", "steps", "compile", "device", "now"),
    [(False, LONG, "auto", "cuda", True), (False, SHORT, True, "cuda", True), (True, SHORT, False, "cuda", False),
     (True, SHORT, "auto", "cpu", False)],
)  # fmt: skip
def test_a_change_is_told(before, steps, compile, device, now, state, begin, resumed) -> None:
    state.step, state.compiled = SHORT, before
    compiled, (warning,) = begin(resumed(state, SHORT, steps), steps, compile, device)
    assert compiled == now
    words = ("were not compiled and are compiled", "were compiled and are not compiled")[before]
    assert words in warning and "up to rounding and the draws of dropout" in warning


def test_without_a_card_nothing_is_decided_for_one(state, begin) -> None:
    assert begin(state, LONG, device="cpu") == (False, []) and state.compiled is None
    assert begin(state, LONG) == (True, []) and state.compiled is True
