"""Words of tokens in log-probabilities, with a tokenizer like those of SentencePiece."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mor_megatron.serving import Event, Logprob, Request, SamplingParams
from mor_megatron.serving.http.choices import ChatChoice, CompletionChoice
from mor_megatron.serving.http.protocol import ChatBody, CompletionBody

WORDS = ["<unk>", "▁the", "the", "▁sea", "<0xE2>", "<0x82>", "<0xAC>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """It strips a space at the beginning of a text, and has the bytes of the euro sign."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def event(token: int, top: dict[int, float]) -> Event:
    request = Request("0", [3], SamplingParams(), None, 0.5)
    return Event(request, token, "", Logprob(-0.5, top), None, "length")


def test_words_keep_their_spaces():
    told = event(1, {1: -0.5, 2: -1.5})
    body = CompletionBody(prompt="sea", logprobs=2)
    (top,) = CompletionChoice(0, body, told.request, tokenizer()).take([told])["logprobs"]["top_logprobs"]
    assert top == {" the": -0.5, "the": -1.5}
    body = ChatBody(messages=[], logprobs=True, top_logprobs=2)
    (entry,) = ChatChoice(0, body, told.request, tokenizer()).take([told])["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == (" the", list(b" the"))
    assert [other["token"] for other in entry["top_logprobs"]] == [" the", "the"]


def test_a_part_of_a_character_has_no_bytes_of_its_own():
    """Those of the character that stands for it would be wrong."""
    told = event(4, {})
    body = ChatBody(messages=[], logprobs=True)
    (entry,) = ChatChoice(0, body, told.request, tokenizer()).take([told])["logprobs"]["content"]
    assert entry["bytes"] is None
