"""lm-evaluation-harness over a backend: `LanguageModel` implements the harness's model interface.

Contexts come from the harness as text, chat templates applied; control tokens in them are parsed,
as its own backends do. Scores and answers equal those of its `hf` backend in float32.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from configs.sampling import SamplingParams
from qwen_jax.tasks.backend import Backend, GenerationRequest, ScoringRequest
from qwen_jax.tasks.task import Style
from qwen_jax.text.chat import encoding as chat
from qwen_jax.text.chat import jinja_template as chat_templates

_MAX_NEW_TOKENS = 256  # where a task says nothing; the harness's own default
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class LanguageModel(TemplateLM):
    """A backend in the harness's model interface, for `lm_eval.simple_evaluate(model=...)`.

    `settings` are the defaults of tasks that sample: they hold where a task sets nothing else.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        name: str,
        settings: SamplingParams | None = None,
        max_gen_toks: int = _MAX_NEW_TOKENS,
    ) -> None:
        super().__init__()
        self._backend, self._name = backend, name
        self._settings = settings or SamplingParams()
        self._max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self._backend.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self._backend.prefix_id

    @property
    def max_length(self) -> int:
        """The number of tokens that the model reads; the last scored token needs no reading."""
        return self._backend.max_length - 1

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer and its template in the harness's caches."""
        return f"{self._name}--{self._backend.tokenizer.fingerprint}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        return {"model": self._name}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        del add_special_tokens, kwargs  # nothing is ever added
        return self._backend.tokenizer.encode(string, special="control")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source. Raises `ValueError` for a name: there is only one template."""
        if chat_template is False or chat_template is None:
            return None
        if chat_template is not True:
            raise ValueError(
                f"chat_template={chat_template!r}: the tokenizer has one template, without a name; "
                f"give True"
            )
        return self._backend.tokenizer.chat_template or chat_templates.CHATML_TEMPLATE

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt, the last message stays open."""
        text = chat.render(
            chat_history,
            tokenizer=self._backend.tokenizer,
            add_generation_prompt=add_generation_prompt,
        )
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        cut = text.rindex(last) + len(last)
        return text[:cut]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """ln p of each whole text, scored in windows with as much context as the model holds."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers up to their first stop strings. Raises `ValueError` for unknown settings."""
        arguments = [request.args for request in requests]
        generations = [self._generation(context, settings) for context, settings in arguments]
        answers = [""] * len(requests)
        for index, text in tqdm(
            self._backend.generate(generations),
            total=len(generations),
            disable=disable_tqdm,
            desc="generate_until",
        ):
            answers[index] = text
            self.cache_hook.add_partial("generate_until", arguments[index], text)
        return answers

    def _generation(self, context: str, settings: Mapping[str, Any]) -> GenerationRequest:
        """The request for an answer to `context` with a task's `generation_kwargs`."""
        values = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        stop = tuple(text for text in values.pop("until") if text)
        max_tokens = values.pop("max_gen_toks")
        sampled = values.pop("do_sample")
        unknown = sorted(set(values) - set(_SAMPLING))
        if unknown:
            raise ValueError(f"generation_kwargs {unknown} are unknown; known: {_SAMPLING}")
        if not sampled:
            values = {"temperature": 0.0, **_greedy_settings(values)}
        room = self.max_length - max_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks={max_tokens} leaves no room for a prompt in the model's "
                f"{self.max_length} tokens; lower it"
            )
        sampling = dataclasses.replace(self._settings, max_tokens=max_tokens, **values)
        tokens = self.tok_encode(context)[-room:]
        return GenerationRequest(tuple(tokens) or (self.prefix_token_id,), sampling, stop)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for index, score in tqdm(
            self._backend.loglikelihood(self._scoring(requests)),
            total=len(requests),
            disable=disable_tqdm,
            desc="loglikelihood",
        ):
            answers[index] = (score.logprob, score.is_greedy)
            text = requests[index][0]
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[index])
        return answers

    def _scoring(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]]
    ) -> Iterable[ScoringRequest]:
        """The backend's requests; a context that does not fit loses its beginning."""
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if not context or not continuation or room < 1:
                raise ValueError(
                    f"a context of {len(context)} tokens and a continuation of "
                    f"{len(continuation)} cannot be scored by a model of {self.max_length} tokens; "
                    f"raise max_length, and leave neither empty"
                )
            yield ScoringRequest(tuple(context[-room:]), tuple(continuation))


def _greedy_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change greedy decoding too."""
    return {key: values[key] for key in ("repetition_penalty",) if key in values}


def evaluate(
    backend: Backend,
    tasks: Sequence[str],
    *,
    name: str,
    style: Style = "plain",
    include_path: str | None = None,
    num_shots: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's results of the tasks, without samples. `include_path` holds task files.

    Raises `ValueError` for tasks that the harness does not know.
    """
    manager = TaskManager(include_path=include_path)
    results = lm_eval.simple_evaluate(
        model=LanguageModel(backend, name=name),
        tasks=list(tasks),
        num_fewshot=num_shots,
        limit=limit,
        apply_chat_template=style == "chat",
        fewshot_as_multiturn=style == "chat",
        task_manager=manager,
        log_samples=False,
    )
    return json.loads(json.dumps(results, default=str))
