"""`affmae bench --quality`: from the options to a finished comparison, its report and its charts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affmae_cli import output
from affmae_cli.bench_charts import drawn
from affmae_cli.quality_plan import FOLDER, QualityOptions, fitted, make_plan
from affmae_engine.errors import AffmaeError

if TYPE_CHECKING:
    from affmae_engine.bench.quality import QualityPlan
    from affmae_engine.bench.quality_data import Sources
    from affmae_engine.bench.quality_run import Progress
    from affmae_engine.data.store import Store
    from affmae_engine.train.device import DeviceChoice
    from affmae_engine.train.signals import StopRequest

CPU_REMARK = "No card: on a CPU the models train on a handful of crops; the scores show that it runs, no more."
MIXED_REMARK = "The cards are of different kinds; only those like the first one are used, as equal time needs."


def run_quality(options: QualityOptions, out: Path | None, *, quiet: bool) -> dict[str, Any]:
    """Do the comparison, or what is left of it, and write its report; returns results.json's content.

    Raises:
        ConfigError: wrong options, or a folder with another comparison.
        InputError: images or labels that cannot be used.
        Interrupted: stopped on request; finished parts are kept.
        AffmaeError: every part failed.
    """
    from affmae_engine import atomic
    from affmae_engine.run_dir import RunDir
    from affmae_engine.train.device import pick_device
    from affmae_engine.train.signals import StopRequest

    plan, sources = make_plan(options)
    choice = pick_device(plan.configs[plan.sizes[0], "pretrain"].train)
    folder = atomic.ensure_folder(out or FOLDER).absolute()
    with RunDir(folder).locked(), StopRequest().installed() as stop:
        values = _compare(plan, sources, folder, choice, stop, quiet=quiet)
    if not any(record["miou"] is not None for record in values["summary"]):
        raise AffmaeError("no part of the comparison could be scored", f"{folder / 'report.md'} and logs/ say why")
    return values


def _compare(
    plan: QualityPlan, sources: Sources, folder: Path, choice: DeviceChoice, stop: StopRequest, *, quiet: bool
) -> dict[str, Any]:
    from affmae_cli import quality_view
    from affmae_engine.bench import quality_results, report
    from affmae_engine.bench.card import CardWatch
    from affmae_engine.bench.quality_data import parts_of, section_count
    from affmae_engine.bench.quality_process import card_slots
    from affmae_engine.bench.quality_run import QualityRun

    remarks = [] if choice.device.type == "cuda" else [CPU_REMARK]
    slots, mixed = card_slots(choice.device.type)
    remarks += [MIXED_REMARK] if mixed else []
    config = plan.configs[plan.sizes[0], "pretrain"]
    about = report.circumstances(choice, remarks)
    about |= {"merge_keep": config.model.merge_keep, "mask_ratio": config.mask.ratio, "mask_kind": config.mask.kind}
    earlier = quality_results.read_earlier(folder, quality_results.identity(plan, sources, about))
    say = (lambda text: None) if quiet else output.say
    say(f"{choice.description}; results in {folder}")
    for remark in remarks:
        if not quiet:
            output.say(remark, label="note", style="bold yellow")
    store = _store(plan, sources, folder, stop, begun=bool(earlier.speeds or earlier.results))
    parts = parts_of(store, plan.test_fraction)
    plan, notes = fitted(plan, section_count(store, parts.train))
    quality_results.refuse_narrower(plan, earlier, folder)
    about["remarks"] += notes
    for note in notes:
        say(note)
    begun = time.monotonic() - earlier.seconds

    with CardWatch(choice.device) as card, quality_view.watching(plan, len(slots), quiet=quiet) as look:

        def document(progress: Progress) -> dict[str, Any]:
            seconds = time.monotonic() - begun
            here = {**about, "card": card.record()}
            return quality_results.document(plan, sources, here, store, parts, progress, seconds=seconds)

        run = QualityRun(
            plan, folder, store, parts, slots, stop=stop, look=look,
            commit=lambda progress: quality_results.write(folder, document(progress)),
            speeds=earlier.speeds, lengths=earlier.lengths, results=earlier.results,
        )  # fmt: skip
        progress = run.run()
        look(progress)
    values = document(progress)
    quality_results.write(folder, values, drawn(values, folder, quiet=quiet))
    return values


def _store(plan: QualityPlan, sources: Sources, folder: Path, stop: StopRequest, *, begun: bool) -> Store:
    """The comparison's own copy of the data: made once, and used by every later attempt as it is."""
    from affmae_engine.bench.quality_data import collect
    from affmae_engine.data.store import Store

    path = folder / "data.zarr"
    if begun:
        return Store.open(path)
    config = plan.configs[plan.sizes[0], "finetune"].finetune
    return collect(sources, path, config, should_stop=lambda: stop.requested)
