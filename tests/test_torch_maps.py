"""Feature maps (n, channels, …): `DirectPredHead(dim, channel_dim=1)`; rows are positions."""

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from directpred.torch import DirectPredHead, replace_predictor  # noqa: E402

DIM = 5
SHAPES = [(6, DIM, 3, 4), (6, DIM, 7), (9, DIM), (2, DIM, 3, 2, 2), (4, DIM, 1, 1), (7, DIM, DIM)]


def rows(z):
    """The positions of a map, one a row, in float64."""
    return np.moveaxis(z.detach().double().numpy(), 1, -1).reshape(-1, z.shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_positions_and_the_channels_are_mixed_as_by_a_convolution(shape):
    torch.manual_seed(0)
    head = DirectPredHead(DIM, channel_dim=1)
    batches = []
    for _ in range(3):
        z = torch.randn(shape, requires_grad=True)
        weight = head.weight.clone()
        p = head(z)
        assert p.shape == z.shape
        torch.testing.assert_close(p, torch.einsum("nc...,cd->nd...", z, weight))
        p.square().sum().backward()
        grad = 2 * torch.einsum("nd...,cd->nc...", p.detach(), weight)
        torch.testing.assert_close(z.grad, grad)
        head.step()
        batches.append([rows(z)])
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-3)


@pytest.mark.parametrize("channel_dim", [-3, -2, 2])
def test_the_channels_may_be_any_axis(channel_dim):
    shape = [4, 4, 4, 4]
    shape[channel_dim] = DIM
    z = torch.randn(shape)
    head = DirectPredHead(DIM, channel_dim=channel_dim)
    moved = DirectPredHead(DIM, channel_dim=-1)
    for each, x in ((head, z), (moved, z.movedim(channel_dim, -1))):
        each(x.requires_grad_()).sum().backward()
        each.step()
    torch.testing.assert_close(head.weight, moved.weight)


def test_a_map_that_is_as_wide_as_the_channels_is_not_taken_as_rows():
    """(n, c, l) with l = dim: another axis would fit as well, and give another weight."""
    z = torch.randn(8, DIM, DIM)
    with pytest.raises(ValueError, match="which axis"):
        DirectPredHead(DIM)(z)
    head, wrong = (DirectPredHead(DIM, channel_dim=axis) for axis in (1, -1))
    for each in (head, wrong):
        each(z.clone().requires_grad_()).sum().backward()
        each.step()
    assert not torch.allclose(head.weight, wrong.weight, atol=1e-2)
    with pytest.raises(ValueError, match=r"shape|channel"):
        head(torch.randn(8, DIM + 1, DIM))


@pytest.mark.parametrize("channel_dim", [1.5, "1", True])
def test_a_wrong_axis_is_an_error(channel_dim):
    with pytest.raises((TypeError, ValueError), match="channel_dim"):
        DirectPredHead(DIM, channel_dim=channel_dim)


def test_features_without_that_axis_are_an_error_that_changes_nothing():
    head = DirectPredHead(DIM, channel_dim=3)
    with pytest.raises(ValueError, match="along axis 3"):
        head(torch.randn(4, DIM))
    head.step()
    assert int(head.step_count) == 0


def test_evaluation_and_the_saved_state_know_nothing_of_it():
    head, plain = DirectPredHead(DIM, channel_dim=1), DirectPredHead(DIM)
    head(torch.randn(6, DIM, 3, requires_grad=True)).sum().backward()
    head.step()
    plain.load_state_dict(head.state_dict())
    head.eval()
    z = torch.randn(2, DIM, 4)
    torch.testing.assert_close(head(z), plain.eval()(z.movedim(1, -1)).movedim(-1, 1))


class PixPro(nn.Module):
    """A dense model with a predictor of 1x1 convolutions, on maps."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, DIM, 1))
        self.predictor = nn.Sequential(
            nn.Conv2d(DIM, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, DIM, 1)
        )

    def forward(self, x):
        return self.predictor(self.encoder(x))


def test_a_predictor_of_convolutions_is_replaced_in_one_line():
    torch.manual_seed(0)
    model = PixPro()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    head = replace_predictor(model, optimizer)
    batches = []
    head.register_forward_pre_hook(lambda _, args: batches.append([rows(args[0])]))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 2 * DIM, 2 * DIM)).square().mean().backward()
        optimizer.step()
    assert int(head.step_count) == 3
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-3)
