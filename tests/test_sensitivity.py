"""How much outputs notice an error: the random estimate against the Jacobian itself."""

import pytest
import torch
from torch import nn

from downsize.network.capture import capture
from downsize.network.rewrite import aten
from downsize.quantization import sensitivity


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, index):
        return self.second(torch.tanh(self.first(self.table(index)))).mean(1)


def test_the_gram_is_that_of_the_jacobian(monkeypatch):
    # Oracle: torch.autograd.functional.jacobian.
    torch.manual_seed(0)
    model = Tokens().eval()
    index = torch.tensor([[1, 4, 2]])
    network = capture(model, index)
    table = next(node for node in network.graph.nodes if node.target is aten.embedding.default)
    monkeypatch.setattr(sensitivity, "DIRECTIONS", 20000)
    found = sensitivity.output_grams(network, [table], [[index]])[table]

    def tail(value):
        return model.second(torch.tanh(model.first(value))).mean(1)

    value = model.table(index).detach()
    size = tail(value).detach().norm().double()
    jacobian = torch.autograd.functional.jacobian(tail, value)[0, :, 0].double() / size  # type: ignore[index]
    expected = torch.einsum("oti,otj->ij", jacobian, jacobian)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_what_outputs_do_not_depend_on_is_not_there():
    model = Tokens().eval()
    index = torch.tensor([[1, 4, 2]])
    network = capture(model, index)
    table = next(node for node in network.graph.nodes if node.target is aten.embedding.default)
    assert sensitivity.output_grams(network, [table], []) == {}


@pytest.mark.parametrize("batch", [1, 2])
def test_the_gram_predicts_what_an_error_does(batch):
    # Oracle: the network run with the error, many times; both to first order.
    torch.manual_seed(1)
    model = Tokens().eval()
    index = torch.randint(11, (batch, 3))
    network = capture(model, index)
    table = next(node for node in network.graph.nodes if node.target is aten.embedding.default)
    pieces = [[index]] * 300
    gram = sensitivity.output_grams(network, [table], pieces)[table] / len(pieces)
    with torch.no_grad():
        value = model.table(index)
        outputs = model(index)

        def tail(moved):
            return model.second(torch.tanh(model.first(moved))).mean(1)

        errors = [1e-3 * torch.randn(value.shape) for _ in range(2000)]
        measured = sum(float((tail(value + error) - outputs).square().sum() / outputs.square().sum()) for error in errors) / len(errors)
    # Errors that are independent at each position: the trace counts.
    assert measured == pytest.approx(1e-6 * float(gram.trace()), rel=0.15)
