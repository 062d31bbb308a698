"""The plan as text: the recommendation, the reasons, and the alternatives."""

from rich import box, console, table

from configs import mesh as mesh_config
from qwen_jax.analysis.plan import communication, memory, roofline, search
from qwen_jax.analysis.plan.search import Candidate

GiB = 2**30
_MOST_ROWS = 12
_WHAT = {"train": "training", "eval": "evaluation", "decode": "decoding"}
_BINDS = {
    "compute": "arithmetic",
    "HBM": "memory traffic",
    "hidden transfers": "transfers beside arithmetic",
    "exposed transfers": "transfers that arithmetic waits for",
}
_SHORT = {
    "compute": "compute",
    "HBM": "HBM",
    "hidden transfers": "links",
    "exposed transfers": "waits",
}
_KEY = (
    "rows: of a device, at one time. !: more than may be used. links: transfers beside arithmetic. "
    "waits: transfers that arithmetic waits for."
)
_SLICES_KEY = (
    "batch 32 in 4: 32 rows a step, in 4 micro-batches (accumulate_steps). chip-hours: of a "
    "billion tokens. links: transfers beside arithmetic. waits: those that it waits for."
)


def show_slice(
    found: list[Candidate],
    refused: list[tuple[str, str]],
    best: Candidate,
    *,
    recipe: str | None = None,
) -> None:
    """Prints the slice, the recommendation with its memory and time, and the other meshes."""
    output = console.Console()
    where = best.job.where
    limit = memory.limit(best.job, reserve=search.RESERVE)
    _print(
        output,
        f"{_title(best)}, on {where.name}: {where.num_chips} chip(s) of {where.chip.name}"
        + (f" ({where.shape_name})" if where.chip.torus_rank else "")
        + f", {where.num_devices} device(s), {where.hosts} machine(s)",
    )
    _show_best(output, best, limit)
    output.print(_memory_table(best, limit))
    output.print(_time_table(best.step))
    if best.step.transfers:
        output.print(_transfer_table(best))
    if len(found) > 1:
        output.print(_other_meshes(found))
    if refused:
        _print(output, f"{len(refused)} mesh(es) do not divide, for example:")
        for mesh, reason in refused[:3]:
            _print(output, f"  {mesh}: {reason}")
    _print(output, _caution(best))
    if best.job.purpose == "train":
        _print(output, f"Train with: {train_command(best, recipe=recipe)}")


def _print(output: console.Console, text: str, *, style: str | None = None) -> None:
    output.print(text, style=style, highlight=False, soft_wrap=True)


def _title(one: Candidate) -> str:
    job = one.job
    return f"{job.cfg.name}, {_WHAT[job.purpose]}, {job.length:,} tokens a row"


def _caution(one: Candidate) -> str:
    on_tpu = one.job.where.chip.platform == "tpu"
    against = (
        "within 15% of the TPU compiler's wherever both were compared"
        if on_tpu
        else "not compared with a compiler"
    )
    ask = "; --compile asks the compiler" if on_tpu else ""
    return (
        "Times are those of a roofline: every unit at its data sheet's peak. Published runs reach "
        f"half to three quarters of that. Memory is an estimate, {against} (docs/planning.md){ask}."
    )


def settings_text(one: Candidate) -> str:
    """The settings of a candidate as text: mesh, policy, batch."""
    job = one.job
    parts = [job.mesh_text]
    if job.purpose == "train":
        parts.append(one.policy)
        times = job.config.accumulate_steps
        parts.append(f"batch {job.config.batch_size}" + (f" in {times}" if times > 1 else ""))
    else:
        parts.append(f"batch {job.rows * job.layout.size('batch')}")
    return ", ".join(parts)


def train_command(one: Candidate, *, recipe: str | None) -> str:
    """The command that trains a candidate; without a recipe it says RECIPE in its place."""
    config = one.job.config
    mesh = " ".join(
        f"--mesh.{axis.replace('_', '-')} {getattr(config.mesh, axis)}"
        for axis in (*mesh_config.MESH_AXES, "dcn_data")
        if axis == "fsdp" or getattr(config.mesh, axis) > 1
    )
    kv_heads = " --mesh.kv-heads replicated" if config.mesh.kv_heads == "replicated" else ""
    return (
        f"qwen-jax train {recipe or 'RECIPE'} --model {one.job.cfg.name} "
        f"--data.sequence-length {one.job.length} --batch-size {config.batch_size} "
        f"--accumulate-steps {config.accumulate_steps} --remat {config.remat} {mesh}{kv_heads}"
    )


def _show_best(output: console.Console, best: Candidate, limit: float | None) -> None:
    one, config = best.job, best.job.config
    batch = one.rows * one.layout.size("batch")
    settings = f"mesh {one.mesh_text}, "
    times = ""
    if one.purpose == "train":
        settings += f"remat {config.remat}, "
        batch, parts = config.batch_size, config.accumulate_steps
        times = f", {parts} times a step (accumulate_steps)" if parts > 1 else ""
    _print(
        output,
        f"Recommended: {settings}batch {batch} = {one.rows} row(s) on each of "
        f"{one.replicas} part(s) of the mesh{times}",
        style="bold",
    )
    used = f"{memory_text(best.memory.total)} a device"
    if limit is not None:
        hbm = one.where.chip.device_hbm_bytes
        used += f" of {memory_text(hbm)}, {best.memory.total / hbm:.0%}"
    step = best.step
    if step.step_seconds is None:
        _print(output, f"  {used}; no time: {step.binds}")
        return
    each = "token" if one.purpose == "decode" else "step"
    _print(
        output,
        f"  {used}; {seconds_text(step.step_seconds)} a {each}, {step.tokens_per_second:,.0f} "
        f"tokens/s ({best.speed:,.0f} a chip); what binds: {_BINDS[step.binds]}",
    )


def memory_text(num_bytes: float) -> str:
    """Memory as text in GiB, two decimals."""
    return f"{num_bytes / GiB:.2f} GiB"


def seconds_text(seconds: float) -> str:
    """Time as text in seconds or milliseconds, three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _grid(title: str, *headings: str, text_headings: tuple[str, ...] = (), caption: str = ""):
    """A table that still reads on 80 columns; `text_headings` may fold."""
    grid = table.Table(
        title=title,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for index, heading in enumerate(headings):
        is_text = index == 0 or heading in text_headings
        grid.add_column(
            heading,
            justify="left" if is_text else "right",
            no_wrap=heading not in text_headings,
            overflow="fold",
        )
    return grid


def _memory_table(best: Candidate, limit: float | None) -> table.Table:
    grid = _grid(f"Memory of a device, at its peak: {best.memory.peak}", "kind", "GiB")
    for name, num_bytes in best.memory.kinds.items():
        grid.add_row(memory.KINDS[name], f"{num_bytes / GiB:.2f}")
    grid.add_section()
    grid.add_row("total", f"{best.memory.total / GiB:.2f}")
    if limit is not None:
        grid.add_row(f"limit, {search.RESERVE:.0%} kept free", f"{limit / GiB:.2f}")
    if best.memory.host:
        grid.add_row("in host memory, a device", f"{best.memory.host / GiB:.2f}")
    return grid


def _time_table(step: roofline.Step) -> table.Table:
    grid = _grid("One step of a device", "what", "amount", "time")
    times = {name: seconds_text(value) for name, value in step.seconds.items()}
    grid.add_row("operations", f"{step.flops / 1e12:,.4g} TFLOP", times.get("compute", ""))
    share = step.repeated / step.flops
    grid.add_row("  of them repeated", f"{step.repeated / 1e12:,.4g} TFLOP ({share:.0%})", "")
    grid.add_row("HBM traffic, at least", f"{step.hbm_bytes / 1e9:,.4g} GB", times.get("HBM", ""))
    for name, overlapped in (("hidden transfers", True), ("exposed transfers", False)):
        moved = sum(t.num_bytes for t in step.transfers if t.overlapped == overlapped)
        grid.add_row(name, f"{moved / 1e9:,.4g} GB", times.get(name, ""))
    if step.step_seconds is not None:
        grid.add_section()
        grid.add_row("step", f"{step.tokens:,.0f} tokens", seconds_text(step.step_seconds))
        mfu = f"{step.mfu_causal:.0%} / {step.mfu_full:.0%}"
        grid.add_row("MFU at most, attention causal / full", mfu, "")
    return grid


def _transfer_table(best: Candidate) -> table.Table:
    grid = _grid(
        "Sent by a device in a step", "mesh axes", "GB", "GB/s", "why", text_headings=("why",)
    )
    for over, total in communication.by_axes(best.step.transfers).items():
        rate = ""
        if best.step.seconds:
            rate = f"{roofline.bandwidth(best.job, tuple(over.split('*'))) / 1e9:,.0f}"
        grid.add_row(over, f"{total / 1e9:,.3g}", rate, "")
        for transfer in best.step.transfers:
            if transfer.over == over:
                hidden = ", hidden" if transfer.overlapped else ""
                amount = f"{transfer.num_bytes / 1e9:,.3g}"
                grid.add_row("", amount, "", f"{transfer.reason}{hidden}")
    return grid


def _other_meshes(found: list[Candidate]) -> table.Table:
    """Table of the best candidate of each mesh, the best meshes first."""
    shown: dict[str, Candidate] = {}
    for one in found:
        shown.setdefault(one.job.mesh_text, one)
    grid = _grid(
        f"Legal meshes, each at its best ({min(len(shown), _MOST_ROWS)} of {len(shown)}; "
        f"{len(found)} ways tried)",
        "mesh", "remat", "rows", "GiB", "tok/s/chip", "MFU", "binds",
        caption=_KEY,
    )  # fmt: skip
    for one in list(shown.values())[:_MOST_ROWS]:
        step, timed = one.step, one.step.step_seconds is not None
        grid.add_row(
            one.job.mesh_text,
            one.policy if one.job.purpose == "train" else "",
            str(one.job.rows),
            f"{one.memory.total / GiB:.1f}" + ("" if one.fits() else "!"),
            f"{one.speed:,.0f}" if timed else "",
            f"{step.mfu_causal:.0%}" if timed else "",
            _SHORT[step.binds] if timed else "",
        )
    return grid


def show_slices(ranking: search.SliceRanking, *, recipe: str | None = None) -> None:
    """Prints the slice to rent and why, the others that fit, and the chips without one."""
    output = console.Console()
    best = ranking.ranked[0]
    _print(output, _title(best) + (f", recipe {recipe}" if recipe else ""))
    _print(output, f"Rent {_slice_text(best)}, unless prices say otherwise.", style="bold")
    for line in advice(ranking):
        _print(output, line)
    grid = _grid(
        "Slices that fit: of each chip the smallest, and the next larger one",
        "slice", "chips", "memory", "tokens/s", "chip-hours", "binds", "mesh, remat, batch",
        text_headings=("mesh, remat, batch",), caption=_SLICES_KEY,
    )  # fmt: skip
    for one in ranking.ranked:
        grid.add_row(
            one.job.where.name,
            str(one.job.where.num_chips),
            f"{one.memory.total / one.job.where.chip.device_hbm_bytes:.0%}",
            f"{one.step.tokens_per_second:,.0f}",
            chip_hours(one),
            _SHORT[one.step.binds],
            settings_text(one),
        )
    output.print(grid)
    for chip, reason in ranking.skipped.items():
        _print(output, f"Not {chip}: {reason}.")
    _print(output, _caution(best))
    _print(output, f"In detail: qwen-jax plan {_plan_flags(best, recipe=recipe)}")
    if best.job.purpose == "train":
        _print(output, f"Train with: {train_command(best, recipe=recipe)}")
    if best.job.where.chip.platform == "tpu":
        _print(output, "How to rent a slice and start a run on it: docs/cloud_tpu.md")


def chip_hours(one: Candidate) -> str:
    """Chip-hours of a billion tokens at best, two digits at least."""
    hours = 1e9 / one.speed / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def _slice_text(one: Candidate) -> str:
    where = one.job.where
    shape = f", {where.shape_name}" if where.chip.torus_rank else ""
    return f"{where.name} ({where.num_chips} chip(s){shape}, {where.hosts} machine(s))"


def _plan_flags(one: Candidate, *, recipe: str | None) -> str:
    flags = f"--model {one.job.cfg.name} --topology {one.job.where.name} --length {one.job.length}"
    flags += f" --recipe {recipe}" if recipe else ""
    return flags + ("" if one.job.purpose == "train" else f" --purpose {one.job.purpose}")


def advice(ranking: search.SliceRanking) -> list[str]:
    """Sentences of advice: what has to fit, what is too small, what binds, how to use prices."""
    best = ranking.ranked[0]
    where, kinds = best.job.where, best.memory.kinds
    parts = sorted(kinds, key=lambda name: -kinds[name])[:4]
    listed = ", ".join(f"{memory.KINDS[name]} {memory_text(kinds[name])}" for name in parts)
    lines = [
        f"Memory: {memory_text(best.memory.total)} of a device's "
        f"{memory_text(where.chip.device_hbm_bytes)}, most of it {listed}."
    ]
    smaller = ranking.too_small.get(where.chip.name)
    if smaller is not None:
        least = memory_text(smaller.memory.total)
        lines.append(
            f"Smaller does not do: on {smaller.job.where.name} a device needs at least {least} "
            f"({settings_text(smaller)}), and may use "
            f"{memory_text(memory.limit(smaller.job, reserve=search.RESERVE))}."
        )
    lines.append(
        f"Speed: {best.step.tokens_per_second:,.0f} tokens/s at best; what binds: "
        f"{_BINDS[best.step.binds]}. A billion tokens take {chip_hours(best)} chip-hours, the "
        f"fewest below."
    )
    fewest = min(ranking.ranked, key=lambda one: one.job.where.num_chips)
    if fewest.job.where != where:
        lines.append(
            f"Fewest chips: {_slice_text(fewest)}, {fewest.step.tokens_per_second:,.0f} tokens/s."
        )
    lines.append(
        "Prices are not known here: multiply the chip-hours by yours, and rent what costs least."
    )
    return lines
