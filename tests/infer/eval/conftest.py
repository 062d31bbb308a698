"""A tiny model in a folder, and tasks of lm-evaluation-harness over a local file."""

import shutil

import pytest

from tests.qwen_jax.tasks import samples

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {shots}
metadata: {{version: 1.0}}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """\
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:", "\\n\\n"], do_sample: false, max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "#### ([0-9]+)"}, {function: take_first}]
  - name: any
    filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, hf_folder):
    """It ends at its config's end token alone, the only one that the harness heeds."""
    path = shutil.copytree(hf_folder, tmp_path_factory.mktemp("model") / "random")
    (path / "generation_config.json").unlink()
    return path


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    records = [
        {
            "question": f"{'a longer story about ' * (i % 3)}what is {i} and {i}?",
            "choices": [f"{i}", f"{2 * i} or so", "none of them at all", " an empty word"],
            "gold": i % 4,
            "answer": f"{2 * i}",
        }
        for i in range(12)
    ]
    records[5]["question"] = "a text far beyond what the model can hold " * 14
    file = samples.write_lines(folder / "data.jsonl", records)
    for name, body, shots in (
        ("choice", CHOICE, 2), ("rolling", ROLLING, 0), ("writing", WRITING, 1)
    ):  # fmt: skip
        text = TASK.format(name=f"local_{name}", file=file, shots=shots) + body
        (folder / f"{name}.yaml").write_text(text)
    return folder
