#!/usr/bin/env python3
"""What a step takes on N hosts, from what it takes on one host and from the speed of the links.

This is a model. It was checked against rate-limited links (benches/results/2026-11-24-ranks.json).

  step(N) = rows / N + update + 2 (N - 1) / N * bytes * 1.05 / bandwidth + 4 * latency

`rows` is the time of the forward and backward pass over all rows of the step on one host. `update`
is that of clipping and AdamW. Reduce-scatter and all-gather move 2 (N - 1) / N of the gradients'
bytes through each host's link, with 5 % for headers. The losses go ahead of the gradients in an
operation of their own.
"""
HEADERS, LATENCY = 1.05, 100e-6
RATES = [1, 10, 50]  # Gbit/s


def adapter(rank, layers, hidden, key_value, intermediate):
    """Trained parameters of LoRA on all linear layers."""
    shapes = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden),
              (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return layers * sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def step(hosts, rows, update, parameters, gbits):
    reduce = 2 * (hosts - 1) / hosts * parameters * 4 * HEADERS / (gbits * 1e9 / 8) + 4 * LATENCY
    return rows / hosts + update + reduce, reduce


def table(what, rows_of, update, parameters):
    print(f"\n{what}: {parameters:,} trained parameters\n")
    print("| hosts | " + " | ".join(f"{rate} Gbit/s" for rate in RATES) + " |")
    print("| --- |" + " --- |" * len(RATES))
    for hosts in [2, 4, 8, 16]:
        cells = []
        for rate in RATES:
            total, reduce = step(hosts, rows_of(hosts), update, parameters, rate)
            alone = rows_of(hosts) + update
            cells.append(f"{total:.2f} s, {100 * reduce / total:.1f} % talk, {100 * alone / total / hosts:.0f} % efficient")
        print(f"| {hosts} | " + " | ".join(cells) + " |")


# The benchmark's model, on CPUs like those of the measurement. Four rows on one host take 1.40 s.
table("32M model, rank 8 on q and v, 4 rows per host", lambda hosts: 1.40 * hosts, 0.001, 114_688)
# Llama 3.1 8B, 4096 tokens per host and step, on a GPU that does 10 TFLOP/s. A weight takes four
# operations per token, because frozen weights have no gradients.
seconds = 4 * 8.03e9 * 4096 / 10e12
for rank in [8, 64]:
    parameters = adapter(rank, 32, 4096, 1024, 14336)
    table(f"8B shape, rank {rank} on all linear layers, 4096 tokens per host at 10 TFLOP/s", lambda hosts: seconds * hosts, parameters * 4e-9, parameters)
