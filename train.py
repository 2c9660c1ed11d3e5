"""Train, evaluate and use AST-Seg: the paper's whole curriculum in one plain loop.

    python train.py                                   the embedded data set, minutes on two cores
    python train.py --dataset clevrtex --data DIR     a data set of the paper, with its settings
    python train.py --dataset folder --data DIR --slots 6 --preset small      images of your own
    python train.py --resume RUN                      go on from the last checkpoint of a run
    python train.py --evaluate RUN [RUN ...]          metrics; of several runs mean and deviation
    python train.py --segment RUN IMAGE [IMAGE ...]   label map, overlay and objects of each image
    torchrun --nproc_per_node N train.py ...          the same on several GPUs

A run folder gets model/, checkpoint.pt, settings.json, log.jsonl, metrics.json and pictures.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import astseg
from astseg import ASTSeg, Config, Images, require

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if GPU else torch.device("cpu")


@dataclass(frozen=True)
class Training:
    """Data, curriculum and optimisers, by default the paper's for CLEVRTEX (Table 6)."""

    dataset: Literal[("shapes", *astseg.DATASETS)] = "shapes"
    data: str = ""  # folder or file; shapes are drawn
    masks: str = ""  # folder of label maps for the images of a folder
    cache: str = "cache"  # where decoded data sets are kept
    scenario: Literal["CT", "BT", "frozen"] = "CT"  # curriculum, baseline, frozen background
    background_steps: int = 500_000  # phase 1; 2 500 for a fixed background
    background_batch: int = 128
    background_lr: float = 2e-3
    steps: int = 125_000  # phases 2 and 3 together
    phase2_steps: int = 30_000  # of these before a frozen background
    batch: int = 64
    lr: float = 4e-5
    warmup: int = 5_000  # steps in which lr grows
    decay_at: float = 0.9  # share of the steps after which it falls to a tenth
    entropy_weight: float = 1e-2  # lambda_pixel
    entropy_warmup: int = 10_000  # N_pixel
    refinement_start: Literal["stock", "identity"] = "stock"  # identity: for short runs
    refinement_lr_factor: float = 1.0  # on lr, for the refinement
    alpha_0_lr_factor: float = 1.0  # on lr, for alpha_0
    glimpse_lr_factor: float = 1.0  # on lr, for the glimpse generator
    # open: weights are random unless named, since not every machine reaches a hub
    pretrained: str = ""  # backbone, a hub name or a folder; the paper's is nvidia/mit-b3
    flip: bool = False  # mirror training images at random; not in the paper
    train_images: int = 10_000  # shapes that are drawn for training
    bf16: bool = True  # on a GPU
    compile: bool = True  # on a GPU
    seed: int = 0
    log_every: int = 100
    evaluate_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self):
        zero = ("seed", "phase2_steps", "warmup", "entropy_weight", "entropy_warmup")
        for name, value in vars(self).items():
            good = type(value) in (str, bool) or value > 0 or (value == 0 and name in zero)
            require(good, f"{name} is {value}: use a positive number")
        inside = 0 <= self.phase2_steps <= self.steps
        require(inside, f"phase2_steps is {self.phase2_steps}: use a part of {self.steps} steps")
        fits = (self.dataset == "shapes") == (not self.data)
        require(fits, f"dataset {self.dataset} with data {self.data!r}: all but shapes need --data")


# Two CPU cores: small sizes and short schedules, every component (the README says why).
SMALL = dict(
    height=64, width=64, anisotropic=False, backbone="tiny", dim_transformer=128,
    dim_feedforward=256, transformer_layers=2, scale_max=10.0, log_alpha_0=4.0,
    background_kind="simple", background_width=0.25, background_steps=1500, background_batch=16,
    background_lr=5e-4, steps=17_000, phase2_steps=15_000, batch=32, lr=1e-3, warmup=500,
    decay_at=0.6, entropy_weight=0.015, entropy_warmup=3000, refinement_start="identity",
    refinement_lr_factor=0.1, alpha_0_lr_factor=0.33, glimpse_lr_factor=3.0,
)  # fmt: skip
SHAPES = SMALL | dict(
    height=48, width=48, slots=4, scale_max=6.0, log_alpha_0=4.5, background_batch=8, steps=5600,
    phase2_steps=4500, warmup=100, decay_at=0.65, entropy_weight=0.02, entropy_warmup=1000,
    train_images=8000,
)  # fmt: skip


# ---- Data: bytes on the GPU where they fit, else mapped into memory ----


def wait():
    if RANKS > 1:
        dist.barrier()


def load_data(config, training):
    """The parts "train", "val", "test" and, unless they are drawn, "all" -> Images each."""
    if training.dataset == "shapes":
        require(config.height == config.width, "shapes are drawn on squares: width is not height")
        counts = {"train": (training.train_images, 1), "val": (200, 2), "test": (500, 3)}
        return {part: astseg.draw_shapes(*count, config.height) for part, count in counts.items()}
    where = (training.dataset, training.data, training.masks, config.height, config.width)
    if RANK > 0:
        wait()  # until the first process has prepared it
    parts = astseg.load_dataset(*where, config.slots, training.cache)
    if RANK == 0:
        wait()
    return parts


def to_float(images):
    """Bytes to floats in [0, 1] on the device."""
    return images.to(DEVICE, non_blocking=True).float() / 255


@lru_cache(maxsize=2)
def epoch_order(count, seed, device):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)


def batch_indices(step, batch, count, seed, device="cpu"):
    """Indices (batch,) of a step, epochs in random order: a function of the step alone.

    Several processes share a batch; each gets its own part of the indices.
    """
    epoch, position = divmod(step, count // batch)  # open: an epoch's remainder is dropped
    order = epoch_order(count, seed * 100_003 + epoch, device)
    return order[position * batch + RANK : (position + 1) * batch : RANKS]


def load_batch(images, backgrounds, step, batch, training):
    """Images of a step and their memorised backgrounds, or None: (B, 3, H, W) in [0, 1]."""
    index = batch_indices(step, batch, len(images), training.seed, images.device)
    pair = [x if x is None else to_float(x[index]) for x in (images, backgrounds)]
    if training.flip:  # an image and its background alike
        mirrored = torch.rand(len(index), 1, 1, 1, device=DEVICE) < 0.5
        pair = [x if x is None else torch.where(mirrored, x.flip(3), x) for x in pair]
    return pair


@torch.no_grad()
def memorise_backgrounds(model, images, path):
    """Backgrounds (N, 3, H, W), uint8, of all images: in a mapped file, or on the GPU as they."""
    memory = torch.from_file(str(path), shared=True, size=images.numel(), dtype=torch.uint8)
    memory = memory.view(images.shape)
    if RANK == 0:
        for part, target in zip(images.split(100), memory.split(100)):
            background, _ = model.eval().background(to_float(part))
            target.copy_((background * 255).round())  # open: at 8 bits per channel, rounded
    wait()
    return memory.to(images.device)


# ---- The curriculum (section 4.2.2) ----


def curriculum(training):
    """The phases of a scenario: (name, first step, stop); "foreground" has a frozen background."""
    background = ("background", 0, training.background_steps)
    if training.scenario == "BT":
        return [("joint", 0, training.steps)]
    if training.scenario == "frozen":
        return [background, ("foreground", 0, training.steps)]
    # open: phases 2 and 3 share one step counter
    middle = training.phase2_steps
    return [background, ("foreground", 0, middle), ("joint", middle, training.steps)]


def make_optimizer(model, phase, training):
    """The optimiser of a phase; only what the phase trains has gradients from here on."""
    model.requires_grad_(phase == "joint")
    if phase == "background":
        model.background.requires_grad_(True)
        # open: AdamW with its default betas and no weight decay in phase 1
        return torch.optim.AdamW(model.background.parameters(), weight_decay=0.0, fused=True)
    factors = {
        model.generator: 1.0,
        model.encoder: training.refinement_lr_factor,  # all its parameters are the refinement's
        model.renderer.glimpse_generator: training.glimpse_lr_factor,
    }
    if phase == "joint":  # open: here the background learns from (22) alone
        factors[model.background] = 1.0
    groups = [
        dict(params=[*part.requires_grad_(True).parameters()], factor=factor)
        for part, factor in factors.items()
    ]
    alpha_0 = model.renderer.log_alpha_0.requires_grad_(True)
    groups.append(dict(params=[alpha_0], factor=training.alpha_0_lr_factor))
    # open: a fresh Adam takes all parameters at the start of phase 3, at full rate
    groups = [group for group in groups if group["params"]]  # there may be no refinement
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-9, fused=True)


def set_learning_rate(optimizer, phase, step, training):
    """Set and return the rate of the update after `step` others."""
    t = training
    if phase == "background":  # open: a tenth of the rate from 80 % of phase 1 on
        lr = astseg.learning_rate(step, t.background_lr, t.background_steps, decay_at=0.8)
    else:  # open: update t uses the rate of step t + 1, the entropy weight of step t
        lr = astseg.learning_rate(step + 1, t.lr, t.steps, t.warmup, t.decay_at)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    return lr


# ---- The loop ----


def build_model(config, training, resume=False):
    """A model of random, or partly pretrained, weights, on the device."""
    torch.manual_seed(training.seed)
    model = ASTSeg(config)
    if config.transformer and training.refinement_start == "identity":
        astseg.start_as_identity(model.encoder.refinement)
    if training.pretrained and not resume:
        model.generator.load_backbone(training.pretrained)
    if GPU and RANKS > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.manual_seed(training.seed + 1000 * RANK)  # processes draw their own dropout
    return model.to(DEVICE)


def train(config, training, folder, resume=False):
    """The whole curriculum, from the start or a checkpoint -> model, data, log, seconds."""
    parts, model = load_data(config, training), build_model(config, training, resume)
    images, batches = parts["train"].images, (training.batch, training.background_batch)
    fits = len(images) >= max(batches)
    require(fits, f"{len(images)} training images do not fill a batch of {max(batches)}")
    shared = all(batch % RANKS == 0 for batch in batches)
    require(shared, f"batches of {batches} images cannot be shared by {RANKS} processes")
    for name, part in parts.items():
        require(len(part.images), f"{training.data} has no {name} part")
    if GPU and 4 * images.nbytes < torch.cuda.mem_get_info()[0]:
        images = images.to(DEVICE)  # and later their backgrounds
    state = dict(phase=0, seconds=0.0, log=[])
    if resume:
        state = astseg.load_tensors(folder / "checkpoint.pt")
        model.load_state_dict(state["model"])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        settings = asdict(config) | asdict(training)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    started = time.time() - state["seconds"]

    for number, (phase, start, stop) in list(enumerate(curriculum(training)))[state["phase"] :]:
        optimizer = make_optimizer(model, phase, training)
        if "optimizer" in state:  # of this phase, resumed
            optimizer.load_state_dict(state.pop("optimizer"))
            start = state["step"]
            if RANK == 0:
                torch.set_rng_state(state["random"])
        alone = phase == "background"
        batch = training.background_batch if alone else training.batch
        network = model.background if alone else model
        network = torch.compile(network) if GPU and training.compile else network
        network = DistributedDataParallel(network) if RANKS > 1 else network
        backgrounds = None
        if phase == "foreground":
            backgrounds = memorise_backgrounds(model, images, folder / "backgrounds.u8")
        print(f"\nphase {number + 1}, {phase}: steps {start} to {stop}\n{LOG_HEAD}")
        losses, clock = [], time.time()
        model.train()
        for step in range(start, stop):
            lr = set_learning_rate(optimizer, phase, step, training)
            x, behind = load_batch(images, backgrounds, step, batch, training)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU and training.bf16):
                if alone:
                    loss = astseg.robust_background_loss(x, *network(x))
                else:
                    weight = training.entropy_weight, training.entropy_warmup
                    loss = astseg.full_loss(x, network(x, behind), step, *weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # Plumbing from here on: log, evaluate, save.
            losses.append(loss.detach())
            done, last = step + 1, step + 1 == stop
            judge = not alone and (last or done % training.evaluate_every == 0)
            save = last or done % training.checkpoint_every == 0
            if judge or save or done % training.log_every == 0:
                mean, speed = torch.stack(losses).mean().item(), len(losses) * batch
                if not math.isfinite(mean):
                    raise FloatingPointError(f"the loss of {phase} is {mean} by step {done}: "
                                             f"lower the rate, or --resume {folder}")  # fmt: skip
                line = {"phase": phase, "step": done, "lr": lr, "loss": mean,
                        "images/s": speed / (time.time() - clock)}  # fmt: skip
                if RANK == 0:
                    report(model, parts["val"] if judge else None, line, state["log"], folder)
                losses, clock = [], time.time()
                model.train()
            if save and RANK == 0:
                state |= dict(phase=number, step=done, seconds=time.time() - started,
                              random=torch.get_rng_state(), model=model.state_dict())  # fmt: skip
                whole = state | dict(optimizer=optimizer.state_dict())
                torch.save(whole, folder / "checkpoint.tmp")
                os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
        if RANK == 0:
            (folder / "backgrounds.u8").unlink(missing_ok=True)
    return model, parts, state["log"], time.time() - started


COLUMNS = {"step": 7, "lr": 9, "loss": 9, "mIoU": 8, "ARI-FG": 8, "foreground": 12, "active": 8,
           "clamped": 9, "alpha_0": 9, "images/s": 10}  # fmt: skip
LOG_HEAD = "".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def report(model, validation, line, log, folder):
    """Complete a line of the log, print and write it; warn of a dead run."""
    line["alpha_0"] = model.renderer.log_alpha_0.exp().mean().item()
    if validation is not None:
        some = Images(*(x if x is None else x[:200] for x in validation))
        line |= evaluate(model, some)
        (folder / "training").mkdir(exist_ok=True)
        picture = folder / "training" / f"{line['step']:06d}.png"
        rows = segmentation_rows(model, some, 4)
        picture_grid({f"step {line['step']}": rows.pop("input")} | rows, picture)
    log.append(line)
    (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    cells = (f"{line[k]:{w}.4g}" if k in line else " " * w for k, w in COLUMNS.items())
    print("".join(cells), flush=True)
    if line.get("foreground", 1) < 0.005:
        print("warning: no foreground yet: train longer, raise --lr or lower --log_alpha_0")
    if line.get("clamped", 0) > 0.5:
        print("warning: most positions are clamped at the border: lower --lr, lengthen --warmup")


# ---- Evaluation (section 5.1) and pictures ----

METRICS = ("mIoU", "mIoU-FG", "ARI-FG", "MSC-FG", "MSE")


@torch.no_grad()
def evaluate(model, data):
    """Metrics and signs of health, each the mean over the Images; without labels MSE alone."""
    slots, rows = model.eval().config.slots, []
    for start in range(0, len(data.images), 50):
        part = slice(start, start + 50)
        images = to_float(data.images[part])
        output = model(images)
        labels = output.weights.argmax(1)
        row = {
            "MSE": astseg.squared_error(images, output.reconstruction),
            "foreground": (labels > 0).float().mean((1, 2)),
            "active": F.one_hot(labels, slots + 1).amax((1, 2))[:, 1:].sum(1),
            "clamped": (output.latents.position.abs() == 1).any(2).float().mean(1),
        }
        if data.labels is not None:
            pair = data.labels[part].to(DEVICE), labels, slots
            row["mIoU"], row["mIoU-FG"] = astseg.mean_iou(*pair)
            row["ARI-FG"] = astseg.adjusted_rand_index(*pair)
            row["MSC-FG"] = astseg.segmentation_covering(*pair)
        rows.append(row)
    return {name: torch.cat([r[name].double().cpu() for r in rows]).mean().item() for name in row}


def print_row(name, metrics):
    """A row of a table as Table 1, in per cent but for the MSE."""
    cells = [f"{metrics.get(m, math.nan) * (1 if m == 'MSE' else 100):10.2f}" for m in METRICS]
    print(f"{name:20}" + "".join(cells))


TABLE_HEAD = f"{'':20}" + "".join(f"{name:>10}" for name in METRICS)
COLORS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 187, 0), (148, 103, 189),
          (23, 190, 207), (227, 119, 194), (255, 127, 14))  # fmt: skip
PALETTE = torch.tensor([(0, 0, 0), *(COLORS[k % 8] for k in range(255))])  # 0 is the background


def colored(labels):
    """Label maps (..., H, W) -> (..., 3, H, W) in [0, 1]."""
    return PALETTE[labels.long().cpu()].movedim(-1, -3) / 255


@torch.no_grad()
def segmentation_rows(model, data, count):
    """Rows of pictures of the first images, as in Figure 2."""
    images = to_float(data.images[:count])
    output, rows = model.eval()(images), {"input": images}
    if data.labels is not None:
        rows["truth"] = colored(data.labels[:count])
    rows["segments"] = colored(output.weights.argmax(1))
    return rows | {"reconstruction": output.reconstruction, "background": output.background}


@torch.no_grad()
def slot_rows(model, data, count=3):
    """Rows of pictures of each slot: attention map with its soft-argmax, glimpse, layer."""
    images, rows = to_float(data.images[:count]), {}
    out, size = model.eval()(images), images.shape[2:]
    weights, (colors, masks) = out.weights[:, 1:, None], out.glimpses.split([3, 1], dim=2)
    layers = weights * out.layers + (1 - weights) * 0.85  # grey where a slot does not show
    glimpses = masks * colors + (1 - masks) * 0.85
    for b in range(len(images)):
        maps = F.interpolate(out.attention[b, :, None], size)  # (K, 1, H, W)
        maps = (maps / maps.amax((2, 3), keepdim=True)).repeat(1, 3, 1, 1)
        places = (out.attention_position[b] + 1) / 2 * (torch.tensor(size[::-1]).to(maps) - 1)
        for picture, (x, y) in zip(maps, places.round().int().tolist()):
            for channel, value in enumerate((1, 0, 0)):  # a red cross
                picture[channel, y, max(0, x - 3) : x + 4] = value
                picture[channel, max(0, y - 3) : y + 4, x] = value
        rows[f"attention {b + 1}"] = [images[b], *maps]
        rows[f"glimpse {b + 1}"] = [out.background[b], *F.interpolate(glimpses[b], size)]
        rows[f"layer {b + 1}"] = [out.reconstruction[b], *layers[b]]
    return rows


def picture_grid(rows, path):
    """Save rows {name: pictures (3, H, W) in [0, 1]} as one picture, twice as large, with names."""
    rows = {name: [F.pad(p.cpu(), (1,) * 4, value=1.0) for p in row] for name, row in rows.items()}
    strips = [torch.cat(row, dim=2) for row in rows.values()]
    pixels = (torch.cat(strips, 1).clamp(0, 1) * 255).byte().movedim(0, 2).numpy()
    pixels = pixels.repeat(2, 0).repeat(2, 1)
    canvas = Image.new("RGB", (pixels.shape[1] + 100, len(pixels)), "white")
    canvas.paste(Image.fromarray(pixels), (100, 0))
    for i, name in enumerate(rows):
        place = (4, (i + 0.4) * len(pixels) / len(rows))
        ImageDraw.Draw(canvas).text(place, name, "black", font_size=14)
    canvas.save(path)


def write_results(model, data, log, folder, facts):
    """The model, metrics.json and the pictures of a finished run."""
    model.save_pretrained(folder / "model")
    metrics = evaluate(model, data)
    results = {name: metrics[name] for name in METRICS if name in metrics} | facts
    (folder / "metrics.json").write_text(json.dumps(results, indent=1))
    picture_grid(segmentation_rows(model, data, 10), folder / "segmentation.png")
    picture_grid(slot_rows(model, data), folder / "slots.png")
    frames = map(astseg.open_image, sorted((folder / "training").glob("*.png")))
    options = dict(save_all=True, append_images=frames, duration=500, loop=0)
    next(frames).save(folder / "training.gif", **options)
    figure = Figure((12, 3), layout="constrained")
    axes, two = figure.subplots(1, 3), ("foreground", "joint")
    for place, key, phases in ((0, "loss", ("background",)), (1, "loss", two), (2, "mIoU", two),
                               (2, "ARI-FG", two)):  # fmt: skip
        lines = [line for line in log if line["phase"] in phases and key in line]
        axes[place].plot([x["step"] for x in lines], [x[key] for x in lines], label=key)
        axes[place].set(xlabel="step", title=", ".join(phases))
        axes[place].legend()
    figure.savefig(folder / "curves.png", dpi=100)
    print(f"\n{TABLE_HEAD}")
    print_row(f"AST-Seg, seed {facts['seed']}", metrics)
    print(f"{folder}: {facts['images']} test images, {facts['seconds']} s in all")


# ---- Use of a trained model ----


def load_model(folder):
    """The trained model of a run folder, in evaluation mode."""
    done = (folder / "model" / "model.safetensors").exists()
    require(done, f"{folder} is no folder of a finished run")
    return ASTSeg.from_pretrained(str(folder / "model"), strict=True).to(DEVICE).eval()


@torch.no_grad()
def segment_files(folder, paths, output):
    """Write <stem>_labels.png, _overlay.png and _objects.json for each image, one at a time.

    An image is cropped at its centre to the model's aspect; what is reported is in its own pixels.
    """
    model, names = load_model(folder), {path.stem for path in paths}
    require(len(names) == len(paths), "two images have one name: their results would collide")
    output.mkdir(parents=True, exist_ok=True)
    size = model.config.height, model.config.width
    for path in paths:
        image = astseg.read_image(path)
        left, top, right, bottom = box = astseg.centre_crop(image.size, *size)
        pixels, _ = astseg.crop_and_resize(image, None, *size)
        out = model(to_float(torch.from_numpy(pixels)[None]))
        small = Image.fromarray(out.weights[0].argmax(0).byte().cpu().numpy())
        picture = Image.new("P", image.size)  # 0, the background, around the crop
        picture.putpalette(PALETTE.flatten().tolist())
        picture.paste(small.resize((right - left, bottom - top), Image.Resampling.NEAREST), box)
        labels, objects = np.array(picture), []
        for k in np.unique(labels[labels > 0]).tolist():
            rows, columns = np.nonzero(labels == k)
            position, scale, activation, _ = (x[0, k - 1].cpu().numpy() for x in out.latents)
            crop = np.array((right - left, bottom - top))
            objects.append(dict(
                label=k, position=((left, top) + (position + 1) / 2 * crop).tolist(),
                glimpse_size=(crop / scale).tolist(),
                activation=float(activation), pixels=len(rows),
                box=[int(x) for x in (columns.min(), rows.min(), columns.max(), rows.max())],
            ))  # fmt: skip
        half = Image.fromarray((labels > 0) * np.uint8(128))
        overlay = Image.composite(picture.convert("RGB"), image, half)
        picture.save(output / f"{path.stem}_labels.png")
        overlay.save(output / f"{path.stem}_overlay.png")
        (output / f"{path.stem}_objects.json").write_text(json.dumps(objects, indent=1))
        print(f"{path}: {len(objects)} objects -> {output}/{path.stem}_labels.png")


def evaluate_runs(folders, given, part):
    """A row of metrics for each run and, for several, their mean and standard deviation."""
    rows = []
    for folder in folders:
        config, training = read_settings(folder)
        training = replace(training, **({"masks": ""} | given if "data" in given else given))
        data = load_data(config, training).get(part, Images([], None))
        require(len(data.images), f"{training.dataset} {training.data} has no {part} part")
        require(data.labels is not None, f"{training.data} has no label maps: name them by --masks")
        rows.append(evaluate(load_model(folder), data))
        (folder / f"evaluation-{training.dataset}-{part}.json").write_text(json.dumps(rows[-1]))
    print(TABLE_HEAD)
    for folder, row in zip(folders, rows):
        print_row(folder.name, row)
    if len(rows) > 1:
        print_row("mean", {m: np.mean([row[m] for row in rows]) for m in METRICS})
        print_row("deviation", {m: np.std([row[m] for row in rows], ddof=1) for m in METRICS})


# ---- Command line: a flag for each setting ----


def split_settings(settings):
    """One dictionary of settings -> Config, Training."""
    names = {field.name for field in fields(Config)}
    config = Config(**{name: value for name, value in settings.items() if name in names})
    return config, Training(**{n: value for n, value in settings.items() if n not in names})


def read_settings(folder):
    path = folder / "settings.json"
    require(path.exists(), f"{path} is missing: there is no run in that folder")
    return split_settings(json.loads(path.read_text()))


def boolean(text):
    return bool(("false", "true").index(text.lower()))  # a ValueError for anything else


def parse(arguments):
    """The flags that were given, name -> value."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--setting value ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    for name, count in (("resume", None), ("evaluate", "+"), ("segment", "+"), ("output", None)):
        parser.add_argument(f"--{name}", type=Path, nargs=count, metavar="PATH")
    parser.add_argument("--part", choices=("test", "val", "train", "all"))
    parser.add_argument("--preset", choices=("shapes", "small", "paper"))
    for field in (*fields(Config), *fields(Training)):
        flag, kind, choices = f"--{field.name}", field.type, get_args(field.type) or None
        options = dict(help=f"default {field.default}", metavar=None if choices else kind.__name__)
        if kind is bool:
            parser.add_argument(flag, type=boolean, nargs="?", const=True, **options)
            no = dict(dest=field.name, action="store_const", const=False, help=argparse.SUPPRESS)
            parser.add_argument(f"--no_{field.name}", **no)
        else:
            parser.add_argument(flag, type=str if choices else kind, choices=choices, **options)
    return vars(parser.parse_args(arguments))


def main(arguments=None):
    given = parse(arguments)
    data = {"dataset", "data", "masks", "cache", "part"}
    for command, others in (("resume", set()), ("segment", {"output"}), ("evaluate", data)):
        wrong = given.keys() - others - {command} if command in given else ()
        require(not wrong, f"--{command} takes the run's own settings: leave out {sorted(wrong)}")
    if "segment" in given:
        folder, *paths = given["segment"]
        require(paths, "--segment takes a run folder and then at least one image")
        return segment_files(folder, paths, given.get("output", folder / "segmented"))
    if RANKS > 1 and not dist.is_initialized():
        if GPU:
            torch.cuda.set_device(DEVICE)
        dist.init_process_group(timeout=timedelta(days=1))  # the first one may decode for hours
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    for name in {"data", "masks", "cache"} & given.keys():
        given[name] = given[name] and os.path.abspath(given[name])
    if "evaluate" in given:
        return evaluate_runs(given.pop("evaluate"), given, given.pop("part", "test"))
    dataset, resume = given.get("dataset", "shapes"), "resume" in given
    folder = given.pop("resume", None) or given.pop("output", Path("runs", dataset))
    exists = (folder / "checkpoint.pt").exists()
    require(exists or not resume, f"{folder} has no checkpoint to resume from")
    inside = Path(given.get("data") or "/dev/null") in folder.absolute().parents
    require(not inside, f"{folder} is inside the data: name another --output")
    require("part" not in given, "--part is for --evaluate only")
    require(resume or not exists, f"{folder} holds a run: --resume it, or name another --output")
    if resume:
        config, training = read_settings(folder)
    else:
        paper = astseg.PAPER_SETTINGS.get(dataset, {}) | dict(checkpoint_every=5000)
        paper |= dict(background_steps=2500) if dataset == "clevr" else {}
        preset = given.pop("preset", "shapes" if dataset == "shapes" else "paper")
        preset = {"shapes": SHAPES, "small": SMALL, "paper": paper}[preset]
        config, training = split_settings(preset | given)
    model, parts, log, seconds = train(config, training, folder, resume)
    if RANK == 0:
        facts = dict(images=len(parts["test"].images), seconds=round(seconds), seed=training.seed)
        write_results(model, parts["test"], log, folder, facts)
    wait()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    try:
        main()
        if RANKS > 1:
            dist.destroy_process_group()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; a run goes on from its last checkpoint by --resume")
