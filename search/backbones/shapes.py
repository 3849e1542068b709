"""The small backbone for generated scenes: five plain convolutions, trained on these scenes in about half a minute.

timm's smallest models take several times as long per image on a CPU, and their weights would have to be downloaded. A wider
one, of four times the multiply-adds, shows whether both rank cells in the same order (`search.fidelity`).
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm import trange

from fast.backbone import Backbone, plain_backbone
from search.datasets import Dataset, open_dataset
from search.errors import InputError
from search.files import write_whole

SMALL_BACKBONE, WIDE_BACKBONE = "shapes_cnn", "shapes_cnn_wide"
SHAPES_BACKBONES = {SMALL_BACKBONE: (16, 32, 64, 128, 128), WIDE_BACKBONE: (32, 64, 128, 256, 256)}  # channels
ITERATIONS = 120
_BATCH = 8


def shapes_backbone(cache_dir: Path, output_stride: int, *, name: str = SMALL_BACKBONE, low_level: bool = False) -> Backbone:
    """The trained backbone `name`, from `cache_dir` if it was trained before. Raises InputError if that cannot be written.

    `low_level=True` also gives the map at stride 4 that a decoder reads.
    """
    backbone = plain_backbone(name, SHAPES_BACKBONES[name], output_stride=output_stride, low_level=low_level)
    dataset = open_dataset("shapes", "train", None)
    # Hash of this file and of the scenes; the rest of what a training depends on rarely changes.
    recipe = hashlib.sha256(Path(__file__).read_bytes() + dataset.fingerprint().images.encode()).hexdigest()
    path = cache_dir / f"{name}-os{output_stride}-{recipe[:8]}.safetensors"
    if not path.exists():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(path.name + ".lock")):  # a second command waits until the first one has trained it
                if not path.exists():
                    _train(backbone, dataset)
                    write_whole(path, save(backbone.state_dict()))
        except OSError as error:
            raise InputError(f"cannot write {path} ({error}): give another `cache_dir`, or make room and run again") from error
    try:
        backbone.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is load_state_dict's
        raise InputError(f"{path} is damaged: delete it and run again") from error
    return backbone.eval()


def _train(backbone: Backbone, dataset: Dataset) -> None:
    """Train by classifying pixels with a linear classifier on the features, so cells have only context left to add."""
    samples = [dataset[i] for i in range(len(dataset))]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)  # (N, 3, H, W) uint8
    labels = torch.from_numpy(np.stack([sample.label for sample in samples]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = nn.Conv2d(backbone.channels, len(dataset.task.outputs), kernel_size=1)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()  # from the seed
        network = nn.Sequential(backbone, classifier).train()
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=ITERATIONS)
        for _ in trange(ITERATIONS, desc=f"backbone {backbone.name} for the shapes", unit="step"):
            batch = torch.randint(len(samples), (_BATCH,))
            loss = dataset.task.loss(network(images[batch].float()), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
