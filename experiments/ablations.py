# SPDX-License-Identifier: MIT
"""Figure 7 of the paper, and what it leaves open, answered in the tiny world.

    python -m experiments.ablations [FOLDER]     or ./run.sh ablations [FOLDER]

This is Inverse-Q* once more, in plain PyTorch and transformers, around the core of inverse_q.py.
The main row is what ./run.sh does. Every other row changes what its
name says. Each has three seeds. The metric is the paper's (sec. 5.4), win minus loss: how many
percent of held-out requests a model alone answers well, minus how many the base model alone does.
FOLDER gets ablations.json and ablations.png, and a base model if it has none.
"""

import copy
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments import tiny_world as world
from inverse_q import SoftLabelLoss, logits, superior_policy

SEEDS = (0, 1, 2)
EPOCHS, SAMPLES, BATCH_SIZE, LEARNING_RATE = 6, 256, 16, 1e-4


@dataclass(frozen=True)
class Variant:
    """What is trained. The defaults are the main row."""

    alpha: float = 1.4
    loss: str = "forward KL"  # or "reverse KL", or "sampled token": see loss_of().
    teacher: str = "frozen"  # "live": pi_0 and pi_plus are the policy as it is at that step.
    prompts: str = "fresh"  # "same": every epoch has those of the first.
    plausibility: float = 0.0
    temperature: float = 1.0  # of the samples to train on; the judge's always have 1

    def __str__(self):
        changed = [f"{k} {v}" for k, v in asdict(self).items() if v != getattr(Variant, k)]
        return ", ".join(changed) or "alpha 1.4, the main row"


VARIANTS = [Variant(alpha) for alpha in (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)]  # figure 7
VARIANTS += [Variant(loss=loss) for loss in ("sampled token", "reverse KL")]
VARIANTS += [Variant(teacher="live"), Variant(prompts="same"), Variant(temperature=0.7)]
VARIANTS += [Variant(alpha, plausibility=0.1) for alpha in (1.4, 2.0)]


def encode(tokenizer, conversations: list, *system: dict) -> list[list[int]]:
    """The prompts as token ids."""
    chats = [[*system, *turns] for turns in conversations]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def sample(model, tokenizer, x: list[list[int]], temperature: float = 1.0) -> list[list[int]]:
    """A response to each prompt, with its end token if the model ended it itself."""
    eos = tokenizer.eos_token_id
    how = {"do_sample": True, "top_k": 0, "temperature": temperature, "pad_token_id": eos}
    by_length = sorted(range(len(x)), key=lambda i: len(x[i]))  # for less padding, on the left
    y = {}
    for start in range(0, len(x), 64):
        batch = by_length[start : start + 64]
        inputs = tokenizer.pad({"input_ids": [x[i] for i in batch]}, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=48, **how)  # [B, L + new]
        for i, row in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            y[i] = row[: row.index(eos) + 1] if eos in row else row
    return [y[i] for i in range(len(x))]


def final_states(model, x: list[list[int]], y: list[list[int]]) -> Tensor:
    """Final hidden states at the positions that predict the T tokens of the responses, [T, d]."""
    pairs = list(zip(x, y, strict=True))
    # Padding stands on the right, where a causal model does not look: it needs no mask.
    ids = pad_sequence([torch.tensor((x + y)[:-1]) for x, y in pairs], batch_first=True)  # [B, L]
    h = model.base_model(input_ids=ids).last_hidden_state  # [B, L, d]
    return torch.cat([row[len(x) - 1 :][: len(y)] for row, (x, y) in zip(h, pairs, strict=True)])


def loss_of(variant: Variant, policy, teacher, x, x_plus, y) -> tuple[Tensor, float]:
    """The loss of responses y to prompts x, x_plus with the principle; KL(pi_hat || pi_theta)."""
    with torch.no_grad():
        z_0 = logits(final_states(teacher, x, y), teacher.lm_head.weight)  # [T, V]
        z_plus = logits(final_states(teacher, x_plus, y), teacher.lm_head.weight)
        log_pi_hat = superior_policy(z_0, z_plus, variant.alpha, variant.plausibility)
    tokens = torch.tensor([token for response in y for token in response])  # [T]
    h, weight = final_states(policy, x, y), policy.lm_head.weight
    loss, entropy, _ = SoftLabelLoss.apply(h, weight, None, log_pi_hat.__getitem__, tokens)
    kl = (loss - entropy).item() / len(tokens)
    log_pi_theta = logits(h, weight).log_softmax(-1)  # [T, V]
    if variant.loss == "reverse KL":  # KL(pi_theta || pi_hat), over the whole vocabulary as well
        loss = (log_pi_theta.exp() * (log_pi_theta - log_pi_hat)).sum()
    elif variant.loss == "sampled token":
        # The other reading of section 4.1: the label of a state is its sampled token a_t, weighted
        # with pi_hat(a_t|s_t). L = -1/N sum_t pi_hat(a_t|s_t) log pi_theta(a_t|s_t). As a_t comes
        # from pi_theta, this is the policy gradient for a reward of pi_hat(a_t|s_t) per token.
        a = tokens[:, None]
        loss = -(log_pi_hat.gather(1, a).exp() * log_pi_theta.gather(1, a)).sum()
    return loss / len(tokens), kl


def train(variant: Variant, base, tokenizer, seed: int):
    """Inverse-Q*: the trained model, and the mean KL of its last epoch."""
    rng, policy = random.Random(seed), copy.deepcopy(base)
    torch.manual_seed(seed)
    teacher = policy if variant.teacher == "live" else base
    adamw = torch.optim.AdamW(policy.parameters(), LEARNING_RATE, weight_decay=0.0)
    principle = {"role": "system", "content": world.PRINCIPLE}
    for epoch in range(EPOCHS):
        if epoch == 0 or variant.prompts == "fresh":
            asked = [world.make_dialogue(rng, world.NOT_SHOWN)[0] for _ in range(SAMPLES)]
            x, x_plus = encode(tokenizer, asked), encode(tokenizer, asked, principle)
        y, kls = sample(policy, tokenizer, x, variant.temperature), []
        for start in range(0, len(x), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            loss, kl = loss_of(variant, policy, teacher, x[rows], x_plus[rows], y[rows])
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            adamw.step()
            kls.append(kl)
    return policy, sum(kls) / len(kls)


def run(folder: str, variant: Variant | None, seed: int) -> tuple[list[bool], float]:
    """Train, unless variant is None: the verdicts on the held-out answers, and the last KL."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    torch.set_num_threads(1)  # Each run has a core of its own.
    logging.disable_progress_bar()
    base, how = Path(folder, "base"), {"padding_side": "left", "pad_token": "</s>"}
    tokenizer = AutoTokenizer.from_pretrained(base, **how)
    model, kl = AutoModelForCausalLM.from_pretrained(base).eval(), 0.0
    if variant is not None:
        model, kl = train(variant, model, tokenizer, seed)
    torch.manual_seed(seed)
    asked = [record["messages"] for record in world.read_jsonl(Path(folder, "held_out.jsonl"))]
    y = sample(model, tokenizer, encode(tokenizer, asked))
    replies = tokenizer.batch_decode(y, skip_special_tokens=True)
    return [world.is_good(*pair) for pair in zip(asked, replies, strict=True)], kl


def row_of(variant: Variant, results: list[tuple], base: Tensor) -> dict:
    """A row of the table, from what run() returns for each seed and the base model's verdicts."""
    good, kl = (torch.tensor(values, dtype=torch.float64) for values in zip(*results, strict=True))
    margins = 100 * (good - base)  # [seeds, requests], each 100, 0 or -100
    half = 1.96 * margins.std().item() / margins.numel() ** 0.5
    row = {"name": str(variant), **asdict(variant), "good": good.mean().item()}
    row |= {"win_minus_loss": margins.mean().item(), "half_interval": half}
    return row | {"seeds": margins.mean(1).tolist(), "kl": kl.mean().item()}


def draw(rows: list[dict], path: Path):
    """The picture: the mean of a row with its 95 % interval, and a cross for each seed."""
    from matplotlib.figure import Figure

    axis = Figure((9, 5), layout="constrained").subplots()
    for row in rows:
        middle, half = row["win_minus_loss"], row["half_interval"]
        axis.errorbar(middle, row["name"], xerr=half, fmt="C0o", capsize=4)
        axis.plot(row["seeds"], [row["name"]] * len(row["seeds"]), "x", color="0.5")
    axis.set_xlabel("win minus loss against the base model, % of the held-out requests")
    axis.invert_yaxis()
    axis.figure.savefig(path, dpi=120)


def main(folder: str = "out/tiny-world"):
    """Run all rows, print the table and write FOLDER/ablations.json and .png."""
    if not Path(folder, "principle.txt").exists():  # the last file of a world
        world.make_world(folder)
    rows = []
    jobs = [(folder, variant, seed) for variant in (None, *VARIANTS) for seed in SEEDS]
    print(f"{'':30} win - loss, %   of each seed, %      good answers   KL to pi_hat")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # a process per core
        results = pool.map(run, *zip(*jobs, strict=True))
        base = torch.tensor([next(results)[0] for _ in SEEDS], dtype=torch.float64)
        for variant in VARIANTS:
            row = row_of(variant, [next(results) for _ in SEEDS], base)
            rows.append(row)
            seeds = " ".join(f"{margin:5.1f}" for margin in row["seeds"])
            numbers = f"{row['win_minus_loss']:6.1f} ± {row['half_interval']:3.1f}    {seeds}"
            print(f"{variant!s:30} {numbers} {row['good']:15.3f} {row['kl']:15.4f}", flush=True)
    path = Path(folder, "ablations.json")
    path.write_text(json.dumps({"epochs": EPOCHS, "rows": rows}, indent=2) + "\n")
    draw(rows, path.with_suffix(".png"))
    print(f"Written to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    if sys.argv[2:] or any(word[:1] == "-" or Path(word).is_file() for word in sys.argv[1:]):
        print(__doc__)
        sys.exit(2)
    main(*sys.argv[1:])
