"""AST-Seg in one file: Unsupervised Multi-object Segmentation Using Attention and Soft-argmax.

Paper: B. Sauvalle and A. de La Fortelle, arXiv 2205.13271; [38] is their AE-NE, arXiv 2112.08001.
From unlabelled images alone the model finds each object, says where it is, what it looks like and
which pixels are its own. One batch, from images to loss:

    images (B, 3, H, W)
     |-- generator ------------------> K logit maps (B, K, h, w), features Phi (B, D, h, w)
     |     softmax over pixels (11) -> attention maps A (B, K, h, w)
     |     soft-argmax (12)-(15) ----> first position (B, K, 2)
     |     A times Phi (16) ---------> pooled features (B, K, D)
     |     refinement of all slots --> position, scale, activation alpha, z_what
     |     glimpses of z_what -------> colours and mask (B, K, 4, G, G)
     |     moved and shrunk ---------> layers L (B, K, 3, H, W), masks M (B, K, H, W)
     |     alpha M, normalised (17) -> weights w (B, K + 1, H, W); their argmax is the segmentation
     `-- background autoencoder -----> L_0 (B, 3, H, W)
    sum of w L (18) -> reconstruction (B, 3, H, W); error (19)(20) + entropy of w (21) -> loss (22)

    >>> import torch, astseg
    >>> model = astseg.ASTSeg(astseg.Config(height=64, width=64, slots=4, backbone="tiny")).eval()
    >>> output = model(torch.rand(2, 3, 64, 64))           # RGB in [0, 1] -> Output
    >>> labels = model.segment(torch.rand(2, 3, 64, 64))   # (2, 64, 64), 0 is the background

To change the generator edit ASTSeg.__init__, the losses full_loss, the data DATASETS.

    section 2, (1) (4) (10)   translate, center_of_mass, spatial_softmax, soft_argmax
    section 4.1, Table 8      SegformerGenerator, UNetGenerator
    Algorithm 1, (11)-(16)    normalized_coordinates, Refinement, Encoder
    Algorithm 2, Table 7      GlimpseGenerator, spatial_transformer
    Algorithm 2, (17)-(18)    occlusion_weights, compose, Renderer
    section 4.1, [38]         BackgroundAutoencoder
    Table 6, Figure 1         Config, ASTSeg
    section 4.2, (19)-(21)    reconstruction_loss, pixel_entropy_loss
    section 4.2, (22), [38]   full_loss, robust_background_loss
    section 5.1               learning_rate, mean_iou, adjusted_rand_index, segmentation_covering

B batch, K slots, H W image, h w feature map, G side of a glimpse, D width of a slot's features (the
paper's d_Phi), Z width of z_what; Phi is `features`. Positions are (x, y), tensors [row, column]:
the paper's (i, j) is [j, i]. Label 0 is the background, label k slot k. "# open:" marks what the
paper leaves open or we do otherwise (see the README). (12)(13) put +-1 on the centres of the
outermost cells of the feature map, the spatial transformer on the edges of the image: a gap of
x / 2 cells at x (2 x pixels with the Segformer) that has to be learned.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

# ---- Section 2: attention maps and soft-argmax for localisation ----


def translate(phi, u, v):
    """Shift maps (..., H, W) by u columns and v rows; what leaves the window is lost."""
    height, width = phi.shape[-2:]
    u, v = max(-width, min(u, width)), max(-height, min(v, height))
    return F.pad(phi, (u, -u, v, -v))  # eq. (1); a negative padding crops


def center_of_mass(attention, x=None, y=None):
    """Sum of phi(p) p over the pixels p, the operator of Proposition 2.1 with C = 0.

    attention (..., h, w), sum 1 each, at columns x (w,) and rows y (h,), by default pixels from 0
    -> (..., 2), the pair (x, y) in the same units.
    """
    if x is None:
        y, x = (torch.arange(side, device=attention.device) for side in attention.shape[-2:])
    center_x = (attention.sum(-2) * x).sum(-1)  # eqs. (4), (14)
    center_y = (attention.sum(-1) * y).sum(-1)  # eqs. (4), (15)
    return torch.stack((center_x, center_y), dim=-1)


def spatial_softmax(logits):
    """Softmax over all pixels of each map (..., h, w), at least in fp32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.flatten(-2).softmax(-1, dtype).unflatten(-1, logits.shape[-2:])


def soft_argmax(logits, x=None, y=None):
    """Differentiable position of each map's maximum: (..., h, w) -> (..., 2), (x, y)."""
    return center_of_mass(spatial_softmax(logits), x, y)  # eq. (10)


# ---- Section 4.1: feature map generators, (B, 3, H, W) -> (B, K + D, h, w) ----

# Mix Transformers: blocks per stage, widths, attention heads, width of the MLP decoder.
MIT_SIZES = {
    "tiny": ([1, 1, 1, 1], [16, 32, 64, 128], [1, 2, 4, 8], 64),  # ours, for two CPU cores
    "b0": ([2, 2, 2, 2], [32, 64, 160, 256], [1, 2, 5, 8], 256),
    "b3": ([3, 4, 18, 3], [64, 128, 320, 512], [1, 2, 5, 8], 768),  # the paper's
}


class SegformerGenerator(nn.Module):
    """Segformer (arXiv 2105.15203): images (B, 3, H, W) -> (B, channels, H/4, W/4), rounded up."""

    def __init__(self, channels, size="b3", dropout=0.1):
        super().__init__()
        depths, widths, heads, decoder = MIT_SIZES[size]
        self.segformer = SegformerForSemanticSegmentation(SegformerConfig(
            depths=depths, hidden_sizes=widths, num_attention_heads=heads,
            decoder_hidden_size=decoder, drop_path_rate=dropout, classifier_dropout_prob=dropout,
            num_labels=channels,  # open: one head makes attention logits and features
        ))  # fmt: skip

    def load_backbone(self, source):
        """Take the backbone of a hub model (nvidia/mit-b3) or a local folder. Raises OSError."""
        try:
            self.segformer.segformer, report = SegformerModel.from_pretrained(
                source, config=self.segformer.config, output_loading_info=True
            )
            require(not report["missing_keys"], "weights are missing")
        except Exception as error:  # the hub, JSON, safetensors and sizes each have their own
            seen = f"has no Segformer backbone of widths {self.segformer.config.hidden_sizes}"
            raise OSError(f"{source!r} {seen}, or is out of reach") from error

    def forward(self, images):
        # open: images enter in [0, 1], without ImageNet's mean and deviation
        return self.segformer(images).logits  # (B, channels, h, w)


def conv_block(c_in, c_out, kernel=3, stride=1):
    """A convolution, batch norm and CELU (section 7.3)."""
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.CELU())


class Residual(nn.Sequential):
    """x + layers(x): (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, x):
        return x + super().forward(x)


class UNetGenerator(nn.Module):
    """The U-Net of the ablation study (Table 8): images (B, 3, H, W) -> (B, channels, H, W).

    channels is K + D, where Table 8 prints d_Phi; factor scales the hidden channels.
    """

    def __init__(self, channels, height=128, width=128, factor=1.0):
        super().__init__()
        c = [max(8, round(c * factor)) for c in (80, 128, 192, 256, 256, 256)]
        self.first, self.center = conv_block(3, c[0]), conv_block(c[5], c[5])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in zip(c, c[1:]):
            residual = Residual(conv_block(c_out, c_out))
            self.down.append(nn.Sequential(conv_block(c_in, c_out, 4, 2), residual))
        for level in (4, 3, 2, 1, 0):
            both = 2 * c[level + 1]  # what comes from below, and the skip
            odd = (height >> level) % 2, (width >> level) % 2  # open: odd sizes are padded
            up = nn.ConvTranspose2d(both, c[level], 4, 2, 1, odd, bias=False)
            residual, norm = Residual(conv_block(both, both)), nn.BatchNorm2d(c[level])
            self.up.append(nn.Sequential(residual, up, norm, nn.CELU()))
        # open: no convolution has a bias, and the last two neither norm nor CELU
        residual = Residual(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        head = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.Sequential(conv_block(2 * c[0], channels), residual, head)

    def forward(self, images):
        skips = [self.first(images)]  # (B, 80, H, W)
        for down in self.down:
            skips.append(down(skips[-1]))  # (B, 128, H/2, W/2) ... (B, 256, H/32, W/32)
        x = self.center(skips[-1])  # (B, 256, H/32, W/32)
        for up in self.up:
            x = up(torch.cat((x, skips.pop()), dim=1))  # (B, 256, H/16, W/16) ... (B, 80, H, W)
        return self.last(torch.cat((x, skips.pop()), dim=1))  # (B, channels, H, W)


# ---- Algorithm 1: from feature maps to the latents of each slot ----


def normalized_coordinates(height, width, device=None):
    """x (w,) of the columns and y (h,) of the rows in [-1, 1]; a single cell is at 0."""
    i, j = torch.arange(width, device=device), torch.arange(height, device=device)  # from 0
    x = (2 * i - (width - 1)) / max(1, width - 1)  # eq. (12)
    y = (2 * j - (height - 1)) / max(1, height - 1)  # eq. (13)
    return x, y


class Latents(NamedTuple):
    """What the encoder says of each slot."""

    position: Tensor  # (B, K, 2), (x_k, y_k) in [-1, 1]
    scale: Tensor  # (B, K, 2), inverse scaling factors (s_k^x, s_k^y) in [s_min, s_max]
    activation: Tensor  # (B, K), alpha_k > 0
    z_what: Tensor  # (B, K, Z), appearance


class Refinement(nn.Module):
    """Transformer encoder over the slots, without positions: (B, K, D + 2) -> (B, K, D + 2)."""

    def __init__(self, dim, width=256, heads=8, feedforward=512, layers=6, dropout=0.1):
        super().__init__()
        # open: PyTorch's stock layer: norm after the residual, ReLU; all copies start alike
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True)
        self.embedding = nn.Linear(dim, width)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.projection = nn.Linear(width, dim)

    def forward(self, slots):
        return self.projection(self.transformer(self.embedding(slots)))  # (B, K, D + 2)


class Encoder(nn.Module):
    """Algorithm 1: feature maps -> latents, attention maps and their soft-argmax.

    dim_scale is 1 for isotropic and 2 for anisotropic scaling, D = dim_scale + 1 + dim_z_what;
    refinement maps (B, K, D + 2) to the same shape, None leaves it out (Table 4).
    """

    def __init__(self, slots, dim_scale, dim_z_what, s_min=1.3, s_max=24.0, refinement=None):
        super().__init__()
        self.slots, self.s_min, self.s_max = slots, s_min, s_max
        self.refinement = refinement or nn.Identity()
        self.columns = [2, dim_scale, 1, dim_z_what]  # open: channel order x y, s, alpha, z_what

    def forward(self, feature_maps):
        """(B, K + D, h, w), K logit maps and then Phi -> Latents, (B, K, h, w), (B, K, 2)."""
        logits, features = feature_maps.tensor_split([self.slots], dim=1)  # K and D channels
        x, y = normalized_coordinates(*features.shape[-2:], device=features.device)
        # The next two lines are soft_argmax(logits, x, y); (16) needs the maps too.
        attention = spatial_softmax(logits)  # (B, K, h, w), eq. (11)
        position = center_of_mass(attention, x, y)  # (B, K, 2), eqs. (14), (15)
        # One matrix product per image, (B, K, hw) times (B, hw, D).
        pooled = attention.flatten(2) @ features.flatten(2).mT  # (B, K, D), eq. (16)
        slots = self.refinement(torch.cat((position, pooled), dim=-1))  # (B, K, D + 2)
        return self.latents(slots), attention, position

    def latents(self, slots):
        """Name the columns of (B, K, D + 2) and bring each into its range."""
        position, scale, activation, z_what = slots.split(self.columns, dim=-1)
        scale = self.s_min + (self.s_max - self.s_min) * scale.sigmoid()
        scale = scale.expand_as(position)  # isotropic: one number serves both axes
        return Latents(position.clamp(-1, 1), scale, activation.squeeze(-1).exp(), z_what)


# ---- Algorithm 2: from latents to layers and their weights ----


class GlimpseGenerator(nn.Module):
    """Colours o_k and mask m_k of an object (Table 7): (N, Z) -> (N, 3 + 1, G, G) in [0, 1]."""

    def __init__(self, dim_z_what=32, size=64):
        super().__init__()
        layers, c_in, c_out = [], dim_z_what, 2 * size
        while c_out >= 8:  # 2 G, G, ... 8 channels; the first layer makes 2 x 2 pixels of one
            shape = (4, 2, 1) if layers else (2, 1, 0)  # kernel, stride, padding
            # open: no bias but in the last layer
            up = nn.ConvTranspose2d(c_in, c_out, *shape, bias=False)
            layers += [up, nn.GroupNorm(max(1, c_out // 16), c_out), nn.CELU()]
            c_in, c_out = c_out, c_out // 2
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(c_in, 4, 4, 2, 1), nn.Sigmoid())

    def forward(self, z_what):
        return self.layers(z_what[:, :, None, None])  # (N, Z, 1, 1) -> (N, 4, G, G)


def spatial_transformer(glimpses, position, scale, height, width):
    """Shrink glimpses by s and move them to (x, y) (Algorithm 2).

    glimpses (N, C, G, G), position (N, 2) in [-1, 1], scale (N, 2) -> (N, C, height, width).
    """
    # The point p of the image shows the glimpse at s (p - position).
    # open: bilinear, zero outside the glimpse, +-1 at the outer edges (align_corners=False)
    columns = (2 * torch.arange(width, device=scale.device) + 1) / width - 1  # (width,)
    rows = (2 * torch.arange(height, device=scale.device) + 1) / height - 1  # (height,)
    u = (scale[:, :1] * (columns - position[:, :1]))[:, None]  # (N, 1, width)
    v = (scale[:, 1:] * (rows - position[:, 1:]))[..., None]  # (N, height, 1)
    grid = torch.stack(torch.broadcast_tensors(u, v), dim=-1)  # (N, height, width, 2)
    return F.grid_sample(glimpses, grid, align_corners=False)


def occlusion_weights(activation, masks, alpha_0):
    """The share of each layer in each pixel, the background first.

    activation (B, K), masks (B, K, H, W), alpha_0 () or (H, W) -> (B, K + 1, H, W), sums to 1.
    """
    objects = activation[:, :, None, None] * masks  # (B, K, H, W), alpha_k M_k
    background = alpha_0.expand_as(objects[:, :1])  # (B, 1, H, W), alpha_0 M_0 with M_0 = 1
    strength = torch.cat((background, objects), dim=1)  # (B, K + 1, H, W)
    return strength / strength.sum(1, keepdim=True)  # eq. (17)


def compose(weights, background, layers):
    """(B, K + 1, H, W), (B, 3, H, W), (B, K, 3, H, W) -> (B, 3, H, W), the sum of all layers."""
    objects = (weights[:, 1:, None] * layers).sum(1)  # (B, 3, H, W)
    return weights[:, :1] * background + objects  # eq. (18)


class Renderer(nn.Module):
    """Algorithm 2, all but its last line: latents -> weights, layers, masks and glimpses."""

    def __init__(self, height, width, dim_z_what=32, glimpse=64, log_alpha_0=11.0, per_pixel=False):
        super().__init__()
        self.size = height, width
        self.glimpse_generator = GlimpseGenerator(dim_z_what, glimpse)
        # A large alpha_0 hides all objects at first, and they grow only where they help. With a
        # small one the first random glimpses hurt, and all slots die.
        # open: the logarithm of alpha_0 is learned, one number or one per pixel
        shape = self.size if per_pixel else ()
        self.log_alpha_0 = nn.Parameter(torch.full(shape, float(log_alpha_0)))

    def forward(self, latents):
        """-> (B, K + 1, H, W), (B, K, 3, H, W), (B, K, H, W), (B, K, 4, G, G)."""
        batch = latents.activation.shape  # (B, K), for a while one dimension
        position, scale, _, z_what = (x.flatten(0, 1) for x in latents)  # (B K, 2 or Z)
        glimpses = self.glimpse_generator(z_what)  # (B K, 4, G, G)
        moved = spatial_transformer(glimpses, position, scale, *self.size)  # (B K, 4, H, W)
        layers, masks = moved.unflatten(0, batch).split([3, 1], dim=2)  # (B, K, 3 or 1, H, W)
        masks = masks.squeeze(2)  # (B, K, H, W)
        weights = occlusion_weights(latents.activation, masks, self.log_alpha_0.exp())
        return weights, layers, masks, glimpses.unflatten(0, batch)


# ---- Section 4.1: background model, the autoencoder of [38] ----

# Channels of encoder and decoder, both from image to latents, by number of blocks, as the authors
# use [38] for this paper.
BACKGROUND_CHANNELS = {
    ("simple", 5): ([3, 64, 160, 160, 32, 16], [4, 144, 256, 256, 32, 16]),
    ("simple", 6): ([3, 64, 160, 320, 160, 32, 16], [4, 144, 256, 512, 256, 32, 16]),
    ("simple", 7): ([3, 64, 160, 320, 160, 160, 32, 16], [4, 144, 256, 512, 256, 256, 32, 16]),
    ("complex", 5): ([3, 64, 160, 160, 16, 16], [4, 144, 640, 640, 16, 16]),
    ("complex", 6): ([3, 64, 160, 320, 160, 16, 16], [4, 144, 640, 1280, 640, 16, 16]),
    ("complex", 7): ([3, 64, 320, 640, 640, 320, 16, 16], [4, 144, 640, 1280, 640, 320, 16, 16]),
}


def background_blocks(height, width):
    """The convolutions that bring an image to 1 x 1 (the schedule of [38]).

    A list of (kernel, stride, padding, output padding of the mirrored one), each (rows, columns).
    """
    sides, blocks = (height, width), []
    while max(sides) > 1:
        # open: each axis has its own kernels
        axes = [(5, 2, 2) if s > 5 else (4, 2, 1) if s > 3 else (s, 1, 0) for s in sides]
        kernel, stride, padding = zip(*axes)
        room = [s + 2 * p - k for s, k, p in zip(sides, kernel, padding)]
        more, remainder = zip(*map(divmod, room, stride))
        blocks.append((kernel, stride, padding, remainder))
        sides = [n + 1 for n in more]
    return blocks


class CoordConv(nn.Module):
    """A convolution of x, row and column, group norm and CELU: (B, C, h, w) -> (B, C', h', w')."""

    def __init__(self, convolution, norm=True):
        super().__init__()
        self.convolution, channels = convolution, convolution.out_channels
        self.norm = nn.GroupNorm(max(1, channels // 16), channels) if norm else None

    def forward(self, x):
        # From -0.5 to 0.5, a single row or column at 1.
        axes = [torch.linspace(-0.5 if n > 1 else 1, 0.5, n, device=x.device) for n in x.shape[2:]]
        where = torch.stack(torch.meshgrid(*axes, indexing="ij")).to(x)  # (2, h, w)
        x = torch.cat((x, where.expand(len(x), -1, -1, -1)), dim=1)  # (B, C + 2, h, w)
        x = self.convolution(x)  # (B, C', h', w')
        return x if self.norm is None else F.celu(self.norm(x))


class BackgroundAutoencoder(nn.Module):
    """Background of an image, through 16 latents that have no room for objects ([38]).

    images (B, 3, H, W), the longer side 25..192 -> background (B, 3, H, W) and a prediction
    (B, H, W) of its error, all in [0, 1]. factor scales the hidden channels.
    """

    def __init__(self, height, width, kind="complex", factor=1.0):
        super().__init__()
        blocks = background_blocks(height, width)
        down, up = map(list, BACKGROUND_CHANNELS[kind, len(blocks)])
        for channels in (down, up):  # in multiples of a norm's group, 16
            channels[1:-1] = [max(16, 16 * round(c * factor / 16)) for c in channels[1:-1]]
        encoder, decoder = [], []
        for level, (*shape, remainder) in enumerate(blocks):
            conv = nn.Conv2d(down[level] + 2, down[level + 1], *shape, bias=False)
            back = nn.ConvTranspose2d(up[level + 1] + 2, up[level], *shape, remainder, bias=False)
            encoder.append(CoordConv(conv))
            decoder.insert(0, CoordConv(back, norm=level > 0))
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def forward(self, images):
        # open: images enter the autoencoder in [0, 1], not in the authors' 0..255
        latents = self.encoder(images)  # (B, 16, 1, 1)
        output = self.decoder(latents).to(images.dtype).sigmoid()  # (B, 4, H, W), not in bf16
        return output[:, :3], output[:, 3]


# ---- Table 6 and Figure 1: the whole model ----


def require(holds, sentence):
    """Raise ValueError with the sentence unless the condition holds."""
    if not holds:
        raise ValueError(sentence)


@dataclass(frozen=True)
class Config:
    """The architecture, by default the paper's for CLEVRTEX (Table 6)."""

    height: int = 128  # H, 32..192 pixels
    width: int = 128  # W
    slots: int = 10  # K, the most objects in a scene
    anisotropic: bool = True  # scale width and height of a glimpse apart
    generator: Literal["segformer", "unet"] = "segformer"  # of the feature maps
    backbone: Literal["tiny", "b0", "b3"] = "b3"  # size of the Segformer
    unet_width: float = 1.0  # factor on the U-Net's channels
    transformer: bool = True  # refine the slots with a transformer encoder
    dim_transformer: int = 256  # d_T, its width
    transformer_heads: int = 8  # attention heads of a layer
    dim_feedforward: int = 512  # hidden width of a layer's MLP
    transformer_layers: int = 6  # number of layers
    dropout: float = 0.1  # and drop-path rate, of Segformer and transformer
    dim_z_what: int = 32  # Z, width of the appearance vector
    scale_min: float = 1.3  # s_min, bounds of the inverse scaling factor
    scale_max: float = 24.0  # s_max
    log_alpha_0: float = 11.0  # of the background, at the start
    alpha_0_per_pixel: bool = False  # learn an alpha_0 per pixel, for fixed cameras
    background_kind: Literal["simple", "complex"] = "complex"  # fixed or varying
    background_width: float = 1.0  # factor on its channels

    zero = ("dropout",)  # settings that may be 0

    def __post_init__(self):
        for field in fields(self):
            name, value, choices = field.name, getattr(self, field.name), get_args(field.type)
            if choices:
                require(value in choices, f"{name} is {value!r}: use one of {', '.join(choices)}")
            elif field.type in (int, float) and name != "log_alpha_0":
                good = value > 0 or (value == 0 and name in self.zero)
                require(good, f"{name} is {value}: use a positive number")
        sides, heads, dim = (self.height, self.width), self.transformer_heads, self.dim_transformer
        low, high = self.scale_min, self.scale_max
        require(32 <= min(sides) <= max(sides) <= 192, f"images are {sides}: use sides of 32..192")
        require(self.dropout < 1, f"dropout is {self.dropout}: use 0..1, without 1")
        require(self.slots <= 255, f"slots is {self.slots}: label maps hold 255 objects at most")
        require(dim % heads == 0, f"{heads} heads do not divide dim_transformer {dim}")
        require(low < high, f"scale_min is {low} and scale_max {high}: the first must be smaller")


# What the paper sets for each of its data sets (section 5.1), where Config's default differs.
PAPER_SETTINGS = {
    "clevrtex": dict(),  # Config's own defaults
    "clevr": dict(anisotropic=False, background_kind="simple"),
    "objectsroom": dict(height=64, width=64, slots=3),
    "shapestacks": dict(height=64, width=64, slots=6, anisotropic=False),
}


class Output(NamedTuple):
    """All that the model says of a batch of images."""

    reconstruction: Tensor  # (B, 3, H, W), the composed image
    background: Tensor  # (B, 3, H, W), L_0 in [0, 1]
    weights: Tensor  # (B, K + 1, H, W), w_0..w_K, sums to 1
    layers: Tensor  # (B, K, 3, H, W), L_1..L_K in [0, 1]
    masks: Tensor  # (B, K, H, W), M_1..M_K in [0, 1]
    glimpses: Tensor  # (B, K, 4, G, G), colours o_k and mask m_k in [0, 1]
    latents: Latents  # position, scale, activation and z_what of each slot
    attention: Tensor  # (B, K, h, w), A_1..A_K, each sums to 1
    attention_position: Tensor  # (B, K, 2), its soft-argmax, before the refinement, in [-1, 1]


class ASTSeg(nn.Module, PyTorchModelHubMixin, library_name="astseg", license="mit"):
    """The whole model (Figure 1), with `save_pretrained(folder)` and `from_pretrained(folder)`."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.config = c = config
        size, scales, z = (c.height, c.width), 2 if c.anisotropic else 1, c.dim_z_what
        dim = scales + 1 + z  # D: scaling factor, activation, z_what
        if c.generator == "segformer":
            self.generator = SegformerGenerator(c.slots + dim, c.backbone, c.dropout)
        else:
            self.generator = UNetGenerator(c.slots + dim, *size, c.unet_width)
        refinement = None
        if c.transformer:
            widths = c.dim_transformer, c.transformer_heads, c.dim_feedforward
            refinement = Refinement(dim + 2, *widths, c.transformer_layers, c.dropout)
        self.encoder = Encoder(c.slots, scales, z, c.scale_min, c.scale_max, refinement)
        glimpse = 32 if max(size) <= 64 else 64  # open: G is 64 above 128 px too (Table 7)
        self.renderer = Renderer(*size, z, glimpse, c.log_alpha_0, c.alpha_0_per_pixel)
        self.background = BackgroundAutoencoder(*size, c.background_kind, c.background_width)

    def forward(self, images, background=None):
        """images (B, 3, H, W) in [0, 1] and, if it is known, their background -> Output."""
        self.check_images(images)
        feature_maps = self.generator(images).to(images.dtype)  # (B, K + D, h, w)
        if background is None:
            background, _ = self.background(images)  # (B, 3, H, W)
        # Softmax over pixels, exp(activation) and (17) do not survive half precision.
        with torch.autocast(images.device.type, enabled=False):
            latents, *where = self.encoder(feature_maps)  # where: (B, K, h, w), (B, K, 2)
            weights, layers, masks, glimpses = self.renderer(latents)
            image = compose(weights, background, layers)  # (B, 3, H, W)
        return Output(image, background, weights, layers, masks, glimpses, latents, *where)

    @torch.no_grad()
    def segment(self, images):
        """images (B, 3, H, W) in [0, 1] -> label maps (B, H, W), int64, 0..K, 0 the background."""
        return self(images, background=images).weights.argmax(1)  # any background (section 4.1)

    def check_images(self, images):
        """Raise ValueError for a wrong shape or type or, outside training, wrong values."""
        wanted, dtype = (3, self.config.height, self.config.width), self.renderer.log_alpha_0.dtype
        if images.ndim != 4 or images.shape[1:] != wanted or len(images) == 0:
            raise ValueError(f"images are {tuple(images.shape)}: this model takes (B, *{wanted})")
        if images.dtype != dtype:
            raise ValueError(f"images are {images.dtype}, the model {dtype}; bytes want / 255")
        if not (self.training or torch.compiler.is_compiling()):
            low, high = images.aminmax()
            if not (low > -1e-3 and high < 1 + 1e-3):  # resampling rounds a little beyond
                raise ValueError(f"images have values {low:.4g}..{high:.4g}: scale them to [0, 1]")


# ---- Section 4.2: losses and schedules ----


def reconstruction_loss(images, reconstruction):
    """Mean over pixels of the squared L1 error over colours: two (B, 3, H, W) -> ()."""
    error = (reconstruction - images).abs().sum(1)  # (B, H, W), eq. (19)
    return error.square().mean()  # eq. (20)


def pixel_entropy_loss(weights):
    """Mean over pixels of the squared entropy of the weights: (B, K + 1, H, W) -> ()."""
    return (weights * (weights + 1e-20).log()).sum(1).square().mean()  # eq. (21)


def quadratic_warmup(step, steps):
    """min(1, step / steps)^2, and 1 where steps is 0 (section 4.2.1)."""
    return min(1.0, step / steps) ** 2 if steps else 1.0


def full_loss(images, output, step, entropy_weight=1e-2, entropy_warmup=10_000):
    """The loss of phases 2 and 3: images (B, 3, H, W), their Output, step from 0 -> ()."""
    weight = entropy_weight * quadratic_warmup(step, entropy_warmup)
    entropy = pixel_entropy_loss(output.weights)
    return reconstruction_loss(images, output.reconstruction) + weight * entropy  # eq. (22)


def robust_background_loss(images, background, predicted_error, beta=6.0, tau=0.25):
    """The loss of phase 1 [38], deaf to pixels that the background does not explain.

    images, background (B, 3, H, W), predicted_error (B, H, W), all in [0, 1] -> ().
    """
    distance = partial(F.smooth_l1_loss, reduction="none", beta=3 / 255)  # quadratic below 3 / 255
    error = distance(background, images).sum(1)  # (B, H, W)
    error_of_error = distance(predicted_error, error.detach() / 3)  # (B, H, W)
    with torch.no_grad():  # pixels around a large error are objects, and should not teach
        unexplained, r = (error / tau).tanh()[:, None], images.shape[-1] // 75  # (B, 1, H, W)
        unexplained = F.avg_pool2d(unexplained, 2 * r + 1, 1, r, count_include_pad=False)
        weight = (-beta * unexplained).exp().squeeze(1)  # (B, H, W)
    return ((error + error_of_error) * weight).mean()


def learning_rate(step, peak, total, warmup=0, decay_at=0.9):
    """Rate of a step: quadratic warm-up, a tenth from the share decay_at of all steps on."""
    return peak * quadratic_warmup(step, warmup) * (0.1 if step >= decay_at * total else 1.0)


# ---- Section 5.1: metrics, per image. Labels: 0 background, 1.. objects or slots ----


def contingency(target, predicted, slots):
    """Pixels that each pair of labels shares: two (B, H, W) -> (B, labels, labels), fp64.

    A label above K gets a row of its own. Raises ValueError for what are no two such label maps.
    """
    for labels in (target, predicted):
        fits = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 3
        seen = f"a label map is {labels.dtype} {tuple(labels.shape)}"
        require(fits and labels.numel() and labels.long().min() >= 0,
                f"{seen}: use tensors (B, H, W) of integers from 0")  # fmt: skip
    require(target.shape == predicted.shape, f"{seen}, its target {tuple(target.shape)}")
    both = torch.stack((target.long(), predicted.long())).flatten(2)  # (2, B, H W)
    known = torch.arange(slots + 1, device=both.device)
    values = torch.cat((known, both.flatten())).unique()  # 0..K, then the labels above
    target, predicted = F.one_hot(torch.searchsorted(values, both), len(values)).double()
    return target.mT @ predicted  # [image, target, predicted]


def iou_matrix(table):
    """IoU of each pair of labels, and whether one of the two is in the image, of (B, n, n)."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table / union.clamp(min=1), union > 0


def mean_iou(target, predicted, slots):
    """mIoU with and without the background pair (mIoU, mIoU-FG), after a Hungarian matching.

    Two (B, H, W) integers -> two (B,), fp64: the sum of the matched IoUs over the number of matched
    pairs of which at least one side is in the image.
    """
    matrices, scores = iou_matrix(contingency(target, predicted, slots).cpu()), []
    for iou, present in zip(*(matrix.numpy() for matrix in matrices)):
        pairs = linear_sum_assignment(iou, maximize=True)  # rows 0.. and their columns
        matched, counted = iou[pairs], present[pairs]
        # open: nothing to be found and nothing found counts 1 in mIoU-FG
        foreground = matched[1:].sum() / counted[1:].sum() if counted[1:].any() else 1.0
        scores.append((matched.sum() / counted.sum(), foreground))
    return tuple(torch.tensor(scores, dtype=torch.float64).T)


def adjusted_rand_index(target, predicted, slots):
    """ARI-FG, over the pixels whose target is an object: two (B, H, W) integers -> (B,), fp64.

    Pixels predicted as background form an ordinary cluster; an image without objects counts 1.
    """
    table = contingency(target, predicted, slots)[:, 1:]  # without the background's row

    def pairs(counts):
        return counts * (counts - 1) / 2

    same_both = pairs(table).sum((1, 2))  # (B,)
    same_target, same_predicted = pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected = same_target * same_predicted / pairs(table.sum((1, 2))).clamp(min=1)
    best = (same_target + same_predicted) / 2
    trivial = best == expected  # no pixel, or one cluster on both sides
    return torch.where(trivial, 1.0, (same_both - expected) / (best - expected + trivial))


def segmentation_covering(target, predicted, slots):
    """MSC-FG, the mean over the objects of their best IoU with any label: (B, H, W) -> (B,)."""
    table = contingency(target, predicted, slots)
    best = iou_matrix(table)[0].amax(2)[:, 1:]  # (B, labels - 1)
    exists = table.sum(2)[:, 1:] > 0
    return (best * exists).sum(1) / exists.sum(1).clamp(min=1)  # 0 without objects


def squared_error(images, reconstruction):
    """Summed over colours and pixels: two (B, 3, H, W) in [0, 1] -> (B,)."""
    return (images - reconstruction).square().sum((1, 2, 3))


# ---- A start for short runs ----


@torch.no_grad()
def start_as_identity(refinement):
    """Let the refinement begin as the identity; PyTorch's own start takes too long."""
    width, dim = refinement.embedding.weight.shape
    require(width > dim + 1, f"dim_transformer is {width}: the identity start needs {dim + 2}")
    # open: initialisation: each layer adds zero, and a large bias makes its norms nearly linear
    bias = (-1.0) ** torch.arange(width)  # 1, -1, 1, ...
    frame = torch.column_stack((torch.ones(width), bias, torch.randn(width, dim)))
    basis = torch.linalg.qr(frame).Q[:, 2:]  # (width, dim), orthogonal to the bias and to the mean
    refinement.embedding.weight.copy_(basis)
    refinement.embedding.bias.copy_(bias)
    refinement.projection.weight.copy_(basis.T)
    for name, parameter in refinement.named_parameters():
        if "out_proj" in name or "linear2" in name or name == "projection.bias":
            parameter.zero_()


# =================================================================================================
# Data: nothing below is needed to understand the model; notebooks and forks import it from here.

import colorsys
import gzip
import itertools
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm


class Images(NamedTuple):
    """Images as bytes, in memory or mapped from a file."""

    images: Tensor  # (N, 3, H, W), uint8
    labels: Tensor  # (N, H, W), uint8, 0 background, 1.. objects; or None


def draw_shapes(count, seed, size=64):
    """The embedded data set -> Images: two to four textured, overlapping shapes before a lit wall.

    Colours do not tell objects apart: those of an image share two hues, shaded from one side.
    """
    random = np.random.default_rng(seed)
    pairs = zip(*(draw_image(size, random) for _ in range(count)))
    return Images(*(torch.from_numpy(np.stack(arrays)) for arrays in pairs))


def draw_image(size, random):
    """One image (3, size, size) and its label map (size, size), uint8."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    turn, labels = random.uniform(0, 2 * np.pi), np.zeros((size, size), np.uint8)
    light = 1 + random.uniform(0.3, 0.7) * ((x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn))
    image = random.uniform(0.9, 1.1) * np.array([0.26, 0.28, 0.32])[:, None, None] * light
    radius, gap = random.uniform(0.15, 0.23, 4), np.zeros(1)
    while gap.min() < 0.75:  # shapes may overlap, but hide none
        center = random.uniform(0.14, 0.86, (4, 2))
        gap = np.hypot(*(center[:, None] - center).T) / (radius[:, None] + radius) + 9 * np.eye(4)
    hues = random.uniform() + np.array([0, random.uniform(0.25, 0.75)])
    for k in range(random.integers(2, 5)):
        dx, dy, r, turn = x - center[k, 0], y - center[k, 1], radius[k], random.uniform(-0.35, 0.35)
        u = (dx * np.cos(turn) + dy * np.sin(turn)) / r
        v = (dy * np.cos(turn) - dx * np.sin(turn)) / r
        corners = (0.95, 0.0), (-0.475, 0.823), (-0.475, -0.823)
        outside = [  # below 0 within a disc, a square, a triangle, an ellipse
            np.hypot(u, v) - 0.95,
            (u**4 + v**4) ** 0.25 - 0.9,
            np.max([np.hypot(u - a, v - b) for a, b in corners], axis=0) - 1.645,
            (np.hypot(u, v / 0.8) - 1) * 0.8,
        ][random.integers(4)]
        stripes, checks = 4 * np.sin(5 * u), 8 * np.sin(5 * u) * np.sin(5 * v)
        spot = 10 * (np.hypot(u, v) - 0.5)
        texture = 1 / (1 + np.exp(-[stripes, checks, spot, 99 + 0 * u][random.integers(4)]))
        hue = random.choice(hues)
        first = colorsys.hsv_to_rgb(hue % 1, 0.85, 1.0)
        second = colorsys.hsv_to_rgb((hue + random.uniform(-0.12, 0.12)) % 1, 0.85, 0.6)
        color = np.multiply.outer(first, texture) + np.multiply.outer(second, 1 - texture)
        color = (color * (0.8 - 0.25 * (dx + dy) / r)).clip(0, 1)  # light from the upper left
        cover = (0.5 - outside * r * size).clip(0, 1)  # an edge one pixel wide
        image, labels[cover > 0.5] = image + cover * (color - image), k + 1
    return (image * 255).round().astype(np.uint8), labels


# ---- Readers of files: generators of (image, labels or None, part or "" to cut by index) ----


def open_image(path, mask=False):
    """An image as RGB, or a mask in its own mode, turned as its EXIF tag says."""
    kinds = ["PNG"] if mask else ["PNG", "JPEG", "WEBP"]
    try:
        with Image.open(path, formats=kinds) as image:
            deep = ";16" in str(image.tile)
            image.load()
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"{path} is missing, damaged or no {' or '.join(kinds)}") from error
    require(mask or not deep, f"{path} has more than 8 bits per channel: scale its range to 8")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a malformed EXIF block turns nothing
        pass
    return image if mask else image.convert("RGB")


def read_labels(path, dataset="folder"):
    """A label map (h, w), uint8; of a folder renumbered 1, 2, ... in the order of its values."""
    rule = "a mask is a single-channel PNG whose values are the labels, 0 the background"
    require(path.suffix.lower() in (".png", ".map"), f"{path} is no PNG: {rule}")
    image = open_image(path, mask=True)
    if dataset == "shapestacks":
        return np.array(image.getchannel(0)) // 32
    require(image.mode in ("1", "L", "P", "I", "I;16"), f"{path} is {image.mode}: {rule}")
    labels = np.array(image)
    if dataset == "folder":
        labels = np.searchsorted(np.union1d(0, labels), labels)
    require(labels.max() < 256, f"{path} has {labels.max()} labels, above 255: are its edges soft?")
    return labels.astype(np.uint8)


def decoded(items, dataset):
    """Open the files of (image path, mask path or None, part); name up to ten damaged ones."""
    damaged = []
    for path, mask, part in tqdm(items, "decoding", disable=None, leave=False):
        try:
            image, labels = open_image(path), mask and read_labels(mask, dataset)
        except OSError as error:
            damaged.append(str(error))
            require(len(damaged) < 10, "; ".join(damaged))
            continue
        fits = labels is None or labels.shape == image.size[::-1]
        require(fits, f"{mask} and its image differ in size, turned as their EXIF tags say")
        yield image, labels, part
    require(not damaged, "; ".join(damaged))


def list_files(folder):
    """Files of a folder and below it, sorted; links are followed, hidden names passed over."""

    def refuse(error):  # a folder that cannot be read
        raise error

    walk = os.walk(folder, followlinks=True, onerror=refuse)
    paths = [Path(where, name).relative_to(folder) for where, _, names in walk for name in names]
    paths = [folder / p for p in paths if not any(part[0] == "." for part in p.parts)]
    once = len({os.path.realpath(path) for path in paths}) == len(paths)
    require(once, f"{folder} shows a file twice: does a link lead in a circle?")
    return sorted(paths)


def by_stem(folder, paths):
    """{sub-folder and stem: path}, refused if two files share one."""
    stems = {path.relative_to(folder).with_suffix(""): path for path in paths}
    require(len(stems) == len(paths), f"{folder} has two files that differ only in their suffix")
    return stems


def read_folder(data, masks, notes):
    """PNG, JPEG and WebP images; masks of the same sub-folder and stem in a folder of their own."""
    words = re.compile(r"(^|[^a-z])(masks?|labels?|annotations?|seg(mentations?)?|gt)([^a-z]|$)")
    files = [p for p in list_files(data) if not masks or masks not in p.parents]
    images = [p for p in files if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    other = Counter(p.suffix for p in files) - Counter(p.suffix for p in images)
    notes += [f"{n} files {suffix} passed over" for suffix, n in other.items()]
    images, labels = by_stem(data, images), by_stem(masks, list_files(masks)) if masks else {}
    for stem, path in images.items():
        named = words.search(str(stem).lower())
        require(not named, f"{path} is named as a mask: give --masks its folder, or rename it")
        require(not masks or stem in labels, f"{path} has no mask {masks}/{stem}.png")
    for stem in labels.keys() - images.keys():
        raise ValueError(f"{labels[stem]} has no image {data}/{stem}")
    yield from decoded([(path, labels.get(stem), "") for stem, path in images.items()], "folder")


def read_clevrtex(data, variant, notes):
    """CLEVRTEX_<variant>_NNNNNN.png with ..._NNNNNN_flat.png, whose palette indices are labels."""
    name = re.compile(rf"CLEVRTEX_{variant}_(\d+)\.png")
    found = sorted((int(m[1]), p) for p in list_files(data) if (m := name.fullmatch(p.name)))
    if [number for number, _ in found] != [*range(len(found))]:
        notes.append("warning: numbers have gaps or doubles, or do not begin with 0")
    # open: outd is one test set; camo too has a test part, its first 10 %
    part = "test" if variant == "outd" else ""
    pairs = [(p, p.with_name(f"{p.stem}_flat.png"), part) for _, p in found]
    yield from decoded(pairs, "clevrtex")


def read_shapestacks(data, _, notes):
    """recordings/<scenario>/rgb-*.png and iseg/<scenario>/*.map, by splits/default/<part>.txt."""
    items = []
    for split, part in (("test", "test"), ("eval", "val"), ("train", "train")):
        for scenario in (data / f"splits/default/{split}.txt").read_text().split():
            for path in sorted(data.glob(f"recordings/{scenario}/rgb-*-cam_*-mono-0.png")):
                name = f"iseg-w=0-f=0-l=0-c=original-cam_{path.stem.split('-cam_')[1]}.map"
                items.append((path, data / "iseg" / scenario / name, part))
    yield from decoded(items, "shapestacks")


def read_tfrecords(data, form, notes):
    """tf.train.Examples with `image` and `mask`, GZIP or not; the first masks are walls."""
    name, height, width, masks, walls = form
    path = data if data.is_file() else data / f"{name}.tfrecords"

    def values(record, key, *shape):
        # Tag, length, key; tag, length, list; each byte is an entry: tag 10, length 1, the byte.
        varint, count = rb"[\x80-\xff]*[\0-\x7f]", int(np.prod(shape))
        start = re.search(rb"\n.%s\x12%s\n%s" % (key, varint, varint), record, re.DOTALL)
        first = start.end() if start else len(record)
        entries = np.frombuffer(record[first : first + 3 * count], np.uint8)
        whole = len(entries) == 3 * count and record[first + 3 * count :][:2] != b"\n\1"
        whole = whole and (entries.reshape(-1, 3)[:, :2] == (10, 1)).all()
        require(whole, f"{key.decode()} is not {count} entries of one byte")
        return entries[2::3].reshape(shape)

    with open(path, "rb") as file:
        opened = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opened(path, "rb") as file:
        for number in tqdm(itertools.count(), "decoding", disable=None, leave=False):
            try:
                head = file.read(12)  # length, its checksum (checking is left to gzip)
                if not head:
                    return
                size = int.from_bytes(head[:8], "little")
                record = file.read(min(size, 1 << 30) + 4)
                require(len(record) == size + 4, "it is cut short, or no record")
                image = values(record, b"image", height, width, 3)
                mask = values(record, b"mask", masks, height, width)
            except Exception as error:
                raise OSError(f"{path}, record {number}: {error}") from error
            labels = mask.argmax(0).clip(walls - 1) - (walls - 1)
            yield Image.fromarray(image), labels, "test" if "_test_" in name else ""


# Reader and its argument, share that the centre crop keeps (by default all), where in its cell a
# label is taken (by default 0.5 as Pillow does, 0 as PyTorch).
DATASETS = {
    "folder": (read_folder, None),
    "shapestacks": (read_shapestacks, None, 196 / 224, 0.0),
    # open: CLEVR's first tenths by index, as the authors take them
    "clevr": (read_tfrecords, ("clevr_with_masks_train", 240, 320, 11, 1), 0.8),
    "objectsroom": (read_tfrecords, ("objects_room_train", 64, 64, 7, 4)),
    "clevrtex": (read_clevrtex, "full", 0.8),
}
for name, masks in {"six_objects": 10, "identical_color": 10, "empty_room": 4}.items():
    DATASETS[name] = (read_tfrecords, (f"objects_room_test_{name}", 64, 64, masks, 4))
for name in ("outd", "camo", "pbg", "vbg", "grassbg"):
    DATASETS[name] = (read_clevrtex, name, 0.8)


def centre_crop(size, height, width, crop=1.0):
    """Box of the largest centre crop of an image of size (w, h) to an aspect, times crop."""
    w, h = size
    side_x = max(1, int(crop * min(w, h * width / height)))
    side_y = max(1, int(crop * min(h, w * height / width)))
    left, top = round((w - side_x) / 2), round((h - side_y) / 2)
    return left, top, left + side_x, top + side_y


def crop_and_resize(image, labels, height, width, crop=1.0, where=0.5):
    """Centre crop, then bilinear resize: (3, height, width) uint8, (height, width) or None."""
    box = left, top, right, bottom = centre_crop(image.size, height, width, crop)
    pixels = np.array(image.crop(box).resize((width, height), Image.Resampling.BILINEAR))
    if labels is not None:
        rows = top + ((np.arange(height) + where) * (bottom - top) / height).astype(int)
        columns = left + ((np.arange(width) + where) * (right - left) / width).astype(int)
        labels = labels[rows][:, columns].astype(np.uint8)
    return pixels.transpose(2, 0, 1), labels


def prepare(dataset, data, masks, height, width):
    """Decode a data set -> images, labels, ends of two parts, most labels, what was taken."""
    reader, argument, *crop = DATASETS[dataset]
    images, maps, notes, parts, counts = bytearray(), bytearray(), [], Counter(), []
    for image, labels, part in reader(data, masks or argument, notes):
        pixels, labels = crop_and_resize(image, labels, height, width, *crop)
        images += pixels.tobytes()
        parts[part] += 1
        if labels is not None:
            maps += labels.tobytes()
            counts.append(np.unique(labels[labels > 0]).size)
    count = parts.total()
    require(count > 2, f"{data} holds {count} images of {dataset}: three parts need three")
    test = val = min(10_000, max(1, count // 10))  # 10 000 of ObjectsRoom
    images = torch.frombuffer(images, dtype=torch.uint8).view(-1, 3, height, width)
    notes += [f"{count} images", f"mean brightness {images[::test].float().mean() / 255:.2f}"]
    labels = None
    if counts:
        labels = torch.frombuffer(maps, dtype=torch.uint8).view(-1, height, width)
        empty = 1 - labels.count_nonzero() / labels.numel()
        fits = 0 < empty < 1 or dataset != "folder"  # a published set may have no object
        require(fits, f"{masks}: {empty:.0%} of the pixels are background")
        notes.append(f"labels, {min(counts)}..{max(counts)} objects each, background {empty:.0%}")
    if "" not in parts:  # the reader knows them
        test, val = parts["test"], parts["val"]
    taken = f"{dataset} {data}: {', '.join(notes)}"
    return images, labels, (test, test + val), max(counts, default=0), taken


def load_tensors(path):
    """What torch.save wrote, mapped from the file, which is named if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise OSError(f"{path} is damaged: delete it, and start again") from error


def load_dataset(dataset, data, masks, height, width, slots=255, cache="cache"):
    """The parts "test", "val", "train" and "all" of a data set, Images each, mapped from a cache.

    The first call decodes it, every call prints what was taken. slots is K, to warn of soft edges.
    """
    fits = not masks or dataset == "folder"
    require(fits, f"--masks belong to the images of a folder, not to {dataset}")
    data, masks = (Path(os.path.abspath(path)) if path else None for path in (data, masks))
    key = zlib.crc32(os.fsencode(f"{data}:{masks}"))
    path = Path(cache, f"{dataset}-{height}x{width}-{key:08x}.pt")
    if not path.exists():
        prepared = prepare(dataset, data, masks, height, width)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(prepared, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    images, labels, (a, b), most, taken = load_tensors(path)
    print(f"{taken}; cached in {path}, delete it to decode again")
    if most > 4 * slots:
        print(f"warning: up to {most} labels per image for {slots} slots: soft edges?")
    parts = {"test": slice(a), "val": slice(a, b), "train": slice(b, None), "all": slice(None)}
    return {
        name: Images(images[part], None if labels is None else labels[part])
        for name, part in parts.items()
    }
