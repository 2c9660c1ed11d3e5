"""The specification of AST-Seg, executable: `pytest test_astseg.py`.

Each part is compared with something independent of it: a loop over pixels, a closed form,
scikit-learn, an exhaustive search, a number of the paper, or a property.
"""

import dataclasses
import gzip
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

# The sizes here are tiny: several threads would only wait for each other, most on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import astseg
import train
from astseg import ASTSeg, Config

HERE = Path(__file__).parent
SMALL = dict(
    height=32, width=32, slots=3, backbone="tiny", dim_transformer=64, transformer_layers=2,
    dim_feedforward=64, background_kind="simple", background_width=0.1,
)  # fmt: skip


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def close(a, b, tolerance=1e-5):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b).to(a.dtype), atol=tolerance)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -------------------------------------------------------------------------------------------------
# Section 2


@pytest.mark.parametrize("u, v", [(0, 0), (2, 1), (-3, 2), (1, -4), (9, 0), (0, -9)])
def test_translate_is_equation_1_with_zeros_outside(u, v):
    phi = torch.randn(2, 5, 7)
    shifted = astseg.translate(phi, u, v)
    for j, i in itertools.product(range(5), range(7)):
        inside = 0 <= i - u < 7 and 0 <= j - v < 5
        assert torch.equal(shifted[:, j, i], phi[:, j - v, i - u] if inside else torch.zeros(2))


def test_center_of_mass_is_the_sum_of_phi_p_times_p():
    phi = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for j, i in itertools.product(range(4), range(6)):
        expected += phi[:, j, i, None] * torch.tensor([i, j])
    assert close(astseg.center_of_mass(phi), expected, 1e-12)


@pytest.mark.parametrize("u, v", [(3, 2), (-2, 1), (0, -3)])
def test_center_of_mass_and_soft_argmax_follow_a_translation(u, v):
    phi = torch.zeros(16, 16, dtype=torch.float64)
    phi[5:10, 5:10] = torch.randn(5, 5).double()
    phi /= phi.sum()
    shift = torch.tensor([u, v], dtype=torch.float64)
    moved = astseg.center_of_mass(astseg.translate(phi, u, v))
    assert close(moved, astseg.center_of_mass(phi) + shift, 1e-10)
    # A window of a periodic plane loses nothing either, as long as the peak does not wrap around.
    logits = torch.full((16, 16), -200.0).double()
    logits[5:10, 5:10] = torch.randn(5, 5).double()
    moved = astseg.soft_argmax(logits.roll((v, u), (0, 1)))
    assert close(moved, astseg.soft_argmax(logits) + shift, 1e-10)


def test_soft_argmax_takes_any_leading_dimensions_and_logits_of_any_size():
    logits = torch.randn(2, 3, 4, 5, 6)
    assert astseg.soft_argmax(logits).shape == (2, 3, 4, 2)
    logits = torch.zeros(4, 6)
    logits[2, 5] = 1e30
    assert torch.equal(astseg.soft_argmax(logits), torch.tensor([5.0, 2.0]))
    assert close(
        astseg.soft_argmax(logits.clamp(max=3) + 1e4), astseg.soft_argmax(logits.clamp(max=3))
    )


def test_soft_argmax_is_in_fp32_under_autocast_and_for_half_precision():
    logits = torch.randn(8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        position = astseg.soft_argmax(logits)
    assert position.dtype == torch.float32
    assert torch.equal(position, astseg.soft_argmax(logits.float()))
    assert astseg.soft_argmax(logits.double()).dtype == torch.float64


def test_gradient_of_soft_argmax_is_s_times_p_minus_mean():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mean = astseg.soft_argmax(logits)
    softmax = logits.detach().flatten().softmax(0).view(4, 5)
    for axis in range(2):
        (gradient,) = torch.autograd.grad(mean[axis], logits, retain_graph=True)
        p = torch.arange(5) if axis == 0 else torch.arange(4)[:, None]
        assert close(gradient, softmax * (p - mean[axis].detach()), 1e-12)


# -------------------------------------------------------------------------------------------------
# Configuration


def test_the_defaults_are_table_6():
    c, t = Config(), train.Training()
    assert (c.dim_z_what, c.entropy_weight, c.entropy_warmup, c.log_alpha_0) == (
        32,
        1e-2,
        10_000,
        11,
    )
    assert (c.scale_min, c.scale_max) == (1.3, 24)
    assert (c.dim_transformer, c.transformer_heads, c.dim_feedforward, c.transformer_layers) == (
        256, 8, 512, 6,
    )  # fmt: skip
    assert (t.background_batch, t.background_lr, t.background_steps) == (128, 2e-3, 500_000)
    assert (t.batch, t.lr, t.steps, t.phase2_steps, t.warmup) == (64, 4e-5, 125_000, 30_000, 5_000)


@pytest.mark.parametrize(
    "dataset, side, slots, anisotropic",
    [
        ("clevrtex", 128, 10, True),
        ("clevr", 128, 10, False),
        ("objectsroom", 64, 3, True),
        ("shapestacks", 64, 6, False),
    ],
)
def test_the_paper_settings_of_each_data_set(dataset, side, slots, anisotropic):
    c = Config.paper(dataset)
    assert (*c.size, c.slots, c.anisotropic) == (side, side, slots, anisotropic)
    assert (
        c.slots + c.dim_latent
        == {"objectsroom": 38, "shapestacks": 40, "clevr": 44, "clevrtex": 45}[dataset]
    )
    assert Config.paper(dataset, transformer=False).transformer is False


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(slots=0), "slots is 0: it must be at least 1"),
        (dict(dim_z_what=0), "dim_z_what is 0"),
        (dict(scale_min=5, scale_max=5), "scale_min is 5 and scale_max 5"),
        (dict(scale_min=0), "0 < scale_min"),
        (dict(generator="resnet"), "generator is 'resnet': use one of segformer, unet"),
        (dict(backbone="b9"), "backbone is 'b9'"),
        (dict(refinement_start="zero"), "refinement_start is 'zero'"),
        (dict(background_kind="hard"), "background_kind is 'hard'"),
        (dict(height=31, width=64), "segformer generator cannot take images of 31x64"),
        (dict(height=31, width=31, generator="unet"), "unet generator cannot take images of 31x31"),
        (dict(height=40, width=210, generator="unet"), "at least 64 pixels"),
        (dict(height=195, width=195), "no schedule for images of 195x195"),
        (dict(height=5000, width=64), "no schedule for images of 5000x64"),
        (dict(transformer_heads=7), "heads must divide the width"),
        (dict(dim_transformer=32, refinement_start="identity"), "identity start needs at least"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(background_width=0), "background_width is 0"),
        (dict(unet_width=-1), "unet_width is -1"),
        (dict(entropy_weight=-1), "entropy_weight is -1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Config(**change)
    assert "\n" not in str(error.value)


def test_an_unknown_paper_data_set_is_refused():
    with pytest.raises(ValueError, match="no data set 'coco'"):
        Config.paper("coco")


# -------------------------------------------------------------------------------------------------
# Section 4.1: generators


@pytest.mark.parametrize(
    "channels, count", [(38, 22_237_860), (40, 22_242_304), (44, 22_251_432), (45, 22_253_764)]
)
def test_unet_has_the_parameters_of_table_8(channels, count):
    assert parameters(astseg.UNetGenerator(channels)) == count


def test_unet_has_a_sixth_level_above_200_pixels():
    assert parameters(astseg.UNetGenerator(43, 200, 320)) == 15_165_376


@pytest.mark.parametrize("channels, count", [(38, 47_251_686), (45, 47_257_069)])
def test_segformer_b3_has_the_parameters_of_the_authors(channels, count):
    with torch.device("meta"):
        assert parameters(astseg.SegformerGenerator(channels, "b3")) == count


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (64, 40)])
def test_generators_take_even_and_odd_sizes(height, width):
    images = torch.rand(2, 3, height, width)
    quarter = (math.ceil(height / 4), math.ceil(width / 4))
    assert astseg.SegformerGenerator(7, "tiny")(images).shape == (2, 7, *quarter)
    unet = astseg.UNetGenerator(7, height, width, factor=0.1)
    assert unet(images).shape == (2, 7, height, width)


@pytest.mark.parametrize("size, height, width", [("tiny", 33, 47), ("b0", 64, 96)])
def test_the_reordered_decoder_says_what_the_library_says(size, height, width):
    generator = astseg.SegformerGenerator(9, size, dropout=0.0).double().train()
    library = transformers.SegformerForSemanticSegmentation(generator.segformer.config).double()
    library.train().load_state_dict(generator.segformer.state_dict())
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    expected, ours = library(images).logits, generator(images)
    assert close(ours, expected, 1e-9)
    weights = torch.rand_like(ours)
    for a, b in zip(
        torch.autograd.grad((expected * weights).sum(), library.parameters()),
        torch.autograd.grad((ours * weights).sum(), generator.parameters()),
    ):
        largest = a.abs().max().clamp(min=1e-3)
        assert close(a / largest, b / largest, 1e-9)


def save_segformer(folder: Path, size: str):
    """A classifier in the layout of nvidia/mit-b3: its backbone under the prefix segformer."""
    depths, widths, heads, decoder = astseg.MIT_SIZES[size]
    config = transformers.SegformerConfig(
        depths=list(depths), hidden_sizes=list(widths), num_attention_heads=list(heads)
    )
    model = transformers.SegformerForImageClassification(config)
    model.save_pretrained(folder)
    return model


def test_a_pretrained_backbone_loads_from_a_local_folder(tmp_path):
    classifier = save_segformer(tmp_path / "mit", "tiny")
    generator = astseg.SegformerGenerator(7, "tiny")
    generator.load_backbone(str(tmp_path / "mit"))
    stored = classifier.segformer.state_dict()
    for name, tensor in generator.segformer.segformer.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


def test_a_backbone_that_is_missing_or_of_another_size_is_refused(tmp_path):
    generator = astseg.SegformerGenerator(7, "tiny")
    with pytest.raises(OSError, match="pass a local folder"):
        generator.load_backbone(str(tmp_path / "nothing"))
    save_segformer(tmp_path / "b0", "b0")
    with pytest.raises(ValueError, match="choose the backbone size"):
        generator.load_backbone(str(tmp_path / "b0"))


# -------------------------------------------------------------------------------------------------
# Algorithm 1


def test_encoder_is_equations_11_to_16_pixel_by_pixel():
    K, Z, h, w = 2, 3, 3, 4
    encoder = astseg.Encoder(K, 2, Z)  # no refinement
    maps = torch.randn(1, K + 3 + Z, h, w)
    seen = {}
    encoder.latents = lambda slots: seen.update(slots=slots)
    _, attention = encoder(maps)
    for k in range(K):
        total = sum(math.exp(maps[0, k, j, i]) for j in range(h) for i in range(w))
        x0 = y0 = 0.0
        phi0 = torch.zeros(3 + Z)
        for j, i in itertools.product(range(h), range(w)):
            a = math.exp(maps[0, k, j, i]) / total  # (11)
            assert abs(attention.maps[0, k, j, i].item() - a) < 1e-6
            x0 += a * (2 * i / (w - 1) - 1)  # (12), (14)
            y0 += a * (2 * j / (h - 1) - 1)  # (13), (15)
            phi0 += a * maps[0, K:, j, i]  # (16)
        assert close(attention.position[0, k], torch.tensor([x0, y0]))
        assert close(seen["slots"][0, k], torch.cat((torch.tensor([x0, y0]), phi0)))


@pytest.mark.parametrize("dim_scale", [1, 2])
def test_each_column_moves_only_its_own_latent(dim_scale):
    encoder = astseg.Encoder(2, dim_scale, 4)
    slots = torch.randn(1, 2, 2 + dim_scale + 1 + 4) * 0.1
    before = encoder.latents(slots)
    owners = ["position"] * 2 + ["scale"] * dim_scale + ["activation"] + ["z_what"] * 4
    for column, owner in enumerate(owners):
        changed = slots.clone()
        changed[..., column] += 0.3
        after = encoder.latents(changed)
        for name in astseg.Latents._fields:
            same = torch.equal(getattr(before, name), getattr(after, name))
            assert same != (name == owner), (column, name)


def test_latents_stay_in_their_ranges():
    latents = astseg.Encoder(3, 1, 4, 1.3, 24.0).latents(torch.randn(5, 3, 8) * 10)
    assert latents.position.abs().max() == 1
    assert latents.scale.min() >= 1.3 and latents.scale.max() <= 24
    assert torch.equal(latents.scale[..., 0], latents.scale[..., 1])  # isotropic
    assert latents.activation.min() > 0
    zero = astseg.Encoder(3, 2, 4, 1.3, 24.0).latents(torch.zeros(1, 3, 9))
    assert close(zero.scale, torch.full((1, 3, 2), (1.3 + 24) / 2))
    assert torch.equal(zero.activation, torch.ones(1, 3))


@pytest.mark.parametrize("dim, embedding, projection", [(37, 9_728, 9_509), (36, 9_472, 9_252)])
def test_refinement_has_the_parameters_of_the_paper(dim, embedding, projection):
    refinement = astseg.Refinement(dim)
    assert parameters(refinement.transformer) == 3_162_624
    assert parameters(refinement.embedding) == embedding
    assert parameters(refinement.projection) == projection


@pytest.mark.parametrize("start", ["stock", "identity"])
def test_a_permutation_of_the_slots_permutes_the_refined_slots(start):
    refinement = astseg.Refinement(12, 64, 4, 32, 2, start=start).eval()
    with torch.no_grad():
        for p in refinement.parameters():
            p += 0.02 * torch.randn_like(p)
    slots, order = torch.randn(2, 5, 12), torch.tensor([3, 0, 4, 1, 2])
    assert close(refinement(slots)[:, order], refinement(slots[:, order]))
    other = slots.clone()
    other[:, 0] += 1  # the slots see one another
    assert not close(refinement(slots)[:, 1:], refinement(other)[:, 1:], 1e-4)


def test_the_identity_start_begins_as_the_identity_and_the_stock_start_does_not():
    slots = 0.3 * torch.randn(2, 5, 12)
    identity = astseg.Refinement(12, 128, start="identity").eval()
    stock = astseg.Refinement(12, 128).eval()
    assert (identity(slots) - slots).abs().max() < 0.02
    assert (stock(slots) - slots).abs().max() > 0.2


# -------------------------------------------------------------------------------------------------
# Algorithm 2


@pytest.mark.parametrize(
    "z, size, count", [(32, 32, 51_956), (32, 64, 191_476), (24, 128, 724_468)]
)
def test_glimpse_generator_has_the_shape_and_parameters_of_table_7(z, size, count):
    generator = astseg.GlimpseGenerator(z, size)
    glimpses = generator(torch.randn(2, z))
    assert parameters(generator) == count
    assert glimpses.shape == (2, 4, size, size)
    assert glimpses.min() >= 0 and glimpses.max() <= 1


def test_spatial_transformer_is_bilinear_sampling_pixel_by_pixel():
    G, H, W = 4, 6, 8
    glimpse = torch.rand(1, 1, G, G)
    (x, y), (sx, sy) = (0.2, -0.3), (1.4, 2.2)
    warped = astseg.spatial_transformer(
        glimpse, torch.tensor([[x, y]]), torch.tensor([[sx, sy]]), H, W
    )

    def pixel(row, column):
        return glimpse[0, 0, row, column].item() if 0 <= row < G and 0 <= column < G else 0.0

    for j, i in itertools.product(range(H), range(W)):
        u = sx * ((2 * i + 1) / W - 1 - x)  # image point -> glimpse point, edges at +-1
        v = sy * ((2 * j + 1) / H - 1 - y)
        column, row = ((u + 1) * G - 1) / 2, ((v + 1) * G - 1) / 2
        c, r = math.floor(column), math.floor(row)
        value = sum(
            (1 - abs(row - rr)) * (1 - abs(column - cc)) * pixel(rr, cc)
            for rr in (r, r + 1)
            for cc in (c, c + 1)
        )
        assert abs(warped[0, 0, j, i].item() - value) < 1e-5


@pytest.mark.parametrize("alpha_0", [torch.tensor(0.7), torch.rand(4, 5) + 0.1])
def test_weights_and_composition_are_equations_17_and_18_pixel_by_pixel(alpha_0):
    B, K, H, W = 2, 3, 4, 5
    activation, masks = torch.rand(B, K) * 3, torch.rand(B, K, H, W)
    background, layers = torch.rand(B, 3, H, W), torch.rand(B, K, 3, H, W)
    weights = astseg.occlusion_weights(activation, masks, alpha_0)
    image = astseg.compose(weights, background, layers)
    assert close(weights.sum(1), torch.ones(B, H, W))
    for b, j, i in itertools.product(range(B), range(H), range(W)):
        strength = [alpha_0.expand(H, W)[j, i]] + [
            activation[b, k] * masks[b, k, j, i] for k in range(K)
        ]
        expected = torch.stack(strength) / sum(strength)
        assert close(weights[b, :, j, i], expected)
        color = expected[0] * background[b, :, j, i]
        color = color + sum(expected[k + 1] * layers[b, k, :, j, i] for k in range(K))
        assert close(image[b, :, j, i], color)


def test_renderer_starts_at_alpha_0_and_may_learn_one_a_pixel():
    assert math.isclose(astseg.Renderer(32, 32).alpha_0.item(), math.e**11, rel_tol=1e-5)
    renderer = astseg.Renderer(32, 40, glimpse_size=32, log_alpha_0=2, alpha_0_per_pixel=True)
    assert renderer.alpha_0.shape == (32, 40)
    assert close(renderer.alpha_0, torch.full((32, 40), math.e**2), 1e-4)


# -------------------------------------------------------------------------------------------------
# Background model


@pytest.mark.parametrize(
    "height, width, kind, encoder, decoder",
    [
        (64, 64, "simple", 2_942_624, 7_679_368),
        (64, 64, "complex", 2_900_096, 43_572_712),
        (128, 128, "simple", 3_590_944, 9_331_080),
        (128, 128, "complex", 21_183_616, 48_633_192),
        (200, 320, "simple", 1_056_992, 2_820_488),
        (200, 320, "complex", 989_088, 12_892_136),
    ],
)
def test_background_autoencoder_has_the_parameters_of_the_authors(
    height, width, kind, encoder, decoder
):
    with torch.device("meta"):
        model = astseg.BackgroundAutoencoder(height, width, kind)
    assert (parameters(model.encoder), parameters(model.decoder)) == (encoder, decoder)


@pytest.mark.parametrize(
    "height, width",
    [
        (25, 25),
        (48, 48),
        (49, 61),
        (64, 96),
        (97, 33),
        (192, 150),
        (200, 320),
        (406, 300),
        (30, 180),
    ],
)
def test_background_autoencoder_returns_every_size_that_has_a_schedule(height, width):
    model = astseg.BackgroundAutoencoder(height, width, "simple", 0.05)
    background, error = model(torch.rand(1, 3, height, width))
    assert background.shape == (1, 3, height, width) and error.shape == (1, height, width)
    assert background.min() >= 0 and background.max() <= 1
    assert model.encoder(torch.rand(1, 3, height, width)).shape == (1, 16, 1, 1)


def test_background_schedule_has_the_blocks_of_the_authors():
    for sides, blocks in [
        ((25, 48), 5),
        ((49, 96), 6),
        ((97, 192), 7),
        ((200, 405), 5),
        ((406, 1215), 6),
    ]:
        for side in sides:
            assert len(astseg.background_blocks(side, side)) == blocks
    for side in (24, 193, 199, 5000):
        with pytest.raises(ValueError, match="no schedule"):
            astseg.background_blocks(side, side)


def test_coordinates_run_from_minus_half_to_half_and_are_one_on_a_single_pixel():
    grid = astseg.coordinate_maps(3, 5)
    assert close(grid[0, 0, :, 0], torch.tensor([-0.5, 0, 0.5]))  # rows
    assert close(grid[0, 1, 0], torch.linspace(-0.5, 0.5, 5))  # columns
    assert torch.equal(astseg.coordinate_maps(1, 1), torch.ones(1, 2, 1, 1))


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_coordinates_are_two_more_channels_of_each_image(kind):
    block = astseg.CoordinateConv(kind(5, 16, 4, 2, 1, bias=False))
    x = torch.randn(2, 3, 6, 8)
    appended = torch.cat((x, astseg.coordinate_maps(6, 8).expand(2, -1, -1, -1)), dim=1)
    expected = torch.nn.functional.celu(block.norm(block.convolution(appended)))
    assert close(block(x), expected)


def test_robust_background_loss_is_that_of_a_loop_over_pixels():
    H, W = 3, 80  # wide enough for a pooling window of 3
    images, background, predicted = (
        torch.rand(1, 3, H, W),
        torch.rand(1, 3, H, W),
        torch.rand(1, H, W),
    )
    background[..., :40] = images[..., :40] + 0.01 * torch.randn(1, 3, H, 40)

    def smooth_l1(a, b):
        d = abs(float(a) - float(b))
        return d * d / 2 / (3 / 255) if d < 3 / 255 else d - 3 / 255 / 2

    e = np.array(
        [
            [
                sum(smooth_l1(background[0, c, j, i], images[0, c, j, i]) for c in range(3))
                for i in range(W)
            ]
            for j in range(H)
        ]
    )
    total = 0.0
    for j, i in itertools.product(range(H), range(W)):
        window = e[max(j - 1, 0) : j + 2, max(i - 1, 0) : i + 2]
        weight = math.exp(-6 * np.tanh(window / 0.25).mean())
        total += (e[j, i] + smooth_l1(predicted[0, j, i], e[j, i] / 3)) * weight
    loss = astseg.robust_background_loss(images, background, predicted)
    assert abs(loss.item() - total / (H * W)) < 1e-5


def test_robust_background_loss_sends_no_gradient_through_its_weight_nor_its_target():
    images = torch.rand(1, 3, 4, 4)
    background = (images + 0.5).requires_grad_()  # all errors 0.5 a channel, far in the linear part
    astseg.robust_background_loss(images, background, torch.rand(1, 4, 4)).backward()
    error = 3 * (0.5 - 1.5 / 255)
    assert close(
        background.grad, torch.full((1, 3, 4, 4), math.exp(-6 * math.tanh(error / 0.25)) / 16), 1e-7
    )


# -------------------------------------------------------------------------------------------------
# The whole model


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(anisotropic=False),
        dict(transformer=False),
        dict(generator="unet", unet_width=0.1),
        dict(height=40, width=56),
        dict(alpha_0_per_pixel=True),
    ],
)
def test_the_model_names_everything_it_says(change):
    model = ASTSeg(Config(**{**SMALL, **change})).eval()
    c, B = model.config, 2
    output = model(torch.rand(B, 3, *c.size))
    h, w = output.attention.shape[-2:]
    assert (h, w) == (c.size if c.generator == "unet" else (c.height // 4, c.width // 4))
    shapes = {
        "reconstruction": (B, 3, *c.size),
        "background": (B, 3, *c.size),
        "weights": (B, c.slots + 1, *c.size),
        "layers": (B, c.slots, 3, *c.size),
        "masks": (B, c.slots, *c.size),
        "glimpses": (B, c.slots, 3, 32, 32),
        "glimpse_masks": (B, c.slots, 32, 32),
        "position": (B, c.slots, 2),
        "scale": (B, c.slots, 2),
        "activation": (B, c.slots),
        "z_what": (B, c.slots, 32),
        "attention": (B, c.slots, h, w),
        "attention_position": (B, c.slots, 2),
    }
    assert {name: tuple(value.shape) for name, value in output._asdict().items()} == shapes
    assert close(output.weights.sum(1), torch.ones(B, *c.size))
    composed = astseg.compose(output.weights, output.background, output.layers)
    assert torch.equal(output.reconstruction, composed)


def test_segmentation_is_the_argmax_of_the_weights_and_needs_no_background():
    model = ASTSeg(Config(**SMALL, log_alpha_0=-3.0)).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = model(images).weights.argmax(1)
    model.background = None
    labels = model.segment(images)
    assert torch.equal(labels, expected)
    assert labels.dtype == torch.int64 and labels.unique().numel() > 1


def test_a_known_background_replaces_the_autoencoder():
    model = ASTSeg(Config(**SMALL)).eval()
    images, background = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images, background).background, background)
    model.background = None
    model(images, background)


@pytest.mark.parametrize(
    "images, message",
    [
        (
            torch.rand(3, 32, 32),
            "images have shape (3, 32, 32): this model takes (batch, 3, 32, 32)",
        ),
        (torch.rand(1, 3, 64, 64), "images have shape (1, 3, 64, 64)"),
        (torch.rand(1, 1, 32, 32), "images have shape (1, 1, 32, 32)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images are torch.uint8: pass floats"),
        (torch.full((1, 3, 32, 32), 255.0), "images have values from 255 to 255"),
        (torch.full((1, 3, 32, 32), -0.1), "images have values from -0.1"),
        (torch.full((1, 3, 32, 32), math.nan), "images have values from nan"),
    ],
)
def test_images_that_the_model_cannot_take_are_refused(images, message):
    model = ASTSeg(Config(**SMALL)).eval()
    for call in (model, model.segment):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(images)


def test_a_saved_model_loads_with_its_configuration_and_says_the_same(tmp_path):
    model = ASTSeg(Config(**SMALL, anisotropic=False)).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = ASTSeg.from_pretrained(str(tmp_path / "model")).eval()
    assert loaded.config == model.config
    images = torch.rand(2, 3, 32, 32)
    for a, b in zip(model(images), loaded(images)):
        assert torch.equal(a, b)


def test_the_output_under_bf16_autocast_is_fp32_where_it_must_be():
    model = ASTSeg(Config(**SMALL)).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    for name in ("attention", "position", "activation", "weights", "reconstruction"):
        assert getattr(output, name).dtype == torch.float32, name
    assert close(output.position, model(images).position, 0.05)


# -------------------------------------------------------------------------------------------------
# Section 4.2


def test_reconstruction_loss_by_hand():
    images = torch.zeros(1, 3, 1, 2)
    reconstruction = torch.tensor([[[[0.1, 0.0]], [[-0.2, 0.0]], [[0.3, 0.5]]]])
    # l = 0.6 and 0.5, mean of the squares
    assert close(astseg.reconstruction_loss(images, reconstruction), (0.36 + 0.25) / 2, 1e-6)


def test_pixel_entropy_loss_by_hand():
    weights = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])  # one-hot, and a coin
    assert close(astseg.pixel_entropy_loss(weights), math.log(2) ** 2 / 2, 1e-6)
    one_hot = torch.tensor([[[[1.0]], [[0.0]]]], requires_grad=True)
    astseg.pixel_entropy_loss(one_hot).backward()
    assert one_hot.grad.isfinite().all()


def test_full_loss_weighs_the_entropy_by_its_warm_up():
    model = ASTSeg(Config(**SMALL, log_alpha_0=0.0)).eval()
    images = torch.rand(1, 3, 32, 32)
    output = model(images)
    reconstruction = astseg.reconstruction_loss(images, output.reconstruction)
    entropy = astseg.pixel_entropy_loss(output.weights)
    for step, share in [(0, 0), (5_000, 0.25), (10_000, 1), (99_999, 1)]:
        loss = astseg.full_loss(images, output, step)
        assert close(loss, reconstruction + share * 1e-2 * entropy, 1e-7)


def test_the_learning_rate_at_its_corners():
    def rate(step):
        return astseg.learning_rate(step, 4e-5, 125_000, 5_000)

    assert rate(0) == 0
    assert rate(2_500) == pytest.approx(1e-5)  # quadratic
    assert rate(5_000) == rate(112_499) == 4e-5
    assert rate(112_500) == rate(125_000) == pytest.approx(4e-6)
    background = [astseg.learning_rate(s, 2e-3, 2_500, decay_at=0.8) for s in (1, 1_999, 2_000)]
    assert background == pytest.approx([2e-3, 2e-3, 2e-4])


# -------------------------------------------------------------------------------------------------
# Section 5.1: metrics


def random_labels(labels, *shape):
    return torch.randint(labels, shape)


def test_ari_fg_is_that_of_scikit_learn_over_the_foreground():
    target, predicted = random_labels(4, 20, 6, 6), random_labels(5, 20, 6, 6)
    predicted[:10] = torch.where(torch.rand(10, 6, 6) < 0.8, target[:10] + 1, predicted[:10])
    ours = astseg.adjusted_rand_index(target, predicted, 4)
    for t, p, score in zip(target, predicted, ours):
        assert abs(adjusted_rand_score(t[t > 0], p[t > 0]) - score.item()) < 1e-9


def exhaustive_mean_iou(target, predicted, labels):
    """The best of all one-to-one matchings, and its score with and without the background."""
    best = (-1.0, 0.0)
    for order in itertools.permutations(range(labels)):
        total, pairs, background = 0.0, 0, 0.0
        for t, p in enumerate(order):
            union = ((target == t) | (predicted == p)).sum().item()
            iou = ((target == t) & (predicted == p)).sum().item() / union if union else 0.0
            total, pairs = total + iou, pairs + (union > 0)
            background = iou if t == 0 else background
        best = max(
            best, (round(total, 12), -pairs, total / pairs, (total - background) / (pairs - 1))
        )
    return best[2:]


def test_mean_iou_is_the_best_of_all_matchings():
    target, predicted = random_labels(4, 10, 5, 5), random_labels(4, 10, 5, 5)
    predicted[:5] = torch.where(torch.rand(5, 5, 5) < 0.7, (target[:5] + 1) % 4, predicted[:5])
    ours, ours_foreground = astseg.mean_iou(target, predicted, 3)
    for i in range(10):
        assert (ours[i].item(), ours_foreground[i].item()) == pytest.approx(
            exhaustive_mean_iou(target[i], predicted[i], 4)
        )


def labels_of(drawing: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in drawing.split()])[None]


CASES = {  # target, prediction, mIoU, mIoU-FG, ARI-FG, MSC-FG with K = 3
    "perfect, other names": ("0011 0011 2200 2200", "0033 0033 1100 1100", 1, 1, 1, 1),
    "nothing found": ("0011 0011 2200 2200", "0000 0000 0000 0000", 0.5 / 3, 0, 0, 0.25),
    "one missing": ("0011 0011 2200 2200", "0011 0011 0000 0000", 5 / 9, 0.5, 1, 2 / 3),
    "one split": ("0011 0011 0000 0000", "0012 0012 0000 0000", (1 + 0.5) / 3, 0.25, 0, 0.5),
    "two merged": ("0011 0011 0022 0022", "0011 0011 0011 0011", (1 + 0.5) / 3, 0.25, 0, 0.5),
    "an extra one": ("0011 0011 0000 0000", "3011 0011 0000 0000", (11 / 12 + 1) / 3, 0.5, 1, 1),
    "the last label only": ("3333 3333 0000 0000", "0000 0000 3333 3333", 1, 1, 1, 1),
    "no background at all": ("1122 1122 1122 1122", "3311 3311 3311 3311", 1, 1, 1, 1),
    "no object, none found": ("0000 0000 0000 0000", "0000 0000 0000 0000", 1, 1, 1, 0),
    "no object, one found": ("0000 0000 0000 0000", "1000 0000 0000 0000", 15 / 16 / 2, 0, 1, 0),
    "a label above K": ("0055 0055 0000 0000", "0011 0011 0000 0000", 1, 1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_metrics_of_images_drawn_by_hand(name):
    target, predicted, iou, iou_foreground, ari, covering = CASES[name]
    target, predicted = labels_of(target), labels_of(predicted)
    ours = (
        *astseg.mean_iou(target, predicted, 3),
        astseg.adjusted_rand_index(target, predicted, 3),
        astseg.segmentation_covering(target, predicted, 3),
    )
    assert [value.item() for value in ours] == pytest.approx([iou, iou_foreground, ari, covering])


def test_label_maps_of_bytes_count_as_those_of_integers():
    target = torch.randint(25, (2, 8, 8), dtype=torch.uint8)
    assert astseg.mean_iou(target, target, 24)[0].tolist() == [1, 1]
    assert astseg.adjusted_rand_index(target, target, 24).tolist() == [1, 1]


def test_more_objects_than_slots_cost_mean_iou():
    target = torch.arange(6).repeat(6, 1)[None]  # five objects
    predicted = target * (target < 4)  # three slots found three of them
    assert astseg.mean_iou(target, predicted, 3)[0].item() == pytest.approx((6 / 18 + 3) / 6)


def test_squared_error_is_summed_over_pixels_and_colours():
    error = astseg.squared_error(torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), 0.5))
    assert close(error, torch.full((2,), 60 * 0.25))


def test_label_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="label maps have shapes"):
        astseg.mean_iou(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long(), 3)
    with pytest.raises(ValueError, match="negative label"):
        astseg.adjusted_rand_index(torch.full((1, 4, 4), -1), torch.zeros(1, 4, 4).long(), 3)


# -------------------------------------------------------------------------------------------------
# The embedded data set


def test_shapes_are_a_function_of_the_seed_and_differ_from_image_to_image():
    a, b, c = astseg.draw_shapes(20, 1), astseg.draw_shapes(20, 1), astseg.draw_shapes(20, 2)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert a.images.shape == (20, 3, 64, 64) and a.images.dtype == torch.uint8
    background = torch.stack([image[:, label == 0].float().mean(1) for image, label in zip(*a)])
    assert background.std(0).min() > 2  # backgrounds differ


def test_shapes_show_two_to_four_objects_of_which_none_is_hidden_and_some_overlap():
    labels = astseg.draw_shapes(500, 3).labels
    areas = torch.stack([(labels == k).sum((1, 2)) for k in range(1, 5)], dim=1)
    assert (areas > 0).sum(1).unique().tolist() == [2, 3, 4]
    assert areas[areas > 0].min() > 40
    touching = (
        (labels[:, :, 1:] != labels[:, :, :-1]) & (labels[:, :, 1:] > 0) & (labels[:, :, :-1] > 0)
    )
    assert touching.any(2).any(1).float().mean() > 0.2


def test_k_means_on_colours_fails_on_shapes():
    data, scores = astseg.draw_shapes(20, 3), []
    for image, label in zip(data.images, data.labels):
        clusters = int(label.max()) + 1
        found = KMeans(clusters, n_init=3, random_state=0).fit_predict(image.flatten(1).T)
        found = torch.tensor(found).view(1, 64, 64).long()
        scores.append(astseg.mean_iou(label[None].long(), found, 4)[0].item())
    assert np.mean(scores) < 0.65


# -------------------------------------------------------------------------------------------------
# train.py

TINY = [
    "--height", "32", "--width", "32", "--slots", "4",
    "--dim_transformer", "64", "--transformer_layers", "1",
    "--train_images", "40", "--background_steps", "6", "--steps", "12", "--phase2_steps", "6",
    "--background_batch", "4", "--batch", "4", "--warmup", "2",
    "--log_every", "2", "--evaluate_every", "6", "--checkpoint_every", "4",
]  # fmt: skip


@pytest.fixture
def few_images(monkeypatch):
    """Evaluate on 10 images, not on hundreds."""
    draw = astseg.draw_shapes
    monkeypatch.setattr(
        astseg, "draw_shapes", lambda n, *rest: draw(min(n, 40 if n == 40 else 10), *rest)
    )


def run_tiny(folder, *more):
    train.main([*TINY, "--output", str(folder), *more])
    return json.loads((folder / "metrics.json").read_text())


def test_the_schedule_of_each_scenario():
    t = train.Training()
    assert train.curriculum(t) == [
        ("background", 0, 500_000), ("foreground", 0, 30_000), ("joint", 30_000, 125_000),
    ]  # fmt: skip
    assert train.curriculum(dataclasses.replace(t, scenario="BT")) == [("joint", 0, 125_000)]
    assert train.curriculum(dataclasses.replace(t, scenario="frozen")) == [
        ("background", 0, 500_000), ("foreground", 0, 125_000),
    ]  # fmt: skip


def test_each_epoch_shows_each_image_once():
    seen = torch.cat([train.batch_indices(step, 4, 20, 7) for step in range(10)])
    assert torch.equal(seen[:20].sort().values, torch.arange(20))
    assert torch.equal(seen[20:].sort().values, torch.arange(20))
    assert not torch.equal(seen[:20], seen[20:])
    assert torch.equal(train.batch_indices(7, 4, 20, 7), seen[28:32])


def test_flip_mirrors_an_image_and_its_background_alike():
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    backgrounds, phase = 255 - images, train.Phase("foreground", 0, 100)
    for flip in (False, True):
        training = train.Training(batch=40, flip=flip)
        job = train.Job(torch.nn.Linear(1, 1), images, None, training, None, None, None)
        index = train.batch_indices(3, 40, 40, training.seed)
        found, behind = train.load_batch(job, phase, 3, backgrounds)
        straight = (found * 255 == images[index]).all(3).all(2).all(1)
        mirrored = (found * 255 == images[index].flip(3)).all(3).all(2).all(1)
        assert (straight ^ mirrored).all() and mirrored.any() == flip and straight.any()
        assert torch.allclose(found + behind, torch.ones(1))


def test_each_phase_trains_its_own_parts_with_its_own_optimiser():
    model, t = ASTSeg(Config(**SMALL)), train.Training()
    images, background = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    parts = dict(model.named_children())
    for name, trained in [
        ("background", {"background"}),
        ("foreground", {"generator", "encoder", "renderer"}),
        ("joint", set(parts)),
    ]:
        phase = train.Phase(name, 0, 100)
        optimizer = train.make_optimizer(model, phase, t)
        train.set_learning_rate(optimizer, phase, 50, t)
        before = {part: [p.clone() for p in m.parameters()] for part, m in parts.items()}
        loss = train.PhaseLoss(model, phase)(
            50, images, background if name == "foreground" else None
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved = {
            part for part, m in parts.items()
            if any(not torch.equal(a, b) for a, b in zip(before[part], m.parameters()))
        }  # fmt: skip
        assert moved == trained
        settings = optimizer.defaults
        expected = ((0.9, 0.999), 1e-8) if name == "background" else ((0.9, 0.98), 1e-9)
        assert (settings["betas"], settings["eps"]) == expected


def test_update_t_uses_the_rate_of_step_t_plus_1_and_the_refinement_its_factor():
    model, t = ASTSeg(Config(**SMALL)), train.Training(refinement_lr_factor=0.05)
    phase = train.curriculum(t)[1]
    optimizer = train.make_optimizer(model, phase, t)
    assert train.set_learning_rate(optimizer, phase, 4_999, t) == 4e-5
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4e-5, 2e-6, 4e-5])
    assert train.set_learning_rate(optimizer, phase, 0, t) == pytest.approx(4e-5 / 5_000**2)


def test_memorised_backgrounds_are_those_of_the_autoencoder_at_8_bits():
    model = ASTSeg(Config(**SMALL))
    images = astseg.draw_shapes(7, 0, 32).images
    memory = train.memorise_backgrounds(model, images)
    live = model.eval().background(images / 255)[0]
    assert memory.dtype == torch.uint8
    assert (memory / 255 - live).abs().max() <= 0.5 / 255 + 1e-6


def test_a_run_leaves_all_that_it_promises(tmp_path, few_images, capsys):
    metrics = run_tiny(tmp_path)
    assert set(metrics) == {
        "mIoU",
        "mIoU-FG",
        "ARI-FG",
        "MSC-FG",
        "MSE",
        "images",
        "seconds",
        "seed",
    }
    assert (
        all(type(value) in (int, float) for value in metrics.values()) and metrics["images"] == 10
    )
    for name in ("segmentation.png", "slots.png", "curves.png"):
        assert Image.open(tmp_path / name).size[0] > 300
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 2, 4, 6, 8, 10, 12]
    assert not list(tmp_path.glob("*.tmp"))
    out = capsys.readouterr().out
    assert "phase 1 of 3" in out and "phase 3 of 3" in out and "mIoU (%)" in out
    train.main(["--evaluate", str(tmp_path)])
    again = json.loads((tmp_path / "evaluation-shapes-test.json").read_text())
    assert again == pytest.approx({name: metrics[name] for name in again})


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, few_images):
    a, b, c = (
        run_tiny(tmp_path / name, "--seed", seed)
        for name, seed in [("a", "5"), ("b", "5"), ("c", "6")]
    )
    assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert a["MSE"] != c["MSE"]


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    draw = astseg.draw_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            astseg, "draw_shapes", lambda n, *rest: draw(min(n, 40 if n == 40 else 10), *rest)
        )
        return folder, run_tiny(folder)


# What a driver does at some moment of a run, in a process of its own: {what} at a step of a phase.
DRIVER = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch, astseg, train
draw, loss, save, saved = astseg.draw_shapes, train.PhaseLoss.forward, torch.save, []
astseg.draw_shapes = lambda n, *rest: draw(min(n, 40 if n == 40 else 10), *rest)

def forward(self, step, *rest):
    if (self.phase.name, step) == ({phase!r}, {step}):
        os.kill(os.getpid(), signal.{signal})
    return loss(self, step, *rest)

def half_saved(state, path):
    saved.append(path)
    save(state, path)
    if len(saved) == {save}:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.{signal})

train.PhaseLoss.forward, torch.save = forward, half_saved
try:
    train.main(sys.argv[1:])
except KeyboardInterrupt:
    sys.exit(130)
"""


def run_driver(folder, signal_name, phase="", step=-1, save=-1):
    script = DRIVER.format(here=str(HERE), signal=signal_name, phase=phase, step=step, save=save)
    command = [sys.executable, "-c", script, *TINY, "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True).returncode


def resume_and_compare(folder, whole_run):
    train.main(["--output", str(folder), "--resume", "--log_every", "2", "--evaluate_every", "6"])
    whole, metrics = whole_run
    ours = json.loads((folder / "metrics.json").read_text())
    assert {**ours, "seconds": 0} == {**metrics, "seconds": 0}
    assert weights_of(folder) == weights_of(whole)


@pytest.mark.parametrize(
    "moment", [("background", 5), ("foreground", 1), ("foreground", 5), ("joint", 11)]
)
def test_a_killed_run_resumes_to_bit_identical_results(moment, tmp_path, whole_run, few_images):
    assert run_driver(tmp_path, "SIGKILL", *moment) == -signal.SIGKILL
    resume_and_compare(tmp_path, whole_run)


def test_a_kill_while_a_checkpoint_is_written_costs_nothing(tmp_path, whole_run, few_images):
    assert run_driver(tmp_path, "SIGKILL", save=3) == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt.tmp").stat().st_size == 1000
    resume_and_compare(tmp_path, whole_run)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_ends_cleanly(name, tmp_path, whole_run, few_images):
    assert run_driver(tmp_path, name, "joint", 9) == 130
    assert train.load_checkpoint(tmp_path)["progress"]["step"] == 10  # the step was finished
    resume_and_compare(tmp_path, whole_run)


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(tmp_path, few_images, monkeypatch):
    save, saved = torch.save, []

    def full(state, path):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*checkpoint.pt: .*No space left"):
        run_tiny(tmp_path)
    assert train.load_checkpoint(tmp_path)["progress"]["step"] == 6
    assert not (tmp_path / "checkpoint.pt.tmp").exists()


def test_too_little_memory_names_the_setting_to_lower(tmp_path, few_images, monkeypatch):
    def forward(self, *rest):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train.PhaseLoss, "forward", forward)
    with pytest.raises(MemoryError, match="--background_batch 4: go on with --resume and a lower"):
        run_tiny(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("evil",)

    torch.save(dict(model=Evil()), tmp_path / "checkpoint.pt")
    with pytest.raises(FileNotFoundError, match="no usable checkpoint"):
        train.load_checkpoint(tmp_path)
    assert "evil" not in capsys.readouterr().out


def test_the_benchmark_reports_each_phase_and_the_whole(few_images, capsys):
    train.main([*TINY, "--benchmark", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["background", "foreground", "joint"]
    for line, batch in zip(lines[2:5], (4, 4, 4)):
        steps, images, flops, speed = map(float, line.split()[1:5])
        assert images == pytest.approx(batch * steps, abs=1)
        assert speed == pytest.approx(flops * steps, rel=0.01) and speed > 0
    assert re.fullmatch(r"the whole curriculum: \d+\.\d\d hours", lines[5])
    # Arithmetic of phase 1 by hand: each level has a convolution and its mirror on maps of one area.
    config = train.parse_arguments(TINY)[0]
    model = astseg.BackgroundAutoencoder(*config.size, "simple", config.background_width)
    side, multiply_adds = config.height, 0
    blocks = astseg.background_blocks(*config.size)
    for down, up, (kernel, stride, padding, _) in zip(
        model.encoder, reversed(model.decoder), blocks
    ):
        side = (side + 2 * padding[0] - kernel[0]) // stride[0] + 1
        for block in (down, up):
            channels = block.convolution.in_channels
            images = (4 * (channels - 2) + 2) / channels  # coordinates once a batch of 4
            multiply_adds += block.convolution.weight.numel() * images * side**2
    assert float(lines[2].split()[3]) == pytest.approx(3 * 2 * multiply_adds / 1e9, rel=1e-3)


def test_benchmark_takes_a_number_of_steps_or_200():
    assert train.parse_arguments(["--benchmark"])[2].benchmark == 200
    assert train.parse_arguments(["--benchmark", "30"])[2].benchmark == 30


def losses_and_gradients(loss, step, *batch):
    loss.zero_grad()
    value = loss(step, *batch)
    value.backward()
    return value.item(), [p.grad.clone() for p in loss.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["background", "foreground", "joint"])
def test_autocast_and_compilation_keep_the_loss(name):
    """What a GPU uses, on the CPU: bf16 autocast, and torch.compile without recompilation."""
    torch._dynamo.reset()
    model, images = ASTSeg(Config(**SMALL, dropout=0.0)).train(), torch.rand(4, 3, 32, 32)
    background = torch.rand(4, 3, 32, 32) if name == "foreground" else None
    phase = train.Phase(name, 0, 10)
    train.make_optimizer(model, phase, train.Training())
    plain, compiled = train.PhaseLoss(model, phase), train.PhaseLoss(model, phase)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.network = torch.compile(plain.network, backend=counter)
    for step in range(3):
        expected, gradients = losses_and_gradients(plain, step, images, background)
        value, ours = losses_and_gradients(compiled, step, images, background)
        assert value == pytest.approx(expected, rel=1e-4) and len(ours) == len(gradients)
        assert all(close(a, b, 1e-4) for a, b in zip(ours, gradients))
        assert counter.frame_count == 1  # one graph, once
    with torch.autocast("cpu", torch.bfloat16):
        half = plain(0, images, background)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=0.05)


def test_a_step_never_waits_for_the_device():
    """With tensors that have no content, whatever asks for a value raises; a GPU would wait."""
    training = train.Training(batch=4, background_batch=4, flip=True)
    model = ASTSeg(Config(**SMALL)).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        job = train.Job(model, images, None, training, train.Run(), None, train.Progress({}))
        for phase in train.curriculum(training):
            train.make_optimizer(model, phase, training)
            backgrounds = images if phase.name == "foreground" else None
            batch = train.load_batch(job, phase, 0, backgrounds)
            loss = train.PhaseLoss(model, phase)(0, *batch)
            loss.backward()
            with pytest.raises(DataDependentOutputException):
                loss.item()
    train.permutation.cache_clear()


# -------------------------------------------------------------------------------------------------
# Several processes

RANK_SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
import torch, astseg, train
from torch.nn.parallel import DistributedDataParallel
train.start_processes()
torch.manual_seed(0)
for name, config in torch.load({inputs!r})["configs"].items():
    model = astseg.ASTSeg(astseg.Config(**config)).train()
    model.renderer.log_alpha_0.data.fill_(0.0)
    train.synchronise_batch_norm(model)
    model.double()
    data = torch.load({inputs!r})
    for phase in ("background", "foreground", "joint"):
        phase = train.Phase(phase, 0, 10)
        train.make_optimizer(model, phase, train.Training())
        loss = train.PhaseLoss(model, phase)
        if train.world()[1] > 1:
            if name == "compiled" and phase.name == "joint":
                loss.network = torch.compile(loss.network, backend="aot_eager")
            loss = DistributedDataParallel(loss)
        index = train.batch_indices(0, 8, 8, 0)
        background = data["backgrounds"][index] if phase.name == "foreground" else None
        model.zero_grad()
        loss(5, data["images"][index], background).backward()
        found = {{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}
        if train.world()[0] == 0:
            torch.save(found, f"{{sys.argv[1]}}-{{name}}-{{phase.name}}.pt")
    buffers = dict(model.named_buffers())
    scores = train.evaluate(model.float(), astseg.draw_shapes(107, 0, 32))
    if train.world()[0] == 0:
        torch.save((buffers, scores), f"{{sys.argv[1]}}-{{name}}.pt")
if train.world()[1] > 1:
    torch.distributed.destroy_process_group()
"""


def torchrun(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, "--nproc_per_node", "2", *map(str, command)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_two_processes_have_the_gradients_and_scores_of_one(tmp_path):
    torch.manual_seed(3)
    images, backgrounds = torch.rand(2, 8, 3, 32, 32, dtype=torch.float64)
    configs = {
        "segformer": dict(SMALL, dropout=0.0),
        "compiled": dict(SMALL, dropout=0.0),
        "unet": dict(SMALL, dropout=0.0, generator="unet", unet_width=0.1),
    }
    torch.save(
        dict(images=images, backgrounds=backgrounds, configs=configs), tmp_path / "inputs.pt"
    )
    script = tmp_path / "script.py"
    script.write_text(RANK_SCRIPT.format(here=str(HERE), inputs=str(tmp_path / "inputs.pt")))
    torchrun(script, tmp_path / "two")
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True)
    for name in configs:
        for phase in ("background", "foreground", "joint"):
            one, two = (torch.load(tmp_path / f"{n}-{name}-{phase}.pt") for n in ("one", "two"))
            assert one.keys() == two.keys() and one
            largest = max(gradient.abs().max() for gradient in one.values())
            for parameter in one:
                assert close(one[parameter] / largest, two[parameter] / largest, 1e-9)
        (buffers1, scores1), (buffers2, scores2) = (
            torch.load(tmp_path / f"{n}-{name}.pt") for n in ("one", "two")
        )
        for buffer in buffers1:
            assert close(buffers1[buffer], buffers2[buffer], 1e-5)
        assert scores1 == pytest.approx(scores2, rel=1e-3, abs=1e-4)


def test_a_run_of_two_processes_is_resumed_by_one(tmp_path, few_images):
    flags = [*TINY, "--output", tmp_path / "run"]
    out = torchrun(HERE / "train.py", *flags, "--log_every", "3")
    assert out.count("phase 3 of 3") == 1  # one process prints
    whole = train.load_checkpoint(tmp_path / "run")["model"]
    last, previous = (tmp_path / "run" / f"checkpoint{x}.pt" for x in ("", ".previous"))
    assert torch.load(previous)["progress"]["step"] == 8
    os.replace(previous, last)
    train.main(["--output", str(tmp_path / "run"), "--resume"])
    state = train.load_checkpoint(tmp_path / "run")
    assert state["progress"]["step"] == 12
    # Where a gradient is zero but for rounding, as a key's bias has it, Adam follows the rounding.
    apart = torch.cat([(state["model"][n] - p).abs().flatten() for n, p in whole.items()])
    assert (apart < 1e-5).float().mean() > 0.98


def test_a_resumed_run_may_take_a_smaller_batch_and_rate(tmp_path, whole_run, few_images):
    folder = shutil.copytree(whole_run[0], tmp_path / "run")
    os.replace(folder / "checkpoint.previous.pt", folder / "checkpoint.pt")
    assert train.load_checkpoint(folder)["progress"]["step"] == 8
    train.main(["--output", str(folder), "--resume", "--batch", "2", "--lr", "1e-4", "--no_bf16"])
    progress = train.load_checkpoint(folder)["progress"]
    written = json.loads((folder / "settings.json").read_text())
    for settings in (progress["settings"], written):
        assert (settings["batch"], settings["lr"], settings["bf16"]) == (2, 1e-4, False)
    assert progress["step"] == 12 and progress["history"][-1]["lr"] <= 1e-4


def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(
    tmp_path, whole_run, few_images, capsys
):
    folder, metrics = whole_run
    shutil.copytree(folder, tmp_path / "run")
    last = tmp_path / "run" / "checkpoint.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    resume_and_compare(tmp_path / "run", whole_run)
    assert f"{last} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, effect",
    [
        (["--no_transformer"], lambda m, t: m.encoder.refinement is None),
        (["--slots", "5"], lambda m, t: m(torch.rand(1, 3, 32, 32)).weights.shape[1] == 6),
        (
            ["--generator", "unet", "--unet_width", "0.1"],
            lambda m, t: m(torch.rand(1, 3, 32, 32)).attention.shape[-1] == 32,
        ),
        (["--entropy_weight", "0"], lambda m, t: m.config.entropy_weight == 0),
        (
            ["--scenario", "frozen"],
            lambda m, t: [p.name for p in train.curriculum(t)] == ["background", "foreground"],
        ),
        (["--scenario", "BT"], lambda m, t: [p.name for p in train.curriculum(t)] == ["joint"]),
        (["--anisotropic", "false"], lambda m, t: m.config.dim_latent == 34),
        (["--anisotropic", "true"], lambda m, t: m.config.dim_latent == 35),
    ],
)
def test_each_ablation_of_table_4_is_a_flag_that_does_what_it_says(flags, effect, tmp_path):
    config, training, _ = train.parse_arguments([*TINY, *flags])
    assert effect(ASTSeg(config).eval(), training)


def test_pretrained_is_a_flag_that_loads_the_backbone(tmp_path, few_images, monkeypatch):
    save_segformer(tmp_path / "mit", "tiny")
    load, seen = astseg.SegformerGenerator.load_backbone, []

    def watched(self, source):
        load(self, source)
        seen.append(source)

    monkeypatch.setattr(astseg.SegformerGenerator, "load_backbone", watched)
    run_tiny(tmp_path / "run", "--pretrained", str(tmp_path / "mit"))
    assert seen == [str(tmp_path / "mit")]


def test_no_entropy_loss_leaves_the_reconstruction_loss():
    model = ASTSeg(Config(**SMALL, entropy_weight=0.0, log_alpha_0=0.0)).eval()
    images, phase = torch.rand(2, 3, 32, 32), train.Phase("joint", 0, 10)
    expected = astseg.reconstruction_loss(images, model(images).reconstruction)
    assert torch.equal(train.PhaseLoss(model, phase)(50_000, images), expected)


def test_a_nan_stops_the_run_with_its_step_and_the_last_checkpoint(
    tmp_path, few_images, monkeypatch
):
    load_batch = train.load_batch

    def poisoned(job, phase, step, backgrounds):
        images, behind = load_batch(job, phase, step, backgrounds)
        if (phase.name, step) == ("joint", 9):
            images[1, 2, 3, 4] = math.nan
        return images, behind

    monkeypatch.setattr(train, "load_batch", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"not finite by step 10 of phase 3.*checkpoint.pt"
    ):
        run_tiny(tmp_path)
    assert train.load_checkpoint(tmp_path)["progress"]["step"] == 8
    assert all(p.isfinite().all() for p in train.load_checkpoint(tmp_path)["model"].values())


def test_known_failures_are_named(capsys):
    def warnings_for(model, last=True):
        train.warn_of_known_failures(train.evaluate(model, astseg.draw_shapes(4, 0, 32)), last)
        return capsys.readouterr().err

    model = ASTSeg(Config(**SMALL, transformer=False))
    assert "the foreground is still empty" in warnings_for(model)
    assert warnings_for(model, last=False) == ""
    latents = model.encoder.latents
    model.encoder.latents = lambda slots: latents(slots + 5)
    assert "positions are clamped" in warnings_for(model)


def test_segment_writes_label_map_overlay_and_objects_in_the_pixels_of_the_image(
    tmp_path, whole_run
):
    folder, _ = whole_run
    model = ASTSeg.from_pretrained(str(folder / "model"))
    with torch.no_grad():
        model.renderer.log_alpha_0.fill_(-3.0)  # an early model shows nothing: make it show
    model.save_pretrained(tmp_path / "run" / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    train.main(["--segment", str(tmp_path / "run"), str(tmp_path / "photo.png")])
    out = tmp_path / "run" / "segmented"
    labels = Image.open(out / "photo_labels.png")
    assert labels.mode == "P" and labels.size == (160, 100)
    assert Image.open(out / "photo_overlay.png").size == (160, 100)
    labels = np.array(labels)
    assert labels[:, :30].max() == labels[:, 130:].max() == 0  # outside the centre crop
    objects = json.loads((out / "photo_objects.json").read_text())
    assert [o["label"] for o in objects] == np.unique(labels[labels > 0]).tolist() != []
    for o in objects:
        left, top, right, bottom = o["box"]
        inside = labels == o["label"]
        assert inside.sum() == o["pixels"] == inside[top : bottom + 1, left : right + 1].sum()
        assert 30 <= o["position"][0] <= 130 and 0 <= o["position"][1] <= 100
        assert o["activation"] > 0 and 100 / 8 <= o["size"][0] <= 100


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(HERE / "train.py"), *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--slots", "0"], "slots is 0: it must be at least 1"),
        (["--slots", "256"], "slots is 256: label maps hold 255 objects at most"),
        (["--train_images", "0"], "train_images is 0: it must be at least 1"),
        (["--lr", "inf"], "lr is inf: it must be above 0"),
        (["--batch", "1"], "batch is 1: it must be at least 2"),
        (["--lr", "0"], "lr is 0.0: it must be above 0"),
        (["--phase2_steps", "99999"], "phase 2 is a part of all steps"),
        (["--warmup", "-1"], "warmup is -1"),
        (["--generator", "unet", "--pretrained", "x"], "only the segformer has pretrained weights"),
        (["--height", "40", "--width", "48"], "the embedded shapes are drawn on square images"),
        (["--log_every", "0"], "log_every is 0"),
        (["--generator", "vit"], "invalid choice: 'vit'"),
        (["--colour", "blue"], "--colour"),
        (["--dataset", "coco"], "invalid choice: 'coco'"),
        (["--dataset", "clevr"], "the data set clevr is read from files: name them by --data"),
        (["--dataset", "clevr", "--data", "/nowhere"], "there is no file or folder /nowhere"),
        (["--part", "all", "--evaluate", "/nowhere"], "/nowhere/settings.json is missing"),
        (["--resume", "--output", "/nowhere"], "/nowhere/settings.json is missing"),
        (["--evaluate", "/nowhere"], "/nowhere/settings.json is missing: there is no run"),
        (["--segment", "/nowhere"], "--segment needs a run folder and then at least one image"),
        (["--segment", "/nowhere", "a.png"], "is no folder of a finished run"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence_before_any_work(arguments, message, capsys):
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        train.main(arguments)
    text = capsys.readouterr().err + str(error.value)
    assert message in text


def test_a_refusal_is_one_line_with_a_non_zero_exit(tmp_path):
    result = run_script("--evaluate", str(tmp_path))
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are 3 training images, and one batch needs 4"):
        run_tiny(tmp_path, "--train_images", "3")


def test_a_run_of_other_settings_is_not_resumed(tmp_path, whole_run):
    folder, _ = whole_run
    with pytest.raises(ValueError, match="was started with slots = 4, not 3"):
        train.main(["--output", str(folder), "--resume", "--slots", "3"])


def test_a_run_whose_images_changed_is_not_resumed(tmp_path, whole_run):
    shutil.copytree(whole_run[0], tmp_path / "run")
    state = train.load_checkpoint(tmp_path / "run")
    state["progress"]["settings"]["training images"] = 39
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="was started with training images = 39, not 40"):
        train.main(["--output", str(tmp_path / "run"), "--resume"])


def test_a_run_is_not_overwritten_by_another(whole_run):
    folder, _ = whole_run
    before = weights_of(folder)
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        run_tiny(folder)
    assert weights_of(folder) == before


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, whole_run):
    folder, _ = whole_run
    shutil.copy(folder / "checkpoint.pt", tmp_path)
    settings = json.loads((folder / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "dim_z_what": 16}))
    with pytest.raises(ValueError, match="was started with dim_z_what = 32, not 16"):
        train.main(["--output", str(tmp_path), "--resume"])


def test_weights_that_are_missing_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    ASTSeg(Config(**SMALL)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["renderer.log_alpha_0"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        ASTSeg.from_pretrained(str(tmp_path))


def test_damaged_files_are_named(tmp_path, whole_run):
    folder, _ = whole_run
    run = tmp_path / "run"
    shutil.copytree(folder / "model", run / "model")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match="cannot read .*text.png as an image"):
        train.main(["--segment", str(run), str(tmp_path / "text.png")])
    with pytest.raises(FileNotFoundError, match="there is no image"):
        train.main(["--segment", str(run), str(tmp_path / "none.png")])
    assert not (run / "segmented").exists()
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="the model in .* is damaged"):
        train.load_model(run)
    with pytest.raises(FileNotFoundError, match="no usable checkpoint"):
        train.load_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="cannot write .*file: No space left"):
        train.write_beside(path, full)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_short_training_lowers_the_loss_and_wakes_the_foreground(tmp_path, monkeypatch):
    draw = astseg.draw_shapes
    monkeypatch.setattr(astseg, "draw_shapes", lambda n, *rest: draw(min(n, 600), *rest))
    train.main([
        "--output", str(tmp_path), "--height", "32", "--width", "32", "--train_images", "600",
        "--background_steps", "300", "--steps", "400", "--phase2_steps", "350", "--warmup", "40",
        "--log_every", "50", "--evaluate_every", "400",
    ])  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["name"] == "foreground"]
    assert losses[-1] < 0.75 * losses[0]
    assert lines[-1]["foreground"] > 0.01 and lines[-1]["mIoU"] > 0.25


# -------------------------------------------------------------------------------------------------
# Data sets, in tiny files of the exact formats


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, to check the one of the reader."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(*fields) -> bytes:
    """A protocol buffer message of length-delimited fields (number, content)."""
    return b"".join(varint(n << 3 | 2) + varint(len(content)) + content for n, content in fields)


def example(**arrays) -> bytes:
    """A tf.train.Example in which every byte is an entry of its own, as in the published files."""
    entries = []
    for name, array in arrays.items():
        values = message(*((1, bytes([value])) for value in array.astype(np.uint8).flatten()))
        entries.append((1, message((1, name.encode()), (2, message((1, values))))))
    floats = message((1, b"visibility"), (2, message((2, message((1, b"\0\0\x80\x3f"))))))
    return message((1, message((1, floats), *entries)))


def record(body: bytes) -> bytes:
    size = struct.pack("<Q", len(body))
    return size + masked_crc(size) + body + masked_crc(body)


def rooms(count: int, masks: int = 7, seed: int = 0):
    """ObjectsRoom at random: images (n, 64, 64, 3), owners of the pixels (n, 64, 64), bodies."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    owners = random.integers(0, masks, (count, 8, 8)).repeat(8, 1).repeat(8, 2)
    bodies = [
        example(image=image, mask=255 * (owner == np.arange(masks)[:, None, None])[..., None])
        for image, owner in zip(images, owners)
    ]
    return images, owners, bodies


def write_records(path: Path, bodies) -> Path:
    path.write_bytes(gzip.compress(b"".join(map(record, bodies)), 1))
    return path


def parts_of(tmp_path, dataset, data, height=64, width=64, masks=None):
    source = astseg.open_source(dataset, data, masks)
    return astseg.cached_parts(source, tmp_path / "cache" / dataset, height, width)


@pytest.fixture(scope="module")
def room_records():
    return rooms(12)


def test_crc32c_is_that_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283 == astseg.google_crc32c.value(b"123456789")


def test_objectsroom_records_are_read_byte_by_byte_and_split_by_count(tmp_path, room_records):
    images, owners, bodies = room_records
    path = write_records(tmp_path / "objects_room_train.tfrecords", bodies)
    for data in (path, tmp_path):  # the file, or the folder it is in
        parts = parts_of(tmp_path, "objectsroom", data)
        assert torch.equal(parts["all"].images, torch.from_numpy(images).movedim(3, 1))
        assert torch.equal(parts["all"].labels, torch.from_numpy(np.maximum(0, owners - 3)).byte())
        assert {name: len(part.images) for name, part in parts.items()} == {
            "test": 1, "val": 1, "train": 10, "all": 12,
        }  # fmt: skip
    path.write_bytes(b"".join(map(record, bodies)))  # decompressed
    assert torch.equal(parts_of(tmp_path, "objectsroom", path)["all"].images, parts["all"].images)


@pytest.mark.parametrize(
    "dataset, masks, suffix",
    [
        ("six_objects", 10, "six_objects"),
        ("identical_color", 10, "identical_color"),
        ("empty_room", 4, "empty_room"),
    ],
)
def test_variants_of_objectsroom_are_one_test_part(dataset, masks, suffix, tmp_path):
    images, owners, bodies = rooms(3, masks)
    write_records(tmp_path / f"objects_room_test_{suffix}.tfrecords", bodies)
    parts = parts_of(tmp_path, dataset, tmp_path)
    assert len(parts["test"].images) == 3 and len(parts["train"].images) == 0
    assert torch.equal(parts["test"].labels, torch.from_numpy(np.maximum(0, owners - 3)).byte())


@pytest.mark.parametrize("count, ends", [(30_000, (10_000, 20_000)), (29_999, (2_999, 5_999))])
def test_the_parts_of_objectsroom_depend_on_its_size(count, ends, tmp_path, room_records):
    path = write_records(tmp_path / "objects_room_train.tfrecords", room_records[2][:1])
    assert astseg.open_source("objectsroom", path).ends(count) == ends


def slow_crop_and_resize(pixels: np.ndarray, crop: int, size: int) -> np.ndarray:
    """Centre crop and bilinear resize with antialiasing, a triangle filter written out."""
    top, left = (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2
    out = pixels[top : top + crop, left : left + crop].astype(float)
    ratio = crop / size
    for _ in range(2):  # columns, then rows: Pillow rounds to bytes in between
        rows = []
        for i in range(size):
            center, support = (i + 0.5) * ratio, max(1.0, ratio)
            weights = np.maximum(0, 1 - abs(np.arange(crop) + 0.5 - center) / support)
            rows.append(np.tensordot(weights / weights.sum(), out.swapaxes(0, 1), 1))
        out = np.round(np.stack(rows)).clip(0, 255)
    return out.astype(np.uint8)


def test_clevr_is_cropped_and_resized_as_the_paper_does(tmp_path):
    random = np.random.default_rng(1)
    small = random.integers(0, 256, (24, 32, 3)).repeat(10, 0).repeat(10, 1)
    image = (small + random.integers(-20, 20, small.shape)).clip(0, 255).astype(np.uint8)
    owner = random.integers(0, 11, (24, 32)).repeat(10, 0).repeat(10, 1)
    mask = 255 * (owner == np.arange(11)[:, None, None])
    path = tmp_path / "clevr_with_masks_train.tfrecords"
    write_records(path, [example(image=image, mask=mask)] * 3)
    images, labels = parts_of(tmp_path, "clevr", path, 128, 128)["all"]
    slow = slow_crop_and_resize(image, 192, 128)
    assert np.abs(images[0].numpy().transpose(1, 2, 0).astype(int) - slow).max() <= 1
    rows = [24 + int((i + 0.5) * 1.5) for i in range(128)]
    columns = [64 + int((i + 0.5) * 1.5) for i in range(128)]
    assert np.array_equal(labels[0], owner[rows][:, columns])


def flip(path: Path, position: int):
    """Damage one byte inside the compressed records."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[position] ^= 255
    path.write_bytes(gzip.compress(bytes(data), 1))


def cut(path: Path, size: int):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: flip(p, 1000), "tfrecords, record 0: .*bad checksum"),
        (lambda p: flip(p, 3), "record 0: .*bad checksum"),
        (lambda p: cut(p, p.stat().st_size // 2), r"record \d: the file is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), "record 3: the file is damaged"),
        (lambda p: p.write_bytes(record(b"x" * 20) * 3), "record 0: it is no tf.train.Example"),
        (lambda p: p.write_bytes(record(example(other=np.zeros(4))) * 3), "no feature 'image'"),
        (
            lambda p: p.write_bytes(record(example(image=np.zeros(12), mask=np.zeros(4)))),
            "'image' is not 12288 entries of one byte .36 bytes in all.: the file is of another",
        ),
        (lambda p: p.write_text("these are no records"), "record 0: .*no TFRecord file"),
        (lambda p: p.unlink(), "objects_room_train.tfrecords is missing"),
    ],
)
def test_a_damaged_tfrecord_is_named_and_leaves_nothing(damage, message, tmp_path, room_records):
    data = tmp_path / "data"
    data.mkdir()
    path = write_records(data / "objects_room_train.tfrecords", room_records[2][:3])
    damage(path)
    with pytest.raises(OSError, match=message):
        parts_of(tmp_path, "objectsroom", data)
    assert not list((tmp_path / "cache").glob("*"))


def save_palette(path: Path, labels: np.ndarray):
    image = Image.fromarray(labels.astype(np.uint8), "P")
    image.putpalette(list(range(255, -1, -1)) * 3)  # colours that have nothing to do with labels
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def clevrtex(tmp_path):
    """20 images of CLEVRTEX, RGBA, with label maps that have gaps and more objects than slots."""
    random = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "data" / "clevrtex_full" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (240, 320, 4), dtype=np.uint8)
        pixels[..., 0] = i
        Image.fromarray(pixels).save(folder / f"CLEVRTEX_full_{i:06d}.png")
        labels = random.choice([0, 2, 5, 12], (24, 32)).repeat(10, 0).repeat(10, 1)
        save_palette(folder / f"CLEVRTEX_full_{i:06d}_flat.png", labels)
        (folder / f"CLEVRTEX_full_{i:06d}.json").write_text("{}")
    return tmp_path / "data"


def test_clevrtex_is_read_in_the_order_of_its_index_and_split_in_tenths(tmp_path, clevrtex):
    parts = parts_of(tmp_path, "clevrtex", clevrtex, 128, 128)
    assert [len(parts[name].images) for name in ("test", "val", "train")] == [2, 2, 16]
    assert parts["all"].images[:, 0].flatten(1).float().mean(1).tolist() == list(range(20))
    assert parts["all"].labels.unique().tolist() == [0, 2, 5, 12]  # indices as they are
    path = clevrtex / "clevrtex_full" / "1" / "CLEVRTEX_full_000001.png"
    slow = slow_crop_and_resize(np.array(Image.open(path).convert("RGB")), 192, 128)
    ours = parts["all"].images[1].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - slow).max() <= 1
    labels = parts["all"].labels[:1]
    assert astseg.mean_iou(labels, labels, slots=4)[0].item() == 1.0  # 12 is a row of its own


def test_a_missing_label_map_is_named(tmp_path, clevrtex):
    path = clevrtex / "clevrtex_full" / "1" / "CLEVRTEX_full_000004_flat.png"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no image {path}"):
        parts_of(tmp_path, "clevrtex", clevrtex)
    with pytest.raises(FileNotFoundError, match="holds no image CLEVRTEX_camo_NNNNNN.png"):
        parts_of(tmp_path, "camo", clevrtex)


@pytest.mark.parametrize("variant, test", [("outd", 10), ("camo", 1), ("grassbg", 1)])
def test_the_test_part_of_the_variants_of_clevrtex(variant, test, tmp_path):
    for i in range(10):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"CLEVRTEX_{variant}_{i:06d}.png")
        save_palette(tmp_path / f"CLEVRTEX_{variant}_{i:06d}_flat.png", np.ones((30, 40)))
    parts = parts_of(tmp_path, variant, tmp_path, 32, 32)
    assert len(parts["test"].images) == test and len(parts["all"].images) == 10


def test_shapestacks_has_its_own_splits_and_label_maps(tmp_path):
    random, owners = np.random.default_rng(0), {}
    names = {"test": ["a-1"], "eval": ["b-2"], "train": ["c-3", "d-4"]}
    for part, scenarios in names.items():
        split = tmp_path / "splits" / "default" / f"{part}.txt"
        split.parent.mkdir(parents=True, exist_ok=True)
        split.write_text("\n".join(scenarios) + "\n")
        for name in scenarios:
            for folder in ("recordings", "iseg"):
                (tmp_path / folder / name).mkdir(parents=True)
            for camera in (1, 10):
                pixels = random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
                stem = f"rgb-w=2-f=1-l=0-c=unique-cam_{camera}-mono-0.png"
                Image.fromarray(pixels).save(tmp_path / "recordings" / name / stem)
                owner = random.integers(0, 6, (28, 28)).repeat(8, 0).repeat(8, 1)
                owners[name, camera] = owner
                values = np.stack((owner * 32 + 5, owner, owner), axis=2).astype(np.uint8)
                stem = f"iseg-w=0-f=0-l=0-c=original-cam_{camera}-mono-0.map"
                Image.fromarray(values).save(tmp_path / "iseg" / name / stem, format="PNG")
    parts = parts_of(tmp_path, "shapestacks", tmp_path)
    assert [len(parts[name].images) for name in ("test", "val", "train")] == [2, 2, 4]
    rows = [14 + i * 196 // 64 for i in range(64)]
    for k, camera in enumerate((1, 10)):
        assert np.array_equal(parts["val"].labels[k], owners["b-2", camera][rows][:, rows])


@pytest.fixture
def photos(tmp_path):
    """Images of several formats and sizes, in nested folders, with masks of several kinds."""
    random, data = np.random.default_rng(0), tmp_path / "photos"
    (data / "images" / "more").mkdir(parents=True)
    (data / "masks" / "more").mkdir(parents=True)
    for i in range(12):
        size = (50 + i, 80 - i)
        suffix = ("png", "jpg", "webp", "JPEG")[i % 4]
        folder = "more" if i % 2 else "."
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "images" / folder / f"{i:02d}.{suffix}")
        values = random.choice([0, 40, 255], (size[0] // 10 + 1, size[1] // 10 + 1))
        values = values.repeat(10, 0).repeat(10, 1)[: size[0], : size[1]].astype(np.uint8)
        if i == 3:  # colours
            values = np.stack((values, values // 2, values * 0), axis=2)
        Image.fromarray(values).save(data / "masks" / folder / f"{i:02d}.png")
    (data / "images" / "notes.txt").write_text("no image")
    (data / "images" / ".hidden.png").write_text("no image")
    (data / "images" / ".trash").mkdir()
    (data / "images" / ".trash" / "99.png").write_text("no image")
    return data


def test_a_folder_takes_any_images_with_or_without_masks(tmp_path, photos):
    with_masks = parts_of(tmp_path, "folder", photos, 32, 48)
    images, masks = photos / "images", photos / "masks"
    named = parts_of(tmp_path, "folder", images, 32, 48, masks)
    assert torch.equal(with_masks["all"].labels, named["all"].labels)
    assert [len(with_masks[name].images) for name in ("test", "val", "train")] == [1, 1, 10]
    assert with_masks["all"].images.shape == (12, 3, 32, 48)
    assert with_masks["all"].labels.unique().tolist() == [0, 1, 2]  # 40 and 255, or two colours
    without = parts_of(tmp_path, "folder", images, 32, 48)
    assert without["all"].labels is None
    assert torch.equal(without["all"].images, with_masks["all"].images)


def test_masks_and_images_of_a_folder_must_agree(tmp_path, photos):
    (photos / "masks" / "00.png").rename(photos / "masks" / "77.png")
    with pytest.raises(FileNotFoundError, match="00.png has no mask"):
        parts_of(tmp_path, "folder", photos)
    Image.new("L", (80, 50)).save(photos / "masks" / "00.png")
    with pytest.raises(FileNotFoundError, match="77.png has no image"):
        parts_of(tmp_path, "folder", photos)
    (photos / "masks" / "77.png").unlink()
    Image.new("L", (5, 5)).save(photos / "masks" / "00.png")
    with pytest.raises(ValueError, match="00.png is 5x5, its image 80x50: they must be of one"):
        parts_of(tmp_path, "folder", photos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no PNG, JPEG or WebP image"):
        parts_of(tmp_path, "folder", tmp_path / "empty")
    labels = Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80))
    labels.save(photos / "masks" / "00.png")
    with pytest.raises(ValueError, match="00.png has label 3999: there can be 255 objects at most"):
        parts_of(tmp_path, "folder", photos)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_damaged_image_of_a_folder_is_named_and_skipped_unless_there_are_many(tmp_path, capsys):
    for i in range(100):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    (tmp_path / "007.png").write_bytes((tmp_path / "007.png").read_bytes()[:60])
    images = parts_of(tmp_path, "folder", tmp_path, 32, 32)["all"].images
    assert images[:, 0, 0, 0].tolist() == [i for i in range(100) if i != 7]
    assert "1 damaged images were skipped" in (err := capsys.readouterr().err) and "007.png" in err
    (tmp_path / "008.png").write_text("no image")
    with pytest.raises(ValueError, match="2 of 100 images are damaged, more than one in a hundred"):
        parts_of(tmp_path, "folder", tmp_path, 32, 32)


def test_a_cache_is_used_again_unless_it_was_changed_or_made_otherwise(tmp_path, photos):
    decoded, decode = [], astseg.crop_and_resize

    def watched(*arguments):
        decoded.append(1)
        return decode(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(astseg, "crop_and_resize", watched)
        folder = tmp_path / "cache" / "folder"

        def count_decoded(height=32) -> int:
            decoded.clear()
            again = parts_of(tmp_path, "folder", photos, height)["all"].images
            assert torch.equal(again, first) or height != 32
            return len(decoded)

        first = parts_of(tmp_path, "folder", photos, 32)["all"].images.clone()
        assert count_decoded() == 0
        cut(folder / "images.u8", 1000)
        assert count_decoded() == 12
        (folder / "labels.u8").write_bytes(bytes((folder / "labels.u8").stat().st_size))
        assert count_decoded() == 12
        (folder / "manifest.json").write_text("{")
        assert count_decoded() == 12
        assert count_decoded(40) == 12 and count_decoded() == 12
        os.utime(photos / "images" / "00.png", (1, 1))
        assert count_decoded() == 12 and count_decoded() == 0


def test_an_interrupted_decoding_goes_on_where_it_was(tmp_path, room_records, monkeypatch):
    path = write_records(tmp_path / "objects_room_train.tfrecords", room_records[2])
    expected = parts_of(tmp_path, "objectsroom", path)["all"]
    folder, seen, decode = tmp_path / "cut", [], astseg.crop_and_resize
    monkeypatch.setattr(astseg, "PROGRESS_SECONDS", 0)

    def killed(*arguments):
        seen.append(1)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return decode(*arguments)

    source = astseg.open_source("objectsroom", path)
    monkeypatch.setattr(astseg, "crop_and_resize", killed)
    with pytest.raises(KeyboardInterrupt):
        astseg.cached_parts(source, folder, 64, 64)
    state = json.loads((folder / "progress.json").read_text())
    assert 0 < state["items"] < 12 and not (folder / "manifest.json").exists()
    with open(folder / "images.u8", "ab") as file:
        file.write(b"half an image")  # written after the last note of progress
    seen[:] = [1] * 8
    parts = astseg.cached_parts(source, folder, 64, 64)
    assert len(seen) - 8 == 12 - state["items"]
    assert all(torch.equal(a, b) for a, b in zip(parts["all"], expected))
    assert sorted(p.name for p in folder.iterdir()) == ["images.u8", "labels.u8", "manifest.json"]


def test_two_programs_that_decode_at_once_wait_for_each_other(tmp_path, photos):
    script = (
        "import sys, zlib, astseg; from pathlib import Path\n"
        "source = astseg.open_source('folder', Path(sys.argv[1]))\n"
        "images = astseg.cached_parts(source, Path(sys.argv[2]), 32, 32)['all'].images\n"
        "print(len(images), zlib.crc32(images.numpy().tobytes()))"
    )
    command = [sys.executable, "-c", script, str(photos), str(tmp_path / "cache" / "shared")]
    both = [subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE) for _ in range(2)]
    images = parts_of(tmp_path, "folder", photos, 32, 32)["all"].images
    expected = f"12 {zlib.crc32(images.numpy().tobytes())}\n".encode()
    assert [process.communicate()[0] for process in both] == [expected, expected]


def test_a_killed_decoding_resumes_to_the_same_arrays(tmp_path, photos):
    script = (
        "import sys, time, astseg; from pathlib import Path; astseg.PROGRESS_SECONDS = 0\n"
        "resize = astseg.crop_and_resize\n"
        "astseg.crop_and_resize = lambda *a: (time.sleep(0.3), resize(*a))[1]\n"
        "source = astseg.open_source('folder', Path(sys.argv[1]))\n"
        "astseg.cached_parts(source, Path(sys.argv[2]), 32, 32)"
    )
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", script, str(photos), str(folder)], cwd=HERE)
    for _ in range(600):
        if (folder / "progress.json").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    parts = astseg.cached_parts(astseg.open_source("folder", photos), folder, 32, 32)
    expected = parts_of(tmp_path, "folder", photos, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(parts["all"], expected["all"]))


def test_a_full_disk_while_decoding_is_one_sentence_and_leaves_nothing(
    tmp_path, photos, monkeypatch
):
    def full(path, mode="r"):  # the device that the kernel keeps for this
        return open("/dev/full" if Path(path).name == "images.u8" else path, mode)

    monkeypatch.setattr(astseg, "open", full, raising=False)
    with pytest.raises(OSError, match="no space left on the disk for .*choose another --cache"):
        parts_of(tmp_path, "folder", photos, 32, 32)
    assert not (tmp_path / "cache").exists()


def test_memory_stays_bounded_while_records_pass_through():
    ahead, largest = [0], [0]

    def items():
        for i in range(500):
            ahead[0] += 1
            largest[0] = max(largest[0], ahead[0])
            yield i

    for i, value in enumerate(astseg.map_in_order(lambda x: x * x, items())):
        ahead[0] -= 1
        assert value == i * i
    assert largest[0] <= 4 * (os.cpu_count() or 1) + 2


def test_the_backgrounds_of_a_fixed_scene_are_simple_and_of_varied_ones_complex():
    fixed = torch.rand(1, 3, 8, 8).expand(20, -1, -1, -1) + 0.01 * torch.rand(20, 3, 8, 8)
    assert astseg.background_complexity(fixed) < 0.24
    assert astseg.background_complexity(torch.rand(20, 3, 8, 8)) > 0.24
    two = torch.tensor([0.0, 0.0, 0.5])[:, None, None, None].expand(-1, 3, 1, 1)
    assert astseg.background_complexity(two) == pytest.approx(math.tanh(1.5 / 0.25) / 3)


def test_a_folder_without_masks_trains_and_says_where_metrics_need_them(tmp_path, photos, capsys):
    shutil.rmtree(photos / "masks")
    flags = ["--dataset", "folder", "--data", str(photos), "--preset", "small"]
    flags += ["--cache", str(tmp_path / "cache"), "--background_choice"]
    metrics = run_tiny(tmp_path / "run", *flags)
    assert set(metrics) == {"MSE", "images", "seconds", "seed"}
    assert "the complexity of the background is" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("backgrounds*"))
    with pytest.raises(ValueError, match="has no label maps, which metrics need"):
        train.main(["--evaluate", str(tmp_path / "run")])


def test_a_run_is_evaluated_on_another_data_set_and_several_runs_together(
    tmp_path, whole_run, photos, capsys
):
    folder, _ = whole_run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    flags = ["--dataset", "folder", "--data", str(photos), "--cache", str(tmp_path / "cache")]
    train.main(["--evaluate", str(folder), str(copy), *flags, "--part", "all"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["Model", folder.name, "copy", "mean", "deviation"]
    assert rows[3].split()[1:] == rows[1].split()[1:] and rows[4].split()[1] == "0.00"
    assert set(json.loads((copy / "evaluation-folder-all.json").read_text())) == set(train.METRICS)


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("clevrtex", (128, 10, True, "complex", 500_000)),
        ("camo", (128, 10, True, "complex", 500_000)),
        ("clevr", (128, 10, False, "simple", 2_500)),
        ("objectsroom", (64, 3, True, "complex", 500_000)),
        ("shapestacks", (64, 6, False, "complex", 500_000)),
    ],
)
def test_a_data_set_of_the_paper_comes_with_its_settings(dataset, expected):
    config, training, _ = train.parse_arguments(["--dataset", dataset, "--data", "x"])
    settings = (config.height, config.slots, config.anisotropic, config.background_kind)
    assert (*settings, training.background_steps) == expected
    assert (training.steps, training.lr, config.refinement_start) == (125_000, 4e-5, "stock")


# -------------------------------------------------------------------------------------------------
# The notebook

NOTEBOOK = HERE / "equivariance_proof.ipynb"


def test_the_notebook_runs_from_top_to_bottom_in_a_clean_kernel():
    """Each of its claims is an assert, so that running it is the check."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute()  # raises what a cell raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(cell.source.count("assert ") for cell in code) > 50
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]


def test_the_notebook_is_stored_with_its_outputs_and_nothing_of_the_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 18 and len(outputs) > 40
    text = "".join(o.get("text", "") for o in outputs)
    assert not re.search(r"Warning|/tmp|/home|/root|site-packages", text)
    for before, cell in zip(cells, cells[1:]):
        assert {before.cell_type, cell.cell_type} != {"code"}  # prose between
        assert cell.cell_type == "markdown" or cell.source.count("\n") < 15


# -------------------------------------------------------------------------------------------------
# The map to the paper


def test_the_table_at_the_head_of_the_module_names_what_is_there_in_its_order():
    head, source = astseg.__doc__, (HERE / "astseg.py").read_text()
    rows = re.findall(r"^    (?:section|Table|Algorithm|Figure).*?  +(\w.*)$", head, re.MULTILINE)
    names = [name for row in rows for name in row.split(", ")]
    assert len(names) > 25
    places = [re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE) for name in names]
    assert all(places), [name for name, place in zip(names, places) if not place]
    assert [place.start() for place in places] == sorted(place.start() for place in places)


def test_each_equation_stands_at_its_line():
    source = (HERE / "astseg.py").read_text()
    tags = {
        int(n)
        for tag in re.findall(r"# .*?eqs?\. (\(.*\))", source)
        for n in re.findall(r"\d+", tag)
    }
    assert tags >= {1, 4, *range(10, 23)} - {2, 3}


def test_the_usage_example_runs_as_written():
    code = "\n".join(
        line.strip()[4:] for line in astseg.__doc__.splitlines() if line.strip().startswith(">>>")
    )
    names = {}
    exec(code, names)
    assert names["labels"].shape == (2, 64, 64)


def test_each_open_choice_is_listed_in_the_readme():
    code = (HERE / "astseg.py").read_text() + (HERE / "train.py").read_text()
    readme = (HERE / "README.md").read_text().replace("\n", " ")
    choices = [c.strip() for c in re.findall(r"# open: ([^\n]+)", code) if '"' not in c]
    assert len(choices) >= 12
    starts = [choice.split(";")[0].split(".")[0] for choice in choices]
    assert not [start for start in starts if start not in readme]
    table = readme.partition("Each row carries `# open:`")[2].partition("The presets")[0]
    rows = [row for row in table.split("| `")[:-1] if row.strip(" |")]
    assert len(rows) >= 12 and not [row for row in rows if not any(s in row for s in starts)]


def test_importing_the_module_is_silent_and_touches_no_random_state():
    code = (
        "import torch as t; a = t.get_rng_state(); import astseg; assert a.equal(t.get_rng_state())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_code_is_short_and_narrow():
    for name in ("astseg.py", "train.py"):
        lines = (HERE / name).read_text().splitlines()
        assert all(len(line) <= 100 for line in lines)
        assert not any("TODO" in line for line in lines)
