"""Many prompts at once: a bar, results as they come, and a reader who stops."""

from __future__ import annotations

from serving_models import VOCAB, model_of
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mor_megatron.serving import LLM, SamplingParams

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
PARAMS = [SamplingParams(max_tokens=n) for n in (3, 20, 2, 4)]


def test_results_come_in_order_and_early(capsys):
    llm = LLM(model_of("expert"), lanes=2)
    together = llm.generate(PROMPTS, PARAMS, progress=True)
    assert "4/4" in capsys.readouterr().err
    results = llm.stream(PROMPTS, PARAMS)
    assert next(results) == together[0]
    assert llm.engine.has_work
    assert list(results) == together[1:]


def test_text_goes_on_where_the_prompt_ends():
    """With a tokenizer that strips a space at the beginning of a text."""
    words = Tokenizer(models.WordLevel({f"▁{i}": i for i in range(VOCAB)}, unk_token="▁0"))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llm = LLM(model_of("expert"), PreTrainedTokenizerFast(tokenizer_object=words))
    (done,) = llm.generate(PROMPTS[:1])
    assert done.text == "".join(f" {token}" for token in done.tokens)
    assert llm.generate("▁1 ▁2") == llm.generate(["▁1 ▁2"]), "a text by itself is one prompt"


def test_who_stops_reading_leaves_no_work():
    llm = LLM(model_of("expert"), lanes=2, prefix_cache=False)
    results = llm.stream(PROMPTS, PARAMS)
    next(results)
    results.close()
    assert not llm.engine.has_work
    assert all(pages.used == 0 for pages in llm.engine.store.kinds)
