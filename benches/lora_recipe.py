"""The step of lora_step.py and ranks.py: the recipe for finetune, and the rows."""
import json, pathlib, struct, sys

TARGETS = {
    "qv": '["q_proj", "v_proj"]',
    "all": '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]',
}


def write_recipe(output, model, targets, rows, steps):
    """The path of a recipe in the directory `output`. `targets` is a key of TARGETS."""
    recipe = pathlib.Path(output, "recipe.toml")
    recipe.write_text(f"""
output_dir = "run"
[model]
path = {json.dumps(str(model))}
device = "cpu"
[lora]
rank = 8
alpha = 16
target_modules = {TARGETS[targets]}
[data]
train = {json.dumps(str(rows))}
format = "tokens"
shuffle = false
[train]
max_steps = {steps}
global_batch_size = 4
micro_batch_size = 4
max_grad_norm = 0.0
[optimizer]
learning_rate = 1e-4
[schedule]
name = "constant"
[checkpoint]
every = 0
""")
    return recipe


def tokens_file(models, directory):
    """64 rows of 257 tokens, from the matrix that a peer's script makes when it first runs."""
    path = pathlib.Path(models, "tokens-257.npy")
    if not path.exists():
        sys.exit(f"{path} is missing: run a peer's script once, it makes the file")
    data = path.read_bytes()
    length = struct.unpack("<H", data[8:10])[0]
    numbers = struct.unpack(f"<{64 * 257}i", data[10 + length:])
    rows = pathlib.Path(directory, "rows.jsonl")
    rows.write_text("".join(json.dumps({"input_ids": numbers[n * 257:(n + 1) * 257]}) + "\n" for n in range(64)))
    return rows
