"""Say which TPU slice a run needs before renting it: arithmetic, which any machine can do.

python examples/plan_run.py
"""

from qwen_jax.analysis.plan.search import Candidate
from qwen_jax.cli import plan_command


def main() -> Candidate:
    """The plan of fine-tuning Qwen2.5-7B at 8,192 tokens on a v5p slice of 32 chips, printed."""
    return plan_command.run(
        plan_command.Request(
            model="qwen2.5-7b",
            recipe="finetune",
            topology="v5p-64",  # "any" compares slices; v5p names count cores, two to a chip
            mesh="",  # every mesh that the slice's torus allows is tried
            length=8192,
            rows=None,
            batch=None,
            remat=None,
            purpose="train",
        ),
        picture=None,
    )


if __name__ == "__main__":
    main()
