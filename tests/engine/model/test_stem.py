"""The stem's parameters; what it computes is tested in tests/kernels."""

from affmae_engine.model.encoder import Stem


def test_parameter_names_and_shapes() -> None:
    expected = {}
    for i, (channels, width) in enumerate([(2, 8), (8, 8), (8, 16)]):
        expected |= {f"convs.{i}.weight": [width, channels, 3, 3], f"convs.{i}.bias": [width]}
        expected |= {f"norms.{i}.weight": [width], f"norms.{i}.bias": [width]}
    parameters = Stem(2, 16, 8, "auto").named_parameters()
    assert {name: list(parameter.shape) for name, parameter in parameters} == expected
