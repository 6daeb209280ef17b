"""Networks of timm and torchvision are recognised by their tensors, and run without being named"""
import pytest
import torch

from lps.models.inspect import inspect_model
from lps.models.read import Reading, read_model
from lps.nets.known import architectures_with, known_networks
from lps.nets.named import network_builder, weight_shapes

SMALL = [
    "timm/resnet10t", "timm/mobilenetv3_small_050", "timm/convnext_atto", "timm/regnetx_002", "timm/test_efficientnet",
    "timm/test_vit", "torchvision/mobilenet_v3_small", "torchvision/resnet18", "torchvision/regnet_y_400mf",
]
LARGE = [
    "timm/vit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224", "timm/swin_tiny_patch4_window7_224",
    "timm/efficientnetv2_rw_t", "torchvision/efficientnet_b0", "torchvision/convnext_tiny", "torchvision/vit_b_16",
    "torchvision/swin_t",
]


def built(arch, **settings):
    "Build a network with random weights and three classes"
    torch.manual_seed(0)
    net = network_builder(arch)(num_classes=3, **settings).eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"): buffer.uniform_(.5, 2)
    return net


def check_is_run(arch, tmp_path, **settings):
    "Assert that a network is read from its state dict alone, with the same outputs"
    net = built(arch, **settings)
    torch.save(net.state_dict(), tmp_path/"x.pt")
    model = read_model(tmp_path/"x.pt")
    assert model.architecture.name.partition("(")[0].partition("/")[0] in ("timm", "torchvision")
    x = torch.rand(1, *model.meta["size"])
    with torch.no_grad(): torch.testing.assert_close(model.outputs(x), net(x), rtol=1e-3, atol=1e-4)
    return model


@pytest.mark.parametrize("arch", SMALL)
def test_networks_are_run_without_being_named(arch, tmp_path): check_is_run(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", LARGE)
def test_larger_networks_are_run_without_being_named(arch, tmp_path): check_is_run(arch, tmp_path)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_recognised(channels, tmp_path):
    model = check_is_run("timm/mobilenetv3_small_050", tmp_path, in_chans=channels)
    assert (model.stem, model.channels) == ("conv_stem", channels)


def test_networks_that_share_their_tensors_are_listed(tmp_path):
    "A blurring ResNet has the tensors of a ResNet: the usual one is run, the other is named; arch chooses"
    torch.save(built("torchvision/resnet18").state_dict(), tmp_path/"x.pt")
    found = inspect_model(tmp_path/"x.pt")
    assert "timm/resnetblur18, which has the same tensors" in found.architecture
    blurred = read_model(tmp_path/"x.pt", Reading(arch="timm/resnetblur18"))
    x = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(blurred.outputs(x), found.model.outputs(x))


def test_a_changed_network_is_not_recognised():
    shapes = weight_shapes(built("timm/resnet10t").state_dict())
    assert architectures_with(shapes) == ["timm/resnet10t"]
    assert architectures_with(shapes | {"layer1.0.conv1.weight": (64, 32, 5, 5)}) == []
    assert architectures_with({name: v for name, v in shapes.items() if name != "layer1.0.bn1.bias"}) == []


def test_the_table_lists_both_packages():
    names = [name for digests in known_networks().values() for same in digests.values() for name in same]
    assert len(names) == len(set(names)) > 1400
    assert {name.partition("/")[0] for name in names} == {"timm", "torchvision"}
