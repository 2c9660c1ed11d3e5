"""AST-Seg in one file: unsupervised multi-object segmentation with attention and soft-argmax.

From unlabelled images alone the model finds each object, says where it is, what it looks like and
which pixels are its own. A feature map generator (Segformer) draws one attention map per slot; the
centre of mass of a map is the slot's position, and the features under it are its description. A
transformer encoder lets the slots compare notes, so that no two of them claim one object. Each slot
then draws a glimpse of its object, which a spatial transformer moves and shrinks to its place, and
a convolutional autoencoder draws the background. The layers compete for each pixel. Training
asks two things: the composed image must match the input, and each pixel be sure of its layer.

Usage (a folder of trained weights loads with `ASTSeg.from_pretrained("runs/shapes/model")`):

    >>> import torch, astseg
    >>> model = astseg.ASTSeg(astseg.Config(height=64, width=64, slots=4, backbone="tiny")).eval()
    >>> images = torch.rand(2, 3, 64, 64)                  # RGB in [0, 1]
    >>> output = model(images)                             # reconstruction, weights, position, ...
    >>> labels = model.segment(images)                     # (2, 64, 64), 0 is the background

The paper, from its first equation to its metrics, and where it stands below, in the same order (the
equations between (1) and (10) that are no code are checked in equivariance_proof.ipynb):

    section 2, eq. (1)                     translate
    section 2, eq. (4), Proposition 2.1    center_of_mass
    section 2, eq. (10)                    spatial_softmax, soft_argmax
    Table 6                                Config
    section 4.1, feature maps              SegformerGenerator
    Table 8                                UNetGenerator
    section 4.1, eqs. (12)-(13)            normalized_coordinates
    section 4.1, refinement                Refinement
    Algorithm 1, eqs. (11)-(16)            Encoder
    Table 7                                GlimpseGenerator
    section 4.1, spatial transformer       spatial_transformer
    section 4.1, eq. (17)                  occlusion_weights
    section 4.1, eq. (18)                  compose
    Algorithm 2                            Renderer
    section 4.1, background, [38]          BackgroundAutoencoder
    Figure 1                               ASTSeg
    section 4.2.1, eqs. (19)-(20)          reconstruction_loss
    section 4.2.1, eq. (21)                pixel_entropy_loss
    section 4.2.1, eq. (22)                quadratic_warmup, full_loss
    section 4.2.2, phase 1, [38]           robust_background_loss
    section 5.1, optimisation              learning_rate
    section 5.1, metrics                   mean_iou, adjusted_rand_index, segmentation_covering
    section 5.1, metrics                   squared_error

The phases of section 4.2.2 and the optimisers of Table 6 are in train.py: curriculum, run_phase and
Training.

Shapes: B batch, K slots, H W image, h w feature map (the paper's h*, w*), G side of a glimpse,
C channels, D latent width (the paper's d_Phi), Z width of z_what.

Conventions: images are float RGB in [0, 1]. Positions are pairs (x, y): x to the right, y down;
tensors are indexed [row, column], so (i, j) of the paper is [j, i] here. In eqs. (12)-(13) the
centres of the outermost pixels are at -1 and +1; in the spatial transformer the outer edges of the
outermost pixels are (the refinement absorbs the difference). Label 0 is the background, label k
is slot k. "# eq. (n)" marks the line that computes equation n; "# open:" marks a choice that the
paper leaves open, or a departure from it, and the README lists them all.
"""

import contextlib
import errno
import gzip
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator, Literal, NamedTuple, Optional

import google_crc32c
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# -------------------------------------------------------------------------------------------------
# Section 2: attention maps and soft-argmax for localisation


def translate(phi: Tensor, u: int, v: int) -> Tensor:
    """Shift maps by u columns and v rows, (T phi)(i, j) = phi(i - u, j - v) (section 2, eq. 1).

    phi (..., H, W) -> (..., H, W). Z^2 is cut to the window: zeros come in, what leaves is lost.
    """
    height, width = phi.shape[-2:]
    u, v = max(-width, min(u, width)), max(-height, min(v, height))
    return F.pad(phi, (u, -u, v, -v))  # eq. (1): a negative padding crops


def center_of_mass(attention: Tensor, x: Optional[Tensor] = None, y: Optional[Tensor] = None):
    """Sum of phi(p) p over the pixels p, the operator of Proposition 2.1 with C = 0 (eq. 4).

    attention (..., h, w), each map with sum 1; x (w,) and y (h,) are the coordinates of columns
    and rows, by default pixel indices from 0 -> (..., 2), the pair (x, y) in the same units.
    Half-precision maps are summed in fp32.
    """
    attention = at_least_float32(attention)
    height, width = attention.shape[-2:]
    x = torch.arange(width, device=attention.device) if x is None else x
    y = torch.arange(height, device=attention.device) if y is None else y
    # Products of elements, not of matrices: autocast would do those in half precision.
    center_x = (attention.sum(-2) * x.to(attention)).sum(-1)  # eqs. (4), (14)
    center_y = (attention.sum(-1) * y.to(attention)).sum(-1)  # eqs. (4), (15)
    return torch.stack((center_x, center_y), dim=-1)


def spatial_softmax(logits: Tensor) -> Tensor:
    """Softmax over all pixels of each map (eqs. 10, 11): (..., h, w) -> (..., h, w), sum 1.

    Stable for logits of any size; in fp32 even where autocast is on.
    """
    return at_least_float32(logits).flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])


def soft_argmax(logits: Tensor, x: Optional[Tensor] = None, y: Optional[Tensor] = None) -> Tensor:
    """Differentiable position of the maximum of each map (section 2, eq. 10).

    logits (..., h, w), any real numbers -> (..., 2), the pair (x, y), in pixels from 0 or in the
    units of the coordinates x (w,) and y (h,).
    """
    return center_of_mass(spatial_softmax(logits), x, y)  # eq. (10)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The same tensor in fp32, or in fp64 where it is fp64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# -------------------------------------------------------------------------------------------------
# Table 6: configuration

# Mix Transformer sizes: blocks a stage, widths, attention heads, width of the MLP decoder.
MIT_SIZES = {
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), (1, 2, 5, 8), 256),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512), (1, 2, 5, 8), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), (1, 2, 5, 8), 768),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), (1, 2, 5, 8), 768),
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512), (1, 2, 5, 8), 768),
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512), (1, 2, 5, 8), 768),
    "tiny": ((1, 1, 1, 1), (16, 32, 64, 128), (1, 2, 4, 8), 64),  # ours, for two CPU cores
}

# What the paper sets for each of its data sets (section 5.1); all else is Config's default. CLEVR
# also has a phase 1 of 2 500 steps only, see Training in train.py.
PAPER_SETTINGS = {
    "clevrtex": dict(height=128, width=128, slots=10),
    "clevr": dict(height=128, width=128, slots=10, anisotropic=False, background_kind="simple"),
    "objectsroom": dict(height=64, width=64, slots=3),
    "shapestacks": dict(height=64, width=64, slots=6, anisotropic=False),
}


def setting(default, help: str, **flag):
    """A dataclass field with one sentence of help, from which train.py makes its flags."""
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class Config:
    """The model's hyperparameters, by default the paper's for CLEVRTEX (Table 6).

    Raises ValueError, in one sentence, for a combination that cannot work.
    """

    height: int = setting(128, "Image height H in pixels.")
    width: int = setting(128, "Image width W in pixels.")
    slots: int = setting(10, "K, the largest number of objects in a scene.")
    anisotropic: bool = setting(True, "Scale width and height of a glimpse apart.")
    generator: Literal["segformer", "unet"] = setting("segformer", "Feature map generator.")
    backbone: Literal["b0", "b1", "b2", "b3", "b4", "b5", "tiny"] = setting(
        "b3", "Size of the Segformer's Mix Transformer."
    )
    unet_width: float = setting(1.0, "Factor on the channels of Table 8, for small runs.")
    transformer: bool = setting(True, "Refine the slots with a transformer encoder.")
    dim_transformer: int = setting(256, "d_T, width of the transformer encoder.")
    transformer_heads: int = setting(8, "Attention heads of a transformer layer.")
    dim_feedforward: int = setting(512, "Hidden width of a transformer layer's feed-forward part.")
    transformer_layers: int = setting(6, "Layers of the transformer encoder.")
    refinement_start: Literal["stock", "identity"] = setting(
        "stock", "Initialise the refinement as PyTorch does, or so that it begins as the identity."
    )
    dropout: float = setting(0.1, "Dropout and drop-path rate of Segformer and transformer.")
    dim_z_what: int = setting(32, "Z, width of the appearance vector z_what.")
    scale_min: float = setting(1.3, "s_min, lower bound of the inverse scaling factor.")
    scale_max: float = setting(24.0, "s_max, upper bound of the inverse scaling factor.")
    log_alpha_0: float = setting(11.0, "Logarithm of the initial background activation alpha_0.")
    alpha_0_per_pixel: bool = setting(False, "Learn one alpha_0(i, j) a pixel, for fixed cameras.")
    background_kind: Literal["simple", "complex"] = setting(
        "complex", "Background autoencoder for fixed (simple) or varying backgrounds (complex)."
    )
    background_width: float = setting(1.0, "Factor on the autoencoder's channels, for small runs.")
    entropy_weight: float = setting(1e-2, "lambda_pixel, weight of the pixel entropy loss.")
    entropy_warmup: int = setting(10_000, "N_pixel, steps over which that weight grows.")

    @classmethod
    def paper(cls, dataset: str, **changes) -> "Config":
        """The paper's settings for "clevrtex", "clevr", "objectsroom" or "shapestacks"."""
        if dataset not in PAPER_SETTINGS:
            raise ValueError(
                f"the paper has no data set {dataset!r}: use one of {', '.join(PAPER_SETTINGS)}"
            )
        return cls(**{**PAPER_SETTINGS[dataset], **changes})

    @property
    def dim_scale(self) -> int:
        """Numbers a scaling factor s_k is made of: 2, or 1 with isotropic scaling."""
        return 2 if self.anisotropic else 1

    @property
    def dim_latent(self) -> int:
        """D = d_Phi: the scaling factor, the activation and z_what."""
        return self.dim_scale + 1 + self.dim_z_what

    @property
    def glimpse_size(self) -> int:
        """G: 32 for images up to 64 pixels, 64 up to 128 (Table 7), 128 above."""
        side = max(self.height, self.width)
        return 32 if side <= 64 else 64 if side <= 128 else 128

    def __post_init__(self):
        for name, choices in [
            ("generator", ("segformer", "unet")),
            ("backbone", tuple(MIT_SIZES)),
            ("refinement_start", ("stock", "identity")),
            ("background_kind", ("simple", "complex")),
        ]:
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: use one of {', '.join(choices)}"
                )
        for name in ("slots", "dim_z_what", "transformer_layers", "dim_feedforward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("unet_width", "background_width"):
            if not 0 < getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.slots > 255:
            raise ValueError(f"slots is {self.slots}: label maps hold 255 objects at most")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be in [0, 1)")
        if not 0 < self.scale_min < self.scale_max:
            raise ValueError(
                f"scale_min is {self.scale_min} and scale_max {self.scale_max}: "
                "they must satisfy 0 < scale_min < scale_max"
            )
        if self.entropy_weight < 0 or self.entropy_warmup < 0:
            raise ValueError(
                f"entropy_weight is {self.entropy_weight} and entropy_warmup "
                f"{self.entropy_warmup}: neither can be negative"
            )
        self._check_transformer()
        smallest = 32 if self.generator == "segformer" else 2 ** len(unet_channels(*self.size)[1:])
        if min(self.size) < smallest:
            raise ValueError(
                f"the {self.generator} generator cannot take images of {self.height}x{self.width}: "
                f"height and width must be at least {smallest} pixels"
            )
        background_blocks(self.height, self.width)  # raises where no schedule exists

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    def _check_transformer(self):
        if self.transformer_heads < 1 or self.dim_transformer % self.transformer_heads:
            raise ValueError(
                f"dim_transformer is {self.dim_transformer} and transformer_heads "
                f"{self.transformer_heads}: the heads must divide the width"
            )
        if self.refinement_start == "identity" and self.dim_transformer < self.dim_latent + 4:
            raise ValueError(
                f"dim_transformer is {self.dim_transformer}: the identity start needs at least "
                f"{self.dim_latent + 4}"
            )


# -------------------------------------------------------------------------------------------------
# Section 4.1: feature map generators, (B, 3, H, W) -> (B, channels, h, w)


class SegformerGenerator(nn.Module):
    """Segformer [49] with its MLP decoder as a dense feature map generator (section 4.1).

    images (B, 3, H, W) -> (B, channels, ceil(H/4), ceil(W/4)). Weights are random until
    `load_backbone` is called; sides of 32 pixels and more.
    """

    def __init__(self, channels: int, size: str = "b3", dropout: float = 0.1):
        super().__init__()
        depths, widths, heads, decoder_width = MIT_SIZES[size]
        self.segformer = SegformerForSemanticSegmentation(
            SegformerConfig(
                depths=list(depths),
                hidden_sizes=list(widths),
                num_attention_heads=list(heads),
                decoder_hidden_size=decoder_width,
                drop_path_rate=dropout,
                classifier_dropout_prob=dropout,
                num_labels=channels,  # open: one head makes attention logits and features
            )
        )
        # The last stage's smallest maps are 2 x 2: their gradient takes oneDNN six times as long
        # when it pads them itself as when the same zeros are written out (4 % of a step).
        for layer in self.segformer.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == 4 * widths[-1]:
                layer.padding_mode = "constant"

    def load_backbone(self, source: str) -> None:
        """Take the backbone's weights from a model of the hub (nvidia/mit-b3) or a local folder.

        Raises OSError where there is nothing to load and ValueError where it is of another size.
        """
        try:
            loaded, report = SegformerModel.from_pretrained(source, output_loading_info=True)
        except Exception as error:  # the hub, JSON and safetensors each have their own
            raise OSError(
                f"cannot load a Segformer backbone from {source!r}: pass a local folder with "
                "config.json and model.safetensors, a hub name such as nvidia/mit-b3 when online, "
                "or leave it out to start from random weights"
            ) from error
        own = self.segformer.segformer
        wanted = {name: tensor.shape for name, tensor in own.state_dict().items()}
        found = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
        if report["missing_keys"] or wanted != found:
            raise ValueError(
                f"the backbone in {source!r} has widths {list(loaded.config.hidden_sizes)} and "
                f"depths {list(loaded.config.depths)}, but this model has "
                f"{list(own.config.hidden_sizes)} and {list(own.config.depths)}: "
                "choose the backbone size that the weights were made for"
            )
        own.load_state_dict(loaded.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        # open: images enter in [0, 1], without ImageNet's mean and deviation
        x, stages, head = images, [], self.segformer.decode_head
        for stage in self.segformer.segformer.stages:
            x = stage(x)
            stages.append(x)  # (B, C_1, H/4, W/4) ... (B, C_4, H/32, W/32)
        x = head.activation(head.batch_norm(self._fuse(stages)))  # (B, decoder width, h, w)
        return head.classifier(head.dropout(x))  # (B, channels, h, w)

    def _fuse(self, stages: list[Tensor]) -> Tensor:
        """The MLP decoder before its norm: stages (B, C_i, h_i, w_i) -> (B, decoder width, h, w).

        The library projects each stage, resizes, concatenates and fuses, all of it linear. Here the
        two matrices are multiplied first and the resize comes last: the same result to rounding,
        for half of the generator's arithmetic in a batch.
        """
        head, fused = self.segformer.decode_head, 0.0
        fuse = head.linear_fuse.weight.flatten(1).chunk(len(stages), dim=1)[::-1]
        for stage, projection, matrix in zip(stages, head.linear_projections, fuse):
            with torch.autocast(stage.device.type, enabled=False):
                weight, bias = matrix @ projection.proj.weight, matrix @ projection.proj.bias
            x = stage.movedim(1, 3) @ weight.T  # (B, h_i, w_i, decoder width)
            x = resize_bilinear(x, *stages[0].shape[2:])  # (B, h, w, decoder width)
            fused = fused + x + bias.to(x)
        return fused.movedim(3, 1)


def resize_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize as two matrix products: (B, h, w, C) -> (B, height, width, C).

    On a CPU a step of the default run is 7 % shorter than with F.interpolate and its slow gradient.
    """
    if x.shape[1:3] == (height, width):
        return x

    def weights(old: int, new: int) -> Tensor:  # (new, old)
        unit = torch.eye(old, dtype=x.dtype, device=x.device)[None]
        return F.interpolate(unit, new, mode="linear")[0].T

    x = weights(x.shape[2], width) @ x  # (B, h, width, C)
    return (weights(x.shape[1], height) @ x.flatten(2)).unflatten(2, (width, -1))


def unet_channels(height: int, width: int) -> tuple[int, ...]:
    """Channels of the U-Net (Table 8): of the first convolution, then of each downsample block."""
    if max(height, width) >= 200:
        return 48, 64, 96, 128, 128, 256, 256  # open: a sixth level for images of 200 px and more
    return 80, 128, 192, 256, 256, 256


def conv_norm_celu(convolution: nn.Module) -> nn.Sequential:
    """A convolution without bias, batch normalisation and CELU (section 7.3)."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.CELU())


class ResidualConv(nn.Module):
    """x + CELU(norm(conv3x3(x))) (section 7.3): (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = conv_norm_celu(nn.Conv2d(channels, channels, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class UNetGenerator(nn.Module):
    """The U-Net of the ablation study (Table 8): images (B, 3, H, W) -> (B, channels, H, W).

    channels is K + D, where Table 8 prints d_Phi.
    """

    def __init__(self, channels: int, height: int = 128, width: int = 128, factor: float = 1.0):
        super().__init__()
        widths = [max(8, round(c * factor)) for c in unet_channels(height, width)]
        sizes = [(height >> level, width >> level) for level in range(len(widths))]
        self.first = conv_norm_celu(nn.Conv2d(3, widths[0], 3, padding=1, bias=False))
        self.down = nn.ModuleList(
            nn.Sequential(
                conv_norm_celu(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1, bias=False)),
                ResidualConv(c_out),
            )
            for c_in, c_out in zip(widths, widths[1:])
        )
        self.center = conv_norm_celu(nn.Conv2d(widths[-1], widths[-1], 3, padding=1, bias=False))
        self.up = nn.ModuleList()
        c_in = widths[-1]
        for level in range(len(widths) - 1, 0, -1):
            c_skip, c_out = widths[level], widths[level - 1]
            odd = (sizes[level - 1][0] % 2, sizes[level - 1][1] % 2)  # open: odd sizes are padded
            up = nn.ConvTranspose2d(c_in + c_skip, c_out, 4, 2, 1, output_padding=odd, bias=False)
            self.up.append(nn.Sequential(ResidualConv(c_in + c_skip), conv_norm_celu(up)))
            c_in = c_out
        self.last = conv_norm_celu(nn.Conv2d(2 * widths[0], channels, 3, padding=1, bias=False))
        self.residual = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.head = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        skips = [self.first(images)]  # (B, 80, H, W)
        for down in self.down:
            skips.append(down(skips[-1]))  # (B, 128, H/2, W/2) ... (B, 256, H/32, W/32), or H/64
        x = self.center(skips[-1])
        for up in self.up:
            x = up(torch.cat((x, skips.pop()), dim=1))  # ... (B, 80, H, W)
        x = self.last(torch.cat((x, skips.pop()), dim=1))  # (B, channels, H, W)
        return self.head(x + self.residual(x))


# -------------------------------------------------------------------------------------------------
# Section 4.1 and Algorithm 1: from feature maps to object latents


def normalized_coordinates(height: int, width: int, device=None) -> tuple[Tensor, Tensor]:
    """x(i) (w,) and y(j) (h,): the centres of the first and last pixel are -1 and +1."""
    x = 2 * torch.arange(width, device=device) / (width - 1) - 1  # eq. (12), with i - 1 = 0, 1, ...
    y = 2 * torch.arange(height, device=device) / (height - 1) - 1  # eq. (13)
    return x, y


class Latents(NamedTuple):
    """What the encoder says of each slot (the output of Algorithm 1)."""

    position: Tensor  # (B, K, 2), (x_k, y_k) in [-1, 1]
    scale: Tensor  # (B, K, 2), inverse scaling factors (s_k^x, s_k^y) in [s_min, s_max]
    activation: Tensor  # (B, K), alpha_k > 0
    z_what: Tensor  # (B, K, Z), appearance


class Attention(NamedTuple):
    """Where each slot looks, before the refinement."""

    maps: Tensor  # (B, K, h, w), each sums to 1
    position: Tensor  # (B, K, 2), (x0_k, y0_k): the soft-argmax of the logits, in [-1, 1]


class Refinement(nn.Module):
    """Transformer encoder over the slots (section 4.1): (B, K, D + 2) -> (B, K, D + 2).

    No positional encoding: a permutation of the slots permutes the output.
    """

    def __init__(
        self,
        dim: int,
        dim_transformer: int = 256,
        heads: int = 8,
        dim_feedforward: int = 512,
        layers: int = 6,
        dropout: float = 0.1,
        start: str = "stock",
    ):
        super().__init__()
        # open: PyTorch's stock layer (norm after the residual, ReLU); its copies start identical
        layer = nn.TransformerEncoderLayer(
            dim_transformer, heads, dim_feedforward, dropout, batch_first=True
        )
        self.embedding = nn.Linear(dim, dim_transformer)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.projection = nn.Linear(dim_transformer, dim)
        if start == "identity":
            self._start_as_identity()

    @torch.no_grad()
    def _start_as_identity(self):
        # open: initialisation
        # With the stock one all slots start with nearly the same latents and drift together for
        # thousands of steps: fine in 125 000, hopeless in 3 000. Here each layer begins by adding
        # zero, and the large bias keeps its norms from changing much else.
        width, dim = self.embedding.weight.shape
        bias = torch.tensor([1.0, -1.0]).repeat(width // 2 + 1)[:width]
        frame = torch.stack((torch.ones(width), bias), dim=1)  # (width, 2)
        basis, _ = torch.linalg.qr(torch.cat((frame, torch.randn(width, dim)), dim=1))
        basis = basis[:, 2:]  # (width, dim), orthonormal, orthogonal to the bias and to the mean
        self.embedding.weight.copy_(basis)
        self.embedding.bias.copy_(bias)
        self.projection.weight.copy_(basis.T)
        self.projection.bias.zero_()
        for layer in self.transformer.layers:
            for last in (layer.self_attn.out_proj, layer.linear2):
                last.weight.zero_()
                last.bias.zero_()

    def forward(self, slots: Tensor) -> Tensor:
        return self.projection(self.transformer(self.embedding(slots)))  # (B, K, D + 2)


class Encoder(nn.Module):
    """Algorithm 1: feature and attention maps -> object latents.

    refinement maps (B, K, D + 2) to the same shape; None leaves it out (Table 4). D is
    dim_scale + 1 + dim_z_what, with dim_scale 1 for isotropic and 2 for anisotropic scaling.
    """

    def __init__(
        self,
        slots: int,
        dim_scale: int,
        dim_z_what: int,
        scale_min: float = 1.3,
        scale_max: float = 24.0,
        refinement: Optional[nn.Module] = None,
    ):
        super().__init__()
        self.slots, self.dim_latent = slots, dim_scale + 1 + dim_z_what
        self.columns = [2, dim_scale, 1, dim_z_what]  # open: channel order x y, s, alpha, z_what
        self.scale_min, self.scale_max = scale_min, scale_max
        self.refinement = refinement

    def forward(self, feature_maps: Tensor) -> tuple[Latents, Attention]:
        """feature_maps (B, K + D, h, w): K attention logit maps, then the feature map Phi."""
        logits, phi = at_least_float32(feature_maps).split([self.slots, self.dim_latent], dim=1)
        attention = spatial_softmax(logits)  # (B, K, h, w), eq. (11)
        x, y = normalized_coordinates(*phi.shape[-2:], device=phi.device)
        position = center_of_mass(attention, x, y)  # (B, K, 2), eqs. (14), (15)
        # A matrix product a map; in fp32 because ASTSeg turns autocast off around it.
        query = attention.flatten(2) @ phi.flatten(2).mT  # (B, K, hw) (B, hw, D), eq. (16)
        slots = torch.cat((position, query), dim=-1)  # (B, K, D + 2)
        if self.refinement is not None:
            slots = self.refinement(slots)
        return self.latents(slots), Attention(attention, position)

    def latents(self, slots: Tensor) -> Latents:
        """Name the columns of (B, K, D + 2) and bring each into its range (Algorithm 1)."""
        position, scale, activation, z_what = slots.split(self.columns, dim=-1)
        scale = self.scale_min + (self.scale_max - self.scale_min) * scale.sigmoid()
        return Latents(
            position=position.clamp(-1, 1),
            scale=scale.expand(*scale.shape[:-1], 2),  # isotropic: one number serves both axes
            activation=activation.squeeze(-1).exp(),
            z_what=z_what,
        )


# -------------------------------------------------------------------------------------------------
# Section 4.1 and Algorithm 2: from object latents to the image


class GlimpseGenerator(nn.Module):
    """Draws an object and its mask from z_what (Table 7): (N, Z) -> (N, 4, G, G) in [0, 1].

    Channels 0..2 are the colours o_k, channel 3 is the mask m_k. G is 32, 64 or 128.
    """

    # Channels of the hidden layers and their groups.
    LAYERS = {
        32: [(64, 4), (32, 2), (16, 1), (8, 1)],
        64: [(128, 8), (64, 4), (32, 2), (16, 1), (8, 1)],
        # open: 128 x 128 glimpses for images above 128 px
        128: [(256, 16), (128, 8), (64, 4), (32, 2), (16, 1), (8, 1)],
    }

    def __init__(self, dim_z_what: int = 32, size: int = 64):
        super().__init__()
        layers, c_in = [], dim_z_what
        for channels, groups in self.LAYERS[size]:
            # 2 x 2 on the 1 x 1 input, then each layer doubles the side.
            # (Table 7 prints stride 2 there; on a single pixel it is the same.)
            kernel, stride, padding = (4, 2, 1) if layers else (2, 1, 0)
            layers += [
                nn.ConvTranspose2d(c_in, channels, kernel, stride, padding, bias=False),
                nn.GroupNorm(groups, channels),
                nn.CELU(),
            ]
            c_in = channels
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(c_in, 4, 4, 2, 1), nn.Sigmoid())

    def forward(self, z_what: Tensor) -> Tensor:
        return self.layers(z_what[:, :, None, None])  # (N, Z, 1, 1) -> (N, 4, G, G)


def spatial_transformer(
    glimpses: Tensor, position: Tensor, scale: Tensor, height: int, width: int
) -> Tensor:
    """Shrink glimpses by s and move them to (x, y) (section 4.1, Algorithm 2).

    glimpses (N, C, G, G), position (N, 2) in [-1, 1], scale (N, 2) -> (N, C, height, width);
    bilinear, zero outside the glimpse.
    """
    # Image point p shows the glimpse at s (p - position): the affine map of the paper's spatial
    # transformer, without its rotation and shear, written out so that it stays in fp32.
    # open: +-1 are the outer edges of the outermost pixels here (align_corners=False)
    columns = (2 * torch.arange(width, device=scale.device) + 1) / width - 1  # (width,)
    rows = (2 * torch.arange(height, device=scale.device) + 1) / height - 1  # (height,)
    u = scale[:, :1] * (columns - position[:, :1])  # (N, width)
    v = scale[:, 1:] * (rows - position[:, 1:])  # (N, height)
    u, v = u[:, None, :].expand(-1, height, -1), v[:, :, None].expand(-1, -1, width)
    return F.grid_sample(glimpses, torch.stack((u, v), dim=-1), align_corners=False)


def occlusion_weights(activation: Tensor, masks: Tensor, alpha_0: Tensor) -> Tensor:
    """How much of each pixel each layer shows (eq. 17), the background first.

    activation (B, K), masks (B, K, H, W), alpha_0 () or (H, W) -> (B, K + 1, H, W), sums to 1.
    """
    objects = activation[:, :, None, None] * masks  # (B, K, H, W), alpha_k M_k
    background = alpha_0.expand_as(objects[:, :1])  # (B, 1, H, W), alpha_0 M_0 with M_0 = 1
    strength = torch.cat((background, objects), dim=1)
    return strength / strength.sum(1, keepdim=True)  # eq. (17)


def compose(weights: Tensor, background: Tensor, layers: Tensor) -> Tensor:
    """The weighted sum of all layers (eq. 18).

    weights (B, K + 1, H, W), background (B, 3, H, W), layers (B, K, 3, H, W) -> (B, 3, H, W).
    """
    objects = (weights[:, 1:, None] * layers).sum(1)  # (B, 3, H, W)
    return weights[:, :1] * background + objects  # eq. (18)


class Layers(NamedTuple):
    """What the renderer makes of the slots (Algorithm 2)."""

    weights: Tensor  # (B, K + 1, H, W), w_0..w_K, sums to 1
    layers: Tensor  # (B, K, 3, H, W), L_1..L_K in [0, 1]
    masks: Tensor  # (B, K, H, W), M_1..M_K in [0, 1]
    glimpses: Tensor  # (B, K, 3, G, G), o_1..o_K in [0, 1]
    glimpse_masks: Tensor  # (B, K, G, G), m_1..m_K in [0, 1]


class Renderer(nn.Module):
    """Algorithm 2, all but its last line: object latents -> layers and their weights."""

    def __init__(
        self,
        height: int,
        width: int,
        dim_z_what: int = 32,
        glimpse_size: int = 64,
        log_alpha_0: float = 11.0,
        alpha_0_per_pixel: bool = False,
    ):
        super().__init__()
        self.height, self.width = height, width
        self.glimpse_generator = GlimpseGenerator(dim_z_what, glimpse_size)
        # alpha_0 = e^11 is what makes learning start well: objects begin invisible and grow only
        # where they help. With a small alpha_0 the first random glimpses hurt, and all slots die.
        # open: its logarithm is learned
        self.log_alpha_0 = nn.Parameter(torch.tensor(float(log_alpha_0)))
        self.log_alpha_0_map = (
            nn.Parameter(torch.zeros(height, width)) if alpha_0_per_pixel else None
        )

    @property
    def alpha_0(self) -> Tensor:
        """The background's activation, () or (H, W)."""
        if self.log_alpha_0_map is None:
            return self.log_alpha_0.exp()
        return (self.log_alpha_0 + self.log_alpha_0_map).exp()

    def forward(self, latents: Latents) -> Layers:
        batch, slots = latents.activation.shape
        # All B K glimpses are drawn and warped as one batch.
        glimpses = self.glimpse_generator(latents.z_what.flatten(0, 1))  # (B K, 4, G, G)
        glimpses = at_least_float32(glimpses)
        position, scale = latents.position.flatten(0, 1), latents.scale.flatten(0, 1)  # (B K, 2)
        warped = spatial_transformer(glimpses, position, scale, self.height, self.width)
        glimpses = glimpses.unflatten(0, (batch, slots))  # (B, K, 4, G, G)
        warped = warped.unflatten(0, (batch, slots))  # (B, K, 4, H, W)
        glimpse_colors, glimpse_masks = glimpses.split([3, 1], dim=2)  # (B, K, 3 or 1, G, G)
        layers, masks = warped.split([3, 1], dim=2)  # (B, K, 3 or 1, H, W)
        masks, glimpse_masks = masks.squeeze(2), glimpse_masks.squeeze(2)
        weights = occlusion_weights(latents.activation, masks, self.alpha_0)
        return Layers(weights, layers, masks, glimpse_colors, glimpse_masks)


# -------------------------------------------------------------------------------------------------
# Section 4.1: background model, the convolutional autoencoder of [38]

# Encoder and decoder channels, both from image to latents, by number of blocks, as the authors use
# [38] for this paper.
BACKGROUND_CHANNELS = {
    ("simple", 5): ([3, 64, 160, 160, 32, 16], [4, 144, 256, 256, 32, 16]),
    ("simple", 6): ([3, 64, 160, 320, 160, 32, 16], [4, 144, 256, 512, 256, 32, 16]),
    ("simple", 7): ([3, 64, 160, 320, 160, 160, 32, 16], [4, 144, 256, 512, 256, 256, 32, 16]),
    ("complex", 5): ([3, 64, 160, 160, 16, 16], [4, 144, 640, 640, 16, 16]),
    ("complex", 6): ([3, 64, 160, 320, 160, 16, 16], [4, 144, 640, 1280, 640, 16, 16]),
    ("complex", 7): ([3, 64, 320, 640, 640, 320, 16, 16], [4, 144, 640, 1280, 640, 320, 16, 16]),
}


def background_blocks(height: int, width: int) -> list[tuple]:
    """The convolutions that bring an image to 1 x 1 (the schedule of [38]), each axis by itself.

    Returns a list of (kernel, stride, padding, output_padding), each a pair (rows, columns);
    output_padding makes the mirrored transpose convolution exact. Raises ValueError for a size
    that has no schedule.
    """
    big = max(height, width) >= 200
    sides, blocks = (height, width), []  # open: each axis of an image has its own kernels
    while max(sides) > 1:
        axes = []
        for side in sides:
            if side > 5:
                axes.append((5, 3 if big else 2, 2))
            elif side > 3 and not big:
                axes.append((4, 2, 1))
            else:
                axes.append((side, 1, 0))
        smaller = [(side + 2 * p - k) // s + 1 for side, (k, s, p) in zip(sides, axes)]
        remainder = [(side + 2 * p - k) % s for side, (k, s, p) in zip(sides, axes)]
        blocks.append((*zip(*axes), tuple(remainder)))
        sides = smaller
    if not 5 <= len(blocks) <= 7 or min(height, width) < 1:
        raise ValueError(
            f"the background autoencoder has no schedule for images of {height}x{width}: "
            "their longer side must be 25..192 or 200..3645 pixels"
        )
    return blocks


def coordinate_maps(height: int, width: int, device=None) -> Tensor:
    """Row and column coordinates in [-0.5, 0.5]: (1, 2, height, width); 1 along a side of 1."""
    y, x = (
        torch.linspace(-0.5, 0.5, side, device=device) if side > 1 else torch.ones(1, device=device)
        for side in (height, width)
    )
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]


class CoordinateConv(nn.Module):
    """A (transpose) convolution that knows where it is; then group norm and CELU, or neither.

    convolution takes C + 2 channels, of which the last two are the coordinates:
    (B, C, h, w) -> (B, C', h', w').
    """

    def __init__(self, convolution: nn.Module, norm: bool = True):
        super().__init__()
        channels = convolution.out_channels
        self.convolution = convolution
        self.norm = nn.GroupNorm(max(1, channels // 16), channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        # The convolution is linear, and the coordinates are the same for all images: they are
        # convolved apart, once a batch (a step of phase 3 is 5 % shorter on a CPU).
        inputs = 0 if self.convolution.transposed else 1  # the weight's axis of input channels
        of_x, of_coordinates = self.convolution.weight.split([x.shape[1], 2], dim=inputs)
        grid = coordinate_maps(*x.shape[-2:], device=x.device).to(x)  # (1, 2, h, w)
        x = self._convolve(x, of_x) + self._convolve(grid, of_coordinates)
        return x if self.norm is None else F.celu(self.norm(x))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        c = self.convolution
        if c.transposed:
            return F.conv_transpose2d(x, weight, None, c.stride, c.padding, c.output_padding)
        return F.conv2d(x, weight, None, c.stride, c.padding)


class BackgroundAutoencoder(nn.Module):
    """Background of an image, through 16 latents that have no room for objects ([38]).

    images (B, 3, H, W) in [0, 1] -> background (B, 3, H, W) in [0, 1], and a prediction
    (B, H, W) in [0, 1] of its reconstruction error, which the robust loss uses.
    """

    def __init__(self, height: int, width: int, kind: str = "complex", factor: float = 1.0):
        super().__init__()
        blocks = background_blocks(height, width)
        down, up = BACKGROUND_CHANNELS[kind, len(blocks)]
        down, up = [self._narrow(c, factor) for c in (down, up)]
        encoder, decoder = [], []
        for level, (kernel, stride, padding, output_padding) in enumerate(blocks):
            encoder.append(
                CoordinateConv(
                    nn.Conv2d(down[level] + 2, down[level + 1], kernel, stride, padding, bias=False)
                )
            )
            transpose = nn.ConvTranspose2d(
                up[level + 1] + 2, up[level], kernel, stride, padding, output_padding, bias=False
            )
            decoder.append(CoordinateConv(transpose, norm=level > 0))
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*reversed(decoder))

    @staticmethod
    def _narrow(channels: list[int], factor: float) -> list[int]:
        """Scale the hidden channels, in multiples of 16 so that their groups still divide them."""
        hidden = [max(16, 16 * round(c * factor / 16)) for c in channels[1:-1]]
        return [channels[0], *hidden, channels[-1]]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # open: images enter the background autoencoder in [0, 1]
        # (in the authors' 0..255 the first layer's coordinates weigh less beside them)
        latents = self.encoder(images)  # (B, 16, 1, 1)
        output = at_least_float32(self.decoder(latents)).sigmoid()  # (B, 4, H, W)
        return output[:, :3], output[:, 3]


# -------------------------------------------------------------------------------------------------
# Figure 1: the whole model


class Output(NamedTuple):
    """All that the model says of a batch of images."""

    reconstruction: Tensor  # (B, 3, H, W), the composed image
    background: Tensor  # (B, 3, H, W), L_0 in [0, 1]
    weights: Tensor  # (B, K + 1, H, W), w_0..w_K, sums to 1
    layers: Tensor  # (B, K, 3, H, W), L_1..L_K in [0, 1]
    masks: Tensor  # (B, K, H, W), M_1..M_K in [0, 1]
    glimpses: Tensor  # (B, K, 3, G, G), o_1..o_K in [0, 1]
    glimpse_masks: Tensor  # (B, K, G, G), m_1..m_K in [0, 1]
    position: Tensor  # (B, K, 2), (x_k, y_k) in [-1, 1]
    scale: Tensor  # (B, K, 2), inverse scaling factors in [s_min, s_max]
    activation: Tensor  # (B, K), alpha_k > 0
    z_what: Tensor  # (B, K, Z), appearance
    attention: Tensor  # (B, K, h, w), A_1..A_K, each sums to 1
    attention_position: Tensor  # (B, K, 2), soft-argmax before the refinement, in [-1, 1]


class ASTSeg(nn.Module, PyTorchModelHubMixin, library_name="astseg", license="mit"):
    """The whole model (Figure 1).

    `save_pretrained(folder)` writes model.safetensors and config.json, `ASTSeg.from_pretrained`
    reads them from a folder or from the hub.
    """

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options) -> "ASTSeg":
        # As in huggingface_hub, but silent, and weights that are missing or too many are an error.
        with contextlib.redirect_stdout(None):
            return super()._from_pretrained(strict=strict, **options)

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.config = c = config
        channels = c.slots + c.dim_latent
        if c.generator == "segformer":
            self.generator = SegformerGenerator(channels, c.backbone, c.dropout)
        else:
            self.generator = UNetGenerator(channels, c.height, c.width, c.unet_width)
        refinement = None
        if c.transformer:
            refinement = Refinement(
                c.dim_latent + 2,
                c.dim_transformer,
                c.transformer_heads,
                c.dim_feedforward,
                c.transformer_layers,
                c.dropout,
                c.refinement_start,
            )
        self.encoder = Encoder(
            c.slots, c.dim_scale, c.dim_z_what, c.scale_min, c.scale_max, refinement
        )
        self.renderer = Renderer(
            c.height, c.width, c.dim_z_what, c.glimpse_size, c.log_alpha_0, c.alpha_0_per_pixel
        )
        self.background = BackgroundAutoencoder(
            c.height, c.width, c.background_kind, c.background_width
        )

    def forward(self, images: Tensor, background: Optional[Tensor] = None) -> Output:
        """images (B, 3, H, W) in [0, 1] -> Output.

        A background (B, 3, H, W) that is known already (phase 2) spares its computation. Raises
        ValueError for images of a wrong shape, type or, outside training, range.
        """
        latents, attention, objects = self._objects(images)
        if background is None:
            background, _ = self.background(images)
        reconstruction = compose(objects.weights, background, objects.layers)
        return Output(
            reconstruction, background, **objects._asdict(), **latents._asdict(),
            attention=attention.maps, attention_position=attention.position,
        )  # fmt: skip

    @torch.no_grad()
    def segment(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> label maps (B, H, W), int64, 0..K, 0 the background.

        The background model is not needed (section 4.1). Raises ValueError as `forward` does.
        """
        return self._objects(images)[2].weights.argmax(1)

    def _objects(self, images: Tensor) -> tuple[Latents, Attention, Layers]:
        self.check_images(images)
        feature_maps = self.generator(images)  # (B, K + D, h, w)
        # Softmax over pixels, exp(activation) and eq. (17) do not survive half precision.
        with torch.autocast(images.device.type, enabled=False):
            latents, attention = self.encoder(feature_maps)
            return latents, attention, self.renderer(latents)

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError, in one sentence, for images that the model cannot take."""
        if images.ndim != 4 or images.shape[1:] != (3, *self.config.size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}: this model takes "
                f"(batch, 3, {self.config.height}, {self.config.width})"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}: pass floats in [0, 1], for bytes images / 255"
            )
        if not self.training and images.numel():  # a training step does not wait for this answer
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"images have values from {low:.4g} to {high:.4g}: scale them to [0, 1]"
                )


# -------------------------------------------------------------------------------------------------
# Section 4.2: losses and schedules


def reconstruction_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over pixels of the squared L1 error over colours (eqs. 19, 20).

    images, reconstruction (B, 3, H, W) -> ().
    """
    error = (reconstruction - images).abs().sum(1)  # (B, H, W), eq. (19)
    return error.square().mean()  # eq. (20)


def pixel_entropy_loss(weights: Tensor) -> Tensor:
    """Mean over pixels of the squared entropy of the weights (eq. 21): (B, K + 1, H, W) -> ().

    The square has no singular gradient near one-hot weights, as the entropy itself has.
    """
    weights = at_least_float32(weights)  # 1e-20 is zero in fp16
    return (weights * (weights + 1e-20).log()).sum(1).square().mean()  # eq. (21)


def quadratic_warmup(step: int, steps: int) -> float:
    """min(1, step / steps)^2, and 1 where steps is 0 (section 4.2.1)."""
    return min(1.0, step / steps) ** 2 if steps else 1.0


def full_loss(
    images: Tensor,
    output: Output,
    step: int,
    entropy_weight: float = 1e-2,
    entropy_warmup: int = 10_000,
) -> Tensor:
    """Reconstruction loss plus the entropy loss at its weight of this step (eq. 22).

    images (B, 3, H, W) in [0, 1], the model's output for them, step from 0 -> ().
    """
    weight = entropy_weight * quadratic_warmup(step, entropy_warmup)
    entropy = pixel_entropy_loss(output.weights)
    return reconstruction_loss(images, output.reconstruction) + weight * entropy  # eq. (22)


def robust_background_loss(
    images: Tensor,
    background: Tensor,
    predicted_error: Tensor,
    beta: float = 6.0,
    tau: float = 0.25,
    pooling: int = 75,
) -> Tensor:
    """The loss of [38], deaf to pixels that the background does not explain.

    images, background (B, 3, H, W), predicted_error (B, H, W), all in [0, 1] -> ().
    """
    error = F.smooth_l1_loss(background, images, reduction="none", beta=3 / 255).sum(1)  # (B, H, W)
    error_of_error = F.smooth_l1_loss(
        predicted_error, error.detach() / 3, reduction="none", beta=3 / 255
    )
    radius = images.shape[-1] // pooling
    with torch.no_grad():  # pixels around a large error are objects, and should not teach
        foreground = F.avg_pool2d(
            (error / tau).tanh()[:, None], 2 * radius + 1, 1, radius, count_include_pad=False
        )
        weight = (-beta * foreground).exp().squeeze(1)  # (B, H, W)
    return ((error + error_of_error) * weight).mean()


def background_complexity(backgrounds: Tensor, tau: float = 0.25) -> float:
    """How far backgrounds (N, 3, H, W) in [0, 1] are from their per-pixel median, in [0, 1] ([38]).

    Above 0.24 [38] takes the complex autoencoder.
    """
    distance = (backgrounds - backgrounds.median(0).values).abs().sum(1)  # (N, H, W)
    return (distance / tau).tanh().mean().item()


def learning_rate(
    step: int, peak: float, total: int, warmup: int = 0, decay_at: float = 0.9
) -> float:
    """Learning rate of step 1..total (section 5.1): quadratic warm-up, then a tenth near the end.

    It falls to peak / 10 from the share decay_at of all steps on.
    """
    decay = 0.1 if step >= decay_at * total else 1.0
    return peak * quadratic_warmup(step, warmup) * decay


# -------------------------------------------------------------------------------------------------
# Section 5.1: metrics, per image. Labels: 0 background, 1.. objects or slots.


def contingency(target: Tensor, predicted: Tensor, labels: int) -> Tensor:
    """Pixels that each pair of labels shares: two (B, H, W) -> (B, labels, labels), fp64."""
    pairs = (target.long() * labels + predicted.long()).flatten(1)  # (B, H W)
    table = torch.zeros(len(pairs), labels * labels, dtype=torch.float64, device=pairs.device)
    table.scatter_add_(1, pairs, torch.ones_like(pairs, dtype=torch.float64))
    return table.unflatten(1, (labels, labels))  # [image, target, predicted]


def label_count(target: Tensor, predicted: Tensor, slots: int) -> int:
    """K + 1, or more where a label is above K: such an object stays a row of its own."""
    if target.shape != predicted.shape or target.ndim != 3:
        raise ValueError(
            f"label maps have shapes {tuple(target.shape)} and {tuple(predicted.shape)}: "
            "both must be (batch, height, width)"
        )
    if min(int(target.min()), int(predicted.min())) < 0:
        raise ValueError("label maps hold a negative label: 0 is the background, 1.. the objects")
    return max(slots, int(target.max()), int(predicted.max())) + 1


def iou_matrix(table: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of each pair of labels, and whether one of the two is in the image.

    Contingency tables (B, labels, labels) -> two of that shape; the IoU of absent pairs is 0.
    """
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table / union.clamp(min=1), union > 0


def mean_iou(target: Tensor, predicted: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """mIoU with and without the background pair (mIoU, mIoU-FG), after a Hungarian matching.

    target, predicted (B, H, W) integers -> two (B,) in [0, 1], fp64. Sum of the matched IoUs over
    the matched pairs of which one side at least is in the image.
    """
    labels = label_count(target, predicted, slots)
    iou, present = iou_matrix(contingency(target, predicted, labels))
    with_background, foreground = [], []
    for scores, counts in zip(iou.cpu().numpy(), present.cpu().numpy()):
        rows, columns = linear_sum_assignment(scores, maximize=True)
        matched, counted = scores[rows, columns], counts[rows, columns]
        with_background.append(matched.sum() / counted.sum())
        # open: an image in which nothing is to be found and nothing was found counts 1 in mIoU-FG
        found = counted[1:].sum()
        foreground.append(matched[1:].sum() / found if found else 1.0)
    return torch.tensor(np.array(with_background)), torch.tensor(np.array(foreground))


def adjusted_rand_index(target: Tensor, predicted: Tensor, slots: int) -> Tensor:
    """ARI-FG: adjusted Rand index over the pixels whose target is an object.

    target, predicted (B, H, W) integers -> (B,), at most 1, fp64. Pixels predicted as background
    form an ordinary cluster; an image without objects counts 1.
    """
    labels = label_count(target, predicted, slots)
    table = contingency(target, predicted, labels)[:, 1:]  # without the background's row

    def pairs(counts):
        return counts * (counts - 1) / 2

    same_both = pairs(table).sum((1, 2))  # (B,)
    same_target, same_predicted = pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected = same_target * same_predicted / pairs(table.sum((1, 2))).clamp(min=1)
    best = (same_target + same_predicted) / 2
    trivial = best == expected  # no pixel, or one cluster on both sides
    return torch.where(trivial, 1.0, (same_both - expected) / (best - expected + trivial))


def segmentation_covering(target: Tensor, predicted: Tensor, slots: int) -> Tensor:
    """MSC-FG: mean over the objects of their best IoU with any predicted label.

    target, predicted (B, H, W) integers -> (B,) in [0, 1], fp64; 0 for an image without objects.
    """
    table = contingency(target, predicted, label_count(target, predicted, slots))
    best = iou_matrix(table)[0].amax(2)[:, 1:]  # (B, labels - 1)
    exists = table.sum(2)[:, 1:] > 0
    return (best * exists).sum(1) / exists.sum(1).clamp(min=1)


def squared_error(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error summed over colours and pixels: two (B, 3, H, W) in [0, 1] -> (B,)."""
    return (images - reconstruction).square().sum((1, 2, 3))


# -------------------------------------------------------------------------------------------------
# Data: the embedded data set. Nothing from here on is needed to understand the model; it stands
# here so that train.py stays the curriculum, and a notebook or a fork imports what it needs.


class Images(NamedTuple):
    """Images as bytes, in memory or mapped into it from a file."""

    images: Tensor  # (N, 3, H, W), uint8
    labels: Optional[Tensor]  # (N, H, W), uint8, 0 background, 1.. objects; for evaluation only


def draw_shapes(count: int, seed: int, size: int = 64) -> Images:
    """The embedded data set: two to four textured, overlapping shapes before a lit wall.

    The same seed draws the same images. Colours do not tell objects apart: those of an image share
    two hues, plain, striped, checked or spotted, and are shaded from one side.
    """
    random = torch.Generator().manual_seed(seed)
    chunks = [_draw_chunk(min(500, count - i), size, random) for i in range(0, count, 500)]
    return Images(*(torch.cat(parts) for parts in zip(*chunks)))


def _draw_chunk(n: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=random)

    axis = (torch.arange(size) + 0.5) / size  # pixel centres in (0, 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # (size, size)
    canvas = _draw_backgrounds(x, y, uniform)  # (n, 3, size, size)
    labels = torch.zeros(n, size, size, dtype=torch.uint8)
    radius = uniform(0.15, 0.23, 4)
    center = _place(radius, uniform)
    objects = torch.randint(2, 5, (n,), generator=random)
    hues = uniform(0, 1, 1) + torch.stack((torch.zeros(n), uniform(0.25, 0.75)), dim=1)  # (n, 2)
    for k in range(4):
        turn = uniform(-0.35, 0.35, 1, 1)
        dx, dy = x - center[:, k, 0, None, None], y - center[:, k, 1, None, None]  # (n, size, size)
        u = (dx * turn.cos() + dy * turn.sin()) / radius[:, k, None, None]  # the shape's own frame
        v = (dy * turn.cos() - dx * turn.sin()) / radius[:, k, None, None]
        inside = _shape_distance(u, v, torch.randint(4, (n,), generator=random))
        # A soft edge one pixel wide; a shape that this image does not have covers nothing.
        cover = (0.5 - inside * radius[:, k, None, None] * size).clamp(0, 1)
        cover = cover * (k < objects)[:, None, None]
        texture = _texture(u, v, torch.randint(4, (n,), generator=random))[:, None]
        hue = hues[torch.arange(n), torch.randint(2, (n,), generator=random)]
        first, second = _color(hue, 0.85, 1.0), _color(hue + uniform(-0.12, 0.12), 0.85, 0.6)
        color = first[..., None, None] * texture + second[..., None, None] * (1 - texture)
        shade = 0.8 - 0.25 * (dx + dy) / radius[:, k, None, None]  # light from the upper left
        canvas = canvas + cover[:, None] * ((color * shade[:, None]).clamp(0, 1) - canvas)
        labels[cover > 0.5] = k + 1
    return (canvas * 255).round().to(torch.uint8), labels


def _draw_backgrounds(x: Tensor, y: Tensor, uniform) -> Tensor:
    """A dim wall, (n, 3, size, size), lit from a varying side, more or less brightly."""
    turn = uniform(0, 2 * math.pi, 1, 1)
    slope = (x - 0.5) * turn.cos() + (y - 0.5) * turn.sin()  # (n, size, size)
    color = torch.tensor([0.26, 0.28, 0.32]) * uniform(0.9, 1.1, 1)
    return color[..., None, None] * (1 + uniform(0.3, 0.7, 1, 1) * slope)[:, None]


def _place(radius: Tensor, uniform) -> Tensor:
    """Centres (n, 4, 2) that let shapes overlap, yet hide none: the best of 40 random tries."""
    tries = uniform(0.14, 0.86, 40, 4, 2)
    gap = torch.cdist(tries, tries) / (radius[:, None, :, None] + radius[:, None, None, :])
    gap = (gap + 10 * torch.eye(4)).amin((2, 3))  # (n, 40), closest pair of each try
    chosen = (gap > 0.75).float().argmax(1) if len(gap) else gap.long().flatten()
    return tries[torch.arange(len(tries)), torch.where(gap.amax(1) > 0.75, chosen, gap.argmax(1))]


def _shape_distance(u: Tensor, v: Tensor, kind: Tensor) -> Tensor:
    """Below 0 inside a disc, rounded square, rounded triangle or ellipse of about unit radius."""
    corners = torch.tensor([[0.95, 0.0], [-0.475, 0.823], [-0.475, -0.823]])
    shapes = [
        torch.hypot(u, v) - 0.95,
        (u**4 + v**4) ** 0.25 - 0.9,
        torch.stack([torch.hypot(u - x, v - y) for x, y in corners]).amax(0) - 1.645,
        (torch.hypot(u, v / 0.8) - 1) * 0.8,
    ]
    return torch.stack(shapes)[kind, torch.arange(len(kind))]


def _texture(u: Tensor, v: Tensor, kind: Tensor) -> Tensor:
    """Share of the first colour: plain, stripes, checks or a spot."""
    stripes, columns = (5 * u).sin(), (5 * v).sin()
    textures = [
        torch.ones_like(u),
        (4 * stripes).sigmoid(),
        (8 * stripes * columns).sigmoid(),
        (10 * (torch.hypot(u, v) - 0.5)).sigmoid(),
    ]
    return torch.stack(textures)[kind, torch.arange(len(kind))]


def _color(hue: Tensor, saturation: float, value: float) -> Tensor:
    """RGB (n, 3) of hues (n,) in turns."""
    channel = (hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    return value * (1 - saturation * (1 - ((channel - 3).abs() - 1).clamp(0, 1)))


# -------------------------------------------------------------------------------------------------
# The paper's data sets as their authors publish them, and folders of images. Each is read once,
# into arrays of bytes (`cached_parts`); each function below names the items of one data set, in the
# order test, validation, training, and what decodes an item.

CLEVRTEX_VARIANTS = {"clevrtex": "full"} | {v: v for v in ("outd", "camo", "pbg", "vbg", "grassbg")}
OBJECTSROOM_VARIANTS = ("six_objects", "identical_color", "empty_room")  # published as test sets
# Image height and width, number of masks, and how many of those are background.
TFRECORDS = {
    "clevr": ("clevr_with_masks_train.tfrecords", 240, 320, 11, 1),
    "objectsroom": ("objects_room_train.tfrecords", 64, 64, 7, 4),
    "six_objects": ("objects_room_test_six_objects.tfrecords", 64, 64, 10, 4),
    "identical_color": ("objects_room_test_identical_color.tfrecords", 64, 64, 10, 4),
    "empty_room": ("objects_room_test_empty_room.tfrecords", 64, 64, 4, 4),
}
DATASETS = (*CLEVRTEX_VARIANTS, *TFRECORDS, "shapestacks", "folder")


class Source(NamedTuple):
    """A data set before it is decoded."""

    files: list[Path]  # all that it is made of; their sizes and times tell whether it changed
    items: Callable[[], Iterable]  # () -> what decode takes, one item an image
    decode: Callable  # item -> (PIL image, label map (H, W) uint8 or None)
    ends: Callable[[int], tuple[int, int]]  # number of images -> end of test, end of validation
    crop: float = 1.0  # side of the centre crop, as a share of the largest one
    nearest: str = "pillow"  # whose nearest neighbour the label maps are resized with
    labelled: bool = True  # whether there are label maps
    tolerance: float = 0.0  # share of images that may be damaged; they are named and skipped


def tenths(count: int) -> tuple[int, int]:
    """The first 10 % by index are the test part, the next 10 % the validation part."""
    tenth = max(1, count // 10) if count > 2 else 0
    return tenth, max(2 * tenth, count // 5)


def clevrtex_source(data: Path, dataset: str) -> Source:
    """CLEVRTEX and its variants: CLEVRTEX_<variant>_NNNNNN.png with ..._NNNNNN_flat.png."""
    variant = CLEVRTEX_VARIANTS[dataset]
    name = re.compile(rf"CLEVRTEX_{variant}_(\d+)\.png")
    images = [path for path in data.rglob(f"CLEVRTEX_{variant}_*.png") if name.fullmatch(path.name)]
    images.sort(key=lambda path: int(name.fullmatch(path.name)[1]))
    if not images:
        raise FileNotFoundError(f"{data} holds no image CLEVRTEX_{variant}_NNNNNN.png")
    pairs = [(path, path.with_name(path.stem + "_flat.png")) for path in images]
    for path in set(data.rglob(f"CLEVRTEX_{variant}_*_flat.png")).difference(p for _, p in pairs):
        raise FileNotFoundError(f"{path} has no image {path.name.replace('_flat', '')} beside it")

    def decode(pair):
        return read_image(pair[0]), read_labels(pair[1])

    # outd is one test set
    # open: camo too has a test part, its first 10 %
    ends = (lambda count: (count, count)) if dataset == "outd" else tenths
    return Source([p for pair in pairs for p in pair], lambda: pairs, decode, ends, crop=0.8)


def tfrecord_source(data: Path, dataset: str) -> Source:
    """CLEVR with masks and ObjectsRoom: TFRecord files of tf.train.Example."""
    name, height, width, masks, backgrounds = TFRECORDS[dataset]
    path = data / name if data.is_dir() else data
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data is that file or the folder it is in")

    def decode(record):
        where, body = record
        features = example_features(body, where)
        image = feature_bytes(features, "image", height * width * 3, where)
        mask = feature_bytes(features, "mask", masks * height * width, where)
        labels = mask.reshape(masks, height, width).argmax(0)
        labels = np.maximum(0, labels - (backgrounds - 1)).astype(np.uint8)
        return Image.fromarray(image.reshape(height, width, 3)), labels

    def ends(count):
        if dataset in OBJECTSROOM_VARIANTS:
            return count, count
        # open: CLEVR's first tenths by index, as the authors take them
        return (10_000, 20_000) if dataset == "objectsroom" and count >= 30_000 else tenths(count)

    crop = 0.8 if dataset == "clevr" else 1.0
    return Source([path], lambda: read_tfrecords(path), decode, ends, crop)


def shapestacks_source(data: Path) -> Source:
    """ShapeStacks: recordings/<scenario>/rgb-*.png, iseg/<scenario>/iseg-*.map, splits/default."""
    pairs, counts, missing = [], [], 0
    for part in ("test", "eval", "train"):
        split = data / "splits" / "default" / f"{part}.txt"
        if not split.is_file():
            raise FileNotFoundError(f"{split} is missing: --data is ShapeStacks' own folder")
        for scenario in split.read_text().split():
            paths = sorted((data / "recordings" / scenario).glob("rgb-*-cam_*-mono-0.png"))
            missing += not paths
            for path in paths:
                camera = path.name.split("-cam_")[1].removesuffix(".png")
                labels = f"iseg-w=0-f=0-l=0-c=original-cam_{camera}.map"
                pairs.append((path, data / "iseg" / scenario / labels))
        counts.append(len(pairs))
    if not pairs:
        raise FileNotFoundError(f"{data / 'recordings'} holds no image of the scenarios in splits")
    if missing:
        print(f"warning: {missing} scenarios of splits have no images in {data}", file=sys.stderr)

    def decode(pair):
        labels = read_labels(pair[1], channel=0) // 32
        return read_image(pair[0]), labels

    files = [p for pair in pairs for p in pair]
    return Source(files, lambda: pairs, decode, lambda _: tuple(counts[:2]), 196 / 224, "torch")


def folder_source(data: Path, masks: Optional[Path] = None) -> Source:
    """Any images, in nested folders too; masks are images of the same stems in another folder.

    A folder that holds images/ and masks/ is taken at its word. Black is the background of a mask,
    every other value or colour an object.
    """
    if masks is None and (data / "images").is_dir() and (data / "masks").is_dir():
        data, masks = data / "images", data / "masks"
    images = list_images(data)
    if not images:
        raise FileNotFoundError(f"{data} holds no PNG, JPEG or WebP image")
    if masks is not None and not list_images(masks):
        raise FileNotFoundError(f"{masks} holds no PNG, JPEG or WebP image, and so no masks")
    of_stem = {path.relative_to(masks).with_suffix(""): path for path in list_images(masks)}
    stems = [path.relative_to(data).with_suffix("") for path in images]
    for path, stem in zip(images, stems):
        if of_stem and stem not in of_stem:
            raise FileNotFoundError(f"{path} has no mask {masks / stem}.png")
    for stem in set(of_stem).difference(stems):
        raise FileNotFoundError(f"{of_stem[stem]} has no image {data / stem}")
    pairs = [(path, of_stem.get(stem)) for path, stem in zip(images, stems)]

    def decode(pair):
        image, labels = read_image(pair[0]), pair[1] and read_labels(pair[1], compact=True)
        if labels is not None and labels.shape != image.size[::-1]:
            raise ValueError(
                f"{pair[1]} is {labels.shape[1]}x{labels.shape[0]}, its image "
                f"{image.width}x{image.height}: they must be of one size"
            )
        return image, labels

    files = [p for pair in pairs for p in pair if p]
    return Source(files, lambda: pairs, decode, tenths, labelled=bool(of_stem), tolerance=0.01)


def open_source(dataset: str, data: Path, masks: Optional[Path] = None) -> Source:
    """The source of a data set in DATASETS. Raises OSError where its files are not."""
    for path in (data, masks):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
    if dataset in CLEVRTEX_VARIANTS:
        return clevrtex_source(data, dataset)
    if dataset in TFRECORDS:
        return tfrecord_source(data, dataset)
    return shapestacks_source(data) if dataset == "shapestacks" else folder_source(data, masks)


class DamagedImage(OSError):
    """A file that is no image, or only a part of one."""


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF tag says; an alpha channel is dropped.

    Raises FileNotFoundError, or DamagedImage with the file's name.
    """

    def convert(image):
        if image.mode.startswith("I"):  # 16 bits of grey
            image = Image.fromarray((np.array(image) // 256).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")

    return _open_image(path, convert)


def read_labels(path: Path, channel: Optional[int] = None, compact: bool = False) -> np.ndarray:
    """A label map (H, W), uint8, from an image file: palette indices, grey values or a channel.

    With compact the values (or colours) are renumbered 1, 2, ... in their order, 0 staying 0.
    Raises FileNotFoundError, DamagedImage, or ValueError for more labels than a byte can hold.
    """
    plain = ("1", "L", "P", "I", "I;16")
    values = _open_image(path, lambda i: np.array(i if i.mode in plain else i.convert("RGB")))
    if compact and values.ndim == 3:
        values = values.astype(np.int64) @ [65536, 256, 1]
    elif channel is not None and values.ndim == 3:
        values = values[..., channel]
    if values.ndim != 2:
        raise ValueError(f"{path} has colours: label maps are palette or grey images")
    if compact:
        present = np.unique(np.append(values, 0))
        values = np.searchsorted(present, values)
    if values.max(initial=0) > 255:
        raise ValueError(f"{path} has label {values.max()}: there can be 255 objects at most")
    return values.astype(np.uint8)


def _open_image(path: Path, convert: Callable):
    try:
        with Image.open(path) as image:
            return convert(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DamagedImage(f"cannot read {path} as an image ({error})") from error


def list_images(folder: Optional[Path]) -> list[Path]:
    """PNG, JPEG and WebP files in a folder and below it, sorted; hidden ones are passed over."""
    if folder is None:
        return []
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def read_tfrecords(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, body) of each record of a TFRecord file, GZIP-compressed or not.

    Raises OSError, with the record's number from 0, where the file is damaged or cut short.
    """

    def checked(size: int, stored: bytes, body: bytes) -> bytes:
        crc = google_crc32c.value(body)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if len(body) < size or struct.pack("<I", masked) != stored:
            raise EOFError("cut short" if len(body) < size or len(stored) < 4 else "bad checksum")
        return body

    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if compressed else open(path, "rb") as file:
        for number in itertools.count():
            where = f"{path}, record {number}"
            try:
                head = file.read(12)  # length, its checksum
                if not head:
                    return
                (size,) = struct.unpack("<Q", checked(8, head[8:], head[:8]))
                body = file.read(size)
                yield where, checked(size, file.read(4), body)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise OSError(
                    f"{where}: the file is damaged or no TFRecord file ({error})"
                ) from error


def message_fields(body: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the length-delimited fields of a protocol buffer message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = body[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while position < len(body):
        tag = varint()
        if tag & 7 != 2:
            raise ValueError(f"field {tag >> 3} is of type {tag & 7}, not length-delimited")
        size = varint()
        if position + size > len(body):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, body[position : position + size]
        position += size


def example_features(body: bytes, where: str) -> dict[str, memoryview]:
    """Name -> bytes_list of a tf.train.Example, each still a message of its own."""
    found = {}
    try:
        for _, features in message_fields(memoryview(body)):  # Example.features
            for _, entry in message_fields(features):  # Features.feature, a map
                pair = dict(message_fields(entry))  # 1: key, 2: Feature
                for kind, values in message_fields(pair[2]):
                    if kind == 1:  # Feature.bytes_list
                        found[bytes(pair[1]).decode()] = values
    except (IndexError, KeyError, ValueError) as error:
        raise OSError(f"{where}: it is no tf.train.Example ({error})") from error
    return found


def feature_bytes(features: dict, name: str, count: int, where: str) -> np.ndarray:
    """The count bytes (count,) of a feature.

    In these files every byte is an entry of its own: tag 0x0a, length 1, the byte.
    """
    if name not in features:
        raise OSError(f"{where}: it has no feature {name!r}, so it is of another data set")
    entries = np.frombuffer(features[name], np.uint8)
    if len(entries) != 3 * count or (entries.reshape(-1, 3)[:, :2] != (0x0A, 1)).any():
        raise OSError(
            f"{where}: {name!r} is not {count} entries of one byte ({len(entries)} bytes in all): "
            "the file is of another data set"
        )
    return entries[2::3]


def centre_crop(image: Image.Image, height: int, width: int, crop: float = 1.0) -> tuple:
    """The box (left, top, right, bottom) of the largest centre crop of aspect height x width.

    crop in (0, 1] shrinks its sides.
    """
    w, h = image.size
    side_x = max(1, int(crop * min(w, h * width / height)))
    side_y = max(1, int(crop * min(h, w * height / width)))
    left, top = round((w - side_x) / 2), round((h - side_y) / 2)
    return left, top, left + side_x, top + side_y


def crop_and_resize(image, labels, height: int, width: int, crop: float = 1.0, nearest="pillow"):
    """Centre crop to the aspect of height x width, then resize.

    image (PIL), labels (h, w) uint8 or None -> (3, height, width) uint8, (height, width) or None.
    Images bilinearly, with antialiasing; label maps to their nearest neighbour.
    """
    box = left, top, right, bottom = centre_crop(image, height, width, crop)
    image = image.crop(box).resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.array(image).transpose(2, 0, 1)
    if labels is None:
        return pixels, None
    if nearest == "torch":
        labels = torch.from_numpy(labels[top:bottom, left:right])
        labels = F.interpolate(labels[None, None], size=(height, width), mode="nearest")
        return pixels, labels[0, 0].numpy()
    labels = Image.fromarray(labels).crop(box)
    return pixels, np.array(labels.resize((width, height), Image.Resampling.NEAREST))


# -------------------------------------------------------------------------------------------------
# The cache: images.u8 and labels.u8, in the order test, validation, training, beside manifest.json


PROGRESS_SECONDS = 5  # between two notes of how far the decoding came


def cached_parts(source: Source, folder: Path, height: int, width: int) -> dict[str, Images]:
    """The parts "test", "val", "train" and "all" of a source, mapped into memory from a cache.

    The first call decodes the source on all cores; one that is interrupted goes on where it was. A
    cache that was made of other files or sizes, or does not match its checksums, is made anew.
    Raises OSError or ValueError, with the file's name, for what cannot be read, and then leaves
    no cache behind.
    """
    facts = [f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in source.files if p.exists()]
    made_from = {
        "files": len(facts),
        "fingerprint": zlib.crc32("\n".join(facts).encode()),
        "preprocessing": [height, width, source.crop, source.nearest],
    }
    state = _whole_cache(folder, made_from)
    if state is None:
        with _locked(folder):
            # Another program may have made it while this one waited.
            state = _whole_cache(folder, made_from)
            state = state or _make_cache(source, folder, height, width, made_from)
    shapes = {"images.u8": (state["count"], 3, height, width)}
    if source.labelled:
        shapes["labels.u8"] = (state["count"], height, width)
    # Mode "c": pages are read when they are touched, and nothing is ever written back.
    arrays = [
        torch.from_numpy(np.memmap(folder / name, np.uint8, "c", shape=shape))
        for name, shape in shapes.items()
    ]
    everything = Images(arrays[0], arrays[1] if source.labelled else None)
    first, second = source.ends(state["count"])
    bounds = {"test": (0, first), "val": (first, second), "train": (second, None), "all": (0, None)}
    return {
        part: Images(*(None if array is None else array[start:stop] for array in everything))
        for part, (start, stop) in bounds.items()
    }


@contextlib.contextmanager
def _locked(folder: Path):
    """One program at a time makes a cache, another one waits; the lock ends with its holder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _whole_cache(folder: Path, made_from: dict) -> Optional[dict]:
    """The manifest of a cache that is whole and of the same source, or None."""
    state = _read_state(folder / "manifest.json", made_from)
    return state if state and _matches(folder, state) else None


def _read_state(path: Path, made_from: dict) -> Optional[dict]:
    """What a manifest says, if it is there, whole, and of the same source."""
    try:
        state = json.loads(path.read_text())
        return state if state["made_from"] == made_from else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _matches(folder: Path, state: dict) -> bool:
    """Whether the arrays begin with the bytes that were counted; what follows them is cut off."""
    for name, (size, checksum) in state["arrays"].items():
        path, crc = folder / name, 0
        if not path.exists() or path.stat().st_size < size:
            return False
        if path.stat().st_size > size:
            os.truncate(path, size)
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                crc = zlib.crc32(chunk, crc)
        if crc != checksum:
            return False
    return True


def _make_cache(source: Source, folder: Path, height: int, width: int, made_from: dict) -> dict:
    """Decode a source; what cannot be read or written leaves nothing behind."""
    try:
        return _decode_all(source, folder, height, width, made_from)
    except (OSError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others' caches may be beside it
            folder.parent.rmdir()
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(f"no space left on the disk for {folder}: choose another --cache")
        raise


def _decode_all(source: Source, folder: Path, height: int, width: int, made_from: dict) -> dict:
    """Append every image and label map to the arrays, noting every few seconds how far it came."""
    names = ["images.u8", "labels.u8"][: 1 + source.labelled]
    progress = folder / "progress.json"
    state = _read_state(progress, made_from)
    if state is None or not _matches(folder, state):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state = dict(made_from=made_from, items=0, count=0, skipped=[])
        state["arrays"] = {name: [0, 0] for name in names}  # bytes and their checksum

    def attempt(item):
        try:
            image, labels = source.decode(item)
        except DamagedImage as error:
            if source.tolerance == 0:
                raise
            return error
        return crop_and_resize(image, labels, height, width, source.crop, source.nearest)

    def save(path: Path):
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        write_json(path, state)

    total = len(source.files) // len(names) if len(source.files) > 1 else None
    items = itertools.islice(source.items(), state["items"], None)
    bar = tqdm(
        map_in_order(attempt, items), f"decoding into {folder}", total, initial=state["items"],
        unit="image", disable=None,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "ab")) for name in names]
        saved = time.monotonic()
        for result in bar:
            state["items"] += 1
            if isinstance(result, DamagedImage):
                state["skipped"].append(str(result))
            else:
                state["count"] += 1
                for file, name, array in zip(files, names, result):
                    size, crc = state["arrays"][name]
                    data = array.tobytes()
                    file.write(data)
                    state["arrays"][name] = [size + len(data), zlib.crc32(data, crc)]
            if time.monotonic() > saved + PROGRESS_SECONDS:
                save(progress)
                saved = time.monotonic()
        _check_count(state, source)
        save(folder / "manifest.json")
    progress.unlink(missing_ok=True)
    return state


def _check_count(state: dict, source: Source) -> None:
    damaged = state["skipped"]
    if len(damaged) > source.tolerance * state["items"]:
        raise ValueError(
            f"{len(damaged)} of {state['items']} images are damaged, more than one in a hundred: "
            f"{damaged[0]}"
        )
    if damaged:
        print(f"warning: {len(damaged)} damaged images were skipped: {damaged}", file=sys.stderr)
    if state["count"] < 3:
        raise ValueError(
            f"{source.files[0]} and all beside it are {state['count']} images: "
            "a test, a validation and a training part need at least 3"
        )


def map_in_order(function: Callable, items: Iterable) -> Iterator:
    """function(item) of each item, in order, by threads on all cores, a few items ahead.

    Pillow and NumPy release Python's lock where they work.
    """
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: write(temporary path), then rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save has RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def write_json(path: Path, content) -> None:
    """Write a JSON file whole or not at all."""
    write_beside(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))
