"""Single operations: correct first, then how fast, beside the reference and beside what the device can do.

The cases are those of `affmae_kernels.cases`. An operation's small cases are compared with the float64 reference; its
network cases are timed only if that passes. The bound of a call is the larger of two times: every input, output and
gradient moved once at the rate of a copy, and the unavoidable operations at the rate of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from affmae_engine.bench.child import Children, Tell
from affmae_engine.bench.report import Figure, Table, figure
from affmae_engine.bench.timing import Call, Ceilings, Timing, measure_ceilings, time_calls
from affmae_engine.errors import first_line
from affmae_engine.runtime.device import DeviceChoice, exact_fp32
from affmae_kernels.cases import Case, cases, deviations
from affmae_kernels.dispatch import choose_backend

INPUT_SETS = 4
"""Copies of the inputs that take turns, so that the L2 cache does not serve them."""
BACKWARD_FLOPS = 2
"""Operations of a backward pass relative to its forward pass."""
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class CallTimes:
    """Times of one implementation. both: forward and backward pass; None without gradients. Bytes of inputs and
    outputs, and with the gradients of both."""

    forward: Timing
    both: Timing | None
    forward_bytes: int
    both_bytes: int


def time_case(
    case: Case, device: torch.device, dtype: torch.dtype, backend: str, *, seconds: float = 0.2, graph: bool = False
) -> CallTimes:
    """Time the forward pass of a case, and forward and backward together.

    Args:
        case, device, dtype, backend: see `affmae_kernels.cases`.
        seconds: about how long each measurement takes.
        graph: leave out the time of launching kernels, see `time_calls`.
    """
    sets = [case.arguments(device, dtype) for _ in range(INPUT_SETS if device.type == "cuda" else 1)]
    with torch.no_grad():
        prepared = [case.prepare(backend=backend, **arguments) for arguments in sets]

    def forward_of(arguments: dict[str, Any]) -> Call:
        return lambda: case.call(backend=backend, **arguments)

    # One call shows what is differentiable, and how large everything is.
    results = case.call(backend=backend, **prepared[0])
    outputs = [tensor for tensor in results.values() if tensor.requires_grad]
    leaves = [[tensor for tensor in _tensors(arguments) if tensor.requires_grad] for arguments in sets]
    forward_bytes = _size(_tensors(prepared[0])) + _size(results.values())
    forward = time_calls([forward_of(arguments) for arguments in prepared], device, seconds=seconds, graph=graph)
    if not outputs or not leaves[0]:
        return CallTimes(forward, None, forward_bytes, forward_bytes)

    upstream = [torch.randn_like(output) for output in outputs]
    # Autograd remembers the stream of a graph that is alive, and a capture on another stream must not wait for that.
    del results, outputs

    def both_of(arguments: dict[str, Any], wanted: Sequence[Tensor]) -> Call:
        def both() -> None:
            found = [t for t in case.call(backend=backend, **arguments).values() if t.requires_grad]
            torch.autograd.grad(found, wanted, upstream, allow_unused=True)

        return both

    calls = [both_of(arguments, wanted) for arguments, wanted in zip(prepared, leaves, strict=True)]
    both = time_calls(calls, device, seconds=seconds, graph=graph)
    return CallTimes(forward, both, forward_bytes, forward_bytes + _size(upstream) + _size(leaves[0]))


def measure_operation(item: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Do one item of `items_of`; a target of `child`. Failures are results.

    Returns:
        "status" ("ok", "wrong", "failed") with "note", and by kind of item: "ceilings"; "errors" by name; or times.
    """
    exact_fp32()
    device, dtype = torch.device(item["device"]), getattr(torch, item["dtype"])
    try:
        if item["what"] == "ceilings":
            return {"status": "ok", "note": "", **asdict(measure_ceilings(device, dtype))}
        backend = choose_backend("auto", item["operation"], device).name
        if item["what"] == "check":
            return _checked(cases(item["operation"], network=False), device, dtype, backend)
        (case,) = [case for case in cases(item["operation"]) if case.name == item["name"]]
        return _timed(case, device, dtype, backend, reference=item["reference"])
    except Exception as error:  # a kernel that does not compile must not end the measurement of the others
        return {"status": "failed", "note": first_line(error)}


def _checked(group: Sequence[Case], device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    found = deviations(group, device, dtype, backend)
    wrong = [f"{name} {tensor.error:.1e}" for name, tensor in found.items() if not tensor.ok]
    worst = max((tensor.error for tensor in found.values()), default=0.0)
    status = "wrong" if wrong else "ok"
    return {"status": status, "note": ", ".join(wrong), "backend": backend, "error": worst, "cases": len(group)}


def _timed(case: Case, device: torch.device, dtype: torch.dtype, backend: str, *, reference: bool) -> dict[str, Any]:
    fast = device.type == "cuda" and backend == "triton"
    times = time_case(case, device, dtype, backend, graph=fast)
    plain = None
    note = ""
    if reference and backend != "reference":
        try:
            plain = time_case(case, device, dtype, "reference", seconds=0.05)
        except Exception as error:  # out of memory, most likely
            note = f"reference: {first_line(error)}"
    return {
        "status": "ok",
        "note": note,
        "backend": backend,
        "flops": case.flops,
        **asdict(times),
        "reference": None if plain is None else asdict(plain),
    }


def items_of(operations: Sequence[str], choice: DeviceChoice, *, reference: bool) -> list[dict[str, Any]]:
    """What `measure_operation` is to do, in order. On a CPU the small cases stand in for those of the network."""
    network = choice.device.type == "cuda"
    about = {"device": str(choice.device), "dtype": str(choice.dtype).removeprefix("torch.")}
    items: list[dict[str, Any]] = [{"what": "ceilings", **about}]
    for operation in operations:
        items.append({"what": "check", "operation": operation, "name": "small cases", **about})
        items += [
            {"what": "time", "operation": operation, "name": case.name, "reference": reference, **about}
            for case in cases(operation, network=network)
        ]
    return items


def run_items(items: Sequence[dict[str, Any]], children: Children) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(item, result) in order; times of an operation that is wrong are left out."""
    wrong: set[str] = set()
    for message in children.run(f"{__name__}:measure_operation", items):
        if message["event"] not in ("ended", "failed"):
            continue
        item = items[message["index"]]
        result = message.get("result") or {"status": "failed", "note": message["reason"]}
        if item["what"] == "check" and result["status"] != "ok":
            wrong.add(item["operation"])
        if item["what"] == "time" and item["operation"] in wrong:
            continue
        yield item, result


def records_of(found: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[list[dict[str, Any]], Ceilings | None]:
    """One record per check and per timed case for results.json, and the ceilings when they were measured."""
    ceilings = None
    records = []
    for item, result in found:
        if item["what"] == "ceilings":
            if result["status"] == "ok":
                ceilings = Ceilings(result["gb_s"], result["tflop_s"])
            continue
        record = {name: item[name] for name in ("what", "operation", "name")} | result
        if ceilings is not None and result.get("forward"):
            record["forward_bound_ms"] = ceilings.bound_ms(result["forward_bytes"], result["flops"])
            flops = (1 + BACKWARD_FLOPS) * result["flops"]
            record["both_bound_ms"] = ceilings.bound_ms(result["both_bytes"], flops) if result["both"] else None
        records.append(record)
    return records, ceilings


def tables_of(records: Sequence[dict[str, Any]]) -> list[Table]:
    """Checks by operation, then times by case."""
    checks = []
    for operation in dict.fromkeys(record["operation"] for record in records):
        own = (record for record in records if record["operation"] == operation and record["what"] == "check")
        check = next(own, {"status": "not checked", "note": ""})
        worst, verdict = check.get("error"), "right" if check["status"] == "ok" else check["status"]
        largest = "" if worst is None else f"{worst:.1e}"
        checks.append(
            (operation, check.get("backend", ""), str(check.get("cases", "")), largest, verdict, check["note"])
        )
    columns = ("operation", "runs as", "cases", "largest error", "verdict", "note")
    return [Table("Against the float64 reference", columns, checks), _time_table(records)]


def figures_of(records: Sequence[dict[str, Any]]) -> list[Figure]:
    """What `--compare` compares."""
    found = []
    for record in records:
        for part in ("forward", "both"):
            timing = record.get(part)
            if timing:
                name = f"{record['operation']}, {record['name']}"
                metric = "forward" if part == "forward" else "forward and backward"
                found.append(Figure(name, metric, "ms", timing["ms"], timing["low_ms"], timing["high_ms"]))
    return found


def _time_table(records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for r in records:
        if r["what"] != "time":
            continue
        if r["status"] != "ok":
            rows.append((r["operation"], r["name"], r["status"], *[""] * 8, r["note"]))
            continue
        whole, part = (r["both"], "both") if r["both"] else (r["forward"], "forward")
        plain = r["reference"] and (r["reference"]["both"] or r["reference"]["forward"])
        bound = r.get(f"{part}_bound_ms")
        rows.append(
            (
                r["operation"],
                r["name"],
                r["backend"],
                figure(r["forward"]["ms"]),
                figure(r["both"]["ms"]) if r["both"] else "",
                figure(plain["ms"]) if plain else "",
                figure(plain["ms"] / whole["ms"]) if plain else "",
                figure(r[f"{part}_bytes"] / whole["ms"] / 1e6),
                figure((1 + BACKWARD_FLOPS * bool(r["both"])) * r["flops"] / whole["ms"] / 1e9 if r["flops"] else None),
                figure(bound),
                figure(whole["ms"] / bound) if bound else "",
                r["note"],
            )
        )
    columns = ("operation", "case", "runs as", "forward ms", "forward+backward ms", "reference ms", "times as fast")
    return Table("Times", (*columns, "GB/s", "TFLOP/s", "bound ms", "over bound", "note"), rows)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in dicts, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _size(tensors: Any) -> int:
    """Bytes of tensors, each counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
