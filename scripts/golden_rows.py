"""Rows of tokens, and what a model says to them: logits and losses of single tokens."""

import torch

from golden_families import VOCABULARY
from golden_float64 import operations_of

IGNORED = -100
# An ordinary token of these models: only the mask and the labels tell padding apart.
PADDING_ID = 0
# Uneven on purpose: with equal numbers of trained tokens, a mean of means would pass for the mean.
ROW_LENGTHS = (12, 25, 7, 18, 21, 9, 30, 14, 6, 22, 16, 11)


def random_row(length, generator, vocabulary=VOCABULARY):
    """Tokens and unshifted labels: a prompt outside the loss, and in longer rows a second gap."""
    input_ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    labels = list(input_ids)
    prompt = int(torch.randint(2, max(3, length // 2), (1,), generator=generator))
    labels[:prompt] = [IGNORED] * prompt
    if length > 15:
        gap = prompt + 2
        labels[gap:gap + 3] = [IGNORED] * 3
    return {"input_ids": input_ids, "labels": labels}


def pad(rows):
    """Rows as [row, position] tensors, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    missing = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [PADDING_ID] * n for row, n in zip(rows, missing)]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, missing)]),
        "labels": torch.tensor([row["labels"] + [IGNORED] * n for row, n in zip(rows, missing)]),
    }


def forward(model, batch):
    with operations_of(model):
        if model.config.model_type == "phi3":
            return forward_by_row(model, batch)
        more = {}
        if model.config.model_type == "gemma3":  # wants to know which tokens are of images: none
            more["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        more["attention_mask"] = batch["attention_mask"]
        return model(input_ids=batch["input_ids"], use_cache=False, **more).logits


def forward_by_row(model, batch):
    """Each row alone, without padding: in a batch, the longest row chooses LongRoPE's factors for all of them."""
    longest = batch["input_ids"].shape[1]
    rows = []
    for row, length in zip(batch["input_ids"], batch["attention_mask"].sum(dim=1).tolist()):
        logits = model(input_ids=row[None, :length], use_cache=False).logits
        rows.append(torch.nn.functional.pad(logits, (0, 0, 0, longest - length)))
    return torch.cat(rows)


def token_losses(logits, labels):
    """Loss of each trained token: logits at a position answer for the label of the next."""
    targets = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses[targets != IGNORED]


def trained_tokens(rows):
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def mean_loss(model, rows):
    """Mean token loss over rows, each row alone."""
    with torch.no_grad():
        total = sum(
            token_losses(forward(model, batch), batch["labels"]).double().sum().item()
            for batch in (pad([row]) for row in rows)
        )
    return total / trained_tokens(rows)
