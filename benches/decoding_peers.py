#!/usr/bin/env python3
"""The peers of decoding.py, each in a process of its own.

    decoding_peers.py prompts MODEL_DIR TEXT_FILE ROWS LENGTH OUTPUT
    decoding_peers.py quantize IN.gguf OUT.gguf q4_0|q8_0
    decoding_peers.py bandwidth BYTES THREADS
    decoding_peers.py llama.cpp|mlx-lm|transformers MODEL PROMPTS.json ROWS TOKENS THREADS

A measurement prints `RESULT {json}`. The prompts are read first and not counted. Every further token
is the most likely one; all rows go through the model in one pass.
"""
import json, os, pathlib, sys, time


def measured(step, tokens):
    """Seconds and CPU seconds of so many calls of `step`, after two that are not counted."""
    for _ in range(2):
        step()
    begun, cpu = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        step()
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu, "steps": tokens}


def prompts(model, text, rows, length, output):
    """The beginning of a text as `rows` prompts of `length` tokens; random ones for the text "random"."""
    if text == "random":
        import random

        with open(os.path.join(model, "config.json")) as file:
            config = json.load(file)
        size = config.get("text_config", config)["vocab_size"]
        draw = random.Random(1)
        parts = [[draw.randrange(3, size) for _ in range(length)] for _ in range(rows)]
        json.dump(parts, open(output, "w"))
        return
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(open(text).read())["input_ids"]
    parts = [ids[n * length:(n + 1) * length] for n in range(rows)]
    if len(parts[-1]) < length:
        sys.exit(f"{text} has {len(ids)} tokens, fewer than {rows} x {length}")
    json.dump(parts, open(output, "w"))


def quantize(source, output, kind):
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[kind]
    # All matrices in one type: by default llama.cpp keeps more bits of the output layer.
    settings.pure = True
    if llama_cpp.llama_model_quantize(source.encode(), output.encode(), settings):
        sys.exit(f"llama.cpp does not quantize {source}")


def bandwidth(size, threads):
    """Bytes a second at which threads read as many bytes as the weights have, again and again."""
    import numpy
    from concurrent.futures import ThreadPoolExecutor

    parts = [numpy.ones(size // threads // 8, numpy.int64) for _ in range(threads)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(9):
            begun = time.perf_counter()
            list(pool.map(numpy.bitwise_or.reduce, parts))
            seconds.append(time.perf_counter() - begun)
    return {"bytes_per_second": sum(part.nbytes for part in parts) / sorted(seconds)[len(seconds) // 2]}


def llama(model, parts, tokens, threads):
    import ctypes, llama_cpp, numpy

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    rows, length = len(parts), len(parts[0])
    settings = llama_cpp.llama_context_default_params()
    # The room is shared by the rows.
    settings.n_ctx, settings.n_batch, settings.n_seq_max = rows * (length + tokens + 8), 512, rows
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(entries):
        """entries: (token, position, row, whether its logits are wanted)"""
        for n, (token, position, row, wanted) in enumerate(entries):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, wanted
            batch.seq_id[n][0] = row
        batch.n_tokens = len(entries)
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama_decode failed")

    def best(index):
        logits = llama_cpp.llama_get_logits_ith(context, index)
        array = numpy.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (size,))
        return int(array.argmax())

    now = []
    for row, part in enumerate(parts):
        decode([(token, n, row, n == length - 1) for n, token in enumerate(part)])
        now.append(best(length - 1))
    at = [length]
    answers = [[token] for token in now]

    def step():
        decode([(token, at[0], row, True) for row, token in enumerate(now)])
        now[:] = [best(row) for row in range(rows)]
        at[0] += 1
        for answer, token in zip(answers, now):
            answer.append(token)

    return measured(step, tokens), answers


def mlx(model, parts, tokens, threads):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    from mlx_lm.models.cache import make_prompt_cache

    mx.set_default_device(mx.cpu)
    network, _ = load_model(pathlib.Path(model))
    cache = make_prompt_cache(network)
    now = mx.argmax(network(mx.array(parts), cache=cache)[:, -1], axis=-1)
    mx.eval(now)
    answers, state = [now.tolist()], [now]

    def step():
        state[0] = mx.argmax(network(state[0][:, None], cache=cache)[:, -1], axis=-1)
        mx.eval(state[0])
        answers.append(state[0].tolist())

    return measured(step, tokens), list(zip(*answers))


def transformers(model, parts, tokens, threads):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.no_grad():
        out = network(torch.tensor(parts), use_cache=True)
        state = [out.past_key_values, out.logits[:, -1].argmax(-1)]
        answers = [state[1].tolist()]

        def step():
            out = network(state[1][:, None], past_key_values=state[0], use_cache=True)
            state[:] = [out.past_key_values, out.logits[:, -1].argmax(-1)]
            answers.append(state[1].tolist())

        return measured(step, tokens), list(zip(*answers))


def main():
    name, *rest = sys.argv[1:]
    if name == "prompts":
        return prompts(rest[0], rest[1], int(rest[2]), int(rest[3]), rest[4])
    if name == "quantize":
        return quantize(*rest)
    if name == "bandwidth":
        found = bandwidth(int(rest[0]), int(rest[1]))
    else:
        run = {"llama.cpp": llama, "mlx-lm": mlx, "transformers": transformers}[name]
        model, path, rows, tokens, threads = rest
        figures, answers = run(model, json.load(open(path))[:int(rows)], int(tokens), int(threads))
        found = {**figures, "answers": [list(answer)[:8] for answer in answers]}
    print("RESULT " + json.dumps(found), flush=True)
    # Some libraries do not end their threads in order.
    os._exit(0)


if __name__ == "__main__":
    main()
