"""Pretraining steps as the trainer takes them: with images of a dataset, through its loader.

Unusual: the loader works ahead, so the first steps show what it prepared while the network was compiled, not how fast
it is. That supply is thrown away, as many steps are taken as it held, so that a faster loader can build it up again,
and only then steps are timed.
"""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from pathlib import Path

import torch

from affmae_engine.bench.case import Measurement, Request, mask_settings
from affmae_engine.bench.step import Network
from affmae_engine.config import RunConfig
from affmae_engine.data.dataset import PretrainDataset
from affmae_engine.data.loading import PREFETCH, batches, worker_count
from affmae_engine.data.split import split
from affmae_engine.data.store import Store
from affmae_engine.model.build import encoder_layers
from affmae_engine.train.device import DeviceChoice
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw, layer_decay_groups, set_learning_rate
from affmae_engine.train.step import EAGER_STEPS, TrainStep, seed_forward


def with_loading(result: Measurement, request: Request, choice: DeviceChoice, network: Network) -> None:
    """Fills in `data_images_per_s` and `data_wait` from steps on the images of `request.data`.

    At least `request.steps` are timed, and twice as many as the loader prepares ahead.

    Raises:
        InputError, CorruptError, ConfigError: the dataset cannot be read or gives no crop of this size.
    """
    case = request.case
    config = RunConfig.model_validate(
        {
            "model": case.network,
            "data": {"crop_size": case.resolution},
            "mask": mask_settings(),
            "train": {"batch_size": case.batch},
        }
    )
    store = Store.open(Path(str(request.data)))
    parts = split(store.images, config.data.holdout, seed=0)
    workers = worker_count(config.data.workers)
    ahead = workers * PREFETCH
    stream = batches(
        PretrainDataset(store, parts.train, config, seed=0), first=0, batch_size=case.batch, micro_batch=case.batch,
        rank=0, world=1, workers=workers,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(choice.device.type, enabled=choice.dtype == torch.float16)
    optimizer = build_adamw(layer_decay_groups(network.model, config.optim, encoder_layers(case.network)), config.optim)
    set_learning_rate(optimizer, config.optim.lr / 100)
    take_step = TrainStep(
        network.model, network.losses, optimizer, scaler, choice,
        accumulate=1, clip_norm=config.optim.clip_norm, record=network.recorded,
    )  # fmt: skip
    watch, count = Stopwatch(), itertools.count()

    def steps(number: int) -> None:
        for _ in range(number):
            taken = take_step(stream, seed=partial(seed_forward, 0, next(count), 0), watch=watch)
            watch.stepped()
        float(taken.losses["loss"])  # waits for the device

    with contextlib.closing(stream):
        steps(max(request.warmup, EAGER_STEPS + 2))
        for _ in range(ahead):
            next(stream)
        if ahead:
            steps(ahead)
        watch.lap(case.batch, 0)
        steps(max(request.steps, 2 * ahead))
        pace = watch.lap(case.batch, 0)
    result.data_images_per_s, result.data_wait = pace.images_per_s, pace.data_wait
