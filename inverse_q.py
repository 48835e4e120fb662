# SPDX-License-Identifier: MIT
"""Inverse-Q*: align a language model without preference data, reward model or value model.

The method of "Inverse-Q*: Token Level Reinforcement Learning for Aligning Large Language Models
Without Preference Data" (Xia et al., Findings of EMNLP 2024, arXiv 2408.14874). Our copy of the
paper lacks its formulas; those below are reconstructed from its text, with its numbers.

THE METHOD.  x is a prompt, y a response, s_t = (x, y_<t) a state and a_t = y_t its next token.
  pi_theta  the policy that is trained
  pi_0      the frozen base model: the policy before training, or --negative_model
  pi_plus   the same frozen model, shown a principle in its system message; or an aligned model
  pi_hat    the estimate of a superior policy: the contrast of pi_plus with pi_0, amplified by alpha

  superior policy  log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z       (sec. 4.2)
  loss             L = -1/N sum_t sum_v pi_hat(v|s_t) log pi_theta(v|s_t)               (sec. 4.1)

Z makes the probabilities of a token sum to 1; t runs over all response tokens of an optimizer step,
N in number. This is all that training computes. One epoch (sec. 5) has three steps:
  1. Sample a response to each of 500 prompts from the current policy, with vLLM.
  2. Contrast: pi_0 and pi_plus read every response, and together they give pi_hat.
  3. Fit pi_theta to pi_hat as soft labels; dL/dlogits = (pi_theta - pi_hat) / N.

WHY IT IS REINFORCEMENT LEARNING.  What follows explains the loss and never enters it. beta is the
weight of the KL penalty.
  reward           r(x, y_<=t) = beta log[ pi_hat(y_<=t|x) / pi_0(y_<=t|x) ]            (eq. 6)
  objective        J(pi) = E_pi[r] - beta KL(pi || pi_0) = -beta KL(pi || pi_hat)       (eq. 3, 5)
  value            V(s_t) = beta log E_pi_0[exp(r(x, y) / beta) | s_t] = r(x, y_<t)     (eq. 7-10)
  credit           A(s_t, a_t) = beta [ log pi_hat(a_t|s_t) - log pi_0(a_t|s_t) ]

J is largest at pi_hat. Minimising L leads there too, by the opposite KL: up to a constant, L is the
mean of KL(pi_hat || pi_theta) over the tokens of the samples. Lemma 4.1: mixing pi_hat into
pi_theta never lowers J, because KL is convex, if distributions over whole responses are mixed;
mixtures token by token are not covered. The value of a state is the reward of its prefix, because
the continuations of pi_hat sum to 1; so no critic is learnt. The credit of a token is
V(s_{t+1}) - V(s_t), a step that the paper leaves out.

WHAT THE PAPER LEAVES OPEN, AND OUR CHOICE.
  Sampling   Temperature 1 and top_p 1, because the loss is an expectation under the policy (as it
             was when the epoch began); fresh prompts every epoch, and one response to each.
  Batch      16 samples per optimizer step: the paper's 2 per GPU on 8 GPUs. The last step of an
             epoch takes what remains. N counts over all micro-batches and ranks of the step.
  Optimizer  AdamW, constant rate, no weight decay; clipping at norm 1 is set in ds_config.json.
  Labels     The whole vocabulary, at every response token including its end token. A response that
             was cut at the limit has no end token, and is fitted as far as it goes.

RUN     ./run.sh                               a demonstration with a tiny model, on any machine
        deepspeed --num_gpus 8 inverse_q.py --model lmsys/vicuna-7b-v1.5       the paper's setting
SHAPES  B sequences of S tokens; T response tokens in them; d hidden size; V vocabulary size.
RANKS   DeepSpeed's launcher runs this file once per GPU. ZeRO-3 shards all weights over these ranks
        but vLLM's and the frozen output layers. "Collective": every rank has to make this call, in
        the same order, because the ranks wait for one another in it.
"""

import contextlib
import copy
import fcntl
import gzip
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from argparse import SUPPRESS, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import huggingface_hub
import jinja2
import psutil
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# vLLM and DeepSpeed are imported where they are used, because they take seconds.

# ---------------------------------------------------------------------------------------- Config --
# The content of the paper's principle (app. C) in our own words.
PRINCIPLE = (
    "Follow these principles in every reply. State nothing that is factually wrong. If a request "
    "could endanger anyone's safety or security, decline it, say why, and guide the person towards "
    "something safe. As long as the person's problem is not solved, keep working towards a "
    "solution. Keep to the thread of the conversation and bring in nothing off topic. Add the "
    "background that helps the person to understand."
)


def option(default: object, text: str):
    """A field of Config. Its text for --help cites the paper or says that the value is ours."""
    source = "" if default in (MISSING, None) or "(" in text else " (our choice)"
    return field(default=default, metadata={"help": text + source})


@dataclass
class Config:
    """The command line: every field is an option of the same name."""

    # What is contrasted with what.
    model: str = option(MISSING, "Model to align, a hub id or a folder.")
    principle: str | None = option(None, "Text or @FILE that pi_plus is shown (sec. 4.2).")
    positive_model: str | None = option(None, "pi_plus (sec. 5.3), of itself without principle.")
    negative_model: str | None = option(None, "pi_0 instead of --model: an SFT model (sec. 5.3).")
    alpha: float = option(1.4, "0 is pi_0, 1 is pi_plus, more goes beyond (sec. 5).")
    plausibility: float = option(0.0, "Drop tokens below this part of pi_plus's top one.")
    # Prompts and responses.
    data: str = option("Anthropic/hh-rlhf", "Hub data sets or files, comma-separated (sec. 5.1).")
    eval_data: str | None = option(None, "Held-out prompts; kl is measured before each epoch.")
    eval_samples: int = option(100, "Prompts drawn from --eval_data.")
    max_prompt_tokens: int = option(1024, "Limit of a prompt, principle included.")
    max_new_tokens: int = option(1024, "Limit of a response (app. A).")
    temperature: float = option(1.0, "Temperature of sampling.")
    date: str = option("2024-08-27", "Today, for chat templates that print it.")
    # Training.
    epochs: int = option(15, "Rounds of sampling and fitting (sec. 5).")
    samples_per_epoch: int = option(500, "Prompts answered in an epoch (sec. 5).")
    batch_size: int = option(16, "Samples of an optimizer step over all ranks.")
    learning_rate: float = option(1e-6, "Constant rate of AdamW (sec. 5).")
    seed: int = option(0, "Seed of the choice of prompts and of sampling.")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "Type of the weights.")
    # Memory, speed and files.
    micro_batch_tokens: int = option(4096, "Padded tokens of the policy's forward pass.")
    activation_checkpointing: bool = option(True, "Recompute layers to save memory.")
    gpu_memory_utilization: float = option(0.5, "Share of GPU memory for vLLM.")
    tensor_parallel_size: int = option(1, "GPUs that share one vLLM engine.")
    ds_config: str = option(f"{Path(__file__).parent}/ds_config.json", "DeepSpeed's own settings.")
    trust_remote_code: bool = option(False, "Run Python code that a model's repository brings.")
    output_dir: str = option("out", "Output folder; a run found in it is resumed.")
    save_every: int = option(1, "Save every so many epochs.")

    def __post_init__(self):
        check_options(self)
        self.negative_model = self.negative_model or self.model
        self.positive_model = self.positive_model or self.negative_model
        if self.principle is None and self.positive_model == self.negative_model:
            self.principle = PRINCIPLE


# -------------------------------------------------------------------------------------- The core --
# Pure functions of tensors, which need only PyTorch and can be pasted into another codebase.

Labels = Callable[[slice], Tensor]  # log pi_hat for a slice of the T response tokens, [t, V]


def superior_policy(z_0: Tensor, z_plus: Tensor, alpha: float, plausibility: float = 0.0) -> Tensor:
    """log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z (sec. 4.2), [..., V], in nats.

    z_0 and z_plus are finite logits or log-probabilities of pi_0 and pi_plus, [..., V], in float32
    or wider, because alpha multiplies their difference. With plausibility p > 0, tokens v that have
    pi_plus(v) < p max_u pi_plus(u) get probability 0, as in contrastive decoding (Li et al. 2023),
    because alpha above 1 also lifts what both models find absurd."""
    z_hat = torch.lerp(z_0, z_plus, alpha)  # z_0 + alpha (z_plus - z_0)
    if plausibility > 0:
        threshold = z_plus.amax(-1, keepdim=True) + math.log(plausibility)
        # The lowest finite number, because the entropy multiplies it by 0, and 0 * -inf is nan.
        z_hat = z_hat.masked_fill(z_plus < threshold, torch.finfo(z_hat.dtype).min)
    return z_hat.log_softmax(-1)


def token_credit(log_pi_hat: Tensor, log_pi_0: Tensor, tokens: Tensor, beta: float = 1) -> Tensor:
    """A(s_t, a_t) = beta [log pi_hat(a_t|s_t) - log pi_0(a_t|s_t)], [..., T] (from eq. 6-10).

    The policies are [..., T, V], the tokens a_t [..., T]; the unit is nats for beta = 1. The sum
    over t is the reward of the response (eq. 6). For analysis: training does not need it."""
    return beta * (log_pi_hat - log_pi_0).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 where a and b are narrower: bfloat16 has steps of 0.125 from 16 on."""
    if a.dtype.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output layer: h [T, d], weight [V, d], bias [V] or None -> [T, V], float32 or wider."""
    z = matmul(h, weight.t())
    return z if bias is None else z + bias


def soft_label_loss(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Labels, tokens: Tensor, chunk: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Output layer and soft-label cross-entropy (sec. 4.1) in one pass.

    h [T, d] holds the policy's final hidden states at the positions that predict the response
    tokens, tokens [T]; weight [V, d] and bias [V] or None are the output layer. Returns
      H(pi_hat, pi_theta), summed over the tokens, in nats, to be divided by N
      H(pi_hat), likewise; the difference of the two is KL(pi_hat || pi_theta)
      log pi_theta(a_t|s_t), [T]
    Only the first has a gradient, for a single backward pass. It is made in closed form together
    with the loss, `chunk` tokens at a time, so that no [T, V] tensor ever exists."""
    fit = torch.is_grad_enabled()  # Read here, because inside forward() it is always off.
    return SoftLabelLoss.apply(h, weight, bias, labels, tokens, chunk, fit)


class SoftLabelLoss(torch.autograd.Function):
    """soft_label_loss() with its gradient."""

    @staticmethod
    def forward(ctx, h, weight, bias, labels, tokens, chunk, fit):
        wide = torch.promote_types(h.dtype, torch.float32)
        cross_entropy = torch.zeros((), dtype=torch.float64, device=h.device)
        entropy = torch.zeros_like(cross_entropy)
        log_pi_tokens = torch.empty(len(h), dtype=wide, device=h.device)  # [T]
        if fit:
            grad_h = torch.empty_like(h)  # [T, d]
            grad_weight = torch.zeros_like(weight, dtype=wide)  # [V, d]
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)  # [V]

        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            log_pi_hat = labels(rows)  # [t, V], t <= chunk
            log_pi_theta = logits(h[rows], weight, bias).log_softmax(-1)  # [t, V]
            pi_hat = log_pi_hat.exp()
            cross_entropy -= torch.linalg.vecdot(pi_hat, log_pi_theta).sum()
            entropy -= torch.linalg.vecdot(pi_hat, log_pi_hat).sum()
            log_pi_tokens[rows] = log_pi_theta.gather(-1, tokens[rows, None]).squeeze(-1)
            if not fit:
                continue

            # In place, because these are the largest tensors. backward() divides by N.
            pi_theta = log_pi_theta.exp_()
            grad_logits = pi_theta.sub_(pi_hat)  # pi_theta - pi_hat, [t, V]
            del log_pi_hat, pi_hat  # Free them before memory for the products is taken.
            if bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(h.dtype)
            grad_h[rows] = matmul(grad_logits, weight)
            if h.dtype == wide:  # addmm_() adds the product without a [V, d] tensor for it.
                grad_weight.addmm_(grad_logits.t(), h[rows])
            else:
                grad_weight += matmul(grad_logits.t(), h[rows])
        if fit:
            gradients = grad_h, grad_weight, grad_bias
            ctx.gradients = [None if g is None else g.to(h.dtype) for g in gradients]
        ctx.mark_non_differentiable(entropy, log_pi_tokens)
        return cross_entropy, entropy, log_pi_tokens

    @staticmethod
    def backward(ctx, scale, *_):
        # Scaled in place and no longer referred to here, they become .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.mul_(scale) for g in gradients)
        return *scaled, None, None, None, None


# ------------------------------------------------------------------------------------------ Data --
Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}
HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # how a turn begins in HH-RLHF's texts
ROLES = {"Human": "user", "Assistant": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant")}


def turns_of(conversation: str | list[Message], speaker: str) -> list[tuple[str, str]]:
    """(role, text) of every turn of messages or an HH text. Another text is one turn by speaker."""
    if isinstance(conversation, list):
        turns = [(message["role"], message["content"]) for message in conversation]
    elif HH_TURN.match(conversation):
        _, *parts = HH_TURN.split(conversation)
        turns = list(zip(parts[::2], parts[1::2], strict=True))
    else:
        turns = [(speaker, conversation)]
    "".join(text for _, text in turns).encode()  # Raises ValueError for what UTF-8 cannot hold.
    return [(ROLES[role], text.strip()) for role, text in turns]


def prompt_of(record: dict) -> list[Message]:
    """The prompt of a record, whose last turn is the user's, or [] if it has none.

    It is `prompt` or `messages`, or else the first turns, as far as `chosen` and `rejected` share
    them (sec. 5.1). Two plain texts are two replies, and share no prompt."""
    conversation = record.get("prompt", record.get("messages"))
    if conversation is not None:
        turns = turns_of(conversation, "user")
    else:  # By turns, because in one HH pair in five the final replies begin with the same words.
        sides = [turns_of(record[key], "assistant") for key in ("chosen", "rejected")]
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))
        turns = [turn for turn, _ in pairs]

    # Chat templates want the user to speak first and roles to alternate. Many drop or refuse a
    # system turn mid-dialogue, so it becomes part of a user turn.
    prompt: list[Message] = []
    for role, text in turns:
        last = prompt[-1]["role"] if prompt else "system"  # Nothing yet counts as system.
        if role == "system" and last != "system":
            role = "user"
        if not text or (role == "assistant" and last == "system"):
            continue
        if prompt and role == last:
            prompt[-1]["content"] += f"\n\n{text}"
        else:
            prompt.append({"role": role, "content": text})
    if prompt and prompt[-1]["role"] != "user":
        prompt.pop()
    return prompt


def draw_prompts(prompts: list[list[Message]], count: int, epoch: int, seed: int) -> list:
    """The prompts of epoch 1, 2, ...: the next `count`. Once all are used, they are shuffled anew.
    What is drawn follows from the seed, and so a resumed run draws the same."""
    order, n = list(prompts), len(prompts)
    for k in range(1, math.ceil(epoch * count / n)):
        order += random.Random(f"{seed}/{k}").sample(prompts, n)
    return order[(epoch - 1) * count : epoch * count]


# --------------------------------------------------------------------------------------- Prompts --
# Vicuna v1.5 has no chat template. This is FastChat's format vicuna_v1.1. The space after the BOS
# stands for the one that SentencePiece adds to a text without a written BOS, as FastChat's is.
VICUNA_TEMPLATE = (
    "{{ bos_token }} {% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.{% endif %}{{ ' ' }}"
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ 'USER: ' + turn.content + ' ' }}"
    "{% elif turn.role == 'assistant' %}{{ 'ASSISTANT: ' + turn.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Chat:
    """A tokenizer's chat format, and where the principle goes in it: the only difference between
    the contexts of pi_0 and pi_plus. The principle follows the system text that pi_0 sees, the
    prompt's own or the template's default. Without such a text the principle is the system message.
    Where a template takes no system message, that is put before the first user turn's text."""

    def __init__(self, tokenizer, principle: str | None, date: str):
        self.tokenizer, self.principle = tokenizer, principle
        self.today = datetime.fromisoformat(date)
        if not tokenizer.chat_template:
            say("There is no chat template: the format of prompts is Vicuna's")
            tokenizer.chat_template = VICUNA_TEMPLATE
        # What the template does with a system message shows in what it renders.
        self.has_system = True
        question = {"role": "user", "content": "<Q>"}
        plain = self.render([question])
        check("<Q>" in plain, "the chat template of --model does not show the text of a user turn")
        shown = ""
        with contextlib.suppress(UserError):
            shown = self.render([{"role": "system", "content": "<S>"}, question])
        self.has_system = "<S>" in shown
        self.default_system = default_text(plain, shown) if self.has_system else ""
        # Apart from one insertion and white space, the two contexts have to be equal.
        a, b = squeeze(plain), squeeze(self.render(self.with_principle([question])))
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
        rest = a[len(list(alike)) :]
        if not b.endswith(rest):
            say(f"Warning: contexts differ by more than the principle, from {rest!r:.60} on")

    def render(self, messages: list[Message]) -> str:
        """Text of the context up to where the response begins; UserError if the template fails."""
        if messages[0]["role"] == "system" and not self.has_system:
            system, user, *rest = messages
            content = f"{system['content']}\n\n{user['content']}"
            messages = [{"role": "user", "content": content}, *rest]
        # A date that changed at midnight, or before a run is resumed, would change the contexts.
        options = {"add_generation_prompt": True, "strftime_now": self.today.strftime}
        mistakes = jinja2.TemplateError, TypeError, ValueError
        with as_user_error("the chat template of --model fails", *mistakes):
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def ids(self, messages: list[Message]) -> list[int]:
        """Token ids of render(), whose text has the special tokens written out already."""
        return self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]

    def with_principle(self, messages: list[Message]) -> list[Message]:
        """The same conversation with the principle: the context of pi_plus."""
        if self.principle is None:
            return messages
        system = self.default_system
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        text = system.rstrip()  # White space at its end stays last.
        content = f"{text} {self.principle}".lstrip() + system[len(text) :]
        return [{"role": "system", "content": content}, *messages]

    def shorten(self, messages: list[Message], limit: int) -> list[Message]:
        """The messages without the oldest turns, so that both contexts have at most `limit` tokens;
        [] if that leaves none. A system text stays."""
        while messages:
            contexts = self.ids(messages), self.ids(self.with_principle(messages))
            if max(map(len, contexts)) <= limit:
                break
            first, *later = (n for n, turn in enumerate(messages) if turn["role"] == "user")
            messages = messages[:first] + messages[later[0] :] if later else []
        return messages


# -------------------------------------------------------------------------------------- Sampling --
@dataclass
class Sample:
    """A prompt in both contexts and one response to it: a line of the samples file."""

    index: int  # within the epoch
    messages: list[Message]
    prompt_ids: list[int]  # x as pi_theta and pi_0 see it
    principle_prompt_ids: list[int]  # x as pi_plus sees it
    response_ids: list[int] = field(default_factory=list)  # y, the same ids after either context
    response: str = ""
    log_probs: list[float] = field(default_factory=list)  # of y's tokens in vLLM, temperature 1
    finish_reason: str = ""  # "stop" if the model ended it, "length" if it was cut at the limit


class Sampler:
    """The policy as a vLLM engine in this process; one engine serves tensor_parallel_size ranks.
    On a GPU it sleeps, with its memory released, except while it samples. Collective to build,
    before the training engines, because its share of the GPU's memory has to be free then."""

    def __init__(self, cfg: Config, chat: Chat):
        from vllm import LLM

        self.cfg, self.chat = cfg, chat
        threads = max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1")))
        gpu, length = torch.cuda.is_available(), cfg.max_prompt_tokens + cfg.max_new_tokens
        engines = dist.get_world_size() // cfg.tensor_parallel_size
        share = math.ceil(max(cfg.samples_per_epoch, cfg.eval_samples) / engines)
        self.llm = LLM(
            cfg.model,
            dtype=cfg.dtype,
            trust_remote_code=cfg.trust_remote_code,
            max_model_len=length,
            max_num_batched_tokens=max(8192, length),
            max_num_seqs=min(share, 512),
            hf_overrides={"head_dtype": "float32"} if gpu else None,  # as training's logits
            enable_chunked_prefill=gpu,  # On a CPU, vLLM 0.32.0 fails with it on seeded requests.
            tensor_parallel_size=cfg.tensor_parallel_size,
            distributed_executor_backend="external_launcher",  # This process is the worker.
            enforce_eager=not gpu,  # CUDA graphs on a GPU; compiling costs more on a CPU.
            enable_sleep_mode=gpu,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            kv_cache_memory_bytes=None if gpu else 2**30,  # default: a share of all memory
            use_tqdm_on_load=False,
        )
        self.llm.sleep(level=2)  # Level 2 frees the weights too. On a CPU it does nothing.
        torch.set_num_threads(threads)  # vLLM leaves one, too few for an offloaded optimizer.

        # vLLM only warns when a reload leaves weights out, which then hold garbage.
        def refuse(record: logging.LogRecord):
            raise UserError(f"vLLM did not get all weights of the policy: {record.getMessage()}")

        log = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
        log.setLevel(logging.WARNING)
        log.addFilter(refuse)

    def unpatched(self):
        """A context in which transformers makes models without vLLM's patches."""
        from vllm.config import set_current_vllm_config

        # For a model that it has no code of its own for, vLLM 0.32.0 patches transformers' class.
        # Training's instances then need a vLLM config; compilation mode 0 switches the patch off.
        config = copy.deepcopy(self.llm.llm_engine.vllm_config)
        config.compilation_config.mode = 0
        return set_current_vllm_config(config)

    def load(self, weights: Iterator[tuple[str, Tensor]]):
        """Collective: wake up, and load the policy's weights, (name, whole tensor) of each."""

        def repack(model: nn.Module):  # On a CPU vLLM keeps a packed copy of a tied output layer.
            for layer in model.modules():
                if type(layer).__name__ == "ParallelLMHead":
                    layer.quant_method.process_weights_after_loading(layer)

        torch.cuda.empty_cache()  # Give vLLM the memory that PyTorch caches.
        # Weights need their memory before they are loaded. The KV cache wakes last, because it
        # would leave no room to gather weights in.
        self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(repack)
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # It holds keys and values of the old weights.

    def sample(self, prompts: list[list[Message]], tag: object) -> list[Sample]:
        """Collective: one response to every prompt (sec. 5), on every rank; engines share the work.
        A sample's seed follows from --seed, tag and its index, not from the number of ranks."""
        from vllm import SamplingParams

        cfg, chat, samples, params = self.cfg, self.chat, [], []
        rank, engines = dist.get_rank(), dist.get_world_size() // cfg.tensor_parallel_size
        engine, tp_rank = divmod(rank, cfg.tensor_parallel_size)
        limits = {"temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
        for i in range(engine, len(prompts), engines):
            x, shown = prompts[i], chat.with_principle(prompts[i])
            samples.append(Sample(i, x, chat.ids(x), chat.ids(shown)))
            seed = random.Random(f"{cfg.seed}/{tag}/{i}").getrandbits(63)
            params.append(SamplingParams(seed=seed, logprobs=0, detokenize=False, **limits))
        contexts = [{"prompt_token_ids": sample.prompt_ids} for sample in samples]
        outputs = self.llm.generate(contexts, params, use_tqdm=rank == 0) if contexts else []
        for sample, output in zip(samples, outputs, strict=True):
            (answer,) = output.outputs
            sample.response_ids = list(answer.token_ids)  # with the end token, if it ended
            sample.response = chat.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            steps = zip(answer.token_ids, answer.logprobs, strict=True)
            sample.log_probs = [log_probs[token].logprob for token, log_probs in steps]
            sample.finish_reason = answer.finish_reason
        # All tensor-parallel ranks of an engine have its answers; only the first contributes them.
        samples = gather(samples if tp_rank == 0 else [])
        return sorted(samples, key=lambda sample: sample.index)


# ------------------------------------------------------------------------------- Superior policy --
def final_states(body: nn.Module, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
    """Collective: final hidden states at the positions that predict response tokens, [T, d]. pairs
    holds (context, response) of B sequences; the last token predicts nothing, and is no input.
    Padding is on the right, where a causal model does not look: it needs no mask."""
    # Under ZeRO-3 a rank without samples has to run a forward as well: on a stand-in.
    pairs = pairs or [([0, 0], [])]
    inputs = [torch.tensor((x + y)[:-1]) for x, y in pairs]
    ids = pad_sequence(inputs, batch_first=True).to(next(body.parameters()).device)  # [B, S]
    h = body(input_ids=ids, use_cache=False).last_hidden_state  # [B, S, d]
    rows = [row[len(x) - 1 :][: len(y)] for row, (x, y) in zip(h, pairs, strict=True)]
    return torch.cat(rows)  # [T, d]


def load_model(name: str, cfg: Config, ds_config: dict) -> nn.Module:
    """Collective: a causal language model, sharded over the ranks while it loads (ZeRO-3)."""
    # In place of HfDeepSpeedConfig, which needs the package accelerate. transformers keeps only a
    # weak reference, so zero3 has to be referred to until the model is loaded.
    zero3 = Namespace(config=ds_config, is_zero3=lambda: True)
    transformers.integrations.deepspeed.set_hf_deepspeed_config(zero3)
    how = {"trust_remote_code": cfg.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(name, **how)
    how["dtype"] = getattr(torch, cfg.dtype)
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)  # The policy that is fitted has to be the one that sampled.
    model = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, **how)
    # zero.Init has rounded the rotary frequencies to bfloat16: at position 1000 radians off.
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            model._init_weights(module.float())
    return model


class SuperiorPolicy:
    """pi_hat at the response tokens of samples (sec. 4.2), from models that are never trained.
    Their layers are sharded over the ranks (ZeRO-3). Their output layers stay whole on every rank,
    because each chunk of the loss needs them. Collective to build. For another teacher, put another
    such class in its place in train(): it takes samples, possibly none, and returns a function from
    rows to finite log pi_hat, [t, V], that makes no collective calls."""

    def __init__(self, cfg: Config, ds_config: dict):
        import deepspeed

        parts = ("train_batch_size", "train_micro_batch_size_per_gpu", "bf16", "zero_optimization")
        frozen_config = {key: ds_config[key] for key in parts}  # without monitors, for example
        self.cfg = cfg
        self.frozen = []  # (body, (weight, bias)) of pi_0, and of pi_plus if that is another model
        for name in dict.fromkeys([cfg.negative_model, cfg.positive_model]):
            model = load_model(name, cfg, ds_config)
            body = model.base_model.requires_grad_(False).eval()
            engine, *_ = deepspeed.initialize(model=body, config=frozen_config)
            head = model.get_output_embeddings()
            with deepspeed.zero.GatheredParameters(list(head.parameters())):
                whole = [p if p is None else p.data.clone() for p in (head.weight, head.bias)]
            self.frozen.append((engine, whole))

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> Labels:
        """Collective: log pi_hat at the T response tokens, made from hidden states on demand."""
        (body_0, head_0), (body_plus, head_plus) = self.frozen[0], self.frozen[-1]
        plain = [(sample.prompt_ids, sample.response_ids) for sample in samples]
        shown = [(sample.principle_prompt_ids, sample.response_ids) for sample in samples]
        if body_0 is body_plus:  # Both contexts in one forward gather the weights once.
            h_0, h_plus = final_states(body_0, plain + shown).chunk(2)
        else:
            h_0, h_plus = final_states(body_0, plain), final_states(body_plus, shown)

        def labels(rows: slice) -> Tensor:
            z_0, z_plus = logits(h_0[rows], *head_0), logits(h_plus[rows], *head_plus)
            return superior_policy(z_0, z_plus, self.cfg.alpha, self.cfg.plausibility)

        return labels


# ---------------------------------------------------------------------------------------- Policy --
class Policy(nn.Module):
    """pi_theta: a causal language model whose output layer computes the loss."""

    def __init__(self, model: nn.Module, checkpointing: bool):
        super().__init__()
        self.model = model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head = model.get_output_embeddings()

        def loss(h: Tensor, labels: Labels, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return soft_label_loss(h, head.weight, head.bias, labels, tokens)

        # ZeRO-3 gathers the shards of a module only while that module itself runs. The loss needs
        # the output layer's weight, so it has to be that layer's forward.
        head.forward = loss

    def forward(self, samples: list[Sample], labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
        """Collective: sums over response tokens of H(pi_hat, pi_theta), of H(pi_hat), and of the
        gap |log pi_theta(a_t|s_t) - the sampler's log-probability|."""
        pairs = [(sample.prompt_ids, sample.response_ids) for sample in samples]
        h = final_states(self.model.base_model, pairs)  # [T, d]
        tokens = torch.tensor([a for _, y in pairs for a in y], dtype=torch.long, device=h.device)
        log_probs = torch.tensor([p for s in samples for p in s.log_probs], device=h.device)
        output_layer = self.model.get_output_embeddings()
        cross_entropy, entropy, log_pi_theta = output_layer(h, labels, tokens)
        return cross_entropy, entropy, (log_pi_theta - log_probs).abs().sum()


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every weight, in the model's order. Collective: all ranks have to
    take all of them. A tensor is whole until the next one is asked for."""
    import deepspeed

    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter.data


def deal(lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Micro-batches of an optimizer step: [micro-step][rank] -> indices into lengths. Sequences of
    similar length share one, up to `budget` tokens with padding; a longer sequence is alone. Under
    ZeRO-3 a forward is a collective, so every rank gets equally many, of which some are empty."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def split(limit: int) -> list[list[int]]:
        batches = [[]]
        for i in longest_first:
            if batches[-1] and (len(batches[-1]) + 1) * lengths[batches[-1][0]] > limit:
                batches.append([])
            batches[-1].append(i)
        return batches + [[]] * (-len(batches) % ranks)

    # The smallest limit that still makes n batches spreads the work most evenly over the ranks.
    n = len(split(budget))
    limit = min(sum(lengths) // n, budget)
    while len(split(limit)) > n:
        limit += 1
    batches = split(limit)
    return [batches[i : i + ranks] for i in range(0, n, ranks)]


# -------------------------------------------------------------------------------------- Training --
# Limit of sampler_gap, in nats, in the first step of an epoch, when policy and sampler have the
# same weights and differ by rounding alone.
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.1}


def compare(engine, superior, samples: list[Sample], budget: int, fit: bool) -> dict[str, float]:
    """Collective: compare pi_theta with pi_hat on samples, which are the same on all ranks and are
    divided among them here. With `fit`, leave the gradient of L in the engine.
    Returns the loss H(pi_hat, pi_theta), KL(pi_hat || pi_theta) and sampler_gap, means over the
    response tokens of all ranks in nats, and the count of samples and tokens."""
    ranks, tokens = dist.get_world_size(), sum(len(sample.response_ids) for sample in samples)
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) - 1 for sample in samples]
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for micro_step in deal(lengths, ranks, budget):
        mine = [samples[i] for i in micro_step[dist.get_rank()]]
        with torch.set_grad_enabled(fit):
            cross_entropy, entropy, gap = engine(mine, superior(mine))
        if fit:
            # L is the sum over micro-batches and ranks, divided by N. DeepSpeed sums over the
            # micro-batches up to step(), but averages over the ranks.
            engine.backward(cross_entropy * (ranks / tokens))
        sums += torch.stack([cross_entropy.detach(), entropy, gap.double()])
    dist.all_reduce(sums)
    loss, entropy, gap = (sums / tokens).tolist()
    record = {"loss": loss, "kl": loss - entropy, "sampler_gap": gap}
    return record | {"samples": len(samples), "tokens": tokens}


def optimizer_step(engine, superior, batch, budget: int, place: str, max_gap=math.inf) -> dict:
    """Collective: fit one batch, and return its record. If a number is not finite, or sampler_gap
    exceeds max_gap, raise a UserError and leave the weights as they were."""
    record = compare(engine, superior, batch, budget, fit=True)
    loss, gap = record["loss"], record["sampler_gap"]
    place = f"{place}: on samples {[sample.index for sample in batch]}"
    check(math.isfinite(loss), f"{place} the loss is {loss}: look at these, and at the models")
    stale = "vLLM has other weights, or computes this model differently"
    check(gap <= max_gap, f"{place} sampler_gap is {gap}: {stale}")
    engine.step()  # Clips the gradient; leaves the weights alone if it is not finite.
    norm = float(engine.get_global_grad_norm())
    check(math.isfinite(norm), f"{place} the gradient is {norm}: lower --learning_rate?")
    return {**record, "grad_norm": norm}


def train(cfg: Config):
    """Collective. The method: in every epoch sync, sample, contrast and fit, log and save."""
    import deepspeed

    ds_config, chat, prompts, held_out = prepare(cfg)
    run = Run(cfg, ds_config, prompts)
    if run.epoch >= cfg.epochs:
        return say("Nothing is left to do: raise --epochs, or choose another --output_dir.")
    sampler = Sampler(cfg, chat)
    with sampler.unpatched():
        superior = SuperiorPolicy(cfg, ds_config)
        policy = Policy(load_model(cfg.model, cfg, ds_config), cfg.activation_checkpointing)
    adamw = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=adamw, config=ds_config)
    run.load_state(engine)
    run.save_model(policy.model, chat.tokenizer)  # Fail now, not after hours, if saving fails.

    step = run.epoch * math.ceil(cfg.samples_per_epoch / cfg.batch_size)
    for epoch in range(run.epoch + 1, cfg.epochs + 1):
        # Sync: the sampler takes over the weights of pi_theta.
        start = time.perf_counter()
        sampler.load(whole_weights(policy.model))
        synced = time.perf_counter()

        # 1. Sample y ~ pi_theta(.|x).
        drawn = draw_prompts(prompts, cfg.samples_per_epoch, epoch, cfg.seed)
        samples = sampler.sample(drawn, tag=epoch)
        sampled = time.perf_counter()
        measured = {"sync_seconds": synced - start, "sample_seconds": sampled - synced}
        unseen = sampler.sample(held_out, tag="held out")
        sampler.llm.sleep(level=2)
        run.save_samples(f"epoch-{epoch:03d}", samples)
        if unseen:  # The policy before it is fitted in this epoch.
            run.save_samples(f"held-out-{epoch - 1:03d}", unseen)
            result = compare(engine, superior, unseen, cfg.micro_batch_tokens, fit=False)
            measured["eval_kl"] = result["kl"]
            measured["eval_response_tokens_mean"] = result["tokens"] / len(unseen)

        # 2. Contrast and 3. fit, batch by batch.
        steps, fitting = [], time.perf_counter()
        starts = range(0, len(samples), cfg.batch_size)
        for i in tqdm(starts, f"Fitting, epoch {epoch}", disable=dist.get_rank() > 0):
            step += 1
            batch, place = samples[i : i + cfg.batch_size], f"epoch {epoch}, step {step}"
            max_gap = math.inf if i else MAX_GAP[cfg.dtype]
            record = optimizer_step(engine, superior, batch, cfg.micro_batch_tokens, place, max_gap)
            steps.append(record)
            on_rank_0(run.log, "step", epoch, step, record)
        measured["train_seconds"] = time.perf_counter() - fitting

        # Log and save.
        record = epoch_record(samples, steps) | measured
        on_rank_0(run.log, "epoch", epoch, step, record)
        left = (cfg.epochs - epoch) * (time.perf_counter() - start)
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in record.items())
        say(f"epoch {epoch} of {cfg.epochs}, {left / 60:.0f} min left: {numbers}")
        if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
            run.save_model(policy.model, chat.tokenizer)
            run.save_state(engine, epoch)
    say(f"The trained model is {run.folder / 'model'}")


# The method ends here. What follows is the job around it: files, ranks, signals and checks.


# ----------------------------------------------------------------------------------------- Input --
def squeeze(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())


def default_text(plain: str, shown: str) -> str:
    """What stands in `plain` in place of the "<S>" in `shown`, if the rest is equal but for white
    space; else "". For "[Be nice.] <Q>" and "[<S>] <Q>" it is "Be nice."."""
    a, b = squeeze(plain), squeeze(shown)
    start, size = b.index("<S>"), len("<S>") + (len(a) - len(b)) // b.count("<S>")
    if b.replace("<S>", a[start : start + size]) != a:
        return ""
    # With the white space that follows it, but for what the template itself puts there.
    places = [i for i, character in enumerate(f"{plain}.") if not character.isspace()]
    text, behind = plain[places[start] : places[start + size]], shown.split("<S>")[1]
    return text.removesuffix(behind[: len(behind) - len(behind.lstrip())])


def data_files(data: str, split: str) -> Iterator[Path]:
    """The files named in data, and *{split}*.json* of its hub data sets, owner/name[/folder]."""
    for name in map(str.strip, data.split(",")):
        if Path(name).is_file():
            yield Path(name)
            continue
        owner, repository, folder = [*name.split("/", 2), "", ""][:3]
        what = {"repo_type": "dataset", "allow_patterns": f"{folder}/*{split}*.json*".lstrip("/")}
        with as_user_error(f"{name}: no such file or hub data set", OSError, ValueError):
            root = Path(huggingface_hub.snapshot_download(f"{owner}/{repository}", **what), folder)
        files = [f for f in sorted(root.rglob("*.json*")) if split in str(f.relative_to(root))]
        check(files, f"{name}: this hub data set has no {split} file in .json or .jsonl")
        yield from files


def read_records(data: str, split: str) -> Iterator[tuple[str, object]]:
    """(place, record) for the lines of .jsonl files and the items of the lists in .json files."""
    for path in data_files(data, split):
        place, is_list = str(path), path.name.removesuffix(".gz").endswith(".json")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                items = json.load(file) if is_list else file
                check(not is_list or isinstance(items, list), f"{path}: has to be a list")
                for n, item in enumerate(items, 1):
                    place = f"{path}, {'item' if is_list else 'line'} {n}"
                    if is_list:
                        yield place, item
                    elif item.strip():
                        yield place, json.loads(item)
        except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
            raise UserError(f"{place}: cannot be read as JSON in UTF-8: {error}") from error


def read_prompts(records: Iterable, chat: Chat, limit: int, left_out: Counter) -> Iterator:
    """(prompt, record) for each of the records, (place, record), that have a prompt of at most
    `limit` tokens; left_out counts the others by reason."""
    mistakes = KeyError, TypeError, AttributeError, ValueError
    needs = "a record needs 'prompt', 'messages', or 'chosen' and 'rejected'"
    for place, record in records:
        with as_user_error(f"{place}: {needs}", *mistakes):
            whole = prompt_of(record)
        try:
            prompt = chat.shorten(whole, limit)
        except UserError as error:
            left_out[f"refused: {error}"] += 1
            continue
        if prompt:
            yield prompt, record
        else:
            left_out["too long" if whole else "without a prompt"] += 1


def load_prompts(data: str, split: str, chat: Chat, limit: int, count: int, seed: int) -> tuple:
    """`count` distinct prompts of data, drawn at random, or all if it has fewer; and how many of
    the records that were looked at were left out, by reason."""
    records, distinct, left_out = list(read_records(data, split)), {}, Counter()
    random.Random(seed).shuffle(records)
    prompts = read_prompts(records, chat, limit, left_out)
    for prompt, _ in tqdm(prompts, f"Prompts of {data}", total=count, leave=False):
        key = json.dumps(prompt)
        left_out["duplicate"] += key in distinct
        distinct[key] = prompt
        if len(distinct) == count:
            break
    check(distinct, f"{data}: no prompt to use; left out: {dict(left_out)}")
    return list(distinct.values()), dict(left_out)


# ----------------------------------------------------------------------------------------- Files --
class Run:
    """What a run leaves under --output_dir. Rank 0 writes files and model/ under other names first,
    so no kill leaves half of one; of metrics.jsonl whole lines count. A run is resumed after the
    epoch that state/done.json names, from DeepSpeed's checkpoint of it. Collective to open."""

    def __init__(self, cfg: Config, ds_config: dict, prompts: list[list[Message]]):
        self.folder, self.state = Path(cfg.output_dir), Path(cfg.output_dir, "state")
        settings = {**asdict(cfg), "ranks": dist.get_world_size()}
        first = json.dumps(prompts[: cfg.samples_per_epoch])  # More epochs load more prompts.
        settings["data_crc32"] = zlib.crc32(first.encode())
        # The one setting of --ds_config that changes results most; others may hold secrets.
        settings["gradient_clipping"] = ds_config.get("gradient_clipping")
        self.epoch = on_rank_0(self.open, settings)

    def open(self, settings: dict) -> int:
        """On rank 0: lock the folder, refuse another run's, return the last saved epoch or 0."""
        for folder in (self.folder / "samples", self.state):
            folder.mkdir(parents=True, exist_ok=True)
        place = f"--output_dir {self.folder}"
        self.lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        with as_user_error(f"{place}: another job is running in it", BlockingIOError):
            # The kernel gives the lock back however this process ends.
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        config, done = self.folder / "config.json", self.state / "done.json"
        saved = json.loads(config.read_text()) if done.exists() else settings
        # These may change when a run is resumed, because the method stays the same.
        free = {"epochs", "save_every", "output_dir", "ds_config", "micro_batch_tokens"}
        free |= {"activation_checkpointing", "gpu_memory_utilization", "tensor_parallel_size"}
        keys = [key for key in settings if saved.get(key) != settings[key] and key not in free]
        changed = "; ".join(f"{k} {saved.get(k)!r} there, {settings[k]!r} here" for k in keys)
        another = f"{place} holds another run, use its settings or another folder"
        check(not keys, f"{another}: {changed}")
        self.write("config.json", json.dumps(settings, indent=2) + "\n")
        epoch = json.loads(done.read_text())["epoch"] if done.exists() else 0
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # whole lines
        kept = [f"{line}\n" for line in lines if json.loads(line)["epoch"] <= epoch]
        self.write("metrics.jsonl", "".join(kept))  # What came after that epoch is redone.
        self.prune(epoch)
        return epoch

    def prune(self, epoch: int):
        """Delete every state but that of an epoch, and so what a kill left of others."""
        for path in set(self.state.glob("epoch-*")) - {self.state / f"epoch-{epoch:03d}"}:
            shutil.rmtree(path, ignore_errors=True)

    def write(self, name: str, text: str):
        """On rank 0: make or replace a text file, as a whole."""
        new = self.folder / f"{name}.new"
        new.write_text(text)
        new.replace(self.folder / name)

    def log(self, kind: str, epoch: int, step: int, record: dict[str, float]):
        """On rank 0: a line of metrics.jsonl, and an event for DeepSpeed's monitors, if any."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **record}) + "\n")
        self.monitor.write_events([(f"{kind}/{key}", record[key], step) for key in record])

    def save_samples(self, name: str, samples: list[Sample]):
        """Collective: samples/NAME.jsonl, and the first one on the console."""
        lines = [json.dumps(asdict(sample)) + "\n" for sample in samples]
        on_rank_0(self.write, f"samples/{name}.jsonl", "".join(lines))
        user, policy = samples[0].messages[-1]["content"], samples[0].response
        say(f"\n{name}, first sample\n  user    {user!r:.300}\n  policy  {policy!r:.300}")

    def save_model(self, model: nn.Module, tokenizer):
        """Collective: make or replace model/, in transformers format. It is never half written."""
        weights = {}
        for name, weight in whole_weights(model):  # All ranks gather, and rank 0 keeps.
            if dist.get_rank() == 0:
                weights[name] = weight.to("cpu", copy=True)
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # Vicuna's, for one, has sampling options without do_sample.
            model.generation_config.do_sample = True

        def save():
            path, new, old = (self.folder / name for name in ("model", "model.new", "model.old"))
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            model.save_pretrained(new, state_dict=weights)
            tokenizer.save_pretrained(new)
            if path.exists():
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)

        on_rank_0(save)

    def load_state(self, engine):
        """Collective: weights and optimizer as they were after the last saved epoch, if any."""
        self.monitor = engine.monitor
        if self.epoch > 0:
            path, _ = engine.load_checkpoint(str(self.state), f"epoch-{self.epoch:03d}")
            check(path, f"{self.state}: the checkpoint of epoch {self.epoch} cannot be loaded")

    def save_state(self, engine, epoch: int):
        """Collective: save what training is resumed from. It is valid once done.json names it."""
        tag = f"epoch-{epoch:03d}"
        with as_user_error(f"{self.state / tag}: not written, disk full?", OSError, RuntimeError):
            engine.save_checkpoint(str(self.state), tag, save_latest=False)
        on_rank_0(self.write, "state/done.json", json.dumps({"epoch": epoch}) + "\n")
        self.prune(epoch)  # On every rank, because machines may have folders of their own.


def epoch_record(samples: list[Sample], steps: list[dict]) -> dict[str, float]:
    """Collective: the record of an epoch, from its samples and steps."""
    tokens = sum(step["tokens"] for step in steps)
    record = {key: sum(s[key] * s["tokens"] for s in steps) / tokens for key in ("loss", "kl")}
    record["sampler_gap_first"] = steps[0]["sampler_gap"]
    record["sampler_gap_last"] = steps[-1]["sampler_gap"]
    record["response_tokens_mean"] = tokens / len(samples)
    record["truncated"] = sum(s.finish_reason == "length" for s in samples) / len(samples)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process, in bytes
    if torch.cuda.is_available():  # What is in use of the device; PyTorch's cache holds its peak.
        free, total = torch.cuda.mem_get_info()
        memory = total - free
    return record | {"peak_memory_gib": max(gather([memory])) / 2**30}


# ----------------------------------------------------------------------------------------- Ranks --
def say(text: str):
    """Print on rank 0, with the control characters that data and models may bring escaped."""
    if os.environ.get("RANK", "0") == "0":
        shown = [c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text]
        print("".join(shown), flush=True)


def gather(items: list) -> list:
    """Collective: the items of every rank, in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return list(itertools.chain(*lists))


def on_rank_0(function: Callable, *args: object) -> object:
    """Collective: function(*args) of rank 0. What a user can fix is raised on every rank."""
    outcome = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except (UserError, OSError, SafetensorError) as error:
            outcome[1] = str(error) or repr(error)
    dist.broadcast_object_list(outcome)
    check(outcome[1] is None, outcome[1])
    return outcome[0]


def join_ranks():
    """Collective: set up torch.distributed as the launcher says; plain python is one rank."""
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # It leaks /dev/shm.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(alone | os.environ)
    usable = torch.version.cuda is None or torch.cuda.is_available()
    check(usable, "PyTorch is built for CUDA, but finds no usable GPU: look at nvidia-smi")
    gpus, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_SIZE"])
    check(ranks <= gpus or gpus == 0, f"{ranks} ranks but {gpus} GPUs: lower --num_gpus")
    deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timedelta(hours=12))  # Others wait while rank 0 reads.
    sys.excepthook = end_at_once  # PyTorch has replaced it.


def end_at_once(kind: type, error: BaseException, *trace: object):
    """Show an error and end this rank. An orderly exit could wait for ranks that wait for it."""
    if kind is UserError:
        # As a rule all ranks raise it, local rank 0 shows it, and the launcher ends the others. A
        # rank that lives on after a while is the only one with the error, and shows it.
        time.sleep(5 if os.environ.get("LOCAL_RANK", "0") != "0" else 0)
        print(f"{Path(sys.argv[0]).name}:", *str(error).split(), flush=True)
        os._exit(2)
    time.sleep(2)  # If another rank failed first, it ends this one before what follows is shown.
    sys.__excepthook__(kind, error, *trace)
    sys.stderr.flush()
    os._exit(1)


def stop_at_once():
    """End this rank at once on Ctrl-C, or when DeepSpeed's launcher is gone."""
    # Python's own handler would wait until C++ returns, and a collective may never return.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launchers = psutil.Process().parents()[:2]  # launch.py, and runner.py above it

    def watch():
        while psutil.Process().parents()[:2] == launchers:
            time.sleep(1)
        os._exit(1)

    if "CROSS_SIZE" in os.environ:  # set by the launcher
        threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------------------------------- Checks --
class UserError(Exception):
    """Something that the user can fix: one line that says what to change, and exit code 2."""


def check(ok: object, message: str):
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


@contextlib.contextmanager
def as_user_error(message: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of these types, which a mistake of the user causes, into a UserError."""
    try:
        yield
    except errors as error:
        raise UserError(f"{message} ({type(error).__name__}: {error})") from error


def check_options(cfg: Config):
    """Refuse values that make no sense; nan lies in no range. Read --principle @FILE."""
    ranges = {number.name: (1, math.inf) for number in fields(cfg) if number.type is int}
    ranges |= {"seed": (0, 2**32 - 1), "alpha": (0, 99), "temperature": (0, 99)}
    ranges |= dict.fromkeys(("plausibility", "learning_rate", "gpu_memory_utilization"), (0, 1))
    for name, (low, high) in ranges.items():
        value = getattr(cfg, name)
        check(low <= value <= high, f"--{name} {value}: has to be from {low} to {high}")
    with as_user_error("--date or --principle cannot be read", OSError, ValueError):
        datetime.fromisoformat(cfg.date)
        if cfg.principle and cfg.principle.startswith("@"):
            cfg.principle = Path(cfg.principle[1:]).read_text("utf-8").strip()
    check(cfg.principle is None or cfg.principle.strip(), "--principle is empty")


def deepspeed_config(cfg: Config) -> dict:
    """--ds_config, with what is decided here filled in; a file that sets that itself is refused."""
    owned = {  # The batch sizes are nominal: deal() and optimizer_step() make the real ones.
        "train_batch_size": int(os.environ.get("WORLD_SIZE", "1")),
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # Gradients add up until step().
        "bf16": {"enabled": cfg.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW; DeepSpeed's needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }
    file = f"--ds_config {cfg.ds_config}"
    needs = "has to be a JSON file that sets ZeRO stage 3"
    with as_user_error(f"{file}: {needs}", OSError, ValueError, LookupError, TypeError):
        config = json.loads(Path(cfg.ds_config).read_text())
        check(config["zero_optimization"]["stage"] == 3, f"{file}: {needs}")
    for key in (*owned, "gradient_accumulation_steps", "optimizer", "scheduler", "fp16"):
        check(key not in config, f"{file}: remove {key!r}, inverse_q.py sets it")
    return config | owned


def memory_needs(cfg: Config, config, weights: int, ranks: int, offload: bool) -> list[float]:
    """Estimates of GB on each GPU: what training keeps, fitting adds, and sampling needs.
    config and the number of weights are the policy's; frozen models are taken to be as large."""
    size = getattr(torch, cfg.dtype).itemsize
    trained = size if offload else size + 16  # with master, gradient and moments in float32
    frozen = len({cfg.negative_model, cfg.positive_model}) * size
    head, layers = config.vocab_size * config.hidden_size, config.num_hidden_layers
    # Activations for each token and unit of width: 17 numbers in a layer, roughly. Checkpointing
    # keeps those of one layer, and of the others the input.
    kept = 17 + layers if cfg.activation_checkpointing else 17 * layers
    activations = size * kept * cfg.micro_batch_tokens * config.hidden_size
    keeps = (trained + frozen) * weights / ranks + frozen * head + 3e9  # NCCL, CUDA graphs
    gathered = size * min(weights, 1e9)  # DeepSpeed's limit of what is whole at a time
    fitting = activations + gathered + (8 + size) * head
    sampling = size * weights / cfg.tensor_parallel_size + 2e9
    return [keeps / 1e9, fitting / 1e9, sampling / 1e9]


def check_memory(cfg: Config, ds_config: dict):
    """Say what each GPU has to hold, and refuse what cannot fit."""
    how = {"trust_remote_code": cfg.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(cfg.model, **how)
    with torch.device("meta"):
        weights = transformers.AutoModelForCausalLM.from_config(config, **how).num_parameters()
    ranks, offload = dist.get_world_size(), "offload_optimizer" in ds_config["zero_optimization"]
    needs = memory_needs(cfg, config.get_text_config(), weights, ranks, offload)
    text = "{:.1f} GB to train, and in turn {:.1f} to fit and {:.1f} to sample".format(*needs)
    say(f"Inverse-Q* on {ranks} rank(s) in {cfg.dtype}, each of which needs about {text}")
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        text += f", of {total:.1f} GB"
        less = "use more GPUs, offload_optimizer in --ds_config, or a lower --micro_batch_tokens"
        check(needs[0] + max(needs[1:]) <= total, f"{text}: {less}")
        least = math.ceil(100 * needs[2] / total) / 100
        most = math.floor(100 * (1 - needs[0] / total)) / 100
        fits = least <= cfg.gpu_memory_utilization <= most
        check(fits, f"{text}: set --gpu_memory_utilization from {least} to {most}")


def load_tokenizer(cfg: Config):
    """The policy's tokenizer, after checking the models as far as that needs no weights."""
    how = {"trust_remote_code": cfg.trust_remote_code}
    need = cfg.max_prompt_tokens + cfg.max_new_tokens
    for name in dict.fromkeys((cfg.model, cfg.negative_model, cfg.positive_model)):
        with as_user_error(f"{name}: no model folder or hub id that loads", OSError, ValueError):
            config = transformers.AutoConfig.from_pretrained(name, **how).get_text_config()
            # Else mistral_common's tokenizer may load, which reads special tokens as plain text.
            load = transformers.AutoTokenizer.from_pretrained
            tokenizer = load(name, mistral_format=False, **how)
        paths = [vars(tokenizer).get(key) for key in ("vocab_file", "_tokenizer_path")]
        check("tekken.json" not in str(paths), f"{name}: tekken.json alone, add tokenizer.json")
        vocabulary = tokenizer.get_vocab(), config.vocab_size
        if name == cfg.model:
            own, expected = tokenizer, vocabulary
        check(vocabulary == expected, f"{name}: its vocabulary has to be that of {cfg.model}")
        have = getattr(config, "max_position_embeddings", None) or need
        lower = f"lower --max_prompt_tokens + --max_new_tokens ({need})"
        check(need <= have, f"{name} has {have} positions: {lower}")
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            unscaled = getattr(config, key, None) in (None, 1)
            check(unscaled, f"{name}: unsupported, it caps or scales its logits ({key})")
    if hasattr(own, "legacy"):  # Of Llama's: it changes ids, and transformers does not save it.
        own.init_kwargs["legacy"] = own.legacy
    return own


def prepare(cfg: Config) -> tuple[dict, Chat, list[list[Message]], list[list[Message]]]:
    """Collective: DeepSpeed's settings, the chat format, the prompts and the held-out ones.
    What a user can fix is found here, before a model is loaded."""
    join_ranks()
    ranks, parallel = dist.get_world_size(), cfg.tensor_parallel_size
    check(ranks % parallel == 0, f"--tensor_parallel_size {parallel} does not divide {ranks} ranks")
    ds_config, chat = deepspeed_config(cfg), Chat(load_tokenizer(cfg), cfg.principle, cfg.date)
    check_memory(cfg, ds_config)
    say(f"  policy     {cfg.model}\n  pi_0       {cfg.negative_model}")
    say(f"  pi_plus    {cfg.positive_model}, alpha {cfg.alpha}, shown: {cfg.principle}")
    limit, count = cfg.max_prompt_tokens, cfg.epochs * cfg.samples_per_epoch
    prompts, left_out = on_rank_0(load_prompts, cfg.data, "train", chat, limit, count, cfg.seed)
    say(f"  prompts    {len(prompts)} of {cfg.data}; left out: {left_out}")
    held_out, count = [], cfg.eval_samples
    if cfg.eval_data:
        held_out, _ = on_rank_0(load_prompts, cfg.eval_data, "test", chat, limit, count, cfg.seed)
    say("If this job stops, the same command resumes it after the last save.")
    return ds_config, chat, prompts, held_out


# ------------------------------------------------------------------------------------------ Main --
def main(run: Callable = train, options: tuple[type, ...] = (Config,)):
    """Parse the command line and run. A UserError is one line, and exit code 2."""
    sys.excepthook = end_at_once
    stop_at_once()
    # Otherwise transformers asks the hub to convert .bin weights, and FlashInfer needs nvcc.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel("ERROR")  # vLLM logs before it reads the variable.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parser = transformers.HfArgumentParser(options, usage=SUPPRESS, allow_abbrev=False)
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # the launcher's
    *parsed, unknown = parser.parse_args_into_dataclasses(arguments, True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    run(*parsed)


if __name__ == "__main__":
    main()
