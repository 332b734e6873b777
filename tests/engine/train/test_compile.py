"""ViT-MAE's compiled parts: one graph each, the same function, eager in evaluations; AFFMAE has none."""

import pytest
import torch

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.build import build_autoencoder, build_segmenter
from affmae_engine.train.compile import compile_vit


class Backend:
    """Runs what it is given to compile; `runs` counts the calls of each graph."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list) -> object:
        number = len(self.runs)
        self.runs.append(0)

        def run(*arguments: object) -> object:
            self.runs[number] += 1
            return graph(*arguments)

        return run


@pytest.fixture
def backend() -> Backend:
    torch._dynamo.reset()
    return Backend()


def test_training_runs_compiled_and_evaluation_eager(backend: Backend) -> None:
    torch.manual_seed(0)
    model = build_segmenter(ModelConfig(family="vit-mae", size="tiny", drop_path=0), 3)
    names, image = list(model.state_dict()), torch.randn(1, 1, 32, 32)
    expected = model(image)["logits"]
    compile_vit(model, backend)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.train()(image)["logits"], expected)
    assert backend.runs == [1, 1], "encoder and decoder"
    model.eval()
    for edge in (32, 40):
        model(torch.randn(1, 1, edge, edge))
    assert backend.runs == [1, 1]


def test_a_pretraining_step_of_vit_compiles_as_a_whole(backend: Backend) -> None:
    torch.manual_seed(0)
    model = build_autoencoder(ModelConfig(family="vit-mae", size="tiny"), LossConfig())
    cells = torch.stack([torch.randperm(16) for _ in range(2)])
    batch = torch.randn(2, 1, 32, 32), cells[:, :8], cells[:, 8:]
    plain = model(*batch)["loss"]
    compile_vit(model, backend)
    loss = model(*batch)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert backend.runs == [1, 1]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_affmae_is_left_as_it_is() -> None:
    model = build_autoencoder(ModelConfig(size="tiny"), LossConfig())
    compile_vit(model, Backend())
    assert not any("forward" in vars(module) for module in model.modules())
