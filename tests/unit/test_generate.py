"""Sampling: reproducible row by row, exact log-probabilities, drawn from the distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from truing.context import Context, use
from truing.core import sampling
from truing.core.chat import prompt_ids
from truing.core.drawing import continued
from truing.core.generate import _as_prompts, generate
from truing.core.generation import waves
from truing.core.generation.draw_token import choose
from truing.core.generation.prefix_cache import Shared
from truing.core.generation.row_cache import Padded
from truing.core.generation.stops import stop_place, stopped_at
from truing.core.sampling import (
    Row,
    Sampled,
    SamplingSettings,
    next_logps,
    sample,
)
from truing.core.tiny import tiny_model
from truing.errors import InputError
from truing.models import Model, Prefix

MODULE, TOKENIZER = tiny_model()
HEAD = [9, 41, 77, 130, 8, 21, 60, 61, 62, 63, 90, 91, 92, 93, 94, 95, 96, 97]  # common to some
PROMPTS = [HEAD + [5, 6, 7], HEAD + [200], [33, 4], [33, 4, 90, 12, 11, 10, 9, 8]]


def drawn(prompts: Sequence[Sequence[int]], **settings: object) -> list[list[Sampled]]:
    settings = {"max_tokens": 12, "stop_ids": (), "seed": 3, **settings}
    return sample(MODULE, prompts, SamplingSettings(**settings))  # type: ignore[arg-type]


def forward(module: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """log p [T, V] at each of `ids`, by one plain pass."""
    with torch.no_grad():
        logits = module(torch.tensor([[*prompt, *ids]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_same_tokens_whatever_the_batch() -> None:
    together = drawn(PROMPTS, n=3)
    for i, prompt in enumerate(PROMPTS):
        assert [s.ids for s in drawn([prompt], n=3)[0]] == [s.ids for s in together[i]]
        assert [s.ids for s in drawn([prompt], n=1)[0]] == [together[i][0].ids]
    back = drawn(PROMPTS[::-1], n=3)[::-1]
    assert [[s.ids for s in items] for items in back] == [[s.ids for s in i] for i in together]


def test_same_bits_for_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = drawn(PROMPTS, n=3), drawn(PROMPTS, n=3)
    assert first == second
    assert drawn(PROMPTS, n=3, seed=4) != first
    monkeypatch.setattr(waves, "ROWS_CPU", 2)  # many waves of two rows
    small = drawn(PROMPTS, n=3)
    assert [[s.ids for s in items] for items in small] == [[s.ids for s in i] for i in first]


def test_a_prompt_given_again_goes_on_with_its_draws() -> None:
    three = drawn([PROMPTS[0]], n=3)[0]
    one_by_one = drawn([PROMPTS[0]] * 3, n=1)
    assert [items[0].ids for items in one_by_one] == [s.ids for s in three]
    assert len({tuple(s.ids) for s in three}) == 3


@pytest.mark.parametrize("states", [Shared, Padded])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}, {"greedy": True}]
)
def test_log_probabilities_are_the_models_own(
    states: type, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(
        module: nn.Module, prompts: object, rows: object, room: int, known: object
    ) -> object:
        return states(module, prompts, rows, room) if states is Shared else Padded(
            module, prompts, rows  # type: ignore[arg-type]
        )  # fmt: skip

    monkeypatch.setattr(sampling, "states_for", chosen)
    for prompt, items in zip(PROMPTS, drawn(PROMPTS, n=2, **settings), strict=True):
        for made in items:
            logp = forward(MODULE, prompt, made.ids)
            want = logp.gather(1, torch.tensor(made.ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(made.logprobs), want, atol=1e-4)
            if settings.get("greedy"):
                assert made.ids == logp.argmax(-1).tolist()


def test_the_first_token_alone_has_its_temperature() -> None:
    """The first whose cumulative probability, by a plain pass, exceeds the random number."""
    how = SamplingSettings(n=2, max_tokens=4, stop_ids=(), seed=3, first_temperature=2.5)
    for prompt, items in zip(PROMPTS, sample(MODULE, PROMPTS, how), strict=True):
        for k, made in enumerate(items):
            logp_TV = forward(MODULE, prompt, made.ids).double()
            logp_TV[0] = (logp_TV[0] / 2.5).log_softmax(-1)
            random_T = torch.from_numpy(sampling.uniforms(prompt, how, k))
            below_TV = logp_TV.exp().cumsum(-1) <= random_T[:, None]
            assert made.ids == below_TV.sum(-1).tolist()


def test_greedy_is_transformers_own() -> None:
    for prompt, (made,) in zip(PROMPTS, drawn(PROMPTS, greedy=True, stop_ids=None), strict=True):
        ids = torch.tensor([prompt])
        theirs = MODULE.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert made.ids == theirs[0, len(prompt) :].tolist()


def test_finished_rows_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    free = drawn(PROMPTS, n=4, max_tokens=20)
    common = Counter(t for items in free for s in items for t in s.ids[:10])
    stop = common.most_common(1)[0][0]
    sizes: list[int] = []
    step = Shared.step

    def watched(self: Shared, ids: Sequence[int]) -> Tensor:
        sizes.append(len(ids))
        return step(self, ids)

    monkeypatch.setattr(Shared, "step", watched)
    told: list[int] = []
    settings = SamplingSettings(n=4, max_tokens=20, seed=3, stop_ids=(stop,))
    ended = sample(MODULE, PROMPTS, settings, told=told.append)
    for whole, cut in zip(free, ended, strict=True):
        for a, b in zip(whole, cut, strict=True):
            at = a.ids.index(stop) + 1 if stop in a.ids else 20
            assert b.ids == a.ids[:at] and b.finish == ("stop" if stop in a.ids else "length")
            assert a.logprobs[:at] == pytest.approx(b.logprobs, abs=1e-4)
    lengths = [len(s.ids) for items in ended for s in items]
    assert sizes == [sum(n > t for n in lengths) for t in range(1, max(lengths))]
    assert min(lengths) < max(lengths) and sum(told) == 16


def test_minimum_length_and_bans() -> None:
    free = drawn(PROMPTS[:1], n=4)[0]
    stop = free[0].ids[2]
    made = drawn(PROMPTS[:1], n=4, stop_ids=(stop,), min_tokens=6)[0]
    assert all(stop not in s.ids[:6] and len(s.ids) >= 6 for s in made)
    banned = tuple(s.ids[0] for s in free)
    assert not {t for s in drawn(PROMPTS[:1], n=4, banned=banned)[0] for t in s.ids} & set(banned)


def test_a_stop_text_before_the_least_length_stops_nothing(tiny_path: Path) -> None:
    """Neither the drawing nor the text; one that is completed at it does."""
    model = Model.open(tiny_path)

    known = model.load_module().tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]

    def letters(rows: object, logits_BV: Tensor) -> Tensor:
        other_BV = torch.ones_like(logits_BV, dtype=torch.bool)
        other_BV[:, known] = False
        return logits_BV.masked_fill(other_BV, -torch.inf)

    asked = {"n": 8, "max_tokens": 40, "seed": 3, "logits": letters}
    whole = [one.text for one in generate(model, ["say"], **asked)[0]]
    tried = 0
    for at, text in enumerate(whole):
        for stop in sorted({c for c in text[:5] if c in text[5:]})[:1]:
            made = generate(model, ["say"], stop=[stop], min_tokens=6, **asked)[0][at]
            end = text.index(stop, 5)  # a token is a letter
            assert (made.text, len(made.ids), made.finish) == (text[:end], end + 1, "stop")
            tried += 1
    assert tried > 1


def test_where_a_text_is_stopped() -> None:
    assert stopped_at("a.b.c", "", ["."]) == 1 and stopped_at("a.b.c", "a.", ["."]) == 3
    assert stopped_at("ab##c##", "ab#", ["##"]) == 2  # completed behind what came before
    assert stopped_at("ab##c##", "ab##", ["##", "zz"]) == 5
    assert stopped_at("ab", "", ["z"]) == -1 and stopped_at("ab", "", []) == -1
    assert stopped_at("x\u00e9", "x\ufffd", ["\u00e9"]) == 1


def test_where_an_answer_is_stopped() -> None:
    def letters(ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    ids = [ord(c) for c in "a.b.c"]
    for least, done, place in [(0, 0, 1), (2, 0, 1), (3, 0, 3), (5, 0, -1), (3, 1, 1), (4, 1, 3)]:
        asked = SamplingSettings(stop=(".",), min_tokens=least)
        assert stop_place("a.b.c", ids, asked, letters, done) == place
    # Without stop texts nothing is decoded.
    assert stop_place("a.b.c", ids, SamplingSettings(), lambda _: 1 / 0) == -1  # type: ignore[arg-type]


def test_stop_texts() -> None:
    settings = SamplingSettings(n=3, max_tokens=30, seed=1, stop_ids=())

    def decode(ids: list[int]) -> str:
        return TOKENIZER.decode(ids)

    free = sample(MODULE, PROMPTS[:2], settings)
    text = decode(free[0][0].ids)
    stop = next(text[i : i + 2] for i in range(3, 20) if text[i : i + 2].isascii())
    limited = SamplingSettings(n=3, max_tokens=30, seed=1, stop_ids=(), stop=(stop,))
    ended = sample(MODULE, PROMPTS[:2], limited, decode=decode)
    assert ended[0][0].finish == "stop" and len(ended[0][0].ids) < 30
    for whole, cut in zip(free, ended, strict=True):
        for a, b in zip(whole, cut, strict=True):
            assert b.ids == a.ids[: len(b.ids)]
            assert (stop in decode(b.ids)) == (b.finish == "stop")
            assert stop not in decode(b.ids[:-1])
    with pytest.raises(InputError, match="decode"):
        sample(MODULE, PROMPTS[:1], limited)


def test_draws_follow_the_distribution() -> None:
    """The first two tokens of 6,000 draws against the model's own probabilities."""
    prompt = PROMPTS[2]
    made = sample(MODULE, [prompt], SamplingSettings(n=6000, max_tokens=1, seed=0, stop_ids=()))[0]
    p_V = forward(MODULE, prompt, [0])[0].exp().double()
    counts = torch.bincount(torch.tensor([s.ids[0] for s in made]), minlength=259).double()
    likely = p_V * 6000 >= 5
    seen = [*counts[likely].tolist(), float(counts[~likely].sum())]
    wanted = [*(p_V[likely] * 6000).tolist(), float(p_V[~likely].sum() * 6000)]
    assert chisquare(seen, [w * 6000 / sum(wanted) for w in wanted]).pvalue > 1e-3
    heat = sample(
        MODULE, [prompt], SamplingSettings(n=6000, max_tokens=1, temperature=0.5, stop_ids=())
    )[0]
    q_V = torch.softmax(2 * p_V.log(), 0)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in heat]), minlength=259).double()
    likely = q_V * 6000 >= 5
    seen = [*counts[likely].tolist(), float(counts[~likely].sum())]
    wanted = [*(q_V[likely] * 6000).tolist(), float(q_V[~likely].sum() * 6000)]
    assert chisquare(seen, [w * 6000 / sum(wanted) for w in wanted]).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [259, 256, 1000])
@pytest.mark.parametrize(
    "cut", [{}, {"top_p": 0.6}, {"top_k": 7}, {"top_k": 9, "top_p": 0.7}, {"min_p": 0.3}]
)
def test_each_number_picks_its_token(vocab: int, cut: dict[str, object]) -> None:
    """A grid of numbers gives each token its share of [0, 1), by the definition of the cut."""
    torch.manual_seed(0)
    logits_V = torch.randn(vocab) * 2
    grid = (torch.arange(20_000).double() + 0.5) / 20_000
    rows_BV = logits_V.expand(len(grid), -1)
    token_B, logp_B = choose(rows_BV, rows_BV.clone(), grid, SamplingSettings(**cut), 0.8)  # type: ignore[arg-type]
    p_V = torch.softmax(logits_V.double() / 0.8, 0)
    order = p_V.argsort(descending=True)
    kept = torch.ones(vocab, dtype=torch.bool)
    if cut.get("top_k"):
        kept[order[int(cut["top_k"]) :]] = False  # type: ignore[call-overload]
    q_V = p_V * kept / (p_V * kept).sum()
    before = q_V[order].cumsum(0) - q_V[order]
    kept[order[before >= float(cut.get("top_p", 1.0))]] = False  # type: ignore[arg-type]
    kept &= p_V >= float(cut.get("min_p", 0.0)) * p_V.max()  # type: ignore[arg-type]
    q_V = p_V * kept / (p_V * kept).sum()
    share = torch.bincount(token_B, minlength=vocab).double() / len(grid)
    assert not share[~kept].any()
    assert float((share - q_V).abs().max()) < 2e-4
    own = logits_V.log_softmax(0)[token_B]
    assert torch.allclose(logp_B, own, atol=1e-4)


def test_a_hook_shapes_what_is_drawn_and_not_its_log_probability() -> None:
    seen: list[tuple[int, int, int]] = []

    def only(rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        seen.extend((r.prompt, r.draw, len(r.ids)) for r in rows)
        for row, logits_V in zip(rows, logits_BV, strict=True):
            logits_V[:] = -torch.inf
            logits_V[100 + row.draw] = 0.0
        return logits_BV

    settings = SamplingSettings(n=2, max_tokens=3, stop_ids=())
    made = sample(MODULE, PROMPTS[:2], settings, logits=only)
    assert [[s.ids for s in items] for items in made] == [[[100] * 3, [101] * 3]] * 2
    assert sorted(seen) == sorted((i, k, t) for i in (0, 1) for k in (0, 1) for t in (0, 1, 2))
    want = forward(MODULE, PROMPTS[1], [101] * 3)[:, 101]
    assert torch.allclose(torch.tensor(made[1][1].logprobs), want, atol=1e-4)


def test_penalty_of_what_was_said() -> None:
    made = drawn(PROMPTS[:1], greedy=True, repetition_penalty=50.0, max_tokens=20)[0][0].ids
    assert len(set(made)) == 20 and not set(made) & set(PROMPTS[0])


def test_the_penalty_of_each_row_is_of_its_own_tokens() -> None:
    made = drawn(PROMPTS, greedy=True, repetition_penalty=1.4, max_tokens=6)
    for prompt, (one,) in zip(PROMPTS, made, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                z_V = MODULE(torch.tensor([ids])).logits[0, -1]
            for t in set(ids):
                z_V[t] = z_V[t] / 1.4 if z_V[t] > 0 else z_V[t] * 1.4
            ids.append(int(z_V.argmax()))
        assert one.ids == ids[len(prompt) :]


def test_next_log_probabilities() -> None:
    logp_BV = next_logps(MODULE, PROMPTS)
    for prompt, logp_V in zip(PROMPTS, logp_BV, strict=True):
        assert torch.allclose(logp_V, forward(MODULE, prompt, [0])[0], atol=1e-4)


def test_an_architecture_of_another_kind() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    module = GPT2LMHeadModel(config).eval()
    made = sample(module, PROMPTS, SamplingSettings(n=2, max_tokens=5, stop_ids=()))
    for prompt, items in zip(PROMPTS, made, strict=True):
        for one in items:
            want = forward(module, prompt, one.ids).gather(1, torch.tensor(one.ids)[:, None])
            assert torch.allclose(torch.tensor(one.logprobs), want[:, 0], atol=1e-4)


def test_mistakes_are_named() -> None:
    for wrong in ({"n": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"min_tokens": 129}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            SamplingSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="context of 2048"):
        drawn([[5] * 2048])
    with pytest.raises(InputError, match="prompt 2"):
        drawn([[5], []])


# With text and models


def test_answers_of_a_model(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    made = generate(model, ["hello", [{"role": "user", "content": "hello"}]], n=2, max_tokens=9)
    assert [c.text for c in made[0]] != [c.text for c in made[1]]  # one prompt, further draws
    for items in made:
        for one in items:
            assert one.tokens == len(one.ids) == len(one.logprobs) <= 9
            assert "<|im_end|>" not in one.text
    four = generate(model, ["hello"], n=4, max_tokens=9)[0]
    assert [c.ids for c in four] == [c.ids for items in made for c in items]
    told = model.adding(Prefix([{"role": "system", "content": "Be brief."}]))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert generate(told, ["hello"], max_tokens=9) == generate(model, [said], max_tokens=9)


def test_a_forced_opening_goes_on(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sure, it"}]
    made = generate(model, [said], greedy=True, max_tokens=7)[0][0]
    loaded = model.load_module()
    ids = prompt_ids(loaded.tokenizer, "hello") + loaded.tokenizer.encode("Sure, it")
    ((expected,),) = continued(loaded, [ids], SamplingSettings(max_tokens=7, greedy=True))
    assert tuple(expected.ids) == tuple(made.ids)


def test_stored_rows_are_drawn_once(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.open(tiny_path)
    with use(Context(seed=1, folder=tmp_path)):
        first = generate(model, ["a", "b"], n=2, max_tokens=5)
    monkeypatch.setattr("truing.core.drawing.sample", None)
    with use(Context(seed=1, folder=tmp_path)):
        assert generate(model, ["a", "b"], n=2, max_tokens=5) == first
        with pytest.raises(TypeError):
            generate(model, ["a", "c"], n=2, max_tokens=5)


def test_token_ids_go_on_without_a_template(tiny_path: Path) -> None:
    loaded = Model.open(tiny_path).load_module()
    how = SamplingSettings(max_tokens=6, greedy=True, stop_ids=())
    ((made,),) = continued(loaded, [PROMPTS[0]], how)
    assert list(made.ids) == drawn(PROMPTS[:1], max_tokens=6, greedy=True)[0][0].ids


def test_one_stop_text_is_no_list_of_letters(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    how = {"max_tokens": 24, "greedy": True}
    text = generate(model, ["Hello there"], **how)[0][0].text  # type: ignore[arg-type]
    stop = text[5:8]
    one = generate(model, ["Hello there"], stop=stop, **how)  # type: ignore[arg-type]
    assert one == generate(model, ["Hello there"], stop=[stop], **how)  # type: ignore[arg-type]
    assert one[0][0].text == text[: text.index(stop)] and one[0][0].finish == "stop"
    with pytest.raises(InputError, match="stop must be"):
        generate(model, ["Hello there"], stop=[""])


@pytest.mark.parametrize("prompts", ["Hello there", [{"role": "user", "content": "Hello there"}]])
def test_one_prompt_is_no_list_of_letters(prompts: Sequence[object], tiny_path: Path) -> None:
    with pytest.raises(InputError, match="takes a list of prompts") as error:
        generate(Model.open(tiny_path), prompts)
    assert "generate(model, [prompt])" in error.value.fix
    assert len(generate(tiny_path, [prompts], max_tokens=1)) == 1


def test_a_model_is_given_by_name(tiny_path: Path) -> None:
    named = [generate(p, ["Hello"], max_tokens=4) for p in (tiny_path, str(tiny_path))]
    assert named == [generate(Model.open(tiny_path), ["Hello"], max_tokens=4)] * 2
    with pytest.raises(InputError, match=r"generate: .*unknown model 'tiniest'"):
        generate("tiniest", ["Hello"])
    with pytest.raises(InputError, match="argument 'model' takes a Model") as error:
        generate(3, ["Hello"])  # type: ignore[arg-type]
    assert error.value.fix


@pytest.mark.parametrize(
    "form", [tuple, np.array, iter, dict.fromkeys, lambda p: dict.fromkeys(p).keys()]
)
def test_prompts_come_in_any_order_of_texts(form: Callable[[list[str]], object]) -> None:
    asked = ["Why?", "How?"]
    assert _as_prompts(form(asked)) == asked  # type: ignore[arg-type]
    with pytest.raises(InputError, match="list of prompts"):
        _as_prompts("Why?")
    with pytest.raises(InputError, match="list of prompts"):
        _as_prompts([{"role": "user", "content": "Why?"}])
