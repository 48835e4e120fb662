# SPDX-License-Identifier: MIT
"""Inverse-Q*: align a language model without preference data, reward model or value model.

The method of "Inverse-Q*: Token Level Reinforcement Learning for Aligning Large Language Models
Without Preference Data" (Xia et al., Findings of EMNLP 2024, arXiv 2408.14874). Our copy of the
paper lacks its formulas; those below are reconstructed from its text, under its numbers.

THE METHOD.  x is a prompt, y a response, s_t = (x, y_<t) a state and a_t = y_t its next token.
  pi_theta  the policy that is trained
  pi_0      the frozen base model: the policy before training, or --negative_model
  pi_plus   the same frozen model, shown a principle in its system message; or --positive_model
  pi_hat    the estimate of a superior policy: the contrast of pi_plus with pi_0, amplified by alpha

  superior policy  log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z       (sec. 4.2)
  loss             L = -1/N sum_t sum_v pi_hat(v|s_t) log pi_theta(v|s_t)               (sec. 4.1)

Z makes the probabilities over the vocabulary sum to 1; t runs over all N response tokens of an
optimizer step. This is all that training computes. One epoch (sec. 5) has three steps:
  1. Sample a response to each of 500 prompts from the current policy, with vLLM.
  2. Contrast: pi_0 and pi_plus read every response, and together they give pi_hat.
  3. Fit pi_theta to pi_hat as soft labels; dL/dlogits = (pi_theta - pi_hat) / N.

WHY IT IS REINFORCEMENT LEARNING.  This explains the loss and never enters it. beta weighs the KL.
  reward           r(x, y_<=t) = beta log[ pi_hat(y_<=t|x) / pi_0(y_<=t|x) ]            (eq. 6)
  objective        J(pi) = E_pi[r] - beta KL(pi || pi_0) = -beta KL(pi || pi_hat)       (eq. 3, 5)
  value            V(s_t) = beta log E_pi_0[exp(r(x, y) / beta) | s_t] = r(x, y_<t)     (eq. 7-10)
  credit (ours)    A(s_t, a_t) = V(s_{t+1}) - V(s_t) = beta log[ pi_hat(a_t|s_t) / pi_0(a_t|s_t) ]

J is largest at pi_hat. Minimising L leads there too, by the opposite KL: up to a constant, L is the
mean of KL(pi_hat || pi_theta) over the tokens of the samples. V(s_t) is the reward of the prefix
y_<t, because the probabilities that pi_hat gives to what follows sum to 1; no critic is learnt.

WHAT THE PAPER LEAVES OPEN, AND OUR CHOICE.
  Sampling   Temperature 1 and no top_p: L averages over responses of the policy with which the
             epoch begins. Fresh prompts while the data last, one response to each.
  Batch      16 samples per optimizer step, the paper's 2 per GPU on 8 GPUs; an epoch's last step
             takes what remains. N counts over all micro-batches and ranks of the step.
  Optimizer  AdamW, constant rate, no weight decay; clipping at norm 1 is set in ds_config.json.
  Labels     The whole vocabulary at every response token, the end token included. A response that
             was cut at the limit has no end token, and is fitted as far as it goes.

RUN     deepspeed --num_gpus 8 inverse_q.py --model lmsys/vicuna-7b-v1.5   (./run.sh: a tiny world)
SHAPES  B sequences of S tokens; T response tokens in them; d hidden size; V vocabulary size.
RANKS   DeepSpeed runs this file as one rank per GPU. ZeRO-3 shards all weights over them, but for
        those of vLLM and of the frozen output layers. "Collective": all ranks must make this call,
        in the same order, because they wait for one another in it. Treat DeepSpeed's calls as such.
"""

import contextlib
import copy
import fcntl
import gzip
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from argparse import SUPPRESS, Namespace
from collections import Counter
from dataclasses import MISSING, asdict, dataclass, field
from datetime import datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import deepspeed
import psutil
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- Config --
PRINCIPLE = (  # the paper's (app. C), in our own words
    "Follow these principles in every reply. State nothing that is factually wrong. If a request "
    "could endanger anyone's safety or security, decline it, say why, and guide the person towards "
    "something safe. As long as the person's problem is not solved, keep working towards a "
    "solution. Keep to the thread of the conversation and bring in nothing off topic. Add the "
    "background that helps the person to understand."
)


def option(default, text: str, source="our choice"):
    """A field of Config, its text for --help, and where its default is from."""
    return field(default=default, metadata={"help": f"{text} ({source})."})


@dataclass
class Config:
    """The command line: every field is an option of the same name."""

    # What is contrasted with what.
    model: str = option(MISSING, "Model to align, a hub id or a folder", "required")
    principle: str | None = option(None, "pi_plus's text; preset if it is pi_0's model", "sec. 4.2")
    negative_model: str | None = option(None, "pi_0, else --model", "sec. 5.3")
    positive_model: str | None = option(None, "pi_plus, else pi_0; reads --principle", "sec. 5.3")
    alpha: float = option(1.4, "0 is pi_0, 1 is pi_plus, more goes beyond", "sec. 5")
    plausibility: float = option(0.0, "Drop tokens below this share of pi_plus's best")
    # Prompts and responses.
    data: str = option("Anthropic/hh-rlhf", "Hub data sets or files, comma-separated", "sec. 5.1")
    eval_data: str | None = option(None, "Held-out prompts; eval_kl is measured before each epoch")
    eval_samples: int = option(100, "Prompts drawn from --eval_data")
    max_prompt_tokens: int = option(1024, "Limit of a prompt, principle included")
    max_new_tokens: int = option(1024, "Limit of a response", "app. A")
    temperature: float = option(1.0, "Temperature of sampling")
    # Training, its memory and its files.
    epochs: int = option(15, "Rounds of sampling and fitting", "sec. 5")
    samples_per_epoch: int = option(500, "Prompts answered in an epoch", "sec. 5")
    batch_size: int = option(16, "Samples of an optimizer step", "2 on each of 8 GPUs, app. A")
    learning_rate: float = option(1e-6, "Constant rate of AdamW", "sec. 5")
    seed: int = option(0, "Seed of the choice of prompts and of sampling")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "Type of the weights")
    micro_batch_tokens: int = option(4096, "Padded tokens of the policy's forward pass")
    activation_checkpointing: bool = option(True, "Recompute layers to save memory")
    gpu_memory_utilization: float = option(0.5, "Share of GPU memory for vLLM")
    tensor_parallel_size: int = option(1, "GPUs that share one vLLM engine")
    ds_config: str = option(f"{Path(__file__).parent}/ds_config.json", "DeepSpeed's own settings")
    output_dir: str = option("out", "Output folder; a run found in it is resumed")
    save_every: int = option(1, "Save every so many epochs")

    def __post_init__(self):
        check_options(self)
        self.negative_model = self.negative_model or self.model
        self.positive_model = self.positive_model or self.negative_model
        if self.principle is None and self.positive_model == self.negative_model:
            self.principle = PRINCIPLE


# --------------------------------- The core, which needs only PyTorch and can be pasted anywhere --
def superior_policy(z_0, z_plus, alpha, plausibility=0.0, head=()):
    """log pi_hat = log pi_0 + alpha (log pi_plus - log pi_0) - log Z (sec. 4.2), [..., V], in nats.

    z_0 and z_plus are finite logits or log-probabilities of pi_0 and pi_plus, [..., V], in float32
    or wider, because alpha multiplies their difference. Or they are final hidden states [T, d], and
    `head` (weight, bias) is the output layer of both: being affine, it can follow the contrast.
    With plausibility p > 0, tokens v with pi_plus(v) < p max_u pi_plus(u) get probability 0, as in
    contrastive decoding (Li et al. 2023): alpha above 1 can raise tokens that both find absurd."""
    z_hat = logits(torch.lerp(z_0, z_plus, alpha), *head)  # z_0 + alpha (z_plus - z_0)
    if plausibility > 0:
        z_plus = logits(z_plus, *head)
        threshold = z_plus.amax(-1, keepdim=True) + math.log(plausibility)
        # The lowest finite number, because a loss multiplies it by pi_hat = 0, and 0 * -inf is nan.
        z_hat = z_hat.masked_fill(z_plus < threshold, torch.finfo(z_hat.dtype).min)
    return z_hat.log_softmax(-1)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 at least: bfloat16 has steps of 0.125 from 16 on."""
    if a.dtype.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def logits(h: Tensor, weight=None, bias=None) -> Tensor:
    """The output layer, if any: h [T, d], weight [V, d], bias [V] -> [T, V], float32 or wider."""
    z = h if weight is None else matmul(h, weight.t())
    return z if bias is None else z + bias


class SoftLabelLoss(torch.autograd.Function):
    """Output layer and soft-label cross-entropy (sec. 4.1) in one pass.

    h [T, d]: the policy's final hidden states at the positions that predict the response tokens.
    weight [V, d], bias [V] or None: the output layer. tokens [T]: ids of the response tokens.
    labels: a function from a slice of C tokens to finite log pi_hat, [C, V], of logits()'s type.
    Returns H(pi_hat, pi_theta) and H(pi_hat), summed over the tokens, in nats (the difference is
    the KL), and log pi_theta(a_t|s_t), [T]. Only the first has a gradient. If h requires one, it is
    made here chunk by chunk, so that no [T, V] tensor ever exists; backward() scales it, once."""

    @staticmethod
    def forward(ctx, h, weight, bias, labels, tokens, chunk=256):
        fit = ctx.needs_input_grad[0]
        wide = torch.promote_types(h.dtype, torch.float32)
        cross_entropy = torch.zeros((), dtype=torch.float64, device=h.device)
        entropy = torch.zeros_like(cross_entropy)
        log_pi_tokens = torch.empty(len(h), dtype=wide, device=h.device)  # [T]
        if fit:
            grad_h = torch.empty_like(h)  # [T, d]
            grad_weight = torch.zeros_like(weight, dtype=wide)  # [V, d]
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)  # [V]
        with torch.autocast(h.device.type, enabled=False):  # Autocast would round the products.
            for start in range(0, len(h), chunk):
                rows = slice(start, start + chunk)
                log_pi_hat = labels(rows)  # [C, V], C <= chunk
                log_pi_theta = logits(h[rows], weight, bias).log_softmax(-1)  # [C, V]
                pi_hat = log_pi_hat.exp()
                cross_entropy -= torch.linalg.vecdot(pi_hat, log_pi_theta).sum()
                entropy -= torch.linalg.vecdot(pi_hat, log_pi_hat).sum()
                log_pi_tokens[rows] = log_pi_theta.gather(-1, tokens[rows, None]).squeeze(-1)
                if not fit:
                    continue
                # In place, because [C, V] is large. The caller's 1/N comes in backward(), as scale.
                pi_theta = log_pi_theta.exp_()
                grad_logits = pi_theta.sub_(pi_hat)  # pi_theta - pi_hat, [C, V]
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
            ctx.gradients = grad_h, grad_weight, grad_bias
        ctx.mark_non_differentiable(entropy, log_pi_tokens)
        return cross_entropy, entropy, log_pi_tokens

    @staticmethod
    def backward(ctx, scale, *_):
        # In place, and ctx lets go of them, so autograd makes no copy. It casts them if need be.
        grad_h, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        if grad_bias is not None:
            grad_bias.mul_(scale)
        return grad_h.mul_(scale), grad_weight.mul_(scale), grad_bias, None, None, None


# ------------------------------------------------------------------------------------------ Data --
Messages = list[dict[str, str]]  # turns: {"role": "system", "user" or "assistant", "content": text}
HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # how a turn begins in HH-RLHF's texts
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
ROLES |= {"Human": "user", "Assistant": "assistant"}


def turns_of(conversation: str | Messages, speaker: str):
    """(role, text) of every turn of messages or an HH text. Other text is one turn, by speaker."""
    if isinstance(conversation, list):
        turns = [(message["role"], message["content"]) for message in conversation]
    elif HH_TURN.match(conversation):
        _, *parts = HH_TURN.split(conversation)
        turns = list(zip(parts[::2], parts[1::2], strict=True))
    else:
        turns = [(speaker, conversation)]
    "".join(text for _, text in turns).encode()  # Raises ValueError if UTF-8 cannot hold it.
    return [(ROLES[role], text.strip()) for role, text in turns]


def prompt_of(record) -> Messages:
    """A record's prompt, which ends with a user's turn, or []: `prompt` or `messages`, or else the
    turns that `chosen` and `rejected` share (sec. 5.1). Plain texts there are replies alone."""
    conversation = record.get("prompt", record.get("messages"))
    if conversation is not None:
        turns = turns_of(conversation, "user")
    else:  # By turns, not characters: in one HH pair in five the final replies begin alike.
        chosen, rejected = (turns_of(record[key], "assistant") for key in ("chosen", "rejected"))
        turns = []
        for turn, other in zip(chosen, rejected, strict=False):
            if turn != other:
                break
            turns.append(turn)
    # Many chat templates want the user first, roles to alternate, and no later system turn.
    prompt = []
    for role, text in turns:
        last = prompt[-1]["role"] if prompt else None
        if role == "system" and last not in (None, "system"):
            role = "user"
        if not text or (role == "assistant" and last in (None, "system")):
            continue
        if role == last:
            prompt[-1]["content"] += f"\n\n{text}"
        else:
            prompt.append({"role": role, "content": text})
    if prompt and prompt[-1]["role"] != "user":
        prompt.pop()
    return prompt


# --------------------------------------------------------------------------------------- Prompts --
TODAY = datetime(2024, 8, 27)  # for templates that print it: a resumed run needs equal contexts
# The space after the BOS is SentencePiece's, which puts none after a BOS that is written out.
VICUNA_TEMPLATE = (  # FastChat's vicuna_v1.1, because Vicuna v1.5 has no template of its own
    "{{ bos_token }} {% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.{% endif %}{{ ' ' }}"
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ 'USER: ' + turn.content + ' ' }}"
    "{% elif turn.role == 'assistant' %}{{ 'ASSISTANT: ' + turn.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def default_text(plain: str, probe: str) -> str:
    """The default system text, or "": what `plain`, a rendering without a system message, has where
    `probe` has "<S>" for it, spaces aside. "[Be nice.] <Q>" and "[<S>] <Q>" give "Be nice."."""
    pattern = r"\s*".join(map(re.escape, "".join(probe.split())))
    pattern = pattern.replace(r"<\s*S\s*>", "(.*?)", 1).replace(r"<\s*S\s*>", r"\1")
    match = re.fullmatch(rf"\s*{pattern}\s*", plain, re.DOTALL)
    return match[1] if match else ""


class Chat:
    """A tokenizer's chat format, and where the principle goes in it: the only difference between
    the contexts of pi_0 and pi_plus. The principle follows the system text that pi_0 sees, the
    prompt's own or the template's default. Without such a text the principle is the system message.
    Where a template refuses or ignores system messages, they open the first user turn."""

    def __init__(self, tokenizer, principle: str | None):
        self.tokenizer, self.principle = tokenizer, principle
        if not tokenizer.chat_template:
            say("There is no chat template: the format of prompts is Vicuna's")
            tokenizer.chat_template = VICUNA_TEMPLATE
        # Render a probe, to see whether the template shows system messages and has its own.
        self.has_system = True  # so that render() leaves the probe as it is
        question = {"role": "user", "content": "<Q>"}
        plain = self.render([question])
        check("<Q>" in plain, "the chat template of --model does not show the text of a user turn")
        probe = ""
        with contextlib.suppress(UserError):
            probe = self.render([{"role": "system", "content": "<S>"}, question])
        self.has_system = "<S>" in probe
        self.default_system = default_text(plain, probe) if self.has_system else ""

    def render(self, messages: Messages) -> str:
        """Text of the context up to where the response begins; UserError if the template fails."""
        if messages[0]["role"] == "system" and not self.has_system:
            system, user, *rest = messages
            content = f"{system['content']}\n\n{user['content']}"
            messages = [{"role": "user", "content": content}, *rest]
        options = {"add_generation_prompt": True, "strftime_now": TODAY.strftime}
        with as_user_error("the chat template of --model fails", Exception):  # It can raise any.
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def ids(self, messages: Messages) -> list[int]:
        """Token ids of render(), whose text has the special tokens written out already."""
        return self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]

    def with_principle(self, messages: Messages) -> Messages:
        """The same conversation with the principle: the context of pi_plus."""
        if self.principle is None:
            return messages
        system = self.default_system
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        return [{"role": "system", "content": f"{system} {self.principle}".lstrip()}, *messages]

    def shorten(self, messages: Messages, limit: int) -> Messages:
        """The messages without the oldest turns, so that both contexts have at most `limit` tokens.
        A system text stays. UserError, with the reason, if none is left or the template fails."""
        check(messages, "without a prompt")
        while True:
            contexts = self.ids(messages), self.ids(self.with_principle(messages))
            if max(map(len, contexts)) <= limit:
                return messages
            first, *later = (n for n, turn in enumerate(messages) if turn["role"] == "user")
            check(later, "too long")
            messages = messages[:first] + messages[later[0] :]


# -------------------------------------------------------------------------------------- Sampling --
@dataclass
class Sample:
    """A prompt in both contexts and one response to it: a line of the samples file."""

    index: int  # within the epoch
    messages: Messages
    prompt_ids: list[int]  # x as pi_theta and pi_0 see it
    principle_prompt_ids: list[int]  # x as pi_plus sees it
    response_ids: list[int] = field(default_factory=list)  # y, the same ids after either context
    response: str = ""
    log_probs: list[float] = field(default_factory=list)  # of y's tokens in vLLM at temperature 1
    finish_reason: str = ""  # "stop" if the model ended it, "length" if it was cut at the limit


class Sampler:
    """The policy in vLLM, in this process, which is one of an engine's tensor_parallel_size ranks.
    On a GPU it sleeps, with its memory released, except while it samples. Collective to build,
    before the training engines, because its share of the GPU's memory has to be free then."""

    def __init__(self, cfg: Config, chat: Chat):
        from vllm import LLM  # Imported here, because it takes seconds.

        self.cfg, self.chat = cfg, chat
        threads = max(1, torch.get_num_threads() // int(os.environ["LOCAL_SIZE"]))
        gpu, length = torch.cuda.is_available(), cfg.max_prompt_tokens + cfg.max_new_tokens
        engines = dist.get_world_size() // cfg.tensor_parallel_size
        per_engine = math.ceil(max(cfg.samples_per_epoch, cfg.eval_samples) / engines)
        with as_user_error(f"vLLM cannot run {cfg.model} with these options", ValueError):
            self.llm = LLM(
                cfg.model,
                dtype=cfg.dtype,
                max_model_len=length,
                max_num_seqs=min(per_engine, 512),
                max_num_batched_tokens=max(8192, length),
                hf_overrides={"head_dtype": "float32"},  # like training's logits
                enable_chunked_prefill=gpu,  # On CPUs vLLM 0.32.0 fails with it on seeded requests.
                tensor_parallel_size=cfg.tensor_parallel_size,
                distributed_executor_backend="external_launcher",  # This process is the worker.
                enforce_eager=not gpu,  # CUDA graphs on a GPU; on a CPU, compiling does not pay.
                enable_sleep_mode=gpu,
                gpu_memory_utilization=cfg.gpu_memory_utilization,
                kv_cache_memory_bytes=None if gpu else 2**30,  # CPU default: a share of all RAM
            )
        self.llm.sleep(level=2)  # Level 2 frees the weights too. On a CPU it does nothing.
        torch.set_num_threads(threads)  # On a GPU vLLM sets one thread: too few to offload.

        # vLLM only warns of weights that a reload left out and that hold garbage: make it an error.
        def refuse(record):
            raise UserError(f"vLLM did not get all weights of the policy: {record.getMessage()}")

        log = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
        log.setLevel(logging.WARNING)
        log.addFilter(refuse)

    def load(self, weights):
        """Collective: wake up, and load (name, whole tensor) pairs; each rank goes through all."""

        def repack(model):  # Needed on CPUs: vLLM packs a copy of a tied output layer.
            for layer in model.modules():
                if type(layer).__name__ == "ParallelLMHead":
                    layer.quant_method.process_weights_after_loading(layer)

        torch.cuda.empty_cache()  # Give vLLM the memory that PyTorch caches.
        # The KV cache wakes last. Until then its memory is free for gathering whole weights.
        self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(repack)
        torch.cuda.empty_cache()  # Again, after gathering.
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # It holds keys and values of the old weights.

    def sample(self, prompts: list[Messages], tag) -> list[Sample]:
        """Collective: one response to each prompt (sec. 5). Engines share the work; ranks get all.
        A sample's seed follows from --seed, tag and its index, not from the number of ranks."""
        from vllm import SamplingParams

        cfg, chat, samples, params = self.cfg, self.chat, [], []
        rank, ranks, parallel = dist.get_rank(), dist.get_world_size(), cfg.tensor_parallel_size
        options = {"temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
        for i in range(rank // parallel, len(prompts), ranks // parallel):
            shown = chat.with_principle(prompts[i])
            samples.append(Sample(i, prompts[i], chat.ids(prompts[i]), chat.ids(shown)))
            seed = random.Random(f"{cfg.seed}/{tag}/{i}").getrandbits(63)
            params.append(SamplingParams(seed=seed, logprobs=0, detokenize=False, **options))
        contexts = [{"prompt_token_ids": sample.prompt_ids} for sample in samples]
        outputs = self.llm.generate(contexts, params, use_tqdm=rank == 0) if contexts else []
        for sample, output in zip(samples, outputs, strict=True):
            (answer,) = output.outputs
            sample.response_ids = list(answer.token_ids)  # with the end token, if it ended
            sample.response = chat.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            choices = zip(answer.token_ids, answer.logprobs, strict=True)
            sample.log_probs = [found[token].logprob for token, found in choices]
            sample.finish_reason = answer.finish_reason
        # The tensor-parallel ranks of an engine all bring the same samples.
        everyones = [None] * ranks
        dist.all_gather_object(everyones, samples)
        by_index = {sample.index: sample for part in everyones for sample in part}
        return [by_index[i] for i in range(len(prompts))]


# ------------------------------------------------------------------------------- Superior policy --
def final_states(body, pairs) -> Tensor:
    """Collective: final hidden states at the positions that predict response tokens, [T, d]. pairs
    holds (context, response) of B sequences; the last token predicts nothing, and is no input.
    Padding is on the right, where a causal model does not look: it needs no mask."""
    # Under ZeRO-3 a rank without samples has to run a forward as well: on a stand-in.
    pairs = pairs or [([0, 0], [])]
    inputs = [torch.tensor((x + y)[:-1]) for x, y in pairs]
    ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(body.device)  # [B, S]
    h = body(input_ids=ids, use_cache=False).last_hidden_state  # [B, S, d]
    rows = [states[len(x) - 1 :][: len(y)] for (x, y), states in zip(pairs, h, strict=True)]
    return torch.cat(rows)  # [T, d]


def load_model(name: str, cfg: Config, ds_config) -> nn.Module:
    """Collective: a causal language model, sharded over the ranks while it loads (ZeRO-3)."""
    # In place of HfDeepSpeedConfig, which needs accelerate. transformers holds it weakly.
    zero3 = Namespace(config=ds_config, is_zero3=lambda: True)
    transformers.integrations.deepspeed.set_hf_deepspeed_config(zero3)
    config = transformers.AutoConfig.from_pretrained(name)
    for key, value in vars(config.get_text_config()).items():
        if "drop" in key and isinstance(value, float):  # vLLM samples without dropout.
            setattr(config.get_text_config(), key, 0.0)
    return transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype=cfg.dtype)


def unpatched(llm):
    """A context to build transformers' models in. vLLM 0.32.0 patches the class of a model that it
    has no code of its own for, unless the compilation mode is 0."""
    from vllm.config import set_current_vllm_config

    # Not deepcopy(): the config leads to the KV cache, and memory that sleeps cannot be read.
    config = copy.copy(llm.llm_engine.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.mode = 0
    return set_current_vllm_config(config)


class SuperiorPolicy:
    """pi_hat at the response tokens of samples (sec. 4.2), from models that are never trained.
    Their layers are sharded over the ranks (ZeRO-3). Their output layers stay whole on every rank,
    because each chunk of the loss needs them. Collective to build and to call. For another teacher
    replace this one in train(). Called with samples, or [] on an idle rank, it returns `labels` for
    SoftLabelLoss, a function without collectives, because ranks differ in the number of chunks."""

    def __init__(self, cfg: Config, ds_config):
        parts = ("train_micro_batch_size_per_gpu", "bf16", "zero_optimization")
        frozen_config = {key: ds_config[key] for key in parts}  # without monitors, for example
        self.cfg, self.frozen = cfg, []  # (body, head) of pi_0, and of pi_plus if it differs
        for name in dict.fromkeys([cfg.negative_model, cfg.positive_model]):
            model = load_model(name, cfg, ds_config)
            body = model.base_model.requires_grad_(False).eval()
            body, *_ = deepspeed.initialize(model=body, config=frozen_config)
            layer = model.get_output_embeddings()
            with deepspeed.zero.GatheredParameters(layer.parameters()):
                head = [p.data.clone() for p in layer.parameters()]  # weight, and bias if any
            self.frozen.append((body, head))

    @torch.no_grad()
    def __call__(self, samples: list[Sample]):
        """Collective: log pi_hat at the T response tokens, as a function of a slice of these."""
        (body_0, head_0), (body_plus, head_plus) = self.frozen[0], self.frozen[-1]
        contrast = self.cfg.alpha, self.cfg.plausibility
        plain = [(sample.prompt_ids, sample.response_ids) for sample in samples]
        shown = [(sample.principle_prompt_ids, sample.response_ids) for sample in samples]
        if body_0 is body_plus:  # Both contexts in one forward gather the weights once.
            h_0, h_plus = final_states(body_0, plain + shown).chunk(2)  # T rows each
        else:
            h_0, h_plus = final_states(body_0, plain), final_states(body_plus, shown)

        def labels(rows):
            if body_0 is body_plus:  # One output layer, which can follow the contrast.
                return superior_policy(h_0[rows], h_plus[rows], *contrast, head_0)
            z_0, z_plus = logits(h_0[rows], *head_0), logits(h_plus[rows], *head_plus)
            return superior_policy(z_0, z_plus, *contrast)

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
        # ZeRO-3 gathers the shards of a module only while that module itself runs. The loss needs
        # the output layer's weight, so it has to be that layer's forward. *rest: labels, tokens.
        head.forward = lambda h, *rest: SoftLabelLoss.apply(h, head.weight, head.bias, *rest)

    def forward(self, samples: list[Sample], labels):
        """Collective: sums over response tokens of H(pi_hat, pi_theta), of H(pi_hat), and of
        sampler_gap, |log pi_theta(a_t|s_t) - the sampler's log-probability|."""
        pairs = [(sample.prompt_ids, sample.response_ids) for sample in samples]
        h = final_states(self.model.base_model, pairs)  # [T, d]
        tokens = torch.tensor([a for _, y in pairs for a in y], dtype=torch.long, device=h.device)
        log_probs = torch.tensor([p for s in samples for p in s.log_probs], device=h.device)
        cross_entropy, entropy, log_pi_theta = self.model.get_output_embeddings()(h, labels, tokens)
        return cross_entropy, entropy, (log_pi_theta - log_probs).abs().sum()


def whole_weights(model: nn.Module):
    """Collective: (name, tensor) of each weight, whole only until the next one is asked for."""
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter.data
    kept = model.state_dict().keys()  # Some models have weights among their buffers.
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def deal(lengths: list[int], ranks: int, budget: int):
    """Micro-batches of an optimizer step: [micro-step][rank] -> indices into lengths. Sequences of
    similar length share one, up to `budget` tokens with padding; a longer sequence is alone. Under
    ZeRO-3 a forward is a collective, so every rank gets equally many, of which some are empty."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # longest first

    def split(limit):
        batches, start = [], 0
        while start < len(order):
            size = max(1, limit // lengths[order[start]])
            batches.append(order[start : start + size])
            start += size
        return batches + [[]] * (-len(batches) % ranks)

    # n batches, empty ones included, are needed anyway: a low limit that gives n evens them out.
    n = len(split(budget))
    limit = min(sum(lengths) // n, budget)
    while len(batches := split(limit)) > n:
        limit += 1
    return [batches[i : i + ranks] for i in range(0, n, ranks)]


# -------------------------------------------------------------------------------------- Training --
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.1}  # the most that rounding alone explains


def compare(engine, superior, samples: list[Sample], budget: int, fit: bool):
    """Collective: run pi_theta and pi_hat on samples. All ranks have all of them, and run a share.
    With `fit` also run the backward: the gradient of L stays in the engine. Returns means over all
    response tokens, in nats: loss, KL(pi_hat || pi_theta), sampler_gap; and how many tokens."""
    ranks, N = dist.get_world_size(), sum(len(sample.response_ids) for sample in samples)
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) - 1 for sample in samples]
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for micro_step in deal(lengths, ranks, budget):
        mine = [samples[i] for i in micro_step[dist.get_rank()]]
        with torch.set_grad_enabled(fit):
            cross_entropy, entropy, gap = engine(mine, superior(mine))
        if fit:
            # L is the sum over micro-batches and ranks, divided by N. DeepSpeed sums over the
            # micro-batches up to step(), but averages over the ranks.
            engine.backward(cross_entropy * (ranks / N))
        sums += torch.stack([cross_entropy.detach(), entropy, gap.double()])
    dist.all_reduce(sums)
    loss, entropy, gap = (sums / N).tolist()
    return {"loss": loss, "kl": loss - entropy, "sampler_gap": gap, "tokens": N}


def optimizer_step(engine, superior, batch, budget: int, place: str, max_gap=math.inf):
    """Collective: fit one batch, and return its record. If a number is not finite, or sampler_gap
    exceeds max_gap, raise a UserError and leave the weights as they were."""
    record = compare(engine, superior, batch, budget, fit=True)
    loss, gap = record["loss"], record["sampler_gap"]
    place = f"{place}: on samples {[sample.index for sample in batch]}"
    check(math.isfinite(loss), f"{place} the loss is {loss}: look at these, and at the models")
    check(gap <= max_gap, f"{place} sampler_gap is {gap}: vLLM's weights or computations differ")
    engine.step()  # Clips the gradient; leaves the weights alone if it is not finite.
    norm = float(engine.get_global_grad_norm())
    check(math.isfinite(norm), f"{place} the gradient is {norm}: lower --learning_rate?")
    return {**record, "grad_norm": norm}


def train(cfg: Config):
    """Collective. The method: in every epoch sync, sample, contrast and fit, log and save."""
    ds_config, chat, prompts, held_out = prepare(cfg)
    run = Run(cfg, prompts)
    if run.epoch >= cfg.epochs:
        say("Nothing is left to do: raise --epochs, or choose another --output_dir.")
        os._exit(0)  # An orderly exit this early can abort in gloo's threads.
    sampler = Sampler(cfg, chat)
    with unpatched(sampler.llm):
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

        # 1. Sample y ~ pi_theta(.|x).
        drawn = range((epoch - 1) * cfg.samples_per_epoch, epoch * cfg.samples_per_epoch)
        samples = sampler.sample([prompts[i % len(prompts)] for i in drawn], tag=epoch)
        measured = {"sample_seconds": time.perf_counter() - start}
        unseen = sampler.sample(held_out, tag="held out")
        sampler.llm.sleep(level=2)
        run.save_samples(f"epoch-{epoch:03d}", samples)
        if unseen:  # eval_kl is that of the policy before this epoch's fit.
            run.save_samples(f"held-out-{epoch - 1:03d}", unseen)
            result = compare(engine, superior, unseen, cfg.micro_batch_tokens, fit=False)
            measured["eval_kl"] = result["kl"]

        # 2. Contrast and 3. fit, batch by batch.
        steps, fitting = [], time.perf_counter()
        starts = range(0, len(samples), cfg.batch_size)
        for i in tqdm(starts, f"Fitting, epoch {epoch}", disable=dist.get_rank() > 0):
            step += 1
            batch, place = samples[i : i + cfg.batch_size], f"epoch {epoch}, step {step}"
            max_gap = MAX_GAP[cfg.dtype] if i == 0 else math.inf  # After a step vLLM is behind.
            record = optimizer_step(engine, superior, batch, cfg.micro_batch_tokens, place, max_gap)
            steps.append(record)
            on_rank_0(run.log, engine.monitor, "step", epoch, step, record)
        measured["train_seconds"] = time.perf_counter() - fitting

        # Log and save.
        record = epoch_record(samples, steps) | measured
        on_rank_0(run.log, engine.monitor, "epoch", epoch, step, record)
        left = (cfg.epochs - epoch) * (time.perf_counter() - start)
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in record.items())
        say(f"epoch {epoch} of {cfg.epochs}, {left / 60:.0f} min left: {numbers}")
        if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
            run.save_model(policy.model, chat.tokenizer)
            run.save_state(engine, epoch)
    with contextlib.suppress(RuntimeError):  # too little memory; but all is saved
        sampler.llm.wake_up()  # Else vLLM 0.32.0 frees sleeping memory twice at its exit.
    say(f"The trained model is {run.folder / 'model'}")


# The method ends here. What follows is the job around it: files, ranks, signals and checks.
# ----------------------------------------------------------------------------------------- Input --
def data_files(data: str, split: str):
    """The files named in data, and *{split}*.json* of its hub data sets, owner/name[/folder]."""
    for name in map(str.strip, data.split(",")):
        if Path(name).is_file():
            yield Path(name)
            continue
        path = name.rstrip("/").split("/")
        wanted = "/".join([*path[2:], f"*{split}*.json*"])
        with as_user_error(f"{name}: no such file or hub data set", OSError, ValueError):
            root = snapshot_download("/".join(path[:2]), repo_type="dataset", allow_patterns=wanted)
        files = [f for f in sorted(Path(root).rglob("*")) if fnmatch(f.relative_to(root), wanted)]
        check(files, f"{name}: this hub data set has no {split} file in .json or .jsonl")
        yield from files


def read_records(data: str, split: str):
    """(place, record) for the items of files that are a JSON list, and for the lines of others."""
    for path in data_files(data, split):
        place = str(path)
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                is_list = file.peek(99).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")  # or BOM
                for n, item in enumerate(json.load(file) if is_list else file, 1):
                    place = f"{path}, {'item' if is_list else 'line'} {n}"
                    if is_list:
                        yield place, item
                    elif item.strip():
                        yield place, json.loads(item)
        except (OSError, EOFError, zlib.error, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{place}: cannot be read as JSON in UTF-8: {error}") from error


def load_prompts(cfg: Config, chat: Chat, data: str, split: str, count: int):
    """Distinct prompts that fit, `count` at most, shuffled; how many were left out, and why."""
    records, prompts, left_out = list(read_records(data, split)), {}, Counter()
    random.Random(cfg.seed).shuffle(records)
    for place, record in tqdm(records, f"Prompts of {data}", count, leave=False):
        if len(prompts) == count:
            break
        needs = f"{place}: a record needs 'prompt', 'messages', or 'chosen' and 'rejected'"
        with as_user_error(needs, KeyError, TypeError, AttributeError, ValueError):
            prompt = prompt_of(record)
        try:
            prompt = chat.shorten(prompt, cfg.max_prompt_tokens)
        except UserError as error:
            left_out[str(error)] += 1
            continue
        key = json.dumps(prompt)
        left_out["duplicate"] += key in prompts
        prompts[key] = prompt
    check(prompts, f"{data}: no prompt to use; left out: {dict(left_out)}")
    return list(prompts.values()), dict(left_out)


# ----------------------------------------------------------------------------------------- Files --
class Run:
    """What a run leaves under --output_dir. Rank 0 renames files and model/ once they are whole, so
    no kill leaves half of one. A run is resumed after the epoch that state/done.json names, from
    DeepSpeed's checkpoint of it; later or cut lines of metrics are dropped. Collective to build."""

    def __init__(self, cfg: Config, prompts: list[Messages]):
        self.folder, self.state = Path(cfg.output_dir), Path(cfg.output_dir, "state")
        first = json.dumps(prompts[: cfg.samples_per_epoch])  # the same if --epochs is raised
        more = {"ranks": dist.get_world_size(), "data_crc32": zlib.crc32(first.encode())}
        self.epoch = on_rank_0(self.open, asdict(cfg) | more)

    def open(self, settings) -> int:
        """On rank 0: lock the folder, refuse another run's, return the last saved epoch or 0."""
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        place = f"--output_dir {self.folder}"
        self.lock = (self.folder / "lock").open("w")
        with as_user_error(f"{place}: another job is running in it", BlockingIOError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        done = self.state / "done.json"
        epoch = json.loads(done.read_text())["epoch"] if done.exists() else 0
        saved = json.loads((self.folder / "config.json").read_text()) if epoch else settings
        # These may change when a run is resumed. Only the clipping in ds_config touches the method.
        free = {"epochs", "save_every", "output_dir", "ds_config", "micro_batch_tokens"}
        free |= {"activation_checkpointing", "gpu_memory_utilization", "tensor_parallel_size"}
        keys = [key for key in settings if key not in free and settings[key] != saved.get(key)]
        changed = "; ".join(f"{k} {saved.get(k)!r} there, {settings[k]!r} here" for k in keys)
        check(not keys, f"{place} holds another run, use its settings or another folder: {changed}")
        self.write("config.json", json.dumps(settings, indent=2) + "\n")
        metrics = self.folder / "metrics.jsonl"
        metrics.touch()
        *lines, _ = metrics.read_text().split("\n")  # The last is "", unless a kill cut it.
        kept = [f"{line}\n" for line in lines if json.loads(line)["epoch"] <= epoch]
        self.write("metrics.jsonl", "".join(kept))  # What came after that epoch is redone.
        self.prune(epoch)
        return epoch

    def prune(self, epoch: int):
        """Delete every state but that of an epoch, including what a kill left."""
        for path in set(self.state.glob("epoch-*")) - {self.state / f"epoch-{epoch:03d}"}:
            shutil.rmtree(path, ignore_errors=True)

    def write(self, name: str, text: str):
        """On rank 0: make or replace a text file, as a whole."""
        new = self.folder / f"{name}.new"
        new.write_text(text)
        new.replace(self.folder / name)

    def log(self, monitor, kind: str, epoch: int, step: int, record):
        """On rank 0: a line of metrics.jsonl, and an event for DeepSpeed's monitors, if any."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **record}) + "\n")
        monitor.write_events([(f"{kind}/{key}", record[key], step) for key in record])

    def save_samples(self, name: str, samples: list[Sample]):
        """Collective: samples/NAME.jsonl, and the first one on the console."""
        text = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)
        on_rank_0(self.write, f"samples/{name}.jsonl", text)
        user, policy = samples[0].messages[-1]["content"], samples[0].response
        say(f"\n{name}, first sample\n  user    {user!r:.300}\n  policy  {policy!r:.300}")

    def save_model(self, model: nn.Module, tokenizer):
        """Collective: make or replace model/, in transformers format."""
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
        if self.epoch > 0:
            with as_user_error(f"{self.state}: epoch {self.epoch} is lost, restore it", Exception):
                engine.load_checkpoint(str(self.state), f"epoch-{self.epoch:03d}")  # can raise any

    def save_state(self, engine, epoch: int):
        """Collective: save what training is resumed from. It is valid once done.json names it."""
        tag = f"epoch-{epoch:03d}"
        with as_user_error(f"{self.state / tag}: not written, disk full?", OSError, RuntimeError):
            engine.save_checkpoint(str(self.state), tag, save_latest=False)
        on_rank_0(self.write, "state/done.json", json.dumps({"epoch": epoch}) + "\n")
        self.prune(epoch)  # On every rank, because machines may have folders of their own.


def epoch_record(samples: list[Sample], steps):
    """The record of an epoch, from its samples and the records of its steps."""
    tokens = sum(step["tokens"] for step in steps)
    record = {key: sum(s[key] * s["tokens"] for s in steps) / tokens for key in ("loss", "kl")}
    truncated = sum(sample.finish_reason == "length" for sample in samples) / len(samples)
    return record | {"response_tokens_mean": tokens / len(samples), "truncated": truncated}


# ----------------------------------------------------------------------------------------- Ranks --
def say(text: str):
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def on_rank_0(function, *args):
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
    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # It leaks /dev/shm.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(alone | os.environ)
    ranks = int(os.environ["LOCAL_SIZE"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    enough = ranks <= gpus or torch.version.cuda is None  # A PyTorch for CPUs takes any number.
    check(enough, f"{ranks} rank(s), {gpus} usable GPU(s): lower --num_gpus, or see nvidia-smi")
    deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    # Objects go over gloo, where ranks can wait for rank 0 and fail at once if it dies. DeepSpeed's
    # own call would bind the group to GPUs, and vLLM's groups would then be splits of it.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(hours=12))
    deepspeed.init_distributed()
    sys.excepthook = end_at_once  # PyTorch has replaced it.


def end_at_once(kind, error, *trace):
    """Show an error and end this rank. An orderly exit could wait for ranks that wait for it."""
    if kind is UserError:
        # As a rule all ranks raise it, local rank 0 shows it, and the launcher ends the others. If
        # this rank still runs after 5 s, the error is its own alone, and it shows it.
        time.sleep(5 if os.environ.get("LOCAL_RANK", "0") != "0" else 0)
        print(f"{Path(sys.argv[0]).name}:", " ".join(str(error).split()), flush=True)
        os._exit(2)
    time.sleep(2)  # If another rank failed first, the launcher ends this one before it prints.
    sys.__excepthook__(kind, error, *trace)
    os._exit(1)


def stop_at_once():
    """End this rank at once on Ctrl-C, or when DeepSpeed's launcher is gone."""
    # Python's own handler would wait until C++ returns, and a collective may never return.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        launch = psutil.Process(os.getppid())  # launch.py, and above it runner.py
        runner = launch.ppid()
        try:
            while os.getppid() == launch.pid and launch.ppid() == runner:
                time.sleep(1)
        finally:  # also if launch.py ends just then, for which psutil raises NoSuchProcess
            os._exit(1)

    if "CROSS_SIZE" in os.environ:  # set by the launcher
        threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------------------------------- Checks --
class UserError(Exception):
    """Something that the user can fix: one line that says what to change, and exit code 2."""


def check(ok, message: str):
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


@contextlib.contextmanager
def as_user_error(message: str, *errors):
    """Turn errors of these types, which a mistake of the user causes, into a UserError."""
    try:
        yield
    except errors as error:
        raise UserError(f"{message} ({type(error).__name__}: {error})") from error


def check_options(cfg: Config):
    """Refuse values that make no sense; nan lies in no range."""
    highest = {"alpha": 99, "temperature": 99, "seed": 2**32 - 1}
    highest |= {"plausibility": 1, "learning_rate": 1, "gpu_memory_utilization": 1}
    for name, value in asdict(cfg).items():
        if type(value) in (int, float):
            low, high = (0, highest[name]) if name in highest else (1, math.inf)  # a count
            check(low <= value <= high, f"--{name} {value}: has to be from {low} to {high}")
    check(cfg.principle is None or cfg.principle.strip(), "--principle is empty")


def deepspeed_config(cfg: Config):
    """--ds_config, with what is decided here filled in; a file that sets any of it is refused."""
    owned = {
        "train_micro_batch_size_per_gpu": 1,  # nominal: train() and deal() make the real batches
        "managed_gradient_accumulation": False,  # Gradients add up until step().
        "bf16": {"enabled": cfg.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW; DeepSpeed's needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        # Else zero.Init rounds rotary frequencies: at position 1,000 angles would be radians off.
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["inv_freq"]},
    }
    needs = f"--ds_config {cfg.ds_config}: has to be a JSON file that sets ZeRO stage 3"
    with as_user_error(needs, OSError, ValueError, LookupError, TypeError):
        config = json.loads(Path(cfg.ds_config).read_text())
        check(config["zero_optimization"]["stage"] == 3, needs)
    others = "train_batch_size gradient_accumulation_steps optimizer scheduler fp16"
    for key in (*owned, *others.split()):
        check(key not in config, f"--ds_config {cfg.ds_config}: remove {key!r}, it is set here")
    return config | owned


def memory_needs(cfg: Config, config, weights: int, ranks: int, zero):
    """Estimates of GB on each GPU: what training keeps, fitting adds, and sampling needs. zero is
    DeepSpeed's zero_optimization; frozen models are taken to be as large as the policy."""
    size, frozen = getattr(torch, cfg.dtype).itemsize, len({cfg.negative_model, cfg.positive_model})
    head, layers = config.vocab_size * config.hidden_size, config.num_hidden_layers
    # Bytes per weight, unless offloaded. 16 = gradient 4 + AdamW's moments 8 + master copy 4.
    bytes_of = {"offload_param": size * (1 + frozen), "offload_optimizer": 16}
    on_gpu = [key for key in bytes_of if (zero.get(key) or {}).get("device", "none") == "none"]
    other = 5e9 if ranks == 1 else 7e9  # CUDA, graphs and buckets, measured; and NCCL, guessed
    keeps = sum(bytes_of[key] for key in on_gpu) * weights / ranks + size * frozen * head + other
    # A token takes some 17 d numbers a layer. Checkpointing keeps one layer's, and all inputs.
    kept = 17 + layers if cfg.activation_checkpointing else 17 * layers
    activations = size * kept * cfg.micro_batch_tokens * config.hidden_size
    fitting = activations + size * min(weights, 1e9) + (8 + size) * head  # 1e9 gathered at most
    sampling = size * weights / cfg.tensor_parallel_size + 2e9
    return [keeps / 1e9, fitting / 1e9, sampling / 1e9]


def check_memory(cfg: Config, ds_config):
    """Say what each GPU has to hold, and refuse what cannot fit."""
    config = transformers.AutoConfig.from_pretrained(cfg.model)
    with torch.device("meta"):
        weights = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    ranks, zero = dist.get_world_size(), ds_config["zero_optimization"]
    keeps, fitting, sampling = memory_needs(cfg, config.get_text_config(), weights, ranks, zero)
    text = f"{keeps:.1f} GB always, and {fitting:.1f} more to fit or {sampling:.1f} to sample"
    say(f"Inverse-Q* in {cfg.dtype} on {ranks} rank(s), each of which needs about {text}")
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        less = "use more GPUs, offload_optimizer in --ds_config, or a lower --micro_batch_tokens"
        check(keeps + max(fitting, sampling) <= total, f"{text}, of {total:.1f} GB: {less}")
        least, most = sampling / total, 1 - keeps / total
        fits = f"--gpu_memory_utilization from {least + 0.0005:.3f} to {most - 0.0005:.3f}"
        check(least <= cfg.gpu_memory_utilization <= most, f"{text}, of {total:.1f} GB: set {fits}")


def load_tokenizer(cfg: Config):
    """The policy's tokenizer, after checking the models as far as that needs no weights."""
    need = cfg.max_prompt_tokens + cfg.max_new_tokens
    for name in dict.fromkeys((cfg.model, cfg.negative_model, cfg.positive_model)):
        with as_user_error(f"{name}: no model folder or hub id that loads", OSError, ValueError):
            config = transformers.AutoConfig.from_pretrained(name).get_text_config()
            # Else mistral_common's tokenizer may load, which reads special tokens as plain text.
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, mistral_format=False)
        tekken = "tekken.json" in str(vars(tokenizer))
        check(not tekken, f"{name}: has tekken.json but no tokenizer.json, add that")
        vocabulary = tokenizer.get_vocab(), config.vocab_size
        if name == cfg.model:
            own, expected = tokenizer, vocabulary
        check(vocabulary == expected, f"{name}: its vocabulary has to be that of {cfg.model}")
        have = getattr(config, "max_position_embeddings", None) or need
        check(need <= have, f"{name}: --max_prompt_tokens + --max_new_tokens may be {have} at most")
        keys = "final_logit_softcapping logits_scaling logit_scale num_experts num_local_experts"
        odd = [key for key in keys.split() if getattr(config, key, None) not in (None, 0, 1)]
        check(not odd, f"{name}: unsupported, it has experts or caps or scales its logits: {odd}")
    if hasattr(own, "legacy"):  # Llama's flag: it changes ids, and transformers does not save it.
        own.init_kwargs["legacy"] = own.legacy
    return own


def prepare(cfg: Config):
    """Collective: join the ranks, check the input, load prompts; all before a model loads."""
    join_ranks()
    ranks, parallel = dist.get_world_size(), cfg.tensor_parallel_size
    check(ranks % parallel == 0, f"--tensor_parallel_size {parallel} does not divide {ranks} ranks")
    ds_config, chat = deepspeed_config(cfg), Chat(load_tokenizer(cfg), cfg.principle)
    check_memory(cfg, ds_config)
    count = cfg.epochs * cfg.samples_per_epoch
    prompts, left_out = on_rank_0(load_prompts, cfg, chat, cfg.data, "train", count)
    say(f"  prompts    {len(prompts)} of {cfg.data}; left out: {left_out}")
    say(f"  pi_0       reads {chat.render(prompts[0])!r}")
    say(f"  pi_plus    reads {chat.render(chat.with_principle(prompts[0]))!r}")
    held_out = []
    if cfg.eval_data:
        held_out, _ = on_rank_0(load_prompts, cfg, chat, cfg.eval_data, "test", cfg.eval_samples)
    say("If this job stops, the same command resumes it after the last save.")
    return ds_config, chat, prompts, held_out


# ------------------------------------------------------------------------------------------ Main --
def main(run=train, options=(Config,)):
    """Parse the command line and run. A UserError is one line, and exit code 2."""
    sys.excepthook = end_at_once
    stop_at_once()
    # Otherwise transformers asks the hub to convert .bin weights, and FlashInfer needs nvcc.
    defaults = {"DISABLE_SAFETENSORS_CONVERSION": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    defaults |= {"VLLM_ALLREDUCE_USE_FLASHINFER": "0", "FLASHINFER_LOGGING_LEVEL": "error"}
    os.environ.update(defaults | {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ)
    logging.getLogger("vllm").setLevel("ERROR")  # vLLM logs before it reads the variable.
    warnings.filterwarnings("ignore", r"`torch\.distributed|barrier")  # that libraries cause
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # Never offer to run a model's code.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = transformers.HfArgumentParser(options, usage=SUPPRESS, allow_abbrev=False)
    parser.add_argument("--local_rank", help=SUPPRESS)  # DeepSpeed's launcher adds it.
    run(*parser.parse_dict(vars(parser.parse_args()), allow_extra_keys=True))  # drops local_rank


if __name__ == "__main__":
    main()
