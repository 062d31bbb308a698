"""IFEval's instructions (arXiv 2311.07911): one check a kind, which says if a text follows it.

`CHECKS` has them by the benchmark's names. Definitions are those of the benchmark's reference
program, except where a comment says otherwise.
"""

import json
import re
from collections.abc import Callable

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FIRST_WORD_ENDS = re.compile(r"[.,?!'\"]")
# Two-letter titles and the like, after which a full stop ends no sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|jr|sr|inc|ltd|co|vs|etc|e\.g|i\.e|no|capt|lt|gen)|\b[a-z])\.$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s+[^\sa-z]|\s*$)")
_EDGES = ".,;:!?\"'()[]{}<>*_`“”‘’…"


def holds(relation: str, count: int, threshold: int) -> bool:
    """Whether `count` is `less than` or `at least` the threshold, as `relation` says.

    Raises `ValueError` for another relation.
    """
    if relation == "less than":
        return count < threshold
    if relation == "at least":
        return count >= threshold
    raise ValueError(f"relation={relation!r} is unknown; known: less than, at least")


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of the text's language, None where the text has no letters.

    langdetect gets a fixed seed, as its answers vary otherwise.
    """
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def count_words(text: str) -> int:
    """The number of runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """The number of sentences, counted by their end marks.

    The reference uses NLTK's trained splitter, which rarely differs in English.
    """
    count, start = 0, 0
    for match in _SENTENCE_END.finditer(text):
        at_end = not text[match.end() :].strip()
        if not at_end and _ABBREVIATION.search(text[start : match.start() + 1]):
            continue
        count, start = count + 1, match.end()
    return count + bool(text[start:].strip())


def _existence(text: str, *, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    count = len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))
    return holds(relation, count, frequency)


def _forbidden(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def _letter(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    # Where `letter` is not a letter, such as `#` or `!`, the reference draws one at random.
    return holds(let_relation, text.lower().count(letter.strip().lower()), let_frequency)


def _response_language(text: str, *, language: str) -> bool:
    return detect_language(text) in (None, language)


def _num_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return holds(relation, count_sentences(text), num_sentences)


def _num_words(text: str, *, num_words: int, relation: str) -> bool:
    return holds(relation, count_words(text), num_words)


def _num_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Whether the text has so many paragraphs, divided by `***`.

    An empty paragraph may stand first or last, where it does not count.
    """
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    outer = [parts[0], parts[-1]] if len(parts) > 1 else parts
    return len(parts) - sum(not part.strip() for part in outer) == num_paragraphs


def _nth_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether the nth of so many paragraphs begins with the word, in any case.

    Paragraphs are divided by an empty line.
    """
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if count != num_paragraphs or nth_paragraph > count or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return _FIRST_WORD_ENDS.split(word)[0].lower() == first_word.lower()


def _placeholders(text: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, *, postscript_marker: str) -> bool:
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    return bool(re.search(spaced.get(marker, re.escape(marker.lower())), text.lower()))


def _bullets(text: str, *, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _options(text: str) -> bool:
    return any(option in text for option in _OPTIONS)


def _highlights(text: str, *, num_highlights: int) -> bool:
    found = [*re.findall(r"\*[^\n\*]*\*", text), *re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


def _sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    marks = re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)
    return len(marks) >= num_sections


def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(text: str) -> bool:
    return any(t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    answers = [part.strip() for part in parts if part.strip()]
    return len(answers) == 2 and answers[0] != answers[1]


def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, *, capital_relation: str, capital_frequency: int) -> bool:
    """Whether the number of words in capitals fits; a hyphenated word counts once.

    The reference splits with NLTK, which also splits contractions.
    """
    words = [word.strip(_EDGES) for word in text.split()]
    return holds(capital_relation, sum(word.isupper() for word in words), capital_frequency)


def _english_capital(text: str) -> bool:
    return text.isupper() and detect_language(text) in (None, "en")


def _english_lowercase(text: str) -> bool:
    return text.islower() and detect_language(text) in (None, "en")


def _no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:number_words": _num_words,
    "length_constraints:nth_paragraph_first_word": _nth_first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _options,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
