"""The step of lora_step.py and ranks.py: the recipe for finetune, and the rows."""
import json, pathlib, random, struct, sys

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


def make_tokens(path, vocabulary=8192):
    """Random tokens in the form that the peers' scripts read."""
    header = "{'descr': '<i4', 'fortran_order': False, 'shape': (64, 257), }"
    header += " " * (-(10 + len(header) + 1) % 64) + "\n"
    draw = random.Random(0)
    numbers = struct.pack(f"<{64 * 257}i", *(draw.randrange(vocabulary) for _ in range(64 * 257)))
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + numbers)


def tokens_file(models, directory, make=False):
    """64 rows of 257 tokens, from the matrix that a peer's script makes when it first runs. With `make`, random ones if it
    is not there.
    """
    path = pathlib.Path(models, "tokens-257.npy")
    if make and not path.exists():
        make_tokens(path)
    if not path.exists():
        sys.exit(f"{path} is missing: run a peer's script once, it makes the file")
    data = path.read_bytes()
    length = struct.unpack("<H", data[8:10])[0]
    numbers = struct.unpack(f"<{64 * 257}i", data[10 + length:])
    rows = pathlib.Path(directory, "rows.jsonl")
    rows.write_text("".join(json.dumps({"input_ids": numbers[n * 257:(n + 1) * 257]}) + "\n" for n in range(64)))
    return rows
