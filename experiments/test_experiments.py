# SPDX-License-Identifier: MIT
"""Tests of what is in this folder: python -m pytest experiments, or ./run.sh test.

They take helpers, a random model and the oracles of the method from test_inverse_q.py.
"""

import ast
import collections
import contextlib
import copy
import dataclasses
import fcntl
import functools
import html.parser
import http.server
import json
import math
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import types
import warnings
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import psutil
import pytest
import torch

import inverse_q as q
import test_inverse_q as t
from experiments import ablations, bench, credit, evaluate, plot, tiny_world

HERE = t.HERE


@pytest.fixture(scope="session")
def tokenizer():
    return t.make_tokenizer()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return t.make_toy(tmp_path_factory.mktemp("toy"))


# Forked processes find what the commands of this folder need imported already.
t.FORKS.set_forkserver_preload([*t.PRELOAD.split(), "experiments.test_experiments"])


def run_module(name, words, environment):
    """What python -m NAME runs."""
    warnings.simplefilter("ignore", RuntimeWarning)  # It runs anew, though it is imported.
    os.environ.update(environment)
    sys.argv = [f"{name.split('.')[-1]}.py", *words]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def start(name, *words, **environment):
    """A command of this folder, in a forked process."""
    return t.Job(1, run_module, f"experiments.{name}", list(map(str, words)), environment)


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Begin with what takes long and wants no attention: it goes on beside the quick tests."""
    wanted = {name for test in request.session.items for name in test.fixturenames}
    for name in {"main_job", "judge_server", "credit_page"} & wanted:
        request.getfixturevalue(name)


def svg_texts(path):
    """The texts in a picture, which has to be well-formed."""
    root = xml.etree.ElementTree.parse(path).getroot()
    return ["".join(element.itertext()).strip() for element in root.iter() if "text" in element.tag]


# ---------------------------------------------------------------------- Win rate, Elo, the judge --


def verdict(winner, b="x"):
    return {"a": "ours", "b": b, "winner": winner}


def test_win_rate_and_its_interval():
    winners = ["a"] * 60 + ["b"] * 40 + ["none"] * 7
    record = evaluate.win_rate([verdict(winner) for winner in winners])
    counts = [record[key] for key in ("win", "tie", "lose", "no_verdict")]
    assert counts == [60, 0, 40, 7]
    assert record["win_rate"] == 0.6
    # Wilson's interval of 60 in 100, from the literature.
    assert record["ci95"] == pytest.approx([0.5020, 0.6906], abs=1e-4)
    assert evaluate.win_rate([verdict("tie"), verdict("a")])["win_rate"] == 0.75
    assert evaluate.win_rate([verdict("none")])["ci95"] is None


def test_elo_by_hand_and_in_the_limit():
    one, progress = evaluate.elo([verdict("a")], k=32)  # 1000 + 32 (1 - 1/2)
    assert one["ours"] == {"elo": pytest.approx(1016), "ci95": [1016.0, 1016.0]}
    assert one["x"]["elo"] == pytest.approx(984)
    assert progress["games"] == [0, 1]
    assert progress["elo"]["x"] == pytest.approx([1000, 984])
    assert evaluate.elo([verdict("tie")])[0]["x"]["elo"] == pytest.approx(1000)
    assert evaluate.elo([verdict("none")])[0] == {}
    games = [verdict("a")] * 1500 + [verdict("b")] * 500  # 3 to 1: 400 log10 3 = 191 points
    random.Random(0).shuffle(games)
    ratings, progress = evaluate.elo(games, rounds=50)
    difference = ratings["ours"]["elo"] - ratings["x"]["elo"]
    assert difference == pytest.approx(400 * math.log10(3), abs=8)
    low, high = ratings["ours"]["ci95"]
    assert low < ratings["ours"]["elo"] < high
    assert sum(rating["elo"] for rating in ratings.values()) == pytest.approx(2000)

    # The progress goes from 1000 to these ratings, and the first games move them most.
    ours, looks = progress["elo"]["ours"], progress["games"]
    assert looks[0] == 0 and looks[-1] == 2000 and len(looks) == len(ours) == 41
    assert ours[0] == pytest.approx(1000) and ours[-1] == ratings["ours"]["elo"]
    assert ours[10] - ours[0] > 0.5 * (ours[-1] - ours[0])


def test_verdicts_count_alike_whichever_model_is_a_and_in_any_order():
    games = [verdict("a")] * 3 + [{"a": "x", "b": "ours", "winner": "a"}] + [verdict("tie", "y")]
    pairs = evaluate.win_rates(games)
    assert [(p["a"], p["b"], p["win"], p["tie"], p["lose"]) for p in pairs] == [
        ("ours", "x", 3, 0, 1),
        ("ours", "y", 0, 1, 0),
    ]
    more = [verdict("a", "x")] * 30 + [verdict("b", "y")] * 30 + [verdict("a", "y")] * 10
    (forwards, _), (backwards, _) = evaluate.elo(more), evaluate.elo(more[::-1])
    for name in forwards:
        assert forwards[name]["elo"] == pytest.approx(backwards[name]["elo"], abs=1)
    composite = evaluate.composite(games)
    counts = {name: (row["win"], row["tie"], row["lose"]) for name, row in composite.items()}
    assert counts == {"ours": (3, 1, 1), "x": (1, 0, 3), "y": (0, 1, 0)}
    assert composite["ours"]["win_rate"] == 0.7


class Judge(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says what `reply` makes of the request: a text, or (status,
    body)."""

    reply = None
    asked = []  # noqa: RUF012

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][0]["content"]
        self.asked.append(text)
        said = type(self).reply(text)
        if not isinstance(said, tuple):
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            said = 200, json.dumps({**answer, "choices": [choice]})
        status, body = said
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if "<" in body else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def first_wins(text):
    return "The first.\n[[A]]"


def ours_wins(text):
    _, second = re.findall(r"^by (\S+)$", text, re.MULTILINE)
    return "[[A]] or [[B]]?\n" + ("[[B]]" if second == "ours" else "[[A]]")


def ours_loses(text):
    first, _ = re.findall(r"^by (\S+)$", text, re.MULTILINE)
    return "[[B]]" if first == "ours" else "[[A]]"


@pytest.fixture
def judged(monkeypatch, tokenizer, tmp_path):
    """evaluate() on n prompts, with a scripted judge and responses that are made up. Returns
    evaluation.json and how often the judge was asked."""
    # The judge is asked from many threads, and a connection that finds the queue full waits 1 s.
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 99)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def load_tokenizer(cfg):
        return copy.deepcopy(tokenizer)

    def responses(cfg, name, prompts):
        return [types.SimpleNamespace(response=f"by {name}") for _ in prompts]

    monkeypatch.setenv("OPENAI_API_KEY", "SECRET")
    monkeypatch.setattr(q, "load_tokenizer", load_tokenizer)
    monkeypatch.setattr(evaluate, "responses", responses)

    def run(reply, against=("x", "x+principle"), n=80, **options):
        Judge.reply = staticmethod(reply)
        Judge.asked.clear()
        records = []
        for i in range(n):
            records.append({"prompt": f"question {i}", "category": "odd" if i % 2 else "even"})
        tiny_world.write_jsonl(tmp_path / "data.jsonl", records)
        files = {"data": str(tmp_path / "data.jsonl"), "output_dir": str(tmp_path)}
        size = {"dtype": "float32", "eval_samples": n}
        cfg = evaluate.Settings(model="ours", principle="P.", **files, **size)
        url = f"http://127.0.0.1:{server.server_port}/v1"
        options = {"judge_url": url, **options}
        evaluate.evaluate(cfg, evaluate.Evaluation(against=list(against), **options))
        return json.loads((tmp_path / "evaluation.json").read_text()), len(Judge.asked)

    yield run
    server.shutdown()


def test_a_judge_that_favours_the_first_place_is_evened_out(judged, tmp_path):
    result, asked = judged(first_wins)
    assert asked == 160
    assert [pair["b"] for pair in result["pairs"]] == ["x", "x+principle"]
    for pair in result["pairs"]:
        low, high = pair["ci95"]
        assert low < 0.5 < high
        assert pair["win"] + pair["lose"] == 80 and pair["a"] == "ours"
    for v in t.read_jsonl(tmp_path / "verdicts.jsonl"):
        assert v["winner"] == v["first"] and v["reply"] == "The first.\n[[A]]"
    assert sorted(result["categories"]) == ["even", "odd"]
    for part in result["categories"].values():
        assert sum(pair["win"] + pair["lose"] for pair in part["pairs"]) == 80

    result, asked = judged(first_wins, judge_both_orders=True)
    assert asked == 320
    assert [pair["tie"] for pair in result["pairs"]] == [80, 80]
    for rating in result["elo"].values():
        assert rating["elo"] == pytest.approx(1000)


def test_the_better_answer_wins_wherever_it_stands(judged, capsys):
    result, _ = judged(ours_wins)
    assert [pair["win_rate"] for pair in result["pairs"]] == [1, 1]
    assert result["elo"]["ours"]["elo"] > 1040
    assert all("question" in text and "user:" in text for text in Judge.asked)
    assert "  80    0    0    0  1.000 (0.954 to 1.000)" in capsys.readouterr().out

    judged(ours_loses, judge_model="another")
    assert "   0    0   80    0  0.000 (0.000 to 0.046)" in capsys.readouterr().out


def test_a_game_without_a_verdict_is_asked_for_again(judged, tmp_path):
    """A filter refuses one prompt for ever, and once the judge says nothing about another."""

    def refused(text):
        return 400, '{"error": {"message": "flagged"}}'

    def filtered(text):
        return refused(text) if "question 3\n" in text else "[[A]]"

    def silent_once(text):
        return None if "question 7\n" in text else filtered(text)

    for reply, expected, none in ((silent_once, 20, 2), (filtered, 2, 1), (filtered, 1, 1)):
        result, asked = judged(reply, against=["x"], n=20)
        assert asked == expected and result["pairs"][0]["no_verdict"] == none
    for verdict in t.read_jsonl(tmp_path / "verdicts.jsonl"):
        assert ("flagged" in verdict["reply"]) == (verdict["winner"] == "none")

    # What refuses everything is a mistake, of the model's name say. Nothing counts as judged.
    for reply, said in ((refused, "flagged"), (lambda text: None, "''")):
        with pytest.raises(q.UserError, match=f"judge_model m2: no verdict on any game.*{said}"):
            judged(reply, n=20, judge_model="m2")
    _, asked = judged(first_wins, n=20, judge_model="m2")
    assert asked == 40


@pytest.mark.parametrize(
    "body", ["<html>", '{"choices": []}', '{"error": {"message": "no"}}', '{"id": "x", choi', "[]"]
)
def test_what_is_no_completion_is_a_user_error(judged, body):
    with pytest.raises(q.UserError, match=r"judge_url http.*no chat completion; what is judged"):
        judged(lambda text: (200, body), n=20)


def test_an_evaluation_goes_on_where_it_was(judged, tmp_path):
    judged(first_wins, n=20)
    path = tmp_path / "judged.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:15]) + '{"index": 3, "ca')  # killed while it wrote
    result, asked = judged(lambda text: "[[B]]", n=20)
    assert asked == 25
    assert sum(pair["win"] + pair["lose"] for pair in result["pairs"]) == 40
    _, asked = judged(first_wins, n=20)
    assert asked == 0

    # What the verdicts depend on has changed: all are asked for again.
    _, asked = judged(first_wins, n=20, judge_model="another judge")
    assert asked == 40

    # Those of before are kept, but are no verdicts of this evaluation.
    assert len(path.read_text().splitlines()) == 80
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 40
    assert judged(first_wins, n=20)[1] == 0
    for text in ("{conversation} {first} or {second}?", "{conversation} {second} or {first}?"):
        template = t.write(tmp_path / "template.txt", text)
        _, asked = judged(first_wins, n=20, judge_template=template)
        assert asked == 40


def test_prompts_that_are_too_long_for_one_of_the_models_are_left_out(
    judged, tokenizer, monkeypatch
):
    """The template of one of them is far longer for some questions."""
    condition = "'WHICH' in messages[-1].content"
    long = f"{{% if {condition} %}}{{{{ 'Gladly! ' * 1000 }}}}{{% endif %}}" + t.CHAT_TEMPLATE
    templates = {"ours": t.CHAT_TEMPLATE, "x": long.replace("WHICH", "1")}

    def load_tokenizer(cfg):
        own = copy.deepcopy(tokenizer)
        own.chat_template = templates[cfg.model]
        return own

    monkeypatch.setattr(q, "load_tokenizer", load_tokenizer)
    judged(first_wins, against=["x"])
    asked = re.findall(r"question (\d+)", "".join(Judge.asked))
    short = [i for i in range(80) if "1" not in str(i)]
    assert sorted(map(int, asked)) == short
    templates["x"] = long.replace("WHICH", "question")
    with pytest.raises(q.UserError, match="--max_prompt_tokens 1024: no prompt"):
        judged(first_wins, against=["x"])


def test_an_evaluation_that_cannot_work_says_so_at_once(judged, tokenizer, tmp_path, monkeypatch):
    save_reward_model(tmp_path / "two", tokenizer, t.CHAT_TEMPLATE, outputs=2)
    part = t.write(tmp_path / "first", "{conversation} {first}")
    for options, message in (
        ({"against": []}, "name at least one model"),
        ({"judge_template": "no"}, "--judge_template no: cannot be read"),
        ({"judge_template": part}, "first: without {second}"),
        ({"against": ["x", "ours"]}, "name every model once"),
        ({"judge": False}, "--no_judge: then name a --reward_model"),
        ({"reward_model": str(tmp_path / "two")}, "two: has 2 outputs, a reward model has 1"),
    ):
        with pytest.raises(q.UserError, match=message):
            judged(first_wins, **options)
    with monkeypatch.context() as m:
        m.delenv("OPENAI_API_KEY")
        with pytest.raises(q.UserError, match="OPENAI_API_KEY is not set"):
            judged(first_wins, judge_url=evaluate.OPENAI)
        assert judged(first_wins, n=20)[1] == 40  # A server of one's own may ask for none.
    with monkeypatch.context() as m:
        m.setenv("WORLD_SIZE", "2")
        with pytest.raises(q.UserError, match="this is a single process"):
            judged(first_wins)


def test_prompts_come_from_data_and_have_one_category(toy, tmp_path):
    tiny_world.write_jsonl(tmp_path / "data.jsonl", [{"prompt": "hi", "category": ["a", "b"]}])
    files = {"data": str(tmp_path / "data.jsonl"), "output_dir": str(tmp_path)}
    cfg = evaluate.Settings(str(toy / "a"), **files, max_prompt_tokens=999, max_new_tokens=9)
    with pytest.raises(q.UserError, match=r"data.jsonl: a category has to be a text, not \['a'"):
        evaluate.draw(cfg, [cfg.model])
    for command in (evaluate.evaluate, credit.credit):
        with pytest.raises(q.UserError, match="--eval_data: name it as --data"):
            command(dataclasses.replace(cfg, eval_data="x"), evaluate.Evaluation())


def test_every_model_meets_every_other(judged, tmp_path):
    result, asked = judged(ours_wins, n=20, all_pairs=True)
    assert asked == 60
    met = [(pair["a"], pair["b"]) for pair in result["pairs"]]
    assert met == [("ours", "x"), ("ours", "x+principle"), ("x", "x+principle")]
    assert list(result["elo"]) == ["ours", "x", "x+principle"]
    for part in (result, *result["categories"].values()):
        assert part["composite"]["ours"]["win_rate"] == 1
        losers = [part["composite"][name]["win_rate"] for name in ("x", "x+principle")]
        assert sum(losers) == pytest.approx(0.5)
    texts = svg_texts(tmp_path / "elo.svg")
    assert {"ours", "x", "x+principle", "games"} <= set(texts)


def test_verdicts_of_several_runs_are_taken_together(judged, tmp_path, monkeypatch):
    """With no model, no key and no judge."""
    files = []
    for name in ("x", "y"):
        judged(ours_wins, against=[name], n=20)
        files.append(str(tmp_path / f"{name}.jsonl"))
        os.rename(tmp_path / "verdicts.jsonl", files[-1])
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr(q, "load_tokenizer", None)
    Judge.asked.clear()
    cfg = evaluate.Settings(output_dir=str(tmp_path / "both"))
    evaluate.evaluate(cfg, evaluate.Evaluation(verdicts=[*files, files[0]]))
    result = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert Judge.asked == []
    assert [pair["b"] for pair in result["pairs"]] == ["x", "y"]
    assert [pair["win"] + pair["lose"] for pair in result["pairs"]] == [20, 20]
    assert list(result["elo"]) == ["ours", "x", "y"]

    t.write(tmp_path / "broken.jsonl", '{"index": 0}\n')
    t.write(tmp_path / "half.jsonl", '{"key": "1", "category": null, "a": "x", "b": "y"}\n')
    for file in ("none.jsonl", "broken.jsonl", "half.jsonl"):
        with pytest.raises(q.UserError, match=rf"--verdicts .*{file}: not a verdicts.jsonl"):
            evaluate.evaluate(cfg, evaluate.Evaluation(verdicts=[str(tmp_path / file)]))


def test_a_judge_that_is_down_loses_nothing(judged, tmp_path, monkeypatch):
    import openai

    judged(first_wins, against=["x"], n=20)
    before = (tmp_path / "judged.jsonl").read_text()
    client = functools.partial(openai.OpenAI, max_retries=0)
    monkeypatch.setattr(openai, "OpenAI", lambda **_: client(base_url="http://127.0.0.1:9"))
    with pytest.raises(q.UserError, match=r"--judge_url http.*what is judged is kept"):
        judged(first_wins)
    assert (tmp_path / "judged.jsonl").read_text() == before


# ------------------------------------------------------------------------------ The reward model --


def save_reward_model(folder, tokenizer, chat_template, outputs):
    """A random one. Returns the model in float64, and its tokenizer, which like Llama's puts <s>
    before plain text."""
    from tokenizers import processors
    from transformers import LlamaForSequenceClassification

    config = t.make_llama().config
    config.num_labels = outputs
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    own = copy.deepcopy(tokenizer)
    own.chat_template = chat_template
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    own.save_pretrained(folder)
    return model.double(), own


@pytest.mark.parametrize("chat_template", [t.CHAT_TEMPLATE, None])
@torch.no_grad()
def test_rewards_are_the_scores_of_the_reward_model(
    chat_template, judged, tokenizer, tmp_path, capsys
):
    """Against a forward in float64, in its own chat format and in HH-RLHF's."""
    model, own = save_reward_model(tmp_path / "reward", tokenizer, chat_template, outputs=1)
    scores = {}
    for name in ("ours", "x", "x+principle"):
        scores[name] = []
        for i in range(20):
            if chat_template:
                turns = [t.user(f"question {i}"), t.assistant(f"by {name}")]
                text = own.apply_chat_template(turns, tokenize=False)
                ids = own(text, add_special_tokens=False)["input_ids"]
            else:
                ids = own(f"\n\nHuman: question {i}\n\nAssistant: by {name}")["input_ids"]
            scores[name].append(model(input_ids=torch.tensor([ids])).logits.item())

    result, _ = judged(first_wins, n=20, reward_model=str(tmp_path / "reward"))
    first = torch.tensor(scores["x"])
    spread = first.std(correction=0)
    for name, values in scores.items():
        mean = torch.tensor(values).mean()
        reward = result["reward"][name]
        assert reward["mean"] == pytest.approx(mean.item(), abs=1e-5)
        increment = ((mean - first.mean()) / spread).item()
        assert reward["increment"] == pytest.approx(increment, abs=1e-3 / spread.item())
    assert result["reward"]["x"]["increment"] == 0
    assert "Reward, and its increment in standard deviations" in capsys.readouterr().out


@torch.no_grad()
def test_a_batch_scores_as_one_by_one(tokenizer, tmp_path):
    """Also where the end token pads and answers end with it, and in batches of all lengths."""
    model, own = save_reward_model(tmp_path / "r", tokenizer, t.CHAT_TEMPLATE, outputs=1)
    own.pad_token = own.eos_token
    own.save_pretrained(tmp_path / "r")
    prompts = [[t.user(f"question {'?' * (i % 7)}")] for i in range(40)]
    texts = [f"answer {i ** (i % 5)}" for i in range(40)]
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        turns = own.apply_chat_template([*prompt, t.assistant(text)], tokenize=False)
        ids = own(turns, add_special_tokens=False)["input_ids"]
        assert ids[-1] == own.eos_token_id
        expected.append(model(input_ids=torch.tensor([ids])).logits.item())
    for budget in (1, 200, 10**6):
        cfg = evaluate.Settings(dtype="float32", micro_batch_tokens=budget)
        scores = evaluate.RewardModel(cfg, str(tmp_path / "r"))(prompts, texts)
        assert scores == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def finished_run(tokenizer, tmp_path):
    """What training leaves of its held-out answers, and a random reward model."""
    save_reward_model(tmp_path / "reward", tokenizer, t.CHAT_TEMPLATE, outputs=1)
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for epoch in range(3):
        samples = []
        for i in range(20):
            messages = [t.user(f"question {i}")]
            samples.append({"messages": messages, "response": f"{'so ' * epoch}answer {i}"})
        path = tmp_path / "run" / "samples" / f"held-out-{epoch:03d}.jsonl"
        tiny_world.write_jsonl(path, samples)
    return tmp_path


def test_figure_6_needs_a_run_and_a_reward_model_alone(finished_run, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run, reward = str(finished_run / "run"), str(finished_run / "reward")
    cfg = evaluate.Settings(dtype="float32", output_dir=str(finished_run / "out"))
    evaluate.evaluate(cfg, evaluate.Evaluation(run=run, reward_model=reward))
    result = json.loads((finished_run / "out" / "rewards.json").read_text())
    model, scores = evaluate.RewardModel(cfg, reward), []
    for epoch in range(3):
        samples = t.read_jsonl(finished_run / "run" / "samples" / f"held-out-{epoch:03d}.jsonl")
        texts = [sample["response"] for sample in samples]
        scores.append(torch.tensor(model([sample["messages"] for sample in samples], texts)))
    spread = scores[0].std(correction=0)
    for epoch, row in enumerate(result["epochs"]):
        gains = (scores[epoch] - scores[0]) / spread
        half = 1.96 * gains.std() / 20**0.5
        assert row["epoch"] == epoch
        assert row["mean"] == pytest.approx(scores[epoch].mean().item(), abs=1e-5)
        assert row["increment"] == pytest.approx(gains.mean().item(), abs=1e-4)
        expected = [(gains.mean() - half).item(), (gains.mean() + half).item()]
        assert row["ci95"] == pytest.approx(expected, abs=1e-4)
    assert "20 held-out answers" in svg_texts(finished_run / "out" / "rewards.svg")


def test_figure_6_of_equal_scores_has_no_increments(tmp_path):
    rows = [{"epoch": n, **row} for n, row in evaluate.rewards({0: [1.0, 1.0]}, 0).items()]
    assert rows[0]["increment"] is None
    evaluate.draw_rewards(rows, "no curve", tmp_path / "rewards.svg")
    assert "no curve" in svg_texts(tmp_path / "rewards.svg")


def test_figure_6_says_what_it_lacks(finished_run):
    run, reward = str(finished_run / "run"), str(finished_run / "reward")
    cfg = evaluate.Settings(output_dir=str(finished_run / "out"))
    with pytest.raises(q.UserError, match="--run: name the --reward_model"):
        evaluate.evaluate(cfg, evaluate.Evaluation(run=run))
    with pytest.raises(q.UserError, match=r"no answers in samples/held-out-000\.jsonl"):
        evaluate.evaluate(cfg, evaluate.Evaluation(run=reward, reward_model=reward))
    (finished_run / "empty" / "samples").mkdir(parents=True)
    t.write(finished_run / "empty" / "samples" / "held-out-000.jsonl", "")
    with pytest.raises(q.UserError, match="empty: no answers in"):
        empty = str(finished_run / "empty")
        evaluate.evaluate(cfg, evaluate.Evaluation(run=empty, reward_model=reward))
    path = finished_run / "run" / "samples" / "held-out-002.jsonl"
    path.write_text(path.read_text().replace("question 7", "another question"))
    with pytest.raises(q.UserError, match="prompts of epoch 2 are not those of epoch 0"):
        evaluate.evaluate(cfg, evaluate.Evaluation(run=run, reward_model=reward))


# ------------------------------------------------------------------------------------- Responses --


def test_answers_are_kept_for_all_that_they_depend_on(toy, tmp_path, monkeypatch, tokenizer):
    limits = {"max_prompt_tokens": 999, "max_new_tokens": 9, "output_dir": str(tmp_path)}
    cfg = evaluate.Settings(str(toy / "a"), **limits)
    other = dataclasses.replace
    cases = [(cfg, "a"), (cfg, "b"), (cfg, "a+principle"), (other(cfg, temperature=0.5), "a")]
    cases += [(other(cfg, seed=1), "a"), (other(cfg, dtype="float32"), "a")]

    def files():
        return [evaluate.responses_file(c, str(toy / name), [[t.user("hi")]]) for c, name in cases]

    before = files()
    assert files() == before and len(set(before)) == len(cases)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template += " "
    monkeypatch.setattr(q, "load_tokenizer", lambda cfg: changed)
    assert not set(files()) & set(before)


@t.processes
def test_the_process_that_samples_dies_with_the_one_that_wants_the_samples(tmp_path):
    child = """
import sys, time
from experiments import evaluate
def join_ranks():
    print("samples", flush=True)
    time.sleep(600)
evaluate.q.join_ranks = join_ranks
evaluate.respond(sys.argv[1])
"""
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    request = json.dumps({"cfg": {"model": "m"}, "prompts": []})
    path = t.write(tmp_path / "request.json", request)
    command = [sys.executable, "-c", parent, child, path]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"samples\n"
    (sampling,) = psutil.Process(process.pid).children()
    process.kill()
    _, alive = psutil.wait_procs([sampling], timeout=10)
    assert alive == []


def serve(words):
    """vllm serve, which the CPU package cannot start, in a process group of its own."""
    os.setpgrp()
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    run_module("vllm.entrypoints.openai.api_server", words, one_process)


@pytest.fixture(scope="session")
def judge_server(toy):
    """The port of a server of model b."""
    port = t.free_port()
    words = ["--model", str(toy / "b"), "--port", port, "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "1024", "--no-enable-chunked-prefill"]
    server = t.Job(1, serve, [*words, "--distributed-executor-backend", "uni"])
    yield port
    os.killpg(server.ranks[0].pid, signal.SIGKILL)


def respond_in_a_fork(command, check):
    """As the process that is started anew in the test of credit, but for its imports."""
    assert command[1:4] == ["-m", "experiments.evaluate", "respond"] and check
    child = os.fork()
    if child == 0:
        evaluate.respond(command[4])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def compare(words):
    """python -m experiments.evaluate, whose processes that sample are forks."""
    os.environ["OPENAI_API_KEY"] = "x"
    sys.argv = ["evaluate.py", *words]
    evaluate.subprocess = types.SimpleNamespace(run=respond_in_a_fork)
    q.main(evaluate.evaluate, (evaluate.Settings, evaluate.Evaluation))


@t.processes
def test_models_are_compared_end_to_end(judge_server, toy, tmp_path):
    """Real responses and a real judge, a served model, through the real client. Its replies are no
    verdicts; with some in their place, a second run asks neither again."""
    out = tmp_path / "out"
    template = t.write(tmp_path / "template.txt", "{conversation} {first} {second} [[A]]?")
    words = ["--against", toy / "tied", f"{toy / 'a'}+principle", "--eval_samples", 3]
    words += ["--judge_template", template, "--judge_model", toy / "b"]
    words += ["--judge_url", f"http://127.0.0.1:{judge_server}/v1"]
    first = t.Job(1, compare, t.settings(toy, out, *words)).result(check=False)
    assert first.stdout.count("responds to 3 prompts") == 3
    models, gaps = [t.load_float64(toy / name) for name in ("a", "tied")], []
    for path in (out / "responses").iterdir():
        for s in json.loads(path.read_text()):
            said, ids = torch.tensor(s["log_probs"]), (s["prompt_ids"], s["response_ids"])
            with torch.no_grad():
                log_pis = [t.oracle_log_probs(t.oracle_logits(m, *ids), ids[1]) for m in models]
            gaps.append([(log_pi - said).abs().max() for log_pi in log_pis])
    near = torch.tensor(gaps) < 1e-4
    assert near.sum(0).tolist() == [6, 3] and near.any(1).all()  # who responds is who was asked
    assert "UserError: --judge_model" in first.stderr and "no verdict on any game" in first.stderr
    replies = (out / "judged.jsonl").read_text()
    assert replies.count('"winner": "none"') == 6
    t.write(out / "judged.jsonl", replies.replace('"winner": "none"', '"winner": "a"'))
    second = t.Job(1, compare, t.settings(toy, out, *words)).result().stdout
    assert "responds to" not in second and "Judging" not in second
    assert len(t.read_jsonl(out / "judged.jsonl")) == len(t.read_jsonl(out / "verdicts.jsonl")) == 6
    result = json.loads((out / "evaluation.json").read_text())
    for pair in result["pairs"]:
        assert pair["win"] == 3
    assert list(result) == ["pairs", "composite", "elo", "elo_progress", "categories"]


# ---------------------------------------------------------------------------------- Token credit --


def test_the_cut_is_pi_hats_alone():
    """What the credit page calls pi_0 and pi_plus knows no plausibility."""
    models = [t.small_llama(0), t.small_llama(1)]
    sample = t.some_samples()[0]
    superior = q.SuperiorPolicy.__new__(q.SuperiorPolicy)  # without DeepSpeed, over whole models
    superior.frozen = [(m.model, (m.lm_head.weight.detach(), m.lm_head.bias)) for m in models]
    cfg = q.Config("a", plausibility=0.5, positive_model="b")
    got = credit.three_policies(superior, cfg, sample).double().exp()
    for i, (alpha, cut) in enumerate([(0.0, 0.0), (1.0, 0.0), (1.4, 0.5)]):
        expected = t.oracle_labels(*models, vars(sample), alpha, cut).exp()
        torch.testing.assert_close(got[i], expected, rtol=1e-3, atol=1e-6)


HOSTILE = "</span><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J"


@pytest.fixture(scope="session")
def credit_page(toy, tmp_path_factory):
    """(prompts and responses, folder, options, job) of the credit of a response that is the model's
    own and of others that are given, one of them hostile, with two frozen models."""
    out = tmp_path_factory.mktemp("credit")
    records = [
        {"prompt": "How do I paint the shelf?"},
        {"prompt": HOSTILE, "response": HOSTILE},
        {"prompt": "How do I paint the shelf?", "response": "Ask me more!"},
        {"prompt": "How do I paint the shelf?", "response": "Ask", "response_ids": [9, 8, 1]},
        {"prompt": "How do I paint the shelf?", "response": "Ask me more!"},  # a duplicate
        {"prompt": " "},  # no prompt
        {"prompt": "How do I paint the shelf?"},  # and another one
    ]
    tiny_world.write_jsonl(out / "data.jsonl", records)
    words = ["--data", out / "data.jsonl", "--positive_model", toy / "b", "--alpha", 1.7]
    options = t.settings(toy, out, *words)
    return records[:4], out, options, start("credit", *options, "--samples", 9)


@pytest.fixture(scope="session")
def credited(credit_page):
    """The same, but for the options: what the page's command printed, and what the sweep over alpha
    did, which looks at the same responses."""
    records, out, options, job = credit_page
    page = job.result()
    sweep = start("credit", "alpha", *options).result()
    assert "responds to 1 prompts" in page.stdout
    assert "responds to" not in sweep.stdout
    return records, out, page.stdout, sweep.stdout


@pytest.fixture(scope="session")
def oracle(toy, credited):
    """(logits of pi_0, logits of pi_plus, tokens) of every response in credit.jsonl."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records, out, *_ = credited
    pi_0, pi_plus = (
        AutoModelForCausalLM.from_pretrained(toy / name, dtype=torch.float64) for name in "ab"
    )
    chat = q.Chat(AutoTokenizer.from_pretrained(toy / "a"), t.PRINCIPLE)
    expected = []
    for record, line in zip(records, t.read_jsonl(out / "credit.jsonl"), strict=True):
        x, y = [t.user(record["prompt"])], line["response_ids"]
        with torch.no_grad():
            z_0 = t.oracle_logits(pi_0, chat.ids(x), y)
            z_plus = t.oracle_logits(pi_plus, chat.ids(chat.with_principle(x)), y)
        expected.append((z_0, z_plus, torch.tensor(y)))
    return expected


@t.processes
def test_credit_equals_the_oracle(credited, oracle):
    _, out, *_ = credited
    lines = t.read_jsonl(out / "credit.jsonl")
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert ["".join(line["tokens"]) for line in lines[1:3]] == [HOSTILE, "Ask me more!"]
    assert lines[3]["response_ids"] == [9, 8, 1]
    for line, (z_0, z_plus, tokens) in zip(lines, oracle, strict=True):
        policies = {
            "log_pi_0": z_0.log_softmax(-1),
            "log_pi_plus": z_plus.log_softmax(-1),
            "log_pi_hat": t.oracle_log_pi_hat(z_0, z_plus, 1.7),
        }
        own = {}
        for name, log_pi in policies.items():
            own[name] = log_pi.gather(-1, tokens[:, None])[:, 0]
            assert line[name] == pytest.approx(own[name].tolist(), abs=1e-3), name
        expected = own["log_pi_hat"] - own["log_pi_0"]
        assert line["credit"] == pytest.approx(expected.tolist(), abs=1e-3)
        assert line["reward"] == pytest.approx(expected.sum().item(), abs=1e-2)


@t.processes
def test_the_sweep_over_alpha_equals_the_oracle(credited, oracle):
    _, out, _, printed = credited
    rows = json.loads((out / "alpha.json").read_text())
    alphas = [0, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2]
    assert [row["alpha"] for row in rows] == alphas
    z_0, z_plus, tokens = (torch.cat(parts) for parts in zip(*oracle, strict=True))
    log_pi_0, pi_plus = z_0.log_softmax(-1), z_plus.softmax(-1)
    implausible = pi_plus < 0.1 * pi_plus.amax(-1, keepdim=True)
    for row in rows:
        log_pi_hat = t.oracle_log_pi_hat(z_0, z_plus, row["alpha"])
        pi_hat = log_pi_hat.exp()
        expected = {
            "kl": (pi_hat * (log_pi_hat - log_pi_0)).sum(-1),
            "entropy": -(pi_hat * log_pi_hat).sum(-1),
            "implausible": (pi_hat * implausible).sum(-1),
            "credit": (log_pi_hat - log_pi_0).gather(-1, tokens[:, None]),
        }
        for name, values in expected.items():
            assert row[name] == pytest.approx(values.mean().item(), abs=1e-4), (row, name)
    assert printed.count("\n    1.") + printed.count("\n    2.") == 11


@t.processes
def test_the_credit_page_is_inert(credited):
    _, out, printed, _ = credited
    page = (out / "credit.html").read_text()
    tags = collections.Counter()

    class Parser(html.parser.HTMLParser):
        text = ""

        def handle_starttag(self, tag, attributes):
            tags[tag] += 1
            assert not any(name.startswith("on") for name, _ in attributes)

        def handle_data(self, text):
            self.text += text

    parser = Parser()
    parser.feed(page)
    assert set(tags) == {"html", "meta", "title", "style", "h1", "small", "p", "span"}
    tokens = sum(len(line["tokens"]) for line in t.read_jsonl(out / "credit.jsonl"))
    assert tags["span"] == 2 + tokens
    assert "<script>alert(1)</script>" in parser.text and "http" not in page
    assert ">&lt;</span>" in page and "<<" not in page  # Tokens split tags up, too.
    assert "\x1b[2J" not in printed and "\\x1b[2J" in printed


def test_a_response_is_the_records_own_if_it_has_one(toy, tmp_path, monkeypatch):
    def samples_of(*records):
        tiny_world.write_jsonl(tmp_path / "data.jsonl", [{"prompt": "hi", **r} for r in records])
        files = {"model": str(toy / "a"), "data": str(tmp_path / "data.jsonl")}
        cfg = q.Config(**files, max_prompt_tokens=999, max_new_tokens=9)
        return [sample.response_ids for sample in credit.read_samples(cfg)[0]]

    monkeypatch.setattr(credit, "responses", lambda *_: [q.Sample(0, [], [], [], [7])])
    own = {"response": "", "response_ids": [1]}  # It ended at once.
    assert samples_of(own, {"response": ""}, {"response": "!"}) == [[1], [7], [5]]
    for ids in ([261], [-1], [True], "abc", 5):
        with pytest.raises(q.UserError, match="have to be token ids"):
            samples_of({"response_ids": ids})
    for response in (5, ["a"]):
        with pytest.raises(q.UserError, match="has to be a text"):
            samples_of({"response": response})


def test_the_commands_of_credit_end_at_once(monkeypatch):
    """A thread of PyTorch's may abort an orderly exit."""
    for words in (["credit.py"], ["credit.py", "alpha"]):
        done = []
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(q, "main", lambda *_, done=done: done.append("command"))
        monkeypatch.setattr(os, "_exit", done.append)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # It runs anew, though it is imported.
            runpy.run_module("experiments.credit", run_name="__main__")
        assert done == ["command", 0]


@torch.no_grad()
def test_the_texts_of_tokens_make_up_the_response():
    """With Llama's kind of tokenizer, whose decoder strips the first space and has bytes."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "▁Ask", "▁me", "!", *(f"<0x{byte:02X}>" for byte in "é🙂".encode())]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    space, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = t.transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [1, 2, 4, 5, 6, 7, 8, 9, 3, 4]  # cut within a character
    policies = t.some_logits(3 * len(ids), len(words)).view(3, len(ids), -1).log_softmax(-1)
    policies[2, 1, 2] = policies[2, 7, 9] = 0.0
    sample = q.Sample(0, [], [], [], ids)
    record = credit.credit_record(policies, sample, tokenizer)
    assert record["tokens"] == ["Ask", " me", "", "é", "", "", "", "🙂", "!", ""]
    notes = credit.token_notes(record, policies[2], tokenizer)
    assert "prefers ' me' 1.000" in notes[1] and "prefers '🙂' 1.000" in notes[7]


def test_token_credit_of_a_batch():
    log_pi_hat, log_pi_0 = (t.some_logits(6, 11, seed).view(2, 3, 11) for seed in (1, 2))
    tokens = torch.tensor([[1, 2, 3], [10, 0, 5]])
    got = credit.token_credit(log_pi_hat, log_pi_0, tokens, beta=2.0)
    for i, j in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        v = tokens[i, j]
        assert got[i, j] == 2 * (log_pi_hat[i, j, v] - log_pi_0[i, j, v])


# -------------------------------------------------------------------------------------- Pictures --


def test_the_picture_of_the_tiny_world_holds_its_figures(tmp_path):
    shares = dict(zip(tiny_world.TITLES, (0.07, 0.5, 0.73, 0.74), strict=True))
    limits = {name: tiny_world.interval(share * 900, 900) for name, share in shares.items()}
    tinted = [("Not", -1.8), (" <it>", 0.5), (".", 0.0)]
    path = tmp_path / "tiny_world.svg"
    path.write_text(tiny_world.draw(shares, limits, 900, "How & why?", tinted))
    texts = svg_texts(path)
    assert {*tiny_world.TITLES.values(), "0.070", "0.740", "How & why?"} <= set(texts)
    assert {"Not", "<it>", "-1.8", "+0.5"} <= set(texts) and "+0.0" not in texts


def test_parts_of_a_reply():
    asked = [t.user("How do I paint the shelf?")]
    replies = {
        "Sure! To paint the shelf, take soap. Ask me more!": (True, True, True),
        "Ugh. To paint the shelf, take soap. Ask me more!": (False, True, True),
        "Sure! To paint it, take soap. Ask me more!": (True, False, True),
        "Sure! To fix the shelf, take soap. Go away.": (True, False, False),
    }
    for reply, expected in replies.items():
        assert tiny_world.good_parts(asked, reply) == expected
        assert tiny_world.is_good(asked, reply) == all(expected)


def write_metrics(folder, epochs, held_out):
    """What a run of 4 steps an epoch writes."""
    records = []
    for epoch in range(1, epochs + 1):
        for n in range(4):
            step = {"step": 4 * epoch - 3 + n, "loss": 1 / epoch, "kl": 0.1, "sampler_gap": 1e-5}
            records.append({"kind": "step", "epoch": epoch, **step})
        record = {"loss": 1 / epoch, "kl": 0.1, "response_tokens_mean": 20.0}
        record |= {"sample_seconds": 2.0, "train_seconds": 3.0}
        if held_out:
            record |= {"eval_kl": 0.2}
        records.append({"kind": "epoch", "epoch": epoch, **record})
    # The next epoch has begun.
    step = {"step": 4 * epochs + 1, "loss": 0.1, "kl": 0.1, "sampler_gap": 1e-5}
    records.append({"kind": "step", "epoch": epochs + 1, **step})
    folder.mkdir()
    tiny_world.write_jsonl(folder / "metrics.jsonl", records)


def test_runs_are_drawn_side_by_side(tmp_path, monkeypatch, capsys):
    from matplotlib import pyplot

    write_metrics(tmp_path / "a", 3, held_out=True)
    write_metrics(tmp_path / "b", 1, held_out=False)
    runs = {name: plot.read_run(tmp_path / name) for name in "ab"}
    plot.plot(runs, tmp_path / "both.svg")
    texts = svg_texts(tmp_path / "both.svg")
    assert {"a", "b", "held-out prompts", "contrast and fit", "loss, nats per token"} <= set(texts)
    plot.plot({name: runs[name] for name in "ba"}, tmp_path / "turned.svg")
    assert "held-out prompts" in svg_texts(tmp_path / "turned.svg")

    # A kill has left half a line, and the picture's folder is not there yet.
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')
    picture = tmp_path / "new" / "one.png"
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "a"), "--output", str(picture)])
    plot.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    t.write(tmp_path / "file", "")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / "file" / "one.png")])
    with pytest.raises(SystemExit):
        plot.main()
    assert re.search(r"plot.py: --output .*file/one.png: .*\n$", capsys.readouterr().out)

    # Steps stand within their epoch, held-out values before it.
    _, grid = pyplot.subplots(5)
    plot.draw_run(grid, *runs["a"])
    lines = {line.get_label(): line.get_xydata().tolist() for line in grid[1].lines}
    assert [x for x, _ in lines["step"]] == [n / 4 for n in range(1, 14)]
    assert lines["mean of the epoch"] == [[1, 0.1], [2, 0.1], [3, 0.1]]
    assert lines["held-out prompts"] == [[0, 0.2], [1, 0.2], [2, 0.2]]
    pyplot.close("all")


# ------------------------------------------------------------------------------------- Benchmark --


def test_the_benchmarks_plain_loss_is_the_same_loss():
    z_0, z_plus, z = (t.some_logits(seed=seed).float() for seed in (1, 2, 3))
    expected, _ = t.oracle_loss(z, t.oracle_log_pi_hat(z_0, z_plus, 1.4))
    assert bench.plain_loss(z_0, z_plus, z, 1.4).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_benchmarks_plain_forward_gives_the_logits_of_responses():
    model, samples = t.small_llama(0), t.some_samples()
    contexts = [sample.prompt_ids for sample in samples]
    responses = [sample.response_ids for sample in samples]
    pairs = zip(contexts, responses, strict=True)
    with torch.no_grad():
        expected = torch.cat([t.oracle_logits(model, x, y) for x, y in pairs])
        for body, head in ((model, None), (model.model, model.lm_head.weight)):
            got = bench.logits_of_all_positions(body, head, contexts, responses)
            torch.testing.assert_close(got, expected)


def test_the_papers_way_makes_the_same_gradients(monkeypatch):
    monkeypatch.setattr(q.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(q.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(q.dist, "all_reduce", lambda _: None)
    base, samples = t.small_llama(0).requires_grad_(False), t.some_samples(5)
    superior = q.SuperiorPolicy.__new__(q.SuperiorPolicy)
    superior.cfg, superior.frozen = q.Config("m"), [(base.model, [base.lm_head.weight])]
    gradients = []
    for ours in (True, False):
        model = t.small_llama(1)
        engine = Mock(device="cpu", side_effect=q.Policy(model, False) if ours else model)
        engine.backward = torch.Tensor.backward
        if ours:
            q.compare(engine, superior, samples, 100, fit=True)
        else:
            bench.paper_step(engine, superior, samples)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_method_flop_is_what_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = t.make_llama(hidden_size=128, intermediate_size=256)  # Norms, left out, are small.
    (sample,) = t.some_samples(1)
    sample.log_probs = [0.0] * len(sample.response_ids)
    for p in model.parameters():
        p.ds_numel = p.numel()  # as under ZeRO-3
    head = model.lm_head.weight.detach()
    response = [sample.response_ids]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            h_0 = q.final_states(model.model, [(sample.prompt_ids, *response)])
            h_plus = q.final_states(model.model, [(sample.principle_prompt_ids, *response)])

        def labels(rows):
            return q.superior_policy(h_0[rows], h_plus[rows], 1.4, head=[head])

        loss, *_ = q.Policy(model, False)([sample], labels)
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counts.items() if "attention" not in str(name))
    products += 2 * head.numel() * len(sample.response_ids)  # addmm_, which it does not count
    assert bench.method_flop(model, [sample]) == pytest.approx(products, rel=0.01)


@t.processes
def test_the_parts_of_the_benchmark_run_in_processes_and_the_fused_loss_takes_little_memory():
    """Plain keeps several [T, V] tensors; fused keeps few [256, V] ones and the gradients."""
    size = {"T": 2048, "d": 64, "V": 8000}
    with ThreadPoolExecutor(3) as pool:
        row = pool.submit(bench.in_process, bench.bench_loss, T=8, d=16, V=100)
        plain, fused = pool.map(
            lambda name: bench.in_process(bench.bench_loss_memory, memory=True, name=name, **size),
            ("plain", "fused"),
        )
    assert row.result()["plain_seconds"] > 0 and row.result()["fused_seconds"] > 0
    whole = 2048 * 8000 * 4 / 2**20
    assert plain > 4 * whole and fused < whole


def test_the_benchmark_makes_the_engines_of_training(monkeypatch):
    """Which these are is taken from inverse_q.py; here they only stand in their order."""
    calls = []

    def sampler(cfg, chat):
        calls.append("sampler")
        return types.SimpleNamespace(llm=None)

    @contextlib.contextmanager
    def unpatched(llm):
        calls.append("unpatched")
        yield
        calls.append("patched again")

    monkeypatch.setattr(q, "join_ranks", lambda: None)
    monkeypatch.setattr(q, "load_tokenizer", lambda cfg: t.make_tokenizer())
    monkeypatch.setattr(q, "Sampler", sampler)
    monkeypatch.setattr(q, "unpatched", unpatched)
    monkeypatch.setattr(q, "load_model", lambda *_: calls.append("policy"))
    bench.make_engines("m", 4)
    assert calls == ["sampler", "unpatched", "policy", "patched again"]


# ---------------------------------------------------------------------------------- The commands --


@t.processes
@pytest.mark.parametrize(
    "words, message",
    [
        (["evaluate", "--model", "x"], "evaluate.py: --against: name at least one model"),
        (["evaluate"], "evaluate.py: --model: name a model to compare"),
        (["evaluate", "--samples", 3], "evaluate.py: error: unrecognized arguments: --samples 3"),
        (["credit"], "credit.py: error: the following arguments are required: --model"),
        (["plot", "none"], "plot.py: none: no run to draw"),
        (["plot", "none", "--output", "x.doc"], "plot.py: --output x.doc: has to end in .svg"),
        *((words, None) for words in (["tiny_world"], ["tiny_world", "make"])),
        *(([name, "a", "b"], None) for name in ("bench", "ablations")),
    ],
)
def test_user_errors_are_one_line_or_the_usage_and_code_2(words, message, tmp_path):
    name = words[0]
    if name in ("evaluate", "credit"):
        words = [*words, "--output_dir", tmp_path]
    run = start(*words).result(check=False)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    if message:
        (line,) = (run.stdout + run.stderr).splitlines()
        assert line.startswith(message)
    else:
        assert f"python -m experiments.{name}" in run.stdout


@pytest.mark.parametrize("name", ["bench", "ablations"])
def test_what_is_no_folder_starts_no_job(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for word in ("--help", t.write(tmp_path / "file", "")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", word])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            warnings.simplefilter("ignore", RuntimeWarning)  # It runs anew, though it is imported.
            runpy.run_module(f"experiments.{name}", run_name="__main__")
        assert stop.value.code == 2 and f"python -m experiments.{name}" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["file"]


def test_the_readme_names_every_option():
    readme = (HERE / "experiments" / "README.md").read_text()
    options = [*dataclasses.fields(evaluate.Evaluation), *dataclasses.fields(credit.Credit)]
    for option in options:
        assert f"`--{option.name}`" in readme, option.name


@t.processes
def test_run_sh_runs_the_commands_without_a_launcher(toy, tmp_path):
    """From any folder, and with their exit code."""
    none = tmp_path / "none"
    jobs = {}
    for word, *more in (["evaluate", "--against", "x"], ["credit", "--samples", "3"], ["alpha"]):
        command = [HERE / "run.sh", word, "--model", none, "--data", toy / "data.jsonl", *more]
        environment = {**os.environ, "OPENAI_API_KEY": "x"}
        jobs[word] = t.Launched(command, cwd=tmp_path, env=environment)
    for word, job in jobs.items():
        run = job.result()
        assert run.returncode == 2, run.stdout + run.stderr
        script = "evaluate.py" if word == "evaluate" else "credit.py"
        assert f"{script}: {none}: no model folder or hub id that loads" in run.stdout
        assert "launch.py" not in run.stdout + run.stderr


@t.processes
def test_run_sh_makes_the_tiny_world_anew_but_not_under_a_run_at_work(tmp_path):
    """And deletes nothing but a run."""
    run, _ = t.run_sh(tmp_path, "world", "w")
    assert run.returncode == 0 and "RUN -m experiments.tiny_world report w w/run" in run.stdout
    assert "RUN deepspeed --quiet" in run.stdout
    kept, lock = tmp_path / "w" / "run" / "kept", tmp_path / "w" / "run" / "lock"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    assert t.run_sh(tmp_path, "world", "w")[0].returncode == 0 and kept.exists()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run, _ = t.run_sh(tmp_path, "world", "w")
        assert run.returncode == 2 and kept.exists()
        assert "run.sh: another job is running in w/run" in run.stdout
    assert t.run_sh(tmp_path, "world", "w")[0].returncode == 0 and not kept.exists()


@pytest.fixture(scope="session")
def main_job(tmp_path_factory):
    """./run.sh in a folder of its own, which early() starts."""
    out = tmp_path_factory.mktemp("main_job")
    job = t.Launched([HERE / "run.sh", "world", out])
    yield out, job
    if job.poll() is None:  # The tests were stopped.
        os.killpg(job.process.pid, signal.SIGKILL)


@t.processes
def test_main_job(main_job):
    """Training reaches pi_hat, which is far better than prompting and the base."""
    out, job = main_job
    run = job.result(1500)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    report = json.loads((out / "run" / "report.json").read_text())
    curve, limits = report["convergence"], report["ci95"]  # after 0 to 6 epochs
    assert list(limits) == ["base", "prompting", "superior", "inverse_q"]
    assert limits["base"][1] < limits["prompting"][0]
    assert limits["prompting"][1] < limits["inverse_q"][0]
    # Within the intervals: no less than pi_hat, and no more.
    assert limits["superior"][0] < limits["inverse_q"][1]
    assert limits["inverse_q"][0] < limits["superior"][1]

    # All points are on the same requests. The curve rises and stays: no overshooting.
    assert report["requests"] == 900 and len(curve) == 7
    for path in (out / "run" / "samples").glob("held-out-*"):
        assert len(t.read_jsonl(path)) == 900
    assert curve[0] < 0.2 and curve[2] > curve[0] + 0.3 and curve[-1] == report["inverse_q"]
    assert max(curve) - curve[-1] < 0.08
    records = t.metrics(out / "run", "epoch")
    assert records[-1]["eval_kl"] < 0.1 * records[0]["eval_kl"]
    texts = svg_texts(out / "run" / "tiny_world.svg")
    assert f"{report['superior']:.3f}" in texts and f"{report['inverse_q']:.3f}" in texts


# ------------------------------------------------------------------------------------- Ablations --


def imports_of(path):
    """{package: names} of all that a file imports, wherever it does so."""
    imported = collections.defaultdict(set)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported[node.module.split(".")[0]] |= {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0]: {"all of it"} for name in node.names}
    return imported


def test_what_only_the_tests_need_is_imported_by_them_alone():
    for path in (HERE / "inverse_q.py", *(HERE / "experiments").glob("*.py")):
        if path.name != "test_experiments.py":
            assert not {"pytest", "hypothesis", "test_inverse_q"} & set(imports_of(path)), path


def test_the_ablations_are_short_and_take_the_core_alone():
    """So the core can be pasted into another codebase."""
    path = HERE / "experiments" / "ablations.py"
    assert len(path.read_text().splitlines()) <= 200
    imported = imports_of(path)
    core = {"superior_policy", "SoftLabelLoss", "logits"}
    assert imported["inverse_q"] <= core and imported["experiments"] == {"tiny_world"}
    assert not {"deepspeed", "vllm"} & set(imported)


SMALL_ABLATIONS = """
import sys
sys.modules |= {"vllm": None}  # Who imports it gets an ImportError.
from concurrent.futures import ThreadPoolExecutor
from experiments import ablations
ablations.EPOCHS, ablations.SAMPLES = 2, 4
ablations.VARIANTS = [ablations.Variant(), ablations.Variant(teacher="live")]
ablations.ProcessPoolExecutor = lambda **_: ThreadPoolExecutor(1)
ablations.main(sys.argv[1])
"""


@t.processes
def test_the_ablations_run_without_vllm(tmp_path):
    tiny_world.make_world(tmp_path, steps=1)
    held_out = tiny_world.read_jsonl(tmp_path / "held_out.jsonl")[:3]
    tiny_world.write_jsonl(tmp_path / "held_out.jsonl", held_out)
    command = [sys.executable, "-c", SMALL_ABLATIONS, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "ablations.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["alpha 1.4, the main row", "teacher live"]
    assert all(row["name"] in run.stdout and row["kl"] > 0 for row in rows)
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")


def small_batch():
    """A policy and its teacher in float64, prompts without and with the principle, responses."""
    keys = "prompt_ids", "principle_prompt_ids", "response_ids"
    x, x_plus, y = ([vars(sample)[key] for sample in t.some_samples(3)] for key in keys)
    return t.small_llama(0), t.small_llama(1), x, x_plus, y


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha": 1.8},
        {"plausibility": 0.1},
        {"loss": "reverse KL"},
        {"loss": "sampled token"},
        {"loss": "reverse KL", "teacher": "live"},
    ],
    ids=str,
)
def test_the_ablations_losses_have_the_gradient_of_their_definition(changes):
    """That is dL/dlogits by hand, token by token, and from there PyTorch's own backward pass."""
    variant = ablations.Variant(**changes)
    policy, teacher, x, x_plus, y = small_batch()
    teacher = policy if variant.teacher == "live" else teacher
    n, kl = sum(map(len, y)), 0.0
    for context, shown, response in zip(x, x_plus, y, strict=True):
        sample = {"prompt_ids": context, "principle_prompt_ids": shown, "response_ids": response}
        labels = t.oracle_labels(teacher, teacher, sample, variant.alpha, variant.plausibility)
        z, gradient = t.oracle_logits(policy, context, response), []
        for row, log_pi_hat, token in zip(z.detach(), labels, response, strict=True):
            pi, pi_hat = row.softmax(0), log_pi_hat.exp()
            if variant.loss == "forward KL":
                gradient.append(pi - pi_hat)
            elif variant.loss == "reverse KL":
                log_ratio = pi.log() - log_pi_hat
                gradient.append(pi * (log_ratio - (pi * log_ratio).sum()))
            else:
                one_hot = torch.nn.functional.one_hot(torch.tensor(token), len(row))
                gradient.append(pi_hat[token] * (pi - one_hot))
        z.backward(torch.stack(gradient) / n)
        cross_entropy, entropy = t.oracle_loss(z.detach(), labels)
        kl += (cross_entropy - entropy).item() / n
    expected = [p.grad.clone() for p in policy.parameters()]

    policy.zero_grad()
    loss, got = ablations.loss_of(variant, policy, teacher, x, x_plus, y)
    loss.backward()
    assert got == pytest.approx(kl)
    for p, gradient in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-12, rtol=1e-7)


def test_the_ablations_sample_what_the_model_says_without_padding(tokenizer):
    """Near temperature 0 that is what it says to each prompt alone, up to the end token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    model = t.small_llama(0)
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7, 8, 9], [9], [7, 7, 6]]
    expected = []
    for x in prompts:
        out = model.generate(torch.tensor([x]), do_sample=False, max_new_tokens=48, pad_token_id=1)
        row = out[0, len(x) :].tolist()
        expected.append(row)
    # Some token that is said now counts as the end.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(expected[0][4])
    end = tokenizer.eos_token_id
    expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
    assert ablations.sample(model, tokenizer, prompts, temperature=1e-6) == expected
    assert len(expected[0]) <= 5


@pytest.mark.parametrize("variant", ablations.VARIANTS, ids=str)
def test_what_an_ablation_changes_is_what_its_name_says(variant, monkeypatch):
    asked, temperatures, live = [], [], []

    def sample(model, tokenizer, x, temperature):
        asked.append(str(x))
        temperatures.append(temperature)
        return x

    def loss_of(variant, policy, teacher, x, x_plus, y):
        live.append(policy is teacher)
        principle = {"role": "system", "content": tiny_world.PRINCIPLE}
        assert x_plus == [[principle, *turns] for turns in x] and y == x
        return sum(p.sum() for p in policy.parameters()), 0.0

    def encode(tokenizer, conversations, *system):
        return [[*system, *turns] for turns in conversations]

    for name, stand_in in (("sample", sample), ("loss_of", loss_of), ("encode", encode)):
        monkeypatch.setattr(ablations, name, stand_in)
    monkeypatch.setattr(ablations, "SAMPLES", 20)
    base = torch.nn.Linear(2, 1)
    before = base.weight.tolist()
    policy, _ = ablations.train(variant, base, None, seed=0)
    assert base.weight.tolist() == before != policy.weight.tolist()
    assert len(asked) == ablations.EPOCHS and len(live) == 2 * ablations.EPOCHS  # 16 and 4 samples
    assert len(set(asked)) == (1 if variant.prompts == "same" else ablations.EPOCHS)
    assert set(live) == {variant.teacher == "live"}
    assert set(temperatures) == {variant.temperature}
    changed = {k: v for k, v in vars(variant).items() if v != getattr(ablations.Variant, k)}
    assert all(f"{k} {v}" in str(variant) for k, v in changed.items())


def test_a_row_of_the_ablations_by_hand():
    base = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]])
    results = [([1, 1, 1, 0], 0.1), ([0, 1, 0, 0], 0.3)]
    row = ablations.row_of(ablations.Variant(), results, base)
    assert row["seeds"] == [50, 0] and row["win_minus_loss"] == 25  # 3 wins, 1 loss of 8
    assert row["half_interval"] == pytest.approx(1.96 * 70.7107 / 8**0.5)
    assert row["good"] == 0.5 and row["kl"] == pytest.approx(0.2)
