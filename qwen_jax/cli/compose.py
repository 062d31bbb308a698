"""The one file of the command line that imports `train` and `infer`, both when a command runs.

An object of one package that the other needs is handed over here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from configs.data import DataConfig
from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from configs.server import ServerConfig
from configs.train import TrainConfig

if TYPE_CHECKING:
    import jax

    from infer.batch.batch_job import Summary
    from infer.eval.service_backend import ServiceBackend
    from infer.text.service import Service
    from qwen_jax.analysis.ahead_of_time import Compiled
    from qwen_jax.analysis.plan.job import Job
    from qwen_jax.tasks.task import Task


# -- training


def train(config: TrainConfig) -> int:
    """The exit code of the run that `config` describes."""
    from partitioning.processes import cluster
    from train.recipes import pretrain

    with cluster.joined(config.cluster):
        result = pretrain.run(config)
    print(f"{config.output}: {result.status} at step {result.step}")
    return result.exit_code


def texts(data: DataConfig) -> Iterator[str]:
    """The text of every training document of `data`."""
    from train.data import mixture

    corpora = mixture.open_splits(data).train
    return (corpus[number].text for corpus in corpora for number in range(len(corpus)))


# -- programs compiled ahead of time


def lower(job: "Job") -> "dict[str, jax.stages.Lowered]":
    """The programs of the job's purpose, by name, for the devices of its slice.

    Raises `ValueError` where the slice cannot be compiled for.
    """
    import jax.numpy as jnp

    from infer.engine import program_table
    from qwen_jax.analysis import ahead_of_time
    from train import executables

    kind = "engine" if job.purpose == "decode" else "train"
    layout = ahead_of_time.layout(job.where, job.config.mesh, kind=kind)
    if job.purpose == "decode":
        advance = program_table.lower_decode(
            job.cfg,
            EngineConfig(),
            layout,
            num_slots=job.config.batch_size // job.replicas,
            length=job.length,
            dtype=jnp.dtype(job.config.compute_dtype),
        )
        return {"advance": advance}
    return executables.lower(job.cfg, job.config, layout, purpose=job.purpose)


def compile_job(job: "Job", *, save: str | None) -> "dict[str, Compiled]":
    """The job's programs, compiled, printed beside the estimate, and saved in the folder `save`.

    Raises `ValueError` where the slice cannot be compiled for, or `save` is there already.
    """
    from rich import console

    from qwen_jax.analysis import ahead_of_time
    from qwen_jax.cli import tables
    from train import executables

    output = console.Console()
    lowered, compiled = lower(job), {}
    for name, one in lowered.items():
        with output.status(f"compiling {name} for {job.where.name}; minutes for large models"):
            compiled[name] = ahead_of_time.compile_program(
                one, flags=ahead_of_time.flags(job.where)
            )
    tables.show_compiled(output, job, compiled)
    if save is not None:
        key = executables.key(lowered, job.cfg, job.config, job.where)
        size = ahead_of_time.save(save, compiled, key)
        output.print(f"{save}: {', '.join(compiled)}, {size / 1e6:.0f} MB", highlight=False)
    return compiled


# -- inference


def load_service(
    model: str,
    *,
    settings: EngineConfig,
    sampling: Mapping[str, Any],
    dtype: str,
    mesh: str,
    draft: str | None,
    programs: str,
) -> "Service":
    """The model behind an engine of these settings, with its draft model where one is named.

    mesh: axis sizes, "" for one device. programs: the folder that compiled programs are stored in.
    """
    from infer.text import loading
    from partitioning import mesh as mesh_lib

    loading.keep_programs(programs)
    return loading.load(
        model,
        settings=settings,
        sampling=sampling,
        dtype=dtype,
        mesh=mesh_lib.parse(mesh) if mesh else None,
        draft=draft,
    )


def generate(service: "Service", prompt: str, *, write: Callable[[str], None]) -> None:
    """Writes the continuation of the prompt as it comes."""
    from infer.text import generate as generate_lib

    generate_lib.stream(service, prompt, settings=service.defaults, write=write)


def chat(
    service: "Service",
    *,
    system: str | None,
    read: Callable[[], str | None],
    write: Callable[[str], None],
) -> None:
    """Answers every line that `read` gives, until it gives None."""
    from infer.text import generate as generate_lib

    generate_lib.chat(service, settings=service.defaults, system=system, read=read, write=write)


def batch(
    load: "Callable[[], Service]",
    input: str,
    output: str,
    *,
    models: Sequence[str],
    share: str,
    order: Literal["arrival", "input"],
    max_open: int,
) -> "tuple[Service, Summary]":
    """The service that answered the input's lines, and the summary of the job.

    The model is loaded once `share` has been read.
    """
    from infer.batch import batch_job, progress
    from qwen_jax.text.chat import tool_calls

    part = batch_job.Share.parse(share)
    service = load()
    with progress.bar() as report:
        summary = batch_job.run(
            service,
            input,
            output,
            models=tuple(models),
            share=part,
            order=order,
            max_open=max_open,
            split_tool_calls=tool_calls.split,
            report=report,
        )
    return service, summary


def merge(input: str, output: str, *, count: int) -> str:
    """A line about the file that `count` shares of a batch were joined into."""
    from infer.batch import batch_job

    return str(batch_job.merge(input, output, count=count))


def serve(
    service: "Service",
    *,
    settings: ServerConfig,
    model_name: str,
    num_slots: int,
    on_program: Callable[[str], None],
) -> int:
    """The exit code of a server over this service; `on_program` is told of each compiled one."""
    from infer import server

    return server.run(
        service,
        settings=settings,
        model_name=model_name,
        num_slots=num_slots,
        warm_up=lambda: service.engine.warm_up(show=on_program),
        show=lambda text: print(text, flush=True),
    )


# -- evaluation


def evaluate(
    service: "Service",
    tasks: "Sequence[Task]",
    *,
    output: str,
    sampling: SamplingParams,
    subject: dict[str, str],
) -> None:
    """Runs the tasks, writes results and answers into `output`, and prints the table of scores."""
    from infer.eval import results_table, run

    backend = _backend(service)
    results_table.show(
        [run.run(backend, task, output, sampling=sampling, subject=subject) for task in tasks]
    )


def lm_eval(load: "Callable[[], Service]", tasks: Sequence[str], **options) -> dict[str, Any]:
    """The results of lm-evaluation-harness on these tasks; `options` are `harness.evaluate`'s.

    The model is loaded once the harness is known to be installed.
    """
    from infer.eval import harness

    return harness.evaluate(_backend(load()), tasks, **options)


def _backend(service: "Service") -> "ServiceBackend":
    from infer.eval.service_backend import ServiceBackend

    settings = service.engine.settings
    return ServiceBackend(
        service,
        max_length=min(settings.max_length, settings.num_pages * settings.page_size),
        num_open=2 * settings.num_slots,
    )
