"""Runs a quality comparison: measures speeds, turns budgets into steps, trains every part, and keeps what is finished.

Child processes do the work, one per GPU at a time. results.json is written after every part, so an interrupted
comparison continues where it stopped; parts that failed are tried again. Nothing is taken over from other settings,
data, devices or versions, because equal time means nothing across machines.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from affmae_engine import atomic
from affmae_engine.bench import quality, report
from affmae_engine.bench.child import Children
from affmae_engine.bench.quality import MODELS, TASKS, Lengths, Part, PartResult, QualityPlan, Record, Speed, Speeds
from affmae_engine.bench.quality_data import Parts, Sources, described, section_count
from affmae_engine.bench.quality_worker import weights_of
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError, Interrupted
from affmae_engine.events import finite
from affmae_engine.runtime.signals import StopRequest

CALIBRATION_SHARE, SHORTEST_CALIBRATION_S, LONGEST_CALIBRATION_S = 0.1, 1.0, 10.0
"""After its start-up a calibration measures for a tenth of the budget, within these limits."""
OVERHEAD_S = 8.0
"""Estimate of what a part takes besides its steps: building, first data, scoring, saving."""
TARGET = "affmae_engine.bench.quality_worker:do_part"
_POLL_S = 0.1
_OURS = frozenset({"data.zarr", "logs", "runs", "run.lock", report.REPORT})
"""Entries of a folder whose comparison was stopped before it had results."""
_MUST_AGREE = {
    "budget_s": "--budget",
    "finetune_budget_s": "--finetune-budget",
    "configs": "settings (--preset, --config, --set)",
    "sources": "images or labels",
    "device": "device",
    "versions": "versions",
}
"""What an earlier attempt must have been made with, and how it is called. Seeds and fractions may be added."""


@dataclass
class Earlier:
    """What earlier attempts left in the folder. seconds: that they took."""

    speeds: Speeds = field(default_factory=dict)
    lengths: Lengths | None = None
    results: dict[Part, PartResult] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class QualityRun:
    """One comparison in one folder.

    Args:
        plan: what to do.
        folder: of results, runs and logs.
        store, parts: see `quality_data`.
        slots: environment variables of each process that may run at the same time: one per GPU.
        commit: writes results.json; called after every change of a result.
        say: shows one line of progress.
        stop: read about ten times a second.
        earlier: what earlier attempts left.
    """

    plan: QualityPlan
    folder: Path
    store: Store
    parts: Parts
    slots: Sequence[Mapping[str, str]]
    commit: Callable[[QualityRun], None]
    say: Callable[[str], None]
    stop: StopRequest
    earlier: Earlier = field(default_factory=Earlier)

    def __post_init__(self) -> None:
        self.runs = self.folder / "runs"
        self.complete = False
        self.speeds, self.lengths = dict(self.earlier.speeds), self.earlier.lengths
        self.results = {part: self.earlier.results.get(part, PartResult.of(part)) for part in self.plan.parts()}
        self._lock = threading.RLock()
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Do everything that is not done yet.

        Raises:
            ConfigError: a budget is too short.
            Interrupted: stopped on request; what was finished is kept.
            ResourceError: results cannot be written.
        """
        for name in ("runs", "logs"):
            atomic.ensure_folder(self.folder / name)
        done = sum(result.status == "ok" for result in self.results.values())
        if done:
            self.say(f"{done} of {len(self.results)} parts were finished earlier")
        # Measure the speeds that are not known yet, and turn budgets into steps.
        unknown = self._calibrations()
        if unknown:
            self.say("measuring how fast each model trains")
            self._work(unknown)
        self.lengths = self.plan.lengths(self.speeds, self.lengths)
        # Train what is left; what cannot be trained at all is a result at once.
        for part, result in self.results.items():
            speed = self.speeds[part.model, part.stage]
            if speed.step_s is None and result.status != "ok":
                result.status, result.note = speed.status, speed.note
        chains = [left for chain in self.plan.chains() if (left := self._unfinished(chain))]
        self._announce(chains)
        self._commit()
        self._work([[self._item(part) for part in chain] for chain in chains])
        self.complete = True
        self._commit()

    def _calibrations(self) -> list[list[dict[str, Any]]]:
        """Items that measure unknown speeds, by model."""
        found = []
        for model in MODELS:
            items = []
            for task in TASKS:
                if (model, task) in self.speeds:
                    continue
                part, budget_s = Part(model, self.plan.seeds[0]), self.plan.budget_s
                if task == "finetune":
                    part = Part(model, self.plan.seeds[0], "scratch", self.plan.fractions[-1])
                    budget_s = self.plan.finetune_budget_s
                seconds = min(LONGEST_CALIBRATION_S, max(SHORTEST_CALIBRATION_S, CALIBRATION_SHARE * budget_s))
                items.append(self._item(part, seconds))
            if items:
                found.append(items)
        return found

    def _item(self, part: Part, calibrate_s: float | None = None) -> dict[str, Any]:
        """What `quality_worker.do_part` is given."""
        steps, micro_batch = 1, None
        if calibrate_s is None:
            assert self.lengths is not None
            steps, micro_batch = self.lengths.steps(part), self.speeds[part.model, part.stage].micro_batch
        return {
            "store": str(self.store.path),
            "runs": str(self.runs),
            "test_fraction": self.plan.test_fraction,
            "part": asdict(part),
            "config": self.plan.config_of(part, steps, micro_batch).model_dump(mode="json"),
            "calibrate_s": calibrate_s,
        }

    def _unfinished(self, chain: Sequence[Part]) -> list[Part]:
        """Parts of a chain to train. Pretrained weights that are gone and still needed are trained again."""

        def can(part: Part) -> bool:
            return self.speeds[part.model, part.stage].step_s is not None

        left = [part for part in chain if self.results[part].status != "ok" and can(part)]
        first = chain[0]
        needed = any(part.init == "pretrained" for part in left)
        if needed and first not in left and can(first) and not weights_of(first, self.runs).is_file():
            return [first, *left]
        return left

    def _announce(self, chains: Sequence[Sequence[Part]]) -> None:
        assert self.lengths is not None
        seconds = [
            OVERHEAD_S + self.lengths.steps(part) * (self.speeds[part.model, part.stage].step_s or 0.0)
            for chain in chains
            for part in chain
        ]
        steps = ", ".join(f"{model} {n}" for model, n in self.lengths.pretrain.items())
        self.say(f"steps: pretraining {steps}; finetuning {self.lengths.finetune}")
        total = sum(seconds) / len(self.slots)
        self.say(f"{len(seconds)} trainings to do, {len(self.slots)} at a time: about {total / 60:.0f} min")

    def _work(self, batches: Sequence[list[dict[str, Any]]]) -> None:
        """Do lists of items, as many lists at once as there are slots."""
        waiting: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()
        for batch in batches:
            waiting.put(batch)
        with Children() as children:
            threads = [
                threading.Thread(target=self._serve, args=(children, slot, waiting))
                for slot in self.slots[: len(batches)]
            ]
            for thread in threads:
                thread.start()
            try:
                while any(thread.is_alive() for thread in threads):
                    if self.stop.requested or self._failure is not None:
                        children.end()
                    time.sleep(_POLL_S)
            finally:
                children.end()
                for thread in threads:
                    thread.join()
        if self._failure is not None:
            raise self._failure
        if self.stop.requested:
            raise Interrupted(
                f"by {self.stop.reason}; finished parts are kept in {self.folder}",
                "the same command continues where it stopped",
                signal_number=self.stop.signal_number or 2,
            )

    def _serve(self, children: Children, slot: Mapping[str, str], waiting: queue.SimpleQueue[Any]) -> None:
        """Take lists of items until none is left or the comparison ends."""
        try:
            while not self.stop.requested and self._failure is None:
                try:
                    items = waiting.get_nowait()
                except queue.Empty:
                    return
                prefix = "calibration-" if items[0]["calibrate_s"] is not None else ""
                log = self.folder / "logs" / f"{prefix}{Part(**items[0]['part']).name}.log"
                for message in children.run(TARGET, items, log=log, environment=slot):
                    self._take(message, items[message["index"]])
        except BaseException as error:
            self._failure = self._failure or error

    def _take(self, message: dict[str, Any], item: dict[str, Any]) -> None:
        """Note what a message says."""
        part, calibration = Part(**item["part"]), item["calibrate_s"] is not None
        with self._lock:
            if message["event"] == "began" and not calibration:
                if self.results[part].status != "ok":  # it may be trained again for its weights
                    self.results[part].status = "running"
            elif message["event"] == "ended" and calibration:
                self.speeds[part.model, part.stage] = Speed(**message["result"]["speed"])
            elif message["event"] == "failed" and calibration:
                self.speeds[part.model, part.stage] = Speed(None, status="failed", note=message["reason"])
            elif message["event"] in ("ended", "failed"):
                if message["event"] == "ended":
                    self.results[part] = PartResult(**message["result"]["result"])
                else:
                    self.results[part].status, self.results[part].note = "failed", message["reason"]
                self.say(self.results[part].describe())
                self._commit()

    def _commit(self) -> None:
        with self._lock:
            self.commit(self)


def gpu_slots(device: str) -> tuple[list[dict[str, str]], bool]:
    """Environment variables of the processes that may run side by side, and whether GPUs were left out.

    Args:
        device: "cuda": one process per visible GPU of the first one's kind; "cpu": one process.
    """
    if device != "cuda":
        return [{}], False
    kinds = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in chosen.split(",") if name.strip()] or [str(i) for i in range(len(kinds))]
    alike = [name for name, kind in zip(names, kinds, strict=False) if kind == kinds[0]]
    # LOCAL_WORLD_SIZE makes the processes share the cores for data loading, as the ranks of one machine do.
    slots = [{"CUDA_VISIBLE_DEVICES": name, "LOCAL_WORLD_SIZE": str(len(alike))} for name in alike]
    return slots, len(alike) < len(kinds)


def identity(plan: QualityPlan, sources: Sources, about: Mapping[str, Any]) -> Record:
    """What decides the results: two attempts with equal values are one comparison."""
    values = {**plan.settings(), "sources": sources.as_dict(), "device": about["device"], "versions": about["versions"]}
    plain: Record = json.loads(json.dumps(finite(values)))
    return plain


def read_earlier(folder: Path, wanted: Record) -> Earlier:
    """Finished parts in the folder; empty when it is new.

    Args:
        folder: of the comparison.
        wanted: its `identity`.

    Raises:
        ConfigError: the folder holds something else, or a comparison with other settings; says which.
    """
    path = folder / report.RESULTS
    other = "choose another folder with -o/--out"
    if not path.is_file():
        strangers = [entry.name for entry in folder.iterdir() if entry.name not in _OURS] if folder.is_dir() else []
        if strangers:
            raise ConfigError(f"{folder} holds other files ({strangers[0]})", other)
        return Earlier()
    try:
        value = json.loads(path.read_text("utf-8"))
        if value["kind"] != "quality" or value["schema"] != report.SCHEMA:
            raise ConfigError(f"{folder} holds another result ({value['kind']}, schema {value['schema']})", other)
        found = value["identity"]
        differing = [title for name, title in _MUST_AGREE.items() if found[name] != wanted[name]]
        if differing:
            raise ConfigError(
                f"{folder} holds a comparison with other {', '.join(differing)}{_example(found, wanted)}",
                f"repeat the command it was made with to continue, or {other}",
            )
        results = [PartResult(**record) for record in value["results"]]
        speeds = {(r["model"], r["task"]): Speed(**r["speed"]) for r in value["speeds"]}
        return Earlier(
            {key: speed for key, speed in speeds.items() if speed.step_s is not None},  # the others are tried again
            Lengths(**value["lengths"]) if value["lengths"] else None,
            {result.part: result for result in results if result.status == "ok"},
            value["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", other) from error


def refuse_narrower(plan: QualityPlan, earlier: Earlier, folder: Path) -> None:
    """Finished parts are never dropped.

    Raises:
        ConfigError: the folder has finished parts that the plan does not ask for.
    """
    extra = [part.name for part in earlier.results if part not in set(plan.parts())]
    if extra:
        raise ConfigError(
            f"{folder} holds {len(extra)} finished trainings that were not asked for now, such as {extra[0]}",
            "ask for at least the same seeds and shares of the labels, or choose another folder with -o/--out",
        )


def document(run: QualityRun, sources: Sources, about: Mapping[str, Any], *, seconds: float) -> Record:
    """results.json (docs/bench-quality.md).

    Args:
        run: with its results so far.
        sources: what it compares.
        about: `report.circumstances`.
        seconds: that all attempts took together.
    """
    plan, store, parts = run.plan, run.store, run.parts
    records = [asdict(result) for result in run.results.values()]
    summary = quality.summarize(records)
    return report.document(
        "quality",
        about,
        records,
        quality.figures_of(summary),
        complete=run.complete,
        seconds=seconds,
        seeds=plan.seeds,
        fractions=plan.fractions,
        budget_s=plan.budget_s,
        finetune_budget_s=plan.finetune_budget_s,
        identity=identity(plan, sources, about),
        data={
            "fingerprint": store.fingerprint(),
            "class_names": list(store.class_names),
            "test": described(store, parts.test),
            "test_sections": section_count(store, parts.test),
            "train": described(store, parts.train),
            "train_sections": section_count(store, parts.train),
            "pretrain_sections": section_count(store, parts.pretrain),
            "left_out": list(parts.left_out),
        },
        speeds=[{"model": m, "task": task, "speed": asdict(speed)} for (m, task), speed in sorted(run.speeds.items())],
        lengths=asdict(run.lengths) if run.lengths else None,
        summary=summary,
        differences=quality.differences(records),
        times=quality.times(records),
    )


def _example(found: Record, wanted: Record) -> str:
    """One setting that differs, in words."""
    for task, sections in wanted["configs"].items():
        for section, values in sections.items():
            for name, value in values.items():
                old = found["configs"].get(task, {}).get(section, {}).get(name)
                if old != value:
                    return f": {section}.{name} was {old}, is {value} now"
    return ""
