"""The text that the warm start teaches for each activation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """The target of the decoder, and what the encoder learns to read: of the warm start, and of
    every stage that uses its loss (the anchor, the control).

    All but windows end with ``lens.end_token``, are made when the activations are dumped and are
    kept in the cache, or in memory where rows are streamed.
    """

    # "window": the source tokens around P, warm.before and warm.after of them. "words": the words
    # that M is about to say, a separator, then content words of the context and, with
    # recent_tokens, another separator and its last tokens. "facts": what a generated document has
    # stated so far, the nearest first. "file": explanations of your own. "model": what M itself, or
    # another model, writes about the context up to P.
    kind: str = "window"
    # "words": M's likeliest next tokens, at most so many, the likeliest first.
    next_words: int = 4
    next_probability: float = 0.05  # "words": only the first of them may be less probable
    # "words": then so many words of the context at most, in the order of the text: those with the
    # largest idf − nearness · (tokens from the word to P), where a word that n of N documents have
    # has idf log(N / n).
    context_words: int = 4
    nearness: float = 0.3  # "words": see context_words
    # "words": a word that a larger share of the documents has is no word of the context to name.
    most_common: float = 0.2
    # "words": then so many of the last tokens up to P. Readers of the source know them, but E has
    # the text alone (docs/formats.md has what they are worth).
    recent_tokens: int = 0
    # "words", "facts": token between two next words or facts; it must be one token of the
    # vocabulary, or is left out if empty. So must the separator.
    comma: str = " ,"  # not ",", which M itself is often about to say
    separator: str = " |"  # "words": token between the next words and those of the context
    path: str = ""  # "file": jsonl or parquet file, folder or glob
    # "model": what the model is asked, through its chat template where it has one, and otherwise
    # continues; <context> stands for the text up to P. The description is the first line of what it
    # writes, at most lens.text_len tokens.
    prompt: str = "<context>\n\nIn a few words, the text above is about"
    # "model": folder, GGUF file or hub id of the model that writes; empty: M. What another one
    # writes is tokenised again with M's tokenizer.
    model_path: str = ""
    temperature: float = 0.0  # "model": logits are divided by it; 0 takes the most probable token
    seed: int = 0  # "model": of the draws, with the document and P
