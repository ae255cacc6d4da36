"""The figures of a simulation, as a table and as JSON."""

import math
from dataclasses import dataclass

from runtime.gpus import Gpu
from runtime.simulate import bounds as b
from scripts.planning.simulate import Simulation


@dataclass(frozen=True)
class Request:
    """What the plan is for."""

    gpu: Gpu
    gpus: int
    network: float  # bytes/s of a GPU between nodes
    price: float | None  # of a GPU-hour
    samples: float | None  # of the training set


def figures(simulation: Simulation, request: Request) -> dict:
    """Everything that the table shows: bytes, seconds and counts."""
    trace = simulation.trace
    config = simulation.config
    gpu = request.gpu
    bound = b.bounds(trace, gpu, config.precision, request.gpus, request.network)
    samples = simulation.setup.batch_size * config.accumulate
    fastest = samples / bound.compiled
    rate = samples / bound.eager
    hours = total_hours(simulation, request, bound.eager)
    fused_hours = total_hours(simulation, request, bound.compiled)
    return {
        "script": simulation.script,
        "gpu": gpu.name,
        "gpus": request.gpus,
        "precision": config.precision,
        "parallel": config.parallel,
        "activation_checkpointing": config.activation_checkpointing,
        "batch_size": simulation.setup.batch_size,
        "accumulate": config.accumulate,
        "global_batch": samples * request.gpus,
        "trained_parameters": simulation.trained,
        "assumed": simulation.setup.assumed,
        "memory": memory_figures(simulation, request),
        "work": {"flops": trace.flops, "bytes": trace.bytes, "launches": trace.launches},
        "seconds": {
            "eager": bound.eager,
            "fused": bound.compiled,
            "kernels": bound.device,
            "launches": bound.host,
            "products": bound.products,
            "communication": bound.communication,
            "exposed_communication": bound.exposed,
        },
        "mfu": {
            "eager": trace.flops / bound.eager / gpu.half,
            "fused": trace.flops / bound.compiled / gpu.half,
        },
        "places": [vars(place) for place in b.places(trace, gpu, config.precision)[:TOP]],
        "compiled_places": [
            vars(place) for place in b.compiled_places(trace, gpu, config.precision)[:TOP]
        ],
        "traffic": traffic_figures(simulation, request),
        "data": {
            "samples_per_second": [rate, fastest],
            "loader_cores": [rate / b.SAMPLES_PER_CORE, fastest / b.SAMPLES_PER_CORE],
            "bus_bytes_per_second": fastest * simulation.setup.image_bytes,
        },
        "checkpoint": {
            "bytes": simulation.checkpoint_bytes,
            "seconds": simulation.checkpoint_bytes / b.DISK,
        },
        "training": None if hours is None else {"hours": [fused_hours, hours]},
        "host_waits": [
            {"times": times, "phase": phase, "what": what, "line": line}
            for (phase, what, line), times in trace.waits.most_common()
        ],
        "simulated_seconds": simulation.seconds,
    }


TOP = 12


def memory_figures(simulation: Simulation, request: Request) -> dict:
    """Bytes at the peak, by part, and what the card has."""
    trace, card = simulation.trace, request.gpu.memory
    needed = b.memory_needed(trace, request.gpus)
    return {
        "peak": trace.peak,
        "peak_phase": trace.peak_phase,
        "parts": {name: size for name, size in trace.peak_parts.items() if size > 0},
        "beside": needed - trace.peak,
        "card": card,
        "fits": needed <= card,
        "fraction": needed / card,
    }


def traffic_figures(simulation: Simulation, request: Request) -> dict:
    """Bytes that a GPU sends a step, by kind, and the time they take over both kinds of links."""
    sent: dict[str, float] = {}
    node = between = 0.0
    for collective in simulation.trace.collectives:
        size = b.traffic(collective, request.gpus)
        sent[collective.name] = sent.get(collective.name, 0.0) + size
        node += size / request.gpu.link
        between += size / request.network
    return {
        "collectives": len(simulation.trace.collectives),
        "bytes": sent,
        "seconds_in_node": node,
        "seconds_between_nodes": between,
    }


def total_hours(simulation: Simulation, request: Request, step: float) -> float | None:
    """Hours of the whole training at `step` seconds an update; None where its length is not known."""
    from runtime.optim.schedule import steps

    config = simulation.config
    schedule = getattr(config, "scheduler", None)
    duration = schedule.duration if schedule is not None else config.duration
    batch = simulation.setup.batch_size * config.accumulate * request.gpus
    known = str(duration).endswith(("step", "steps", "sample", "samples"))
    if request.samples is None and not known:
        return None
    epoch = max(1, int((request.samples or batch) // batch))
    return steps(duration, epoch_steps=epoch, batch=batch) * step / 3600


def text(f: dict, price: float | None) -> str:
    """The table."""
    rows = [
        *_setting(f),
        *_memory(f),
        *_time(f),
        *_graphs(f),
        *_waits(f),
        *_traffic(f),
        *_data(f),
        *_training(f, price),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
    for kind, name in (("eager", "places"), ("compiled", "compiled_places")):
        lines += ["", f"where the time of a step goes, {kind} (bounds):"]
        for p in f[name]:
            what = f"{p['count']:>5} x {p['name']} {p['dtype']}"
            lines.append(f"  {p['seconds'] * 1e3:7.2f} ms {what:<58} {p['phase']:<9} {p['line']}")
    if f["host_waits"]:
        lines += ["", "the host waits for the card:"]
        for w in f["host_waits"]:
            lines.append(f"  {w['times']:>5} x {w['what']} ({w['phase']})  {w['line']}")
    return "\n".join(lines)


def _setting(f: dict) -> list[tuple[str, str]]:
    wrapped = f["parallel"] + ", activation checkpointing" * f["activation_checkpointing"]
    return [
        (
            "recipe",
            f"{f['script']}.py, {f['trained_parameters'] / 1e6:,.1f} M parameters trained",
        ),
        ("cards", f"{f['gpus']} x {f['gpu']}, {f['precision']}, {wrapped}"),
        (
            "batch",
            f"{f['batch_size']} a GPU x {f['accumulate']} micro-batches x {f['gpus']} GPUs = "
            f"{f['global_batch']:,}",
        ),
        ("assumed", "; ".join(f["assumed"])),
    ]


def _memory(f: dict) -> list[tuple[str, str]]:
    m = f["memory"]
    parts = sorted(m["parts"].items(), key=lambda part: -part[1])
    verdict = "fits" if m["fits"] else "DOES NOT FIT"
    return [
        (
            "memory",
            f"{gigabytes(m['peak'])} of tensors at the peak ({m['peak_phase']}) + about "
            f"{gigabytes(m['beside'])} of context, workspaces and fragments, of "
            f"{gigabytes(m['card'])}: {verdict} ({m['fraction']:.0%})",
        ),
        ("", ", ".join(f"{name} {gigabytes(size)}" for name, size in parts)),
    ]


def _time(f: dict) -> list[tuple[str, str]]:
    w, s, mfu = f["work"], f["seconds"], f["mfu"]
    return [
        (
            "work",
            f"{w['flops'] / 1e12:,.2f} TFLOP, {w['bytes'] / 1e9:,.1f} GB read and written, "
            f"{w['launches']:,} launches a step",
        ),
        (
            "step, eager",
            f"at least {milliseconds(s['eager'])} (kernels {milliseconds(s['kernels'])}, of which "
            f"products {milliseconds(s['products'])}; launches {milliseconds(s['launches'])}); "
            f"MFU at most {mfu['eager']:.0%}",
        ),
        (
            "step, compiled",
            f"at least {milliseconds(s['fused'])} (memory-bound operations with no product "
            f"between them fused into one); MFU at most {mfu['fused']:.0%}",
        ),
    ]


def _graphs(f: dict) -> list[tuple[str, str]]:
    """What torch.compile would capture; nothing where it was not asked for."""
    if "graphs" not in f:
        return []
    g = f["graphs"]
    breaks = sum(g["breaks"].values())
    said = f"{g['graphs']} captured, {breaks} graph breaks, {g['recompiled']} recompilations"
    rows = [("graphs", said + " in two more steps of the same shapes")]
    return rows + [("", f"{times} x {reason}") for reason, times in g["breaks"].items()]


def _waits(f: dict) -> list[tuple[str, str]]:
    """How often the host waits for the card; the places are listed at the end."""
    times = sum(wait["times"] for wait in f["host_waits"])
    return [("host waits", f"{times} a step, listed below" if times else "none")]


def _traffic(f: dict) -> list[tuple[str, str]]:
    t = f["traffic"]
    if not t["collectives"]:
        return [("traffic", "none: one process")]
    sent = ", ".join(f"{name} {gigabytes(size)}" for name, size in t["bytes"].items())
    return [
        ("traffic", f"{t['collectives']} collectives a step; a GPU sends {sent}"),
        (
            "",
            f"over NVLink {milliseconds(t['seconds_in_node'])}, over the network "
            f"{milliseconds(t['seconds_between_nodes'])}; not hidden by the backward pass "
            f"{milliseconds(f['seconds']['exposed_communication'])}",
        ),
    ]


def _data(f: dict) -> list[tuple[str, str]]:
    d, c = f["data"], f["checkpoint"]
    low, high = d["samples_per_second"]
    few, many = d["loader_cores"]
    return [
        (
            "data",
            f"up to {low:,.0f} samples/s a GPU eager, {high:,.0f} compiled: about "
            f"{whole_cores(few, many)} a GPU; {d['bus_bytes_per_second'] / 1e9:.2f} GB/s of "
            "images over the bus",
        ),
        ("checkpoint", f"{gigabytes(c['bytes'])}, about {c['seconds']:.0f} s to write"),
    ]


def _training(f: dict, price: float | None) -> list[tuple[str, str]]:
    if f["training"] is None:
        return [("training", "of unknown length: give --samples, the size of the training set")]
    low, high = f["training"]["hours"]
    gpu_hours = f"{low * f['gpus']:,.0f} to {high * f['gpus']:,.0f} GPU-hours"
    money = (
        ""
        if price is None
        else f", {low * f['gpus'] * price:,.0f} to {high * f['gpus'] * price:,.0f} at {price:g} a GPU-hour"
    )
    return [
        ("training", f"at least {low:,.1f} (compiled) to {high:,.1f} hours: {gpu_hours}{money}")
    ]


def whole_cores(few: float, many: float) -> str:
    """A range of loader cores; part of one is one."""
    least, most = math.ceil(few), math.ceil(many)
    if least == most:
        return f"{least} loader core" + "s" * (least > 1)
    return f"{least} to {most} loader cores"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def milliseconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 10 else f"{value:,.1f} s"
