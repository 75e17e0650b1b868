#!/usr/bin/env python3
"""The peers of disk.py: a LoRA step of transformers + PEFT with gradient checkpointing.

    disk_peer.py plain|accelerate|accelerate-as-is MODEL_DIR ROWS.jsonl DTYPE STEPS MICRO_BATCHES ROWS

`plain` has the weights where `from_pretrained` puts them: on a CPU in the file, which is mapped into memory, if they are
to be of the file's type, else in memory. `accelerate` gives the layers to the disk (`device_map`): its hooks take a
module's weights from there while it is computed, and drop them. PEFT then makes the adapter of an offloaded layer on the
device "meta", where it has no values; `accelerate-as-is` shows what that leads to, `accelerate` makes it again on the CPU.

Prints a line `RESULT {json}` for the loaded model and for each step. A step is so many micro-batches of so many rows.
"""
import json, pathlib, sys, tempfile, time

import torch
import transformers
import accelerate, peft


def load(way, model, dtype, folder):
    if way == "plain":
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    layers = json.loads(pathlib.Path(model, "config.json").read_text())["num_hidden_layers"]
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{n}": "disk" for n in range(layers)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, device_map=places, offload_folder=folder)


def with_adapter(way, network):
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    network = peft.get_peft_model(network, settings)
    if way == "accelerate":
        for layer in network.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.lora_A.to_empty(device="cpu")
                layer.lora_B.to_empty(device="cpu")
                layer.reset_lora_parameters("default", True)
    network.enable_input_require_grads()
    # The reentrant kind: the other one ends a layer's second pass early, and weights stay behind in memory.
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return network.train()


def report(**found):
    print("RESULT " + json.dumps(found), flush=True)


def main():
    way, model, rows, dtype = sys.argv[1:5]
    steps, micro_batches, together = map(int, sys.argv[5:])
    tokens = torch.tensor([json.loads(line)["input_ids"] for line in pathlib.Path(rows).read_text().splitlines()])
    parts = tokens.split(together)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=pathlib.Path(rows).parent) as folder:
        network = with_adapter(way, load(way, model, getattr(torch, dtype), folder))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        report(versions={module.__name__: module.__version__ for module in (torch, transformers, peft, accelerate)})
        for step in range(steps):
            begun, sum_of_losses = time.perf_counter(), 0.0
            for n in range(micro_batches):
                batch = parts[(step * micro_batches + n) % len(parts)]
                loss = network(input_ids=batch, labels=batch, use_cache=False).loss / micro_batches
                loss.backward()
                sum_of_losses += loss.item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report(seconds=time.perf_counter() - begun, loss=sum_of_losses)


if __name__ == "__main__":
    main()
