"""Train, evaluate and use AST-Seg: the paper's whole curriculum in one plain loop.

    python train.py                               the embedded data set, in ten minutes on two cores
    python train.py --dataset clevrtex --data DIR a data set of the paper, with the paper's settings
    python train.py --dataset folder --data DIR --slots 6 --preset small       images of your own
    python train.py --resume                      go on where an interrupted run stopped
    python train.py --evaluate runs/shapes        metrics of a trained run, or of several
    python train.py --segment runs/shapes a.png   label map, overlay and objects of your images
    python train.py --benchmark                   speed and memory of each phase
    torchrun --nproc_per_node 4 train.py ...      the same on several GPUs
    python train.py --help                        every setting

A run folder holds model/ (loads with ASTSeg.from_pretrained), checkpoint.pt, settings.json,
log.jsonl, metrics.json, segmentation.png, slots.png and curves.png.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import HfArgumentParser

import astseg
from astseg import ASTSeg, Config, Images, setting, write_beside, write_json

# -------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Training:
    """The curriculum and its optimisers, by default the paper's for CLEVRTEX (Table 6)."""

    scenario: Literal["CT", "BT", "frozen"] = setting(
        "CT", "Curriculum training, baseline training, or background frozen to the end (Table 4)."
    )
    background_steps: int = setting(500_000, "Steps of phase 1; 2 500 for a fixed background.")
    background_batch: int = setting(128, "Images a step of phase 1.")
    background_lr: float = setting(2e-3, "Learning rate of phase 1.")
    background_choice: bool = setting(
        False, "Choose simple or complex by a short phase 1, as [38] does, not by background_kind."
    )
    steps: int = setting(125_000, "Steps of phases 2 and 3 together.")
    phase2_steps: int = setting(30_000, "Steps of phase 2, with a frozen background.")
    batch: int = setting(64, "Images a step of phases 2 and 3.")
    lr: float = setting(4e-5, "Learning rate of phases 2 and 3.")
    warmup: int = setting(5_000, "Steps of the quadratic warm-up of that learning rate.")
    decay_at: float = setting(0.9, "Share of phases 2 and 3 after which it falls to a tenth.")
    refinement_lr_factor: float = setting(1.0, "Factor on it for the whole refinement.")
    renderer_lr_factor: float = setting(1.0, "Factor on it for the glimpse generator and alpha_0.")
    # open: weights are random unless they are named, since not every machine reaches a hub
    pretrained: str = setting(
        "", "Backbone weights, a hub name or a folder; the paper's are nvidia/mit-b3."
    )
    bf16: bool = setting(True, "Use bf16 autocast where there is a GPU.")
    compile: bool = setting(True, "Use torch.compile where there is a GPU.")
    flip: bool = setting(False, "Mirror training images left to right at random; not in the paper.")
    train_images: int = setting(10_000, "Images that the embedded data set draws for training.")
    seed: int = setting(0, "Seed of the weights and of the order of images.")

    def __post_init__(self):
        for name in ("background_batch", "batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 2")
        factors = ("refinement_lr_factor", "renderer_lr_factor")
        for name in ("background_lr", "lr", "steps", "background_steps", *factors):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.train_images < 1:
            raise ValueError(f"train_images is {self.train_images}: it must be at least 1")
        if not 0 <= self.phase2_steps <= self.steps:
            raise ValueError(
                f"phase2_steps is {self.phase2_steps} and steps {self.steps}: "
                "phase 2 is a part of all steps"
            )
        if not 0 < self.decay_at <= 1:
            raise ValueError(f"decay_at is {self.decay_at}: it must be in (0, 1]")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}: it cannot be negative")


PATHS = ("data", "masks", "cache")
INTERVALS = ("log_every", "evaluate_every", "evaluate_images", "checkpoint_every")
# What a resumed run may change: where its files are, what its machine can hold, a rate too high.
CHANGEABLE = (
    *PATHS, *INTERVALS, "bf16", "compile", "batch", "background_batch", "lr", "background_lr",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What to do, and where."""

    dataset: Literal[("shapes", *astseg.DATASETS)] = setting(
        "shapes", "Data set: shapes is drawn by the program, folder takes any images."
    )
    data: str = setting("", "Folder or file of the data set.")
    masks: str = setting("", "Folder of label maps, of the same names as the images of a folder.")
    cache: str = setting("cache", "Where a data set's arrays are kept, once it is decoded.")
    preset: Literal["", "shapes", "small", "paper"] = setting(
        "", "Settings to start from: by default shapes for shapes, paper for all else."
    )
    part: Literal["test", "val", "train", "all"] = setting("test", "Part that --evaluate takes.")
    output: str = setting("", "Run folder; by default runs/<dataset>.")
    resume: bool = setting(False, "Go on from the run folder's last checkpoint.")
    evaluate: Optional[list[str]] = setting(None, "Evaluate these run folders and stop.")
    segment: Optional[list[str]] = setting(
        None, "A run folder, then images to segment with its model."
    )
    benchmark: int = setting(
        0, "Time each phase over so many steps, by default 200, and stop.", nargs="?", const=200
    )
    log_every: int = setting(100, "Steps between lines of losses.")
    evaluate_every: int = setting(500, "Steps between evaluations on validation images.")
    evaluate_images: int = setting(200, "How many of those images at most.")
    checkpoint_every: int = setting(500, "Steps between checkpoints.")

    def __post_init__(self):
        for name in INTERVALS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.dataset != "shapes" and not self.data and not self.resume and not self.segment:
            raise ValueError(f"the data set {self.dataset} is read from files: name them by --data")


# Two CPU cores: small sizes and short schedules, every component. The README says what each
# departure from the paper is for.
SMALL = dict(
    height=64, width=64, anisotropic=False, backbone="tiny", dropout=0.0,
    dim_transformer=128, dim_feedforward=256, transformer_layers=2,
    refinement_start="identity", refinement_lr_factor=0.1, renderer_lr_factor=3.0,
    scale_max=10.0, log_alpha_0=4.0, entropy_weight=0.015, entropy_warmup=3000,
    background_kind="simple", background_width=0.25,
    background_steps=1500, background_batch=16, background_lr=5e-4,
    steps=17_000, phase2_steps=15_000, batch=32, lr=1e-3, warmup=500, decay_at=0.6,
)  # fmt: skip
PRESETS = {
    "small": SMALL,
    "shapes": {
        **SMALL, **dict(
            height=48, width=48, slots=4, scale_max=6.0, log_alpha_0=4.5,
            entropy_weight=0.02, entropy_warmup=1000, background_batch=8,
            steps=5200, phase2_steps=4100, warmup=100, decay_at=0.65, train_images=8000,
        ),
    },
}  # fmt: skip


def preset(run: Run) -> dict:
    """The settings that a run starts from, before its flags."""
    name = run.preset or ("shapes" if run.dataset == "shapes" else "paper")
    if name != "paper":
        return PRESETS[name]
    family = run.dataset  # variants have the settings of the data set itself
    if family in astseg.CLEVRTEX_VARIANTS:
        family = "clevrtex"
    if family in astseg.OBJECTSROOM_VARIANTS:
        family = "objectsroom"
    phase1 = dict(background_steps=2500) if family == "clevr" else {}
    # A checkpoint of 1.4 GB every 500 steps would be one every few seconds.
    intervals = dict(evaluate_every=2500, checkpoint_every=5000)
    return {**astseg.PAPER_SETTINGS.get(family, {}), **phase1, **intervals}


# -------------------------------------------------------------------------------------------------
# Several processes, started by torchrun; with one, all of this does nothing


def world() -> tuple[int, int]:
    """Rank of this process and number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes() -> None:
    """Join the processes that torchrun started; only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend, device, number = "gloo", None, int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs and more processes: "
                "lower --nproc_per_node"
            )
        backend, device = "nccl", torch.device("cuda", number)
        torch.cuda.set_device(device)
    # A day: the first process may decode a data set for hours while the others wait.
    dist.init_process_group(backend, timeout=timedelta(days=1), device_id=device)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def first_process_first():
    """Let the first process do what the others then find done (a cache, a folder)."""
    if world()[0] > 0:
        dist.barrier()
    yield
    if world()[1] > 1 and world()[0] == 0:
        dist.barrier()


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is summed likewise."""

    @staticmethod
    def forward(context, tensor):
        return summed(tensor.clone())

    @staticmethod
    def backward(context, gradient):
        return summed(gradient.clone())


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes (PyTorch's own one needs a GPU)."""

    @torch.compiler.disable  # compiled, PyTorch 2.11 would get its gradients wrong
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x32, ranks = astseg.at_least_float32(x), world()[1]
        mean = SumOverProcesses.apply(x32.mean((0, 2, 3))) / ranks
        centered = x32 - mean[:, None, None]
        variance = SumOverProcesses.apply(centered.square().mean((0, 2, 3))) / ranks
        with torch.no_grad():
            count = ranks * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if world()[1] > 1 and type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronisedBatchNorm


# -------------------------------------------------------------------------------------------------
# Data: bytes on the GPU where they fit, else mapped into memory, so that the loop never waits for a
# decoder


def load_data(part: str, config: Config, training: Training, run: Run) -> Images:
    """The images of one part of a data set ("train", "val" or "test"; files also have "all")."""
    if run.dataset == "shapes":
        sizes = {"train": (training.train_images, 1), "val": (200, 2), "test": (500, 3)}
        if part not in sizes:
            raise ValueError(f"the embedded data set has no part {part!r}: use train, val or test")
        return astseg.draw_shapes(*sizes[part], config.height)
    return load_parts(run.dataset, run.data, run.masks, run.cache, config.size)[part]


@lru_cache(maxsize=1)
def open_data(dataset: str, data: str, masks: str) -> tuple[astseg.Source, list[Optional[Path]]]:
    """A data set before it is decoded, and the full paths of its data and masks."""
    paths = [Path(path).resolve() if path else None for path in (data, masks)]
    return astseg.open_source(dataset, *paths), paths


@lru_cache(maxsize=1)
def load_parts(dataset: str, data: str, masks: str, cache: str, size: tuple) -> dict[str, Images]:
    source, paths = open_data(dataset, data, masks)
    where = zlib.crc32(str(paths).encode())
    folder = Path(cache) / f"{dataset}-{size[0]}x{size[1]}-{where:08x}"
    with first_process_first():
        return astseg.cached_parts(source, folder, *size)


def on_device(images: torch.Tensor) -> torch.Tensor:
    """Images on the GPU, if they and their backgrounds fit into half of its free memory."""
    if torch.cuda.is_available() and 4 * images.nbytes < torch.cuda.mem_get_info()[0]:
        return images.to("cuda")
    return images


@lru_cache(maxsize=1)
def permutation(count: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)


def batch_indices(step: int, batch: int, count: int, seed: int, device="cpu") -> torch.Tensor:
    """Indices of a step, epochs in random order, a function of the step alone: (batch,).

    Several processes share a batch; each gets its own part of the indices.
    """
    rank, ranks = world()
    epoch, position = divmod(step, count // batch)
    order = permutation(count, seed * 100_003 + epoch, torch.device(device))
    return order[position * batch + rank : (position + 1) * batch : ranks]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in [0, 1]."""
    return images.float() / 255


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def memorise_backgrounds(
    model: ASTSeg, images: torch.Tensor, path: Optional[Path] = None
) -> torch.Tensor:
    """Backgrounds of all images by the frozen autoencoder, computed once: (N, 3, H, W) uint8.

    They are kept where the images are, or in the file `path`, one for each process.
    """
    model.eval()
    needed = images.nbytes * world()[1]
    if path is None:
        memory = torch.empty_like(images)
    elif shutil.disk_usage(path.parent).free > needed:
        memory = torch.from_file(str(path), True, images.numel(), dtype=torch.uint8)
        memory = memory.view(images.shape)
    else:
        raise OSError(f"the backgrounds need {needed:,} bytes: free them for {path}")
    for part, target in zip(images.split(100), memory.split(100)):
        # open: memorised at 8 bits a channel, rounded
        target.copy_((model.background(to_float(part.to(device_of(model))))[0] * 255).round())
    return memory


# -------------------------------------------------------------------------------------------------
# The curriculum (section 4.2.2)


class Phase(NamedTuple):
    name: str  # "background", "foreground" (frozen background) or "joint"
    start: int  # first step; foreground and joint share one counter
    stop: int


def curriculum(training: Training) -> list[Phase]:
    """The phases of a scenario, in order."""
    background = Phase("background", 0, training.background_steps)
    if training.scenario == "BT":
        return [Phase("joint", 0, training.steps)]
    if training.scenario == "frozen":
        return [background, Phase("foreground", 0, training.steps)]
    return [
        background,
        Phase("foreground", 0, training.phase2_steps),
        Phase("joint", training.phase2_steps, training.steps),
    ]


def make_optimizer(model: ASTSeg, phase: Phase, training: Training) -> torch.optim.Optimizer:
    """The optimiser of a phase; only what the phase trains has gradients from here on."""
    model.requires_grad_(phase.name == "joint")
    if phase.name == "background":
        model.background.requires_grad_(True)
        # open: AdamW with its default betas and no weight decay in phase 1
        return torch.optim.AdamW(model.background.parameters(), weight_decay=0.0, fused=True)
    parts = [
        (model.generator, 1.0),
        (model.encoder, training.refinement_lr_factor),  # all its parameters are the refinement's
        (model.renderer, training.renderer_lr_factor),
    ]
    if phase.name == "joint":
        parts.append((model.background, 1.0))
    groups = []
    for part, factor in parts:
        part.requires_grad_(True)
        groups.append(dict(params=list(part.parameters()), factor=factor))
    groups = [group for group in groups if group["params"]]  # there may be no refinement
    # open: a fresh Adam takes all parameters at the start of phase 3, at full rate
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-9, fused=True)


def set_learning_rate(optimizer, phase: Phase, step: int, training: Training) -> float:
    # open: update number t uses the rate of step t + 1, the entropy weight of step t
    if phase.name == "background":
        # open: a tenth of the rate from 80 % of the steps on, in phase 1
        lr = astseg.learning_rate(step + 1, training.background_lr, phase.stop, decay_at=0.8)
    else:
        t = training
        lr = astseg.learning_rate(step + 1, t.lr, t.steps, t.warmup, t.decay_at)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    return lr


class PhaseLoss(nn.Module):
    """The loss of a phase, as a module that DistributedDataParallel can wrap."""

    def __init__(self, model: ASTSeg, phase: Phase, compile: bool = False):
        super().__init__()
        self.phase, self.config = phase, model.config
        network = model.background if phase.name == "background" else model
        # Evaluation, with batches of other sizes, calls the model itself: nothing is recompiled.
        self.network = torch.compile(network) if compile else network

    def forward(self, step: int, images: torch.Tensor, background: Optional[torch.Tensor] = None):
        """Step, images (B, 3, H, W) and their memorised backgrounds in phase 2 -> ()."""
        if self.phase.name == "background":
            return astseg.robust_background_loss(images, *self.network(images))
        output = self.network(images, background)
        c = self.config
        return astseg.full_loss(images, output, step, c.entropy_weight, c.entropy_warmup)


# -------------------------------------------------------------------------------------------------
# Checkpoints: written beside and renamed, the previous one kept


@dataclass
class Progress:
    """All that a resumed run needs besides the model's weights."""

    settings: dict  # of the run that it belongs to
    phase: int = 0  # index into curriculum(...)
    step: int = 0  # steps done in that phase's counter
    seconds: float = 0.0  # spent so far
    started: float = 0.0  # when this run would have started, had it not been interrupted
    history: list = dataclasses.field(default_factory=list)  # lines of log.jsonl


def save_checkpoint(folder: Path, model: ASTSeg, optimizer, progress: Progress) -> None:
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise_not_finite(folder, progress)
    state = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict() if optimizer else None,
        progress=dataclasses.asdict(progress),
        random=torch.get_rng_state(),
        random_cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )

    def write(path: Path):
        torch.save(state, path)
        if (folder / "checkpoint.pt").exists():
            os.replace(folder / "checkpoint.pt", folder / "checkpoint.previous.pt")

    write_beside(folder / "checkpoint.pt", write)


def load_checkpoint(folder: Path) -> dict:
    """The last checkpoint that is whole; a damaged one is named and the previous one used."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged archive makes torch raise
            reason = str(error).splitlines()[0]
            print(f"warning: {path} is damaged and not used ({reason})", file=sys.stderr)
    raise FileNotFoundError(f"{folder} has no usable checkpoint: start it without --resume")


def raise_not_finite(folder: Path, progress: Progress):
    last = folder / "checkpoint.pt"
    hint = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written"
    raise FloatingPointError(
        f"the loss or a weight is not finite by step {progress.step} of phase {progress.phase + 1}"
        f": {hint}; go on with --resume and a lower --lr (of the background alone: "
        "--background_lr) or, if it came with bf16, --no_bf16"
    )


# -------------------------------------------------------------------------------------------------
# Evaluation (section 5.1)

METRICS = ("mIoU", "mIoU-FG", "ARI-FG", "MSC-FG", "MSE")


@torch.no_grad()
def evaluate(model: ASTSeg, data: Images) -> dict[str, float]:
    """Metrics and signs of health, each the mean over the images.

    Without label maps MSE is the only metric. Several processes share the images.
    """
    model.eval()
    (rank, ranks), slots, device = world(), model.config.slots, device_of(model)
    names = ("MSE", "foreground", "active", "clamped", *METRICS[:4])
    names = names if data.labels is not None else names[:4]
    scores = torch.zeros(len(names), len(data.images), dtype=torch.float64)
    for start in range(50 * rank, len(data.images), 50 * ranks):
        part = slice(start, start + 50)
        images = to_float(data.images[part].to(device))
        output = model(images)
        labels = output.weights.argmax(1)
        rows = [
            astseg.squared_error(images, output.reconstruction),
            (labels > 0).float().mean((1, 2)),
            sum((labels == k).any(2).any(1) * 1.0 for k in range(1, slots + 1)),
            (output.position.abs() == 1).any(2).float().mean(1),
        ]
        if data.labels is not None:
            target = data.labels[part].to(device).long()
            rows += astseg.mean_iou(target, labels, slots)
            rows.append(astseg.adjusted_rand_index(target, labels, slots))
            rows.append(astseg.segmentation_covering(target, labels, slots))
        scores[:, part] = torch.stack([row.double().cpu() for row in rows])
    scores = summed(scores.to(device if ranks > 1 else "cpu"))
    return dict(zip(names, scores.mean(1).tolist()))


def table_row(name: str, metrics: dict) -> str:
    """A row as in Table 1, with a dash for what is not known."""
    cells = [f"{100 * metrics[m]:.2f}" if m in metrics else "-" for m in METRICS[:4]]
    return "{:24}{:>10}{:>10}{:>12}{:>9}{:8.1f}".format(name, *cells, metrics["MSE"])


TABLE_HEAD = "{:24}{:>10}{:>10}{:>12}{:>9}{:>8}".format(
    "Model", "mIoU (%)", "mIoU-FG", "ARI-FG (%)", "MSC-FG", "MSE"
)


# -------------------------------------------------------------------------------------------------
# Training


class Job(NamedTuple):
    """What all phases of a run share."""

    model: ASTSeg
    images: torch.Tensor  # (N, 3, H, W), uint8, on the GPU or mapped into memory
    validation: Images
    training: Training
    run: Run
    folder: Path
    progress: Progress


def make_job(config: Config, training: Training, run: Run, folder: Path) -> Job:
    """Data and a model of random (or pretrained) weights, on the device."""
    torch.manual_seed(training.seed)
    images = load_data("train", config, training, run).images
    ranks, largest = world()[1], max(training.batch, training.background_batch)
    if len(images) < largest:
        raise ValueError(
            f"there are {len(images)} training images, and one batch needs {largest}: "
            "lower --batch and --background_batch"
        )
    if training.batch % ranks or training.background_batch % ranks:
        raise ValueError(
            f"batch is {training.batch} and background_batch {training.background_batch}: "
            f"the {ranks} processes must divide both"
        )
    validation = load_data("val", config, training, run)
    validation = Images(*(x if x is None else x[: run.evaluate_images] for x in validation))
    model = ASTSeg(config).to("cuda" if torch.cuda.is_available() else "cpu")
    synchronise_batch_norm(model)
    if training.pretrained and not run.resume:
        model.generator.load_backbone(training.pretrained)
    torch.manual_seed(training.seed + 1000 * world()[0])  # processes draw their own dropouts
    return Job(model, on_device(images), validation, training, run, folder, Progress({}))


def train(config: Config, training: Training, run: Run, folder: Path) -> Job:
    """The whole curriculum, from the start or from a checkpoint."""
    started = time.time()
    state = load_checkpoint(folder) if run.resume else None
    job = make_job(config, training, run, folder)
    settings = {**flat_settings(config, training, run), "training images": len(job.images)}
    progress = Progress(**state["progress"]) if state else Progress(settings)
    check_same_settings(folder, progress.settings, settings)
    progress.settings = settings
    if world()[0] == 0:
        write_json(folder / "settings.json", flat_settings(config, training, run))
    progress.started = started - progress.seconds
    job = job._replace(progress=progress)
    if state:
        job.model.load_state_dict(state["model"])
    # A set that is mapped from a file has its backgrounds in one as well.
    in_memory = run.dataset == "shapes" or job.images.is_cuda
    memory = None if in_memory else folder / f"backgrounds.{world()[0]}.u8"

    phases = curriculum(training)
    for number, phase in enumerate(phases[progress.phase :], progress.phase):
        optimizer = make_optimizer(job.model, phase, training)
        if state:
            optimizer.load_state_dict(state["optimizer"])
            restore_random_state(state)
            state = None
        else:
            progress.phase, progress.step = number, phase.start
        title = f"phase {number + 1} of {len(phases)}, {PHASE_TITLES[phase.name]}"
        print(f"\n{title}: steps {progress.step} to {phase.stop}\n{LINE_HEAD}")
        try:
            with memory_explained(phase, training):
                backgrounds = None
                if phase.name == "foreground":
                    backgrounds = memorise_backgrounds(job.model, job.images, memory)
                run_phase(job, phase, optimizer, backgrounds)
        finally:
            backgrounds = None  # which closes its file; a killed run may have left others
            for path in folder.glob("backgrounds.*.u8"):
                path.unlink(missing_ok=True)
    return job


def restore_random_state(state: dict) -> None:
    if world()[0] > 0:  # the checkpoint is the first process's; another one draws other dropouts
        return
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and state["random_cuda"] is not None:
        torch.cuda.set_rng_state(state["random_cuda"])


def batch_size(phase: Phase, training: Training) -> int:
    return training.background_batch if phase.name == "background" else training.batch


def load_batch(job: Job, phase: Phase, step: int, backgrounds: Optional[torch.Tensor]):
    """Images of a step and, in phase 2, their backgrounds: (B, 3, H, W) floats, on the device."""
    batch, device = batch_size(phase, job.training), device_of(job.model)
    index = batch_indices(step, batch, len(job.images), job.training.seed, job.images.device)
    sources = (job.images,) if backgrounds is None else (job.images, backgrounds)
    pair = [source[index] for source in sources]
    if device.type == "cuda" and not pair[0].is_cuda:  # else the copy would wait for the GPU
        pair = [x.pin_memory() for x in pair]
    pair = [to_float(x.to(device, non_blocking=True)) for x in pair]
    if job.training.flip:  # an image and its background alike
        mirrored = torch.rand(len(index), 1, 1, 1, device=device) < 0.5
        pair = [torch.where(mirrored, x.flip(3), x) for x in pair]
    return pair[0], None if backgrounds is None else pair[1]


def make_step(job: Job, phase: Phase, optimizer, backgrounds: Optional[torch.Tensor]):
    """The function that does one step of a phase: step -> loss (), still on the device."""
    training, device = job.training, device_of(job.model)
    # GPUs before Ampere can only emulate bf16.
    bf16 = training.bf16 and device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    network = PhaseLoss(job.model, phase, training.compile and device.type == "cuda")
    if world()[1] > 1:
        network = DistributedDataParallel(network)

    def do_step(step: int) -> torch.Tensor:
        images, background = load_batch(job, phase, step, backgrounds)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = network(step, images, background)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return do_step


def run_phase(job: Job, phase: Phase, optimizer, backgrounds: Optional[torch.Tensor]) -> None:
    """The loop. It waits for the device only where it logs, evaluates or saves."""
    model, _, _, training, run, folder, progress = job
    batch = batch_size(phase, training)
    do_step = make_step(job, phase, optimizer, backgrounds)
    total, since, clock = 0.0, progress.step, time.time()
    first = world()[0] == 0
    bar = tqdm(
        range(progress.step, phase.stop), phase.name, initial=progress.step, total=phase.stop,
        unit="step", disable=None if first else True, leave=False,
    )  # fmt: skip
    model.train()
    for step in bar:
        lr = set_learning_rate(optimizer, phase, step, training)
        total = total + do_step(step)

        progress.step = step + 1
        last = progress.step == phase.stop
        judge = phase.name != "background" and progress.step % run.evaluate_every == 0
        log = last or judge or progress.step % run.log_every == 0
        save = last or progress.step % run.checkpoint_every == 0
        stop = asked_to_stop(log or save or step % 20 == 0, device_of(model))
        if log or save or stop:
            mean = summed(total / world()[1]).item() / (progress.step - since)
            if not math.isfinite(mean):
                raise_not_finite(folder, progress)
        if log:
            speed = batch * (progress.step - since) / max(time.time() - clock, 1e-9)
            line = log_line(job, phase, lr, mean, speed, judge or last)
            model.train()
            bar.write(format_line(line), file=sys.stdout)
            sys.stdout.flush()
            if first:
                warn_of_known_failures(line, last)
            total, since, clock = 0.0, progress.step, time.time()
        if (save or stop) and first:
            progress.seconds = time.time() - progress.started
            write_log(folder, progress)
            save_checkpoint(folder, model, optimizer, progress)
        if stop:
            if world()[1] > 1:
                dist.barrier()  # all wait until the first has saved
            raise KeyboardInterrupt


SIGNALS = []  # those that arrived while training


@contextmanager
def signals_kept():
    """Within it SIGINT and SIGTERM are noted, so that the loop saves and ends after its step."""

    def note(number, _):
        SIGNALS.append(number)
        if number == signal.SIGINT:
            print("\nfinishing the step and saving; Ctrl-C again to stop at once", file=sys.stderr)
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        SIGNALS.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(in_step: bool, device) -> bool:
    """Whether a signal arrived; several processes compare notes only where they wait anyway."""
    if world()[1] == 1:
        return bool(SIGNALS)
    return in_step and bool(summed(torch.tensor(len(SIGNALS)).to(device)).item())


@contextmanager
def memory_explained(phase: Phase, training: Training):
    """Say which setting to lower where the memory does not suffice."""
    try:
        yield
    except RuntimeError as error:  # CUDA's OutOfMemoryError is one; the CPU has no other
        if not any(sign in str(error) for sign in ("out of memory", "allocate memory")):
            raise
        flag = "background_batch" if phase.name == "background" else "batch"
        raise MemoryError(
            f"out of memory in the {phase.name} phase with --{flag} {batch_size(phase, training)}: "
            f"go on with --resume and a lower --{flag} (where there is no checkpoint yet, without "
            "--resume), or start again with smaller images"
        ) from error


def log_line(job: Job, phase: Phase, lr, loss, images_per_second, judge: bool) -> dict:
    """One entry of log.jsonl, at intervals with the validation metrics."""
    line = dict(
        phase=job.progress.phase + 1, name=phase.name, step=job.progress.step, lr=lr, loss=loss,
        alpha_0=job.model.renderer.alpha_0.mean().item(), images_per_second=images_per_second,
    )  # fmt: skip
    if judge and phase.name != "background":
        line.update(evaluate(job.model, job.validation))
    job.progress.history.append(line)
    return line


PHASE_TITLES = {
    "background": "background alone",
    "foreground": "foreground before a frozen background",
    "joint": "foreground and background",
}
LINE_HEAD = (
    "   step       lr      loss   mIoU  ARI-FG  foreground  active  clamped  alpha_0  images/s"
)


def write_log(folder: Path, progress: Progress) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in progress.history)
    write_beside(folder / "log.jsonl", lambda path: path.write_text(lines))


def format_line(line: dict) -> str:
    def column(name: str, form: str, width: int) -> str:
        return f"{line[name]:{form}}" if name in line else " " * (width - 1) + "-"

    return (
        f"{line['step']:7d} {line['lr']:8.1e} {line['loss']:9.5f} {column('mIoU', '6.3f', 6)} "
        f"{column('ARI-FG', '7.3f', 7)} {column('foreground', '11.1%', 11)} "
        f"{column('active', '7.2f', 7)} {column('clamped', '8.1%', 8)} {line['alpha_0']:8.0f} "
        f"{line['images_per_second']:9.0f}"
    )


def warn_of_known_failures(line: dict, last: bool) -> None:
    """Name what a dead run looks like: an empty foreground at a phase's end, clamped positions."""
    if last and line.get("foreground", 1) < 0.005:
        print(
            f"warning: the foreground is still empty ({line['foreground']:.2%} of the pixels): "
            "train longer, raise --lr or lower --log_alpha_0; phase 3 would only let the "
            "background take the objects over",
            file=sys.stderr,
        )
    if line.get("clamped", 0) > 0.5:
        print(
            f"warning: {line['clamped']:.0%} of the positions are clamped at the image's border, "
            "where they get no gradient: lower --lr or lengthen --warmup",
            file=sys.stderr,
        )


# -------------------------------------------------------------------------------------------------
# Results: metrics.json and pictures


def write_results(job: Job, test: Images, metrics: dict) -> None:
    """The model, metrics.json and the pictures of a run."""
    model, folder = job.model, job.folder
    save_model(model, folder)
    write_json(folder / "metrics.json", metrics)
    draw_segmentation(model, test, folder / "segmentation.png")
    draw_slots(model, test, folder / "slots.png")
    draw_curves(job.progress.history, folder / "curves.png")


def label_colors(count: int) -> np.ndarray:
    """RGB bytes (count, 3): black for the background, then colours that are told apart easily."""
    import matplotlib

    colors = np.array(matplotlib.colormaps["tab20"].colors)
    colors = np.concatenate((colors[0::2], colors[1::2]))
    return (255 * np.vstack(([0, 0, 0], colors[np.arange(count - 1) % 20]))).astype(np.uint8)


def new_figure(rows: int, columns: int, size: tuple[float, float], ticks: bool = False):
    """A grid of axes, made without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    if not ticks:
        plt.setp(axes, xticks=[], yticks=[])
    return figure, axes


def save_figure(figure, path: Path, w_pad: float = 0.4) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout(pad=0.4, w_pad=w_pad)
    write_beside(path, lambda p: figure.savefig(p, dpi=110, bbox_inches="tight", format="png"))
    plt.close(figure)


@torch.no_grad()
def predict(model: ASTSeg, data: Images, count: int) -> tuple[torch.Tensor, astseg.Output]:
    """The first images of a data set, on the model's device, and what the model says of them."""
    images = to_float(data.images[:count].to(device_of(model)))
    return images, model.eval()(images)


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.movedim(-3, -1).cpu().numpy()


def draw_segmentation(model: ASTSeg, data: Images, path: Path, count: int = 10) -> None:
    """Input, ground truth, segmentation, reconstruction and background, as in Figure 2."""
    images, output = predict(model, data, count)
    colors, rows = label_colors(256), {"input": channels_last(images)}
    if data.labels is not None:
        rows["ground truth"] = colors[data.labels[:count].numpy()]
    rows |= {
        "segmentation": colors[output.weights.argmax(1).cpu().numpy()],
        "reconstruction": channels_last(output.reconstruction),
        "background": channels_last(output.background),
    }
    figure, axes = new_figure(len(rows), len(images), (1.25 * len(images), 1.3 * len(rows)))
    for axis_row, (name, pictures) in zip(axes, rows.items()):
        axis_row[0].set_ylabel(name, fontsize=11)
        for axis, picture in zip(axis_row, pictures):
            axis.imshow(picture)
    save_figure(figure, path)


def draw_slots(model: ASTSeg, data: Images, path: Path, count: int = 3) -> None:
    """For each slot of some images: attention map with its soft-argmax point, glimpse, layer."""
    images, output = predict(model, data, count)
    slots, (height, width) = model.config.slots, output.attention.shape[-2:]
    # The layer as it shows in the image: its colours where its weight is large, grey elsewhere.
    shown = output.weights[:, 1:, None] * output.layers + (1 - output.weights[:, 1:, None]) * 0.85
    glimpses = output.glimpse_masks[:, :, None] * output.glimpses
    glimpses = glimpses + (1 - output.glimpse_masks[:, :, None]) * 0.85
    figure, axes = new_figure(3 * len(images), slots + 1, (1.4 * (slots + 1), 3.9 * len(images)))
    for i in range(len(images)):
        rows = dict(zip(("attention", "glimpse", "layer"), axes[3 * i : 3 * i + 3]))
        rows["attention"][0].imshow(channels_last(images[i]))
        rows["attention"][0].set_ylabel("input", fontsize=10)
        rows["glimpse"][0].axis("off")
        rows["layer"][0].imshow(channels_last(output.reconstruction[i]))
        rows["layer"][0].set_ylabel("reconstruction", fontsize=10)
        for name, row in rows.items():  # left of the first slot, without widening all columns
            where = dict(rotation=90, va="center", ha="right", transform=row[1].transAxes)
            row[1].text(-0.03, 0.5, name, fontsize=10, in_layout=False, **where)
        for k in range(slots):
            x, y = ((output.attention_position[i, k].cpu() + 1) / 2).tolist()
            rows["attention"][k + 1].imshow(output.attention[i, k].cpu().numpy(), cmap="gray")
            rows["attention"][k + 1].plot(x * (width - 1), y * (height - 1), "r+", ms=12)
            rows["glimpse"][k + 1].imshow(channels_last(glimpses[i, k]))
            rows["layer"][k + 1].imshow(channels_last(shown[i, k]))
            axes[0][k + 1].set_title(f"slot {k + 1}", fontsize=10)
    save_figure(figure, path, w_pad=2.0)


def draw_curves(history: list[dict], path: Path) -> None:
    """Losses of each phase and validation metrics against the step."""
    figure, axes = new_figure(1, 3, (13, 3.2), ticks=True)
    background, losses, scores = axes[0]
    for axis, names in [(background, ["background"]), (losses, ["foreground", "joint"])]:
        for name in names:
            lines = [line for line in history if line["name"] == name]
            axis.plot(
                [line["step"] for line in lines], [line["loss"] for line in lines], label=name
            )
    for metric in ("mIoU", "ARI-FG"):
        lines = [line for line in history if metric in line]
        scores.plot(
            [line["step"] for line in lines], [line[metric] for line in lines], label=metric
        )
    background.set(title="Phase 1: robust background loss", xlabel="step", ylabel="loss")
    losses.set(title="Phases 2 and 3: loss (22)", xlabel="step", ylabel="loss", yscale="log")
    scores.set(title="Validation", xlabel="step", ylabel="score", ylim=(0, 1))
    losses.legend()
    scores.legend()
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------------
# Images of a user


def load_model(folder: Path) -> ASTSeg:
    """The trained model of a run folder, in evaluation mode."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / "model" / name).exists():
            raise FileNotFoundError(
                f"{folder / 'model' / name} is missing: {folder} is no folder of a finished run"
            )
    try:
        model = ASTSeg.from_pretrained(str(folder / "model"))
    except Exception as error:  # safetensors, JSON and torch each have their own
        reason = str(error).splitlines()[0]
        raise OSError(f"the model in {folder / 'model'} is damaged ({reason})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def save_model(model: ASTSeg, folder: Path) -> None:
    """Write folder/model whole or not at all."""
    new, old = folder / "model.tmp", folder / "model.old"
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        model.save_pretrained(new)
    except Exception as error:  # safetensors has its own for a full disk
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"cannot write {folder / 'model'}: {error}") from error
    if (folder / "model").exists():
        os.replace(folder / "model", old)
    os.replace(new, folder / "model")
    shutil.rmtree(old, ignore_errors=True)


def segment_files(folder: Path, paths: list[Path], output: Path) -> None:
    """Write <stem>_labels.png, <stem>_overlay.png and <stem>_objects.json for each image.

    An image is cropped at its centre to the model's aspect; what it reports is in its own pixels.
    """
    model = load_model(folder)
    stems = [path.stem for path in paths]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise ValueError(f"two images are named {repeated[0]}: their results would collide")
    # All are read before anything is written.
    pictures = [astseg.read_image(path) for path in paths]
    output.mkdir(parents=True, exist_ok=True)
    height, width = model.config.size
    for path, picture in zip(paths, pictures):
        left, top, right, bottom = box = astseg.centre_crop(picture, height, width)
        pixels, _ = astseg.crop_and_resize(picture, None, height, width)
        with torch.no_grad():
            prediction = model(to_float(torch.from_numpy(pixels)[None].to(device_of(model))))
        small = Image.fromarray(prediction.weights[0].argmax(0).byte().cpu().numpy())
        whole = Image.new("L", picture.size)
        whole.paste(small.resize((right - left, bottom - top), Image.NEAREST), (left, top))
        labels = np.array(whole)
        objects = describe_objects(labels, prediction, box)
        save_segmentation(output, path.stem, picture, labels, objects, model.config.slots)
        print(f"{path}: {len(objects)} objects -> {output / path.stem}_labels.png")


def describe_objects(labels: np.ndarray, prediction: astseg.Output, box: tuple) -> list[dict]:
    """One entry for each slot that shows in the label map, in pixels of the user's image."""
    left, top, right, bottom = box  # of the crop that the model saw
    objects = []
    for label in np.unique(labels[labels > 0]).tolist():
        rows, columns = np.nonzero(labels == label)
        x, y = ((prediction.position[0, label - 1] + 1) / 2).tolist()
        scale_x, scale_y = prediction.scale[0, label - 1].tolist()
        objects.append(
            {
                "label": label,
                "position": [left + x * (right - left), top + y * (bottom - top)],
                "size": [(right - left) / scale_x, (bottom - top) / scale_y],
                "activation": prediction.activation[0, label - 1].item(),
                "pixels": len(rows),
                "box": [int(v) for v in (columns.min(), rows.min(), columns.max(), rows.max())],
            }
        )
    return objects


def save_segmentation(output: Path, stem: str, picture, labels, objects, slots: int) -> None:
    colors = label_colors(slots + 1)
    overlay = np.array(picture, dtype=np.float32)
    found = labels > 0
    overlay[found] = (overlay[found] + colors[labels[found]]) / 2
    palette = Image.fromarray(labels, "P")  # pixel index = label
    palette.putpalette(colors.flatten().tolist())
    for name, image in (
        ("labels", palette),
        ("overlay", Image.fromarray(overlay.astype(np.uint8))),
    ):
        write_beside(output / f"{stem}_{name}.png", lambda p: image.save(p, format="PNG"))
    write_json(output / f"{stem}_objects.json", objects)


# -------------------------------------------------------------------------------------------------
# Before training: which background, how fast


def choose_background(config: Config, training: Training, run: Run, folder: Path) -> Config:
    """Simple or complex, by whether the backgrounds of a short phase 1 differ ([38])."""
    # open: that short phase is 2 500 steps (or all there are) of the complex autoencoder
    config = dataclasses.replace(config, background_kind="complex")
    job = make_job(config, training, run, folder)
    phase = Phase("background", 0, min(2500, training.background_steps))
    optimizer = make_optimizer(job.model, phase, training)
    do_step = make_step(job, phase, optimizer, None)
    for step in tqdm(range(phase.stop), "choosing the background", disable=None, leave=False):
        set_learning_rate(optimizer, phase, step, training)
        do_step(step)
    backgrounds = memorise_backgrounds(job.model, job.images[:1000].clone())
    complexity = astseg.background_complexity(to_float(backgrounds))
    kind = "complex" if complexity > 0.24 else "simple"
    print(f"the complexity of the background is {complexity:.3f}: {kind} (complex above 0.24)")
    return dataclasses.replace(config, background_kind=kind)


def benchmark(config: Config, training: Training, run: Run) -> None:
    """Print speed, memory and arithmetic of each phase, and how long the curriculum would take."""
    job, hours = make_job(config, training, run, Path()), 0.0
    device = device_of(job.model)
    print(f"{config.height}x{config.width}, K = {config.slots}, {config.generator}, {device}")
    print("phase        steps/s  images/s  Gflop/step  Gflop/s  data  peak memory     hours")
    for phase in curriculum(training):
        with memory_explained(phase, training):
            hours += benchmark_phase(job, phase)
    print(f"the whole curriculum: {hours:.2f} hours")


def benchmark_phase(job: Job, phase: Phase) -> float:
    """Print a phase's row and return the hours that its steps would take."""
    training, device, backgrounds = job.training, device_of(job.model), None
    if phase.name == "foreground":
        backgrounds = torch.zeros_like(job.images)
    job.model.train()
    optimizer = make_optimizer(job.model, phase, training)
    set_learning_rate(optimizer, phase, phase.start, training)
    # Three times a forward pass, of the whole batch. (Of a step itself PyTorch counts too much: the
    # gradient of a depthwise convolution as if it were a dense one's.)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        PhaseLoss(job.model, phase)(0, *load_batch(job, phase, 0, backgrounds))
    work = 3 * counter.get_total_flops() * world()[1] / 1e9
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    do_step = make_step(job, phase, optimizer, backgrounds)
    for step in range(10):  # warm up: compilation, choice of algorithms
        do_step(step)
    seconds = median_seconds(do_step, job.run.benchmark)
    loading = median_seconds(
        lambda step: load_batch(job, phase, step, backgrounds), job.run.benchmark
    )
    memory, batch = "-", batch_size(phase, training)
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    hours = (phase.stop - phase.start) * seconds / 3600
    print(
        f"{phase.name:10} {1 / seconds:9.2f} {batch / seconds:9.0f} {work:11.4g} "
        f"{work / seconds:8.4g} {loading / seconds:5.1%} {memory:>12} {hours:9.2f}"
    )
    return hours


def median_seconds(function, steps: int) -> float:
    """Median seconds of function(step), in blocks of 10: the device is waited for between them."""
    blocks = []
    for block in range(10, 10 + max(10, steps), 10):
        clock = time.perf_counter()
        for step in range(block, block + 10):
            function(step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        blocks.append((time.perf_counter() - clock) / 10)
    return statistics.median(blocks)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(
    arguments: Optional[list[str]] = None, folder: Optional[Path] = None
) -> tuple[Config, Training, Run]:
    """Flags made from the dataclasses. Defaults: a preset's, or those of a run folder."""
    run, _ = HfArgumentParser(Run, add_help=False, allow_abbrev=False).parse_known_args(arguments)
    if folder is None and (run.evaluate or run.resume):
        folder = Path(run.evaluate[0]) if run.evaluate else run_folder(run)
    parser = HfArgumentParser(
        [Run, Config, Training], description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.set_defaults(**(read_settings(folder) if folder else preset(run)))
    run, config, training = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if run.dataset == "shapes" and config.height != config.width:
        raise ValueError(
            f"the embedded shapes are drawn on square images, not {config.height}x{config.width}: "
            "give --height and --width the same number"
        )
    if training.pretrained and config.generator != "segformer":
        raise ValueError(
            f"pretrained is {training.pretrained!r}, but the generator is {config.generator}: "
            "only the segformer has pretrained weights"
        )
    return config, training, run


def run_folder(run) -> Path:
    return Path(run.output or f"runs/{run.dataset}")


def read_settings(folder: Path) -> dict:
    """The flat settings of a run folder: those of Config, Training and the data set."""
    path = folder / "settings.json"
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: there is no run in that folder") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def flat_settings(config: Config, training: Training, run: Run) -> dict:
    paths = {name: getattr(run, name) for name in PATHS}
    paths = {name: path and str(Path(path).resolve()) for name, path in paths.items()}
    settings = {**dataclasses.asdict(config), **dataclasses.asdict(training)}
    intervals = {name: getattr(run, name) for name in INTERVALS}
    return {**settings, **intervals, "dataset": run.dataset, **paths}


def check_same_settings(folder: Path, stored: dict, settings: dict) -> None:
    """A resumed run keeps its settings, but for the changeable: name the first that differs."""
    for name, value in stored.items():
        if name not in CHANGEABLE and settings.get(name) != value:
            raise ValueError(
                f"the run in {folder} was started with {name} = {value}, not "
                f"{settings.get(name)}: leave the flag out, or train into another --output"
            )


def evaluate_runs(folders: list[str], arguments: Optional[list[str]]) -> None:
    """A row of metrics for each run and, for several, their mean and standard deviation."""
    rows = []
    for folder in map(Path, folders):
        config, training, run = parse_arguments(arguments, folder)
        model = load_model(folder)
        if run.dataset != "shapes" and not open_data(run.dataset, run.data, run.masks)[0].labelled:
            raise ValueError(
                f"{run.data} has no label maps, which metrics need: name their folder by --masks"
            )
        data = load_data(run.part, config, training, run)
        if not len(data.images):
            raise ValueError(f"{run.data} has no {run.part} part")
        metrics = evaluate(model, data)
        rows.append({name: metrics[name] for name in METRICS})
        if world()[0] == 0:
            write_json(folder / f"evaluation-{run.dataset}-{run.part}.json", rows[-1])
        print((TABLE_HEAD + "\n" if len(rows) == 1 else "") + table_row(folder.name, rows[-1]))
    if len(rows) > 1:
        columns = {name: [row[name] for row in rows] for name in METRICS}
        print(table_row("mean", {name: statistics.mean(c) for name, c in columns.items()}))
        print(table_row("deviation", {name: statistics.stdev(c) for name, c in columns.items()}))


def main(arguments: Optional[list[str]] = None) -> None:
    config, training, run = parse_arguments(arguments)
    start_processes()
    started, folder = time.time(), run_folder(run)
    if run.segment:
        if len(run.segment) < 2:
            raise ValueError("--segment needs a run folder and then at least one image")
        source, *images = map(Path, run.segment)
        return segment_files(source, images, Path(run.output or source / "segmented"))
    if run.evaluate:
        return evaluate_runs(run.evaluate, arguments)
    if run.benchmark:
        return benchmark(config, training, run)
    if not run.resume and any(folder.glob("checkpoint*.pt")):
        raise ValueError(
            f"{folder} holds a run already: go on with --resume, or choose another --output"
        )
    if run.dataset != "shapes":  # what is wrong with the files is said before a run folder is made
        load_data("train", config, training, run)
    if training.background_choice and not run.resume:
        config = choose_background(config, training, run, folder)
    first = world()[0] == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    with signals_kept():
        job = train(config, training, run, folder)
    test = load_data("test", config, training, run)
    metrics = evaluate(job.model, test)  # all processes take part
    if first:
        metrics = {name: metrics[name] for name in METRICS if name in metrics}
        facts = dict(images=len(test.images), seconds=round(job.progress.seconds, 1))
        write_results(job, test, {**metrics, **facts, "seed": training.seed})
        print(f"\n{TABLE_HEAD}\n" + table_row(f"AST-Seg-{training.scenario}", metrics))
        print(f"{folder}: {len(test.images)} test images, {time.time() - started:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("train.py: interrupted; a run that had begun goes on with --resume", file=sys.stderr)
        sys.exit(130)
