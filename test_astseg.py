"""The specification of AST-Seg, executable: `pytest test_astseg.py`.

Each part is compared with something independent of it: a loop over pixels, a closed form,
scikit-learn, an exhaustive search, a number of the paper, or a property.
"""

import ast
import base64
import decimal
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import weakref
import zlib
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

# The sizes here are tiny: several threads would only wait for each other. The bits are a CPU's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import nbclient
import nbformat
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import astseg
import train
from astseg import ASTSeg, Config

HERE = Path(__file__).parent
SMALL = dict(
    height=32, width=32, slots=3, backbone="tiny", dim_transformer=64, transformer_layers=2,
    dim_feedforward=64, background_kind="simple", background_width=0.1,
)  # fmt: skip


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def close(found, expected, tolerance=1e-5):
    """Fail unless shapes are equal and no entry differs by more than the tolerance."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def differ(a, b, tolerance=1e-4):
    return (a - b).abs().max().item() > tolerance


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- Section 2 ----


@pytest.mark.parametrize("u, v", [(0, 0), (2, 1), (-3, 2), (1, -4), (9, 0), (0, -9)])
def test_translate_is_equation_1_with_zeros_outside(u, v):
    phi = torch.randn(2, 5, 7)
    shifted = astseg.translate(phi, u, v)
    assert shifted.shape == phi.shape
    for j, i in itertools.product(range(5), range(7)):
        inside = 0 <= i - u < 7 and 0 <= j - v < 5
        assert torch.equal(shifted[:, j, i], phi[:, j - v, i - u] if inside else torch.zeros(2))


def test_center_of_mass_is_the_sum_of_phi_p_times_p():
    phi = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for j, i in itertools.product(range(4), range(6)):
        expected += phi[:, j, i, None] * torch.tensor([i, j])
    close(astseg.center_of_mass(phi), expected, 1e-12)


@pytest.mark.parametrize("u, v", [(3, 2), (-2, 1), (0, -3)])
def test_center_of_mass_and_soft_argmax_follow_a_translation(u, v):
    phi = torch.zeros(16, 16, dtype=torch.float64)
    phi[5:10, 5:10] = torch.randn(5, 5).double()
    phi /= phi.sum()
    shift = torch.tensor([u, v], dtype=torch.float64)
    moved = astseg.center_of_mass(astseg.translate(phi, u, v))
    close(moved, astseg.center_of_mass(phi) + shift, 1e-10)
    logits = torch.full((16, 16), -200.0).double()
    logits[5:10, 5:10] = torch.randn(5, 5).double()
    moved = astseg.soft_argmax(logits.roll((v, u), (0, 1)))
    close(moved, astseg.soft_argmax(logits) + shift, 1e-10)


def test_soft_argmax_takes_any_leading_dimensions_and_logits_of_any_size():
    logits = torch.zeros(2, 3, 4, 6)
    logits[..., 2, 5] = 1e30
    assert torch.equal(astseg.soft_argmax(logits), torch.tensor([5.0, 2.0]).expand(2, 3, 2))
    logits = logits.clamp(max=3)
    close(astseg.soft_argmax(logits + 1e4), astseg.soft_argmax(logits))


def test_gradient_of_soft_argmax_is_s_times_p_minus_mean():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mean = astseg.soft_argmax(logits)
    softmax = logits.detach().flatten().softmax(0).view(4, 5)
    for axis in range(2):
        (gradient,) = torch.autograd.grad(mean[axis], logits, retain_graph=True)
        p = torch.arange(5) if axis == 0 else torch.arange(4)[:, None]
        close(gradient, softmax * (p - mean[axis].detach()), 1e-12)


# ---- Settings ----


def test_the_defaults_are_table_6():
    t = train.Training()
    assert (t.dim_z_what, t.log_alpha_0, t.scale_min, t.scale_max) == (32, 11, 1.3, 24)
    assert (t.entropy_weight, t.entropy_warmup, t.dropout) == (1e-2, 10_000, 0.1)
    assert (t.dim_transformer, t.transformer_heads, t.dim_feedforward) == (256, 8, 512)
    assert (t.transformer_layers, t.backbone, t.pretrained) == (6, "b3", "nvidia/mit-b3")
    assert (t.background_batch, t.background_lr, t.background_steps) == (128, 2e-3, 500_000)
    assert (t.batch, t.lr, t.steps, t.phase2_steps) == (64, 4e-5, 125_000, 30_000)
    assert (t.warmup, t.decay_at, t.decay) == (5_000, 0.9, "step")
    assert (t.scenario, t.flip, t.background_plain_steps) == ("CT", False, 0)
    factors = t.refinement_lr_factor, t.alpha_0_lr_factor, t.glimpse_lr_factor
    assert (t.refinement_start, *factors) == ("stock", 1, 1, 1)
    assert t.transformer and t.anisotropic and not t.alpha_0_per_pixel


@pytest.mark.parametrize(
    "name, side, slots, isotropic, channels, background, steps",
    [("clevrtex", 128, 10, False, 45, "complex", 500_000),
     ("clevr", 128, 10, True, 44, "simple", 2_500),
     ("objectsroom", 64, 3, False, 38, "complex", 500_000),
     ("shapestacks", 64, 6, True, 40, "complex", 500_000)],
)  # fmt: skip
def test_the_paper_settings_of_each_data_set(
    name, side, slots, isotropic, channels, background, steps
):
    t = train.PRESETS[name]
    assert (t.dataset, t.height, t.width, t.slots) == (name, side, side, slots)
    assert (t.anisotropic, t.background_kind, t.background_steps) == (
        not isotropic, background, steps
    )  # fmt: skip
    own = {"dataset", "output", "height", "width", "slots", "anisotropic"}
    for field in fields(train.Training):  # all else is Table 6
        if field.name not in own | {"background_kind", "background_steps"}:
            assert getattr(t, field.name) == getattr(train.Training(), field.name), field.name
    with torch.device("meta"):
        model = ASTSeg(t)
    assert model.generator.network.config.num_labels == channels
    assert parameters(model.encoder) == (3_181_348 if isotropic else 3_181_861)  # the transformer
    assert parameters(model.renderer) == {64: 51_957, 128: 191_477}[side]  # Table 7 and alpha_0


# ---- Section 4.1: generators ----


@pytest.mark.parametrize("channels, count", [(38, 22_237_860), (40, 22_242_304), (45, 22_253_764)])
def test_unet_has_the_parameters_of_table_8(channels, count):
    assert parameters(astseg.UNetGenerator(channels)) == count


def test_unet_is_the_graph_of_table_8():
    unet = astseg.UNetGenerator(7, 48, 48, factor=0.1).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p += 0.1 * torch.randn_like(p)
    images = torch.rand(1, 3, 48, 48)

    def block(x, convolution, norm):
        return F.celu(norm(convolution(x)))

    x = block(images, *unet.first[:2])
    maps = [x]
    for (convolution, norm, _), (residual,) in unet.down:
        assert (convolution.kernel_size, convolution.stride) == ((4, 4), (2, 2))
        x = block(x, convolution, norm)
        x = x + block(x, *residual[:2])
        maps.append(x)
    x = block(x, *unet.center[:2])
    for (residual,), transposed, norm, _ in unet.up:
        x = torch.cat((x, maps.pop()), dim=1)
        x = block(x + block(x, *residual[:2]), transposed, norm)
    x = block(torch.cat((x, maps.pop()), dim=1), *unet.last[0][:2])
    x = x + unet.last[1][0](x)
    close(unet(images), unet.last[2](x))


@pytest.mark.parametrize("channels, count", [(38, 47_251_686), (45, 47_257_069)])
def test_segformer_b3_has_the_parameters_of_the_authors(channels, count):
    with torch.device("meta"):
        assert parameters(astseg.SegformerGenerator(channels, "b3")) == count


def test_segformer_sees_the_images_as_they_are_and_has_its_stock_dropout():
    generator, images = astseg.SegformerGenerator(7, "tiny", 0.3).eval(), torch.rand(2, 3, 32, 32)
    assert torch.equal(generator(images), generator.network(images).logits)
    config = generator.network.config
    assert config.drop_path_rate == config.classifier_dropout_prob == 0.3
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0


def save_segformer(folder, size, dtype=torch.float32):
    """A classifier in the layout of nvidia/mit-b3: its backbone under the prefix segformer."""
    config = transformers.SegformerConfig(**astseg.SEGFORMER_SIZES[size])
    model = transformers.SegformerForImageClassification(config).to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pretrained_backbone_is_taken_whole_and_in_float32(dtype, tmp_path):
    stored = save_segformer(tmp_path, "tiny", dtype).segformer.state_dict()
    generator = astseg.SegformerGenerator(7, "tiny", dropout=0.2)
    generator.load_backbone(str(tmp_path))
    for name, tensor in generator.network.segformer.state_dict().items():
        assert torch.equal(tensor, stored[name].float()) and tensor.dtype != torch.float16
    assert generator.network.segformer.config.drop_path_rate == 0.2  # ours, not the file's
    assert generator(torch.rand(1, 3, 32, 32)).shape == (1, 7, 8, 8)


def test_a_backbone_of_another_size_is_refused(tmp_path):
    save_segformer(tmp_path / "b0", "b0")
    transformers.SegformerForImageClassification(
        transformers.SegformerConfig(depths=[1], hidden_sizes=[16], num_attention_heads=[1],
                                     num_encoder_blocks=1)
    ).save_pretrained(tmp_path / "half")  # fmt: skip
    generator = astseg.SegformerGenerator(7, "tiny")
    before = generator.network.segformer
    for name in ("b0", "half", "nothing"):
        with pytest.raises((ValueError, OSError, RuntimeError), match=name + "|size|mismatch"):
            generator.load_backbone(str(tmp_path / name))
    assert generator.network.segformer is before


# ---- Algorithm 1 ----


class Spy(torch.nn.Module):
    """A refinement that adds a constant and keeps what it saw."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, slots):
        self.seen = slots
        return slots + self.shift


@pytest.mark.parametrize("dim_scale", [1, 2])
def test_encoder_is_algorithm_1_pixel_by_pixel(dim_scale):
    K, Z, h, w = 2, 3, 3, 4
    encoder = astseg.Encoder(K, dim_scale, Z, 1.3, 24.0, refinement=Spy(shift=0.1))
    maps = torch.randn(1, K + dim_scale + 1 + Z, h, w)
    latents, attention, position = encoder(maps)
    for k in range(K):
        total = sum(math.exp(maps[0, k, j, i]) for j in range(h) for i in range(w))
        x0 = y0 = 0.0
        phi0 = torch.zeros(dim_scale + 1 + Z)
        for j, i in itertools.product(range(h), range(w)):
            a = math.exp(maps[0, k, j, i]) / total  # (11)
            assert abs(attention[0, k, j, i].item() - a) < 1e-6
            x0 += a * (2 * i / (w - 1) - 1)  # (12), (14)
            y0 += a * (2 * j / (h - 1) - 1)  # (13), (15)
            phi0 += a * maps[0, K:, j, i]  # (16)
        close(position[0, k], [x0, y0])
        close(encoder.refinement.seen[0, k], torch.cat((torch.tensor([x0, y0]), phi0)))
        close(latents.position[0, k], [x0 + 0.1, y0 + 0.1])
        for axis in range(2):
            s = phi0[min(axis, dim_scale - 1)].item() + 0.1
            scale = 1.3 + (24.0 - 1.3) / (1 + math.exp(-s))
            assert abs(latents.scale[0, k, axis].item() - scale) < 1e-4
        alpha = math.exp(phi0[dim_scale].item() + 0.1)
        assert abs(latents.activation[0, k].item() - alpha) < 1e-5
        close(latents.z_what[0, k], phi0[dim_scale + 1 :] + 0.1)
    x, y = astseg.normalized_coordinates(h, w)
    assert torch.equal(position, astseg.soft_argmax(maps[:, :K], x, y))


@pytest.mark.parametrize("dim_scale", [1, 2])
def test_each_column_moves_only_its_own_latent(dim_scale):
    encoder = astseg.Encoder(2, dim_scale, 4)
    slots = torch.randn(1, 2, 2 + dim_scale + 1 + 4) * 0.1
    before = encoder.split_latents(slots)
    owners = ["position"] * 2 + ["scale"] * dim_scale + ["activation"] + ["z_what"] * 4
    for column, owner in enumerate(owners):
        changed = slots.clone()
        changed[..., column] += 0.3
        after = encoder.split_latents(changed)
        for name in astseg.Latents._fields:
            same = torch.equal(getattr(before, name), getattr(after, name))
            assert same != (name == owner), (column, name)


def test_latents_stay_in_their_ranges():
    latents = astseg.Encoder(3, 1, 4, 1.3, 24.0).split_latents(torch.randn(5, 3, 8) * 10)
    assert latents.position.max() == 1 and latents.position.min() == -1


def test_refinement_is_embedding_stock_layers_and_projection():
    refinement = astseg.Refinement(10, 16, 4, 24, 2, dropout=0.3).eval()
    stock = torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    slots = torch.randn(2, 5, 12)
    x = slots @ refinement.embedding.weight.T + refinement.embedding.bias
    for layer in refinement.transformer.layers:
        assert {m.p for m in layer.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
        assert layer.self_attn.dropout == 0.3 and not layer.norm_first
        stock.load_state_dict(layer.state_dict())
        x = stock(x)
    expected = x @ refinement.projection.weight.T + refinement.projection.bias
    close(refinement(slots), expected)


# ---- Algorithm 2 ----


def test_glimpse_generator_is_the_stack_of_table_7():
    generator, z_what = astseg.GlimpseGenerator(8, 32), torch.randn(3, 8)
    kinds = "ConvTranspose2d " + "GroupNorm CELU ConvTranspose2d " * 4 + "Sigmoid"
    assert [type(layer).__name__ for layer in generator.layers] == kinds.split()
    x = z_what.view(3, 8, 1, 1)
    for number, layer in enumerate(generator.layers[::3][:5]):
        assert (layer.bias is not None) == (number == 4)  # the last one alone
        x = F.conv_transpose2d(x, layer.weight, layer.bias, *((2, 1) if number else (1, 0)))
        if number < 4:
            x = F.celu(F.group_norm(x, (4, 2, 1, 1)[number]))  # 64, 32, 16 and 8 channels
    close(generator(z_what), x.sigmoid())


@pytest.mark.parametrize("alpha_0", [torch.tensor(0.7), torch.rand(4, 5) + 0.1])
def test_weights_and_composition_are_equations_17_and_18(alpha_0):
    B, K, H, W = 2, 3, 4, 5
    activation, masks = torch.rand(B, K) * 3, torch.rand(B, K, H, W)
    background, layers = torch.rand(B, 3, H, W), torch.rand(B, K, 3, H, W)
    weights = astseg.occlusion_weights(activation, masks, alpha_0)
    objects = torch.einsum("bk,bkhw->bkhw", activation, masks)
    strength = torch.cat((alpha_0.expand(B, 1, H, W), objects), dim=1)
    close(weights, strength / strength.sum(1, keepdim=True))
    all_layers = torch.cat((background[:, None], layers), dim=1)
    image = torch.einsum("bkhw,bkchw->bchw", weights, all_layers)
    close(astseg.compose(weights, background, layers), image)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_renderer_is_algorithm_2_slot_by_slot(per_pixel):
    B, K, H, W = 2, 3, 20, 24
    renderer = astseg.Renderer(H, W, 8, 32, log_alpha_0=0.5, per_pixel=per_pixel)
    if per_pixel:
        torch.nn.init.normal_(renderer.log_alpha_0_map)
    latents = astseg.Latents(
        torch.rand(B, K, 2) * 2 - 1, torch.rand(B, K, 2) * 3 + 1.3, torch.rand(B, K) * 4,
        torch.randn(B, K, 8),
    )  # fmt: skip
    weights, layers, masks, glimpses = renderer(latents)
    for b, k in itertools.product(range(B), range(K)):
        glimpse = renderer.glimpse_generator(latents.z_what[b, k][None])
        close(glimpses[b, k], glimpse[0])
        (x, y), (sx, sy) = latents.position[b, k].tolist(), latents.scale[b, k].tolist()
        theta = torch.tensor([[[sx, 0, -x * sx], [0, sy, -y * sy]]])
        grid = F.affine_grid(theta, (1, 4, H, W), align_corners=False)
        moved = F.grid_sample(glimpse, grid, align_corners=False)[0]
        close(layers[b, k], moved[:3], 1e-4)
        close(masks[b, k], moved[3], 1e-4)
    alpha_0 = (0.5 + torch.as_tensor(renderer.log_alpha_0_map)).exp()
    close(weights, astseg.occlusion_weights(latents.activation, masks, alpha_0))
    weights[:, 1].sum().backward()
    assert renderer.log_alpha_0.grad.abs() > 0
    assert ("log_alpha_0_map" in dict(renderer.named_parameters())) == per_pixel
    assert not per_pixel or renderer.log_alpha_0_map.grad.abs().max() > 0


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


def test_background_is_the_first_three_channels_and_its_error_the_fourth():
    model, images = astseg.BackgroundAutoencoder(40, 32, "simple", 0.05), torch.rand(2, 3, 40, 32)
    x = images
    for layer in [*model.encoder, *model.decoder]:
        x = layer(x)
    background, error = model(images)
    assert torch.equal(background, x[:, :3].sigmoid()) and torch.equal(error, x[:, 3].sigmoid())
    norms = [layer.norm for layer in [*model.encoder, *model.decoder]]
    assert norms.index(None) == len(norms) - 1  # all but the last one
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "height, width, count", [(25, 48, 5), (49, 96, 6), (192, 97, 7), (33, 97, 7)]
)
def test_background_schedule_has_the_blocks_of_the_authors(height, width, count):
    model = astseg.BackgroundAutoencoder(height, width, "simple", 0.05)
    assert len(model.encoder) == len(model.decoder) == count
    for axis, side in enumerate((height, width)):
        for down, up in zip(model.encoder, reversed(model.decoder)):
            shape = (5, 2, 2) if side > 5 else (4, 2, 1) if side > 3 else (side, 1, 0)
            kernel, stride, padding = shape
            smaller = (side + 2 * padding - kernel) // stride + 1
            for c in (down.convolution, up.convolution):
                assert (c.kernel_size[axis], c.stride[axis], c.padding[axis]) == shape
                assert c.bias is None
            remainder = up.convolution.output_padding[axis]
            assert (smaller - 1) * stride - 2 * padding + kernel + remainder == side
            side = smaller
        assert side == 1


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("height, width", [(3, 5), (1, 1), (1, 4)])
def test_row_and_column_are_two_more_channels_and_one_on_a_single_pixel(kind, height, width):
    block = astseg.CoordConv(kind(5, 32, 3, 1, 1, bias=False))
    x = torch.randn(2, 3, height, width)
    rows = torch.linspace(-0.5, 0.5, height) if height > 1 else torch.ones(1)
    columns = torch.linspace(-0.5, 0.5, width) if width > 1 else torch.ones(1)
    grid = torch.stack((rows[:, None].expand(height, width), columns.expand(height, width)))
    appended = torch.cat((x, grid.expand(2, 2, height, width)), dim=1)
    convolved = block.convolution(appended)
    close(block(x), F.celu(F.group_norm(convolved, 2)))
    bare = astseg.CoordConv(block.convolution, is_last=True)
    close(bare(x), convolved)


@pytest.mark.parametrize("width, radius", [(74, 0), (80, 1), (150, 2)])
def test_robust_background_loss_is_that_of_a_loop_over_pixels(width, radius):
    H, W, r = 3, width, radius
    images, background = torch.rand(2, 1, 3, H, W)
    predicted = torch.rand(1, H, W)
    background[..., :40] = images[..., :40] + 0.01 * torch.randn(1, 3, H, 40)

    def smooth_l1(a, b):
        d = abs(float(a) - float(b))
        return d * d / 2 / (3 / 255) if d < 3 / 255 else d - 3 / 255 / 2

    e, total = np.zeros((H, W)), 0.0
    for c, j, i in itertools.product(range(3), range(H), range(W)):
        e[j, i] += smooth_l1(background[0, c, j, i], images[0, c, j, i])
    for j, i in itertools.product(range(H), range(W)):
        window = e[max(j - r, 0) : j + r + 1, max(i - r, 0) : i + r + 1]
        weight = math.exp(-6 * np.tanh(window / 0.25).mean())
        total += (e[j, i] + smooth_l1(predicted[0, j, i], e[j, i] / 3)) * weight
    loss = astseg.robust_background_loss(images, background, predicted)
    assert abs(loss.item() - total / (H * W)) < 1e-5
    plain = astseg.robust_background_loss(images, background, predicted, strength=0.0)
    assert plain > 2 * loss


def test_robust_background_loss_sends_no_gradient_through_its_weight_nor_its_target():
    images = torch.rand(1, 3, 4, 4)
    background = (images + 0.5).requires_grad_()  # all errors 0.5 a channel, far in the linear part
    predicted = torch.full((1, 4, 4), 0.9, requires_grad=True)
    astseg.robust_background_loss(images, background, predicted).backward()
    error = 3 * (0.5 - 1.5 / 255)
    expected = math.exp(-6 * math.tanh(error / 0.25)) / 16
    close(background.grad, torch.full((1, 3, 4, 4), expected), 1e-7)
    close(predicted.grad, torch.full((1, 4, 4), expected), 1e-7)  # 0.9 is above error / 3


# ---- The whole model ----


@pytest.mark.parametrize(
    "change",
    [{}, dict(anisotropic=False), dict(transformer=False), dict(generator="unet", unet_width=0.1),
     dict(height=64, width=40), dict(alpha_0_per_pixel=True), dict(height=32, width=65),
     dict(generator="unet", unet_width=0.1, height=33, width=47)],
)  # fmt: skip
def test_the_model_names_everything_it_says(change):
    model = ASTSeg(Config(**{**SMALL, **change})).eval()
    c, B, K = model.config, 2, 3
    H, W = size = (c.height, c.width)
    output = model(torch.rand(B, 3, *size))
    h, w = size if c.generator == "unet" else (math.ceil(H / 4), math.ceil(W / 4))
    G = 32 if max(size) <= 64 else 64
    shapes = dict(
        reconstruction=(B, 3, H, W), background=(B, 3, H, W), weights=(B, K + 1, H, W),
        layers=(B, K, 3, H, W), masks=(B, K, H, W), glimpses=(B, K, 4, G, G),
        attention=(B, K, h, w), attention_position=(B, K, 2), position=(B, K, 2),
        scale=(B, K, 2), activation=(B, K), z_what=(B, K, 32),
    )  # fmt: skip
    tensors = output._asdict() | output.latents._asdict()
    del tensors["latents"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    close(output.weights.sum(1), torch.ones(B, *size))


@pytest.mark.parametrize("anisotropic", [False, True])
def test_the_model_is_figure_1_part_by_part(anisotropic):
    model = ASTSeg(Config(**SMALL | dict(anisotropic=anisotropic, scale_min=2.0, scale_max=7.0)))
    images = torch.rand(2, 3, 32, 32)
    output = model.eval()(images)
    latents, attention, position = model.encoder(model.generator(images))
    weights, layers, masks, glimpses = model.renderer(latents)
    background = model.background(images)[0]
    expected = astseg.Output(
        astseg.compose(weights, background, layers), background, weights, layers, masks, glimpses,
        latents, attention, position,
    )  # fmt: skip
    for found, other in zip(output, expected):
        for a, b in zip(found, other):
            assert torch.equal(a, b)
    given = torch.rand(2, 3, 32, 32)
    output = model(images, background=given)
    assert torch.equal(output.background, given)
    assert torch.equal(output.reconstruction, astseg.compose(weights, given, layers))
    assert 2 <= latents.scale.min() and latents.scale.max() <= 7
    assert model.encoder.split_sizes == [2, 1 + anisotropic, 1, 32]


def test_segmentation_is_the_argmax_of_the_weights_and_needs_no_background():
    model = ASTSeg(Config(**SMALL, log_alpha_0=-3.0)).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = model(images).weights.argmax(1)
    model.background = None
    labels = model.segment(images)
    with pytest.raises(ValueError, match="call model.eval.. before model.segment"):
        model.train().segment(images)
    assert torch.equal(labels, expected)
    assert labels.dtype == torch.int64 and labels.unique().numel() > 1


def test_the_gradient_from_loss_to_feature_maps_is_that_of_finite_differences():
    K, Z, size = 2, 3, 8
    encoder = astseg.Encoder(K, 2, Z, 1.3, 4.0, refinement=Spy())
    renderer = astseg.Renderer(size, size, Z, 32, log_alpha_0=0.3).double()
    image, background = torch.rand(2, 1, 3, size, size, dtype=torch.float64)
    maps = torch.randn(1, K + 3 + Z, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(maps, background):
        latents, *_ = encoder(maps)
        weights, layers, *_ = renderer(latents)
        reconstruction = astseg.compose(weights, background, layers)
        output = SimpleNamespace(reconstruction=reconstruction, weights=weights)
        return tuple(astseg.full_loss(image, output, 9, entropy_warmup=9).values())

    assert torch.autograd.gradcheck(loss, (maps, background.requires_grad_()))


@pytest.mark.parametrize(
    "images",
    [torch.rand(3, 32, 32), torch.rand(1, 3, 64, 64), torch.zeros(1, 3, 32, 32).byte(),
     torch.rand(1, 3, 32, 32).half(), [0.5], np.zeros((1, 3, 32, 32), np.float32),
     torch.full((1, 3, 32, 32), -0.1), torch.full((1, 3, 32, 32), 1.1),
     torch.full((1, 3, 32, 32), math.nan)],
)  # fmt: skip
def test_what_is_no_image_in_0_to_1_is_refused_and_values_are_looked_at_once_in_training(images):
    model = ASTSeg(Config(**SMALL))
    for mode in (True, False):
        with pytest.raises(ValueError, match="^images "):
            model.train(mode)(images)
    model.train()(torch.rand(2, 3, 32, 32))
    if torch.is_tensor(images) and images.dtype == torch.float32 and images.shape[-1] == 32:
        if images.ndim == 4:
            model(images)  # a training loop does not wait for the look
            with pytest.raises(ValueError, match="scale them to"):
                model.eval().segment(images)


def test_the_model_can_be_exported_for_any_size_of_a_batch():
    model = ASTSeg(Config(**SMALL | dict(transformer_layers=1))).eval()
    images = torch.rand(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
        images = torch.rand(5, 3, 32, 32)
        close(exported(images).weights, model(images).weights)


def test_a_saved_model_loads_whole_or_is_refused(tmp_path):
    model = ASTSeg(Config(**SMALL, anisotropic=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = ASTSeg.from_pretrained(tmp_path).eval()
    assert loaded.config == model.config
    assert "license" not in (tmp_path / "README.md").read_text()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images).reconstruction, loaded(images).reconstruction)
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("background")}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="[Mm]issing"):
        ASTSeg.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({k: v for k, v in config.items() if k != "scale_max"}, config | {"scale": 3}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises((KeyError, TypeError), match="scale"):
            ASTSeg.from_pretrained(tmp_path)


def test_the_output_under_bf16_autocast_is_fp32_where_it_must_be():
    model = ASTSeg(Config(**SMALL)).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    for tensor in (output.attention, *output.latents, output.weights, output.reconstruction):
        assert tensor.dtype == torch.float32
    close(output.latents.position, model(images).latents.position, 0.05)
    rounded = output.background.bfloat16().float()
    assert differ(output.background, rounded, 1e-4)  # its sigmoid is finer than bf16


# ---- Section 4.2.1 ----


def test_reconstruction_loss_by_hand():
    images = torch.zeros(1, 3, 1, 2)
    reconstruction = torch.tensor([[[[0.1, 0.0]], [[-0.2, 0.0]], [[0.3, 0.5]]]])
    # l = 0.6 and 0.5, mean of the squares
    close(astseg.reconstruction_loss(images, reconstruction), (0.36 + 0.25) / 2, 1e-6)


def test_pixel_entropy_loss_by_hand():
    weights = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])  # one-hot, and a coin
    close(astseg.pixel_entropy_loss(weights), math.log(2) ** 2 / 2, 1e-6)
    tiny = torch.full((1, 1, 1, 1), 1e-20, dtype=torch.float64)  # as large as epsilon
    expected = (1e-20 * math.log(2e-20)) ** 2
    assert astseg.pixel_entropy_loss(tiny).item() == pytest.approx(expected, rel=1e-9, abs=0)
    one_hot = torch.tensor([[[[1.0]], [[0.0]]]], requires_grad=True)
    astseg.pixel_entropy_loss(one_hot).backward()
    assert one_hot.grad.isfinite().all()


# ---- Section 5.1: metrics ----


def scores(name, target, predicted, slots=0):
    """A metric of each of B label maps."""
    return [astseg.METRICS[name](t) for t in astseg.contingency_tables(target, predicted, slots)]


def test_ari_fg_is_that_of_scikit_learn_over_the_foreground():
    target, predicted = torch.randint(4, (20, 6, 6)), torch.randint(5, (20, 6, 6))
    predicted[:10] = torch.where(torch.rand(10, 6, 6) < 0.8, target[:10] + 1, predicted[:10])
    ours = scores("ARI-FG", target, predicted)
    for t, p, score in zip(target, predicted, ours):
        assert abs(adjusted_rand_score(t[t > 0], p[t > 0]) - score) < 1e-9


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
    ours = zip(scores("mIoU", target, predicted), scores("mIoU-FG", target, predicted))
    for found, t, p in zip(ours, target, predicted):
        assert found == pytest.approx(exhaustive_mean_iou(t, p, 4))


def test_tables_have_a_row_for_each_of_the_labels_0_to_k_and_ties_are_broken_on_them():
    target = torch.randint(5, (400, 3, 3))
    predicted = torch.randint(5, (400, 3, 3))
    tables = astseg.contingency_tables(target, predicted, slots=6)
    assert tables.shape == (400, 7, 7) and tables.sum((1, 2)).unique().tolist() == [9]
    assert tables[0, 2, 3] == ((target[0] == 2) & (predicted[0] == 3)).sum()
    cut = [astseg.mean_iou(table[present][:, present]) for table in tables
           for present in [(table.sum(0) + table.sum(1)) > 0]]  # fmt: skip
    ours = [astseg.mean_iou(table) for table in tables]
    assert ours != cut  # labels that are in neither image break some ties otherwise
    assert scores("mIoU", target, predicted, 4)[0] == scores("mIoU", target.byte(), predicted, 4)[0]


def labels_of(drawing):
    return torch.tensor([[int(c) for c in row] for row in drawing.split()])[None]


CASES = {  # target, prediction, mIoU, mIoU-FG, ARI-FG, MSC-FG
    "perfect, other names": ("0011 0011 2200 2200", "0033 0033 1100 1100", 1, 1, 1, 1),
    "nothing found": ("0011 0011 2200 2200", "0000 0000 0000 0000", 0.5 / 3, 0, 0, 0.25),
    "one missing": ("0011 0011 2200 2200", "0011 0011 0000 0000", 5 / 9, 0.5, 1, 2 / 3),
    "a small one missing": ("0111 0111 2000 2000", "0111 0111 0000 0000", 0.6, 0.5, 1, 0.6),
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
    target, predicted, *expected = CASES[name]
    tables = astseg.contingency_tables(labels_of(target), labels_of(predicted), 3)
    assert [metric(tables[0]) for metric in astseg.METRICS.values()] == pytest.approx(expected)


def test_probabilities_are_no_labels():
    zeros = torch.zeros(1, 4, 4).long()
    for pair in ((zeros, zeros * 0.9), (zeros * 0.9, zeros)):
        with pytest.raises(ValueError, match="use integers"):
            astseg.contingency_tables(*pair, 3)


# ---- The embedded data set ----


def test_shapes_are_a_function_of_the_seed_and_differ_from_image_to_image():
    a, b, c = astseg.draw_shapes(12, 1), astseg.draw_shapes(12, 1), astseg.draw_shapes(12, 2)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert a.images.shape == (12, 3, 64, 64) and a.images.dtype == torch.uint8
    assert a.labels.shape == (12, 64, 64) and a.labels.dtype == torch.uint8
    background = torch.stack([image[:, label == 0].float().mean(1) for image, label in zip(*a)])
    assert background.std(0).min() > 2  # backgrounds differ


def test_labels_are_where_objects_are_drawn():
    shape = (3, 48, 48)
    for n in range(20):
        dark, labels = astseg.draw_scene(np.zeros(shape), np.random.default_rng(n))
        bright, again = astseg.draw_scene(np.ones(shape), np.random.default_rng(n))
        assert np.array_equal(labels, again)
        wall = np.abs(bright.astype(int) - dark).max(0)  # how much of the wall a pixel shows
        assert (wall[labels > 0] < 160).all() and (wall[labels == 0] > 60).all()
        assert (wall[labels > 0] == 0).mean() > 0.7 and (dark.max(0)[labels > 0] > 0).all()


# ---- train.py: the curriculum, and the loop step by step ----


def test_the_learning_rate_at_its_corners():
    t = train.Training()

    def rate(step):  # of the update with this number, counted from 1
        return train.learning_rate("joint", step - 1, t)

    assert train.learning_rate("background", 0, t) == 2e-3  # without a warm-up
    assert rate(2_500) == pytest.approx(1e-5)  # quadratic
    assert rate(5_000) == rate(112_499) == 4e-5
    assert rate(112_500) == rate(125_000) == pytest.approx(4e-6)
    assert train.learning_rate("joint", 124_998, replace(t, decay_at=1.0, decay="linear")) == 4e-5


DRAW = astseg.draw_shapes


def draw_few(count, seed, size):
    """40 images where a run draws hundreds for validation and test."""
    return DRAW(min(count, 40), seed, size)


# The factor on the learning rate of each part, by the beginning of its parameters' names.
PARTS = {
    "generator.": None,
    "encoder.": "refinement_lr_factor",
    "renderer.glimpse_generator.": "glimpse_lr_factor",
    "renderer.log_alpha_0": "alpha_0_lr_factor",
    "background.": None,
}
LOOP = replace(
    train.PRESETS["shapes"], height=32, width=32, slots=3, dim_transformer=64, dim_feedforward=32,
    transformer_layers=1, background_width=0.1, log_alpha_0=0.5, dropout=0.0, device="cpu",
    background_steps=5, background_batch=4, background_lr=3e-3, background_warmup=2,
    steps=7, phase2_steps=4, batch=3, lr=4e-3, warmup=3, decay_at=0.8, decay="step",
    entropy_weight=2.0, entropy_warmup=5, train_images=11, seed=3,
    refinement_lr_factor=0.5, alpha_0_lr_factor=0.25, glimpse_lr_factor=2.0,
    log_every=2, save_every=3,
)  # fmt: skip


class Loop:
    """A run of train.train with its weights before the first and after each step."""

    def __init__(self, training, monkeypatch):
        self.training, self.model, self.states = training, None, []
        monkeypatch.setattr(astseg, "draw_shapes", draw_few)
        clock = SimpleNamespace(perf_counter=lambda: float(len(self.states)))  # a step: a second
        monkeypatch.setattr(train, "time", clock)
        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(self.first_call),
            register_optimizer_step_post_hook(lambda *_: self.keep()),
        ]
        try:
            self.metrics = train.train(training)
        finally:
            for hook in hooks:
                hook.remove()
        self.images = DRAW(training.train_images, 1, 32).images
        if training.flip:
            self.images = torch.cat((self.images, self.images.flip(3)))
        self.log = read_log(Path(training.output))

    def first_call(self, module, arguments):
        if isinstance(module, ASTSeg) and self.model is None:
            self.model = module
            self.keep()

    def keep(self):
        self.states.append(deepcopy(self.model.state_dict()))

    def by_hand(self, phases):
        """(phase, step, rate, terms of the loss, state dict) of each step, computed from its own
        images, number and settings, and from the weights that the loop had before it."""
        t, model, images = self.training, self.model, self.images
        names = [name for name, _ in model.named_parameters()]
        states = iter(self.states)
        weights = next(states)
        update = 0
        for phase, first, stop in phases:
            model.load_state_dict(weights)
            behind = model.eval().background(images / 255)[0].mul(255).round() / 255
            moments = defaultdict(lambda: (0.0, 0.0))
            model.train()
            for number, step in enumerate(range(first, stop), start=1):
                model.load_state_dict(weights)
                torch.manual_seed(1_000_000 * t.seed + update)
                index = torch.randint(len(images), (4 if phase == "background" else 3,))
                x = images[index] / 255
                if phase == "background":
                    strength = 0 if step < t.background_plain_steps else 6
                    loss = astseg.robust_background_loss(x, *model.background(x), strength)
                    terms = {"background": loss}
                    rate = 3e-3 * min(1, step / 2) ** 2
                    rate *= 1 if step < 4 else 0.1  # a tenth from 80 % of 5 on
                    (beta1, beta2), eps = (0.9, 0.999), 1e-8
                else:
                    output = model(x, behind[index].detach()) if phase == "foreground" else model(x)
                    weight = t.entropy_weight * min(1, step / 5) ** 2
                    terms = {
                        "reconstruction": astseg.reconstruction_loss(x, output.reconstruction),
                        "weighted_entropy": weight * astseg.pixel_entropy_loss(output.weights),
                    }
                    rate = 4e-3 * min(1, (step + 1) / 3) ** 2
                    if t.decay == "step":
                        rate *= 1 if step + 1 < 0.8 * 7 else 0.1
                    else:  # from 80 % of 7, at 5.6, to 0 at 7
                        rate *= min(1, (7 - (step + 1)) / 1.4)
                    (beta1, beta2), eps = (0.9, 0.98), 1e-9
                tensors = [model.get_parameter(name) for name in names]
                gradients = torch.autograd.grad(sum(terms.values()), tensors, allow_unused=True)
                expected = deepcopy(model.state_dict())  # with the new statistics of batch norm
                for name, g in zip(names, gradients):
                    (part,) = (part for part in PARTS if name.startswith(part))
                    if phase != "joint" and (part == "background.") != (phase == "background"):
                        assert g is None, name
                        continue
                    m = beta1 * moments[name][0] + (1 - beta1) * g
                    v = beta2 * moments[name][1] + (1 - beta2) * g**2
                    moments[name] = m, v
                    m, v = m / (1 - beta1**number), v / (1 - beta2**number)
                    factor = getattr(t, PARTS[part]) if PARTS[part] else 1
                    expected[name] = weights[name] - rate * factor * m / (v.sqrt() + eps)
                values = {name: term.item() for name, term in terms.items()}
                yield phase, step, rate, values, expected
                weights = next(states)
                update += 1


CT = [("background", 0, 5), ("foreground", 0, 4), ("joint", 4, 7)]


@pytest.mark.parametrize(
    "change, phases",
    [
        ({}, CT),
        (dict(scenario="BT", dropout=0.2, alpha_0_per_pixel=True), [("joint", 0, 7)]),
        (dict(scenario="frozen", dropout=0.2), [("background", 0, 5), ("foreground", 0, 7)]),
        (dict(entropy_weight=0.0, flip=True), CT),
        (dict(decay="linear", background_plain_steps=3), CT),
    ],
    ids=["CT", "BT", "frozen background", "no entropy, flip", "linear decay, plain steps"],
)  # fmt: skip
def test_each_step_of_the_loop_is_the_one_computed_by_hand(change, phases, tmp_path, monkeypatch):
    loop = Loop(replace(LOOP, **change, output=str(tmp_path)), monkeypatch)
    rows, losses = iter(loop.log), []
    validation = DRAW(40, 2, 32)
    for n, (phase, step, rate, terms, expected) in enumerate(loop.by_hand(phases), start=1):
        found = loop.states[n]
        before = loop.states[n - 1]
        for name, tensor in expected.items():
            close(found[name], tensor, 5e-7)
            own = phase == "joint" or name.startswith("background.") == (phase == "background")
            if not own:
                known = "running" in name or "batches" in name  # statistics, no weights
                assert known or torch.equal(found[name], before[name]), name
        if phase == "joint":  # (22) teaches the background, but not its prediction of the error
            name = "background.decoder.4.convolution.weight"
            assert torch.equal(found[name][:, 3], before[name][:, 3])
            learns = rate > 0  # all but the last update of a linear fall
            assert differ(found[name][:, :3], before[name][:, :3], 1e-4) == learns
        losses.append(terms | {"loss": sum(terms.values())})
        stop = {p: last for p, _, last in phases}[phase]
        save = (step + 1) % 3 == 0 or step + 1 == stop
        if save or (step + 1) % 2 == 0:
            row = next(rows)
            assert (row["phase"], row["step"], row["lr"]) == (phase, step + 1, pytest.approx(rate))
            assert row["update"] == n
            for name in losses[0]:
                mean = sum(values[name] for values in losses) / len(losses)
                assert row[name] == pytest.approx(mean, rel=1e-4, abs=1e-7), name
            assert ("mIoU" in row) == (save and phase != "background")
            if "mIoU" in row:
                shown = deepcopy(loop.model)
                shown.load_state_dict(found)
                metrics = train.evaluate(shown, validation)
                assert {name: row[name] for name in metrics} == pytest.approx(metrics, rel=1e-4)
            assert row["images/s"] == (4 if phase == "background" else 3)  # a step a second
            assert row["left"] == stop - step - 1
            losses = []
    assert next(rows, None) is None and n == len(loop.states) - 1
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for weights in (saved["model"], ASTSeg.from_pretrained(tmp_path / "model").state_dict()):
        assert all(torch.equal(weights[name], tensor) for name, tensor in found.items())
    loop.model.load_state_dict(found)
    metrics = train.evaluate(loop.model, DRAW(40, 3, 32))
    assert {name: loop.metrics[name] for name in metrics} == pytest.approx(metrics, rel=1e-4)
    assert loop.metrics["seconds"] == n + 1  # with the making of the model


def test_no_graph_of_a_step_outlives_it(tmp_path, monkeypatch):
    """A CUDA graph cannot record a phase while something of the phase before is left."""
    terms, paper_loss = [], astseg.full_loss

    def kept(*arguments):
        assert all(term() is None for term in terms)
        loss = paper_loss(*arguments)
        terms.extend(weakref.ref(term) for term in loss.values())
        return loss

    monkeypatch.setattr(astseg, "full_loss", kept)
    Loop(replace(LOOP, output=str(tmp_path)), monkeypatch)
    assert len(terms) == 14 and all(term() is None for term in terms)


class SeenDevices(TorchDispatchMode):
    """Collects the kind of device on which each operation puts its results."""

    def __init__(self):
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.kinds |= {x.device.type for x in tree_leaves(results) if isinstance(x, torch.Tensor)}
        return results


@pytest.mark.parametrize("generator", ["segformer", "unet"])
def test_the_model_makes_nothing_on_the_cpu_that_a_cuda_graph_could_not_copy(
    generator, monkeypatch
):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    model = ASTSeg(Config(**SMALL, generator=generator, unet_width=0.1)).train()
    model(torch.rand(2, 3, 32, 32))  # its values have been looked at
    model, images = model.to("meta"), torch.empty(2, 3, 32, 32, device="meta")
    with SeenDevices() as seen:
        sum(astseg.full_loss(images, model(images), 1).values()).backward()
        astseg.robust_background_loss(images, *model.background(images)).backward()
    assert seen.kinds == {"meta"}


# ---- train.py: runs ----

TINY = (
    "--height 32 --width 32 --slots 4 --dim_transformer 64 --transformer_layers 1 --flip "
    "--train_images 40 --background_steps 6 --steps 12 --phase2_steps 6 --background_batch 4 "
    "--batch 4 --warmup 2 --entropy_warmup 3 --background_warmup 2 --background_plain_steps 3 "
    "--dropout 0.1 --log_every 2 --save_every 4"
).split()


def run_tiny(folder, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(astseg, "draw_shapes", draw_few)
        train.main([*TINY, "--output", str(folder), *map(str, more)])
    return json.loads((folder / "metrics.json").read_text())


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def training_of(*arguments):
    """The settings that a command line asks for."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", asked.append)
        train.main(arguments)
    return asked[0]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_tiny(folder)


def test_a_run_leaves_all_that_it_promises(whole_run):
    folder, metrics = whole_run
    assert set(metrics) >= {*astseg.METRICS, "MSE", "images", "seconds", "seed"}
    rows = read_log(folder)
    assert [row["update"] for row in rows] == [*range(2, 20, 2)]
    assert [row["step"] for row in rows] == [2, 4, 6, *range(2, 14, 2)]
    pictures = {"segmentation.png", "slots.png", "training.gif"}
    files = {"settings.json", "log.jsonl", "metrics.json", "checkpoint.pt", "model", "training"}
    assert {path.name for path in folder.iterdir()} == pictures | files
    frames = sorted(path.name for path in (folder / "training").iterdir())
    assert frames == [f"{n:07d}.png" for n in (4, 6, 10, 12, 14, 18)]
    assert Image.open(folder / "training.gif").n_frames == len(frames)
    assert all(Image.open(folder / name).size[0] > 300 for name in pictures)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings == asdict(training_of(*TINY, "--output", str(folder)))
    modes = {path.stat().st_mode for path in (folder / "model").iterdir()}
    assert len(modes) == 1  # who may read one may read all


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from torch.optim.optimizer import register_optimizer_step_post_hook
import astseg, train
draw, left = astseg.draw_shapes, [{updates}]
def count(*_):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
register_optimizer_step_post_hook(count)
astseg.draw_shapes = lambda count, *rest: draw(min(count, 40), *rest)
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("updates", [3, 11, 15])  # before a checkpoint, in phase 2, in phase 3
def test_a_killed_run_goes_on_to_the_same_bits_by_the_same_command(updates, tmp_path, whole_run):
    folder = tmp_path / "run"
    script = KILLED.format(here=str(HERE), updates=updates)
    line = [sys.executable, "-c", script, *TINY, "--output", str(folder)]
    assert subprocess.run(line, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    state = {"seconds": 0.0}
    if updates > 4:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(state | {"seconds": state["seconds"] + 1000}, folder / "checkpoint.pt")
    ours = run_tiny(folder)
    assert (ours["seconds"] >= 1000) == (updates > 4)  # the time before counts
    assert ours | {"seconds": 0} == whole_run[1] | {"seconds": 0}
    weights = [(f / "model" / "model.safetensors").read_bytes() for f in (folder, whole_run[0])]
    assert weights[0] == weights[1]
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images/s", "left")} for row in read_log(f)]
        for f in (folder, whole_run[0])
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_run_prints_its_table_again_goes_on_with_more_steps_and_refuses_others(
    whole_run, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(whole_run[0], folder)
    assert run_tiny(folder) | {"seconds": 0} == whole_run[1] | {"seconds": 0}
    assert f"AST-Seg, seed 0{100 * whole_run[1]['mIoU']:15.2f}" in capsys.readouterr().out
    run_tiny(folder, "--steps", 14, "--device", "cpu")
    assert "goes on after 18 updates" in capsys.readouterr().out
    assert [row["update"] for row in read_log(folder)][-2:] == [18, 20]
    for change in (["--steps", 12], ["--seed", 1], ["--lr", 0.1]):
        with pytest.raises(SystemExit, match="holds a run of .*: name another --output"):
            run_tiny(folder, *change)
    assert json.loads((folder / "settings.json").read_text())["steps"] == 14


def test_a_run_is_evaluated_again_and_several_have_mean_and_deviation(
    whole_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(astseg, "draw_shapes", draw_few)
    folder, metrics = whole_run
    shutil.copytree(folder, tmp_path / "other")
    model = ASTSeg.from_pretrained(folder / "model")
    model.renderer.log_alpha_0.data.fill_(-3.0)
    model.save_pretrained(tmp_path / "other" / "model")
    train.main(["evaluate", str(folder), str(folder), str(tmp_path / "other")])
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert lines[0].split() == [*astseg.METRICS, "MSE"]
    rows = [line.split() for line in lines[1:]]
    assert [row[0] for row in rows] == ["run", "other", "mean", "deviation"]
    for column, name in enumerate(lines[0].split(), start=1):
        a, b, mean, deviation = (float(row[column]) for row in rows)
        assert a == pytest.approx(metrics[name] * 100 ** (name != "MSE"), abs=0.006)
        assert [mean, deviation] == pytest.approx([(a + b) / 2, abs(a - b) / 2**0.5], abs=0.011)


def test_a_run_is_evaluated_on_other_data(whole_run, tmp_path, capsys, monkeypatch):
    data = DRAW(30, 9, 32)

    def reader(path, masks=None):
        assert path == Path("there") and masks in (None, Path("maps"))
        for image, labels in zip(data.images.permute(0, 2, 3, 1).numpy(), data.labels.numpy()):
            yield Image.fromarray(image), labels if masks else None, "test"

    monkeypatch.chdir(tmp_path)  # for the cache
    Path("there").mkdir()
    monkeypatch.setitem(astseg.DATASETS, "own", astseg.DataSet(reader))
    expected = train.evaluate(ASTSeg.from_pretrained(whole_run[0] / "model"), data)
    for masks in ([], ["--masks", "maps"]):
        other = ["--dataset", "own", "--data", "there", *masks]
        train.main(["evaluate", str(whole_run[0]), *other])
        row = capsys.readouterr().out.splitlines()[-1].split()
        assert float(row[-1]) == pytest.approx(expected["MSE"], abs=0.006)
        assert float(row[1]) == pytest.approx(100 * expected["mIoU"], abs=0.006) or not masks
        assert (row[1] == "nan") == (not masks)


def test_evaluation_is_the_mean_over_the_images_of_what_each_shows():
    model = ASTSeg(Config(**SMALL, log_alpha_0=-2.0))
    model.encoder.refinement = Spy(shift=1.0)  # some positions are clamped
    data = DRAW(53, 0, 32)  # more than one batch of 50
    expected = defaultdict(list)
    for image, label in zip(*data):
        x = image[None] / 255
        output = model.eval()(x)
        found = output.weights.argmax(1)
        expected["MSE"].append(((x - output.reconstruction) ** 2).sum().item())
        expected["foreground"].append((found > 0).sum().item() / 32**2)
        expected["active"].append(len({*found.flatten().tolist()} - {0}))
        at_border = [max(abs(v) for v in p) == 1 for p in output.latents.position[0].tolist()]
        expected["clamped"].append(sum(at_border) / 3)
        expected["alpha_0"].append(math.exp(-2))
        expected["entropy"].append(astseg.pixel_entropy_loss(output.weights).item())
        for name in astseg.METRICS:
            expected[name] += scores(name, label[None], found, 3)
    assert 0 < np.mean(expected["clamped"]) < 1 and 0 < np.mean(expected["foreground"]) < 1
    found = train.evaluate(model.train(), data)
    assert found == pytest.approx({n: np.mean(values) for n, values in expected.items()}, rel=1e-4)
    assert "mIoU" not in train.evaluate(model, data._replace(labels=None))
    some = train.evenly_spaced(data, 5)
    assert torch.equal(some.images, data.images[[0, 13, 26, 39, 52]])
    assert torch.equal(some.labels, data.labels[[0, 13, 26, 39, 52]])


def test_a_loss_that_is_not_finite_stops_the_run_before_it_saves(tmp_path):
    with pytest.raises(SystemExit, match="the loss is (nan|inf) in phase foreground"):
        run_tiny(tmp_path, "--lr", "1e30", "--warmup", "0")
    model = torch.load(tmp_path / "checkpoint.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_a_short_training_lowers_the_loss_and_wakes_the_foreground(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(astseg, "draw_shapes", lambda n, *rest: DRAW(min(n, 200), *rest))
        train.main(
            ["--output", str(tmp_path), *"--height 32 --width 32 --train_images 200 --warmup 50 "
             "--background_steps 60 --steps 200 --phase2_steps 180 --decay_at 1 --log_every 20 "
             "--log_alpha_0 1 --lr 1.5e-3 --batch 8 --transformer_layers 1".split()]
        )  # fmt: skip
    lines = read_log(tmp_path)
    losses = [line["loss"] for line in lines if line["phase"] == "foreground"]
    assert losses[-1] < 0.87 * losses[0]
    assert max(line.get("foreground", 0) for line in lines) > 0.02


# ---- train.py: what each setting changes ----


def test_each_ablation_of_table_4_changes_what_it_says(tmp_path):
    def model_of(*flags):
        training = training_of(*TINY, *flags)
        return train.build_model(training, {}), training

    images = torch.rand(2, 3, 32, 32)
    full, training = model_of("--anisotropic")
    output = full(images)

    model, _ = model_of("--no-transformer")
    assert parameters(model.encoder) == 0
    assert torch.equal(model.encoder(model.generator(images))[2], model(images).latents.position)

    model, _ = model_of("--slots", "5")
    assert model(images).weights.shape == (2, 6, 32, 32)

    model, _ = model_of("--generator", "unet", "--unet_width", "0.1")
    assert output.attention.shape == (2, 4, 8, 8)
    assert model(images).attention.shape == (2, 4, 32, 32)

    model, _ = model_of()
    assert torch.equal(*model(images).latents.scale.unbind(2))
    assert differ(*output.latents.scale.unbind(2))

    slots = torch.randn(1, 4, 64)
    for flag, same in (("0", True), ("0.1", False)):
        model, _ = model_of("--dropout", flag, "--refinement_start", "stock")
        model.train()
        assert torch.equal(model(images).attention, model(images).attention) == same
        layer = model.encoder.refinement.transformer.layers[0]
        assert torch.equal(layer(slots), layer(slots)) == same

    for start, same in (("identity", True), ("stock", False)):
        model, _ = model_of("--refinement_start", start)
        slots = 0.1 * torch.randn(1, 4, model.encoder.refinement.embedding.in_features)
        assert differ(model.encoder.refinement(slots), slots, 0.05) != same

    stored = save_segformer(tmp_path / "mit", "tiny").segformer.state_dict()
    model, training = model_of("--pretrained", str(tmp_path / "mit"))
    loaded = model.generator.network.segformer.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
    for change in (
        dict(generator="unet", unet_width=0.1),
        dict(pretrained=str(tmp_path / "nothing")),
    ):
        with pytest.raises(ValueError, match="--pretrained '' starts from random weights"):
            train.build_model(replace(training, **change), {})


# ---- train.py: pictures ----


def test_pictures_show_what_they_are_named():
    model, data = ASTSeg(Config(**SMALL, log_alpha_0=-2.0)), DRAW(3, 0, 32)
    model.generator.network.decode_head.classifier.weight.data *= 1000  # positions off the centre
    images = data.images / 255
    with torch.no_grad():
        output = model.eval()(images)
    rows, slots = (of(images, output, data.labels) for of in (train.figure_2, train.slot_rows))
    palette = train.PALETTE
    assert palette.shape == (256, 3) and palette[0].sum() == 0
    gaps = torch.cdist(palette[:14], palette[:14]) + 9 * torch.eye(14)
    assert gaps.min() > 0.2  # more than ten slots have colours of their own
    labels = output.weights.argmax(1)
    for b, j, i in itertools.product(range(3), (3, 30), (5, 17)):
        assert torch.equal(rows["true labels"][b, :, j, i], palette[data.labels[b, j, i].long()])
        assert torch.equal(rows["segmentation"][b, :, j, i], palette[labels[b, j, i]])
    assert torch.equal(rows["input"], images)
    assert output.attention_position.abs().amax((0, 1)).min() > 0.2
    assert torch.equal(rows["reconstruction"], output.reconstruction)
    assert torch.equal(rows["background"], output.background)
    assert list(slots) == [f"{n} {b}" for b in (1, 2, 3) for n in ("attention", "glimpse", "layer")]
    for b in range(3):
        attention = slots[f"attention {b + 1}"]
        glimpse = slots[f"glimpse {b + 1}"]
        layer = slots[f"layer {b + 1}"]
        assert torch.equal(attention[0], images[b])
        assert torch.equal(glimpse[0], output.background[b])
        assert torch.equal(layer[0], output.reconstruction[b])
        for k in range(3):
            x, y = (output.attention_position[b, k] + 1) / 2 * 31  # pixels, as (12) counts
            spot = (attention[k + 1] == torch.tensor([1.0, 0, 0])[:, None, None]).all(0).nonzero()
            close(spot.float().mean(0), torch.stack((y, x)), 0.6)
            shade = attention[k + 1][:, 0, 0] * output.attention[b, k].max()
            close(shade, output.attention[b, k, 0, 0].expand(3))
            color, mask = output.glimpses[b, k, :3], output.glimpses[b, k, 3]
            close(glimpse[k + 1], 1 - mask + mask * color)
            weight = output.weights[b, k + 1]
            close(layer[k + 1], 1 - weight + weight * output.layers[b, k])


def test_a_drawn_grid_holds_a_row_for_each_name_and_a_failing_one_costs_a_warning(tmp_path, capsys):
    rows = {"one": torch.rand(2, 3, 8, 10), "two": torch.rand(2, 3, 8, 10)}
    t, model, data = replace(LOOP, output=str(tmp_path)), ASTSeg(Config(**SMALL)), DRAW(2, 0, 32)
    train.draw(t, "grid.png", lambda *_: rows, model, data)
    assert not model.training  # without dropout
    picture = np.array(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (2 * 2 * 10, 2 * (2 * 12 + 55), 3)
    for n, name in enumerate(rows):
        for b in range(2):
            top, left = 2 * (10 * n + 1), 2 * (55 + 12 * b + 1)
            part = picture[top : top + 16 : 2, left : left + 20 : 2]
            assert np.abs(part - 255 * rows[name][b].permute(1, 2, 0).numpy()).max() <= 1
        assert (picture[20 * n : 20 * n + 20, :110] < 100).any()  # its name
    train.draw(t, "no.png", lambda *_: {}, model, data)
    assert "warning: no" in capsys.readouterr().out and not (tmp_path / "no.png").exists()


# ---- train.py: commands ----


def test_segment_sees_the_crop_of_its_training_and_writes_in_the_pixels_of_the_image(
    tmp_path, whole_run, capsys
):
    run = tmp_path / "run"
    model = ASTSeg.from_pretrained(whole_run[0] / "model").eval()
    model.renderer.log_alpha_0.data.fill_(-3.0)  # an early model shows nothing: make it show
    model.save_pretrained(run / "model")
    settings = json.loads((whole_run[0] / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | dict(dataset="clevrtex")))
    pixels = np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    train.main(["segment", str(run), str(tmp_path / "photo.png")])
    image = Image.open(run / "segmented" / "photo_labels.png")
    labels, overlay = np.array(image), np.array(Image.open(run / "segmented" / "photo_overlay.png"))
    assert image.mode == "P" and labels.shape == overlay.shape[:2] == (100, 160)
    crop = pixels[10:90, 40:120]  # 0.8 of the largest centre crop
    small = Image.fromarray(crop).resize((32, 32), Image.Resampling.BILINEAR)
    found = model.segment(torch.tensor(np.array(small)).movedim(2, 0)[None] / 255)[0]
    where = ((np.arange(80) + 0.5) * 0.4).astype(int)
    assert np.array_equal(labels[10:90, 40:120], found.numpy()[where][:, where]) and labels.any()
    labels[10:90, 40:120] = 0
    assert not labels.any()
    labels = np.array(image)
    assert f"{len(np.unique(labels[labels > 0]))} objects" in capsys.readouterr().out
    assert np.array_equal(overlay[labels == 0], pixels[labels == 0])
    colors = (train.PALETTE * 255).byte().numpy()[labels]
    blend = (colors * 128.0 + pixels * 127.0) / 255
    assert np.abs(overlay - blend)[labels > 0].max() < 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--scale_min 0.5", "scales are 0.5"),
        ("--decay_at 90", "decay_at is 90"),
        ("--generator vit", "registered as 'vit'"),
        ("--slotz 3", "--slots"),
        ("--device cuda", "device is cuda"),
        ("small", "--data"),
        ("small --data .", "runs/small is inside the data"),
        ("small --data nothing", "No such file or directory: 'nothing'"),
        ("evaluate nothing", "nothing/settings.json"),
        ("segment run a.png b/a.png", "two images have one name"),
    ],
)
def test_common_mistakes_are_refused_in_a_line_and_leave_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(astseg, "draw_shapes", draw_few)
    with pytest.raises((SystemExit, ValueError)) as error:
        train.main(arguments.split())
    assert message in capsys.readouterr().err + str(error.value)
    assert not list(tmp_path.iterdir())


def test_warmups_that_are_longer_than_their_phase_are_said(tmp_path, capsys):
    t = replace(LOOP, background_plain_steps=5, output=str(tmp_path))
    for steps, said in ((8, True), (7, False)):  # of 7
        train.start_or_resume(replace(t, entropy_warmup=steps))
        out = capsys.readouterr().out
        assert ("warning: a warm-up is longer" in out) == said
        assert out.startswith(f"shapes, 3 slots, on cpu, output: {tmp_path}\n")


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


def load(tmp_path, dataset, data, size=(64, 64), masks=""):
    return astseg.load_dataset(dataset, data, masks, *size, cache=tmp_path / "cache")


def all_of(parts, field="images"):
    return torch.cat([getattr(parts[name], field) for name in ("test", "val", "train")])


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_rooms_are_read_byte_by_byte(compress, tmp_path):
    images, owners, records = rooms(12)
    path = tmp_path / "objects_room_train.tfrecords"
    path.write_bytes(compress(records))
    parts = load(tmp_path, "objectsroom", path)
    assert torch.equal(all_of(parts), torch.from_numpy(images).movedim(3, 1))
    assert torch.equal(all_of(parts, "labels"), torch.from_numpy(np.maximum(0, owners - 3)).byte())
    assert {name: len(part.images) for name, part in parts.items()} == dict(test=1, val=1, train=10)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[: len(data) // 2], "record 1, has no image"),
        (lambda data: b"these are no records, but a text", "record 0, has no image"),
        (lambda data: record(example(image=np.zeros(12288))), "record 0, has no mask"),
        (lambda data: record(example(image=np.zeros(12), mask=np.zeros(4))), "record 0, has no im"),
    ],
)  # fmt: skip
def test_a_damaged_tfrecord_is_named_and_leaves_nothing(damage, message, tmp_path):
    path = tmp_path / "objects_room_train.tfrecords"
    path.write_bytes(damage(rooms(3)[2]))
    with pytest.raises(OSError, match=message) as error:
        load(tmp_path, "objectsroom", path)
    assert str(path) in str(error.value) and not [*(tmp_path / "cache").iterdir()]


def test_clevr_is_cropped_and_resized_as_the_paper_does(tmp_path):
    random = np.random.default_rng(1)
    small = random.integers(0, 256, (24, 32, 3)).repeat(10, 0).repeat(10, 1)
    image = (small + random.integers(-20, 20, small.shape)).clip(0, 255).astype(np.uint8)
    owner = random.integers(0, 11, (24, 32)).repeat(10, 0).repeat(10, 1)
    records = 3 * record(example(image=image, mask=masks_of(owner, 11)))
    path = tmp_path / "clevr_with_masks_train.tfrecords"
    path.write_bytes(gzip.compress(records, 1))
    images, labels = load(tmp_path, "clevr", path, (128, 128))["train"]
    crop = torch.from_numpy(image[24:216, 64:256]).movedim(2, 0)[None].float()
    resized = F.interpolate(crop, (128, 128), mode="bilinear", antialias=True)[0]
    assert (images[0] - resized).abs().max() <= 1
    nearest = Image.fromarray(owner[24:216, 64:256].astype(np.uint8)).resize((128, 128), 0)
    assert np.array_equal(labels[0], nearest)


@pytest.mark.parametrize(
    "variant, parts", [("full", (2, 2, 16)), ("outd", (20,)), ("camo", (2, 2, 16))]
)
def test_clevrtex_is_read_in_the_order_of_its_numbers(variant, parts, tmp_path):
    random = np.random.default_rng(0)
    for i in reversed(range(20)):
        folder = tmp_path / f"clevrtex_{variant}" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (240, 320, 4), dtype=np.uint8)
        pixels[..., 0], pixels[..., 3] = i, 255
        Image.fromarray(pixels).save(folder / f"CLEVRTEX_{variant}_{i:06d}.png")
        labels = random.choice([0, 2, 5, 12], (24, 32)).repeat(10, 0).repeat(10, 1)
        flat = Image.fromarray(labels.astype(np.uint8), "P")
        flat.putpalette(list(range(255, -1, -1)) * 3)  # colours that have nothing to do with it
        flat.save(folder / f"CLEVRTEX_{variant}_{i:06d}_flat.png")
    dataset = variant.replace("full", "clevrtex")
    found = load(tmp_path, dataset, tmp_path, (128, 128))
    assert [len(part.images) for part in found.values()] == [*parts]
    images = torch.cat([part.images for part in found.values()])
    assert images[:, 0].flatten(1).float().mean(1).tolist() == list(range(20))
    assert found["test"].labels.unique().tolist() == [0, 2, 5, 12]  # indices as they are
    first = labels[24:216, 64:256].astype(np.uint8)  # of the image that was written last, 0
    nearest = Image.fromarray(first).resize((128, 128), Image.Resampling.NEAREST)
    assert np.array_equal(found["test"].labels[0], nearest)
    (folder / f"CLEVRTEX_{variant}_000000_flat.png").unlink()
    with pytest.raises(OSError, match=f"CLEVRTEX_{variant}_000000_flat.png is no readable image"):
        load(tmp_path, dataset, tmp_path, (64, 64))


@pytest.fixture
def stacks(tmp_path):
    """ShapeStacks at random: its folder and the owners of the pixels by scenario and camera."""
    random, owners, data = np.random.default_rng(0), {}, tmp_path / "stacks"
    (data / "splits" / "default").mkdir(parents=True)
    for part, scenarios in {"test": ["a-1"], "eval": ["b-2"], "train": ["c-3", "d-4"]}.items():
        (data / "splits" / "default" / f"{part}.txt").write_text("\n".join(scenarios))
        for name, camera in itertools.product(scenarios, (1, 10)):
            for folder in ("recordings", "iseg"):
                (data / folder / name).mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            stem = f"rgb-w=2-f=1-l=0-c=unique-cam_{camera}-mono-0.png"
            Image.fromarray(pixels).save(data / "recordings" / name / stem)
            (data / "recordings" / name / stem.replace("rgb", "depth")).write_text("not read")
            owners[name, camera] = owner = random.integers(0, 6, (28, 28)).repeat(8, 0).repeat(8, 1)
            values = np.stack((owner * 32 + 5, owner, owner), axis=2).astype(np.uint8)
            stem = f"iseg-w=0-f=0-l=0-c=original-cam_{camera}-mono-0.map"
            Image.fromarray(values).save(data / "iseg" / name / stem, format="PNG")
    return data, owners


def test_shapestacks_has_its_own_splits_and_label_maps(stacks, tmp_path):
    data, owners = stacks
    parts = load(tmp_path, "shapestacks", data)
    assert [len(parts[name].images) for name in ("test", "val", "train")] == [2, 2, 4]
    rows = [14 + i * 196 // 64 for i in range(64)]
    for k, camera in enumerate((1, 10)):
        assert np.array_equal(parts["val"].labels[k], owners["b-2", camera][rows][:, rows])
    shutil.rmtree(data / "recordings" / "b-2")
    with pytest.raises(OSError, match="recordings/b-2"):  # a scenario that was not unpacked
        load(tmp_path, "shapestacks", data)


def picture(*size, mode="RGB"):
    return Image.new(mode, size or (80, 50))


@pytest.fixture
def photos(tmp_path):
    """Forty images of several kinds with label maps of several kinds, and other files."""
    random, data = np.random.default_rng(0), tmp_path / "photos"
    for i in range(40):
        sub, suffix = ("", "more/")[i % 2], ("png", "jpg", "webp", "JPEG")[i % 4]
        pixels = random.integers(0, 256, (50 + i, 90 - i, 3), dtype=np.uint8)
        values = random.choice([0, 40, 255], (8, 8)).astype(np.uint8).repeat(12, 0).repeat(12, 1)
        mask = Image.fromarray(values[: 50 + i, : 90 - i])
        mask = [mask, mask.convert("1"), mask.convert("P"), mask.convert("I;16")][i // 2 % 4]
        for folder in (data / sub, data / "masks" / sub):
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(data / f"{sub}{i:02d}.{suffix}")
        mask.save(data / "masks" / f"{sub}{i:02d}.png")
    (data / "notes.txt").symlink_to(tmp_path / "nowhere")
    (data / "circle").symlink_to(data)
    (data / ".hidden.png").write_text("no image")
    (data / ".thumbnails").mkdir()
    (data / ".thumbnails" / "00.png").write_text("no image")
    return data


def test_a_folder_says_what_it_took_and_is_decoded_once(tmp_path, photos, capsys, monkeypatch):
    images, masks = photos, photos / "masks"
    parts = load(tmp_path, "folder", images, (32, 48), masks)
    out = capsys.readouterr().out
    for words in (". 20", "more 20", " train", "up to 2 objects", "% background", "decoded into"):
        assert words in out, words
    assert sum(len(part.images) for part in parts.values()) == 40
    assert all_of(parts).shape == (40, 3, 32, 48)
    assert all_of(parts, "labels").unique().tolist() == [0, 1, 2]  # 40 and 255, renumbered
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # the cache suffices
        again = load(tmp_path, "folder", images, (32, 48), masks)
    assert torch.equal(all_of(again), all_of(parts)) and "from the cache" in capsys.readouterr().out
    mask = next(masks.glob("*.png"))
    time = os.stat(mask).st_mtime + 5  # a mask is mended under its name
    Image.fromarray(np.where(np.array(Image.open(mask)) == 0, 40, 0).astype(np.uint8)).save(mask)
    os.utime(mask, (time, time))
    mended = load(tmp_path, "folder", images, (32, 48), masks)
    assert not torch.equal(all_of(mended, "labels"), all_of(parts, "labels"))
    with pytest.raises(OSError, match="masks/.*more than 8 bits"):  # taken for images, and so said
        load(tmp_path, "folder", images, (32, 48))
    assert "masks 20" in capsys.readouterr().out
    shutil.rmtree(masks)
    assert load(tmp_path, "folder", images, (32, 48))["train"].labels is None
    assert not [*(tmp_path / "cache").glob("*.tmp")]


def test_an_image_never_leaves_its_part_when_others_come(tmp_path):
    random = np.random.default_rng(0)

    def grow(first, last, folder=""):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        for n in range(first, last):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{n:03d}.png")
        parts = load(tmp_path, "folder", tmp_path / "data", (32, 32))
        return {name: {image.numpy().tobytes() for image in part.images}
                for name, part in parts.items()}  # fmt: skip

    before, after = grow(50, 110), grow(0, 50)
    assert all(before[name] < after[name] for name in ("test", "val", "train"))
    assert 3 <= len(after["test"]) <= 20 and 3 <= len(after["val"]) <= 20  # about a tenth
    named = grow(0, 7, "val")
    assert len(named["val"]) == len(after["val"]) + 7 and named["test"] == after["test"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: (m / "00.png").unlink(), "masks/00.png is no readable image"),
        (lambda m: picture(5, 5, mode="L").save(m / "00.png"), "use its size"),
        (lambda m: picture(50, 90, mode="L").save(m / "00.png"), "use its size"),
        (lambda m: picture().save(m / "00.png"), "00.png is no mask: use a single-channel PNG"),
        (lambda m: picture(mode="L").save(m / "00.png", format="JPEG"), "00.png is no readable"),
        (lambda m: Image.fromarray(np.arange(4500, dtype=np.uint16).reshape(50, 90)).save(
            m / "00.png"), r"up to \d{4} .* labels 0..255"),
        (lambda m: picture().save(m.parent / "00.webp"), "differ only in their suffix"),
        (lambda m: Image.fromarray(np.zeros((50, 90), np.uint16)).save(
            m.parent / "00.png"), "00.png has more than 8 bits per channel"),
        (lambda m: picture(mode="RGBA").save(m.parent / "00.png"), "is transparent"),
        (lambda m: (m.parent / "00.png").write_bytes(b"<html>404</html>"),
         "00.png is no readable image"),
    ],
)  # fmt: skip
def test_what_is_no_image_or_mask_by_the_rules_is_refused(change, message, tmp_path, photos):
    change(photos / "masks")
    with pytest.raises((ValueError, OSError), match=message):
        load(tmp_path, "folder", photos, masks=photos / "masks")
    assert not [*(tmp_path / "cache").glob("*")]


def test_a_color_image_of_16_bits_is_refused(tmp_path):
    def chunk(kind, content):
        sums = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sums

    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # 2 x 1, 16 bits, RGB
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(13))) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(OSError, match="deep.png has more than 8 bits"):
        astseg.open_image(tmp_path / "deep.png")


def test_image_and_mask_are_turned_as_exif_says_and_a_malformed_tag_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png", exif=exif)
    turned = np.rot90(pixels, -1)
    assert np.array_equal(astseg.open_image(tmp_path / "a.png"), turned)
    assert np.array_equal(astseg.open_labels(tmp_path / "b.png"), turned[..., 0])
    junk = b"\x00\x08\x00\x02\x01\x12\x00\x03\x00\x00"
    Image.fromarray(pixels).save(tmp_path / "c.png", exif=junk)
    assert np.array_equal(astseg.open_image(tmp_path / "c.png"), pixels)


@pytest.mark.parametrize("size", [(80, 50), (50, 80), (64, 48), (7, 5)])
@pytest.mark.parametrize("crop, label_at", [(1.0, 0.5), (0.8, 0.5), (0.8, 0.0)])
def test_image_and_labels_are_the_same_centre_crop_and_labels_come_back(size, crop, label_at):
    (w, h), (height, width) = size, (32, 48)
    scale = min(w / width, h / height)
    side_x, side_y = max(1, int(crop * scale * width)), max(1, int(crop * scale * height))
    box = astseg.crop_box(size, height, width, crop)
    assert (box[2] - box[0], box[3] - box[1]) == (side_x, side_y)
    assert abs(box[0] - (w - box[2])) <= 1 and abs(box[1] - (h - box[3])) <= 1
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resized = image.crop(box).resize((width, height), Image.Resampling.BILINEAR)
    found = astseg.to_model(image, height, width, crop)
    assert np.array_equal(found, np.array(resized).transpose(2, 0, 1))
    labels = astseg.labels_to_model(pixels[..., 0], height, width, crop, label_at)
    for j, i in itertools.product(range(height), range(width)):
        row, column = int((j + label_at) * side_y / height), int((i + label_at) * side_x / width)
        assert labels[j, i] == pixels[box[1] + row, box[0] + column, 0]
    back = astseg.labels_to_image(torch.from_numpy(labels), size, crop)
    assert back.shape == (h, w)
    for row, column in itertools.product(range(side_y), range(side_x)):
        j, i = int((row + 0.5) * height / side_y), int((column + 0.5) * width / side_x)
        assert back[box[1] + row, box[0] + column] == labels[j, i]
    back[box[1] : box[3], box[0] : box[2]] = 0
    assert not back.any()


def test_the_crop_of_published_sets_rounds_as_theirs():
    assert astseg.crop_box((320, 240), 128, 128, 0.8) == (64, 24, 256, 216)
    assert astseg.crop_box((224, 224), 64, 64, 196 / 224) == (14, 14, 210, 210)
    assert astseg.crop_box((5, 4), 32, 32) == (0, 0, 4, 4)  # 0.5 is rounded to even


def reader_of(parts, labels=None):
    """A fork's own data set: an image of each part, whose red is its number."""

    def reader(data):
        for n, part in enumerate(parts):
            yield Image.new("RGB", (32, 32), (n, 0, 0)), labels and labels[n], part

    return astseg.DataSet(reader)


def test_parts_are_collected_by_name_in_any_order_or_cut_by_order(tmp_path, monkeypatch):
    names = ["train", "test", "val", "train", "test", "train"]
    monkeypatch.setitem(astseg.DATASETS, "own", reader_of(names))
    parts = load(tmp_path, "own", tmp_path, (32, 32))
    found = {name: part.images[:, 0, 0, 0].tolist() for name, part in parts.items()}
    assert found == dict(test=[1, 4], val=[2], train=[0, 3, 5])
    monkeypatch.setitem(astseg.DATASETS, "cut", reader_of([""] * 25))
    cut = load(tmp_path, "cut", tmp_path, (32, 32))
    found = {name: part.images[:, 0, 0, 0].tolist() for name, part in cut.items()}
    assert found == dict(test=[0, 1], val=[2, 3], train=[*range(4, 25)])


@pytest.mark.parametrize(
    "parts, labels",
    [
        (["train", "test", "dev"], None),
        (["", "test", "val"], None),
        ([""] * 3, [np.zeros((32, 32), int) + n for n in (0, 0, 256)]),
        ([""] * 3, [np.zeros((32, 32), int) + n for n in (0, -1, 1)]),
        ([""] * 3, [np.zeros((32, 32)) + n for n in (0, 0.5, 1)]),
        ([""] * 3, [np.zeros((31, 32), int)] * 3),
        ([""] * 3, [np.eye(32, dtype=int), None, None]),
    ],
)
def test_a_reader_that_breaks_the_rules_is_refused(parts, labels, tmp_path, monkeypatch):
    monkeypatch.setitem(astseg.DATASETS, "own", reader_of(parts, labels))
    with pytest.raises(ValueError, match="label|parts"):
        load(tmp_path, "own", tmp_path, (32, 32))


def test_the_cache_knows_age_settings_and_reader(tmp_path, monkeypatch):
    def key(*settings):
        return astseg.cache_key("own", tmp_path, *settings)

    file = tmp_path / "a.bin"
    file.write_text("a")
    monkeypatch.setitem(astseg.DATASETS, "own", reader_of([""]))
    first, alone = key(32), astseg.cache_key("own", file)
    assert key(32) == first != key(64)
    os.utime(file, (1, 1))  # the same name and size
    second = key(32)
    assert second != first and astseg.cache_key("own", file) != alone
    monkeypatch.setitem(astseg.DATASETS, "own", reader_of([""])._replace(crop=0.8))
    assert key(32) != second
    monkeypatch.setitem(astseg.DATASETS, "own", astseg.DataSet(lambda data: iter(())))
    assert key(32) != second
    partials = [astseg.DataSet(functools.partial(astseg.read_clevrtex, v)) for v in "ab"]
    partials += [astseg.DataSet(functools.partial(astseg.read_clevrtex, variant=v)) for v in "ab"]
    keys = set()
    for partial in partials:
        monkeypatch.setitem(astseg.DATASETS, "own", partial)
        keys.add(key(32))
    assert len(keys) == 4


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.pt"
    astseg.save_whole({"a": 1}, path)
    with pytest.raises(Exception, match="pickle|local"):
        astseg.save_whole(lambda: 0, path)
    assert torch.load(path) == {"a": 1} and os.listdir(tmp_path) == ["file.pt"]


def test_a_published_set_takes_no_masks_and_a_small_folder_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(TypeError, match="read_clevrtex"):
        load(tmp_path, "clevrtex", tmp_path, masks=tmp_path)
    for i in range(3):
        picture().save(tmp_path / f"{i}.png")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "a.pt.1.tmp").write_text("of a killed process")
    t = replace(LOOP, dataset="folder", data=str(tmp_path), cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="sub-folders train, val and test"):
        train.load_data(t, "train", "val", "test")
    assert "a.pt.1.tmp is of a process that was killed" in capsys.readouterr().out


def test_data_of_the_embedded_set_are_parts_that_differ():
    parts = train.load_data(replace(LOOP, train_images=20), "train", "val", "test")
    assert [len(part.images) for part in parts] == [20, 200, 500]
    for a, b in itertools.combinations(parts, 2):
        assert not torch.equal(a.images[:20], b.images[:20])


# ---- The notebook ----

NOTEBOOK = HERE / "equivariance_proof.ipynb"


def printed(cell):
    """What a cell has printed: its text with # for each number, and the numbers."""
    text = " ".join("".join(o.get("text", "") for o in cell.get("outputs", ())).split())
    number = r"[-+]?\d+\.?\d*(?:e[-+]\d+)?"
    return re.sub(r"\s*#", " #", re.sub(number, "#", text)), re.findall(number, text)


def drawn(cell):
    """The pictures that a cell has drawn, (H, W, 3) each, and what has drawn them."""
    shown = [o for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    files = [io.BytesIO(base64.b64decode(o.data["image/png"])) for o in shown]
    pictures = [np.asarray(Image.open(file).convert("RGB"), float) for file in files]
    return pictures, [o.metadata["image/png"]["drawn by"] for o in shown]


def test_the_notebook_runs_from_top_to_bottom_in_a_clean_kernel():
    """Each of its claims is an assert; and what it prints and draws is what is stored.

    Machines round otherwise: what a training has changed ("trained") or a picture of rounding
    errors ("rounding") may differ by more.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = deepcopy(notebook.cells)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute()  # raises what a cell raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(cell.source.count("assert ") for cell in code) > 40
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    for before, after in zip(stored, notebook.cells):
        tags = after.metadata.get("tags", ())
        (words, old), (same_words, new) = printed(before), printed(after)
        assert words == same_words
        for a, b in zip(old, new):
            last_digit = 10.0 ** decimal.Decimal(a).as_tuple().exponent
            rounding = 2 * last_digit + 1e-9 if set(".e") & set(a) else 0
            slack = 0.2 * abs(float(a)) if "trained" in tags else 0
            assert abs(float(a) - float(b)) <= rounding + slack, words
        (pictures, version), (same_pictures, new_version) = drawn(before), drawn(after)
        assert len(pictures) == len(same_pictures)
        if version == new_version:  # another Matplotlib lays text out otherwise
            for a, b in zip(pictures, same_pictures):
                assert np.abs(a - b).mean() < (1.0 if "rounding" in tags else 0.3)


def test_no_assert_of_the_notebook_is_empty():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    asserts = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert len(asserts) > 100
    for node in asserts:
        assert not isinstance(node.test, (ast.GeneratorExp, ast.Tuple, ast.List)), node.lineno
        for compared in ast.walk(node.test):  # a side with itself
            if isinstance(compared, ast.Compare):
                sides = [ast.dump(side) for side in (compared.left, *compared.comparators)]
                assert all(a != b for a, b in itertools.pairwise(sides)), node.lineno


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


# ---- The map to the paper ----

MODEL_PART = (HERE / "astseg.py").read_text().partition("# ==== Data: nothing below")[0]


def numbers_in(text):
    """The equations that a text names: "(1) (4), (10)-(12)" -> {1, 4, 10, 11, 12}."""
    ends = re.findall(r"\((\d+)\)(?:-\((\d+)\))?", text)
    return {n for first, last in ends for n in range(int(first), int(last or first) + 1)}


def table_of_the_head():
    """The rows of the module's table: (equations, names)."""
    line = r"^    ((?:section|Table|Algorithm).*?)  +(\w.*)$"
    rows = re.findall(line, astseg.__doc__, re.MULTILINE)
    return [(numbers_in(paper), names.split(", ")) for paper, names in rows]


def test_the_table_at_the_head_of_the_module_names_what_is_there_in_its_order():
    names = [name for _, row in table_of_the_head() for name in row]
    places = [re.search(rf"^(?:(?:def|class) {name}\b|{name} = )", MODEL_PART, re.MULTILINE)
              for name in names]  # fmt: skip
    assert len(names) > 25 and all(places)
    assert [place.start() for place in places] == sorted(place.start() for place in places)


def test_each_equation_stands_in_what_the_table_names_for_it():
    found = defaultdict(set)  # equation -> names of the functions and classes that hold its tag
    for node in ast.parse(MODEL_PART).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines = MODEL_PART.splitlines()[node.lineno - 1 : node.end_lineno]
            for tag in re.findall(r"# .*?\beqs?\. (.*)", "\n".join(lines)):
                for number in numbers_in(tag):
                    found[number].add(node.name)
    table = {number: set(names) for numbers, names in table_of_the_head() for number in numbers}
    assert found.keys() == table.keys() == {1, 4, *range(10, 23)}
    # Section 2 holds what Algorithm 1 uses: (11), and (4), of which (14) and (15) are coordinates.
    elsewhere = {11: {"spatial_softmax"}, 14: {"center_of_mass"}, 15: {"center_of_mass"}}
    for number, names in found.items():
        assert names & table[number], number
        assert names - table[number] == elsewhere.get(number, set()), number


def test_the_usage_example_runs_as_written():
    lines = [line.strip() for line in astseg.__doc__.splitlines()]
    names = {}
    exec("\n".join(line[4:] for line in lines if line.startswith(">>>")), names)
    assert names["labels"].shape == (2, 64, 64)


def test_importing_the_module_is_silent_and_touches_no_random_state():
    code = "import torch as t; a = t.get_rng_state(); import astseg"
    code += "; assert a.equal(t.get_rng_state())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---- The README ----

README = (HERE / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run_examples(folder, *examples):
    """Side by side, as they are written but for the settings and steps of a tiny run."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    started = []
    for number, code in enumerate(examples):
        code = re.sub(r"train\.main\(\[(.*?)\]\)", rf"train.main([\1, *{TINY}])", code, flags=re.S)
        script = folder / f"example_{number}.py"
        script.write_text(code.replace("range(100)", "range(2)"))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(
            subprocess.Popen([sys.executable, script], cwd=folder, env=environment, **pipes)
        )
    ended = [(process.communicate(), process.returncode) for process in started]
    for (_, errors), code in ended:
        assert code == 0, errors[-2000:]
    return [printed for (printed, _), _ in ended]


def test_the_lines_of_the_readme_on_a_trained_model_run_as_written(tmp_path):
    model = ASTSeg(Config(**SMALL | dict(height=48, width=48), log_alpha_0=-3.0))
    model.save_pretrained(tmp_path / "runs" / "shapes" / "model")
    picture(90, 60).save(tmp_path / "photo.png")
    *_, use = blocks("python")
    shapes = "print(*labels.shape, *on_photo.shape, *center.shape, *extent.shape)"
    (output,) = run_examples(tmp_path, use + shapes)
    assert output.splitlines()[-1] == "1 48 48 60 90 1 3 2 1 3 2"


def test_each_fork_of_the_readme_runs_as_written(tmp_path):
    *forks, _ = blocks("python")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 50, 60, 3), dtype=np.uint8)
    np.savez(tmp_path / "scenes.npz", image=images, mask=random.integers(0, 4, (20, 50, 60)))
    run_examples(tmp_path, *forks)
    settings = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/settings.json")]
    assert {"convolutions"} < {s["generator"] for s in settings}
    assert {"npz"} < {s["dataset"] for s in settings}
    for row in read_log(tmp_path / "runs" / "sparse")[-3:]:
        terms = row["reconstruction"] + row["weighted_entropy"] + row["sparsity"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5) and row["sparsity"] > 0


def test_the_commands_of_the_readme_are_taken():
    """Each line of its bash blocks and each cell of its tables that is a command of train.py."""
    lines = "".join(blocks("bash")).splitlines()
    lines += re.findall(r"`(python train\.py[^`\n]*)`", README)
    asked = []
    for line in lines:
        line = re.sub(r"\bS\b", "1", line.partition("#")[0])
        if "python train.py" in line:
            words = shlex.split(line.partition("python train.py")[2])
            with pytest.MonkeyPatch.context() as patch:
                for name in ("train", "evaluate_runs", "segment_files"):
                    patch.setattr(train, name, asked.append)
                if "--help" not in words:
                    train.main(words)
    assert len(asked) > 12 and {type(command) for command in asked} == {
        train.Training, train.Evaluate, train.Segment
    }  # fmt: skip


def test_the_links_names_and_flags_of_the_readme_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 4 and all((HERE / link).exists() for link in local)
    anchors = re.findall(r"\]\(#([^)]+)\)", README)
    heads = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    heads = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
    assert set(anchors) <= heads
    steps = re.findall(r"^.*\| `(\w+)`$", README.partition("## How it works")[2], re.MULTILINE)
    assert len(steps) == 7 and all(hasattr(astseg, name) for name in steps)
    flags = {flag.replace("no_", "") for flag in re.findall(r"`--(\w+)", README)}
    settings = {field.name for field in fields(train.Training)} | {"help"}
    assert flags <= settings, flags - settings
