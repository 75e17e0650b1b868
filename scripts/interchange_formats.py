"""The checks of check_interchange.py for GGUF files and several adapters. Those for mlx-lm are in interchange_mlx.py.

Each compares logits of the same tokens, position by position: those of transformers with PEFT, and those of the other
program with what `finetune export` wrote. Each prints its figure: the largest difference, and of what size.

    gguf       the gguf package reads the files, and knows all names of tensors and keys; where tensors lie in a file as in
               a directory, the numbers are those of the merged export, in q8_0, bf16 and f16 the bytes that gguf-py
               makes of them (interchange_gguf.py); llama.cpp's logits with base + adapter, and merged, of the golden
               model or of one that llama.cpp can compute (interchange_llama_cpp.py)
    several    two adapters with weights: PEFT's add_weighted_adapter (cat) has the same tensors, bit by bit, and the
               same losses
    pieces     llama.cpp's tokens of texts with a tokenizer of Llama 2's kind, against tokenizers
    smollm2    with --smollm2 DIR: llama.cpp's tokens of texts, and its greedy answers, against `finetune generate`
"""

import json
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from interchange_gguf import AS_THEY_ARE, check_names, check_numbers
from interchange_llama_cpp import (
    DIFFERS, ROUNDED_INPUTS, TAKEN, WITHOUT_LLAMA_CPP, has_mxfp4, llama_cpp_case, with_rounded_inputs,
)
from interchange_logits import compare_logits, missing, refused, rows_of, torch_logits
from interchange_mlx import mlx_case, mlx_logits

WEIGHTS = (0.7, -0.4)
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n🚀 (normal) 😶‍🌫️ (multiple emojis) ✅ 🦙🦙 3 33 333 3333 3.3 3..3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
PROMPTS = ("Hello!", "What is the capital of France?", "Write a Python function that adds 17 and 4.\n")
NEW_TOKENS = 32


# GGUF


def llama_cpp(path, adapter=None, **options):
    from llama_cpp import GGML_TYPE_F32, Llama

    options = {"n_ctx": 64, "logits_all": True, **options}
    return Llama(str(path), lora_path=adapter and str(adapter), verbose=False, n_gpu_layers=0, n_threads=1,
                 type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, **options)


def llama_cpp_logits(path, adapter, rows):
    llama = llama_cpp(path, adapter)
    found = []
    for row in rows:
        llama.reset()
        llama.eval(row)
        found.append(np.array(llama.scores[:len(row)]))
    return found


def compare_tokens(report, family, llama, texts, tokens_of):
    same = sum(llama.tokenize(text.encode(), add_bos=False, special=True) == tokens_of(text) for text in texts)
    report.note(family, "tokens", f"llama.cpp splits {same} of {len(texts)} texts as tokenizers", wrong=same < len(texts))


def export_gguf(run_finetune, binary, source, output, *options):
    run_finetune(binary, "export", *source, "--format", "gguf", "--output", output, *options)
    found = list(output.glob("*.gguf"))
    assert len(found) == 1 and (output / "Modelfile").is_file(), found
    return found[0]


def check_refused(run_finetune, binary, family, report, run):
    """What llama.cpp computes otherwise, without a word in the file, is refused by name."""
    try:
        export_gguf(run_finetune, binary, [run], family.work / "gguf-refused")
        report.note(family.name, "gguf", "what llama.cpp takes otherwise for granted: not refused", wrong=True)
    except Exception as error:
        if not refused(error, report, family, "gguf", "llama.cpp cannot compute"):
            raise


def check_gguf(run_finetune, binary, family, report, run, merged, peft_adapter):
    if absent := missing("gguf"):
        return report.skipped(family.name, "gguf", absent)
    if family.name in TAKEN or family.name in WITHOUT_LLAMA_CPP:
        check_refused(run_finetune, binary, family, report, run)
    if family.name in WITHOUT_LLAMA_CPP:
        return None
    case = llama_cpp_case(family, run, peft_adapter)
    source = [run] if case.adapter.parent == run and case.base == family.directory else [
        case.base, "--adapter", case.adapter, "--force"]
    files = {kind: export_gguf(run_finetune, binary, source, family.work / f"gguf-{kind}", "--dtype", kind)
             for kind in ("f32", "f16", "bf16", "q8_0")}
    is_as_it_is = json.loads((case.base / "config.json").read_text())["model_type"] in AS_THEY_ARE
    if is_as_it_is and case.base != family.directory:
        merged = family.work / "llama-cpp-merged"
        run_finetune(binary, "export", *source, "--format", "merged", "--output", merged)
    for kind, path in files.items():
        check_names(report, family, path, kind)
        if is_as_it_is:
            check_numbers(report, family, merged, path, kind)
    base = export_gguf(run_finetune, binary, [case.base], family.work / "gguf-base", "--dtype", "f32")
    try:
        adapter = export_gguf(run_finetune, binary, source, family.work / "gguf-adapter", "--adapter-only")
    except Exception as error:
        if not refused(error, report, family, "gguf", "llama.cpp has no place for the branch"):
            raise
        adapter = None
    if absent := missing("llama_cpp"):
        return report.skipped(family.name, "gguf", absent)
    compare_with_llama_cpp(family, report, case, [("the merged file", files["f32"], None), ("base + adapter", base, adapter)])
    exact = np.concatenate(llama_cpp_logits(files.pop("f32"), None, case.rows))
    for kind, path in files.items():
        rounded = np.concatenate(llama_cpp_logits(path, None, case.rows))
        same = int((exact.argmax(-1) == rounded.argmax(-1)).sum())
        # It rounds what it multiplies with these too, and in models of drawn weights tokens lie close together.
        text = f"llama.cpp with {kind}: the best token of the file in f32 at {same} of {len(exact)}"
        report.note(family.name, "gguf", text, wrong=same < len(exact) * 3 // 4 or not np.isfinite(rounded).all())


def compare_with_llama_cpp(family, report, case, ways):
    if family.name in DIFFERS:
        report.note(family.name, "gguf", f"llama.cpp differs: {DIFFERS[family.name]}")
    for what, path, adapter in ways:
        if what == "base + adapter" and adapter is None:
            continue
        model = case.change(family.load(case.theirs or case.base))
        if has_mxfp4(path):
            report.note(family.name, "gguf", f"llama.cpp differs: {ROUNDED_INPUTS}")
            model = with_rounded_inputs(model)
        theirs = torch_logits(PeftModel.from_pretrained(model, str(case.peft_adapter)).eval(), case.rows)
        ours = llama_cpp_logits(path, adapter, case.rows)
        compare_logits(report, family.name, "gguf", theirs, ours, f"PEFT, and llama.cpp with {what}", case.bound)


# DoRA, modules trained in full, branches on embedding and output layer


def check_formats_of_case(run_finetune, binary, family, report, directory, peft_model):
    """Logits of the golden adapter in mlx-lm and merged in llama.cpp, or the refusal of what a format lacks."""
    rows = rows_of(family)
    source = [family.directory, "--adapter", directory / "adapter"]
    theirs = torch_logits(peft_model, rows)
    if absent := missing("mlx", "mlx_lm"):
        report.skipped(directory.name, "mlx", absent)
    else:
        exported = family.work / "mlx"
        try:
            run_finetune(binary, "export", *source, "--format", "mlx", "--output", exported)
        except Exception as error:
            words = [line for line in str(error).splitlines() if "no place for" in line]
            report.note(directory.name, "mlx", f"refused: {words}", wrong=not words)
        else:
            ours = mlx_logits(mlx_case(family).mlx, exported, rows)
            compare_logits(report, directory.name, "mlx", theirs, ours, "PEFT and mlx-lm")
    if absent := missing("gguf", "llama_cpp"):
        return report.skipped(directory.name, "gguf", absent)
    path = export_gguf(run_finetune, binary, source, family.work / "gguf", "--dtype", "f32")
    ours = llama_cpp_logits(path, None, rows)
    compare_logits(report, directory.name, "gguf", theirs, ours, "PEFT, and llama.cpp with the merged file")


# A tokenizer of pieces


def write_pieces(directory):
    """A small Llama 2: SentencePiece's kind of tokenizer, as tokenizer.json has it, and a random model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    special, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{n:02X}>" for n in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    pages = sorted((Path(__file__).resolve().parent.parent / "docs").glob("*.md"))
    texts = [line for page in pages for line in page.read_text().splitlines()]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    settings = json.loads(tokenizer.to_str())
    # The whole text is merged at once, and bytes are plain tokens.
    settings["pre_tokenizer"] = None
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] in special]
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    torch.manual_seed(6)
    config = LlamaConfig(vocab_size=len(settings["model"]["vocab"]), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(directory)
    return texts


def check_pieces(run_finetune, binary, work, report):
    if absent := missing("gguf", "llama_cpp"):
        return report.skipped("pieces", "gguf", absent)
    from tokenizers import Tokenizer

    directory = work / "pieces"
    texts = [text for text in write_pieces(directory) if text.strip()] + [PROBE, *PROMPTS]
    llama = llama_cpp(export_gguf(run_finetune, binary, [directory], work / "pieces-gguf"), n_ctx=512)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    compare_tokens(report, "pieces", llama, texts, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


# Several adapters


def check_several(run_finetune, our_loss, mean_loss, binary, family, report, run):
    first, second = family.directory / "adapter", run / "adapter"
    if isinstance(json.loads((first / "adapter_config.json").read_text())["target_modules"], str):
        first = second  # PEFT does not add an adapter whose modules are a pattern to one with a list
    output = family.work / "several"
    source = [family.directory, "--adapter", f"{first}={WEIGHTS[0]}", "--adapter", f"{second}={WEIGHTS[1]}"]
    run_finetune(binary, "export", *source, "--format", "peft", "--output", output)
    model = PeftModel.from_pretrained(family.load(), str(first), adapter_name="first")
    model.load_adapter(str(second), adapter_name="second")
    model.add_weighted_adapter(["first", "second"], list(WEIGHTS), "sum", combination_type="cat")
    model.set_adapter("sum")
    for module in model.modules():
        # PEFT 0.21 takes use_rslora from the first adapter, and so multiplies by alpha / sqrt(rank) what has all its
        # scales in A already.
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and "sum" in scaling:
            scaling["sum"] = 1.0
    theirs = {name: value for name, value in model.state_dict().items() if ".sum." in name}
    ours = load_file(output / "adapter_model.safetensors")
    elements = different = 0
    for name, value in theirs.items():
        mine = ours.pop(name.replace(".sum.", "."), None)
        elements += value.numel()
        # PEFT fills branches that one adapter lacks up with zeros.
        if mine is None or not torch.equal(value[: mine.shape[0], : mine.shape[1]], mine):
            different += value.numel()
    report.note(family.name, "several", f"{different} of {elements} numbers differ from PEFT's (cat), {len(ours)} tensors too many",
                wrong=bool(different or ours))
    rows = family.files["all"]
    loss = mean_loss(model.eval(), rows[1])
    report.compare(family.name, "several", "peft", loss, our_loss(binary, family.directory, rows, output))
    merged = family.work / "several-merged"
    run_finetune(binary, "export", *source, "--format", "merged", "--output", merged)
    report.compare(family.name, "several", "merged", loss, our_loss(binary, merged, rows))


# A real model


def train_smollm2(run_finetune, binary, directory, work):
    rows = work / "smollm2.jsonl"
    answer = {"role": "assistant", "content": "Yes, and 42."}
    lines = [json.dumps({"messages": [{"role": "user", "content": prompt}, answer]}) for prompt in PROMPTS]
    rows.write_text("".join(line + "\n" for line in lines))
    recipe = work / "smollm2.toml"
    recipe.write_text(f"""\
output_dir = {json.dumps(str(work / "smollm2-run"))}
[model]
path = {json.dumps(str(directory))}
device = "cpu"
[lora]
rank = 8
alpha = 16
use_rslora = true
target_modules = ["q_proj", "k_proj", "v_proj", "down_proj"]
alpha_pattern = {{ "k_proj" = 8 }}
[data]
train = {json.dumps(str(rows))}
[train]
max_steps = 2
global_batch_size = 3
micro_batch_size = 1
[optimizer]
learning_rate = 1e-4
""")
    run_finetune(binary, "run", recipe)
    return work / "smollm2-run"


def greedy(llama, tokens, ends):
    """Tokens up to an end, which is left out."""
    llama.reset()
    llama.eval(tokens)
    found = []
    while len(found) < NEW_TOKENS:
        token = int(np.argmax(llama.scores[llama.n_tokens - 1]))
        if token in ends:
            break
        found.append(token)
        llama.eval([token])
    return found


def check_smollm2(run_finetune, binary, directory, work, report):
    if absent := missing("gguf", "llama_cpp"):
        return report.skipped("smollm2", "gguf", absent)
    run = train_smollm2(run_finetune, binary, directory, work)
    base = export_gguf(run_finetune, binary, [directory], work / "smollm2-base", "--dtype", "f32")
    adapter = export_gguf(run_finetune, binary, [run], work / "smollm2-adapter", "--adapter-only")
    merged = {kind: export_gguf(run_finetune, binary, [run], work / f"smollm2-{kind}", "--dtype", kind)
              for kind in ("f32", "f16", "bf16", "q8_0")}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    llama = llama_cpp(merged["f32"], n_ctx=512)
    texts = [PROBE, *PROMPTS]
    compare_tokens(report, "smollm2", llama, texts, lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    template = llama.metadata["tokenizer.chat_template"]
    report.note("smollm2", "template", f"{len(template)} characters in the file", wrong=template != tokenizer.chat_template)
    ends = {tokenizer.eos_token_id}
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    answers = []
    for prompt in PROMPTS:
        settings = ("--max-new-tokens", NEW_TOKENS, "--device", "cpu", "--json")
        answer = run_finetune(binary, "generate", run, "--prompt", prompt, *settings)
        tokens = json.loads(answer)["token_ids"]
        answers.append([token for token in tokens if token not in ends])
    ways = [("base + adapter", base, adapter), *((f"merged {kind}", path, None) for kind, path in merged.items())]
    for what, path, lora in ways:
        llama = llama_cpp(path, lora, n_ctx=512)
        found = [greedy(llama, prompt, ends) for prompt in prompts]
        same = sum(a == b for mine, theirs in zip(answers, found) for a, b in zip(mine, theirs))
        count = sum(map(len, answers))
        # In 16 bits and less llama.cpp rounds what it multiplies too: the figure is for information.
        exact = what in ("base + adapter", "merged f32")
        text = f"{what}: {same} of {count} tokens are those of `finetune generate`"
        report.note("smollm2", "greedy", text, wrong=exact and found != answers)
