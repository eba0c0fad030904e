from __future__ import annotations

import pytest
import torch
from torch import nn

from models.recomputation import in_chunks, is_recomputing, recomputed


class Layer(nn.Module):
    """A linear layer that writes down the rows it was given, and whether for a second time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.seen = nn.Linear(3, 3), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((len(x), is_recomputing()))
        return nn.functional.dropout(self.linear(x).tanh(), 0.5)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_chunks_change_neither_rows_nor_gradients(size):
    x, layers = torch.randn(5, 3), [Layer(), Layer()]
    for layer in layers:
        torch.manual_seed(1)
        rows = in_chunks(lambda part, layer=layer: layer.linear(part).tanh(), x, size if layer is layers[0] else 0)
        (rows @ rows.T).logsumexp(dim=1).sum().backward()
    for found, wanted in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


def test_each_chunk_is_computed_again_in_the_backward_pass_with_the_same_dropout():
    layer = Layer()
    rows = in_chunks(layer, torch.ones(5, 3), 2)
    assert layer.seen == [(2, False), (2, False), (1, False)]
    rows.sum().backward()
    assert sorted(layer.seen[3:]) == [(1, True), (2, True), (2, True)] and not is_recomputing()
    kept = (rows != 0).sum(dim=0)
    slope = 2 * (1 - (layer.linear(torch.ones(3)).tanh()) ** 2)
    torch.testing.assert_close(layer.linear.bias.grad, kept * slope)


def test_nested_parts_know_that_they_run_again():
    layer = Layer()
    recomputed(lambda x: recomputed(layer, x) + 1, torch.ones(2, 3)).sum().backward()
    assert layer.seen[0] == (2, False) and set(layer.seen[1:]) == {(2, True)}


def test_nothing_is_run_again_without_gradients():
    layer = Layer()
    with torch.no_grad():
        assert not recomputed(layer, torch.ones(2, 3)).requires_grad
    assert layer.seen == [(2, False)]


def test_a_failure_in_the_second_run_does_not_leave_the_flag_set():
    def fails_twice(x):
        if is_recomputing():
            raise RuntimeError("second run")
        return (x * x).sum()

    with pytest.raises(RuntimeError, match="second run"):
        recomputed(fails_twice, torch.ones(2, requires_grad=True)).backward()
    assert not is_recomputing()
