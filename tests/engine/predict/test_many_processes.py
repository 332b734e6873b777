"""Blocks computed by other processes, on this machine and on a dask cluster: the bytes of one process."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from affmae_engine import checkpoint, run_dir
from affmae_engine.config import RunConfig
from affmae_engine.data.readers import open_sources
from affmae_engine.errors import ConfigError, InputError, ResourceError
from affmae_engine.model.affmae import Segmenter
from affmae_engine.predict import workers
from affmae_engine.predict.job import Job, PredictOptions
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.run import Observer, PredictProgress, predict
from affmae_engine.predict.work import Work
from affmae_engine.predict.workers import Workers, gpu_indices
from affmae_engine.weights import WeightsMetadata

CONFIG = RunConfig.model_validate({"model": {"size": "tiny"}, "data": {"crop_size": 32}})


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A tiny network with random weights, from a file that other processes can open."""
    torch.manual_seed(0)
    run = run_dir.create(tmp_path_factory.mktemp("run") / "seg")
    run.write_config(CONFIG, "finetune")
    about = WeightsMetadata(
        task="finetune", step=1, model=CONFIG.model.model_dump(mode="json"), image_size=32, pixel_nm=None,
        normalisation={"mode": "image", "mean": 0.0, "std": 1.0, "clahe": False}, class_names=("a", "b", "c"),
    )  # fmt: skip
    model = Segmenter(CONFIG.model, 3)
    checkpoint.save(run, weights=model.state_dict(), optimizer={}, state={}, metadata=about)
    return Predictor.from_weights(run.root, device="cpu")


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "stack.tif"
    image = np.random.default_rng(0).integers(0, 255, (10, 60, 50), np.uint8)
    tifffile.imwrite(path, image, photometric="minisblack")
    return path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bits of a matrix product may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def run(stack: Path, predictor: Predictor, out: Path, engine: Any = None, **more: Any) -> Any:
    targets = Outputs(out, with_probabilities=True)
    with open_sources(stack)[0] as source:
        return predict(source, predictor, targets, PredictOptions(), engine=engine, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_processes_of_this_machine_give_the_bytes_of_a_single_run(
    tmp_path: Path, stack: Path, predictor: Predictor
) -> None:
    with Workers(["", ""]) as engine:  # they stay for the next input
        for name in ("a.zarr", "a.tif"):
            seen: list[PredictProgress] = []
            run(stack, predictor, tmp_path / f"whole-{name}" / name)
            report = run(stack, predictor, tmp_path / f"many-{name}" / name, engine, on_progress=seen.append)
            assert content(tmp_path / f"many-{name}") == content(tmp_path / f"whole-{name}")
            assert seen[-1].tiles_done == seen[-1].tiles and not report.warnings


def killing(engine: Any, blocks: int, victim: Callable[[], int]) -> Callable[..., None]:
    """The engine, and a process that is killed once so many blocks are finished."""

    def compute(job: Job, numbers: Sequence[int], observer: Observer) -> None:
        done = 0
        real = observer.block

        def block(number: int) -> None:
            nonlocal done
            real(number)
            done += 1
            if done == blocks:
                os.kill(victim(), signal.SIGKILL)

        observer.block = block  # type: ignore[method-assign]
        engine(job, numbers, observer)

    return compute


@pytest.mark.slow
def test_a_killed_process_costs_nothing_while_another_lives(tmp_path: Path, stack: Path, predictor: Predictor) -> None:
    run(stack, predictor, tmp_path / "whole" / "a.zarr")
    with Workers(["", ""]) as engine:
        pid = engine._processes[0]._child.pid
        report = run(stack, predictor, tmp_path / "many" / "a.zarr", killing(engine, 2, lambda: pid))
    assert content(tmp_path / "many") == content(tmp_path / "whole")
    assert any("was killed by SIGKILL: the others took over" in text for text in report.warnings)


@pytest.mark.slow
def test_the_last_process_killed_keeps_finished_blocks(tmp_path: Path, stack: Path, predictor: Predictor) -> None:
    run(stack, predictor, tmp_path / "whole" / "a.zarr")
    out = tmp_path / "many" / "a.zarr"
    with Workers([""]) as engine:
        pid = engine._processes[0]._child.pid
        with pytest.raises(
            ResourceError, match="the process on the CPU was killed by SIGKILL; finished blocks are kept"
        ):
            run(stack, predictor, out, killing(engine, 3, lambda: pid))
        assert not out.exists() and len(list(Work(out).blocks.iterdir())) >= 3
        report = run(stack, predictor, out, engine)  # another process is started
    assert report.blocks_before >= 3 and content(tmp_path / "many") == content(tmp_path / "whole")


@pytest.mark.slow
def test_what_a_process_meets_is_told_as_if_it_were_this_one(tmp_path: Path, stack: Path, predictor: Predictor) -> None:
    def without_weights(job: Job, numbers: Sequence[int], observer: Observer) -> None:
        aside = predictor.weights.rename(predictor.weights.with_name("aside"))
        try:
            with Workers([""]) as engine:
                engine(job, numbers, observer)
        finally:
            aside.rename(predictor.weights)

    with pytest.raises(InputError, match="no such run, checkpoint or weights file"):
        run(stack, predictor, tmp_path / "a.zarr", without_weights)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_indices("all") == [0, 1] and gpu_indices("1") == [0]
    with pytest.raises(ConfigError, match="this machine has 2"):
        gpu_indices("3")
    for wrong in ("0", "-1", "x", ""):
        with pytest.raises(ConfigError, match="give a number of GPUs, or all"):
            gpu_indices(wrong)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    made: list[Sequence[str]] = []
    monkeypatch.setattr(workers.Workers, "__init__", lambda self, devices: made.append(devices))
    workers.Workers.on_gpus([1])
    assert made == [["7"]]


@pytest.fixture
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as made,
    ):
        yield made


@pytest.mark.slow
def test_a_dask_cluster_gives_the_bytes_of_a_single_run_with_a_worker_killed_midway(
    tmp_path: Path, stack: Path, predictor: Predictor, cluster: Any
) -> None:
    from affmae_engine.predict.cluster import Cluster

    run(stack, predictor, tmp_path / "whole" / "a.zarr")

    def victim() -> int:
        return next(iter(cluster.workers.values())).process.process.pid

    with Cluster(cluster.scheduler_address) as engine:
        report = run(stack, predictor, tmp_path / "many" / "a.zarr", killing(engine, 3, victim))
    assert report is not None and content(tmp_path / "many") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_block_that_fails_three_times_ends_a_dask_run(
    tmp_path: Path, stack: Path, predictor: Predictor, cluster: Any
) -> None:
    from affmae_engine.predict.cluster import Cluster

    whole = stack.read_bytes()
    status = stack.stat()

    def damaged(job: Job, numbers: Sequence[int], observer: Observer) -> None:
        stack.write_bytes(whole[:20000] + bytes(len(whole) - 20000))
        os.truncate(stack, 20000)
        with Cluster(cluster.scheduler_address) as engine:
            try:
                engine(job, numbers, observer)
            finally:
                stack.write_bytes(whole)
                os.utime(stack, ns=(status.st_atime_ns, status.st_mtime_ns))

    out = tmp_path / "a.zarr"
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"block \d+ failed 3 times: .*stack\.tif.*finished blocks are kept"):
        run(stack, predictor, out, damaged)
    assert time.monotonic() - began < 60 and not out.exists()
    report = run(stack, predictor, out)
    assert report.blocks == 10
