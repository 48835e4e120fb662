# SPDX-License-Identifier: MIT
"""What does pi_hat think of responses, token by token? Two commands, neither of which trains.

    python -m experiments.credit --model lmsys/vicuna-7b-v1.5 --data my.jsonl
    python -m experiments.credit alpha --model lmsys/vicuna-7b-v1.5

The first shows which tokens of a response pi_hat rewards (the case study of sec. 5.5), on a page
with a color for every token. The second shows what pi_hat would be like for alpha from 1 to 2, by
which to choose alpha before training.

Records of --data that have a "response", not an empty one, or "response_ids" are taken with it,
as are the lines of a run's samples files. --model responds to the prompts of the others.
"""

import collections
import dataclasses
import html
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import torch

import inverse_q as q
from experiments.evaluate import OneSource, prepare, prompts_of, responses
from experiments.tiny_world import BLUE, ORANGE, tint, write_jsonl


@dataclasses.dataclass
class Credit:
    """The option of the first command, beside those of training."""

    samples: int = q.option(0, "Responses that are shown in the terminal, too")


# ------------------------------------------------------------------ Responses and their policies --


def read_pairs(cfg, chat):
    """(prompt, record) of all records of --data whose prompt fits, in their order. A prompt may
    come with several responses, but counts once where the model has to respond."""
    known = set()
    for prompt, record in prompts_of(cfg, chat):
        key = json.dumps([prompt, record.get("response"), record.get("response_ids")])
        if key not in known:
            known.add(key)
            yield prompt, record


def given_ids(record, tokenizer, vocab_size):
    """The token ids of a record's own response, [] if it has none."""
    ids, text = record.get("response_ids"), record.get("response") or ""
    if not ids:
        q.check(isinstance(text, str), f"--data: a response has to be a text, not {text!r:.80}")
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    valid = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    q.check(valid, f"--data: response_ids have to be token ids of --model, not {ids!r:.80}")
    return ids


def read_samples(cfg):
    """The first --eval_samples samples of --data, with a response of their own or of --model, and
    the tokenizer."""
    chat = q.Chat(q.load_tokenizer(cfg), cfg.principle)
    pairs = list(itertools.islice(read_pairs(cfg, chat), cfg.eval_samples))
    q.check(pairs, f"{cfg.data}: no prompt to use")
    prompts = [prompt for prompt, _ in pairs]
    # The output layer may have more rows than the tokenizer has tokens.
    size = q.transformers.AutoConfig.from_pretrained(cfg.model).get_text_config().vocab_size
    given = [given_ids(record, chat.tokenizer, size) for _, record in pairs]
    asked = [prompt for prompt, ids in zip(prompts, given, strict=True) if not ids]
    made = iter(responses(cfg, cfg.model, asked) if asked else [])
    samples = []
    for i, (prompt, ids) in enumerate(zip(prompts, given, strict=True)):
        ids, shown = ids or next(made).response_ids, chat.with_principle(prompt)
        samples.append(q.Sample(i, prompt, chat.ids(prompt), chat.ids(shown), ids))
    return samples, chat.tokenizer


def prepare_contrast(cfg):
    """The samples, the tokenizer, and the superior policy that is to judge them."""
    prepare(cfg)
    ds_config = q.deepspeed_config(cfg)
    samples, tokenizer = read_samples(cfg)
    q.join_ranks()
    return samples, tokenizer, q.SuperiorPolicy(cfg, ds_config)


def token_credit(log_pi_hat, log_pi_0, tokens, beta=1.0):
    """A(s_t, a_t) = beta [log pi_hat(a_t|s_t) - log pi_0(a_t|s_t)], [..., T] (from eq. 6-10).

    The policies are [..., T, V], the tokens a_t [..., T]; the unit is nats for beta = 1. The sum
    over t is the reward of the response (eq. 6)."""
    return beta * (log_pi_hat - log_pi_0).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def three_policies(superior, cfg, sample):
    """log pi_0, log pi_plus and log pi_hat at the response tokens of a sample, [3, T, V]."""
    everything = slice(None)
    superior.cfg = dataclasses.replace(cfg, alpha=0.0, plausibility=0.0)
    log_pi_0 = superior([sample])(everything)
    superior.cfg = dataclasses.replace(cfg, alpha=1.0, plausibility=0.0)
    log_pi_plus = superior([sample])(everything)
    log_pi_hat = q.superior_policy(log_pi_0, log_pi_plus, cfg.alpha, cfg.plausibility)
    return torch.stack([log_pi_0, log_pi_plus, log_pi_hat])


# -------------------------------------------------------------------------------- Choosing alpha --

ALPHAS = (0.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
IMPLAUSIBLE = 0.1  # share of pi_plus's largest probability, as in contrastive decoding (Li et al.)


def sums_of(log_pi_0, log_pi_plus, tokens, alpha, plausibility):
    """Sums over the T tokens of a response, in nats but for the third: KL(pi_hat || pi_0), the
    entropy of pi_hat, its probability of implausible tokens, and the credit of the tokens."""
    log_pi_hat = q.superior_policy(log_pi_0, log_pi_plus, alpha, plausibility)
    pi_hat = log_pi_hat.exp()
    implausible = log_pi_plus < log_pi_plus.amax(-1, keepdim=True) + math.log(IMPLAUSIBLE)
    parts = {
        "kl": pi_hat * (log_pi_hat - log_pi_0),
        "entropy": -pi_hat * log_pi_hat,
        "implausible": pi_hat[implausible],
        "credit": token_credit(log_pi_hat, log_pi_0, tokens),
    }
    return {name: part.sum(dtype=torch.float64).item() for name, part in parts.items()}


def sweep(cfg):
    """What pi_hat would be like for several alpha, at the tokens of responses: means over the
    tokens, in alpha.json and on the console."""
    samples, _, superior = prepare_contrast(cfg)
    totals = {alpha: collections.Counter() for alpha in ALPHAS}
    for sample in samples:
        log_pi_0, log_pi_plus, _ = three_policies(superior, cfg, sample)
        tokens = torch.tensor(sample.response_ids, device=log_pi_0.device)
        for alpha in ALPHAS:
            sums = sums_of(log_pi_0, log_pi_plus, tokens, alpha, cfg.plausibility)
            totals[alpha].update(sums)  # which adds

    n = sum(len(sample.response_ids) for sample in samples)
    rows = []
    for alpha in ALPHAS:
        means = {name: total / n for name, total in totals[alpha].items()}
        # Adding 0.0 makes 0.0 of -0.0.
        rows.append({"alpha": alpha, **{name: round(x, 6) + 0.0 for name, x in means.items()}})
    path = Path(cfg.output_dir, "alpha.json")
    path.write_text(json.dumps(rows, indent=2) + "\n")

    q.say(
        f"\npi_hat at the {n} tokens of {len(samples)} responses (alpha 0 is pi_0, 1 is pi_plus), "
        f"in nats but for its\nprobability of implausible tokens, those under {IMPLAUSIBLE} of "
        "pi_plus's likeliest"
    )
    q.say("  alpha  KL(pi_hat || pi_0)  entropy  implausible  credit")
    for row in rows:
        divergence = f"{row['alpha']:5.1f}  {row['kl']:18.4f}  {row['entropy']:7.4f}"
        q.say(f"  {divergence}  {row['implausible']:11.4f}  {row['credit']:6.3f}")
    q.say(f"Written: {path}")


# ------------------------------------------------------------------------------- The credit page --

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token credit</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.9 system-ui, sans-serif; max-width: 48rem; margin: auto; padding: 1rem; }
p { white-space: pre-wrap; overflow-wrap: anywhere; } .x, small { opacity: .75; }
span { border-radius: 3px; } span:hover, span:focus { outline: 2px solid; }
span:empty::before { content: "·"; }
span[data-tip]:hover::after, span[data-tip]:focus::after { content: attr(data-tip); z-index: 1;
  position: absolute; left: 1rem; right: 1rem; max-width: 46rem; margin: 2em auto; padding: .6em;
  white-space: pre-wrap; font: .85rem/1.5 ui-monospace, monospace; background: Canvas;
  color: CanvasText; border: 1px solid; border-radius: 4px; }
</style>
<h1>Token credit</h1>
<small>A_t = log pi_hat - log pi_0 in nats, alpha ALPHA: <span style="background: LOW">
-SCALE or less </span> <span style="background: HIGH"> SCALE or more </span>.
Point at a token, or tap it, for its probabilities.</small>
ARTICLES</html>
"""


def added_text(tokenizer, ids, before):
    """What the last of the tokens adds to the texts of those before it. Decoded by itself, it could
    lack its space, as in Llama's tokenizer, or be a part of a character."""
    return tokenizer.decode(ids).rstrip("\ufffd")[len("".join(before)) :]


def credit_record(policies, sample, tokenizer):
    """A line of credit.jsonl: a response, token by token. policies: [3, T, V]."""
    texts = []
    for n in range(1, len(sample.response_ids) + 1):
        texts.append(added_text(tokenizer, sample.response_ids[:n], texts))
    tokens = torch.tensor(sample.response_ids, device=policies.device)
    log_pi_0, log_pi_plus, log_pi_hat = policies
    credit = token_credit(log_pi_hat, log_pi_0, tokens).double()

    def of_tokens(log_pi):
        return log_pi.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()

    return {
        "index": sample.index,
        "response_ids": sample.response_ids,
        "tokens": texts,
        "log_pi_0": of_tokens(log_pi_0),
        "log_pi_plus": of_tokens(log_pi_plus),
        "log_pi_hat": of_tokens(log_pi_hat),
        "credit": credit.tolist(),
        "reward": credit.sum().item(),
    }


def token_notes(record, log_pi_hat, tokenizer):
    """What the page says about each token of a response. log_pi_hat: [T, V]."""
    probabilities, favourites = (part.tolist() for part in log_pi_hat.exp().topk(3))
    totals = itertools.accumulate(record["credit"])
    notes = []
    for t, total in enumerate(totals):
        before, texts = record["response_ids"][:t], record["tokens"][:t]
        pi_0, pi_plus, pi_hat = (
            math.exp(record[name][t]) for name in ("log_pi_0", "log_pi_plus", "log_pi_hat")
        )
        preferred = [
            f"{added_text(tokenizer, [*before, i], texts)!r} {p:.3f}"
            for p, i in zip(probabilities[t], favourites[t], strict=True)
        ]
        notes.append(
            f"{record['tokens'][t]!r}  credit {record['credit'][t]:+.3f}, sum so far {total:+.3f}\n"
            f"pi_0 {pi_0:.4f}  pi_plus {pi_plus:.4f}  pi_hat {pi_hat:.4f}\n"
            f"pi_hat prefers {', '.join(preferred)}"
        )
    return notes


def rgba(color, strength):
    """A color of CSS, with its opacity."""
    red, green, blue = color
    return f"rgba({red}, {green}, {blue}, {strength:.2f})"


def article(question, record, notes, scale):
    """A response on the page. Whatever a model or a record says is escaped."""
    spans = []
    for token, credit, note in zip(record["tokens"], record["credit"], notes, strict=True):
        color = rgba(*tint(credit, scale))
        spans.append(
            f'<span tabindex="0" style="background: {color}" '
            f'data-tip="{html.escape(note)}">{html.escape(token)}</span>'
        )
    return (
        f'<p class="x">{html.escape(question)}</p>\n'
        f"<p>{''.join(spans)}</p>\n"
        f"<small>reward {record['reward']:+.3f} nats</small>"
    )


def spelt_out(text):
    """A text whose control characters do nothing in a terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def print_tinted(question, record, scale):
    """A response in the terminal."""
    print(f"\n{spelt_out(question)}")
    colored = ""
    for token, credit in zip(record["tokens"], record["credit"], strict=True):
        color, strength = tint(credit, scale)
        red, green, blue = (round(255 - strength * (255 - part)) for part in color)
        colored += f"\x1b[30;48;2;{red};{green};{blue}m{spelt_out(token)}\x1b[0m"
    print(colored)
    print(f"reward {record['reward']:+.3f} nats")


def credit(cfg, options):
    """Which tokens of responses pi_hat rewards. Leaves credit.jsonl and credit.html."""
    samples, tokenizer, superior = prepare_contrast(cfg)
    records, notes = [], []
    for sample in samples:
        policies = three_policies(superior, cfg, sample)
        records.append(credit_record(policies, sample, tokenizer))
        notes.append(token_notes(records[-1], policies[2], tokenizer))

    credits = torch.tensor([a for record in records for a in record["credit"]])
    scale = max(0.01, credits.abs().quantile(0.95).item())
    articles = []
    for i, sample in enumerate(samples):
        question = sample.messages[-1]["content"]
        articles.append(article(question, records[i], notes[i], scale))
        if i < options.samples:
            print_tinted(question, records[i], scale)

    table = Path(cfg.output_dir, "credit.jsonl")
    write_jsonl(table, records)
    parts = {
        "LOW": rgba(ORANGE, 0.8),
        "HIGH": rgba(BLUE, 0.8),
        "SCALE": f"{scale:.2f}",
        "ALPHA": f"{cfg.alpha}",
        "ARTICLES": "\n".join(articles),
    }
    # In one pass, so that these words inside an article stay as they are.
    page = Path(cfg.output_dir, "credit.html")
    page.write_text(re.sub("|".join(parts), lambda match: parts[match[0]], PAGE))
    q.say(f"Written: {page} and {table}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["alpha"]:
        del sys.argv[1]
        q.main(sweep, (OneSource,))
    else:
        q.main(credit, (OneSource, Credit))
    os._exit(0)  # PyTorch's gloo threads can abort an orderly exit. All has been flushed.
