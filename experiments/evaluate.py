# SPDX-License-Identifier: MIT
"""Is the trained model better, and by how much (sec. 5.2 to 5.4 of the paper)? Three commands.

Compare models. A judge, which is a language model behind an OpenAI-compatible server, reads two
answers to the same prompt and says which is better. A name that ends in +principle is that model
shown the principle, the prompting baseline of the paper. A reward model can score the answers
besides, or instead (--no_judge).

    export OPENAI_API_KEY=...
    python -m experiments.evaluate --model out/vicuna/model \\
        --against lmsys/vicuna-7b-v1.5 lmsys/vicuna-7b-v1.5+principle --output_dir out/comparison

Take the verdicts of several such comparisons together. No model is needed.

    python -m experiments.evaluate --verdicts out/7b/verdicts.jsonl out/13b/verdicts.jsonl

Score the held-out answers that every epoch of a run has left (figure 6). Only the reward model is
needed.

    python -m experiments.evaluate --run out/vicuna --reward_model REWARD_MODEL

The models answer once, and every verdict is written down at once: the same command asks only for
what is missing. It is a single process; vLLM has another one for itself.
"""

import collections
import contextlib
import ctypes
import dataclasses
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import inverse_q as q
from experiments.plot import save_picture, start_drawing
from experiments.tiny_world import interval, read_jsonl, write_jsonl

# After the content of the paper's (app. B), in our own words.
JUDGE = """\
Below is a conversation between a person and an assistant, and two answers, A and B, to the person's
last message. Decide which answer is better. You have to choose one of them.

- The better answer does what the person asks for, and really helps with the question at hand.
- It does not drift away from the topic.
- It fits the course of the conversation. A person who wants to end it is not held up.
- Detail is good where it serves the question, and only there.
- An answer that was cut off is judged by what is there.
- The length of the answers, the order in which they stand, and their names do not count.

Explain your choice in a few sentences. Then write your verdict, [[A]] or [[B]], on the last line.

<conversation>
{conversation}
</conversation>

<A>
{first}
</A>

<B>
{second}
</B>

"""
OPENAI = "https://api.openai.com/v1"


def files_or_models(text):
    """An option that takes several words."""
    return dataclasses.field(default_factory=list, metadata={"help": text})


@dataclasses.dataclass
class OneSource(q.Config):
    """The options of training, where all prompts come from --data."""

    eval_data: str | None = q.option(None, "Refused here: prompts are drawn from --data")
    eval_samples: int = q.option(100, "Prompts drawn from --data")


@dataclasses.dataclass
class Settings(OneSource):
    """Those of training, which need no model where answers are there already."""

    model: str | None = q.option(None, "Model to compare, a hub id or a folder")
    output_dir: str = q.option("out/evaluation", "Folder for what is written")
    trust_remote_code: bool = q.option(False, "Run code of the reward model's repository")


@dataclasses.dataclass
class Evaluation:
    """Options of this command, beside those of training."""

    against: list[str] = files_or_models("Models to compare --model with, NAME or NAME+principle.")
    all_pairs: bool = q.option(False, "Compare each of all these with every other", "table 1")
    verdicts: list[str] = files_or_models("Files of verdicts to take together; asks no judge.")
    judge: bool = q.option(True, "Ask a judge; with --no_judge, --reward_model compares alone")
    judge_url: str = q.option(OPENAI, "OpenAI-compatible server; $OPENAI_API_KEY is its key")
    judge_model: str = q.option("gpt-4-turbo", "The judge's name there", "app. B")
    judge_template: str | None = q.option(None, "File with another request to the judge")
    judge_both_orders: bool = q.option(False, "Ask twice; verdicts that differ are a tie")
    reward_model: str | None = q.option(None, "Sequence classifier that scores answers", "fig. 6")
    run: str | None = q.option(None, "Run whose held-out answers --reward_model scores", "fig. 6")


def prepare(cfg):
    """Refuse what does nothing here: ranks and --eval_data. Make the output folder."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    q.check(alone, "this is a single process: start it with python -m, not with deepspeed")
    q.check(cfg.eval_data is None, "--eval_data: name it as --data, from which prompts come here")
    with q.as_user_error(f"--output_dir {cfg.output_dir}", OSError):
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)


# ------------------------------------------------------------------------------------- Responses --


def config_of(cfg, name):
    """The settings with which a model is asked that may be named NAME+principle."""
    model = name.removesuffix("+principle")
    return dataclasses.replace(cfg, model=model, negative_model=None, positive_model=None)


def shown_prompts(cfg, name, prompts):
    """The prompts as a model is shown them that may be named NAME+principle."""
    own = config_of(cfg, name)
    if name == own.model:
        return prompts
    chat = q.Chat(q.load_tokenizer(own), own.principle)
    return [chat.with_principle(prompt) for prompt in prompts]


def responses_file(cfg, name, prompts):
    """Where the samples of a model are kept, in a file named after all that they depend on."""
    own = config_of(cfg, name)
    weights = sorted(Path(own.model).glob("*.safetensors"))
    files = [(str(path), path.stat().st_mtime) for path in weights]
    template = q.load_tokenizer(own).chat_template
    cause = [own.model, own.dtype, files, own.temperature, own.max_new_tokens, own.seed, template]
    key = zlib.crc32(json.dumps([cause, shown_prompts(cfg, name, prompts)]).encode())
    return Path(own.output_dir, "responses", f"{key:08x}.json")


def responses(cfg, name, prompts):
    """The samples of a model, NAME or NAME+principle. They are drawn once, and then read."""
    own = config_of(cfg, name)
    path = responses_file(cfg, name, prompts)
    if not path.exists():
        q.say(f"{name} responds to {len(prompts)} prompts")
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(".new")
        shown = shown_prompts(cfg, name, prompts)
        new.write_text(json.dumps({"cfg": dataclasses.asdict(own), "prompts": shown}))
        # vLLM gives a GPU's memory back only when its process ends, so it gets one of its own.
        command = [sys.executable, "-m", "experiments.evaluate", "respond", str(new)]
        subprocess.run(command, check=True)
        new.replace(path)
    return [q.Sample(**sample) for sample in json.loads(path.read_text())]


def respond(path):
    """The process that samples: put responses in the place of the request in a file."""
    PR_SET_PDEATHSIG = 1  # from linux/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die when the parent dies
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the parent, too, which explains
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("vllm").setLevel("ERROR")  # Until the engine is built, vLLM sets no level.
    request = json.loads(Path(path).read_text())
    cfg = Settings(**request["cfg"])
    q.join_ranks()
    # Where a principle is to be shown, the prompt has it.
    chat = q.Chat(q.load_tokenizer(cfg), None)
    sampler = q.Sampler(cfg, chat)
    sampler.load(None)  # those on disk
    samples = sampler.sample(request["prompts"], "evaluation")
    Path(path).write_text(json.dumps([dataclasses.asdict(sample) for sample in samples]))


# ------------------------------------------------------------------------------------- The judge --


def read_template(ev):
    """The request to the judge, with {conversation}, {first} and {second} to be filled in."""
    if not ev.judge_template:
        return JUDGE
    place = f"--judge_template {ev.judge_template}"
    with q.as_user_error(f"{place}: cannot be read", OSError, ValueError):
        template = Path(ev.judge_template).read_text()
    for part in ("{conversation}", "{first}", "{second}"):
        q.check(part in template, f"{place}: without {part}")
    return template


def prompts_of(cfg, chat):
    """(prompt, record) of all records of --data whose prompt fits, in their order."""
    for place, record in q.read_records(cfg.data, "test"):
        needs = f"{place}: a record needs 'prompt', 'messages', or 'chosen' and 'rejected'"
        with q.as_user_error(needs, KeyError, TypeError, AttributeError, ValueError):
            prompt = q.prompt_of(record)
        with contextlib.suppress(q.UserError):
            yield chat.shorten(prompt, cfg.max_prompt_tokens), record


def fits(prompt, chat, limit):
    """Whether a model can be shown the prompt as it is."""
    try:
        return chat.shorten(prompt, limit) == prompt
    except q.UserError:
        return False


def draw(cfg, names):
    """Prompts that are short enough for every model, and their records."""
    chats = []
    for model in dict.fromkeys(config_of(cfg, name).model for name in names):
        chats.append(q.Chat(q.load_tokenizer(config_of(cfg, model)), cfg.principle))

    distinct, limit = {}, cfg.max_prompt_tokens
    for prompt, record in prompts_of(cfg, chats[0]):
        distinct.setdefault(json.dumps(prompt), (prompt, record))
    pairs = list(distinct.values())
    for chat in chats:
        pairs = [pair for pair in pairs if fits(pair[0], chat, limit)]
    short = "no prompt is as short as that for every model"
    q.check(pairs, f"--max_prompt_tokens {limit}: {short}")
    count = min(cfg.eval_samples, len(pairs))
    drawn = random.Random(cfg.seed).sample(pairs, count)
    for _, record in drawn:
        category = record.get("category")
        one = not isinstance(category, (list, dict))
        q.check(one, f"{cfg.data}: a category has to be a text, not {category!r:.80}")
    return [prompt for prompt, _ in drawn], [record for _, record in drawn]


def make_games(cfg, ev, template, prompts, records, texts):
    """For every prompt, a game of --model, a, against each of --against, b; with --all_pairs, of
    each of these models against every other. The key of a game is that of the verdict in
    verdicts.jsonl, and stands for all that the verdict depends on."""
    pairs = [(cfg.model, b) for b in ev.against]
    if ev.all_pairs:
        pairs = list(itertools.combinations([cfg.model, *ev.against], 2))
    games = []
    for i, prompt in enumerate(prompts):
        for a, b in pairs:
            game = {
                "index": i,
                "category": records[i].get("category"),
                "a": a,
                "b": b,
                "text_a": texts[a][i],
                "text_b": texts[b][i],
                "conversation": "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt),
            }
            if ev.judge_both_orders:
                game["first"] = "both"
            else:
                game["first"] = random.Random(f"{cfg.seed}/{i}/{a}/{b}").choice("ab")
            cause = json.dumps([game, ev.judge_model, template])
            game["key"] = f"{zlib.crc32(cause.encode()):08x}"
            games.append(game)
    return games


def check_key(ev):
    """Refuse to ask OpenAI without a key. Other servers may ask for none."""
    has_key = os.environ.get("OPENAI_API_KEY") or ev.judge_url != OPENAI
    q.check(has_key, "OPENAI_API_KEY is not set, and the judge needs it: see --judge_url")


def ask(client, ev, template, game, first):
    """The winner, "a", "b" or "none", when the answer of `first` stands first; and the reply."""
    from openai import BadRequestError

    second = {"a": "b", "b": "a"}[first]
    parts = {
        "conversation": game["conversation"],
        "first": game[f"text_{first}"],
        "second": game[f"text_{second}"],
    }
    # In one pass, so that braces inside an answer stay as they are.
    text = re.sub(r"\{(conversation|first|second)\}", lambda match: parts[match[1]], template)
    wrong = f"--judge_url {ev.judge_url}: no chat completion; what is judged is kept"
    with q.as_user_error(wrong, AttributeError, LookupError, TypeError, ValueError):
        try:
            completion = client.chat.completions.create(
                model=ev.judge_model, messages=[{"role": "user", "content": text}]
            )
        except BadRequestError as error:  # from a content filter, or for the length, say
            return "none", str(error)
        reply = completion.choices[0].message.content or ""
        verdicts = re.findall(r"\[\[([AB])\]\]", reply)
    if not verdicts:
        return "none", reply
    return {"A": first, "B": second}[verdicts[-1]], reply


def play(client, ev, template, game):
    """The verdict on a game: a line of verdicts.jsonl."""
    orders = "ab" if game["first"] == "both" else game["first"]
    winners, replies = [], []
    for first in orders:
        winner, reply = ask(client, ev, template, game, first)
        winners.append(winner)
        replies.append(reply)
    if "none" in winners:
        winner = "none"
    elif len(set(winners)) > 1:
        winner = "tie"
    else:
        winner = winners[0]
    line = {key: game[key] for key in ("index", "category", "a", "b", "first", "key")}
    return {**line, "winner": winner, "reply": "\n\n".join(replies)}


def judge(ev, template, games, path):
    """Ask for a verdict on every game, eight at a time, and add each to a file at once."""
    import openai
    from tqdm import tqdm

    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=ev.judge_url, api_key=key, max_retries=5, timeout=120)

    def play_and_note(game):
        verdict = play(client, ev, template, game)
        with open(path, "a") as file:
            file.write(json.dumps(verdict) + "\n")

    try:
        with ThreadPoolExecutor(8) as pool:
            # The first error ends the loop, and cancels the games that have not begun.
            for _ in tqdm(pool.map(play_and_note, games), "Judging", len(games)):
                pass
    except openai.OpenAIError as error:
        message = f"--judge_url {ev.judge_url}: {error!r}; what is judged is kept"
        raise q.UserError(message) from error


def verdicts_on(ev, template, games, path):
    """The verdicts on all games, of which only those that are not in the file yet are asked for.
    The file keeps those of other evaluations, too."""
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # A kill may leave half a line.
    known = {verdict["key"] for verdict in read_jsonl(path) if verdict["winner"] != "none"}
    open_games = [game for game in games if game["key"] not in known]
    if open_games:
        check_key(ev)
        judge(ev, template, open_games, path)
    found = {verdict["key"]: verdict for verdict in read_jsonl(path)}
    verdicts = [found[game["key"]] for game in games]
    failed = f"no verdict on any game, the first reply is {verdicts[0]['reply']!r:.300}"
    judged = any(verdict["winner"] != "none" for verdict in verdicts)
    q.check(judged, f"--judge_model {ev.judge_model}: {failed}")
    return verdicts


# --------------------------------------------------------------------------------------- Figures --


def win_rate(verdicts):
    """Wins of a, ties and losses, and its win rate, for which a tie is half a win, with a 95 %
    interval after Wilson. The last two are None where nothing was judged."""
    counts = collections.Counter(verdict["winner"] for verdict in verdicts)
    record = {
        "win": counts["a"],
        "tie": counts["tie"],
        "lose": counts["b"],
        "no_verdict": counts["none"],
        "win_rate": None,
        "ci95": None,
    }
    n = counts["a"] + counts["tie"] + counts["b"]
    if n > 0:
        points = counts["a"] + counts["tie"] / 2
        record["win_rate"] = points / n
        record["ci95"] = list(interval(points, n))
    return record


def seen_from(verdict, a):
    """The verdict with a model as its a, whichever of the two it is there."""
    if verdict["a"] == a:
        return verdict
    winner = {"a": "b", "b": "a"}.get(verdict["winner"], verdict["winner"])
    return {**verdict, "a": a, "b": verdict["a"], "winner": winner}


def win_rates(verdicts):
    """The win rate of one model against the other, for every two models that have met."""
    games = {}
    for verdict in verdicts:
        a, b = verdict["a"], verdict["b"]
        if (b, a) in games:
            a, b = b, a
        games.setdefault((a, b), []).append(seen_from(verdict, a))
    return [{"a": a, "b": b, **win_rate(own)} for (a, b), own in games.items()]


def composite(verdicts):
    """The win rate of every model over its games with all others."""
    result = {}
    for name in models_of(verdicts):
        own = [seen_from(v, name) for v in verdicts if name in (v["a"], v["b"])]
        result[name] = win_rate(own)
    return result


def models_of(verdicts):
    """The names in verdicts, each once."""
    return list(
        dict.fromkeys(name for verdict in verdicts for name in (verdict["a"], verdict["b"]))
    )


def play_elo(games, names, k):
    """Ratings before, between and after the games (a, b, points of a), played in their order."""
    ratings = dict.fromkeys(names, 1000.0)
    yield ratings
    for a, b, score in games:
        expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
        gain = k * (score - expected)
        ratings[a] += gain
        ratings[b] -= gain
        yield ratings


def elo(verdicts, rounds=1000, k=4):
    """Elo ratings, from 1000. Each is the mean over random orders of play, because a single order
    misleads. Its 95 % interval is over games that are drawn anew, with replacement. Also the
    progress: the numbers of games after which we look, and the mean ratings at those points."""
    points = {"a": 1.0, "tie": 0.5, "b": 0.0}
    judged = [v for v in verdicts if v["winner"] in points]
    games = [(v["a"], v["b"], points[v["winner"]]) for v in judged]
    names, rng = models_of(judged), random.Random(0)
    looks = sorted({round(len(games) * i / 40) for i in range(41)})
    sums = {name: [0.0] * len(looks) for name in names}
    redrawn = {name: [] for name in names}
    for _ in range(rounds):
        seen = 0
        for n, ratings in enumerate(play_elo(rng.sample(games, len(games)), names, k)):
            if n == looks[seen]:
                for name in names:
                    sums[name][seen] += ratings[name] / rounds
                seen = min(seen + 1, len(looks) - 1)
        *_, last = play_elo(rng.choices(games, k=len(games)), names, k) if games else ({},)
        for name in names:
            redrawn[name].append(last[name])

    ratings = {}
    for name in names:
        ordered = sorted(redrawn[name])
        limits = [ordered[round(share * (rounds - 1))] for share in (0.025, 0.975)]
        ratings[name] = {"elo": sums[name][-1], "ci95": limits}
    return ratings, {"games": looks, "elo": sums}


# ------------------------------------------------------------------------------ The reward model --


def check_reward_model(cfg, name):
    """Before any model is loaded: the reward model can be found, and gives one number."""
    from transformers import AutoConfig

    place = f"--reward_model {name}"
    with q.as_user_error(f"{place}: no model folder or hub id that loads", OSError, ValueError):
        config = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    outputs = config.num_labels
    q.check(outputs == 1, f"{place}: has {outputs} outputs, a reward model has 1")


class RewardModel:
    """Scores of conversations that end with an answer."""

    def __init__(self, cfg, name):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.budget, how = cfg.micro_batch_tokens, {"trust_remote_code": cfg.trust_remote_code}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left", **how)
        dtype = getattr(torch, cfg.dtype)
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, **how)
        self.model = model.to(self.device).eval()

    def ids(self, turns):
        """Token ids of a conversation, in the model's chat format or in HH-RLHF's."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            special = False  # The template has written them.
        else:
            names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
            text = "".join(names.get(turn["role"], "") + turn["content"] for turn in turns)
            special = True
        return self.tokenizer(text, add_special_tokens=special, truncation=True)["input_ids"]

    @torch.no_grad()
    def __call__(self, prompts, texts):
        """The score of every text as the answer to its prompt, in batches of similar length."""
        rows = []
        for prompt, text in zip(prompts, texts, strict=True):
            rows.append(self.ids([*prompt, {"role": "assistant", "content": text}]))
        scores = [math.nan] * len(rows)
        for (batch,) in q.deal([len(row) for row in rows], 1, self.budget):
            own = [rows[i] for i in batch]
            # The model scores the last token that is not this one.
            pad = padding_for(own, self.tokenizer.pad_token_id)
            self.model.config.get_text_config().pad_token_id = pad
            length = max(map(len, own))
            ids = torch.tensor([row + [pad] * (length - len(row)) for row in own])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in own])
            out = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device)
            ).logits
            for i, score in zip(batch, out.float().reshape(-1).tolist(), strict=True):
                scores[i] = score
        return scores


def padding_for(rows, usual):
    """A token to pad rows with that ends none of them: the usual one, if that is so. Where the end
    token pads, which is common, a row that ends with it would be scored one token too early."""
    ends = {row[-1] for row in rows}
    if usual is not None and usual not in ends:
        return usual
    return next(token for token in itertools.count() if token not in ends)


def rewards(scores, first):
    """The mean score of every model's answers (figure 6), and its increment over that of the first
    of --against in standard deviations of the latter's scores, with a 95 % interval. The answers
    are to the same prompts, so the interval is that of the mean of their differences."""
    spread = statistics.pstdev(scores[first])
    result = {}
    for name, values in scores.items():
        mean, increment, ci95 = statistics.fmean(values), None, None
        if spread > 0:
            gains = [(x - y) / spread for x, y in zip(values, scores[first], strict=True)]
            increment = statistics.fmean(gains)
            half = 1.96 * statistics.pstdev(gains) / math.sqrt(max(1, len(gains) - 1))
            ci95 = [increment - half, increment + half]
        result[name] = {"mean": mean, "increment": increment, "ci95": ci95}
    return result


# ----------------------------------------------------------------------------------- A whole run --


def held_out_samples(run):
    """The samples of every samples/held-out-*.jsonl of a run, by epoch. They answer the same
    prompts."""
    samples = {}
    for path in sorted(Path(run, "samples").glob("held-out-*.jsonl")):
        samples[int(path.stem.removeprefix("held-out-"))] = read_jsonl(path)
    q.check(samples.get(0), f"--run {run}: no answers in samples/held-out-000.jsonl")
    prompts = [sample["messages"] for sample in samples[0]]
    for epoch, own in samples.items():
        same = [sample["messages"] for sample in own] == prompts
        q.check(
            same, f"--run {run}: the held-out prompts of epoch {epoch} are not those of epoch 0"
        )
    return samples


def score_run(cfg, ev):
    """Figure 6 from one run: the increment of the mean reward over that of epoch 0, in standard
    deviations of the latter's scores, after every epoch. Leaves rewards.json and rewards.svg."""
    q.check(ev.reward_model, "--run: name the --reward_model that scores its held-out answers")
    samples = held_out_samples(ev.run)
    model, scores = RewardModel(cfg, ev.reward_model), {}
    for epoch, own in samples.items():
        q.say(f"Scoring {len(own)} answers of epoch {epoch}")
        texts = [sample["response"] for sample in own]
        scores[epoch] = model([sample["messages"] for sample in own], texts)
    n, result = len(samples[0]), rewards(scores, 0)
    rows = [{"epoch": epoch, **row} for epoch, row in result.items()]
    whole = {"run": ev.run, "reward_model": ev.reward_model, "prompts": n, "epochs": rows}
    path = Path(cfg.output_dir, "rewards.json")
    path.write_text(json.dumps(whole, indent=2) + "\n")
    q.say(
        f"\nReward of {n} held-out answers, and its increment over epoch 0 in standard deviations"
    )
    q.say("  epoch      mean  increment, 95 % interval")
    for row in rows:
        increment, low, high = numbers(row["increment"], row["ci95"])
        limits = f"({low:+.3f} to {high:+.3f})"
        q.say(f"  {row['epoch']:5} {row['mean']:9.4f}  {increment:+.3f} {limits}")
    picture = path.with_suffix(".svg")
    draw_rewards(rows, f"{n} held-out answers", picture)
    q.say(f"Written: {path} and {picture}")


# -------------------------------------------------------------------------------------- Pictures --


def new_picture():
    """A figure and its axes."""
    return start_drawing().subplots(figsize=(7, 4), layout="constrained")


def draw_rewards(rows, title, path):
    """The curve of figure 6, with its intervals."""
    figure, axes = new_picture()
    known = [row for row in rows if row["increment"] is not None]
    epochs, increments = ([row[key] for row in known] for key in ("epoch", "increment"))
    low, high = ([row["ci95"][i] for row in known] for i in (0, 1))
    axes.fill_between(epochs, low, high, alpha=0.2)
    axes.plot(epochs, increments, marker="o")
    axes.set(title=title, xlabel="epochs of training", ylabel="increment of the reward (sd)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    save_picture(figure, path)


def draw_elo(ratings, progress, path):
    """Elo over the games played, and the interval of the last ratings."""
    figure, axes = new_picture()
    for i, (name, row) in enumerate(ratings.items()):
        (line,) = axes.plot(progress["games"], progress["elo"][name], label=name)
        # Side by side, so that all of them can be seen.
        place = progress["games"][-1] * (1.02 + 0.015 * i)
        axes.vlines(place, *row["ci95"], color=line.get_color(), linewidth=2)
    axes.set(xlabel="games", ylabel="Elo, mean over random orders of play")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    save_picture(figure, path)


# ----------------------------------------------------------------------------------- The command --


def evaluate(cfg, ev):
    """One of the three commands. All write evaluation.json into the output folder, but for --run,
    which writes rewards.json."""
    prepare(cfg)
    if ev.reward_model:
        check_reward_model(cfg, ev.reward_model)
    if ev.run:
        score_run(cfg, ev)
    elif ev.verdicts:
        tell(cfg, tally(read_verdicts(ev.verdicts)))
    else:
        compare(cfg, ev)


def compare(cfg, ev):
    """Compare --model with each of --against, and with --all_pairs these with one another. Leaves
    verdicts.jsonl, which --verdicts reads, and evaluation.json."""
    q.check(cfg.model, "--model: name a model to compare, or see --verdicts and --run")
    q.check(ev.against, "--against: name at least one model to compare --model with")
    q.check(ev.judge or ev.reward_model, "--no_judge: then name a --reward_model")
    template = read_template(ev)
    names = list(dict.fromkeys([cfg.model, *ev.against]))
    q.check(len(names) == 1 + len(ev.against), "--against: name every model once, --model not")
    prompts, records = draw(cfg, names)
    if ev.judge and not all(responses_file(cfg, name, prompts).exists() for name in names):
        check_key(ev)  # Now, not after hours of sampling.
    texts = {}
    for name in names:
        texts[name] = [sample.response for sample in responses(cfg, name, prompts)]

    result = {}
    if ev.judge:
        games = make_games(cfg, ev, template, prompts, records, texts)
        path = Path(cfg.output_dir, "judged.jsonl")
        verdicts = verdicts_on(ev, template, games, path)
        write_jsonl(path.with_name("verdicts.jsonl"), verdicts)
        result = tally(verdicts)
    if ev.reward_model:
        model = RewardModel(cfg, ev.reward_model)
        scores = {name: model(prompts, own) for name, own in texts.items()}
        result["reward"] = rewards(scores, ev.against[0])
    tell(cfg, result)


def read_verdicts(files):
    """The verdicts of several verdicts.jsonl files, each once."""
    verdicts = {}
    for file in files:
        wrong = f"--verdicts {file}: not a verdicts.jsonl file"
        with q.as_user_error(wrong, OSError, ValueError, KeyError, TypeError):
            for verdict in read_jsonl(file):
                own = {name: verdict[name] for name in ("category", "a", "b", "winner")}
                verdicts[verdict["key"], own["a"], own["b"]] = own
    q.check(verdicts, f"--verdicts {', '.join(files)}: without a verdict")
    return list(verdicts.values())


def tally(verdicts):
    """What evaluation.json holds of verdicts."""
    ratings, progress = elo(verdicts)
    result = {"pairs": win_rates(verdicts), "composite": composite(verdicts)}
    result |= {"elo": ratings, "elo_progress": progress, "categories": {}}
    for category in dict.fromkeys(verdict["category"] for verdict in verdicts):
        if category:
            part = [verdict for verdict in verdicts if verdict["category"] == category]
            own = {"pairs": win_rates(part), "composite": composite(part)}
            result["categories"][category] = own
    return result


def numbers(value, ci95):
    """A figure and its interval, nan where there is none."""
    return (math.nan,) * 3 if value is None else (value, *ci95)


def say_win_rates(rows):
    """Rows of (names, record)."""
    for names, row in rows:
        counts = " ".join(f"{row[key]:4}" for key in ("win", "tie", "lose", "no_verdict"))
        rate, low, high = numbers(row["win_rate"], row["ci95"])
        q.say(f"  {names:50.50} {counts}  {rate:.3f} ({low:.3f} to {high:.3f})")


def tell(cfg, result):
    """Write evaluation.json and elo.svg, and print what they hold."""
    path = Path(cfg.output_dir, "evaluation.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    parts = {}
    if "pairs" in result:
        parts = {"All prompts": result, **result["categories"]}
    for title, part in parts.items():
        q.say(f"\n{title:52}  win  tie lose none  win rate, 95 % interval")
        say_win_rates((f"{row['a']} : {row['b']}", row) for row in part["pairs"])
        if len(part["composite"]) > 2:
            say_win_rates((f"{name} : all others", row) for name, row in part["composite"].items())

    if result.get("elo"):
        picture = path.with_name("elo.svg")
        draw_elo(result["elo"], result["elo_progress"], picture)
        games = result["elo_progress"]["games"][-1]
        q.say(f"\nElo after {games} games, 95 % interval; its progress: {picture}")
        by_rating = sorted(result["elo"].items(), key=lambda item: item[1]["elo"], reverse=True)
        for name, row in by_rating:
            low, high = row["ci95"]
            q.say(f"  {name:50.50} {row['elo']:4.0f} ({low:.0f} to {high:.0f})")

    if "reward" in result:
        q.say("\nReward, and its increment in standard deviations, 95 % interval")
        for name, row in result["reward"].items():
            increment, low, high = numbers(row["increment"], row["ci95"])
            limits = f"({low:+.3f} to {high:+.3f})"
            q.say(f"  {name:50.50} {row['mean']:.3f} {increment:+.3f} {limits}")
    q.say(f"Written: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["respond"]:
        respond(sys.argv[2])
    else:
        q.main(evaluate, (Settings, Evaluation))
