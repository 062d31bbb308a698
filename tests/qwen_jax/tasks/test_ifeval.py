"""Checks of instructions: what follows each kind and what does not, strict and loose."""

import json
import os
from pathlib import Path

import pytest

from qwen_jax.tasks.ifeval import ifeval, instruction_checks
from qwen_jax.tasks.ifeval.instruction_checks import CHECKS
from qwen_jax.tasks.task import Answer
from tests.qwen_jax.tasks import samples

ENGLISH = "The quick brown fox jumps over the lazy dog, and everybody was happy about it."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und alle waren sehr zufrieden."
LESS, LEAST = "less than", "at least"

# kind, options, texts that follow, texts that do not
CASES = [
    ("keywords:existence", {"keywords": ["land", "c++"]}, ["An ISLAND in C++"], ["land, c"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": LEAST},
     ["War, warm"], ["war"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": LESS},
     ["war", "none"], ["war war"]),
    ("keywords:forbidden_words", {"forbidden_words": ["art", "b"]},
     ["a party"], ["The ART of", "a b."]),
    ("keywords:letter_frequency", {"letter": "c", "let_frequency": 3, "let_relation": LEAST},
     ["Cacao c"], ["Cacao"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": LESS},
     ["well"], ["well!"]),
    ("language:response_language", {"language": "de"}, [GERMAN, "12 + 3"], [ENGLISH]),
    ("length_constraints:number_sentences", {"relation": LESS, "num_sentences": 3},
     ["One. Two!", "One? Mr. Smith came.", "Version 3.5 is out. It is good"], ["One. Two. Three."]),
    ("length_constraints:number_sentences", {"relation": LEAST, "num_sentences": 2},
     ['"Go!" He went.', "One...\nTwo."], ["One, e.g. this, only"]),
    ("length_constraints:number_words", {"relation": LEAST, "num_words": 3},
     ["well-known it"], ["two words"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\n***\nb", "***\na *** b\n***"], ["a\n\nb", "a\n***\n***\nb", "a"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "jasper"},
     ["a\n\nJasper, who", 'a\n\n"Jasper" is', "a\n\njasper's"],
     ["Jasper\n\na", "a\n\nb\n\nJasper", "jasper"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[name] at [place]"], ["[name]", "[a\nb] [c]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Bye\nP.S. more", "p. s. more"], ["PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"},
     ["P.P.S more", "p. p. s"], ["P.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n* b", "- a\n text\n  * b"], ["* a", "* a\n- b\n- c", "** a\n* b"]),
    ("detectable_format:constrained_response", {},
     ["Well. My answer is no. Really."], ["My answer is No.", "yes"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*a* and *b*", "**a** *b*"], ["*a*", "* a\n* b", "** **"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\na\nSECTION2 b"], ["SECTION 1\nSection 2", "SECTION A SECTION B"]),
    ("detectable_format:json_format", {},
     ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n3\n```"], ["{'a': 1}", 'Here: {"a": 1}']),
    ("detectable_format:title", {}, ["<<A poem>>\ntext"], ["<A>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {},
     ["a******b", "******a\n******\nb"], ["a******a", "a", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write it. "},
     [" write it. Here"], ["Sure. Write it."]),
    ("startend:end_checker", {"end_phrase": "Any other questions?"},
     ["Yes.\nany OTHER questions? ", '"Any other questions?"'], ["Any other questions? No."]),
    ("startend:quotation", {}, [' "a" '], ['"', '"a', "'a'"]),
    ("change_case:capital_word_frequency", {"capital_relation": LEAST, "capital_frequency": 3},
     ["I am VERY (LOUD)!", "A-B NATO, OK"], ["I am Loud", "X 1 2"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper()]),
    ("change_case:english_lowercase", {}, [ENGLISH.lower()], [ENGLISH, GERMAN.lower()]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "good", "bad"), CASES, ids=lambda x: str(x)[:40])
def test_a_check_tells_what_follows(kind, options, good, bad):
    if kind.startswith(("language:", "change_case:english")):
        pytest.importorskip("langdetect")
    for text in good:
        assert CHECKS[kind](text, **options), text
    for text in bad:
        assert not CHECKS[kind](text, **options), text


def test_every_kind_has_a_case():
    assert {kind for kind, *_ in CASES} == set(CHECKS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two? Three! Four", 4),
        ("Dr. Who met Mr. Smith. Then he left.", 2),
        ("It costs 3.50 dollars. Cheap!", 2),
        ("J. R. R. Tolkien wrote it.", 1),
        ("Wait... what? Yes.", 2),
        ('He said "Stop!" She didn\'t.', 2),
        ("www.example.com is a site.", 1),
    ],
)
def test_sentences_are_counted(text, count):
    assert instruction_checks.count_sentences(text) == count


def test_strict_and_loose(tmp_path):
    pytest.importorskip("langdetect")
    task = ifeval.load(samples.write_lines(tmp_path / "ifeval.jsonl", samples.IFEVAL))
    first, second = task.items
    assert first.question == samples.IFEVAL[0]["prompt"] and task.stop == ()

    def judged(item, text):
        return task.grade(item, Answer(texts=(text,))).metrics

    assert judged(first, "a tree and a tree") == {
        "prompt_strict": (1.0,),
        "instruction_strict": (1.0, 1.0),
        "prompt_loose": (1.0,),
        "instruction_loose": (1.0, 1.0),
    }
    # The first line breaks a rule, and the keyword is cut by asterisks.
    got = judged(first, "Sure, here it is:\na tr*ee and a tree")
    assert got["instruction_strict"] == (0.0, 0.0) and got["prompt_strict"] == (0.0,)
    assert got["instruction_loose"] == (1.0, 1.0) and got["prompt_loose"] == (1.0,)
    assert judged(first, "a tree")["instruction_strict"] == (1.0, 0.0)
    assert judged(first, " \n ")["instruction_loose"] == (0.0, 0.0), "nothing follows nothing"
    assert judged(second, "<<T>>")["prompt_strict"] == (1.0,)


def test_loosening():
    assert ifeval.loose_variants("a\n*b*\nc") == [
        "a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["punctuation:none"], [{}], "unknown instruction 'punctuation:none'"),
        (["keywords:existence"], [{}], r"keywords:existence needs \['keywords'\], not \[\]"),
        (["punctuation:no_comma"], [{"n": 1}], r"no_comma needs \[\], not \['n'\]"),
    ],
)
def test_unknown_instructions_are_refused(tmp_path, names, options, message):
    pytest.importorskip("langdetect")
    record = {"key": 3, "prompt": "p", "instruction_id_list": names, "kwargs": options}
    path = samples.write_lines(tmp_path / "ifeval.jsonl", [record])
    with pytest.raises(ValueError, match=f"key 3: .*{message}"):
        ifeval.load(path)


def counted(unit: str, threshold: int, relation: str = LEAST) -> tuple[str, str]:
    """Texts with so many units that one just follows the relation and the other just does not."""
    below, reached = (f"0 {unit * count}" for count in (threshold - 1, threshold))
    return (reached, below) if relation == LEAST else (below, reached)


# kind -> from the published options, a text that follows the instruction and one that does not
WRITERS = {
    "keywords:existence": lambda keywords: (" ".join(keywords), "0"),
    "keywords:frequency": lambda keyword, frequency, relation: counted(
        f"{keyword.strip()} ", frequency, relation
    ),
    "keywords:forbidden_words": lambda forbidden_words: ("0", f"0 {forbidden_words[-1]} 0"),
    "keywords:letter_frequency": lambda letter, let_frequency, let_relation: counted(
        letter, let_frequency, let_relation
    ),
    "language:response_language": lambda language: (
        GERMAN if language == "de" else "12 + 3", ENGLISH
    ),
    "length_constraints:number_sentences": lambda num_sentences, relation: tuple(
        text.removeprefix("0 ") for text in counted("And so on. ", num_sentences, relation)
    ),
    "length_constraints:number_words": lambda num_words, relation: tuple(
        text.removeprefix("0 ") or "..." for text in counted("word ", num_words, relation)
    ),
    "length_constraints:number_paragraphs": lambda num_paragraphs: (
        "\n***\n".join("a" * num_paragraphs), "\n***\n".join("a" * (num_paragraphs + 1))
    ),
    "length_constraints:nth_paragraph_first_word":
        lambda num_paragraphs, nth_paragraph, first_word: (
            "\n\n".join(
                first_word if i == nth_paragraph else "a" for i in range(1, num_paragraphs + 1)
            ),
            "\n\n".join("a" * num_paragraphs),
        ),
    "detectable_content:number_placeholders": lambda num_placeholders: counted(
        "[a] ", num_placeholders
    ),
    "detectable_content:postscript": lambda postscript_marker: (f"0\n{postscript_marker} 0", "0"),
    "detectable_format:number_bullet_lists": lambda num_bullets: (
        "* a\n" * num_bullets, "* a\n" * (num_bullets + 1)
    ),
    "detectable_format:constrained_response": lambda: ("My answer is maybe.", "maybe"),
    "detectable_format:number_highlighted_sections": lambda num_highlights: counted(
        "*a* ", num_highlights
    ),
    "detectable_format:multiple_sections": lambda section_spliter, num_sections: counted(
        f"{section_spliter} 1\n", num_sections
    ),
    "detectable_format:json_format": lambda: ('{"a": 1}', "{a}"),
    "detectable_format:title": lambda: ("<<a>>", "a"),
    "combination:two_responses": lambda: ("a******b", "a"),
    "combination:repeat_prompt": lambda prompt_to_repeat: (f"{prompt_to_repeat} 0", "0"),
    "startend:end_checker": lambda end_phrase: (f"0 {end_phrase}", "0"),
    "startend:quotation": lambda: ('"a"', "a"),
    "change_case:capital_word_frequency": lambda capital_frequency, capital_relation: counted(
        "GO ", capital_frequency, capital_relation
    ),
    "change_case:english_capital": lambda: (ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": lambda: (ENGLISH.lower(), ENGLISH),
    "punctuation:no_comma": lambda: ("a", "a, b"),
}  # fmt: skip


def check_understood(path: Path) -> int:
    """The number of instructions of a published file, each graded right for two made-up answers."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    task = ifeval.load(path)
    assert len(task.items) == len(records)
    total = 0
    for item, record, prompt in zip(task.items, records, task.prompts(), strict=True):
        assert prompt.messages == ({"role": "user", "content": record["prompt"]},)
        published = zip(record["instruction_id_list"], record["kwargs"], strict=True)
        for number, (kind, options) in enumerate(published):
            given = {name: value for name, value in options.items() if value is not None}
            followed = [
                task.grade(item, Answer(texts=(text,))).metrics["instruction_strict"]
                for text in WRITERS[kind](**given)
            ]
            assert [len(values) for values in followed] == [len(record["kwargs"])] * 2
            assert [values[number] for values in followed] == [1.0, 0.0], (item.id, kind, given)
            total += 1
    return total


def test_prompts_are_understood(tmp_path):
    pytest.importorskip("langdetect")
    lines = [
        {"key": i, "prompt": f" Prompt {i}.\n", "instruction_id_list": [kind], "kwargs": [options]}
        for i, (kind, options, *_) in enumerate(CASES)
    ]
    path = samples.write_lines(tmp_path / "ifeval.jsonl", lines)
    assert check_understood(path) == len(CASES)


@pytest.mark.slow
def test_the_published_prompts_are_understood():
    folder = os.environ.get("QWEN_JAX_EVAL_DATA")
    if folder is None:
        pytest.skip("QWEN_JAX_EVAL_DATA names no folder with the published benchmarks")
    assert check_understood(Path(folder) / "benchmarks" / "ifeval.jsonl") == 834
