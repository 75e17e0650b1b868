"""What transformers says greedily, with its cache: generation.json of each golden model.

make_goldens.py writes it with everything else. `make_goldens.py --generation` writes it alone, for models that are
there. It has a list of answers of the base, and one of the base with its adapter:

    prompt              tokens
    repetition_penalty  1: none. Others, because some of these models say one token for ever
    tokens              of `generate(do_sample=False)`, in f32 with eager attention
    logprobs            of these tokens, by the model's own logits
    margin              by how much the best token is ahead of the second at least

Where a margin is no larger than two results may differ, another order of sums would say another token. So a prompt
with such an answer is not taken, but the next one of its length.
"""

import math

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

NEW_TOKENS = 24
# One token; a few; more than a window and LongRoPE's original context have. (tokens, repetition penalty)
QUESTIONS = ((1, 1.0), (4, 1.0), (30, 1.0), (4, 5.0), (30, 5.0))
# The tests take logits that differ by 3e-5, and a penalty multiplies one that is below 0: 3e-5 * (1 + 5).
TIE = 2e-4
# Of logits with the cache and those of one pass over everything.
CACHE = 1e-4


def answer(model, forward, prompt, penalty):
    """`forward(tokens)`: the logits of one pass, without a cache."""
    # Every answer has all its tokens: these models say the end token like any other.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=NEW_TOKENS, repetition_penalty=penalty, use_cache=True,
            return_dict_in_generate=True, output_logits=True, output_scores=True,
        )
    tokens, logprobs, margin = found.sequences[0, len(prompt):].tolist(), [], math.inf
    assert len(tokens) == NEW_TOKENS
    processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else [])
    for n, (logits, scores) in enumerate(zip(found.logits, found.scores)):
        with torch.no_grad():
            whole = forward(prompt + tokens[:n])
        assert (whole - logits[0]).abs().max() < CACHE, f"token {n}: transformers says something else with its cache"
        same = processor(torch.tensor([prompt + tokens[:n]]), logits.clone())
        assert torch.equal(same, scores), "the penalty is not the only rule"
        best, second = scores[0].topk(2).values.tolist()
        margin = min(margin, best - second)
        logprobs.append(round(logits[0].log_softmax(-1)[tokens[n]].item(), 7))
    return {"prompt": prompt, "repetition_penalty": penalty, "tokens": tokens, "logprobs": logprobs,
            "margin": float(f"{margin:.2e}")}


def answers(model, forward, vocabulary):
    """One for each question, and how many prompts were not taken."""
    generator = torch.Generator().manual_seed(2000)
    found, passed_over = [], 0
    for length, penalty in QUESTIONS:
        while True:
            prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
            one = answer(model, forward, prompt, penalty)
            if one["margin"] >= TIE:
                break
            passed_over += 1
        found.append(one)
    return found, passed_over
