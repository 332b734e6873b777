"""Training steps with images of a dataset through the trainer's data loader.

The loader works ahead, so the first steps show what it prepared while the network was compiled, not how fast it is.
That supply is thrown away, and as many steps are taken as it held before any step is timed.
"""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from pathlib import Path

import torch
from torch import nn

from affmae_engine.bench.networks import CLASSES, SpeedCase, train_step
from affmae_engine.config import RunConfig
from affmae_engine.data.dataset import PretrainDataset
from affmae_engine.data.loading import PREFETCH, batches, worker_count
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.segmentation import SegmentationDataset
from affmae_engine.data.split import Region, split
from affmae_engine.data.store import Store
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.step import EAGER_STEPS, seed_forward
from affmae_engine.train.trainer import KEPT_SHARE

FEWEST_STEPS = 10
"""Timed steps; more where the loader prepares more than half as many ahead."""


def with_loading(
    case: SpeedCase, model: nn.Module, choice: DeviceChoice, data: Path, *, clahe: bool
) -> tuple[float, float]:
    """Images per second, and the share of the time in which the device waited for data.

    Args:
        case: a case of pretraining or finetuning.
        model: its network, as it was timed without loading.
        choice: where it is.
        data: path of a dataset; finetuning needs its labels.
        clahe: as `data.clahe`.

    Raises:
        InputError, CorruptError, ConfigError: the dataset cannot be read or gives no crop of this size.
    """
    config = RunConfig.model_validate(
        {
            "model": case.model,
            "data": {"crop_size": case.resolution, "clahe": clahe},
            "train": {"batch_size": case.batch},
        }
    )
    dataset = _dataset(case, config, Store.open(data))
    workers = worker_count(config.data.workers)
    ahead = workers * PREFETCH
    on_gpu = choice.device.type == "cuda"
    if on_gpu and isinstance(dataset, SegmentationDataset):
        dataset.keep_on(choice.device, int(KEPT_SHARE * torch.cuda.mem_get_info(choice.device)[1]))
    stream = batches(
        dataset,
        first=0,
        batch_size=case.batch,
        micro_batch=case.batch,
        rank=0,
        world=1,
        workers=workers,
        raw=on_gpu,
    )
    take_step = train_step(case, model, choice, finish=dataset.finish if on_gpu else None)
    watch, count = Stopwatch(), itertools.count()

    def steps(number: int) -> None:
        for _ in range(number):
            taken = take_step(stream, seed=partial(seed_forward, 0, next(count), 0), watch=watch)
            watch.stepped()
        float(taken.losses["loss"])  # waits for the device

    with contextlib.closing(stream):
        # Warm up and record, drop what was prepared meanwhile, let the loader reach its own pace.
        steps(EAGER_STEPS + 2)
        for _ in range(ahead):
            next(stream)
        if ahead:
            steps(ahead)
        watch.lap(case.batch)
        steps(max(FEWEST_STEPS, 2 * ahead))
        pace = watch.lap(case.batch)
    return pace.images_per_s, pace.data_wait


def _dataset(case: SpeedCase, config: RunConfig, store: Store) -> PretrainDataset | SegmentationDataset:
    if case.task == "pretrain":
        return PretrainDataset(store, split(store.images, config.data.holdout, seed=0).train, config, seed=0)
    regions = [Region(image.name, 0, image.shape_ZYX[0]) for image in store.images if image.labelled]
    normalisation = Normalisation.from_store(config.data, store)
    return SegmentationDataset(store, regions, config, classes=CLASSES, normalisation=normalisation, seed=0)
