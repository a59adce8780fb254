"""Scoring with the prefix computed once: the scores of transformers' own code over whole rows, one by one, whatever the
family, the prefix and the company; and models that cannot share go on without."""

import copy
import logging
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForSequenceClassification

from aisp_dist.engine import attention
from aisp_dist.rewards import prefix
from aisp_dist.rewards.prefix import Classifier

SHARING = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_oss", "opt"]
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_OTHER = {
    "bert": {**_SIZE, "initializer_range": 0.5, "pad_token_id": 0},
    "deberta-v2": {**_SIZE, "initializer_range": 0.5, "pad_token_id": 0},
    "dynamic": {
        **tiny.FAMILIES["llama"],
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    },
}
_TYPES = {"gemma3": "gemma3_text", "dynamic": "llama"}


def tokens(count, seed):
    return tuple(torch.randint(4, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


PREFIX = tokens(37, 0)
LONG = tokens(31, 1)
# The prefix itself, one row that another begins with, and all lengths between; windows of the tiny models are 8.
ROWS = sorted(
    (PREFIX, PREFIX + LONG, PREFIX + LONG[:4], *(PREFIX + tokens(n, n) for n in (1, 3, 9, 20, 23))),
    key=lambda row: (len(row), row),
)


def model(family, dtype=torch.float32, cls=AutoModelForSequenceClassification, **more):
    settings = {**(_OTHER.get(family) or tiny.FAMILIES[family]), **more}
    settings |= {"vocab_size": 260, "num_labels": 1, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(_TYPES.get(family, family), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = cls if cls is not AutoModelForSequenceClassification else cls.from_config
        return build(config).to(dtype).eval()


@torch.inference_mode()
def one_by_one(model, rows):
    """By transformers alone; eager, as sdpa has no softcap."""
    alone = copy.deepcopy(model)
    if alone._can_set_attn_implementation():
        alone.set_attn_implementation("eager")
    alone.config.pad_token_id = alone.config.get_text_config().pad_token_id = None
    return [alone(input_ids=torch.tensor([row])).logits.item() for row in rows]


def sharing(family, **more):
    """A classifier that shares prefixes, and the scores of ROWS."""
    made = model(family, **more)
    want = one_by_one(made, ROWS)
    classifier = Classifier(made)
    assert classifier.shares
    return classifier, want


def embedded(run):
    """Shapes [B, T] of what the model embeds meanwhile."""
    shapes = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape)) if isinstance(module, torch.nn.Embedding) else None
    )
    run()
    hook.remove()
    return shapes


@pytest.mark.parametrize("family", SHARING)
def test_scores_are_those_of_whole_rows_one_by_one(family):
    classifier, want = sharing(family)
    assert max(want) - min(want) > 0.1
    for batch_rows in (32, 3, 1):
        assert classifier.logits(ROWS, batch_rows) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_queries_in_chunks_see_the_same(family, monkeypatch):
    classifier, want = sharing(family)
    monkeypatch.setattr(prefix, "_CHUNK", 128)
    assert classifier.logits(ROWS, 32) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_any_rows_will_do(family):
    made = model(family)
    low_ends = [(*PREFIX, 5, 0), (*PREFIX, 6, 0, 0, 1)]  # an end that was taken for padding would move the score
    all_tokens = [PREFIX + tuple(range(130)), PREFIX + tuple(range(130, 260))]  # none is left for padding
    cases = [
        ROWS[:1],
        ROWS[-1:],
        [(7,), (7, 8), (9, 7, 7)],
        [(7, 1), (8, 1, 1)],
        [(7,), (8,)],
        ROWS[:2],
        low_ends,
        all_tokens,
    ]
    want = [one_by_one(made, rows) for rows in cases]
    classifier = Classifier(made)
    for rows, scores in zip(cases, want, strict=True):
        assert classifier.logits(rows, 32) == pytest.approx(scores, abs=1e-5), rows
    assert classifier.logits([], 32) == []


def test_padding_takes_no_position_that_is_not_there():
    classifier, want = sharing("gpt2", n_positions=len(ROWS[-1]))
    assert classifier.logits(ROWS[1:], 32) == pytest.approx(want[1:], abs=1e-5)


def test_the_prefix_is_computed_once_and_alone():
    classifier, _ = sharing("llama")
    rows = [row for row in ROWS if len(row) > len(PREFIX)]
    first = embedded(lambda: classifier.logits(rows, 4))
    assert first == [(1, 64), (4, 16), (3, 32)]  # 37 tokens, padded for the kernels; own tokens only
    assert embedded(lambda: classifier.logits(rows, 4)) == first[1:]
    assert embedded(lambda: classifier.logits(rows[-1:], 4)) == [(1, 72)]  # a row alone is one pass


def test_few_prefixes_are_kept(monkeypatch):
    monkeypatch.setattr(prefix, "_KEPT_TOKENS", 80)
    classifier, _ = sharing("llama")
    requests = [[(*start, 1), (*start, 2)] for start in (PREFIX, PREFIX[::-1], PREFIX[:9])]
    prefilled = [len(embedded(lambda rows=requests[i]: classifier.logits(rows, 32))) - 1 for i in (0, 1, 0, 2, 0, 1)]
    assert prefilled == [1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_request_has_the_same_bits_whatever_came_before(family, dtype):
    classifier, _ = sharing(family, dtype=dtype)
    want = classifier.logits(ROWS, 3)
    assert classifier.logits(ROWS, 3) == want
    for rows in (ROWS[::2], [PREFIX[:20] + tokens(5, 50), PREFIX[:20]], ROWS[:1]):
        classifier.logits(rows, 3)
        assert classifier.logits(ROWS, 3) == want
    fresh, _ = sharing(family, dtype=dtype)
    fresh.logits(ROWS[-2:], 3)
    assert fresh.logits(ROWS, 3) == want


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2", "llama"])
def test_a_window_or_a_position_off_by_one_would_be_seen(family):
    """The passes by hand: right as they are, and clearly wrong if one thing is."""
    classifier, want = sharing(family)
    pad, longest = classifier._set_pad(ROWS), len(LONG)
    length = len(PREFIX)
    own = [(*row[length:], *[pad] * (longest - len(row) + length)) for row in ROWS[1:]]

    @torch.inference_mode()
    def error(window=0, position=0, kept=0):
        shared = classifier._prefill(PREFIX)
        kv = [(k[:, kept:], v[:, kept:]) for k, v in shared.kv]

        def attend(layer, *qkv):
            layer = replace(layer, window=layer.window + window) if layer.window else layer
            return prefix.Extend(length, kv)(layer, *qkv)

        scores = classifier._run(attend, own, length + position, longest).logits[:, 0].tolist()
        return max(abs(a - b) for a, b in zip(scores, want[1:], strict=True))

    assert error() < 1e-5
    assert error(position=1) > 1e-3 and error(position=-1) > 1e-3 and error(kept=1) > 1e-3
    if family in ("mistral", "gemma3"):
        assert error(window=-1) > 1e-3 and error(window=1) > 1e-3


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "falcon", "bloom", "dynamic"])
def test_other_models_score_whole_rows_and_say_so_once(family, caplog):
    made = model(family)
    want = one_by_one(made, ROWS)
    with caplog.at_level(logging.WARNING, "aisp_dist"):
        classifier = Classifier(made)
        got = classifier.logits(ROWS, 4)
    assert got == pytest.approx(want, abs=1e-5) and max(want) - min(want) > 0.1
    (record,) = [r for r in caplog.records if r.name.startswith("aisp_dist")]
    assert "whole prompt" in record.message and not classifier.shares


def test_an_encoder_does_not_share_where_rounding_hides_it():
    assert not Classifier(model("bert", torch.bfloat16, initializer_range=0.02)).shares


class Counting(LlamaForSequenceClassification):
    """Rewards that depend on the prompt's tokens beside the attention, which no probe can see."""

    def forward(self, input_ids=None, **more):
        out = super().forward(input_ids=input_ids, **more)
        out.logits = out.logits + (input_ids == PREFIX[5]).sum(-1, keepdim=True)
        return out


def test_a_models_own_code_is_not_trusted_with_parts_of_rows():
    made = model("llama", cls=Counting)
    want = one_by_one(made, ROWS)
    assert Classifier(made).logits(ROWS, 4) == pytest.approx(want, abs=1e-5)


def test_a_model_of_nan_still_answers():
    made = model("llama")
    with torch.no_grad():
        made.score.weight.fill_(torch.nan)
    classifier = Classifier(made)
    assert all(score != score for score in classifier.logits(ROWS, 4)) and not classifier.shares


def test_a_sharing_model_attends_by_a_pass_alone():
    classifier, _ = sharing("llama")
    with pytest.raises(RuntimeError, match="engine"):
        classifier.model(input_ids=torch.tensor([PREFIX]))
    assert classifier.model.config._attn_implementation == attention.NAME
