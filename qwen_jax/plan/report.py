"""The plan as text: what is recommended, why, and what else there is."""

import math

from rich import console, table

from qwen_jax.plan import communication, job, memory, roofline, search
from qwen_jax.plan.search import Candidate

GiB = 2**30
_MOST_ROWS = 12


def show(found: list[Candidate], refused: list[tuple[str, str]], best: Candidate) -> None:
    """The slice, the recommendation with its memory and time, and the other ways to run."""
    output = console.Console()
    where, cfg = best.job.where, best.job.cfg
    limit = memory.limit(best.job, reserve=search.RESERVE)
    output.print(
        f"{cfg.name}, {best.job.purpose}, {best.job.length:,} tokens a row, on {where.name}: "
        f"{where.num_chips} chip(s) of {where.chip.name}"
        + (f" ({where.shape_name})" if where.chip.torus_rank else "")
        + f", {where.num_devices} device(s), {where.hosts} machine(s)",
        highlight=False,
        soft_wrap=True,
    )
    _show_best(output, best, limit)
    output.print(_memory_table(best, limit))
    output.print(_time_table(best.step))
    if best.step.transfers:
        output.print(_transfer_table(best))
    if len(found) > 1:
        output.print(_others(found))
    if refused:
        output.print(f"{len(refused)} mesh(es) do not divide, for example:", highlight=False)
        for mesh, reason in refused[:3]:
            output.print(f"  {mesh}: {reason}", highlight=False, soft_wrap=True)
    output.print(
        "Times are those of a roofline: every unit at its data sheet's peak, so a real step takes "
        "longer. Memory is an estimate; --compile asks the compiler.",
        highlight=False,
        soft_wrap=True,
    )


def _show_best(output: console.Console, best: Candidate, limit: float | None) -> None:
    one, config = best.job, best.job.config
    batch = one.rows * one.layout.size("batch")
    settings = f"mesh {one.mesh_text}, remat {config.remat}, "
    if one.purpose == "decode":
        settings = f"mesh {one.mesh_text}, "
    output.print(
        f"Recommended: {settings}batch {batch} = {one.rows} row(s) on each of "
        f"{one.layout.size('batch')} part(s)",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    used = f"{memory_text(best.memory.total)} a device"
    if limit is not None:
        hbm = one.where.chip.device_hbm_bytes
        used += f" of {memory_text(hbm)}, {best.memory.total / hbm:.0%}"
    step = best.step
    if step.step_seconds is None:
        output.print(f"  {used}; no time: {step.binds}", highlight=False, soft_wrap=True)
        return
    output.print(
        f"  {used}; {seconds_text(step.step_seconds)} a "
        f"{'token' if one.purpose == 'decode' else 'step'}, {step.tokens_per_second:,.0f} tokens/s "
        f"({best.speed:,.0f} a chip); {step.binds} binds",
        highlight=False,
        soft_wrap=True,
    )


def memory_text(num_bytes: float) -> str:
    """In GiB, two decimals."""
    return f"{num_bytes / GiB:.2f} GiB"


def seconds_text(seconds: float) -> str:
    """In seconds or milliseconds, three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _grid(title: str, *headings: str) -> table.Table:
    grid = table.Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if index == 0 else "right")
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
    grid = _grid("Sent by a device in a step", "mesh axes", "GB", "GB/s", "why")
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


def _others(found: list[Candidate]) -> table.Table:
    """The best of each mesh, the best meshes first."""
    grid = _grid(
        f"Legal meshes, the best of each ({len(found)} ways tried)",
        "mesh", "remat", "rows", "GiB", "fits", "step", "tokens/s a chip", "MFU", "binds",
    )  # fmt: skip
    shown: dict[str, Candidate] = {}
    for one in found:
        shown.setdefault(one.job.mesh_text, one)
    for one in list(shown.values())[:_MOST_ROWS]:
        grid.add_row(*_row(one))
    if len(shown) > _MOST_ROWS:
        grid.caption = f"and {len(shown) - _MOST_ROWS} more"
    return grid


def _row(one: Candidate) -> tuple[str, ...]:
    step = one.step
    timed = step.step_seconds is not None
    return (
        one.job.mesh_text,
        one.policy if one.job.purpose == "train" else "",
        str(one.job.rows),
        f"{one.memory.total / GiB:.1f}",
        "yes" if one.fits() else "no",
        seconds_text(step.step_seconds) if timed else "",
        f"{one.speed:,.0f}" if timed else "",
        f"{step.mfu_causal:.0%}" if timed else "",
        step.binds if timed else "",
    )


def show_rent(ranked: list[Candidate], skipped: dict[str, str]) -> None:
    """Slices to rent, and chips on which nothing that is sold suffices."""
    output = console.Console()
    one = ranked[0].job
    grid = _grid(
        f"{one.cfg.name}, {one.purpose}, {one.length:,} tokens a row: slices that fit",
        "slice", "chips", "mesh", "remat", "batch", "GiB of", "tokens/s a chip", "tokens/s", "MFU",
        "binds",
    )  # fmt: skip
    for each in ranked:
        where, job_ = each.job.where, each.job
        hbm = where.chip.device_hbm_bytes
        grid.add_row(
            where.name,
            str(where.num_chips),
            job_.mesh_text,
            each.policy,
            str(job_.rows * job_.layout.size("batch")),
            f"{each.memory.total / GiB:.0f} of {hbm / GiB:.0f}",
            f"{each.speed:,.0f}",
            f"{each.step.tokens_per_second:,.0f}",
            f"{each.step.mfu_causal:.0%}",
            each.step.binds,
        )
    output.print(grid)
    for chip, reason in skipped.items():
        output.print(f"{chip}: {reason}", highlight=False, soft_wrap=True)
    fastest, smallest = ranked[0], min(ranked, key=lambda c: c.job.where.num_chips)
    output.print(why(fastest, smallest), highlight=False, soft_wrap=True)


def why(fastest: Candidate, smallest: Candidate) -> str:
    """The advice in words."""
    one = fastest.job
    state = 16 * sum(math.prod(leaf.shape) for leaf in job.parameters(one))
    where = one.where
    lines = [
        f"Rent {where.name}: {where.num_chips} chip(s), {fastest.step.tokens_per_second:,.0f} "
        f"tokens/s at best. Try: qwen-jax plan --model {one.cfg.name} --topology {where.name} "
        f"--length {one.length}",
        f"Why: parameters, moments and gradients take {state / GiB:,.0f} GiB in all, and a row of "
        f"{one.length:,} tokens its activations; {where.name} holds that with "
        f"{fastest.memory.total / where.chip.device_hbm_bytes:.0%} of each device's memory and has "
        f"the highest rate a chip of those above; {fastest.step.binds} binds.",
    ]
    if smallest.job.where != where:
        lines.append(
            f"The fewest chips that hold it: {smallest.job.where.name}, "
            f"{smallest.step.tokens_per_second:,.0f} tokens/s at best. Prices are not known here: "
            f"divide yours by the rates."
        )
    return "\n".join(lines)
