"""Convolutions as matrix products equal torch's own, in values and gradients."""

import copy

import pytest
import torch
from torch import nn

from clever_zoo.backbones import build_backbone
from training.config import load_recipe
from training.objective import Objective
from training.small_maps import SmallMapConv2d, use_small_map_convolutions


def _pair(conv: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    plain = conv.double()
    network = nn.Sequential(copy.deepcopy(plain))
    use_small_map_convolutions(network)
    return plain, network[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4), (7, 5), (9, 9)])
def test_values_and_gradients_equal_torch(size, kernel, padding, stride, memory_format):
    torch.manual_seed(0)
    plain, products = _pair(nn.Conv2d(6, 5, kernel, stride, padding, bias=False))
    assert type(products) is SmallMapConv2d
    x = torch.randn(3, 6, *size, dtype=torch.double).to(memory_format=memory_format)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    a, b = (conv(i) for conv, i in zip((plain, products), inputs, strict=True))
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, stride=(1, 2), bias=False),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 7, padding=3, bias=False),
        nn.Conv2d(4, 4, 1, padding=1, bias=False),
    ],
)
def test_other_convolutions_are_left_alone(conv):
    network = nn.Sequential(conv)
    use_small_map_convolutions(network)
    assert type(network[0]) is nn.Conv2d


@pytest.mark.parametrize("size", [16, 32, 40])
def test_resnet_keeps_its_tensors_and_its_values(size):
    torch.manual_seed(0)
    plain = build_backbone("resnet50").double().eval()
    products = copy.deepcopy(plain)
    use_small_map_convolutions(products)
    changed = [m for m in products.modules() if isinstance(m, SmallMapConv2d)]
    assert len(changed) == 52  # all but the first of 53
    assert list(products.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, size, size, dtype=torch.double)
    with torch.inference_mode():
        torch.testing.assert_close(products(x), plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("on", [False, True])
def test_the_recipe_decides(on):
    recipe = load_recipe("clever-resnet18.fmnist", [f"run.small_map_products={str(on).lower()}"])
    objective = Objective(recipe)
    for network in (objective.student, objective.teacher):
        assert any(isinstance(m, SmallMapConv2d) for m in network.modules()) is on
