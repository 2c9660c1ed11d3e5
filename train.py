"""Train, evaluate and use AST-Seg: the paper's whole curriculum in one plain loop.

    python train.py [--setting value ...]               the embedded data set, preset shapes
    python train.py small  --data D [--masks M] ...     your images, two CPU cores
    python train.py folder --data D [--masks M] ...     your images, the paper's model
    python train.py clevrtex --data D ...               a data set of the paper, its settings; also
                                                        clevr, objectsroom, shapestacks
    python train.py evaluate RUN [RUN ...]              metrics; of several runs mean and deviation
    python train.py segment RUN IMAGE [IMAGE ...]       label map and overlay of each image

Each command has its own --help. The same command again goes on from the last checkpoint.
"""

import colorsys
import gc
import json
import math
import shutil
import sys
import time
import warnings
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw

import astseg
from astseg import ASTSeg, Config, Images

# "# open:" marks what the paper leaves open, "# differs:" what we do otherwise than the paper.

# ---- Settings: the paper's, and presets that replace some ----


@dataclass(frozen=True)
class Training(Config):
    """The architecture (astseg.Config), and data, curriculum, optimisers: the paper's (Table 6)."""

    dataset: str = "clevrtex"  # shapes, which are drawn, or a name of astseg.DATASETS
    data: str = ""  # folder or file of the data set
    masks: str = ""  # folder of label maps, for the images of a folder
    cache: str = "cache"  # folder of decoded data sets
    output: str = "runs/clevrtex"  # folder of the run
    scenario: Literal["CT", "BT", "frozen"] = "CT"  # curriculum, baseline, frozen background
    background_steps: int = 500_000  # steps of phase 1
    background_batch: int = 128  # images per step of phase 1
    background_lr: float = 2e-3  # learning rate of phase 1
    background_warmup: int = 0  # steps over which background_lr grows from 0
    background_plain_steps: int = 0  # first steps of phase 1, without [38]'s robust weight
    steps: int = 125_000  # steps of phases 2 and 3 together
    phase2_steps: int = 30_000  # of these with a frozen background
    batch: int = 64  # images per step of phases 2 and 3
    lr: float = 4e-5  # learning rate of phases 2 and 3
    warmup: int = 5_000  # steps over which lr grows from 0
    decay_at: float = 0.9  # share of the steps after which lr falls
    decay: Literal["step", "linear"] = "step"  # at once to a tenth, or along a line to zero
    entropy_weight: float = 1e-2  # weight of the entropy loss, lambda_pixel
    entropy_warmup: int = 10_000  # steps over which entropy_weight grows from 0, N_pixel
    refinement_start: Literal["stock", "identity"] = "stock"  # PyTorch's weights, or output = input
    refinement_lr_factor: float = 1.0  # the transformer encoder's rate is lr times this
    alpha_0_lr_factor: float = 1.0  # and so for the background's activation
    glimpse_lr_factor: float = 1.0  # and so for the glimpse generator
    pretrained: str = "nvidia/mit-b3"  # backbone: a hub name, a folder or '' for random weights
    flip: bool = False  # add the mirror images to the training images; not in the paper
    train_images: int = 10_000  # number of training images that are generated, for shapes
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # or another that torch knows
    bf16: bool = True  # mixed precision, on cuda
    cuda_graphs: bool = True  # on cuda: record the kernels of a step once and replay them
    seed: int = 0  # of weights, choice of images, dropout
    log_every: int = 100  # steps between rows of the log
    save_every: int = 5_000  # steps between checkpoints, with a picture and, after phase 1, metrics

    def __post_init__(self):
        super().__post_init__()
        if self.scenario == "CT" and self.phase2_steps > self.steps:
            raise ValueError(f"phase2_steps is {self.phase2_steps} of {self.steps} steps: lower it")
        if not 0 <= self.decay_at <= 1:
            raise ValueError(f"decay_at is {self.decay_at}: use a share of the steps, 0..1")


# differs: all values of SMALL and SHAPES, and random weights, are for two CPU cores. No part of the
# model is left out.
SMALL = dict(
    dataset="folder",
    height=64,  # a fourth of the pixels of 128 x 128
    width=64,
    anisotropic=False,  # most objects are about as wide as high
    backbone="tiny",  # half a million weights, where b3 has 47 million
    pretrained="",  # there are none of that size
    dim_transformer=128,  # this, and the next two: enough for a handful of slots
    dim_feedforward=256,
    transformer_layers=2,
    scale_max=10.0,  # no glimpse is smaller than a tenth of the image
    log_alpha_0=4.0,  # objects must show within hundreds of steps, not thousands
    background_kind="simple",  # learns textured walls too, at this size
    background_width=0.25,
    background_steps=1500,
    background_batch=16,
    background_lr=5e-4,  # steady without a warm-up, in small batches
    steps=17_000,
    phase2_steps=15_000,
    batch=32,
    lr=1e-3,  # small models bear more, and short runs need it
    warmup=500,
    decay_at=0.6,  # a low rate sharpens masks: it is worth two fifths of the run
    entropy_weight=0.015,
    entropy_warmup=3000,
    refinement_start="identity",  # PyTorch's start idles for thousands of steps
    # differs: the paper has one learning rate for all parts.
    refinement_lr_factor=0.1,  # if higher, slots are driven to the image's border and stay there
    alpha_0_lr_factor=0.33,  # if higher, alpha_0 falls, and masks take in the objects' rims
    glimpse_lr_factor=3.0,  # if lower, glimpses lag; yet the rendered textures (README) want 0.5
    save_every=500,
)
SHAPES = SMALL | dict(
    dataset="shapes",
    height=48,
    width=48,
    slots=4,
    dropout=0.0,  # it blurs glimpses, and 8000 images are not learned by heart
    scale_max=6.0,  # a glimpse is a sixth of the image at least, the smallest object a quarter
    log_alpha_0=3.5,
    background_steps=3000,  # twelve walls in changing light
    background_lr=2e-3,  # the paper's; a low rate does not tell the walls apart in time
    background_warmup=500,  # without it, that rate never tells them apart
    background_plain_steps=1000,  # without them, seed 0 painted one wall for all
    steps=10_000,
    phase2_steps=9500,
    batch=16,  # better than 32 with half the steps
    warmup=200,
    decay="linear",  # goes on learning while it sharpens masks
    entropy_weight=0.08,  # if lower, two slots share an object
    entropy_warmup=6000,  # if shorter, slots stay invisible
    glimpse_lr_factor=6.0,
    train_images=8000,
)
PRESETS = {  # the last four are the paper's (section 5.1)
    "shapes": Training(**SHAPES),
    "small": Training(**SMALL),
    "folder": Training(dataset="folder"),
    "clevrtex": Training(dataset="clevrtex"),
    "clevr": Training(  # all of its images show one background
        dataset="clevr", anisotropic=False, background_kind="simple", background_steps=2500
    ),
    "objectsroom": Training(dataset="objectsroom", height=64, width=64, slots=3),
    "shapestacks": Training(dataset="shapestacks", height=64, width=64, slots=6, anisotropic=False),
}
PRESETS = {name: replace(preset, output=f"runs/{name}") for name, preset in PRESETS.items()}


# ---- The loop, and below it the four functions that say what it does ----


def train(t: Training):
    """The whole curriculum, from its start or the last checkpoint -> metrics on the test part."""
    state = start_or_resume(t)  # of a new run: counts of 0, and no model nor optimizer
    run_began = time.perf_counter() - state["seconds"]  # as if it had never stopped
    data, val, test = load_data(t, "train", "val", "test")
    images = torch.cat((data.images, data.images.flip(3))) if t.flip else data.images
    if t.device.startswith("cuda") and 4 * images.nbytes < torch.cuda.mem_get_info()[0]:
        images = images.to(t.device)  # (N, 3, H, W), uint8; backgrounds will take as much
    model = build_model(t, state)
    log = state["log"]

    update = 0  # counts through all phases
    for phase, first, stop, batch in curriculum(t):
        skipped = max(0, min(state["update"] - update, stop - first))  # done before the checkpoint
        update += skipped
        first += skipped
        if first == stop:  # nothing is left of this phase
            continue
        optimizer = make_optimizer(model, phase, t)
        if skipped:
            optimizer.load_state_dict(state["optimizer"])
        # In phase 2 the background model does not change: its images are made once.
        backgrounds = memorise_backgrounds(model, images) if phase == "foreground" else None
        network = None  # frees the CUDA graph of the phase before
        # The autoencoder in phase 1, else the model; on a GPU, a CUDA graph of it.
        network = make_network(model, phase, images, backgrounds, batch, t)
        print(f"\n{phase}: steps {first} to {stop}\n{HEAD}")
        recent = []
        for step in range(first, stop):
            if not recent:  # at the start, and after each row of the log
                row_began = time.perf_counter()
                model.train()
            # All that is random in a step follows from its number, so that a run that was killed
            # goes on as if it had not been.
            torch.manual_seed(1_000_000 * t.seed + update)
            index = torch.randint(len(images), (batch,))
            batch_images = as_input(images[index], model)  # (B, 3, H, W)
            # Without a memorised background, as in phase 3, the model makes its own.
            background = None if backgrounds is None else as_input(backgrounds[index], model)
            lr = learning_rate(phase, step, t)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            terms = training_step(network, optimizer, phase, step, batch_images, background, t)
            recent.append(terms)
            update += 1

            # From here on: log, evaluate, draw, save.
            done = step + 1
            save_now = done == stop or done % t.save_every == 0
            if not save_now and done % t.log_every:
                continue
            row = dict(phase=phase, step=done, update=update, lr=lr)
            for name in terms:
                row[name] = torch.stack([past[name] for past in recent]).mean().item()
            if not math.isfinite(row["loss"]):
                raise ValueError(f"the loss is {row['loss']} in phase {phase}: try a lower rate")
            pace = len(recent) / (time.perf_counter() - row_began)  # steps per second
            row |= {"images/s": pace * batch, "left": (stop - done) / pace}  # seconds of the phase
            if save_now and phase != "background":
                row |= evaluate(model, evenly_spaced(val, 200))
            log.append(row)
            write_log(log, t)
            if save_now:
                seconds = time.perf_counter() - run_began
                progress = dict(update=update, seconds=seconds, log=log)
                save_checkpoint(model, optimizer, progress, t)
                draw(t, f"training/{update:07d}.png", figure_2, model, evenly_spaced(val, 8))
            recent = []
    return write_results(model, test, time.perf_counter() - run_began, t)


def curriculum(t: Training):
    """The phases of a scenario: (name, first step, stop, images per step), section 4.2.2.

    Phase 1 trains the background alone. In phase 2, "foreground", it is frozen; in phase 3,
    "joint", all learns. In the scenario "frozen" of section 5.2, phase 2 goes on to the end, and no
    step is left for phase 3. BT is phase 3 alone.
    """
    if t.scenario == "BT":
        return [("joint", 0, t.steps, t.batch)]
    phase2_steps = {"CT": t.phase2_steps, "frozen": t.steps}[t.scenario]
    return [
        ("background", 0, t.background_steps, t.background_batch),
        ("foreground", 0, phase2_steps, t.batch),  # open: phases 2 and 3 share one step counter
        ("joint", phase2_steps, t.steps, t.batch),
    ]


def make_optimizer(model, phase, t: Training):
    """Adam over all parameters, whatever the phase.

    This is how a phase freezes parts: in phase 1 only the autoencoder runs, in phase 2 all but the
    autoencoder. What does not run has no gradient (None), and Adam passes it over.
    """
    factors = {  # on the learning rate, by the beginning of a parameter's name
        "encoder.refinement.": t.refinement_lr_factor,
        "renderer.glimpse_generator.": t.glimpse_lr_factor,
        "renderer.log_alpha_0": t.alpha_0_lr_factor,
        "": 1.0,  # which every name begins with: all the rest
    }
    groups = {prefix: dict(params=[], factor=factor) for prefix, factor in factors.items()}
    for name, parameter in model.named_parameters():
        prefix = next(prefix for prefix in factors if name.startswith(prefix))
        groups[prefix]["params"].append(parameter)
    # open: phase 1 has the default betas and eps; phase 3 starts a fresh Adam, without a warm-up
    options = {} if phase == "background" else dict(betas=(0.9, 0.98), eps=1e-9)
    return torch.optim.Adam(groups.values(), fused=True, **options)


def learning_rate(phase, step, t: Training):
    """The rate of update number `step`, from 0: quadratic warm-up, then a fall (section 5.1)."""
    if phase == "background":  # open: a tenth of the rate from 80 % of phase 1 on
        fall = 0.1 if step >= 0.8 * t.background_steps else 1.0
        return t.background_lr * astseg.quadratic_warmup(step, t.background_warmup) * fall
    step += 1  # open: counted from 1 here, as in the authors' code; elsewhere from 0
    start = t.decay_at * t.steps
    # differs: "linear", in the preset shapes, is a line that ends at zero
    falls = {"step": 0.1, "linear": (t.steps - step) / max(1.0, t.steps - start)}
    fall = falls[t.decay] if step >= start else 1.0
    return t.lr * astseg.quadratic_warmup(step, t.warmup) * fall


def training_step(network, optimizer, phase, step, images, background, t: Training):
    """One update by images (B, 3, H, W) -> the terms of the loss and their sum, by name.

    The network is the autoencoder in phase 1, else the whole model. background (B, 3, H, W) is the
    memorised one in phase 2, else None.
    """
    with mixed_precision(t):
        if phase == "background":
            # [38] weighs a pixel less, the larger its error; at a strength of 0 all weigh the same.
            # differs: the first steps have strength 0, and learn objects too; the weight then
            # unlearns them.
            strength = 0.0 if step < t.background_plain_steps else 6.0
            painted, predicted_error = network(images)  # (B, 3, H, W), (B, H, W): both learn
            loss = astseg.robust_background_loss(images, painted, predicted_error, strength)
            terms = {"background": loss}
        else:
            output = network(images, background)
            terms = astseg.full_loss(images, output, step, t.entropy_weight, t.entropy_warmup)
        terms["loss"] = sum(terms.values())  # eq. (22) in phases 2 and 3
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()
    # Detached, or a step's graph would outlive it.
    return {name: term.detach() for name, term in terms.items()}


# ==== Nothing below is needed to understand the training. ====

# ---- Data ----


def load_data(t: Training, *names):
    """Images of the parts that are named, of "train", "val" and "test"."""
    if t.dataset == "shapes":
        if t.data or t.masks or t.height != t.width:
            raise ValueError("shapes are drawn, on squares: they have no --data and no --masks")
        counts_seeds = {"train": (t.train_images, 1), "val": (200, 2), "test": (500, 3)}
        return [astseg.draw_shapes(*counts_seeds[name], t.height) for name in names]
    if not t.data:
        raise ValueError(f"{t.dataset} is read from files: name them by --data")
    if Path(t.data).resolve() in Path(t.output).resolve().parents:
        raise ValueError(f"{t.output} is inside the data: its pictures would join them")
    parts = astseg.load_dataset(t.dataset, t.data, t.masks, t.height, t.width, t.cache)
    if not parts.keys() >= set(names):
        way = "add images, or sort them into sub-folders train, val and test"
        raise ValueError(f"{t.data} has the parts {[*parts]}, not all of {[*names]}: {way}")
    return [parts[name] for name in names]


def as_input(images, model):
    """Images as bytes -> in [0, 1], on the device of the model."""
    return images.to(next(model.parameters()).device) / 255


def evenly_spaced(data, count):
    """At most `count` images of a part, evenly spaced over it."""
    index = torch.linspace(0, len(data.images) - 1, min(count, len(data.images))).long()
    return Images(data.images[index], None if data.labels is None else data.labels[index])


@torch.no_grad()
def memorise_backgrounds(model, images):
    """The background of each image: (N, 3, H, W), uint8, on the images' device (section 5.2)."""
    # open: section 5.2 has it for the scenario frozen; we do so in phase 2 too, and as bytes
    model.eval()
    memory = torch.empty_like(images)
    for chunk, target in zip(images.split(100), memory.split(100)):
        background, _ = model.background(as_input(chunk, model))
        target.copy_((background * 255).round())
    return memory


# ---- The model, and what makes it fast ----


def build_model(t: Training, state):
    """A model of random, partly pretrained, or a checkpoint's weights, on its device."""
    torch.manual_seed(t.seed)
    model = ASTSeg(Config(**{field.name: getattr(t, field.name) for field in fields(Config)}))
    if t.transformer and t.refinement_start == "identity":
        start_as_identity(model.encoder.refinement)
    if "model" in state:
        model.load_state_dict(state["model"])
    elif t.pretrained:
        try:
            model.generator.load_backbone(t.pretrained)
        except (OSError, AttributeError) as error:  # no such files; or no such method, as the U-Net
            raise ValueError(f"{error}\n--pretrained '' starts from random weights") from error
    # In a first call transformers installs hooks, which a CUDA graph could not record.
    model.eval().segment(torch.zeros(1, 3, t.height, t.width))
    return model.to(t.device)


@torch.no_grad()
def start_as_identity(refinement):
    """Let a Refinement begin as the identity: PyTorch's start idles for thousands of steps.

    The last linear maps of each layer are zero, so that a layer adds nothing, and its norms alone
    remain. A norm subtracts the mean and divides by the deviation. The embedding E adds a bias of
    1, -1, 1, ..., of mean 0 and deviation 1. A slot s begins with a length of 0.03 to 0.3, and the
    bias has 11, so that norm(bias + E s) is bias + E s up to about 2e-4. E has orthonormal columns,
    orthogonal to that bias and to (1, 1, ...), so that its transpose reads s back.
    """
    # differs: the paper keeps PyTorch's start; at its 125 000 steps there is time for it
    width, dim_slot = refinement.embedding.weight.shape  # d_T, D + 2
    for layer in refinement.transformer.layers:
        for last in (layer.self_attn.out_proj, layer.linear2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    bias = (-1.0) ** torch.arange(width)  # 1, -1, 1, ...
    columns = torch.column_stack((torch.ones(width), bias, torch.randn(width, dim_slot)))
    embedding = torch.linalg.qr(columns).Q[:, 2:]  # (d_T, D + 2), made orthonormal in their order
    refinement.embedding.weight.copy_(embedding)
    refinement.embedding.bias.copy_(bias)
    refinement.projection.weight.copy_(embedding.T)
    torch.nn.init.zeros_(refinement.projection.bias)


def mixed_precision(t: Training):
    """bf16 for the networks, on a GPU."""
    enabled = t.bf16 and t.device.startswith("cuda")  # open: the paper does not say in what type
    return torch.autocast(t.device.partition(":")[0], torch.bfloat16, enabled, cache_enabled=False)


def make_network(model, phase, images, backgrounds, batch, t: Training):
    """The network that learns in a phase, as it is or, on a GPU, as a CUDA graph.

    A step is a thousand short kernels. They are recorded once and replayed; else the GPU would wait
    for Python between them.
    """
    network = model.background if phase == "background" else model
    if not (t.device.startswith("cuda") and t.cuda_graphs):
        return network
    # The recording makes gradients on a stream of its own, which is meant so.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    gc.collect()  # the network recorded before refers to itself
    index = torch.arange(batch) % len(images)
    inputs = [x[index].to(t.device) / 255 for x in (images, backgrounds) if x is not None]
    network = copy(network.train())  # shares the weights; only its forward is replaced
    with mixed_precision(t):
        graph = torch.cuda.make_graphed_callables(network, tuple(inputs), allow_unused_input=True)
    return lambda *given: graph(*(x for x in given if x is not None))


# ---- The folder of a run ----

MAY_DIFFER = ("steps", "output", "cache", "device", "cuda_graphs", "log_every", "save_every")


def start_or_resume(t: Training):
    """Where the run in the folder stands. Raises ValueError if its settings are others.

    A run may get more steps, also when it has finished. Its rate is then that of the longer run.
    """
    source = f"{t.dataset} {t.data}".strip()
    print(f"{source}, {t.slots} slots, on {t.device}, output: {t.output}")
    beginning = max(t.background_warmup, t.background_plain_steps)  # of phase 1
    if beginning > t.background_steps or max(t.warmup, t.entropy_warmup) > t.steps:
        print("warning: a warm-up is longer than its phase, and does not end in it")
    if t.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device is {t.device}: this PyTorch sees no GPU")
        torch.cuda.set_device(torch.device(t.device).index or 0)
    path = Path(t.output, "checkpoint.pt")
    if not path.exists():
        return dict(update=0, seconds=0.0, log=[])
    state = torch.load(path, map_location="cpu", weights_only=True)
    saved = state["settings"]
    other = [n for n, value in asdict(t).items() if value != saved.get(n) and n not in MAY_DIFFER]
    if other or t.steps < saved["steps"]:
        changed = ", ".join(f"{name} {saved.get(name)}" for name in other or ["steps"])
        raise ValueError(f"{t.output} holds a run of {changed}: name another --output")
    for left in path.parent.glob("checkpoint.pt.*.tmp"):  # by a process that was killed
        left.unlink()
    print(f"{t.output}: goes on after {state['update']} updates")
    return state


def save_checkpoint(model, optimizer, progress, t: Training):
    """model/ and settings.json for the run's users; last, checkpoint.pt, to go on from."""
    folder = Path(t.output)
    model.save_pretrained(folder / "model")
    # safetensors lets nobody else read its file.
    shutil.copymode(folder / "model" / "config.json", folder / "model" / "model.safetensors")
    (folder / "settings.json").write_text(json.dumps(asdict(t), indent=1))
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), settings=asdict(t))
    astseg.save_whole(progress | state, folder / "checkpoint.pt")


COLUMNS = "step loss mIoU ARI-FG foreground active clamped alpha_0 images/s left".split()
HEAD = "".join(f"{name:>11}" for name in COLUMNS)


def write_log(log, t: Training):
    """Print the last row of the log, and write all of it to log.jsonl."""
    Path(t.output).mkdir(parents=True, exist_ok=True)
    Path(t.output, "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    row = log[-1]
    cells = {name: f"{row[name]:.4g}" for name in COLUMNS if name in row}
    minutes, seconds = divmod(round(row["left"]), 60)
    cells |= dict(step=str(row["step"]), left=f"{minutes}:{seconds:02d}")
    print("".join(f"{cells.get(name, ''):>11}" for name in COLUMNS), flush=True)


# ---- Evaluation (section 5.1) ----


@torch.no_grad()
def evaluate(model, data):
    """Signs of health and metrics, of which MSE alone wants no labels: means over the images."""
    model.eval()
    slots = model.config.slots
    chunks = []
    for index in torch.arange(len(data.images)).split(50):
        images = as_input(data.images[index], model)
        output = model(images)
        labels = output.weights.argmax(1)  # (B, H, W)
        shown = F.one_hot(labels, slots + 1).amax((1, 2))  # (B, K + 1), 1 for labels with a pixel
        chunk = {
            "MSE": (images - output.reconstruction).square().sum((1, 2, 3)),
            "foreground": (labels > 0).float().mean((1, 2)),
            "active": shown[:, 1:].sum(1),
            "clamped": (output.latents.position.abs() == 1).any(2).float().mean(1),
            "alpha_0": model.renderer.log_alpha_0.exp().expand(len(images)),
            "entropy": astseg.pixel_entropy_loss(output.weights).expand(len(images)),
        }
        if data.labels is not None:
            tables = astseg.contingency_tables(data.labels[index], labels, slots)
            for name, metric in astseg.METRICS.items():
                chunk[name] = torch.tensor([metric(table) for table in tables], dtype=torch.float64)
        chunks.append(chunk)
    columns = {name: torch.cat([c[name].cpu().double() for c in chunks]) for name in chunks[0]}
    return {name: column.mean().item() for name, column in columns.items()}


def print_table(rows):
    """Rows (name, metrics) as in Table 1, in per cent but for the MSE."""
    print(f"\n{'':20}" + "".join(f"{name:>10}" for name in (*astseg.METRICS, "MSE")))
    for name, row in rows:
        cells = [100 * row.get(metric, math.nan) for metric in astseg.METRICS] + [row["MSE"]]
        print(f"{name:20}" + "".join(f"{cell:10.2f}" for cell in cells))


def write_results(model, test, seconds, t: Training):
    """The table of a finished run; metrics.json and its pictures."""
    folder = Path(t.output)
    metrics = evaluate(model, test)
    print_table([(f"AST-Seg, seed {t.seed}", metrics)])
    print(f"{folder}: {len(test.images)} test images, {seconds:.0f} s in all")
    metrics |= dict(images=len(test.images), seconds=round(seconds), seed=t.seed)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    draw(t, "segmentation.png", figure_2, model, evenly_spaced(test, 10))
    draw(t, "slots.png", slot_rows, model, evenly_spaced(test, 3))
    paths = sorted((folder / "training").glob("*.png"))
    frames = [Image.open(path).quantize(32) for path in paths]
    for first in frames[:1]:  # none, where no picture could be drawn
        first.save(folder / "training.gif", append_images=frames[1:], duration=500, loop=0)
    return metrics


# ---- Pictures ----

# Steps of the golden ratio around the circle of hues: labels of any number differ in colour.
HUES = [colorsys.hsv_to_rgb(0.618 * k % 1, 0.6 + 0.4 * (k % 2), 1.0) for k in range(255)]
PALETTE = torch.tensor([(0, 0, 0), *HUES])  # (256, 3), 0 is the background


def figure_2(images, output, labels):
    """Rows of pictures as in Figure 2: {name: (N, 3, H, W)}."""
    rows = {"input": images}
    if labels is not None:
        rows["true labels"] = PALETTE[labels.long()].movedim(3, 1)
    rows["segmentation"] = PALETTE[output.weights.argmax(1).cpu()].movedim(3, 1)
    return rows | {"reconstruction": output.reconstruction, "background": output.background}


def slot_rows(images, out, labels):
    """Attention, glimpse and layer of each slot of each image, beside what they make up."""
    size = images.shape[2:]
    x, y = astseg.normalized_coordinates(*size, images.device)
    red = torch.tensor([1.0, 0, 0], device=images.device).view(3, 1, 1)
    rows = {}
    for b in range(len(images)):
        attention = out.attention[b, :, None]  # (K, 1, h, w)
        attention = F.interpolate(attention / attention.amax((2, 3), keepdim=True), size)
        at_x, at_y = out.attention_position[b, :, :, None, None, None].unbind(1)  # (K, 1, 1, 1)
        away = torch.hypot(x - at_x, y[:, None] - at_y)  # (K, 1, H, W)
        attention = attention.where(away > 0.08, red)  # (K, 3, H, W), a spot at the soft-argmax
        color, mask = F.interpolate(out.glimpses[b], size).split([3, 1], dim=1)
        glimpse = 1 - mask * (1 - color)  # white where there is nothing
        layer = 1 - out.weights[b, 1:, None] * (1 - out.layers[b])
        rows[f"attention {b + 1}"] = torch.cat((images[b, None], attention))
        rows[f"glimpse {b + 1}"] = torch.cat((out.background[b, None], glimpse))
        rows[f"layer {b + 1}"] = torch.cat((out.reconstruction[b, None], layer))
    return rows


@torch.no_grad()
def draw(t: Training, name, rows_of, model, data):
    """Save rows of pictures of a model as one, twice as large. If it fails, the run goes on."""
    path = Path(t.output, name)
    images = as_input(data.images, model)
    try:
        rows = rows_of(images, model.eval()(images), data.labels)
        strips = [F.pad(row.cpu(), (1,) * 4, value=1.0) for row in rows.values()]
        grid = torch.cat([strip.movedim(0, 2).flatten(2) for strip in strips], dim=1)  # (3, H, W)
        grid = F.interpolate(F.pad(grid, (55, 0), value=1.0)[None], scale_factor=2)[0]
        picture = Image.fromarray((grid.clamp(0, 1) * 255).byte().movedim(0, 2).numpy())
        for i, row_name in enumerate(rows):  # on the left
            place = (4, (i + 0.4) * picture.height / len(rows))
            ImageDraw.Draw(picture).text(place, row_name, "black", font_size=14)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except Exception as error:
        print(f"warning: no {path}: {error}")


# ---- Commands ----


@dataclass(frozen=True)
class Evaluate:
    """Metrics of each run and, of several, their mean and standard deviation."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs
    dataset: str = ""  # evaluate on another data set than the run's own
    data: str = ""  # evaluate on other files than the run's own
    masks: str = ""  # label maps of these files


def evaluate_runs(command: Evaluate):
    rows = []
    for folder in dict.fromkeys(path.resolve() for path in command.runs):
        settings, model = open_run(folder)
        if command.dataset or command.data or command.masks:  # the run's masks are for its own data
            dataset = command.dataset or settings.dataset
            settings = replace(settings, dataset=dataset, data=command.data, masks=command.masks)
        (test,) = load_data(settings, "test")
        rows.append((folder.name, evaluate(model, test)))
    if len(rows) > 1:
        columns = {name: [metrics[name] for _, metrics in rows] for name in rows[0][1]}
        rows.append(("mean", {name: np.mean(column) for name, column in columns.items()}))
        rows.append(("deviation", {name: np.std(c, ddof=1) for name, c in columns.items()}))
    print_table(rows)


def open_run(folder):
    """The settings and the model of a run."""
    settings = Training(**json.loads((folder / "settings.json").read_text()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return settings, ASTSeg.from_pretrained(folder / "model").to(device).eval()


@dataclass(frozen=True)
class Segment:
    """Write <name>_labels.png and <name>_overlay.png of each image, into RUN/segmented.

    The model sees the centre crop that it was trained on; around it labels are 0.
    """

    run: tyro.conf.Positional[Path]  # folder of a run
    images: tyro.conf.Positional[tuple[Path, ...]]  # files


def segment_files(command: Segment):
    if len({path.stem for path in command.images}) < len(command.images):
        raise ValueError("two images have one name: their results would collide")
    settings, model = open_run(command.run)
    crop = 1.0 if settings.dataset == "shapes" else astseg.DATASETS[settings.dataset].crop
    folder = command.run / "segmented"
    folder.mkdir(exist_ok=True)
    for path in command.images:
        image = astseg.open_image(path)
        pixels = astseg.to_model(image, model.config.height, model.config.width, crop)
        labels = model.segment(as_input(pixels[None], model))[0]
        picture = Image.fromarray(astseg.labels_to_image(labels, image.size, crop)).convert("P")
        picture.putpalette((PALETTE * 255).byte().flatten().tolist())
        opacity = picture.point(lambda label: 128 * (label > 0), "L")
        picture.save(folder / f"{path.stem}_labels.png")
        overlay = Image.composite(picture.convert("RGB"), image, opacity)
        overlay.save(folder / f"{path.stem}_overlay.png")
        print(f"{path}: {(labels.unique() > 0).sum()} objects -> {folder}/{path.stem}_labels.png")


def main(arguments):
    """Do what a command line asks for. One without a command trains with the preset shapes."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["shapes", *arguments]
    commands = tyro.extras.subcommand_type_from_defaults(PRESETS) | Evaluate | Segment
    actions = {Training: train, Evaluate: evaluate_runs, Segment: segment_files}
    try:
        command = tyro.cli(commands, args=arguments, description=__doc__, use_underscores=True)
        actions[type(command)](command)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main(sys.argv[1:])
