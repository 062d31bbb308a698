"""Whether a model can serve a request at all."""

from collections.abc import Sequence

from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from qwen_jax.model import transformer


def prompt(cfg: ModelConfig, tokens: Sequence[int], *, settings: SamplingParams) -> tuple[int, ...]:
    """The prompt's tokens; an empty one begins with the model's bos token.

    Raises `ValueError` for a token outside the vocabulary, for an empty prompt where the model has
    no bos token, and where prompt and answer would exceed the model's length.
    """
    tokens = tuple(int(token) for token in tokens)
    if not tokens:
        if cfg.bos_token_id is None:
            raise ValueError(
                f"the prompt is empty and {cfg.name} has no bos_token_id to begin with; give at "
                f"least one token"
            )
        tokens = (cfg.bos_token_id,)
    for name, ids in (
        ("prompt", tokens),
        ("logit_bias", [token for token, _ in settings.logit_bias]),
        ("stop_token_ids", settings.stop_token_ids),
    ):
        for token in ids:
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(
                    f"{name} token {token} is outside the vocabulary of {cfg.vocab_size} rows; use "
                    f"the tokenizer that came with the model"
                )
    try:
        transformer.check_length(cfg, len(tokens) + settings.max_tokens)
    except ValueError as error:
        raise ValueError(
            f"prompt of {len(tokens)} tokens with max_tokens={settings.max_tokens}: {error}"
        ) from None
    return tokens
