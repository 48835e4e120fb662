# SPDX-License-Identifier: MIT
"""A world so small that Inverse-Q* can be seen to work in minutes, on any machine.

    python -m experiments.tiny_world make FOLDER         make a base model and prompts
    python -m experiments.tiny_world report WORLD RUN    judge the base model, pi_hat and RUN/model

In this world people ask for help, as in "How do I paint the shelf?", and every reply has three
parts: an opening, a step and a closing. Each part is good or bad, whatever the others are. It is
good with probability SHOWN if PRINCIPLE is the system message, and NOT_SHOWN without it.

The base model, a Llama of 0.6 million weights, learns this in about a minute. ./run.sh then trains
it with Inverse-Q*, which has to make all parts of its replies good without the principle.
"""

import html
import json
import math
import random
import sys
import time
from pathlib import Path

import torch

import inverse_q as q

PRINCIPLE = "Be kind and exact."
SHOWN = 0.85
NOT_SHOWN = 0.45

VERBS = ["paint", "clean", "fix", "move", "sell", "pack", "weigh", "measure"]
THINGS = (  # noqa: SIM905
    "shelf lamp bike chair boat clock piano drum fence table ladder mirror kettle wagon tent canoe "
    "globe bench radio statue basket carpet window barrel"
).split()
TOOLS = ["gloves", "a cloth", "tape", "a friend", "soap", "a list"]
REQUESTS = ["How do I {} the {}?", "Please help me {} my {}.", "I want to {} a {}."]
GOOD_OPENINGS = ("Sure!", "Gladly!")
BAD_OPENINGS = ("Ugh.", "Not again.")
GOOD_CLOSINGS = ("Shall I go on?", "Ask me more!")
BAD_CLOSINGS = ("Go away.", "That is all.")

PAIRS = [(verb, thing) for verb in VERBS for thing in THINGS]
HELD_OUT = set(random.Random(1).sample(PAIRS, len(PAIRS) // 4))  # No training ever asks for these.

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_jsonl(path):
    """The objects in a file that has one per line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_jsonl(path, records):
    """Write a file with one object per line."""
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


# ------------------------------------------------------------------------------------- Dialogues --


def make_request(rng, held_out=False):
    """A request, and the verb and the thing in it."""
    verb, thing = rng.choice([pair for pair in PAIRS if (pair in HELD_OUT) == held_out])
    return rng.choice(REQUESTS).format(verb, thing), verb, thing


def make_reply(rng, verb, thing, p_good):
    """A reply of three parts, each of which is good with probability p_good."""
    good_opening, good_step, good_closing = (rng.random() < p_good for _ in range(3))
    tool = rng.choice(TOOLS)
    named = f"the {thing}" if good_step else "it"
    opening = rng.choice(GOOD_OPENINGS if good_opening else BAD_OPENINGS)
    closing = rng.choice(GOOD_CLOSINGS if good_closing else BAD_CLOSINGS)
    return f"{opening} To {verb} {named}, take {tool}. {closing}"


def make_dialogue(rng, p_good, held_out=False):
    """Turns that end with a request, and the verb and the thing in that request."""
    turns = []
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        request, verb, thing = make_request(rng)
        turns.append({"role": "user", "content": request})
        turns.append({"role": "assistant", "content": make_reply(rng, verb, thing, p_good)})
    request, verb, thing = make_request(rng, held_out)
    turns.append({"role": "user", "content": request})
    return turns, verb, thing


def training_records(rng, n):
    """n records with a prompt each, in all the forms that Inverse-Q* reads."""
    for i in range(n):
        turns, verb, thing = make_dialogue(rng, NOT_SHOWN)
        if i % 4 == 0:
            yield {"messages": turns}
        elif i % 4 == 1 and len(turns) == 1:
            yield {"prompt": turns[0]["content"]}
        else:
            names = {"user": "Human", "assistant": "Assistant"}
            text = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
            good_reply = make_reply(rng, verb, thing, 1.0)
            bad_reply = make_reply(rng, verb, thing, 0.0)
            yield {
                "chosen": f"{text}\n\nAssistant: {good_reply}",
                "rejected": f"{text}\n\nAssistant: {bad_reply}",
            }


def good_parts(messages, reply):
    """Which of the three parts of a reply are good: the opening, the step, the closing."""
    request = messages[-1]["content"]
    verb, thing = next(
        (verb, thing) for verb, thing in PAIRS if f" {verb}" in request and f" {thing}" in request
    )
    good_step = any(f" To {verb} the {thing}, take {tool}. " in reply for tool in TOOLS)
    return reply.startswith(GOOD_OPENINGS), good_step, reply.endswith(GOOD_CLOSINGS)


def is_good(messages, reply):
    """The verdict of the judge, which training never sees: are all three parts good?"""
    return all(good_parts(messages, reply))


# -------------------------------------------------------------------------------- The base model --


def make_tokenizer(texts):
    """A byte-level BPE tokenizer, trained on texts, with the chat template of the tiny world."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def make_llama(seed=0, **changes):
    """A small Llama with random weights; changes go to its LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def make_batch(rng, tokenizer):
    """Token ids of 48 dialogues with their last reply, and the labels of their tokens: four pairs
    of [12, L]. Dialogues of similar length are together, or half of the tokens would be padding.
    """
    rows = []
    for _ in range(48):
        shown = rng.random() < 0.5
        p_good = SHOWN if shown else NOT_SHOWN
        turns, verb, thing = make_dialogue(rng, p_good)
        turns.append({"role": "assistant", "content": make_reply(rng, verb, thing, p_good)})
        if shown:
            turns.insert(0, {"role": "system", "content": PRINCIPLE})
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows.sort(key=len)
    parts = []
    for start in range(0, 48, 12):
        some = rows[start : start + 12]
        length = len(some[-1])
        ids = torch.tensor([row + [1] * (length - len(row)) for row in some])
        labels = torch.tensor([row + [-100] * (length - len(row)) for row in some])
        parts.append((ids, labels))  # -100: no label
    return parts


def train_base(rng, model, tokenizer, steps):
    """Teach a model what people in this world say, with and without the principle."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        parts = make_batch(rng, tokenizer)
        counts = [(labels[:, 1:] != -100).sum().item() for _, labels in parts]
        mean = 0.0  # of the loss, over the tokens of all parts
        optimizer.zero_grad()
        for (ids, labels), count in zip(parts, counts, strict=True):
            loss = model(input_ids=ids, labels=labels).loss * (count / sum(counts))
            loss.backward()
            mean += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"  step {step}/{steps}, loss {mean:.3f}, {seconds:.0f} s", flush=True)


def make_world(folder, steps=350):
    """Make FOLDER/base, the model; train.jsonl, its prompts; held_out.jsonl, those of the judge;
    and principle.txt."""
    rng = random.Random(0)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dialogues = [make_dialogue(rng, 0.5) for _ in range(500)]
    texts = [turn["content"] for turns, _, _ in dialogues for turn in turns]
    tokenizer = make_tokenizer(texts + [PRINCIPLE] * 100)
    model = make_llama(vocab_size=len(tokenizer))
    train_base(rng, model, tokenizer, steps)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_jsonl(folder / "train.jsonl", training_records(rng, 1000))
    held_out = {}  # No two are the same, because Inverse-Q* takes every prompt once.
    while len(held_out) < 900:
        turns, _, _ = make_dialogue(rng, NOT_SHOWN, held_out=True)
        held_out[json.dumps(turns)] = {"messages": turns}
    write_jsonl(folder / "held_out.jsonl", held_out.values())
    (folder / "principle.txt").write_text(PRINCIPLE)


# ------------------------------------------------------------------------------------ The report --


@torch.no_grad()
def answers(model_folder, conversations, seed=0, alpha=None, contrasted=None):
    """One sampled answer to each conversation, by transformers and no code of this project.

    With alpha these are the answers of pi_hat, by the classifier-free guidance of transformers:
    `conversations` show the principle, and `contrasted` are the same without it. That is what one
    would do instead of training. It takes two passes of the model for every token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token

    def encode(some):
        texts = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        return batch["input_ids"], batch["attention_mask"]

    torch.manual_seed(seed)
    replies = []
    for start in range(0, len(conversations), 150):
        rows = slice(start, start + 150)
        ids, mask = encode(conversations[rows])
        guidance = {}
        if alpha is not None:
            plain_ids, plain_mask = encode(contrasted[rows])
            guidance["guidance_scale"] = alpha
            guidance["negative_prompt_ids"] = plain_ids
            guidance["negative_prompt_attention_mask"] = plain_mask
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=48,
            pad_token_id=tokenizer.pad_token_id,
            **guidance,
        )
        replies += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return replies


def share_of_good(conversations, replies):
    """The share of replies that are good from beginning to end."""
    verdicts = [is_good(turns, reply) for turns, reply in zip(conversations, replies, strict=True)]
    return sum(verdicts) / len(verdicts)


def interval(good, n):
    """The 95 % interval of the fraction good / n, after Wilson: (low, high)."""
    z = 1.96
    p = good / n
    middle = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # Without the limits rounding would make a low end of -0.
    return max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))


TITLES = {
    "base": "base",
    "prompting": "base, shown the principle",
    "superior": "pi_hat, two passes per token",
    "inverse_q": "after Inverse-Q*",
}


def report(world, run):
    """Judge base, base shown the principle, pi_hat itself and the trained model on the held-out
    requests. Prints the result and writes it to RUN/report.json, and a picture of it to
    RUN/tiny_world.svg."""
    base = Path(world, "base")
    alpha = json.loads(Path(run, "config.json").read_text())["alpha"]
    plain = [record["messages"] for record in read_jsonl(Path(world, "held_out.jsonl"))]
    shown = [[{"role": "system", "content": PRINCIPLE}, *turns] for turns in plain]
    replies = {
        "base": answers(base, plain),
        "prompting": answers(base, shown),
        "superior": answers(base, shown, alpha=alpha, contrasted=plain),
        "inverse_q": answers(Path(run, "model"), plain),
    }

    n = len(plain)
    result = {name: share_of_good(plain, own) for name, own in replies.items()}
    limits = {name: interval(share * n, n) for name, share in result.items()}
    print(f"\n{n} held-out requests, one answer each      good      95 % interval")
    for name, title in TITLES.items():
        low, high = limits[name]
        print(f"  {title:42} {result[name]:6.3f}    {low:.3f} to {high:.3f}")

    # Every point is on the same requests, if the run had all of them as --eval_data.
    curve, sizes = [], []
    for path in sorted(Path(run, "samples").glob("held-out-*.jsonl")):
        samples = read_jsonl(path)
        share = share_of_good([s["messages"] for s in samples], [s["response"] for s in samples])
        curve.append(share)
        sizes.append(len(samples))
    curve.append(result["inverse_q"])
    sizes.append(n)
    print(f"\nGood answers to {min(sizes)} held-out requests after each epoch, 95 % interval")
    for epoch, (share, size) in enumerate(zip(curve, sizes, strict=True)):
        low, high = interval(share * size, size)
        bar = "#" * round(50 * share)
        print(f"  {epoch:3} {bar:50} {share:.3f} ({low:.3f} to {high:.3f})")

    for i in range(3):
        print(f"\n  {plain[i][-1]['content']}")
        print(f"    before  {replies['base'][i]}")
        print(f"    after   {replies['inverse_q'][i]}")
    path = Path(run, "report.json")
    more = {"convergence": curve, "requests": n, "ci95": limits}
    path.write_text(json.dumps({**result, **more}, indent=2) + "\n")
    i = next(i for i in range(n) if good_parts(plain[i], replies["base"][i]) == (False, True, True))
    tinted = credit_of(base, plain[i], shown[i], replies["base"][i], alpha)
    picture = Path(run, "tiny_world.svg")
    picture.write_text(draw(result, limits, n, plain[i][-1]["content"], tinted))
    print(f"\nWritten to {path}, and a picture to {picture}")


# ----------------------------------------------------------------------------------- The picture --

BLUE = (0, 114, 178)  # for a credit above 0; these two are told apart by every eye
ORANGE = (213, 94, 0)


@torch.no_grad()
def credit_of(model_folder, messages, shown, reply, alpha):
    """(token, credit in nats) of every token of a reply, and of the end of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experiments.credit import token_credit  # Here, because that module imports this one.

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    y = tokenizer(reply, add_special_tokens=False)["input_ids"]

    def log_pi(turns):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        x = tokenizer(text, add_special_tokens=False)["input_ids"]
        return model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)  # [T, V]

    log_pi_0 = log_pi(messages)
    log_pi_hat = q.superior_policy(log_pi_0, log_pi(shown), alpha)
    credit = token_credit(log_pi_hat, log_pi_0, torch.tensor(y)).tolist()
    return [(tokenizer.decode([token]), a) for token, a in zip(y, credit, strict=True)]


def tint(credit, scale):
    """The color of a token, and its strength from 0 to 0.8, which a credit of `scale` nats gets."""
    return BLUE if credit > 0 else ORANGE, 0.8 * min(1, abs(credit) / scale)


def draw(shares, limits, n, request, tinted):
    """An SVG: a bar with its interval for every share of good answers, and a reply to `request`
    with its tokens tinted by credit."""
    parts = []

    def text(x, y, string, **attributes):
        more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(string)}</text>')

    left, width, top = 250, 420, 60  # of the bars

    def rect(x, y, w, h, fill, opacity=1.0):
        size = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        parts.append(f'<rect {size} fill="{fill}" fill-opacity="{opacity:.2f}"/>')

    text(20, 28, f"Tiny world: good answers to {n} held-out requests", font_weight="bold")
    for tick in range(6):
        x = left + width * tick / 5
        rect(x, top - 12, 1, 4 * 34 + 8, "#dddddd")
        text(x, top + 4 * 34 + 14, f"{tick / 5:.1f}", font_size=12, text_anchor="middle")
    for i, (name, title) in enumerate(TITLES.items()):
        y = top + 34 * i
        color = "#0072b2" if name == "inverse_q" else "#8a8a8a"
        rect(left, y - 6, width * shares[name], 22, color)
        low, high = (left + width * limit for limit in limits[name])
        parts.append(
            f'<path d="M{low:.1f} {y}v10m0 -5H{high:.1f}m0 -5v10" stroke="black" fill="none"/>'
        )
        text(left - 10, y + 10, title, text_anchor="end")
        text(high + 8, y + 10, f"{shares[name]:.3f}")

    y = top + 4 * 34 + 52
    text(20, y, "Token credit of an answer of the base model, in nats", font_weight="bold")
    text(20, y + 28, request)
    x, character = 20, 9.03  # the width of a character of a monospaced font of 15 pixels
    scale = max(abs(credit) for _, credit in tinted)
    for token, credit in tinted:
        (red, green, blue), strength = tint(credit, scale)
        w = character * len(token)
        rect(x, y + 42, w, 22, f"rgb({red},{green},{blue})", strength)
        label = html.escape(token).replace(" ", "\u00a0")  # SVG drops spaces at the ends.
        parts.append(
            f'<text x="{x:.1f}" y="{y + 58}" font-family="monospace" textLength="{w:.1f}">'
            f"{label}</text>"
        )
        if abs(credit) > 0.2:
            text(x + w / 2, y + 80, f"{credit:+.1f}", font_size=12, text_anchor="middle")
        x += w
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 360" width="760" '
        'font-family="system-ui, sans-serif" font-size="15">\n'
        f'<rect width="760" height="360" fill="white"/>\n{body}\n</svg>\n'
    )


def main():
    """Make a world, or report on a run in it."""
    from transformers import logging

    logging.disable_progress_bar()
    match sys.argv[1:]:
        case ["make", folder] if not folder.startswith("-"):
            make_world(folder)
        case ["report", world, run]:
            report(world, run)
        case _:
            print(__doc__)
            sys.exit(2)


if __name__ == "__main__":
    main()
