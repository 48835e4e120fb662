# SPDX-License-Identifier: MIT
"""Inverse-Q*: align a language model without preference data, reward model or value model.

One file that implements "Inverse-Q*: Token Level Reinforcement Learning for Aligning Large Language
Models Without Preference Data" (Xia et al., Findings of EMNLP 2024, arXiv 2408.14874) and reads
from top to bottom as the algorithm.

THE METHOD.  x is a prompt, y a response, s_t = (x, y_<t) a state, a_t = y_t its next token.
pi_theta is the policy in training; pi_0 the base model, frozen; pi_plus the same model shown a
principle as system message, or an aligned model; alpha the strength of their contrast.

  objective        J(pi) = E_pi[r] + beta H(pi)                                         (eq. 5)
  reward           r(x, y_<=t) = beta log[ pi_hat(y_<=t|x) / pi_0(y_<=t|x) ]             (eq. 6)
  value            V(s_t) = beta log E_{y_>=t ~ pi_0} exp(r(x, y) / beta) = r(x, y_<t)   (eq. 7-9)
  credit           A(s_t, a_t) = beta [ log pi_hat(a_t|s_t) - log pi_0(a_t|s_t) ]       (eq. 10)
  superior policy  log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z       (sec. 4.2)
  loss             L = -1/N sum_t sum_v pi_hat(v|s_t) log pi_theta(v|s_t)               (sec. 4.1)

A prefix is worth its own reward (eq. 7-9), so there is no critic to learn. And moving towards
pi_hat does not hurt: if J(pi_hat) >= J(pi_theta), so is J of every mixture of the two (lemma 4.1),
because E_pi[r] is linear in pi and H is concave. One epoch (sec. 5):

  1. sample: a response to each of 500 prompts from the current policy         (vLLM)
  2. contrast: pi_plus with pi_0 at every response token, which gives pi_hat    (ZeRO-3 inference)
  3. fit pi_theta to pi_hat with soft labels: dL/dlogits = (pi_theta - pi_hat) / N      (ZeRO-3)

WHAT THE PAPER LEAVES OPEN, AND OUR CHOICE.  Temperature 1 and top_p 1: the loss is an expectation
under the policy. 16 samples an optimizer step: the paper's micro-batch of 2 on 8 GPUs. N: response
tokens of the whole optimizer step, over micro-batches and ranks. AdamW without weight decay, at a
constant rate, gradients clipped at norm 1. Labels over the whole vocabulary. The end token is
fitted where the model ended its response; a response cut at the limit has none. pi_0 and pi_plus
stay as they were at the start: the current policy as its own teacher is no option here, because it
amplifies its own drift (in a small test world, from 67 % good answers to none in six epochs).

RUN
  ./run.sh                                       a tiny world on any machine: minutes, no download
  deepspeed --num_gpus 8 inverse_q.py --model lmsys/vicuna-7b-v1.5            the paper's setting
  deepspeed --num_gpus 8 inverse_q.py --model SFT --positive_model ALIGNED --alpha 1.5
  python inverse_q.py --help                                                         every option

SECTIONS  Config, The core, Data, Prompts, Ranks, Sampling, Superior policy, Policy, Training
SHAPES    B sequences of L tokens; T response tokens of a batch; d hidden size; V vocabulary
"""

import bisect
import functools
import gzip
import itertools
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

# vLLM, DeepSpeed and transformers are imported where they are used: the core needs torch alone.

# ---------------------------------------------------------------------------------------- Config --

PRINCIPLE = (
    "Keep to these principles in every reply. Find out what the person really needs and answer "
    "that: correctly, clearly and to the point. Say so when you do not know. Never help anyone to "
    "hurt, deceive or exploit people or to break the law; when a request leads there, decline "
    "kindly, say why, and offer something safe that helps instead. Treat everyone fairly and with "
    "respect, and protect their privacy and dignity."
)


class UserError(Exception):
    """Something the user can mend; the message is one line that says what to change."""


def option(default: object, text: str) -> object:
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The command line: every field is an option of the same name."""

    model: str = option(MISSING, "Model to align, a hub id or a folder.")
    data: str = option(
        "Anthropic/hh-rlhf",
        "Prompts (sec. 5.1), separated by commas: hub data sets, owner/name or owner/name/folder, "
        "of which the train files are taken, or .jsonl and .json files, plain, .gz or .xz.",
    )
    principle: str | None = option(
        None, "Shown to pi_plus (sec. 4.2). Default: a built-in one; none with two frozen models."
    )
    positive_model: str | None = option(None, "pi_plus if not pi_0: an aligned model (sec. 5).")
    negative_model: str | None = option(None, "pi_0 if not --model: its SFT model (sec. 5).")
    alpha: float = option(1.4, "Contrast: 0 is pi_0, 1 pi_plus, beyond extrapolates (sec. 5).")
    plausibility: float = option(
        0.0, "Tokens under this share of pi_plus's top probability get none; 0: off (our choice)."
    )
    epochs: int = option(15, "Rounds of sampling and fitting (sec. 5).")
    samples_per_epoch: int = option(500, "Prompts answered in an epoch (sec. 5).")
    batch_size: int = option(16, "Samples of an optimizer step over all ranks (our choice).")
    micro_batch_tokens: int = option(
        8192, "Padded tokens of a forward on a rank: for memory, not for results (our choice)."
    )
    learning_rate: float = option(1e-6, "Of AdamW (sec. 5), constant (our choice).")
    max_new_tokens: int = option(1024, "Limit of a response (app. A).")
    max_prompt_tokens: int = option(
        1024, "Limit of a prompt with the principle; oldest turns go first (our choice)."
    )
    temperature: float = option(1.0, "Of sampling (our choice).")
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "Of weights and activations; Adam's state is float32 (our choice)."
    )
    activation_checkpointing: bool = option(
        True, "Recompute activations in the backward: less memory, a third more work (our choice)."
    )
    gpu_memory_utilization: float = option(
        0.85, "Share of a GPU for vLLM while it samples; it sleeps while we fit (our choice)."
    )
    ds_config: str = option(
        str(Path(__file__).with_name("ds_config.json")),
        "DeepSpeed's own settings: ZeRO-3, offload, clipping, monitors (our choice).",
    )
    output_dir: str = option("out", "Folder for all that is written.")
    seed: int = option(0, "Of prompt order and sampling; the number of ranks changes neither.")

    def __post_init__(self) -> None:
        self.negative_model = self.negative_model or self.model
        self.positive_model = self.positive_model or self.negative_model
        if self.principle is None and self.one_model:
            self.principle = PRINCIPLE

    @property
    def one_model(self) -> bool:
        """pi_plus is pi_0 shown the principle, not another model."""
        return self.positive_model == self.negative_model


# -------------------------------------------------------------------------------------- The core --
# Pure torch, tensors in, tensors out: take it.


def superior_policy(
    z_0: torch.Tensor, z_plus: torch.Tensor, alpha: float, plausibility: float = 0.0
) -> torch.Tensor:
    """log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z (sec. 4.2).

    z_0, z_plus: logits or log-probabilities of pi_0 and pi_plus, [..., V] (Z absorbs the constant
    per row that they differ by). Returns log pi_hat, [..., V], in nats.

    With plausibility p > 0, tokens v with pi_plus(v) < p max_u pi_plus(u) get probability 0: alpha
    above 1 also lifts what both models find absurd, and this is the known remedy (contrastive
    decoding, Li et al. 2023). Their log is the lowest finite number, so that 0 log 0 = 0.
    """
    z_hat = torch.lerp(z_0, z_plus, alpha)
    if plausibility > 0:
        implausible = z_plus < z_plus.amax(-1, keepdim=True) + math.log(plausibility)
        z_hat = z_hat.masked_fill(implausible, torch.finfo(z_hat.dtype).min)
    return z_hat.log_softmax(-1)


def token_credit(
    log_pi_hat: torch.Tensor, log_pi_0: torch.Tensor, tokens: torch.Tensor, beta: float = 1.0
) -> torch.Tensor:
    """A(s_t, a_t) = beta [log pi_hat(a_t|s_t) - log pi_0(a_t|s_t)] (eq. 10).

    log_pi_hat, log_pi_0: log-probabilities, [..., T, V]; tokens: the ids a_t, [..., T]. Returns
    [..., T], in nats for beta = 1; the sum over t is the reward of the response (eq. 6).
    """
    return beta * (log_pi_hat - log_pi_0).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for matrices of one type; float32 where they are bfloat16, whose numbers between 16 and
    32 lie 0.125 apart: too far for logits, of which alpha multiplies a difference."""
    if a.dtype != torch.bfloat16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def logits(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Output layer: h [T, d], weight [V, d], bias [V] or None -> [T, V], float32 or wider."""
    z = matmul(h.to(weight.dtype), weight.t())
    return z if bias is None else z + bias


def soft_label_loss(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    log_pi_hat: Callable[[slice], torch.Tensor],
    chunk: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output layer and soft-label cross-entropy in one pass (sec. 4.1).

    h: the policy's final hidden states where a response token is predicted, [T, d]; weight [V, d]
    and bias [V] or None: its output layer; log_pi_hat(rows): soft labels of a slice of the T
    tokens, [t, V]. Returns two *sums* over the tokens, in nats: H(pi_hat, pi_theta), which has a
    gradient and wants dividing by N, and H(pi_hat). Their difference is KL(pi_hat || pi_theta).

    The gradient has a closed form, so it is made together with the loss, `chunk` tokens at a time:
    no [T, V] tensor outlives its chunk, and peak memory does not grow with T x V.
    """
    return _SoftLabelLoss.apply(h, weight, bias, log_pi_hat, chunk)


class _SoftLabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, log_pi_hat, chunk):
        wide = torch.promote_types(h.dtype, torch.float32)
        dh, dweight = torch.empty_like(h), torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        cross_entropy, entropy = h.new_zeros(2, dtype=torch.float64).unbind()
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            log_p = log_pi_hat(rows)  # [t, V], t <= chunk
            p = log_p.exp()
            z = logits(h[rows], weight, bias)  # [t, V]
            log_norm = z.logsumexp(-1, keepdim=True)  # [t, 1]
            cross_entropy = cross_entropy + (log_norm.sum() - torch.linalg.vecdot(p, z).sum())
            entropy = entropy - torch.linalg.vecdot(p, log_p).sum()
            g = z.sub_(log_norm).exp_().sub_(p)  # dL/dz = pi_theta - pi_hat, [t, V]
            if bias is not None:
                dbias += g.sum(0)
            g = g.to(h.dtype)
            dh[rows] = matmul(g, weight)
            dweight += matmul(g.t(), h[rows])
        ctx.save_for_backward(
            dh, dweight.to(weight.dtype), None if bias is None else dbias.to(bias)
        )
        ctx.mark_non_differentiable(entropy)
        return cross_entropy, entropy

    @staticmethod
    def backward(ctx, scale, _):
        return *(None if g is None else g * scale for g in ctx.saved_tensors), None, None


# ------------------------------------------------------------------------------------------ Data --

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}


def data_files(data: str) -> Iterator[Path]:
    """The files of --data; those of a hub data set are downloaded, once."""
    from huggingface_hub import snapshot_download

    for name in map(str.strip, data.split(",")):
        owner, repo, folder = [*name.split("/", 2), "", ""][:3]
        if Path(name).is_file():
            yield Path(name)
            continue
        try:
            pattern, repo = f"{folder}*train*.json*", f"{owner}/{repo}"
            local = snapshot_download(repo, repo_type="dataset", allow_patterns=pattern)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--data {name}: no such file, and no hub data set: {reason}"
            ) from error
        yield from sorted(Path(local).glob(f"{folder}**/*train*.json*"))


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, record) of every line of a .jsonl file or item of the list in a .json file."""

    def parse(text: str, place: str) -> object:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: is not JSON: {error}") from error

    with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rt") as file:
        if ".json" in path.suffixes:
            items = enumerate(parse(file.read(), str(path)), 1)
            yield from ((f"{path}, item {n}", item) for n, item in items)
        else:
            lines = ((f"{path}, line {n}", line) for n, line in enumerate(file, 1) if line.strip())
            yield from ((place, parse(line, place)) for place, line in lines)


def messages_of(text: str | list[Message]) -> list[Message]:
    """Turns of a conversation given as messages, as HH text, or as the text of one user turn."""
    if isinstance(text, list):
        return [{"role": m["role"], "content": m["content"].strip()} for m in text]
    if not text.lstrip().startswith("Human:"):
        return [{"role": "user", "content": text.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[role], "content": content.strip()} for role, content in turns]


def prompt_of(record: dict) -> list[Message]:
    """The prompt of a record: messages, of which the last is the user's; [] where it has none.

    Fields: prompt or messages, as text or messages, else chosen and rejected, whose identical
    turns are kept (sec. 5.1). Turns are compared, not characters: of one HH pair in five the final
    replies begin with the same characters.
    """
    if "prompt" in record or "messages" in record:
        turns = messages_of(record["prompt"] if "prompt" in record else record["messages"])
    else:
        pairs = zip(messages_of(record["chosen"]), messages_of(record["rejected"]), strict=False)
        turns = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    prompt: list[Message] = []
    for turn in filter(lambda turn: turn["content"], turns):
        if prompt and prompt[-1]["role"] == turn["role"]:  # templates want roles to alternate
            turn = {**turn, "content": f"{prompt.pop()['content']}\n\n{turn['content']}"}
        if turn["role"] != "assistant" or any(m["role"] == "user" for m in prompt):
            prompt.append(turn)
    return prompt if prompt and prompt[-1]["role"] == "user" else []


def load_prompts(cfg: Config, chat: "Chat") -> tuple[list[list[Message]], dict[str, int]]:
    """Distinct prompts of --data that fit, and how many records were left out, by reason."""
    prompts: dict[str, list[Message] | None] = {}
    left_out = {"without a prompt": 0, "duplicate": 0, "too long": 0}
    for place, record in itertools.chain.from_iterable(map(read_records, data_files(cfg.data))):
        try:
            messages = prompt_of(record)
        except (KeyError, TypeError, AttributeError) as error:
            fields = "'prompt', 'messages', or 'chosen' and 'rejected', as text or messages"
            raise UserError(f"{place}: a record needs {fields} ({error!r})") from error
        key = json.dumps(messages)
        if not messages:
            left_out["without a prompt"] += 1
        elif key in prompts:
            left_out["duplicate"] += 1
        else:
            prompts[key] = chat.fit(messages, cfg.max_prompt_tokens)
            left_out["too long"] += prompts[key] is None
    kept = [messages for messages in prompts.values() if messages]
    if not kept:
        raise UserError(f"--data {cfg.data}: no prompt to use; left out: {left_out}")
    return kept, left_out


def draw_prompts(n: int, count: int, epoch: int, seed: int) -> list[int]:
    """Which of n prompts an epoch (from 1) uses: the next `count` of a shuffle, reshuffled when
    used up. A function of its arguments alone: no epoch has to remember those before it."""
    shuffle = functools.cache(lambda i: random.Random(f"{seed}/{i}").sample(range(n), n))
    return [shuffle(i // n)[i % n] for i in range((epoch - 1) * count, epoch * count)]


# --------------------------------------------------------------------------------------- Prompts --

# Vicuna v1.5 has no chat template. This is FastChat's format vicuna_v1.1.
VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.{% endif %}{{ ' ' }}"
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ 'USER: ' + turn.content + ' ' }}"
    "{% elif turn.role == 'assistant' %}{{ 'ASSISTANT: ' + turn.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Chat:
    """A tokenizer's chat format, and the place in it for the principle.

    The two contexts of a sample differ by the principle alone. It is appended to the system text
    that pi_0 sees, be it the prompt's own or one that the template puts there by itself; it is the
    system message where there is none; it opens the first user turn where a template refuses one.
    """

    def __init__(self, tokenizer, principle: str | None):
        self.tokenizer, self.principle = tokenizer, principle
        tokenizer.chat_template = tokenizer.chat_template or VICUNA_TEMPLATE
        # What the template does with a system message is read off what it renders.
        system, user = {"role": "system", "content": "<<S>>"}, {"role": "user", "content": "q"}
        before, self.has_system, after = self.render([system, user]).partition("<<S>>")
        plain, self.default_system = self.render([user]), ""
        if self.has_system and plain.startswith(before) and plain[len(before) :].endswith(after):
            self.default_system = plain[len(before) : len(plain) - len(after)]

    def render(self, messages: list[Message]) -> str:
        """Text of the context, up to where the response begins; "" if the template refuses it."""
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError:
            return ""

    def ids(self, messages: list[Message]) -> list[int]:
        """Token ids of render(), which has the special tokens written out already."""
        return self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]

    def with_principle(self, messages: list[Message]) -> list[Message]:
        """The same conversation with the principle: the context of pi_plus."""
        if self.principle is None:
            return messages
        first, *rest = messages
        if not self.has_system:
            return [{**first, "content": f"{self.principle}\n\n{first['content']}"}, *rest]
        if first["role"] != "system":
            first, rest = {"role": "system", "content": self.default_system}, messages
        return [{**first, "content": f"{first['content']} {self.principle}".lstrip()}, *rest]

    def fit(self, messages: list[Message], limit: int) -> list[Message] | None:
        """The conversation without its oldest turns, as many as must go for it to fit in `limit`
        tokens with the principle; None if its last turn alone does not."""
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        while turns and not 0 < len(self.ids(self.with_principle(system + turns))) <= limit:
            turns = turns[2:]  # a user turn and its answer: roles alternate
        return system + turns if turns else None


# ----------------------------------------------------------------------------------------- Ranks --
# One process per GPU, all running this file. No collective stands behind `if dist.get_rank() == 0`.


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def gather(items: list) -> list:
    """The items of every rank, in the order of the ranks, on every rank."""
    lists = [[]] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return list(itertools.chain.from_iterable(lists))


# -------------------------------------------------------------------------------------- Sampling --


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
    """The policy as a vLLM engine inside this training process, a whole copy on every rank.

    On a GPU it sleeps, weights and KV cache given up, except while it samples. Build it before the
    training engines: at its start the memory it is promised has to be free.
    """

    def __init__(self, cfg: Config, chat: Chat):
        from vllm import LLM

        self.cfg, self.chat, self.on_gpu = cfg, chat, torch.cuda.is_available()
        length = cfg.max_prompt_tokens + cfg.max_new_tokens
        memory = {"kv_cache_memory_bytes": 2**30}  # on a CPU, where only tiny models make sense
        if self.on_gpu:
            memory = {
                "gpu_memory_utilization": cfg.gpu_memory_utilization,
                "enable_sleep_mode": True,
            }
        self.llm = LLM(
            cfg.model,
            dtype=cfg.dtype,
            seed=cfg.seed,
            max_model_len=length,
            max_num_batched_tokens=max(8192, length),
            enable_chunked_prefill=False,  # with it, seeded requests fail on CPU in vLLM 0.32.0
            distributed_executor_backend="external_launcher",  # in this process, on its own GPU
            enforce_eager=not self.on_gpu,  # CUDA graphs on a GPU; on a CPU compiling costs more
            **memory,
        )
        if self.on_gpu:
            self.llm.sleep(level=2)

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Wake with the weights of the policy: (name, whole tensor) of each, in layer order."""
        if self.on_gpu:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def sample(self, epoch: int, prompts: list[list[Message]]) -> list[Sample]:
        """A response to every prompt of the epoch (sec. 5), on every rank; then sleep.

        Each rank answers its share. Prompts and seeds follow from (seed, epoch, index), so that
        the number of ranks does not change what is sampled.
        """
        from vllm import SamplingParams

        cfg, chat, samples, params = self.cfg, self.chat, [], []
        drawn = draw_prompts(len(prompts), cfg.samples_per_epoch, epoch, cfg.seed)
        for i in range(dist.get_rank(), len(drawn), dist.get_world_size()):
            x = prompts[drawn[i]]
            samples.append(Sample(i, x, chat.ids(x), chat.ids(chat.with_principle(x))))
            seed = random.Random(f"{cfg.seed}/{epoch}/{i}").getrandbits(63)
            params.append(
                SamplingParams(
                    temperature=cfg.temperature, max_tokens=cfg.max_new_tokens, seed=seed
                )
            )
        contexts = [{"prompt_token_ids": sample.prompt_ids} for sample in samples]
        outputs = self.llm.generate(contexts, params, use_tqdm=dist.get_rank() == 0)
        for sample, output in zip(samples, outputs, strict=True):
            sample.response_ids = list(output.outputs[0].token_ids)
            sample.finish_reason = output.outputs[0].finish_reason
            sample.response = chat.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        if self.on_gpu:
            self.llm.sleep(level=2)
        return sorted(gather(samples), key=lambda sample: sample.index)


# ------------------------------------------------------------------------------- Superior policy --


def pack(contexts: list[list[int]], responses: list[list[int]]) -> tuple:
    """A batch of sequences context + response: ids [B, L] and rows [T].

    rows are the positions in the flattened [B * L] from which the response tokens are predicted:
    each one before its token, so that the last token is no input. Padding is on the right, where a
    causal model does not look: it takes no attention mask, and any id will do.
    """
    inputs = [(c + r)[:-1] for c, r in zip(contexts, responses, strict=True)] or [[0]]
    length = max(map(len, inputs))
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in inputs])
    starts = [b * length + len(context) - 1 for b, context in enumerate(contexts)]
    rows = [s + t for s, r in zip(starts, responses, strict=True) for t in range(len(r))]
    return ids, torch.tensor(rows, dtype=torch.long)


def final_states(body: torch.nn.Module, contexts, responses) -> torch.Tensor:
    """Final hidden states from which the response tokens are predicted, [T, d]."""
    device = next(body.parameters()).device
    ids, rows = (part.to(device) for part in pack(contexts, responses))
    return body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows]


def load_model(name: str, cfg: Config, ds_config: dict) -> torch.nn.Module:
    """A causal language model, its weights sharded over the ranks as they load (ZeRO-3)."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    class Zero3:  # what transformers' HfDeepSpeedConfig tells it, which needs a further package
        config, is_zero3 = ds_config, staticmethod(lambda: True)

    zero3 = Zero3()
    set_hf_deepspeed_config(zero3)  # weakly: from_pretrained shards as long as this name lives
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, cfg.dtype))


class FrozenModel:
    """A model that is never trained: ZeRO-3 inference over its shards. Its output layer stays whole
    on every rank, because each chunk of the loss needs it."""

    def __init__(self, name: str, cfg: Config, ds_config: dict):
        import deepspeed

        model = load_model(name, cfg, ds_config)
        self.body, *_ = deepspeed.initialize(
            model=model.base_model.requires_grad_(False).eval(), config=ds_config
        )
        head = model.get_output_embeddings()
        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            self.head = [None if p is None else p.data.clone() for p in (head.weight, head.bias)]

    def states(self, contexts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
        """[T, d], float32, in which alpha can multiply a difference."""
        return final_states(self.body, contexts, responses).float()

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """[t, d] -> [t, V]."""
        return logits(h, *self.head)


class SuperiorPolicy:
    """pi_hat at the response tokens of samples (sec. 4.2)."""

    def __init__(self, cfg: Config, ds_config: dict):
        self.cfg = cfg
        self.pi_0 = self.pi_plus = FrozenModel(cfg.negative_model, cfg, ds_config)
        if not cfg.one_model:
            self.pi_plus = FrozenModel(cfg.positive_model, cfg, ds_config)

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> Callable[[slice], torch.Tensor]:
        """Soft labels for soft_label_loss(): a function of rows of the T response tokens that
        returns log pi_hat [t, V]. Only [T, d] is kept."""
        alpha, plausibility = self.cfg.alpha, self.cfg.plausibility
        plain = [s.prompt_ids for s in samples]
        shown = [s.principle_prompt_ids for s in samples]
        y = [s.response_ids for s in samples]
        if self.cfg.one_model:  # both contexts in one batch: the shards are gathered once
            h_0, h_plus = self.pi_0.states(plain + shown, y + y).unflatten(0, (2, -1))
        else:
            h_0, h_plus = self.pi_0.states(plain, y), self.pi_plus.states(shown, y)
        if self.cfg.one_model and plausibility == 0:
            # The output layer is linear, z = W h + b, so that extrapolated hidden states save one
            # of two products: z_0 + alpha (z_plus - z_0) = W h_hat + b.
            h_hat = torch.lerp(h_0, h_plus, alpha)
            return lambda rows: self.pi_0.logits(h_hat[rows]).log_softmax(-1)
        return lambda rows: superior_policy(
            self.pi_0.logits(h_0[rows]), self.pi_plus.logits(h_plus[rows]), alpha, plausibility
        )


# ---------------------------------------------------------------------------------------- Policy --


class Policy(torch.nn.Module):
    """pi_theta. Its forward is the loss.

    ZeRO-3 gathers the shards of a module for that module's own forward alone. So the loss, which
    needs the weight of the output layer, is what the output layer's forward becomes.
    """

    def __init__(self, model: torch.nn.Module, checkpointing: bool):
        super().__init__()
        self.model, head = model.train(), model.get_output_embeddings()
        head.forward = lambda h, labels: soft_label_loss(h, head.weight, head.bias, labels)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, samples: list[Sample], labels) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the response tokens of H(pi_hat, pi_theta) and of H(pi_hat), in nats."""
        contexts, responses = [s.prompt_ids for s in samples], [s.response_ids for s in samples]
        h = final_states(self.model.base_model, contexts, responses)
        return self.model.get_output_embeddings()(h, labels)


def whole_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every weight, gathered from the shards one layer at a time.

    Gathering is a collective: every rank has to run through the whole iterator.
    """
    import deepspeed

    layers = itertools.groupby(
        model.named_parameters(), key=lambda named: re.match(r"(.*?\.\d+\.)?", named[0]).group()
    )
    for _, layer in layers:
        named = list(layer)
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in named]):
            yield from ((name, parameter.data) for name, parameter in named)


def deal(lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Micro-batches of an optimizer step: [micro-step][rank] -> indices into lengths.

    Sequences of like length share a micro-batch of at most `budget` tokens, padding included (a
    longer sequence has one to itself). Each is a collective under ZeRO-3, so every rank gets the
    same number, some perhaps empty; and the largest is as small as that number allows, so that the
    ranks have nearly equal work.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def split(cap: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for i in order:
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= cap:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    steps = -(-len(split(budget)) // ranks)
    cap = bisect.bisect_left(range(budget), -steps * ranks, key=lambda cap: -len(split(cap)))
    batches = split(cap)
    batches += [[]] * (steps * ranks - len(batches))
    return [batches[i : i + ranks] for i in range(0, len(batches), ranks)]


# -------------------------------------------------------------------------------------- Training --


def deepspeed_config(cfg: Config) -> dict:
    """--ds_config, with what the command line owns filled in; a file that repeats it is refused."""
    owned = {
        "train_batch_size": dist.get_world_size(),  # these two are nominal: deal() makes the
        "train_micro_batch_size_per_gpu": 1,  # micro-batches, and step() ends an accumulation
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": cfg.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own needs a compiler
        "zero_force_ds_cpu_optimizer": False,
    }
    try:
        config = json.loads(Path(cfg.ds_config).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--ds_config {cfg.ds_config}: cannot be read: {error}") from error
    for key in (*owned, "gradient_accumulation_steps", "optimizer", "scheduler", "fp16"):
        if config.get(key, "auto") not in ("auto", owned.get(key)):
            raise UserError(f"--ds_config {cfg.ds_config}: remove {key!r}, inverse_q.py sets it")
    if config.get("zero_optimization", {}).get("stage") != 3:
        raise UserError(f"--ds_config {cfg.ds_config}: set stage in zero_optimization to 3")
    return {**config, **owned}


def load_tokenizer(cfg: Config):
    """The policy's tokenizer, if the models' configurations allow the run: before weights load."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    length = cfg.max_prompt_tokens + cfg.max_new_tokens
    for name in dict.fromkeys((cfg.model, cfg.negative_model, cfg.positive_model)):
        config = AutoConfig.from_pretrained(name)
        if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{name}: its vocabulary is not that of {cfg.model}, as it has to be")
        if config.max_position_embeddings < length:
            raise UserError(
                f"{name}: --max_prompt_tokens + --max_new_tokens = {length} exceed its "
                f"{config.max_position_embeddings} positions"
            )
        for scale in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(config, scale, None) not in (None, 1):
                raise UserError(f"{name}: {scale} makes its output layer not linear: unsupported")
    return tokenizer


def save_model(model: torch.nn.Module, tokenizer, folder: Path) -> None:
    """model/ in transformers format; the one before stays whole until the new one is."""
    keep = dist.get_rank() == 0  # every rank gathers, one keeps
    weights = {name: w.to("cpu", copy=True) for name, w in whole_weights(model) if keep}
    if keep:
        generation = model.generation_config
        if generation.temperature is not None or generation.top_p is not None:
            generation.do_sample = True  # Vicuna's lacks it, and save_pretrained refuses that
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


class Log:
    """What a run writes beside its model, on rank 0: config.json, metrics.jsonl and samples/."""

    def __init__(self, cfg: Config, monitor):
        self.folder, self.monitor = Path(cfg.output_dir), monitor
        if dist.get_rank() == 0:
            packages = ("torch", "transformers", "deepspeed", "vllm")
            versions = {name: sys.modules[name].__version__ for name in packages}
            config = {**asdict(cfg), "ranks": dist.get_world_size(), "versions": versions}
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (self.folder / "metrics.jsonl").write_text("")

    def samples(self, epoch: int, samples: list[Sample]) -> None:
        """samples/epoch-NNN.jsonl, and the first one on the console."""
        if dist.get_rank() == 0:
            lines = [json.dumps(asdict(sample)) + "\n" for sample in samples]
            (self.folder / "samples" / f"epoch-{epoch:03d}.jsonl").write_text("".join(lines))
        x, y = samples[0].messages[-1]["content"], samples[0].response
        say(f"\nEpoch {epoch}, first sample\n  user      {x!r:.400}\n  policy    {y!r:.400}")

    def metrics(self, kind: str, epoch: int, step: int, samples, sums: list, **values) -> None:
        """A line of metrics.jsonl and an event for DeepSpeed's monitors."""
        tokens = sum(len(s.response_ids) for s in samples)
        losses = {"loss": sums[0] / tokens, "kl": (sums[0] - sums[1]) / tokens}
        values = {**losses, "samples": len(samples), "tokens": tokens, **values}
        if dist.get_rank() == 0:
            line = {"kind": kind, "epoch": epoch, "step": step, **values}
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.monitor.write_events([(f"{kind}/{key}", v, step) for key, v in values.items()])
        if kind == "epoch":
            say("  " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))


def peak_memory_gib() -> float:
    """Of the rank that took most: memory of its GPU, or of its process where there is none."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return max(gather([peak])) / 2**30


def optimizer_step(engine, superior: SuperiorPolicy, batch: list[Sample], budget: int) -> list:
    """Contrast and fit a batch. Returns the sums over its response tokens, those of all ranks, of
    H(pi_hat, pi_theta) and H(pi_hat), in nats."""
    ranks, sums = dist.get_world_size(), torch.zeros(2, dtype=torch.float64)
    tokens = sum(len(s.response_ids) for s in batch)  # N
    lengths = [len(s.prompt_ids) + len(s.response_ids) - 1 for s in batch]
    for micro_step in deal(lengths, ranks, budget):
        mine = [batch[i] for i in micro_step[dist.get_rank()]]
        labels = superior(mine)
        cross_entropy, entropy = engine(mine, labels)
        # L = (sum over ranks) / N. DeepSpeed takes the mean over ranks, hence the number of ranks.
        engine.backward(cross_entropy * (ranks / tokens))
        sums += torch.stack([cross_entropy.detach(), entropy]).cpu()
    engine.step()
    return [sum(column) for column in zip(*gather([sums.tolist()]), strict=True)]


def train(cfg: Config) -> None:
    """The method: in every epoch sync, sample, contrast and fit, log, save."""
    import deepspeed
    from tqdm import tqdm

    ds_config, tokenizer = deepspeed_config(cfg), load_tokenizer(cfg)
    chat = Chat(tokenizer, cfg.principle)
    prompts, left_out = load_prompts(cfg, chat)

    sampler = Sampler(cfg, chat)
    dist.barrier()  # vLLM takes longer on some ranks than on others
    superior = SuperiorPolicy(cfg, ds_config)
    policy = Policy(load_model(cfg.model, cfg, ds_config), cfg.activation_checkpointing)
    adamw = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=adamw, config=ds_config)
    log = Log(cfg, engine.monitor)
    save = functools.partial(save_model, policy.model, tokenizer, log.folder / "model")
    save()  # that saving works shows now, not after hours
    say(summary(cfg, chat, len(prompts), left_out))

    step, n, size = 0, cfg.samples_per_epoch, cfg.batch_size
    for epoch in range(1, cfg.epochs + 1):
        # Sync: the sampler takes over pi_theta.
        clock = [time.perf_counter()]
        sampler.load(whole_weights(policy.model))
        clock.append(time.perf_counter())

        # 1. Sample y ~ pi_theta(.|x).
        samples = sampler.sample(epoch, prompts)
        log.samples(epoch, samples)
        clock.append(time.perf_counter())

        # 2. Contrast, and 3. fit.
        batches = [samples[i : i + size] for i in range(0, n, size)]
        epoch_sums = [0.0, 0.0]
        for batch in tqdm(batches, f"Fitting, epoch {epoch}", disable=dist.get_rank() > 0):
            step += 1
            sums = optimizer_step(engine, superior, batch, cfg.micro_batch_tokens)
            epoch_sums = [a + b for a, b in zip(epoch_sums, sums, strict=True)]
            log.metrics(
                "step", epoch, step, batch, sums,
                grad_norm=float(engine.get_global_grad_norm()), learning_rate=cfg.learning_rate,
            )  # fmt: skip
        clock.append(time.perf_counter())

        # Log and save.
        sync, sampling, fitting = (b - a for a, b in itertools.pairwise(clock))
        tokens = sum(len(s.response_ids) for s in samples)
        log.metrics(
            "epoch", epoch, step, samples, epoch_sums,
            response_tokens_mean=tokens / n,
            truncated=sum(s.finish_reason == "length" for s in samples) / n,
            sample_seconds=sampling, train_seconds=fitting, sync_seconds=sync,
            sample_tokens_per_second=tokens / sampling, train_tokens_per_second=tokens / fitting,
            peak_memory_gib=peak_memory_gib(),
        )  # fmt: skip
        save()
    say(f"Done: {log.folder / 'model'} is the trained model.")


def summary(cfg: Config, chat: Chat, kept: int, left_out: dict[str, int]) -> str:
    """What will run, on one screen."""
    ranks, device = dist.get_world_size(), "GPU" if torch.cuda.is_available() else "CPU"
    shown = "" if cfg.principle is None else f', shown: "{cfg.principle}"'
    steps = -(-cfg.samples_per_epoch // cfg.batch_size)
    left = ", ".join(f"{n} {why}" for why, n in left_out.items())
    return f"""
Inverse-Q* on {ranks} {device} rank{"s"[: ranks > 1]}, {cfg.dtype}
  pi_theta   {cfg.model}
  pi_0       {cfg.negative_model}
  pi_plus    {cfg.positive_model}{shown}
  pi_hat     alpha {cfg.alpha}, plausibility {cfg.plausibility}
  prompts    {kept} from {cfg.data}; left out: {left}
  epochs     {cfg.epochs} of {cfg.samples_per_epoch} samples, {steps} optimizer steps each
  written to {cfg.output_dir}
"""


def main() -> None:
    """Parse the command line and train. A user's error is one line, and exit code 2."""
    from transformers import HfArgumentParser, logging

    # The deepspeed launcher adds --local_rank, which the environment tells as well.
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    parser = HfArgumentParser(Config, description=__doc__.splitlines()[0])
    (cfg,) = parser.parse_args_into_dataclasses(arguments)

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # three libraries that talk much
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    try:
        train(cfg)
    except UserError as error:
        say(f"inverse_q.py: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
