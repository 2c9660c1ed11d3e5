"""The specification of AST-Seg, executable: `pytest test_astseg.py`.

Each part is compared with something independent of it: a loop over pixels, a closed form,
scikit-learn, an exhaustive search, a number of the paper, or a property.
"""

import gzip
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

# The sizes here are tiny: several threads would only wait for each other. The bits are a CPU's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

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


# ---- Section 2 ----


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
    logits = torch.full((16, 16), -200.0).double()
    logits[5:10, 5:10] = torch.randn(5, 5).double()
    moved = astseg.soft_argmax(logits.roll((v, u), (0, 1)))
    assert close(moved, astseg.soft_argmax(logits) + shift, 1e-10)


def test_soft_argmax_is_in_fp32_under_autocast_and_for_half_precision():
    logits = torch.randn(8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        position = astseg.soft_argmax(logits)
    assert position.dtype == torch.float32
    assert torch.equal(position, astseg.soft_argmax(logits.float()))
    assert astseg.soft_argmax(logits.double()).dtype == torch.float64


def test_soft_argmax_takes_any_leading_dimensions_and_logits_of_any_size():
    logits = torch.zeros(2, 3, 4, 6)
    logits[..., 2, 5] = 1e30
    assert torch.equal(astseg.soft_argmax(logits), torch.tensor([5.0, 2.0]).expand(2, 3, 2))
    logits = logits.clamp(max=3)
    assert close(astseg.soft_argmax(logits + 1e4), astseg.soft_argmax(logits))


def test_gradient_of_soft_argmax_is_s_times_p_minus_mean():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mean = astseg.soft_argmax(logits)
    softmax = logits.detach().flatten().softmax(0).view(4, 5)
    for axis in range(2):
        (gradient,) = torch.autograd.grad(mean[axis], logits, retain_graph=True)
        p = torch.arange(5) if axis == 0 else torch.arange(4)[:, None]
        assert close(gradient, softmax * (p - mean[axis].detach()), 1e-12)


# ---- Configuration ----


def test_the_defaults_are_table_6():
    c, t = Config(), train.Training()
    assert (c.dim_z_what, t.entropy_weight, t.entropy_warmup, c.log_alpha_0) == (32, 1e-2, 10_000, 11)
    assert (c.scale_min, c.scale_max) == (1.3, 24)
    assert (c.dim_transformer, c.transformer_heads, c.dim_feedforward, c.transformer_layers) == (
        256, 8, 512, 6,
    )  # fmt: skip
    assert (t.background_batch, t.background_lr, t.background_steps) == (128, 2e-3, 500_000)
    assert (t.batch, t.lr, t.steps, t.phase2_steps, t.warmup) == (64, 4e-5, 125_000, 30_000, 5_000)


@pytest.mark.parametrize(
    "dataset, side, slots, isotropic, channels",
    [("clevrtex", 128, 10, False, 45), ("clevr", 128, 10, True, 44),
     ("objectsroom", 64, 3, False, 38), ("shapestacks", 64, 6, True, 40)],
)  # fmt: skip
def test_the_paper_settings_of_each_data_set(dataset, side, slots, isotropic, channels):
    c = Config(**astseg.PAPER_SETTINGS[dataset])
    assert (c.height, c.width, c.slots, not c.anisotropic) == (side, side, slots, isotropic)
    with torch.device("meta"):
        assert ASTSeg(c).generator.segformer.config.num_labels == channels


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(slots=0), "slots is 0: use a positive number"),
        (dict(slots=256), "slots is 256: label maps hold 255 objects at most"),
        (dict(dim_z_what=-1), "dim_z_what is -1: use a positive number"),
        (dict(scale_min=0), "scale_min is 0: use a positive number"),
        (dict(backbone="b9"), "backbone is 'b9'"),
        (dict(background_kind="hard"), "background_kind is 'hard'"),
        (dict(height=64, width=193), "use sides of 32..192"),
        (dict(dropout=1.0), "dropout is 1.0: use 0..1, without 1"),
        (dict(scale_min=5, scale_max=5), "scale_min is 5 and scale_max 5"),
        (dict(generator="resnet"), "generator is 'resnet': use one of segformer, unet"),
        (dict(height=31, width=64), "images are (31, 64): use sides of 32..192"),
        (dict(transformer_heads=7), "7 heads do not divide dim_transformer 256"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Config(**change)
    assert "\n" not in str(error.value)


# ---- Section 4.1: generators ----


@pytest.mark.parametrize("channels, count", [(38, 22_237_860), (40, 22_242_304), (45, 22_253_764)])
def test_unet_has_the_parameters_of_table_8(channels, count):
    assert parameters(astseg.UNetGenerator(channels)) == count


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


def save_segformer(folder: Path, size: str):
    """A classifier in the layout of nvidia/mit-b3: its backbone under the prefix segformer."""
    depths, widths, heads, _ = astseg.MIT_SIZES[size]
    config = transformers.SegformerConfig(
        depths=depths, hidden_sizes=widths, num_attention_heads=heads
    )
    model = transformers.SegformerForImageClassification(config)
    model.save_pretrained(folder)
    return model


def test_a_backbone_that_is_missing_or_of_another_size_is_refused(tmp_path):
    generator = astseg.SegformerGenerator(7, "tiny")
    save_segformer(tmp_path / "b0", "b0")
    for source in (tmp_path / "nothing", tmp_path / "b0"):
        with pytest.raises(OSError, match=r"has no Segformer backbone of widths \[16, 32, 64, 128\]"):
            generator.load_backbone(str(source))


# ---- Algorithm 1 ----


def test_encoder_is_equations_11_to_16_pixel_by_pixel():
    K, Z, h, w = 2, 3, 3, 4
    encoder = astseg.Encoder(K, 2, Z)  # no refinement
    maps = torch.randn(1, K + 3 + Z, h, w)
    seen = {}
    encoder.latents = lambda slots: seen.update(slots=slots)
    _, attention, position = encoder(maps)
    for k in range(K):
        total = sum(math.exp(maps[0, k, j, i]) for j in range(h) for i in range(w))
        x0 = y0 = 0.0
        phi0 = torch.zeros(3 + Z)
        for j, i in itertools.product(range(h), range(w)):
            a = math.exp(maps[0, k, j, i]) / total  # (11)
            assert abs(attention[0, k, j, i].item() - a) < 1e-6
            x0 += a * (2 * i / (w - 1) - 1)  # (12), (14)
            y0 += a * (2 * j / (h - 1) - 1)  # (13), (15)
            phi0 += a * maps[0, K:, j, i]  # (16)
        assert close(position[0, k], torch.tensor([x0, y0]))
        assert close(seen["slots"][0, k], torch.cat((torch.tensor([x0, y0]), phi0)))
    x, y = astseg.normalized_coordinates(h, w)
    assert torch.equal(position, astseg.soft_argmax(maps[:, :K], x, y))


def test_a_single_cell_is_at_0():
    x, y = astseg.normalized_coordinates(1, 5)
    assert x.tolist() == [-1, -0.5, 0, 0.5, 1] and y.tolist() == [0]


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
    refinement = astseg.Refinement(12, 64, 4, 32, 2).eval()
    if start == "identity":
        astseg.start_as_identity(refinement)
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
    identity, stock = (astseg.Refinement(12, 128).eval() for _ in range(2))
    astseg.start_as_identity(identity)
    assert (identity(slots) - slots).abs().max() < 0.02
    assert (stock(slots) - slots).abs().max() > 0.2


# ---- Algorithm 2 ----


@pytest.mark.parametrize("size, count", [(32, 51_956), (64, 191_476)])
def test_glimpse_generator_has_the_shape_and_parameters_of_table_7(size, count):
    generator = astseg.GlimpseGenerator(32, size)
    glimpses = generator(torch.randn(2, 32))
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


def test_renderer_starts_at_alpha_0_and_may_learn_one_per_pixel():
    assert math.isclose(astseg.Renderer(32, 32).log_alpha_0.exp().item(), math.e**11, rel_tol=1e-5)
    renderer = astseg.Renderer(32, 40, glimpse=32, log_alpha_0=2, per_pixel=True)
    assert close(renderer.log_alpha_0, torch.full((32, 40), 2.0))


# ---- Background model ----


@pytest.mark.parametrize(
    "side, kind, encoder, decoder",
    [(64, "simple", 2_942_624, 7_679_368), (64, "complex", 2_900_096, 43_572_712),
     (128, "simple", 3_590_944, 9_331_080), (128, "complex", 21_183_616, 48_633_192)],
)  # fmt: skip
def test_background_autoencoder_has_the_parameters_of_the_authors(side, kind, encoder, decoder):
    with torch.device("meta"):
        model = astseg.BackgroundAutoencoder(side, side, kind)
    assert (parameters(model.encoder), parameters(model.decoder)) == (encoder, decoder)


@pytest.mark.parametrize("height, width", [(25, 25), (48, 48), (49, 61), (64, 96), (97, 33), (192, 150), (30, 180)])
def test_background_autoencoder_returns_every_size_that_has_a_schedule(height, width):
    model = astseg.BackgroundAutoencoder(height, width, "simple", 0.05)
    background, error = model(torch.rand(1, 3, height, width))
    assert background.shape == (1, 3, height, width) and error.shape == (1, height, width)
    assert background.min() >= 0 and background.max() <= 1
    assert model.encoder(torch.rand(1, 3, height, width)).shape == (1, 16, 1, 1)


def test_background_schedule_has_the_blocks_of_the_authors():
    for sides, blocks in [((25, 48), 5), ((49, 96), 6), ((97, 192), 7)]:
        for side in sides:
            assert len(astseg.background_blocks(side, side)) == blocks


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("height, width", [(3, 5), (1, 1)])
def test_row_and_column_are_two_more_channels_and_one_on_a_single_pixel(kind, height, width):
    block = astseg.CoordConv(kind(5, 16, 3, 1, 1, bias=False))
    x = torch.randn(2, 3, height, width)
    rows = torch.linspace(-0.5, 0.5, height) if height > 1 else torch.ones(1)
    columns = torch.linspace(-0.5, 0.5, width) if width > 1 else torch.ones(1)
    where = torch.stack((rows[:, None].expand(height, width), columns.expand(height, width)))
    appended = torch.cat((x, where.expand(2, 2, height, width)), dim=1)
    assert close(block(x), F.celu(block.norm(block.convolution(appended))))


def test_robust_background_loss_is_that_of_a_loop_over_pixels():
    H, W = 3, 80  # wide enough for a pooling window of 3
    images, background, predicted = torch.rand(1, 3, H, W), torch.rand(1, 3, H, W), torch.rand(1, H, W)
    background[..., :40] = images[..., :40] + 0.01 * torch.randn(1, 3, H, 40)

    def smooth_l1(a, b):
        d = abs(float(a) - float(b))
        return d * d / 2 / (3 / 255) if d < 3 / 255 else d - 3 / 255 / 2

    e, total = np.zeros((H, W)), 0.0
    for c, j, i in itertools.product(range(3), range(H), range(W)):
        e[j, i] += smooth_l1(background[0, c, j, i], images[0, c, j, i])
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
    expected = math.exp(-6 * math.tanh(error / 0.25)) / 16
    assert close(background.grad, torch.full((1, 3, 4, 4), expected), 1e-7)


# ---- The whole model ----


@pytest.mark.parametrize(
    "change",
    [{}, dict(anisotropic=False), dict(transformer=False), dict(generator="unet", unet_width=0.1),
     dict(height=40, width=56), dict(alpha_0_per_pixel=True)],
)  # fmt: skip
def test_the_model_names_everything_it_says(change):
    model = ASTSeg(Config(**{**SMALL, **change})).eval()
    c, B, K = model.config, 2, 3
    H, W = size = (c.height, c.width)
    output = model(torch.rand(B, 3, *size))
    h, w = size if c.generator == "unet" else (H // 4, W // 4)
    shapes = dict(
        reconstruction=(B, 3, H, W), background=(B, 3, H, W), weights=(B, K + 1, H, W),
        layers=(B, K, 3, H, W), masks=(B, K, H, W), glimpses=(B, K, 4, 32, 32),
        attention=(B, K, h, w), attention_position=(B, K, 2), position=(B, K, 2),
        scale=(B, K, 2), activation=(B, K), z_what=(B, K, 32),
    )  # fmt: skip
    tensors = output._asdict() | output.latents._asdict()
    del tensors["latents"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert close(output.weights.sum(1), torch.ones(B, *size))
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
        (torch.rand(3, 32, 32), "images are (3, 32, 32): this model takes (B, *(3, 32, 32))"),
        (torch.rand(0, 3, 32, 32), "images are (0, 3, 32, 32)"),
        (torch.zeros(1, 3, 32, 32).byte(), "images are torch.uint8, the model torch.float32"),
        (torch.rand(1, 3, 64, 64), "images are (1, 3, 64, 64)"),
        (torch.rand(1, 3, 32, 32).double(), "images are torch.float64"),
        (torch.full((1, 3, 32, 32), -0.1), "images have values -0.1"),
        (torch.full((1, 3, 32, 32), 255.0), "images have values 255..255"),
        (torch.full((1, 3, 32, 32), math.nan), "images have values nan"),
    ],
)
def test_images_that_the_model_cannot_take_are_refused(images, message):
    model = ASTSeg(Config(**SMALL)).eval()
    for call in (model, model.segment):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(images)


def test_images_that_resampling_rounded_beyond_1_are_taken():
    white = F.interpolate(torch.ones(1, 3, 100, 130), (32, 32), mode="bilinear", antialias=True)
    assert white.max() > 1 and ASTSeg(Config(**SMALL)).eval().segment(white).shape == (1, 32, 32)


def test_the_model_can_be_exported():
    model, images = ASTSeg(Config(**SMALL)).eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        assert close(exported(images).weights, model(images).weights)


def test_a_saved_model_loads_with_its_configuration_and_says_the_same(tmp_path):
    model = ASTSeg(Config(**SMALL, anisotropic=False)).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = ASTSeg.from_pretrained(str(tmp_path / "model")).eval()
    assert loaded.config == model.config
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images).reconstruction, loaded(images).reconstruction)
    (tmp_path / "model" / "model.safetensors").unlink()
    ASTSeg(Config(**SMALL)).save_pretrained(tmp_path / "other")  # anisotropic: other weights
    os.replace(tmp_path / "other" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(RuntimeError):
        ASTSeg.from_pretrained(str(tmp_path / "model"), strict=True)


def test_the_output_under_bf16_autocast_is_fp32_where_it_must_be():
    model = ASTSeg(Config(**SMALL)).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    for tensor in (output.attention, *output.latents, output.weights, output.reconstruction):
        assert tensor.dtype == torch.float32
    assert close(output.latents.position, model(images).latents.position, 0.05)


# ---- Section 4.2 ----


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


# ---- Section 5.1: metrics ----


def test_ari_fg_is_that_of_scikit_learn_over_the_foreground():
    target, predicted = torch.randint(4, (20, 6, 6)), torch.randint(5, (20, 6, 6))
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
        scores = total / pairs, (total - background) / (pairs - 1)
        best = max(best, (round(total, 12), -pairs, *scores))
    return best[2:]


def test_mean_iou_is_the_best_of_all_matchings():
    target, predicted = torch.randint(4, (2, 10, 5, 5))
    predicted[:5] = torch.where(torch.rand(5, 5, 5) < 0.7, (target[:5] + 1) % 4, predicted[:5])
    ours, ours_foreground = astseg.mean_iou(target, predicted, 3)
    for i in range(10):
        best = exhaustive_mean_iou(target[i], predicted[i], 4)
        assert (ours[i].item(), ours_foreground[i].item()) == pytest.approx(best)


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


def test_more_objects_than_slots_cost_mean_iou():
    target = torch.arange(6).repeat(6, 1)[None]  # five objects
    predicted = target * (target < 4)  # three slots found three of them
    assert astseg.mean_iou(target, predicted, 3)[0].item() == pytest.approx((6 / 18 + 3) / 6)


def test_squared_error_is_summed_over_pixels_and_colours():
    error = astseg.squared_error(torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), 0.5))
    assert close(error, torch.full((2,), 60 * 0.25))


def test_label_maps_that_do_not_fit_are_refused():
    zeros = torch.zeros(1, 4, 4).long()
    for wrong, message in [
        (torch.zeros(1, 4, 5).long(), "a label map is torch.int64 (1, 4, 5), its target (1, 4, 4)"),
        (zeros * 0.9, "a label map is torch.float32 (1, 4, 4): use tensors (B, H, W) of integers"),
        (zeros[0], "a label map is torch.int64 (4, 4)"),
        (zeros - 1, "of integers from 0"),
        (zeros.numpy(), "a label map is int64 (1, 4, 4): use tensors"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            astseg.mean_iou(zeros, wrong, 3)


def test_labels_of_any_size_and_kind_count_as_one_each():
    target = torch.tensor([[[0, 26_001], [7, 7]]])
    assert astseg.mean_iou(target, target // 5, 3)[0].item() == 1
    assert astseg.mean_iou(target.to(torch.uint16), target.int(), 3)[0].item() == 1
    target = torch.randint(25, (2, 8, 8), dtype=torch.uint8)
    assert astseg.mean_iou(target, target, 24)[0].tolist() == [1, 1]
    assert astseg.adjusted_rand_index(target, target, 24).tolist() == [1, 1]


# ---- The embedded data set ----


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


# ---- train.py ----

TINY = (
    "--height 32 --width 32 --slots 4 --dim_transformer 64 --transformer_layers 1 "
    "--train_images 40 --background_steps 6 --steps 12 --phase2_steps 6 --background_batch 4 "
    "--batch 4 --warmup 2 --log_every 2 --evaluate_every 6 --checkpoint_every 4"
).split()


def run_tiny(folder, *more):
    train.main([*TINY, "--output", str(folder), *map(str, more)])
    return json.loads((folder / "metrics.json").read_text())


def weights_of(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_tiny(folder)


def test_the_schedule_of_each_scenario():
    t = train.Training()
    background = ("background", 0, 500_000)
    both = [("foreground", 0, 30_000), ("joint", 30_000, 125_000)]
    assert train.curriculum(t) == [background, *both]
    assert train.curriculum(replace(t, scenario="BT")) == [("joint", 0, 125_000)]
    frozen = train.curriculum(replace(t, scenario="frozen"))
    assert frozen == [background, ("foreground", 0, 125_000)]


def test_each_epoch_shows_each_image_once():
    seen = torch.cat([train.batch_indices(step, 4, 20, 7) for step in range(10)])
    assert torch.equal(seen[:20].sort().values, torch.arange(20))
    assert torch.equal(seen[20:].sort().values, torch.arange(20))
    assert not torch.equal(seen[:20], seen[20:])
    assert torch.equal(train.batch_indices(7, 4, 20, 7), seen[28:32])


@pytest.mark.parametrize("flip", [False, True])
def test_flip_mirrors_an_image_and_its_background_alike(flip):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    training = train.Training(flip=flip)
    found, behind = train.load_batch([images, 255 - images], 3, 40, training)
    index = train.batch_indices(3, 40, 40, training.seed)
    straight = ((found * 255).round() == images[index]).all(3).all(2).all(1)
    mirrored = ((found * 255).round() == images[index].flip(3)).all(3).all(2).all(1)
    assert (straight ^ mirrored).all() and mirrored.any() == flip and straight.any()
    assert close(found + behind, torch.ones(1))


@pytest.mark.parametrize(
    "name, trained",
    [("background", {"background"}), ("foreground", {"generator", "encoder", "renderer"}),
     ("joint", {"background", "generator", "encoder", "renderer"})],
)  # fmt: skip
def test_each_phase_trains_its_own_parts_with_its_own_optimiser(name, trained):
    model, images = ASTSeg(Config(**SMALL)), torch.rand(2, 3, 32, 32)
    parts = dict(model.named_children())
    optimizer = train.make_optimizer(model, name, train.Training())
    train.set_learning_rate(optimizer, name, 50, train.Training())
    before = {part: [p.clone() for p in m.parameters()] for part, m in parts.items()}
    astseg.full_loss(images, model(images), 50).backward()
    optimizer.step()
    moved = {
        part for part, m in parts.items()
        if any(not torch.equal(a, b) for a, b in zip(before[part], m.parameters()))
    }  # fmt: skip
    expected = ((0.9, 0.999), 1e-8) if name == "background" else ((0.9, 0.98), 1e-9)
    assert moved == trained and (optimizer.defaults["betas"], optimizer.defaults["eps"]) == expected


def test_which_rate_an_update_uses_and_on_what():
    t = train.Training(refinement_lr_factor=0.5, glimpse_lr_factor=3.0, background_steps=20)
    model = ASTSeg(Config(**SMALL))
    optimizer = train.make_optimizer(model, "foreground", t)

    def rates(optimizer, phase, step):
        train.set_learning_rate(optimizer, phase, step, t)
        return pytest.approx([group["lr"] for group in optimizer.param_groups])

    peak = [4e-5, 4e-5, 2e-5, 12e-5, 4e-5]  # background, generator, refinement, glimpses, alpha_0
    assert peak == rates(optimizer, "foreground", 4_999)  # step t + 1
    assert [rate / 5_000**2 for rate in peak] == rates(optimizer, "foreground", 0)
    optimizer = train.make_optimizer(model, "background", t)
    assert [2e-3] == rates(optimizer, "background", 15)
    assert [2e-4] == rates(optimizer, "background", 16)  # the first of the last fifth of 20


def test_a_step_is_one_graph_for_the_compiler():
    model = train.build_model(train.Training(**train.SHAPES | SMALL))
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for arguments in ([images, images], [images]):  # phases 2 and 3
            output = torch.compile(model, backend="eager", fullgraph=True)(*arguments)
            assert output.weights.shape == (2, 4, 32, 32)


def test_memorised_backgrounds_are_those_of_the_autoencoder_at_8_bits(tmp_path):
    model, images = ASTSeg(Config(**SMALL)), astseg.draw_shapes(7, 0, 32).images
    memory = train.memorise_backgrounds(model, images, tmp_path / "backgrounds.u8")
    live = model.background(images / 255)[0]
    assert memory.dtype == torch.uint8 and (memory / 255 - live).abs().max() <= 0.5 / 255 + 1e-6


def test_a_run_leaves_all_that_it_promises_and_is_evaluated_again(whole_run, capsys):
    folder, metrics = whole_run
    assert set(metrics) == {*train.METRICS, "images", "seconds", "seed"}
    assert all(type(value) in (int, float) for value in metrics.values())
    for name in ("segmentation.png", "slots.png", "curves.png", "training.gif"):
        assert Image.open(folder / name).size[0] > 300
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 2, 4, 6, 8, 10, 12]
    assert not [*folder.glob("*.tmp"), *folder.glob("*.u8")]
    train.main(["--evaluate", str(folder), str(folder)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    again = json.loads((folder / "evaluation-shapes-test.json").read_text())
    assert all(again[name] == pytest.approx(metrics[name]) for name in train.METRICS)
    cells = [f"{metrics[m] * (1 if m == 'MSE' else 100):.2f}" for m in train.METRICS]
    assert rows == [["run", *cells], ["run", *cells], ["mean", *cells], ["deviation", *["0.00"] * 5]]


DRIVER = """
import os, signal, sys
sys.path.insert(0, {here!r})
import train
rate = train.set_learning_rate
def killed(optimizer, phase, step, training):
    if (phase, step) == {moment!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(optimizer, phase, step, training)
train.set_learning_rate = killed
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "moment", [("background", 5), ("foreground", 1), ("foreground", 5), ("joint", 11)]
)
def test_a_killed_run_resumes_to_bit_identical_results(moment, tmp_path, whole_run):
    script = DRIVER.format(here=str(HERE), moment=moment)
    command = [sys.executable, "-c", script, *TINY, "--output", str(tmp_path / "run")]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    train.main(["--resume", str(tmp_path / "run")])
    ours = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert ours | {"seconds": 0} == whole_run[1] | {"seconds": 0}
    assert weights_of(tmp_path / "run") == weights_of(whole_run[0])


def test_two_processes_train_as_one(tmp_path):
    flags = [*TINY, "--scenario", "frozen", "--steps", "1", "--phase2_steps", "0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command, name in (([sys.executable], "one"), (launcher, "two")):
        command = [*command, str(HERE / "train.py"), *flags, "--output", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("phase 2,") == 1, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / n / "checkpoint.pt")["model"] for n in ("one", "two"))
    learned = [name for name in one if name.startswith("background")]  # without batch norm
    assert learned and all(close(one[name], two[name], 1e-4) for name in learned)


@pytest.mark.parametrize(
    "flags, effect",
    [
        ("--no_transformer", lambda t, m: not parameters(m.encoder)),
        ("--slots 5", lambda t, m: m.encoder.slots == 5),
        ("--generator unet", lambda t, m: hasattr(m.generator, "up")),
        ("--entropy_weight 0", lambda t, m: t.entropy_weight == 0),
        ("--scenario BT", lambda t, m: len(train.curriculum(t)) == 1),
        ("--anisotropic true --anisotropic false", lambda t, m: m.encoder.columns == [2, 1, 1, 32]),
        ("--anisotropic true", lambda t, m: m.encoder.columns == [2, 2, 1, 32]),
        ("--anisotropic true --no_anisotropic", lambda t, m: m.encoder.columns == [2, 1, 1, 32]),
        ("--flip", lambda t, m: t.flip),
    ],
)
def test_each_ablation_of_table_4_is_a_flag_that_does_what_it_says(flags, effect):
    training = train.Training(**train.SHAPES | train.parse([*TINY, *flags.split()]))
    assert effect(training, train.build_model(training))


def test_pretrained_is_a_flag_that_loads_the_backbone(tmp_path):
    stored = save_segformer(tmp_path / "mit", "tiny").segformer.state_dict()
    settings = train.SHAPES | train.parse(["--pretrained", str(tmp_path / "mit")])
    loaded = train.build_model(train.Training(**settings)).generator.segformer.segformer
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run_before_it_saves(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss of foreground is nan by step"):
        run_tiny(tmp_path, "--lr", "1e30", "--warmup", "0")
    model = torch.load(tmp_path / "checkpoint.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_dead_runs_are_named(tmp_path, capsys):
    model, validation = ASTSeg(Config(**SMALL, transformer=False)), astseg.draw_shapes(4, 0, 32)
    line = dict(phase="joint", step=1, loss=0.0)
    train.report(model, validation, line, [], tmp_path)
    assert "warning: no foreground yet" in capsys.readouterr().out
    latents = model.encoder.latents
    model.encoder.latents = lambda slots: latents(slots + 5)
    train.report(model, validation, line, [], tmp_path)
    assert "positions are clamped" in capsys.readouterr().out


def test_segment_writes_what_it_found_in_the_pixels_of_the_image(tmp_path, whole_run):
    model = ASTSeg.from_pretrained(str(whole_run[0] / "model"))
    model.renderer.log_alpha_0.data.fill_(-3.0)  # an early model shows nothing: make it show
    model.save_pretrained(tmp_path / "run" / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    train.main(["--segment", str(tmp_path / "run"), str(tmp_path / "photo.png")])
    out = tmp_path / "run" / "segmented"
    labels = Image.open(out / "photo_labels.png")
    assert labels.mode == "P" and labels.size == Image.open(out / "photo_overlay.png").size
    labels = np.array(labels)
    assert labels.shape == (100, 160) and labels[:, :30].max() == labels[:, 130:].max() == 0
    objects = json.loads((out / "photo_objects.json").read_text())
    assert [o["label"] for o in objects] == np.unique(labels[labels > 0]).tolist() != []
    for o in objects:
        left, top, right, bottom = o["box"]
        inside = labels == o["label"]
        assert inside.sum() == o["pixels"] == inside[top : bottom + 1, left : right + 1].sum()
        assert inside[[top, bottom]].any(1).all() and inside[:, [left, right]].any(0).all()
        assert 30 <= o["position"][0] <= 130 and 0 <= o["position"][1] <= 100
        assert o["activation"] > 0 and 100 / 6 <= o["glimpse_size"][0] <= 100 / 1.3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--slots 0", "slots is 0: use a positive number"),
        ("--batch 0", "batch is 0: use a positive number"),
        ("--lr nan", "lr is nan: use a positive number"),
        ("--generator vit", "invalid choice: 'vit'"),
        ("--colour blue", "unrecognized arguments: --colour blue"),
        ("--dataset folder --data /nowhere", "/nowhere"),
        ("--resume /nowhere", "/nowhere has no checkpoint to resume from"),
        ("--evaluate /nowhere --slots 9", "leave out ['slots']"),
        ("--flip maybe", "invalid boolean value: 'maybe'"),
        ("--part val", "--part is for --evaluate only"),
        ("--dim_transformer 16", "the identity start needs 38"),
        ("--dataset folder --data .", "is inside the data: name another --output"),
        ("--phase2_steps 99999", "phase2_steps is 99999: use a part of 11500 steps"),
        ("--height 40", "shapes are drawn on squares"),
        ("--dataset clevr", "dataset clevr with data '': all but shapes need --data"),
        ("--dataset clevr --data D --masks M", "--masks belong to the images of a folder"),
        ("--train_images 3", "3 training images do not fill a batch of 16"),
        ("--resume /nowhere --lr 1", "--resume takes the run's own settings: leave out ['lr']"),
        ("--evaluate /nowhere", "/nowhere/settings.json is missing: there is no run"),
        ("--segment /nowhere", "--segment takes a run folder and then at least one image"),
        ("--segment /nowhere a.png", "/nowhere is no folder of a finished run"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        train.main(arguments.split())
    assert message in capsys.readouterr().err + str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(tmp_path, whole_run):
    for name, size in (("settings.json", None), ("checkpoint.pt", 5000)):
        (tmp_path / name).write_bytes((whole_run[0] / name).read_bytes()[:size])
    with pytest.raises(OSError, match="checkpoint.pt is damaged: delete it"):
        train.main(["--resume", str(tmp_path)])


def test_a_refusal_is_one_line_and_a_run_is_not_overwritten(whole_run):
    command = [sys.executable, str(HERE / "train.py"), "--output", str(whole_run[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "holds a run: --resume it, or name another --output" in done.stderr


def test_a_short_training_lowers_the_loss_and_wakes_the_foreground(tmp_path):
    train.main(
        ["--output", str(tmp_path), *"--height 32 --width 32 --train_images 600 --warmup 40 "
         "--background_steps 300 --steps 700 --phase2_steps 650 --decay_at 1 --log_every 50 "
         "--glimpse_lr_factor 3".split()]
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["phase"] == "foreground"]
    assert losses[-1] < 0.75 * losses[0]
    assert lines[-1]["foreground"] > 0.01 and lines[-1]["mIoU"] > 0.25


# ---- Data sets, in tiny files of the exact formats ----


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(*fields):
    """A protocol buffer message of length-delimited fields (number, content)."""
    return b"".join(varint(n << 3 | 2) + varint(len(content)) + content for n, content in fields)


def example(**arrays):
    """A tf.train.Example in which every byte is an entry of its own, as in the published files."""
    entries = [(1, message((1, b"visibility"), (2, message((2, message((1, b"\0\0\x80\x3f")))))))]
    for name, array in arrays.items():
        values = message(*((1, bytes([value])) for value in array.astype(np.uint8).flatten()))
        entries.append((1, message((1, name.encode()), (2, message((1, values))))))
    return message((1, message(*entries)))


def record(body):
    return struct.pack("<Q", len(body)) + b"sums" + body + b"sums"


def masks_of(owner, count):
    return 255 * (owner == np.arange(count)[:, None, None])[..., None]


def rooms(count, masks=7):
    """ObjectsRoom at random: images (n, 64, 64, 3), owners of the pixels (n, 64, 64), records."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    owners = random.integers(0, masks, (count, 8, 8)).repeat(8, 1).repeat(8, 2)
    bodies = [example(mask=masks_of(o, masks), image=i) for i, o in zip(images, owners)]
    return images, owners, b"".join(map(record, bodies))


def load(tmp_path, dataset, data, size=(64, 64), masks=None, **options):
    return astseg.load_dataset(dataset, data, masks, *size, cache=tmp_path / "cache", **options)


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
@pytest.mark.parametrize(
    "dataset, name, masks, test",
    [("objectsroom", "train", 7, 1), ("six_objects", "test_six_objects", 10, 12),
     ("identical_color", "test_identical_color", 10, 12), ("empty_room", "test_empty_room", 4, 12)],
)  # fmt: skip
def test_rooms_are_read_byte_by_byte(dataset, name, masks, test, compress, tmp_path):
    images, owners, records = rooms(12, masks)
    (tmp_path / f"objects_room_{name}.tfrecords").write_bytes(compress(records))
    parts = load(tmp_path, dataset, tmp_path)
    assert torch.equal(parts["all"].images, torch.from_numpy(images).movedim(3, 1))
    assert torch.equal(parts["all"].labels, torch.from_numpy(np.maximum(0, owners - 3)).byte())
    assert len(parts["test"].images) == test


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: gzip.compress(data)[:-2000], r"record \d"),
        (lambda data: data[: len(data) // 2], "record 1: it is cut short, or no record"),
        (lambda data: b"these are no records, but a text", "record 0: it is cut short"),
        (lambda data: record(b"x" * 20), "record 0: image is not 12288 entries of one byte"),
        (lambda data: record(example(image=np.zeros(12), mask=np.zeros(4))), "image is not 12288"),
    ],
)
def test_a_damaged_tfrecord_is_named_and_leaves_nothing(damage, message, tmp_path):
    path = tmp_path / "objects_room_train.tfrecords"
    path.write_bytes(damage(rooms(3)[2]))
    with pytest.raises(OSError, match=message):
        load(tmp_path, "objectsroom", path)
    assert not (tmp_path / "cache").exists()


def test_clevr_is_cropped_and_resized_as_the_paper_does(tmp_path):
    random = np.random.default_rng(1)
    small = random.integers(0, 256, (24, 32, 3)).repeat(10, 0).repeat(10, 1)
    image = (small + random.integers(-20, 20, small.shape)).clip(0, 255).astype(np.uint8)
    owner = random.integers(0, 11, (24, 32)).repeat(10, 0).repeat(10, 1)
    records = 3 * record(example(image=image, mask=masks_of(owner, 11)))
    path = tmp_path / "clevr_with_masks_train.tfrecords"
    path.write_bytes(gzip.compress(records, 1))
    images, labels = load(tmp_path, "clevr", path, (128, 128))["all"]
    crop = torch.from_numpy(image[24:216, 64:256]).movedim(2, 0)[None].float()
    resized = F.interpolate(crop, (128, 128), mode="bilinear", antialias=True)[0]
    assert (images[0] - resized).abs().max() <= 1
    rows = [24 + int((i + 0.5) * 1.5) for i in range(128)]
    columns = [64 + int((i + 0.5) * 1.5) for i in range(128)]
    assert np.array_equal(labels[0], owner[rows][:, columns])


@pytest.mark.parametrize("variant, test", [("full", 2), ("outd", 20), ("camo", 2)])
def test_clevrtex_is_read_in_the_order_of_its_numbers(variant, test, tmp_path, capsys):
    random = np.random.default_rng(0)
    for i in reversed(range(20)):
        folder = tmp_path / f"clevrtex_{variant}" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (240, 320, 4), dtype=np.uint8)
        pixels[..., 0] = i
        number = i if i < 19 else 30  # a gap
        Image.fromarray(pixels).save(folder / f"CLEVRTEX_{variant}_{number:06d}.png")
        labels = random.choice([0, 2, 5, 12], (24, 32)).repeat(10, 0).repeat(10, 1)
        flat = Image.fromarray(labels.astype(np.uint8), "P")
        flat.putpalette(list(range(255, -1, -1)) * 3)  # colours that have nothing to do with it
        flat.save(folder / f"CLEVRTEX_{variant}_{number:06d}_flat.png")
    dataset = variant.replace("full", "clevrtex")
    parts = load(tmp_path, dataset, tmp_path, (128, 128))
    assert parts["all"].images[:, 0].flatten(1).float().mean(1).tolist() == list(range(20))
    assert parts["all"].labels.unique().tolist() == [0, 2, 5, 12]  # indices as they are
    assert len(parts["test"].images) == test
    assert "warning: numbers have gaps or doubles" in capsys.readouterr().out
    flat.save(folder / "CLEVRTEX_camo_000099.png")
    with pytest.raises(ValueError, match="CLEVRTEX_camo_000099_flat.png is missing, damaged or no PNG"):
        load(tmp_path, "camo", folder, (64, 64))


def test_shapestacks_has_its_own_splits_and_label_maps(tmp_path):
    random, owners = np.random.default_rng(0), {}
    (tmp_path / "splits" / "default").mkdir(parents=True)
    for part, scenarios in {"test": ["a-1"], "eval": ["b-2"], "train": ["c-3", "d-4"]}.items():
        (tmp_path / "splits" / "default" / f"{part}.txt").write_text("\n".join(scenarios))
        for name, camera in itertools.product(scenarios, (1, 10)):
            for folder in ("recordings", "iseg"):
                (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            stem = f"rgb-w=2-f=1-l=0-c=unique-cam_{camera}-mono-0.png"
            Image.fromarray(pixels).save(tmp_path / "recordings" / name / stem)
            owners[name, camera] = owner = random.integers(0, 6, (28, 28)).repeat(8, 0).repeat(8, 1)
            values = np.stack((owner * 32 + 5, owner, owner), axis=2).astype(np.uint8)
            stem = f"iseg-w=0-f=0-l=0-c=original-cam_{camera}-mono-0.map"
            Image.fromarray(values).save(tmp_path / "iseg" / name / stem, format="PNG")
    parts = load(tmp_path, "shapestacks", tmp_path)
    assert [len(parts[name].images) for name in ("test", "val", "train")] == [2, 2, 4]
    rows = [14 + i * 196 // 64 for i in range(64)]
    for k, camera in enumerate((1, 10)):
        assert np.array_equal(parts["val"].labels[k], owners["b-2", camera][rows][:, rows])


@pytest.fixture
def photos(tmp_path):
    """Twelve images of several kinds with label maps of several kinds, and other files."""
    random, data = np.random.default_rng(0), tmp_path / "photos"
    for i in range(12):
        sub, suffix = ("", "more/")[i % 2], ("png", "jpg", "webp", "JPEG")[i % 4]
        pixels = random.integers(0, 256, (50 + i, 80 - i, 3), dtype=np.uint8)
        values = random.choice([0, 40, 255], (6, 8)).astype(np.uint8).repeat(12, 0).repeat(12, 1)
        mask = Image.fromarray(values[: 50 + i, : 80 - i])
        mask = [mask, mask.convert("1"), mask.convert("P"), mask.convert("I;16")][i // 2 % 4]
        for folder in ("images", "masks"):
            (data / folder / sub).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(data / "images" / f"{sub}{i:02d}.{suffix}")
        mask.save(data / "masks" / f"{sub}{i:02d}.png")
    (data / "images" / "notes.txt").write_text("no image")
    (data / "images" / ".hidden.png").write_text("no image")
    (data / "images" / "more").rename(tmp_path / "elsewhere")
    (data / "images" / "more").symlink_to(tmp_path / "elsewhere")
    return data


def test_a_folder_says_what_it_took_and_is_decoded_once(tmp_path, photos, capsys, monkeypatch):
    images, masks = photos / "images", photos / "masks"
    parts = load(tmp_path, "folder", images, (32, 48), masks)
    out = capsys.readouterr().out
    for words in ("12 images", "1 files .txt passed over", "1..2 objects each", "brightness 0."):
        assert words in out
    assert [len(parts[name].images) for name in ("test", "val", "train", "all")] == [1, 1, 10, 12]
    assert parts["all"].images.shape == (12, 3, 32, 48)
    assert parts["all"].labels.unique().tolist() == [0, 1, 2]  # 40 and 255, renumbered
    monkeypatch.setattr(astseg, "prepare", None)  # the cache suffices
    again = load(tmp_path, "folder", images, (32, 48), masks, slots=0)
    assert torch.equal(again["all"].images, parts["all"].images)
    assert "warning: up to 2 labels per image for 0 slots" in (said := capsys.readouterr().out)
    assert out.splitlines()[0] == said.splitlines()[0]


def picture(*size, mode="RGB"):
    return Image.new(mode, size or (80, 50))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: (m / "00.png").unlink(), "00.png has no mask"),
        (lambda m: picture().save(m / "77.png"), "77.png has no image"),
        (lambda m: picture(5, 5, mode="L").save(m / "00.png"), "its image differ in size"),
        (lambda m: picture().save(m / "00.png"), "00.png is RGB: a mask is a single-channel PNG"),
        (lambda m: picture(mode="LA").save(m / "00.png"), "00.png is LA: a mask is a"),
        (lambda m: (m / "00.png").rename(m / "00.jpg"), "00.jpg is no PNG: a mask is a"),
        (lambda m: [picture(*Image.open(p).size, mode="L").save(p) for p in m.rglob("*.png")],
         "100% of the pixels are background"),
        (lambda m: Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80)).save(
            m / "00.png"), "00.png has 3999 labels, above 255"),
        (lambda m: picture().save(m.parent / "images" / "00_mask.png"), "named as a mask"),
        (lambda m: picture().save(m.parent / "images" / "00.webp"), "differ only in their suffix"),
        (lambda m: picture().save(m / "00.PNG"), "two files that differ only in their suffix"),
        (lambda m: (m / "more" / "up").symlink_to(m), "shows a file twice: does a link lead"),
        (lambda m: Image.fromarray(np.zeros((50, 80), np.uint16)).save(
            m.parent / "images" / "00.png"), "00.png has more than 8 bits per channel"),
    ],
)  # fmt: skip
def test_what_is_no_image_or_mask_by_the_rules_is_refused(change, message, tmp_path, photos):
    change(photos / "masks")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "folder", photos / "images", masks=photos / "masks")
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_masks_within_the_images_is_no_folder_of_images(tmp_path):
    (tmp_path / "D" / "masks").mkdir(parents=True)
    for i in range(4):
        picture().save(tmp_path / "D" / f"{i}.png")
        Image.fromarray(np.eye(50, 80, dtype=np.uint8)).save(tmp_path / "D" / "masks" / f"{i}.png")
    with pytest.raises(ValueError, match="masks/0.png is named as a mask: give --masks its folder"):
        load(tmp_path, "folder", tmp_path / "D")
    parts = load(tmp_path, "folder", tmp_path / "D", masks=tmp_path / "D" / "masks")
    assert len(parts["all"].images) == 4


def test_damaged_images_are_named_together_and_a_malformed_exif_costs_none(tmp_path):
    junk = b"\x00\x08\x00\x02\x01\x12\x00\x03\x00\x00"
    for i in range(20):
        picture().save(tmp_path / f"{i:02d}.png", exif=junk)
    assert len(load(tmp_path, "folder", tmp_path, (32, 32))["all"].images) == 20
    for i in (7, 11, 13):
        (tmp_path / f"{i:02d}.png").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="07.png is missing, damaged or no PNG.*11.png.*13.png") as error:
        load(tmp_path, "folder", tmp_path, (64, 64))
    assert "\n" not in str(error.value)


def test_image_and_mask_are_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png", exif=exif)
    turned = np.rot90(pixels, -1)
    assert np.array_equal(astseg.open_image(tmp_path / "a.png"), turned)
    assert np.array_equal(astseg.read_labels(tmp_path / "b.png"), turned[..., 0] > 0)


# ---- The notebook, and the map to the paper ----

NOTEBOOK = HERE / "equivariance_proof.ipynb"


def test_the_notebook_runs_from_top_to_bottom_in_a_clean_kernel():
    """Each of its claims is an assert, so that running it is the check."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute()  # raises what a cell raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(cell.source.count("assert ") for cell in code) > 40
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]


def test_the_notebook_is_stored_with_its_outputs_and_nothing_of_the_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells, code = notebook.cells, [c for c in notebook.cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert len(outputs) > 40 and not re.search(r"Warning|/tmp|/home|/root|site-packages", text)
    for before, cell in zip(cells, cells[1:]):
        assert {before.cell_type, cell.cell_type} != {"code"}  # prose between


def test_the_table_at_the_head_of_the_module_names_what_is_there_in_its_order():
    source = (HERE / "astseg.py").read_text()
    rows = re.findall(r"^    (?:section|Table|Algorithm).*?  +(\w.*)$", astseg.__doc__, re.MULTILINE)
    names = [name for row in rows for name in row.split(", ")]
    places = [re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE) for name in names]
    assert len(names) > 22 and all(places)
    assert [place.start() for place in places] == sorted(place.start() for place in places)


def test_each_equation_stands_at_its_line():
    source = (HERE / "astseg.py").read_text()
    tags = "".join(re.findall(r"# .*?eqs?\. (\(.*\))", source))
    assert {int(n) for n in re.findall(r"\d+", tags)} >= {1, 4, *range(10, 23)}


def test_the_usage_example_runs_as_written():
    lines = [line.strip() for line in astseg.__doc__.splitlines()]
    names = {}
    exec("\n".join(line[4:] for line in lines if line.startswith(">>>")), names)
    assert names["labels"].shape == (2, 64, 64)


def test_the_readme_lists_the_places_of_all_open_choices():
    """The function, class or table in which each `# open:` stands, in the README's table."""
    readme = (HERE / "README.md").read_text()
    table = readme.partition("## What is open")[2].partition("mIoU counts")[0]
    places = set()
    for name in ("astseg.py", "train.py"):
        for line in (HERE / name).read_text().splitlines():
            if found := re.match(r"(?:def|class) (\w+)|(\w+) = {", line):
                place = found[1] or found[2]
            if "# open: " in line:
                places.add(place)
    assert len(places) > 12 and places == set(re.findall(r"\n`(\w+)` \|", table))


def test_importing_the_module_is_silent_and_touches_no_random_state():
    code = "import torch as t; a = t.get_rng_state(); import astseg; assert a.equal(t.get_rng_state())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
